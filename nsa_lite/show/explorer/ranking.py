"""The order in which a query takes its blocks, so that what it selects is a beginning of it."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_lite import Trace
from nsa_lite.blocks import forced_blocks, visible_select_blocks

TIE = 1e-4  # of a row's largest score: two computations of one score may differ by so much
AT_ONCE = 2**18  # numbers: ranked in chunks that stay in a cache, queries need little memory
KEPT = 2**22  # numbers: of 65,536 queries of one group the best 64 blocks are kept
ID_BITS = 20  # of a sort key; a million blocks


class Ranking(NamedTuple):
    """The order of a layer's blocks for each group and query, and how many of them were taken.

    Shapes: order (G, Q, ranks) int64 holds the first `ranks` blocks, each once, those that start
    after the query last; score (G, Q, ranks) float32 are their importances and largest (G, Q) that
    of all blocks; taken (G, Q): as many from the front are the trace's own choice; forced (G, Q):
    as many of these were taken whatever their scores. by_score: the rest of the order is that of
    the scores, and for another n the first n blocks are the choice.
    """

    order: Tensor
    score: Tensor
    largest: Tensor
    taken: Tensor
    forced: Tensor
    by_score: bool


def rank_blocks(trace: Trace, row: int, positions: Tensor, ranks: int) -> Ranking:
    """Rank the blocks of one sequence of a batch: forced, taken, left out, not begun.

    Within the middle two the higher score goes first, ties to the lower id, and a score that is
    NaN counts as 0, as in the layer. That the trace's own blocks go before those it left out
    settles only ties, if it chose by score; if it did not, it keeps what was chosen in front.
    positions (Q,): where the trace's queries stand.
    """
    size = max(1, AT_ONCE // trace.importance[row, :, 0].numel())
    chunks = (slice(first, first + size) for first in range(0, len(positions), size))
    parts = list(_rank_some(trace, row, positions, ranks, chunks))
    *columns, by_score = zip(*parts, strict=True)
    return Ranking(*(torch.cat(column, dim=1) for column in columns), by_score=all(by_score))


def kept_ranks(groups: int, queries: int, blocks: int, taken: int) -> int:
    """How many of each query's blocks a ranking keeps: all, unless they are too many to hold.

    At least the `taken` ones and one more, so that the margin between the two is known.
    """
    return min(blocks, max(taken + 1, KEPT // (groups * queries)))


def _rank_some(
    trace: Trace, row: int, positions: Tensor, ranks: int, chunks: Iterator[slice]
) -> Iterator[Ranking]:
    c = trace.config
    blocks = trace.importance.shape[-1]
    for some in chunks:
        raw = trace.importance[row, :, some].float().cpu()  # (G, chunk, J)
        score = raw.nan_to_num(nan=0.0)
        t = positions[some]
        legal = visible_select_blocks(t, blocks, c.select_block_size)
        forced = forced_blocks(t, blocks, c.select_block_size, c.num_initial, c.num_local)
        taken = mask_of(trace.ids[row, :, some].cpu(), blocks)
        order = sort_keys(score, taken, forced, legal).topk(ranks, largest=False).indices
        yield Ranking(
            order=order,
            score=raw.gather(-1, order),
            largest=score.amax(-1),
            taken=taken.sum(-1),
            forced=(taken & forced).sum(-1),
            by_score=_chosen_by_score(score, taken, legal, forced, c.num_selected),
        )


def sort_keys(score: Tensor, taken: Tensor, forced: Tensor, legal: Tensor) -> Tensor:
    """A number for each block, no two of a row alike: the smallest goes first.

    Its highest bits are the block's turn, then come those of its score, the lowest are its id. So
    ties go to the lower id in any sort, also in one that looks for the first few only.
    """
    turn = torch.where(taken, 1, torch.where(legal, 2, 3)).masked_fill(taken & forced, 0)
    by_id = (turn == 0) | (turn == 3)
    falling = (2**31 - 1 - in_order(score)).masked_fill(by_id, 0)
    ids = torch.arange(score.shape[-1])
    return (turn << (32 + ID_BITS)) + (falling << ID_BITS) + ids


def in_order(x: Tensor) -> Tensor:
    """Whole numbers -2^31 .. 2^31 - 1 that compare as the float32 numbers x do."""
    bits = (x + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 the 0.0 that it equals
    return torch.where(bits < 0, -(2**31) - 1 - bits, bits)


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
