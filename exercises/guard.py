"""Run an answer so that it cannot hang, end or flood the notebook, or move PyTorch's random state.

The answer runs in a thread of its own, which is stopped when its time is over. Out of reach are
a call into C that keeps Python's lock for ever, and one that ends the whole process.
"""

import contextlib
import ctypes
import io
import threading
from collections.abc import Callable

import torch


class Stopped(BaseException):
    """Raised inside an answer whose time is over."""


class LateError(Exception):
    """The answer's time was over before it returned."""


class Nowhere(io.TextIOBase):
    """A stream that forgets what is written to it."""

    def write(self, text: str) -> int:
        return len(text)


def run(work: Callable[[], object], seconds: float) -> object:
    """What work() returns, and nothing of what it prints.

    Errors: whatever work() raises; LateError after `seconds`.
    """
    result = {}
    done = threading.Event()

    def target() -> None:
        try:
            result["value"] = work()
        except BaseException as error:  # SystemExit too: it would pass in silence
            result["error"] = error
        finally:
            done.set()

    if _is_late(threading.Thread(target=target, daemon=True), done, seconds):
        raise LateError
    if "error" in result:
        raise result["error"]
    return result["value"]


def _is_late(thread: threading.Thread, done: threading.Event, seconds: float) -> bool:
    """Run the thread in silence; stop it if its time ends, or the learner interrupts, first."""
    out = contextlib.redirect_stdout(Nowhere())
    err = contextlib.redirect_stderr(Nowhere())
    with out, err, torch.random.fork_rng(devices=[]):
        thread.start()
        try:
            # Not thread.join: Python 3.11 takes a thread for ended when its join is interrupted.
            done.wait(max(seconds, 0.0))
        finally:
            late = not done.is_set()
            if late:
                _stop(thread, done)
    return late


def _stop(thread: threading.Thread, done: threading.Event) -> None:
    """Raise Stopped in the thread; more than once, since a bare `except:` swallows it."""
    for _ in range(5):
        if not done.is_set():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident), ctypes.py_object(Stopped)
            )
            done.wait(0.2)
    if done.is_set():
        thread.join()
