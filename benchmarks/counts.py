"""What each kernel multiplies and moves: floating-point operations and bytes, counted, not timed.

An attention kernel keeps a tile of rows, or of keys, and walks over the others; KERNELS says what
it does for a pair of them. A sum that our kernels add up in parts is counted so: its parts go to
memory and come back. Matrix products count, and the gates' multiply-adds; exponentials do not, nor
does the selected branch's work on ids. Tiles are counted on average, not one by one. From 8k tokens
on all this is within 2% of the tiles that the kernels walk and the bytes that they load.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from kernels.block_sparse_attention import reader_row, reader_tile, union_tile
from kernels.flash_attention import row_tile, token_chunks
from kernels.tile_sizes import (
    TileSizes,
    blocks_in_a_tile,
    columns,
    padded,
    row_name,
    tile_sizes,
    widest,
)
from kernels.union_and_readers import CHUNK
from kernels.visible_keys import Keys
from nsa_lite.blocks import num_compressed, num_select_blocks
from nsa_lite.checks import require
from nsa_lite.config import NSAConfig
from nsa_lite.cost import sequence_cost

MATRIX_ROWS = 64  # of the first operand, in one instruction of the matrix unit


@dataclass(frozen=True)
class Work:
    """What one kernel does: floating-point operations, and bytes."""

    operations: float  # for pairs that the mask lets through
    executed: float  # for whole tiles
    memory: float  # each tensor, and each part of a sum, once: no order of programs moves less
    cache: float  # what all programs load and store
    shared: float = 0.0  # what the steps of all walks write to shared memory, and read from it


# --- what the attention kernels do ---


class Kernel(NamedTuple):
    """What an attention kernel multiplies for a pair of a row and a key, and what it moves of each.

    A row is one head's query. (a, b) counts vectors of D numbers and vectors of Dv.
    """

    owns: str  # "rows" or "keys": a program keeps a tile of these, and walks over the others
    products: tuple[int, int]  # how often a pair meets a vector
    owned: tuple[int, int]  # vectors of what it owns that are first operands of products
    row_vectors: int  # of D + Dv
    row_numbers: int  # in float32
    key_vectors: int  # of D + Dv


KERNELS = {
    "forward": Kernel(
        owns="rows",
        products=(1, 1),  # s = q k, out += p v
        owned=(1, 0),  # q; p was computed, so it is in registers
        row_vectors=1,  # q and out
        row_numbers=1,  # lse
        key_vectors=1,  # k and v
    ),
    "dq": Kernel(
        owns="rows",
        products=(2, 1),  # s and dp = dout v again, dq += ds k
        owned=(1, 1),  # q and dout
        row_vectors=2,  # q and dq, out and dout
        row_numbers=3,  # lse, row_lse and row_delta
        key_vectors=1,
    ),
    "dk dv": Kernel(
        owns="keys",
        products=(2, 2),  # s and dp again, dk += ds q, dv += p dout
        owned=(1, 1),  # k and v
        row_vectors=1,  # q and dout
        row_numbers=2,  # row_lse and row_delta
        key_vectors=2,  # k, v, dk and dv
    ),
}


# --- sizes ---


@dataclass(frozen=True)
class Sizes:
    """What the counts below share: rows are queries x heads, numbers are elements of a tensor."""

    config: NSAConfig
    length: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def groups(self) -> int:
        return self.batch * self.config.kv_heads

    @property
    def rows(self) -> int:
        return self.batch * self.config.heads * self.length

    @property
    def width(self) -> int:
        """D + Dv: a key and its value, or a query and its output."""
        return self.config.head_dim + self.config.value_dim

    def bytes(self, numbers: float) -> float:
        """Bytes of `numbers` elements of q, k, v and their like."""
        return numbers * self.dtype.itemsize

    def row_bytes(self, kernel: Kernel) -> float:
        """Bytes that a kernel moves for a row."""
        return self.bytes(kernel.row_vectors * self.width) + 4 * kernel.row_numbers

    def numbers(self, vectors: tuple[int, int], in_tiles: bool = True) -> int:
        """Numbers in so many vectors of D and of Dv; a tile's are padded."""
        widths = (self.config.head_dim, self.config.value_dim)
        if in_tiles:
            widths = tuple(columns(width) for width in widths)
        return vectors[0] * widths[0] + vectors[1] * widths[1]

    def tile(self, kernel: str) -> TileSizes:
        """The line of kernels/tile_sizes.py."""
        width = widest(self.config.head_dim, self.config.value_dim)
        return tile_sizes(kernel, width, self.dtype)


