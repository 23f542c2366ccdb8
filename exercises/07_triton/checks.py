"""Set 07, Triton: a vector, a row, a tile, and the selected branch, each with its edges.

An answer is the launcher with the kernel behind it. Its tensors lie in the middle of larger
memory: NaN around the inputs, one known number in and around the output.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from exercises.compare import close, matches, name_mistake
from exercises.records import Case, Exercise, in_turn

from . import mistakes

EDGE = 1 << 16  # numbers on each side of a tensor: a wrong address should not end the notebook
UNWRITTEN = -99.0
AROUND = "places changed outside of out"
# A GPU compiles the mistakes that a check knows, the first time that it looks for them.
SECONDS = 60 if torch.cuda.is_available() else 20


def in_memory(x: Tensor, around: float) -> tuple[Tensor, Tensor]:
    """x in the middle of a buffer filled with `around`, and that buffer; on a GPU if there is one.

    The last axis of x may be a part of longer rows: keep its stride.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = x.untyped_storage().nbytes() // x.element_size()
    buffer = torch.full((size + 2 * EDGE,), around, dtype=x.dtype, device=device)
    return buffer.as_strided(x.shape, x.stride(), EDGE).copy_(x), buffer


def launch(answer, inputs: tuple, numbers: tuple, out: Tensor) -> tuple[Tensor, int]:
    """What the kernel wrote into a tensor like out, and how many numbers it wrote outside of it."""
    inputs = [in_memory(x, torch.nan if x.is_floating_point() else 0)[0] for x in inputs]
    out, buffer = in_memory(out, UNWRITTEN)
    try:
        with warnings.catch_warnings(action="ignore"):  # the interpreter's, of NaN
            answer(*inputs, out, *numbers)
    except Exception as error:
        raise cause(error) from None
    got = out.cpu().clone()
    out.fill_(UNWRITTEN)
    return got, int((buffer != UNWRITTEN).sum())


def cause(error: BaseException) -> BaseException:
    """The learner's own error: Triton wraps what is raised inside a kernel."""
    if "raise NotImplementedError()" in str(error):  # a stub that was compiled
        return NotImplementedError()
    return cause(error.__cause__) if error.__cause__ else error


def empty(*shape: int) -> Tensor:
    """An output into which nothing has been written."""
    return torch.full(shape, UNWRITTEN)


def output(result: tuple[Tensor, int]) -> Tensor:
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
}


def add_case(generator, name, size, block) -> Case:
    """Two random vectors; the sum is made number by number."""
    x, y = torch.randn(2, size, generator=generator)
    out = torch.tensor([2.5 * a + b for a, b in zip(x.tolist(), y.tolist(), strict=True)])
    arguments = dict(x=x, y=y, a=2.5, block=block)
    axes = {"out": ("place",), AROUND: ()}
    return Case(name, arguments, (out, 0), axes, explain_add, call_add)


def call_add(answer, x, y, a, block):
    """What the answer wrote into out, and around it."""
    return launch(answer, (x, y), (a, block), empty(len(x)))


def explain_add(got, expected, x, y, a, block):
    """One block only, something in memory, or a known mistake in the sum."""
    out, overwritten = got
    if not overwritten and len(x) > block and (out[block:] == UNWRITTEN).all():
        return "only the first block was written: what tells one program from another?"
    if said := explain_memory(out, overwritten, "place"):
        return said
    return name_mistake(got, mistakes.ADD, (x, y, a, block), call=call_add, part=output)


# --- 07.2 ---

ROWS = {
    "whole rows": dict(seen=[8, 8], width=8),
    "low scores in a ragged row": dict(seen=[6, 6, 6], width=6, shift=-8.0),
    "numbers that a row may not use": dict(seen=[3, 1, 7], width=8),
    "rows with a gap between them": dict(seen=[5, 5, 5], width=5, gap=6),
    "large scores": dict(seen=[6, 6], width=6, scale=0.25, shift=800.0),
    "a row that may use nothing": dict(seen=[0, 4], width=6),
}


