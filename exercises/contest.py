"""The contest of set 08: which rule covers most of the attention under a budget of vectors?

    a sequence of 1024 keys, blocks of 32        a query in its second half, 4 heads

    block j:  topic topic FACT topic ...         kind 0 asks for one fact of a block far back
                                                 kind 1 asks for the topic of such a block

A query may read `budget` vectors. What a rule kept of each finished block is read first, to score
the blocks; the rest of the budget goes to whole blocks. The data are made up: they have both kinds
of question, so that no single summary is enough, and say nothing about a trained model.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

LENGTH = 1024  # keys of a sequence
BLOCK = 32  # keys of a block
HEADS = 4
WIDTH = 16
QUESTIONS = 64  # in a sequence
FACTS = 3  # in a block
BUDGETS = (192, 256, 384)
FORCED = 3  # the first block, the one before the query's own, and its own


@dataclass(frozen=True)
class World:
    """One sequence and its questions.

    Shapes: keys (1024, 16), q (64, 4, 16), own (64,) the block of each query, answer (64,) the
    block that its question is about, mass (64, 32) what dense attention gives to each block.
    """

    keys: Tensor
    q: Tensor
    own: Tensor
    answer: Tensor
    mass: Tensor

    @property
    def blocks(self) -> Tensor:
        """The keys block by block, (32, 32, 16)."""
        return self.keys.unflatten(0, (-1, BLOCK))


def world(generator: torch.Generator) -> World:
    """A sequence of topics and facts, and questions about both."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    count = LENGTH // BLOCK
    topic = 0.8 * normal(count, WIDTH)
    keys = topic[:, None] + 0.6 * normal(count, BLOCK, WIDTH)
    place = torch.stack([torch.randperm(BLOCK, generator=generator)[:FACTS] for _ in range(count)])
    keys[torch.arange(count)[:, None], place] = 1.6 * normal(count, FACTS, WIDTH)

    t = torch.randint(LENGTH // 2, LENGTH, (QUESTIONS,), generator=generator)
    own = t // BLOCK
    answer = 1 + (torch.rand(QUESTIONS, generator=generator) * (own - 2)).long()  # not forced
    fact = place[answer, torch.randint(FACTS, (QUESTIONS,), generator=generator)]
    about_topic = (torch.arange(QUESTIONS) % 2 == 1)[:, None]
    target = torch.where(about_topic, 1.8 * topic[answer], keys[answer, fact])
    q = target[:, None] + 0.5 * normal(QUESTIONS, HEADS, WIDTH)
    keys = keys.flatten(0, 1)
    return World(keys, q, own, answer, dense_mass(q, keys, t))


def dense_mass(q: Tensor, keys: Tensor, t: Tensor) -> Tensor:
    """What dense causal attention gives to each block, the mean of the heads: (queries, blocks)."""
    scores = q @ keys.T * WIDTH**-0.5  # (queries, heads, T)
    scores = scores.masked_fill(torch.arange(len(keys)) > t[:, None, None], -torch.inf)
    return scores.softmax(-1).mean(1).unflatten(-1, (-1, BLOCK)).sum(-1)


def worlds(seeds: Iterable[int] = (0, 1)) -> list[World]:
    """The worlds of the leaderboard."""
    return [world(torch.Generator().manual_seed(seed)) for seed in seeds]


# --- a rule: what is kept of a block (32, 16) -> (m, 16), and the scores of the blocks before the
# --- own one, from q (4, 16) and what was kept of them (own, m, 16) -> (own,)


class Random:
    """The floor: keeps nothing, and draws the same scores for the same number of blocks."""

    def keep(self, block):
        return block[:0]

    def score(self, q, kept):
        return torch.rand(len(kept), generator=torch.Generator().manual_seed(len(kept)))


class MostRecent:
    """Keeps nothing; the newest blocks first."""

    def keep(self, block):
        return block[:0]

    def score(self, q, kept):
        return torch.arange(float(len(kept)))


class BlockMeans:
    """Keeps the mean of a block's keys, as MoBA does (arXiv 2502.13189)."""

    def keep(self, block):
        return block.mean(0, keepdim=True)

    def score(self, q, kept):
        return votes(q @ kept[:, 0].T)


class Importance:
    """Keeps two means, of 16 keys each, and sums their probabilities (Eq. 8-10, l = d = 16)."""

    def keep(self, block):
        return block.unflatten(0, (2, -1)).mean(1)

    def score(self, q, kept):
        p = (q @ kept.flatten(0, 1).T * WIDTH**-0.5).softmax(-1)
        return p.sum(0).unflatten(0, (-1, 2)).sum(-1)


class MinAndMax:
    """Keeps the lowest and the highest of each coordinate: Quest's bound (arXiv 2406.10774)."""

    def keep(self, block):
        return torch.stack([block.amin(0), block.amax(0)])

    def score(self, q, kept):
        low = q[:, None] * kept[:, 0]  # (heads, own, 16)
        high = q[:, None] * kept[:, 1]
        return votes(torch.maximum(low, high).sum(-1))


def votes(products: Tensor) -> Tensor:
    """q.k of each head and block to one score a block: scale, softmax, sum of the heads."""
    return (products * WIDTH**-0.5).softmax(-1).sum(0)


RULES = {
    "random": Random,
    "most recent": MostRecent,
    "block means": BlockMeans,
    "compressed importance": Importance,
    "minimum and maximum": MinAndMax,
}


# --- the game ---


def choose(score: Tensor, own: int, kept: int, budget: int) -> list[int]:
    """The forced blocks, then the best-scored ones, as many as the budget leaves room for."""
    ids = {j for j in (0, own - 1, own) if j >= 0}
    room = (budget - kept * own) // BLOCK
    for j in torch.sort(score, descending=True, stable=True).indices.tolist():
        if len(ids) < room:
            ids.add(j)
    return sorted(ids)


def play(rule, sequences: list[World], budgets=BUDGETS) -> dict[int, tuple[float, float]]:
    """For each budget: the share of the attention covered, and of the questions hit, on average.

    rule None is the oracle: scores are the true mass, and reading them costs nothing.
    """
    found = {budget: [] for budget in budgets}
    for w in sequences:
        kept = None if rule is None else torch.stack([rule().keep(b) for b in w.blocks])
        for i, own in enumerate(w.own.tolist()):
            score = w.mass[i, :own] if rule is None else rule().score(w.q[i], kept[:own])
            for budget in budgets:
                ids = choose(score, own, 0 if rule is None else kept.shape[1], budget)
                found[budget].append((float(w.mass[i, ids].sum()), int(w.answer[i]) in ids))
    return {
        budget: tuple(torch.tensor(x, dtype=torch.float64).mean(0).tolist())
        for budget, x in found.items()
    }


def board(rules: dict[str, type]) -> None:
    """Print the leaderboard, the given rules and yours: the largest mean share first."""
    sequences = worlds()
    rows = {"oracle (reads all)": play(None, sequences)}
    unfit = []
    for name, rule in {**RULES, **rules}.items():
        try:
            rows[name] = play(rule, sequences)
        except NotImplementedError:
            unfit.append(f"{name:<22} not attempted")
        except Exception as error:
            unfit.append(f"{name:<22} not valid: {type(error).__name__}")
    heads = "".join(f"{budget:>9} hits" for budget in BUDGETS)
    print(f"{'share at a budget of':<22}{heads}{'mean':>8}")
    for name, row in sorted(rows.items(), key=lambda item: -mean_share(item[1])):
        cells = "".join(f"{share:>9.2f}{hits:>5.0%}" for share, hits in row.values())
        print(f"{name:<22}{cells}{mean_share(row):>8.2f}")
    for line in unfit:
        print(line)


def mean_share(row: dict[int, tuple[float, float]]) -> float:
    """The share of the attention covered, the mean of the budgets."""
    return sum(share for share, _ in row.values()) / len(row)
