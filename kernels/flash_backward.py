"""The gradients of flash.py, recomputed from the log-sum-exp that the forward stored.

    dq      one program owns a box of rows and walks over their keys, as the forward does;
    dk, dv  one program owns N keys and walks over the tokens that see them, STEP at a time:

    keys 0..N-1      tokens ->  low          full_low        full_high        high
                              |  edge: masked  |  all see all  |  edge: masked  |

With ds = p (dout v - delta), delta = sum(out dout) - dlse, and ' for the transpose:
dq = scale ds k,  dk = scale ds' q,  dv = p' dout.
The rows of one key tile can be many: they are cut into chunks, one program each, whose sums are
added up afterwards in a fixed order. No atomics, so two runs agree bit by bit. dq also leaves each
row's log-sum-exp and delta, in the order of the boxes that dk and dv load: then these numbers are
boxes too, and no thread has to fetch them.
"""

import triton
import triton.language as tl

from kernels.boxes import (
    hold,
    load_box,
    load_group,
    load_numbers,
    place_in_boxes,
    rows_of_a_box,
)
from kernels.flash import key_range, may_read
from kernels.tile import (
    LOG2E,
    add_rows,
    number_offsets,
    prepare_gradient,
    row_offsets,
    score_gradient,
    score_gradient_by_key,
    store_rows,
)


@triton.jit
def flash_dq(
    q, k, v, out, dout, lse, dlse, gates, dgates, row_lse, row_delta, dq,
    q_strides, out_strides, dout_strides, dq_strides, row_stride, G, T, S, start, scale,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    HEADS: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr, HOLD: tl.constexpr,
    ROW_STEP: tl.constexpr, BRANCH: tl.constexpr, ADD: tl.constexpr,
):
    # STEP: tokens of a program here. ROW_STEP: of a step of dk and dv, whose order row_lse has.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * STEP
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    token, head, real = rows_of_a_box(first, T, R, HEADS, STEP)
    t, last = start + token, start + tl.minimum(first + STEP, T) - 1
    low, full_low, full_high, high = key_range(
        start + first, last, S, BLOCK, STRIDE, WINDOW, N)

    q_tile = load_group(q, q_strides, b, g * R, first, head, token, real, D, DP, HOLD)
    do_tile = load_group(
        dout, dout_strides, b, g * R, first, head, token, real, DV, DVP, HOLD)
    o_tile = load_group(out, out_strides, b, g * R, first, head, token, real, DV, DVP, False)
    at = number_offsets(b, g, head, token, G, T, R)
    by_row = tl.program_id(1).to(tl.int64) * row_stride + place_in_boxes(
        token, head, HEADS, ROW_STEP)
    log_sum, delta, gate = prepare_gradient(
        o_tile, do_tile, lse, dlse, gates, dgates, row_lse, row_delta, at, by_row, real, BRANCH)
    dq_tile = tl.zeros([HEADS * STEP, DP], tl.float32)
    for part in tl.static_range(3):
        begin = low if part == 0 else full_low if part == 1 else full_high
        end = full_low if part == 0 else full_high if part == 1 else high
        for first_key in range(begin, end, N):
            k_tile = load_box(k, b, g, first_key, N, DP)
            v_tile = load_box(v, b, g, first_key, N, DVP)
            key = first_key + tl.arange(0, N)
            visible = None if part == 1 else may_read(
                key[None, :], t[:, None], S, BLOCK, STRIDE, WINDOW)
            _, ds = score_gradient(
                q_tile, k_tile, v_tile, do_tile, log_sum, delta, visible, scale * LOG2E)
            dq_tile = tl.dot(ds.to(k_tile.dtype), k_tile, dq_tile, input_precision="ieee")
    add_rows(dq, row_offsets(dq_strides, b, g * R + head, token),
             dq_tile * (scale * gate)[:, None], real, D, DP, ADD)


@triton.jit
def token_range(
    first_key, T, start,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    N: tl.constexpr, STEP: tl.constexpr,
):
    """The tokens that read a tile of N keys: low, full_low, full_high, high (see the picture)."""
    first_end = first_key * STRIDE + BLOCK - 1
    last_end = first_end + (N - 1) * STRIDE
    low = tl.minimum(tl.maximum(first_end - start, 0), T)
    full_low = tl.minimum(tl.maximum(last_end - start, 0), T)
    full_high, high = T, T
    if WINDOW is not None:
        full_high = tl.minimum(tl.maximum(first_end + WINDOW - start, 0), T)
        high = tl.minimum(tl.maximum(last_end + WINDOW - start, 0), T)
    low = low // STEP * STEP
    full_low = (full_low + STEP - 1) // STEP * STEP
    return low, full_low, tl.maximum(full_high // STEP * STEP, full_low), high


@triton.jit
def flash_dkdv(
    q, k, v, dout, row_lse, row_delta, dk, dv, dk_strides, dv_strides, B, G, T, S, start, scale,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    HEADS: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr, HOLD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    b, g, chunk = tl.program_id(1) // G, tl.program_id(1) % G, tl.program_id(2)
    first_key = tl.program_id(0) * N
    key = first_key + tl.arange(0, N)
    k_tile = hold(load_box(k, b, g, first_key, N, DP), key < S, HOLD)
    v_tile = hold(load_box(v, b, g, first_key, N, DVP), key < S, HOLD)
    low, full_low, full_high, high = token_range(
        first_key, T, start, BLOCK, STRIDE, WINDOW, N, STEP)
    # Without a window all key tiles cut their tokens at the same places, to meet in the cache.
    begin = chunk * CHUNK if WINDOW is None else low + chunk * CHUNK

    dk_tile, dv_tile = tl.zeros([N, DP], tl.float32), tl.zeros([N, DVP], tl.float32)
    for part in tl.static_range(3):
        since = low if part == 0 else full_low if part == 1 else full_high
        until = full_low if part == 0 else full_high if part == 1 else high
        until = tl.minimum(until, high)
        for first in range(tl.maximum(since, begin), tl.minimum(until, begin + CHUNK), STEP):
            q_tile = load_box(q, b, g * R, first, HEADS * STEP, DP)
            do_tile = load_box(dout, b, g * R, first, HEADS * STEP, DVP)
            token, head, inside = rows_of_a_box(first, T, R, HEADS, STEP)
            real = None if part == 1 and HEADS == R else inside
            visible = None if real is None else real[None, :] & may_read(
                key[:, None], start + token[None, :], S, BLOCK, STRIDE, WINDOW)
            log_sum = load_numbers(row_lse, tl.program_id(1), first * HEADS, HEADS * STEP)
            delta = load_numbers(row_delta, tl.program_id(1), first * HEADS, HEADS * STEP)
            p, ds = score_gradient_by_key(
                q_tile, k_tile, v_tile, do_tile, log_sum, delta, visible, scale * LOG2E)
            dv_tile = tl.dot(p.to(do_tile.dtype), do_tile, dv_tile, input_precision="ieee")
            dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")
    slot = chunk * B + b  # partial sums lie side by side, as (chunks * B, G, S, width)
    store_rows(dk, row_offsets(dk_strides, slot, g, key), dk_tile * scale, key < S, D, DP)
    store_rows(dv, row_offsets(dv_strides, slot, g, key), dv_tile, key < S, DV, DVP)
