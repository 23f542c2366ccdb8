"""Faults that the checkpoints of notebook 01 must see."""

import torch


def next_key_too(old):
    """Each query reads the key behind itself as well."""
    return lambda q, start=0: old(q, start) + 1


def own_key_left_out(old):
    return lambda q, start=0: (old(q, start) - 1).clamp(min=0)


def twice_the_scale(old):
    return lambda q, k, mask, scale: old(2 * q, k, mask, scale)


def even_where_nothing_is_seen(old):
    """An empty row gets equal weights, as a finite sentinel in place of -inf would give."""

    def masked_softmax(scores, mask):
        p, lse = old(scores, mask)
        return p.where(mask.any(-1, keepdim=True), 1 / scores.shape[-1]), lse

    return masked_softmax


def nan_where_nothing_is_seen(old):
    def masked_softmax(scores, mask):
        scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1), scores.logsumexp(-1)

    return masked_softmax


def logarithm_to_base_2(old):
    def masked_softmax(scores, mask):
        p, lse = old(scores, mask)
        return p, lse * 1.442695

    return masked_softmax


def heads_dealt_out_in_turn(old):
    """Head h reads key/value head h % G."""

    def attention_probabilities(q, k, mask, scale):
        groups = k.shape[1]
        dealt = q.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2)
        return old(dealt, k, mask, scale)

    return attention_probabilities


def bytes_of_every_head(old):
    """Each query head loads its keys and values for itself."""

    def query_cost(config, *more):
        one = old(config, *more)
        return type(one)(one.tokens, one.flops, one.bytes * config.group_size)

    return query_cost


def half_the_work(old):
    """A multiplication and an addition counted as one."""

    def query_cost(config, *more):
        one = old(config, *more)
        return type(one)(one.tokens, one.flops / 2, one.bytes)

    return query_cost


MUTATIONS = [
    ("mask off by one", "nsa_lite.blocks.query_positions", next_key_too, "# Checkpoint 1"),
    ("own key left out", "nsa_lite.blocks.query_positions", own_key_left_out, "# Checkpoint 1"),
    (
        "scores too large",
        "nsa_lite.attention.attention_probabilities",
        twice_the_scale,
        "# Checkpoint 1",
    ),
    (
        "loop without scale",
        "cell",
        "scores[s] = q[t] @ k[s] / D**0.5",
        "scores[s] = q[t] @ k[s]",
        "# Checkpoint 1",
    ),
    (
        "the late mask repaired",
        "cell",
        "p = (q @ k.T / q.shape[1] ** 0.5).softmax(dim=-1)",
        "p = (q @ k.T / 2).masked_fill(later, -torch.inf).softmax(dim=-1)",
        "# Checkpoint 2",
    ),
    ("another token changed", "cell", "v2[10] += 3", "v2[9] += 3", "# Checkpoint 2"),
    (
        "an empty row counts evenly",
        "nsa_lite.attention.masked_softmax",
        even_where_nothing_is_seen,
        "# Checkpoint 3",
    ),
    (
        "an empty row is NaN",
        "nsa_lite.attention.masked_softmax",
        nan_where_nothing_is_seen,
        "# Checkpoint 3",
    ),
    ("lse to base 2", "nsa_lite.attention.masked_softmax", logarithm_to_base_2, "# Checkpoint 3"),
    (
        "pieces weigh the same",
        "cell",
        "out[t] = weight @ outs[:, t] / weight.sum()",
        "out[t] = outs[:, t].mean(0)",
        "# Checkpoint 3",
    ),
    (
        "heads dealt out in turn",
        "nsa_lite.attention.attention_probabilities",
        heads_dealt_out_in_turn,
        "# Checkpoint 4",
    ),
    (
        "start ignored",
        "nsa_lite.blocks.query_positions",
        lambda old: lambda q, start=0: old(q, 0),
        "# Checkpoint 4",
    ),
    (
        "each decoded token at position 0",
        "nsa_lite.cache.Cache.next_positions",
        lambda old: lambda self, count: torch.arange(count),
        "# Checkpoint 4",
    ),
    (
        "groups not shared in bytes",
        "nsa_lite.cost.query_cost",
        bytes_of_every_head,
        "# Checkpoint 5",
    ),
    ("half the FLOPs", "nsa_lite.cost.query_cost", half_the_work, "# Checkpoint 5"),
    (
        "one of two FLOPs in a score",
        "cell",
        "(2 * D * square, q + k, square)",
        "(D * square, q + k, square)",
        "# Checkpoint 5",
    ),
]
