"""The gradients of selected.py.

    dq      by query: the forward's walk over the union of a few tokens' blocks;
    dk, dv  by block: its readers, gathered from all over the sequence, each a token's R rows

    block j:  reader lists (last token first) | chunk | chunk | ..   one program a chunk
                                                  \\   |    /
                                                sum in this order -> dk, dv of the block

Every query reads block 0, so its list is as long as the sequence: chunks keep any one program from
walking all of it, and their sums are added in list order, so two runs agree bit by bit. In dk and
dv a token's HEADS rows are R padded to 16 at least, as the matrix unit wants; dq calls that
ROW_HEADS, as its own HEADS may be smaller.
"""

import triton
import triton.language as tl

from kernels.boxes import hold, load_box, load_group, place_in_boxes, rows_of_a_box
from kernels.selected import read_entry
from kernels.tile import (
    LOG2E,
    add_rows,
    load_rows,
    number_offsets,
    prepare_gradient,
    row_offsets,
    score_gradient,
    score_gradient_by_key,
    store_rows,
)

# Products that use a held tile: with one alone, Triton would fill the registers anew in every step.
# dq has two from two loops, dk and dv from two readers a step.
USES = tl.constexpr(2)


@triton.jit
def selected_dq(
    q, k, v, entries, counts, out, dout, lse, gates, dgates, row_lse, row_delta, dq,
    q_strides, out_strides, dout_strides, dq_strides, row_stride, G, T, start, scale,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    n: tl.constexpr, SELECT: tl.constexpr, U: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr,
    HOLD: tl.constexpr, ROW_HEADS: tl.constexpr, BRANCH: tl.constexpr, ADD: tl.constexpr,
):
    """dq = scale * sum of ds k, by the forward's walk; leaves lse and delta for dk and dv."""
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    first = tl.program_id(0) * U
    token, head, real = rows_of_a_box(first, T, R, HEADS, U)
    t = start + token
    tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)

    q_tile = load_group(q, q_strides, b, g * R, first, head, token, real, D, DP, HOLD)
    do_tile = load_group(
        dout, dout_strides, b, g * R, first, head, token, real, DV, DVP, HOLD)
    o_tile = load_group(out, out_strides, b, g * R, first, head, token, real, DV, DVP, False)
    at = number_offsets(b, g, head, token, G, T, R)
    by_row = tl.program_id(1).to(tl.int64) * row_stride + place_in_boxes(token, head, ROW_HEADS, 1)
    log_sum, delta, gate = prepare_gradient(
        o_tile, do_tile, lse, None, gates, dgates, row_lse, row_delta, at, by_row, real, BRANCH)
    dq_tile = tl.zeros([HEADS * U, DP], tl.float32)
    count = tl.load(counts + tile)
    PARTS: tl.constexpr = USES if HOLD else 1
    for part in tl.static_range(PARTS):
        for e in range(part * count // PARTS, (part + 1) * count // PARTS):
            key, visible = read_entry(entries, tile * U * n + e, token, real, t, U, SELECT, N)
            k_tile, v_tile = load_box(k, b, g, key, N, DP), load_box(v, b, g, key, N, DVP)
            _, ds = score_gradient(
                q_tile, k_tile, v_tile, do_tile, log_sum, delta, visible, scale * LOG2E)
            dq_tile = tl.dot(ds.to(k_tile.dtype), k_tile, dq_tile, input_precision="ieee")
    add_rows(dq, row_offsets(dq_strides, b, g * R + head, token),
             dq_tile * (scale * gate)[:, None], real, D, DP, ADD)


@triton.jit
def selected_dkdv(
    q, k, v, dout, row_lse, row_delta, tokens, bounds, owner, chunk_bounds, dk, dv,
    G, T, start, scale, LISTS, BLOCKS,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    SELECT: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, HOLD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0)
    readers = tl.load(owner + chunk)
    if readers >= LISTS:
        return  # more programs are started than there are chunks
    group, block = readers // BLOCKS, readers % BLOCKS
    b, g = group // G, group % G
    begin = tl.load(bounds + readers) + (chunk - tl.load(chunk_bounds + readers)) * CHUNK
    end = tl.minimum(tl.load(bounds + readers + 1), begin + CHUNK)
    tl.assume(end > begin)  # not knowing it, the assembler lets each product wait
    rows = group.to(tl.int64) * T * HEADS  # where this group's rows begin
    first_key, column, head = block * SELECT, tl.arange(0, N), tl.arange(0, HEADS)
    held = column < SELECT
    k_tile = hold(load_box(k, b, g, first_key, N, DP), held, HOLD)
    v_tile = hold(load_box(v, b, g, first_key, N, DVP), held, HOLD)

    dk_tile, dv_tile = tl.zeros([N, DP], tl.float32), tl.zeros([N, DVP], tl.float32)
    STEP: tl.constexpr = USES if HOLD else 1
    for some in range(begin, end, STEP):
        for i in tl.static_range(STEP):
            token = tl.load(tokens + tl.minimum(some + i, end - 1))
            q_tile = load_box(q, b, g * R, token, HEADS, DP)
            do_tile = load_box(dout, b, g * R, token, HEADS, DVP)
            limit = tl.where(some + i < end, start + token, -1)
            visible = (first_key + column <= limit)[:, None] & (head < R)[None, :]
            row = rows + token * HEADS + head
            p, ds = score_gradient_by_key(
                q_tile, k_tile, v_tile, do_tile, tl.load(row_lse + row), tl.load(row_delta + row),
                visible, scale * LOG2E)
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