class Tiles(NamedTuple):
    """The tiles of one kernel: rows x keys, and the pairs of all of them, masked ones included."""

    rows: int
    keys: int
    hold: bool  # what a program owns waits in registers
    pairs: float


# --- one count for every attention kernel ---


def attention(
    sizes: Sizes, what: str, tiles: Tiles, pairs: float, count: int, parts: float = 0.0
) -> Work:
    """One kernel, for `pairs` that the mask lets through in each head, and `count` keys a group.

    What it owns is moved once. Every step of its walk brings in one tile of the others: a key for
    each tiles.rows pairs, or a row for each tiles.keys. `parts`: how many float32 sums a key has,
    on average, that are added up afterwards; each was made by a program of its own.
    """
    kernel = KERNELS[what]
    row = sizes.row_bytes(kernel)
    key = sizes.bytes(sizes.width)
    keys = sizes.groups * count
    sums = 2 * 4 * parts * keys * sizes.width  # out and back
    if kernel.owns == "rows":
        moved = sizes.rows * row + tiles.pairs / tiles.rows * key
    else:
        moved = tiles.pairs / tiles.keys * row + (max(parts, 1) + 1) * keys * key + sums
    needed = sizes.batch * sizes.config.heads * pairs
    return Work(
        operations=2 * needed * sizes.numbers(kernel.products, in_tiles=False),
        executed=2 * tiles.pairs * sizes.numbers(kernel.products),
        memory=sizes.rows * row + kernel.key_vectors * keys * key + sums,
        cache=moved,
        shared=through_shared_memory(sizes, kernel, tiles),
    )


