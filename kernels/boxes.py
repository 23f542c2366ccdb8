"""How tiles reach a kernel: as boxes of a (B, H, T, width) tensor.

    box(x, heads, tokens)              on the host: a description of x and of the box's size
    load_box(x, b, head, token, ...)   in a kernel: the box that begins there, as a tile of rows

                     head h    token t .. t + tokens - 1     rows 0 .. tokens - 1
                     head h+1  token t .. t + tokens - 1     rows tokens .. 2 tokens - 1
                     ...

The H100's copy engine (TMA) fetches a box: it computes the addresses, so that no thread needs
registers for them, and it gives 0 for all that lies outside x. It wants an address and positive
strides of whole 16 bytes, and contiguous rows; other tensors are copied first. A box of q has HEADS
x STEP rows: STEP tokens of HEADS heads. HEADS is a power of two and at least R, so a box may reach
into the next group's heads, which are no rows of ours. A box of k or v: one head, N keys.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.tile import load_rows, row_offsets
from kernels.tiles import padded

ALIGNED = 16  # bytes


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it that the engine can read: strides of whole 16 bytes, a token at least."""
    size = x.element_size()
    whole = all(stride > 0 and stride * size % ALIGNED == 0 for stride in x.stride()[:3])
    if whole and x.stride(3) == 1 and x.data_ptr() % ALIGNED == 0 and x.shape[2] > 0:
        return x
    batch, heads, tokens, width = x.shape
    wide = triton.cdiv(width * size, ALIGNED) * ALIGNED // size
    rows = x.new_zeros(batch, heads, max(tokens, 1), wide)
    rows[:, :, :tokens, :width] = x
    return rows[..., :width]


def box(x: Tensor, heads: int, tokens: int) -> TensorDescriptor:
    """Boxes of `heads` x `tokens` rows of x (B, H, T, width), each row padded with 0."""
    x = aligned(x)
    return TensorDescriptor(x, list(x.shape), list(x.stride()),
                            [1, heads, tokens, padded(x.shape[3])])


@triton.jit
def load_box(x, b, head, token, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """A (ROWS, PADDED) tile: the box that begins at this head and token."""
    return x.load([b, head, token, 0]).reshape(ROWS, PADDED)


def number_box(x: Tensor, rows: int) -> TensorDescriptor:
    """Boxes of `rows` float32 of x (groups, rows in all); 32 at least, as the engine wants."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows])


@triton.jit
def load_numbers(x, group, first, ROWS: tl.constexpr):
    """The ROWS numbers of a group that begin at `first`."""
    return x.load([group, first]).reshape(ROWS)


@triton.jit
def place_in_boxes(token, head, HEADS: tl.constexpr, STEP: tl.constexpr):
    """Where a row lies among all of its group's, box after box."""
    return (token // STEP * HEADS + head) * STEP + token % STEP


@triton.jit
def rows_of_a_box(first, T, R: tl.constexpr, HEADS: tl.constexpr, STEP: tl.constexpr):
    """The token and the head of each row of a box, and whether it is one of the group's."""
    row = tl.arange(0, HEADS * STEP)
    token, head = first + row % STEP, row // STEP
    return token, head, (token < T) & (head < R)


@triton.jit
def hold(tile, real, HOLD: tl.constexpr):
    """With HOLD: the tile in registers, 0 in unreal rows.

    The matrix unit takes its first operand from shared memory or from registers. Triton leaves
    what was only loaded in shared memory; what was computed, as by this, goes to registers.
    """
    return tl.where(real[:, None], tile, 0.0) if HOLD else tile


@triton.jit
def load_group(
    x, strides, b, first_head, first, head, token, real,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, HOLD: tl.constexpr,
):
    """The rows of a box that begins at first_head and token `first`, as rows_of_a_box names them.

    With HOLD x is made of such boxes, and the tile is held; without, x is a pointer.
    """
    if HOLD:
        return hold(load_box(x, b, first_head, first, real.shape[0], PADDED), real, HOLD)
    else:
        return load_rows(x, row_offsets(strides, b, first_head + head, token), real, WIDTH, PADDED)
