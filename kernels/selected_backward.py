"""The gradients of selected.py.

    dq      by query: the forward's walk over the union of a few tokens' blocks;
    dk, dv  by block: its readers, gathered from all over the sequence, a token's R rows at a time

    block j:  reader lists (last token first) | chunk | chunk | ..   one program a chunk
                                                  \\   |    /
                                                sum in this order -> dk, dv of the block

Every query reads block 0, so its list is as long as the sequence: chunks keep any one program from
walking all of it, and their sums are added in list order, so two runs agree bit by bit. A box of
HEADS, R rounded up to a power of two and 16 at least, may reach into the next group: masked.
"""

import triton
import triton.language as tl

from kernels.boxes import load_box
from kernels.selected import read_entry
from kernels.tile import (
    LOG2E,
    add_rows,
    load_each,
    load_rows,
    prepare_gradient,
    row_offsets,
    score_gradient,
    score_gradient_by_key,
    store_rows,
)


@triton.jit
def selected_dq(
    q, k, v, entries, counts, out, dout, lse, gates, dgates, row_lse, row_delta, dq,
    q_strides, out_strides, dout_strides, dq_strides, G, T, start, scale,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    n: tl.constexpr, SELECT: tl.constexpr, U: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BRANCH: tl.constexpr, ADD: tl.constexpr,
):
    """The same walk for dq = sum of ds k; it leaves each row's lse and delta for dk and dv."""
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    row = tl.arange(0, M)
    token, head = tl.program_id(0) * U + row // R, g * R + row % R
    real, t = (row < U * R) & (token < T), start + token
    tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)

    q_tile = load_rows(q, row_offsets(q_strides, b, head, token), real, D, DP)
    do_tile = load_rows(dout, row_offsets(dout_strides, b, head, token), real, DV, DVP)
    o_tile = load_rows(out, row_offsets(out_strides, b, head, token), real, DV, DVP)
    at = (b.to(tl.int64) * G * R + head) * T + token
    by_row = tl.program_id(1).to(tl.int64) * T * R + token * R + row % R
    log_sum, delta, gate = prepare_gradient(
        o_tile, do_tile, lse, None, gates, dgates, row_lse, row_delta, at, by_row, real, BRANCH)
    dq_tile = tl.zeros([M, DP], tl.float32)
    for e in range(tl.load(counts + tile)):
        first, visible = read_entry(entries, tile * U * n + e, token, real, t, U, SELECT, N)
        k_tile, v_tile = load_box(k, b, g, first, N, DP), load_box(v, b, g, first, N, DVP)
        _, ds = score_gradient(
            q_tile, k_tile, v_tile, do_tile, log_sum, delta, visible, scale * LOG2E)
        dq_tile = tl.dot(ds.to(k_tile.dtype), k_tile, dq_tile, input_precision="ieee")
    add_rows(dq, row_offsets(dq_strides, b, head, token), dq_tile * (scale * gate)[:, None], real,
             D, DP, ADD)


@triton.jit
def selected_dkdv(
    q, k, v, dout, row_lse, row_delta, tokens, bounds, owner, chunk_bounds, dk, dv,
    G, T, start, scale, LISTS, BLOCKS,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    SELECT: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0)
    readers = tl.load(owner + chunk)
    if readers >= LISTS:
        return  # more programs are started than there are chunks
    pair, block = readers // BLOCKS, readers % BLOCKS
    b, g = pair // G, pair % G
    begin = tl.load(bounds + readers) + (chunk - tl.load(chunk_bounds + readers)) * CHUNK
    end = tl.minimum(tl.load(bounds + readers + 1), begin + CHUNK)
    rows = pair.to(tl.int64) * T * R  # where this group's rows begin
    first_key, column, head = block * SELECT, tl.arange(0, N), tl.arange(0, HEADS)
    k_tile, v_tile = load_box(k, b, g, first_key, N, DP), load_box(v, b, g, first_key, N, DVP)

    dk_tile, dv_tile = tl.zeros([N, DP], tl.float32), tl.zeros([N, DVP], tl.float32)
    for i in range(begin, end):
        token = tl.load(tokens + i)
        q_tile = load_box(q, b, g * R, token, HEADS, DP)
        do_tile = load_box(dout, b, g * R, token, HEADS, DVP)
        real = None if HEADS == R else head < R
        by_row = token * R + head
        visible = (first_key + column <= start + token)[:, None] & (head < R)[None, :]
        p, ds = score_gradient_by_key(
            q_tile, k_tile, v_tile, do_tile, load_each(row_lse + rows, by_row, real),
            load_each(row_delta + rows, by_row, real), visible, scale * LOG2E)
        dv_tile = tl.dot(p.to(do_tile.dtype), do_tile, dv_tile, input_precision="ieee")
        dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")
    slot = chunk.to(tl.int64) * SELECT + column
    store_rows(dk, slot * D, dk_tile * scale, column < SELECT, D, DP)
    store_rows(dv, slot * DV, dv_tile, column < SELECT, DV, DVP)


@triton.jit
def add_chunks(
    parts, chunk_bounds, dx, dx_strides, G, S, BLOCKS,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SELECT: tl.constexpr, N: tl.constexpr,
):
    """The sums of a block's chunks, added in order; 0 for a block that nobody read."""
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    readers = tl.program_id(1) * BLOCKS + tl.program_id(0)
    column = tl.arange(0, N)
    key = tl.program_id(0) * SELECT + column
    total = tl.zeros([N, PADDED], tl.float32)
    for chunk in range(tl.load(chunk_bounds + readers), tl.load(chunk_bounds + readers + 1)):
        slot = (tl.zeros([N], tl.int64) + chunk) * SELECT + column
        total += load_rows(parts, slot * WIDTH, column < SELECT, WIDTH, PADDED)
    store_rows(dx, row_offsets(dx_strides, b, g, key), total, (column < SELECT) & (key < S),
               WIDTH, PADDED)
