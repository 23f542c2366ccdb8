"""Set 06, online softmax: one key, two parts, one tile, the tiles of a walk, the whole walk."""

import math

import torch
from torch import Tensor

from exercises.compare import close, matches, name_mistake, same
from exercises.records import Case, Exercise, in_turn

from . import mistakes, watching

# --- 06.1 ---

KEYS = {
    "the first key": dict(scores=[], score=2.0, value=5.0),
    "a smaller score": dict(scores=[1.0, 3.0], score=2.0, value=7.0),
    "a larger score": dict(scores=[1.0, 3.0], score=4.0, value=7.0),
    "the same score again": dict(scores=[3.0], score=3.0, value=-2.0),
    "large scores": dict(scores=[1000.0, 1002.0], score=1001.0, value=4.0),
    "very negative scores": dict(scores=[-1002.0, -1000.0], score=-1001.0, value=4.0),
    "a larger score below 0": dict(scores=[-7.0, -5.0, -6.0], score=-4.0, value=-3.0),
    "the first key, far below 0": dict(scores=[], score=-3e9, value=6.0),
    "a score far above": dict(scores=[-800.0, 2.0, 2.0], score=900.0, value=8.0),
    "a score far below": dict(scores=[700.0, 700.0], score=-700.0, value=1e4),
    "a score of 0 among others": dict(scores=[-2.0, 0.0], score=0.0, value=0.5),
}


def key_case(generator, name, scores, score, value) -> Case:
    """The scores before this key; their values are 1, 2, 3, ..."""
    values = list(range(1, len(scores) + 1))
    m, total, out = state_of(scores, values)
    expected = state_of([*scores, score], [*values, value])
    arguments = dict(m=m, total=total, out=out, score=score, value=value)
    return Case(name, arguments, expected, {"m": (), "total": (), "out": ()}, explain_key)


def state_of(scores, values) -> tuple[float, float, float]:
    """m, total and out of all keys so far, by their definition."""
    m = max(scores, default=-math.inf)
    weights = [math.exp(score - m) for score in scores]
    return m, sum(weights, 0.0), sum((w * x for w, x in zip(weights, values, strict=True)), 0.0)


def explain_key(got, expected, m, total, out, score, value):
    """A wrong m, or a known mistake in the sums."""
    got = tuple(map(float, got))
    if any(map(math.isnan, got)):
        return None
    if got[0] != max(m, score):
        known = {
            score: "the new score, and an earlier score was larger",
            m: "the old m, and the new score is larger",
        }
        return f"m is {got[0]:.4g}: " + known.get(got[0], "neither the old m nor the new score")
    return name_mistake(got, mistakes.KEYS, (m, total, out, score, value))


# --- 06.2 ---

MERGES = {
    "two halves": dict(sizes=(4, 4)),
    "one key and seven": dict(sizes=(1, 7), scale=2.0, rows=6, width=5),
    "as many queries as channels": dict(sizes=(3, 2), rows=3, width=3),
    "equal scores": dict(sizes=(2, 5), scale=0.0, rows=5),
    "large scores": dict(sizes=(3, 3), scale=2.0, shift=200.0),
    "very negative scores": dict(sizes=(3, 3), scale=2.0, shift=-200.0, rows=7),
    "scores far below -10000": dict(sizes=(1, 1), shift=-32768.0, between=64.0, rows=3, width=4),
    "part b far above": dict(sizes=(2, 3), between=200.0, width=3),
    "part a far above": dict(sizes=(4, 3), between=-200.0, rows=2),
    "queries far apart": dict(sizes=(3, 4), apart=-150.0, rows=5, width=3),
    "an empty part": dict(sizes=(3, 5), empty=(0, 2)),
    "two empty parts": dict(sizes=(3, 0), empty=(1, 3)),
    "empty parts, and very negative scores": dict(
        sizes=(2, 0), empty=(2,), shift=-200.0, rows=3, width=1
    ),
}


