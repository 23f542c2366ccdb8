"""A long run in pieces that survive interruptions, and where its result is recorded."""

import itertools
import json
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from nsa_lite.lab import training
from nsa_lite.lab.checkpoint import difference, load
from nsa_lite.lab.logs import evaluations, read_log
from nsa_lite.lab.origin import origin

RECORDED = Path(__file__).parents[2] / "notebooks" / "recorded"


@dataclass(frozen=True)
class Run:
    """One piece of work: `work(folder)` yields once a step, and its last dict is the result.

    It keeps in `folder` what it needs to go on after an interruption. config: all that the result
    depends on, as JSON holds it. minutes: about what it takes on one core, or on one GPU.
    """

    name: str
    steps: int
    work: Callable[[Path], Generator[dict, None, None]]
    config: dict = field(default_factory=dict)
    minutes: float = 1.0


def training_run(
    config: training.TrainConfig, name: str | None = None, minutes: float = 1.0
) -> Run:
    """A training with training.steps; its result is the seconds and all held-out evaluations."""

    def work(folder: Path) -> Generator[dict, None, None]:
        yield from training.steps(config, folder, resume=True)
        _, state = load(folder / "checkpoint.safetensors")
        yield training_result(state, read_log(folder))

    return Run(name or config.name, config.steps, work, config.everything(), minutes)


def training_result(state: dict, records: list[dict]) -> dict:
    """A training's result: the seconds that its checkpoint counts, its log's evaluations."""
    return {"seconds": round(state["seconds"], 1), "evaluations": evaluations(records)}


def do(run: Run, folder: Path, stop: list[int]) -> None:
    """Do a run, or the rest of it, and leave result.json; a finished run is not done again.

    Beside it about.json holds the run's config and under what each part of it was done. Where the
    config has changed since, the run is done anew; what was there is kept under another name.
    Errors: KeyboardInterrupt between two steps, once `stop` holds a signal (signals_noted).
    """
    if finished(run, folder):
        return
    if why := stale(run, folder):
        print(f"{run.name}: {why}. Done anew; the old run is now in {put_aside(folder)}")
    folder.mkdir(parents=True, exist_ok=True)
    note(run, folder)
    work = run.work(folder)
    result = {}
    with tqdm(total=run.steps, desc=run.name, unit="step") as bar:
        for result in work:
            bar.update(result["step"] - bar.n if "step" in result else 1)
            if stop:
                work.close()
                raise KeyboardInterrupt(stop[0])
    write_json(result, folder / "result.json")


def finished(run: Run, folder: Path) -> bool:
    """Whether the folder holds the result of this very run."""
    return (folder / "result.json").exists() and stale(run, folder) is None


def stale(run: Run, folder: Path) -> str | None:
    """Why what the folder holds is not this run's; None if it is, or is empty."""
    about = folder / "about.json"
    if about.exists():
        what = difference(json.loads(about.read_text("utf-8"))["config"], run.config)
        return what and f"made with {what}"
    if folder.exists() and any(folder.iterdir()):
        return "made before configs were noted"
    return None


def put_aside(folder: Path) -> Path:
    """Rename the folder to the first free of name.old1, name.old2 ...; its new name."""
    names = (folder.with_name(f"{folder.name}.old{i}") for i in itertools.count(1))
    return folder.rename(next(name for name in names if not name.exists()))


def note(run: Run, folder: Path) -> None:
    """Write about.json: the config, and where another part was done under another origin, both."""
    path = folder / "about.json"
    under = json.loads(path.read_text("utf-8"))["under"] if path.exists() else []
    now = origin()
    write_json({"config": run.config, "under": under + [now] * (now not in under)}, path)


def write_json(value: dict, path: Path) -> None:
    """The whole file or none of it, whatever interrupts."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    os.replace(part, path)


def recorded(experiment: str, folder: Path = RECORDED) -> dict:
    """What an experiment left as JSON: the command, the versions, each run's result and origin.

    `runs` holds the results by name, `made` each run's config and under what its parts were done.
    """
    return json.loads((folder / f"{experiment}.json").read_text("utf-8"))
