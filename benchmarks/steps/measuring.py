"""What the steps take on a GPU: in turns, with a cold cache, beside what would have misled."""

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks import ab
from benchmarks.cases import Sizes
from benchmarks.layer import between, mark
from benchmarks.steps import chain
from benchmarks.steps.case import Case, runner

SHORT = 8192  # keys and values of a group fit the L2 cache
FASTEST = "forward_5_stages"
DRIFT_SECONDS = 8.0
REST = 5.0  # seconds without work before it
ROUNDS = 15
TINY = Sizes(32, 2, 32, 32, select_block_size=16, num_selected=4)  # to try the script on a CPU


# --- the chains ---


def rows(kind: str, x: Case, rounds: int) -> Iterator[dict]:
    """Every step's times, a family's in turns; how long its first run took; its largest error."""
    for family in chain.FAMILIES:
        runs = {name: runner(x, name) for name in chain.with_shipped(family)}
        first = {name: wall_ms(run) for name, run in runs.items()}
        times = ab.in_turns(runs, rounds, before=ab.cold_cache())
        for name in runs:
            yield {
                "family": family,
                "ids": kind,
                "name": name,
                "first_ms": first[name],
                "median_ms": statistics.median(times[name]),
                "times": [round(ms, 4) for ms in times[name]],
                "error": error_of(x, name),
            }


def error_of(x: Case, name: str) -> float | None:
    """The largest difference from the family's first step, as a share of the largest number."""
    if name.endswith("_shipped"):
        return None  # its output stays inside; the tests hold it to the reference
    first = chain.step(chain.names(chain.family_of(name))[0]).run(x)[0].float()
    mine = chain.step(name).run(x)[0].float()
    return float((mine - first).abs().max() / first.abs().max())


def wall_ms(run: Callable[[], object], wait: bool = True) -> float:
    """Milliseconds by the host's clock, from the call to its return or to the device's end."""
    synchronize()
    began = time.perf_counter()
    run()
    if wait:
        synchronize()
    return 1e3 * (time.perf_counter() - began)


def synchronize() -> None:
    """Wait until the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- what misleads ---


def mistakes(x: Case, rounds: int) -> dict[str, float]:
    """One kernel on a short case, timed rightly and in three wrong ways; milliseconds."""
    run = runner(x, FASTEST)
    first = wall_ms(run)

    def median_of(measure: Callable[[], float]) -> float:
        return statistics.median(measure() for _ in range(rounds))

    def by_events(before: ab.Run) -> float:
        return ab.one_round({"": run}, [""], before)[""]

    cold = ab.cold_cache()
    return {
        "the first call": first,
        "nobody waits": median_of(lambda: wall_ms(run, wait=False)),
        "by the host's clock": median_of(lambda: wall_ms(run)),
        "events, warm cache": median_of(lambda: by_events(ab.nothing)),
        "events, cold cache": median_of(lambda: by_events(cold)),
    }


def control(x: Case, rounds: int) -> dict[str, list[float]]:
    """A kernel against itself: what noise looks like."""
    runs = {name: runner(x, FASTEST) for name in ("A", "A again")}
    return ab.in_turns(runs, rounds, before=ab.cold_cache())


@contextmanager
def watched(every: float = 0.1) -> Iterator[list[tuple]]:
    """(seconds, MHz, watts, degrees) of the card, looked at all the time."""
    looks = []
    stop = threading.Event()
    began = time.perf_counter()

    def look() -> None:
        while not stop.is_set():
            found = ab.card()
            if found is not None:
                looks.append((round(time.perf_counter() - began, 3), *found))
            stop.wait(every)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield looks
    finally:
        stop.set()
        watcher.join()


def drift(x: Case, seconds: float = DRIFT_SECONDS) -> dict[str, list]:
    """One kernel again and again on a card that rested: (second, ms) of each run, and the card."""
    run = runner(x, FASTEST)
    run()
    synchronize()
    time.sleep(min(REST, seconds))
    found = []
    began = time.perf_counter()
    with watched() as looks:
        while (now := time.perf_counter() - began) < seconds:
            marks = [mark()]
            for _ in range(8):  # the device is never idle for long
                run()
                marks.append(mark())
            pairs = zip(marks, marks[1:], strict=False)
            found += [(round(now, 3), round(between(*pair), 4)) for pair in pairs]
    return {"times": found, "card": looks}
