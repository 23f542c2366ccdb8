"""The order in which a query takes its blocks, so that what it selects is a beginning of it."""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa_lite import Trace
from nsa_lite.blocks import forced_blocks, visible_select_blocks

TIE = 1e-4  # of a row's largest score: two computations of one score may differ by so much


class Ranking(NamedTuple):
    """The order of a layer's blocks for each group and query, and how many of them were taken.

    Shapes: order (G, T, J) int64 holds every block once, those that start after the query last;
    taken (G, T): as many from the front are the trace's own choice; forced (G, T): as many of
    these were taken whatever their scores. by_score: the rest of the order is that of the scores,
    and for another n the first n blocks are the choice.
    """

    order: Tensor
    taken: Tensor
    forced: Tensor
    by_score: bool


def rank_blocks(trace: Trace, row: int) -> Ranking:
    """Rank the blocks of one sequence of a batch: forced, taken, left out, not begun.

    Within the middle two the higher score goes first, ties to the lower id, and a score that is
    NaN counts as 0, as in the layer. That the trace's own blocks go before those it left out
    settles only ties, if it chose by score; if it did not, it keeps what was chosen in front.
    """
    score = trace.importance[row].cpu().nan_to_num(nan=0.0)  # (G, T, J)
    _, queries, blocks = score.shape
    positions = torch.arange(trace.start, trace.start + queries)
    c = trace.config
    legal = visible_select_blocks(positions, blocks, c.select_block_size)
    forced = forced_blocks(positions, blocks, c.select_block_size, c.num_initial, c.num_local)
    taken = mask_of(trace.ids[row].cpu(), blocks)
    turn = torch.where(taken, 1, torch.where(legal, 2, 3)).masked_fill(taken & forced, 0)
    by_id = (turn == 0) | (turn == 3)
    by_score = score.masked_fill(by_id, 0.0).sort(dim=-1, descending=True, stable=True).indices
    by_turn = turn.gather(-1, by_score).sort(dim=-1, stable=True).indices
    return Ranking(
        order=by_score.gather(-1, by_turn),
        taken=taken.sum(-1),
        forced=(taken & forced).sum(-1),
        by_score=_chosen_by_score(score, taken, legal, forced, c.num_selected),
    )


def mask_of(ids: Tensor, blocks: int) -> Tensor:
    """Which blocks are among the ids, -1 is padding: (G, T, n) -> bool (G, T, blocks)."""
    mask = torch.zeros(*ids.shape[:2], blocks + 1, dtype=torch.bool)  # one more column: -1
    return mask.scatter(-1, ids.long().where(ids >= 0, blocks), True)[..., :blocks]


def _chosen_by_score(
    score: Tensor, taken: Tensor, legal: Tensor, forced: Tensor, num_selected: int
) -> bool:
    """Whether every query took the forced blocks and then the best, n in all, but for ties."""
    full = taken.sum(-1) == legal.sum(-1).clamp(max=num_selected)
    lowest = score.masked_fill(~taken | forced, torch.inf).amin(-1)
    best_left = score.masked_fill(taken | ~legal, -torch.inf).amax(-1)
    ordered = lowest >= best_left - TIE * score.amax(-1).abs()
    return bool((full & ordered).all() and (taken | ~forced).all())
