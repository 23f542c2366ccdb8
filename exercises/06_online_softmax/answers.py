"""Set 06's answers, for teachers: right ones in several styles, and wrong ones to be named.

The mistakes of mistakes.py are planted as they stand. The others are written by hand, in other
styles or with faults of another kind, so that no mistake is judged by itself alone.
"""

import math
import operator

import numpy as np
import torch

from exercises.records import Wrong, planted

from . import mistakes

# --- 06.1 ---


def key_by_cases(m, total, out, score, value):
    """Two cases: a new largest score, or not."""
    if score > m:
        shrink = math.exp(m - score)
        return score, total * shrink + 1.0, out * shrink + value
    weight = math.exp(score - m)
    return m, total + weight, out + weight * value


def key_with_tensors(m, total, out, score, value):
    """A tensor of two scores, and one product for both sums."""
    both = torch.tensor([m, score], dtype=torch.float64)
    weights = (both - both.max()).exp()
    old = torch.tensor([[total, 1.0], [out, value]], dtype=torch.float64)
    return both.max().item(), *(old @ weights).tolist()


def key_with_powers_of_two(m, total, out, score, value):
    """2 in place of e; a list."""
    new = max(m, score)
    shrink, weight = (2.0 ** ((x - new) / math.log(2)) for x in (m, score))
    return [new, shrink * total + weight, shrink * out + weight * value]


def old_sums_kept(m, total, out, score, value):
    """The new key is weighed with the new m, the old ones with the old."""
    new = max(m, score)
    weight = math.exp(score - new)
    return new, total + weight, out + weight * value


def plain_exp(m, total, out, score, value):
    """Nothing is subtracted before exp."""
    weight = math.exp(score)
    return max(m, score), total * math.exp(m) + weight, out * math.exp(m) + weight * value


def newest_walk():
    """A state of its own: it begins anew where total is 0."""
    state = {}

    def answer(m, total, out, score, value):
        old = (m, total, out) if total == 0 or "now" not in state else state["now"]
        state["now"] = key_by_cases(*old, score, value)
        return state["now"]

    return answer


KEYS = [
    *planted(mistakes.KEYS),
    Wrong("sums not shrunk, by hand", old_sums_kept, "are not brought to the new one"),
    Wrong(
        "m is the newest score",
        mistakes.add(new=lambda m, score: score),
        "the new score, and an earlier score was larger",
    ),
    Wrong(
        "m never changes",
        mistakes.add(new=lambda m, score: m if math.isfinite(m) else score),
        "the old m, and the new score is larger",
    ),
    Wrong(
        "m from 0 on",
        mistakes.add(new=lambda m, score: max(m, score, 0.0)),
        "m is 0: neither the old m nor the new score",
    ),
    Wrong(
        "the largest size",
        mistakes.add(new=lambda m, score: score if abs(score) > abs(m) or math.isinf(m) else m),
        "an earlier score was larger",
    ),
    Wrong(
        "no m below -10000",
        mistakes.add(new=lambda m, score: max(m, score, -1e4)),
        "the first key, far below 0: m is -1e+04: neither",
    ),
    Wrong(
        "no m below -1e9",
        lambda m, *key: mistakes.add()(max(m, -1e9), *key),
        "the first key, far below 0: m is -1e+09: neither",
    ),
    Wrong("a state of its own", newest_walk(), "m is "),
    Wrong("plain exp", plain_exp, "large scores: the function raised OverflowError"),
    Wrong("two results", lambda *x: key_by_cases(*x)[1:], "2 results, and 3 were asked for"),
]

# --- 06.2 ---


def merge_with_logaddexp(out_a, lse_a, out_b, lse_b):
    """PyTorch's logaddexp: -inf and -inf give -inf."""
    lse = torch.logaddexp(lse_a, lse_b)
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    return (lse_a - safe).exp()[:, None] * out_a + (lse_b - safe).exp()[:, None] * out_b, lse