def through_shared_memory(sizes: Sizes, kernel: Kernel, tiles: Tiles) -> float:
    """Bytes that the steps of all walks move through shared memory, in and out.

    One instruction of the matrix unit (wgmma m64nNk16) multiplies 64 x 16 by 16 x N numbers:

        first operand     64 x 16 numbers    from shared memory, or from registers
        second operand    16 x N numbers     from shared memory, always

    The second operands are what a step loaded. 64 owned rows use it in one go, more rows read it
    again. With N = 16 a first operand of 2 KB takes 16 clocks at 128 bytes, the products 8.
    What a program loads once, before its walk, is left out: at most a tenth of its bytes.
    """
    owned, walked = tiles.rows, tiles.keys
    if kernel.owns == "keys":
        owned, walked = walked, owned
    written = walked * sizes.numbers((1, 1))  # by the copy engine
    second = -(-owned // MATRIX_ROWS) * walked * sizes.numbers(kernel.products)
    first = 0 if tiles.hold else owned * sizes.numbers(kernel.owned)
    steps = tiles.pairs / (tiles.rows * tiles.keys)
    return steps * sizes.bytes(written + second + first)


# --- the kernels ---


def flash(sizes: Sizes, keys: Keys, pairs: float) -> dict[str, Work]:
    """flash_forward, flash_dq and flash_dkdv; pairs of queries and keys that may meet, a head."""
    return {what: flash_kernel(sizes, what, keys, pairs) for what in KERNELS}


def flash_kernel(sizes: Sizes, what: str, keys: Keys, pairs: float) -> Work:
    """One kernel of kernels/flash_attention.py, whose walk takes every tile that the mask touches.

    Where an edge of the mask crosses a row, it cuts a tile, on average in the middle: the row
    multiplies half a tile more than it sees. A causal mask has one edge, a window two. A tile of
    many tokens and few keys is crossed from end to end: then its tokens count.
    """
    sizes_of_tile = sizes.tile(row_name(f"flash_{what.replace(' ', '')}", keys.window))
    heads, tokens = row_tile(sizes.config.group_size, sizes_of_tile.BLOCK_M)
    N = sizes_of_tile.BLOCK_N
    edges = 1 if keys.window is None else 2
    wasted = (edges * max(N, tokens // keys.stride) - 1) / 2
    rows = sizes.groups * heads * sizes.length  # `heads` is padded to a power of two
    tiles = Tiles(heads * tokens, N, sizes_of_tile.hold, rows * (pairs / sizes.length + wasted))
    count = num_compressed(sizes.length, keys.block_size, keys.stride)
    programs = -(-count // N) * sizes.groups
    _, chunks = token_chunks(sizes.length, keys.window, tokens, N, programs)
    parts = chunks if what == "dk dv" and chunks > 1 else 0
    return attention(sizes, what, tiles, pairs, count, parts)


def neighbours(sizes: Sizes) -> int:
    """How many tokens share a program of the selected forward and dq, and its walk over a union."""
    return union_tile(sizes.config.group_size, sizes.tile("selected_forward").BLOCK_M)[1]


def expected_union(config: NSAConfig, length: int, U: int, keep: float = 0.0) -> float:
    """Blocks that U queries in a row read together, on average over the sequence.

    The free blocks are drawn at random from the legal ones, and each is kept from one query to
    the next with probability `keep`; the neighbours lie in one block, so they share the forced.
    Errors: ValueError for a `keep` outside 0 .. 1.
    """
    require(0 <= keep <= 1, "keep", keep, "must be a probability")
    forced = config.num_initial + config.num_local
    free = config.num_selected - forced
    blocks = num_select_blocks(length, config.select_block_size)
    total = 0.0
    for legal in range(1, blocks + 1):
        if legal <= config.num_selected:
            total += legal
            continue
        drawn = free / (legal - forced)
        missed = (1 - drawn) * (1 - (1 - keep) * drawn) ** (U - 1)
        total += forced + (legal - forced) * (1 - missed)
    return total / blocks


def selected(sizes: Sizes, pairs: float, union: float, U: int | None = None) -> dict[str, Work]:
    """selected_forward, selected_dq and selected_dkdv; `union` blocks a program on average.

    U tokens share a program; None takes what the kernels take. The bytes of ids and of lists of
    readers are left out: at most 4% of the memory.
    """
    U = neighbours(sizes) if U is None else U
    return selected_walks(sizes, pairs, union, U) | {"dk dv": selected_dkdv(sizes, pairs)}


def selected_walks(sizes: Sizes, pairs: float, union: float, U: int) -> dict[str, Work]:
    """The forward and dq: a program owns U tokens, and walks over the union of their blocks."""
    M = max(16, U * row_tile(sizes.config.group_size, 1)[0])
    N = padded(sizes.config.select_block_size)
    steps = sizes.groups * -(-sizes.length // U) * union  # programs x blocks
    works = {}
    for what in ("forward", "dq"):
        tiles = Tiles(M, N, sizes.tile(f"selected_{what}").hold, steps * M * N)
        works[what] = attention(sizes, what, tiles, pairs, sizes.length)
    return works


def selected_dkdv(sizes: Sizes, pairs: float) -> Work:
    """Each block gathers its readers' rows; the chunks of a list leave float32 parts.

    memory is a far bound here: readers lie all over the sequence, and a cache that cannot hold
    their rows until the next block asks for them has to load them again.
    """
    l_sel = sizes.config.select_block_size
    tile = sizes.tile(reader_row(sizes.config.group_size))
    heads, together = reader_tile(sizes.config.group_size, tile.BLOCK_M)
    N = padded(l_sel)
    blocks = num_select_blocks(sizes.length, l_sel)
    n = min(sizes.config.num_selected, blocks)
    readers = n * sizes.length - l_sel * n * (n - 1) // 2  # the first blocks' tokens see fewer
    chunks = sizes.groups * readers // CHUNK + sizes.groups * blocks  # at most
    tiles = Tiles(heads * together, N, tile.hold, sizes.groups * readers * heads * N)
    return attention(
        sizes, "dk dv", tiles, pairs, sizes.length, parts=chunks / (sizes.groups * blocks)
    )


def selection(sizes: Sizes, pairs: float) -> dict[str, Work]:
    """block_scores and top_blocks: one product for each pair, then no matrix product at all."""
    # Of a block's own keys, and of what the block before passes on: two numbers.
    blocks_seen = (num_select_blocks(sizes.length, sizes.config.select_block_size) + 1) / 2
    scores = 2 * 4 * sizes.groups * sizes.length * blocks_seen
    ids = 4 * sizes.groups * sizes.length * sizes.config.num_selected
    # The ids are written twice: -1 everywhere, then the chosen ones.
    moved = scores + 2 * ids
    return {
        "scores": block_scores(sizes, pairs, blocks_seen, scores),
        "top-n": Work(operations=0, executed=0, memory=moved, cache=moved),
    }


def block_scores(sizes: Sizes, pairs: float, blocks_seen: float, scores: float) -> Work:
    """A program keeps the N keys of J blocks, and walks over the heads: each brings M rows of q.

    A causal edge, as in `flash_kernel`, but of whole blocks. The first operand is what is walked.
    """
    config = sizes.config
    M = sizes.tile("block_scores").BLOCK_M
    N = sizes.tile("block_scores").BLOCK_N
    J = blocks_in_a_tile(N, config.select_block_size, config.stride)
    steps = sizes.rows * (blocks_seen + (J - 1) / 2) / (M * J)  # tiles of rows x tiles of blocks
    programs = steps / config.group_size
    count = num_compressed(sizes.length, config.block_size, config.stride)
    wide = columns(config.head_dim)
    k = sizes.bytes(config.head_dim)
    q = sizes.bytes(config.head_dim) + 4  # and its log-sum-exp
    return Work(
        operations=2 * config.head_dim * sizes.batch * config.heads * pairs,
        executed=2 * wide * steps * M * N,
        memory=sizes.rows * q + sizes.groups * count * k + scores,
        cache=steps * M * q + programs * (N * k + 2 * 4 * M * J),
        shared=steps * sizes.bytes((2 * M + -(-M // MATRIX_ROWS) * N) * wide),  # q in and out, k
    )


def gated_sum(sizes: Sizes) -> dict[str, Work]:
    """mix and mix_backward: nothing is loaded twice, and hardly anything is computed."""
    width = sizes.config.value_dim
    works = {}
    # Three branches in, one sum out; or three and dout in, three douts out. Gates, then dgates too.
    for what, tensors, gates, per_number in (("forward", 4, 3, 6), ("backward", 7, 6, 9)):
        moved = sizes.bytes(sizes.rows * (tensors * width + gates))
        counted = per_number * sizes.rows * width
        works[what] = Work(counted, counted, moved, moved)
    return works


def works(sizes: Sizes, union: float | None = None) -> dict[str, dict[str, Work]]:
    """Every kernel, as works["window"]["dq"]; `union` is that of random selection by default."""
    config, length = sizes.config, sizes.length
    pairs = sequence_cost(config, length).tokens | sequence_cost(config, length, "dense").tokens
    if union is None:
        union = expected_union(config, length, neighbours(sizes))
    keys = {
        "dense": Keys(1, 1, None),
        "window": Keys(1, 1, config.window),
        "compressed": Keys(config.block_size, config.stride, None),
    }
    return {branch: flash(sizes, keys[branch], pairs[branch]) for branch in keys} | {
        "selected": selected(sizes, pairs["selected"], union),
        "selection": selection(sizes, pairs["compressed"]),
        "gated sum": gated_sum(sizes),
    }
