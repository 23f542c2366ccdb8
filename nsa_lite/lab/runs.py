"""A long run in pieces that survive interruptions, and where its result is recorded."""

import json
import os
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nsa_lite.lab import training
from nsa_lite.lab.checkpoint import load
from nsa_lite.lab.logs import evaluations, read_log

RECORDED = Path(__file__).parents[2] / "notebooks" / "recorded"


@dataclass(frozen=True)
class Run:
    """One piece of work: `work(folder)` yields once a step, and its last dict is the result.

    It keeps in `folder` what it needs to go on after an interruption.
    """

    name: str
    steps: int
    work: Callable[[Path], Generator[dict, None, None]]


def training_run(config: training.TrainConfig, name: str | None = None) -> Run:
    """A training with training.steps; its result is the seconds and all held-out evaluations."""

    def work(folder: Path) -> Generator[dict, None, None]:
        yield from training.steps(config, folder, resume=True)
        _, state = load(folder / "checkpoint.safetensors")
        seconds = round(state["seconds"], 1)
        yield {"seconds": seconds, "evaluations": evaluations(read_log(folder))}

    return Run(name or config.name, config.steps, work)


def do(run: Run, folder: Path, stop: threading.Event) -> None:
    """Do a run, or the rest of it, and leave result.json; a finished run is not done again.

    Errors: KeyboardInterrupt when `stop` is set, between two steps.
    """
    if (folder / "result.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    work = run.work(folder)
    result = {}
    with tqdm(total=run.steps, desc=run.name, unit="step") as bar:
        for result in work:
            bar.update(result["step"] - bar.n if "step" in result else 1)
            if stop.is_set():
                work.close()
                raise KeyboardInterrupt
    write_json(result, folder / "result.json")


def write_json(value: dict, path: Path) -> None:
    """The whole file or none of it, whatever interrupts."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, path)


def recorded(experiment: str, folder: Path = RECORDED) -> dict:
    """What an experiment left as JSON: the command, the versions, and each run's result."""
    return json.loads((folder / f"{experiment}.json").read_text("utf-8"))
