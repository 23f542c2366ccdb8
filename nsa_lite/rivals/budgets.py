"""Trained models read by the neighbours at a budget: what they score, what they read and keep.

Costs are in tokens of one group: a token is one key and one value, D + Dv numbers. What a method
reads or keeps beside whole tokens (page bounds, sampled scores) is counted in the same unit.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_lite import cost
from nsa_lite.attention import dense_attention
from nsa_lite.checks import require
from nsa_lite.config import NSAConfig
from nsa_lite.lab import train
from nsa_lite.lab.checkpoint import load, weights
from nsa_lite.lab.tasks import Batch
from nsa_lite.model import DecoderLM
from nsa_lite.rivals import neighbours
from nsa_lite.rope import rotate


def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Dense attention, which FlashAttention-2 computes too (2307.08691): the whole past is read."""
    past = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    return dense_attention(q, k, v), past.expand(*q.shape[:3], -1)


METHODS = {
    "dense": dense,
    "StreamingLLM": neighbours.streaming_llm,
    "H2O": neighbours.h2o,
    "Quest": neighbours.quest,
    "SampleAttention": neighbours.sample_attention,
}
COSTS = ("read_by_head", "read_by_group", "kept")  # in tokens of one group


def trained(config: train.TrainConfig, folder: Path) -> DecoderLM:
    """The model of a run that nsa_lite.lab.train left in `folder`."""
    model = train.build(config)
    model.load_state_dict(weights(load(folder / "checkpoint.safetensors")[0]))
    return model.eval()


@contextmanager
def reading(model: DecoderLM, method: str, **settings) -> Iterator[list[Tensor]]:
    """Inside, every dense layer of `model` reads by a method of METHODS; weights are untouched.

    Yields a list that each pass extends by what its layers read, bool (B, H, T, T) a layer.
    """
    require(method in METHODS, "method", repr(method), f"must be one of {list(METHODS)}")
    read: list[Tensor] = []

    def instead(q: Tensor, k: Tensor, v: Tensor, theta: float) -> Tensor:
        if method == "StreamingLLM":  # it rotates by the place in the cache
            out, mask = METHODS[method](q, k, v, theta=theta, **settings)
        else:
            t = torch.arange(q.shape[2], device=q.device)
            q, k = rotate(q, t, theta), rotate(k, t, theta)
            out, mask = METHODS[method](q, k, v, **settings)
        read.append(mask)
        return out

    layers = [block.attention for block in model.blocks]
    try:
        for layer in layers:
            layer.instead = instead
        yield read
    finally:
        for layer in layers:
            layer.instead = None


