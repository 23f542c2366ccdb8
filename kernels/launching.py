"""Where every kernel starts, how it starts again, and how most grids are laid out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from threading import local
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from triton import KernelInterface

Grid = tuple[int, ...]
T = TypeVar("T")
Starter = Callable[[KernelInterface, Grid, tuple, dict], None]


def on_the_device(kernel: KernelInterface, grid: Grid, arguments: tuple, options: dict) -> None:
    """Start a grid of programs on the current device."""
    kernel[grid](*arguments, **options)


starter: Starter = on_the_device


class Recording(local):
    """Who keeps this thread's launches, if anyone: those of other threads are not among them."""

    starter: Starter | None = None


recording = Recording()


def launch(kernel: KernelInterface, grid: Grid, *arguments: object, **options: object) -> None:
    """Start a kernel, or hand it to whoever asked for the launches with `launching_by`."""
    (recording.starter or starter)(kernel, grid, arguments, options)


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


# --- again ---

MOST_KEPT = 256  # looks of tensors that an operation remembers what it did for


def looks_of(tensors: Sequence[object]) -> tuple:
    """All that decides how a kernel reads its tensors, apart from their values."""
    return tuple(
        [
            (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else type(x)
            for x in tensors
        ]
    )


def kept(memory: dict[tuple, T], key: tuple, make: Callable[[], T]) -> T:
    """What `make` gave when this key was first asked for, or gives now; the memory is bounded."""
    found = memory.get(key)  # once: another thread may clear it
    if found is None:
        found = make()
        if len(memory) >= MOST_KEPT:
            memory.clear()
        memory[key] = found
    return found


Fill = Callable[[list[int]], object]  # addresses of tensors -> an argument


class Started(NamedTuple):
    """A launch that can be made again: machine code, grid, and which arguments of Recorded."""

    compiled: Callable
    grid: Grid
    choose: Callable[[list], tuple]


class Recorded(NamedTuple):
    """Launches, and all their arguments: those that stay, and how to make those with tensors."""

    launches: list[Started]
    constants: list[object]
    fills: list[Fill]


class Again:
    """The launches of a function, made once by it and from then on without it.

    For each launch Triton looks at every argument to find the machine code that fits, which takes
    the host longer than a small kernel runs. But if tensors have the same shapes, strides and types
    as before, and begin at multiples of 16 bytes, what fits is what fitted before: only addresses
    are new. Call it with functions that do the same launches for such tensors, and nothing else. A
    launch gets these tensors themselves, or parts of the last one. If that one began at 4096 and a
    launch got what lies 256 bytes further, then the next time, with a last one at 8192, the launch
    gets the address 8448.
    """

    def __init__(self) -> None:
        self.recorded: Recorded | None = None

    def __call__(self, run: Callable[..., None], tensors: Sequence[Tensor]) -> None:
        addresses = [x.data_ptr() for x in tensors]
        aligned = not any(address % 16 for address in addresses)
        with torch.cuda.device_of(tensors[0]):
            if starter is not on_the_device or not aligned or not tensors[0].is_cuda:
                run(*tensors)
                return
            if self.recorded is None:
                self.recorded = recorded(run, tensors)
                return
            launches, constants, fills = self.recorded
            values = [*constants, *(fill(addresses) for fill in fills)]
            stream = torch.cuda.current_stream().cuda_stream
            for compiled, grid, choose in launches:
                compiled[grid](*choose(values), stream=stream)


def recorded(run: Callable[..., None], tensors: Sequence[Tensor]) -> Recorded:
    """Run a function, and keep its launches."""
    made = []
    # Each an object of its own: where one tensor serves twice, the next time it may be two.
    tensors = [x.detach() for x in tensors]

    def start(kernel: KernelInterface, grid: Grid, arguments: tuple, options: dict) -> None:
        compiled = kernel[grid](*arguments, **options)
        constants = [options[name] for name in kernel.arg_names[len(arguments) :]]
        made.append((compiled, (*grid, 1, 1)[:3], [*arguments, *constants]))

    recording.starter = start
    try:
        run(*tensors)
    finally:
        recording.starter = None
    once = {id(x): x for _, _, arguments in made for x in arguments}.values()
    constants = [x for x in once if not any_tensor(x)]
    others = [x for x in once if any_tensor(x)]
    place = {id(x): i for i, x in enumerate([*constants, *others])}
    launches = [
        Started(compiled, grid, itemgetter(*(place[id(x)] for x in arguments)))
        for compiled, grid, arguments in made
    ]
    return Recorded(launches, constants, [filling(x, tensors) for x in others])


def filling(argument: object, tensors: Sequence[Tensor]) -> Fill:
    """How to make an argument, or a tuple of them, when the tensors in it lie elsewhere."""
    if isinstance(argument, Tensor):
        index = next((i for i, x in enumerate(tensors) if x is argument), len(tensors) - 1)
        same = argument.untyped_storage().data_ptr() == tensors[index].untyped_storage().data_ptr()
        assert same, "a launch got a tensor that Again was not called with"
        offset = argument.data_ptr() - tensors[index].data_ptr()
        return lambda addresses: addresses[index] + offset
    assert isinstance(argument, tuple)  # that holds one: nothing else is filled in
    inside = [(i, filling(x, tensors)) for i, x in enumerate(argument) if any_tensor(x)]
    others = [None if any_tensor(x) else x for x in argument]  # no tensor is kept alive

    def filled(addresses: list[int]) -> tuple:
        parts = others.copy()
        for i, fill in inside:
            parts[i] = fill(addresses)
        return tuple(parts)

    return filled


def any_tensor(argument: object) -> bool:
    """Whether there is a tensor in an argument, however deep in tuples."""
    if isinstance(argument, tuple):
        return any(any_tensor(part) for part in argument)
    return isinstance(argument, Tensor)


# --- grids ---


def grid_of(programs: int, batch: int, groups: int, chunks: int = 1) -> Grid:
    """Programs for each pair of a batch entry and a group, and for each chunk of their walk.

    `batch_and_group` of rows.py reads it back.
    """
    return (programs, batch * groups, chunks)
