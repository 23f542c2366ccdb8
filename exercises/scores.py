"""Scores that a careless softmax does not survive, and what a check says of it."""

import torch
from torch import Tensor

EXTREME = 88.0  # beyond, exp is infinite in float32; a little further below 0 it is 0
APART = 40.0  # exp(-APART) is nothing beside 1, so that a log-sum-exp is the largest score itself
OVERFLOW = (
    "exp of a large score overflows, and of a very negative one it is 0: subtract the row's own "
    "largest score first"
)


def far_below(q: Tensor, k: Tensor, below: float) -> tuple[Tensor, Tensor]:
    """Queries and keys like these, whose scaled scores lie about `below` under 0.

    Their width must be a square. The scores of a query are whole numbers, APART or more from each
    other: float32 holds them, and what a softmax makes of them, without rounding.
    """
    root = q.shape[-1] ** 0.5
    queries = torch.zeros_like(q)
    queries[..., 0] = 1.0
    queries[..., 1] = torch.where(q[..., 1] < 0, -1.0, 1.0)
    keys = torch.zeros_like(k)
    keys[..., 0] = -below * root
    keys[..., 1] = APART * root * places(k[..., 1])
    return queries, keys


def rising(q: Tensor, k: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Queries and keys like these, where each key's scaled score is `step` above the one before."""
    queries = torch.zeros_like(q)
    queries[..., 0] = 1.0
    keys = torch.zeros_like(k)
    keys[..., 0] = step * q.shape[-1] ** 0.5 * torch.arange(k.shape[-2])
    return queries, keys


def places(x: Tensor) -> Tensor:
    """The place of each number among its row's, from 0: whole numbers in a random order."""
    return x.argsort(-1).argsort(-1).to(x.dtype)