def at_budget(method: str, budget: int, page: int) -> dict[str, int]:
    """The settings that let a query of StreamingLLM, H2O or Quest read at most `budget` tokens.

    Four sinks, half of H2O's cache recent (as in the papers), whole pages. SampleAttention has no
    such number: it reads what its share asks for.
    """
    rules = {
        "dense": {},
        "StreamingLLM": dict(sinks=4, window=budget - 4),
        "H2O": dict(recent=budget // 2, heavy=budget - budget // 2),
        "Quest": dict(page=page, pages=budget // page),
    }
    require(method in rules, "method", repr(method), f"must be one of {list(rules)}")
    return rules[method]


def read_by_head(read: Tensor, positions: Tensor) -> float:
    """Keys that one head reads at the queries `positions`, in the mean; read (B, H, T, T)."""
    return float(read[:, :, positions].sum(-1).double().mean())


def read_by_group(
    read: Tensor, positions: Tensor, c: NSAConfig, method: str, settings: dict
) -> float:
    """Tokens loaded from one group's cache at the queries `positions`, in the mean.

    A token that any of the group's heads reads is loaded once; the summaries that a method looks
    at before it chooses are loaded on top.
    """
    union = read.unflatten(1, (c.kv_heads, -1)).any(dim=2)[:, :, positions]
    numbers = [0] * len(positions)
    if method == "Quest":  # two bounds a page that is full
        numbers = [2 * c.head_dim * (t // settings["page"]) for t in positions.tolist()]
    elif method == "SampleAttention":  # a sampled query scores every key of its past first
        sampled = [(t + 1) % settings["every"] == 0 for t in positions.tolist()]
        numbers = [
            c.head_dim * (t + 1) * s for t, s in zip(positions.tolist(), sampled, strict=True)
        ]
    extra = sum(numbers) / len(numbers) / (c.head_dim + c.value_dim)
    return float(union.sum(-1).double().mean()) + extra


def kept(c: NSAConfig, length: int, method: str, settings: dict) -> float:
    """Tokens that one group's cache holds after `length` tokens."""
    per_token = c.head_dim + c.value_dim
    if method == "StreamingLLM":
        return min(length, settings["sinks"] + settings["window"])
    if method == "H2O":  # and one running sum for each of them
        return min(length, settings["recent"] + settings["heavy"]) * (1 + 1 / per_token)
    if method == "Quest":  # and two bounds a page
        return length + 2 * c.head_dim * -(-length // settings["page"]) / per_token
    if method == "nsa":
        return cost.cache_bytes(c, length, bytes_per_number=1) / c.kv_heads / per_token
    return length


def with_blocks(model: DecoderLM, num_selected: int) -> None:
    """Let a trained NSA model select another number n of blocks: no weight depends on it."""
    for block in model.blocks:
        block.attention.config = replace(block.attention.config, num_selected=num_selected)


def counted_positions(batch: Batch) -> Tensor:
    """The queries that are scored: the questions, or the second half of a text.

    A text asks at every position, but only late ones have a past that is longer than a budget.
    """
    asked = batch.answer_at[0] >= 0
    length = len(asked)
    return asked.nonzero().flatten() if asked.any() else torch.arange(length // 2, length)


@torch.no_grad()
def measure(model: DecoderLM, batch: Batch, method: str, settings: dict) -> dict:
    """What a model scores on `batch` when it reads by `method`, and what that costs.

    A dense model takes any of METHODS, with its settings; one trained with NSA takes "nsa", and
    its settings, the n it runs with, are only noted.
    """
    at, c = counted_positions(batch), model.blocks[0].attention.config
    if method == "nsa":
        logits, read = model(batch.tokens), []
        tokens = sum(sum(cost.tokens_read(c, t).values()) for t in at.tolist()) / len(at)
        by_head = by_group = tokens  # a group's heads share their blocks
    else:
        with reading(model, method, **settings) as read:
            logits = model(batch.tokens)
        by_head = sum(read_by_head(r, at) for r in read) / len(read)
        by_group = sum(read_by_group(r, at, c, method, settings) for r in read) / len(read)
    costs = {
        "read_by_head": by_head,
        "read_by_group": by_group,
        "kept": kept(c, batch.tokens.shape[1], method, settings),
    }
    costs = {name: round(float(tokens), 3) for name, tokens in costs.items()}
    is_text = bool((batch.answer_at < 0).all())
    score = bits_per_byte(logits, batch, at) if is_text else answers(logits, batch, at, read)
    return {"settings": settings, **costs, **score}


def bits_per_byte(logits: Tensor, batch: Batch, at: Tensor) -> dict:
    """The loss at the positions `at`, in bits, and how many bytes that is."""
    targets = batch.targets[:, at].flatten()
    loss = F.cross_entropy(logits[:, at].flatten(0, 1).double(), targets)
    return {"bits_per_byte": round(float(loss) / math.log(2), 4), "bytes": len(targets)}


def answers(logits: Tensor, batch: Batch, at: Tensor, read: list[Tensor]) -> dict:
    """How many questions are asked and answered right, in all and by the answer's block of 8.

    With `read` of a model of one layer: of how many the answer was read, by any head, and how
    many of those are right.
    """
    right = logits[:, at].argmax(-1) == batch.targets[:, at]
    answer_at = batch.answer_at[:, at]
    block = answer_at.flatten() // 8
    result = {
        "asked": right.numel(),
        "right": int(right.sum()),
        "asked_by_block": block.bincount().tolist(),
        "right_by_block": block.bincount(right.flatten()).int().tolist(),
    }
    if len(read) == 1:
        seen = read[0].any(dim=1)[:, at].gather(-1, answer_at[..., None])[..., 0]
        result |= {"answer_read": int(seen.sum()), "right_of_read": int(right[seen].sum())}
    return result


def sweep_table(recorded: dict, task: str) -> dict[str, list[dict]]:
    """A recorded sweep by method: one point a setting, costs and score as means over the seeds.

    A point holds settings, read_by_head, read_by_group, kept, and the score (accuracy, or bits
    per byte) with its lowest and highest seed as low and high.
    """
    rows: dict[tuple[str, str], list[dict]] = {}
    for name, run in recorded["runs"].items():
        for r in run["results"] if name.startswith(f"{task}-sweep") else []:
            rows.setdefault((r["method"], str(r["settings"])), []).append(r)
    table: dict[str, list[dict]] = {}
    for (method, _), seeds in rows.items():
        scores = [r["right"] / r["asked"] if "right" in r else r["bits_per_byte"] for r in seeds]
        costs = {key: sum(r[key] for r in seeds) / len(seeds) for key in COSTS}
        table.setdefault(method, []).append(
            {
                "settings": seeds[0]["settings"],
                **costs,
                "score": sum(scores) / len(scores),
                "low": min(scores),
                "high": max(scores),
            }
        )
    return table


def nearest(table: dict[str, list[dict]], cost: str, tokens: float) -> dict[str, tuple]:
    """For each method the point whose cost is nearest to `tokens`: (its cost, its score)."""
    best = {m: min(points, key=lambda p: abs(p[cost] - tokens)) for m, points in table.items()}
    return {m: (round(p[cost]), round(p["score"], 2)) for m, p in best.items()}
