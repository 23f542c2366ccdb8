"""Branch 2: score blocks, choose n of them for each query and group, attend to their tokens."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding, pad

from nsa_lite.attention import accurate, in_full_precision, masked_softmax, scale_of, seen
from nsa_lite.blocks import (
    forced_blocks,
    num_select_blocks,
    query_positions,
    visible_compressed,
    visible_select_blocks,
)
from nsa_lite.checks import (
    require_attention_inputs,
    require_counts,
    require_ids,
    require_int,
    require_keys_for_every_query,
    require_scale,
    require_score,
    require_scoring,
)
from nsa_lite.compression import finished_blocks

BEHIND_ALL = 2**31 - 1  # where no block is: sorted by id, it comes last


@torch.no_grad()
@in_full_precision
def compressed_probabilities(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G N D"],
    lse: Float[Tensor, "B H T"],
    *,
    block_size: int,
    stride: int,
    scale: float | None = None,
    start: int = 0,
) -> Float[Tensor, "B G R T N"]:
    """The compressed branch's softmax again, from its log-sum-exp: p = exp(s - lse) (Eq. 8)."""
    group = (k.shape[1], q.shape[1] // k.shape[1])
    scores = torch.einsum("bgrtd,bgnd->bgrtn", accurate(q).unflatten(1, group), accurate(k))
    visible = visible_compressed(query_positions(q, start), k.shape[2], block_size, stride)
    scores = (scores * scale_of(scale, k.shape[3])).masked_fill(~visible, -math.inf)
    lse = lse.masked_fill(lse == -math.inf, 0.0)  # exp(-inf - 0) = 0 where nothing is visible
    return (scores - lse.unflatten(1, group)[..., None]).exp()


def block_importance(  # noqa: PLR0913  the paper's sizes
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G N D"],
    lse: Float[Tensor, "B H T"],
    *,
    block_size: int,
    stride: int,
    select_block_size: int,
    scale: float | None = None,
    start: int = 0,
) -> Float[Tensor, "B G T blocks"]:
    """How much each selection block matters to each query and group (Eq. 8-10); no gradient.

    k and lse are the compressed branch's.
    importance[t, j] = sum over the group's heads, sum_i p[t, i] |C_i ∩ S_j| / d.
    Errors: ValueError or TypeError that names the argument.
    """
    require_scoring(q, k, lse, block_size, stride, select_block_size, scale, start)
    return importance_of(q, k, lse, block_size, stride, select_block_size, scale, start)


@torch.no_grad()
def importance_of(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_size: int,
    stride: int,
    select_block_size: int,
    scale: float | None,
    start: int,
) -> Tensor:
    """block_importance without its checks."""
    k = finished_blocks(k, q, block_size, stride, start)
    p = compressed_probabilities(
        q, k, lse, block_size=block_size, stride=stride, scale=scale, start=start
    )
    blocks = num_select_blocks(start + q.shape[2], select_block_size)
    return shared_out(p, blocks, block_size, stride, select_block_size)


@in_full_precision
def shared_out(
    p: Float[Tensor, "B G R T N"],
    blocks: int,
    block_size: int,
    stride: int,
    select_block_size: int,
) -> Float[Tensor, "B G T {blocks}"]:
    """What the selection blocks get of compressed ones' probabilities, all heads' (Eq. 9-10).

    Eq. 9's two sums, one after the other: a stride of d tokens gets p of the l/d compression blocks
    that cover it, a selection block what its l'/d strides have.
    """
    p = p.sum(dim=2)  # Eq. 10 sums probabilities, not logits
    covering = block_size // stride
    shifted = [pad(p, (m, covering - 1 - m)) for m in range(covering)]
    strides = torch.stack(shifted).sum(0)  # (B, G, T, N + l/d - 1)
    inside = select_block_size // stride
    strides = pad(strides, (0, blocks * inside - strides.shape[-1]))
    return strides.unflatten(-1, (blocks, inside)).sum(-1)


def choose_blocks(
    score: Float[Tensor, "B G T blocks"],
    *,
    select_block_size: int,
    num_selected: int,
    num_initial: int = 1,
    num_local: int = 2,
    start: int = 0,
) -> Int[Tensor, "B G T n"]:
    """The n best legal blocks of each query, forced ones first, whatever made the score (Eq. 11).

    int32, ascending, then -1 where fewer blocks than n have begun. Ties go to the lower id. A score
    of NaN counts as 0; a row of nothing else is a tie.
    Errors: ValueError or TypeError that names the argument.
    """
    require_int("select_block_size", select_block_size, at_least=1)
    require_int("start", start, at_least=0)
    require_counts(num_selected, num_initial, num_local)
    require_score(score, select_block_size, start)
    return best_blocks(score, select_block_size, num_selected, num_initial, num_local, start)


@torch.no_grad()
def best_blocks(
    score: Tensor,
    select_block_size: int,
    num_selected: int,
    num_initial: int,
    num_local: int,
    start: int,
) -> Tensor:
    """choose_blocks without its checks."""
    positions = torch.arange(start, start + score.shape[2], device=score.device)
    blocks = score.shape[3]
    legal = visible_select_blocks(positions, blocks, select_block_size)
    forced = forced_blocks(positions, blocks, select_block_size, num_initial, num_local)
    rank = score.nan_to_num(nan=0.0).masked_fill(forced, math.inf).masked_fill(~legal, -math.inf)
    order = rank.sort(dim=-1, descending=True, stable=True).indices[..., :num_selected]
    # The best n may hold blocks that start after t when few are legal: mask them again.
    chosen = order.masked_fill(~legal.expand_as(rank).gather(-1, order), BEHIND_ALL)
    ids = chosen.sort(dim=-1).values
    ids = pad(ids, (0, num_selected - ids.shape[-1]), value=BEHIND_ALL)
    return ids.masked_fill(ids == BEHIND_ALL, -1).int()


def select_blocks(  # noqa: PLR0913  the paper's sizes
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G N D"],
    lse: Float[Tensor, "B H T"],
    *,
    block_size: int,
    stride: int,
    select_block_size: int,
    num_selected: int,
    num_initial: int = 1,
    num_local: int = 2,
    scale: float | None = None,
    start: int = 0,
) -> Int[Tensor, "B G T n"]:
    """The selection blocks each query reads, one set per group of heads (Eq. 8-11).

    k and lse are the compressed branch's. int32, ascending, then -1. Not differentiable.
    Errors: ValueError or TypeError that names the argument.
    """
    require_scoring(q, k, lse, block_size, stride, select_block_size, scale, start)
    require_counts(num_selected, num_initial, num_local)
    score = importance_of(q, k, lse, block_size, stride, select_block_size, scale, start)
    return best_blocks(score, select_block_size, num_selected, num_initial, num_local, start)


def selected_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S Dv"],
    ids: Int[Tensor, "B G T n"],
    *,
    select_block_size: int,
    scale: float | None = None,
    start: int = 0,
) -> Float[Tensor, "B H T Dv"]:
    """Attention to the raw tokens of the selected blocks, causal inside the own block (Eq. 12).

    An id of -1 is padding; the others of a query must differ. Keys from start + T on are not read.
    Memory grows with T n l', not T x T.
    Errors: ValueError or TypeError that names the argument.
    """
    require_attention_inputs(q, k, v)
    require_keys_for_every_query(q, k, start)
    require_int("select_block_size", select_block_size, at_least=1)
    require_scale(scale)
    require_ids(ids, q, k, select_block_size, start)
    return attend_to_blocks(q, k, v, ids, scale, select_block_size, start)


