"""What a model scores on a task: loss, accuracy, and how often it selects the answer's block.

A long sequence is read as a language model reads it: first what stands before the questions, into
caches, then the questions. So memory holds one trace a question, and a few sequences at a time.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nsa_lite.attention import accurate
from nsa_lite.lab.tasks import IGNORE, Batch, Task
from nsa_lite.model import DecoderLM
from nsa_lite.traces import Trace

TOKENS = 2**15  # of the sequences that are read at once, unless one alone is longer


def asked_span(batch: Batch) -> int:
    """How many newest positions hold every target: no other logits are worth computing."""
    asked = (batch.targets != IGNORE).any(0)
    return len(asked) - int(asked.int().argmax())


def loss_and_accuracy(
    logits: Float[Tensor, "B T vocabulary"], targets: Int[Tensor, "B T"]
) -> tuple[Float[Tensor, ""], float]:
    """Cross-entropy in nats and the share of right answers, over the positions that are asked."""
    flat = accurate(logits).flatten(0, 1)  # under autocast logits come in 16 bits
    loss = F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE)
    asked = targets != IGNORE
    return loss, float((logits.argmax(-1) == targets)[asked].float().mean())


class Answers(NamedTuple):
    """What a model says at the m newest positions of each sequence, which hold all questions.

    Shapes: logits (B, m, vocabulary), targets and answer_at (B, m), hit (B, m): whether a group of
    some layer selects the block of answer_at; None for attentions that select nothing.
    """

    logits: Tensor
    targets: Tensor
    answer_at: Tensor
    hit: Tensor | None


@torch.no_grad()
def answers(model: DecoderLM, batch: Batch) -> Answers:
    """The model's answers to a batch of any length."""
    size = max(1, TOKENS // batch.tokens.shape[1])
    parts = [answers_to_some(model, some) for some in batch.split(size)]
    hits = [part.hit for part in parts if part.hit is not None]
    return Answers(
        torch.cat([part.logits for part in parts]),
        torch.cat([part.targets for part in parts]),
        torch.cat([part.answer_at for part in parts]),
        torch.cat(hits) if hits else None,
    )


def answers_to_some(model: DecoderLM, batch: Batch) -> Answers:
    """The model's answers to sequences that it reads at once."""
    count = asked_span(batch)
    size, length = batch.tokens.shape[:2]
    caches = model.new_caches(size, length, dtype=dtype_of_rows(batch.tokens.device))
    if count < length:
        model(batch.tokens[:, :-count], caches, last=1)
    logits, traces = model(batch.tokens[:, -count:], caches, return_traces=True)
    answer_at = batch.answer_at[:, -count:]
    hit = hits(traces, answer_at) if traces and bool((answer_at >= 0).any()) else None
    return Answers(logits, batch.targets[:, -count:], answer_at, hit)


def dtype_of_rows(device: torch.device) -> torch.dtype | None:
    """What keys and values are under the autocast of the moment; None outside one."""
    autocasts = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if autocasts else None


def hits(traces: list[Trace], answer_at: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Whether the block that holds the answer is selected, by any group of any layer."""
    block = answer_at // traces[0].config.select_block_size  # (B, T)
    each = [(t.ids == block[:, None, :, None]).any(-1).any(1) for t in traces]  # (B, T) each
    return torch.stack(each).any(0)


@contextmanager
def asked(model: DecoderLM, seed: int) -> Iterator[None]:
    """Inside, a rule does not explore as it does in training, and random blocks disturb no one."""
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
    model.train()


def evaluate(model: DecoderLM, task: Task, size: int | None = None, seed: int = 0) -> dict:
    """Held-out loss and accuracy on the task's last stage, the task's own score, the hit rate."""
    batch = task.held_out(size or task.held_out_size, seed).to(model.embedding.weight.device)
    with asked(model, seed):
        given = answers(model, batch)
    loss, accuracy = loss_and_accuracy(given.logits, given.targets)
    result = {"test_loss": round(float(loss), 5), "test_accuracy": round(accuracy, 4)}
    result |= task.score(float(loss))
    if given.hit is not None and math.isfinite(float(loss)):  # NaN scores choose something too
        result["hit_rate"] = round(share(given.hit, given.answer_at), 4)
    return result


def hit_rate(traces: list[Trace], batch: Batch) -> float:
    """How often a trace of all positions selects the answer's block, where there is an answer."""
    return share(hits(traces, batch.answer_at), batch.answer_at)


def share(hit: Bool[Tensor, "B T"], answer_at: Int[Tensor, "B T"]) -> float:
    """The hits as a share of the positions that have an answer."""
    return float(hit[answer_at >= 0].float().mean())
