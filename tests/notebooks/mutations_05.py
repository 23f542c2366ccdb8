"""Faults that notebook 05 must notice: in gates and sum, in each step of the layer, in the cost."""

import torch

IMPORTANCE = "nsa_lite.selection.importance_of"


def softmax_gates(forward):
    """Gates that sum to 1."""
    return lambda gate, x: gate.mlp(x).unflatten(-1, (gate.heads, 3)).softmax(-1).transpose(1, 2)


def gates_by_branch_first(forward):
    """The MLP's columns read as (branch, head)."""
    return lambda gate, x: gate.mlp(x).sigmoid().unflatten(-1, (3, gate.heads)).permute(0, 3, 1, 2)


def branches_swapped(gated_sum):
    """The selected branch's gate weighs the window."""
    return lambda gates, outputs: gated_sum(gates, (outputs[0], outputs[2], outputs[1]))


def never_quite_shut(forward):
    """A gate stays above a thousandth."""
    return lambda gate, x: forward(gate, x).clamp(min=1e-3)


def infinite_rows(masked_softmax):
    """A row with no allowed key is 0 / 0."""

    def wrong(scores, mask):
        scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1), scores.logsumexp(-1)

    return wrong


def first_head_only(shared_out):
    """Eq. 10 without its sum over heads."""
    return lambda p, *sizes: shared_out(p[:, :, :1], *sizes)


def negated(importance_of):
    """The worst blocks first."""
    return lambda *arguments: -importance_of(*arguments)


def a_block_late(importance_of):
    """Each block has its neighbour's score."""
    return lambda *arguments: importance_of(*arguments).roll(1, -1)


def logits_summed(probabilities):
    """One softmax of the heads' summed scores, where Eq. 10 sums probabilities."""

    def wrong(q, k, lse, **sizes):
        p = probabilities(q, k, lse, **sizes)
        return p.log().sum(2, keepdim=True).softmax(-1).nan_to_num(nan=0.0)

    return wrong


def one_id_less(best_blocks):
    """The last chosen block is left out."""

    def wrong(*arguments):
        ids = best_blocks(*arguments)
        return torch.cat([ids[..., :-1], torch.full_like(ids[..., -1:], -1)], -1)

    return wrong


def one_key_more(attend_in_window):
    """The window reads t - w too."""
    return lambda q, k, v, window, *rest: attend_in_window(
        q, k, v, window if window is None else window + 1, *rest
    )


def window_forgotten(tokens_read):
    """The cost without the window."""
    return lambda config, t: {**tokens_read(config, t), "window": 0}


def stride_is_the_block(paper_tokens):
    """T / l in place of T / d."""
    return lambda config, T: paper_tokens(config, T) - T // config.stride + T // config.block_size


GATE = "nsa_lite.gates.Gate.forward"
MUTATIONS = [
    ("gates softmaxed", GATE, softmax_gates, "# Checkpoint 1"),
    ("heads and branches mixed", GATE, gates_by_branch_first, "# Checkpoint 1"),
    ("branches swapped", "nsa_lite.gates.gated_sum", branches_swapped, "# Checkpoint 1"),
    ("NaN rows", "nsa_lite.attention.masked_softmax", infinite_rows, "# Checkpoint 1"),
    ("head 0 only", "nsa_lite.selection.shared_out", first_head_only, "# Checkpoint 2"),
    ("importance negated", IMPORTANCE, negated, "# Checkpoint 2"),
    ("a block late", IMPORTANCE, a_block_late, "# Checkpoint 2"),
    (
        "logits summed",
        "nsa_lite.selection.compressed_probabilities",
        logits_summed,
        "# Checkpoint 2",
    ),
    ("a block left out", "nsa_lite.selection.best_blocks", one_id_less, "# Checkpoint 2"),
    ("w + 1 keys", "nsa_lite.attention.attend_in_window", one_key_more, "# Checkpoint 2"),
    ("a gate never shut", GATE, never_quite_shut, "# Checkpoint 3"),
    ("the wrong gate shut", "cell", ".bias.data[0::3]", ".bias.data[1::3]", "# Checkpoint 3"),
    ("no window in the cost", "nsa_lite.cost.tokens_read", window_forgotten, "# Checkpoint 4"),
    ("T / l tokens", "nsa_lite.cost.paper_tokens", stride_is_the_block, "# Checkpoint 4"),
    (
        "a blind test of causality",
        "cell",
        "return all(torch.equal(",
        "return any(torch.equal(",
        "# Checkpoint 5",
    ),
    ("no fault planted", "cell", "right(q, k).roll(1, -1)", "right(q, k)", "# Checkpoint 5"),
]
