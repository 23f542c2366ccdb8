"""Train small models on a toy task, side by side, and resume after any interruption.

    python -m nsa_lite.lab.train --task recall --attention nsa --attention dense --attention window

It leaves a table, curves and a summary; a run that Ctrl-C stopped goes on with --resume.
On several GPUs, or several processes on the CPU, which divide each batch among them:

    torchrun --nproc-per-node 2 -m nsa_lite.lab.train --device cuda
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from nsa_lite.checks import require
from nsa_lite.lab import distributed
from nsa_lite.lab.checkpoint import load
from nsa_lite.lab.interrupts import signals_noted, status_of
from nsa_lite.lab.logs import evaluations, last_evaluation, read_log, runs_table
from nsa_lite.lab.origin import origin
from nsa_lite.lab.training import (
    AUTOCASTS,
    TASKS,
    DivergedError,
    TrainConfig,
    require_device,
    steps,
)
from nsa_lite.rivals.attentions import ATTENTIONS

SIZES = ("steps", "batch_size", "accumulate", "lr", "layers", "length")
MEANS = ("threads", "device", "autocast", "checkpoint", "all_queries")
CHANGES = (*SIZES, *MEANS)  # over a task's preset


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    words = parse(arguments)
    with distributed.processes():
        again = command(arguments)
        try:
            runs, states = train_all(words)
        except KeyboardInterrupt as stopped:
            say(f"\nStopped and saved. To go on: {again} --resume")
            return status_of(stopped)
        except DivergedError as error:
            say(f"error: {error}")
            return 1
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            say(f"error: {first_line(error)}")
            return 2
        if distributed.rank() == 0:
            out = folder(words)
            report(words.task, runs, states, out)
            summary = summary_of(runs, states, again)
            (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return 0


def train_all(words: argparse.Namespace) -> tuple[dict[str, list[dict]], dict[str, dict]]:
    """Each run's log and the state of its last checkpoint, by the run's name; on rank 0."""
    require_once("--attention", words.attention)
    require_once("--seed", words.seed)
    device = words.device or "cpu"
    distributed.take_own_device(device)
    require_device(device)
    changes = {k: getattr(words, k) for k in CHANGES if getattr(words, k) is not None}
    runs: dict[str, list[dict]] = {}
    states: dict[str, dict] = {}
    for attention in words.attention or ["nsa", "dense", "window"]:
        for seed in words.seed or [0]:
            config = TrainConfig.preset(words.task, attention, seed, **changes)
            directory = folder(words) / config.name
            train_with_bar(config, directory, words.resume)
            if distributed.rank() == 0:
                _, states[config.name] = load(directory / "checkpoint.safetensors")
                runs[config.name] = read_log(directory)
    return runs, states


def require_once(name: str, given: list | None) -> None:
    """Raise a ValueError for a run that is asked for twice."""
    twice = [x for x in given or [] if (given or []).count(x) > 1]
    require(not twice, name, twice[0] if twice else None, "is given twice")


def first_line(error: Exception) -> str:
    """What an error says first; torch adds pages to some."""
    return str(error).partition("\n")[0]


def folder(words: argparse.Namespace) -> Path:
    """Where the runs are."""
    return words.out or Path("runs") / words.task


def say(line: str) -> None:
    """Print to stderr, once for all processes: what ends a run ends it on all of them."""
    if distributed.rank() == 0:
        print(line, file=sys.stderr)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The words of the command line."""
    p = argparse.ArgumentParser(
        prog="python -m nsa_lite.lab.train",
        description="Train small models on a toy task, side by side, and resume them.",
    )
    p.add_argument("--task", choices=TASKS, default="recall")
    p.add_argument("--attention", choices=ATTENTIONS, action="append", help="repeat for several")
    p.add_argument("--seed", type=int, action="append", help="repeat for several; 0 if not given")
    p.add_argument("--steps", type=int)
    p.add_argument("--batch-size", type=int, help="of all processes together")
    p.add_argument("--accumulate", type=int, help="batches a step, one update for all; 1")
    p.add_argument("--layers", type=int)
    p.add_argument(
        "--length", type=int, help="of the longest sequences; haystack takes 256 to 262144"
    )
    p.add_argument("--lr", type=float)
    p.add_argument("--threads", type=int, help="2 if not given; part of what a run repeats")
    p.add_argument("--device", help="cpu if not given; only there a resumed run repeats every bit")
    p.add_argument("--autocast", choices=AUTOCASTS, help="matrix products in 16 bits")
    p.add_argument(
        "--checkpoint",
        action="store_true",
        default=None,
        help="keep only the blocks' inputs for the backward: less memory, one forward more",
    )
    p.add_argument(
        "--all-queries",
        action="store_true",
        default=None,
        help="the last layer attends from every position, not from those alone that are asked",
    )
    p.add_argument("--out", type=Path, help="runs/TASK if not given")
    p.add_argument("--resume", action="store_true", help="go on with runs that exist")
    return p.parse_args(arguments)


