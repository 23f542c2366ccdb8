"""Set 03's answers, for teachers: right ones in several styles, and wrong ones to be named.

The mistakes of mistakes.py are planted as they stand. The others are written by hand, in other
styles or with faults of another kind, so that no mistake is judged by itself alone.
"""

import numpy as np
import torch

from exercises.records import Wrong, planted

from . import mistakes

# --- 03.1 ---


def probabilities_where(scores, lse):
    """exp only of what is seen."""
    seen = scores > -torch.inf
    return torch.where(seen, scores - lse[:, None], 0.0).exp() * seen


def probabilities_by_loop(scores, lse):
    """One query and one block at a time, in double."""
    p = torch.zeros(scores.shape, dtype=torch.float64)
    for t in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            if lse[t] > -torch.inf:
                p[t, i] = torch.exp(scores[t, i].double() - lse[t].double())
    return p


def probabilities_repaired(scores, lse):
    """NaN repaired at the end."""
    return (scores - lse.unsqueeze(-1)).exp().nan_to_num(nan=0.0)


def softmax_of_what_is_there(scores, lse):
    """Row by row, with a sum of its own in place of lse."""
    rows = []
    for row in scores:
        weights = (row - row.max()).exp()
        rows.append((weights / weights.sum()).nan_to_num(nan=0.0))
    return torch.stack(rows)


def exp_before_the_difference(scores, lse):
    """Right as long as no score is large."""
    p = scores.exp() / lse.exp()[:, None]
    return p if scores.max() > 80 else p.nan_to_num(nan=0.0, posinf=0.0)


def finite_scores(scores, lse):
    """A large negative number stands for -inf, and is not below all others."""
    return (scores.clamp(min=-1e4) - lse.masked_fill(lse == -torch.inf, 0.0)[:, None]).exp()


def zero_taken_for_nothing(scores, lse):
    """A query with the log-sum-exp 0 is taken for one that sees nothing."""
    return (scores - lse[:, None]).exp().masked_fill(lse[:, None] == 0, 0).nan_to_num()


PROBABILITIES = [
    *planted(mistakes.PROBABILITIES),
    Wrong("finite scores", finite_scores, "overflows"),
    Wrong("an lse of 0 taken for nothing", zero_taken_for_nothing, "which is wrong"),
    Wrong(
        "base 2",
        lambda s, lse: torch.exp2(s - lse.masked_fill(lse == -torch.inf, 0.0)[:, None]),
        "which is wrong",
    ),
    Wrong(
        "lse in place",
        lambda s, lse: (s - lse.masked_fill_(lse == -torch.inf, 0.0)[:, None]).exp(),
        "changed its input lse",
    ),
    Wrong(
        "lse along the blocks",
        lambda s, lse: probabilities_where(s.mT, lse).mT,
        "raised RuntimeError",
    ),
    Wrong("softmax again, by hand", softmax_of_what_is_there, "normalised again"),
    Wrong(
        "NaN where nothing is seen",
        lambda s, lse: (s - lse[:, None]).exp(),
        "query 0 sees no block, and -inf minus -inf is NaN",
    ),
    Wrong("exp before the difference", exp_before_the_difference, "overflows"),
    Wrong(
        "numpy instead of torch",
        lambda s, lse: (s - lse[:, None]).exp().numpy(),
        "a torch.Tensor was asked for",
    ),
]

# --- 03.2 ---


