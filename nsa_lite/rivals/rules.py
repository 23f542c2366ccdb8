"""Who chooses the blocks: NSA's own importance, or another rule in its place.

A rule takes what the layer knows and returns a Choice. The rules here have no weights of their
own; those that do are in selectors.py. All share everything else with NSA, so that a difference
in the result comes from the choice alone.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa_lite.attention import accurate, attention_probabilities, masked_softmax
from nsa_lite.blocks import (
    forced_blocks,
    num_select_blocks,
    query_positions,
    visible_compressed,
)
from nsa_lite.config import NSAConfig
from nsa_lite.selection import choose_blocks


@dataclass(frozen=True)
class Known:
    """All that a rule may use: the layer's sizes, operations and tensors.

    Shapes: x (B, S, C) the layer's input, q (B, H, T, D) the queries at start .. start + T - 1,
    k_short (B, G, N, D) and lse (B, H, T) of the compressed branch, k_raw (B, G, S, D) the
    selected branch's keys.
    """

    config: NSAConfig
    ops: ModuleType
    x: Tensor
    q: Tensor
    k_short: Tensor
    lse: Tensor
    k_raw: Tensor
    start: int
    training: bool = False

    @property
    def blocks(self) -> int:
        """How many selection blocks the tokens up to the last query touch."""
        return num_select_blocks(self.start + self.q.shape[2], self.config.select_block_size)

    def finished(self) -> Tensor:
        """Which blocks lie wholly at or before each query, bool (T, blocks)."""
        size = self.config.select_block_size
        return visible_compressed(query_positions(self.q, self.start), self.blocks, size, size)

    def forced(self) -> Tensor:
        """Which blocks each query selects whatever their score, bool (T, blocks)."""
        c, t = self.config, query_positions(self.q, self.start)
        return forced_blocks(t, self.blocks, c.select_block_size, c.num_initial, c.num_local)

    def candidates(self) -> Tensor:
        """Which blocks a rule chooses from: finished and not forced, bool (T, blocks)."""
        return self.finished() & ~self.forced()

    def best(self, score: Tensor) -> Tensor:
        """The forced blocks and the highest scores: (B, G, T, blocks) -> ids (B, G, T, n)."""
        return choose_blocks(score, start=self.start, **choice_sizes(self.config))

    def chosen(self, ids: Tensor) -> Tensor:
        """The candidates among the chosen blocks: ids (B, G, T, n) -> bool (B, G, T, blocks)."""
        j = torch.arange(self.blocks, device=ids.device)
        return (ids[..., None] == j).any(-2) & self.candidates()


@dataclass(frozen=True)
class Choice:
    """What a rule decides, and what it asks of the training.

    Shapes: ids (B, G, T, n). weight (B, G, T, n) is 1 in value and scales each block's keys: a
    way for the task's gradient into the scores. loss is a scalar that is added to the task's.
    """

    ids: Tensor
    weight: Tensor | None = None
    loss: Tensor | None = None


def by_importance(known: Known) -> Choice:
    """The paper's rule: the compressed branch's softmax scores the blocks (Eq. 8-11)."""
    c = known.config
    return Choice(
        known.ops.select_blocks(
            known.q,
            known.k_short,
            known.lse,
            block_size=c.block_size,
            stride=c.stride,
            start=known.start,
            **choice_sizes(c),
        )
    )


def at_random(known: Known) -> Choice:
    """The forced blocks and random legal ones: the floor that a learned choice must beat."""
    batch, _, length, _ = known.q.shape
    shape = (batch, known.config.kv_heads, length, known.blocks)
    return Choice(known.best(torch.rand(shape, device=known.q.device)))


def by_true_mass(known: Known) -> Choice:
    """The blocks that dense attention over the selection keys weighs most: the ceiling."""
    size = known.config.select_block_size
    return Choice(known.best(block_mass(known.q, known.k_raw, size, known.start)))


def by_bound(known: Known) -> Choice:
    """Quest's page bound on the selected branch's keys, no weights (arXiv 2406.10774)."""
    return Choice(known.best(vote(known, page_bound(known.q, *block_ranges(known)))))


def by_block_mean(known: Known) -> Choice:
    """MoBA's score: the query times the mean of the block's keys (arXiv 2502.13189)."""
    means = whole_blocks(known).mean(-2)  # (B, G, blocks, D)
    q = accurate(known.q).unflatten(1, (means.shape[1], -1))
    return Choice(known.best(vote(known, torch.einsum("bgrtd,bgjd->bgrtj", q, means))))


def nothing(known: Known) -> Choice:
    """No block at all: the selected branch gives exactly 0, which leaves the other two."""
    batch, _, length, _ = known.q.shape
    shape = (batch, known.config.kv_heads, length, 1)
    return Choice(torch.full(shape, -1, device=known.q.device))


@torch.no_grad()
def block_mass(q: Tensor, k: Tensor, select_block_size: int, start: int = 0) -> Tensor:
    """Dense causal attention's probability in each block, summed over the group's heads.

    Shapes: q (B, H, T, D), k (B, G, S, D) -> (B, G, T, blocks).
    """
    causal = torch.arange(k.shape[2], device=k.device) <= query_positions(q, start)[:, None]
    p = attention_probabilities(q, k, causal, None)[0].sum(dim=2)
    p = pad(p, (0, -k.shape[2] % select_block_size))
    return p.unflatten(-1, (-1, select_block_size)).sum(-1)


def whole_blocks(known: Known) -> Tensor:
    """The selected branch's keys in blocks, a ragged tail left out: (B, G, whole, l', D)."""
    size = known.config.select_block_size
    whole = known.k_raw.shape[2] // size
    return accurate(known.k_raw[:, :, : whole * size].detach()).unflatten(2, (whole, size))


def block_ranges(known: Known) -> tuple[Tensor, Tensor]:
    """The lowest and the highest key of each whole block, channel by channel: (B, G, whole, D)."""
    keys = whole_blocks(known)
    return keys.amin(-2), keys.amax(-2)


def page_bound(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Quest's bound u = sum_c max(q_c m_c, q_c M_c), never below the best q.k of the page.

    Shapes: q (B, H, T, D), low and high (B, G, pages, D) -> (B, G, R, T, pages).
    """
    q = accurate(q).unflatten(1, (low.shape[1], -1))
    up, down = q.clamp(min=0), q.clamp(max=0)  # a negative q_c is largest times the lowest key
    return torch.einsum("bgrtd,bgjd->bgrtj", up, high) + torch.einsum(
        "bgrtd,bgjd->bgrtj", down, low
    )


def vote(known: Known, logits: Tensor) -> Tensor:
    """One score a block from the logits of a group's heads: softmax each, then add (Eq. 10).

    Shapes: logits (B, G, R, T, whole) -> (B, G, T, blocks); blocks not finished get 0.
    """
    logits = pad(logits * known.config.head_dim**-0.5, (0, known.blocks - logits.shape[-1]))
    return masked_softmax(logits, known.finished())[0].sum(2)


def choice_sizes(c: NSAConfig) -> dict[str, int]:
    """The sizes that choose_blocks asks for."""
    return dict(
        select_block_size=c.select_block_size,
        num_selected=c.num_selected,
        num_initial=c.num_initial,
        num_local=c.num_local,
    )


# The rules without weights, by name.
PLAIN = {
    "importance": by_importance,
    "random": at_random,
    "oracle": by_true_mass,
    "none": nothing,
    "quest": by_bound,
    "moba": by_block_mean,
}
