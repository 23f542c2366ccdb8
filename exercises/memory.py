"""How much memory an answer takes and keeps, whatever holds it: for checks of memory."""

import gc
import tracemalloc
import types
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

BYTES = 16  # a number of Python or NumPy: 4 or 8 in an array, 32 in a list


class Memory(TorchDispatchMode):
    """Notes the numbers in the largest tensor, and the most that all tensors held at once.

    It stands below vmap and autograd, so that it sees what they make. A view counts with what it
    looks at: an expanded row is no larger than the row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.most = 0
        self.held = 0
        self.views: Counter[int] = Counter()  # of each memory that is held
        self.refs: dict[int, tuple[weakref.ref, int, int]] = {}  # a tensor, its memory, the size

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled: False spares torch the import of its compiler, for seconds."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            size = stored(tensor)
            memory = tensor.untyped_storage().data_ptr()
            self.largest = max(self.largest, size)
            self.held += size if self.views[memory] == 0 else 0
            self.views[memory] += 1
            ref = weakref.ref(tensor, self.forget)
            self.refs[id(ref)] = ref, memory, size
        self.most = max(self.most, self.held)
        return out

    def forget(self, tensor: weakref.ref) -> None:
        """One view of a memory is gone; the last one frees it."""
        _, memory, size = self.refs.pop(id(tensor))
        self.views[memory] -= 1
        self.held -= size if self.views[memory] == 0 else 0


def largest_made(work: Callable[[], object]) -> tuple[object, int]:
    """What work() returns, and the numbers in the largest tensor that was made meanwhile."""
    with Memory() as mode:
        result = work()
    return result, mode.largest


def most_held(work: Callable[[], object]) -> tuple[object, int]:
    """What work() returns, and the most numbers held at once: in tensors, or in Python and NumPy.

    What Python and NumPy hold is measured in bytes, and the object around a tensor counts too,
    about 100 numbers for each that is kept.
    """
    with tracing(), Memory() as mode:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        result = work()
        peak = tracemalloc.get_traced_memory()[1]
    return result, max(mode.most, (peak - before) // BYTES)


@contextmanager
def tracing() -> Iterator[None]:
    """Count the bytes that Python and NumPy hold, and stop unless somebody else counts too."""
    before = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        yield
    finally:
        if not before:
            tracemalloc.stop()


def numbers_in(value: object) -> int:
    """The numbers that a value holds, whatever it is made of: a dict, an object, a function, ..."""
    seen = set()

    def count(part: object) -> int:
        if isinstance(part, int | float):
            return 1
        if isinstance(part, str | type | types.ModuleType | types.CodeType) or id(part) in seen:
            return 0
        seen.add(id(part))
        if isinstance(part, torch.Tensor):
            return part.numel()
        if isinstance(part, np.ndarray):
            return part.size
        if isinstance(part, bytes | bytearray | array):
            return len(part)
        inside = gc.get_referents(part)
        if isinstance(part, types.FunctionType):  # not the whole module that it stands in
            inside = [part.__closure__, part.__defaults__, part.__kwdefaults__, part.__dict__]
        return sum(map(count, inside))

    return count(value)


def tensors(value: object) -> list[torch.Tensor]:
    """The tensors in a tensor, list, tuple or dict of them, however deep."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for part in value for tensor in tensors(part)]


def stored(tensor: torch.Tensor) -> int:
    """The numbers in the memory that a tensor is a view of."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()
