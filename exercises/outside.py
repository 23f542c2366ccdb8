"""What an answer may change outside of itself, noticed and put back: names, and settings.

A replaced torch.isclose would judge as the answer likes; a changed default dtype would follow the
learner through the notebook. All of this is one process: who looks for more to change finds it.
"""

import builtins
import copy
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
import torch.nn.functional as F


def _set_default_device(device: torch.device) -> None:
    """Without a default, tensors are made on the CPU; naming the CPU would leave a mode behind.

    PyTorch follows every function while such a mode is there, and its compiler breaks graphs at it.
    """
    torch.set_default_device(None if device == torch.device("cpu") else device)


# What is read and set. The device and the grad mode belong to a thread, the others to all.
SETTINGS: dict[str, tuple[Callable, Callable]] = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, _set_default_device),
    "torch's grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's deterministic mode": (
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    "torch's seed": (torch.initial_seed, torch.manual_seed),
    "Python's recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
}

# torch itself replaces the first two, for a dtype and for its compiler; a test runner the third.
FOLLOWS = {"Storage", "manual_seed", "excepthook"}

# A module or class by its name, with what it held when it was kept.
_kept: dict[str, tuple[object, dict[str, object]]] = {}


def keep(name: str, place: object) -> None:
    """Remember the functions of a module or class, once."""
    if name not in _kept:
        _kept[name] = place, _watched(place)


def keep_ours() -> None:
    """Remember what judges an answer: the modules of the checks, and of the paper behind them."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("exercises", "nsa_lite"):
            keep(name, module)


def _watched(place: object) -> dict[str, object]:
    """All of a class; of a module the public functions and classes, as imports may add to it."""
    if isinstance(place, type):
        return dict(place.__dict__)
    return {
        name: value
        for name, value in place.__dict__.items()
        # A notebook binds the method `input` anew for every cell.
        if callable(value) and not isinstance(value, MethodType)
        if name[0] != "_" and name not in FOLLOWS
    }


def put_back_names() -> list[str]:
    """Undo what was replaced in the places that are kept; "torch.isclose was replaced", say."""
    said = []
    for label, (place, names) in _kept.items():
        for name in _hiding(place, names):
            delattr(place, name)
            said.append(f"{label}.{name} was replaced")
        for name, value in names.items():
            if place.__dict__.get(name) is not value:
                setattr(place, name, value)
                said.append(f"{label}.{name} was replaced")
    return said


def _hiding(place: object, names: dict[str, object]) -> list[str]:
    """What was added to a class and hides an inherited name: most of Tensor's are inherited."""
    if not isinstance(place, type):
        return []
    new = [name for name in place.__dict__ if name not in names]
    return [name for name in new if any(name in base.__dict__ for base in place.__mro__[1:])]


def settings() -> dict[str, object]:
    """The settings as this thread sees them."""
    return {name: get() for name, (get, _) in SETTINGS.items()}


def put_back(before: dict[str, object]) -> list[str]:
    """Undo what was replaced, and what differs from these settings; say what that was."""
    said = put_back_names()
    now = settings()
    for name, value in before.items():
        if now[name] != value:
            SETTINGS[name][1](value)
            said.append(f"{name} was changed")
    return said


@contextmanager
def as_at_the_start() -> Iterator[list[str]]:
    """PyTorch as a new kernel has it, then as it was; the list tells what had to be put back."""
    said = put_back_names()
    before = settings()
    state = torch.default_generator.get_state()
    torch.set_default_dtype(torch.float32)
    start = settings()
    try:
        yield said
    finally:
        said += put_back(start)
        put_back(before)
        torch.default_generator.set_state(state)


for _place in (builtins, copy, math, threading, time, torch, F):
    keep(_place.__name__, _place)
keep("torch.Tensor", torch.Tensor)
