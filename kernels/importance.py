"""Which blocks to read: the scores of Eq. 8-10, then the n best of each query (Eq. 11).

    scores   one program owns BLOCK_M tokens and the compressed keys that begin in BLOCK_J selection
             blocks:

             head 0: p  +  head 1: p  +  ..  +  head R-1: p      [M, N], summed in registers
             then the sums over each block's keys, weighted by |C_i ∩ S_j| / d (Eq. 9)

             A key is no longer than a block, so it reaches into its block and the next one at
             most. Each has its own sum, and a block's score is its own plus what the block
             before it passes on.

    top-n    one warp (four, beyond 1024 blocks) owns one query, all its block scores in registers.
             Forced blocks score inf. n - forced times a bar falls to the next lower score: chosen
             is what is not below it. Too many, through equal scores: one by one

Only the (2, B, G, T, blocks) sums reach memory: no head's probabilities ever do.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from kernels.checks import (
    check_counts,
    check_every_block,
    check_geometry,
    check_inputs,
    check_lse,
    check_most_blocks,
    check_start,
    scale_or_default,
)
from kernels.descriptors import descriptor, load_tile
from kernels.launching import grid_of, launch
from kernels.online_softmax import LOG2E, load_lse
from kernels.operations import in_batches, operation
from kernels.pieces import load_pieces, products
from kernels.rows import row_offsets, rows, rows_contiguous
from kernels.tile_sizes import blocks_in_a_tile, cdiv, tile_for, widths_of
from kernels.visible_keys import Keys, may_read

MOST_SCORES = 2**30  # float32 numbers that are held at a time: 4 GiB
STRETCH = 128  # queries: a multiple of every tile's, so that no tile is cut


class Choice(NamedTuple):
    """Compile-time: the size of a selection block, and how many a query reads, forced included."""

    select_block_size: int
    num_selected: int
    num_initial: int
    num_local: int


class Sizes(NamedTuple):
    """Runtime sizes: batch, groups, queries, compressed keys, blocks, first position, scale."""

    B: int
    G: int
    T: int
    S: int
    num_blocks: int
    start: int
    scale: float


class ScoreTile(NamedTuple):
    """Compile-time: tokens, keys and selection blocks of a tile."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_J: int


