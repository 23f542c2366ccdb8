"""Planted wrong answers that the checks of set 06 must name, and right ones they must accept."""

import math

import torch

from exercises.records import Wrong

# --- 06.1 ---


def key_by_cases(m, total, out, score, value):
    if score > m:
        shrink = math.exp(m - score)
        return score, total * shrink + 1.0, out * shrink + value
    weight = math.exp(score - m)
    return m, total + weight, out + weight * value


def key_with_tensors(m, total, out, score, value):
    both = torch.tensor([m, score], dtype=torch.float64)
    weights = (both - both.max()).exp()
    old = torch.tensor([[total, 1.0], [out, value]], dtype=torch.float64)
    return both.max().item(), *(old @ weights).tolist()


def key_with_powers_of_two(m, total, out, score, value):
    new = max(m, score)
    shrink, weight = (2.0 ** ((x - new) / math.log(2)) for x in (m, score))
    return [new, shrink * total + weight, shrink * out + weight * value]


def add(
    new=max,
    old=lambda m, new: math.exp(m - new),
    weight=lambda m, s, new: math.exp(s - new),
    total=True,
    out=True,
):
    """The right answer with one step changed."""

    def answer(m, sum_, mean, score, value):
        m_new = new(m, score)
        shrink, w = old(m, m_new), weight(m, score, m_new)
        return (
            m_new,
            sum_ * (shrink if total else 1) + w,
            mean * (shrink if out else 1) + w * value,
        )

    return answer


def divided(m, total, out, score, value):
    m, total, out = key_by_cases(m, total, out, score, value)
    return m, total, out / total


def unweighted(m, total, out, score, value):
    new, total_new, _ = key_by_cases(m, total, out, score, value)
    return new, total_new, out * math.exp(m - new) + value


KEYS = [
    Wrong("sums not shrunk", add(total=False, out=False), "are not brought to the new one"),
    Wrong("total shrinks, out does not", add(out=False), "the old out is not"),
    Wrong("out shrinks, total does not", add(total=False), "the old total is not"),
    Wrong("factor upside down", add(old=lambda m, new: math.exp(min(new - m, 700))), "upside down"),
    Wrong(
        "weighed with the old m",
        add(weight=lambda m, s, new: math.exp(s - (m if math.isfinite(m) else s))),
        "the new key is weighed with the old m",
    ),
    Wrong(
        "m is the newest score",
        add(new=lambda m, s: s, old=lambda m, new: math.exp(m - new)),
        "the new score, and an earlier score was larger",
    ),
    Wrong(
        "m never changes",
        add(new=lambda m, s: m if math.isfinite(m) else s),
        "the old m, and the new score is larger",
    ),
    Wrong("divided at every key", divided, "out is divided by total already"),
    Wrong("value without its weight", unweighted, "without its weight"),
    Wrong(
        "plain exp",
        lambda m, total, out, s, x: (
            max(m, s),
            total * math.exp(m) + math.exp(s),
            out * math.exp(m) + math.exp(s) * x,
        ),
        "large scores: the function raised OverflowError",
    ),
    Wrong("two results", lambda *x: key_by_cases(*x)[1:], "2 results, and 3 were asked for"),
]

# --- 06.2 ---


def merge_with_logaddexp(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)  # -inf and -inf give -inf
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    return (lse_a - safe).exp()[:, None] * out_a + (lse_b - safe).exp()[:, None] * out_b, lse


def merge_by_rows(out_a, lse_a, out_b, lse_b):
    out, lse = torch.zeros_like(out_a), torch.full_like(lse_a, -torch.inf)
    for t in range(len(lse)):
        a, b = float(lse_a[t]), float(lse_b[t])
        if max(a, b) == -math.inf:
            continue
        weights = [math.exp(x - max(a, b)) for x in (a, b)]
        out[t] = (weights[0] * out_a[t] + weights[1] * out_b[t]) / sum(weights)
        lse[t] = math.log(sum(weights)) + max(a, b)
    return out, lse


