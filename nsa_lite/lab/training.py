"""Train a small model on a toy task, step by step, and resume after any interruption.

Two held-out batches are drawn: one is reported, the other decides when a task is solved and the run
stops, so that a run does not stop when the reported number happens to be high.
In a group of processes (lab/distributed.py) each takes its part of every batch.
"""

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from filelock import FileLock, Timeout
from torch import nn
from torch.optim import Optimizer

from nsa_lite.checks import require, require_int
from nsa_lite.config import NSAConfig
from nsa_lite.lab import distributed
from nsa_lite.lab.checkpoint import CheckpointError, load, restore, save
from nsa_lite.lab.evaluate import asked_span, evaluate, loss_and_accuracy
from nsa_lite.lab.haystack import Haystack
from nsa_lite.lab.logs import cut_log
from nsa_lite.lab.positions import require_rope_reaches
from nsa_lite.lab.tasks import IGNORE, Batch, Copy, Needle, Pace, Recall, Task
from nsa_lite.lab.text import Text
from nsa_lite.model import DecoderLM, ModelConfig
from nsa_lite.rivals.attentions import ATTENTIONS

TASKS = {task.name: task for task in (Recall, Needle, Copy, Text, Haystack)}

WARM = 50  # steps until the learning rate is full
AUTOCASTS = {"bfloat16": torch.bfloat16}  # float16 would need its loss scaled
LAST_SEED = 2**40  # every batch's seed then fits torch's 64 bits
REPORTED = 0  # the seed of the held-out batch whose scores are logged
DECIDING = 1  # the seed of the one that says whether the task is solved


class DivergedError(ArithmeticError):
    """A run whose loss, gradient or weights left the finite numbers: the message says where."""


@dataclass(frozen=True)
class TrainConfig:
    """One run: everything that its result depends on but the machine.

    length: of the task's (longest) sequences, None for the task's own. A step takes `accumulate`
    batches of batch_size (a stage may ask for a multiple), which several processes divide among
    them, and updates once. autocast: the dtype of matrix products ("bfloat16") or None. checkpoint:
    blocks keep only their inputs for the backward. all_queries: the last layer too attends from
    every position, as a language model does, not from those alone that have a target. sizes:
    fields of the task, over its own. threads: of each process.
    """

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
    length: int | None = None
    autocast: str | None = None
    accumulate: int = 1
    checkpoint: bool = False
    all_queries: bool = False
    sizes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.task in TASKS, "task", repr(self.task), f"must be one of {list(TASKS)}")
        rule = f"must be one of {list(ATTENTIONS)}"
        require(self.attention in ATTENTIONS, "attention", repr(self.attention), rule)
        require_int("seed", self.seed, at_least=0)
        require(self.seed <= LAST_SEED, "seed", self.seed, f"must not exceed {LAST_SEED}")
        for name in ("layers", "steps", "batch_size", "threads", "accumulate"):
            require_int(name, getattr(self, name), at_least=1)
        require(self.lr > 0, "lr", self.lr, "must be positive")
        rule = f"must be None or one of {list(AUTOCASTS)}"
        require(self.autocast in (None, *AUTOCASTS), "autocast", repr(self.autocast), rule)
        require_rope_reaches(self.nsa, self.made_task().longest)

    @classmethod
    def preset(cls, task: str, attention: str, seed: int = 0, **changes) -> "TrainConfig":
        """The task's own sizes, with `changes` over them."""
        require(task in TASKS, "task", repr(task), f"must be one of {list(TASKS)}")
        fields = {**TASKS[task].preset, **changes}
        return cls(task=task, attention=attention, seed=seed, **fields)

    def made_task(self) -> Task:
        """The task, of the run's length. Errors: ValueError where the task has no such length."""
        task: Task = TASKS[self.task](**self.sizes)
        task = task if self.length is None else task.at_length(self.length)
        return task.on(self.device)

    def everything(self) -> dict:
        """All that a result depends on but the code and the machine, as a checkpoint holds it."""
        task = self.made_task()
        sizes = asdict(cast(Any, task))  # every task is a dataclass
        curriculum = [task.pace(stage)._asdict() for stage in range(len(task.stages))]
        seeds = {"reported": REPORTED, "deciding": DECIDING}
        return {**asdict(self), "sizes": sizes, "curriculum": curriculum, "held_out": seeds}

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
    vocab_size = config.made_task().vocab_size
    attention = ATTENTIONS[config.attention].build
    model = DecoderLM(ModelConfig(vocab_size, config.layers, config.nsa), attention)
    return model.to(config.device)


