"""Branch 2: score blocks, choose n of them for each query and group, attend to their tokens."""

import math

import torch
from torch import Tensor

from nsa_lite.attention import accurate, masked_softmax
from nsa_lite.blocks import (
    forced_blocks,
    num_select_blocks,
    overlap_in_strides,
    query_positions,
    visible_compressed,
    visible_select_blocks,
)
from nsa_lite.checks import (
    require,
    require_attention_inputs,
    require_float_tensor,
    require_int,
    require_keys_for_every_query,
    require_queries_and_keys,
)
from nsa_lite.config import require_counts, require_geometry


@torch.no_grad()
def compressed_probabilities(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    block_size: int,
    stride: int,
    scale: float | None = None,
    start: int = 0,
) -> Tensor:
    """The compressed branch's softmax again, from its log-sum-exp: p = exp(s - lse) (Eq. 8).

    Shapes: q (B, H, T, D), k (B, G, N, D), lse (B, H, T) -> p (B, G, R, T, N).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = (k.shape[1], q.shape[1] // k.shape[1])
    scores = torch.einsum("bgrtd,bgnd->bgrtn", accurate(q).unflatten(1, group), accurate(k))
    visible = visible_compressed(query_positions(q, start), k.shape[2], block_size, stride)
    scores = (scores * scale).masked_fill(~visible, -math.inf)
    lse = lse.masked_fill(lse == -math.inf, 0.0)  # exp(-inf - 0) = 0 where nothing is visible
    return (scores - lse.unflatten(1, group)[..., None]).exp()


@torch.no_grad()
def block_importance(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    block_size: int,
    stride: int,
    select_block_size: int,
    scale: float | None = None,
    start: int = 0,
) -> Tensor:
    """How much each selection block matters to each query and group (Eq. 8-10); no gradient.

    Shapes: q (B, H, T, D), k (B, G, N, D), lse (B, H, T) -> importance (B, G, T, blocks).
    importance[t, j] = sum over the group's heads, sum_i p[t, i] |C_i ∩ S_j| / d.
    Errors: ValueError or TypeError that names the argument.
    """
    require_queries_and_keys(q, k)
    require_geometry(block_size, stride, select_block_size)
    require_int("start", start, at_least=0)
    _require_lse(lse, q)
    p = compressed_probabilities(
        q, k, lse, block_size=block_size, stride=stride, scale=scale, start=start
    ).sum(dim=2)  # Eq. 10: probabilities are summed over the group's heads, not logits
    blocks = num_select_blocks(start + q.shape[2], select_block_size)
    overlap = overlap_in_strides(k.shape[2], blocks, block_size, stride, select_block_size)
    return p @ overlap.to(p)


@torch.no_grad()
def choose_blocks(
    score: Tensor,
    *,
    select_block_size: int,
    num_selected: int,
    num_initial: int = 1,
    num_local: int = 2,
    start: int = 0,
) -> Tensor:
    """The n best legal blocks of each query, forced ones first, whatever made the score (Eq. 11).

    Shapes: score (B, G, T, blocks) -> ids (B, G, T, n) int32, ascending, then -1 where fewer
    blocks than n have begun. Ties go to the lower id.
    Errors: ValueError or TypeError that names the argument.
    """
    require_int("select_block_size", select_block_size, at_least=1)
    require_int("start", start, at_least=0)
    require_counts(num_selected, num_initial, num_local)
    _require_score(score, select_block_size, start)
    positions = torch.arange(start, start + score.shape[2], device=score.device)
    blocks = score.shape[3]
    legal = visible_select_blocks(positions, blocks, select_block_size)
    forced = forced_blocks(positions, blocks, select_block_size, num_initial, num_local)
    rank = score.nan_to_num(nan=0.0).masked_fill(forced, math.inf).masked_fill(~legal, -math.inf)
    order = rank.sort(dim=-1, descending=True, stable=True).indices[..., :num_selected]
    # The best n may hold blocks that start after t when few are legal: mask them again.
    chosen = order.masked_fill(~legal.expand_as(rank).gather(-1, order), blocks)
    ids = chosen.sort(dim=-1).values
    ids = torch.nn.functional.pad(ids, (0, num_selected - ids.shape[-1]), value=blocks)
    return ids.masked_fill(ids == blocks, -1).int()


def select_blocks(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    block_size: int,
    stride: int,
    select_block_size: int,
    num_selected: int,
    num_initial: int = 1,
    num_local: int = 2,
    scale: float | None = None,
    start: int = 0,
) -> Tensor:
    """The selection blocks each query reads, one set per group of heads (Eq. 8-11).

    Shapes: q (B, H, T, D), compressed k (B, G, N, D), lse (B, H, T) of the compressed branch
    -> ids (B, G, T, n) int32, ascending, then -1. Not differentiable.
    Errors: ValueError or TypeError that names the argument.
    """
    importance = block_importance(
        q,
        k,
        lse,
        block_size=block_size,
        stride=stride,
        select_block_size=select_block_size,
        scale=scale,
        start=start,
    )
    return choose_blocks(
        importance,
        select_block_size=select_block_size,
        num_selected=num_selected,
        num_initial=num_initial,
        num_local=num_local,
        start=start,
    )


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    *,
    select_block_size: int,
    scale: float | None = None,
    start: int = 0,
) -> Tensor:
    """Attention to the raw tokens of the selected blocks, causal inside the own block (Eq. 12).

    Shapes: q (B, H, T, D), k (B, G, S, D), v (B, G, S, Dv), ids (B, G, T, n) int, -1 is padding
    -> out (B, H, T, Dv). Memory grows with T n l', not T x T.
    Errors: ValueError or TypeError that names the argument.
    """
    require_attention_inputs(q, k, v)
    require_keys_for_every_query(q, k, start)
    require_int("select_block_size", select_block_size, at_least=1)
    _require_ids(ids, q, k, select_block_size, start)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attend_to_blocks(q, k, v, ids, scale, select_block_size, start)


def attend_to_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    scale: float | Tensor,
    select_block_size: int,
    start: int,
) -> Tensor:
    """selected_attention without its checks; the scale may differ from key to key.

    Shapes: scale a number or (B, G, T, 1, n l').
    """
    keys, values = (gather_blocks(x, ids, select_block_size) for x in (k, v))
    mask = selected_mask(ids, query_positions(q, start), select_block_size)
    q = accurate(q).unflatten(1, (k.shape[1], -1)).transpose(2, 3)  # (B, G, T, R, D)
    # Keys first: their gradient then has the gathered layout, which saves a copy of all blocks.
    scores = (keys @ q.transpose(-1, -2)).transpose(-1, -2)  # (B, G, T, R, n l')
    p, _ = masked_softmax(scores * scale, mask[..., None, :])
    out = (p @ values).transpose(2, 3).flatten(1, 2)
    return out.to(v.dtype)


def gather_blocks(x: Tensor, ids: Tensor, select_block_size: int) -> Tensor:
    """The tokens of each query's blocks, side by side; -1 reads block 0, to be masked.

    Shapes: x (B, G, S, D), ids (B, G, T, n) -> (B, G, T, n l', D).
    """
    batch, groups, length, width = x.shape
    blocks = num_select_blocks(length, select_block_size)
    x = torch.nn.functional.pad(accurate(x), (0, 0, 0, blocks * select_block_size - length))
    table = x.reshape(-1, select_block_size * width)  # one row a block, of every batch and group
    row = torch.arange(batch * groups, device=x.device).view(batch, groups, 1, 1) * blocks
    rows = torch.nn.functional.embedding(ids.long().clamp(min=0) + row, table)
    return rows.view(batch, groups, ids.shape[2], -1, width)


def selected_mask(ids: Tensor, positions: Tensor, select_block_size: int) -> Tensor:
    """Which of the gathered tokens a query may read: real blocks, tokens up to its own.

    Shapes: ids (B, G, T, n), positions (T,) -> bool (B, G, T, n l').
    """
    token = torch.arange(select_block_size, device=ids.device)
    token = ids[..., None] * select_block_size + token  # (B, G, T, n, l')
    return ((ids >= 0)[..., None] & (token <= positions[:, None, None])).flatten(-2)


def _require_lse(lse: Tensor, q: Tensor) -> None:
    require_float_tensor("lse", lse, "B, H, T")
    require(
        lse.shape == q.shape[:3],
        "lse.shape",
        tuple(lse.shape),
        f"must be (B, H, T) = {tuple(q.shape[:3])}",
    )
    require(lse.device == q.device, "lse.device", lse.device, f"must be q.device = {q.device}")


def _require_score(score: Tensor, select_block_size: int, start: int) -> None:
    require_float_tensor("score", score, "B, G, T, blocks")
    shape, last = tuple(score.shape), start + score.shape[2]
    require(shape[2] >= 1, "score.shape", shape, "must hold at least one query")
    blocks = num_select_blocks(last, select_block_size)
    require(
        shape[3] == blocks,
        "score.shape",
        shape,
        f"{last} tokens lie in {blocks} blocks of {select_block_size}",
    )


def _require_ids(ids: Tensor, q: Tensor, k: Tensor, select_block_size: int, start: int) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        got = getattr(ids, "dtype", type(ids).__name__)
        raise TypeError(f"ids: must be an int32 or int64 tensor (B, G, T, n), got {got}")
    expected = (k.shape[0], k.shape[1], q.shape[2])
    require(
        ids.dim() == 4 and ids.shape[:3] == expected,
        "ids.shape",
        tuple(ids.shape),
        f"must be (B, G, T, n) with (B, G, T) = {expected}",
    )
    require(ids.device == q.device, "ids.device", ids.device, f"must be q.device = {q.device}")
    if ids.numel():
        last = num_select_blocks(start + q.shape[2], select_block_size) - 1
        low, high = int(ids.min()), int(ids.max())
        require(
            low >= -1 and high <= last,
            "ids",
            f"{low} .. {high}",
            f"must lie in -1 .. {last}, the blocks of this sequence",
        )
