"""Set 08's mistakes that the checks of 08.1 and 08.4 know by what they give."""

import math
from collections.abc import Callable

import torch
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

# --- 08.4: a teacher for the choice ---


def shares_of(mass: Tensor, among: Tensor) -> Tensor:
    """The candidates' shares of their mass."""
    mass = mass.masked_fill(~among, 0.0)
    return mass / mass.sum(1, keepdim=True).clamp(min=1e-30)


def divergence(
    p=shares_of,
    z=lambda z, among: z.masked_fill(~among, -1e9),
    loss=lambda p, log_s: torch.xlogy(p, p) - p * log_s,
    add=lambda loss: loss.sum(1),
) -> Callable:
    """The divergence of the scores' shares from the teacher's."""

    def answer(scores: Tensor, mass: Tensor, among: Tensor) -> Tensor:
        log_s = z(scores, among).log_softmax(1)
        return add(loss(p(mass, among), log_s).masked_fill(~among, 0.0))

    return answer


TEACHERS = [
    Mistake(
        "cross-entropy",
        divergence(loss=lambda p, log_s: -p * log_s),
        "this is the cross-entropy: sum p log p is left out, and a perfect choice has a loss",
    ),
    Mistake(
        "the other way round",
        divergence(loss=lambda p, log_s: log_s.exp() * (log_s - p.clamp(min=1e-9).log())),
        "the divergence is the other way round: the teacher's shares are the weights",
    ),
    Mistake(
        "sign",
        divergence(loss=lambda p, log_s: p * log_s - torch.xlogy(p, p)),
        "the loss has the wrong sign: it would be largest where both agree",
    ),
    Mistake(
        "mass as it is",
        divergence(p=lambda mass, among: mass.masked_fill(~among, 0.0)),
        "the teacher's mass is taken as it is, and its shares must sum to 1 over the candidates",
    ),
    Mistake(
        "shares of all blocks",
        divergence(p=lambda mass, among: mass / mass.sum(1, keepdim=True)),
        "the teacher's shares are taken over all blocks, not over the candidates",
    ),
    Mistake(
        "softmax over all blocks",
        divergence(z=lambda z, among: z.clamp(min=-1e30)),
        "the softmax of z runs over all blocks, not over the candidates",
    ),
    Mistake(
        "0 for others",
        divergence(z=lambda z, among: z.masked_fill(~among, 0.0)),
        "blocks that are no candidates count in the softmax, with the score 0",
    ),
    Mistake(
        "softmax of the mass",
        divergence(
            p=lambda mass, among: mass.masked_fill(~among, -1e9).softmax(1).masked_fill(~among, 0.0)
        ),
        "the teacher's mass went through a softmax: it is divided by its sum",
    ),
    Mistake(
        "mean of the blocks",
        divergence(add=lambda loss: loss.mean(1)),
        "the terms are averaged over the blocks, not added",
    ),
    Mistake(
        "mean of the queries",
        divergence(add=lambda loss: loss.sum(1).mean().expand(len(loss))),
        "the queries are averaged, and each was to have its own loss",
    ),
    Mistake(
        "base 2",
        divergence(loss=lambda p, log_s: (torch.xlogy(p, p) - p * log_s) / math.log(2)),
        "the logarithm has base 2",
    ),
    Mistake(
        "squares",
        divergence(loss=lambda p, log_s: (p - log_s.exp()) ** 2),
        "the squared difference of the shares was taken",
    ),
    Mistake(
        "yes or no",
        divergence(
            loss=lambda p, log_s: -p * log_s - (1 - p) * (1 - log_s.exp()).clamp(min=1e-9).log()
        ),
        "this is a binary cross-entropy, block by block",
    ),
]
