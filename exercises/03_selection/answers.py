"""Planted wrong answers that the checks of set 03 must name, and right ones they must accept."""

import torch

from exercises.records import Wrong

# --- 03.1 ---


def probabilities_where(scores, lse):
    return torch.where(scores == -torch.inf, 0.0, scores - lse[:, None]).exp() * (
        scores > -torch.inf
    )


def probabilities_by_loop(scores, lse):
    p = torch.zeros(scores.shape, dtype=torch.float64)
    for t in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            if lse[t] > -torch.inf:
                p[t, i] = torch.exp(scores[t, i].double() - lse[t].double())
    return p


def probabilities_repaired(scores, lse):
    return (scores - lse.unsqueeze(-1)).exp().nan_to_num(nan=0.0)


PROBABILITIES = [
    Wrong("softmax again", lambda s, lse: s.softmax(-1).nan_to_num(nan=0.0), "normalised again"),
    Wrong("no exp", lambda s, lse: s - lse[:, None], "still a logarithm"),
    Wrong(
        "divided by the logarithm",
        lambda s, lse: s.exp() / lse[:, None],
        "divided by lse, which is its logarithm",
    ),
    Wrong("not divided", lambda s, lse: s.exp(), "nothing was divided"),
    Wrong(
        "NaN where nothing is seen",
        lambda s, lse: (s - lse[:, None]).exp(),
        "query 0 sees no block, and -inf minus -inf is NaN",
    ),
    Wrong(
        "exp before the difference",
        lambda s, lse: (
            (s.exp() / lse.exp()[:, None]).nan_to_num(nan=0.0, posinf=0.0)
            if s.max() < 80
            else s.exp() / lse.exp()[:, None]
        ),
        "overflows",
    ),
    Wrong(
        "numpy instead of torch",
        lambda s, lse: (s - lse[:, None]).exp().numpy(),
        "a torch.Tensor was asked for",
    ),
]

# --- 03.2 ---


