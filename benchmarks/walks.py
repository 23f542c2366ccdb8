"""Three small kernels that do one thing only, so that it can be timed: benchmarks.ceilings.

Tiles are 64 x 64 int32: 16 KB, as 64 keys of 128 bf16 are, and as wide in bytes. What was read is
folded by exclusive or: an instruction a number, and a result that says which tiles were read.
"""

from kernels.launching import launch  # before triton, which kernels may set to interpret

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS = 64
WIDTH = 64
TILE = ROWS * WIDTH * 4  # bytes


@triton.jit
def tile_number(program, step, programs, count):
    """Which of `count` tiles a program reads in a step: they begin evenly spread."""
    return (program * count // programs + step) % count


@triton.jit
def read_pointers(
    x,
    out,
    count,
    steps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program reads `steps` tiles of x (count, ROWS * WIDTH) by pointers."""
    program = tl.program_id(0)
    numbers = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)
    acc = tl.zeros([ROWS, WIDTH], tl.int32)
    for step in tl.range(0, steps, num_stages=STAGES):
        tile = tile_number(program, step, tl.num_programs(0), count)
        acc ^= tl.load(x + tile * (ROWS * WIDTH) + numbers)
    tl.store(out + program * (ROWS * WIDTH) + numbers, acc)


@triton.jit
def read_boxes(
    desc,
    out,
    count,
    steps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program reads `steps` tiles of x (count * ROWS, WIDTH), each one box of a descriptor."""
    program = tl.program_id(0)
    numbers = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)
    acc = tl.zeros([ROWS, WIDTH], tl.int32)
    for step in tl.range(0, steps, num_stages=STAGES):
        tile = tile_number(program, step, tl.num_programs(0), count)
        acc ^= desc.load([tile * ROWS, 0])
    tl.store(out + program * (ROWS * WIDTH) + numbers, acc)


@triton.jit
def power_kernel(out, again, NUMBERS: tl.constexpr):
    """x = exp2(-x), again and again, from 0 on: 1, 1/2, 0.707 .."""
    x = tl.zeros([NUMBERS], tl.float32)
    for _ in range(again):
        x = tl.exp2(-x)
    tl.store(out + tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS), x)


def room(x: Tensor, programs: int) -> Tensor:
    """A tile for each program."""
    return x.new_empty(programs, ROWS * WIDTH)


def walk_pointers(x: Tensor, programs: int, steps: int, warps: int, stages: int) -> Tensor:
    """Each program's exclusive or of the tiles that it reads by pointers, (programs, numbers).

    Shapes: x (count, ROWS * WIDTH) int32.
    """
    out = room(x, programs)
    grid = (programs,)
    launch(read_pointers, grid, x, out, x.shape[0], steps, ROWS, WIDTH, stages, num_warps=warps)
    return out


def walk_boxes(x: Tensor, programs: int, steps: int, warps: int, stages: int) -> Tensor:
    """The same by a tensor descriptor."""
    out = room(x, programs)
    desc = TensorDescriptor.from_tensor(x.view(-1, WIDTH), [ROWS, WIDTH])
    grid = (programs,)
    launch(read_boxes, grid, desc, out, x.shape[0], steps, ROWS, WIDTH, stages, num_warps=warps)
    return out


def exp2_again(programs: int, numbers: int, again: int, device: str) -> Tensor:
    """`again` exp2s of each of programs x numbers float32."""
    out = torch.empty(programs, numbers, device=device)
    launch(power_kernel, (programs,), out, again, numbers, num_warps=4)
    return out
