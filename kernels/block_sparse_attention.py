"""Attention to the selected blocks (Eq. 12), forward and backward.

    forward, dq    program (i, g) owns BLOCK_T tokens x R heads, a tile of rows
                       for each block of the tokens' union:  its l' keys, loaded once
                           rows of tokens that did not choose it are masked

    dk, dv         a program owns a block and a chunk of its readers, gathered from all over
                   the sequence: a token's R rows each, several tokens a product for small R
                       block j:  readers (first token first) | chunk | chunk | ..
                                                                  \\    |    /
                                                  sum in this order -> dk, dv of block j

The paper's kernel (section 3.4) has a program for each token and group: a block is then loaded for
R rows only. Here BLOCK_T neighbouring tokens, 32 at most, share a program, and load once what they
have in common: at least the forced blocks. Four tokens for R = 16, or 16 for R = 4, fill the 64
rows that the H100's fast matrix unit wants.

Every query reads block 0, so its list is as long as the sequence: chunks keep any one program from
walking all of it, and their sums are added in list order, so two runs agree bit by bit.

H query heads in G groups of R = H / G; T queries, S keys. Read rows.py (why the heads of a group
are rows of one tile), online_softmax.py and union_and_readers.py first.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32, Int64
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.checks import (
    check_ids,
    check_inputs,
    check_keys_reach,
    check_select_block_size,
    scale_or_default,
)
from kernels.descriptors import (
    descriptor,
    group_argument,
    hold,
    load_group,
    load_tile,
    place_in_tiles,
    room_for_numbers,
)
from kernels.launching import grid_of, launch
from kernels.online_softmax import (
    LOG2E,
    GatedBranch,
    Read,
    RowNumbers,
    Saved,
    finish,
    fold_in,
    prepare_gradient,
    score_gradient,
    score_gradient_by_key,
)
from kernels.operations import in_batches, operation
from kernels.pieces import (
    add_pieces,
    add_products,
    load_pieces,
    plus,
    store_pieces,
    times,
    zeros,
)
from kernels.rows import (
    Rows,
    TileRows,
    batch_and_group,
    empty_gradient,
    empty_key_gradient,
    empty_output,
    load_gate,
    number_offsets,
    row_offsets,
    rows,
    rows_contiguous,
    rows_of_a_tile,
    rows_to_read,
)
from kernels.tile_sizes import (
    PRODUCTS_OF_HELD,
    Tile,
    cdiv,
    padded,
    piece_width,
    power_of_two,
    tile_for,
    tile_sizes,
    widest,
    widths_of,
)
from kernels.union_and_readers import (
    CHUNK,
    NEIGHBOURS,
    Readers,
    Union,
    empty_union,
    readers,
    union,
)


class Blocks(NamedTuple):
    """What attention to selected blocks needs beside its tensors; query i is token start + i."""

    select_block_size: int
    scale: float
    start: int


class Mix(NamedTuple):
    """Eq. 5: the gates, the outputs of the other two branches, and where the sum goes."""

    gates: Tensor
    compressed: Tensor
    window: Tensor
    out: Tensor


# --- the kernels ---


class Sizes(NamedTuple):
    """Runtime sizes: groups, queries, the first query's position, and the scale."""

    G: int
    T: int
    start: int
    scale: float


class Selection(NamedTuple):
    """Compile-time sizes of a selection: l' and n."""

    select_block_size: int
    num_selected: int


class ChunkSums(NamedTuple):
    """dk and dv (chunks, l', width) float32, contiguous: each chunk of a list has its own sums."""

    dk: Tensor
    dv: Tensor


