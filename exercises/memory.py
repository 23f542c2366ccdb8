"""How large a tensor an answer makes, and how much it keeps: for checks of memory."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that PyTorch makes; views hold nothing of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.size = max(self.size, size_of(out, largest=True))
        return out


def largest_made(work: Callable[[], object]) -> tuple[object, int]:
    """What work() returns, and the numbers in the largest tensor that was made meanwhile."""
    with Largest() as mode:
        result = work()
    return result, mode.size


def size_of(value: object, largest: bool = False) -> int:
    """The numbers in all tensors (or in the largest) of a tensor, list, tuple or dict of them."""
    if isinstance(value, torch.Tensor):
        return value.numel()
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    sizes = [size_of(x, largest) for x in value]
    return max(sizes, default=0) if largest else sum(sizes)
