"""Set 04, window and gates: which keys, how few scores, how branches add up, how they decode."""

from collections.abc import Callable

import torch
from torch import Tensor

from exercises.compare import close, name_mistake, plain
from exercises.memory import largest_made, tensors
from exercises.records import Case, Exercise, in_turn
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
}


def window_cases(generator: torch.Generator) -> list[Case]:
    """Outputs, and last the memory that a longer sequence takes."""
    outputs = in_turn(window_case, WINDOWS)(generator)
    return [*outputs, memory_case(generator, "memory", length=128, window=4)]


def window_case(generator, name, length, window, scale=1.0) -> Case:
    """Random q, k and v of one head, and the package's loop over them."""
    q = torch.randn(length, 4, generator=generator) * scale
    k = torch.randn(length, 4, generator=generator) * scale
    v = torch.randn(length, 3, generator=generator)
    out = loops.window_attention(q[None, None], k[None, None], v[None, None], window=window)
    arguments = dict(q=q, k=k, v=v, window=window)
    return Case(name, arguments, out[0, 0], ("query", "channel"), explain_window)


def memory_case(generator, name, length, window) -> Case:
    """The same, and the largest tensor that was made on the way."""
    case = window_case(generator, name, length, window)
    expected = (case.expected, most_numbers(length))
    axes = {"output": case.axes, "largest tensor": ()}
    return Case(name, case.arguments, expected, axes, explain_memory, with_largest)


def most_numbers(length: int) -> int:
    """Half of a causal triangle: far more than w queries by 2 w keys, far less than T by T."""
    return length * length // 4


def with_largest(answer, q, k, v, window):
    """The answer's output and its largest tensor; the allowed size counts as none."""
    out, largest = largest_made(lambda: answer(q, k, v, window))
    return out, max(largest, most_numbers(len(q)))


def explain_memory(got, expected, q, k, v, window):
    """A right output that took too much memory."""
    out, largest = got
    if largest > expected[1] and close(out, expected[0]).all():
        return (
            f"the output is right, but a tensor of {largest} numbers was made for {len(q)} "
            f"queries with a window of {window}"
        )
    return None


def explain_window(got, expected, q, k, v, window):
    """A known mistake, at the first query that is wrong."""
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
    "every gate shut": dict(length=3, heads=1, fill=-30.0),
}


def gate_case(generator, name, length, heads, fill=None) -> Case:
    """Random branches of two channels, and random logits or one number for all of them."""
    logits = torch.randn(length, 3 * heads, generator=generator)
    if fill is not None:
        logits = torch.full_like(logits, fill)
    branches = {name: torch.randn(heads, length, 2, generator=generator) for name in BRANCHES}
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
    """A known mistake."""
    return name_mistake(got, mistakes.GATES, tuple(arguments.values()))


# --- 04.4 ---


def gradient_cases(generator: torch.Generator) -> list[Case]:
    """One case a loss, each with a weight of its own."""
    axes = {"through the far branch": ("row", "column"), "through the window": ("row", "column")}
    cases = []
    for name, loss in losses(generator).items():
        weight = torch.randn(3, 2, dtype=torch.float64, generator=generator)
        expected = by_differences(loss, weight)
        arguments = dict(loss=loss, weight=weight)
        cases.append(Case(name, arguments, expected, axes, explain_gradients, both_parts))
    return cases


def losses(generator: torch.Generator) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Losses of two weights: of the far branch, and of the window."""

    def numbers(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    a, b = (numbers(4, 3) for _ in range(2))
    y = numbers(4, 2)
    x = numbers(6, 3)
    q = numbers(6, 2)
    t = torch.arange(6)
    near = (t <= t[:, None]) & (t > t[:, None] - 2)
    early = t <= t[:, None] // 2

    def two_attentions(far, window):
        out = read(q, x @ far, q, early) + read(q, x @ window, q, near)
        return (out - q.flip(0)).square().sum()

    return {
        "a sum": lambda far, window: (a @ far).sum() + 5 * (b @ window).sum(),
        "a squared error": lambda far, window: (a @ far + b @ window - y).square().sum(),
        "the window's gate is shut": lambda far, window: (a @ far - y).square().sum(),
        "two attentions": two_attentions,
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
    """The answer's two gradients, NaN for one that is None."""
    got = answer(loss, weight)
    if not isinstance(got, tuple | list):
        return got
    return tuple(torch.full_like(weight, torch.nan) if part is None else part for part in got)


def explain_gradients(got, expected, loss, weight):
    """A gradient that is None, or a known mistake."""
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
}


def decode_cases(generator: torch.Generator) -> list[Case]:
    """Outputs, and last the size of the cache after a longer sequence."""
    sizes = dict(length=40, window=4, block_size=8, stride=4)
    outputs = in_turn(decode_case, DECODED)(generator)
    return [*outputs, cache_case(generator, "the size of the cache", **sizes)]


def decode_case(generator, name, length, gates=None, **sizes) -> Case:
    """Random tokens, and random gates or one pair for all tokens."""
    q = torch.randn(length, 4, generator=generator)
    k = torch.randn(2, length, 4, generator=generator)
    v = torch.randn(2, length, 3, generator=generator)
    every = torch.rand(length, 2, generator=generator)
    if gates is not None:
        every = torch.tensor(gates).expand(length, 2).clone()
    arguments = dict(q=q, k=k, v=v, gates=every, **sizes)
    axes = ("query", "channel")
    return Case(name, arguments, prefill(**arguments), axes, explain_decoding, decode)


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


def decode(answer, *arguments):
    """One call a token, with one cache."""
    return decode_into({}, answer, *arguments)


def decode_into(cache, answer, q, k, v, gates, *sizes):
    """The outputs of all tokens; the cache is the caller's."""
    rows = []
    for t in range(len(q)):
        token = (x.clone() for x in (q[t], k[:, t], v[:, t], gates[t]))
        row = answer(cache, *token, *sizes)
        if not isinstance(row, Tensor):
            return row
        rows.append(row)
    return torch.stack(rows)


def decode_and_weigh(answer, *arguments):
    """The outputs, and the numbers in the cache; those that are needed count as none too many."""
    cache = {}
    out = decode_into(cache, answer, *arguments)
    return out, max(numbers_needed(*arguments), sum(x.numel() for x in tensors(cache)))


def numbers_needed(q, k, v, gates, window, block_size, stride):
    """Keys and values of w tokens, of l raw tokens and of N blocks, and two rows to spare."""
    blocks = len(ends_of_blocks(len(q), block_size, stride))
    return (window + block_size + blocks + 2) * (k.shape[-1] + v.shape[-1])


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
    """A known mistake, at the first query that is wrong."""
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
