"""How tiles reach a kernel: as boxes of a (B, H, T, width) tensor.

    box(x, heads, tokens)              on the host: a description of x and of the box's size
    load_box(x, b, head, token, ...)   in a kernel: the box that begins there, as a tile of rows

                     head h    token t .. t + tokens - 1     rows 0 .. tokens - 1
                     head h+1  token t .. t + tokens - 1     rows tokens .. 2 tokens - 1
                     ...

The H100's copy engine (TMA) fetches a box: it computes the addresses, so that no thread needs
registers for them, and it gives 0 for all that lies outside x. It wants an address and positive
strides of whole 16 bytes, and contiguous rows; other tensors are copied first. A box packs its rows
head by head, where tile.py packs them token by token.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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
