"""Decoding: the attention of the newest tokens against a cache that holds them already."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa_lite.attention import accurate, attend_in_window, in_full_precision, seen
from nsa_lite.blocks import num_compressed, query_positions
from nsa_lite.checks import (
    Pair,
    require,
    require_counts,
    require_gates,
    require_geometry,
    require_instance,
    require_int,
    require_int_tensor,
    require_pair,
    require_pair_like,
    require_range,
    require_scale,
)
from nsa_lite.compression import attend_compressed
from nsa_lite.gates import add_gated
from nsa_lite.selection import attend_to_gathered, best_blocks, importance_of, selected_mask

MOST_NEW = 8  # tokens a sequence in one step; speculative decoding asks for several


@runtime_checkable
class Held(Protocol):
    """What decode_step reads: a Cache, or whatever has these.

    raw["selected"] and raw["window"]: keys (B, G, rows, D) and values (B, G, rows, Dv), token s of
    a sequence in row s; blocks: the same of phi's blocks; lengths (B,). What stands behind a
    sequence's length, and blocks that are not whole, may be anything.
    """

    @property
    def raw(self) -> Mapping[str, Pair]: ...
    @property
    def blocks(self) -> Pair | None: ...
    @property
    def lengths(self) -> Tensor: ...


class Sizes(NamedTuple):
    """The paper's sizes, as nsa_attention takes them."""

    block_size: int
    stride: int
    select_block_size: int
    num_selected: int
    num_initial: int
    num_local: int
    window: int
    scale: float | None


@torch.no_grad()
def decode_step(  # noqa: PLR0913  the paper's sizes
    q: Float[Tensor, "B H T D"],
    cache: Held,
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
    return_ids: bool = False,
) -> Float[Tensor, "B H T Dv"] | tuple[Float[Tensor, "B H T Dv"], Int[Tensor, "B G T n"]]:
    """Eq. 5 for the newest tokens of each sequence, which the cache holds and counts already.

    Query i of sequence b is its token lengths[b] - T + i, 1 <= T <= 8: the last T rows of
    nsa_attention, without gradient. return_ids adds the blocks that were chosen.
    Errors: ValueError or TypeError that names the argument.
    """
    require_geometry(block_size, stride, select_block_size)
    require_counts(num_selected, num_initial, num_local)
    require_int("window_size", window_size, at_least=1)
    require_scale(scale)
    require_held(q, cache, block_size, stride)
    require_gates(gates, q)
    sizes = Sizes(
        block_size,
        stride,
        select_block_size,
        num_selected,
        num_initial,
        num_local,
        window_size,
        scale,
    )
    parts = []
    for some, length in spans(cache.lengths.tolist()):
        blocks = of(cache.blocks, some)
        selected = of(cache.raw["selected"], some)
        window = of(cache.raw["window"], some)
        start = length - q.shape[2]
        parts.append(newest(q[some], blocks, selected, window, gates[some], sizes, start))
    out, ids = (torch.cat(x) for x in zip(*parts, strict=True))
    return (out, ids) if return_ids else out


def spans(lengths: list[int]) -> list[tuple[slice, int]]:
    """(sequences, their length): all at once if they are equally long, else one after another."""
    if len(set(lengths)) == 1:
        return [(slice(None), lengths[0])]
    return [(slice(b, b + 1), length) for b, length in enumerate(lengths)]


def of(pair: Pair | None, some: slice) -> Pair:
    """The keys and values of some sequences."""
    assert pair is not None  # require_held has seen to it
    k, v = pair
    return k[some], v[some]