def merge_as_a_softmax(out_a, lse_a, out_b, lse_b):
    both = torch.stack([lse_a, lse_b], 1).double()
    dead = (both == -torch.inf).all(1, keepdim=True)
    p = both.masked_fill(dead, 0.0).softmax(1).masked_fill(dead, 0.0)
    out = torch.einsum("tp,tpc->tc", p, torch.stack([out_a, out_b], 1).double())
    return out, both.logsumexp(1)


def merge(
    weights=lambda a, b: (a, b),
    finish=lambda out, lse, m: (out, lse),
    m=torch.maximum,
    safe=True,
    divide=True,
):
    """The right answer with one step changed."""

    def answer(out_a, lse_a, out_b, lse_b):
        top = m(lse_a, lse_b)
        zero = top.masked_fill(top == -torch.inf, 0.0) if safe else top
        a, b = weights((lse_a - zero).exp(), (lse_b - zero).exp())
        total = a + b
        out = a[:, None] * out_a + b[:, None] * out_b
        if divide:
            out = out / torch.where(total == 0, 1, total)[:, None]
        return finish(out, total.log() + zero, top)

    return answer


def average(out_a, lse_a, out_b, lse_b):
    return (out_a + out_b) / 2, torch.logaddexp(lse_a, lse_b)


def by_lse_itself(out_a, lse_a, out_b, lse_b):
    a = (lse_a / (lse_a + lse_b))[:, None]
    return a * out_a + (1 - a) * out_b, torch.logaddexp(lse_a, lse_b)


def larger_alone(out_a, lse_a, out_b, lse_b):
    return torch.where((lse_a > lse_b)[:, None], out_a, out_b), torch.logaddexp(lse_a, lse_b)


MERGES = [
    Wrong("average", average, "averaged, whatever their parts weigh"),
    Wrong(
        "sum of the outputs",
        lambda a, la, b, lb: (a + b, torch.logaddexp(la, lb)),
        "added, not weighed",
    ),
    Wrong("weighed by lse", by_lse_itself, "weighed by lse itself"),
    Wrong("crosswise", merge(weights=lambda a, b: (b, a)), "crosswise"),
    Wrong("the larger part alone", larger_alone, "the larger part is taken alone"),
    Wrong("not divided", merge(divide=False), "not divided by the sum of the weights"),
    Wrong(
        "lse added",
        lambda a, la, b, lb: (merge()(a, la, b, lb)[0], la + lb),
        "the two lse are added",
    ),
    Wrong("the larger lse", merge(finish=lambda out, lse, m: (out, m)), "the larger of the two"),
    Wrong(
        "lse without m", merge(finish=lambda out, lse, m: (out, lse - m)), "lacks the largest score"
    ),
    Wrong("exp without the larger lse", merge(m=lambda a, b: torch.zeros_like(a)), "is not finite"),
    Wrong("-inf minus -inf", merge(safe=False), "query 1 is NaN: both parts are empty"),
    Wrong(
        "nan_to_num",
        lambda *x: tuple(y.nan_to_num(0.0) for y in merge(safe=False)(*x)),
        "query 1 sees nothing in either part, and its lse is 0",
    ),
    Wrong("base 2", merge(finish=lambda out, lse, m: (out, lse / math.log(2))), "has base 2"),
    Wrong("the outputs only", lambda *x: merge()(*x)[0], "2 results were asked for"),
]

# --- 06.3 ---


def fold_row_by_row(m, total, out, scores, v):
    m, total, out = m.clone(), total.clone(), out.clone()
    for t in range(len(m)):
        for s, x in zip(scores[t], v, strict=True):
            if s > m[t]:
                shrink = torch.exp(m[t] - s)
                m[t], total[t], out[t] = s, total[t] * shrink, out[t] * shrink
            if s > -torch.inf:
                p = torch.exp(s - m[t])
                total[t], out[t] = total[t] + p, out[t] + p * x
    return m, total, out