def learning_rate(config: TrainConfig, task: Task, progress: Progress) -> float:
    """Warm-up, then as the task has it."""
    warm = min(1.0, (progress.step + 1) / WARM)
    return config.lr * warm * task.rate(progress.stage, progress.step / config.steps)


def require_device(device: str) -> None:
    """Raise a ValueError unless torch computes on `device` here: asked before a run begins."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError):  # the second from a torch that was built without it
        usable = "cpu or cuda" if torch.cuda.is_available() else "cpu, for no GPU is found"
        rule = f"no device that torch can use here; try {usable}"
        raise ValueError(f"device = {device!r}: {rule}") from None


def steps(
    config: TrainConfig, directory: Path, resume: bool = False
) -> Generator[dict, None, None]:
    """Train, yielding one log record a step; leave log.jsonl and checkpoint.safetensors behind.

    A checkpoint is written with every held-out result (task.evaluate_every), at the end, and when
    the caller closes the iterator between two steps; never in the middle of one, and only of good
    weights: they are finite, and so is their held-out loss. With resume=True the run goes on from
    it and ends with the same weights as an unbroken one. Several processes call, and close, alike:
    each gets the records, rank 0 writes, and all go on from what it wrote.
    Errors: ValueError for a device that is not here, or a batch_size that does not divide among the
    processes; CheckpointError when there is a run already, or when its checkpoint does not fit;
    DivergedError, the last checkpoint left as it was, when the loss, its gradient, the weights or
    the held-out loss are not finite. It would not help to keep the weights of the step before
    instead: going on from any of them repeats the same steps.
    """
    require_device(config.device)
    distributed.own_size(config.batch_size)  # says no to a batch_size
    with alone(directory):
        yield from rest_of(config, directory, resume)


def rest_of(config: TrainConfig, directory: Path, resume: bool) -> Generator[dict, None, None]:
    """All steps of a run, or those that are left."""
    torch.set_num_threads(config.threads)
    task = config.made_task()
    model = build(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    checkpoint = directory / "checkpoint.safetensors"
    progress = distributed.together(lambda: begin(config, model, optimizer, checkpoint, resume))
    distributed.require_alike("step", progress.step)
    log = directory / "log.jsonl" if distributed.rank() == 0 else Path(os.devnull)
    distributed.once(lambda: cut_log(log, progress.step))

    def keep_good(record: dict) -> None:
        require_good(config, task, model, record)
        save(checkpoint, model, optimizer, {"config": config.everything(), **asdict(progress)})

    def keep(record: dict) -> None:
        distributed.once(lambda: keep_good(record))

    try:
        with open(log, "a") as file:
            spread = distributed.spread(model)
            yield from updates(config, task, spread, optimizer, progress, file, keep)
    except DivergedError as error:
        raise DivergedError(f"{error}; stopped. {what_is_left(checkpoint)}") from None


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Make the folder, and let no other run work in it. Errors: CheckpointError if one does."""
    lock = FileLock(directory / "lock")

    def take() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            rule = "another run is at work here; wait for its end, or choose another --out"
            raise CheckpointError(f"{directory}: {rule}") from None

    distributed.once(take)
    try:
        yield
    finally:
        lock.release()


def updates(
    config: TrainConfig,
    task: Task,
    model: nn.Module,
    optimizer: Optimizer,
    progress: Progress,
    log: TextIO,
    keep: Callable[[dict], None],
) -> Generator[dict, None, None]:
    """One update after another until the run is done; keep(record) is called between two."""
    while progress.step < config.steps and not progress.solved:
        began = time.monotonic()
        record = one_step(config, task, model, optimizer, progress)
        progress.seconds += time.monotonic() - began
        log.write(json.dumps(record) + "\n")
        log.flush()
        if "test_loss" in record:
            keep(record)
        try:
            yield record
        except GeneratorExit:
            keep(record)
            raise


