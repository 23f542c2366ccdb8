"""Set 06, online softmax: one key, two parts, one tile, the tiles of a walk, the whole walk."""

import math

import torch
from torch import Tensor

from exercises.compare import close, matches, name_mistake
from exercises.memory import largest_made
from exercises.records import Case, Exercise, in_turn
from nsa_lite import loops

from . import mistakes

# --- 06.1 ---

KEYS = {
    "the first key": dict(scores=[], score=2.0, value=5.0),
    "a smaller score": dict(scores=[1.0, 3.0], score=2.0, value=7.0),
    "a larger score": dict(scores=[1.0, 3.0], score=4.0, value=7.0),
    "the same score again": dict(scores=[3.0], score=3.0, value=-2.0),
    "large scores": dict(scores=[1000.0, 1002.0], score=1001.0, value=4.0),
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
    "one key and seven": dict(sizes=(1, 7), scale=2.0),
    "large scores": dict(sizes=(3, 3), scale=2.0, shift=200.0),
    "very negative scores": dict(sizes=(3, 3), scale=2.0, shift=-200.0),
    "an empty part": dict(sizes=(3, 5), empty=(0, 2)),
    "two empty parts": dict(sizes=(3, 0), empty=(1, 3)),
}


def merge_case(generator, name, sizes, scale=1.0, shift=0.0, empty=()) -> Case:
    """Keys in two parts of these sizes; the rows in `empty` see nothing of part a."""
    count = sum(sizes)
    q = torch.randn(4, 3, generator=generator)
    k = torch.randn(count, 3, generator=generator)
    v = torch.randn(count, 2, generator=generator)
    scores = q @ k.T * scale + shift
    seen = torch.ones(4, count, dtype=torch.bool)
    seen[list(empty), : sizes[0]] = False
    a = slice(0, sizes[0])
    b = slice(sizes[0], None)
    out_a, lse_a = rows_of(scores[:, a], v[a], seen[:, a])
    out_b, lse_b = rows_of(scores[:, b], v[b], seen[:, b])
    arguments = dict(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    axes = {"out": ("query", "channel"), "lse": ("query",)}
    return Case(name, arguments, rows_of(scores, v, seen), axes, explain_merge)


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

TILES = {
    "one tile": dict(tiles=1),
    "three tiles": dict(tiles=3, scale=3.0),
    "a last tile that is hidden": dict(tiles=2, hidden=lambda t, s: (t < 2) & (s > 2)),
    "a first tile that is hidden": dict(tiles=3, hidden=lambda t, s: (t > 1) & (s < 3)),
    "a row that sees nothing": dict(tiles=2, hidden=lambda t, s: (t == 1) & (s >= 0)),
    "very negative scores after a hidden tile": dict(
        tiles=2, shift=-300.0, hidden=lambda t, s: (t > 1) & (s < 3)
    ),
    "rows of very different scores": dict(tiles=2, spread=-150.0),
}


def tile_case(generator, name, tiles, scale=1.0, shift=0.0, hidden=None, spread=0.0) -> Case:
    """hidden(t, s): which keys a row does not see; row t is shifted by spread * t."""
    scores = torch.randn(4, 3 * tiles, generator=generator) * scale + shift
    scores = scores + spread * torch.arange(4)[:, None]
    v = torch.randn(3 * tiles, 2, generator=generator)
    seen = torch.ones_like(scores, dtype=torch.bool)
    if hidden is not None:
        seen = ~hidden(torch.arange(4)[:, None], torch.arange(3 * tiles))
    arguments = dict(scores=scores.masked_fill(~seen, -torch.inf), v=v, width=3)
    mean, lse = rows_of(scores, v, seen)
    axes = {"m + ln(total)": ("row",), "total > 0": ("row",), "out / total": ("row", "channel")}
    return Case(name, arguments, (lse, seen.any(1), mean), axes, explain_tiles, fold_all)


def fold_all(answer, scores, v, width):
    """Fold in tile after tile; then what any right state says: lse, rows alive, mean."""
    rows = len(scores)
    state = (torch.full((rows,), -torch.inf), torch.zeros(rows), torch.zeros(rows, v.shape[1]))
    for first in range(0, scores.shape[1], width):
        keys = slice(first, first + width)
        state = answer(*state, scores[:, keys].clone(), v[keys].clone())
        if not isinstance(state, tuple | list) or len(state) != 3:
            return state
        if [part.shape for part in state] != [(rows,), (rows,), (rows, v.shape[1])]:
            return state  # the message will say which shape is wrong
    m, total, out = state
    mean = out / torch.where(total == 0, 1, total)[:, None]
    return m + total.log(), total != 0, mean


def explain_tiles(got, expected, scores, v, width):
    """A row that is not what it can be, or a known mistake."""
    hidden = (scores.unflatten(1, (-1, width)) == -torch.inf).all(-1)  # (rows, tiles)
    far = scores[scores.isfinite()].abs().max() > 80  # exp(-80) is nearly nothing
    for t, row in enumerate(zip(*got, hidden, strict=True)):
        if said := impossible_state(*row, far):
            return f"row {t}{said}"
    return name_mistake(
        got,
        mistakes.FOLDS,
        (scores, v, width),
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

WALKS = {
    "whole tiles": dict(length=32, l=4, d=4, rows=8, keys=4),
    "scale": dict(length=16, l=4, d=4, rows=4, keys=2, scale=3.0),
    "overlapping blocks": dict(length=24, l=4, d=2, rows=8, keys=4),
    "ragged tiles": dict(length=21, l=4, d=2, rows=8, keys=4),
    "keys that nobody sees hold NaN": dict(length=17, l=2, d=2, rows=4, keys=4, unseen=8),
}


def attention_cases(generator: torch.Generator) -> list[Case]:
    """Outputs, and last the memory that a longer sequence takes."""
    outputs = in_turn(attention_case, WALKS)(generator)
    return [*outputs, memory_case(generator, "memory", length=64, l=4, d=2, rows=8, keys=8)]


def attention_case(generator, name, length, l, d, scale=1.0, unseen=0, **tiles) -> Case:
    """Random q, compressed keys and values, and the package's loop; `unseen` more keys are NaN."""
    count = max(0, (length - l) // d + 1)
    q = torch.randn(length, 4, generator=generator) * scale
    k = torch.randn(count, 4, generator=generator) * scale
    v = torch.randn(count, 3, generator=generator)
    sizes = dict(block_size=l, stride=d)
    out, lse = loops.compressed_attention(q[None, None], k[None, None], v[None, None], **sizes)
    k, v = (torch.cat([x, torch.full((unseen, x.shape[1]), torch.nan)]) for x in (k, v))
    arguments = dict(q=q, k=k, v=v, **sizes, **tiles)
    axes = {"out": ("query", "channel"), "lse": ("query",)}
    return Case(name, arguments, (out[0, 0], lse[0, 0]), axes, explain_attention)


def memory_case(generator, name, **sizes) -> Case:
    """The same, and the largest tensor that was made on the way."""
    case = attention_case(generator, name, **sizes)
    allowed = len(case.arguments["q"]) * len(case.arguments["k"]) // 4
    axes = {**case.axes, "largest tensor": ()}
    expected = (*case.expected, allowed)
    return Case(name, case.arguments, expected, axes, explain_attention, with_largest)


def with_largest(answer, *arguments):
    """The answer's results and its largest tensor; the allowed size counts as none."""
    result, largest = largest_made(lambda: answer(*arguments))
    if not isinstance(result, tuple | list) or len(result) != 2:
        return result
    q, k = arguments[:2]
    return *result, max(largest, len(q) * len(k) // 4)


def explain_attention(got, expected, q, k, v, **sizes):
    """NaN, too much memory, a known mistake, or something where no block is seen."""
    if len(got) == 3 and matches(got[:2], expected[:2]):
        return (
            f"out and lse are right, but a tensor of {got[2]} numbers was made for "
            f"{len(q)} queries, {len(k)} keys and tiles of {sizes['rows']} by {sizes['keys']}"
        )
    got, expected = (tuple(results[:2]) for results in (got, expected))
    l, d = (sizes[name] for name in ("block_size", "stride"))
    seen = [max(0, (t + 1 - l) // d + 1) for t in range(len(q))]
    if said := nan_row(*got, seen, k):
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
        in_turn(tile_case, TILES),
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
