"""Train a small model on a toy task, step by step, and resume after any interruption."""

import json
import math
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from nsa_lite.checks import require, require_int
from nsa_lite.config import NSAConfig
from nsa_lite.lab.checkpoint import CheckpointError, restore, save
from nsa_lite.lab.evaluate import asked_span, evaluate, loss_and_accuracy
from nsa_lite.lab.logs import cut_log
from nsa_lite.lab.tasks import Copy, Needle, Recall, Task
from nsa_lite.lab.text import Text
from nsa_lite.model import DecoderLM, ModelConfig
from nsa_lite.rivals.attentions import ATTENTIONS

TASKS = {task.name: task for task in (Recall, Needle, Copy, Text)}

NEXT_STAGE_AT = 0.7  # accuracy, averaged over the last steps, at which the curriculum goes on
STAGE_SHARE = 0.25  # of the steps: no stage but the last lasts longer, learned or not


@dataclass(frozen=True)
class TrainConfig:
    """One run: everything that its result depends on but the machine."""

    task: str
    attention: str
    seed: int
    nsa: NSAConfig
    layers: int
    steps: int
    batch_size: int
    lr: float
    threads: int = 2
    device: str = "cpu"

    def __post_init__(self) -> None:
        require(self.task in TASKS, "task", repr(self.task), f"must be one of {list(TASKS)}")
        rule = f"must be one of {list(ATTENTIONS)}"
        require(self.attention in ATTENTIONS, "attention", repr(self.attention), rule)
        require_int("seed", self.seed, at_least=0)
        for name in ("layers", "steps", "batch_size", "threads"):
            require_int(name, getattr(self, name), at_least=1)
        require(self.lr > 0, "lr", self.lr, "must be positive")

    @classmethod
    def preset(cls, task: str, attention: str, seed: int = 0, **changes) -> "TrainConfig":
        """The task's own sizes, with `changes` over them."""
        require(task in TASKS, "task", repr(task), f"must be one of {list(TASKS)}")
        fields = {**TASKS[task].preset, **changes}
        return cls(task=task, attention=attention, seed=seed, **fields)

    @property
    def name(self) -> str:
        """The run's folder."""
        return f"{self.attention}-seed{self.seed}"


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint needs beside the tensors."""

    step: int = 0
    stage: int = 0
    recent_accuracy: float = 0.0
    solved: bool = False
    seconds: float = 0.0  # spent in all, before and after a resume


def build(config: TrainConfig) -> DecoderLM:
    """The model of a run, its weights drawn from the run's seed."""
    torch.manual_seed(config.seed)
    vocab_size = TASKS[config.task]().vocab_size
    attention = ATTENTIONS[config.attention].build
    model = DecoderLM(ModelConfig(vocab_size, config.layers, config.nsa), attention)
    return model.to(config.device)


def learning_rate(config: TrainConfig, step: int) -> float:
    """50 steps of warm-up, then half a cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / 50)
    return config.lr * warm * (0.05 + 0.475 * (1 + math.cos(math.pi * step / config.steps)))


def steps(
    config: TrainConfig, directory: Path, resume: bool = False
) -> Generator[dict, None, None]:
    """Train, yielding one log record a step; leave log.jsonl and checkpoint.safetensors behind.

    A checkpoint is written every 50 steps, at the end, and when the caller closes the iterator
    between two steps; never in the middle of one. With resume=True the run goes on from it and
    ends with the same weights as an unbroken one.
    Errors: CheckpointError when there is a run already, or when its checkpoint does not fit.
    """
    torch.set_num_threads(config.threads)
    task = TASKS[config.task]()
    model = build(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    checkpoint = directory / "checkpoint.safetensors"
    progress = begin(config, model, optimizer, checkpoint, resume)
    log = directory / "log.jsonl"
    cut_log(log, progress.step)

    def keep() -> None:
        save(checkpoint, model, optimizer, {"config": asdict(config), **asdict(progress)})

    with open(log, "a") as file:
        while progress.step < config.steps and not progress.solved:
            began = time.monotonic()
            record = one_step(config, task, model, optimizer, progress)
            progress.seconds += time.monotonic() - began
            file.write(json.dumps(record) + "\n")
            file.flush()
            if "test_loss" in record:
                keep()
            try:
                yield record
            except GeneratorExit:
                keep()
                raise


def begin(
    config: TrainConfig, model: nn.Module, optimizer: Optimizer, checkpoint: Path, resume: bool
) -> Progress:
    """Where the run starts: at 0, or where its checkpoint stands, which is then loaded.

    Errors: CheckpointError when there is a run already, or when its checkpoint does not fit.
    """
    if not checkpoint.exists():
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        return Progress()
    if not resume:
        raise CheckpointError(
            f"{checkpoint}: this run exists; continue it with --resume, or choose another --out"
        )
    state = restore(checkpoint, model, optimizer, asdict(config))
    return Progress(**{field: state[field] for field in asdict(Progress())})


def one_step(
    config: TrainConfig, task: Task, model: DecoderLM, optimizer: Optimizer, progress: Progress
) -> dict:
    """One update, in place; the record says what happened."""
    batch = task.batch(config.batch_size, batch_seed(config, progress.step), progress.stage)
    batch = batch.to(config.device)
    last = asked_span(batch)
    logits, rules_loss = model(batch.tokens, last=last, return_loss=True)
    loss, accuracy = loss_and_accuracy(logits, batch.targets[:, -last:])
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, progress.step)
    optimizer.zero_grad()
    (loss + rules_loss).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

    stage = progress.stage
    advance(progress, accuracy, config.steps, last_stage=len(task.stages) - 1)
    record = {
        "step": progress.step,
        "stage": stage,
        "loss": round(loss.item(), 5),
        "accuracy": round(accuracy, 4),
    }
    if progress.step % 50 == 0 or progress.step == config.steps:
        record |= evaluate(model, task)
        at_end = progress.stage == len(task.stages) - 1
        solved = task.solved_at is not None and record["test_accuracy"] >= task.solved_at
        progress.solved = solved and at_end
        record["solved"] = progress.solved
    return record


def advance(progress: Progress, accuracy: float, steps: int, last_stage: int) -> None:
    """One step further; on to the next stage once this one is learned, or has lasted too long."""
    progress.step += 1
    progress.recent_accuracy = 0.8 * progress.recent_accuracy + 0.2 * accuracy
    overdue = progress.step >= STAGE_SHARE * steps * (progress.stage + 1)
    learned = progress.recent_accuracy > NEXT_STAGE_AT
    if progress.stage < last_stage and (learned or overdue):
        progress.stage += 1
        progress.recent_accuracy = 0.0


def batch_seed(config: TrainConfig, step: int) -> int:
    """A different batch at every step of every seed; evaluation uses seeds below 1000."""
    return 1000 + 1_000_003 * config.seed + step
