"""Set 07, Triton: a vector, a row, a tile, and the selected branch, each with its edges.

An answer is the launcher with the kernel behind it. Its tensors lie in the middle of larger
memory: NaN around the inputs, one known number in and around the output.
"""

import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from exercises.compare import close, matches, name_mistake
from exercises.records import Case, Exercise, in_turn
from kernels.online_softmax import fold_in

from . import mistakes, watching

EDGE = 1 << 16  # numbers on each side of a tensor: a wrong address should not end the notebook
UNWRITTEN = -99.0
AROUND = "places changed outside of out"
WAY = "the way"
# A GPU compiles the mistakes that a check knows, the first time that it looks for them.
SECONDS = 60 if torch.cuda.is_available() else 20


def in_memory(x: Tensor, around: float) -> watching.Memory:
    """x in the middle of a buffer filled with `around`; on a GPU if there is one.

    The last axis of x may be a part of longer rows: keep its stride.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = x.untyped_storage().nbytes() // x.element_size()
    buffer = torch.full((size + 2 * EDGE,), around, dtype=x.dtype, device=device)
    part = buffer.as_strided(x.shape, x.stride(), EDGE).copy_(x)
    return watching.Memory(part, buffer, EDGE)


@dataclass(frozen=True)
class Plan:
    """How a launch is watched: its programs, how many are left out, and what must not be called."""

    programs: int
    skipped: int = 0
    forbidden: object = None


def launch(answer, inputs: dict[str, Tensor], numbers: tuple, out: Tensor, plan: Plan):
    """What the kernel wrote into a tensor like out, and around it, and what is wrong with the way.

    "Around" is a number of places outside of out.
    """
    around = {name: torch.nan if x.is_floating_point() else 0 for name, x in inputs.items()}
    given = {name: in_memory(x, around[name]) for name, x in inputs.items()}
    target = in_memory(out, UNWRITTEN)
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # the interpreter's, of NaN
            watching.Launches(
                list(given.values()), target, plan.skipped, plan.forbidden
            ) as launches,
        ):
            answer(*(x.part for x in given.values()), target.part, *numbers)
    except Exception as error:
        raise cause(error) from None
    got = target.part.cpu().clone()
    target.part.fill_(UNWRITTEN)
    changed = [name for name, x in given.items() if x.is_changed()]
    way = f"the kernel changed its input {changed[0]}" if changed else ""
    return got, int((target.whole != UNWRITTEN).sum()), way or launches.wrong_way(plan.programs)


def without_last(out: Tensor, owned: int, axis: int = 0) -> Tensor:
    """What all programs but the last write, which owns that many places of an axis."""
    out = out.clone()
    out.narrow(axis, out.shape[axis] - owned, owned).fill_(UNWRITTEN)
    return out


def explain_way(got, expected, last: bool) -> str | None:
    """What is wrong with the way to a right result, or places of a program that did not run."""
    out, overwritten, way = got[:3]
    if matches(out, expected[0]) and not overwritten and way:
        return f"the numbers are right, but {way}"
    if last and not overwritten and not matches(out, expected[0]):
        unwritten = expected[0] == UNWRITTEN
        if (out != UNWRITTEN)[unwritten].any() and matches(
            out[~unwritten], expected[0][~unwritten]
        ):
            return "the last program was left out, and another one wrote its places"
    return None


def cause(error: BaseException) -> BaseException:
    """The learner's own error: Triton wraps what is raised inside a kernel."""
    if "raise NotImplementedError()" in str(error):  # a stub that was compiled
        return NotImplementedError()
    return cause(error.__cause__) if error.__cause__ else error


def empty(*shape: int) -> Tensor:
    """An output into which nothing has been written."""
    return torch.full(shape, UNWRITTEN)


def output(result: tuple[Tensor, int, str]) -> Tensor:
    """What a kernel wrote, with a number in place of NaN, so that NaN can be compared too."""
    return result[0].nan_to_num(UNWRITTEN)


