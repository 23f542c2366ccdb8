"""Tiles in pieces: how rows of 192 columns are multiplied without being padded to 256.

A tile's sizes are powers of two, a row's width need not be. A tile of rows is therefore a tuple of
pieces, BLOCK_WIDTH columns each, that begin at columns 0, BLOCK_WIDTH .. below WIDTH:

    width 128     [ 128 columns ]                        one piece, as most widths have
    width 192     [ 64 ][ 64 ][ 64 ]                     three: a quarter of 256 would be empty
    width 160     [ 64 ][ 64 ][ 32, and 32 of 0 ]

A product that sums over columns adds the pieces' products up (`products`), one that keeps them has
a sum for each piece (`add_products`). piece_width in tile_sizes.py says how wide pieces are.

The kernels of notebooks and exercises have one piece, and hand it to `fold_in` and `finish` as it
is, without a tuple around it: what those two call takes a plain tensor too.
"""

import triton
import triton.language as tl

from kernels.rows import load_rows, row_products, store_rows

# --- tiles ---


@triton.jit
def zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Sums [ROWS, WIDTH] that begin at 0, in float32."""
    tile = ()
    for _ in tl.static_range(0, WIDTH, BLOCK_WIDTH):
        tile = tile + (tl.zeros([ROWS, BLOCK_WIDTH], tl.float32),)
    return tile


@triton.jit
def load_pieces(ptr, offsets, row_mask, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """The tile of rows that begin at these offsets: 0 outside WIDTH and in masked rows."""
    tile = ()
    for start in tl.static_range(0, WIDTH, BLOCK_WIDTH):
        piece = load_rows(ptr + start, offsets, row_mask, WIDTH - start, BLOCK_WIDTH)
        tile = tile + (piece,)
    return tile


@triton.jit
def store_pieces(ptr, offsets, tile, row_mask, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Write a tile's real rows and columns, in ptr's type."""
    for i in tl.static_range(len(tile)):
        start = i * BLOCK_WIDTH
        store_rows(ptr + start, offsets, tile[i], row_mask, WIDTH - start, BLOCK_WIDTH)


@triton.jit
def add_pieces(
    ptr,
    offsets,
    tile,
    row_mask,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ADD: tl.constexpr,
):
    """store_pieces; with ADD the sum of the tile and what is there."""
    if ADD:
        tile = plus(tile, load_pieces(ptr, offsets, row_mask, WIDTH, BLOCK_WIDTH))
    store_pieces(ptr, offsets, tile, row_mask, WIDTH, BLOCK_WIDTH)


# --- their arithmetic ---


@triton.jit
def products(a, b):
    """a b' [M, N] of tiles [M, D] and [N, D]."""
    if isinstance(a, tl.tensor):
        s = tl.dot(a, tl.trans(b), input_precision="ieee")
    else:
        s = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
        for i in tl.static_range(1, len(a)):
            s = tl.dot(a[i], tl.trans(b[i]), s, input_precision="ieee")
    return s


@triton.jit
def add_products(sums, weights, tile):
    """sums [M, D] + weights [M, N] tile [N, D]; the weights are rounded to the tile's type."""
    if isinstance(sums, tl.tensor):
        added = tl.dot(weights.to(tile.dtype), tile, sums, input_precision="ieee")
    else:
        added = ()
        for i in tl.static_range(len(sums)):
            rounded = weights.to(tile[i].dtype)
            added = added + (tl.dot(rounded, tile[i], sums[i], input_precision="ieee"),)
    return added


@triton.jit
def times(tile, factor):
    """The tile times a number, or each row times its own, [M, 1]."""
    if isinstance(tile, tl.tensor):
        scaled = tile * factor
    else:
        scaled = ()
        for i in tl.static_range(len(tile)):
            scaled = scaled + (tile[i] * factor,)
    return scaled


@triton.jit
def over(tile, divisor):
    """Each row of the tile divided by its own number, [M, 1]."""
    if isinstance(tile, tl.tensor):
        divided = tile / divisor
    else:
        divided = ()
        for i in tl.static_range(len(tile)):
            divided = divided + (tile[i] / divisor,)
    return divided


@triton.jit
def plus(a, b):
    """The sum of two tiles in float32."""
    total = ()
    for i in tl.static_range(len(a)):
        total = total + (a[i].to(tl.float32) + b[i].to(tl.float32),)
    return total


@triton.jit
def products_of_rows(a, b):
    """The sum of a * b in each row."""
    total = row_products(a[0], b[0])
    for i in tl.static_range(1, len(a)):
        total += row_products(a[i], b[i])
    return total