def merge_by_rows(out_a, lse_a, out_b, lse_b):
    """Row by row, in Python numbers."""
    out = torch.zeros_like(out_a)
    lse = torch.full_like(lse_a, -torch.inf)
    for t, both in enumerate(zip(lse_a.tolist(), lse_b.tolist(), strict=True)):
        m = max(both)
        if m == -math.inf:
            continue
        a, b = (math.exp(x - m) for x in both)
        out[t] = (a * out_a[t] + b * out_b[t]) / (a + b)
        lse[t] = math.log(a + b) + m
    return out, lse


def merge_as_a_softmax(out_a, lse_a, out_b, lse_b):
    """The shares are a softmax of the two lse, in double."""
    both = torch.stack([lse_a, lse_b], 1).double()
    dead = (both == -torch.inf).all(1, keepdim=True)
    p = both.masked_fill(dead, 0.0).softmax(1).masked_fill(dead, 0.0)
    out = torch.einsum("tp,tpc->tc", p, torch.stack([out_a, out_b], 1).double())
    return out, both.logsumexp(1)


def shares_crossed(out_a, lse_a, out_b, lse_b):
    """A right share, given to the other part."""
    share = torch.sigmoid(lse_a - lse_b)[:, None]
    return (1 - share) * out_a + share * out_b, torch.logaddexp(lse_a, lse_b)


def average(out_a, lse_a, out_b, lse_b):
    """Both parts count alike."""
    return torch.stack([out_a, out_b]).mean(0), torch.logaddexp(lse_a, lse_b)


def larger_lse_by_sort(out_a, lse_a, out_b, lse_b):
    """A right output; the smaller lse is forgotten."""
    out, _ = merge_by_rows(out_a, lse_a, out_b, lse_b)
    return out, torch.stack([lse_a, lse_b]).sort(0).values[1]


def one_maximum(a, b):
    """The largest lse of all queries."""
    return torch.maximum(a, b).max().expand_as(a)


def no_lse_below(least):
    """-inf becomes `least`, and `least` becomes -inf again."""

    def answer(out_a, lse_a, out_b, lse_b):
        parts = out_a, lse_a.clamp(min=least), out_b, lse_b.clamp(min=least)
        out, lse = merge_with_logaddexp(*parts)
        return out, lse.masked_fill(lse < least + 1, -torch.inf)

    return answer


def merge_by_vmap(out_a, lse_a, out_b, lse_b):
    """Query by query, by torch.vmap."""

    def one(a, x, b, y):
        m = torch.maximum(x, y).clamp(min=-1e38)
        weights = torch.stack([x - m, y - m]).exp()
        total = weights.sum()
        out = (weights @ torch.stack([a, b])) / torch.where(total == 0, 1.0, total)
        return out, m + total.log()

    return torch.vmap(one)(out_a, lse_a, out_b, lse_b)


MERGES = [
    *planted(mistakes.OUTPUTS),
    *planted(mistakes.TOTALS),
    Wrong("average, by stack", average, "averaged, whatever their parts weigh"),
    Wrong("the larger lse, by sort", larger_lse_by_sort, "lse is the larger of the two"),
    Wrong("crosswise, by sigmoid", shares_crossed, "weighed crosswise"),
    Wrong(
        "exp without the larger lse",
        mistakes.merge(largest=lambda a, b: torch.zeros_like(a)),
        "is not finite",
    ),
    Wrong("lse of part a for m", mistakes.merge(largest=lambda a, b: a), "exp of a large lse"),
    Wrong("lse of part b for m", mistakes.merge(largest=lambda a, b: b), "exp of a large lse"),
    Wrong("the smaller lse for m", mistakes.merge(largest=torch.minimum), "exp of a large lse"),
    Wrong(
        "the mean lse for m",
        mistakes.merge(largest=lambda a, b: (a + b) / 2),
        "exp of a large lse overflows",
    ),
    Wrong(
        "m from 0 on",
        mistakes.merge(largest=lambda a, b: torch.maximum(a, b).clamp(min=0)),
        "of a very negative one it is 0",
    ),
    Wrong("one m for all queries", mistakes.merge(largest=one_maximum), "of a very negative one"),
    Wrong(
        "-10000 for an empty part",
        no_lse_below(-1e4),
        "scores far below -10000: query 0 is not finite",
    ),
    Wrong("-inf minus -inf", mistakes.merge(safe=False), "query 1 is NaN: both parts are empty"),
    Wrong(
        "nan_to_num",
        lambda *x: tuple(y.nan_to_num(0.0) for y in mistakes.merge(safe=False)(*x)),
        "query 1 sees nothing in either part, and its lse is 0",
    ),
    Wrong("the outputs only", lambda *x: merge_by_rows(*x)[0], "2 results were asked for"),
]

