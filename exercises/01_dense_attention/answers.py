"""Planted wrong answers that the checks of set 01 must name, and right ones they must accept."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from exercises.records import Wrong

# --- 01.1 ---


def heads_by_repeat(heads, kv_heads):
    return torch.arange(kv_heads).repeat_interleave(heads // kv_heads)


def heads_by_loop(heads, kv_heads):
    groups = []
    for g in range(kv_heads):
        groups += [g] * (heads // kv_heads)
    return groups


def heads_by_scaling(heads, kv_heads):
    return tuple(math.floor(h * kv_heads / heads + 1e-9) for h in range(heads))


HEADS = [
    Wrong("dealt out in turn", lambda H, G: [h % G for h in range(H)], "neighbours"),
    Wrong("divided by G, not by R", lambda H, G: [h // G for h in range(H)], "there are 0 to 1"),
    Wrong("counted from 1", lambda H, G: [h * G // H + 1 for h in range(H)], "there are 0 to"),
    Wrong("one entry a group", lambda H, G: list(range(G)), "8 query heads"),
    Wrong("not rounded down", lambda H, G: [h * G / H for h in range(H)], "a float, and an int"),
    Wrong(
        "groups in reverse",
        lambda H, G: [G - 1 - h * G // H for h in range(H)],
        "which belongs to other heads",
    ),
    Wrong(
        "last group takes the rest",
        lambda H, G: [min(h, G - 1) for h in range(H)],
        "each serves equally many",
    ),
]

# --- 01.2 ---


def attention_by_loop(q, k, v):
    rows = []
    for t in range(len(q)):
        scores = [float(q[t] @ k[s]) / math.sqrt(q.shape[1]) for s in range(t + 1)]
        weights = [math.exp(s - max(scores)) for s in scores]
        rows.append(sum(w / sum(weights) * v[s] for s, w in enumerate(weights)))
    return torch.stack(rows)


def attention_by_torch(q, k, v):
    return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


def attention_with_bias(q, k, v):
    bias = torch.full((len(q), len(k)), -torch.inf, dtype=torch.float64).triu(1)
    scores = torch.einsum("td,sd->ts", q.double() / q.shape[1] ** 0.5, k.double()) + bias
    return torch.einsum("ts,sv->tv", scores.softmax(-1), v.double())


def attention(scale=lambda d, dv: d**-0.5, mask=torch.tril, dim=-1):
    """The right answer with one step changed."""

    def answer(q, k, v):
        seen = mask(torch.ones(len(q), len(k))).bool()
        scores = q @ k.T * scale(q.shape[1], v.shape[1])
        return scores.masked_fill(~seen, -torch.inf).softmax(dim) @ v

    return answer


def exp_without_the_largest(q, k, v):
    e = (q @ k.T * q.shape[1] ** -0.5).exp().tril()
    return e @ v / e.sum(-1, keepdim=True)


def mask_in_place(q, k, v):
    q /= q.shape[1] ** 0.5
    return (q @ k.T).masked_fill(torch.ones(len(q), len(k)).triu(1).bool(), -1e9).softmax(-1) @ v


ATTENTION = [
    Wrong("no mask", attention(mask=lambda x: x), "query 0 reads all 12 keys"),
    Wrong(
        "mask after the softmax",
        lambda q, k, v: (q @ k.T * q.shape[1] ** -0.5).softmax(-1).tril() @ v,
        "the mask came after the softmax",
    ),
    Wrong("the other triangle", attention(mask=torch.triu), "the other way round"),
    Wrong("own key left out", attention(mask=lambda x: x.tril(-1)), "does it see no key at all"),
    Wrong("softmax over the queries", attention(dim=0), "do not sum to 1"),
    Wrong("no scale", attention(scale=lambda d, dv: 1.0), "not divided by the root of the width"),
    Wrong("scale by the width", attention(scale=lambda d, dv: 1 / d), "not by its root"),
    Wrong(
        "scale by the values' width",
        attention(scale=lambda d, dv: dv**-0.5),
        "root of the values' width",
    ),
    Wrong("exp without the largest score", exp_without_the_largest, "exp of a large score"),
    Wrong("q scaled in place", mask_in_place, "changed its input q"),
]

# --- 01.3 ---


def merge_one_by_one(outs, lses):
    out, lse = torch.zeros_like(outs[0]), torch.full_like(lses[0], -torch.inf)
    for one, its_lse in zip(outs, lses, strict=True):
        both = torch.logaddexp(lse, its_lse)
        safe = both.masked_fill(both == -torch.inf, 0.0)
        out = out * (lse - safe).exp()[:, None] + one * (its_lse - safe).exp()[:, None]
        lse = both
    return out, lse


def merge_by_largest(outs, lses):
    top = lses.double().amax(0).clamp(min=-1e30)
    weight = (lses.double() - top).exp()
    total = weight.sum(0)
    return (
        torch.einsum("pt,ptv->tv", weight, outs.double()) / total.clamp(min=1e-30)[:, None],
        total.log() + top,
    )


def merge_by_softmax(outs, lses):
    share = lses.softmax(0).nan_to_num(nan=0.0)
    return (share.unsqueeze(-1) * outs).sum(0), lses.logsumexp(0)


def merge(
    share=lambda lses: lses.softmax(0).nan_to_num(nan=0.0), total=lambda lses: lses.logsumexp(0)
):
    """The right answer with one step changed."""
    return lambda outs, lses: ((share(lses)[..., None] * outs).sum(0), total(lses))


def share_by_exp(lses):
    return (lses.exp() / lses.exp().sum(0)).nan_to_num(nan=0.0)


MERGE = [
    Wrong("plain mean", merge(share=lambda x: torch.full_like(x, 1 / len(x))), "counts alike"),
    Wrong("plain sum", merge(share=torch.ones_like), "were added up"),
    Wrong("softmax over the queries", merge(share=lambda x: x.softmax(1)), "over the queries"),
    Wrong("weights are the lse", merge(share=lambda x: x / x.sum(0)), "which is a logarithm"),
    Wrong(
        "the heaviest piece only",
        merge(share=lambda x: (x == x.amax(0)).float()),
        "only the piece with the largest lse",
    ),
    Wrong("lse added", merge(total=lambda x: x.sum(0)), "no sum of logs"),
    Wrong("largest lse", merge(total=lambda x: x.amax(0)), "the largest of the pieces"),
    Wrong("lse without logarithm", merge(total=lambda x: x.exp().sum(0)), "without its logarithm"),
    Wrong(
        "exp of a large lse",
        merge(share=lambda x: x.exp() / x.exp().sum(0), total=lambda x: x.exp().sum(0).log()),
        "-inf minus -inf",
    ),
    Wrong("overflow", merge(total=lambda x: x.exp().sum(0).log()), "overflows"),
    Wrong("NaN where all is empty", merge(share=lambda x: x.softmax(0)), "-inf minus -inf"),
    Wrong("out alone", lambda outs, lses: merge()(outs, lses)[0], "2 results were asked for"),
]

# --- 01.4 ---


def cost_in_steps(length, heads, kv_heads, head_dim, value_dim, bytes_per_number):
    scores = heads * length * (2 * head_dim)
    values = heads * length * (2 * value_dim)
    cache = kv_heads * length * head_dim + kv_heads * length * value_dim
    return scores + values, bytes_per_number * cache


def cost_by_groups(length, heads, kv_heads, head_dim, value_dim, bytes_per_number):
    kept = length * (head_dim + value_dim) * kv_heads
    sharing = heads // kv_heads
    return [2 * sharing * kept, kept * bytes_per_number]


def cost_by_tensors(length, heads, kv_heads, head_dim, value_dim, bytes_per_number):
    k, v = torch.empty(kv_heads, length, head_dim), torch.empty(kv_heads, length, value_dim)
    numbers = k.numel() + v.numel()
    return torch.tensor(2 * numbers * heads // kv_heads), torch.tensor(numbers * bytes_per_number)


def cost(
    flops=lambda T, H, G, D, Dv: 2 * (D + Dv) * H * T,
    loaded=lambda T, H, G, D, Dv, b: b * (D + Dv) * G * T,
):
    """The right answer with one count changed."""
    return lambda T, H, G, D, Dv, b: (flops(T, H, G, D, Dv), loaded(T, H, G, D, Dv, b))


COST = [
    Wrong(
        "multiply-add as one",
        cost(flops=lambda T, H, G, D, Dv: (D + Dv) * H * T),
        "a multiply and an add count as one",
    ),
    Wrong(
        "groups compute",
        cost(flops=lambda T, H, G, D, Dv: 2 * (D + Dv) * G * T),
        "every query head computes",
    ),
    Wrong(
        "values forgotten in the work",
        cost(flops=lambda T, H, G, D, Dv: 2 * D * H * T),
        "the weighted values are not",
    ),
    Wrong(
        "all queries",
        cost(flops=lambda T, H, G, D, Dv: 2 * (D + Dv) * H * T * T),
        "one token is decoded",
    ),
    Wrong(
        "Dv taken for D",
        cost(flops=lambda T, H, G, D, Dv: 4 * D * H * T),
        "as if the values were as wide",
    ),
    Wrong(
        "a load for each head",
        cost(loaded=lambda T, H, G, D, Dv, b: b * (D + Dv) * H * T),
        "share one load",
    ),
    Wrong(
        "numbers, not bytes", cost(loaded=lambda T, H, G, D, Dv, b: (D + Dv) * G * T), "not bytes"
    ),
    Wrong(
        "values forgotten in the load",
        cost(loaded=lambda T, H, G, D, Dv, b: b * D * G * T),
        "the values are not",
    ),
    Wrong(
        "2 bytes always",
        cost(loaded=lambda T, H, G, D, Dv, b: 2 * (D + Dv) * G * T),
        "as if every number took 2 bytes",
    ),
    Wrong("a float", cost(flops=lambda T, H, G, D, Dv: 2e0 * (D + Dv) * H * T), "a float"),
]

# --- 01.5 ---


def decode_by_loop(q, k, v, start):
    out = torch.zeros(*q.shape[:3], v.shape[3])
    sharing = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                keys = k[b, h // sharing, : start + t + 1]
                weights = (keys @ q[b, h, t] / q.shape[3] ** 0.5).softmax(0)
                out[b, h, t] = weights @ v[b, h // sharing, : start + t + 1]
    return out


def decode_by_torch(q, k, v, start):
    end = start + q.shape[2]
    mask = torch.ones(q.shape[2], end).tril(start).bool()
    return F.scaled_dot_product_attention(
        q, k[:, :, :end], v[:, :, :end], attn_mask=mask, enable_gqa=True
    )


def decode_by_repeat(q, k, v, start):
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s, t = torch.arange(k.shape[2]), torch.arange(q.shape[2])
    late = s > (t + start).unsqueeze(1)
    scores = q.double() @ k.mT / q.shape[3] ** 0.5
    return scores.masked_fill(late, float("-inf")).softmax(-1) @ v


def decode(
    seen=lambda s, t, start, T: s <= t + start,
    scale=lambda d: d**-0.5,
    spread: str = "repeat_interleave",
):
    """The right answer with one step changed."""

    def answer(q, k, v, start):
        sharing = q.shape[1] // k.shape[1]

        def heads(x: Tensor) -> Tensor:
            if spread == "repeat":
                return x.repeat(1, sharing, 1, 1)
            return x.repeat_interleave(sharing, 1)

        s, t = torch.arange(k.shape[2]), torch.arange(q.shape[2])[:, None]
        scores = q @ heads(k).mT * scale(q.shape[3])
        mask = seen(s, t, start, q.shape[2]).expand(len(t), len(s))
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ heads(v)

    return answer


def causal_of_torch(q, k, v, start):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


DECODE = [
    Wrong("is_causal aligns with key 0", causal_of_torch, "as if it stood at 0"),
    Wrong("no mask", decode(seen=lambda s, t, start, T: s >= 0), "position 5, reads all 12 keys"),
    Wrong(
        "the chunk sees all of itself",
        decode(seen=lambda s, t, start, T: s < start + T),
        "reads the keys of later queries",
    ),
    Wrong(
        "own key left out",
        decode(seen=lambda s, t, start, T: s < (t + start).clamp(min=1)),
        "does not read its own key",
    ),
    Wrong("heads dealt out in turn", decode(spread="repeat"), "neighbours"),
    Wrong(
        "aligned with the end of the cache",
        lambda q, k, v, start: decode()(q, k, v, k.shape[2] - q.shape[2]),
        "that is not written yet",
    ),
    Wrong("no scale", decode(scale=lambda d: 1.0), "not divided by the root of the width"),
    Wrong(
        "batch dropped",
        lambda q, k, v, start: decode_by_loop(q[:1], k, v, start),
        "two sequences: the shape is",
    ),
    Wrong("heads not matched", lambda q, k, v, start: q @ k.mT @ v, "RuntimeError"),
]

RIGHT = {
    "01.1": [heads_by_repeat, heads_by_loop, heads_by_scaling],
    "01.2": [attention_by_loop, attention_by_torch, attention_with_bias],
    "01.3": [merge_one_by_one, merge_by_largest, merge_by_softmax],
    "01.4": [cost_in_steps, cost_by_groups, cost_by_tensors],
    "01.5": [decode_by_loop, decode_by_torch, decode_by_repeat],
}
WRONG = {"01.1": HEADS, "01.2": ATTENTION, "01.3": MERGE, "01.4": COST, "01.5": DECODE}
