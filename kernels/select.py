"""Which blocks to read: the scores of Eq. 8-10, then the n best of each query (Eq. 11).

    scores   one program owns M tokens and the compressed keys of J selection blocks:

             head 0: p  +  head 1: p  +  ..  +  head R-1: p      (M, N), summed in registers
             then one product with the overlaps |C_i ∩ S_j| / d  (N, J)

    top-n    one warp owns one query: all its block scores are in registers, and it takes the
             largest again and again

Only the (B, G, T, blocks) sums reach memory: no head's probabilities ever do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
def overlap(i, j, BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr):
    """|C_i ∩ S_j| / d, Eq. 9 by geometry: how far block i of the keys reaches into block j."""
    last = tl.minimum(i * STRIDE + BLOCK, (j + 1) * SELECT)
    return (tl.maximum(last - tl.maximum(i * STRIDE, j * SELECT), 0) // STRIDE).to(tl.float32)


@triton.jit
def block_scores(
    q, k, lse, score, q_strides, k_strides, G, T, N_KEYS, BLOCKS, start, scale,
    R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, J: tl.constexpr, J_PADDED: tl.constexpr,
):
    if tl.program_id(0) * J * SELECT > start + tl.program_id(1) * M + M - 1:
        return  # these blocks begin after the last of these tokens: nobody asks for their score
    b, g = tl.program_id(2) // G, tl.program_id(2) % G
    token = tl.program_id(1) * M + tl.arange(0, M)
    j = tl.program_id(0) * J + tl.arange(0, J_PADDED)
    # Block j is also reached by the keys that begin before it: at most l/d - 1 of them.
    key = tl.program_id(0) * J * (SELECT // STRIDE) - (BLOCK // STRIDE - 1) + tl.arange(0, N)
    real, inside = token < T, (key >= 0) & (key < N_KEYS)
    visible = (key >= 0)[None, :] & may_read(
        key[None, :], start + token[:, None], N_KEYS, BLOCK, STRIDE, None)

    total = tl.zeros([M, N], tl.float32)
    k_tile = load_rows(k, row_offsets(k_strides, b, g, key), inside, D, DP)
    for r in range(R):
        head = g * R + r
        q_tile = load_rows(q, row_offsets(q_strides, b, head, token), real, D, DP)
        at = (b.to(tl.int64) * G * R + head) * T + token
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        total += tl.exp2(s * (scale * LOG2E) - load_lse(lse, at, real)[:, None])
    total = tl.where(visible, total, 0.0)  # Eq. 10 is a sum of probabilities
    weights = overlap(key[:, None], j[None, :], BLOCK, STRIDE, SELECT)
    sums = tl.dot(total, weights, input_precision="ieee")
    at = (tl.program_id(2).to(tl.int64) * T + token) * BLOCKS
    keep = real[:, None] & (j < BLOCKS)[None, :] & (tl.arange(0, J_PADDED) < J)[None, :]
    tl.store(score + at[:, None] + j[None, :], sums, mask=keep)


@triton.jit
def top_blocks(
    score, ids, T, BLOCKS, start,
    SELECT: tl.constexpr, SELECTED: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)
    own = (start + (query % T).to(tl.int32)) // SELECT
    j = tl.arange(0, BLOCKS_PADDED)
    chosen = (j <= own) & ((j < INITIAL) | (j > own - LOCAL))  # a mask: no block comes twice
    if own < SELECTED:
        chosen = j <= own  # all that have begun
    else:
        rank = tl.load(score + query * BLOCKS + j, mask=(j <= own) & ~chosen, other=-1.0)
        rank = tl.where(rank == rank, rank, 0.0)  # NaN would win every comparison, or none
        rank = tl.where((j <= own) & ~chosen, rank, -1.0)
        for _ in range(SELECTED - INITIAL - LOCAL):
            best = tl.argmax(rank, 0, tie_break_left=True)  # ties go to the lower id
            chosen = chosen | (j == best)
            rank = tl.where(j == best, -2.0, rank)
    slot = tl.cumsum(chosen.to(tl.int32), 0) - 1  # how many chosen ids are smaller
    tl.store(ids + query * SELECTED + slot, j, mask=chosen)


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
    score = torch.empty(batch, groups, length, blocks, device=q.device)
    tile = tiles("scores", width, q.dtype)
    # A key tile holds the keys of `per_tile` whole blocks.
    per_tile = (tile["N"] - block_size // stride + 1) * stride // select_block_size
    if per_tile < 1:
        raise ValueError(f"select_block_size = {select_block_size}: with stride = {stride} a block "
                         f"has more than {tile['N']} keys; take a longer stride or smaller blocks")
    grid = (triton.cdiv(blocks, per_tile), triton.cdiv(length, tile["M"]), batch * groups)
    block_scores[grid](
        q, k, lse.contiguous(), score, q.stride(), k.stride(), groups, length, keys, blocks, start,
        scale_or_default(scale, width), R=heads // groups, D=width, DP=padded(width),
        BLOCK=block_size, STRIDE=stride, SELECT=select_block_size, J=per_tile,
        J_PADDED=padded(per_tile), **tile,
    )
    ids = torch.full((batch, groups, length, num_selected), -1, dtype=torch.int32, device=q.device)
    top_blocks[(batch * groups * length,)](
        score, ids, length, blocks, start, SELECT=select_block_size, SELECTED=num_selected,
        INITIAL=num_initial, LOCAL=num_local, BLOCKS_PADDED=max(32, triton.next_power_of_2(blocks)),
        num_warps=1 if blocks <= 1024 else 4,
    )
    return ids
