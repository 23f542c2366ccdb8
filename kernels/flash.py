"""Attention to a run of keys: the dense, the window and the compressed branch, forward.

           keys ->    0  ..  low           full_low        full_high     high
    a box of rows   |  unread  |  edge: masked  |  all see all  |  edge: masked  |  unread  |

One program owns a box of HEADS x STEP rows (STEP tokens of HEADS heads) and walks over the keys
that any of them sees, N at a time. Key j ends at token j * STRIDE + BLOCK - 1 and may be read from
there on: raw keys have STRIDE = BLOCK = 1, compressed keys d and l. Only the edges need a mask.
"""

import triton
import triton.language as tl

from kernels.boxes import load_box, load_group, rows_of_a_box
from kernels.tile import LOG2E, finish, fold_in, number_offsets, row_offsets, store_rows


@triton.jit
def keys_seen(t, S, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """How many keys end at or before token t."""
    return tl.minimum(tl.maximum(t + 1 - BLOCK + STRIDE, 0) // STRIDE, S)


@triton.jit
def may_read(key, t, S, BLOCK: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr):
    """The mask of an edge tile; key and t are broadcast against each other."""
    end = key * STRIDE + BLOCK - 1
    visible = (end <= t) & (key < S)
    if WINDOW is not None:
        visible = visible & (end > t - WINDOW)
    return visible


@triton.jit
def key_range(
    first, last, S,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr, N: tl.constexpr,
):
    """The keys read by queries first .. last: low, full_low, full_high, high (see the picture)."""
    low, full_low = 0, 0
    if WINDOW is not None:
        low = tl.maximum(first - WINDOW + 1, 0) // N * N
        full_low = (tl.maximum(last - WINDOW + 1, 0) + N - 1) // N * N
    full_high = tl.maximum(keys_seen(first, S, BLOCK, STRIDE) // N * N, full_low)
    return low, full_low, full_high, keys_seen(last, S, BLOCK, STRIDE)


@triton.jit
def flash_forward(
    q, k, v, out, lse, q_strides, out_strides, G, T, S, start, scale,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    HEADS: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr, HOLD: tl.constexpr,
):
    # The last tokens walk over the most keys: they come first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * STEP
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    token, head, real = rows_of_a_box(first, T, R, HEADS, STEP)
    t, last = start + token, start + tl.minimum(first + STEP, T) - 1
    low, full_low, full_high, high = key_range(
        start + first, last, S, BLOCK, STRIDE, WINDOW, N)

    q_tile = load_group(q, q_strides, b, g * R, first, head, token, real, D, DP, HOLD)
    m = tl.full([HEADS * STEP], -float("inf"), tl.float32)
    total, o = tl.zeros([HEADS * STEP], tl.float32), tl.zeros([HEADS * STEP, DVP], tl.float32)
    for part in tl.static_range(3):  # left edge, middle, right edge: three loops, compiled apart
        begin = low if part == 0 else full_low if part == 1 else full_high
        end = full_low if part == 0 else full_high if part == 1 else high
        for first_key in range(begin, end, N):
            k_tile = load_box(k, b, g, first_key, N, DP)
            v_tile = load_box(v, b, g, first_key, N, DVP)
            key = first_key + tl.arange(0, N)
            visible = None if part == 1 else may_read(
                key[None, :], t[:, None], S, BLOCK, STRIDE, WINDOW)
            m, total, o = fold_in(q_tile, k_tile, v_tile, visible, scale * LOG2E, m, total, o)
    o, row_lse = finish(m, total, o)
    store_rows(out, row_offsets(out_strides, b, g * R + head, token), o, real, DV, DVP)
    tl.store(lse + number_offsets(b, g, head, token, G, T, R), row_lse, mask=real)
