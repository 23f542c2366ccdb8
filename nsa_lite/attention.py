"""Softmax attention with grouped heads, and its two plainest uses: dense and windowed.

Queries sit at positions start .. start + T - 1, keys at 0 .. S - 1. In training start is 0
and S = T; when decoding, the queries are the newest positions and the keys are the cache.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from nsa_lite.blocks import query_positions
from nsa_lite.checks import (
    autocasts,
    require_attention_inputs,
    require_int,
    require_keys_for_every_query,
    require_scale,
)

P = ParamSpec("P")
R = TypeVar("R")


class KV(NamedTuple):
    """The keys (B, G, S, D) and values (B, G, S, Dv) of one branch."""

    k: Tensor
    v: Tensor


def accurate(x: Tensor) -> Tensor:
    """x in at least float32: half precision is for storage, sums need more digits."""
    return x if x.dtype == torch.float64 else x.float()


def in_full_precision(
    operation: Callable[Concatenate[Tensor, P], R],
) -> Callable[Concatenate[Tensor, P], R]:
    """The operation without autocast, which would round the factors of its products to 16 bits.

    Its first argument, given by its place, is a tensor on the device that it runs on.
    """

    @wraps(operation)
    def run(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not autocasts(x.device.type):
            return operation(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return operation(x, *args, **kwargs)

    return run


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


@in_full_precision
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


@in_full_precision
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

    Keys behind the last query, from start + T on, are not read.
    Errors: ValueError or TypeError that names the argument. Source: section 3.3.3.
    """
    require_attention_inputs(q, k, v)
    require_keys_for_every_query(q, k, start)
    require_scale(scale)
    if window is not None:
        require_int("window", window, at_least=1)
    return attend_in_window(q, k, v, window, scale, start)


def seen(x: Float[Tensor, "B G S D"], q: Tensor, start: int) -> Float[Tensor, "B G _ D"]:
    """The keys or values up to the last query's position: what lies behind may be anything."""
    return x[:, :, : start + q.shape[2]]


def attend_in_window(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None, start: int
) -> Tensor:
    """window_attention without its checks; a window that cuts nothing off is dense."""
    k = seen(k, q, start)
    v = seen(v, q, start)
    if window is None or window >= start + q.shape[2]:
        s = torch.arange(k.shape[2], device=q.device)
        return attend(q, k, v, s <= query_positions(q, start)[:, None], scale)[0]
    return attend_in_chunks(q, k, v, window, scale, start)


def attend_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None, start: int
) -> Tensor:
    """attend_in_window with c = min(w, T) queries to a row of a batch, which share c + w - 1 keys.

    Query r of a chunk reads its keys r .. r + w - 1, but for those before the sequence's first.
    """
    batch, _, length, _ = q.shape
    size = min(window, length)
    count = -(-length // size)
    behind = count * size - length  # fills up the last chunk
    chunks = pad(q, (0, 0, 0, behind)).unflatten(2, (count, size))  # (B, H, chunks, c, D)
    r = torch.arange(size, device=q.device)[:, None]
    s = torch.arange(size + window - 1, device=q.device)
    first = torch.arange(count, device=q.device) * size + start - window + 1
    mask = (s >= r) & (s < r + window) & (first[:, None, None] + s >= 0)  # (chunks, c, c + w - 1)
    mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)[:, None, None]
    keys = shared_keys(k, start, window, size, behind)
    values = shared_keys(v, start, window, size, behind)
    out, _ = attend(chunks.transpose(1, 2).flatten(0, 1), keys, values, mask, scale)
    out = out.unflatten(0, (batch, count)).transpose(1, 2)  # (B, H, chunks, c, Dv)
    return out.flatten(2, 3)[:, :, :length]


def shared_keys(
    x: Float[Tensor, "B G S D"], start: int, window: int, size: int, behind: int
) -> Float[Tensor, "B_chunks G keys D"]:
    """The c + w - 1 keys, or values, that each chunk of c queries reads, 0 outside the sequence."""
    before = window - 1 - start  # of the first query's window, keys that do not exist
    x = accurate(x[:, :, max(0, -before) :])  # chunks share keys: gradients add without rounding
    x = pad(x, (0, 0, max(0, before), behind))
    return x.unfold(2, size + window - 1, size).permute(0, 2, 1, 4, 3).flatten(0, 1)


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
