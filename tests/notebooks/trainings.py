"""Trainings in the mutations of 15, 16 and 18: done once, shortened, or read from their record.

A planted fault is in what reads a trained model, or in what stops a training and goes on. What
trains for minutes in the notebook need not do so for such a fault to be seen.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from torch.optim import AdamW

from nsa_lite.lab import checkpoint, training
from nsa_lite.lab.logs import read_log
from nsa_lite.lab.runs import recorded
from nsa_lite.lab.training import TrainConfig

NOTEBOOKS = ("15", "16")
OF_RECORD = {"18": "successors"}  # what is trained live there is the beginning of recorded runs
SHORT = 100  # steps; runs of no more are about stopping and going on, and are done each time
# Dense attention's mass teaches NSA's own scores, so that it chooses well after fewer steps.
SHORTER = {"nsa": {"attention": "nsa-own-kl", "steps": 700}, "window": {"steps": 101}}


def once(steps: Callable, kept: Path) -> Callable:
    """training.steps, but a whole run is done once; what it left in `kept` is given again.

    In a folder, since the faults of a notebook run in processes of their own.
    """

    def given(config: TrainConfig, directory: Path, resume: bool = False) -> Iterator[dict]:
        if resume or config.steps <= SHORT:
            yield from steps(config, directory, resume)
            return
        folder = kept / hashlib.sha256(json.dumps(config.everything()).encode()).hexdigest()
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)  # a training that a fault stopped
            train(steps, config, part)
            part.rename(folder)
        shutil.copytree(folder, directory, dirs_exist_ok=True)
        yield from read_log(directory)

    return given


def of_record(experiment: str) -> Callable:
    """training.steps, but what a recorded run of the same name has seen, without its model."""
    runs = recorded(experiment)["runs"]

    def given(config: TrainConfig, directory: Path) -> Iterator[dict]:  # noqa: ARG001  as training.steps
        evaluations = {r["step"]: r for r in runs[config.name]["evaluations"]}
        for step in range(1, max(evaluations) + 1):
            yield {"step": step} | evaluations.get(step, {})

    return given


def train(steps: Callable, config: TrainConfig, folder: Path) -> None:
    """Train, perhaps for less long, and leave a checkpoint that `config` fits."""
    for _ in steps(replace(config, **SHORTER.get(config.attention, {})), folder):
        pass
    path = folder / "checkpoint.safetensors"
    tensors, state = checkpoint.load(path)
    model = training.build(config)
    found = checkpoint.weights(tensors)
    model.load_state_dict({name: found[name] for name in model.state_dict()})
    optimizer = AdamW(model.parameters())
    checkpoint.save(path, model, optimizer, {**state, "config": config.everything()})
