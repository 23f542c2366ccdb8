"""Set 06's mistakes that the checks know by what they give: the right one, one step changed."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from exercises.records import Mistake

# --- 06.1: one key at a time ---


def add(
    new=max,
    old=lambda m, new: math.exp(m - new),
    weight=lambda m, score, new: math.exp(score - new),
    total_too=True,
    out_too=True,
) -> Callable:
    """One more key; old is the factor of the old sums, total_too and out_too say which get it."""

    def answer(m: float, total: float, out: float, score: float, value: float):
        m_new = new(m, score)
        shrink = old(m, m_new)
        w = weight(m, score, m_new)
        return (
            m_new,
            total * (shrink if total_too else 1) + w,
            out * (shrink if out_too else 1) + w * value,
        )

    return answer


def divided_already(m, total, out, score, value):
    """Out is the mean so far, and not the sum that the next key needs."""
    m, total, out = add()(m, total, out, score, value)
    return m, total, out / total


def without_its_weight(m, total, out, score, value):
    """The new value is added as it is."""
    new, total, _ = add()(m, total, out, score, value)
    return new, total, out * math.exp(m - new) + value


KEYS = [
    Mistake(
        "sums not shrunk",
        add(total_too=False, out_too=False),
        "the old sums were weighed with the old m and are not brought to the new one",
    ),
    Mistake(
        "total shrinks, out does not",
        add(out_too=False),
        "the old total is brought to the new m, the old out is not",
    ),
    Mistake(
        "out shrinks, total does not",
        add(total_too=False),
        "the old out is brought to the new m, the old total is not",
    ),
    Mistake(
        "factor upside down",
        add(old=lambda m, new: math.exp(min(new - m, 700))),
        "the factor of the old sums is upside down: they must shrink when m grows",
    ),
    Mistake(
        "weighed with the old m",
        add(weight=lambda m, score, new: math.exp(score - (m if math.isfinite(m) else score))),
        "the new key is weighed with the old m",
    ),
    Mistake(
        "divided at every key",
        divided_already,
        "out is divided by total already; the next key needs the sum",
    ),
    Mistake(
        "value without its weight",
        without_its_weight,
        "the new key adds its value to out without its weight",
    ),
]

# --- 06.2: merge two parts ---


def merge(
    weights=lambda a, b: (a, b),
    largest=torch.maximum,
    safe=True,
    divide=True,
    finish=lambda lse, m: lse,
) -> Callable:
    """Two parts weighed by exp(lse - m); safe subtracts 0 where both are empty."""

    def answer(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor):
        m = largest(lse_a, lse_b)
        zero = m.masked_fill(m == -torch.inf, 0.0) if safe else m
        a, b = weights((lse_a - zero).exp(), (lse_b - zero).exp())
        total = a + b
        out = a[:, None] * out_a + b[:, None] * out_b
        if divide:
            out = out / torch.where(total == 0, 1, total)[:, None]
        return out, finish(total.log() + zero, m)

    return answer


def with_right_lse(join: Callable) -> Callable:
    """join makes the output of both outputs and both lse; the lse is right."""

    def answer(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor):
        return join(out_a, lse_a[:, None], out_b, lse_b[:, None]), torch.logaddexp(lse_a, lse_b)

    return answer


def with_right_output(total: Callable) -> Callable:
    """total makes the lse of both lse; the output is right."""

    def answer(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor):
        return merge()(out_a, lse_a, out_b, lse_b)[0], total(lse_a, lse_b)

    return answer


def along_the_channels(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """The output with its weights along the wrong axis, where that has the same length."""
    if len(out_a) != out_a.shape[1]:
        return merge()(out_a, lse_a[:, 0], out_b, lse_b[:, 0])[0]
    share = torch.sigmoid(lse_a - lse_b).T
    return share * out_a + (1 - share) * out_b


OUTPUTS = [
    Mistake(
        "weights along the channels",
        with_right_lse(along_the_channels),
        "the weights run along the channels, and each query has weights of its own",
    ),
    Mistake(
        "average",
        with_right_lse(lambda a, lse_a, b, lse_b: (a + b) / 2),
        "the outputs are averaged, whatever their parts weigh",
    ),
    Mistake(
        "sum of the outputs",
        with_right_lse(lambda a, lse_a, b, lse_b: a + b),
        "the outputs are added, not weighed",
    ),
    Mistake(
        "weighed by lse",
        with_right_lse(lambda a, lse_a, b, lse_b: (lse_a * a + lse_b * b) / (lse_a + lse_b)),
        "the outputs are weighed by lse itself, and a part weighs exp(lse)",
    ),
    Mistake(
        "crosswise",
        merge(weights=lambda a, b: (b, a)),
        "the outputs are weighed crosswise: the weight of a stands at b",
    ),
    Mistake(
        "the larger part alone",
        with_right_lse(lambda a, lse_a, b, lse_b: torch.where(lse_a > lse_b, a, b)),
        "the larger part is taken alone",
    ),
    Mistake(
        "not divided",
        merge(divide=False),
        "the weighted sum is not divided by the sum of the weights",
    ),
]
TOTALS = [
    Mistake(
        "lse added",
        with_right_output(lambda a, b: a + b),
        "the two lse are added, and lse is the logarithm of a sum",
    ),
    Mistake(
        "the larger lse",
        merge(finish=lambda lse, m: m),
        "lse is the larger of the two, and the other part is left out of it",
    ),
    Mistake(
        "lse without logarithm",
        merge(finish=lambda lse, m: torch.where(lse == -torch.inf, lse, lse.exp())),
        "lse is the sum itself, without its logarithm",
    ),
    Mistake(
        "lse without m",
        merge(finish=lambda lse, m: lse - m),
        "lse lacks the largest score, which was subtracted before exp",
    ),
    Mistake(
        "base 2",
        merge(finish=lambda lse, m: lse / math.log(2)),
        "lse has base 2, and the natural logarithm was asked for",
    ),
]

# --- 06.3: fold in a tile ---


def fold(
    new=lambda m, scores: torch.maximum(m, scores.amax(1)),
    safe=lambda m: m.masked_fill(m == -torch.inf, 0.0),
    shrink=lambda m, safe: (m - safe).exp(),
    weight=lambda m, safe: safe,
    total_too=True,
    out_too=True,
    returned=lambda new, safe: new,
) -> Callable:
    """One more tile; weight(m, safe) is subtracted from its scores, shrink is for the old sums."""

    def answer(m: Tensor, total: Tensor, out: Tensor, scores: Tensor, v: Tensor):
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


FOLD = fold()


def upside_down(m: Tensor, safe: Tensor) -> Tensor:
    """The factor by which the old sums would grow; 0 where there are none."""
    return torch.where(m == -torch.inf, 0.0, safe - m).exp() * (m > -torch.inf)


def forget(m: Tensor, total: Tensor, out: Tensor, scores: Tensor, v: Tensor):
    """Only this tile."""
    return FOLD(torch.full_like(m, -torch.inf), total * 0, out * 0, scores, v)


FOLDS = [
    Mistake(
        "sums not shrunk",
        fold(total_too=False, out_too=False),
        "a new tile's m does not shrink the sums of the earlier tiles",
    ),
    Mistake(
        "total only",
        fold(out_too=False),
        "total shrinks with a new m, and out does not",
    ),
    Mistake(
        "out only",
        fold(total_too=False),
        "out shrinks with a new m, and total does not",
    ),
    Mistake(
        "upside down",
        fold(shrink=upside_down),
        "the factor of the old sums is upside down",
    ),
    Mistake(
        "weighed with the old m",
        fold(weight=lambda m, safe: torch.where(m == -torch.inf, safe, m)),
        "a tile's weights are taken with the m before it",
    ),
    Mistake("only this tile", forget, "only the last tile counts"),
]

# --- 06.5: tiled attention ---


def tiles_to_visit(first: int, last: int, count: int, l: int, d: int, tile: int):
    """The first keys of the tiles to visit, and of those that need a mask."""
    visit = [start for start in range(0, count, tile) if start * d + l - 1 <= last]
    ends = {start: min(start + tile, count) - 1 for start in visit}
    return visit, [start for start in visit if ends[start] * d + l - 1 > first]


def all_masked(*arguments):
    """The right tiles, each of them with a mask."""
    visit, _ = tiles_to_visit(*arguments)
    return visit, visit


def edge_left_out(*arguments):
    """Only the tiles that need no mask."""
    visit, mask = tiles_to_visit(*arguments)
    return [start for start in visit if start not in mask], []


def short_tile_left_out(first: int, last: int, count: int, l: int, d: int, tile: int):
    """Only tiles of full length."""
    visit, mask = tiles_to_visit(first, last, count, l, d, tile)
    whole = [start for start in visit if start + tile <= count]
    return whole, [start for start in mask if start in whole]


def divided(m: Tensor, total: Tensor, sums: Tensor):
    """Out and lse of a finished state; 0 and -inf where nothing was seen."""
    return sums / torch.where(total == 0, 1, total)[:, None], m + total.log()


def with_lse(change: Callable) -> Callable:
    """A right output, and change(m, total) as its lse."""
    return lambda m, total, sums: (divided(m, total, sums)[0], change(m, total))


def walk(
    tiles=tiles_to_visit,
    step=FOLD,
    hide=lambda t, i, first, start, l, d: i * d + l - 1 > t,
    scale=lambda width: width**-0.5,
    finish=divided,
    carry=False,
    row_end=lambda length, rows: length,
) -> Callable:
    """Attention tile by tile; hide(t, i, first row, first key, l, d) is the mask of a tile."""

    def walk_keys(state, t, q, k, v, l, d, keys):
        """The state of one tile of rows, at positions t, after its tiles of keys."""
        first = int(t[0])
        visit, mask = tiles(first, int(t[-1]), len(k), l, d, keys)
        for start in visit:
            i = torch.arange(start, min(start + keys, len(k)))
            scores = q[t] @ k[i].T * scale(q.shape[1])
            if start in mask:
                scores = scores.masked_fill(hide(t[:, None], i, first, start, l, d), -torch.inf)
            state = step(*state, scores, v[i])
        return state

    return by_rows(walk_keys, finish, carry, row_end)


def by_rows(walk_keys: Callable, finish: Callable, carry: bool, row_end: Callable) -> Callable:
    """The loop over tiles of rows; carry begins each with the state of the one before."""

    def answer(q, k, v, l, d, rows, keys):
        out = q.new_zeros(len(q), v.shape[1])
        lse = q.new_full((len(q),), -torch.inf)
        state = nothing_yet(q[:rows], v)
        for first in range(0, row_end(len(q), rows), rows):
            t = torch.arange(first, min(first + rows, len(q)))
            before = [x[: len(t)] for x in state] if carry else nothing_yet(q[t], v)
            state = walk_keys(before, t, q, k, v, l, d, keys)
            out[t], lse[t] = finish(*state)
        return out, lse

    return answer


def nothing_yet(q: Tensor, v: Tensor):
    """The state of rows that have seen no tile: m, total and out."""
    rows = len(q)
    return q.new_full((rows,), -torch.inf), q.new_zeros(rows), q.new_zeros(rows, v.shape[1])


WALKS = [
    Mistake(
        "no mask on the edge",
        walk(hide=lambda t, i, first, start, l, d: i < 0),
        "the tiles on the edge are not masked: a query reads keys that it has not passed",
    ),
    Mistake(
        "rows counted in their tile",
        walk(hide=lambda t, i, first, start, l, d: i * d + l - 1 > t - first),
        "the mask counts queries from the first row of their tile, not of the sequence",
    ),
    Mistake(
        "rows counted in their tile, every tile masked",
        walk(all_masked, hide=lambda t, i, first, start, l, d: i * d + l - 1 > t - first),
        "in every tile the mask counts queries from the first row of their tile",
    ),
    Mistake(
        "keys counted in their tile",
        walk(hide=lambda t, i, first, start, l, d: (i - start) * d + l - 1 > t),
        "the mask counts keys from the first key of their tile, not of the sequence",
    ),
    Mistake(
        "seen once begun",
        walk(hide=lambda t, i, first, start, l, d: i * d > t),
        "a key counts from the token on at which its block begins",
    ),
    Mistake("edge left out", walk(edge_left_out), "the tiles on the edge are left out"),
    Mistake("only the last tile", walk(step=forget), "only the last visited tile of keys counts"),
    Mistake(
        "short tile of keys left out",
        walk(short_tile_left_out),
        "the keys of the last, short tile are left out",
    ),
    Mistake(
        "no scale",
        walk(scale=lambda width: 1.0),
        "the scores are not divided by the root of the width",
    ),
    Mistake(
        "scale by the width",
        walk(scale=lambda width: 1 / width),
        "the scores are divided by the width, not by its root",
    ),
    Mistake(
        "state carried over",
        walk(carry=True),
        "each tile of rows begins with the state of the tile before",
    ),
]
ENDS = [  # the output is right, the lse is not
    Mistake(
        "lse in base 2",
        walk(finish=with_lse(lambda m, total: (m + total.log()) / math.log(2))),
        "out is right, and lse has another base than e",
    ),
    Mistake(
        "lse without m",
        walk(finish=with_lse(lambda m, total: total.log())),
        "out is right, and lse lacks m",
    ),
    Mistake(
        "m as the lse",
        walk(finish=with_lse(lambda m, total: m)),
        "out is right, and lse is m without ln(total)",
    ),
]
NOT_DIVIDED = Mistake(
    "not divided",
    walk(finish=lambda m, total, sums: (sums, m + total.log())),
    "out is not divided by total",
)
