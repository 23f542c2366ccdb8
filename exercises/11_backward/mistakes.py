"""Set 11's mistakes that the checks know by what they give: the right one, one step changed."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from exercises.records import Mistake

# --- 11.1: delta ---

DELTAS = [
    Mistake(
        "in the inputs' precision",
        lambda out, dout, dlse: (out * dout).sum(1) - dlse,
        "the sum is taken in the inputs' precision, and was asked for in float32",
    ),
    Mistake(
        "products rounded",
        lambda out, dout, dlse: (out * dout).float().sum(1) - dlse,
        "each product is rounded to the inputs' precision: go to float32 before it",
    ),
    Mistake(
        "no dlse",
        lambda out, dout, dlse: (out.float() * dout.float()).sum(1),
        "the gradient of the log-sum-exp is left out",
    ),
    Mistake(
        "dlse added",
        lambda out, dout, dlse: (out.float() * dout.float()).sum(1) + dlse,
        "the gradient of the log-sum-exp is added, and delta falls by it",
    ),
    Mistake(
        "sign of the whole",
        lambda out, dout, dlse: dlse - (out.float() * dout.float()).sum(1),
        "delta has the wrong sign",
    ),
    Mistake(
        "mean of the channels",
        lambda out, dout, dlse: (out.float() * dout.float()).mean(1) - dlse,
        "the products are averaged over the channels, not added",
    ),
    Mistake(
        "out twice",
        lambda out, dout, dlse: (out.float() * out.float()).sum(1) - dlse,
        "out is multiplied by itself, not by its gradient",
    ),
    Mistake(
        "dout twice",
        lambda out, dout, dlse: (dout.float() * dout.float()).sum(1) - dlse,
        "the gradient is multiplied by itself, not by out",
    ),
    Mistake(
        "sums multiplied",
        lambda out, dout, dlse: out.float().sum(1) * dout.float().sum(1) - dlse,
        "each row is added up before the product, and the products are added",
    ),
    Mistake(
        "one number for all rows",
        lambda out, dout, dlse: (out.float() * dout.float()).sum() - dlse,
        "the rows are added up too, and each has its own delta",
    ),
]

# --- 11.2: the gradient of a gate ---


def gates(
    gate=torch.sigmoid,
    slope=lambda gate: gate * (1 - gate),
    product=lambda outs, gates, dout: (outs * dout).sum(2).T,
    through=lambda gates, logits: gates,
) -> Callable:
    """dlogits (T, 3) and douts (3, T, Dv); through is what a branch's gradient is multiplied by."""

    def answer(logits: Tensor, outs: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        g = gate(logits)
        dlogits = slope(g) * product(outs, g, dout)
        return dlogits, through(g, logits).T[:, :, None] * dout

    return answer


def by_softmax(logits: Tensor, outs: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gates that compete."""
    g = logits.softmax(1)
    dgates = (outs * dout).sum(2).T
    return g * (dgates - (g * dgates).sum(1, keepdim=True)), g.T[:, :, None] * dout


LOGITS = [
    Mistake(
        "gate's own gradient",
        gates(slope=lambda g: 1.0),
        "this is the gradient of the gates, and the sigmoid's slope is left out",
    ),
    Mistake(
        "slope of g alone",
        gates(slope=lambda g: g),
        "the slope of a sigmoid is g (1 - g), and 1 - g is left out",
    ),
    Mistake(
        "slope of 1 - g alone",
        gates(slope=lambda g: 1 - g),
        "the slope of a sigmoid is g (1 - g), and g is left out",
    ),
    Mistake(
        "the gated output",
        gates(product=lambda outs, g, dout: (g.T[:, :, None] * outs * dout).sum(2).T),
        "the outputs are multiplied by their gates once more",
    ),
    Mistake(
        "the whole output",
        gates(
            product=lambda outs, g, dout: (
                ((g.T[:, :, None] * outs).sum(0) * dout).sum(1, keepdim=True).expand_as(g)
            )
        ),
        "every gate gets the product of dout with the whole output, not with its own branch",
    ),
    Mistake(
        "sum of the branches",
        gates(product=lambda outs, g, dout: (outs.sum(0) * dout).sum(1, keepdim=True).expand_as(g)),
        "every gate gets the product of dout with the sum of the branches",
    ),
    Mistake(
        "mean of the channels",
        gates(product=lambda outs, g, dout: (outs * dout).mean(2).T),
        "the products are averaged over the channels, not added",
    ),
    Mistake(
        "branches in reverse",
        gates(product=lambda outs, g, dout: (outs.flip(0) * dout).sum(2).T),
        "the gates of the first and the last branch are exchanged",
    ),
    Mistake(
        "softmax",
        by_softmax,
        "this is the gradient of a softmax: the gates of NSA are sigmoids, and do not compete",
    ),
    Mistake(
        "gates that compete",
        gates(gate=lambda logits: logits.softmax(1)),
        "the gates went through a softmax, and NSA's are sigmoids",
    ),
    Mistake(
        "slope of the logits",
        lambda logits, outs, dout: (
            logits * (1 - logits) * (outs * dout).sum(2).T,
            gates()(logits, outs, dout)[1],
        ),
        "the slope is taken of the logits, not of the gates",
    ),
]
BRANCHES = [
    Mistake(
        "dout as it is",
        gates(through=lambda g, logits: torch.ones_like(g)),
        "a branch gets dout as it is, without its gate",
    ),
    Mistake(
        "by the logits",
        gates(through=lambda g, logits: logits),
        "a branch's gradient is multiplied by its logit, not by its gate",
    ),
    Mistake(
        "by the slope",
        gates(through=lambda g, logits: g * (1 - g)),
        "a branch's gradient is multiplied by the sigmoid's slope, not by the gate",
    ),
    Mistake(
        "gates that sum to 1",
        gates(through=lambda g, logits: g / g.sum(1, keepdim=True)),
        "the gates are divided by their sum, and NSA's are not",
    ),
    Mistake(
        "one branch's gate for all",
        gates(through=lambda g, logits: g[:, :1].expand_as(g)),
        "every branch gets the gate of branch 0",
    ),
]

# --- 11.3: dq of one query ---


def chosen(ids: Tensor, k: Tensor, t: int) -> list[int]:
    """The blocks that a query reads."""
    return [j for j in ids.tolist() if j >= 0]


def query_gradient(
    blocks=chosen,
    first_hidden=lambda t: t + 1,
    p=lambda s, lse: (s - lse).exp(),
    ds=lambda p, dp, delta: p * (dp - delta),
    add=lambda dq, part: dq + part,
    score=lambda s, scale: s * scale,
    finish=lambda dq, scale: dq * scale,
) -> Callable:
    """dq of one query, block after block; keys from first_hidden(t) on are not read."""

    def answer(q, k, v, ids, dout, saved, t, scale):
        lse, delta = saved
        dq = torch.zeros_like(q)
        for j in blocks(ids, k, t):
            count = max(0, min(k.shape[1], first_hidden(t) - j % len(k) * k.shape[1]))
            keys = k[j, :count]
            values = v[j, :count]
            weights = p(score(q @ keys.T, scale), lse[:, None])
            dq = add(dq, ds(weights, dout @ values.T, delta[:, None]) @ keys)
        return finish(dq, scale)

    return answer


QUERIES = [
    Mistake(
        "no delta",
        query_gradient(ds=lambda p, dp, delta: p * dp),
        "delta is left out: ds is p (dp - delta)",
    ),
    Mistake(
        "delta added",
        query_gradient(ds=lambda p, dp, delta: p * (dp + delta)),
        "delta is added to dp, and it is the mean that is taken off",
    ),
    Mistake(
        "delta outside",
        query_gradient(ds=lambda p, dp, delta: p * dp - delta),
        "delta is taken off after the product with p, not before",
    ),
    Mistake(
        "delta of each block",
        query_gradient(ds=lambda p, dp, delta: p * (dp - (p * dp).sum(1, keepdim=True))),
        "delta is summed block by block, and it is that of all keys: it was given",
    ),
    Mistake(
        "plain mean for delta",
        query_gradient(ds=lambda p, dp, delta: p * (dp - dp.mean(1, keepdim=True))),
        "the plain mean of dp stands for delta, which is weighted with p: it was given",
    ),
    Mistake(
        "delta of head 0",
        query_gradient(ds=lambda p, dp, delta: p * (dp - delta[:1])),
        "every head gets the delta of head 0",
    ),
    Mistake(
        "lse of head 0",
        query_gradient(p=lambda s, lse: (s - lse[:1]).exp()),
        "every head's weights are taken with the log-sum-exp of head 0",
    ),
    Mistake(
        "not normalised",
        query_gradient(p=lambda s, lse: s.exp()),
        "the weights are exp(s), and the log-sum-exp is not taken off",
    ),
    Mistake(
        "base 2",
        query_gradient(p=lambda s, lse: torch.exp2(s - lse)),
        "the weights are powers of 2, and the log-sum-exp is a natural one",
    ),
    Mistake(
        "softmax of each block",
        query_gradient(p=lambda s, lse: s.softmax(1)),
        "each block has a softmax of its own: the log-sum-exp is that of all blocks together",
    ),
    Mistake(
        "not weighted by p",
        query_gradient(ds=lambda p, dp, delta: dp - delta),
        "ds is not multiplied by the weights p",
    ),
    Mistake(
        "the heads' ds added",
        query_gradient(
            ds=lambda p, dp, delta: (p * (dp - delta)).sum(0, keepdim=True).expand_as(p)
        ),
        "ds is added over the heads: they share keys, and each has its own dq",
    ),
    Mistake(
        "scores not scaled",
        query_gradient(score=lambda s, scale: s),
        "the scores are not multiplied by the scale",
    ),
    Mistake(
        "dq not scaled",
        query_gradient(finish=lambda dq, scale: dq),
        "dq is not multiplied by the scale",
    ),
    Mistake(
        "dq scaled twice",
        query_gradient(finish=lambda dq, scale: dq * scale * scale),
        "dq is multiplied by the scale twice",
    ),
    Mistake(
        "last block only",
        query_gradient(add=lambda dq, part: part),
        "only the last block of the list counts",
    ),
    Mistake(
        "first block only",
        query_gradient(blocks=lambda ids, k, t: chosen(ids, k, t)[:1]),
        "only the first block of the list counts",
    ),
    Mistake(
        "-1 is block 0",
        query_gradient(blocks=lambda ids, k, t: [max(j, 0) for j in ids.tolist()]),
        "-1 is padding, and was read as block 0",
    ),
    Mistake(
        "-1 is the last block",
        query_gradient(blocks=lambda ids, k, t: ids.tolist()),
        "-1 is padding, and was read as the last block",
    ),
    Mistake(
        "own token left out",
        query_gradient(first_hidden=lambda t: t),
        "the query's own token is left out",
    ),
    Mistake(
        "own block left out",
        query_gradient(
            blocks=lambda ids, k, t: [j for j in chosen(ids, k, t) if j != t // k.shape[1]]
        ),
        "the query's own block is left out",
    ),
    Mistake(
        "all blocks",
        query_gradient(blocks=lambda ids, k, t: range(t // k.shape[1] + 1)),
        "blocks are read that were not chosen",
    ),
]

# --- 11.4: who reads a block ---


def index(
    order=lambda block, token: block,
    legal=lambda ids, blocks: ids,
    names=lambda token, slot: token,
    starts=lambda counts: torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
) -> Callable:
    """The lists of all blocks, one after another, by a sort of the pairs by `order`."""

    def answer(ids: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
        block = legal(ids, blocks).flatten().long()
        slot = torch.arange(len(block))
        token = slot // ids.shape[1]
        pair = torch.sort(order(block, token), stable=True).indices
        pair = pair[block[pair] >= 0]
        counts = torch.bincount(block[block >= 0], minlength=blocks)
        return starts(counts), names(token, slot)[pair]

    return answer


STARTS = [
    Mistake(
        "counts",
        index(starts=lambda counts: torch.cat([counts, counts.new_zeros(1)])),
        "indptr holds how many readers each block has, not where its list begins",
    ),
    Mistake(
        "counts behind a 0",
        index(starts=lambda counts: torch.cat([counts.new_zeros(1), counts])),
        "indptr holds how many readers each block has, not their running sum",
    ),
    Mistake(
        "ends",
        index(starts=lambda counts: torch.cat([counts.cumsum(0), counts.sum()[None]])),
        "indptr holds where each list ends: it begins with 0",
    ),
    Mistake(
        "-1 as block 0",
        index(legal=lambda ids, blocks: ids.clamp(min=0)),
        "-1 is padding, and was counted for block 0",
    ),
    Mistake(
        "-1 as the last block",
        index(legal=lambda ids, blocks: ids % blocks),
        "-1 is padding, and was counted for the last block",
    ),
]
INDICES = [
    Mistake(
        "from the last query on",
        index(order=lambda block, token: block * (len(token) + 1) - token),
        "the readers of a block stand from the last to the first, and were asked for in order",
    ),
    Mistake(
        "places in ids",
        index(names=lambda token, slot: slot),
        "these are places in ids, and a place divided by n is the query",
    ),
    Mistake(
        "blocks",
        lambda ids, blocks: (index()(ids, blocks)[0], ids[ids >= 0].long().sort().values),
        "these are the blocks, and their readers were asked for",
    ),
    Mistake(
        "by query",
        index(order=lambda block, token: token),
        "the readers stand by query, and a block's must lie side by side",
    ),
    Mistake(
        "from the last block on",
        index(order=lambda block, token: -block),
        "the lists stand from the last block to the first",
    ),
    Mistake(
        "queries counted from 1",
        index(names=lambda token, slot: token + 1),
        "queries are counted from 1",
    ),
]

# --- 11.5: dk and dv of one block ---


def block_gradients(
    hidden=lambda key, token: key > token,
    readers=lambda tokens: tokens,
    heads=lambda x: x,
    weights=lambda s, lse: (s - lse).exp(),
    slope=lambda p, dp, delta: p * (dp - delta),
    to_values=lambda p, ds: p,
    to_keys=lambda p, ds: ds,
    scaled=lambda dk, scale: dk * scale,
) -> Callable:
    """dk and dv of block j, of all readers and heads at once; heads takes some of (m, R, ...)."""

    def answer(q, k, v, dout, saved, tokens, j, scale):
        tokens = readers(tokens)
        q, dout, lse, delta = (heads(x[tokens]) for x in (q, dout, *saved))
        gone = hidden(j * len(k) + torch.arange(len(k)), tokens[:, None])[:, None]  # (m, 1, l)
        s = torch.einsum("mrd,ld->mrl", q, k) * scale
        p = weights(s, lse[..., None]).masked_fill(gone, 0.0)
        dp = torch.einsum("mrc,lc->mrl", dout, v)
        ds = slope(p, dp, delta[..., None]).masked_fill(gone, 0.0)
        dk = torch.einsum("mrl,mrd->ld", to_keys(p, ds), q)
        return scaled(dk, scale), torch.einsum("mrl,mrc->lc", to_values(p, ds), dout)

    return answer


BLOCKS = [
    Mistake(
        "no mask",
        block_gradients(hidden=lambda key, token: (key < 0) & (token < 0)),
        "readers inside the block count for keys after them",
    ),
    Mistake(
        "own key hidden",
        block_gradients(hidden=lambda key, token: key >= token),
        "a reader does not count for its own key",
    ),
    Mistake(
        "the other triangle",
        block_gradients(hidden=lambda key, token: key < token),
        "readers count for the keys after them only: the mask is the other way round",
    ),
    Mistake(
        "last reader only",
        block_gradients(readers=lambda tokens: tokens[-1:]),
        "only the last reader counts",
    ),
    Mistake(
        "first reader left out",
        block_gradients(readers=lambda tokens: tokens[1:]),
        "the first reader of the list is left out",
    ),
    Mistake(
        "last reader left out",
        block_gradients(readers=lambda tokens: tokens[:-1]),
        "the last reader of the list is left out",
    ),
    Mistake(
        "head 0 only",
        block_gradients(heads=lambda x: x[:, :1]),
        "only head 0 counts: the keys belong to all heads of the group",
    ),
    Mistake(
        "mean of the heads",
        lambda *x: tuple(part / x[0].shape[1] for part in block_gradients()(*x)),
        "the gradients are averaged over the heads, and they add up",
    ),
    Mistake(
        "no delta",
        block_gradients(slope=lambda p, dp, delta: p * dp),
        "delta is left out of ds",
    ),
    Mistake(
        "not weighted by p",
        block_gradients(slope=lambda p, dp, delta: dp - delta),
        "ds is not multiplied by the weights p",
    ),
    Mistake(
        "not normalised",
        block_gradients(weights=lambda s, lse: s.exp()),
        "the weights are exp(s), and the log-sum-exp is not taken off",
    ),
    Mistake(
        "base 2",
        block_gradients(weights=lambda s, lse: torch.exp2(s - lse)),
        "the weights are powers of 2, and the log-sum-exp is a natural one",
    ),
    Mistake(
        "ds for dv",
        block_gradients(to_values=lambda p, ds: ds),
        "dv is summed with ds, and the weights of values are p",
    ),
    Mistake(
        "p for dk",
        block_gradients(to_keys=lambda p, ds: p),
        "dk is summed with p, and the weights of keys are ds",
    ),
    Mistake(
        "dk not scaled",
        block_gradients(scaled=lambda dk, scale: dk),
        "dk is not multiplied by the scale",
    ),
    Mistake(
        "scores scaled by the width",
        lambda q, k, v, dout, saved, tokens, j, scale: block_gradients()(
            q, k, v, dout, saved, tokens, j, 1 / math.sqrt(q.shape[2])
        ),
        "the root of the width stands where the scale was given",
    ),
]
