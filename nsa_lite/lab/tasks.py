"""Toy long-context tasks that can fail: the answer is far away, and controls cannot reach it.

Every batch comes from a seed alone, so a run can be resumed or repeated bit for bit.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor

from nsa_lite.checks import require, require_int
from nsa_lite.config import NSAConfig

IGNORE = -100  # a target that the loss skips
NEXT_STAGE_AT = 0.7  # accuracy, averaged over the last steps, at which the curriculum goes on
STAGE_SHARE = 0.25  # of the steps: no stage but the last lasts longer, learned or not
TINY = NSAConfig.small(
    kv_heads=1, head_dim=32, value_dim=32, block_size=4, stride=2, num_selected=6
)


@dataclass(frozen=True)
class Batch:
    """Shapes: tokens (B, T) or (B, T, 2) int64, targets (B, T), answer_at (B, T).

    A target is the token to predict there, or IGNORE. answer_at is the position that holds the
    answer, -1 where nothing is asked or no one position does.
    """

    tokens: Tensor
    targets: Tensor
    answer_at: Tensor

    def to(self, device: str | torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(*(x.to(device) for x in (self.tokens, self.targets, self.answer_at)))

    def split(self, size: int) -> list["Batch"]:
        """The batch in pieces of at most `size` sequences."""
        pieces = (x.split(size) for x in (self.tokens, self.targets, self.answer_at))
        return [Batch(*piece) for piece in zip(*pieces, strict=True)]


class Pace(NamedTuple):
    """How a run goes through one stage of a curriculum.

    The stage ends, if another follows, at an accuracy of `until` averaged over the last steps, or
    once a share `by` of the run's steps is done. A step takes `batch` times the run's batch_size.
    """

    until: float
    by: float
    batch: int = 1


class Task(Protocol):
    """What a model can be trained on; everything that differs from task to task is asked here.

    stages: the curriculum, one entry a stage; batch(stage=-1) is of the last. preset: the fields
    of a TrainConfig that a laptop finishes in minutes. evaluate_every: the steps between two
    held-out results. solved_at: the held-out accuracy at which a run may stop, None for never.
    """

    name: ClassVar[str]
    preset: ClassVar[dict[str, Any]]
    solved_at: ClassVar[float | None]

    @property
    def held_out_size(self) -> int: ...

    @property
    def evaluate_every(self) -> int: ...

    @property
    def stages(self) -> tuple[Any, ...]: ...

    @property
    def longest(self) -> int:
        """How many tokens its longest sequence has."""
        ...

    @property
    def vocab_size(self) -> int: ...

    def at_length(self, length: int) -> "Task":
        """The same task with sequences of another length. Errors: ValueError if it has but one."""
        ...

    def on(self, device: str) -> "Task":
        """The same task, its batches made on that device if it can make them there."""
        ...

    def pace(self, stage: int) -> Pace:
        """When a stage ends, and how much a step of it takes."""
        ...

    def rate(self, stage: int, done: float) -> float:
        """The learning rate as a share of the run's, in a stage, after a share of the steps."""
        ...

    def batch(self, size: int, seed: int, stage: int = -1) -> Batch:
        """Training sequences, drawn from the seed."""
        ...

    def held_out(self, size: int, seed: int = 0) -> Batch:
        """Sequences that no training sees: evaluation takes seeds below 1000."""
        ...

    def score(self, loss: float) -> dict[str, float]:
        """What a held-out loss (nats a target) means in the task's own unit, if it has one."""
        ...

    def guess(self) -> float:
        """The loss of one who knows which answers there are, and nothing else (nats a target)."""
        ...

    def baseline(self) -> str:
        """One line to hold a result beside; empty if there is none."""
        ...


