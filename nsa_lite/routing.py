"""Who chooses the blocks: NSA's own importance, or a control that the experiments need.

A routing takes what the layer knows and returns ids (B, G, T, n). The controls share everything
else with NSA, so that a difference in the result comes from the choice alone.
"""

from types import ModuleType

import torch
from torch import Tensor

from nsa_lite.attention import attention_probabilities
from nsa_lite.blocks import num_select_blocks, query_positions
from nsa_lite.config import NSAConfig
from nsa_lite.selection import choose_blocks


def by_importance(
    ops: ModuleType, c: NSAConfig, q: Tensor, k_short: Tensor, lse: Tensor, k_raw: Tensor,
    start: int,
) -> Tensor:
    """The paper's rule: the compressed branch's softmax scores the blocks (Eq. 8-11)."""
    return ops.select_blocks(
        q, k_short, lse, block_size=c.block_size, stride=c.stride, start=start, **_choice(c)
    )


def at_random(ops, c: NSAConfig, q, k_short, lse, k_raw, start: int) -> Tensor:
    """The forced blocks and random legal ones: the floor that a learned choice must beat."""
    blocks = num_select_blocks(start + q.shape[2], c.select_block_size)
    score = torch.rand(q.shape[0], c.kv_heads, q.shape[2], blocks, device=q.device)
    return choose_blocks(score, start=start, **_choice(c))


def by_true_mass(ops, c: NSAConfig, q, k_short, lse, k_raw, start: int) -> Tensor:
    """The blocks that dense attention over the selection keys weighs most: the ceiling."""
    return choose_blocks(block_mass(q, k_raw, c.select_block_size, start), start=start,
                         **_choice(c))


def nothing(ops, c: NSAConfig, q, k_short, lse, k_raw, start: int) -> Tensor:
    """No block at all: the selected branch gives exactly 0, which leaves the other two."""
    return torch.full((q.shape[0], c.kv_heads, q.shape[2], 1), -1, device=q.device)


@torch.no_grad()
def block_mass(q: Tensor, k: Tensor, select_block_size: int, start: int = 0) -> Tensor:
    """Dense causal attention's probability in each block, summed over the group's heads.

    Shapes: q (B, H, T, D), k (B, G, S, D) -> (B, G, T, blocks).
    """
    causal = torch.arange(k.shape[2], device=k.device) <= query_positions(q, start)[:, None]
    p = attention_probabilities(q, k, causal, None)[0].sum(dim=2)
    ragged = -k.shape[2] % select_block_size
    p = torch.nn.functional.pad(p, (0, ragged))
    return p.unflatten(-1, (-1, select_block_size)).sum(-1)


def _choice(c: NSAConfig) -> dict[str, int]:
    return dict(select_block_size=c.select_block_size, num_selected=c.num_selected,
                num_initial=c.num_initial, num_local=c.num_local)


ROUTINGS = {
    "importance": by_importance, "random": at_random, "oracle": by_true_mass, "none": nothing,
}
