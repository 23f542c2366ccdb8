"""Set 01's mistakes that the checks know by what they give: the right one, one step changed."""

from collections.abc import Callable

import torch
from torch import Tensor

from exercises.records import Mistake

# --- 01.2: causal attention ---


def attention(scale=lambda d, dv: d**-0.5, mask=torch.tril, dim=-1) -> Callable:
    """Causal attention; mask turns ones (T, T) into what is seen, dim is the softmax's axis."""

    def answer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = mask(torch.ones(len(q), len(k))).bool()
        scores = q @ k.T * scale(q.shape[1], v.shape[1])
        return scores.masked_fill(~seen, -torch.inf).softmax(dim) @ v

    return answer


def masked_after_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights of late keys are set to 0 once they have been counted in the sum of their row."""
    p = (q @ k.T * q.shape[1] ** -0.5).softmax(-1)
    return p.tril() @ v


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
]

# --- 01.3: merge the pieces of a softmax ---


def shares_of(lses: Tensor) -> Tensor:
    """The share of each piece, (P, T); 0 where all pieces are empty."""
    return lses.softmax(0).nan_to_num(nan=0.0)


def merge(share=shares_of, total=lambda lses: lses.logsumexp(0)) -> Callable:
    """The merged output and log-sum-exp, from the shares of the pieces and their total."""
    return lambda outs, lses: ((share(lses)[..., None] * outs).sum(0), total(lses))


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
    scale=lambda d: d**-0.5,
    spread: str = "repeat_interleave",
) -> Callable:
    """Attention to a cache; seen says which places s query t of T reads, spread deals out heads."""

    def answer(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        sharing = q.shape[1] // k.shape[1]

        def heads(x: Tensor) -> Tensor:
            if spread == "repeat":
                return x.repeat(1, sharing, 1, 1)
            return x.repeat_interleave(sharing, 1)

        s = torch.arange(k.shape[2])
        t = torch.arange(q.shape[2])[:, None]
        scores = q @ heads(k).mT * scale(q.shape[3])
        mask = seen(s, t, start, q.shape[2]).expand(len(t), len(s))
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ heads(v)

    return answer


DECODE = [
    Mistake(
        "masked as if it began at 0",
        decode(seen=lambda s, t, start, T: s <= t),
        "the first query stands at position {start}, and was masked as if it stood at 0",
    ),
    Mistake(
        "no mask",
        decode(seen=lambda s, t, start, T: s >= 0),
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
        decode(spread="repeat"),
        "head h reads key/value head h % G: a group's heads are neighbours",
    ),
    Mistake(
        "aligned with the end of the cache",
        decode(seen=lambda s, t, start, T: s <= t + len(s) - T),
        "the last query was aligned with the last place of the cache, {end}, and that is not "
        "written yet",
    ),
    Mistake(
        "no scale",
        decode(scale=lambda d: 1.0),
        "the scores are not divided by the root of the width",
    ),
]