# --- 06.3 ---


def fold_row_by_row(m, total, out, scores, v):
    """One key of one row at a time."""
    m, total, out = (x.clone() for x in (m, total, out))
    for t in range(len(m)):
        for s, x in zip(scores[t], v, strict=True):
            if s > m[t]:
                shrink = torch.exp(m[t] - s)
                m[t] = s
                total[t] *= shrink
                out[t] *= shrink
            if s > -torch.inf:
                p = torch.exp(s - m[t])
                total[t] += p
                out[t] += p * x
    return m, total, out


def fold_with_where(m, total, out, scores, v):
    """torch.where in place of a safe m."""
    new = torch.cat([m[:, None], scores], 1).amax(1)
    seen = new > -torch.inf
    shrink = torch.where(seen, m - torch.where(seen, new, 0), 0).exp()
    p = torch.where(seen[:, None], scores - torch.where(seen, new, 0)[:, None], -torch.inf).exp()
    return new, total * shrink + p.sum(1), torch.addmm(out * shrink[:, None], p, v)


def fold_with_a_column_of_ones(m, total, out, scores, v):
    """The total is the out of a value that is always 1; in double."""
    both = torch.cat([total[:, None], out], 1).double()
    values = torch.cat([torch.ones(len(v), 1), v], 1).double()
    new = torch.maximum(m, scores.max(1).values)
    safe = new.clamp(min=torch.finfo(new.dtype).min)[:, None].double()
    both = both * (m[:, None] - safe).exp() + (scores - safe).exp() @ values
    return new, both[:, 0], both[:, 1:]


def last_tile_alone(m, total, out, scores, v):
    """A softmax of this tile, whatever was before."""
    largest = scores.amax(1)
    safe = torch.where(largest == -torch.inf, 0.0, largest)
    p = (scores - safe[:, None]).exp()
    return largest, p.sum(1), p @ v


def finite_mask(m, total, out, scores, v):
    """-10000 in place of -inf."""
    return fold_with_where(m, total, out, scores.clamp(min=-1e4), v)


def total_as_a_column(*state):
    """The right state, with total (T, 1)."""
    m, total, out = fold_with_where(*state)
    return m, total[:, None], out


def newest_state():
    """A state of its own: it begins anew where all of total is 0."""
    kept = {}

    def answer(m, total, out, scores, v):
        old = kept["state"] if "state" in kept and total.any() else (m, total, out)
        kept["state"] = fold_with_where(*old, scores, v)
        return kept["state"]

    return answer


def folded_in_place(*names):
    """The right step, written into some of its inputs."""

    def answer(m, total, out, scores, v):
        given = dict(m=m, total=total, out=out)
        state = dict(zip(given, fold_with_where(m, total, out, scores, v), strict=True))
        return [given[x].copy_(y) if x in names else y for x, y in state.items()]

    return answer


def scores_in_place(m, total, out, scores, v):
    """exp in the place of the scores."""
    new = torch.maximum(m, scores.amax(1))
    safe = new.clamp(min=-1e38)
    p = scores.sub_(safe[:, None]).exp_()
    shrink = (m - safe).exp()
    return new, total * shrink + p.sum(1), out * shrink[:, None] + p @ v


def fold_by_merging(m, total, out, scores, v):
    """The tile as a part of its own, merged by its log-sum-exp; m returned is that of the merge."""
    lse = torch.logsumexp(scores, 1)
    safe = lse.clamp(min=-1e38)
    new = torch.logaddexp(m + total.log(), lse)
    top = new.clamp(min=-1e38)
    old = torch.where(total > 0, (m - top).exp(), 0.0)
    p = (scores - safe[:, None]).exp() * (safe - top).exp()[:, None]
    return new, total * old + p.sum(1), out * old[:, None] + p @ v


