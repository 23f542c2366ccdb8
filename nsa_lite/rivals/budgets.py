"""Trained models read by the neighbours at a budget: how each reads, and what it reads and keeps.

Costs are in tokens of one group: a token is one key and one value, D + Dv numbers. What a method
reads or keeps beside whole tokens (page bounds, sampled scores) is counted in the same unit.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from nsa_lite import cost
from nsa_lite.attention import dense_attention
from nsa_lite.blocks import query_positions
from nsa_lite.cache import Cache
from nsa_lite.checks import require, require_instance, require_int
from nsa_lite.config import NSAConfig
from nsa_lite.dense import DenseAttention
from nsa_lite.layer import (
    NSAttention,
    join_heads,
    newest,
    require_input,
    require_last,
    split_heads,
    with_extras,
)
from nsa_lite.model import DecoderLM, ModelConfig
from nsa_lite.rivals import neighbours
from nsa_lite.rivals.attentions import Line
from nsa_lite.rope import rotate

COSTS = ("read_by_head", "read_by_group", "kept")  # in tokens of one group
Settings = dict[str, int] | dict[str, float]


class Neighbour(NamedTuple):
    """A system that reads a trained dense model.

    attend(q, k, v, theta, **settings), q and k not yet rotated, gives out (B, H, T, Dv) and read,
    bool (B, H, T, T). at_budget(tokens, page) are the settings that let a query read at most so
    many tokens. looked_at(config, t, settings) counts the numbers that query t reads before it
    chooses, kept(config, length, settings) the tokens that one group's cache holds.
    """

    name: str
    attend: Callable[..., tuple[Tensor, Tensor]]
    line: Line
    at_budget: Callable[[int, int], Settings] | None = None
    looked_at: Callable[[NSAConfig, int, Settings], int] = lambda config, t, settings: 0  # noqa: ARG005
    kept: Callable[[NSAConfig, int, Settings], float] = lambda config, length, settings: length  # noqa: ARG005


def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Dense attention, which FlashAttention-2 computes too (2307.08691): the whole past is read."""
    past = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    return dense_attention(q, k, v), past.expand(*q.shape[:3], -1)


def rotated(method: Callable) -> Callable:
    """A method of rotated queries and keys, for those that are not yet."""

    def attend(q: Tensor, k: Tensor, v: Tensor, theta: float, **settings) -> tuple[Tensor, Tensor]:
        t = query_positions(q)
        return method(rotate(q, t, theta), rotate(k, t, theta), v, **settings)

    return attend


def streaming_llm(q: Tensor, k: Tensor, v: Tensor, theta: float, **settings):
    """StreamingLLM rotates by the place in the cache."""
    return neighbours.streaming_llm(q, k, v, theta=theta, **settings)


