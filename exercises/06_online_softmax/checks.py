"""Set 06, online softmax: one key, two parts, one tile, the tiles of a walk, the whole walk."""

import math

import torch
from torch import Tensor

from exercises.compare import close, matches, recognise
from exercises.memory import largest_made
from exercises.records import Case, Exercise
from nsa_lite import loops

# --- 06.1 ---


def key_cases(generator: torch.Generator) -> list[Case]:
    def case(name, scores, score, value):
        """The scores before this key; their values are 1, 2, 3, ..."""
        state = state_of(scores, range(1, len(scores) + 1))
        expected = state_of([*scores, score], [*range(1, len(scores) + 1), value])
        arguments = dict(m=state[0], total=state[1], out=state[2], score=score, value=value)
        return Case(name, arguments, expected, {"m": (), "total": (), "out": ()}, explain_key)

    return [
        case("the first key", [], 2.0, 5.0),
        case("a smaller score", [1.0, 3.0], 2.0, 7.0),
        case("a larger score", [1.0, 3.0], 4.0, 7.0),
        case("the same score again", [3.0], 3.0, -2.0),
        case("large scores", [1000.0, 1002.0], 1001.0, 4.0),
    ]


def state_of(scores, values) -> tuple[float, float, float]:
    """m, total and out of all keys so far, by their definition."""
    m = max(scores, default=-math.inf)
    weights = [math.exp(score - m) for score in scores]
    return m, sum(weights, 0.0), sum((w * x for w, x in zip(weights, values, strict=True)), 0.0)


def explain_key(got, expected, m, total, out, score, value):
    new, (got_m, got_total, got_out) = max(m, score), map(float, got)
    if any(map(math.isnan, (got_m, got_total, got_out))):
        return None
    shrink, p = math.exp(m - new), math.exp(score - new)
    if got_m != new:
        known = {
            score: "the new score, and an earlier score was larger",
            m: "the old m, and the new score is larger",
        }
        return f"m is {got_m:.4g}: " + known.get(got_m, "neither the old m nor the new score")
    grown = math.exp(new - m) if math.isfinite(m) else math.nan
    late = math.exp(score - m) if math.isfinite(m) else math.nan
    sums = (got_m, got_total, got_out)
    return recognise(
        sums,
        {
            "the old sums were weighed with the old m and are not brought to the new one": (
                new,
                total + p,
                out + p * value,
            ),
            "the old total is brought to the new m, the old out is not": (
                new,
                total * shrink + p,
                out + p * value,
            ),
            "the old out is brought to the new m, the old total is not": (
                new,
                total + p,
                out * shrink + p * value,
            ),
            "the factor of the old sums is upside down: they must shrink when m grows": (
                new,
                total * grown + p,
                out * grown + p * value,
            ),
            "the new key is weighed with the old m": (
                new,
                total * shrink + late,
                out * shrink + late * value,
            ),
            "out is divided by total already; the next key needs the sum": (
                new,
                expected[1],
                expected[2] / expected[1],
            ),
            "the new key adds its value to out without its weight": (
                new,
                expected[1],
                out * shrink + value,
            ),
        },
    )


# --- 06.2 ---


def merge_cases(generator: torch.Generator) -> list[Case]:
    def case(name, sizes, scale=1.0, shift=0.0, empty=()):
        """Keys in two parts of these sizes; the rows in `empty` see nothing of part a."""
        q, k = (
            torch.randn(4, 3, generator=generator),
            torch.randn(sum(sizes), 3, generator=generator),
        )
        v, parts = torch.randn(sum(sizes), 2, generator=generator), []
        scores = q @ k.T * scale + shift
        seen = torch.ones(4, sum(sizes), dtype=torch.bool)
        seen[list(empty), : sizes[0]] = False
        for keys in (slice(0, sizes[0]), slice(sizes[0], None)):
            parts += rows_of(scores[:, keys], v[keys], seen[:, keys])
        names = ("out_a", "lse_a", "out_b", "lse_b")
        arguments = dict(zip(names, parts, strict=True))
        return Case(
            name,
            arguments,
            rows_of(scores, v, seen),
            {"out": ("query", "channel"), "lse": ("query",)},
            explain_merge,
        )

    return [
        case("two halves", (4, 4)),
        case("one key and seven", (1, 7), scale=2.0),
        case("large scores", (3, 3), scale=2.0, shift=200.0),
        case("very negative scores", (3, 3), scale=2.0, shift=-200.0),
        case("an empty part", (3, 5), empty=(0, 2)),
        case("two empty parts", (3, 0), empty=(1, 3)),
    ]