@triton.jit
def read_entry(union, entry, at, t, TILE: tl.constexpr, SELECT_BLOCK_SIZE: tl.constexpr):
    """The first key of one block of a union, and which of its keys each row may read [M, N]."""
    block_and_bits = tl.load(union.entries + entry)
    first = (block_and_bits >> TILE.BLOCK_T).to(tl.int32) * SELECT_BLOCK_SIZE
    chosen = ((block_and_bits.to(tl.int32) >> (at.token % TILE.BLOCK_T)) & 1) > 0
    limit = tl.where(chosen & at.mask, t, -1)  # the last key to read; -1: none of this block
    if TILE.BLOCK_N > SELECT_BLOCK_SIZE:  # the tile reaches into the next block
        limit = tl.minimum(limit, first + SELECT_BLOCK_SIZE - 1)
    return first, (first + tl.arange(0, TILE.BLOCK_N))[None, :] <= limit[:, None]


@triton.jit
def selected_forward(
    q,
    desc_k,
    desc_v,
    union,
    out,
    lse,
    mix,
    sizes,
    WIDTHS: tl.constexpr,
    TILE: tl.constexpr,
    SELECTION: tl.constexpr,
):
    """out and lse of M = BLOCK_H * BLOCK_T rows, which walk over the union of their blocks.

    Tiles: q [M, D], k [N, D], v [N, DV], the output acc [M, DV]. With `mix` (Mix or None) it writes
    the gated sum of all three branches too.
    """
    M: tl.constexpr = TILE.BLOCK_H * TILE.BLOCK_T
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    D: tl.constexpr = WIDTHS.D
    DV: tl.constexpr = WIDTHS.DV
    BLOCK_D: tl.constexpr = WIDTHS.BLOCK_D
    BLOCK_DV: tl.constexpr = WIDTHS.BLOCK_DV
    at = rows_of_a_tile(tl.program_id(0) * TILE.BLOCK_T, sizes, WIDTHS.R, TILE)
    t = sizes.start + at.token  # [M]
    tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    entry = tile * TILE.BLOCK_T * SELECTION.num_selected

    q_tile = load_group(q, at, WIDTHS.R, D, BLOCK_D, False)  # [M, D]
    m_i = tl.full([M], -float("inf"), tl.float32)
    l_i = tl.zeros([M], tl.float32)
    acc = zeros(M, DV, BLOCK_DV)
    for e in range(tl.load(union.counts + tile)):
        key, mask = read_entry(union, entry + e, at, t, TILE, SELECTION.select_block_size)
        k_tile = load_tile(desc_k, at.b, at.g, key, BLOCK_N, D, BLOCK_D)  # [N, D]
        v_tile = load_tile(desc_v, at.b, at.g, key, BLOCK_N, DV, BLOCK_DV)  # [N, DV]
        m_i, l_i, acc = fold_in(q_tile, k_tile, v_tile, mask, sizes.scale * LOG2E, m_i, l_i, acc)
    acc, row_lse = finish(m_i, l_i, acc)
    to = row_offsets(out.strides, at.b, at.g * WIDTHS.R + at.head, at.token)
    number = number_offsets(at, sizes, WIDTHS.R)
    store_pieces(out.ptr, to, acc, at.mask, DV, BLOCK_DV)
    tl.store(lse + number, row_lse, mask=at.mask)
    if mix is not None:  # Eq. 5; the outputs of all branches lie alike
        total = times(acc, load_gate(mix.gates, number, at.mask, 1)[:, None])
        compressed = load_pieces(mix.compressed, to, at.mask, DV, BLOCK_DV)
        total = plus(total, times(compressed, load_gate(mix.gates, number, at.mask, 0)[:, None]))
        window = load_pieces(mix.window, to, at.mask, DV, BLOCK_DV)
        total = plus(total, times(window, load_gate(mix.gates, number, at.mask, 2)[:, None]))
        store_pieces(mix.out, to, total, at.mask, DV, BLOCK_DV)


