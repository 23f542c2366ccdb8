"""Native Sparse Attention in one function: three branches, the choice between them, gates."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from nsa_lite.attention import attend_in_window
from nsa_lite.checks import (
    Pair,
    require_counts,
    require_every_block,
    require_gates,
    require_geometry,
    require_ids,
    require_int,
    require_keys_for_every_query,
    require_pair,
    require_pair_like,
    require_rule,
    require_scale,
)
from nsa_lite.compression import attend_compressed
from nsa_lite.gates import add_gated
from nsa_lite.selection import attend_to_blocks, best_blocks, importance_of

Choose = Callable[[Float[Tensor, "B H T"]], Int[Tensor, "B G T n"]]  # the compressed lse -> ids


class Branches(NamedTuple):
    """What the gates add up and what chose it, without gradient.

    Shapes: compressed, selected and window (B, H, T, Dv), lse (B, H, T), ids (B, G, T, n).
    """

    compressed: Tensor
    selected: Tensor
    window: Tensor
    lse: Tensor
    ids: Tensor


def nsa_attention(  # noqa: PLR0913  the paper's sizes
    q: Float[Tensor, "B H T D"],
    compressed: Pair,
    selected: Pair,
    window: Pair,
    gates: Float[Tensor, "B H T 3"],
    *,
    block_size: int,
    stride: int,
    select_block_size: int,
    num_selected: int,
    window_size: int,
    num_initial: int = 1,
    num_local: int = 2,
    scale: float | None = None,
    start: int = 0,
    choose: Choose | None = None,
    return_branches: bool = False,
) -> Float[Tensor, "B H T Dv"] | tuple[Float[Tensor, "B H T Dv"], Branches]:
    """Eq. 5: the gated sum of the three branches; each has its own keys and values.

    `choose` may replace the choice of Eq. 8-11: it gets the compressed branch's lse and returns
    ids. With return_branches the Branches come too. Keys and values that the last query does not
    see are not read. Sequences of a batch may end early: padding behind the last token changes
    nothing before it, as long as it is finite (a NaN there may reach it, for 0 * NaN is NaN).
    Errors: ValueError or TypeError that names the argument.
    """
    require_branches(q, compressed, selected, window, start)
    require_geometry(block_size, stride, select_block_size)
    require_every_block(q, compressed[0], block_size, stride, start, "compressed[0]")
    require_counts(num_selected, num_initial, num_local)
    require_int("window_size", window_size, at_least=1)
    require_scale(scale)
    require_rule(choose)
    require_gates(gates, q)

    out_c, lse = attend_compressed(q, *compressed, block_size, stride, scale, start)
    if choose is None:
        score = importance_of(
            q, compressed[0], lse, block_size, stride, select_block_size, scale, start
        )
        ids = best_blocks(score, select_block_size, num_selected, num_initial, num_local, start)
    else:
        ids = choose(lse)
        require_ids(ids, q, selected[0], select_block_size, start)
    out_s = attend_to_blocks(q, *selected, ids, scale, select_block_size, start)
    out_w = attend_in_window(q, *window, window_size, scale, start)
    out = add_gated(gates, (out_c, out_s, out_w)).to(q.dtype)
    if not return_branches:
        return out
    return out, Branches(*(x.detach() for x in (out_c, out_s, out_w, lse, ids)))


def require_branches(q: Tensor, compressed: Pair, selected: Pair, window: Pair, start: int) -> None:
    """Raise unless each pair fits q, and the raw ones reach the last query."""
    require_pair(q, compressed, "compressed")
    for name, pair in {"selected": selected, "window": window}.items():
        require_pair(q, pair, name)
        require_pair_like(name, pair, "compressed", compressed)
        require_keys_for_every_query(q, pair[0], start, f"{name}[0]")
