"""Say in one sentence how a value differs from the expected one, and where first."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from exercises.records import Mistake

Axes = tuple[str, ...] | dict[str, tuple[str, ...]]


def difference(got: object, expected: object, axes: Axes = ()) -> str | None:
    """None if `got` is what was asked for, else the first thing that is wrong with it."""
    return form(got, expected) or wrong_value(got, expected, axes)


def form(got: object, expected: object) -> str | None:
    """What is wrong with the type, length, shape, dtype or device, values aside."""
    if got is None and expected is not None:
        return "the function returned None: is a return missing?"
    if isinstance(expected, tuple):
        if not isinstance(got, tuple | list):
            return f"the function returned {a(got)}, and {len(expected)} results were asked for"
        if len(got) != len(expected):
            return f"the function returned {len(got)} results, and {len(expected)} were asked for"
        parts = enumerate(map(form, got, expected), 1)
        return next((f"result {n}: {said}" for n, said in parts if said), None)
    if isinstance(expected, Tensor):
        return _form_of_tensor(got, expected)
    if isinstance(expected, list):
        return None if isinstance(plain(got), list) else _asked(got, "a list")
    return _form_of_number(got, expected)


def wrong_value(got: object, expected: object, axes: Axes = ()) -> str | None:
    """Where a value of the right form is wrong first."""
    if isinstance(expected, tuple):
        names = axes
        if not isinstance(axes, dict):
            names = {f"result {n + 1}": () for n in range(len(expected))}
        for (name, its_axes), one, other in zip(names.items(), got, expected, strict=True):
            if said := wrong_value(one, other, its_axes):
                return f"{name}: {said}"
        return None
    if isinstance(expected, Tensor):
        return _first_wrong_entry(got, expected, axes)
    if isinstance(expected, list):
        return _first_wrong_item(plain(got), expected)
    return None if _equal(plain(got), expected) else f"got {number(plain(got))}, which is wrong"


def plain(value: object) -> object:
    """A list for a tuple, a range or an array; a number for an array of no axes."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, tuple | range) else value


def _form_of_tensor(got: object, expected: Tensor) -> str | None:
    """The first of device, shape and kind of numbers that is not the expected one."""
    if not isinstance(got, Tensor):
        return _asked(got, "a torch.Tensor")
    if got.device != expected.device:
        return f"the result is on the device {got.device}, the inputs on {expected.device}"
    if got.shape != expected.shape:
        return f"the shape is {tuple(got.shape)}, and {tuple(expected.shape)} was asked for"
    if kind(got.dtype) != kind(expected.dtype):
        return f"the dtype is {got.dtype}, and {kind(expected.dtype)} was asked for"
    return None


def _form_of_number(got: object, expected: bool | int | float | str) -> str | None:
    """A number of another type; whole numbers are accepted where a float is expected."""
    value = plain(got)
    wanted = (int, float) if isinstance(expected, float) else type(expected)
    right = isinstance(value, wanted) and isinstance(value, bool) == isinstance(expected, bool)
    return None if right else _asked(got, a(expected))


def _asked(got: object, wanted: str) -> str:
    """What came, and what was asked for."""
    return f"the function returned {a(got)}, and {wanted} was asked for"


def kind(dtype: torch.dtype) -> str:
    """ "bool", "floating point" or "integer": any width of a kind is accepted."""
    if dtype == torch.bool or dtype.is_complex:
        return "bool" if dtype == torch.bool else "complex"
    return "floating point" if dtype.is_floating_point else "integer"


def close(got: Tensor, expected: Tensor) -> Tensor:
    """Which entries agree: exactly for integers, to about 4 digits for floating point."""
    if not expected.is_floating_point():
        return got == expected
    return torch.isclose(got.detach().double(), expected.double(), rtol=1e-4, atol=1e-5)


def matches(got: object, value: object) -> bool:
    """Whether `got` is this value: for an explanation that recognises a known mistake."""
    return difference(got, value) is None


def recognise(got: object, mistakes: dict[str, object]) -> str | None:
    """The sentence whose value is `got`; mistakes maps a sentence to what that mistake gives.

    None if there is no such value, or more than one: another case may tell the two apart.
    """
    found = [sentence for sentence, value in mistakes.items() if matches(got, value)]
    return found[0] if len(found) == 1 else None


def name_mistake(
    got: object,
    mistakes: Sequence[Mistake],
    arguments: Sequence[object],
    *,
    call: Callable[..., object] | None = None,
    part: Callable[[object], object] | None = None,
    **places: object,
) -> str | None:
    """The sentence of the one mistake that gives `got` for these arguments, its places filled in.

    call is the case's own call(answer, *arguments); part(result) is what of a result is compared.
    """
    part = part or (lambda result: result)
    values = {}
    for mistake in mistakes:
        run = mistake.answer if call is None else functools.partial(call, mistake.answer)
        try:
            with torch.inference_mode(False), torch.enable_grad():  # whatever the notebook has set
                values[mistake.says.format(**places)] = part(run(*arguments))
        except Exception:  # a mistake that stops at these inputs gives nothing to compare
            continue
    return recognise(part(got), values)


def place(index: tuple[int, ...], axes: tuple[str, ...]) -> str:
    """(5, 2) with axes ("query", "block") is "query 5, block 2"."""
    names = [*axes, *(f"axis {n}" for n in range(len(axes), len(index)))]
    return ", ".join(f"{name} {i}" for name, i in zip(names, index, strict=False))


def a(value: object) -> str:
    """ "a list", "an int": the type of a value, in words."""
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in tuple('aeiou') else 'a'} {name}"


def number(value: float | int | bool) -> str:
    """A number as a message shows it, in at most 4 digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _first_wrong_entry(got: Tensor, expected: Tensor, axes: Axes) -> str | None:
    """The place of the first wrong entry, a NaN before all others, and how many there are."""
    wrong = ~close(got, expected)
    if not wrong.any():
        return None
    lost = got.isnan() & ~expected.isnan()
    first = tuple((lost if lost.any() else wrong).nonzero()[0].tolist())
    where = f"{place(first, axes)}: " if first else ""
    count = f" ({int(wrong.sum())} of {wrong.numel()} entries are wrong)" if first else ""
    return f"{where}got {number(got[first].item())}, which is wrong{count}"


def _first_wrong_item(got: list, expected: list) -> str | None:
    """The first entry that differs, or a wrong length."""
    for n, (one, other) in enumerate(zip(got, expected, strict=False)):
        if said := difference(one, other):
            return f"entry {n}: {said}"
    if len(got) == len(expected):
        return None
    return f"the list has {len(got)} entries: too {'few' if len(got) < len(expected) else 'many'}"


def _equal(got: object, expected: object) -> bool:
    """Whether two numbers agree: exactly, or to about 4 digits for floating point."""
    if isinstance(expected, float):
        return math.isclose(got, expected, rel_tol=1e-4, abs_tol=1e-9)
    return got == expected


def same(one: object, other: object) -> bool:
    """Whether two arguments hold the same numbers, bit by bit, NaN equal to NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return bool(((one == other) | (one.isnan() & other.isnan())).all())
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and same(list(one.values()), list(other.values()))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(itertools.starmap(same, zip(one, other, strict=True)))
    if isinstance(one, int | float | str | bool):
        return one == other
    return True  # a module or a function: not compared
