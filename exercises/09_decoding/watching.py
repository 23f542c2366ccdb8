"""What set 09 observes of an answer: what it makes, what it reads, what it keeps."""

import tracemalloc
import weakref
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from exercises.memory import stored, tensors


class LargestCopy(TorchFunctionMode):
    """Notes the largest tensor or list that is made of numbers outside of one tensor's memory."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.size = 0
        self.memory = given.untyped_storage().data_ptr()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in tensors(out) if x.untyped_storage().data_ptr() != self.memory]
        listed = [args[0].numel()] if func is Tensor.tolist else []
        self.size = max([self.size, *map(stored, made), *listed])
        return out


class Reader:
    """read(p): a share's scores, values and overlap, always in the same memory."""

    def __init__(self, *shares: list[Tensor]) -> None:
        self.shares = list(zip(*shares, strict=True))
        # One number more than any share: what is as large as a share belongs to the answer.
        self.memory = [torch.empty(max(x.numel() for x in part) + 1) for part in shares]
        self.times = Counter()
        self.watch: Callable[[int], None] | None = None

    def __call__(self, p: int) -> tuple[Tensor, ...]:
        self.times[p] += 1
        if self.watch:
            self.watch(p)
        for memory in self.memory:
            memory.fill_(torch.nan)
        pairs = zip(self.memory, self.shares[p], strict=True)
        return tuple(memory[: x.numel()].view(x.shape).copy_(x) for memory, x in pairs)

    def often(self) -> int:
        """How often the share was read that was read most often; 0 if one was never read."""
        times = [self.times[p] for p in range(len(self.shares))]
        return max(times) if min(times) > 0 else 0


class Held(TorchFunctionMode):
    """Remembers the tensors of some sizes, and how many shares were read when each was made.

    What Python and NumPy hold is measured, in bytes at each read.
    """

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.share = 0
        self.made: list[tuple[int, weakref.ref]] = []
        self.held = 0
        self.bytes: list[int] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tensors(out):
            if x.numel() in self.sizes:
                self.made.append((self.share, weakref.ref(x)))
        return out

    def look(self, p: int) -> None:
        """What is still held of shares before the last one, when share p is asked for."""
        self.bytes.append(tracemalloc.get_traced_memory()[0])
        self.held = max(self.held, len(self.of_before()))
        self.share += 1

    def shares_held(self) -> int:
        """The most shares that were held at once; all but two, if what Python holds grew so."""
        grown = self.bytes[-1] - self.bytes[2] if len(self.bytes) > 3 else 0
        numbers = grown / 4 / max(1, len(self.bytes) - 3)  # of 4 bytes, and of each share
        return max(self.held, len(self.bytes) - 2 if numbers > min(self.sizes) / 2 else 0)

    def of_before(self) -> set[int]:
        """The shares before the last whose tensors are still there."""
        return {n for n, x in self.made if n < self.share and x() is not None}
