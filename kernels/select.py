"""Which blocks to read: the scores of Eq. 8-10, then the n best of each query (Eq. 11).

    scores   one program owns M tokens and the compressed keys that begin in J selection blocks:

             head 0: p  +  head 1: p  +  ..  +  head R-1: p      (M, N), summed in registers
             then the sums over each block's keys, weighted by |C_i ∩ S_j| / d (Eq. 9)

             A key is no longer than a block, so it reaches into its block and the next one at
             most. Each has its own sum, and a block's score is its own plus what the block
             before it passes on.

    top-n    one warp (four, beyond 1024 blocks) owns one query, all its block scores in registers.
             Forced blocks score inf. FREE = n - forced times a bar falls to the next lower score:
             chosen is what is not below it. Too many, through equal scores: one by one

Only the (2, B, G, T, blocks) sums reach memory: no head's probabilities ever do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.boxes import box, load_box
from kernels.checks import (
    check_counts,
    check_geometry,
    check_inputs,
    check_lse,
    check_start,
    scale_or_default,
)
from kernels.flash import may_read
from kernels.tile import LOG2E, load_lse, load_rows, row_offsets
from kernels.tiles import padded, tiles


@triton.jit
def block_scores(
    q, k, lse, score, k_strides, B, G, T, N_KEYS, BLOCKS, start, scale,
    R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, J: tl.constexpr,
):
    if tl.program_id(0) * J * SELECT > start + tl.program_id(1) * M + M - 1:
        return  # these blocks begin after the last of these tokens: nobody asks for their score
    b, g = tl.program_id(2) // G, tl.program_id(2) % G
    token = tl.program_id(1) * M + tl.arange(0, M)
    j, i = tl.program_id(0) * J + tl.arange(0, N) // (N // J), tl.arange(0, N) % (N // J)
    key = j * (SELECT // STRIDE) + i  # the i-th that begins in block j
    real, inside = token < T, (i < SELECT // STRIDE) & (key < N_KEYS)
    visible = inside[None, :] & may_read(
        key[None, :], start + token[:, None], N_KEYS, BLOCK, STRIDE, None)

    total = tl.zeros([M, N], tl.float32)
    k_tile = load_rows(k, row_offsets(k_strides, b, g, key), inside, D, DP)
    for r in range(R):
        q_tile = load_box(q, b, g * R + r, tl.program_id(1) * M, M, DP)
        at = (b.to(tl.int64) * G * R + g * R + r) * T + token
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        total += tl.exp2(s * (scale * LOG2E) - load_lse(lse, at, real)[:, None])
    total = tl.where(visible, total, 0.0)  # Eq. 10 is a sum of probabilities
    # Eq. 9 by geometry: how many strides of the key lie in block j, and in the block after it.
    after = tl.maximum(i * STRIDE + BLOCK - SELECT, 0) // STRIDE
    block = tl.program_id(0) * J + tl.arange(0, J)
    keep = real[:, None] & (block < BLOCKS)[None, :]
    for part in tl.static_range(2):
        weight = (after if part == 1 else BLOCK // STRIDE - after).to(tl.float32)
        sums = tl.sum((total * weight[None, :]).reshape(M, J, N // J), 2)
        row = (part * B * G + tl.program_id(2).to(tl.int64)) * T + token
        tl.store(score + row[:, None] * BLOCKS + block[None, :], sums, mask=keep)


@triton.jit
def top_blocks(
    score, ids, first, T, BLOCKS, start,
    SELECT: tl.constexpr, SELECTED: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    FREE: tl.constexpr, WIDTH: tl.constexpr,
):
    token, queries = first + tl.program_id(0), tl.num_programs(1).to(tl.int64) * T
    query, own = tl.program_id(1).to(tl.int64) * T + token, (start + token) // SELECT
    j = tl.arange(0, WIDTH)
    taken = j <= own  # all that have begun
    if own >= SELECTED:
        rank = tl.load(score + query * BLOCKS + j, mask=taken, other=0.0)
        passed_on = score + (queries + query) * BLOCKS + j - 1  # by the block before
        rank += tl.load(passed_on, mask=taken & (j > 0), other=0.0)
        rank = tl.where(rank == rank, rank, 0.0)  # NaN would win every comparison, or none
        rank = tl.where((j < INITIAL) | (j > own - LOCAL), float("inf"), rank)  # forced
        rank = tl.where(taken, rank, -1.0)
        bar = float("inf")  # what the forced blocks have
        for _ in range(FREE):
            bar = tl.max(tl.where(rank < bar, rank, -1.0), 0)  # the next largest score
        taken = taken & (rank >= bar)
        if tl.sum(taken.to(tl.int32), 0) > SELECTED:
            # Equal scores were taken together: now one by one, the lower id first.
            for _ in range(SELECTED):
                best = tl.min(tl.where(rank == tl.max(rank, 0), j, WIDTH), 0)
                rank = tl.where(j == best, -2.0, rank)
            taken = rank == -2.0
    slot = tl.cumsum(taken.to(tl.int32), 0) - 1  # how many chosen ids are smaller
    tl.store(ids + query * SELECTED + slot, j, mask=taken)


def choose(
    score: Tensor, ids: Tensor, start: int, select_block_size: int, initial: int, local: int
) -> None:
    """Fill ids with the best blocks; a tile is as wide as the blocks that its tokens can see."""
    batch, groups, length, blocks = score.shape[1:]
    selected, width, first = ids.shape[3], 32, 0
    while first < length:
        end = min(max(width * select_block_size - start, 0), length)  # up to it: `width` blocks
        if end > first:
            top_blocks[(end - first, batch * groups)](
                score, ids, first, length, blocks, start, SELECT=select_block_size,
                SELECTED=selected, INITIAL=initial, LOCAL=local,
                FREE=selected - initial - local, WIDTH=width,
                num_warps=1 if width <= 1024 else 4,
            )
        width, first = 2 * width, max(first, end)


def blocks_in_a_tile(N: int, select_block_size: int, stride: int) -> int:
    """How many selection blocks a tile of N keys holds, each padded to a power of two.

    Errors: ValueError if it cannot hold one.
    """
    if select_block_size // stride > N:
        raise ValueError(f"select_block_size = {select_block_size}: with stride = {stride} a block "
                         f"has more than {N} keys; take a longer stride or smaller blocks")
    return N // triton.next_power_of_2(select_block_size // stride)


@torch.no_grad()
def select_blocks(
    q: Tensor, k: Tensor, lse: Tensor, *,
    block_size: int, stride: int, select_block_size: int, num_selected: int,
    num_initial: int = 1, num_local: int = 2, scale: float | None = None, start: int = 0,
) -> Tensor:
    """The selection blocks each query reads, one set per group of heads (Eq. 8-11).

    Shapes: q (B, H, T, D), compressed k (B, G, N, D), lse (B, H, T) of the compressed branch
    -> ids (B, G, T, n) int32, ascending, then -1. Not differentiable.
    Errors: ValueError or TypeError that names the argument.
    """
    check_inputs(q, k)
    check_geometry(block_size, stride, select_block_size)
    check_counts(num_selected, num_initial, num_local)
    check_start(start)
    check_lse(lse, q)
    (batch, heads, length, width), (groups, keys) = q.shape, k.shape[1:3]
    blocks = triton.cdiv(start + length, select_block_size)
    score = torch.empty(2, batch, groups, length, blocks, device=q.device)
    tile = tiles("scores", width, q.dtype)
    J = blocks_in_a_tile(tile["N"], select_block_size, stride)
    block_scores[(triton.cdiv(blocks, J), triton.cdiv(length, tile["M"]), batch * groups)](
        box(q, 1, tile["M"]), k, lse.contiguous(), score, k.stride(), batch, groups, length, keys,
        blocks, start, scale_or_default(scale, width), R=heads // groups, D=width, DP=padded(width),
        BLOCK=block_size, STRIDE=stride, SELECT=select_block_size, J=J, **tile,
    )
    ids = torch.full((batch, groups, length, num_selected), -1, dtype=torch.int32, device=q.device)
    choose(score, ids, start, select_block_size, num_initial, num_local)
    return ids
