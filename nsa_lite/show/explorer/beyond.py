"""What a query's window cannot tell it: dense attention's mass on the blocks before the window.

Dense attention here is that of the same queries and the selected branch's keys, the one that the
oracle and the KL teacher take for the truth (rivals.rules.block_mass). A block that has much of it
and is not selected is what the choice missed.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa_lite import Trace
from nsa_lite.attention import attention_probabilities

AT_ONCE = 2**20  # probabilities: T x T of a long sequence would not fit
MOST = 2**29  # pairs of a query and a key that are worth the wait; 23,000 tokens, all queries


def can_tell(trace: Trace) -> bool:
    """Whether a trace holds the queries and keys, and not too many pairs of them."""
    return trace.q is not None and trace.k is not None and _pairs(trace.q, trace.k) <= MOST


def _pairs(q: Tensor, k: Tensor) -> int:
    return q.shape[2] * k.shape[2]


@torch.no_grad()
def mass_beyond(trace: Trace, row: int, positions: Tensor) -> Tensor:
    """Dense attention's probability of each block's tokens before the query's window.

    The mean over the group's heads: (G, Q, blocks) float32. So a row adds up to what dense
    attention gives to tokens t - w and before; a mass that is NaN counts as 0.
    """
    assert trace.q is not None and trace.k is not None  # can_tell has seen to it
    c = trace.config
    q = trace.q[row, None].cpu()
    k = trace.k[row, None].cpu()
    chunk = max(1, AT_ONCE // (q.shape[1] * k.shape[2]))
    s = torch.arange(k.shape[2])
    parts = []
    for first in range(0, q.shape[2], chunk):
        t = positions[first : first + chunk, None]
        p, _ = attention_probabilities(q[:, :, first : first + chunk], k, s <= t, None)
        before = p[0].mean(1).masked_fill(s > t - c.window, 0.0)  # (G, chunk, S)
        blocks = pad(before, (0, -len(s) % c.select_block_size))
        parts.append(blocks.unflatten(-1, (-1, c.select_block_size)).sum(-1))
    return torch.cat(parts, dim=1).float().nan_to_num(nan=0.0)
