"""Triton's interpreter, which runs the kernels where there is no CUDA device, in less time.

What it does again and again, where once or never would do, and when:

    puts its own functions into triton.language     at each call of a jit function, though they are
                                                    there from the kernel's start to its end
    computes with whole numbers a second time, in   always, though without its option debug nobody
    64 bits, and compares                           reads whether they overflowed
    lists the numpy types of all of Triton's        at each value that it makes
    asks the system for memory                      at each call whose frame is the first in a new
                                                    piece: Python has them in pieces of 16 KiB, and
                                                    gives one back when its last function returns

Without all that kernels like ours take a third of the time, and compute the same.
"""

from dataclasses import replace

from triton import language as tl
from triton.runtime import interpreter

ROOM = 40_000  # pointers: a piece for it has 512 KiB, of which it leaves 200


def hasten() -> None:
    """Have the interpreter leave all of that out; another triton's stays as fast as it is."""
    if hasattr(interpreter, "_LangPatchScope"):
        patch_once()
    options = interpreter.interpreter_builder.options
    if hasattr(options, "sanitize_overflow") and not options.debug:
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    if hasattr(interpreter, "_get_np_dtype"):
        remember_types()
    if hasattr(interpreter, "GridExecutor"):
        give_room()


def give_room() -> None:
    """Have a launch begin with a large frame: Python makes its piece large enough for more."""
    run = interpreter.GridExecutor.__call__

    def run_in_room(*args, **kwargs):
        return run(*args, **kwargs)

    run_in_room.__code__ = run_in_room.__code__.replace(co_stacksize=ROOM)
    interpreter.GridExecutor.__call__ = run_in_room


def patch_once() -> None:
    """Have the interpreter leave a language alone that it has patched already."""
    patch = interpreter._patch_lang

    def unless_done(fn):
        return interpreter._LangPatchScope() if is_patched(fn) else patch(fn)

    interpreter._patch_lang = unless_done


def remember_types() -> None:
    """Have the interpreter look up numpy's type for one of Triton's once."""
    look_up = interpreter._get_np_dtype
    found = {}

    def remembered(dtype):
        name = dtype.scalar.name  # of a block's elements; a block is no key
        if name not in found:
            found[name] = look_up(dtype.scalar)
        return found[name]

    interpreter._get_np_dtype = remembered


def is_patched(fn) -> bool:
    """Whether all of triton.language that a function can see is the interpreter's."""
    seen = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
    samples = [f for language in seen for f in (language.load, language.tensor.__add__)]
    return bool(samples) and not any(tl.core.is_builtin(f) for f in samples)
