"""The interpreter patches triton.language once a launch, and takes all of it back."""

import os
from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

import kernels  # noqa: F401  before triton, so that it interprets

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
