"""Rules without weights that choose blocks in place of the paper's Eq. 8-11.

A rule takes what the layer knows (Known) and returns a Choice: NSAttention(config,
choose=at_random) asks it. The rules with weights of their own are in taught.py. All share
everything else with NSA, so that a difference in the result comes from the choice alone.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from nsa_lite.attention import (
    accurate,
    attention_probabilities,
    in_full_precision,
    masked_softmax,
    seen,
)
from nsa_lite.blocks import (
    forced_blocks,
    num_select_blocks,
    query_positions,
    visible_compressed,
)
from nsa_lite.checks import (
    require_int,
    require_keys_for_every_query,
    require_queries_and_keys,
)
from nsa_lite.layer import Choice, Known
from nsa_lite.selection import choose_blocks


def num_blocks(known: Known) -> int:
    """How many selection blocks the tokens up to the last query touch."""
    return num_select_blocks(known.start + known.q.shape[2], known.config.select_block_size)


def finished(known: Known) -> Bool[Tensor, "T blocks"]:
    """Which blocks lie wholly at or before each query: those of size and stride l'."""
    l_sel = known.config.select_block_size
    return visible_compressed(
        query_positions(known.q, known.start), num_blocks(known), l_sel, l_sel
    )


def forced(known: Known) -> Bool[Tensor, "T blocks"]:
    """Which blocks each query selects whatever their score."""
    c = known.config
    t = query_positions(known.q, known.start)
    return forced_blocks(t, num_blocks(known), c.select_block_size, c.num_initial, c.num_local)


def candidates(known: Known) -> Bool[Tensor, "T blocks"]:
    """Which blocks a rule chooses from: finished and not forced."""
    return finished(known) & ~forced(known)


def best(known: Known, score: Float[Tensor, "B G T blocks"]) -> Int[Tensor, "B G T n"]:
    """The forced blocks and those of the highest scores (Eq. 11)."""
    return choose_blocks(score, start=known.start, **known.config.choice_sizes)


def chosen(known: Known, ids: Int[Tensor, "B G T n"]) -> Bool[Tensor, "B G T blocks"]:
    """The candidates among the chosen blocks."""
    j = torch.arange(num_blocks(known), device=ids.device)
    return (ids[..., None] == j).any(-2) & candidates(known)


def at_random(known: Known) -> Choice:
    """The forced blocks and random legal ones: the floor that a learned choice must beat."""
    batch, _, length, _ = known.q.shape
    shape = (batch, known.config.kv_heads, length, num_blocks(known))
    return Choice(best(known, torch.rand(shape, device=known.q.device)))


def by_true_mass(known: Known) -> Choice:
    """The blocks that dense attention over the selection keys weighs most: the ceiling."""
    return Choice(best(known, true_mass(known)))


def by_bound(known: Known) -> Choice:
    """Quest's page bound on the selected branch's keys, no weights (arXiv 2406.10774)."""
    return Choice(best(known, vote(known, page_bound(known.q, *block_ranges(known)))))


def by_block_mean(known: Known) -> Choice:
    """MoBA's score: the query times the mean of the block's keys (arXiv 2502.13189)."""
    means = whole_blocks(known).mean(-2)  # (B, G, blocks, D)
    return Choice(best(known, vote(known, products(known.q, means))))


def nothing(known: Known) -> Choice:
    """No block at all: the selected branch gives exactly 0, which leaves the other two."""
    batch, _, length, _ = known.q.shape
    shape = (batch, known.config.kv_heads, length, 1)
    return Choice(torch.full(shape, -1, device=known.q.device))


def true_mass(known: Known) -> Float[Tensor, "B G T blocks"]:
    """block_mass of what a layer knows."""
    return block_mass(known.q, known.k, known.config.select_block_size, known.start)


@torch.no_grad()
def block_mass(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], select_block_size: int, start: int = 0
) -> Float[Tensor, "B G T blocks"]:
    """Dense causal attention's probability in each block, summed over the group's heads.

    Errors: ValueError or TypeError that names the argument.
    """
    require_queries_and_keys(q, k)
    require_keys_for_every_query(q, k, start)
    require_int("select_block_size", select_block_size, at_least=1)
    k = seen(k, q, start)
    causal = torch.arange(k.shape[2], device=k.device) <= query_positions(q, start)[:, None]
    p = attention_probabilities(q, k, causal, None)[0].sum(dim=2)
    p = pad(p, (0, -k.shape[2] % select_block_size))
    return p.unflatten(-1, (-1, select_block_size)).sum(-1)


def whole_blocks(known: Known) -> Tensor:
    """The selected branch's keys in blocks, a ragged tail left out: (B, G, whole, l', D)."""
    l_sel = known.config.select_block_size
    whole = known.k.shape[2] // l_sel
    return accurate(known.k[:, :, : whole * l_sel].detach()).unflatten(2, (whole, l_sel))


def block_ranges(known: Known) -> tuple[Tensor, Tensor]:
    """The lowest and the highest key of each whole block, channel by channel: (B, G, whole, D)."""
    keys = whole_blocks(known)
    return keys.amin(-2), keys.amax(-2)


@in_full_precision
def products(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G blocks D"]
) -> Float[Tensor, "B G R T blocks"]:
    """Each query head times its group's keys, one a block, not scaled."""
    return torch.einsum("bgrtd,bgjd->bgrtj", accurate(q).unflatten(1, (k.shape[1], -1)), k)


def page_bound(
    q: Float[Tensor, "B H T D"],
    low: Float[Tensor, "B G pages D"],
    high: Float[Tensor, "B G pages D"],
) -> Float[Tensor, "B G R T pages"]:
    """Quest's bound u = sum_c max(q_c m_c, q_c M_c), never below the best q.k of the page."""
    up = products(q.clamp(min=0), high)
    down = products(q.clamp(max=0), low)  # largest at the lowest key
    return up + down


def vote(known: Known, logits: Float[Tensor, "B G R T whole"]) -> Float[Tensor, "B G T blocks"]:
    """One score a block from the logits of a group's heads: softmax each, then add (Eq. 10).

    Blocks not finished get 0.
    """
    logits = pad(logits * known.config.head_dim**-0.5, (0, num_blocks(known) - logits.shape[-1]))
    return masked_softmax(logits, finished(known))[0].sum(2)
