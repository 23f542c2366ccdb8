"""The gradients of flash.py, recomputed from the log-sum-exp that the forward stored.

    dq      one program owns M rows and walks over their keys, as the forward does;
    dk, dv  one program owns N keys and walks over the rows that see them:

    keys 0..N-1      rows ->  row_low         full_low        full_high    row_high
                            |  edge: masked  |  all see all  |  edge: masked  |

With ds = p (dout v - delta), delta = sum(out dout) - dlse:  dq = ds k,  dk = ds' q,  dv = p' dout.
The rows of one key tile can be many: they are cut into chunks, one program each, whose sums are
added up afterwards in a fixed order. No atomics, so two runs agree bit by bit. dq also leaves each
row's log-sum-exp and delta, in the order of the rows, where dk and dv load them side by side.
"""

import triton
import triton.language as tl

from kernels.flash import key_range, may_read
from kernels.tile import (
    LOG2E,
    load_each,
    load_lse,
    load_rows,
    row_offsets,
    score_gradient,
    score_gradient_by_key,
    store_rows,
)


@triton.jit
def flash_dq(
    q, k, v, out, dout, lse, dlse, row_lse, row_delta, dq,
    q_strides, k_strides, v_strides, out_strides, dout_strides, dq_strides, G, T, S, start, scale,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    row = tile * M + tl.arange(0, M)
    token, head = row // R, g * R + row % R
    real, t = token < T, start + token
    first, last = start + tile * M // R, start + tl.minimum((tile * M + M - 1) // R, T - 1)
    low, full_low, full_high, high = key_range(first, last, S, BLOCK, STRIDE, WINDOW, N)

    q_tile = load_rows(q, row_offsets(q_strides, b, head, token), real, D, DP)
    do_tile = load_rows(dout, row_offsets(dout_strides, b, head, token), real, DV, DVP)
    o_tile = load_rows(out, row_offsets(out_strides, b, head, token), real, DV, DVP)
    at = (b.to(tl.int64) * G * R + head) * T + token
    log_sum = load_lse(lse, at, real)
    delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    delta -= tl.load(dlse + at, mask=real, other=0.0)
    by_row = tl.program_id(1).to(tl.int64) * T * R + row
    tl.store(row_lse + by_row, log_sum, mask=real)
    tl.store(row_delta + by_row, delta, mask=real)
    dq_tile = tl.zeros([M, DP], tl.float32)
    for part in tl.static_range(3):
        begin = low if part == 0 else full_low if part == 1 else full_high
        end = full_low if part == 0 else full_high if part == 1 else high
        for first_key in range(begin, end, N):
            key = first_key + tl.arange(0, N)
            inside = None if part == 1 else key < S
            k_tile = load_rows(k, row_offsets(k_strides, b, g, key), inside, D, DP)
            v_tile = load_rows(v, row_offsets(v_strides, b, g, key), inside, DV, DVP)
            visible = None if part == 1 else may_read(
                key[None, :], t[:, None], S, BLOCK, STRIDE, WINDOW)
            _, ds = score_gradient(
                q_tile, k_tile, v_tile, do_tile, log_sum, delta, visible, scale * LOG2E)
            dq_tile = tl.dot(ds.to(k_tile.dtype), k_tile, dq_tile, input_precision="ieee")
    store_rows(dq, row_offsets(dq_strides, b, head, token), dq_tile * scale, real, D, DP)


@triton.jit
def row_range(
    first_key, T, start, R: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):
    """The rows that read a tile of N keys: row_low, full_low, full_high, row_high (see above)."""
    first_end = first_key * STRIDE + BLOCK - 1
    last_end = first_end + (N - 1) * STRIDE
    low = tl.minimum(tl.maximum(first_end - start, 0), T) * R
    full_low = tl.minimum(tl.maximum(last_end - start, 0), T) * R
    high, full_high = T * R, T * R
    if WINDOW is not None:
        high = tl.minimum(tl.maximum(last_end + WINDOW - start, 0), T) * R
        full_high = tl.minimum(tl.maximum(first_end + WINDOW - start, 0), T) * R
    full_low = low + (full_low - low + M - 1) // M * M
    return low, full_low, low + tl.maximum(full_high - low, 0) // M * M, high


@triton.jit
def flash_dkdv(
    q, k, v, dout, row_lse, row_delta, dk, dv,
    q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides, B, G, T, S, start, scale,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):
    b, g, chunk = tl.program_id(1) // G, tl.program_id(1) % G, tl.program_id(2)
    key = tl.program_id(0) * N + tl.arange(0, N)
    k_tile = load_rows(k, row_offsets(k_strides, b, g, key), key < S, D, DP)
    v_tile = load_rows(v, row_offsets(v_strides, b, g, key), key < S, DV, DVP)
    low, full_low, full_high, high = row_range(
        tl.program_id(0) * N, T, start, R, BLOCK, STRIDE, WINDOW, M, N)
    low = low + chunk * CHUNK
    high = tl.maximum(tl.minimum(high, low + CHUNK), low)
    full_low = tl.minimum(tl.maximum(full_low, low), low + CHUNK)
    full_high = tl.minimum(tl.maximum(full_high, full_low), low + CHUNK)

    dk_tile, dv_tile = tl.zeros([N, DP], tl.float32), tl.zeros([N, DVP], tl.float32)
    for part in tl.static_range(3):
        begin = low if part == 0 else full_low if part == 1 else full_high
        end = tl.minimum(full_low if part == 0 else full_high if part == 1 else high, high)
        for first_row in range(begin, end, M):
            row = first_row + tl.arange(0, M)
            token, head = row // R, g * R + row % R
            inside = None if part == 1 else row < T * R
            q_tile = load_rows(q, row_offsets(q_strides, b, head, token), inside, D, DP)
            do_tile = load_rows(dout, row_offsets(dout_strides, b, head, token), inside, DV, DVP)
            by_row = tl.program_id(1).to(tl.int64) * T * R + row
            visible = None if part == 1 else inside[None, :] & may_read(
                key[:, None], start + token[None, :], S, BLOCK, STRIDE, WINDOW)
            p, ds = score_gradient_by_key(
                q_tile, k_tile, v_tile, do_tile, load_each(row_lse, by_row, inside),
                load_each(row_delta, by_row, inside), visible, scale * LOG2E)
            dv_tile = tl.dot(p.to(do_tile.dtype), do_tile, dv_tile, input_precision="ieee")
            dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")
    slot = chunk * B + b  # partial sums lie side by side, as (chunks * B, G, S, width)
    store_rows(dk, row_offsets(dk_strides, slot, g, key), dk_tile * scale, key < S, D, DP)
    store_rows(dv, row_offsets(dv_strides, slot, g, key), dv_tile, key < S, DV, DVP)