def spread_by_formula(p, block_size, stride, select_block_size, blocks):
    out = torch.zeros(len(p), blocks)
    for j in range(blocks):
        for m in range(select_block_size // stride):
            for n in range(block_size // stride):
                i = select_block_size // stride * j + m - n
                if 0 <= i < p.shape[1]:
                    out[:, j] += p[:, i]
    return out


def spread_by_tokens(p, block_size, stride, select_block_size, blocks):
    tokens = torch.zeros(len(p), blocks * select_block_size, dtype=torch.float64)
    for i in range(p.shape[1]):
        tokens[:, i * stride : i * stride + block_size] += p[:, i : i + 1].double() / stride
    return tokens.view(len(p), blocks, select_block_size).sum(-1)


def spread_by_strides(p, block_size, stride, select_block_size, blocks):
    # every stride of a block carries p on; a selection block is a run of strides
    strides = torch.nn.functional.pad(p, (0, blocks * select_block_size // stride - p.shape[1]))
    total = sum(strides.roll(n, -1) for n in range(block_size // stride))
    return torch.einsum("tjm->tj", total.reshape(len(p), blocks, -1))


def spread(weight):
    """Each probability times a weight that depends on block i, block j and the sizes."""

    def answer(p, l, d, l_sel, blocks):
        weights = torch.tensor(
            [[float(weight(i, j, l, d, l_sel)) for j in range(blocks)] for i in range(p.shape[1])]
        )
        return p @ weights

    return answer


def common(i, j, l, d, l_sel):
    return max(0, min(i * d + l, (j + 1) * l_sel) - max(i * d, j * l_sel))


def printed(p, l, d, l_sel, blocks, shift=0):
    out = torch.zeros(len(p), blocks)
    for j in range(blocks):
        for m in range(l_sel // d):
            for n in range(l // d):
                i = l_sel // d * (j + shift) - m - n
                if 0 <= i < p.shape[1]:
                    out[:, j] = out[:, j] + p[:, i]
    return out


SPREAD = [
    Wrong("the printed Eq. 9 with j from 0", printed, "the printed Eq. 9"),
    Wrong("j from 1, blocks from 0", lambda *x: printed(*x, shift=1), "one compression block late"),
    Wrong("every touched block counts alike", spread(lambda *x: common(*x) > 0), "the same share"),
    Wrong(
        "whole blocks only",
        spread(lambda i, j, l, d, s: (common(i, j, l, d, s) == l) * l / d),
        "lie wholly inside",
    ),
    Wrong(
        "to the block in which it starts",
        spread(lambda i, j, l, d, s: (i * d // s == j) * l / d),
        "in which it starts",
    ),
    Wrong("tokens, not strides", spread(common), "counted in tokens"),
    Wrong(
        "divided by l",
        spread(lambda i, j, l, d, s: common(i, j, l, d, s) / l),
        "divided by l, not by d",
    ),
    Wrong("transposed", lambda *x: spread_by_formula(*x).T, "the shape is"),
    Wrong("no return", lambda *x: None, "is a return missing"),
]

# --- 03.3 ---


def group_by_loop(scores, kv_heads):
    sharing = len(scores) // kv_heads
    groups = []
    for g in range(kv_heads):
        total = 0
        for h in range(g * sharing, (g + 1) * sharing):
            total = total + torch.softmax(scores[h], dim=-1)
        groups.append(total)
    return torch.stack(groups)


def group_by_index_add(scores, kv_heads):
    heads, length, blocks = scores.shape
    group = torch.arange(heads) * kv_heads // heads
    p = (scores.double() - scores.double().logsumexp(-1, keepdim=True)).exp()
    return torch.zeros(kv_heads, length, blocks).double().index_add(0, group, p)


def group_by_einsum(scores, kv_heads):
    member = torch.arange(kv_heads).repeat_interleave(len(scores) // kv_heads)
    member = (member == torch.arange(kv_heads)[:, None]).to(scores)  # (G, H)
    return torch.einsum("gh,htn->gtn", member, scores.softmax(2))


def group(combine):
    return lambda scores, kv_heads: combine(scores.unflatten(0, (kv_heads, -1)))


GROUP = [
    Wrong("logits summed", group(lambda s: s.sum(1).softmax(-1)), "logits were summed before"),
    Wrong("logits averaged", group(lambda s: s.mean(1).softmax(-1)), "logits were averaged before"),
    Wrong("one head only", group(lambda s: s[:, 0].softmax(-1)), "only the first of the 2 heads"),
    Wrong("mean of the heads", group(lambda s: s.softmax(-1).mean(1)), "were averaged"),
    Wrong(
        "largest of the heads", group(lambda s: s.softmax(-1).amax(1)), "the largest probability"
    ),
    Wrong(
        "heads dealt out in turn",
        lambda s, g: s.unflatten(0, (-1, g)).softmax(-1).sum(0),
        "a group's heads are neighbours",
    ),
    Wrong("softmax over the heads", group(lambda s: s.softmax(1).sum(1)), "ran over the heads"),
    Wrong("no softmax", group(lambda s: s.sum(1)), "no softmax taken"),
    Wrong(
        "all heads in every group",
        lambda s, g: s.softmax(-1).sum(0).expand(g, *s.shape[1:]),
        "heads of all groups",
    ),
    Wrong(
        "exp without the largest",
        group(lambda s: (s.exp() / s.exp().sum(-1, True)).sum(1)),
        "overflows",
    ),
]

# --- 03.4 ---


def choose_by_loop(score, select_block_size, num_selected, num_initial, num_local):
    rows = []
    for t in range(len(score)):
        own = t // select_block_size
        forced = [j for j in range(own + 1) if j < num_initial or own - j < num_local]
        rest = sorted(
            (j for j in range(own + 1) if j not in forced), key=lambda j: -float(score[t, j])
        )  # Python's sort keeps the order of ties
        row = sorted((forced + rest)[:num_selected])
        rows.append(row + [-1] * (num_selected - len(row)))
    return torch.tensor(rows)


def choose_by_rank(
    score,
    select_block_size,
    num_selected,
    num_initial,
    num_local,
    *,
    boost=torch.inf,
    again=True,
    own_too=True,
    local=True,
    initial=True,
    stable=True,
    ascending=True,
):
    """The right answer, in which one step can be changed."""
    length, blocks = score.shape
    own, j = torch.arange(length)[:, None] // select_block_size, torch.arange(blocks)
    legal = j <= own
    forced = torch.zeros_like(legal)
    if initial:
        forced = forced | (j < num_initial)
    if local:
        newest = own if own_too else own - 1
        forced = forced | ((j <= newest) & (j > newest - num_local))
    rank = torch.where(forced, score + boost, score).masked_fill(~legal, -torch.inf)
    if not stable:  # ties go to the higher id
        order = blocks - 1 - rank.flip(-1).sort(descending=True, stable=True).indices
    else:
        order = rank.sort(descending=True, stable=True).indices
    order = order[:, :num_selected]
    if again:
        order = order.masked_fill(~legal.gather(1, order), blocks)
    ids = order.sort(-1).values if ascending else order
    ids = torch.nn.functional.pad(ids, (0, num_selected - ids.shape[1]), value=blocks)
    return ids.masked_fill(ids == blocks, -1)


def choose_with_numpy_sort(score, select_block_size, num_selected, num_initial, num_local):
    import numpy as np

    out = np.full((len(score), num_selected), -1)
    for t, row in enumerate(score.double().numpy()):
        j = np.arange(t // select_block_size + 1)
        forced = (j < num_initial) | (j > j[-1] - num_local)
        best = np.lexsort((j, -row[: len(j)], ~forced))[:num_selected]  # last key first
        out[t, : len(best)] = np.sort(best)
    return torch.from_numpy(out)


def chosen_twice(score, select_block_size, num_selected, num_initial, num_local):
    """Initial, then local, then the best: a block that is both initial and local comes twice."""
    rows = []
    for t in range(len(score)):
        own = t // select_block_size
        row = list(range(min(num_initial, own + 1)))
        row += [own - n for n in range(num_local) if own - n >= 0]
        rest = [j for j in range(own + 1) if j not in row]
        row += sorted(rest, key=lambda j: -float(score[t, j]))
        row = sorted(row[:num_selected])
        rows.append(row + [-1] * (num_selected - len(row)))
    return torch.tensor(rows)


def changed(**step):
    return lambda *arguments: choose_by_rank(*arguments, **step)


def no_mask_at_all(score, select_block_size, num_selected, num_initial, num_local):
    return score.topk(num_selected).indices.sort().values


def one_too_few(score, select_block_size, num_selected, num_initial, num_local):
    ids = choose_by_loop(score, select_block_size, num_selected - 1, num_initial, num_local)
    return torch.nn.functional.pad(ids, (0, 1), value=-1)


CHOICE = [
    Wrong("no causal mask", no_mask_at_all, "query 0 selected block 5, which starts at token 20"),
    Wrong(
        "not masked again after the sort",
        changed(again=False),
        "query 0 selected block 1, which starts at token 4",
    ),
    Wrong("forced by adding 1.0", changed(boost=1.0), "lacks block 0, one of the first 1"),
    Wrong("no initial blocks", changed(initial=False), "one of the first"),
    Wrong("no local blocks", changed(local=False), "one of the last"),
    Wrong("local blocks before the own one", changed(own_too=False), "up to its own"),
    Wrong("block 0 twice when it is local too", chosen_twice, "query 0 selected block 0 twice"),
    Wrong("ties to the higher id", changed(stable=False), "a lower block with an equal score"),
    Wrong("best first, not ascending", changed(ascending=False), "ascend"),
    Wrong(
        "forced blocks on top of n",
        lambda score, size, n, a, b: choose_by_loop(score, size, n + a + b, a, b),
        "the shape is",
    ),
    Wrong("lowest scores", lambda score, *rule: choose_by_rank(-score, *rule), "a higher score"),
    Wrong("one block too few", one_too_few, "has room for"),
    Wrong(
        "scores changed in place",
        lambda score, *rule: choose_by_rank(score.clamp_(min=1.0), *rule),
        "changed its input score",
    ),
]

# --- 03.5 ---


def attend_by_loop(q, k, v, ids, select_block_size):
    rows = []
    for t in range(len(q)):
        tokens = [s for s in range(t + 1) if s // select_block_size in ids[t].tolist()]
        rows.append(torch.softmax(k[tokens] @ q[t] / q.shape[1] ** 0.5, 0) @ v[tokens])
    return torch.stack(rows)


def attend_by_mask(q, k, v, ids, select_block_size):
    block = torch.arange(len(k)) // select_block_size
    seen = (ids[:, :, None] == block).any(1) & torch.ones(len(q), len(k)).tril().bool()
    scores = (q @ k.T / q.shape[1] ** 0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


def attend_by_gather(q, k, v, ids, select_block_size):
    token = ids[:, :, None] * select_block_size + torch.arange(select_block_size)
    seen = (ids[:, :, None] >= 0) & (token <= torch.arange(len(q))[:, None, None])
    token, seen = token.clamp(0, len(k) - 1).flatten(1), seen.flatten(1)
    q, k, v = q.double(), k.double()[token], v.double()[token]
    scores = torch.einsum("td,tsd->ts", q, k) / q.shape[1] ** 0.5
    e = (scores - scores.masked_fill(~seen, -1e30).amax(1, True)).clamp(max=0).exp() * seen
    return torch.einsum("ts,tsv->tv", e, v) / e.sum(1, True)


def attend(
    causal=True, padding=lambda size: (), chosen=True, own=True, scale=lambda width: width**-0.5
):
    """The right answer with one step changed."""

    def answer(q, k, v, ids, size):
        out, last = [], (len(k) - 1) // size
        for t in range(len(q)):
            tokens = []
            for j in ids[t].tolist() if chosen else range(last + 1):
                if j < 0:
                    tokens += padding(size)
                else:
                    tokens += range(j * size, min((j + 1) * size, len(k)))
            tokens = [s for s in tokens if s <= t] if causal else tokens
            if not own:
                tokens = [s for s in tokens if s // size != t // size] or [t]
            out.append((k[tokens] @ q[t] * scale(q.shape[1])).softmax(0) @ v[tokens])
        return torch.stack(out)

    return answer


def exp_without_the_largest(q, k, v, ids, size):
    block = torch.arange(len(k)) // size
    seen = (ids[:, :, None] == block).any(1) & torch.ones(len(q), len(k)).tril().bool()
    e = (q @ k.T / q.shape[1] ** 0.5).exp() * seen
    return e @ v / e.sum(-1, keepdim=True)


ATTENTION = [
    Wrong("not causal in the own block", attend(causal=False), "reads tokens after itself"),
    Wrong("-1 read as block 0", attend(padding=range), "was read as block 0"),
    Wrong(
        "-1 read from the end", attend(padding=lambda size: range(-size, 0)), "was read as block -1"
    ),
    Wrong("the choice ignored", attend(chosen=False), "chosen or not"),
    Wrong("no scale", attend(scale=lambda width: 1.0), "not divided by the root of the width"),
    Wrong("scale by the width", attend(scale=lambda width: 1 / width), "not by its root"),
    Wrong("own block left out", attend(own=False), "own block was left out"),
    Wrong("exp without the largest", exp_without_the_largest, "exp of a large score"),
    Wrong(
        "tail read past its end",
        lambda q, k, v, ids, size: torch.stack(
            [v[ids[t].long() * size + size - 1].mean(0) for t in range(len(q))]
        ),
        "a ragged end: the function raised IndexError",
    ),
]

RIGHT = {
    "03.1": [probabilities_where, probabilities_by_loop, probabilities_repaired],
    "03.2": [spread_by_formula, spread_by_tokens, spread_by_strides],
    "03.3": [group_by_loop, group_by_index_add, group_by_einsum],
    "03.4": [choose_by_loop, choose_by_rank, choose_with_numpy_sort],
    "03.5": [attend_by_loop, attend_by_mask, attend_by_gather],
}
WRONG = {"03.1": PROBABILITIES, "03.2": SPREAD, "03.3": GROUP, "03.4": CHOICE, "03.5": ATTENTION}