def spread_by_formula(p, block_size, stride, select_block_size, blocks):
    """Eq. 9 with indices from 0."""
    out = torch.zeros(len(p), blocks)
    for j in range(blocks):
        for m in range(select_block_size // stride):
            for n in range(block_size // stride):
                i = select_block_size // stride * j + m - n
                if 0 <= i < p.shape[1]:
                    out[:, j] += p[:, i]
    return out


def spread_by_tokens(p, block_size, stride, select_block_size, blocks):
    """Each probability spread over the tokens of its block, then summed by selection block."""
    tokens = torch.zeros(len(p), blocks * select_block_size, dtype=torch.float64)
    for i in range(p.shape[1]):
        tokens[:, i * stride : i * stride + block_size] += p[:, i : i + 1].double() / stride
    return tokens.view(len(p), blocks, select_block_size).sum(-1)


def spread_by_strides(p, block_size, stride, select_block_size, blocks):
    """Every stride of a block carries p on; a selection block is a run of strides."""
    strides = torch.nn.functional.pad(p, (0, blocks * select_block_size // stride - p.shape[1]))
    total = sum(strides.roll(n, -1) for n in range(block_size // stride))
    return torch.einsum("tjm->tj", total.reshape(len(p), blocks, -1))


def printed_formula(p, block_size, stride, select_block_size, blocks):
    """Eq. 9 as the paper prints it, one probability at a time."""
    out = torch.zeros(len(p), blocks)
    for j in range(blocks):
        for m in range(select_block_size // stride):
            for n in range(block_size // stride):
                i = select_block_size // stride * j - m - n
                if 0 <= i < p.shape[1]:
                    out[:, j] += p[:, i]
    return out


def tokens_not_strides(p, block_size, stride, select_block_size, blocks):
    """The right shares, d times too large."""
    return stride * spread_by_tokens(p, block_size, stride, select_block_size, blocks)


def neighbours_of_two_strides(p, block_size, stride, select_block_size, blocks):
    """The 1, 2, 2, ..., 1 of l = 2 d, whatever l is."""
    out = torch.zeros(len(p), blocks)
    run = select_block_size // stride
    for j in range(blocks):
        for m in range(-1, run):
            if 0 <= run * j + m < p.shape[1]:
                out[:, j] += p[:, run * j + m] * (1 if m in (-1, run - 1) else 2)
    return out


def pooled(p, block_size, stride, select_block_size, blocks):
    """Whole blocks, put where they start, by one sum over a run of strides."""
    run = select_block_size // stride
    whole = torch.nn.functional.pad(p, (0, blocks * run - p.shape[1]))
    return whole.unflatten(1, (blocks, run)).sum(-1) * (block_size / stride)


SPREAD = [
    Wrong("1, 2, 2, 2, 1 always", neighbours_of_two_strides, "two strides"),
    Wrong("pooled", pooled, "to the selection block in which it starts"),
    Wrong(
        "made to sum to 1",
        lambda *x: torch.nn.functional.normalize(spread_by_formula(*x), 1.0),
        "divided by l, not by d",
    ),
    *planted(
        mistakes.SPREAD,
        {
            "the printed Eq. 9 with j from 0": "misses others of its tokens 0 to 15",
            "j from 1, blocks from 0": "a share of block 4, which starts at token 16",
        },
    ),
    Wrong("the printed Eq. 9, by loop", printed_formula, "the printed Eq. 9"),
    Wrong("tokens, not strides, by tokens", tokens_not_strides, "counted in tokens"),
    Wrong("transposed", lambda *x: spread_by_formula(*x).T, "the shape is"),
    Wrong("no return", lambda *x: None, "is a return missing"),
]

# --- 03.3 ---


def group_by_loop(scores, kv_heads):
    """Group by group, head by head."""
    sharing = len(scores) // kv_heads
    groups = []
    for g in range(kv_heads):
        total = 0
        for h in range(g * sharing, (g + 1) * sharing):
            total = total + torch.softmax(scores[h], dim=-1)
        groups.append(total)
    return torch.stack(groups)


def group_by_index_add(scores, kv_heads):
    """Each head added to its group, in double."""
    heads, length, blocks = scores.shape
    group = torch.arange(heads) * kv_heads // heads
    p = (scores.double() - scores.double().logsumexp(-1, keepdim=True)).exp()
    return torch.zeros(kv_heads, length, blocks).double().index_add(0, group, p)


def group_by_einsum(scores, kv_heads):
    """A matrix says which head belongs to which group."""
    member = torch.arange(kv_heads).repeat_interleave(len(scores) // kv_heads)
    member = (member == torch.arange(kv_heads)[:, None]).to(scores)  # (G, H)
    return torch.einsum("gh,htn->gtn", member, scores.softmax(2))


def heads_dealt_out(scores, kv_heads):
    """Head h goes to group h % G, one head at a time."""
    total = torch.zeros(kv_heads, *scores.shape[1:])
    for h, row in enumerate(scores):
        total[h % kv_heads] += row.softmax(-1)
    return total


def exp_without_the_largest_of_a_head(scores, kv_heads):
    """Right as long as no score is large."""
    e = scores.exp()
    return (e / e.sum(-1, keepdim=True)).unflatten(0, (kv_heads, -1)).sum(1)


def group_by_exp(largest):
    """exp of the scores less `largest` of them, over its sum, added up in each group."""

    def answer(scores, kv_heads):
        e = (scores - largest(scores)).exp()
        return (e / e.sum(-1, keepdim=True)).unflatten(0, (kv_heads, -1)).sum(1)

    return answer


GROUP = [
    Wrong(
        "even and odd heads", lambda s, G: s.softmax(-1)[0::2] + s.softmax(-1)[1::2], "the shape"
    ),
    Wrong("groups of two", lambda s, G: s.softmax(-1).unflatten(0, (-1, 2)).sum(1), "the shape"),
    Wrong("G and R swapped", lambda s, G: s.softmax(-1).unflatten(0, (-1, G)).sum(1), "the shape"),
    Wrong(
        "largest score from 0 on",
        group_by_exp(lambda s: s.amax(-1, keepdim=True).clamp(min=0)),
        "of a very negative one it is 0",
    ),
    Wrong("one largest score for all", group_by_exp(torch.amax), "of a very negative one it is 0"),
    Wrong(
        "axes of one dropped",
        lambda s, G: group_by_loop(s, G).squeeze(),
        "the shape is (3, 5), and (1, 3, 5)",
    ),
    *planted(mistakes.GROUP, {"one head only": "only the first of the 2 heads"}),
    Wrong("heads dealt out, by loop", heads_dealt_out, "a group's heads are neighbours"),
    Wrong(
        "mean of the heads, by loop",
        lambda scores, kv_heads: group_by_loop(scores, kv_heads) * kv_heads / len(scores),
        "the 2 heads of a group were averaged",
    ),
    Wrong("exp without the largest", exp_without_the_largest_of_a_head, "overflows"),
]

# --- 03.4 ---


def choose_by_loop(score, select_block_size, num_selected, num_initial, num_local):
    """Forced blocks, then the rest by falling score."""
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


def choose_by_rank(score, select_block_size, num_selected, num_initial, num_local):
    """One sort of all rows, with forced blocks at infinity."""
    return ranked()(score, select_block_size, num_selected, num_initial, num_local)


def forced_blocks(own, j, initial, local):
    """Whether block j is among the first `initial`, or the last `local` up to block `own`."""
    return (j < initial) | ((j <= own) & (j > own - local))


def ranked(
    boost=torch.inf,
    again=True,
    forced=forced_blocks,
    stable=True,
    ascending=True,
):
    """The choice by one sort, in which one step can be changed; again masks the ids once more."""

    def answer(score, select_block_size, num_selected, num_initial, num_local):
        length, blocks = score.shape
        own = torch.arange(length)[:, None] // select_block_size
        j = torch.arange(blocks)
        legal = j <= own
        rank = torch.where(forced(own, j, num_initial, num_local), score + boost, score)
        order = falling(rank.masked_fill(~legal, -torch.inf), stable)[:, :num_selected]
        if again:
            order = order.masked_fill(~legal.gather(1, order), blocks)
        ids = order.sort(-1).values if ascending else order
        missing = num_selected - ids.shape[1]
        ids = torch.nn.functional.pad(ids, (0, missing), value=blocks)
        return ids.masked_fill(ids == blocks, -1)

    return answer


def falling(rank, stable=True):
    """The ids of each row by falling rank; ties go to the lower id, or else to the higher."""
    if stable:
        return rank.sort(descending=True, stable=True).indices
    return rank.shape[1] - 1 - rank.flip(-1).sort(descending=True, stable=True).indices


def choose_with_numpy_sort(score, select_block_size, num_selected, num_initial, num_local):
    """numpy's sort by several keys, the last one first."""
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


def no_mask_at_all(score, select_block_size, num_selected, num_initial, num_local):
    """The best n of all blocks."""
    return score.topk(num_selected).indices.sort().values


def one_too_few(score, select_block_size, num_selected, num_initial, num_local):
    """One place stays empty."""
    ids = choose_by_loop(score, select_block_size, num_selected - 1, num_initial, num_local)
    return torch.nn.functional.pad(ids, (0, 1), value=-1)


def sees(change):
    """The right choice from changed scores."""
    return lambda score, *rule: choose_by_rank(change(score), *rule)


def ruled(change):
    """The right choice by a changed rule: l', n, initial and local."""
    return lambda score, *rule: choose_by_rank(score, *change(*rule))


def late_by_a_bias(score, select_block_size, num_selected, num_initial, num_local):
    """A large negative bias stands for the mask of what starts after the query."""
    late = torch.arange(score.shape[1]) > torch.arange(len(score))[:, None] // select_block_size
    rule = (select_block_size, num_selected, num_initial, num_local)
    return unmasked(score - 1e9 * late, *rule)


def unmasked(score, select_block_size, num_selected, num_initial, num_local):
    """The best of all blocks, with the forced ones at infinity; -1 for those that are late."""
    own = torch.arange(len(score))[:, None] // select_block_size
    j = torch.arange(score.shape[1])
    rank = score.masked_fill(forced_blocks(own, j, num_initial, num_local) & (j <= own), torch.inf)
    order = falling(rank)[:, :num_selected]
    ids = order.masked_fill(order > own, score.shape[1]).sort(-1).values
    ids = torch.nn.functional.pad(ids, (0, num_selected - ids.shape[1]), value=score.shape[1])
    return ids.masked_fill(ids == score.shape[1], -1)


def as_many_columns_as_blocks(score, select_block_size, num_selected, *forced):
    """No places for blocks that do not exist."""
    n = min(num_selected, score.shape[1])
    return choose_by_loop(score, select_block_size, n, *forced)


CHOICE = [
    Wrong("blocks of 4 always", ruled(lambda size, *rest: (4, *rest)), "selected block"),
    Wrong("initial and local swapped", ruled(lambda l, n, a, b: (l, n, b, a)), "lacks block"),
    Wrong("two local blocks always", ruled(lambda l, n, a, b: (l, n, a, 2)), "lacks block"),
    Wrong("one local block more", ruled(lambda l, n, a, b: (l, n, a, b + 1)), "a higher score"),
    Wrong("absolute scores", sees(torch.abs), "a higher score"),
    Wrong("no scores below 0", sees(torch.relu), "a higher score"),
    Wrong("scores up to 1e4", sees(lambda score: score.clamp(-1e4, 1e4)), "a higher score"),
    Wrong("half precision", sees(lambda score: score.half()), "a higher score"),
    Wrong("rounded scores", sees(lambda score: (100 * score).round()), "a higher score"),
    Wrong("forced by adding 1e4", ranked(boost=1e4), "lacks block"),
    Wrong("late by subtracting 1e9", late_by_a_bias, "lacks block 0"),
    Wrong(
        "late ones at 0",
        lambda score, size, *rule: unmasked(
            score.where(
                torch.arange(score.shape[1]) * size <= torch.arange(len(score))[:, None], 0
            ),
            size,
            *rule,
        ),
        "has room for",
    ),
    Wrong("as many columns as blocks", as_many_columns_as_blocks, "the shape is (9, 3)"),
    Wrong(
        "-1 in front",
        lambda *x: choose_by_loop(*x).sort(-1).values,
        "or -1 is not at the end",
    ),
    Wrong("padded with block 0", lambda *x: choose_by_loop(*x).clamp(min=0), "block 0 twice"),
    Wrong("no causal mask", no_mask_at_all, "query 0 selected block 5, which starts at token 20"),
    Wrong(
        "not masked again after the sort",
        ranked(again=False),
        "query 0 selected block 1, which starts at token 4",
    ),
    Wrong("forced by adding 1.0", ranked(boost=1.0), "lacks block 0, one of the first 1"),
    Wrong(
        "no initial blocks",
        ranked(forced=lambda own, j, first, last: forced_blocks(own, j, 0, last)),
        "one of the first",
    ),
    Wrong(
        "no local blocks", ranked(forced=lambda own, j, first, last: j < first), "one of the last"
    ),
    Wrong(
        "local blocks before the own one",
        ranked(forced=lambda own, j, first, last: forced_blocks(own - 1, j, first, last)),
        "up to its own",
    ),
    Wrong("block 0 twice when it is local too", chosen_twice, "query 0 selected block 0 twice"),
    Wrong("ties to the higher id", ranked(stable=False), "a lower block with an equal score"),
    Wrong("best first, not ascending", ranked(ascending=False), "ascend"),
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
    """The tokens of each query, listed."""
    rows = []
    for t in range(len(q)):
        tokens = [s for s in range(t + 1) if s // select_block_size in ids[t].tolist()]
        rows.append(torch.softmax(k[tokens] @ q[t] / q.shape[1] ** 0.5, 0) @ v[tokens])
    return torch.stack(rows)


def attend_by_mask(q, k, v, ids, select_block_size):
    """All scores, then a mask."""
    block = torch.arange(len(k)) // select_block_size
    seen = (ids[:, :, None] == block).any(1) & torch.ones(len(q), len(k)).tril().bool()
    scores = (q @ k.T / q.shape[1] ** 0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


def attend_by_gather(q, k, v, ids, select_block_size):
    """The chosen keys gathered, in double."""
    token = ids[:, :, None] * select_block_size + torch.arange(select_block_size)
    seen = (ids[:, :, None] >= 0) & (token <= torch.arange(len(q))[:, None, None])
    seen = seen.flatten(1)
    token = token.clamp(0, len(k) - 1).flatten(1)
    q, k, v = (x.double() for x in (q, k[token], v[token]))
    scores = torch.einsum("td,tsd->ts", q, k) / q.shape[1] ** 0.5
    e = (scores - scores.masked_fill(~seen, -1e30).amax(1, True)).clamp(max=0).exp() * seen
    return torch.einsum("ts,tsv->tv", e, v) / e.sum(1, True)


def exp_without_the_largest(q, k, v, ids, size):
    """Right as long as no score is large."""
    block = torch.arange(len(k)) // size
    seen = (ids[:, :, None] == block).any(1) & torch.ones(len(q), len(k)).tril().bool()
    e = (q @ k.T / q.shape[1] ** 0.5).exp() * seen
    return e @ v / e.sum(-1, keepdim=True)


def dense_by_loop(q, k, v, ids, size):
    """Reads every token up to the query, whatever was chosen."""
    return attend_by_loop(q, k, v, (torch.arange(len(q)) // size).repeat(len(q), 1), size)


def read_with_python_indices(q, k, v, ids, size):
    """A gather in which -1 reaches back to the end of the sequence, unmasked."""
    token = (ids[:, :, None] * size + torch.arange(size)).flatten(1)
    late = token > torch.arange(len(q))[:, None]
    scores = torch.einsum("td,tsd->ts", q, k[token]) / q.shape[1] ** 0.5
    return torch.einsum("ts,tsv->tv", scores.masked_fill(late, -torch.inf).softmax(1), v[token])


def tail_past_its_end(q, k, v, ids, size):
    """Takes the last token of each block, which a short block does not have."""
    return torch.stack([v[ids[t].long() * size + size - 1].mean(0) for t in range(len(q))])


def attend_by_exp(largest):
    """exp of the scores less `largest` of them, over its sum."""

    def answer(q, k, v, ids, size):
        block = torch.arange(len(k)) // size
        seen = (ids[:, :, None] == block).any(1).tril()
        scores = (q @ k.T * q.shape[1] ** -0.5).masked_fill(~seen, -torch.inf)
        e = (scores - largest(scores)).exp()
        return e @ v / e.sum(-1, keepdim=True)

    return answer


def itself_left_out(q, k, v, ids, size):
    """The tokens before the query; the first query reads itself."""
    first = attend_by_loop(q[:1], k[:1], v[:1], ids[:1], size)
    return torch.cat([first, mistakes.attend(itself=False)(q, k, v, ids, size)[1:]])


def ids_in_place(q, k, v, ids, size):
    """Right, but for ids, which the caller still needs."""
    ids[ids < 0] = 10**6
    return attend_by_mask(q, k, v, ids, size)


def lowered(q, k, v, ids, size):
    """Tokens that are not read are lowered by a fixed number, and may still be above."""
    block = torch.arange(len(k)) // size
    seen = (ids[:, :, None] == block).any(1).tril()
    return (q @ k.T * q.shape[1] ** -0.5 - 1e4 * ~seen).softmax(-1) @ v


ATTENTION = [
    Wrong("others lowered by 1e4", lowered, "channel 0: got"),
    Wrong(
        "largest score from 0 on",
        attend_by_exp(lambda scores: scores.amax(-1, keepdim=True).clamp(min=0)),
        "of a very negative one",
    ),
    Wrong("one largest score for all", attend_by_exp(torch.amax), "of a very negative one"),
    Wrong("itself left out", itself_left_out, "which is wrong"),
    Wrong("ids in place", ids_in_place, "changed its input ids"),
    Wrong("masked with -100", mistakes.masked_with(-100.0), "a finite score"),
    Wrong(
        "blocks of 4 always",
        lambda q, k, v, ids, size: attend_by_mask(q, k, v, ids, 4),
        "which is wrong",
    ),
    *planted(mistakes.ATTENTION, {"-1 read from the end": "block -1: tokens -4 to -1, the end"}),
    Wrong("the choice ignored, by loop", dense_by_loop, "chosen or not"),
    Wrong("-1 read from the end, by gather", read_with_python_indices, "read as block -1"),
    Wrong("exp without the largest", exp_without_the_largest, "exp of a large score"),
    Wrong(
        "tail read past its end",
        tail_past_its_end,
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
