"""The operations once more, as loops over queries and blocks that can be read beside the paper.

Same names and keywords as the vectorised operations, for whole sequences (no start), far slower;
arguments are taken as they are.
The tests hold the two equal.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa_lite.attention import scale_of


def every_query(q: Tensor, groups: int) -> Iterator[tuple[int, int, int, int]]:
    """(b, h, g, t) of each query of q (B, H, T, D); g is the group that head h belongs to."""
    batch, heads, length, _ = q.shape
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                yield b, h, h * groups // heads, t


def softmax_rows(
    q: Float[Tensor, " D"],
    keys: Float[Tensor, "S D"],
    values: Float[Tensor, "S Dv"],
    scale: float,
) -> tuple[Float[Tensor, " Dv"], float]:
    """One query attends to some keys and values: its output and log-sum-exp."""
    if len(keys) == 0:
        return values.new_zeros(values.shape[-1]), -torch.inf
    scores = keys @ q * scale
    p = torch.exp(scores - scores.max())
    return (p / p.sum()) @ values, float(torch.log(p.sum()) + scores.max())


def window_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T Dv"],
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H T Dv"]:
    """Query t reads keys t - w + 1 .. t; window=None reads 0 .. t."""
    scale = scale_of(scale, q.shape[3])
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for b, h, g, t in every_query(q, k.shape[1]):
        first = 0 if window is None else max(0, t - window + 1)
        seen = slice(first, t + 1)
        out[b, h, t], _ = softmax_rows(q[b, h, t], k[b, g, seen], v[b, g, seen], scale)
    return out


def compressed_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G N D"],
    v: Float[Tensor, "B G N Dv"],
    *,
    block_size: int,
    stride: int,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H T Dv"], Float[Tensor, "B H T"]]:
    """Query t reads compressed token i iff its block's last token, i d + l - 1, is at most t."""
    scale = scale_of(scale, q.shape[3])
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_zeros(q.shape[:3])
    for b, h, g, t in every_query(q, k.shape[1]):
        seen = [i for i in range(k.shape[2]) if i * stride + block_size - 1 <= t]
        row, row_lse = softmax_rows(q[b, h, t], k[b, g, seen], v[b, g, seen], scale)
        out[b, h, t] = row
        lse[b, h, t] = row_lse
    return out, lse


def block_importance(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G N D"],
    lse: Float[Tensor, "B H T"],
    *,
    block_size: int,
    stride: int,
    select_block_size: int,
    scale: float | None = None,
) -> Float[Tensor, "B G T blocks"]:
    """Every token of an overlap hands 1/d of the compressed block's probability on (Eq. 8-10)."""
    scale = scale_of(scale, q.shape[3])
    batch, groups, count, _ = k.shape
    length = q.shape[2]
    importance = q.new_zeros(batch, groups, length, -(-length // select_block_size))
    for b, h, g, t in every_query(q, groups):
        for i in range(count):
            if i * stride + block_size - 1 > t:
                continue
            score = q[b, h, t] @ k[b, g, i] * scale
            p = torch.exp(score - lse[b, h, t])
            for token in range(i * stride, i * stride + block_size):
                importance[b, g, t, token // select_block_size] += p / stride
    return importance


def choose_blocks(
    score: Float[Tensor, "B G T blocks"],
    *,
    select_block_size: int,
    num_selected: int,
    num_initial: int = 1,
    num_local: int = 2,
) -> Int[Tensor, "B G T n"]:
    """Forced blocks first, then the best of the rest, one block at a time (Eq. 11)."""
    ids = torch.full((*score.shape[:3], num_selected), -1, dtype=torch.int32)
    for b, _, g, t in every_query(score, score.shape[1]):
        own = t // select_block_size
        legal = list(range(own + 1))
        chosen = {j for j in legal if j < num_initial or j > own - num_local}
        while len(chosen) < min(num_selected, len(legal)):
            rest = [j for j in legal if j not in chosen]
            chosen.add(max(rest, key=lambda j: (float(score[b, g, t, j]), -j)))
        ids[b, g, t, : len(chosen)] = torch.tensor(sorted(chosen))
    return ids


def select_blocks(  # noqa: PLR0913  the paper's sizes
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G N D"],
    lse: Float[Tensor, "B H T"],
    *,
    block_size: int,
    stride: int,
    select_block_size: int,
    scale: float | None = None,
    **choice: int,
) -> Int[Tensor, "B G T n"]:
    """Score the blocks, then choose: Eq. 8-11 in two calls; `choice` are choose_blocks' sizes."""
    importance = block_importance(
        q,
        k,
        lse,
        block_size=block_size,
        stride=stride,
        select_block_size=select_block_size,
        scale=scale,
    )
    return choose_blocks(importance, select_block_size=select_block_size, **choice)


def selected_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T Dv"],
    ids: Int[Tensor, "B G T n"],
    *,
    select_block_size: int,
    scale: float | None = None,
) -> Float[Tensor, "B H T Dv"]:
    """Query t reads the tokens of its group's chosen blocks, none after t (Eq. 12)."""
    scale = scale_of(scale, q.shape[3])
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for b, h, g, t in every_query(q, k.shape[1]):
        blocks = [j for j in ids[b, g, t].tolist() if j >= 0]
        tokens = [j * select_block_size + i for j in blocks for i in range(select_block_size)]
        tokens = [s for s in tokens if s <= t]
        out[b, h, t], _ = softmax_rows(q[b, h, t], k[b, g, tokens], v[b, g, tokens], scale)
    return out
