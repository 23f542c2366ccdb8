"""Softmax attention with grouped heads, and its two plainest uses: dense and windowed.

Queries sit at positions start .. start + T - 1, keys at 0 .. S - 1. In training start is 0
and S = T; when decoding, the queries are the newest positions and the keys are the cache.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nsa_lite.blocks import query_positions
from nsa_lite.checks import (
    require_attention_inputs,
    require_int,
    require_keys_for_every_query,
)


class KV(NamedTuple):
    """The keys (B, G, S, D) and values (B, G, S, Dv) of one branch."""

    k: Tensor
    v: Tensor


def accurate(x: Tensor) -> Tensor:
    """x in at least float32: half precision is for storage, sums need more digits."""
    return x if x.dtype == torch.float64 else x.float()


def scale_of(scale: float | None, width: int) -> float:
    """The factor in front of every score: 1 / sqrt(D) unless one is given."""
    return width**-0.5 if scale is None else scale


def masked_softmax(
    scores: Float[Tensor, "*rows S"], mask: Bool[Tensor, "*#rows S"]
) -> tuple[Float[Tensor, "*rows S"], Float[Tensor, "*rows"]]:
    """Softmax over the last axis among the allowed keys, and its natural log-sum-exp.

    A row with no allowed key gets probabilities 0, lse -inf and gradient 0, never NaN.
    """
    alive = mask.any(-1, keepdim=True)
    # A dead row keeps finite scores: exp(-inf - -inf) would be NaN, in the backward as well.
    scores = scores.masked_fill(~mask & alive, -math.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    p = (scores - lse).exp().masked_fill(~alive, 0.0)
    return p, lse.masked_fill(~alive, -math.inf).squeeze(-1)


def attention_probabilities(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    mask: Bool[Tensor, "*#B_G_R T S"],
    scale: float | None,
) -> tuple[Float[Tensor, "B G R T S"], Float[Tensor, "B G R T"]]:
    """The softmax rows of every head, among the keys that `mask` allows, and their lse."""
    q = q.unflatten(1, (k.shape[1], -1))  # (B, G, R, T, D): heads of a group stand side by side
    scores = torch.einsum("bgrtd,bgsd->bgrts", accurate(q), accurate(k))
    return masked_softmax(scores * scale_of(scale, k.shape[3]), mask)


def attend(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S Dv"],
    mask: Bool[Tensor, "*#B_G_R T S"],
    scale: float | None,
) -> tuple[Float[Tensor, "B H T Dv"], Float[Tensor, "B H T"]]:
    """Attention of each query head to its group's keys, where `mask` allows, and its lse.

    Scale defaults to 1 / sqrt(D).
    """
    p, lse = attention_probabilities(q, k, mask, scale)
    out = torch.einsum("bgrts,bgsv->bgrtv", p, accurate(v))
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def window_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S Dv"],
    *,
    window: int | None = None,
    scale: float | None = None,
    start: int = 0,
) -> Float[Tensor, "B H T Dv"]:
    """Causal attention to the last `window` keys, the query's own included; None is dense.

    Errors: ValueError or TypeError that names the argument. Source: section 3.3.3.
    """
    require_attention_inputs(q, k, v)
    require_keys_for_every_query(q, k, start)
    if window is not None:
        require_int("window", window, at_least=1)
    return attend_in_window(q, k, v, window, scale, start)


def attend_in_window(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None, start: int
) -> Tensor:
    """window_attention without its checks; a window that cuts nothing off is dense."""
    if window is None or window >= start + q.shape[2]:
        s = torch.arange(k.shape[2], device=q.device)
        return attend(q, k, v, s <= query_positions(q, start)[:, None], scale)[0]
    return attend_in_chunks(q, k, v, window, scale, start)


def attend_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None, start: int
) -> Tensor:
    """attend_in_window for w queries at a time, which share at most 2w - 1 keys."""
    k = accurate(k)  # chunks share keys: their gradients are added without rounding
    v = accurate(v)
    chunks = []
    for first in range(0, q.shape[2], window):
        chunk = q[:, :, first : first + window]
        t = query_positions(chunk, start + first)[:, None]
        low = max(0, start + first - window + 1)
        s = torch.arange(low, start + first + chunk.shape[2], device=q.device)
        keys = slice(low, low + len(s))
        mask = (s <= t) & (s > t - window)
        chunks.append(attend(chunk, k[:, :, keys], v[:, :, keys], mask, scale)[0])
    return torch.cat(chunks, dim=2)


def dense_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S Dv"],
    *,
    scale: float | None = None,
    start: int = 0,
) -> Float[Tensor, "B H T Dv"]:
    """Causal attention to every key up to the query's own (the paper's full attention, Eq. 1)."""
    return window_attention(q, k, v, window=None, scale=scale, start=start)