@triton.jit
def selected_dq(
    q,  # with HOLD a descriptor, else Rows; dout too
    desc_k,
    desc_v,
    dout,
    union,
    out,
    dq,
    numbers,
    gating,
    sizes,
    WIDTHS: tl.constexpr,
    TILE: tl.constexpr,
    SELECTION: tl.constexpr,
    BRANCH: tl.constexpr,
):
    """dq of M = BLOCK_H * BLOCK_T rows, by the forward's walk; lse and delta for dk and dv.

    Tiles: q and dq [M, D], out and dout [M, DV], k [N, D], v [N, DV]. `gating` is Gates or None.
    With it the three branches share one dq: compressed (BRANCH 0) is launched first and writes it,
    selected (1) and window (2) add to it.
    """
    M: tl.constexpr = TILE.BLOCK_H * TILE.BLOCK_T
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    D: tl.constexpr = WIDTHS.D
    DV: tl.constexpr = WIDTHS.DV
    BLOCK_D: tl.constexpr = WIDTHS.BLOCK_D
    BLOCK_DV: tl.constexpr = WIDTHS.BLOCK_DV
    HEADS: tl.constexpr = triton.next_power_of_2(WIDTHS.R)
    PARTS: tl.constexpr = PRODUCTS_OF_HELD if TILE.HOLD else 1
    at = rows_of_a_tile(tl.program_id(0) * TILE.BLOCK_T, sizes, WIDTHS.R, TILE)
    t = sizes.start + at.token  # [M]
    tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    entry = tile * TILE.BLOCK_T * SELECTION.num_selected

    q_tile = load_group(q, at, WIDTHS.R, D, BLOCK_D, TILE.HOLD)  # [M, D]
    do_tile = load_group(dout, at, WIDTHS.R, DV, BLOCK_DV, TILE.HOLD)  # [M, DV]
    o_tile = load_group(out, at, WIDTHS.R, DV, BLOCK_DV, False)  # [M, DV]
    number = number_offsets(at, sizes, WIDTHS.R)
    by_row = tl.program_id(1).to(tl.int64) * numbers.stride
    by_row += place_in_tiles(at, HEADS, 1)  # one token's heads a tile: selected_dkdv's
    lse, delta, gate = prepare_gradient(
        o_tile, do_tile, numbers, gating, number, by_row, at.mask, BRANCH
    )
    acc = zeros(M, D, BLOCK_D)
    count = tl.load(union.counts + tile)
    for part in tl.static_range(PARTS):
        for e in range(part * count // PARTS, (part + 1) * count // PARTS):
            key, mask = read_entry(union, entry + e, at, t, TILE, SELECTION.select_block_size)
            k_tile = load_tile(desc_k, at.b, at.g, key, BLOCK_N, D, BLOCK_D)  # [N, D]
            v_tile = load_tile(desc_v, at.b, at.g, key, BLOCK_N, DV, BLOCK_DV)  # [N, DV]
            _, ds = score_gradient(
                q_tile, k_tile, v_tile, do_tile, lse, delta, mask, sizes.scale * LOG2E
            )
            acc = add_products(acc, ds, k_tile)
    to = row_offsets(dq.strides, at.b, at.g * WIDTHS.R + at.head, at.token)
    acc = times(acc, (sizes.scale * gate)[:, None])
    add_pieces(dq.ptr, to, acc, at.mask, D, BLOCK_D, BRANCH > 0)


@triton.jit
def chunk_of_readers(readers, list_id, CHUNK: tl.constexpr):
    """The first reader of this program's chunk of a list, and the end of the chunk."""
    begin = tl.load(readers.indptr + list_id)
    begin += (tl.program_id(0) - tl.load(readers.chunk_indptr + list_id)) * CHUNK
    return begin, tl.minimum(tl.load(readers.indptr + list_id + 1), begin + CHUNK)


@triton.jit
def readers_of_a_step(readers, b, g, first, end, R: tl.constexpr, TILE: tl.constexpr):
    """The TileRows of BLOCK_T readers, from `first` on; here a reader's heads lie together.

    A last step that readers do not fill reads the last one again, all of it masked.
    """
    row = tl.arange(0, TILE.BLOCK_H * TILE.BLOCK_T)
    head = row % TILE.BLOCK_H
    reader = first + row // TILE.BLOCK_H if TILE.BLOCK_T > 1 else first
    token = tl.load(readers.indices + tl.minimum(reader, end - 1))
    return TileRows(b, g, token, token, head, (reader < end) & (head < R))


@triton.jit
def load_readers(
    x, at, R: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TILE: tl.constexpr
):
    """The rows `at` of x as a tile [M, BLOCK_WIDTH]: a box of one token's, else gathered."""
    if TILE.BLOCK_T == 1:
        tile = load_tile(x, at.b, at.g * R, at.first, TILE.BLOCK_H, WIDTH, BLOCK_WIDTH)
    else:
        offsets = row_offsets(x.strides, at.b, at.g * R + at.head, at.token)
        tile = load_pieces(x.ptr, offsets, at.mask, WIDTH, BLOCK_WIDTH)
    return tile


@triton.jit
def selected_dkdv(
    q,  # with BLOCK_T = 1 a descriptor, else Rows; dout too
    desc_k,
    desc_v,
    dout,
    row_lse,
    row_delta,
    readers,
    sums,
    sizes,
    WIDTHS: tl.constexpr,
    TILE: tl.constexpr,
    SELECT_BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """dk and dv of one block, from one chunk of its readers; a reader is a token's R rows.

    Tiles: k and dk [N, D], v and dv [N, DV], q [M, D] and dout [M, DV] of BLOCK_T readers, the
    scores [N, M]. M = BLOCK_H * BLOCK_T, where BLOCK_H is R padded, and N is l' padded.
    """
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    D: tl.constexpr = WIDTHS.D
    DV: tl.constexpr = WIDTHS.DV
    BLOCK_D: tl.constexpr = WIDTHS.BLOCK_D
    BLOCK_DV: tl.constexpr = WIDTHS.BLOCK_DV
    PARTS: tl.constexpr = PRODUCTS_OF_HELD if TILE.HOLD else 1
    chunk = tl.program_id(0)
    list_id = tl.load(readers.chunk_list + chunk)
    if list_id >= readers.lists:
        return  # more programs are started than there are chunks
    batch_group = list_id // readers.blocks
    b = batch_group // sizes.G
    g = batch_group % sizes.G
    begin, end = chunk_of_readers(readers, list_id, CHUNK)
    tl.assume(end > begin)  # not knowing it, the assembler lets each product wait
    group_rows = batch_group.to(tl.int64) * sizes.T * TILE.BLOCK_H  # where this group's rows begin
    key = list_id % readers.blocks * SELECT_BLOCK_SIZE
    column = tl.arange(0, BLOCK_N)
    key_mask = column < SELECT_BLOCK_SIZE
    k_tile = hold(load_tile(desc_k, b, g, key, BLOCK_N, D, BLOCK_D), key_mask, TILE.HOLD)
    v_tile = hold(load_tile(desc_v, b, g, key, BLOCK_N, DV, BLOCK_DV), key_mask, TILE.HOLD)

    dk = zeros(BLOCK_N, D, BLOCK_D)
    dv = zeros(BLOCK_N, DV, BLOCK_DV)
    for some in range(begin, end, PARTS * TILE.BLOCK_T):
        for i in tl.static_range(PARTS):
            at = readers_of_a_step(readers, b, g, some + i * TILE.BLOCK_T, end, WIDTHS.R, TILE)
            q_tile = load_readers(q, at, WIDTHS.R, D, BLOCK_D, TILE)  # [M, D]
            do_tile = load_readers(dout, at, WIDTHS.R, DV, BLOCK_DV, TILE)  # [M, DV]
            limit = tl.where(at.mask, sizes.start + at.token, -1)  # the last key to read
            mask = (key + column)[:, None] <= limit[None, :]
            row = group_rows + at.token * TILE.BLOCK_H + at.head
            lse = tl.load(row_lse + row)  # less log2(gate): p is gate * p then, dk and dv gated
            delta = tl.load(row_delta + row)
            p, ds = score_gradient_by_key(
                q_tile, k_tile, v_tile, do_tile, lse, delta, mask, sizes.scale * LOG2E
            )
            dv = add_products(dv, p, do_tile)
            dk = add_products(dk, ds, q_tile)
    slot = chunk.to(tl.int64) * SELECT_BLOCK_SIZE + column
    store_pieces(sums.dk, slot * D, times(dk, sizes.scale), key_mask, D, BLOCK_D)
    store_pieces(sums.dv, slot * DV, dv, key_mask, DV, BLOCK_DV)


@triton.jit
def add_chunks(
    sums,
    chunk_indptr,
    dx,
    G,
    S,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    SELECT_BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums of a block's chunks, added in order; 0 for a block that nobody read.

    Tiles: a chunk's sum and the total, [N, width] for the block's l' keys padded to N = BLOCK_N.
    """
    b, g = batch_and_group(G)
    list_id = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    column = tl.arange(0, BLOCK_N)
    key = tl.program_id(0) * SELECT_BLOCK_SIZE + column
    key_mask = column < SELECT_BLOCK_SIZE
    total = zeros(BLOCK_N, WIDTH, BLOCK_WIDTH)
    for chunk in range(tl.load(chunk_indptr + list_id), tl.load(chunk_indptr + list_id + 1)):
        slot = (tl.zeros([BLOCK_N], tl.int64) + chunk) * SELECT_BLOCK_SIZE + column
        total = plus(total, load_pieces(sums, slot * WIDTH, key_mask, WIDTH, BLOCK_WIDTH))
    to = row_offsets(dx.strides, b, g, key)
    store_pieces(dx.ptr, to, total, key_mask & (key < S), WIDTH, BLOCK_WIDTH)


# --- their launches ---


def union_tile(R: int, BLOCK_M: int) -> tuple[int, int]:
    """How many heads and tokens share a program and its walk over the union of their blocks.

    As many tokens as fill BLOCK_M rows, if an entry has a bit for each. For R = 1 it has not: half
    of the 64 rows that the fast matrix unit takes stay empty.
    """
    heads = power_of_two(R)
    tokens = max(1, min(NEIGHBOURS, BLOCK_M // heads))
    return max(heads, min(64, BLOCK_M) // tokens), tokens


def tokens_of_a_union(q: Tensor, k: Tensor, v: Tensor) -> int:
    """How many neighbouring tokens share a program."""
    widths = widths_of(q, k, v)
    tile = tile_sizes("selected_forward", widest(widths.D, widths.DV), q.dtype)
    return union_tile(widths.R, tile.BLOCK_M)[1]


def reader_tile(R: int, BLOCK_M: int) -> tuple[int, int]:
    """How many heads and readers are the rows of a product of dk and dv: about BLOCK_M."""
    heads = power_of_two(R)
    return heads, max(1, BLOCK_M // heads)


def reader_row(R: int) -> str:
    """The line of selected_dkdv: groups of fewer than 16 heads, whose readers share products."""
    return "selected_dkdv_small" if power_of_two(R) < 16 else "selected_dkdv"


def readers_argument(x: Tensor, heads: int, tokens: int) -> TensorDescriptor | Rows:
    """What `load_readers` takes for x: a descriptor for one reader at a time, else rows."""
    return descriptor(x, heads, 1) if tokens == 1 else rows(x)


def num_blocks(q: Tensor, blocks: Blocks) -> int:
    """How many blocks have begun at the last query's token."""
    return cdiv(blocks.start + q.shape[2], blocks.select_block_size)


def sizes_of(q: Tensor, k: Tensor, blocks: Blocks) -> Sizes:
    """The runtime sizes that the kernels here take."""
    return Sizes(k.shape[1], q.shape[2], blocks.start, blocks.scale)


def prepared(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels read: of the keys those up to the last query's."""
    return rows_to_read(q, k, v, blocks.start + q.shape[2])


def block_sparse(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, blocks: Blocks, mix: Mix | None = None
) -> tuple[Saved, Union]:
    """Attention to the selected blocks, and the union that its dq walks too."""
    q, k, v = prepared(q, k, v, blocks)
    out, lse = empty_output(q, v.shape[3])
    widths = widths_of(q, k, v)
    tuned = tile_for("selected_forward", widths, q, block=blocks.select_block_size)
    heads, tokens = union_tile(widths.R, tuned.BLOCK_M)
    BLOCK_N = tuned.BLOCK_N
    shared = union(ids, tokens, num_blocks(q, blocks))
    launch(
        selected_forward,
        grid_of(shared.counts.shape[2], k.shape[0], k.shape[1]),
        rows(q),
        descriptor(k, 1, BLOCK_N),
        descriptor(v, 1, BLOCK_N),
        shared,
        rows(out),
        lse,
        mix,
        sizes_of(q, k, blocks),
        WIDTHS=widths,
        TILE=Tile(heads, tokens, BLOCK_N, tuned.hold),
        SELECTION=Selection(blocks.select_block_size, ids.shape[3]),
        **tuned.launch_options(),
    )
    return Saved(q, k, v, out, lse), shared


def block_sparse_gradients(
    saved: Saved,
    ids: Tensor,
    shared: Union,
    dout: Tensor,
    blocks: Blocks,
    gated: GatedBranch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of `block_sparse`."""
    q, k, v = prepared(*saved[:3], blocks)
    out, lse = saved[3:]
    dout = rows_contiguous(dout)
    widths = widths_of(q, k, v)
    tuned = tile_for("selected_dq", widths, q, block=blocks.select_block_size)
    heads, tokens = union_tile(widths.R, tuned.BLOCK_M)
    BLOCK_N = tuned.BLOCK_N
    row_lse, row_delta = room_for_numbers(q, k.shape[1], power_of_two(widths.R), 1)
    dq = empty_gradient(saved.q) if gated is None else gated.dq
    launch(
        selected_dq,
        grid_of(shared.counts.shape[2], k.shape[0], k.shape[1]),
        group_argument(q, heads, tokens, tuned.hold),
        descriptor(k, 1, BLOCK_N),
        descriptor(v, 1, BLOCK_N),
        group_argument(dout, heads, tokens, tuned.hold),
        shared,
        rows(out),
        rows(dq),
        RowNumbers(lse, None, row_lse, row_delta, row_lse.stride(0)),
        None if gated is None else gated.gates,
        sizes_of(q, k, blocks),
        WIDTHS=widths,
        TILE=Tile(heads, tokens, BLOCK_N, tuned.hold),
        SELECTION=Selection(blocks.select_block_size, ids.shape[3]),
        BRANCH=0 if gated is None else gated.branch,
        **tuned.launch_options(),
    )
    dk, dv = (empty_key_gradient(x, k.shape[2]) for x in saved[1:3])
    block_gradients(Read(q, k, v, dout), ids, row_lse, row_delta, blocks, dk, dv)
    return dq, dk, dv


def block_gradients(
    read: Read,
    ids: Tensor,
    row_lse: Tensor,
    row_delta: Tensor,
    blocks: Blocks,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write dk and dv of each block from its readers, whose chunks are added up in order."""
    q, k, v, dout = read
    widths = widths_of(q, k, v)
    tuned = tile_for(reader_row(widths.R), widths, q, block=blocks.select_block_size)
    heads, tokens = reader_tile(widths.R, tuned.BLOCK_M)
    BLOCK_N = tuned.BLOCK_N
    who = readers(ids, num_blocks(q, blocks), CHUNK)
    shape = len(who.chunk_list), blocks.select_block_size
    sums = ChunkSums(*(x.new_empty(*shape, x.shape[3], dtype=torch.float32) for x in (k, v)))
    launch(
        selected_dkdv,
        (len(who.chunk_list),),
        readers_argument(q, heads, tokens),
        descriptor(k, 1, BLOCK_N),
        descriptor(v, 1, BLOCK_N),
        readers_argument(dout, heads, tokens),
        row_lse,
        row_delta,
        who,
        sums,
        sizes_of(q, k, blocks),
        WIDTHS=widths,
        TILE=Tile(heads, tokens, BLOCK_N, tuned.hold),
        SELECT_BLOCK_SIZE=blocks.select_block_size,
        CHUNK=CHUNK,
        **tuned.launch_options(),
    )
    key_count = k.shape[2]
    add_up(sums.dk, dk[:, :, :key_count], who, blocks)
    add_up(sums.dv, dv[:, :, :key_count], who, blocks)


def add_up(sums: Tensor, dx: Tensor, who: Readers, blocks: Blocks) -> None:
    """Write one gradient, of the keys up to the last query's, from its blocks' chunks."""
    batch, groups, key_count, width = dx.shape
    launch(
        add_chunks,
        grid_of(who.blocks, batch, groups),
        sums,
        who.chunk_indptr,
        rows(dx),
        groups,
        key_count,
        WIDTH=width,
        BLOCK_WIDTH=piece_width(width),
        SELECT_BLOCK_SIZE=blocks.select_block_size,
        BLOCK_N=padded(blocks.select_block_size),
    )


# --- as an operation of torch ---


@operation
@in_batches
def attend_to_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    select_block_size: int,
    scale: float,
    start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention to the selected blocks: out (B, H, T, Dv), its log-sum-exp, and the Union."""
    blocks = Blocks(select_block_size, scale, start)
    saved, shared = block_sparse(q, k, v, ids.contiguous(), blocks)
    return saved.out, saved.lse, *shared


@operation
@in_batches
def attend_to_blocks_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    out: Tensor,
    lse: Tensor,
    entries: Tensor,
    counts: Tensor,
    dout: Tensor,
    select_block_size: int,
    scale: float,
    start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of attend_to_blocks."""
    return block_sparse_gradients(
        Saved(q, k, v, out, lse),
        ids.contiguous(),
        Union(entries, counts),
        dout,
        Blocks(select_block_size, scale, start),
    )


@attend_to_blocks.register_fake
def _(q, k, v, ids, *_):
    return *empty_output(q, v.shape[3]), *empty_union(ids, tokens_of_a_union(q, k, v))


@attend_to_blocks_backward.register_fake
def _(q, k, v, *_):
    return empty_gradient(q), empty_gradient(k), empty_gradient(v)


def save(ctx, inputs, output):
    q, k, v, ids, *ctx.sizes = inputs
    ctx.save_for_backward(q, k, v, ids, *output)
    ctx.set_materialize_grads(False)


def backward(ctx, dout, *_):
    gradients = attend_to_blocks_backward(*ctx.saved_tensors, dout, *ctx.sizes)
    return *gradients, None, None, None, None


attend_to_blocks.register_autograd(backward, setup_context=save)


# --- for everyone ---


def selected_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S Dv"],
    ids: Int32[Tensor, "B G T n"] | Int64[Tensor, "B G T n"],
    *,
    select_block_size: int,
    scale: float | None = None,
    start: int = 0,
) -> Float[Tensor, "B H T Dv"]:
    """Attention to the raw tokens of the selected blocks, causal inside the own block.

    Eq. 12: out_t = softmax(scale q_t k_s) v_s over s <= t with s // select_block_size in ids[t].
    ids are distinct, -1 is padding, and so is an id beyond the last block. On a GPU they are not
    looked at, for that would wait: a block named twice is read once there, but the gradients of its
    keys and values are then twice as large, which is wrong.
    Errors: ValueError or TypeError that names the argument.
    """
    check_inputs(q, k, v)
    check_keys_reach(q, k, start)
    check_select_block_size(select_block_size)
    check_ids(ids, q, k)
    scale = scale_or_default(scale, q.shape[3])
    return attend_to_blocks(q, k, v, ids, select_block_size, scale, start)[0]
