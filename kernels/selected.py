"""The selected branch, forward: neighbouring tokens read the union of their blocks.

    program (i, g):  U tokens x R heads = M rows        U = 4 for 16 heads
                     for each block of their union:     l' keys, loaded once
                         rows of tokens that did not choose it are masked

One program a token loads every block for 16 rows; four tokens share what they have in common (at
least the forced blocks) and fill the 64 rows that the H100's fast matrix unit wants.
"""

import triton
import triton.language as tl

from kernels.boxes import load_box
from kernels.tile import LOG2E, finish, fold_in, load_rows, row_offsets, store_rows


@triton.jit
def read_entry(entries, at, token, real, t, U: tl.constexpr, SELECT: tl.constexpr,
               N: tl.constexpr):
    """The first key of one block of a union, and which of its N keys each row may read."""
    entry = tl.load(entries + at)
    first = entry // 16 * SELECT
    chosen = ((entry >> (token % U)) & 1) > 0
    limit = tl.where(chosen & real, t, -1)
    if N > SELECT:  # the tile reaches into the next block
        limit = tl.minimum(limit, first + SELECT - 1)
    return first, (first + tl.arange(0, N))[None, :] <= limit[:, None]


@triton.jit
def selected_forward(
    q, k, v, entries, counts, out, lse, q_strides, out_strides, G, T, start, scale,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    n: tl.constexpr, SELECT: tl.constexpr, U: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    row = tl.arange(0, M)
    token, head = tl.program_id(0) * U + row // R, g * R + row % R
    real, t = (row < U * R) & (token < T), start + token
    tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)

    q_tile = load_rows(q, row_offsets(q_strides, b, head, token), real, D, DP)
    m, total = tl.full([M], -float("inf"), tl.float32), tl.zeros([M], tl.float32)
    o = tl.zeros([M, DVP], tl.float32)
    for e in range(tl.load(counts + tile)):
        first, visible = read_entry(entries, tile * U * n + e, token, real, t, U, SELECT, N)
        k_tile, v_tile = load_box(k, b, g, first, N, DP), load_box(v, b, g, first, N, DVP)
        m, total, o = fold_in(q_tile, k_tile, v_tile, visible, scale * LOG2E, m, total, o)
    o, row_lse = finish(m, total, o)
    store_rows(out, row_offsets(out_strides, b, head, token), o, real, DV, DVP)
    tl.store(lse + (b.to(tl.int64) * G * R + head) * T + token, row_lse, mask=real)