def fold_with_where(m, total, out, scores, v):
    new = torch.cat([m[:, None], scores], 1).amax(1)
    seen = new > -torch.inf
    shrink = torch.where(seen, m - torch.where(seen, new, 0), 0).exp()
    p = torch.where(seen[:, None], scores - torch.where(seen, new, 0)[:, None], -torch.inf).exp()
    return new, total * shrink + p.sum(1), torch.addmm(out * shrink[:, None], p, v)


def fold_with_a_column_of_ones(m, total, out, scores, v):
    # the total is the out of a value that is always 1
    both = torch.cat([total[:, None], out], 1).double()
    values = torch.cat([torch.ones(len(v), 1), v], 1).double()
    new = torch.maximum(m, scores.max(1).values)
    safe = new.clamp(min=torch.finfo(new.dtype).min)[:, None].double()
    both = both * (m[:, None] - safe).exp() + (scores - safe).exp() @ values
    return new, both[:, 0], both[:, 1:]


def fold(
    new=lambda m, s: torch.maximum(m, s.amax(1)),
    safe=lambda m: m.masked_fill(m == -torch.inf, 0.0),
    shrink=lambda m, safe: (m - safe).exp(),
    total_too=True,
    out_too=True,
    returned=lambda new, safe: new,
    weight=lambda m, safe: safe,
):
    """The right answer with one step changed."""

    def answer(m, total, out, scores, v):
        m_new = new(m, scores)
        m_safe = safe(m_new)
        old = shrink(m, m_safe)
        p = (scores - weight(m, m_safe)[:, None]).exp()
        return (
            returned(m_new, m_safe),
            total * (old if total_too else 1) + p.sum(1),
            out * (old[:, None] if out_too else 1) + p @ v,
        )

    return answer


def keep(m):
    return m


FOLDS = [
    Wrong("NaN after a hidden tile", fold(safe=keep), "is NaN: it sees nothing of tile 0"),
    Wrong(
        "sums not shrunk",
        fold(total_too=False, out_too=False),
        "does not shrink the sums of the earlier tiles",
    ),
    Wrong("total only", fold(out_too=False), "total shrinks with a new m, and out does not"),
    Wrong("out only", fold(total_too=False), "out shrinks with a new m, and total does not"),
    Wrong(
        "upside down",
        fold(
            shrink=lambda m, safe: (
                torch.where(m == -torch.inf, 0, safe - m).exp() * (m > -torch.inf)
            )
        ),
        "upside down",
    ),
    Wrong(
        "weighed with the old m",
        fold(weight=lambda m, safe: torch.where(m == -torch.inf, safe, m)),
        "with the m before it",
    ),
    Wrong(
        "no m at all",
        fold(new=lambda m, s: torch.zeros_like(m)),
        "total is 0, although it has scores: does what you subtract",
    ),
    Wrong(
        "returns the safe m",
        fold(returned=lambda new, safe: safe),
        "although it has scores after a tile of which it saw nothing",
    ),
    Wrong(
        "one m for all rows",
        fold(new=lambda m, s: torch.maximum(m, s.max().expand_as(m))),
        "total is 0, although it has scores: does what you subtract",
    ),
    Wrong(
        "m of the newest tile only",
        fold(new=lambda m, s: s.amax(1)),
        "row 0: m is -inf at the end, although it has scores",
    ),
    Wrong(
        "-10000 for the mask",
        lambda m, total, out, s, v: fold()(m, total, out, s.clamp(min=-1e4), v),
        "sees nothing in any tile, and its total is not 0",
    ),
    Wrong(
        "only this tile",
        lambda m, total, out, s, v: fold()(
            torch.full_like(m, -torch.inf), total * 0, out * 0, s, v
        ),
        "only the last tile counts",
    ),
    Wrong("m forgotten", lambda *x: fold()(*x)[1:], "2 results, and 3 were asked for"),
    Wrong(
        "total as a column",
        lambda *x: (lambda m, total, out: (m, total[:, None], out))(*fold()(*x)),
        "result 2: the shape is (4, 1), and (4,) was asked for",
    ),
]

# --- 06.4 ---