def require_finite(step: int, what: str, number: float) -> None:
    """Raise DivergedError, naming the step and the number, unless it is finite."""
    if not math.isfinite(number):
        raise DivergedError(f"step {step}: the {what} is {number}")


def require_good(config: TrainConfig, task: Task, model: DecoderLM, record: dict) -> None:
    """Raise DivergedError unless the weights after a step, and their held-out loss, are finite."""
    if not finite(model):
        raise DivergedError(f"step {record['step']}: some weights are not finite")
    if "test_loss" not in record:  # where it is, it was looked at
        with autocast_of(config):
            scores = evaluate(model, task, seed=REPORTED)
        require_finite(record["step"], "held-out loss", scores["test_loss"])


def finite(model: nn.Module) -> bool:
    """Whether every weight is a finite number."""
    return all(bool(p.isfinite().all()) for p in model.parameters())


def what_is_left(checkpoint: Path) -> str:
    """What a run that diverged still has, and what to do."""
    advice = "The same settings would end here again: try a smaller --lr, in another --out"
    if not checkpoint.exists():
        return f"There is no checkpoint yet. {advice}"
    _, state = load(checkpoint)
    return f"{checkpoint} still holds step {state['step']}, the last good one. {advice}"


def begin(
    config: TrainConfig, model: nn.Module, optimizer: Optimizer, checkpoint: Path, resume: bool
) -> Progress:
    """Where the run starts: at 0, or where its checkpoint stands, which is then loaded.

    Errors: CheckpointError when there is a run already, or when its checkpoint does not fit.
    """
    log = checkpoint.with_name("log.jsonl")
    if not checkpoint.exists():
        if log.exists() and log.stat().st_size > 0:
            keep_log(log, resume)
        return Progress()
    if not resume:
        raise CheckpointError(
            f"{checkpoint}: this run exists; continue it with --resume, or choose another --out"
        )
    state = restore(checkpoint, model, optimizer, config.everything())
    if not finite(model):
        raise CheckpointError(f"{checkpoint}: some weights are not finite; left untouched")
    return progress_of(checkpoint, state, config)


def keep_log(log: Path, resume: bool) -> None:
    """Rename a log that has no checkpoint: a run that died early, or whose checkpoint is lost."""
    if not resume:
        raise CheckpointError(
            f"{log}: a log without its checkpoint; choose another --out, or begin anew with "
            "--resume, which keeps this log under another name"
        )
    names = (log.with_name(f"log.old{i}.jsonl") for i in itertools.count(1))
    log.rename(next(name for name in names if not name.exists()))


def progress_of(checkpoint: Path, state: dict, config: TrainConfig) -> Progress:
    """Where a checkpoint stands. Errors: CheckpointError for fields that are no such place."""
    stages = len(config.made_task().stages)
    allowed = {
        "step": lambda x: type(x) is int and 0 <= x <= config.steps,
        "stage": lambda x: type(x) is int and 0 <= x < stages,
        "recent_accuracy": lambda x: type(x) is float and 0 <= x <= 1,
        "solved": lambda x: type(x) is bool,
        "seconds": lambda x: type(x) is float and x >= 0,
    }
    for name, fits in allowed.items():
        if not fits(state.get(name)):
            found = f"{name} = {state.get(name)!r}"
            raise CheckpointError(f"{checkpoint}: {found} is no place in this run; left untouched")
    return Progress(**{name: state[name] for name in allowed})


