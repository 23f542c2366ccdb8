"""Set 01's answers, for teachers: right ones in several styles, and wrong ones to be named.

The mistakes of mistakes.py are planted as they stand. The others are written by hand, in other
styles or with faults of another kind, so that no mistake is judged by itself alone.
"""

import math

import torch
import torch.nn.functional as F

from exercises.records import Wrong, planted

from . import mistakes

# --- 01.1 ---


def heads_by_repeat(heads, kv_heads):
    """Each group number R times."""
    return torch.arange(kv_heads).repeat_interleave(heads // kv_heads)


def heads_by_loop(heads, kv_heads):
    """Group after group."""
    groups = []
    for g in range(kv_heads):
        groups += [g] * (heads // kv_heads)
    return groups


def heads_by_scaling(heads, kv_heads):
    """The place of a head, scaled to the groups and rounded down; a tuple."""
    return tuple(math.floor(h * kv_heads / heads + 1e-9) for h in range(heads))


def cached_by_heads():
    """The list of the first call with as many heads, whatever the groups."""
    found = {}
    return lambda H, G: found.setdefault(H, [h * G // H for h in range(H)])


HEADS = [
    Wrong("always two heads a group", lambda H, G: [h // 2 for h in range(H)], "there are 0 to 1"),
    Wrong("always two groups", lambda H, G: [h // (H // 2) for h in range(H)], "serve"),
    Wrong("each group twice", lambda H, G: [g for g in range(G) for _ in range(2)], "8 query"),
    Wrong(
        "shifted by the bits of R",
        lambda H, G: [h >> ((H // G).bit_length() - 1) for h in range(H)],
        "there are 0 to 1",
    ),
    Wrong("rounded to the nearest", lambda H, G: [round(h * G / H) for h in range(H)], "there are"),
    Wrong("kept for the number of heads", cached_by_heads(), "there are 0 to 1"),
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
    """One query at a time, with Python's own exp."""
    rows = []
    for t in range(len(q)):
        scores = [float(q[t] @ k[s]) / math.sqrt(q.shape[1]) for s in range(t + 1)]
        weights = [math.exp(s - max(scores)) for s in scores]
        rows.append(sum(w / sum(weights) * v[s] for s, w in enumerate(weights)))
    return torch.stack(rows)


def attention_by_torch(q, k, v):
    """PyTorch's fused attention."""
    return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


def attention_with_bias(q, k, v):
    """A bias of -inf in place of a mask, in double."""
    bias = torch.full((len(q), len(k)), -torch.inf, dtype=torch.float64).triu(1)
    scores = torch.einsum("td,sd->ts", q.double() / q.shape[1] ** 0.5, k.double()) + bias
    return torch.einsum("ts,sv->tv", scores.softmax(-1), v.double())


def exp_without_the_largest(q, k, v):
    """Right as long as no score is large."""
    e = (q @ k.T * q.shape[1] ** -0.5).exp().tril()
    return e @ v / e.sum(-1, keepdim=True)


def scaled_in_place(q, k, v):
    """Right, but for q, which the caller still needs."""
    q /= q.shape[1] ** 0.5
    late = torch.ones(len(q), len(k)).triu(1).bool()
    return (q @ k.T).masked_fill(late, -1e9).softmax(-1) @ v


def attention_by_exp(largest):
    """exp of the scores less `largest` of them, (T, T) and what is seen, over its sum."""

    def answer(q, k, v):
        seen = torch.ones(len(q), len(k)).tril().bool()
        scores = q @ k.T * q.shape[1] ** -0.5
        e = (scores - largest(scores.masked_fill(~seen, -torch.inf))).exp() * seen
        return e @ v / e.sum(-1, keepdim=True)

    return answer


def one_mask_for_all():
    """The mask of the first call, for all later ones."""
    kept = []

    def answer(q, k, v):
        kept.append(torch.ones(len(q), len(k)).triu(1).bool())
        scores = (q @ k.T * q.shape[1] ** -0.5).masked_fill(kept[0], -torch.inf)
        return scores.softmax(-1) @ v

    return answer


def values_as_wide_as_queries(q, k, v):
    """The output is made like q."""
    out = torch.zeros_like(q)
    for t in range(len(q)):
        out[t] = (k[: t + 1] @ q[t] / q.shape[1] ** 0.5).softmax(0) @ v[: t + 1]
    return out


ATTENTION = [
    Wrong(
        "late keys lowered by 1e4",
        lambda q, k, v: (
            (q @ k.T * q.shape[1] ** -0.5 - 1e4 * torch.ones(len(q), len(k)).triu(1)).softmax(-1)
            @ v
        ),
        "later keys far above: query 0",
    ),
    Wrong(
        "scale by a whole root",
        mistakes.attention(scale=lambda d, dv: 1 / int(d**0.5)),
        "which is wrong",
    ),
    Wrong(
        "largest score from 0 on",
        attention_by_exp(lambda scores: scores.amax(-1, keepdim=True).clamp(min=0)),
        "of a very negative one it is 0",
    ),
    Wrong("one largest score for all", attention_by_exp(torch.amax), "of a very negative one"),
    Wrong(
        "largest score of key 0",
        attention_by_exp(lambda scores: scores[:, :1]),
        "exp of a large score overflows",
    ),
    Wrong(
        "the newest 16 keys",
        mistakes.attention(mask=lambda x: x.tril().triu(-15)),
        "equal scores: query 16",
    ),
    Wrong("mask of the first call", one_mask_for_all(), "reads all 12 keys"),
    Wrong("output made like q", values_as_wide_as_queries, "raised RuntimeError"),
    Wrong(
        "half precision",
        lambda q, k, v: mistakes.attention()(q.half(), k.half(), v.half()).float(),
        "exp of a large score overflows",
    ),
    *planted(mistakes.ATTENTION, {"no mask": "query 0 reads all 12 keys"}),
    Wrong(
        "no mask, by PyTorch",
        lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None])[0],
        "query 0 reads all 12 keys, and only key 0 is not after it",
    ),
    Wrong(
        "no scale, by PyTorch",
        lambda q, k, v: attention_by_torch(q * q.shape[1] ** 0.5, k, v),
        "not divided by the root of the width",
    ),
    Wrong(
        "own key left out",
        mistakes.attention(mask=lambda x: x.tril(-1)),
        "does it see no key at all",
    ),
    Wrong("exp without the largest score", exp_without_the_largest, "exp of a large score"),
    Wrong("q scaled in place", scaled_in_place, "changed its input q"),
]

# --- 01.3 ---


def merge_one_by_one(outs, lses):
    """A running merge of two at a time."""
    out = torch.zeros_like(outs[0])
    lse = torch.full_like(lses[0], -torch.inf)
    for one, its_lse in zip(outs, lses, strict=True):
        both = torch.logaddexp(lse, its_lse)
        safe = both.masked_fill(both == -torch.inf, 0.0)
        out = out * (lse - safe).exp()[:, None] + one * (its_lse - safe).exp()[:, None]
        lse = both
    return out, lse


def merge_by_largest(outs, lses):
    """Weights relative to the heaviest piece, in double."""
    top = lses.double().amax(0).clamp(min=-1e30)
    weight = (lses.double() - top).exp()
    total = weight.sum(0)
    return (
        torch.einsum("pt,ptv->tv", weight, outs.double()) / total.clamp(min=1e-30)[:, None],
        total.log() + top,
    )


def merge_by_softmax(outs, lses):
    """The shares are a softmax of the lse."""
    share = lses.softmax(0).nan_to_num(nan=0.0)
    return (share.unsqueeze(-1) * outs).sum(0), lses.logsumexp(0)


def mean_of_pieces(outs, lses):
    """Every piece counts alike."""
    return sum(outs) / len(outs), lses.logsumexp(0)


def exp_of_lse(outs, lses):
    """Divides sums of exp, which are 0 where all is empty and infinite where lse is large."""
    weights = lses.exp()
    total = weights.sum(0)
    return (weights[..., None] * outs).sum(0) / total[:, None], total.log()


def lse_added_one_by_one(outs, lses):
    """A right output; the lse of the pieces are added up."""
    out, _ = merge_one_by_one(outs, lses)
    total = torch.zeros_like(lses[0])
    for lse in lses:
        total = total + lse
    return out, total


def merge_relative_to(reference):
    """exp of each lse less a reference, over its sum; 0 where all is empty."""

    def answer(outs, lses):
        top = reference(lses)
        weights = (lses - top).exp()
        total = weights.sum(0)
        out = (weights[..., None] * outs).sum(0) / total.clamp(min=1e-38)[:, None]
        return out, total.log() + top

    return answer


def merge_in_place(outs, lses):
    """Right, but for outs, which the caller still needs."""
    total = lses.logsumexp(0)
    outs *= (lses - total.masked_fill(total == -torch.inf, 0)).exp()[..., None]
    return outs.sum(0), total


MERGE = [
    Wrong(
        "largest lse from 0 on",
        merge_relative_to(lambda lses: lses.amax(0).clamp(min=0)),
        "of a very negative one it is 0",
    ),
    Wrong("one largest lse for all", merge_relative_to(torch.amax), "-inf minus -inf"),
    Wrong(
        "relative to piece 0",
        merge_relative_to(lambda lses: lses[0].nan_to_num(neginf=0)),
        "exp of a large log-sum-exp overflows",
    ),
    Wrong(
        "relative to the mean",
        merge_relative_to(lambda lses: lses.nan_to_num(neginf=0).mean(0)),
        "exp of a large log-sum-exp overflows",
    ),
    Wrong(
        "lse held above -100",
        mistakes.merge(share=lambda lses: lses.clamp(min=-100.0).softmax(0)),
        "every piece counts alike",
    ),
    Wrong("merged in place", merge_in_place, "changed its input outs"),
    *planted(mistakes.SHARES),
    *planted(mistakes.TOTALS),
    Wrong("plain mean, by hand", mean_of_pieces, "every piece counts alike"),
    Wrong("lse added, one by one", lse_added_one_by_one, "no sum of logs"),
    Wrong("exp of a large lse", exp_of_lse, "-inf minus -inf"),
    Wrong("overflow", mistakes.merge(total=lambda lses: lses.exp().sum(0).log()), "overflows"),
    Wrong(
        "NaN where all is empty",
        mistakes.merge(share=lambda lses: lses.softmax(0)),
        "-inf minus -inf",
    ),
    Wrong("out alone", lambda *pieces: merge_by_softmax(*pieces)[0], "2 results were asked for"),
]

# --- 01.4 ---


def cost_in_steps(length, heads, kv_heads, head_dim, value_dim, bytes_per_number):
    """Scores and values apart."""
    scores = heads * length * (2 * head_dim)
    values = heads * length * (2 * value_dim)
    cache = kv_heads * length * head_dim + kv_heads * length * value_dim
    return scores + values, bytes_per_number * cache


def cost_by_groups(length, heads, kv_heads, head_dim, value_dim, bytes_per_number):
    """What is kept, times the heads that share it."""
    kept = length * (head_dim + value_dim) * kv_heads
    sharing = heads // kv_heads
    return [2 * sharing * kept, kept * bytes_per_number]


def cost_by_tensors(length, heads, kv_heads, head_dim, value_dim, bytes_per_number):
    """Counts the numbers of real tensors; returns tensors."""
    k = torch.empty(kv_heads, length, head_dim)
    v = torch.empty(kv_heads, length, value_dim)
    numbers = k.numel() + v.numel()
    return torch.tensor(2 * numbers * heads // kv_heads), torch.tensor(numbers * bytes_per_number)


def cost_of_heads_of_their_own(length, heads, kv_heads, head_dim, value_dim, bytes_per_number):
    """The work is right; every query head loads keys and values as if they were its own."""
    flops = 0
    loaded = 0
    for _head in range(heads):
        flops += 2 * length * head_dim + 2 * length * value_dim
        loaded += bytes_per_number * length * (head_dim + value_dim)
    return flops, loaded


def work_of_the_groups(length, heads, kv_heads, head_dim, value_dim, bytes_per_number):
    """The bytes are right; the work is counted once for each number that is loaded."""
    numbers = kv_heads * length * (head_dim + value_dim)
    return 2 * numbers, numbers * bytes_per_number


COST = [
    Wrong(
        "always two heads a group",
        mistakes.cost(flops=lambda T, H, G, D, Dv: 4 * G * T * (D + Dv)),
        "which is wrong",
    ),
    Wrong(
        "the new token on top",
        lambda T, *sizes: mistakes.cost()(T + 1, *sizes),
        "which is wrong",
    ),
    Wrong(
        "keys as wide as values",
        mistakes.cost(loaded=lambda T, H, G, D, Dv, b: b * 2 * Dv * G * T),
        "which is wrong",
    ),
    Wrong(
        "one addition fewer a sum",
        mistakes.cost(flops=lambda T, H, G, D, Dv: H * T * (2 * D - 1) + H * Dv * (2 * T - 1)),
        "which is wrong",
    ),
    *planted(mistakes.FLOPS),
    *planted(mistakes.BYTES),
    Wrong("groups compute, by numbers", work_of_the_groups, "every query head computes"),
    Wrong("a load for each head, by loop", cost_of_heads_of_their_own, "share one load"),
    Wrong(
        "a float",
        mistakes.cost(flops=lambda T, H, G, D, Dv: 2e0 * (D + Dv) * H * T),
        "a float",
    ),
]

# --- 01.5 ---


def decode_by_loop(q, k, v, start):
    """One query of one head at a time."""
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
    """PyTorch's fused attention, with a mask that starts later."""
    end = start + q.shape[2]
    mask = torch.ones(q.shape[2], end).tril(start).bool()
    return F.scaled_dot_product_attention(
        q, k[:, :, :end], v[:, :, :end], attn_mask=mask, enable_gqa=True
    )


def decode_by_repeat(q, k, v, start):
    """Keys and values repeated for each head, in double."""
    end = start + q.shape[2]
    k, v = (x[:, :, :end].double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    position = torch.arange(q.shape[2]) + start
    late = torch.arange(k.shape[2]) > position.unsqueeze(1)
    scores = q.double() @ k.mT / q.shape[3] ** 0.5
    return scores.masked_fill(late, float("-inf")).softmax(-1) @ v


def causal_of_torch(q, k, v, start):
    """PyTorch aligns its causal mask with key 0."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def heads_in_twos(q, k, v, start):
    """Two heads for each group, however many there are."""
    return mistakes.decode(heads=lambda x, sharing: x.repeat_interleave(2, 1))(q, k, v, start)


def room_read_and_masked(q, k, v, start):
    """The whole cache, with a weight of 0 for what is not written yet."""
    return mistakes.decode(places=mistakes.whole_cache)(q, k, v, start)


def room_cleared(q, k, v, start):
    """Right, but for the caller's cache."""
    for x in (k, v):
        x[:, :, start + q.shape[2] :] = 0
    return room_read_and_masked(q, k, v, start)


def decode_by_exp(largest):
    """exp of the scores less `largest` of them, over its sum."""

    def answer(q, k, v, start):
        end = start + q.shape[2]
        k, v = (x[:, :, :end].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        late = torch.ones(q.shape[2], end).triu(start + 1).bool()
        scores = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(late, -torch.inf)
        e = (scores - largest(scores)).exp()
        return e @ v / e.sum(-1, keepdim=True)

    return answer


DECODE = [
    Wrong("always two heads a group", heads_in_twos, "raised RuntimeError"),
    Wrong("room read with a weight of 0", room_read_and_masked, "not written yet"),
    Wrong(
        "no mask for one query",
        mistakes.decode(
            seen=lambda s, t, start, T: (s <= t + start) | (T == 1), places=mistakes.whole_cache
        ),
        "not written yet",
    ),
    Wrong("room cleared in place", room_cleared, "changed its input k"),
    Wrong("exp without the largest", decode_by_exp(lambda scores: 0.0), "exp of a large score"),
    Wrong(
        "largest score from 0 on",
        decode_by_exp(lambda scores: scores.amax(-1, keepdim=True).clamp(min=0)),
        "of a very negative one it is 0",
    ),
    Wrong(
        "the newest 16 keys",
        mistakes.decode(seen=lambda s, t, start, T: (s <= t + start) & (s > t + start - 16)),
        "equal scores: batch 0, head 0, query 0",
    ),
    *planted(mistakes.DECODE, {"no mask": "query 0, at position 5, reads all 12 keys"}),
    Wrong("is_causal aligns with key 0", causal_of_torch, "as if it stood at 0"),
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