class Common:
    """What most tasks share: they are drawn anew from each seed, and can be solved."""

    name: ClassVar[str]
    values: int  # of which every answer is one
    held_out_size: int = 64
    evaluate_every: int = 50
    solved_at: ClassVar[float | None] = 0.995

    def at_length(self, length: int) -> Self:
        """The task with its length changed, if that is one of its fields."""
        has_one = "length" in [field.name for field in fields(cast(Any, self))]
        require(has_one, "length", length, f"{self.name} has one length only")
        return replace(cast(Any, self), length=length)

    def on(self, device: str) -> Self:  # noqa: ARG002  small batches are made on the CPU
        """The task as it is."""
        return self

    def pace(self, stage: int) -> Pace:
        """All stages alike."""
        return Pace(until=NEXT_STAGE_AT, by=STAGE_SHARE * (stage + 1))

    def rate(self, stage: int, done: float) -> float:  # noqa: ARG002  the stages do not matter
        """Half a cosine, down to a twentieth."""
        return 0.05 + 0.475 * (1 + math.cos(math.pi * done))

    def batch(self, size: int, seed: int, stage: int = -1) -> Batch:
        raise NotImplementedError

    def held_out(self, size: int, seed: int = 0) -> Batch:
        """As in training, whose seeds (training.batch_seed) are 1000 and more."""
        return self.batch(size, seed)

    def score(self, loss: float) -> dict[str, float]:  # noqa: ARG002  accuracy says it all
        """Nothing beside loss and accuracy."""
        return {}

    def guess(self) -> float:
        """All values are equally likely."""
        return math.log(self.values)

    def baseline(self) -> str:
        """The controls of notebook 16 are trained, not counted."""
        return ""


@dataclass(frozen=True)
class Recall(Common):
    """Look up values by key, outside the window, among more facts than a summary holds easily.

    Each position carries two symbols, whose embeddings are summed: a fact is (key, value), a
    question (key, ?), filler (., .). Blocks of facts follow a first block of filler; a gap as
    long as the window keeps them out of every question's local reach. With two facts a block:

        block      0        |    1     |    2     |   gap    |  questions
        symbol 1   .  .  .  |  k3  k9  |  k1  k5  |  .  .  . |  k9  k1
        symbol 2   .  .  .  |  v7  v2  |  v4  v2  |  .  .  . |   ?   ?
        target     -  -  -  |   -   -  |   -   -  |  -  -  - |  v2  v4

    stages: the facts in each block while the curriculum lasts, and at the end. A block starts
    nearly empty: what stands in it can then be read from its compressed tokens.
    """

    keys: int = 64
    values: int = 64
    questions: int = 16
    blocks: int = 8
    block: int = 8
    gap: int = 16
    stages: tuple[int, ...] = (2, 4, 8)
    name: ClassVar[str] = "recall"
    preset: ClassVar[dict] = dict(
        # Values of 14 numbers: with fewer NSA learns less, with more a summary holds four facts.
        nsa=replace(TINY, value_dim=14, phi="mean+mlp"),
        layers=1,
        steps=1500,
        batch_size=32,
        lr=4e-3,
    )

    def __post_init__(self) -> None:
        require(
            max(self.stages) <= self.block,
            "stages",
            self.stages,
            f"no block holds more facts than block = {self.block}",
        )
        facts = [self.blocks * count for count in self.stages]
        require(
            max(facts) <= self.keys,
            "keys",
            self.keys,
            f"must be at least {max(facts)}: no key repeats",
        )
        require(
            min(facts) >= self.questions,
            "questions",
            self.questions,
            f"must not exceed {min(facts)}, the facts of the first stage",
        )

    @property
    def longest(self) -> int:
        """The tokens of every sequence."""
        return (1 + self.blocks) * self.block + self.gap + self.questions

    @property
    def vocab_size(self) -> int:
        """Filler, the question mark, the keys and the values."""
        return 2 + self.keys + self.values

    def batch(self, size: int, seed: int, stage: int = -1) -> Batch:
        """A batch of sequences, of the last stage unless told otherwise."""
        rng = torch.Generator().manual_seed(seed)
        count = self.blocks * self.stages[stage]
        tokens = torch.zeros(size, self.longest, 2, dtype=torch.int64)
        key = 2 + shuffled(size, self.keys, rng)[:, :count]
        value = 2 + self.keys + torch.randint(self.values, (size, count), generator=rng)
        places = shuffled(size * self.blocks, self.block, rng)[:, : self.stages[stage]]
        places = places.sort(-1).values.view(size, self.blocks, -1)
        block_start = (1 + torch.arange(self.blocks)) * self.block
        at = (places + block_start[:, None]).flatten(1)
        row = torch.arange(size)[:, None]
        tokens[row, at] = torch.stack([key, value], dim=-1)
        asked = shuffled(size, count, rng)[:, : self.questions]
        tokens[:, -self.questions :, 0] = key.gather(1, asked)
        tokens[:, -self.questions :, 1] = 1
        return with_answers(tokens, value.gather(1, asked), at.gather(1, asked))


