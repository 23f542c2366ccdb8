"""Set 06's answers, for teachers: right ones in several styles, and wrong ones to be named.

The mistakes of mistakes.py are planted as they stand. The others are written by hand, in other
styles or with faults of another kind, so that no mistake is judged by itself alone.
"""

import math

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
        "total is 0, although it has scores: does what you subtract",
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
    Wrong("one big matrix", whole_matrix, "a tensor of 1984 numbers was made"),
    Wrong("the outputs only", lambda *x: attention_by_rows(*x)[0], "2 results were asked for"),
]

RIGHT = {
    "06.1": [key_by_cases, key_with_tensors, key_with_powers_of_two],
    "06.2": [merge_with_logaddexp, merge_by_rows, merge_as_a_softmax],
    "06.3": [fold_row_by_row, fold_with_where, fold_with_a_column_of_ones],
    "06.4": [visit_by_looking, visit_by_mask, visit_by_counting],
    "06.5": [attention_by_rows, attention_by_merging, attention_in_double],
}
WRONG = {"06.1": KEYS, "06.2": MERGES, "06.3": FOLDS, "06.4": VISITS, "06.5": ATTENTIONS}