@triton.jit
def block_scores(
    desc_q,
    k,
    lse,
    score,
    sizes,
    KEYS: tl.constexpr,
    WIDTHS: tl.constexpr,
    TILE: tl.constexpr,
    SELECT_BLOCK_SIZE: tl.constexpr,
):
    """The scores of BLOCK_J blocks for BLOCK_M tokens, in two parts: their own, and passed on.

    Tiles: k [N, D], a head's q [M, D], the probabilities of all heads [M, N], as [M, J, N / J] by
    block, the scores [M, J]. Grid: tiles of blocks, tiles of tokens, batch x groups.
    """
    M: tl.constexpr = TILE.BLOCK_M
    N: tl.constexpr = TILE.BLOCK_N
    J: tl.constexpr = TILE.BLOCK_J
    D: tl.constexpr = WIDTHS.D
    BLOCK_D: tl.constexpr = WIDTHS.BLOCK_D
    KEYS_OF_A_BLOCK: tl.constexpr = SELECT_BLOCK_SIZE // KEYS.stride
    first = tl.program_id(1) * M
    if tl.program_id(0) * J * SELECT_BLOCK_SIZE > sizes.start + first + M - 1:
        return  # these blocks begin after the last of these tokens: nobody asks for their score
    b = tl.program_id(2) // sizes.G
    g = tl.program_id(2) % sizes.G
    token = first + tl.arange(0, M)
    j = tl.program_id(0) * J + tl.arange(0, N) // (N // J)
    i = tl.arange(0, N) % (N // J)
    key = j * KEYS_OF_A_BLOCK + i  # the i-th that begins in block j
    row_mask = token < sizes.T
    key_mask = (i < KEYS_OF_A_BLOCK) & (key < sizes.S)
    seen = may_read(key[None, :], sizes.start + token[:, None], sizes.S, KEYS)

    total = tl.zeros([M, N], tl.float32)
    k_tile = load_pieces(k.ptr, row_offsets(k.strides, b, g, key), key_mask, D, BLOCK_D)
    for r in range(WIDTHS.R):
        q_tile = load_tile(desc_q, b, g * WIDTHS.R + r, first, M, D, BLOCK_D)  # [M, D]
        at = (b.to(tl.int64) * sizes.G * WIDTHS.R + g * WIDTHS.R + r) * sizes.T + token
        s = products(q_tile, k_tile)
        total += tl.exp2(s * (sizes.scale * LOG2E) - load_lse(lse, at, row_mask)[:, None])
    total = tl.where(key_mask[None, :] & seen, total, 0.0)  # Eq. 10: a sum of probabilities
    block = tl.program_id(0) * J + tl.arange(0, J)
    keep = row_mask[:, None] & (block < sizes.num_blocks)[None, :]
    for part in tl.static_range(2):
        sums = sums_of_blocks(total, i, part, J, KEYS, SELECT_BLOCK_SIZE)
        row = (part * sizes.B * sizes.G + tl.program_id(2).to(tl.int64)) * sizes.T + token
        tl.store(score + row[:, None] * sizes.num_blocks + block[None, :], sums, mask=keep)


@triton.jit
def sums_of_blocks(
    p, i, PART: tl.constexpr, J: tl.constexpr, KEYS: tl.constexpr, SELECT_BLOCK_SIZE: tl.constexpr
):
    """Eq. 9 within a tile p [M, N] of J blocks: [M, J].

    i [N] counts the keys that begin in a block. PART 0 sums what lies in their own block, PART 1
    what reaches into the block after it.
    """
    # By geometry: how many strides of a key lie in its block, and in the one after it.
    after = tl.maximum(i * KEYS.stride + KEYS.block_size - SELECT_BLOCK_SIZE, 0) // KEYS.stride
    weight = after if PART == 1 else KEYS.block_size // KEYS.stride - after
    weighted = p * weight.to(tl.float32)[None, :]
    return tl.sum(weighted.reshape(p.shape[0], J, p.shape[1] // J), 2)


@triton.jit
def top_blocks(
    score,
    ids,
    first,
    T,
    num_blocks,
    start,
    CHOICE: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """The ids of one query's n best blocks, ascending. Tile: its scores [BLOCK_J]."""
    SELECTED: tl.constexpr = CHOICE.num_selected
    token = first + tl.program_id(0)
    queries = tl.num_programs(1).to(tl.int64) * T
    query = tl.program_id(1).to(tl.int64) * T + token
    own = (start + token) // CHOICE.select_block_size
    j = tl.arange(0, BLOCK_J)
    taken = j <= own  # all that have begun
    if own >= SELECTED:
        rank = tl.load(score + query * num_blocks + j, mask=taken, other=0.0)
        passed_on = score + (queries + query) * num_blocks + j - 1  # by the block before
        rank += tl.load(passed_on, mask=taken & (j > 0), other=0.0)
        taken = best_of(rank, j, own, CHOICE, BLOCK_J)
    slot = tl.cumsum(taken.to(tl.int32), 0) - 1  # how many chosen ids are smaller
    tl.store(ids + query * SELECTED + slot, j, mask=taken)


@triton.jit
def best_of(rank, j, own, CHOICE: tl.constexpr, BLOCK_J: tl.constexpr):
    """Which of the blocks j [BLOCK_J] a query in block `own` reads, by their scores `rank`.

    There are more than n that have begun.
    """
    SELECTED: tl.constexpr = CHOICE.num_selected
    FREE: tl.constexpr = SELECTED - CHOICE.num_initial - CHOICE.num_local
    rank = tl.where(rank == rank, rank, 0.0)  # NaN would win every comparison, or none
    forced = (j < CHOICE.num_initial) | (j > own - CHOICE.num_local)
    rank = tl.where(forced, float("inf"), rank)
    rank = tl.where(j <= own, rank, -1.0)
    bar = float("inf")  # what the forced blocks have
    for _ in range(FREE):
        bar = tl.max(tl.where(rank < bar, rank, -1.0), 0)  # the next largest score
    taken = (j <= own) & (rank >= bar)
    if tl.sum(taken.to(tl.int32), 0) > SELECTED:
        # Equal scores were taken together: now one by one, the lower id first.
        for _ in range(SELECTED):
            best = tl.min(tl.where(rank == tl.max(rank, 0), j, BLOCK_J), 0)
            rank = tl.where(j == best, -2.0, rank)
        taken = rank == -2.0
    return taken


def importance_scores(
    q: Tensor, k: Tensor, lse: Tensor, keys: Keys, select_block_size: int, scale: float, start: int
) -> Tensor:
    """Eq. 8-10: (2, B, G, T, blocks) float32, a block's own part and what it passes on."""
    batch, _, length, _ = q.shape
    groups, key_count = k.shape[1:3]
    blocks = cdiv(start + length, select_block_size)
    score = q.new_empty(2, batch, groups, length, blocks, dtype=torch.float32)
    widths = widths_of(q, k, k)._replace(DV=0)  # no values are read
    sizes = tile_for("block_scores", widths, q)
    blocks_of_tile = blocks_in_a_tile(sizes.BLOCK_N, select_block_size, keys.stride)
    tiles = cdiv(blocks, blocks_of_tile), cdiv(length, sizes.BLOCK_M)
    launch(
        block_scores,
        (*tiles, batch * groups),
        descriptor(q, 1, sizes.BLOCK_M),
        rows(rows_contiguous(k)),
        lse.contiguous(),
        score,
        Sizes(batch, groups, length, key_count, blocks, start, scale),
        KEYS=keys,
        WIDTHS=widths,
        TILE=ScoreTile(sizes.BLOCK_M, sizes.BLOCK_N, blocks_of_tile),
        SELECT_BLOCK_SIZE=select_block_size,
        **sizes.launch_options(),
    )
    return score


def best_blocks(score: Tensor, choice: Choice, start: int) -> Tensor:
    """Eq. 11: ids (B, G, T, n); a tile is as wide as the blocks that its tokens can see."""
    batch, groups, length, blocks = score.shape[1:]
    shape = batch, groups, length, choice.num_selected
    ids = torch.full(shape, -1, dtype=torch.int32, device=score.device)
    width = 32
    first = 0
    while first < length:
        end = min(max(width * choice.select_block_size - start, 0), length)  # they see `width`
        if end > first:
            launch(
                top_blocks,
                grid_of(end - first, batch, groups),
                score,
                ids,
                first,
                length,
                blocks,
                start,
                CHOICE=choice,
                BLOCK_J=width,
                num_warps=1 if width <= 1024 else 4,
            )
        first = max(first, end)
        width = 2 * width
    return ids


# --- as an operation of torch; no gradient flows ---


@operation
@in_batches
def choose_blocks(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_size: int,
    stride: int,
    select_block_size: int,
    num_selected: int,
    num_initial: int,
    num_local: int,
    scale: float,
    start: int,
) -> Tensor:
    """Eq. 8-11: ids (B, G, T, n)."""
    keys = Keys(block_size, stride, None)
    choice = Choice(select_block_size, num_selected, num_initial, num_local)
    chosen = []
    for part in stretches(q.shape[2], 2 * k.shape[0] * k.shape[1], start, select_block_size):
        some = q[:, :, part.start : part.stop]
        lse_of_some = lse[:, :, part.start : part.stop]
        first = start + part.start
        score = importance_scores(some, k, lse_of_some, keys, select_block_size, scale, first)
        chosen.append(best_blocks(score, choice, first))
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=2)


def stretches(length: int, rows: int, start: int, select_block_size: int) -> list[range]:
    """Queries 0 .. length - 1 in stretches whose scores, `rows` for each, memory can hold."""
    blocks = cdiv(start + length, select_block_size)
    count = max(STRETCH, MOST_SCORES // max(1, rows * blocks) // STRETCH * STRETCH)
    return [range(first, min(first + count, length)) for first in range(0, max(length, 1), count)]


@choose_blocks.register_fake
def _(q, k, _lse, *sizes):
    num_selected = sizes[3]
    return q.new_empty(*k.shape[:2], q.shape[2], num_selected, dtype=torch.int32)


# --- for everyone ---


@torch.no_grad()
def select_blocks(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G N D"],
    lse: Float32[Tensor, "B H T"],
    *,
    block_size: int,
    stride: int,
    select_block_size: int,
    num_selected: int,
    num_initial: int = 1,
    num_local: int = 2,
    scale: float | None = None,
    start: int = 0,
) -> Int32[Tensor, "B G T n"]:
    """The selection blocks that each query reads, one set per group of heads; no gradient flows.

    Eq. 8-11: importance[t, j] = sum over the group's heads and i of p[t, i] |C_i ∩ S_j| / d, where
    p = softmax(scale q k) over the compressed keys, from lse, their branch's log-sum-exp. The first
    num_initial and the last num_local blocks are in every set. ids are ascending, then -1.
    A score of NaN counts as 0. Errors: ValueError or TypeError that names the argument.
    """
    check_inputs(q, k)
    check_geometry(block_size, stride, select_block_size)
    check_counts(num_selected, num_initial, num_local)
    check_most_blocks(num_selected)
    check_start(start)
    check_every_block(q, k, block_size, stride, start)
    check_lse(lse, q)
    choice = select_block_size, num_selected, num_initial, num_local
    scale = scale_or_default(scale, q.shape[3])
    return choose_blocks(q, k, lse, block_size, stride, *choice, scale, start)