def explain_memory(got: Tensor, overwritten: int, name: str) -> str | None:
    """Places changed outside of out, places of out never written, and NaN."""
    if overwritten:
        places = "place" if overwritten == 1 else "places"
        return f"memory outside of out was changed, {overwritten} {places}: what masks the store?"
    rows = got.reshape(len(got), -1)
    never = (rows == UNWRITTEN).any(1).nonzero()
    if len(never):
        return f"{name} {int(never[0])} of out was never written"
    lost = rows.isnan().any(1).nonzero()
    if len(lost):
        return (
            f"{name} {int(lost[0])} is NaN: NaN lies in memory around the inputs; was some of it "
            "loaded?"
        )
    return None


# --- 07.1 ---

VECTORS = {
    "one program": dict(size=8, block=8),
    "three programs": dict(size=12, block=4),
    "a ragged end": dict(size=10, block=4),
    "shorter than a block": dict(size=3, block=16),
    "large blocks": dict(size=37, block=16, a=-0.75),
    "a is 0": dict(size=5, block=2, a=0.0),
    "very large numbers": dict(size=21, block=8, a=3.0, scale=1e37),
    "one number": dict(size=1, block=1, a=-1.0),
    "all programs but the last": dict(size=22, block=8, a=1.5, skipped=1),
}


def add_case(generator, name, size, block, a=2.5, scale=1.0, skipped=0) -> Case:
    """Two random vectors; the sum is made number by number."""
    x, y = torch.randn(2, size, generator=generator) * scale
    out = torch.tensor([a * one + two for one, two in zip(x.tolist(), y.tolist(), strict=True)])
    if skipped:
        out = without_last(out, (size - 1) % block + 1)
    arguments = dict(x=x, y=y, a=a, block=block, skipped=skipped)
    axes = {"out": ("place",), AROUND: (), WAY: ()}
    return Case(name, arguments, (out, 0, ""), axes, explain_add, call_add)


