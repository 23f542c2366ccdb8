"""Run work so that it cannot hang, end or flood the notebook.

It runs in a thread of its own, which is stopped when its time is over: PyTorch's grad mode and
default device are as a new thread has them. Out of reach are a call into C that keeps Python's
lock for ever, and one that ends the whole process.
"""

import contextlib
import ctypes
import io
import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
PATIENCE = 1.0  # seconds in which a thread is told to end
AGAIN = 0.005  # seconds from one telling to the next


class LateError(Exception):
    """The time was over before the work returned."""


class Nowhere(io.TextIOBase):
    """A stream that forgets what is written to it, and holds a thread whose time is over.

    `while True: try: print() except: pass` catches whatever it is told, and would print for ever.
    """

    def write(self, text: str) -> int:
        thread = threading.current_thread()
        if isinstance(thread, Worker) and thread.late:
            threading.Event().wait()
        return len(text)


class Worker(threading.Thread):
    """A thread that keeps what its work returned or raised, and can be told to end."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.value: object = None
        self.error: BaseException | None = None
        self.done = threading.Event()
        self.late = False

    def run(self) -> None:
        try:
            self.value = self.work()
        except BaseException as error:  # SystemExit too: it would pass in silence
            self.error = error
        finally:
            self.done.set()

    def stop(self) -> None:
        """Raise SystemExit in the thread, again and again, since a bare `except:` swallows it.

        Sooner or later it comes where no `try` is. Threads end by a SystemExit without a word.
        """
        self.late = True
        end = time.monotonic() + PATIENCE
        while self.is_alive() and not self.done.is_set() and time.monotonic() < end:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self.ident), ctypes.py_object(SystemExit)
            )
            self.done.wait(AGAIN)


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
        raise LateError
    if worker.error:
        raise worker.error
    return worker.value
