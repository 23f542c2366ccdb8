"""Putting new keys and values into a cache: all its tensors in one pass, each row in its place.

    buffer (B, G, capacity, width)    row rows[b, i]  <-  new (B, G, n, width), row i

One program owns BLOCK_T rows of one group of heads in one tensor: keys or values of a branch. The
places lie on the device, so that a CUDA graph of a step writes a row further at each replay.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.library import custom_op

from kernels.checks import check_range, check_write, require
from kernels.launching import Again, kept, launch, looks_of
from kernels.operations import watched
from kernels.rows import load_rows, row_offsets, rows, rows_contiguous, store_rows
from kernels.tile_sizes import cdiv, power_of_two

BLOCK_T = 16


@triton.jit
def copy_rows(
    buffers,
    new,
    places,
    T,
    WIDTHS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """BLOCK_T rows of one group in one of the tensors. Tile: the rows [T, width].

    Grid: batch x tiles of rows, groups, tensors.
    """
    tiles = tl.cdiv(T, BLOCK_T)
    b = tl.program_id(0) // tiles
    i = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    g = tl.program_id(1)
    place = tl.load(places + b.to(tl.int64) * T + i, mask=i < T, other=0)
    for which in tl.static_range(len(buffers)):
        if tl.program_id(2) == which:
            at = row_offsets(new[which].strides, b, g, i)
            to = row_offsets(buffers[which].strides, b, g, place)
            tile = load_rows(new[which].ptr, at, i < T, WIDTHS[which], BLOCK_WIDTH)
            store_rows(buffers[which].ptr, to, tile, i < T, WIDTHS[which], BLOCK_WIDTH)


known: dict[tuple, Again] = {}


def write_rows(
    buffers: Sequence[Float[Tensor, "B G capacity _"]],
    new: Sequence[Float[Tensor, "B G n _"]],
    places: Int[Tensor, "B n"],
) -> None:
    """Write row i of sequence b of each new tensor into row places[b, i] of its buffer.

    The places of a GPU are not read here, so they must fit, and no two may be equal.
    No gradient flows: a buffer may require none, and one that a graph has saved is known to have
    changed. Errors: ValueError or TypeError that names the argument.
    """
    try:
        check_no_gradient(buffers)
        tensors = (*buffers, *(rows_contiguous(x) for x in new), places.contiguous())
    except (AttributeError, TypeError):  # of something that is no tensor: the check says which
        check_write(buffers, new, places)
        raise
    if watched(places):
        check_write(buffers, new, places)
        with torch.no_grad():
            write_all(buffers, new, places)
        return

    def checked() -> Again:
        check_write(buffers, new, places)
        return Again()

    copy_all(kept(known, looks_of(tensors), checked), tensors)
    increment_version([x for x in buffers if not x.is_inference()])


def check_no_gradient(buffers: Sequence[Tensor]) -> None:
    """Raise if autograd would have to follow what is written. Shapes do not tell: ask each time."""
    if torch.is_grad_enabled():
        for i, x in enumerate(buffers):
            require(not x.requires_grad, f"buffers[{i}].requires_grad", True, "must be False")


def copy_all(again: Again, tensors: Sequence[Tensor]) -> None:
    """The launch for buffers, new tensors and places, once their places are known to fit."""
    *both, places = tensors
    if not places.is_cuda:
        room = min(x.shape[2] for x in both[: len(both) // 2])
        check_range("places", places, 0, room - 1, f"must be rows of a buffer, 0 .. {room - 1}")
    again(launch_copy, tensors)


@custom_op("nsa::write_rows", mutates_args=("buffers",))
def write_all(buffers: Sequence[Tensor], new: Sequence[Tensor], places: Tensor) -> None:
    """write_rows, as an operation of torch."""
    copy_all(Again(), (*buffers, *(rows_contiguous(x) for x in new), places.contiguous()))


@write_all.register_fake
def _(*_):
    """It returns nothing."""


def launch_copy(*tensors: Tensor) -> None:
    """One launch for buffers, new tensors and places."""
    *both, places = tensors
    count = len(both) // 2
    buffers, new = both[:count], both[count:]
    batch, groups, length, _ = new[0].shape
    widths = tuple(x.shape[3] for x in new)
    block_t = min(BLOCK_T, power_of_two(length))
    launch(
        copy_rows,
        (batch * cdiv(length, block_t), groups, count),
        tuple(rows(x) for x in buffers),
        tuple(rows(x) for x in new),
        places,
        length,
        WIDTHS=widths,
        BLOCK_T=block_t,
        BLOCK_WIDTH=power_of_two(max(widths)),
        num_warps=1 if block_t == 1 else 4,
    )