def train_with_bar(config: TrainConfig, directory: Path, resume: bool) -> None:
    """Do a run under a progress bar.

    Errors: KeyboardInterrupt, with the signal's number, once it is saved after Ctrl-C or `kill`.
    """
    run = steps(config, directory, resume)
    with signals_noted() as stop:
        quiet = distributed.rank() > 0
        with tqdm(total=config.steps, desc=config.name, unit="step", disable=quiet) as bar:
            for record in run:
                bar.update(record["step"] - bar.n)
                shown = ("test_accuracy", "hit_rate", "bits_per_byte")
                if numbers := {k: record[k] for k in shown if k in record}:
                    bar.set_postfix(numbers)
                numbers = sum(distributed.everyone(stop), [])
                if numbers:  # all ranks leave after the same step
                    run.close()
                    raise KeyboardInterrupt(numbers[0])


def command(arguments: list[str] | None) -> str:
    """The command as it was given, without --resume, quoted for a shell."""
    given = sys.argv[1:] if arguments is None else arguments
    world = distributed.world()
    start = ["python"] if world == 1 else ["torchrun", "--nproc-per-node", str(world)]
    words = ["-m", "nsa_lite.lab.train", *(x for x in given if x != "--resume")]
    return shlex.join([*start, *words])


def summary_of(runs: dict[str, list[dict]], states: dict[str, dict], command: str) -> dict:
    """What was run, with what, and how it ended: enough to draw it again or to repeat it."""
    return {
        "command": command,
        **origin(),
        "runs": {
            name: {
                "config": states[name]["config"],
                "seconds": round(states[name]["seconds"], 1),
                "evaluations": evaluations(records),
            }
            for name, records in runs.items()
        },
    }


def report(task: str, runs: dict[str, list[dict]], states: dict[str, dict], out: Path) -> None:
    """Print the table, and draw the curves into `out`."""
    from nsa_lite.show import curves, plots  # matplotlib is slow to import; only the end needs it

    plots.use_style()
    picture = out / "curves.png"
    curves.draw_curves(runs).savefig(picture)
    print(runs_table(runs, {name: state["seconds"] for name, state in states.items()}))
    if baseline := TASKS[task]().baseline():
        print(baseline)
    for name, records in runs.items():
        if sentence := verdict(name, last_evaluation(records), TASKS[task]().guess()):
            print(sentence)
    print(f"curves: {picture}")


def verdict(name: str, last: dict, guess: float) -> str | None:
    """A sentence about a run that learned no answer; None for others.

    That is right for a control that cannot reach the answers, and a fault of any other run.
    """
    if not last or last["test_loss"] < 0.98 * guess:
        return None
    loss = f"its held-out loss, {last['test_loss']:.3f}, is that of a guess ({guess:.3f})"
    return f"{name}: {loss}. It found no answers"


if __name__ == "__main__":
    sys.exit(main())
