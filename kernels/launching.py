"""Where every kernel starts, how most grids are laid out, and how torch gets to know of it all.

`operation` makes a function on tensors one of torch's own operations. torch.compile, torch.export
and FakeTensor then take it as one step that they need not look into: they ask its `register_fake`
for the shapes of its outputs, and autograd asks what it was registered with for its gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps

import torch
from torch.library import CustomOpDef, custom_op
from torch.utils._pytree import tree_leaves, tree_map_only
from triton import KernelInterface

MOST_PROGRAMS = 65_535  # on a grid's second axis, CUDA's limit
Grid = tuple[int, ...]
Starter = Callable[[KernelInterface, Grid, tuple, dict], None]


def on_the_device(kernel: KernelInterface, grid: Grid, arguments: tuple, options: dict) -> None:
    """Start a grid of programs on the current device."""
    kernel[grid](*arguments, **options)


starter: Starter = on_the_device


def launch(kernel: KernelInterface, grid: Grid, *arguments: object, **options: object) -> None:
    """Start a kernel, or hand it to whoever asked for the launches with `launching_by`."""
    starter(kernel, grid, arguments, options)


@contextmanager
def launching_by(other: Starter) -> Iterator[None]:
    """Within this, `other` gets each launch: to time it, say, or to compile it without a device."""
    global starter
    before = starter
    starter = other
    try:
        yield
    finally:
        starter = before


def grid_of(programs: int, batch: int, groups: int, chunks: int = 1) -> Grid:
    """Programs for each pair of a batch entry and a group, and for each chunk of their walk.

    `batch_and_group` of rows.py reads it back.
    """
    return (programs, batch * groups, chunks)


def in_batches(run: Callable) -> Callable:
    """Let `run` take any batch: part after part, where a grid's second axis ends before its groups.

    All tensors that it takes and returns begin with the batch; the fewest heads are the groups.
    """

    @wraps(run)
    def run_all(*args: object) -> object:
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        batch = len(tensors[0])
        most = MOST_PROGRAMS // min(x.shape[1] for x in tensors)
        if batch <= most:
            return run(*args)
        parts = [run(*of_batch(args, i, i + most)) for i in range(0, batch, most)]
        if isinstance(parts[0], torch.Tensor):
            return joined(parts)
        return tuple(joined(same) for same in zip(*parts, strict=True))

    return run_all


def of_batch(args: tuple, first: int, end: int) -> tuple:
    """The arguments with these entries of the batch only."""
    return tree_map_only(torch.Tensor, lambda x: x[first:end], args)


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The parts of a batch in one tensor, laid out as they are."""
    first = parts[0]
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    whole = torch.empty_strided(shape, first.stride(), dtype=first.dtype, device=first.device)
    return torch.cat(parts, out=whole)


def operation(run: Callable) -> CustomOpDef:
    """Make `run` the operation nsa::<its name> of torch; it runs on its first tensor's device.

    What it returns is new memory. A kernel starts on the current device, whatever its tensors say.
    """

    @wraps(run)
    def run_on_its_device(first: torch.Tensor, *others: object) -> object:
        with torch.cuda.device_of(first):
            return run(first, *others)

    return custom_op(f"nsa::{run.__name__}", run_on_its_device, mutates_args=())
