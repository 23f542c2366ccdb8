"""A made-up machine for set 11: it runs programs in an order that nobody chose, and keeps watch."""

from collections.abc import Callable

import torch
from torch import Tensor


class Machine:
    """run(count, program) calls program(0), program(1), ... in the machine's own order.

    partial(first, last) is the sum of the rows of readers first to last - 1, for one program.
    """

    def __init__(self, rows: Tensor, indptr: Tensor, chunk: int, order: Callable) -> None:
        self.rows = rows
        self.starts = indptr.tolist()
        self.chunk = chunk
        self.order = order
        self.times = [0] * len(rows)  # how often each reader was read
        self.program: int | None = None  # the one that runs
        self.calls = 0  # of partial, by this program
        self.said = ""

    def run(self, count: int, program: Callable[[int], object]) -> None:
        """Every program once."""
        for i in self.order(list(range(count))):
            self.program = i
            self.calls = 0
            program(i)
        self.program = None

    def partial(self, first: int, last: int) -> Tensor:
        """The sum of some rows; what is wrong with asking for it is remembered."""
        self.said = self.said or self.wrong(first, last)
        self.calls += 1
        for reader in range(max(first, 0), min(last, len(self.rows))):
            self.times[reader] += 1
        return self.rows[first:last].double().sum(0).float()

    def wrong(self, first: int, last: int) -> str:
        """Why a program may not ask for this sum; "" if it may."""
        if self.program is None:
            return "partial was called outside of a program"
        if self.calls:
            return "a program took two chunks, and each is a program of its own"
        if last - first > self.chunk:
            return f"a program took {last - first} readers, and a chunk has at most {self.chunk}"
        inside = [start for start in self.starts if first < start < last]
        if inside:
            return f"a program took readers {first} to {last - 1}, which belong to two blocks"
        return ""

    def end(self) -> str:
        """What was wrong with the way; "" if nothing was."""
        if self.said:
            return self.said
        for reader, times in enumerate(self.times):
            if times != 1:
                return f"reader {reader} was read {times} times"
        return ""


def forwards(programs: list[int]) -> list[int]:
    """As they are counted."""
    return programs


def backwards(programs: list[int]) -> list[int]:
    """The last one first."""
    return programs[::-1]


def inside_out(programs: list[int]) -> list[int]:
    """The odd ones, then the even ones."""
    return programs[1::2] + programs[::2]


ORDERS = (forwards, backwards, inside_out)


def same_bits(results: list[object]) -> bool:
    """Whether all of them are tensors with the same numbers."""
    if not all(isinstance(x, Tensor) for x in results):
        return True  # their form will be told
    first = results[0]
    return all(torch.equal(first, x) for x in results[1:])