def call_add(answer, x, y, a, block, skipped):
    """What the answer wrote into out, and around it, and the way."""
    plan = Plan(-(-len(x) // block), skipped)
    return launch(answer, dict(x=x, y=y), (a, block), empty(len(x)), plan)


def explain_add(got, expected, x, y, a, block, skipped):
    """The way, one block only, something in memory, or a known mistake in the sum."""
    out, overwritten = got[:2]
    if said := explain_way(got, expected, bool(skipped)):
        return said
    if skipped:
        return None
    if not overwritten and len(x) > block and (out[block:] == UNWRITTEN).all():
        return "only the first block was written: what tells one program from another?"
    if said := explain_memory(out, overwritten, "place"):
        return said
    return name_mistake(got, mistakes.ADD, (x, y, a, block, 0), call=call_add, part=output)


# --- 07.2 ---

ROWS = {
    "whole rows": dict(seen=[8, 8], width=8),
    "low scores in a ragged row": dict(seen=[6, 6, 6], width=6, shift=-8.0),
    "numbers that a row may not use": dict(seen=[3, 1, 7], width=8),
    "rows with a gap between them": dict(seen=[5, 5, 5], width=5, gaps=(6, 3)),
    "gaps in out alone": dict(seen=[9, 2, 11, 4], width=11, gaps=(0, 5), scale=1.5),
    "equal scores": dict(seen=[3, 2, 1, 3, 0], width=3, spread=0.0),
    "large scores": dict(seen=[6, 6], width=6, scale=0.25, shift=800.0),
    "very negative scores": dict(seen=[7, 4, 6], width=7, shift=-800.0),
    "scores far below -10000": dict(seen=[4, 3], width=5, shift=-32768.0, step=128.0),
    "scores on both sides of 0": dict(seen=[12, 12, 7], width=12, spread=300.0),
    "NaN in numbers that a row may not use": dict(seen=[3, 8, 1], width=9, hidden=torch.nan),
    "inf in numbers that a row may not use": dict(seen=[2, 0, 9], width=10, hidden=torch.inf),
    "a row that may use nothing": dict(seen=[0, 4], width=6),
    "all programs but the last": dict(seen=[4, 9, 6], width=13, skipped=1),
}


def softmax_case(generator, name, seen, width, scale=0.5, skipped=0, gaps=(0, 0), **scores) -> Case:
    """Random scores; between two rows of s and of out lie `gaps` numbers."""
    seen = torch.tensor(seen, dtype=torch.int32)
    s = random_rows(generator, seen, width, **scores)
    arguments = dict(s=s, seen=seen, scale=scale, gaps=gaps, skipped=skipped)
    axes = {"out": ("row", "column"), AROUND: (), WAY: ()}
    out = softmax_by_definition(s, seen, scale)
    expected = (without_last(out, 1) if skipped else out, 0, "")
    return Case(name, arguments, expected, axes, explain_softmax, call_softmax)


def random_rows(generator, seen, width, shift=0.0, spread=2.0, step=0.0, hidden=None) -> Tensor:
    """Numbers around `shift`, in whole eighths or at least a `step` apart.

    `hidden` stands where a row may not use any.
    """
    s = torch.randn(len(seen), width, generator=generator) * spread
    s = (8 * s).round() / 8
    if step:
        s = s.argsort(1) * step
    s = s + shift
    if hidden is not None:
        s[torch.arange(width) >= seen[:, None]] = hidden
    return s


def softmax_by_definition(s: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Row by row, in Python's numbers."""
    out = torch.zeros_like(s)
    for row, count in enumerate(seen.tolist()):
        used = s[row, :count].tolist()
        weights = [math.exp(scale * (x - max(used))) for x in used]
        for column, weight in enumerate(weights):
            out[row, column] = weight / sum(weights)
    return out


def call_softmax(answer, s, seen, scale, gaps, skipped):
    """What the answer wrote into out, and around it: the gaps between rows count as around."""
    width = s.shape[1]
    spaced = F.pad(s, (0, gaps[0]), value=torch.nan)[:, :width]
    out = F.pad(empty(*s.shape), (0, gaps[1]), value=UNWRITTEN)[:, :width]
    return launch(answer, dict(s=spaced, seen=seen), (scale,), out, Plan(len(s), skipped))


def explain_softmax(got, expected, s, seen, scale, gaps, skipped):
    """Overflow, an empty row, something in memory, weight where none may be, a known mistake."""
    out, overwritten = got[:2]
    if said := explain_way(got, expected, bool(skipped)):
        return said
    if skipped:
        return None
    if is_far(s, seen, scale) and not overwritten:
        return explain_far(out, seen)
    said = None if overwritten else explain_empty_row(out, seen)
    said = said or explain_memory(out, overwritten, "row")
    if said:
        return said
    leaks = (out != 0) & (torch.arange(s.shape[1]) >= seen[:, None])
    if leaks.any():
        row, column = leaks.nonzero()[0].tolist()
        return (
            f"row {row} may use its first {int(seen[row])} numbers, and column {column} got weight"
        )
    arguments = (s, seen, scale, gaps, skipped)
    return name_mistake(got, mistakes.SOFTMAX, arguments, call=call_softmax, part=output)


def is_far(s: Tensor, seen: Tensor, scale: float) -> bool:
    """Whether exp of a number that a row may use is inf or 0."""
    used = s[torch.arange(s.shape[1]) < seen[:, None]]
    return bool((scale * used).abs().max() > 100)


def explain_empty_row(out: Tensor, seen: Tensor) -> str | None:
    """The first row that may use nothing, if it was written and is not 0."""
    for row in (seen == 0).nonzero().flatten().tolist():
        if out[row].any() and not (out[row] == UNWRITTEN).any():
            bad = "NaN" if out[row].isnan().any() else "not 0"
            return f"row {row} may use nothing, and its weights are {bad}"
    return None


def explain_far(out: Tensor, seen: Tensor) -> str | None:
    """Weights that large or very negative scores made infinite, NaN or 0."""
    used = out[seen > 0]
    if used.isfinite().all() and used.any(1).all():
        return None
    bad = "all 0" if used.isfinite().all() else "not finite"
    return (
        f"the weights are {bad}: exp of a large number is inf, exp of a very negative one "
        "is 0; take the largest of the numbers that go into exp from them"
    )


# --- 07.3 ---

TILES = {
    "one tile": dict(length=16),
    "two tiles of keys": dict(length=32, growth=40.0, poison=16),
    "a ragged end": dict(length=21),
    "wide tiles of keys": dict(length=20, tiles=(16, 32), D=32, DV=16),
    "tall tiles of queries": dict(length=25, tiles=(32, 16), DV=64, scale=0.5),
    "large scores": dict(length=16, levels=[256.0], DV=16),
    "very negative scores": dict(length=18, levels=[-256.0], D=64, DV=16, scale=0.125),
    "scores far below -10000": dict(length=17, levels=[-16384.0], fall=64.0, DV=16),
    "queries far apart": dict(length=19, levels=[256.0, -256.0, 0.0], DV=16),
    "equal scores": dict(length=23, levels=[0.0], flat=True, tiles=(16, 32), DV=16),
    "scores that fall along the keys": dict(length=34, fall=16.0, DV=16),
    "all programs but the last": dict(length=38, D=32, DV=16, skipped=1),
}


def flash_case(
    generator, name, length, tiles=(16, 16), scale=0.25, poison=None, skipped=0, **tokens
) -> Case:
    """Random tokens; poison: later tokens become NaN."""
    q, k, v = random_tokens(generator, length, scale, **tokens)
    out = causal_attention(q, k, v, scale)
    plan = dict(M=tiles[0], N=tiles[1], poison=poison, skipped=skipped)
    arguments = dict(q=q, k=k, v=v, scale=scale, **plan)
    axes = {"out": ("query", "channel"), AROUND: (), WAY: ()}
    if skipped:
        out = without_last(out, (length - 1) % tiles[0] + 1)
    expected = (out, 0, "")
    if poison is not None:
        axes["out with NaN in later tokens"] = ("query", "channel")
        expected = (out, 0, "", out[:poison])
    return Case(name, arguments, expected, axes, explain_flash, call_flash)


def random_tokens(
    generator, length, scale, D=16, DV=32, growth=0.0, levels=None, fall=0.0, flat=False
):
    """q and k (T, D), v (T, Dv), with scores that grow or fall along the keys, or at levels."""
    q, k = torch.randn(2, length, D, generator=generator) * (not flat)
    place = torch.arange(length)
    k = k + growth * place[:, None] / length * q.mean(0)
    if levels or fall:  # without rounding: whole eighths, and channels that move the scores
        q, k = ((8 * x).round() / 8 for x in (q, k))
        q[:, 0] = torch.tensor(levels or [0.0]).repeat(length)[:length] / (256 * scale)
        k[:, 0] = 256.0
        q[:, 1] = 1 / scale
        k[:, 1] = -fall * place
    return q, k, torch.randn(length, DV, generator=generator)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Query by query, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    out = []
    for t in range(len(q)):
        weights = (k[: t + 1] @ q[t] * scale).softmax(0)
        out.append(weights @ v[: t + 1])
    return torch.stack(out).float()


def call_flash(answer, q, k, v, scale, M, N, poison, skipped):
    """What the answer wrote into out, and around it; and the early rows with NaN in later ones."""
    plan = Plan(-(-len(q) // M), skipped, fold_in)
    out = empty(len(q), v.shape[1])
    result = launch(answer, dict(q=q, k=k, v=v), (scale, M, N), out, plan)
    if poison is None:
        return result
    k, v = (x.clone() for x in (k, v))
    k[poison:] = torch.nan
    v[poison:] = torch.nan
    poisoned = launch(answer, dict(q=q, k=k, v=v), (scale, M, N), out, plan)[0]
    return *result, poisoned[:poison]


def explain_flash(got, expected, q, k, v, scale, M, N, poison, skipped):
    """Tiles too many, overflow, a walk that ends early, something in memory, a known mistake."""
    out, overwritten = got[:2]
    if said := explain_way(got, expected, bool(skipped)):
        return said
    if skipped:
        return None
    if matches(got[:3], expected[:3]):
        return explain_poison(got[3], poison, M)
    far = (scale * (q @ k.T)).abs().max() > 90
    if far and not overwritten and not (out.isfinite().all() and out.any(1).all()):
        bad = "0" if out.isfinite().all() else "not finite"
        return (
            f"the result is {bad}: exp of a large number is inf, exp of a very negative "
            "one 0; take the largest of the numbers that go into exp from them"
        )
    if q[0, 1] * scale == 1:
        return None  # scores were moved: another case can tell
    if overwritten == 0 and out.isnan().any(1).all():
        return None  # whatever it is, another case can tell
    known = dict(call=call_flash, part=output, count=len(q), after=len(q) - 1)
    known |= dict(query=first_wrong(out, expected[0]))
    arguments = (q, k, v, scale, M, N, None, 0)
    said = None
    if overwritten == 0:
        said = name_mistake(got, mistakes.WALKS, arguments, **known)
        said = said or explain_lost_query(out, M)
    said = said or explain_memory(out, overwritten, "query")
    return said or name_mistake(got, mistakes.FLASH, arguments, **known)


def explain_lost_query(out: Tensor, M: int) -> str | None:
    """Query 0 alone is NaN: there is no other key that it could read."""
    if not out[0].isnan().all() or out[1:M].isnan().any():
        return None
    return "query 0 is NaN: did it find no key it may read, not even its own?"


def explain_poison(early: Tensor, poison: int, M: int) -> str | None:
    """The first early row that is NaN once the tokens from `poison` on are."""
    lost = early.isnan().any(1).nonzero()
    if len(lost) == 0:
        return None
    return (
        f"query {int(lost[0])} is NaN once tokens {poison} and later are NaN: its program "
        f"owns queries 0 to {M - 1}, and loaded more keys"
    )


def first_wrong(out: Tensor, expected: Tensor) -> int:
    """The first wrong row of out; 0 if none is."""
    return int((~close(out, expected)).any(1).int().argmax())


# --- 07.4 ---

CHOICES = {
    "one finished block": dict(ids=[[0]], start=16, length=48),
    "causal in the own block": dict(ids=[[0]], start=1, length=16),
    "a choice among many blocks": dict(ids=[[0, 3], [1, 3]], start=62),
    "padding": dict(ids=[[2, -1], [1, 2]], start=40, length=48),
    "a ragged end": dict(ids=[[0, 1]], start=19),
    "a query that chose nothing": dict(ids=[[-1], [1]], start=30),
    "wide heads": dict(ids=[[0, 1, 2], [1, 2, -1], [0, 2, -1]], start=37, D=32, scale=0.125),
    "many heads": dict(ids=[[0, 1, 3, -1], [0, 1, 2, 3]], start=55, R=32, scale=0.5),
    "large blocks": dict(ids=[[0, 2], [1, 2], [2, -1]], start=70, l_sel=32, scale=0.5),
    "NaN in blocks that are not chosen": dict(
        ids=[[1, 3, -1], [1, 3, -1]], start=60, length=90, hidden=torch.nan
    ),
    "large scores": dict(ids=[[0, 1], [1, -1]], start=20, level=256.0),
    "very negative scores": dict(ids=[[0, -1], [0, 1]], start=24, level=-256.0),
    "equal scores": dict(ids=[[1, 2, -1], [0, 1, 2]], start=39, spread=0.0),
    "all programs but the last": dict(ids=[[0, 1], [1, -1], [0, 1]], start=26, skipped=1),
}


def selected_case(
    generator, name, ids, start, length=None, l_sel=16, hidden=None, skipped=0, scale=0.25, **shape
) -> Case:
    """Random q, k and v; without a length the sequence ends with the last query."""
    ids = torch.tensor(ids, dtype=torch.int32)
    length = start + len(ids) if length is None else length
    q, k, v = random_heads(generator, len(ids), length, scale, **shape)
    if hidden is not None:
        chosen = torch.isin(torch.arange(length) // l_sel, ids.long())
        k[~chosen] = v[~chosen] = hidden
    arguments = dict(q=q, k=k, v=v, ids=ids, start=start, scale=scale, l_sel=l_sel)
    axes = {"out": ("head", "query", "channel"), AROUND: (), WAY: ()}
    out = chosen_attention(**arguments)
    expected = (without_last(out, 1, axis=1) if skipped else out, 0, "")
    arguments["skipped"] = skipped
    return Case(name, arguments, expected, axes, explain_selected, call_selected)


def random_heads(generator, count, length, scale, R=16, D=16, level=0.0, spread=1.0):
    """q (R, T, D), k and v (S, D); scores are moved by `level`, without rounding."""
    q = torch.randn(R, count, D, generator=generator) * spread
    k, v = torch.randn(2, length, D, generator=generator)
    if level:
        q, k = ((8 * x).round() / 8 for x in (q, k))
        q[:, :, 0] = level / (256 * scale)
        k[:, 0] = 256.0
    return q, k, v


def chosen_attention(q, k, v, ids, start, scale, l_sel) -> Tensor:
    """Query by query, over the list of the tokens that it reads."""
    out = torch.zeros(q.shape)
    for i, row in enumerate(ids.tolist()):
        tokens = [s for j in row if j >= 0 for s in range(j * l_sel, (j + 1) * l_sel)]
        seen = [s for s in tokens if s <= start + i]
        if seen:
            out[:, i] = (q[:, i] @ k[seen].T * scale).softmax(1) @ v[seen]
    return out


def call_selected(answer, q, k, v, ids, start, scale, l_sel, skipped):
    """What the answer wrote into out, and around it, and the way."""
    plan = Plan(len(ids), skipped)
    inputs = dict(q=q, k=k, v=v, ids=ids)
    return launch(answer, inputs, (start, scale, l_sel), empty(*q.shape), plan)


def explain_selected(got, expected, q, k, v, ids, start, scale, l_sel, skipped):
    """A query of no block, a -1 that was read, something in memory, or a known mistake."""
    out, overwritten = got[:2]
    if said := explain_way(got, expected, bool(skipped)):
        return said
    if skipped:
        return None
    by_query = out.transpose(0, 1)
    said = None if overwritten else explain_padding(by_query, ids)
    said = said or explain_memory(by_query, overwritten, "query")
    if said or not is_plain(q, k, l_sel):
        return said
    known = [*mistakes.SELECTED, mistakes.LAST_ID] if ids.shape[1] > 1 else mistakes.SELECTED
    arguments = (q, k, v, ids, start, scale, l_sel, skipped)
    places = dict(start=start, next=start + 1)
    return name_mistake(got, known, arguments, call=call_selected, part=output, **places)


def is_plain(q: Tensor, k: Tensor, l_sel: int) -> bool:
    """Whether it is one of the first cases; in the others a known mistake is not looked for."""
    return q.shape[0] == q.shape[2] == l_sel == 16 and bool(q.any() and k.abs().max() < 100)


def explain_padding(by_query: Tensor, ids: Tensor) -> str | None:
    """The first query that chose nothing and is not 0, or NaN in all the rows with a -1."""
    for i in (ids < 0).all(1).nonzero().flatten().tolist():
        if by_query[i].any() and not (by_query == UNWRITTEN).any():
            bad = "NaN" if by_query[i].isnan().any() else "not 0"
            return f"query {i} chose nothing, and its output is {bad}"
    padded = (ids < 0).any(1)
    lost = by_query.isnan().flatten(1).any(1)
    if lost.any() and (lost == padded).all():
        return (
            "the queries with a -1 are NaN: values were loaded for it, before the first key or of "
            "block 0; masked later or not, 0 times NaN is NaN"
        )
    return None


# --- 07.5 ---

UNIONS = {
    "nothing shared": dict(ids=[[0, 1], [2, 3]]),
    "four neighbours": dict(ids=[[0, 3, 7], [0, 3, 8], [0, 4, 8], [0, 4, 8]]),
    "padding": dict(ids=[[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1]]),
    "three neighbours": dict(ids=[[0, 5, 9, 30], [0, 6, 9, 31], [0, 5, 8, 31]]),
    "blocks out of order": dict(ids=[[7, 2, 5], [1, 5, 7], [9, 1, 2], [2, 0, 9]]),
    "one token": dict(ids=[[2, 4, 6, 8, -1]]),
    "the same choice": dict(ids=[[0, 11, 12, 13, 14]] * 4),
    "nothing chosen": dict(ids=[[-1, -1], [-1, -1], [-1, -1]]),
    "only the last token chose": dict(ids=[[-1, -1], [-1, -1], [-1, -1], [3, 1000]]),
    "many": dict(ids=None),
}


def union_case(generator, name, ids) -> Case:
    """The entries by asking every block of every token."""
    if ids is None:
        ids = [torch.randperm(40, generator=generator)[:16].tolist() for _ in range(4)]
    blocks = [j for row in ids for j in row if j >= 0]
    expected = []
    for j in dict.fromkeys(blocks):
        bits = sum(2**u for u, row in enumerate(ids) if j in row)
        expected.append(16 * j + bits)
    arguments = dict(ids=torch.tensor(ids, dtype=torch.int32))
    return Case(name, arguments, expected, explain=explain_union)


def explain_union(got, expected, ids):
    """A known mistake."""
    return name_mistake(torch.as_tensor(got).tolist(), mistakes.UNIONS, (ids,))


EXERCISES = [
    Exercise(
        "07.1",
        "A vector, in blocks",
        "warm-up",
        5,
        in_turn(add_case, VECTORS),
        hints=(
            "Which places belong to program 2 if a block has 4? Which of them exist if there are "
            "10 numbers?",
            "Program p owns the places p B, ..., p B + B - 1; a place is real iff it is less than "
            "the size.",
            "places of this program; which are real; load x and y there, masked; compute; store, "
            "masked",
        ),
    ),
    Exercise(
        "07.2",
        "A row, with a mask",
        "core",
        20,
        in_turn(softmax_case, ROWS),
        hints=(
            "Which number, put in the place of a score, changes neither the largest score nor the "
            "sum? And what are -inf minus -inf, and 0 / 0?",
            "p_i = exp(c s_i - m) / sum_j exp(c s_j - m), with m = max_j c s_j, over the numbers "
            "that the row may use.",
            "load how many; load the scores with -inf elsewhere, times scale; the largest, or 0 if "
            "that is -inf; exp; the sum, or 1 if that is 0; divide; store the whole row",
        ),
    ),
    Exercise(
        "07.3",
        "FlashAttention, forward",
        "stretch",
        45,
        in_turn(flash_case, TILES),
        seconds=SECONDS,
        hints=(
            "Up to which key does any query of program p read? Which key does every query read, "
            "so that no row of the first tile is empty?",
            "m_new = max(m_i, max_j s_j); p_j = exp(s_j - m_new); alpha = exp(m_i - m_new); l_i = "
            "alpha l_i + sum_j p_j; acc = alpha acc + sum_j p_j v_j; m_i = m_new.",
            "tile of q, masked; m_i, l_i, acc; for each first key up to the program's last query: "
            "tiles of k and v, 0 beyond the end; scores; -inf after the query; fold in; at the end "
            "divide and store the real rows",
        ),
    ),
    Exercise(
        "07.4",
        "The selected branch",
        "stretch",
        45,
        in_turn(selected_case, CHOICES),
        seconds=SECONDS,
        hints=(
            "What do you load for the id -1? Which two things must hold for a loaded key to be "
            "read?",
            "token t = start + program; keys j l', ..., j l' + l' - 1; a key is loaded iff j >= 0 "
            "and key < S, and read iff key <= t too.",
            "rows of q: one a head, R of them; m_i, l_i, acc; for each of the n ids: load it, then "
            "its keys and values, none for -1 and none after the end of the sequence; the mask; "
            "fold in; finish; store",
        ),
    ),
    Exercise(
        "07.5",
        "The union of neighbours",
        "core",
        15,
        in_turn(union_case, UNIONS),
        hints=(
            "Write all ids in one row, token after token. How do you see from the ids before it "
            "whether an id is new?",
            "id a is new iff no id before it equals it; its bits are the sum of 2^u over the "
            "tokens u in whose row an equal id stands; entry = 16 block + bits.",
            "flatten; token of each place; a table of which ids are equal; new = real and no equal "
            "id to the left; for each token u the bit 2^u where it has an equal id; 16 times the "
            "id + bits, where new",
        ),
    ),
]
