"""Is B faster than A? Two things timed in turns, in one process, and a verdict with its noise.

    python -m benchmarks.ab forward_1_pointers forward_5_stages      two steps, on a GPU
    python -m benchmarks.ab my_module:make_a my_module:make_b        your own, on a GPU or a CPU

module:function is called once, without arguments, and returns what is to be timed, a callable; so
inputs are made before any clock runs. A step's name (`python -m benchmarks.steps --list`) stands
for that step at 64k tokens.

    warm-up      the first runs are not counted: they compile, and fill memory pools
    events       on a GPU the device itself says when it began and ended; on a CPU the clock does
    cold cache   before each run something larger than the cache is written (not with --warm-cache)
    turns        A B, B A, A B ..: what drifts, as a clock at its power limit, meets both alike
    verdict      from the ratio B / A of each turn: their median, and the range that holds the true
                 median in 95 of 100 such runs, if turns do not depend on each other

`card` asks nvidia-smi for the clock, the power and the temperature before and after.
"""

import argparse
import importlib
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from benchmarks.bench import NO_DEVICE
from benchmarks.layer import between, mark

COLD = 256 * 2**20  # bytes that are written between runs: more than any cache holds
MARGIN = 0.01  # a ratio closer to 1 is called no difference, however sure
CONFIDENCE = 0.95
Run = Callable[[], object]

# --- measuring ---


def cold_cache() -> Run:
    """What empties the cache: it writes COLD bytes of other memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    other = torch.zeros(COLD // 4, dtype=torch.int32, device=device)
    return other.zero_


def nothing() -> None:
    """What is done between runs where the cache is to stay as it is."""


def in_turns(
    runs: dict[str, Run], rounds: int = 20, warm_up: int = 3, before: Run = nothing
) -> dict[str, list[float]]:
    """Milliseconds of each run in each round; every second round goes through them backwards.

    `before` is called ahead of each run and is not timed.
    """
    for run in runs.values():
        for _ in range(warm_up):
            run()
    times = {name: [] for name in runs}
    for i in range(rounds):
        order = list(runs) if i % 2 == 0 else list(reversed(runs))
        for name, ms in one_round(runs, order, before).items():
            times[name].append(ms)
    return times


def one_round(runs: dict[str, Run], order: list[str], before: Run) -> dict[str, float]:
    """Milliseconds of each run, once, in this order; the device is waited for at the end only."""
    marks = {}
    for name in order:
        before()
        began = mark()
        runs[name]()
        marks[name] = (began, mark())
    return {name: between(*pair) for name, pair in marks.items()}


class Card(NamedTuple):
    """A GPU as nvidia-smi sees it."""

    clock_mhz: float
    power_w: float
    temperature_c: float


def card() -> Card | None:
    """The card's clock, power and temperature now; None where no nvidia-smi answers."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = "--query-gpu=clocks.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", asked, "--format=csv,noheader,nounits", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return Card(*(float(x) for x in done.stdout.split(",")))
    except (TypeError, ValueError):  # no device, or one that does not tell
        return None


# --- judging ---


class Verdict(NamedTuple):
    """B / A: the median over turns, the range of the true median, and whether it is away from 1."""

    ratio: float
    low: float
    high: float
    differs: bool


def rank(count: int, confidence: float = CONFIDENCE) -> int:
    """The r for which the r-th smallest and the r-th largest of `count` values hold the median.

    Each value is above the true median with probability 1/2, so the number of those above it is
    binomial. 0 where even all values do not reach the confidence: fewer than six turns for .95.
    """
    r = 0
    tail = 0.5**count  # that the median lies below the smallest value
    while 2 * tail <= 1 - confidence:
        r += 1
        tail += math.comb(count, r) * 0.5**count  # below the (r + 1)-th
    return r


def compare(a: Sequence[float], b: Sequence[float], margin: float = MARGIN) -> Verdict:
    """The verdict on times of A and B that were taken in turns; a[i] and b[i] are of one turn.

    With too few turns for any confidence nothing differs. Errors: ValueError unless there are as
    many of A as of B.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"turns = {len(a)} and {len(b)}: A and B need as many, one at least")
    ratios = sorted(y / x for x, y in zip(a, b, strict=True))
    r = rank(len(ratios))
    low = ratios[max(r - 1, 0)]
    high = ratios[-max(r, 1)]
    differs = r > 0 and (high < 1 - margin or low > 1 + margin)
    return Verdict(statistics.median(ratios), low, high, differs)


def spread(times: Sequence[float]) -> tuple[float, float]:
    """Where the middle half of the times lies: a quarter is below, a quarter above."""
    if len(times) < 2:
        return times[0], times[0]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, high


# --- in words ---


def words(verdict: Verdict) -> str:
    """The verdict as a sentence."""
    if not verdict.differs:
        return "does not differ beyond noise"
    less_or_more = "less" if verdict.ratio < 1 else "more"
    return f"differs: B takes {abs(1 - verdict.ratio):.1%} {less_or_more}"


def report(times: dict[str, list[float]]) -> str:
    """Both medians with their spread, the ratio with its range, and the verdict."""
    lines = []
    for letter, (name, found) in zip("AB", times.items(), strict=True):
        low, high = spread(found)
        middle = statistics.median(found)
        lines.append(f"{letter} {name:24} {middle:9.3f} ms, middle half {low:.3f} to {high:.3f}")
    a, b = times.values()
    verdict = compare(a, b)
    ratio = f"B / A {verdict.ratio:.3f}, from {verdict.low:.3f} to {verdict.high:.3f}"
    return "\n".join([*lines, f"{ratio} over {len(a)} turns", words(verdict)])


def card_line(when: str, found: Card | None) -> str:
    """One look at the card."""
    if found is None:
        return f"{when}: no nvidia-smi tells the clock and the power here"
    return f"{when}: {found.clock_mhz:.0f} MHz, {found.power_w:.0f} W, {found.temperature_c:.0f} C"


# --- the command ---


def is_step(name: str) -> bool:
    """Whether this is the name of a step and not module:function."""
    return ":" not in name


def made(name: str) -> Run:
    """What a name on the command line stands for, ready to be timed."""
    if is_step(name):
        from benchmarks.steps.case import at_64k

        return at_64k(name)
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ab", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("a", metavar="A", help="a step's name or module:function")
    parser.add_argument("b", metavar="B", help="the same")
    parser.add_argument("--rounds", type=int, default=20, help="turns that count (20)")
    parser.add_argument("--warm-cache", action="store_true", help="write nothing between runs")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available() and (is_step(args.a) or is_step(args.b)):
        print(NO_DEVICE.split("`")[0].strip(), file=sys.stderr)
        return 2
    runs = {args.a: made(args.a)}
    again = args.b if args.b != args.a else f"{args.b}, again"
    runs[again] = made(args.b)
    print(card_line("before", card()))
    before = nothing if args.warm_cache else cold_cache()
    print(report(in_turns(runs, args.rounds, before=before)))
    print(card_line("after", card()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