def one_step(
    config: TrainConfig, task: Task, model: nn.Module, optimizer: Optimizer, progress: Progress
) -> dict:
    """One update, in place; the record says what happened."""
    drawn = batch_seed(config.seed, progress.step)
    distributed.draw_apart(drawn)
    pace = task.pace(progress.stage)
    size = config.batch_size * pace.batch
    batch = task.batch(config.accumulate * size, drawn, progress.stage)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, task, progress)
    optimizer.zero_grad()
    loss, accuracy = backward(config, model, batch.to(config.device))
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    require_finite(progress.step + 1, "loss", loss)
    require_finite(progress.step + 1, "gradient's norm", float(norm))
    optimizer.step()

    stage = progress.stage
    advance(progress, accuracy, pace, config.steps, last_stage=len(task.stages) - 1)
    record = {
        "step": progress.step,
        "stage": stage,
        "loss": round(loss, 5),
        "accuracy": round(accuracy, 4),
    }
    if progress.step % task.evaluate_every == 0 or progress.step == config.steps:
        alone = cast(DecoderLM, distributed.bare(model))
        record |= distributed.once(lambda: held_out_scores(config, task, alone, progress))
        progress.solved = record["solved"]
    return record


def backward(config: TrainConfig, model: nn.Module, batch: Batch) -> tuple[float, float]:
    """Add up the gradients of a batch, an `accumulate`th at a time; its loss and accuracy.

    The loss is the mean over all targets of the batch, however they are spread over its parts and
    over processes, and a rule's own loss the mean over the parts.
    """
    last = batch.tokens.shape[1] if config.all_queries else asked_span(batch)
    whole = asked_count(batch)
    world = distributed.world()
    size = len(batch.tokens) // config.accumulate
    own = distributed.own(batch.split(distributed.own_size(size)))
    mean_loss = 0.0
    mean_accuracy = 0.0
    for part in own:
        share = asked_count(part) / whole
        with distributed.exchange(model, now=part is own[-1]):
            with autocast_of(config):
                logits, rules_loss = model(
                    part.tokens, last=last, return_loss=True, recompute=config.checkpoint
                )
            loss, accuracy = loss_and_accuracy(logits, part.targets[:, -last:])
            # Gradients are averaged over ranks, but a share is of the sum.
            (world * share * loss + rules_loss / config.accumulate).backward()
        mean_loss += share * loss.item()
        mean_accuracy += share * accuracy
    mean_loss, mean_accuracy = distributed.added_up(mean_loss, mean_accuracy)
    return mean_loss, mean_accuracy


def asked_count(batch: Batch) -> int:
    """How many targets a batch has."""
    return int((batch.targets != IGNORE).sum())


def autocast_of(config: TrainConfig) -> torch.autocast:
    """The autocast under which a run computes forward; switched off where it has none."""
    device_type = torch.device(config.device).type
    dtype = AUTOCASTS[config.autocast] if config.autocast else None
    return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None)


def held_out_scores(config: TrainConfig, task: Task, model: DecoderLM, progress: Progress) -> dict:
    """What is logged of the reported batch, and whether the deciding one says "solved".

    Errors: DivergedError when the held-out loss is not finite.
    """
    with autocast_of(config):
        scores = evaluate(model, task, seed=REPORTED)
        require_finite(progress.step, "held-out loss", scores["test_loss"])
        at_end = progress.stage == len(task.stages) - 1
        if not at_end or task.solved_at is None:
            return {**scores, "solved": False}
        accuracy = evaluate(model, task, seed=DECIDING)["test_accuracy"]
    return {**scores, "deciding_accuracy": accuracy, "solved": accuracy >= task.solved_at}


def advance(progress: Progress, accuracy: float, pace: Pace, steps: int, last_stage: int) -> None:
    """One step further; on to the next stage once this one is learned, or has lasted too long."""
    progress.step += 1
    progress.recent_accuracy = 0.8 * progress.recent_accuracy + 0.2 * accuracy
    overdue = progress.step >= pace.by * steps
    learned = progress.recent_accuracy > pace.until
    if progress.stage < last_stage and (learned or overdue):
        progress.stage += 1
        progress.recent_accuracy = 0.0


def batch_seed(seed: int, step: int) -> int:
    """A different batch at every step of every seed; evaluation uses seeds below 1000."""
    return 1000 + 1_000_003 * seed + step