def merge_case(generator, name, sizes, rows=4, width=2, empty=(), between=0.0, **spread) -> Case:
    """Keys in two parts of these sizes; the rows in `empty` see nothing of part a."""
    count = sum(sizes)
    scores = random_scores(generator, rows, count, **spread)
    scores[:, sizes[0] :] += between
    v = torch.randn(count, width, generator=generator)
    seen = torch.ones(rows, count, dtype=torch.bool)
    seen[list(empty), : sizes[0]] = False
    a = slice(0, sizes[0])
    b = slice(sizes[0], None)
    out_a, lse_a = rows_of(scores[:, a], v[a], seen[:, a])
    out_b, lse_b = rows_of(scores[:, b], v[b], seen[:, b])
    arguments = dict(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    axes = {"out": ("query", "channel"), "lse": ("query",)}
    return Case(name, arguments, rows_of(scores, v, seen), axes, explain_merge)


def random_scores(generator, rows, count, scale=1.0, shift=0.0, apart=0.0, rise=0.0) -> Tensor:
    """Scores in whole eighths; row t lies t * apart higher, and key s lies s * rise higher."""
    scores = (torch.randn(rows, count, generator=generator) * scale * 8).round() / 8
    return scores + shift + apart * torch.arange(rows)[:, None] + rise * torch.arange(count)


def rows_of(scores: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of each row over the keys it sees, from its definition, in double: out and lse."""
    scores, v = (x.double() for x in (scores, v))
    if scores.shape[1] == 0:
        return torch.zeros(len(scores), v.shape[1]), torch.full((len(scores),), -torch.inf)
    largest = scores.masked_fill(~seen, -1e300).amax(1, keepdim=True)
    weights = (scores - largest).masked_fill(~seen, -torch.inf).exp()
    total = weights.sum(1, keepdim=True)
    out = weights @ v / total.masked_fill(total == 0, 1.0)
    return out.float(), (total.log() + largest)[:, 0].float()


def explain_merge(got, expected, out_a, lse_a, out_b, lse_b):
    """A row that is not what it can be, or a known mistake in the output or else in the lse."""
    for t, row in enumerate(zip(*got, lse_a.tolist(), lse_b.tolist(), strict=True)):
        if said := impossible_row(*row):
            return f"query {t}{said}"
    parts = (out_a, lse_a, out_b, lse_b)
    said = None
    if not matches(got[0], expected[0]):
        said = name_mistake(got, mistakes.OUTPUTS, parts, part=lambda result: result[0])
    if said is None and not matches(got[1], expected[1]):
        said = name_mistake(got, mistakes.TOTALS, parts, part=lambda result: result[1])
    return said


def impossible_row(out: Tensor, lse: Tensor, lse_a: float, lse_b: float) -> str | None:
    """What no row may hold: NaN, infinity, or something from two empty parts."""
    empty = [part == -math.inf for part in (lse_a, lse_b)]
    if any(empty) and (out.isnan().any() or lse.isnan()):
        return f" is NaN: {'both parts are' if all(empty) else 'a part is'} empty there"
    if all(empty):
        if out.any():
            return " sees nothing in either part, and its output is not 0"
        if lse != -math.inf:
            return f" sees nothing in either part, and its lse is {float(lse):.4g}"
        return None
    if lse == -math.inf and empty[0]:
        return ": lse is -inf, although part b saw keys"
    if not out.isfinite().all() or not lse.isfinite():
        return " is not finite: exp of a large lse overflows, and of a very negative one it is 0"
    return None


# --- 06.3 ---

MIXED = 12345.0  # in the place of a state into which another walk's has got
TILES = {
    "one tile": dict(tiles=1),
    "three tiles": dict(tiles=3, scale=3.0),
    "a short last tile": dict(tiles=2, short=2, keys=5, rows=6, width=3),
    "a last tile that is hidden": dict(tiles=2, hidden=lambda t, s: (t < 2) & (s > 2)),
    "a first tile that is hidden": dict(tiles=3, hidden=lambda t, s: (t > 1) & (s < 3)),
    "a row that sees nothing": dict(tiles=2, rows=3, hidden=lambda t, s: (t == 1) & (s >= 0)),
    "equal scores": dict(tiles=4, keys=2, rows=5, scale=0.0),
    "large scores": dict(tiles=2, keys=4, rows=2, width=5, shift=300.0),
    "very negative scores after a hidden tile": dict(
        tiles=2, shift=-300.0, hidden=lambda t, s: (t > 1) & (s < 3)
    ),
    "scores far below -10000": dict(
        tiles=2, keys=5, rows=7, shift=-32768.0, hidden=lambda t, s: (t > 1) & (s < 5)
    ),
    "rows of very different scores": dict(tiles=2, apart=-150.0),
    "scores that rise from key to key": dict(tiles=3, keys=4, rise=60.0),
    "scores that fall from key to key": dict(tiles=2, keys=6, rows=3, rise=-60.0),
}


def tile_case(
    generator, name, tiles, keys=3, short=0, rows=4, width=2, hidden=None, **spread
) -> Case:
    """hidden(t, s): which keys a row does not see; the last tile lacks `short` of its keys."""
    count = tiles * keys - short
    scores = random_scores(generator, rows, count, **spread)
    v = torch.randn(count, width, generator=generator)
    seen = torch.ones_like(scores, dtype=torch.bool)
    if hidden is not None:
        seen = ~hidden(torch.arange(rows)[:, None], torch.arange(count))
    state = dict(m=torch.full((rows,), -torch.inf), total=torch.zeros(rows))
    state |= dict(out=torch.zeros(rows, width))
    arguments = {**state, "scores": scores.masked_fill(~seen, -torch.inf), "v": v, "width": keys}
    mean, lse = rows_of(scores, v, seen)
    axes = {"m + ln(total)": ("row",), "total > 0": ("row",), "out / total": ("row", "channel")}
    return Case(name, arguments, (lse, seen.any(1), mean), axes, explain_tiles, fold_all)


def tile_cases(generator: torch.Generator) -> list[Case]:
    """One walk after the other, and last two walks in turn."""
    walks = in_turn(tile_case, TILES)(generator)
    both = tile_case(generator, "two walks in turn", tiles=4, keys=2, rows=3, width=4)
    last = Case(both.name, both.arguments, both.expected, both.axes, explain_tiles, fold_two)
    return [*walks, last]


def fold_all(answer, *arguments):
    """Fold in tile after tile; then what any right state says: lse, rows alive, mean."""
    return list(walk_tiles(answer, *arguments))[-1]


def fold_two(answer, *arguments):
    """The same of a walk with another one beside it, over the rows in reverse; MIXED if it differs.

    The other one stands first, so that the state of this walk is the older one.
    """
    alone = fold_all(answer, *arguments)
    other = [x.flip(0) if x.dim() == 1 or n == 3 else x for n, x in enumerate(arguments[:4])]
    states = zip(
        walk_tiles(answer, *(x.clone() for x in other), *arguments[4:]),
        walk_tiles(answer, *arguments),
        strict=True,
    )
    beside = [mine for _, mine in states][-1]
    if not isinstance(alone, tuple) or same(alone, beside):
        return alone
    return torch.full_like(alone[0], MIXED), *alone[1:]


def walk_tiles(answer, m, total, out, scores, v, width):
    """Fold in tile after tile; after each, what any right state says of it."""
    state = m, total, out
    for keys in torch.arange(scores.shape[1]).split(width):
        tile = slice(int(keys[0]), int(keys[-1]) + 1)
        state = answer(*state, scores[:, tile], v[tile])  # views: a change of them is seen
        if not is_state(state, len(scores), v.shape[1]):
            yield state  # the message will say what is wrong with its form
            return
        yield end_of(*state)


def is_state(state, rows: int, width: int) -> bool:
    """Whether it has the form of m, total and out."""
    if not isinstance(state, tuple | list) or len(state) != 3:
        return False
    shapes = [x.shape if isinstance(x, Tensor) else None for x in state]
    return shapes == [(rows,), (rows,), (rows, width)]


def end_of(m: Tensor, total: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The log-sum-exp, which rows are alive, and the mean."""
    return m + total.log(), total != 0, out / torch.where(total == 0, 1, total)[:, None]


def explain_tiles(got, expected, m, total, out, scores, v, width):
    """Two walks that were mixed, a row that is not what it can be, or a known mistake."""
    if (got[0] == MIXED).all():
        return "alone each walk is right: does the function keep a state of its own?"
    parts = (scores == -torch.inf).split(width, 1)
    hidden = torch.stack([part.all(1) for part in parts], 1)  # (rows, tiles)
    far = scores[scores.isfinite()].abs().max() > 80  # exp(-80) is nearly nothing
    for t, row in enumerate(zip(*got, hidden, strict=True)):
        if said := impossible_state(*row, far):
            return f"row {t}{said}"
    return name_mistake(
        got,
        mistakes.FOLDS,
        (m, total, out, scores, v, width),
        call=fold_all,
        part=lambda result: (result[0], result[2]),
    )


def impossible_state(lse, alive, mean, hidden, far) -> str | None:
    """What no row may end with; hidden says of which tiles it sees nothing."""
    if (mean.isnan().any() or lse.isnan()) and hidden.any():
        return f" is NaN: it sees nothing of tile {int(hidden.nonzero()[0])}"
    if hidden.all() and alive:
        return " sees nothing in any tile, and its total is not 0"
    if lse == -torch.inf and alive:
        return ": m is -inf at the end, although it has scores"
    if not hidden.all() and not alive:
        after = " after a tile of which it saw nothing" if hidden[0] else ""
        why = ": does what you subtract before exp lie far above them?" if far else ""
        return f": total is 0, although it has scores{after}{why}"
    if not mean.isfinite().all() or lse == torch.inf:
        return " is not finite: exp of a large number overflows"
    return None


# --- 06.4 ---

VISITS = {
    "an edge inside a tile": dict(first=16, last=19, count=15, block_size=4, stride=2, tile=4),
    "an edge between two tiles": dict(first=17, last=18, count=15, block_size=4, stride=2, tile=4),
    "two tiles on the edge": dict(first=16, last=31, count=15, block_size=4, stride=2, tile=4),
    "nothing is visible": dict(first=0, last=2, count=15, block_size=4, stride=2, tile=4),
    "the last tile is short, and all see it": dict(
        first=60, last=63, count=11, block_size=4, stride=4, tile=4
    ),
    "blocks side by side": dict(first=8, last=15, count=10, block_size=4, stride=4, tile=2),
    "blocks of three strides": dict(first=20, last=29, count=17, block_size=9, stride=3, tile=2),
    "blocks of five strides": dict(first=11, last=17, count=9, block_size=10, stride=2, tile=3),
    "one query": dict(first=22, last=22, count=12, block_size=6, stride=3, tile=5),
    "one key": dict(first=5, last=9, count=1, block_size=7, stride=7, tile=3),
    "no key": dict(first=0, last=3, count=0, block_size=5, stride=5, tile=2),
}


def visit_case(generator, name, **sizes) -> Case:
    """The tiles, by looking at every query and key."""
    return Case(name, sizes, by_looking(**sizes), {"to visit": (), "to mask": ()}, explain_visit)


def by_looking(first, last, count, block_size, stride, tile):
    """A tile is visited if any query sees any of its keys, and masked if one does not see all."""
    visit = []
    mask = []
    for start in range(0, count, tile):
        ends = [i * stride + block_size - 1 for i in range(start, min(start + tile, count))]
        seen = [end <= t for end in ends for t in range(first, last + 1)]
        if any(seen):
            visit.append(start)
        if any(seen) and not all(seen):
            mask.append(start)
    return visit, mask


def explain_visit(got, expected, first, last, count, block_size, stride, tile):
    """The first tile that is wrongly visited, masked or left out."""
    visit, mask = map(list, got)
    rows = f"queries {first} to {last}"
    starts = list(range(0, count, tile))
    if strange := [x for x in visit + mask if x not in starts]:
        return f"{rows}: {strange[0]} is not the first key of a tile: those are {starts}"
    for start in starts:
        end = min(start + tile, count) - 1
        lasts = [key * stride + block_size - 1 for key in (start, end)]
        said = wrong_visit(start in visit, start in expected[0], start, lasts[0], last)
        said = said or wrong_mask(start in visit, start in mask, start in expected[1])
        if said is None and start not in mask and start in expected[1]:
            said = (
                f"is not masked, and its key {end} ends at token {lasts[1]}: query {first} has "
                "not passed it"
            )
        if said:
            return f"{rows}: tile {start}, keys {start} to {end}, {said}"
    if visit != sorted(set(visit)) or mask != sorted(set(mask)):
        return f"{rows}: the right tiles, but not each once in ascending order"
    return None


def wrong_visit(visited: bool, wanted: bool, key: int, last_token: int, last: int) -> str | None:
    """A tile that no query has reached, or one that was left out."""
    if visited and not wanted:
        return f"is visited; its key {key} ends at token {last_token}, after the last query"
    if wanted and not visited:
        return f"is not visited, and query {last} has passed its key {key}"
    return None


def wrong_mask(visited: bool, masked: bool, wanted: bool) -> str | None:
    """A tile that needs no mask."""
    if not masked or wanted:
        return None
    why = "and every query has passed all of it" if visited else "but is not visited"
    return f"is to be masked, {why}"


# --- 06.5 ---


def level(*levels):
    """Move the scores of query t to level t, without rounding: whole eighths, times 256."""

    def move(q, k):
        q, k = ((8 * x).round() / 8 for x in (q, k))
        q[:, 0] = torch.tensor(levels).repeat(len(q))[: len(q)] * q.shape[1] ** 0.5 / 256
        k[:, 0] = 256.0
        return q, k

    return move


def below_any_mask(q, k):
    """Scores around -32768, one of them at least 64 above the others: a key gets all or nothing."""
    q = torch.zeros_like(q)
    k = torch.zeros_like(k)
    q[:, 0] = -128.0 * q.shape[1] ** 0.5
    k[:, 0] = 256.0
    q[:, 1] = 64.0 * q.shape[1] ** 0.5
    k[:, 1] = torch.arange(len(k)) * 5 % 11
    return q, k


def rising(q, k):
    """Scores that rise by 50 from key to key."""
    q, k = (x.clone() for x in (q, k))
    q[:, 0] = q.shape[1] ** 0.5
    k[:, 0] = 50.0 * torch.arange(len(k))
    return q, k


WALKS = {
    "whole tiles": dict(length=32, l=4, d=4, tiles=(8, 4)),
    "scale": dict(length=16, l=4, d=4, tiles=(4, 2), scale=3.0, width=5),
    "overlapping blocks": dict(length=24, l=4, d=2, tiles=(8, 4)),
    "ragged tiles": dict(length=21, l=4, d=2, tiles=(8, 4)),
    "blocks of three strides": dict(length=35, l=6, d=2, tiles=(10, 3), width=6, values=5),
    "fewer tokens than a block": dict(length=3, l=5, d=5, tiles=(2, 3), width=3),
    "equal scores": dict(length=20, l=4, d=2, tiles=(6, 5), scale=0.0, width=3, values=2),
    "large scores": dict(length=19, l=3, d=3, tiles=(4, 5), move=level(1024.0)),
    "very negative scores": dict(length=26, l=5, d=5, tiles=(7, 2), move=level(-1024.0)),
    "scores far below -10000": dict(length=27, l=4, d=2, tiles=(4, 3), move=below_any_mask),
    "queries far apart": dict(length=23, l=4, d=2, tiles=(5, 4), move=level(512.0, -512.0, 0.0)),
    "scores that rise from key to key": dict(length=22, l=4, d=2, tiles=(9, 3), move=rising),
    "keys that nobody sees hold NaN": dict(length=17, l=2, d=2, tiles=(4, 4), unseen=8),
    "tiles that end with the last key seen": dict(length=31, l=3, d=3, tiles=(7, 5), unseen=9),
}


def attention_cases(generator: torch.Generator) -> list[Case]:
    """Outputs, and last the way to those of a longer sequence."""
    outputs = in_turn(attention_case, WALKS)(generator)
    longer = dict(length=94, l=4, d=1, tiles=(6, 7), unseen=300, width=2)
    case = attention_case(generator, "tile by tile", **longer)
    axes = {**case.axes, "the way": ()}
    last = Case(case.name, case.arguments, (*case.expected, ""), axes, explain_attention, watched)
    return [*outputs, last]


def attention_case(generator, name, length, l, d, tiles, unseen=0, **tokens) -> Case:
    """Random q, compressed keys and values; `unseen` more keys are NaN."""
    count = max(0, (length - l) // d + 1)
    q, k, v = random_tokens(generator, length, count, **tokens)
    seen = torch.arange(count) * d + l - 1 <= torch.arange(length)[:, None]
    scores = q.double() @ k.double().T / q.shape[1] ** 0.5
    k, v = (torch.cat([x, torch.full((unseen, x.shape[1]), torch.nan)]) for x in (k, v))
    expected = rows_of(scores, v[:count], seen)
    arguments = dict(q=q, k=k, v=v, block_size=l, stride=d, rows=tiles[0], keys=tiles[1])
    axes = {"out": ("query", "channel"), "lse": ("query",)}
    return Case(name, arguments, expected, axes, explain_attention)


def random_tokens(generator, length, count, width=4, values=3, scale=1.0, move=None):
    """Random q (T, D), k (N, D) and v (N, Dv); move(q, k) moves the scores."""
    q = torch.randn(length, width, generator=generator) * scale
    k = torch.randn(count, width, generator=generator) * scale
    v = torch.randn(count, values, generator=generator)
    if move is not None:
        q, k = move(q, k)
    return q, k, v


def watched(answer, q, k, v, l, d, rows, keys):
    """The answer's results, and what is wrong with the way to them."""
    seen = max(0, (len(q) - l) // d + 1)
    visited = 0
    for first in range(0, len(q), rows):
        last = min(first + rows, len(q)) - 1
        visited += rows * keys * len(by_looking(first, last, len(k), l, d, keys)[0])
    copies = q.numel() + k.numel() + v.numel()
    # A column beside a tile is allowed, of m or of ones.
    limits = watching.Limits((rows + 1) * (keys + 1), len(q) * seen // 4, copies, 3 * visited)
    result, said = watching.look(answer, (q, k, v, l, d, rows, keys), limits)
    return (*result, said) if isinstance(result, tuple | list) else result


def explain_attention(got, expected, q, k, v, **sizes):
    """NaN, the way to a right result, a known mistake, or something where no block is seen."""
    if len(got) == 3 and matches(got[:2], expected[:2]):
        tiles = f"{len(q)} queries, tiles of {sizes['rows']} by {sizes['keys']}"
        return f"out and lse are right, but {got[2]} ({tiles})"
    got, expected = (tuple(results[:2]) for results in (got, expected))
    l, d = (sizes[name] for name in ("block_size", "stride"))
    seen = [max(0, (t + 1 - l) // d + 1) for t in range(len(q))]
    if said := lost_by_exp(*got, seen, q, k) or nan_row(*got, seen, k):
        return said
    alive = torch.tensor(seen) > 0
    results, right = (tuple(part[alive] for part in each) for each in (got, expected))
    if not matches(results, right):
        arguments = (q, k, v, *sizes.values())
        return None if k.isnan().any() else known_walk(got, expected, alive, arguments)
    out, lse = got
    t = int((out.any(1) | (lse != -torch.inf)).logical_and(~alive).nonzero()[0])
    if out[t].any():
        return f"query {t} sees no block, and its output is not 0"
    return f"query {t} sees no block, and its lse is {float(lse[t]):.4g}"


def lost_by_exp(out, lse, seen, q, k) -> str | None:
    """The first query whose sums became inf or 0, where scores are far from 0."""
    alive = torch.tensor(seen) > 0
    scores = (q @ k.T).nan_to_num()
    if scores.numel() == 0 or scores.abs().max() < 500:
        return None
    lost = alive & ~(out.isfinite().all(1) & lse.isfinite() & out.any(1))
    if not lost.any():
        return None
    t = int(lost.nonzero()[0])
    return (
        f"query {t} has lost its sums: exp of a large score is inf, of a very negative one 0; "
        "subtract the row's own largest score first"
    )


def nan_row(out, lse, seen, k) -> str | None:
    """The first row that is NaN, and what may have made it so."""
    rows = (out.isnan().any(1) | lse.isnan()).nonzero().flatten().tolist()
    if not rows:
        return None
    if k.isnan().any():
        return (
            f"query {rows[0]} is NaN; the keys that nobody sees are NaN in this case: does your "
            "walk load a tile of them?"
        )
    blocks = seen[rows[0]]
    return f"query {rows[0]} sees {f'{blocks} blocks' if blocks else 'no block'}, and it is NaN"


def known_walk(got, expected, alive, arguments):
    """A known mistake that ends in finite numbers, for the queries that see a block."""
    out, lse = got
    said = name_mistake(
        got, mistakes.WALKS, arguments, part=lambda result: (result[0][alive], result[1][alive])
    )
    if said:
        return said
    lost = alive & (lse == -torch.inf) & ~out.any(1)
    if lost.any():
        return f"query {int(lost.nonzero()[0])} sees blocks, and its out is 0 and its lse -inf"
    if close(out[alive], expected[0][alive]).all():
        return name_mistake(got, mistakes.ENDS, arguments, part=lambda result: result[1][alive])
    one = [mistakes.NOT_DIVIDED]
    return name_mistake(got, one, arguments, part=lambda result: result[0][alive])


EXERCISES = [
    Exercise(
        "06.1",
        "One key at a time",
        "warm-up",
        5,
        in_turn(key_case, KEYS),
        hints=(
            "total is a sum of exp(s - m) with the old m. What must it be multiplied by so that "
            "the new m stands there?",
            "m' = max(m, s); total' = total exp(m - m') + exp(s - m'); out' likewise, with the "
            "value at the new key.",
            "the new m; the factor of the old sums; the weight of the new key; three results",
        ),
    ),
    Exercise(
        "06.2",
        "Merge two parts",
        "core",
        15,
        in_turn(merge_case, MERGES),
        hints=(
            "How large is the sum of exp over the keys of part a, in terms of lse_a? Which share "
            "of the whole sum is it?",
            "lse = ln(exp(lse_a) + exp(lse_b)) and out = exp(lse_a - lse) out_a + exp(lse_b - "
            "lse) out_b. Where both are -inf, -inf - -inf is NaN.",
            "m = the larger lse, and 0 where it is -inf; weights a, b = exp(lse - m); their sum, "
            "1 where it is 0; out = (a out_a + b out_b) / sum; lse = m + ln(a + b)",
        ),
    ),
    Exercise(
        "06.3",
        "Fold in a tile",
        "core",
        20,
        tile_cases,
        hints=(
            "What is m after a tile in which a row sees nothing, if it saw nothing before? What "
            "is exp(-inf - m) then?",
            "m' = max(m, the row's largest score); p = exp(s - m'); total' = total exp(m - m') + "
            "sum p; out' = out exp(m - m') + p v. As long as m' is -inf, subtract 0 instead.",
            "new m, row by row; safe = 0 where it is -inf, else it; p and the factor with safe; "
            "return the new m itself, not safe",
        ),
    ),
    Exercise(
        "06.4",
        "Which tiles to visit",
        "core",
        15,
        in_turn(visit_case, VISITS),
        hints=(
            "Which query of the tile of rows sees most? Which sees least?",
            "Query t sees keys 0 .. (t + 1 - l) // d. A tile is visited iff its first key is seen "
            "by the last query; it needs no mask iff its last key is seen by the first query.",
            "high = how many keys the last query sees, full = how many the first sees, both "
            "within 0 .. count; go through the starts below high; mask those whose end (start + "
            "tile, or count if that is smaller) lies above full",
        ),
    ),
    Exercise(
        "06.5",
        "Tiled attention",
        "stretch",
        50,
        attention_cases,
        hints=(
            "Which part of the walk belongs to one tile of rows, and what begins anew with the "
            "next one?",
            "For each tile of rows: state (-inf, 0, 0); for each tile of keys to visit: scores, "
            "mask, fold in; then out / total and m + ln(total), or 0 and -inf where total is 0.",
            "two loops; the rows are tokens first .. last; call 06.4 for the tiles; slice the "
            "keys and values; scale the scores; where a mask is needed fill with -inf by true "
            "positions; call 06.3; write the finished rows into their place",
        ),
    ),
]
