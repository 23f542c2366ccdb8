"""Train attentions side by side up to 16,384 tokens, through a curriculum of haystacks.

    python -m nsa_lite.lab.train_long --attention dense --attention nsa-kl --attention window

One layer, and only the positions that ask are queries: what keys, values and phi cost over all T
is paid in full, what T queries would cost is not.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from nsa_lite.lab.curriculum import evaluate, train
from nsa_lite.lab.haystack import Haystack
from nsa_lite.lab.origin import origin
from nsa_lite.model import DecoderLM, ModelConfig
from nsa_lite.rivals.attentions import ATTENTIONS
from nsa_lite.show.tables import Column, table

KINDS = ("dense", "nsa-kl", "window")
COLUMNS = (
    Column("attention", 16),
    Column("tokens", 7),
    Column("steps", 6),
    Column("seconds", 8, ".1f"),
    Column("CPU s", 7, ".1f"),
    Column("accuracy", 9, ".3f"),
    Column("hit rate", 9, ".3f"),
)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    words = parse(arguments)
    torch.set_num_threads(words.threads)
    runs = {}
    try:
        task = up_to(words.length, Haystack())
        for attention in words.attention or KINDS:
            runs[attention] = one_run(task, attention, words.seed)
            print(table(COLUMNS, rows_of(runs[attention])))
            record(runs, words)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nStopped. Runs that had ended are in {words.out}", file=sys.stderr)
        return 130
    return 0


def record(runs: dict[str, dict], words: argparse.Namespace) -> None:
    """Leave the runs that have ended, and what they were made with, in summary.json."""
    words.out.mkdir(parents=True, exist_ok=True)
    settings = {"seed": words.seed, "threads": words.threads}
    summary = {**origin(), **settings, "runs": runs}
    (words.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The words of the command line."""
    p = argparse.ArgumentParser(
        prog="python -m nsa_lite.lab.train_long",
        description="Train attentions side by side on haystacks of up to 16,384 tokens.",
    )
    p.add_argument("--attention", choices=ATTENTIONS, action="append", help="repeat for several")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--length", type=int, help="leave out longer stages")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path, default=Path("runs") / "haystack")
    return p.parse_args(arguments)


def build(task: Haystack, attention: str, seed: int) -> DecoderLM:
    """The task's own model with one kind of attention, its weights drawn from the seed."""
    torch.manual_seed(seed)
    sizes = ModelConfig(task.vocab_size, task.preset["layers"], task.preset["nsa"])
    return DecoderLM(sizes, ATTENTIONS[attention].build)


def up_to(length: int | None, task: Haystack) -> Haystack:
    """The task without its stages that are longer. Errors: ValueError if none is left."""
    if length is None:
        return task
    return replace(task, stages=tuple(s for s in task.stages if s.length <= length))


def one_run(task: Haystack, attention: str, seed: int) -> dict:
    """Train one attention through the whole curriculum; a held-out result after every stage."""
    model = build(task, attention, seed)
    lr = task.preset["lr"]
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)
    began = time.monotonic()
    used_before = time.process_time()
    results = []
    with tqdm(total=sum(s.steps for s in task.stages), desc=attention, unit="step") as bar:
        for record in train(task, model, optimizer, lr, seed):
            bar.update()
            bar.set_postfix(tokens=record["length"], accuracy=record["running_accuracy"])
            if record["done"]:
                stage = task.stages[record["stage"]]
                result = {"length": stage.length, "step": record["step"]}
                result |= evaluate(task, model, stage)
                result["seconds"] = time.monotonic() - began
                result["cpu_seconds"] = time.process_time() - used_before
                results.append(result)
    return {"attention": attention, "seed": seed, "stages": results}


def rows_of(run: dict) -> list[list]:
    """A run's lines of the table, one a stage."""
    keys = ("length", "step", "seconds", "cpu_seconds", "accuracy", "hit_rate")
    return [[run["attention"], *(stage.get(key) for key in keys)] for stage in run["stages"]]


if __name__ == "__main__":
    sys.exit(main())
