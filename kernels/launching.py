"""Where every kernel starts, and how most grids are laid out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from triton import KernelInterface

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
