"""The command line of benchmarks.steps."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import benchmarks.steps
from benchmarks.records import RESULTS, about, save, what_was_run
from benchmarks.steps import chain


def listed() -> Iterator[str]:
    """Each step, and what it changes."""
    for family in chain.FAMILIES:
        for name in chain.names(family):
            yield f"{name:24} {chain.title(name)}"


def differences() -> Iterator[str]:
    """The lines that change from each step to the next."""
    for family in chain.FAMILIES:
        names = chain.names(family)
        for before, after in zip(names, names[1:], strict=False):
            yield f"\n{before} -> {after}"
            yield from chain.difference(before, after)


def once(name: str) -> None:
    """One step at 64k, three times, for a profiler to look at the last."""
    from benchmarks.steps.case import at_64k
    from benchmarks.steps.measuring import synchronize

    run = at_64k(name)
    for _ in range(3):
        run()
    synchronize()


def measured(arguments: list[str], tiny: bool, out: Path) -> None:
    """Time all of it, and save as it comes in."""
    from benchmarks import ab
    from benchmarks.cases import CONFIGS
    from benchmarks.steps import case, measuring

    layer = measuring.TINY if tiny else CONFIGS["A"]
    rounds = 2 if tiny else measuring.ROUNDS
    length, short = (24, 24) if tiny else (case.LENGTH, measuring.SHORT)
    seconds = 0.1 if tiny else measuring.DRIFT_SECONDS
    record = about(arguments, "benchmarks.steps") | {"config": "A", "length": length}
    record |= {"before": ab.card(), "rows": []}

    for kind in case.KINDS:
        for row in measuring.rows(kind, case.drawn(kind, length, layer), rounds):
            record["rows"].append(row)
            print(f"{kind:13} {row['name']:24} {row['median_ms']:9.3f} ms", flush=True)
            save(record, out)
    long = case.drawn("random", length, layer)
    record["control"] = measuring.control(long, rounds)
    record["short"] = short
    record["mistakes"] = measuring.mistakes(case.drawn("random", short, layer), rounds)
    record["drift"] = measuring.drift(long, seconds)
    record["after"] = ab.card()
    save(record, out)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps",
        description=benchmarks.steps.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="name the steps")
    parser.add_argument("--difference", action="store_true", help="print what each one changes")
    parser.add_argument(
        "--compile",
        nargs="*",
        metavar="FAMILY",
        help=f"compile them for an H100: of {', '.join(chain.FAMILIES)} (all)",
    )
    parser.add_argument("--once", metavar="STEP", help="run one at 64k, for a profiler")
    parser.add_argument("--tiny", action="store_true", help="try the script on a CPU")
    parser.add_argument("--out", type=Path, help="where the record goes")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    words = what_was_run(arguments, args.out)
    printed: dict[bool, Callable] = {args.list: listed, args.difference: differences}
    if True in printed:
        print("\n".join(printed[True]()))
        return 0
    if args.compile is not None:
        from benchmarks.steps import machine_code

        save(
            machine_code.record(words, args.compile or chain.FAMILIES),
            args.out or RESULTS / "steps_compiled.json",
        )
        return 0
    if not torch.cuda.is_available() and not args.tiny:
        print("error: no CUDA device: times of interpreted kernels mean nothing", file=sys.stderr)
        return 2
    if args.once:
        once(args.once)
        return 0
    measured(words, args.tiny, args.out or RESULTS / "steps.json")
    return 0
