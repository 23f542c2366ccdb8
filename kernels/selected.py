"""The selected branch, forward: neighbouring tokens read the union of their blocks.

    program (i, g):  U tokens x R heads, a box of rows      U = 4 for 16 heads
                     for each block of their union:     l' keys, loaded once
                         rows of tokens that did not choose it are masked

With a program for each token, a block would be loaded for R rows only. U tokens, 4 at most, load
what they have in common once: at least the forced blocks. For R = 16 they fill the 64 rows that the
H100's fast matrix unit wants.
"""

import triton
import triton.language as tl

from kernels.boxes import load_box, load_group, rows_of_a_box
from kernels.tile import (
    LOG2E,
    finish,
    fold_in,
    load_gate,
    load_rows,
    number_offsets,
    row_offsets,
    store_rows,
)


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
    q, k, v, entries, counts, out, lse, gates, out_c, out_w, mixed,
    q_strides, out_strides, G, T, start, scale,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    n: tl.constexpr, SELECT: tl.constexpr, U: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr,
):
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    first = tl.program_id(0) * U
    token, head, real = rows_of_a_box(first, T, R, HEADS, U)
    t = start + token
    tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)

    q_tile = load_group(q, q_strides, b, g * R, first, head, token, real, D, DP, False)
    m = tl.full([HEADS * U], -float("inf"), tl.float32)
    total, o = tl.zeros([HEADS * U], tl.float32), tl.zeros([HEADS * U, DVP], tl.float32)
    for e in range(tl.load(counts + tile)):
        key, visible = read_entry(entries, tile * U * n + e, token, real, t, U, SELECT, N)
        k_tile, v_tile = load_box(k, b, g, key, N, DP), load_box(v, b, g, key, N, DVP)
        m, total, o = fold_in(q_tile, k_tile, v_tile, visible, scale * LOG2E, m, total, o)
    o, row_lse = finish(m, total, o)
    to = row_offsets(out_strides, b, g * R + head, token)
    at = number_offsets(b, g, head, token, G, T, R)
    store_rows(out, to, o, real, DV, DVP)
    tl.store(lse + at, row_lse, mask=real)
    if gates is not None:  # Eq. 5, with the outputs of the compressed branch and of the window
        mix = load_gate(gates, at, real, 1)[:, None] * o
        mix += load_gate(gates, at, real, 0)[:, None] * load_rows(out_c, to, real, DV, DVP)
        mix += load_gate(gates, at, real, 2)[:, None] * load_rows(out_w, to, real, DV, DVP)
        store_rows(mixed, to, mix, real, DV, DVP)