FOLDS = [
    *planted(mistakes.FOLDS),
    Wrong("only this tile, by softmax", last_tile_alone, "only the last tile counts"),
    Wrong(
        "NaN after a hidden tile",
        mistakes.fold(safe=lambda m: m),
        "is NaN: it sees nothing of tile 0",
    ),
    Wrong(
        "no m at all",
        mistakes.fold(new=lambda m, scores: torch.zeros_like(m)),
        "large scores: row 0 is not finite: exp of a large number overflows",
    ),
    Wrong(
        "returns the safe m",
        mistakes.fold(returned=lambda new, safe: safe),
        "although it has scores after a tile of which it saw nothing",
    ),
    Wrong(
        "one m for all rows",
        mistakes.fold(new=lambda m, scores: torch.maximum(m, scores.max().expand_as(m))),
        "total is 0, although it has scores: does what you subtract",
    ),
    Wrong(
        "m of the newest tile only",
        mistakes.fold(new=lambda m, scores: scores.amax(1)),
        "row 0: m is -inf at the end, although it has scores",
    ),
    Wrong(
        "m from 0 on",
        mistakes.fold(new=lambda m, scores: torch.maximum(m, scores.amax(1)).clamp(min=0)),
        "does what you subtract before exp lie far above them?",
    ),
    Wrong(
        "the first score of a tile for its largest",
        mistakes.fold(new=lambda m, scores: torch.maximum(m, scores[:, 0])),
        "is not finite: exp of a large number overflows",
    ),
    Wrong(
        "-10000 for a safe m",
        mistakes.fold(safe=lambda m: m.clamp(min=-1e4)),
        "scores far below -10000: row 0: total is 0, although it has scores",
    ),
    Wrong("state in place", folded_in_place("m", "total", "out"), "changed its input m in place"),
    Wrong("total in place", folded_in_place("total"), "changed its input total in place"),
    Wrong("scores in place", scores_in_place, "changed its input scores in place"),
    Wrong("a state of its own", newest_state(), "does the function keep a state of its own?"),
    Wrong("-10000 for the mask", finite_mask, "sees nothing in any tile, and its total is not 0"),
    Wrong("m forgotten", lambda *x: fold_with_where(*x)[1:], "2 results, and 3 were asked for"),
    Wrong(
        "total as a column",
        total_as_a_column,
        "result 2: the shape is (4, 1), and (4,) was asked for",
    ),
]

# --- 06.4 ---


