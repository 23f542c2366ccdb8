"""Tensor descriptors: how the H100's copy engine (TMA) fetches a tile of a (B, H, T, width) tensor.

    descriptor(x, heads, tokens)       on the host: x, and the size of what one load fetches
    load_tile(desc, b, head, token)    in a kernel: what begins there, [heads * tokens, width],
                                       one load for each piece of the width

The engine computes the addresses, so that no thread needs registers for them, and it gives 0 for
all that lies outside x. It wants an address and positive strides of whole 16 bytes, and contiguous
rows; other tensors are copied first. A descriptor is an argument of its own: triton starts no
kernel that finds one inside a tuple.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.pieces import load_pieces
from kernels.rows import Rows, row_offsets, rows
from kernels.tile_sizes import cdiv, piece_width

ALIGNED = 16  # bytes

# --- on the host ---


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it that the engine can read: strides of whole 16 bytes, a token at least."""
    size = x.element_size()
    whole = all(stride > 0 and stride * size % ALIGNED == 0 for stride in x.stride()[:3])
    if whole and x.stride(3) == 1 and x.data_ptr() % ALIGNED == 0 and x.shape[2] > 0:
        return x
    batch, heads, tokens, width = x.shape
    wide = cdiv(width * size, ALIGNED) * ALIGNED // size
    copy = x.new_zeros(batch, heads, max(tokens, 1), wide)
    copy[:, :, :tokens, :width] = x
    return copy[..., :width]


def descriptor(x: Tensor, heads: int, tokens: int) -> TensorDescriptor:
    """One piece of `heads` x `tokens` rows a load of x (B, H, T, width), padded with 0."""
    x = aligned(x)
    block_shape = [1, heads, tokens, piece_width(x.shape[3])]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block_shape)


def group_argument(x: Tensor, heads: int, tokens: int, hold: bool) -> TensorDescriptor | Rows:
    """What `load_group` takes for x: a descriptor with hold, else rows."""
    return descriptor(x, heads, tokens) if hold else rows(x)


def number_descriptor(x: Tensor, count: int) -> TensorDescriptor:
    """`count` float32 a load of x (groups, rows in all); 32 at least, as the engine wants."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, count])


def room_for_numbers(q: Tensor, groups: int, heads: int, tokens: int) -> tuple[Tensor, Tensor]:
    """row_lse and row_delta (B G, rows), tile after tile of heads x tokens; 0 where no row is."""
    shape = q.shape[0] * groups, cdiv(q.shape[2], tokens) * tokens * heads
    row_lse, row_delta = (
        torch.zeros(shape, dtype=torch.float32, device=q.device) for _ in range(2)
    )
    return row_lse, row_delta


# --- in a kernel ---


@triton.jit
def load_tile(
    desc, b, head, token, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """The tile [ROWS, WIDTH] that begins at this head and token, in pieces (pieces.py)."""
    tile = ()
    for start in tl.static_range(0, WIDTH, BLOCK_WIDTH):
        piece = desc.load([b, head, token, start]).reshape(ROWS, BLOCK_WIDTH)
        tile = tile + (piece,)
    return tile


@triton.jit
def load_numbers(desc, group, first, ROWS: tl.constexpr):
    """The numbers [ROWS] of a group that begin at `first`."""
    return desc.load([group, first]).reshape(ROWS)


@triton.jit
def place_in_tiles(at, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr):
    """Where the rows `at` lie among all of their group's, tile after tile."""
    return (at.token // BLOCK_T * BLOCK_H + at.head) * BLOCK_T + at.token % BLOCK_T


@triton.jit
def hold(tile, row_mask, HOLD: tl.constexpr):
    """With HOLD: the tile in registers, 0 in masked rows.

    The matrix unit takes its first operand from shared memory or from registers. Triton leaves
    what was only loaded in shared memory; what was computed, as by this, goes to registers.
    """
    held = ()
    for i in tl.static_range(len(tile)):
        held = held + (tl.where(row_mask[:, None], tile[i], 0.0) if HOLD else tile[i],)
    return held


@triton.jit
def load_group(
    x,
    at,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    HOLD: tl.constexpr,
):
    """The rows `at` (TileRows) of x as a tile [M, WIDTH].

    With HOLD x is a descriptor and the tile is held; without, x is Rows.
    """
    if HOLD:
        tile = load_tile(x, at.b, at.g * R, at.first, at.mask.shape[0], WIDTH, BLOCK_WIDTH)
        tile = hold(tile, at.mask, HOLD)
    else:
        offsets = row_offsets(x.strides, at.b, at.g * R + at.head, at.token)
        tile = load_pieces(x.ptr, offsets, at.mask, WIDTH, BLOCK_WIDTH)
    return tile
