"""Set 01's mistakes that the checks know by what they give: the right one, one step changed."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from exercises.records import Mistake

# --- 01.2: causal attention ---


def attention(scale=lambda d, dv: d**-0.5, mask=torch.tril, dim=-1, fill=-torch.inf) -> Callable:
    """Causal attention; mask turns ones (T, T) into what is seen, dim is the softmax's axis."""

    def answer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = mask(torch.ones(len(q), len(k))).bool()
        scores = q @ k.T * scale(q.shape[1], v.shape[1])
        return scores.masked_fill(~seen, fill).softmax(dim) @ v

    return answer


def masked_after_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights of late keys are set to 0 once they have been counted in the sum of their row."""
    p = (q @ k.T * q.shape[1] ** -0.5).softmax(-1)
    return p.tril() @ v


def bounded(q: Tensor, k: Tensor) -> Tensor:
    """The scores between -30 and 30, as queries to keys that are the identity."""
    return (q @ k.T * q.shape[1] ** -0.5).clamp(-30, 30) * len(k) ** 0.5


ATTENTION = [
    Mistake(
        "no mask",
        attention(mask=torch.ones_like),
        "query 0 reads all {length} keys, and only key 0 is not after it",
    ),
    Mistake(
        "mask after the softmax",
        masked_after_the_softmax,
        "the mask came after the softmax: keys after the query still count in the sum of a row",
    ),
    Mistake(
        "the other triangle",
        attention(mask=torch.triu),
        "query 0 reads the keys after it: the mask is the other way round",
    ),
    Mistake(
        "softmax over the queries",
        attention(dim=0),
        "the weights that one query gives to its keys do not sum to 1",
    ),
    Mistake(
        "no scale",
        attention(scale=lambda d, dv: 1.0),
        "the scores are not divided by the root of the width",
    ),
    Mistake(
        "scale by the width",
        attention(scale=lambda d, dv: 1 / d),
        "the scores are divided by the width, not by its root",
    ),
    Mistake(
        "scale by the values' width",
        attention(scale=lambda d, dv: dv**-0.5),
        "the scores are divided by the root of the values' width, not the keys'",
    ),
    Mistake(
        "scale for a width of 4",
        attention(scale=lambda d, dv: 0.5),
        "the scores are divided by 2, whatever the width",
    ),
    Mistake(
        "masked with -1e4",
        attention(fill=-1e4),
        "a masked key has a finite score, and the true ones lie below it: fill with -inf",
    ),
    Mistake(
        "scores held between bounds",
        lambda q, k, v: attention()(bounded(q, k), torch.eye(len(k)), v),
        "the scores are held between bounds, so that keys far apart weigh the same",
    ),
]

# --- 01.3: merge the pieces of a softmax ---


def shares_of(lses: Tensor) -> Tensor:
    """The share of each piece, (P, T); 0 where all pieces are empty."""
    return lses.softmax(0).nan_to_num(nan=0.0)


def merge(share=shares_of, total=lambda lses: lses.logsumexp(0)) -> Callable:
    """The merged output and log-sum-exp, from the shares of the pieces and their total."""
    return lambda outs, lses: ((share(lses)[..., None] * outs).sum(0), total(lses))


def running(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Pieces merged one by one, with the lse of the piece before in place of the running one."""
    out = outs[0]
    for one, last, its in zip(outs[1:], lses, lses[1:], strict=False):
        share = shares_of(torch.stack([last, its]))[..., None]
        out = share[0] * out + share[1] * one
    return out, lses.logsumexp(0)