def rows_of(scores: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of each row over the keys it sees, from its definition, in double: out and lse."""
    scores, v = scores.double(), v.double()
    if scores.shape[1] == 0:
        return torch.zeros(len(scores), v.shape[1]), torch.full((len(scores),), -torch.inf)
    largest = scores.masked_fill(~seen, -1e300).amax(1, keepdim=True)
    weights = (scores - largest).masked_fill(~seen, -torch.inf).exp()
    total = weights.sum(1, keepdim=True)
    out = weights @ v / total.masked_fill(total == 0, 1.0)
    return out.float(), (total.log() + largest)[:, 0].float()


def explain_merge(got, expected, out_a, lse_a, out_b, lse_b):
    (out, lse), both = got, (lse_a == -torch.inf) & (lse_b == -torch.inf)
    for t in range(len(lse)):
        part = "both parts are" if both[t] else "a part is"
        if (lse_a[t] == -torch.inf or lse_b[t] == -torch.inf) and (
            out[t].isnan().any() or lse[t].isnan()
        ):
            return f"query {t} is NaN: {part} empty there"
        if both[t] and out[t].any():
            return f"query {t} sees nothing in either part, and its output is not 0"
        if both[t] and lse[t] != -torch.inf:
            return f"query {t} sees nothing in either part, and its lse is {float(lse[t]):.4g}"
        if lse[t] == -torch.inf and not both[t] and lse_a[t] == -torch.inf:
            return f"query {t}: lse is -inf, although part b saw keys"
        if not out[t].isfinite().all() or (not lse[t].isfinite() and not both[t]):
            return (
                f"query {t} is not finite: exp of a large lse overflows, and of a very "
                "negative one it is 0"
            )
    true_out, true_lse = expected
    weight = lse_a / (lse_a + lse_b)
    wrong_outs = {
        "the outputs are averaged, whatever their parts weigh": (out_a + out_b) / 2,
        "the outputs are added, not weighed": out_a + out_b,
        "the outputs are weighed by lse itself, and a part weighs exp(lse)": out_a * weight[:, None]
        + out_b * (1 - weight[:, None]),
        "the outputs are weighed crosswise: the weight of a stands at b": out_a
        * (lse_b - true_lse).exp()[:, None]
        + out_b * (lse_a - true_lse).exp()[:, None],
        "the larger part is taken alone": torch.where((lse_a > lse_b)[:, None], out_a, out_b),
        "the weighted sum is not divided by the sum of the weights": true_out
        * (true_lse - torch.maximum(lse_a, lse_b)).exp()[:, None],
    }
    if said := recognise(
        out, {says: value for says, value in wrong_outs.items() if not matches(value, true_out)}
    ):
        return said
    return recognise(
        lse,
        {
            says: value
            for says, value in {
                "the two lse are added, and lse is the logarithm of a sum": lse_a + lse_b,
                "lse is the larger of the two, and the other part is left out of it": torch.maximum(
                    lse_a, lse_b
                ),
                "lse is the sum itself, without its logarithm": true_lse.exp(),
                "lse lacks the largest score, which was subtracted before exp": true_lse
                - torch.maximum(lse_a, lse_b),
                "lse has base 2, and the natural logarithm was asked for": true_lse / math.log(2),
            }.items()
            if not matches(value, true_lse)
        },
    )


# --- 06.3 ---


def tile_cases(generator: torch.Generator) -> list[Case]:
    def case(name, tiles, scale=1.0, shift=0.0, hidden=None, spread=0.0):
        """hidden(t, s): which keys a row does not see; row t is shifted by spread * t."""
        scores = torch.randn(4, 3 * tiles, generator=generator) * scale + shift
        scores = scores + spread * torch.arange(4)[:, None]
        v = torch.randn(3 * tiles, 2, generator=generator)
        t, s = torch.arange(4)[:, None], torch.arange(3 * tiles)
        seen = torch.ones_like(scores, dtype=torch.bool) if hidden is None else ~hidden(t, s)
        arguments = dict(scores=scores.masked_fill(~seen, -torch.inf), v=v, width=3)
        mean, lse = rows_of(scores, v, seen)
        axes = {"m + ln(total)": ("row",), "total > 0": ("row",), "out / total": ("row", "channel")}
        return Case(name, arguments, (lse, seen.any(1), mean), axes, explain_tiles, walk)

    return [
        case("one tile", 1),
        case("three tiles", 3, scale=3.0),
        case("a last tile that is hidden", 2, hidden=lambda t, s: (t < 2) & (s > 2)),
        case("a first tile that is hidden", 3, hidden=lambda t, s: (t > 1) & (s < 3)),
        case("a row that sees nothing", 2, hidden=lambda t, s: (t == 1) & (s >= 0)),
        case(
            "very negative scores after a hidden tile",
            2,
            shift=-300.0,
            hidden=lambda t, s: (t > 1) & (s < 3),
        ),
        case("rows of very different scores", 2, spread=-150.0),
    ]


def walk(answer, scores, v, width):
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


def by_folding(
    scores, v, width, shrink_total=True, shrink_out=True, upside=False, old=False, last=False
):
    """The walk with a mistake in the step."""
    m = torch.full((len(scores),), -torch.inf)
    total, out = torch.zeros(len(scores)), torch.zeros(len(scores), v.shape[1])
    for first in range(0, scores.shape[1], width):
        s = scores[:, first : first + width]
        new = s.amax(1) if last else torch.maximum(m, s.amax(1))
        safe = torch.where(new == -torch.inf, 0, new)
        shrink = (safe - m if upside else m - safe).exp()
        shrink = torch.where(m == -torch.inf, 0, shrink)
        p = (s - (torch.where(m == -torch.inf, safe, m) if old else safe)[:, None]).exp()
        total = total * (shrink if shrink_total else 1) + p.sum(1)
        out = out * (shrink[:, None] if shrink_out else 1) + p @ v[first : first + width]
        m = new
    return m + total.log(), out / torch.where(total == 0, 1, total)[:, None]


def explain_tiles(got, expected, scores, v, width):
    lse, alive, mean = got
    hidden = (scores.unflatten(1, (-1, width)) == -torch.inf).all(-1)  # (rows, tiles)
    for t in range(len(scores)):
        if (mean[t].isnan().any() or lse[t].isnan()) and hidden[t].any():
            tile = int(hidden[t].nonzero()[0])
            return f"row {t} is NaN: it sees nothing of tile {tile}"
        if hidden[t].all() and alive[t]:
            return f"row {t} sees nothing in any tile, and its total is not 0"
        if lse[t] == -torch.inf and alive[t]:
            return f"row {t}: m is -inf at the end, although it has scores"
        if not hidden[t].all() and not alive[t]:
            after = " after a tile of which it saw nothing" if hidden[t, 0] else ""
            far = scores[scores.isfinite()].abs().max() > 80  # exp(-80) is nearly nothing
            why = ": does what you subtract before exp lie far above them?" if far else ""
            return f"row {t}: total is 0, although it has scores{after}{why}"
        if not mean[t].isfinite().all() or lse[t] == torch.inf:
            return f"row {t} is not finite: exp of a large number overflows"
    known = {
        "a new tile's m does not shrink the sums of the earlier tiles": by_folding(
            scores, v, width, shrink_total=False, shrink_out=False
        ),
        "total shrinks with a new m, and out does not": by_folding(
            scores, v, width, shrink_out=False
        ),
        "out shrinks with a new m, and total does not": by_folding(
            scores, v, width, shrink_total=False
        ),
        "the factor of the old sums is upside down": by_folding(scores, v, width, upside=True),
        "a tile's weights are taken with the m before it": by_folding(scores, v, width, old=True),
    }
    last = slice(scores.shape[1] - width, None)
    mean_of_last, lse_of_last = rows_of(scores[:, last], v[last], scores[:, last] > -torch.inf)
    known["only the last tile counts"] = lse_of_last, mean_of_last
    return recognise((lse, mean), known)


# --- 06.4 ---


def visit_cases(generator: torch.Generator) -> list[Case]:
    def case(name, first, last, count, l, d, tile):
        seen = [[i * d + l - 1 <= t for i in range(count)] for t in range(first, last + 1)]
        visit, mask = [], []
        for start in range(0, count, tile):
            part = [seen_by_one[start : start + tile] for seen_by_one in seen]
            if any(map(any, part)):
                visit.append(start)
                if not all(map(all, part)):
                    mask.append(start)
        arguments = dict(first=first, last=last, count=count, block_size=l, stride=d, tile=tile)
        return Case(name, arguments, (visit, mask), {"to visit": (), "to mask": ()}, explain_visit)

    return [
        case("an edge inside a tile", 16, 19, 15, 4, 2, 4),
        case("an edge between two tiles", 17, 18, 15, 4, 2, 4),
        case("two tiles on the edge", 16, 31, 15, 4, 2, 4),
        case("nothing is visible", 0, 2, 15, 4, 2, 4),
        case("the last tile is short, and all see it", 60, 63, 11, 4, 4, 4),
        case("blocks side by side", 8, 15, 10, 4, 4, 2),
    ]


def explain_visit(got, expected, first, last, count, block_size, stride, tile):
    visit, mask = map(list, got)
    rows = f"queries {first} to {last}"

    def last_token(key):
        return key * stride + block_size - 1

    starts = list(range(0, count, tile))
    if strange := [x for x in visit + mask if x not in starts]:
        return f"{rows}: {strange[0]} is not the first key of a tile: those are {starts}"
    for start in starts:
        end = min(start + tile, count) - 1
        name = f"{rows}: tile {start}, keys {start} to {end},"
        if start in visit and start not in expected[0]:
            return (
                f"{name} is visited; its key {start} ends at token {last_token(start)}, "
                "after the last query"
            )
        if start not in visit and start in expected[0]:
            return f"{name} is not visited, and query {last} has passed its key {start}"
        if start in mask and start not in expected[1]:
            return f"{name} is to be masked, " + (
                "but is not visited"
                if start not in visit
                else "and every query has passed all of it"
            )
        if start not in mask and start in expected[1]:
            return (
                f"{name} is not masked, and its key {end} ends at token {last_token(end)}: "
                f"query {first} has not passed it"
            )
    if visit != sorted(set(visit)) or mask != sorted(set(mask)):
        return f"{rows}: the right tiles, but not each once in ascending order"
    return None


# --- 06.5 ---


def attention_cases(generator: torch.Generator) -> list[Case]:
    def case(name, length, l, d, rows, keys, scale=1.0, unseen=0, memory=False):
        count = max(0, (length - l) // d + 1)
        q, k = (torch.randn(n, 4, generator=generator) * scale for n in (length, count))
        v = torch.randn(count, 3, generator=generator)
        out, lse = loops.compressed_attention(
            q[None, None], k[None, None], v[None, None], block_size=l, stride=d
        )
        expected = out[0, 0], lse[0, 0]
        axes = {"out": ("query", "channel"), "lse": ("query",)}
        if unseen:  # keys that no query sees hold NaN
            k, v = (torch.cat([x, torch.full((unseen, x.shape[1]), torch.nan)]) for x in (k, v))
        arguments = dict(q=q, k=k, v=v, block_size=l, stride=d, rows=rows, keys=keys)
        call = None
        if memory:
            expected = *expected, length * count // 4
            axes, call = {**axes, "largest tensor": ()}, with_largest
        return Case(name, arguments, expected, axes, explain_attention, call)

    return [
        case("whole tiles", 32, 4, 4, 8, 4),
        case("scale", 16, 4, 4, 4, 2, scale=3.0),
        case("overlapping blocks", 24, 4, 2, 8, 4),
        case("ragged tiles", 21, 4, 2, 8, 4),
        case("keys that nobody sees hold NaN", 17, 2, 2, 4, 4, unseen=8),
        case("memory", 64, 4, 2, 8, 8, memory=True),
    ]


def with_largest(answer, *arguments):
    result, largest = largest_made(lambda: answer(*arguments))
    if not isinstance(result, tuple | list) or len(result) != 2:
        return result
    q, k = arguments[:2]
    return *result, max(largest, len(q) * len(k) // 4)


def explain_attention(got, expected, q, k, v, block_size, stride, rows, keys):
    (out, lse), expected = got[:2], expected[:2]
    if len(got) == 3 and matches((out, lse), expected):
        return (
            f"out and lse are right, but a tensor of {got[2]} numbers was made for "
            f"{len(q)} queries, {len(k)} keys and tiles of {rows} by {keys}"
        )
    seen = [max(0, (t + 1 - block_size) // stride + 1) for t in range(len(q))]
    for t, blocks in enumerate(seen):
        if not (out[t].isnan().any() or lse[t].isnan()):
            continue
        if k.isnan().any():
            return (
                f"query {t} is NaN; the keys that nobody sees are NaN in this case: does your "
                "walk load a tile of them?"
            )
        return f"query {t} sees {f'{blocks} blocks' if blocks else 'no block'}, and it is NaN"
    alive = torch.tensor(seen) > 0
    sizes = block_size, stride, rows, keys
    if not matches((out[alive], lse[alive]), (expected[0][alive], expected[1][alive])):
        return None if k.isnan().any() else _known_walks(out, lse, expected, q, k, v, *sizes)
    t = int((out.any(1) | (lse != -torch.inf)).logical_and(~alive).nonzero()[0])
    return (
        f"query {t} sees no block, and its output is not 0"
        if out[t].any()
        else f"query {t} sees no block, and its lse is {float(lse[t]):.4g}"
    )


def _known_walks(out, lse, expected, q, k, v, l, d, rows, keys):
    """Mistakes of a walk that end in finite numbers, for the queries that see a block."""
    i, t, root = torch.arange(len(k)), torch.arange(len(q))[:, None], q.shape[1] ** 0.5
    first, last = t // rows * rows, (t // rows * rows + rows - 1).clamp(max=len(q) - 1)
    start, end = i // keys * keys, (i // keys * keys + keys).clamp(max=len(k)) - 1
    seen = i * d + l - 1 <= t
    visited = start * d + l - 1 <= last
    full = end * d + l - 1 <= first
    alive = seen.any(1)

    def attend(mask, q=q):
        return rows_of(q @ k.T / root, v, mask)

    masks = {
        "the tiles on the edge are not masked: a query reads keys that it has not passed": visited,
        "the mask counts queries from the first row of their tile, not of the sequence": visited
        & (full | (i * d + l - 1 <= t % rows)),
        "in every tile the mask counts queries from the first row of their tile": i * d + l - 1
        <= t % rows,
        "the mask counts keys from the first key of their tile, not of the sequence": visited
        & (full | ((i - start) * d + l - 1 <= t)),
        "a key counts from the token on at which its block begins": visited & (i * d <= t),
        "the tiles on the edge are left out": full,
        "only the last visited tile of keys counts": seen
        & (start == torch.where(visited, start, 0).amax(1, keepdim=True)),
        "the keys of the last, short tile are left out": seen & (i < len(k) // keys * keys),
    }
    known = {says: attend(mask) for says, mask in masks.items()} | {
        "the scores are not divided by the root of the width": attend(seen, q * root),
        "the scores are divided by the width, not by its root": attend(seen, q / root),
        "each tile of rows begins with the state of the tile before": _carried(*expected, rows),
    }
    largest = (q @ k.T / root).masked_fill(~seen, -torch.inf).amax(1)
    wrong = {
        says: value
        for says, value in known.items()
        if not matches(value[0][alive], expected[0][alive])
    }
    if said := recognise(
        (out[alive], lse[alive]), {says: (o[alive], s[alive]) for says, (o, s) in wrong.items()}
    ):
        return said
    lost = alive & (lse == -torch.inf) & ~out.any(1)
    if lost.any():
        return f"query {int(lost.nonzero()[0])} sees blocks, and its out is 0 and its lse -inf"
    if close(out[alive], expected[0][alive]).all():
        return recognise(
            lse[alive],
            {
                "out is right, and lse has another base than e": expected[1][alive] / math.log(2),
                "out is right, and lse lacks m": (expected[1] - largest)[alive],
                "out is right, and lse is m without ln(total)": largest[alive],
            },
        )
    total = (expected[1] - largest).exp()[:, None]
    return recognise(out[alive], {"out is not divided by total": (expected[0] * total)[alive]})


def _carried(out: Tensor, lse: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Each row with all that was summed in its place of the earlier tiles of rows."""
    sums, total = torch.zeros_like(out), torch.zeros_like(lse)
    for t in range(len(out)):
        for earlier in range(t % rows, t + 1, rows):
            sums[t] += lse[earlier].exp() * out[earlier]
            total[t] += lse[earlier].exp()
    return sums / total[:, None], total.log()


EXERCISES = [
    Exercise(
        "06.1",
        "One key at a time",
        "warm-up",
        5,
        key_cases,
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
        merge_cases,
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
        visit_cases,
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