def seen_by(t, count, l, d):
    """How many of the keys query t sees."""
    return min(count, max(0, (t + 1 - l) // d + 1))


def visit_by_looking(first, last, count, block_size, stride, tile):
    """Tile by tile, from the ends of its keys."""
    visit = []
    mask = []
    for start in range(0, count, tile):
        ends = [i * stride + block_size - 1 for i in range(start, min(start + tile, count))]
        if ends[0] <= last:
            visit.append(start)
            if ends[-1] > first:
                mask.append(start)
    return visit, mask


def visit_by_mask(first, last, count, block_size, stride, tile):
    """The whole mask, cut into tiles."""
    t = torch.arange(first, last + 1)[:, None]
    seen = (torch.arange(count) * stride + block_size <= t + 1).split(tile, 1)
    visit = [n * tile for n, part in enumerate(seen) if part.any()]
    return visit, [x for x in visit if not seen[x // tile].all()]


def visit_by_counting(first, last, count, block_size, stride, tile):
    """From how many keys the first and the last query see."""
    high = seen_by(last, count, block_size, stride)
    full = seen_by(first, count, block_size, stride)
    whole = -(-full // tile) if full == count else full // tile  # tiles that all rows see
    tiles = -(-high // tile)
    return [x * tile for x in range(tiles)], [x * tile for x in range(whole, tiles)]


def visiting(
    high=lambda first, last, n, l, d: seen_by(last, n, l, d),
    full=lambda first, last, n, l, d: seen_by(first, n, l, d),
    short=True,
    add=0,
):
    """The right answer with one step changed."""

    def answer(first, last, count, l, d, tile):
        all_see = full(first, last, count, l, d)
        visit = list(range(0, high(first, last, count, l, d) + add, tile))
        ends = {x: min(x + tile, count) if short else x + tile for x in visit}
        return visit, [x for x in visit if ends[x] > all_see]

    return answer


def unmasked_for_one_query(first, last, *sizes):
    """One query needs no mask, it says."""
    visit, mask = visit_by_looking(first, last, *sizes)
    return visit, mask if first < last else []


def other_sizes(change):
    """The right answer for other sizes."""
    return lambda first, last, count, l, d, tile: visit_by_looking(
        first, last, count, *change(l, d, tile)
    )


VISITS = [
    Wrong("all tiles", visiting(high=lambda first, last, n, l, d: n), "after the last query"),
    Wrong(
        "what the first query sees",
        visiting(high=lambda first, last, n, l, d: seen_by(first, n, l, d)),
        "is not visited, and query 19 has passed its key 8",
    ),
    Wrong("all masked", visiting(full=lambda *x: -1), "every query has passed all of it"),
    Wrong("none masked", visiting(full=lambda *x: 10**6), "is not masked, and its key"),
    Wrong(
        "unmasked if the last query sees it",
        visiting(full=lambda first, last, n, l, d: seen_by(last, n, l, d)),
        "is not masked, and its key",
    ),
    Wrong(
        "seen once begun",
        visiting(high=lambda first, last, n, l, d: min(n, last // d + 1)),
        "after the last query",
    ),
    Wrong("one key too many", visiting(add=1), "after the last query"),
    Wrong("one key too few", visiting(add=-1), "is not visited"),
    Wrong(
        "stride ignored",
        visiting(high=lambda first, last, n, l, d: seen_by(last, n, l, l)),
        "is not visited",
    ),
    Wrong(
        "blocks of 4", other_sizes(lambda l, d, tile: (4, d, tile)), "is not masked, and its key"
    ),
    Wrong(
        "blocks of two strides",
        other_sizes(lambda l, d, tile: (2 * d, d, tile)),
        "is to be masked, and every query has passed all of it",
    ),
    Wrong("half a block", other_sizes(lambda l, d, tile: (l, l // 2, tile)), "is "),
    Wrong("one query unmasked", unmasked_for_one_query, "one query: queries 22 to 22: tile 5"),
    Wrong(
        "the short tile taken for a long one",
        visiting(short=False),
        "tile 8, keys 8 to 10, is to be masked, and every query has passed all of it",
    ),
    Wrong(
        "numbers of tiles",
        lambda *x: tuple([y // x[-1] for y in part] for part in visit_by_looking(*x)),
        "is not the first key of a tile",
    ),
    Wrong("the tiles only", lambda *x: visit_by_looking(*x)[0], "3 results, and 2 were asked for"),
]

# --- 06.5 ---


def attention_by_rows(q, k, v, block_size, stride, rows, keys):
    """Each row walks alone, and keeps a mean and its lse."""
    out = torch.zeros(len(q), v.shape[1])
    lse = torch.full((len(q),), -torch.inf)
    for t in range(len(q)):
        seen = seen_by(t, len(k), block_size, stride)
        for first in range(0, seen, keys):
            part = slice(first, min(first + keys, seen))
            scores = k[part] @ q[t] / q.shape[1] ** 0.5
            new = torch.logaddexp(lse[t], scores.logsumexp(0))
            out[t] = out[t] * (lse[t] - new).exp() + (scores - new).exp() @ v[part]
            lse[t] = new
    return out, lse


def attention_by_merging(q, k, v, block_size, stride, rows, keys):
    """Every tile alone, and the parts merged from the last key to the first."""
    parts = []
    for first in range(0, len(q), rows):
        t = torch.arange(first, min(first + rows, len(q)))[:, None]
        state = torch.zeros(len(t), v.shape[1]), torch.full((len(t),), -torch.inf)
        seen = seen_by(int(t[-1]), len(k), block_size, stride)
        for start in reversed(range(0, seen, keys)):
            i = torch.arange(start, min(start + keys, seen))
            one = tile_alone(q[t[:, 0]], k[i], v[i], i * stride + block_size - 1 <= t)
            state = tuple(x.float() for x in merge_as_a_softmax(*one, *state))
        parts.append(state)
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def tile_alone(q, k, v, mask):
    """Attention of some rows to the keys of one tile; 0 and -inf where the mask allows none."""
    scores = (q @ k.T * q.shape[1] ** -0.5).masked_fill(~mask, -torch.inf)
    dead = ~mask.any(1, keepdim=True)
    p = scores.masked_fill(dead, 0.0).softmax(1).masked_fill(dead, 0.0)
    return p @ v, scores.logsumexp(1)


def attention_in_double(q, k, v, block_size, stride, rows, keys):
    """Every tile masked, in double."""
    q, k, v = (x.double() for x in (q, k, v))
    out = q.new_zeros(len(q), v.shape[1])
    lse = torch.full_like(out[:, 0], -torch.inf)
    for first in range(0, len(q), rows):
        t = torch.arange(first, min(first + rows, len(q)))
        state = torch.full_like(lse[t], -torch.inf), torch.zeros_like(lse[t]), out[t]
        for start in visit_by_looking(first, int(t[-1]), len(k), block_size, stride, keys)[0]:
            i = torch.arange(start, min(start + keys, len(k)))
            hidden = i * stride + block_size - 1 > t[:, None]
            scores = (q[t] @ k[i].T / q.shape[1] ** 0.5).masked_fill(hidden, -torch.inf)
            state = fold_with_where(*state, scores, v[i])
        m, total, sums = state
        out[t] = sums / torch.where(total == 0, 1, total)[:, None]
        lse[t] = m + total.log()
    return out, lse


def all_tiles(first, last, count, l, d, tile):
    """Every tile is visited and masked."""
    starts = list(range(0, count, tile))
    return starts, starts


def whole_matrix(q, k, v, l, d, rows, keys):
    """Right, but with a square of scores."""
    count = seen_by(len(q) - 1, len(k), l, d)
    k, v = (x[:count] for x in (k, v))
    seen = torch.arange(count) * d + l - 1 <= torch.arange(len(q))[:, None]
    return tile_alone(q, k, v, seen)


def state_of_all_rows(q, k, v, block_size, stride, rows, keys):
    """Each tile of rows begins with the sums of the tiles before, added up at the end."""
    out, lse = attention_by_rows(q, k, v, block_size, stride, rows, keys)
    total = lse.exp()
    sums = total[:, None] * out
    for t in range(rows, len(q)):
        total[t] += total[t - rows]
        sums[t] += sums[t - rows]
    return sums / torch.where(total == 0, 1, total)[:, None], total.log()


def lse_in_base_2(*arguments):
    """A right output; log2 in place of ln."""
    out, lse = attention_by_rows(*arguments)
    return out, torch.log2(lse.exp())


def attention_in_two_walks(q, k, v, block_size, stride, rows, keys):
    """First the largest score of each row, then one sum with it; scores as (keys, rows)."""
    parts = []
    for t in torch.arange(len(q)).split(rows):
        last = int(t[-1])
        starts = range(0, seen_by(last, len(k), block_size, stride), keys)
        tiles = [slice(start, min(start + keys, len(k))) for start in starts]

        def scores(tile, t=t):
            i = torch.arange(tile.start, tile.stop)[:, None]
            hidden = i * stride + block_size - 1 > t
            return (k[tile] @ q[t].T / q.shape[1] ** 0.5).masked_fill(hidden, -torch.inf)

        top = torch.full((len(t),), -1e38)
        for tile in tiles:
            top = torch.maximum(top, scores(tile).amax(0))
        total = torch.zeros(len(t))
        sums = torch.zeros(len(t), v.shape[1])
        for tile in tiles:
            p = (scores(tile) - top).exp()
            total = total + p.sum(0)
            sums = sums + p.T @ v[tile]
        parts.append((sums / torch.where(total == 0, 1, total)[:, None], top + total.log()))
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def attention_with_products_by_hand(q, k, v, block_size, stride, rows, keys):
    """Products as sums over channels, one key at a time."""
    out = torch.zeros(len(q), v.shape[1])
    lse = torch.full((len(q),), -torch.inf)
    for first in range(0, len(q), rows):
        t = torch.arange(first, min(first + rows, len(q)))
        state = torch.full((len(t),), -torch.inf), torch.zeros(len(t)), torch.zeros_like(out[t])
        for i in range(seen_by(int(t[-1]), len(k), block_size, stride)):
            s = (q[t] * k[i]).sum(1, keepdim=True) / q.shape[1] ** 0.5
            s = s.masked_fill((i * stride + block_size - 1 > t)[:, None], -torch.inf)
            state = fold_with_where(*state, s, v[i : i + 1])
        out[t] = state[2] / torch.where(state[1] == 0, 1, state[1])[:, None]
        lse[t] = state[0] + state[1].log()
    return out, lse


def other_tiles(change):
    """The right answer with other tiles."""
    walk = mistakes.walk()
    return lambda q, k, v, l, d, rows, keys: walk(
        q, k, v, l, d, *change(rows, keys, len(q), len(k))
    )


def whole_rows(q, k, v, block_size, stride, rows, keys):
    """Some queries at a time, and all the keys that they see."""
    parts = []
    for t in torch.arange(len(q)).split(rows):
        count = seen_by(int(t[-1]), len(k), block_size, stride)
        mask = torch.arange(count) * stride + block_size - 1 <= t[:, None]
        parts.append(tile_alone(q[t], k[:count], v[:count], mask))
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def through_arrays(q, k, v, l, d, rows, keys):
    """A square of scores in NumPy."""
    count = seen_by(len(q) - 1, len(k), l, d)
    hidden = np.arange(count) * d + l - 1 > np.arange(len(q))[:, None]
    scores = q.numpy() @ k.numpy()[:count].T / math.sqrt(q.shape[1])
    scores[hidden] = -np.inf
    top = scores.max(1, initial=np.float32(-1e38), keepdims=True)
    p = np.exp(scores - top)
    total = p.sum(1, keepdims=True)
    out = p @ v.numpy()[:count] / np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[:, 0]
    return torch.from_numpy(out), torch.from_numpy(lse)


def through_lists(q, k, v, l, d, rows, keys):
    """Row by row in Python's numbers."""
    outs = []
    lses = []
    for t, row in enumerate(q.tolist()):
        seen = k.tolist()[: seen_by(t, len(k), l, d)]
        scores = [sum(map(operator.mul, row, key)) / math.sqrt(len(row)) for key in seen]
        top = max(scores, default=0.0)
        p = torch.tensor([math.exp(x - top) for x in scores])
        outs.append(p @ v[: len(p)] / p.sum() if scores else torch.zeros(v.shape[1]))
        lses.append(top + p.sum().log())
    return torch.stack(outs), torch.stack(lses)


def every_tile_kept(q, k, v, l, d, rows, keys):
    """The right walk, which keeps its scores."""
    kept = []

    def step(m, total, out, scores, v):
        kept.append(scores)
        return mistakes.FOLD(m, total, out, scores, v)

    return mistakes.walk(step=step)(q, k, v, l, d, rows, keys)


def nan_made_0(q, k, v, *sizes):
    """Tiles that nobody sees, with 0 in the place of NaN."""
    return mistakes.walk(tiles=all_tiles)(q, k.nan_to_num(), v.nan_to_num(), *sizes)


ATTENTIONS = [
    *planted(mistakes.WALKS),
    *planted(mistakes.ENDS),
    *planted([mistakes.NOT_DIVIDED]),
    Wrong(
        "no scale, by rows",
        lambda q, *others: attention_by_rows(q * q.shape[1] ** 0.5, *others),
        "not divided by the root of the width",
    ),
    Wrong("lse in base 2, by rows", lse_in_base_2, "lse has another base than e"),
    Wrong("state carried over, at the end", state_of_all_rows, "with the state of the tile before"),
    Wrong(
        "-10000 for the mask",
        mistakes.walk(step=finite_mask),
        "query 0 sees no block, and its output is not 0",
    ),
    Wrong(
        "NaN rows at the end",
        mistakes.walk(finish=lambda m, total, sums: (sums / total[:, None], m + total.log())),
        "query 0 sees no block, and it is NaN",
    ),
    Wrong(
        "NaN in the step",
        mistakes.walk(step=mistakes.fold(safe=lambda m: m)),
        "query 0 sees no block, and it is NaN",
    ),
    Wrong(
        "short tile of rows left out",
        mistakes.walk(row_end=lambda length, rows: length // rows * rows),
        "query 16 sees blocks, and its out is 0 and its lse -inf",
    ),
    Wrong(
        "tiles that nobody sees",
        mistakes.walk(tiles=all_tiles),
        "does your walk load a tile of them",
    ),
    Wrong("one big matrix", whole_matrix, "a tensor of 8554 numbers was made"),
    Wrong("all keys for each tile of rows", whole_rows, "scores of the shape 6 x "),
    Wrong(
        "all keys for each row",
        lambda q, k, v, l, d, rows, keys: whole_rows(q, k, v, l, d, 1, keys),
        "were made, and a tile has fewer",
    ),
    Wrong("all rows for each tile of keys", other_tiles(lambda r, n, T, N: (T, n)), "94 x 7 were"),
    Wrong("tiles of twice the rows", other_tiles(lambda r, n, T, N: (2 * r, n)), "12 x 7 were"),
    Wrong("tiles of twice the keys", other_tiles(lambda r, n, T, N: (r, 2 * n)), "load a tile of"),
    Wrong("rows and keys exchanged", other_tiles(lambda r, n, T, N: (n, r)), "load a tile of them"),
    Wrong("square tiles", other_tiles(lambda r, n, T, N: (r, r)), "load a tile of them"),
    Wrong("tiles of 4 by 4", other_tiles(lambda r, n, T, N: (4, 4)), "load a tile of them"),
    Wrong("a square in NumPy", through_arrays, "numbers left PyTorch at once"),
    Wrong("rows in lists", through_lists, "numbers left PyTorch at once"),
    Wrong("every tile kept", every_tile_kept, "numbers were kept at once"),
    Wrong("every tile visited, NaN made 0", nan_made_0, "are tiles loaded that nobody sees?"),
    Wrong(
        "no maximum",
        mistakes.walk(step=mistakes.fold(new=lambda m, scores: torch.zeros_like(m))),
        "has lost its sums",
    ),
    Wrong(
        "m from 0 on",
        mistakes.walk(
            step=mistakes.fold(new=lambda m, scores: torch.maximum(m, scores.amax(1)).clamp(min=0))
        ),
        "has lost its sums",
    ),
    Wrong(
        "one m for all rows",
        mistakes.walk(
            step=mistakes.fold(
                new=lambda m, scores: torch.maximum(m, scores.max()).max().expand(len(m))
            )
        ),
        "has lost its sums",
    ),
    Wrong(
        "-10000 for a safe m",
        mistakes.walk(step=mistakes.fold(safe=lambda m: m.clamp(min=-1e4))),
        "has lost its sums",
    ),
    Wrong(
        "scores halved",
        mistakes.walk(scale=lambda width: 0.5),
        "scale: out: query",
    ),
    Wrong("the outputs only", lambda *x: attention_by_rows(*x)[0], "2 results were asked for"),
]

RIGHT = {
    "06.1": [key_by_cases, key_with_tensors, key_with_powers_of_two],
    "06.2": [merge_with_logaddexp, merge_by_rows, merge_as_a_softmax, merge_by_vmap],
    "06.3": [fold_row_by_row, fold_with_where, fold_with_a_column_of_ones, fold_by_merging],
    "06.4": [visit_by_looking, visit_by_mask, visit_by_counting],
    "06.5": [
        attention_by_rows,
        attention_by_merging,
        attention_in_double,
        attention_in_two_walks,
        attention_with_products_by_hand,
    ],
}
WRONG = {"06.1": KEYS, "06.2": MERGES, "06.3": FOLDS, "06.4": VISITS, "06.5": ATTENTIONS}
