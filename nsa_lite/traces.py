"""A trace: what one pass through a layer read, and what it scored. The data of every picture."""

from dataclasses import dataclass

from torch import Tensor

from nsa_lite.attention import KV
from nsa_lite.config import NSAConfig
from nsa_lite.gates import BRANCHES
from nsa_lite.nsa import Branches
from nsa_lite.selection import block_importance, compressed_probabilities


@dataclass(frozen=True)
class Trace:
    """What one pass through a layer did, without gradient.

    probabilities and importance are the paper's, Eq. 8-10, also where another rule chose the ids.

    Shapes: ids (B, G, T, n), probabilities (B, G, R, T, N), importance (B, G, T, blocks),
    gates (B, H, T, 3) in the order of BRANCHES, outputs: each branch's (B, H, T, Dv); the queries
    q (B, H, T, D) and the selected branch's keys k (B, G, S, D), both rotated, of which dense
    attention would make the mass that the choice may have missed.
    """

    config: NSAConfig
    start: int
    ids: Tensor
    probabilities: Tensor
    importance: Tensor
    gates: Tensor
    outputs: dict[str, Tensor]
    q: Tensor | None = None
    k: Tensor | None = None


def trace_of(  # noqa: PLR0913  what the layer has in hand
    config: NSAConfig,
    q: Tensor,
    blocks: KV,
    k: Tensor,
    gates: Tensor,
    branches: Branches,
    start: int,
) -> Trace:
    """The trace of queries q (B, H, T, D): Eq. 8 and Eq. 9-10 once more, beside what was read.

    blocks: the compressed keys and values, k: the selected branch's keys.
    """
    sizes = dict(block_size=config.block_size, stride=config.stride, start=start)
    return Trace(
        config,
        start,
        branches.ids,
        compressed_probabilities(q, blocks.k, branches.lse, **sizes),
        block_importance(
            q, blocks.k, branches.lse, select_block_size=config.select_block_size, **sizes
        ),
        gates.detach(),
        dict(zip(BRANCHES, branches[:3], strict=True)),
        q.detach(),
        k.detach().clone(),  # not a view of a cache, which may be written anew
    )