@in_full_precision
def attend_to_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    scale: float | Float[Tensor, "B G T 1 keys"] | None,
    select_block_size: int,
    start: int,
) -> Tensor:
    """selected_attention without its checks; the scale may differ from key to key (keys = n l')."""
    keys = gather_blocks(seen(k, q, start), ids, select_block_size)
    values = gather_blocks(seen(v, q, start), ids, select_block_size)
    mask = selected_mask(ids, query_positions(q, start), select_block_size)
    return attend_to_gathered(q, keys, values, mask, scale).to(v.dtype)


def attend_to_gathered(
    q: Float[Tensor, "B H T D"],
    keys: Float[Tensor, "B G T keys D"],
    values: Float[Tensor, "B G T keys Dv"],
    mask: Bool[Tensor, "B G T keys"],
    scale: float | Float[Tensor, "B G T 1 keys"] | None,
) -> Float[Tensor, "B H T Dv"]:
    """Attention of each query to tokens of its own, in full precision as they are."""
    scale = scale_of(scale, q.shape[3]) if scale is None else scale
    q = accurate(q).unflatten(1, (keys.shape[1], -1)).transpose(2, 3)  # (B, G, T, R, D)
    # Keys first: their gradient then has the gathered layout, which saves a copy of all blocks.
    scores = (keys @ q.transpose(-1, -2)).transpose(-1, -2)  # (B, G, T, R, n l')
    p, _ = masked_softmax(scores * scale, mask[..., None, :])
    return (p @ values).transpose(2, 3).flatten(1, 2)


def gather_blocks(
    x: Float[Tensor, "B G S D"], ids: Int[Tensor, "B G T n"], select_block_size: int
) -> Float[Tensor, "B G T keys D"]:
    """The tokens of each query's blocks, keys = n l' of them; -1 reads block 0, to be masked."""
    batch, groups, length, width = x.shape
    blocks = num_select_blocks(length, select_block_size)
    x = accurate(x).contiguous()  # first: torch.compile expects that a pad of nothing copies
    x = pad(x, (0, 0, 0, blocks * select_block_size - length))
    table = x.reshape(-1, select_block_size * width)  # one row a block, of every batch and group
    row = torch.arange(batch * groups, device=x.device).view(batch, groups, 1, 1) * blocks
    rows = embedding(ids.long().clamp(min=0) + row, table)
    return rows.reshape(batch, groups, ids.shape[2], -1, width)


def selected_mask(
    ids: Int[Tensor, "B G T n"], positions: Int[Tensor, " T"], select_block_size: int
) -> Bool[Tensor, "B G T keys"]:
    """Which of the gathered tokens a query may read: real blocks, tokens up to its own."""
    token = torch.arange(select_block_size, device=ids.device)
    token = ids[..., None] * select_block_size + token  # (B, G, T, n, l')
    return ((ids >= 0)[..., None] & (token <= positions[:, None, None])).flatten(-2)
