"""Set 04, window and gates: which keys, how few scores, how branches add up, how they decode."""

from collections.abc import Callable

import torch
from torch import Tensor

from exercises.compare import close, name_mistake, plain
from exercises.memory import most_held, numbers_in
from exercises.records import Case, Exercise, in_turn
from exercises.scores import OVERFLOW, far_below, rising
from nsa_lite import loops

from . import mistakes


def first_wrong(got: Tensor, expected: Tensor) -> int:
    """The first row that is wrong."""
    return int((~close(got, expected)).flatten(1).any(1).nonzero()[0])


def read(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of one head to the keys of a mask (T, S); a row without any is 0."""
    scores = (q @ k.T * q.shape[1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(1).nan_to_num() @ v


# --- 04.1 ---

# By hand: t - w + 1, ..., t, and nothing before key 0.
KEYS = {
    "a full window": dict(t=10, window=4, keys=[7, 8, 9, 10]),
    "the first query": dict(t=0, window=4, keys=[0]),
    "fewer tokens than the window": dict(t=2, window=4, keys=[0, 1, 2]),
    "the first full window": dict(t=3, window=4, keys=[0, 1, 2, 3]),
    "the first query that loses a key": dict(t=4, window=4, keys=[1, 2, 3, 4]),
    "a window of one": dict(t=5, window=1, keys=[5]),
    "a window of seven": dict(t=12, window=7, keys=[6, 7, 8, 9, 10, 11, 12]),
}


def key_case(generator, name, t, window, keys) -> Case:
    """The keys of one query, written down by hand."""
    return Case(name, dict(t=t, window=window), keys, explain=explain_keys)


def explain_keys(got, expected, t, window):
    """What is wrong with a list of keys."""
    keys = plain(got)
    given = f"query {t}, window {window}"
    if min(keys, default=0) < 0:
        return f"{given}: reads key {min(keys)}, and keys count from 0"
    if max(keys, default=0) > t:
        return f"{given}: reads key {max(keys)}, which comes after the query"
    if t not in keys:
        return f"{given}: does not read the query's own key"
    if len(keys) > window:
        return f"{given}: reads {len(keys)} keys: {keys}"
    if sorted(keys) == expected:
        return f"{given}: the right keys, but not in ascending order"
    return f"{given}: reads {len(keys)} of the keys that the window holds"


# --- 04.2 ---

WINDOWS = {
    "whole chunks": dict(length=12, window=4),
    "scale": dict(length=8, window=4, scale=3.0),
    "a last chunk that is short": dict(length=11, window=4),
    "a window longer than the sequence": dict(length=5, window=8),
    "a window of one": dict(length=4, window=1),
    "another width": dict(length=17, window=5, width=9, value_width=5),
    "values wider than keys": dict(length=10, window=3, width=3, value_width=6),
    "large scores": dict(length=14, window=4, scale=20.0, value_width=2),
    "very negative scores": dict(length=13, window=3, below=30_000),
    "later keys far above": dict(length=15, window=4, value_width=5, rise=20_000),
    "equal scores": dict(length=9, window=6, scale=0.0, width=5),
}


def window_cases(generator: torch.Generator) -> list[Case]:
    """Outputs, then the memory of a longer sequence, and last which keys a chunk is given."""
    outputs = in_turn(window_case, WINDOWS)(generator)
    return [
        *outputs,
        memory_case(generator, "memory", length=400, window=5),
        slice_case(generator, "keys that a chunk does not need", length=30, window=4),
    ]


def window_case(  # noqa: PLR0913  what a row of the table may say
    generator, name, length, window, *, scale=1.0, width=4, value_width=3, below=0, rise=0
) -> Case:
    """Random q, k and v of one head, or scores of extreme sizes, and the package's loop."""
    q = torch.randn(length, width, generator=generator) * scale
    k = torch.randn(length, width, generator=generator) * scale
    v = torch.randn(length, value_width, generator=generator)
    if below:
        q, k = far_below(q, k, below)
    if rise:
        q, k = rising(q, k, rise)
    out = loops.window_attention(q[None, None], k[None, None], v[None, None], window=window)
    arguments = dict(q=q, k=k, v=v, window=window)
    return Case(name, arguments, out[0, 0], ("query", "channel"), explain_window)


def slice_case(generator, name, length, window) -> Case:
    """NaN in the first and in the last key, and the queries whose chunks need neither."""
    case = window_case(generator, name, length, window)
    for x in (case.arguments["k"], case.arguments["v"]):
        x[0] = x[-1] = torch.nan
    expected = between(case.expected, window)
    return Case(name, case.arguments, expected, case.axes, explain_slice, far_from_both)


def between(out: Tensor, window: int) -> Tensor:
    """The rows that no chunk of `window` queries joins with key 0 or with the last one."""
    return out[2 * window : -window]


def far_from_both(answer, q, k, v, window):
    """The answer's output where neither the first nor the last key may be read."""
    out = answer(q, k, v, window)
    return between(out, window) if isinstance(out, Tensor) else out


def explain_slice(got, expected, q, k, v, window):
    """A query that got keys from far away."""
    if not got.isnan().any():
        return None
    t = 2 * window + int(got.isnan().any(-1).nonzero()[0])
    return (
        f"key 0 or {len(k) - 1} was read for query {t}, which needs keys {t - window + 1} to {t}: "
        "give a chunk only its own slice of keys and values"
    )


def memory_case(generator, name, length, window) -> Case:
    """The same, and the most numbers that were held on the way."""
    case = window_case(generator, name, length, window)
    expected = (case.expected, most_numbers(length))
    axes = {"output": case.axes, "numbers held": ()}
    return Case(name, case.arguments, expected, axes, explain_memory, with_most)


def most_numbers(length: int) -> int:
    """Less than a causal triangle: far more than w queries by 2 w keys."""
    return length * length // 3


def with_most(answer, q, k, v, window):
    """The answer's output and the most numbers that it held; the allowed ones count as none."""
    out, most = most_held(lambda: answer(q, k, v, window))
    return out, max(most, most_numbers(len(q)))


def explain_memory(got, expected, q, k, v, window):
    """A right output that took too much memory."""
    out, most = got
    if most > expected[1] and close(out, expected[0]).all():
        return (
            f"the output is right, but about {round(most, -4)} numbers were held at once for "
            f"{len(q)} queries with a window of {window}: that grows with every pair of a query "
            "and a key"
        )
    return None


def explain_window(got, expected, q, k, v, window):
    """A row that is not finite, or a known mistake, at the first query that is wrong."""
    if not got.isfinite().all():
        t = int((~got.isfinite()).any(-1).nonzero()[0])
        return f"query {t} is not finite: {OVERFLOW}"
    row = first_wrong(got, expected)
    return name_mistake(
        got,
        mistakes.WINDOWS,
        (q, k, v, window),
        row=row,
        before=row - window,
        more=window + 1,
    )


# --- 04.3 ---

BRANCHES = ("compressed", "selected", "window")
GATES = {
    "one head": dict(length=4, heads=1),
    "two heads": dict(length=5, heads=2),
    "as many heads as branches": dict(length=3, heads=3),
    "every gate open": dict(length=3, heads=1, fill=30.0),
    "every gate shut": dict(length=3, heads=1, fill=-300.0),
    "large logits": dict(length=7, heads=4, scale=300.0, width=5),
    "five heads": dict(length=2, heads=5, width=3),
}


def gate_case(  # noqa: PLR0913  what a row of the table may say
    generator, name, length, heads, width=2, fill=None, scale=1.0
) -> Case:
    """Random branches, and random logits or one number for all of them."""
    logits = scale * torch.randn(length, 3 * heads, generator=generator)
    if fill is not None:
        logits = torch.full_like(logits, fill)
    branches = {name: torch.randn(heads, length, width, generator=generator) for name in BRANCHES}
    return Case(
        name,
        dict(logits=logits, **branches),
        mixed(logits, *branches.values()),
        ("head", "query", "channel"),
        explain_gates if fill is None else explain_equal_gates,
    )


def mixed(logits: Tensor, *branches: Tensor) -> Tensor:
    """Eq. 5, number by number."""
    out = torch.zeros_like(branches[0])
    for h in range(out.shape[0]):
        for t in range(out.shape[1]):
            for c, branch in enumerate(branches):
                gate = 1 / (1 + torch.exp(-logits[t, 3 * h + c]))
                out[h, t] += gate * branch[h, t]
    return out


def explain_equal_gates(got, expected, logits, compressed, selected, window):
    """How much of the sum of the branches came out, where all gates are alike."""
    whole = compressed + selected + window
    share = float((got * whole).sum() / whole.square().sum())
    if close(got, share * whole).all():
        return (
            f"every logit is {float(logits[0, 0]):.0f}, and the output is {share:.2f} times "
            "the sum of the three branches"
        )
    return None


def explain_gates(got, expected, **arguments):
    """A number that is not finite, or a known mistake."""
    if not got.isfinite().all():
        return (
            "a gate is not finite: exp of a large logit overflows, and infinite / infinite is NaN"
        )
    return name_mistake(got, mistakes.GATES, tuple(arguments.values()))


# --- 04.4 ---


WEIGHTS = {  # rows and columns of the weight in each case
    "a sum": (3, 2),
    "a squared error": (3, 2),
    "the window's gate is shut": (3, 2),
    "two attentions": (3, 2),
    "another shape": (5, 3),
    "the far branch is not used": (2, 6),
    "a loss that bends sharply": (4, 3),
    "a large loss": (1, 4),
}


def gradient_cases(generator: torch.Generator) -> list[Case]:
    """One case a loss, each with a weight of its own."""
    axes = {"through the far branch": ("row", "column"), "through the window": ("row", "column")}
    cases = []
    for name, shape in WEIGHTS.items():
        loss = losses(generator, *shape)[name]
        weight = torch.randn(shape, dtype=torch.float64, generator=generator)
        expected = by_differences(loss, weight)
        arguments = dict(loss=loss, weight=weight)
        cases.append(Case(name, arguments, expected, axes, explain_gradients, both_parts))
    return cases


def losses(
    generator: torch.Generator, rows: int, columns: int
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Losses of two weights: of the far branch, and of the window."""

    def numbers(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    a, b = (numbers(4, rows) for _ in range(2))
    y = numbers(4, columns)
    x = numbers(6, rows)
    q = numbers(6, columns)
    t = torch.arange(6)
    near = (t <= t[:, None]) & (t > t[:, None] - 2)
    early = t <= t[:, None] // 2

    def squared_error(far, window):
        return (a @ far + b @ window - y).square().sum()

    def two_attentions(far, window):
        out = read(q, x @ far, q, early) + read(q, x @ window, q, near)
        return (out - q.flip(0)).square().sum()

    return {
        "a sum": lambda far, window: (a @ far).sum() + 5 * (b @ window).sum(),
        "a squared error": squared_error,
        "the window's gate is shut": lambda far, window: (a @ far - y).square().sum(),
        "two attentions": two_attentions,
        "another shape": squared_error,
        "the far branch is not used": lambda far, window: (b @ window - y).square().sum(),
        "a loss that bends sharply": lambda far, window: (30 * far * window.square()).sin().sum(),
        "a large loss": lambda far, window: 1e6 * squared_error(far, window),
    }


def by_differences(loss, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients from the loss itself, moving one number at a time."""
    parts = torch.zeros(2, *weight.shape, dtype=weight.dtype)
    step = 1e-5
    for index in range(weight.numel()):
        moved = torch.zeros_like(weight)
        moved.view(-1)[index] = step
        ends = [
            (loss(weight + moved, weight), loss(weight - moved, weight)),
            (loss(weight, weight + moved), loss(weight, weight - moved)),
        ]
        for part, (high, low) in zip(parts, ends, strict=True):
            part.view(-1)[index] = (high - low) / (2 * step)
    return parts[0], parts[1]


def both_parts(answer, loss, weight):
    """The answer's two gradients, NaN for one that is None; infinite if the weight was changed."""
    got = answer(loss, weight)
    if not isinstance(got, tuple | list):
        return got
    if weight.requires_grad:  # a leaf of the answer: it may hold a gradient, too
        weight.requires_grad_(False)
        return tuple(torch.full_like(weight, torch.inf) for _ in got)
    return tuple(torch.full_like(weight, torch.nan) if part is None else part for part in got)


def explain_gradients(got, expected, loss, weight):
    """A weight that was changed, a gradient that is None, or a known mistake."""
    if got[0].isinf().all():
        return "the weight that was given requires gradients now: work on a copy"
    for name, part in zip(("far branch", "window"), got, strict=True):
        if part.isnan().all():
            return (
                f"the gradient through the {name} is None: the loss does not use that weight, "
                "so its gradient is 0"
            )
    return name_mistake(got, mistakes.PARTS, (loss, weight), call=both_parts)


# --- 04.5 ---

DECODED = {
    "before the first block ends": dict(length=3, window=4, block_size=4, stride=2),
    "the window alone": dict(length=9, window=3, block_size=4, stride=2, gates=(0.0, 1.0)),
    "compression alone": dict(length=11, window=3, block_size=4, stride=2, gates=(1.0, 0.0)),
    "both branches": dict(length=13, window=5, block_size=4, stride=2),
    "blocks side by side": dict(length=13, window=2, block_size=4, stride=4),
    "a stride that does not divide the block": dict(
        length=16, window=7, block_size=5, stride=2, width=6, value_width=4
    ),
    "three strides a block": dict(
        length=14, window=1, block_size=6, stride=2, width=9, value_width=5
    ),
    "a block longer than the window": dict(length=15, window=2, block_size=7, stride=1, width=2),
    "large scores": dict(length=12, window=3, block_size=3, stride=3, scale=20.0),
    "very negative scores": dict(length=10, window=4, block_size=4, stride=2, below=1_000),
    "equal scores": dict(length=17, window=6, block_size=3, stride=1, scale=0.0, value_width=2),
}


def decode_cases(generator: torch.Generator) -> list[Case]:
    """Outputs, two sequences in turn, and last the size of the cache after a longer one."""
    sizes = dict(length=40, window=4, block_size=8, stride=4)
    return [
        *in_turn(decode_case, DECODED)(generator),
        turns_case(generator, "two sequences in turn", **{**sizes, "length": 12, "stride": 2}),
        cache_case(generator, "the size of the cache", **sizes),
    ]


def decode_case(  # noqa: PLR0913  what a row of the table may say
    generator, name, length, *, gates=None, width=4, value_width=3, scale=1.0, below=0, **sizes
) -> Case:
    """Random tokens, and random gates or one pair for all tokens."""
    q = scale * torch.randn(length, width, generator=generator)
    k = scale * torch.randn(2, length, width, generator=generator)
    v = torch.randn(2, length, value_width, generator=generator)
    if below:
        q, k = far_below(q, k, below)
    every = torch.rand(length, 2, generator=generator)
    if gates is not None:
        every = torch.tensor(gates).expand(length, 2).clone()
    arguments = dict(q=q, k=k, v=v, gates=every, **sizes)
    axes = ("query", "channel")
    return Case(name, arguments, prefill(**arguments), axes, explain_decoding, decode)


def turns_case(generator, name, **sizes) -> Case:
    """Two caches, one token each in turn: the second sequence is the first one backwards."""
    case = decode_case(generator, name, **sizes)
    expected = (case.expected, case.expected, prefill(*backwards(*case.arguments.values())))
    axes = dict.fromkeys(("alone", "sequence 0", "sequence 1"), case.axes)
    return Case(name, case.arguments, expected, axes, explain_turns, decode_in_turn)


def cache_case(generator, name, **sizes) -> Case:
    """The same, and the numbers that the cache holds at the end."""
    case = decode_case(generator, name, **sizes)
    expected = (case.expected, numbers_needed(**case.arguments))
    axes = {"output": case.axes, "cache": ()}
    return Case(name, case.arguments, expected, axes, explain_cache, decode_and_weigh)


def ends_of_blocks(length, block_size, stride):
    """The last token of each block that ends in time."""
    return range(block_size - 1, length, stride)


def prefill(q, k, v, gates, window, block_size, stride):
    """Both branches for every query at once: the definition."""
    t = torch.arange(len(q))[:, None]
    token = torch.arange(len(q))
    last = torch.tensor(ends_of_blocks(len(q), block_size, stride))
    block = ((token <= last[:, None]) & (token > last[:, None] - block_size)).float()
    block = block / block_size  # a row of weights for the mean of each block
    compressed = read(q, block @ k[0], block @ v[0], last <= t)
    local = read(q, k[1], v[1], (token <= t) & (token > t - window))
    return gates[:, :1] * compressed + gates[:, 1:] * local


def backwards(q, k, v, gates, *sizes):
    """The same tokens, the last one first."""
    return q.flip(0), k.flip(1), v.flip(1), gates.flip(0), *sizes


def decode(answer, *arguments):
    """One call a token, with one cache."""
    return decode_into({}, answer, *arguments)


def decode_into(cache, answer, *arguments):
    """The outputs of all tokens; the cache is the caller's."""
    return together(list(outputs_of(cache, answer, *arguments)))


def outputs_of(cache, answer, q, k, v, gates, *sizes, moved=None):
    """One output after the other; at token `moved` the cache becomes a copy of itself.

    A token is a part of the inputs: a change to it shows there.
    """
    for t in range(len(q)):
        if t == moved:
            cache = dict(cache)
        yield answer(cache, q[t], k[:, t], v[:, t], gates[t], *sizes)


def together(rows):
    """The outputs of all tokens in one tensor, or the first that is none."""
    others = [row for row in rows if not isinstance(row, Tensor)]
    return others[0] if others else torch.stack(rows)


def decode_in_turn(answer, *arguments):
    """The outputs of one sequence alone, then of two: token 0 of both, then token 1 of both, ..."""
    alone = decode(answer, *arguments)
    half = len(arguments[0]) // 2
    one = outputs_of({}, answer, *arguments, moved=half)
    other = outputs_of({}, answer, *backwards(*arguments))
    pairs = list(zip(one, other, strict=True))
    return alone, *(together(list(rows)) for rows in zip(*pairs, strict=True))


def explain_turns(got, expected, **arguments):
    """The tokens of one sequence met those of the other, if it is right alone."""
    if not close(got[0], expected[0]).all():
        return None
    return (
        "two sequences were decoded in turn, one of them from a copy of its cache on, and an "
        "output changed: keep all state in `cache`"
    )


def decode_and_weigh(answer, *arguments):
    """The outputs, and the numbers in the cache; those that are needed count as none too many."""
    cache = {}
    out = decode_into(cache, answer, *arguments)
    return out, max(numbers_needed(*arguments), numbers_in(cache))


def numbers_needed(q, k, v, gates, window, block_size, stride):
    """Keys and values of w tokens, of l raw tokens and of N blocks, and six rows to spare."""
    blocks = len(ends_of_blocks(len(q), block_size, stride))
    return (window + block_size + blocks + 6) * (k.shape[-1] + v.shape[-1])


def explain_cache(got, expected, q, k, v, **others):
    """Right outputs from a cache that holds too much."""
    if got[1] > expected[1] and close(got[0], expected[0]).all():
        width = k.shape[-1] + v.shape[-1]
        return (
            f"the output is right, but after {len(q)} tokens the cache holds {got[1]} "
            f"numbers, {got[1] / width:.0f} rows of a key and a value: more than the window, "
            "one block and the compressed tokens"
        )
    return None


def explain_decoding(got, expected, **arguments):
    """A row that is not finite, or a known mistake, at the first query that is wrong."""
    if not got.isfinite().all():
        t = int((~got.isfinite()).any(-1).nonzero()[0])
        return f"query {t} is not finite: {OVERFLOW}"
    return name_mistake(
        got,
        mistakes.STEPS,
        tuple(arguments.values()),
        call=decode,
        row=first_wrong(got, expected),
        more=arguments["window"] + 1,
        fewer=arguments["window"] - 1,
        size=arguments["block_size"],
        stride=arguments["stride"],
    )


EXERCISES = [
    Exercise(
        "04.1",
        "The keys of a window",
        "warm-up",
        5,
        in_turn(key_case, KEYS),
        hints=(
            "How many keys are there from key a to key b, both included? Is the query's own key "
            "among the w?",
            "Query t reads keys max(0, t - w + 1), ..., t.",
            "list the whole numbers from the first key up to and including t",
        ),
    ),
    Exercise(
        "04.2",
        "A window in chunks",
        "core",
        20,
        window_cases,
        hints=(
            "Take queries 4 to 7 and a window of 4. Which is the oldest key that any of them "
            "reads? Which key does query 7 not read, although query 4 does?",
            "Queries a .. b - 1 together read keys max(0, a - w + 1) .. b - 1; among those, "
            "query t reads s iff t - w < s <= t.",
            "for each chunk of w queries (the last may be shorter): cut out its slice of keys and "
            "values, compute the scores, mask by the true positions of queries and keys, softmax, "
            "times the values; put the chunks one below the other",
        ),
    ),
    Exercise(
        "04.3",
        "Three gates for each head",
        "core",
        10,
        in_turn(gate_case, GATES),
        hints=(
            "May all three gates be close to 1 at once? May all be close to 0?",
            "out[h, t] = sum over c of sigmoid(logits[t, 3 h + c]) times branch c [h, t].",
            "split the 3 H columns into (H, 3); sigmoid; bring heads in front of queries; each "
            "gate times its branch, with an axis of size 1 for the channels; add the three",
        ),
    ),
    Exercise(
        "04.4",
        "Who trains shared keys",
        "core",
        15,
        gradient_cases,
        hints=(
            "If one tensor stands in both places, whose gradient does autograd return?",
            "For L(a, b) with a = b = W: dW of the shared weight is dL/da + dL/db, and you want "
            "the two terms.",
            "make two leaves that hold the same numbers; call the loss with both; ask autograd "
            "for both gradients in one call; a leaf that is not used has gradient 0",
        ),
    ),
    Exercise(
        "04.5",
        "Decode one token at a time",
        "stretch",
        45,
        decode_cases,
        hints=(
            "After which tokens is a new block whole? Which raw keys will no later block and no "
            "later window need?",
            "A block ends at token t iff t + 1 >= l and d divides t + 1 - l; it holds the newest "
            "l tokens. The window holds the newest w.",
            "append the two new rows and drop what is too old: w rows for the window, l for the "
            "compression. If a block ends here, append its mean to the compressed tokens. Then "
            "attend to both, and add them with their gates; the compressed branch is 0 as long as "
            "it has no block.",
        ),
    ),
]
