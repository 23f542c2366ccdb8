"""The long runs behind the course's recorded figures: resumable, each experiment one JSON file.

python -m nsa_lite.lab.experiments rules
"""

import argparse
import fnmatch
import importlib
import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from nsa_lite.checks import require
from nsa_lite.lab import train
from nsa_lite.lab.checkpoint import load

# Name -> the module whose runs() lists the runs, in the order in which they are done.
EXPERIMENTS = {
    "rules": "nsa_lite.lab.rule_runs",
    "neighbours": "nsa_lite.lab.neighbour_runs",
}
RECORDED = Path(__file__).parents[2] / "notebooks" / "recorded"


@dataclass(frozen=True)
class Run:
    """One piece of work: `work(folder)` yields once a step, and its last dict is the result.

    It keeps in `folder` what it needs to go on after an interruption.
    """

    name: str
    steps: int
    work: Callable[[Path], Iterator[dict]]


def training_run(config: train.TrainConfig) -> Run:
    """A training with train.steps; its result is the seconds and all held-out evaluations."""

    def work(folder: Path) -> Iterator[dict]:
        yield from train.steps(config, folder, resume=True)
        _, state = load(folder / "checkpoint.safetensors")
        yield {
            "seconds": round(state["seconds"], 1),
            "evaluations": train.evaluations(train.read_log(folder)),
        }

    return Run(config.name, config.steps, work)


def runs_of(experiment: str) -> list[Run]:
    """The runs of an experiment by name."""
    require(
        experiment in EXPERIMENTS,
        "experiment",
        repr(experiment),
        f"must be one of {list(EXPERIMENTS)}",
    )
    return importlib.import_module(EXPERIMENTS[experiment]).runs()


def recorded(experiment: str, folder: Path = RECORDED) -> dict:
    """What `make experiments` wrote: the command, the versions, and each run's result."""
    return json.loads((folder / f"{experiment}.json").read_text("utf-8"))


def do(run: Run, folder: Path, stop: threading.Event) -> None:
    """Do a run, or the rest of it, and leave result.json; a finished run is not done again.

    Errors: KeyboardInterrupt when `stop` is set, between two steps.
    """
    if (folder / "result.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    work, result = run.work(folder), None
    with tqdm(total=run.steps, desc=run.name, unit="step") as bar:
        for result in work:
            bar.update(result["step"] - bar.n if "step" in result else 1)
            if stop.is_set():
                work.close()
                raise KeyboardInterrupt
    write_json(result, folder / "result.json")


def record(experiment: str, runs: list[Run], out: Path, path: Path) -> int:
    """Write an experiment's JSON once every run has its result; how many have not."""
    results = {run.name: out / experiment / run.name / "result.json" for run in runs}
    missing = sum(not result.exists() for result in results.values())
    if not missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            {
                "command": f"python -m nsa_lite.lab.experiments {experiment}",
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
                "runs": {name: json.loads(result.read_text()) for name, result in results.items()},
            },
            path,
        )
    return missing


def write_json(value: dict, path: Path) -> None:
    """The whole file or none of it, whatever interrupts."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, path)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    a = _parse(arguments)
    stop = threading.Event()
    # Ctrl-C waits for the end of a step, as in nsa_lite.lab.train.
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        for experiment in a.experiment or EXPERIMENTS:
            runs = runs_of(experiment)
            for run in runs:
                if fnmatch.fnmatch(run.name, a.only):
                    do(run, a.out / experiment / run.name, stop)
            missing = record(experiment, runs, a.out, a.record / f"{experiment}.json")
            print(
                f"{experiment}: {len(runs) - missing} of {len(runs)} runs finished"
                + ("" if missing else f"; wrote {a.record / experiment}.json")
            )
    except KeyboardInterrupt:
        print("\nStopped and saved. The same command goes on from here.", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGINT, before)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m nsa_lite.lab.experiments", description=__doc__.split("\n")[0]
    )
    p.add_argument("experiment", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; all if not given")
    p.add_argument("--only", default="*", help="runs whose name fits, as in '*-seed0'")
    p.add_argument("--out", type=Path, default=Path("runs/experiments"), help="checkpoints, logs")
    p.add_argument("--record", type=Path, default=RECORDED, help="where the JSON goes")
    return p.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