def quest_bounds(config: NSAConfig, t: int, settings: Settings) -> int:
    """Two bounds of every page that is full."""
    return int(2 * config.head_dim * (t // settings["page"]))


def sampled_scores(config: NSAConfig, t: int, settings: Settings) -> int:
    """A sampled query scores every key of its past first."""
    sampled = (t + 1) % settings["every"] == 0
    return config.head_dim * (t + 1) * sampled


def kept_by_h2o(config: NSAConfig, length: int, settings: Settings) -> float:
    """A token, and one running sum for it."""
    tokens = min(length, settings["recent"] + settings["heavy"])
    return tokens * (1 + 1 / (config.head_dim + config.value_dim))


def kept_by_quest(config: NSAConfig, length: int, settings: Settings) -> float:
    """Every token, and two bounds a page."""
    pages = -(-length // settings["page"])
    return length + 2 * config.head_dim * pages / (config.head_dim + config.value_dim)


# Four sinks, half of H2O's cache recent (as in the papers), whole pages. SampleAttention has no
# budget: it reads what its share asks for.
NEIGHBOURS = {
    neighbour.name: neighbour
    for neighbour in (
        Neighbour(
            "dense",
            rotated(dense),
            Line("#000000", "--", "s"),
            at_budget=lambda tokens, page: {},  # noqa: ARG005
        ),
        Neighbour(
            "StreamingLLM",
            streaming_llm,
            Line("#009E73", ":", "^"),
            at_budget=lambda tokens, page: dict(sinks=4, window=tokens - 4),  # noqa: ARG005
            kept=lambda config, length, s: min(length, s["sinks"] + s["window"]),  # noqa: ARG005
        ),
        Neighbour(
            "H2O",
            rotated(neighbours.h2o),
            Line("#D55E00", "-.", "v"),
            at_budget=lambda tokens, page: dict(recent=tokens // 2, heavy=tokens - tokens // 2),  # noqa: ARG005
            kept=kept_by_h2o,
        ),
        Neighbour(
            "Quest",
            rotated(neighbours.quest),
            Line("#E69F00", "-", "D"),
            at_budget=lambda tokens, page: dict(page=page, pages=tokens // page),
            looked_at=quest_bounds,
            kept=kept_by_quest,
        ),
        Neighbour(
            "SampleAttention",
            rotated(neighbours.sample_attention),
            Line("#CC79A7", (0, (3, 1, 1, 1)), "P"),
            looked_at=sampled_scores,
        ),
    )
}
# The models that were trained with NSA stand beside them in a comparison.
TRAINED = {"nsa": Line("#0072B2", "-", "o"), "nsa-thin": Line("#56B4E9", "-", "o")}


class NeighbourAttention(DenseAttention):
    """A dense layer that reads as a neighbour does; with return_trace also what each query read.

    The trace is bool (B, H, T, T). Errors: ValueError when a cache is given.
    """

    def __init__(self, config: NSAConfig, neighbour: Neighbour, settings: Settings) -> None:
        super().__init__(config)
        self.neighbour = neighbour
        self.settings = settings

    def forward(
        self,
        x: Tensor,
        cache: Cache | None = None,
        *,
        last: int | None = None,
        return_loss: bool = False,
        return_trace: bool = False,
    ) -> Tensor | tuple:
        require_input(x, self.config.dim, self.query)
        require_last(x, last)
        require(cache is None, "cache", type(cache).__name__, "must be None: whole sequences only")
        c = self.config
        q = split_heads(self.query(x), c.heads)
        k = split_heads(self.key(x), c.kv_heads)
        v = split_heads(self.value(x), c.kv_heads)
        out, read = self.neighbour.attend(q, k, v, c.rope_theta, **self.settings)
        y = newest(self.output(join_heads(out)), last)
        return with_extras(y, None, read, return_loss, return_trace)


def reading(model: DecoderLM, name: str, **settings: float) -> DecoderLM:
    """A dense model's weights in a model whose layers read as a neighbour does.

    Errors: ValueError for a name that is not one of NEIGHBOURS, TypeError for another model.
    """
    require_layers(model, DenseAttention)
    attention = partial(NeighbourAttention, neighbour=neighbour_named(name), settings=settings)
    return same_weights(model, model.config, attention)


def with_blocks(model: DecoderLM, num_selected: int) -> DecoderLM:
    """A trained NSA model that selects another number n of blocks: no weight depends on it.

    Errors: ValueError or TypeError that names the argument.
    """
    require_layers(model, NSAttention)
    nsa = replace(model.config.nsa, num_selected=num_selected)
    return same_weights(model, replace(model.config, nsa=nsa))


def require_layers(model: object, kind: type[nn.Module]) -> None:
    """Raise unless this is a DecoderLM whose attentions are all of this kind."""
    require_instance("model", model, DecoderLM, "a DecoderLM")
    for layer in cast(DecoderLM, model).attentions:
        require_instance("model.attentions", layer, kind, f"of the kind {kind.__name__}")


def same_weights(model: DecoderLM, config: ModelConfig, *attention: Callable) -> DecoderLM:
    """A model of another config or attention that holds the weights of `model`."""
    with torch.random.fork_rng(devices=[]):  # the weights it is born with do not matter
        other = DecoderLM(config, *attention)
    other.load_state_dict(model.state_dict())
    return other.to(model.embedding.weight).train(model.training)


def neighbour_named(name: str) -> Neighbour:
    """One of NEIGHBOURS. Errors: ValueError for another name."""
    require(name in NEIGHBOURS, "name", repr(name), f"must be one of {list(NEIGHBOURS)}")
    return NEIGHBOURS[name]


def at_budget(name: str, budget: int, page: int) -> Settings:
    """The settings that let a query of a neighbour read at most `budget` tokens.

    Errors: ValueError for a neighbour without a budget, or for one too small; TypeError for no int.
    """
    require_int("budget", budget, at_least=1)
    require_int("page", page, at_least=1)
    settings = neighbour_named(name).at_budget
    if settings is None:
        named = [n.name for n in NEIGHBOURS.values() if n.at_budget]
        raise ValueError(f"name = {name!r}: has no budget; must be one of {named}")
    found = settings(budget, page)
    enough = min(found.values(), default=1) >= 1
    rule = "is too small for {}, whose settings would be {}"
    require(enough, "budget", budget, rule, name, found)
    return found


def read_by_head(read: Bool[Tensor, "B H T T"], positions: Int[Tensor, " P"]) -> float:
    """Keys that one head reads at the queries `positions`, in the mean."""
    return float(read[:, :, positions].sum(-1).double().mean())


def read_by_group(
    read: Bool[Tensor, "B H T T"],
    positions: Int[Tensor, " P"],
    config: NSAConfig,
    neighbour: Neighbour,
    settings: Settings,
) -> float:
    """Tokens loaded from one group's cache at the queries `positions`, in the mean.

    A token that any of the group's heads reads is loaded once; what a method looks at before it
    chooses is loaded on top.
    """
    union = read.unflatten(1, (config.kv_heads, -1)).any(dim=2)[:, :, positions]
    numbers = [neighbour.looked_at(config, t, settings) for t in positions.tolist()]
    extra = sum(numbers) / len(numbers) / (config.head_dim + config.value_dim)
    return float(union.sum(-1).double().mean()) + extra


def kept_by_nsa(config: NSAConfig, length: int) -> float:
    """Tokens that one group's cache of NSA holds after `length` tokens."""
    numbers = cost.cache_bytes(config, length, bytes_per_number=1) / config.kv_heads
    return numbers / (config.head_dim + config.value_dim)


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
        score = {"score": sum(scores) / len(scores), "low": min(scores), "high": max(scores)}
        point = {"settings": seeds[0]["settings"], **costs, **score}
        table.setdefault(method, []).append(point)
    return table


def nearest(table: dict[str, list[dict]], cost: str, tokens: float) -> dict[str, tuple]:
    """For each method the point whose cost is nearest to `tokens`: (its cost, its score)."""
    best = {m: min(points, key=lambda p: abs(p[cost] - tokens)) for m, points in table.items()}
    return {m: (round(p[cost]), round(p["score"], 2)) for m, p in best.items()}