def seen_by(t, count, l, d):
    return min(count, max(0, (t + 1 - l) // d + 1))


def visit_by_looking(first, last, count, block_size, stride, tile):
    visit, mask = [], []
    for start in range(0, count, tile):
        ends = [i * stride + block_size - 1 for i in range(start, min(start + tile, count))]
        if ends[0] <= last:
            visit.append(start)
            if ends[-1] > first:
                mask.append(start)
    return visit, mask


def visit_by_mask(first, last, count, block_size, stride, tile):
    t = torch.arange(first, last + 1)[:, None]
    seen = (torch.arange(count) * stride + block_size <= t + 1).split(tile, 1)
    visit = [n * tile for n, part in enumerate(seen) if part.any()]
    return visit, [x for x in visit if not seen[x // tile].all()]


def visit_by_counting(first, last, count, block_size, stride, tile):
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
        top, all_see = high(first, last, count, l, d), full(first, last, count, l, d)
        visit = list(range(0, top + add, tile))
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
        lambda *x: tuple([y // x[-1] for y in part] for part in visiting()(*x)),
        "is not the first key of a tile",
    ),
    Wrong("the tiles only", lambda *x: visiting()(*x)[0], "3 results, and 2 were asked for"),
]

# --- 06.5 ---


def attention_by_rows(q, k, v, block_size, stride, rows, keys):
    out, lse = torch.zeros(len(q), v.shape[1]), torch.full((len(q),), -torch.inf)
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
    # every tile alone, and the parts merged from the last key to the first
    out, lse = [], []
    for first in range(0, len(q), rows):
        t = torch.arange(first, min(first + rows, len(q)))[:, None]
        state = torch.zeros(len(t), v.shape[1]), torch.full((len(t),), -torch.inf)
        for start in reversed(range(0, seen_by(int(t[-1]), len(k), block_size, stride), keys)):
            i = torch.arange(start, min(start + keys, len(k)))
            i = i[i * stride + block_size - 1 <= t[-1]]
            mask = i * stride + block_size - 1 <= t
            scores = (q[t[:, 0]] @ k[i].T * q.shape[1] ** -0.5).masked_fill(~mask, -torch.inf)
            dead = ~mask.any(1, keepdim=True)
            p = scores.masked_fill(dead, 0.0).softmax(1).masked_fill(dead, 0.0)
            state = merge_as_a_softmax(p @ v[i], scores.logsumexp(1), *state)
            state = state[0].float(), state[1].float()
        out.append(state[0])
        lse.append(state[1])
    return torch.cat(out), torch.cat(lse)


def attention_in_double(q, k, v, block_size, stride, rows, keys):
    return walk()(q.double(), k.double(), v.double(), block_size, stride, rows, keys)


def walk(
    tiles=visit_by_looking,
    step=fold_with_where,
    scale=lambda width: width**-0.5,
    row_mask=lambda t, first: t,
    key_mask=lambda i, start: i,
    masked=True,
    divide=True,
    reset=True,
    base=1.0,
    dead=True,
    key_end=lambda x, n: min(x, n),
    row_end=lambda length, rows: length,
    end_of=lambda i, l, d: i * d + l - 1,
):
    """The right answer with one step changed."""

    def answer(q, k, v, l, d, rows, keys):
        out, lse = q.new_zeros(len(q), v.shape[1]), q.new_full((len(q),), -torch.inf)
        carried = None
        for first in range(0, row_end(len(q), rows), rows):
            t = torch.arange(first, min(first + rows, len(q)))
            state = (
                q.new_full((len(t),), -torch.inf),
                q.new_zeros(len(t)),
                q.new_zeros(len(t), v.shape[1]),
            )
            if not reset and carried is not None and len(carried[0]) == len(t):
                state = carried
            visit, mask = tiles(first, int(t[-1]), len(k), l, d, keys)
            for start in visit:
                i = torch.arange(start, key_end(start + keys, len(k)))
                scores = q[t] @ k[i].T * scale(q.shape[1])
                if masked and start in mask:
                    ends = end_of(key_mask(i, start), l, d)
                    scores = scores.masked_fill(ends > row_mask(t, first)[:, None], -torch.inf)
                state = step(*state, scores, v[i])
            carried = m, total, sums = state
            safe = torch.where(total == 0, 1, total) if dead else total
            out[t] = sums / safe[:, None] if divide else sums
            lse[t] = (m + total.log()) / base
        return out, lse

    return answer


def all_tiles(first, last, count, l, d, tile):
    starts = list(range(0, count, tile))
    return starts, starts


def edge_left_out(first, last, count, l, d, tile):
    visit, mask = visit_by_looking(first, last, count, l, d, tile)
    return [x for x in visit if x not in mask], []


def whole_matrix(q, k, v, l, d, rows, keys):
    count = seen_by(len(q) - 1, len(k), l, d)
    k, v = k[:count], v[:count]
    seen = torch.arange(count) * d + l - 1 <= torch.arange(len(q))[:, None]
    dead = ~seen.any(1, keepdim=True)
    scores = (q @ k.T * q.shape[1] ** -0.5).masked_fill(~seen, -torch.inf)
    p = scores.masked_fill(dead, 0.0).softmax(1).masked_fill(dead, 0.0)
    return p @ v, scores.logsumexp(1)


def forget(m, total, out, scores, v):
    return fold_with_where(torch.full_like(m, -torch.inf), total * 0, out * 0, scores, v)


ATTENTIONS = [
    Wrong("no mask on the edge", walk(masked=False), "tiles on the edge are not masked"),
    Wrong(
        "-10000 for the mask",
        walk(step=lambda m, total, out, s, v: fold_with_where(m, total, out, s.clamp(min=-1e4), v)),
        "query 0 sees no block, and its output is not 0",
    ),
    Wrong("NaN rows at the end", walk(dead=False), "query 0 sees no block, and it is NaN"),
    Wrong("NaN in the step", walk(step=fold(safe=keep)), "query 0 sees no block, and it is NaN"),
    Wrong(
        "rows counted in their tile",
        walk(row_mask=lambda t, first: t - first),
        "counts queries from the first row of their tile",
    ),
    Wrong(
        "keys counted in their tile",
        walk(key_mask=lambda i, start: i - start),
        "from the first key of their tile",
    ),
    Wrong("state carried over", walk(reset=False), "with the state of the tile before"),
    Wrong("no scale", walk(scale=lambda width: 1.0), "not divided by the root of the width"),
    Wrong("scale by the width", walk(scale=lambda width: 1 / width), "divided by the width"),
    Wrong("edge left out", walk(tiles=edge_left_out), "the tiles on the edge are left out"),
    Wrong("only the last tile", walk(step=forget), "only the last visited tile of keys counts"),
    Wrong("not divided", walk(divide=False), "out is not divided by total"),
    Wrong("lse in base 2", walk(base=math.log(2)), "another base than e"),
    Wrong(
        "short tile of rows left out",
        walk(row_end=lambda n, rows: n // rows * rows),
        "query 16 sees blocks, and its out is 0 and its lse -inf",
    ),
    Wrong("tiles that nobody sees", walk(tiles=all_tiles), "does your walk load a tile of them"),
    Wrong("one big matrix", whole_matrix, "a tensor of 1984 numbers was made"),
    Wrong("the outputs only", lambda *x: walk()(*x)[0], "2 results were asked for"),
]

RIGHT = {
    "06.1": [key_by_cases, key_with_tensors, key_with_powers_of_two],
    "06.2": [merge_with_logaddexp, merge_by_rows, merge_as_a_softmax],
    "06.3": [fold_row_by_row, fold_with_where, fold_with_a_column_of_ones],
    "06.4": [visit_by_looking, visit_by_mask, visit_by_counting],
    "06.5": [attention_by_rows, attention_by_merging, attention_in_double],
}
WRONG = {"06.1": KEYS, "06.2": MERGES, "06.3": FOLDS, "06.4": VISITS, "06.5": ATTENTIONS}
