"""Train a model through the stages of a curriculum: short haystacks first, the longest last."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from nsa_lite.lab.evaluate import hit_rate, loss_and_accuracy
from nsa_lite.lab.haystack import Haystack, Stage, require_rope_reaches
from nsa_lite.lab.tasks import Batch
from nsa_lite.lab.training import batch_seed
from nsa_lite.model import DecoderLM

WARM = 50  # steps until the learning rate is full
FADE = 0.9  # of the running accuracy stays, each step adds the rest


@dataclass
class Place:
    """Where a run through a curriculum stands: all that goes on from step to step."""

    stage: int = 0
    step: int = 0
    step_of_stage: int = 0
    accuracy: float = 0.0  # of the last steps

    def ends(self, stage: Stage) -> bool:
        """Whether the stage is learned, or has lasted long enough."""
        return self.accuracy >= stage.until or self.step_of_stage >= stage.steps


def train(
    task: Haystack, model: DecoderLM, optimizer: Optimizer, lr: float, seed: int = 0
) -> Iterator[dict]:
    """Go through the task's stages, yielding one record a step; `done` holds the last step of each.

    Only the asking positions are queries of the last layer. Errors: ValueError if RoPE's base
    cannot tell the longest stage's positions apart.
    """
    require_rope_reaches(model.config.nsa, max(stage.length for stage in task.stages))
    place = Place()
    for place.stage, stage in enumerate(task.stages):
        place.step_of_stage = 0
        place.accuracy = 0.0
        while not place.ends(stage):
            batch = task.batch(stage.batch, batch_seed(seed, place.step), place.stage)
            set_learning_rate(optimizer, lr * stage.rate * min(1.0, (place.step + 1) / WARM))
            record = one_step(model, optimizer, batch, task.questions)
            place.step += 1
            place.step_of_stage += 1
            place.accuracy = FADE * place.accuracy + (1 - FADE) * record["accuracy"]
            done = place.ends(stage)
            where = {"stage": place.stage, "length": stage.length, "step": place.step}
            yield {**where, **record, "running_accuracy": place.accuracy, "done": done}


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """The same rate for every weight."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def one_step(model: DecoderLM, optimizer: Optimizer, batch: Batch, questions: int) -> dict:
    """One update, in place; the record says what happened and how long it took."""
    began = time.monotonic()
    logits, rules_loss = model(batch.tokens, last=questions, return_loss=True)
    loss, accuracy = loss_and_accuracy(logits, batch.targets[:, -questions:])
    optimizer.zero_grad()
    (loss + rules_loss).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    seconds = time.monotonic() - began
    return {"loss": loss.item(), "accuracy": accuracy, "seconds": seconds}


@torch.no_grad()
def evaluate(
    task: Haystack, model: DecoderLM, stage: Stage, sequences: int = 32, seed: int = 0
) -> dict:
    """Held-out accuracy and hit rate at any length, one sequence at a time: memory is that of one.

    The hit rate is missing for attentions that select nothing.
    """
    model.eval()
    rows = [asked_one(task, model, stage, seed + i) for i in range(sequences)]
    model.train()
    return {key: sum(row[key] for row in rows) / sequences for key in rows[0]}


def asked_one(task: Haystack, model: DecoderLM, stage: Stage, seed: int) -> dict[str, float]:
    """What the model answers to one sequence's questions."""
    batch = task.draw(stage, 1, seed)
    count = task.questions
    logits, traces = model(batch.tokens, last=count, return_traces=True)
    asked = Batch(*(x[:, -count:] for x in (batch.tokens, batch.targets, batch.answer_at)))
    _, accuracy = loss_and_accuracy(logits, asked.targets)
    result = {"accuracy": accuracy}
    if traces:
        result["hit_rate"] = hit_rate(traces, asked)
    return result
