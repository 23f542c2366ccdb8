"""Faults that notebook 06 must notice: in the top n, the importance, the teachers, the records."""

from collections.abc import Callable

from torch import Tensor

from nsa_lite.lab.border_runs import Arm


def worst_blocks(best_blocks):
    """The lowest scores are chosen."""
    return lambda score, *sizes: best_blocks(-score, *sizes)


def ties_to_the_higher(best_blocks):
    """Of equal scores the block with the higher id, as if the scores rose a little with the id."""

    def wrong(score: Tensor, *sizes):
        rising = score.new_tensor(range(score.shape[-1])) * 1e-6
        return best_blocks(score + rising, *sizes)

    return wrong


def first_head_only(shared_out):
    """Eq. 10 without its sum over heads."""
    return lambda p, *sizes: shared_out(p[:, :, :1], *sizes)


def targets_only(bce_over_softmax):
    """Without the loss on the blocks that are no targets."""
    return lambda z, m, among: -(m * z.log_softmax(-1)).sum(-1)


def two_rules_swapped(results):
    """The records of bce and kl under each other's name."""

    def wrong():
        found = results()
        found["nsa-kl"], found["nsa-bce"] = found["nsa-bce"], found["nsa-kl"]
        return found

    return wrong


def swapped(one: Arm, other: Arm) -> Callable:
    """The border's records of two arms under each other's name, in a record that has both."""

    def fault(results):
        def wrong(record):
            found = results(record)
            if one in found and other in found:
                found[one], found[other] = found[other], found[one]
            return found

        return wrong

    return fault


def taught(attention: str, block_size: int = 8) -> Arm:
    """The arm of span 2 with this attention."""
    return Arm(block_size, attention=attention)


BORDER = "nsa_lite.lab.border_runs.results"
SWAPPED = {
    "spans": (Arm(8, 1), Arm(8, 8)),
    "half and an eighth": (Arm(4, 2), Arm(16, 2)),
    "the teacher and none": (taught("nsa-own-kl-first", 16), taught("nsa-all-first", 16)),
    "bce and none": (taught("nsa-bce"), Arm()),
    "all blocks first": (taught("nsa-all-first"), taught("nsa-own-kl")),
    "no selection": (taught("nsa-no-selection"), Arm()),
    "whose keys": (taught("nsa-shut"), taught("nsa-moba-shut")),
    "taught, gate shut": (taught("nsa-kl-shut"), taught("nsa-quest-shut")),
    "private keys taught": (taught("nsa-own-kl-first-shut"), taught("nsa-shut")),
    "the rates": (Arm(span=4, lr=1e-3), Arm(span=4, lr=4e-3)),
    "the short stage": (Arm(starts_whole=False), Arm(noise=0.0)),
    "phi": (Arm(span=4, phi="mlp"), Arm(span=4, phi="mean")),
    "read alone, once": (Arm(16, 4, attention="nsa-no-selection"), Arm(16, 2)),
    "a choice that left chance": (Arm(32, 4), Arm(32, 1)),
    "short facts taught": (taught("nsa-own-kl-first", 32), Arm(32, 2)),
    "grown blocks": (Arm(16, first_size=4), Arm(16)),
}

SHARED_OUT = "nsa_lite.selection.shared_out"
MUTATIONS = [
    ("the worst blocks", "nsa_lite.selection.best_blocks", worst_blocks, "# Checkpoint 1"),
    ("ties", "nsa_lite.selection.best_blocks", ties_to_the_higher, "# Checkpoint 1"),
    ("head 0 only", SHARED_OUT, first_head_only, "# Checkpoint 2"),
    ("no control", "cell", "answer_at.roll(1, 0)", "answer_at.roll(0, 0)", "# Checkpoint 2"),
    ("BCE", "nsa_lite.rivals.taught.bce_over_softmax", targets_only, "# Checkpoint 3"),
    ("records", "nsa_lite.lab.rule_runs.results", two_rules_swapped, "# Checkpoint 4"),
    ("no teacher", "cell", "choose = starters.OwnKL(plan.nsa)", "choose = None", "# Checkpoint 5"),
    *(
        (f"border: {name}", BORDER, swapped(*pair), "# Checkpoint 5")
        for name, pair in SWAPPED.items()
    ),
    ("a rule's worst", "cell", "products.amax(-1)", "products.amin(-1)", "# Checkpoint 6"),
]