@dataclass(frozen=True)
class Needle(Common):
    """One fact at any depth in a haystack of noise; the last position asks for it.

    symbol 1   .  .  .  n  .  .  .  .  .  .  n
    symbol 2   a  f  b  v  e  a  c  f  d  b  ?
    target     -  -  -  -  -  -  -  -  -  -  v
    """

    length: int = 128
    values: int = 16
    noise: int = 16
    stages: tuple[int, ...] = (1,)
    name: ClassVar[str] = "needle"
    preset: ClassVar[dict] = dict(nsa=TINY, layers=1, steps=600, batch_size=32, lr=4e-3)

    def __post_init__(self) -> None:
        require_int("length", self.length, at_least=2)

    @property
    def longest(self) -> int:
        """The tokens of every sequence."""
        return self.length

    @property
    def vocab_size(self) -> int:
        """Filler, the question mark, the needle's sign, the values and the noise."""
        return 3 + self.values + self.noise

    def batch(self, size: int, seed: int, stage: int = -1) -> Batch:  # noqa: ARG002  one stage
        """A batch of haystacks, the needle's depth drawn evenly."""
        rng = torch.Generator().manual_seed(seed)
        noise = torch.randint(self.noise, (size, self.length), generator=rng)
        tokens = torch.stack([torch.zeros_like(noise), 3 + self.values + noise], dim=-1)
        at = torch.randint(self.length - 1, (size, 1), generator=rng)
        value = 3 + torch.randint(self.values, (size, 1), generator=rng)
        tokens[torch.arange(size)[:, None], at] = torch.stack(
            [torch.full_like(value, 2), value], dim=-1
        )
        tokens[:, -1] = torch.tensor([2, 1])
        return with_answers(tokens, value, at)


@dataclass(frozen=True)
class Copy(Common):
    """Repeat a random string after a stretch of filler: every next token of the second copy.

    tokens     c  a  d  b  .  .  .  .  ?  c  a  d
    target     -  -  -  -  -  -  -  -  c  a  d  b
    """

    string: int = 24
    gap: int = 48
    values: int = 16
    stages: tuple[int, ...] = (1,)
    name: ClassVar[str] = "copy"
    preset: ClassVar[dict] = dict(nsa=TINY, layers=2, steps=1200, batch_size=32, lr=2e-3)

    @property
    def longest(self) -> int:
        """The tokens of every sequence."""
        return 2 * self.string + self.gap

    @property
    def vocab_size(self) -> int:
        """Filler, the sign to begin, and the symbols."""
        return 2 + self.values

    def batch(self, size: int, seed: int, stage: int = -1) -> Batch:  # noqa: ARG002  one stage
        """A batch of strings to copy; answer_at is where the next symbol stood at first."""
        rng = torch.Generator().manual_seed(seed)
        text = 2 + torch.randint(self.values, (size, self.string), generator=rng)
        gap = torch.zeros(size, self.gap, dtype=torch.int64)
        begin = torch.ones(size, 1, dtype=torch.int64)
        tokens = torch.cat([text, gap, begin, text[:, :-1]], dim=1)
        return with_answers(tokens, text, torch.arange(self.string).expand(size, -1))


def shuffled(rows: int, count: int, rng: torch.Generator) -> Tensor:
    """Each row a permutation of 0 .. count - 1."""
    return torch.rand(rows, count, generator=rng, device=rng.device).argsort(-1)


def with_answers(tokens: Tensor, answers: Tensor, answer_at: Tensor) -> Batch:
    """The last positions ask for these answers (B, questions); nothing is asked before them."""
    before = tokens.shape[1] - answers.shape[1]
    nothing = answers.new_full((len(tokens), before), -1)
    targets = torch.cat([torch.full_like(nothing, IGNORE), answers], dim=1)
    return Batch(tokens, targets, torch.cat([nothing, answer_at], dim=1))
