"""A result in Python's and PyTorch's own types, so that nothing in it can answer for itself."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def bare(value: object) -> object:
    """The same values, without what the answer may have added to them.

    An int whose == is always True becomes the int that it is, a subclass of Tensor a Tensor (of
    the same memory, with its gradient), an object of any other type an empty one of that name.
    """
    for kind, make in KINDS.items():
        if issubclass(type(value), kind):
            return make(value)
    return value if type(value) in (bool, complex, range, type(None)) else _nameless(value)


def _tensor(value: Tensor) -> Tensor:
    """The same tensor without a subclass of the answer's."""
    if type(value) is Tensor:
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return Tensor.as_subclass(value, Tensor)


def _array(value: np.ndarray) -> object:
    """The same array without a subclass; one of Python objects is a list of them."""
    if value.dtype.hasobject:
        return bare(np.ndarray.tolist(value))
    return value if type(value) is np.ndarray else np.ndarray.view(value, np.ndarray)


def _nameless(value: object) -> object:
    """An object that can do nothing, whose type has the same name."""
    return type(str(type(value).__name__), (), {})()


KINDS: dict[type, Callable] = {
    Tensor: _tensor,
    np.ndarray: _array,
    np.generic: lambda value: bare(np.generic.item(value)),  # before float: float64 is one
    bool: lambda value: value,
    int: int.__pos__,
    float: float.__pos__,
    str: str.__str__,
    tuple: lambda value: tuple(map(bare, tuple.__iter__(value))),
    list: lambda value: list(map(bare, list.__iter__(value))),
}
