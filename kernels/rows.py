"""The rows of a group as one tile: which they are, where they lie, how they are loaded and stored.

The R heads of a group read the same keys, so a tile packs them as rows: those of some tokens, head
after head. One load of a key then serves all of them.

    BLOCK_H heads x BLOCK_T tokens       head 0    token t .. t + BLOCK_T - 1    rows 0 ..
                                         head 1    token t .. t + BLOCK_T - 1    rows BLOCK_T ..
                                         ...

BLOCK_H is a power of two and at least R, so a tile may hold heads that are no rows of the group.
Tensors and sizes travel in NamedTuples: triton hands a kernel each field as an argument of its own.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """A (B, H, T, width) tensor as a kernel takes it; its rows are contiguous."""

    ptr: Tensor
    strides: tuple[int, ...]  # of the batch, the heads and the tokens


class TileRows(NamedTuple):
    """Which rows a program's tile has, M = BLOCK_H * BLOCK_T of them; made in the kernel.

    The batch entry, the group, the first token, then for each row [M] its token,
    its head within the group, and whether it is one of the group's.
    """

    b: tl.tensor
    g: tl.tensor
    first: tl.tensor
    token: tl.tensor
    head: tl.tensor
    mask: tl.tensor


# --- on the host ---


def rows(x: Tensor) -> Rows:
    """x (B, H, T, width) for a kernel."""
    return Rows(x, x.stride()[:3])


def rows_contiguous(x: Tensor) -> Tensor:
    """x, copied only if its last axis is strided: the kernels step freely along the others."""
    return x if x.stride(-1) == 1 else x.contiguous()


def laid_out_as(x: Tensor, other: Tensor) -> Tensor:
    """x, copied only if its rows lie otherwise than other's: one offset then serves both."""
    return x if x.stride() == other.stride() else torch.empty_like(other).copy_(x)


def rows_to_read(q: Tensor, k: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with contiguous rows; of the keys the first `count`, those that a query may read.

    What lies behind them, the unwritten end of a cache, say, may hold anything.
    """
    return rows_contiguous(q), rows_contiguous(k[:, :, :count]), rows_contiguous(v[:, :, :count])


def empty_beside(x: Tensor, width: int) -> Tensor:
    """Room for (B, H, T, width) beside x (B, H, T, any width).

    In memory a token's heads lie side by side, as a layer's linear maps read and write them.
    """
    batch, heads, length, _ = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


def empty_output(q: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Room for an output (B, H, T, width) and its float32 log-sum-exp (B, H, T)."""
    return empty_beside(q, width), q.new_empty(q.shape[:3], dtype=torch.float32)


def empty_gradient(x: Tensor) -> Tensor:
    """Room for the gradient of x, laid out as x is, but always with contiguous rows."""
    dx = torch.empty_like(x)
    return dx if dx.stride(-1) == 1 else x.new_empty(x.shape)


def empty_key_gradient(x: Tensor, count: int) -> Tensor:
    """empty_gradient of keys or values, of which queries may read the first `count`: 0 behind."""
    dx = empty_gradient(x)
    dx[:, :, count:] = 0
    return dx


# --- in a kernel ---


@triton.jit
def batch_and_group(G):
    """The batch entry and the group of this program: axis 1 of the grid counts both."""
    return tl.program_id(1) // G, tl.program_id(1) % G


@triton.jit
def tokens_and_heads(first, T, R: tl.constexpr, TILE: tl.constexpr):
    """The token and the head of each row [M], and whether it is one of the group's."""
    row = tl.arange(0, TILE.BLOCK_H * TILE.BLOCK_T)
    token = first + row % TILE.BLOCK_T
    head = row // TILE.BLOCK_T
    return token, head, (token < T) & (head < R)


@triton.jit
def rows_of_a_tile(first, sizes, R: tl.constexpr, TILE: tl.constexpr):
    """The TileRows of this program, which begin at token `first`."""
    b, g = batch_and_group(sizes.G)
    token, head, mask = tokens_and_heads(first, sizes.T, R, TILE)
    return TileRows(b, g, first, token, head, mask)


@triton.jit
def row_offsets(strides, b, head, token):
    """Where rows of a (B, H, T, width) tensor begin; 64 bits, for tensors beyond 2^31 elements."""
    base = b.to(tl.int64) * strides[0]
    return base + head.to(tl.int64) * strides[1] + token.to(tl.int64) * strides[2]


@triton.jit
def number_offsets(at, sizes, R: tl.constexpr):
    """Where the numbers of TileRows lie in a contiguous (B, H, T) tensor; 64 bits."""
    return ((at.b.to(tl.int64) * sizes.G + at.g) * R + at.head) * sizes.T + at.token


@triton.jit
def load_rows(ptr, offsets, row_mask, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """A tile [rows, BLOCK_WIDTH]: 0 outside WIDTH and in masked rows."""
    column = tl.arange(0, BLOCK_WIDTH)
    at = ptr + offsets[:, None] + column[None, :]
    return tl.load(at, mask=row_mask[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, offsets, tile, row_mask, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Write the rows and columns of a tile [rows, BLOCK_WIDTH] that are real, in ptr's type."""
    column = tl.arange(0, BLOCK_WIDTH)
    at = ptr + offsets[:, None] + column[None, :]
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=row_mask[:, None] & (column < WIDTH)[None, :])


@triton.jit
def row_products(a, b):
    """The sum of a * b in each row.

    Without the 0 the compiler may fuse the last product into the sum. Then two threads that hold
    one row could round differently, and which of them writes it would be a race.
    """
    return tl.sum(a.to(tl.float32) * b.to(tl.float32) + 0.0, 1)


@triton.jit
def load_gate(gates, at, row_mask, BRANCH: tl.constexpr):
    """A row's gate in float32; branch 0 is the compressed one, 1 the selected, 2 the window."""
    return tl.load(gates + at * 3 + BRANCH, mask=row_mask, other=0.0).to(tl.float32)