def whole_pieces(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Only the pieces that every query sees something of."""
    whole = (lses > -torch.inf).all(1)
    return (shares_of(lses[whole])[..., None] * outs[whole]).sum(0), lses.logsumexp(0)


SHARES = [  # the output is wrong, whatever the lse
    Mistake(
        "plain mean",
        merge(share=lambda lses: torch.full_like(lses, 1 / len(lses))),
        "every piece counts alike, and a piece with more weight must count more",
    ),
    Mistake(
        "plain sum",
        merge(share=torch.ones_like),
        "the pieces were added up: their shares must sum to 1",
    ),
    Mistake(
        "softmax over the queries",
        merge(share=lambda lses: lses.softmax(1)),
        "the shares run over the queries, not over the pieces",
    ),
    Mistake(
        "weights are the lse",
        merge(share=lambda lses: lses / lses.sum(0)),
        "each piece counts by its lse, which is a logarithm",
    ),
    Mistake(
        "the heaviest piece only",
        merge(share=lambda lses: (lses == lses.amax(0)).float()),
        "only the piece with the largest lse counts",
    ),
    Mistake(
        "two pieces only",
        lambda outs, lses: merge()(outs[:2], lses[:2]),
        "only the first two pieces were merged",
    ),
    Mistake(
        "the last lse as the running one",
        running,
        "each piece was merged with the one before it alone: the running lse must grow",
    ),
    Mistake(
        "an empty piece has lse 0",
        merge(share=lambda lses: shares_of(lses.masked_fill(lses == -torch.inf, 0.0))),
        "an empty piece counts as if its lse were 0",
    ),
    Mistake(
        "lse held above -1e4",
        merge(share=lambda lses: shares_of(lses.clamp(min=-1e4))),
        "log-sum-exps below a bound were raised to it: an empty piece has -inf, no large number",
    ),
    Mistake(
        "dropped where any query has nothing",
        whole_pieces,
        "a piece that is empty for one query was dropped for all of them",
    ),
]
TOTALS = [  # the output is right, the lse is not
    Mistake(
        "lse added",
        merge(total=lambda lses: lses.sum(0)),
        "out is right, but the lse of the pieces were added: a log of a sum is no sum of logs",
    ),
    Mistake(
        "largest lse",
        merge(total=lambda lses: lses.amax(0)),
        "out is right, but lse is the largest of the pieces",
    ),
    Mistake(
        "mean lse",
        merge(total=lambda lses: (shares_of(lses) * lses).nansum(0)),
        "out is right, but lse is the mean of the pieces",
    ),
    Mistake(
        "lse without logarithm",
        merge(total=lambda lses: lses.exp().sum(0)),
        "out is right, but lse is the sum itself, without its logarithm",
    ),
    Mistake(
        "lse in base 2",
        merge(total=lambda lses: lses.logsumexp(0) / math.log(2)),
        "out is right, but lse has another base than e",
    ),
    Mistake(
        "lse never negative",
        merge(total=lambda lses: lses.logsumexp(0).relu()),
        "out is right, but a negative lse became 0: a sum of exponentials may be below 1",
    ),
]

# --- 01.4: what one decoded token costs ---


def cost(
    flops=lambda T, H, G, D, Dv: 2 * (D + Dv) * H * T,
    loaded=lambda T, H, G, D, Dv, b: b * (D + Dv) * G * T,
) -> Callable:
    """The work and the bytes, each counted by its own formula."""
    return lambda T, H, G, D, Dv, b: (flops(T, H, G, D, Dv), loaded(T, H, G, D, Dv, b))


FLOPS = [
    Mistake(
        "multiply-add as one",
        cost(flops=lambda T, H, G, D, Dv: (D + Dv) * H * T),
        "flops: a multiply and an add count as one",
    ),
    Mistake(
        "groups compute",
        cost(flops=lambda T, H, G, D, Dv: 2 * (D + Dv) * G * T),
        "flops: counted for the key/value heads, and every query head computes",
    ),
    Mistake(
        "values forgotten in the work",
        cost(flops=lambda T, H, G, D, Dv: 2 * D * H * T),
        "flops: the scores are counted, the weighted values are not",
    ),
    Mistake(
        "Dv taken for D",
        cost(flops=lambda T, H, G, D, Dv: 4 * D * H * T),
        "flops: counted as if the values were as wide as the keys",
    ),
    Mistake(
        "all queries",
        cost(flops=lambda T, H, G, D, Dv: 2 * (D + Dv) * H * T * T),
        "flops: counted for a whole sequence of queries, and one token is decoded",
    ),
    Mistake(
        "one head",
        cost(flops=lambda T, H, G, D, Dv: 2 * (D + Dv) * T),
        "flops: counted for a single head",
    ),
]
BYTES = [
    Mistake(
        "a load for each head",
        cost(loaded=lambda T, H, G, D, Dv, b: b * (D + Dv) * H * T),
        "bytes: counted for each query head, and heads of a group share one load",
    ),
    Mistake(
        "numbers, not bytes",
        cost(loaded=lambda T, H, G, D, Dv, b: (D + Dv) * G * T),
        "bytes: numbers were counted, not bytes",
    ),
    Mistake(
        "values forgotten in the load",
        cost(loaded=lambda T, H, G, D, Dv, b: b * D * G * T),
        "bytes: the keys are counted, the values are not",
    ),
    Mistake(
        "2 bytes always",
        cost(loaded=lambda T, H, G, D, Dv, b: 2 * (D + Dv) * G * T),
        "bytes: counted as if every number took 2 bytes",
    ),
    Mistake(
        "Dv taken for D in the load",
        cost(loaded=lambda T, H, G, D, Dv, b: b * 2 * D * G * T),
        "bytes: counted as if the values were as wide as the keys",
    ),
]

# --- 01.5: decode from a cache ---


def decode(
    seen=lambda s, t, start, T: s <= t + start,
    scale=lambda d, dv: d**-0.5,
    heads=lambda x, R: x.repeat_interleave(R, 1),
    places=lambda last, room: last,
    fill=-torch.inf,
) -> Callable:
    """Attention to a cache; seen says which places s query t of T reads, heads deals out groups.

    places says how many places of the cache are touched at all.
    """

    def answer(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        end = places(start + q.shape[2], k.shape[2])
        k, v = (heads(x[:, :, :end], q.shape[1] // x.shape[1]) for x in (k, v))
        s = torch.arange(end)
        t = torch.arange(q.shape[2])[:, None]
        scores = q @ k.mT * scale(q.shape[3], v.shape[3])
        mask = seen(s, t, start, q.shape[2]).expand(len(t), len(s))
        return scores.masked_fill(~mask, fill).softmax(-1) @ v

    return answer


def whole_cache(last: int, room: int) -> int:
    """Every place, written or not."""
    return room


DECODE = [
    Mistake(
        "masked as if it began at 0",
        decode(seen=lambda s, t, start, T: s <= t),
        "the first query stands at position {start}, and was masked as if it stood at 0",
    ),
    Mistake(
        "no mask",
        decode(seen=lambda s, t, start, T: s >= 0, places=whole_cache),
        "query 0, at position {start}, reads all {places} keys",
    ),
    Mistake(
        "the chunk sees all of itself",
        decode(seen=lambda s, t, start, T: s < start + T),
        "query 0, at position {start}, reads the keys of later queries, up to {last}",
    ),
    Mistake(
        "own key left out",
        decode(seen=lambda s, t, start, T: s < (t + start).clamp(min=1)),
        "query 0 stands at position {start}, and does not read its own key",
    ),
    Mistake(
        "heads dealt out in turn",
        decode(heads=lambda x, R: x.repeat(1, R, 1, 1)),
        "head h reads key/value head h % G: a group's heads are neighbours",
    ),
    Mistake(
        "group 0 for all heads",
        decode(heads=lambda x, R: x[:, :1].expand(-1, R * x.shape[1], -1, -1)),
        "every head reads the keys and values of group 0",
    ),
    Mistake(
        "keys of sequence 0",
        decode(heads=lambda x, R: x[:1].repeat_interleave(R, 1)),
        "every sequence of the batch reads the cache of sequence 0",
    ),
    Mistake(
        "aligned with the end of the cache",
        decode(seen=lambda s, t, start, T: s <= t + len(s) - T, places=whole_cache),
        "the last query was aligned with the last place of the cache, {end}, and that is not "
        "written yet",
    ),
    Mistake(
        "no scale",
        decode(scale=lambda d, dv: 1.0),
        "the scores are not divided by the root of the width",
    ),
    Mistake(
        "scale for a width of 4",
        decode(scale=lambda d, dv: 0.5),
        "the scores are divided by 2, whatever the width",
    ),
    Mistake(
        "scale by the values' width",
        decode(scale=lambda d, dv: dv**-0.5),
        "the scores are divided by the root of the values' width, not the keys'",
    ),
    Mistake(
        "masked with -1e4",
        decode(fill=-1e4),
        "a masked key has a finite score, and the true ones lie below it: fill with -inf",
    ),
]
