"""Run work so that it cannot hang, end or flood the notebook.

It runs in a thread of its own, which is stopped when its time is over: PyTorch's grad mode and
default device are as a new thread has them. Out of reach are a call into C that keeps Python's
lock for ever, and one that ends the whole process.
"""

import contextlib
import ctypes
import io
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
TELLINGS = 40  # how often a thread is told to end before it is held
AGAIN = 0.005  # seconds from one telling to the next
PATIENCE = 1.0  # seconds until a thread is left alone that neither ends nor can be held, as asleep


class LateError(Exception):
    """The time was over before the work returned."""


class HeldError(SystemExit):
    """Holds for ever the thread in which it is raised: `except:` makes it, and gets no further."""

    def __init__(self) -> None:
        super().__init__()
        thread = threading.current_thread()
        if isinstance(thread, Worker):
            thread.gone.set()
            threading.Event().wait()


class Nowhere(io.TextIOBase):
    """A stream that forgets what is written to it."""

    def write(self, text: str) -> int:
        return len(text)


class Worker(threading.Thread):
    """A thread that keeps what its work returned or raised, and can be told to end."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.value: object = None
        self.error: BaseException | None = None
        self.done = threading.Event()
        self.gone = threading.Event()  # it ended, or is held

    def run(self) -> None:
        try:
            self.value = self.work()
        except BaseException as error:  # SystemExit too: it would pass in silence
            self.error = error
        finally:
            self.done.set()
            self.gone.set()

    def stop(self) -> None:
        """Tell the thread to end; hold it, if a bare `except:` swallows that again and again.

        A thread that is left over would print for ever, and end Python badly.
        """
        for telling in range(round(PATIENCE / AGAIN)):
            if not self.is_alive() or self.gone.is_set():
                return
            error = SystemExit if telling < TELLINGS else HeldError
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self.ident), ctypes.py_object(error)
            )
            self.gone.wait(AGAIN)


def is_inside() -> bool:
    """Whether this is run by an answer."""
    return isinstance(threading.current_thread(), Worker)


def run(work: Callable[[], Result], seconds: float) -> Result:
    """What work() returns, and nothing of what it prints.

    Errors: whatever work() raises; LateError after `seconds`.
    """
    worker = Worker(work)
    nowhere = Nowhere()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        worker.start()
        try:
            # Not worker.join: Python 3.11 takes a thread for ended when its join is interrupted.
            worker.done.wait(max(seconds, 0.0))
        finally:  # the learner's Ctrl-C comes here too
            late = not worker.done.is_set()
            if late:
                worker.stop()
            if worker.done.is_set():
                worker.join()
    if late:
        raise LateError(f"not done in {seconds:g} seconds")
    if worker.error:
        raise worker.error
    return worker.value
