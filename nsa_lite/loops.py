"""Every step once more, as loops over queries and blocks that can be read beside the paper.

Same names and keywords as the vectorised operations, for whole sequences (no start), far slower.
The tests hold the two equal.
"""

import torch
from torch import Tensor


def scale_of(scale: float | None, width: int) -> float:
    """The factor in front of every score: 1 / sqrt(D) unless one is given."""
    return width**-0.5 if scale is None else scale


def softmax_rows(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, float]:
    """One query (D,) attends to keys (S, D), values (S, Dv): its output and log-sum-exp."""
    if len(keys) == 0:
        return values.new_zeros(values.shape[-1]), -torch.inf
    scores = keys @ q * scale
    p = torch.exp(scores - scores.max())
    return (p / p.sum()) @ values, float(torch.log(p.sum()) + scores.max())


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scale: float | None = None
) -> Tensor:
    """Query t reads keys t - w + 1 .. t; window=None reads 0 .. t."""
    batch, heads, length, width = q.shape
    out = q.new_zeros(batch, heads, length, v.shape[-1])
    for b in range(batch):
        for h in range(heads):
            g = h * k.shape[1] // heads  # the group this head belongs to
            for t in range(length):
                first = 0 if window is None else max(0, t - window + 1)
                out[b, h, t], _ = softmax_rows(
                    q[b, h, t],
                    k[b, g, first : t + 1],
                    v[b, g, first : t + 1],
                    scale_of(scale, width),
                )
    return out


def compressed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int, stride: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Query t reads compressed token i iff its block's last token, i d + l - 1, is at most t."""
    batch, heads, length, width = q.shape
    out = q.new_zeros(batch, heads, length, v.shape[-1])
    lse = q.new_zeros(batch, heads, length)
    for b in range(batch):
        for h in range(heads):
            g = h * k.shape[1] // heads
            for t in range(length):
                seen = [i for i in range(k.shape[2]) if i * stride + block_size - 1 <= t]
                out[b, h, t], lse[b, h, t] = softmax_rows(
                    q[b, h, t], k[b, g, seen], v[b, g, seen], scale_of(scale, width)
                )
    return out, lse


def block_importance(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    block_size: int,
    stride: int,
    select_block_size: int,
    scale: float | None = None,
) -> Tensor:
    """Every token of an overlap hands 1/d of the compressed block's probability on (Eq. 8-10)."""
    batch, heads, length, width = q.shape
    groups, blocks = k.shape[1], -(-length // select_block_size)
    importance = q.new_zeros(batch, groups, length, blocks)
    for b in range(batch):
        for h in range(heads):
            g = h * groups // heads
            for t in range(length):
                for i in range(k.shape[2]):
                    if i * stride + block_size - 1 > t:
                        continue
                    score = q[b, h, t] @ k[b, g, i] * scale_of(scale, width)
                    p = torch.exp(score - lse[b, h, t])
                    for token in range(i * stride, i * stride + block_size):
                        importance[b, g, t, token // select_block_size] += p / stride
    return importance


def choose_blocks(
    score: Tensor,
    *,
    select_block_size: int,
    num_selected: int,
    num_initial: int = 1,
    num_local: int = 2,
) -> Tensor:
    """Forced blocks first, then the best of the rest, one block at a time (Eq. 11)."""
    batch, groups, length, _ = score.shape
    ids = torch.full((batch, groups, length, num_selected), -1, dtype=torch.int32)
    for b in range(batch):
        for g in range(groups):
            for t in range(length):
                own = t // select_block_size
                legal = list(range(own + 1))
                chosen = {j for j in legal if j < num_initial or j > own - num_local}
                while len(chosen) < min(num_selected, len(legal)):
                    rest = [j for j in legal if j not in chosen]
                    chosen.add(max(rest, key=lambda j: (float(score[b, g, t, j]), -j)))
                ids[b, g, t, : len(chosen)] = torch.tensor(sorted(chosen))
    return ids


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
) -> Tensor:
    """Score the blocks, then choose: Eq. 8-11 in two calls."""
    importance = block_importance(
        q,
        k,
        lse,
        block_size=block_size,
        stride=stride,
        select_block_size=select_block_size,
        scale=scale,
    )
    return choose_blocks(
        importance,
        select_block_size=select_block_size,
        num_selected=num_selected,
        num_initial=num_initial,
        num_local=num_local,
    )


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    *,
    select_block_size: int,
    scale: float | None = None,
) -> Tensor:
    """Query t reads the tokens of its group's chosen blocks, none after t (Eq. 12)."""
    batch, heads, length, width = q.shape
    out = q.new_zeros(batch, heads, length, v.shape[-1])
    for b in range(batch):
        for h in range(heads):
            g = h * k.shape[1] // heads
            for t in range(length):
                tokens = [
                    s
                    for j in ids[b, g, t].tolist()
                    if j >= 0
                    for s in range(j * select_block_size, (j + 1) * select_block_size)
                    if s <= t
                ]
                out[b, h, t], _ = softmax_rows(
                    q[b, h, t], k[b, g, tokens], v[b, g, tokens], scale_of(scale, width)
                )
    return out