@in_full_precision
def newest(
    q: Tensor, blocks: Pair, selected: Pair, window: Pair, gates: Tensor, sizes: Sizes, start: int
) -> tuple[Tensor, Tensor]:
    """Eq. 5 for queries at start .. start + T - 1, and their ids.

    nsa_attention in its plain form pads and copies whole branches, where many queries share them;
    here only the chosen blocks are read, so that a step costs what the paper counts.
    """
    l, d, block, count, initial, local, width, scale = sizes
    out_c, lse = attend_compressed(q, *blocks, l, d, scale, start)
    score = importance_of(q, blocks[0], lse, l, d, block, scale, start)
    ids = best_blocks(score, block, count, initial, local, start)
    keys, values = (chosen_tokens(seen(x, q, start), ids, block) for x in selected)
    mask = selected_mask(ids, query_positions(q, start), block)
    out_s = attend_to_gathered(q, keys, values, mask, scale).to(q.dtype)
    out_w = attend_in_window(q, *window, width, scale, start)
    return add_gated(gates, (out_c, out_s, out_w)).to(q.dtype), ids


def chosen_tokens(
    x: Float[Tensor, "B G S D"], ids: Int[Tensor, "B G T n"], select_block_size: int
) -> Float[Tensor, "B G T keys D"]:
    """The tokens of each query's blocks, keys = n l' of them, and nothing else of x is read.

    An id of -1, and a block that ends behind the last token, read another token, to be masked.
    """
    token = torch.arange(select_block_size, device=x.device)
    token = (ids.clamp(min=0)[..., None] * select_block_size + token).flatten(-2)
    token = token.clamp(max=x.shape[2] - 1)
    b = torch.arange(x.shape[0], device=x.device)[:, None, None, None]
    g = torch.arange(x.shape[1], device=x.device)[:, None, None]
    return accurate(x[b, g, token])


def require_held(q: Tensor, cache: Held, block_size: int, stride: int) -> None:
    """Raise unless the cache holds the T queries' tokens, and fits them."""
    require_parts(cache)
    blocks = cache.blocks
    assert blocks is not None  # as require_parts has found
    require_pair(q, blocks, "cache.blocks")
    raw = {f"cache.raw[{name!r}]": cache.raw[name] for name in ("selected", "window")}
    for name, pair in raw.items():
        require_pair(q, pair, name)
        require_pair_like(name, pair, "cache.blocks", blocks)
    new = q.shape[2]
    rule = "must hold 1 to {} new tokens a sequence"
    require(new <= MOST_NEW, "q.shape", tuple(q.shape), rule, MOST_NEW)
    require_lengths(cache.lengths, q)
    room = min(keys.shape[2] for keys, _ in raw.values())
    rule = f"must lie between the {new} new tokens and the {{}} rows of the cache"
    require_range("cache.lengths", cache.lengths, new, room, rule)
    whole = num_compressed(int(cache.lengths.max()), block_size, stride)
    rule = "must hold the {} blocks of the longest sequence"
    enough = blocks[0].shape[2] >= whole
    require(enough, "cache.blocks[0].shape", tuple(blocks[0].shape), rule, whole)


def require_parts(cache: Held) -> None:
    """Raise unless an object has the parts that decode_step reads, and raw its branches."""
    require_instance("cache", cache, Held, "a Cache, or have blocks, raw and lengths as it has")
    if cache.blocks is None:
        raise ValueError("cache.blocks = None: must be phi's blocks, keys and values")
    require_instance("cache.raw", cache.raw, Mapping, "a dict of pairs (k, v), by branch")
    missing = sorted({"selected", "window"} - set(cache.raw))
    require(not missing, "cache.raw", sorted(cache.raw), f"must have the branches {missing} too")


def require_lengths(lengths: Tensor, q: Tensor) -> None:
    """Raise unless lengths is (B,) of int32 or int64, on q's device."""
    require_int_tensor("cache.lengths", lengths, "(B,)")
    expected = (q.shape[0],)
    shape = tuple(lengths.shape)
    require(shape == expected, "cache.lengths.shape", shape, "must be (B,) = {}", expected)
    here = lengths.device == q.device
    require(here, "cache.lengths.device", lengths.device, f"must be q.device = {q.device}")
