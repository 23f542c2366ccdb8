"""Recall at any length: facts at random places of a haystack, and questions at its end.

The alphabet is the same at every length, so a model that learned at one can be asked at another. A
curriculum is data: a tuple of stages, each of which says what to draw, how much, and when to go on.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from nsa_lite.checks import require, require_int
from nsa_lite.config import NSAConfig
from nsa_lite.lab.positions import smallest_rope_base
from nsa_lite.lab.tasks import Batch, Common, Pace, shuffled, with_answers

SHORTEST = 256
LONGEST = 262_144


@dataclass(frozen=True)
class Stage:
    """One stage of a curriculum: what is drawn, how much of it, and when it ends.

    noise: the share of the positions without a fact that hold a noise pair; the others are filler.
    facts_a_block: a number gathers that many facts in each of a few blocks, None leaves them
    wherever they fall. batch: sequences a step, times the run's batch_size. A stage ends once a
    share of `until` of the answers is right, averaged over the last steps, and at the latest when
    its share of the run's steps is over, which is `weight` of all stages' weights. rate: its
    learning rate as a share of the run's; noisy steps, of few sequences, want a smaller one.
    """

    length: int
    noise: float = 1.0
    facts_a_block: int | None = None
    batch: int = 1
    weight: float = 1.0
    until: float = 0.95
    rate: float = 1.0

    def __post_init__(self) -> None:
        for name in ("length", "batch"):
            require_int(name, getattr(self, name), at_least=1)
        inside = SHORTEST <= self.length <= LONGEST
        require(inside, "length", self.length, f"must lie in {SHORTEST} .. {LONGEST}")
        require(0 <= self.noise <= 1, "noise", self.noise, "must lie in 0 .. 1: it is a share")
        require(
            self.until > 0, "until", self.until, "must be positive; above 1 it is never reached"
        )
        for name in ("weight", "rate"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        if self.facts_a_block is not None:
            require_int("facts_a_block", self.facts_a_block, at_least=1)


SIZES = NSAConfig.small(
    dim=128,
    kv_heads=1,
    head_dim=64,
    value_dim=32,
    block_size=4,
    stride=4,
    select_block_size=8,
    num_selected=32,
    window=64,
    rope_theta=smallest_rope_base(LONGEST, head_dim=64, slow_pairs=16),
    phi="mean+mlp",
)
LAPTOP = 16_384  # the preset's longest stage
TOKENS = 8192  # that a step of the preset reads, where a sequence is not longer


def curriculum(length: int, tokens: int = TOKENS, first: int = SHORTEST) -> tuple[Stage, ...]:
    """Stages of first, 2 first, 4 first .. tokens, the last one `length`; the first has no noise.

    Short stages are cheap a step and teach the choice, long ones make it hold among more blocks. A
    step reads about so many tokens, at most those of a thousandth as many sequences; from 512
    tokens a sequence on the learning rate falls as one over the root of the length.
    """
    require_int("first", first, at_least=SHORTEST)
    require_int("length", length, at_least=first)
    require_int("tokens", tokens, at_least=1)
    most = max(1, tokens // 1024)
    doubled = [first << i for i in range(length.bit_length()) if first << i < length]
    shortest, *others = [*doubled, length]
    stages = [Stage(shortest, noise=0.0, batch=most, weight=2.0, until=0.97)]
    for each in others:
        batch = max(1, min(most, tokens // each))
        stages.append(Stage(each, batch=batch, until=0.985, rate=min(1.0, (512 / each) ** 0.5)))
    return tuple(stages)


@dataclass(frozen=True)
class Haystack(Common):
    """Look up values by key among T positions whose noise looks like facts.

    Each position carries two symbols, whose embeddings are summed: a fact is (key, value), a
    question (key, ?), filler (., .), and noise (a key that no fact has, any value). No fact stands
    at the first `before` positions, nor at the `gap` before the questions: where a block and a
    window are no longer than these, the initial block, local ones and windows hold noise only. With
    noise at half of the other positions:

        place      before |             anywhere             |   gap    | questions
        symbol 1   n1  .  |  .  k3  n4  .  n1  .  .  k7  n4  |  .  n9   |  k7  k3
        symbol 2   v5  .  |  .  v7  v2  .  v2  .  .  v1  v8  |  .  v7   |   ?   ?
        target      -  -  |  -   -   -  -   -  -  -   -   -  |  -   -   |  v1  v7

    batch(stage=-1) is of the last stage. The data are made on `device`: a seed gives the same
    numbers on one kind of device, not on two.
    """

    stages: tuple[Stage, ...] = curriculum(LAPTOP)
    keys: int = 48
    values: int = 16
    facts: int = 32
    questions: int = 32
    block: int = 8
    before: int = 8
    gap: int = 64
    span: int = 1
    held_out_size: int = 8
    evaluate_every: int = 100
    device: str = "cpu"
    name: ClassVar[str] = "haystack"
    solved_at: ClassVar[float | None] = 0.98
    preset: ClassVar[dict] = dict(nsa=SIZES, layers=1, steps=1000, batch_size=1, lr=3e-3)

    def __post_init__(self) -> None:
        for name in ("values", "facts", "questions", "block", "span"):
            require_int(name, getattr(self, name), at_least=1)
        for name in ("before", "gap"):
            require_int(name, getattr(self, name), at_least=0)
        require(len(self.stages) > 0, "stages", self.stages, "must hold at least one")
        rule = f"must exceed facts = {self.facts}: noise takes the keys that no fact has"
        require(self.keys > self.facts, "keys", self.keys, rule)
        rule = f"must not exceed facts = {self.facts}: no key is asked twice"
        require(self.questions <= self.facts, "questions", self.questions, rule)
        for stage in self.stages:
            self.require_room(stage)

    def require_room(self, stage: Stage) -> None:
        """Raise a ValueError unless a stage's facts have places."""
        first, end = self.reach(stage)
        together = stage.facts_a_block
        if together is None:
            places = len(self.places_of(first, end))
            rule = f"leaves {places} places for facts = {self.facts} of span = {self.span}"
            require(places >= self.facts, "length", stage.length, rule)
            return
        places = self.block // self.span
        rule = f"must divide facts = {self.facts} and not exceed the {places} places of a block"
        fits = self.facts % together == 0 and together <= places
        require(fits, "facts_a_block", together, rule)
        count = self.facts // together
        whole = self.whole_blocks(stage)
        rule = f"holds {len(whole)} whole blocks for facts, and {count} are needed"
        require(len(whole) >= count, "length", stage.length, rule)

    @property
    def longest(self) -> int:
        """The tokens of its longest stage."""
        return max(stage.length for stage in self.stages)

    def at_length(self, length: int) -> Self:
        """The task with the curriculum that ends at this length."""
        return replace(self, stages=curriculum(length))

    def on(self, device: str) -> Self:
        """The same task, its batches made there."""
        return replace(self, device=device)

    def pace(self, stage: int) -> Pace:
        """As the stage says."""
        weights = [each.weight for each in self.stages]
        by = sum(weights[: stage + 1]) / sum(weights)
        return Pace(self.stages[stage].until, by, self.stages[stage].batch)

    def rate(self, stage: int, done: float) -> float:  # noqa: ARG002  the stage says it all
        """The stage's own."""
        return self.stages[stage].rate

    @property
    def vocab_size(self) -> int:
        """Filler, the question mark, the keys and the values."""
        return 2 + self.keys + self.values

    def reach(self, stage: Stage) -> tuple[int, int]:
        """The first position that may hold a fact, and the one behind the last."""
        return self.before, stage.length - self.questions - self.gap

    def places_of(self, first: int, end: int) -> range:
        """The multiples of a span at which a fact may begin that lies inside first .. end - 1."""
        return range(-(-first // self.span), end // self.span)

    def whole_blocks(self, stage: Stage) -> range:
        """The blocks that lie wholly where facts may be."""
        first, end = self.reach(stage)
        return range(-(-first // self.block), end // self.block)

    def batch(self, size: int, seed: int, stage: int = -1) -> Batch:
        """A batch of sequences, of the last stage unless told otherwise."""
        return self.draw(self.stages[stage], size, seed)

    def draw(self, stage: Stage, size: int, seed: int) -> Batch:
        """A batch of any stage, also of one that the curriculum does not hold."""
        self.require_room(stage)
        rng = torch.Generator(self.device).manual_seed(seed)
        key = 2 + shuffled(size, self.keys, rng)
        value = self.some_values((size, self.facts), rng)
        tokens = self.noise(key[:, self.facts :], stage, rng)
        at = self.places(stage, size, rng)
        row = torch.arange(size, device=rng.device)[:, None]
        fact = torch.stack([key[:, : self.facts], value], dim=-1)
        for i in range(self.span):
            tokens[row, at + i] = fact
        asked = some_of(self.facts, self.questions, size, rng)
        tokens[:, -self.questions :, 0] = key.gather(1, asked)
        tokens[:, -self.questions :, 1] = 1
        return with_answers(tokens, value.gather(1, asked), at.gather(1, asked))

    def some_values(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Random values, as tokens."""
        drawn = torch.randint(self.values, shape, generator=rng, device=rng.device)
        return 2 + self.keys + drawn

    def noise(self, keys: Tensor, stage: Stage, rng: torch.Generator) -> Tensor:
        """(B, T, 2): at a share of the positions one of these keys with a value, else filler."""
        shape = (len(keys), stage.length)
        which = torch.randint(keys.shape[1], shape, generator=rng, device=rng.device)
        pairs = torch.stack([keys.gather(1, which), self.some_values(shape, rng)], dim=-1)
        if stage.noise == 1:
            return pairs
        kept = torch.rand(shape, generator=rng, device=rng.device) < stage.noise
        return pairs * kept[..., None]

    def places(self, stage: Stage, size: int, rng: torch.Generator) -> Tensor:
        """(B, facts): where the facts begin, no place twice."""
        if stage.facts_a_block is None:
            among = self.places_of(*self.reach(stage))
            return self.span * (among.start + some_of(len(among), self.facts, size, rng))
        whole = self.whole_blocks(stage)
        count = self.facts // stage.facts_a_block
        blocks = whole.start + some_of(len(whole), count, size, rng)
        inside = self.span * some_of(
            self.block // self.span, stage.facts_a_block, size * count, rng
        )
        return (blocks[..., None] * self.block + inside.view(size, count, -1)).flatten(1)


def some_of(among: int, count: int, rows: int, rng: torch.Generator) -> Tensor:
    """Each row `count` different numbers below `among`, in random order."""
    drawn = torch.rand(rows, among, generator=rng, device=rng.device)
    return drawn.topk(count).indices  # the order of random numbers is itself random