def softmax_case(generator, name, seen, width, scale=0.5, shift=0.0, gap=0) -> Case:
    """Random scores around `shift`; between two rows lie `gap` numbers."""
    s = torch.randn(len(seen), width, generator=generator) * 2 + shift
    seen = torch.tensor(seen, dtype=torch.int32)
    arguments = dict(s=s, seen=seen, scale=scale, gap=gap)
    axes = {"out": ("row", "column"), AROUND: ()}
    expected = (softmax_by_definition(s, seen, scale), 0)
    return Case(name, arguments, expected, axes, explain_softmax, call_softmax)


def softmax_by_definition(s: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Row by row, in Python's numbers."""
    out = torch.zeros_like(s)
    for row, count in enumerate(seen.tolist()):
        top = float(s[row].max())
        weights = [math.exp(scale * (x - top)) for x in s[row, :count].tolist()]
        for column, weight in enumerate(weights):
            out[row, column] = weight / sum(weights)
    return out


def call_softmax(answer, s, seen, scale, gap):
    """What the answer wrote into out, and around it: the gaps between rows count as around."""
    width = s.shape[1]
    spaced = F.pad(s, (0, gap), value=torch.nan)[:, :width]
    out = F.pad(empty(*s.shape), (0, gap), value=UNWRITTEN)[:, :width]
    return launch(answer, (spaced, seen), (scale,), out)


def explain_softmax(got, expected, s, seen, scale, gap):
    """Overflow, an empty row, something in memory, weight where none may be, a known mistake."""
    out, overwritten = got
    if scale * s.max() > 100 and not overwritten:
        return explain_large(out)
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
    arguments = (s, seen, scale, gap)
    return name_mistake(got, mistakes.SOFTMAX, arguments, call=call_softmax, part=output)


def explain_empty_row(out: Tensor, seen: Tensor) -> str | None:
    """The first row that may use nothing, if it was written and is not 0."""
    for row in (seen == 0).nonzero().flatten().tolist():
        if out[row].any() and not (out[row] == UNWRITTEN).any():
            bad = "NaN" if out[row].isnan().any() else "not 0"
            return f"row {row} may use nothing, and its weights are {bad}"
    return None


def explain_large(out: Tensor) -> str | None:
    """Weights that large scores made infinite, NaN or 0."""
    if out.isfinite().all() and out.any():
        return None
    bad = "all 0" if out.isfinite().all() else "not finite"
    return (
        f"the weights are {bad}: exp of a large number is inf, exp of a very negative one "
        "is 0; take the largest of the numbers that go into exp from them"
    )


# --- 07.3 ---

TILES = {
    "one tile": dict(length=16),
    "two tiles of keys": dict(length=32, growth=40.0, poison=16),
    "a ragged end": dict(length=21),
    "wide tiles of keys": dict(length=20, M=16, N=32),
    "tall tiles of queries": dict(length=25, M=32, N=16),
    "large scores": dict(length=16, level=5.0),
}


def flash_case(generator, name, length, M=16, N=16, growth=0.0, level=0.0, poison=None) -> Case:
    """Scores that grow along the keys, or that are large; poison: later tokens become NaN."""
    q, k = torch.randn(2, length, 16, generator=generator)
    k = k + growth * torch.arange(length)[:, None] / length * q.mean(0)
    if level:  # every q.k moves up by about 16 level^2, and float32 still holds it exactly
        q, k = (((x + level) * 8).round() / 8 for x in (q, k))
    v = torch.randn(length, 32, generator=generator)
    out = causal_attention(q, k, v, 0.25)
    arguments = dict(q=q, k=k, v=v, scale=0.25, M=M, N=N, poison=poison)
    axes = {"out": ("query", "channel"), AROUND: ()}
    expected = (out, 0)
    if poison is not None:
        axes["out with NaN in later tokens"] = ("query", "channel")
        expected = (out, 0, out[:poison])
    return Case(name, arguments, expected, axes, explain_flash, call_flash)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Query by query, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    out = []
    for t in range(len(q)):
        weights = (k[: t + 1] @ q[t] * scale).softmax(0)
        out.append(weights @ v[: t + 1])
    return torch.stack(out).float()


def call_flash(answer, q, k, v, scale, M, N, poison):
    """What the answer wrote into out, and around it; and the early rows with NaN in later ones."""
    result = launch(answer, (q, k, v), (scale, M, N), empty(len(q), v.shape[1]))
    if poison is None:
        return result
    k, v = (x.clone() for x in (k, v))
    k[poison:] = torch.nan
    v[poison:] = torch.nan
    poisoned, _ = launch(answer, (q, k, v), (scale, M, N), empty(len(q), v.shape[1]))
    return *result, poisoned[:poison]


def explain_flash(got, expected, q, k, v, scale, M, N, poison):
    """Tiles too many, overflow, a walk that ends early, something in memory, a known mistake."""
    out, overwritten = got[:2]
    if matches(got[:2], expected[:2]):
        return explain_poison(got[2], poison, M)
    if scale * (q @ k.T).max() > 90 and not out.isfinite().all():
        return (
            "the result is not finite: exp of a large number is inf, exp of a very negative "
            "one 0; take the largest of the numbers that go into exp from them"
        )
    if overwritten == 0 and out.isnan().any(1).all():
        return None  # whatever it is, another case can tell
    known = dict(call=call_flash, part=output, count=len(q), after=len(q) - 1)
    known |= dict(query=first_wrong(out, expected[0]))
    arguments = (q, k, v, scale, M, N, None)
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

SELECT_BLOCK_SIZE = 16  # l'
HEADS = 16  # R
WIDTH = 16  # D

CHOICES = {
    "one finished block": dict(ids=[[0]], start=16, length=48),
    "causal in the own block": dict(ids=[[0]], start=1, length=16),
    "a choice among many blocks": dict(ids=[[0, 3], [1, 3]], start=62),
    "padding": dict(ids=[[2, -1], [1, 2]], start=40, length=48),
    "a ragged end": dict(ids=[[0, 1]], start=19),
    "a query that chose nothing": dict(ids=[[-1], [1]], start=30),
}


def selected_case(generator, name, ids, start, length=None) -> Case:
    """Random q, k and v; without a length the sequence ends with the last query."""
    ids = torch.tensor(ids, dtype=torch.int32)
    length = start + len(ids) if length is None else length
    q = torch.randn(HEADS, len(ids), WIDTH, generator=generator)
    k, v = torch.randn(2, length, WIDTH, generator=generator)
    arguments = dict(q=q, k=k, v=v, ids=ids, start=start, scale=0.25)
    axes = {"out": ("head", "query", "channel"), AROUND: ()}
    expected = (chosen_attention(**arguments), 0)
    return Case(name, arguments, expected, axes, explain_selected, call_selected)


def chosen_attention(q, k, v, ids, start, scale) -> Tensor:
    """Query by query, over the list of the tokens that it reads."""
    size = SELECT_BLOCK_SIZE
    out = torch.zeros(q.shape)
    for i, row in enumerate(ids.tolist()):
        tokens = [s for j in row if j >= 0 for s in range(j * size, (j + 1) * size)]
        seen = [s for s in tokens if s <= start + i]
        if seen:
            out[:, i] = (q[:, i] @ k[seen].T * scale).softmax(1) @ v[seen]
    return out


def call_selected(answer, q, k, v, ids, start, scale):
    """What the answer wrote into out, and around it."""
    return launch(answer, (q, k, v, ids), (start, scale, SELECT_BLOCK_SIZE), empty(*q.shape))


def explain_selected(got, expected, q, k, v, ids, start, scale):
    """A query of no block, a -1 that was read, something in memory, or a known mistake."""
    out, overwritten = got
    by_query = out.transpose(0, 1)
    said = None if overwritten else explain_padding(by_query, ids)
    said = said or explain_memory(by_query, overwritten, "query")
    if said:
        return said
    known = [*mistakes.SELECTED, mistakes.LAST_ID] if ids.shape[1] > 1 else mistakes.SELECTED
    arguments = (q, k, v, ids, start, scale)
    places = dict(start=start, next=start + 1)
    return name_mistake(got, known, arguments, call=call_selected, part=output, **places)


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
            "the queries with a -1 are NaN: block -1 lies before the first key; masked or not, "
            "its values were loaded, and 0 times NaN is NaN"
        )
    return None


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
            "token t = start + program; keys j l', ..., j l' + l' - 1 with j clamped at 0; a key "
            "may be read iff id >= 0 and key <= t.",
            "rows of q: one a head, R of them; m_i, l_i, acc; for each of the n ids: load it, "
            "clamp it, load its keys and values, masked at the end of the sequence; the mask; "
            "fold in; finish; store",
        ),
    ),
]
