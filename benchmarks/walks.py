"""Two small kernels that do one thing only, so that it can be timed: benchmarks.ceilings.

Tiles are 64 x 64 int32: 16 KB, as 64 keys of 128 bf16 are, and as wide in bytes. What was read is
folded by exclusive or: an instruction a number, and a result that says which tiles were read.
"""

from kernels.launching import launch  # before triton, which kernels may set to interpret

# isort: split
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS = 64
WIDTH = 64
TILE = ROWS * WIDTH * 4  # bytes


@triton.jit
def tile_number(program, step, programs, count, APART: tl.constexpr):
    """Which of `count` tiles a program reads in a step: they begin evenly spread.

    Then each goes on to the next tile, so that a tile is read by one program soon after another;
    APART each makes leaps of its own length instead.
    """
    leap = 2 * program + 1 if APART else 1
    return (program * count // programs + step * leap) % count


@triton.jit
def read_tiles(  # noqa: PLR0913  as in kernels: sizes are arguments too
    source,  # with BOXES a descriptor, else a pointer
    out,
    count,
    steps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    APART: tl.constexpr,
    BOXES: tl.constexpr,
):
    """A program reads `steps` tiles of x (count, ROWS * WIDTH), by pointers or each as one box."""
    program = tl.program_id(0)
    numbers = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)
    acc = tl.zeros([ROWS, WIDTH], tl.int32)
    for step in tl.range(0, steps, num_stages=STAGES):
        tile = tile_number(program, step, tl.num_programs(0), count, APART)
        if BOXES:
            acc ^= source.load([tile * ROWS, 0])
        else:
            acc ^= tl.load(source + tile * (ROWS * WIDTH) + numbers)
    tl.store(out + program * (ROWS * WIDTH) + numbers, acc)


@triton.jit
def power_kernel(out, again, NUMBERS: tl.constexpr):
    """x = exp2(-x), again and again, from 0 on: 1, 1/2, 0.707 .."""
    x = tl.zeros([NUMBERS], tl.float32)
    for _ in range(again):
        x = tl.exp2(-x)
    tl.store(out + tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS), x)


class Walk(NamedTuple):
    """How far programs walk and in which way: see tile_number; `stages` loads on their way."""

    programs: int
    steps: int
    warps: int
    stages: int
    apart: bool


def walk_pointers(x: Tensor, walk: Walk) -> Tensor:
    """Each program's exclusive or of the tiles that it reads by pointers, (programs, numbers).

    Shapes: x (count, ROWS * WIDTH) int32.
    """
    return walk_over(x, x, walk, boxes=False)


def walk_boxes(x: Tensor, walk: Walk) -> Tensor:
    """The same by a tensor descriptor."""
    desc = TensorDescriptor.from_tensor(x.view(-1, WIDTH), [ROWS, WIDTH])
    return walk_over(desc, x, walk, boxes=True)


def walk_over(source: TensorDescriptor | Tensor, x: Tensor, walk: Walk, *, boxes: bool) -> Tensor:
    """Launch the walk over a source, which holds the tiles x."""
    out = x.new_empty(walk.programs, ROWS * WIDTH)  # a tile for each program
    launch(
        read_tiles,
        (walk.programs,),
        source,
        out,
        x.shape[0],
        walk.steps,
        ROWS=ROWS,
        WIDTH=WIDTH,
        STAGES=walk.stages,
        APART=walk.apart,
        BOXES=boxes,
        num_warps=walk.warps,
    )
    return out


def exp2_again(programs: int, numbers: int, again: int, device: str) -> Tensor:
    """`again` exp2s of each of programs x numbers float32."""
    out = torch.empty(programs, numbers, device=device)
    launch(power_kernel, (programs,), out, again, numbers, num_warps=4)
    return out
