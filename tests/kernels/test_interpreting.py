"""What the interpreter leaves out: patches that are there, checks that nobody reads."""

import os
import resource
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

import kernels  # noqa: F401  it hastens the interpreter

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter's own"
)


@triton.jit
def doubled(x):
    return x + x


@triton.jit
def many_times(x_ptr, times: tl.constexpr, bad: tl.constexpr):
    x = tl.load(x_ptr)
    for _ in range(times):
        x = doubled(x)
    if bad:
        x = doubled(tl.zeros([3], tl.float32))  # 3 is no power of 2
    tl.store(x_ptr, x + tl.sum(tl.full([4], 1.0, tl.float32), 0))  # a function of triton's own


@triton.jit
def sums_of_whole_numbers(x_ptr):
    x = tl.load(x_ptr + tl.arange(0, 4))
    tl.store(x_ptr + tl.arange(0, 4), x + x * 3 - 1)


@pytest.fixture
def patched(monkeypatch):
    """How often the interpreter has patched part of the language."""
    calls = []
    patch = interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *a: calls.append(a) or patch(*a))
    return calls


def test_a_launch_patches_as_often_however_many_functions_it_calls(patched):
    counts = []
    for times in (1, 20):
        patched.clear()
        x = torch.ones(1)
        many_times[(1,)](x, times, False)
        assert x.item() == 2**times + 4
        counts.append(len(patched))
    assert 0 < counts[1] <= counts[0]


@pytest.mark.parametrize("bad", [False, True])
def test_after_a_launch_the_language_is_tritons_own(bad):
    with pytest.raises(interpreter.InterpreterError) if bad else nullcontext():
        many_times[(1,)](torch.ones(1), 2, bad)
    for function in (tl.load, tl.store, tl.tensor.__add__, tl.math.exp):
        assert tl.core.is_builtin(function)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.float16])
def test_arithmetic_is_as_it_was_where_numbers_overflow_too(dtype):
    given = torch.tensor([0, 1, -7, 100]).to(dtype)
    x = given.clone()
    sums_of_whole_numbers[(1,)](x)
    assert torch.equal(x, given + given * 3 - 1)  # PyTorch's whole numbers wrap around too


@pytest.mark.parametrize("as_triton_does", [False, True])
def test_whole_numbers_are_added_once(as_triton_does, monkeypatch):
    """A second time, in 64 bits, takes casts."""
    builder = interpreter.interpreter_builder
    casts = []
    cast = builder.cast_impl
    monkeypatch.setattr(builder, "cast_impl", lambda *a: casts.append(a) or cast(*a))
    if as_triton_does:
        monkeypatch.setattr(builder, "options", replace(builder.options, sanitize_overflow=True))
    sums_of_whole_numbers[(1,)](torch.ones(4, dtype=torch.int32))
    assert bool(casts) == as_triton_does


def at_depth(depth, work):
    return at_depth(depth - 1, work) if depth else work()


def test_no_depth_of_calls_makes_each_turn_ask_the_system_for_memory():
    """At some depth the functions of a loop are the first in a new 16 KiB of frames."""

    def page_faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        many_times[(1,)](torch.zeros(1), 200, False)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    page_faults()
    faults = [at_depth(depth, page_faults) for depth in range(0, 200, 2)]
    # Several depths beside each other would suffer; a burst of other faults hits one or two.
    assert sorted(faults)[-3] < 200, faults
