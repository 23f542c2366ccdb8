"""Every recorded experiment in one table, and the command that does it again.

    python -m nsa_lite.lab.experiments rules

Each is resumable; its record stands in notebooks/recorded. A finished run is kept unless its config
has changed since: then it is done anew.
"""

import argparse
import fnmatch
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from nsa_lite.checks import require
from nsa_lite.lab import (
    border_runs,
    long_runs,
    neighbour_runs,
    rule_runs,
    selection_long,
    selection_runs,
)
from nsa_lite.lab.interrupts import signals_noted, status_of
from nsa_lite.lab.origin import versions
from nsa_lite.lab.runs import RECORDED, Run, do, finished, write_json
from nsa_lite.lab.training import DivergedError


class Experiment(NamedTuple):
    """One recorded experiment.

    runs() lists its runs in the order in which they are done; write(about, results, folder, path)
    leaves its record once all have a result: `about` names the command, the versions that wrote the
    record, and for each run (`made`) its config, commit, versions and machine; `results` are the
    runs' by name, `folder` is where they worked. on_gpu: its runs need a CUDA device.
    """

    name: str
    runs: Callable[[], list[Run]]
    file: str
    write: Callable[[dict, dict[str, dict], Path, Path], None]
    on_gpu: bool = False


def write_results(about: dict, results: dict[str, dict], folder: Path, path: Path) -> None:  # noqa: ARG001
    """The results as JSON."""
    write_json({**about, "runs": results}, path)


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment("recall_controls", rule_runs.controls, "recall_controls.json", write_results),
        Experiment("no_selection", rule_runs.without_selection, "no_selection.json", write_results),
        Experiment("papers_phi", rule_runs.with_the_papers_phi, "papers_phi.json", write_results),
        Experiment("rules", rule_runs.runs, "rules.json", write_results),
        Experiment("successors", rule_runs.successor_runs, "successors.json", write_results),
        Experiment("neighbours", neighbour_runs.runs, "neighbours.json", write_results),
        Experiment(
            "selection_recall",
            partial(selection_runs.runs, selection_runs.RECALL),
            "selection_recall.npz",
            partial(selection_runs.write_traces, selection_runs.RECALL),
        ),
        Experiment(
            "selection_text",
            partial(selection_runs.runs, selection_runs.TEXT),
            selection_runs.TEXT_MODEL.name,
            partial(selection_runs.write_model, selection_runs.TEXT),
        ),
        Experiment(
            "selection_haystack",
            selection_long.runs,
            "selection_haystack.npz",
            selection_long.write_traces,
        ),
        Experiment("border_small", border_runs.few_runs, "border_small.json", write_results),
        Experiment("haystack", long_runs.laptop_runs, "haystack.json", write_results),
        Experiment("train_long", long_runs.make_train_long, "train_long.json", write_results),
        Experiment(
            "haystack_controls",
            long_runs.laptop_controls,
            "haystack_controls.json",
            write_results,
        ),
        Experiment("border", border_runs.runs, "border.json", write_results, on_gpu=True),
        Experiment("haystack_64k", long_runs.gpu_runs, "haystack_64k.json", write_results, True),
        Experiment(
            "haystack_64k_short",
            long_runs.short_runs,
            "haystack_64k_short.json",
            write_results,
            on_gpu=True,
        ),
    )
}


def record(experiment: Experiment, folder: Path, path: Path) -> int:
    """Write an experiment's record once every run has its result; how many have not."""
    runs = experiment.runs()
    missing = sum(not finished(run, folder / run.name) for run in runs)
    if missing:
        return missing

    def of_each_run(file: str) -> dict[str, dict]:
        return {r.name: json.loads((folder / r.name / file).read_text("utf-8")) for r in runs}

    about = {
        "command": f"python -m nsa_lite.lab.experiments {experiment.name}",
        "versions": versions(),
        "made": of_each_run("about.json"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    experiment.write(about, of_each_run("result.json"), folder, path)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    words = parse(arguments)
    try:
        with signals_noted() as stop:
            for name in words.experiment or EXPERIMENTS:
                do_and_record(name, words, stop)
    except KeyboardInterrupt as stopped:
        print("\nStopped and saved. The same command goes on from here.", file=sys.stderr)
        return status_of(stopped)
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def do_and_record(name: str, words: argparse.Namespace, stop: list[int]) -> None:
    """Do what is left of one experiment, say before what it costs, and after how far it is."""
    require(name in EXPERIMENTS, "experiment", repr(name), f"must be one of {list(EXPERIMENTS)}")
    experiment = EXPERIMENTS[name]
    if experiment.on_gpu and not torch.cuda.is_available():
        print(f"{name}: its runs need a GPU, and torch finds none here; left out")
        return
    runs = experiment.runs()
    folder = words.out / name
    chosen = [run for run in runs if fnmatch.fnmatch(run.name, words.only)]
    left = [run for run in chosen if not finished(run, folder / run.name)]
    if left:
        cost = spoken_cost(left, experiment.on_gpu)
        print(f"{name}: {len(left)} of {len(runs)} runs to do, {cost}", flush=True)
    for run in chosen:
        do(run, folder / run.name, stop)
    path = words.record / experiment.file
    missing = record(experiment, folder, path)
    end = "" if missing else f"; wrote {path}"
    print(f"{name}: {len(runs) - missing} of {len(runs)} runs finished{end}")


def spoken_cost(runs: list[Run], on_gpu: bool) -> str:
    """About how long runs take, one after the other: 'about 2.5 hours on one core'."""
    minutes = sum(run.minutes for run in runs)
    spoken = f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
    return f"about {spoken} on one {'H100' if on_gpu else 'core'}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The words of the command line."""
    p = argparse.ArgumentParser(
        prog="python -m nsa_lite.lab.experiments",
        description="Do the long runs behind the recorded figures, or what is left of them.",
    )
    p.add_argument("experiment", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; all if not given")
    p.add_argument("--only", default="*", help="runs whose name fits, as in '*-seed0'")
    p.add_argument("--out", type=Path, default=Path("runs/experiments"), help="checkpoints, logs")
    p.add_argument("--record", type=Path, default=RECORDED, help="where the record goes")
    return p.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
