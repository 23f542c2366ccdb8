"""How large a tensor an answer makes, and how much it keeps: for checks of memory."""

from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode


class Largest(TorchFunctionMode):
    """Notes the size of the largest tensor that a call of PyTorch returns.

    A view counts with what it looks at, so that an expanded row is no larger than the row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size, *map(stored, tensors(out))])
        return out


def largest_made(work: Callable[[], object]) -> tuple[object, int]:
    """What work() returns, and the numbers in the largest tensor that was made meanwhile."""
    with Largest() as mode:
        result = work()
    return result, mode.size


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
