"""Set 08's mistakes that the check of 08.1 knows by what they give."""

from torch import Tensor

from exercises.records import Mistake


def picked(mass: Tensor, ids: Tensor) -> Tensor:
    """The mass of each chosen block, (queries, n); 0 for the padding."""
    return mass.gather(1, ids.long().clamp(min=0)) * (ids >= 0)


COVERED = [
    Mistake(
        "-1 read from the end",
        lambda mass, ids: mass.gather(1, ids.long() % mass.shape[1]).sum(1),
        "-1 is padding, and was read as the last block",
    ),
    Mistake(
        "-1 clamped, not masked",
        lambda mass, ids: mass.gather(1, ids.long().clamp(min=0)).sum(1),
        "-1 is padding, and was read as block 0",
    ),
    Mistake(
        "mean of the chosen",
        lambda mass, ids: picked(mass, ids).sum(1) / (ids >= 0).sum(1).clamp(min=1),
        "the mean of the chosen blocks was taken, not their sum",
    ),
    Mistake(
        "divided by the number of ids",
        lambda mass, ids: picked(mass, ids).mean(1),
        "the sum was divided by the number of ids",
    ),
    Mistake(
        "row of query 0",
        lambda mass, ids: picked(mass[:1].expand_as(mass), ids).sum(1),
        "every query got the mass of query 0",
    ),
    Mistake(
        "what is left out",
        lambda mass, ids: 1 - picked(mass, ids).sum(1),
        "this is what the choice leaves out",
    ),
    Mistake(
        "blocks counted",
        lambda mass, ids: (ids >= 0).sum(1).to(mass),
        "the number of blocks was counted, not their mass",
    ),
    Mistake(
        "largest only",
        lambda mass, ids: picked(mass, ids).amax(1),
        "the largest of the chosen blocks was taken, not their sum",
    ),
]
