"""Set 07, Triton: a vector, a row, a tile, and the selected branch, each with its edges.

An answer is the launcher with the kernel behind it. Its tensors lie in the middle of larger
memory: NaN around the inputs, one known number in and around the output.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from exercises.compare import matches, recognise
from exercises.records import Case, Exercise

EDGE = 1 << 16  # numbers on each side of a tensor: a wrong address should not end the notebook
UNWRITTEN = -99.0
AROUND = "places changed outside of out"


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
    return torch.full(shape, UNWRITTEN)


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
        return (f"{name} {int(lost[0])} is NaN: NaN lies in memory around the inputs; was some of "
                "it loaded?")
    return None


# --- 07.1 ---


def add_cases(generator: torch.Generator) -> list[Case]:
    def case(name, size, block):
        x, y = torch.randn(2, size, generator=generator)
        out = torch.tensor([2.5 * a + b for a, b in zip(x.tolist(), y.tolist(), strict=True)])
        return Case(name, dict(x=x, y=y, a=2.5, block=block), (out, 0),
                    axes={"out": ("place",), AROUND: ()}, explain=explain_add, call=call_add)

    return [
        case("one program", 8, 8),
        case("three programs", 12, 4),
        case("a ragged end", 10, 4),
        case("shorter than a block", 3, 16),
    ]


def call_add(answer, x, y, a, block):
    return launch(answer, (x, y), (a, block), empty(len(x)))


def explain_add(got, expected, x, y, a, block):
    out, overwritten = got
    if not overwritten and len(x) > block and (out[block:] == UNWRITTEN).all():
        return "only the first block was written: what tells one program from another?"
    return explain_memory(out, overwritten, "place") or recognise(out, {
        "a multiplied the sum, and it belongs to x only": a * (x + y),
        "a multiplied y, and it belongs to x": x + a * y,
        "y was not added": a * x,
        "x was not multiplied by a": x + y,
    })


# --- 07.2 ---


def softmax_cases(generator: torch.Generator) -> list[Case]:
    def case(name, seen, width, scale=0.5, shift=0.0, gap=0):
        s = torch.randn(len(seen), width, generator=generator) * 2 + shift
        arguments = dict(s=s, seen=torch.tensor(seen, dtype=torch.int32), scale=scale, gap=gap)
        expected = torch.zeros(len(seen), width)
        for row, count in enumerate(seen):
            weights = [math.exp(scale * (x - float(s[row].max()))) for x in s[row, :count].tolist()]
            for column, weight in enumerate(weights):
                expected[row, column] = weight / sum(weights)
        return Case(name, arguments, (expected, 0), explain=explain_softmax, call=call_softmax,
                    axes={"out": ("row", "column"), AROUND: ()})

    return [
        case("whole rows", [8, 8], 8),
        case("low scores in a ragged row", [6, 6, 6], 6, shift=-8.0),
        case("numbers that a row may not use", [3, 1, 7], 8),
        case("rows with a gap between them", [5, 5, 5], 5, gap=6),
        case("large scores", [6, 6], 6, scale=0.25, shift=800.0),
        case("a row that may use nothing", [0, 4], 6),
    ]


def call_softmax(answer, s, seen, scale, gap):
    s, out = (F.pad(x, (0, gap), value=fill)[:, : s.shape[1]]
              for x, fill in ((s, torch.nan), (empty(*s.shape), UNWRITTEN)))
    return launch(answer, (s, seen), (scale,), out)


def explain_softmax(got, expected, s, seen, scale, gap):
    (out, overwritten), width = got, s.shape[1]
    if scale * s.max() > 100 and not overwritten:
        return explain_large(out)
    empty_row = next((row for row in range(len(s)) if seen[row] == 0), None)
    if empty_row is not None and not overwritten and not (out[empty_row] == UNWRITTEN).any():
        bad = "NaN" if out[empty_row].isnan().any() else "not 0"
        if not (out[empty_row] == 0).all():
            return f"row {empty_row} may use nothing, and its weights are {bad}"
    if said := explain_memory(out, overwritten, "row"):
        return said
    real = torch.arange(width) < seen[:, None]
    if leak := next(iter(((out != 0) & ~real).nonzero().tolist()), None):
        row, column = leak
        return (f"row {row} may use its first {int(seen[row])} numbers, and column {column} "
                "got weight")
    hidden = s.masked_fill(~real, -torch.inf)
    spare = 2 ** math.ceil(math.log2(width)) - width
    zeros = torch.cat([s * real, torch.zeros(len(s), spare)], 1)
    return recognise(out, {
        "0 stands in the place of numbers that may not be used, and takes part in the sum":
            (zeros * scale).softmax(1)[:, :width] * real,
        "the weights are those of another base: exp(x) is not exp2(x)":
            (hidden * scale * math.log(2)).softmax(1),
        "the scores were not multiplied by scale": hidden.softmax(1),
        "the weights were not divided by their sum":
            ((hidden - hidden.amax(1, keepdim=True)) * scale).exp(),
        "the last number that the row may use was left out":
            (s.masked_fill(torch.arange(width) >= seen[:, None] - 1, -torch.inf)
             * scale).softmax(1),
    })


def explain_large(out):
    if not out.isfinite().all() or (out == 0).all():
        bad = "not finite" if not out.isfinite().all() else "all 0"
        return (f"the weights are {bad}: exp of a large number is inf, exp of a very negative one "
                "is 0; take the largest of the numbers that go into exp from them")
    return None


# --- 07.3 ---


def flash_cases(generator: torch.Generator) -> list[Case]:
    def case(name, length, M=16, N=16, growth=0.0, level=0.0, poison=None):
        q, k = torch.randn(2, length, 16, generator=generator)
        k = k + growth * torch.arange(length)[:, None] / length * q.mean(0)
        # every q.k moves up by about 16 level^2, and float32 still holds it exactly
        q, k = (((x + level) * 8).round() / 8 if level else x for x in (q, k))
        v = torch.randn(length, 32, generator=generator)
        arguments = dict(q=q, k=k, v=v, scale=0.25, M=M, N=N, poison=poison)
        out = causal_attention(q, k, v, 0.25)
        expected = (out, 0) if poison is None else (out, 0, out[:poison])
        axes = {"out": ("query", "channel"), AROUND: ()}
        if poison is not None:
            axes["out with NaN in later tokens"] = ("query", "channel")
        return Case(name, arguments, expected, axes, explain_flash, call_flash)

    return [
        case("one tile", 16),
        case("two tiles of keys", 32, growth=40.0, poison=16),
        case("a ragged end", 21),
        case("wide tiles of keys", 20, M=16, N=32),
        case("tall tiles of queries", 25, M=32, N=16),
        case("large scores", 16, level=5.0),
    ]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, ahead: int = 0) -> Tensor:
    """Query by query, in float64; ahead = 1 also reads the token after the query."""
    q, k, v, out = q.double(), k.double(), v.double(), []
    for t in range(len(q)):
        weights = (k[: t + 1 + ahead] @ q[t] * scale).softmax(0)
        out.append(weights @ v[: t + 1 + ahead])
    return torch.stack(out).float()


def call_flash(answer, q, k, v, scale, M, N, poison):
    out = launch(answer, (q, k, v), (scale, M, N), empty(len(q), v.shape[1]))
    if poison is None:
        return out
    k, v = k.clone(), v.clone()
    k[poison:], v[poison:] = torch.nan, torch.nan
    poisoned, _ = launch(answer, (q, k, v), (scale, M, N), empty(len(q), v.shape[1]))
    return *out, poisoned[:poison]


def explain_flash(got, expected, q, k, v, scale, M, N, poison):
    out, overwritten = got[:2]
    if poison is not None and matches((out, overwritten), expected[:2]):
        lost = got[2].isnan().any(1).nonzero()
        return (f"query {int(lost[0])} is NaN once tokens {poison} and later are NaN: its program "
                f"owns queries 0 to {M - 1}, and loaded more keys") if len(lost) else None
    if scale * (q @ k.T).max() > 90 and not out.isfinite().all():
        return ("the result is not finite: exp of a large number is inf, exp of a very negative "
                "one 0; take the largest of the numbers that go into exp from them")
    if overwritten == 0 and out.isnan().any(1).all():
        return None  # whatever it is, another case can tell
    if said := explain_walk(out, q, k, v, scale, M, N):
        return said
    if said := explain_memory(out, overwritten, "query"):
        return said
    dense = (q @ k.T * scale).softmax(1) @ v
    return recognise(out, {
        f"query 0 reads all {len(q)} keys, and {len(q) - 1} of them come after it": dense,
        "query 0 reads key 1, which comes after it": causal_attention(q, k, v, scale, ahead=1),
        "the weights are those of another base: exp(x) is not exp2(x)":
            causal_attention(q, k, v, scale * math.log(2)),
        "the scores were not multiplied by scale": causal_attention(q, k, v, 1.0),
        "out was not made smaller when a tile brought a larger maximum":
            by_tiles(q, k, v, scale, N, shrink_out=torch.ones_like),
        "total was not made smaller when a tile brought a larger maximum":
            by_tiles(q, k, v, scale, N, shrink_total=torch.ones_like),
        "out and total were not made smaller when a tile brought a larger maximum":
            by_tiles(q, k, v, scale, N, torch.ones_like, torch.ones_like),
        "out and total were made smaller in base 2, and the weights are in base e":
            by_tiles(q, k, v, scale, N, torch.exp2, torch.exp2),
        "out was not divided by total": by_tiles(q, k, v, scale, N, divide=False),
    })


def by_tiles(q, k, v, scale, N, shrink_out=torch.exp, shrink_total=torch.exp, divide=True):
    """The online softmax over tiles of N keys, with one of its steps changed."""
    t = torch.arange(len(q))[:, None]
    m, total = torch.full((len(q), 1), -torch.inf), torch.zeros(len(q), 1)
    out = torch.zeros(len(q), v.shape[1])
    for first in range(0, len(k), N):
        key = torch.arange(first, min(first + N, len(k)))
        s = (q @ k[key].T * scale).masked_fill(key > t, -torch.inf)
        m_new = torch.maximum(m, s.amax(1, keepdim=True))
        p = (s - m_new).exp()
        total = total * shrink_total(m - m_new) + p.sum(1, keepdim=True)
        out, m = out * shrink_out(m - m_new) + p @ v[key], m_new
    return out / total if divide else out


def explain_walk(out, q, k, v, scale, M, N):
    """Keys that a query lacks because its program's walk ends too early, or begins too late."""
    t, key = torch.arange(len(q))[:, None], torch.arange(len(k))
    walks = {  # the first key that the walk of a query's program does not reach
        "the walk ends before the program's own queries": t // M * M,
        "the walk takes as many tiles of keys as there are tiles of queries": (t // M + 1) * N,
        "the walk ends one tile too early": (t // M * M + M - 1) // N * N,
    }
    for sentence, end in walks.items():
        visible = (key <= t) & (key < end)
        lacking = ((key <= t) & ~visible).nonzero()
        p = (q @ k.T * scale).masked_fill(~visible, -torch.inf).softmax(1)
        if len(lacking) and torch.allclose(out, p @ v, rtol=1e-4, atol=1e-5, equal_nan=True):
            query, missed = lacking[0].tolist()
            return f"query {query} does not read key {missed}: {sentence}"
    if out[0].isnan().all() and not out[1:M].isnan().any():
        return "query 0 is NaN: did it find no key it may read, not even its own?"
    return None


# --- 07.4 ---

BLOCK = 16  # l'
HEADS = 16  # R
WIDTH = 16  # D


def selected_cases(generator: torch.Generator) -> list[Case]:
    def case(name, ids, start, length=None, level=0.0):
        ids = torch.tensor(ids, dtype=torch.int32)
        length = start + len(ids) if length is None else length
        q = torch.randn(HEADS, len(ids), WIDTH, generator=generator)
        k, v = torch.randn(2, length, WIDTH, generator=generator)
        arguments = dict(q=q, k=k + level, v=v, ids=ids, start=start, scale=0.25)
        return Case(name, arguments, (read(**arguments), 0), explain=explain_selected,
                    call=call_selected, axes={"out": ("head", "query", "channel"), AROUND: ()})

    return [
        case("one finished block", [[0]], 16, length=48),
        case("causal in the own block", [[0]], 1, length=16),
        case("a choice among many blocks", [[0, 3], [1, 3]], 62),
        case("padding", [[2, -1], [1, 2]], 40, length=48),
        case("a ragged end", [[0, 1]], 19),
        case("a query that chose nothing", [[-1], [1]], 30),
    ]


def read(q, k, v, ids, start, scale, limit=None, tokens=None):
    """Head by head and query by query; tokens(j) are those of id j, limit(t) the last one read."""
    limit = limit or (lambda t: t)
    tokens = tokens or (lambda j: range(j * BLOCK, (j + 1) * BLOCK) if j >= 0 else [])
    out = torch.zeros(q.shape)
    for i, row in enumerate(ids.tolist()):
        seen = [s for j in row for s in tokens(j) if s <= limit(start + i) and s < len(k)]
        if seen:
            out[:, i] = (q[:, i] @ k[seen].T * scale).softmax(1) @ v[seen]
    return out


def call_selected(answer, q, k, v, ids, start, scale):
    return launch(answer, (q, k, v, ids), (start, scale, BLOCK), empty(*q.shape))


def explain_selected(got, expected, q, k, v, ids, start, scale):
    out, overwritten = got
    by_query = out.transpose(0, 1)
    nothing = (ids < 0).all(1)
    if not overwritten and nothing.any() and not (by_query == UNWRITTEN).any():
        i = int(nothing.nonzero()[0])
        if not (by_query[i] == 0).all():
            bad = "NaN" if by_query[i].isnan().any() else "not 0"
            return f"query {i} chose nothing, and its output is {bad}"
    lost = by_query.isnan().flatten(1).any(1)
    if not overwritten and (ids < 0).any() and lost.any() and (lost == (ids < 0).any(1)).all():
        return ("the queries with a -1 are NaN: block -1 lies before the first key; masked or not, "
                "its values were loaded, and 0 times NaN is NaN")
    if said := explain_memory(by_query, overwritten, "query"):
        return said
    given = dict(q=q, k=k, v=v, ids=ids, start=start, scale=scale)
    own = f"query 0 is token {start}"
    fewer = {"the walk ends one id too early": read(**{**given, "ids": ids[:, :-1]})}
    return recognise(out, {
        **(fewer if ids.shape[1] > 1 else {}),  # of one id nothing is left: an output of 0
        f"{own}, and reads to the end of its own block": read(**given, limit=lambda t: len(k)),
        f"{own}, and reads token {start + 1}": read(**given, limit=lambda t: t + 1),
        f"{own}, and does not read itself": read(**given, limit=lambda t: t - 1),
        f"{own}, and was taken for token 0": read(**given, limit=lambda t: t - start),
        "-1 is padding, and was read as block 0":
            read(**given, tokens=lambda j: range(max(j, 0) * BLOCK, (max(j, 0) + 1) * BLOCK)),
        "ids are blocks, and were read as tokens":
            read(**given, tokens=lambda j: range(j, j + BLOCK) if j >= 0 else []),
        "the weights are those of another base: fold_in counts in powers of 2":
            read(**{**given, "scale": scale * math.log(2)}),
        "the scores were not multiplied by scale": read(**{**given, "scale": 1.0}),
        "all heads got the output of head 0": read(**given)[:1].expand_as(q),
        "every query read the ids of query 0": read(**{**given, "ids": ids[:1].expand_as(ids)}),
        "every token up to the query was read, chosen or not":
            read(**{**given, "ids": torch.arange(len(k) // BLOCK + 1).expand(len(ids), -1)}),
    })


EXERCISES = [
    Exercise(
        "07.1", "A vector, in blocks", "warm-up", 5, add_cases,
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
        "07.2", "A row, with a mask", "core", 20, softmax_cases,
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
        "07.3", "FlashAttention, forward", "stretch", 45, flash_cases, seconds=20,
        hints=(
            "Up to which key does any query of program p read? Which key does every query read, "
            "so that no row of the first tile is empty?",
            "m' = max(m, max_j s_j); p_j = exp(s_j - m'); a = exp(m - m'); total' = a total + "
            "sum_j p_j; out' = a out + sum_j p_j v_j.",
            "tile of q, masked; m, total, out; for each first key up to the program's last query: "
            "tiles of k and v, 0 beyond the end; scores; -inf after the query; fold in; at the end "
            "divide and store the real rows",
        ),
    ),
    Exercise(
        "07.4", "The selected branch", "stretch", 45, selected_cases, seconds=20,
        hints=(
            "What do you load for the id -1? Which two things must hold for a loaded key to be "
            "read?",
            "token t = start + program; keys j l', ..., j l' + l' - 1 with j clamped at 0; visible "
            "iff id >= 0 and key <= t.",
            "rows of q: one a head, R of them; m, total, out; for each of the n ids: load it, "
            "clamp it, load its keys and values, masked at the end of the sequence; visible; "
            "fold in; finish; store",
        ),
    ),
]
