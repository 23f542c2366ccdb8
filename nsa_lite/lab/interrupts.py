"""Ctrl-C, `kill` and a closed terminal wait for the end of a step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Inside, what asks a process to end is noted in the list, by number, and no more happens.

    Who works inside looks at the list between two steps: half a step must not reach a checkpoint.
    """
    noted: list[int] = []
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {n: signal.signal(n, lambda number, _: noted.append(number)) for n in numbers}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def status_of(stopped: KeyboardInterrupt) -> int:
    """The exit status of a command that a signal ended, as shells have it: 130 for Ctrl-C."""
    return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
