"""Triton's interpreter, which runs the kernels where there is no CUDA device, in less time.

At a kernel's start it puts its own functions into triton.language, and takes them out at the end.
At each call of another jit function it puts all of them in again, though they are there: with
kernels of many small functions that takes a third of the time. So it is told to look first.
"""

from triton import language as tl
from triton.runtime import interpreter


def patch_once() -> None:
    """Have the interpreter leave a language alone that it has patched already."""
    if not hasattr(interpreter, "_LangPatchScope"):  # another triton: as fast as it is
        return
    patch = interpreter._patch_lang

    def unless_done(fn):
        return interpreter._LangPatchScope() if is_patched(fn) else patch(fn)

    interpreter._patch_lang = unless_done


def is_patched(fn) -> bool:
    """Whether all of triton.language that a function can see is the interpreter's."""
    seen = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
    samples = [f for language in seen for f in (language.load, language.tensor.__add__)]
    return bool(samples) and not any(tl.core.is_builtin(f) for f in samples)
