"""What a model scores on a task: loss, accuracy, and how often it selects the answer's block."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nsa_lite.attention import accurate
from nsa_lite.lab.tasks import IGNORE, Batch, Task
from nsa_lite.model import DecoderLM
from nsa_lite.traces import Trace


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


@torch.no_grad()
def evaluate(model: DecoderLM, task: Task, size: int | None = None, seed: int = 0) -> dict:
    """Held-out loss and accuracy on the task's last stage, the task's own score, the hit rate."""
    batch = task.held_out(size or task.held_out_size, seed).to(model.embedding.weight.device)
    model.eval()  # a rule that explores while it trains does not do so here
    with torch.random.fork_rng(devices=[]):  # random blocks must not disturb the training
        torch.manual_seed(seed)
        logits, traces = model(batch.tokens, return_traces=True)
    model.train()
    loss, accuracy = loss_and_accuracy(logits, batch.targets)
    result = {"test_loss": round(float(loss), 5), "test_accuracy": round(accuracy, 4)}
    result |= task.score(float(loss))
    if traces and (batch.answer_at >= 0).any():
        result["hit_rate"] = round(hit_rate(traces, batch), 4)
    return result


def hit_rate(traces: list[Trace], batch: Batch) -> float:
    """How often the block that holds the answer is selected, by any group of any layer."""
    block = batch.answer_at // traces[0].config.select_block_size  # (B, T)
    hits = [(t.ids == block[:, None, :, None]).any(-1).any(1) for t in traces]  # (B, T) each
    return float(torch.stack(hits).any(0)[batch.answer_at >= 0].float().mean())
