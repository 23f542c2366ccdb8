"""Set 04, window and gates: which keys, how few scores, how branches add up, how they decode."""

import torch
from torch import Tensor

from exercises.compare import close, plain, recognise
from exercises.memory import largest_made, tensors
from exercises.records import Case, Exercise
from nsa_lite import loops


def first_wrong(got: Tensor, expected: Tensor) -> int:
    """The first row that is wrong."""
    return int((~close(got, expected)).flatten(1).any(1).nonzero()[0])


# --- 04.1 ---


def key_cases(generator: torch.Generator) -> list[Case]:
    # By hand: t - w + 1, ..., t, and nothing before key 0.
    numbers = [
        ("a full window", 10, 4, [7, 8, 9, 10]),
        ("the first query", 0, 4, [0]),
        ("fewer tokens than the window", 2, 4, [0, 1, 2]),
        ("the first full window", 3, 4, [0, 1, 2, 3]),
        ("the first query that loses a key", 4, 4, [1, 2, 3, 4]),
        ("a window of one", 5, 1, [5]),
    ]
    return [
        Case(name, dict(t=t, window=window), keys, explain=explain_keys)
        for name, t, window, keys in numbers
    ]


def explain_keys(got, expected, t, window):
    keys, given = plain(got), f"query {t}, window {window}"
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


def window_cases(generator: torch.Generator) -> list[Case]:
    def case(name, length, window, scale=1.0, call=None):
        q, k = (torch.randn(length, 4, generator=generator) * scale for _ in range(2))
        v = torch.randn(length, 3, generator=generator)
        out = loops.window_attention(q[None, None], k[None, None], v[None, None], window=window)
        expected, axes = out[0, 0], ("query", "channel")
        if call is not None:
            expected = (expected, most_numbers(length))
            axes = {"output": axes, "largest tensor": ()}
        arguments = dict(q=q, k=k, v=v, window=window)
        return Case(
            name,
            arguments,
            expected,
            axes,
            explain_window if call is None else explain_memory,
            call,
        )

    return [
        case("whole chunks", 12, 4),
        case("scale", 8, 4, scale=3.0),
        case("a last chunk that is short", 11, 4),
        case("a window longer than the sequence", 5, 8),
        case("a window of one", 4, 1),
        case("memory", 128, 4, call=with_largest),
    ]


def most_numbers(length: int) -> int:
    """Half of a causal triangle: far more than w queries by 2 w keys, far less than T by T."""
    return length * length // 4


def with_largest(answer, q, k, v, window):
    out, largest = largest_made(lambda: answer(q, k, v, window))
    return out, max(largest, most_numbers(len(q)))


def explain_memory(got, expected, q, k, v, window):
    out, largest = got
    if largest > expected[1] and close(out, expected[0]).all():
        return (
            f"the output is right, but a tensor of {largest} numbers was made for {len(q)} "
            f"queries with a window of {window}"
        )
    return None


def read(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Attention of one head to the keys of a mask (T, S); a row without any is 0."""
    scale = q.shape[1] ** -0.5 if scale is None else scale
    scores = (q @ k.T * scale).masked_fill(~mask, -torch.inf)
    return scores.softmax(1).nan_to_num() @ v


def explain_window(got, expected, q, k, v, window):
    t, s = torch.arange(len(q))[:, None], torch.arange(len(k))[None]
    chunk, row = t // window * window, first_wrong(got, expected)
    band, in_slice = (s <= t) & (s > t - window), (s > chunk - window) & (s < chunk + window)
    known = {
        f"query {row} reads key {row - window} too: that makes {window + 1} keys": (s <= t)
        & (s >= t - window),
        f"query {row} reads key {row - window} too, which makes {window + 1} keys, and only the "
        "first query of a chunk is right": in_slice & (s <= t) & (s >= t - window),
        f"query {row} does not read its own key": (s < t) & (s > t - window),
        f"query {row} reads every key of its chunk's slice, keys after it included": in_slice,
        f"query {row} reads keys that are older than its window, from where its chunk's slice "
        "begins": in_slice & (s <= t),
        f"query {row} reads keys that come after it": in_slice & (s > t - window),
        f"query {row} reads only keys of its own chunk": (s <= t) & (s >= chunk),
        f"query {row} reads its whole past: there is no window": s <= t,
    }
    masks = {says: read(q, k, v, mask) for says, mask in known.items() if (mask != band).any()}
    return recognise(
        got,
        {
            **masks,
            "the scores are not divided by the root of the width": read(q, k, v, band, 1.0),
            "the scores are divided by the width, not by its root": read(
                q, k, v, band, 1 / q.shape[1]
            ),
        },
    )


# --- 04.3 ---

BRANCHES = ("compressed", "selected", "window")


def gate_cases(generator: torch.Generator) -> list[Case]:
    def numbers(*shape):
        return torch.randn(*shape, generator=generator)

    def case(name, length, heads, fill=None):
        logits = numbers(length, 3 * heads)
        if fill is not None:
            logits = torch.full_like(logits, fill)
        branches = {name: numbers(heads, length, 2) for name in BRANCHES}
        expected = mixed(logits, *branches.values())
        return Case(
            name,
            dict(logits=logits, **branches),
            expected,
            ("head", "query", "channel"),
            explain_gates if fill is None else explain_equal_gates,
        )

    return [
        case("one head", 4, 1),
        case("two heads", 5, 2),
        case("as many heads as branches", 3, 3),
        case("every gate open", 3, 1, fill=30.0),
        case("every gate shut", 3, 1, fill=-30.0),
    ]


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
    whole = compressed + selected + window
    share = float((got * whole).sum() / whole.square().sum())
    if close(got, share * whole).all():
        return (
            f"every logit is {float(logits[0, 0]):.0f}, and the output is {share:.2f} times "
            "the sum of the three branches"
        )
    return None


def explain_gates(got, expected, logits, compressed, selected, window):
    branches = torch.stack([compressed, selected, window], -1)  # (H, T, Dv, 3)
    heads, length = branches.shape[:2]
    raw = logits.unflatten(1, (heads, 3)).transpose(0, 1)  # (H, T, 3)
    by_branch = logits.unflatten(1, (3, heads)).permute(2, 0, 1)
    gates = raw.sigmoid()

    def mix(gates):
        return (branches * gates[:, :, None]).sum(-1)

    return recognise(
        got,
        {
            "the three gates are a softmax: they sum to 1, and opening one shuts the others": mix(
                raw.softmax(-1)
            ),
            "the sigmoids are divided by their sum, and Eq. 5 does not normalise them": mix(
                gates / gates.sum(-1, keepdim=True)
            ),
            "the logits themselves weigh the branches: a gate lies between 0 and 1": mix(raw),
            "the sum of the three gated branches is divided by 3": mix(gates / 3),
            "the columns were read branch by branch, and they go head by head": mix(
                by_branch.sigmoid()
            ),
            "the columns were cut without moving the axis of queries: head 1 gets the gates of "
            "other queries": mix(logits.reshape(heads, length, 3).sigmoid()),
            "every head uses the gates of head 0": mix(gates[:1].expand_as(gates)),
            "every head uses the mean of all heads' gates": mix(
                gates.mean(0, True).expand_as(gates)
            ),
            "the three gates are in the reverse order of the branches": mix(gates.flip(-1)),
        },
    )


# --- 04.4 ---


def gradient_cases(generator: torch.Generator) -> list[Case]:
    def numbers(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def case(name, loss):
        weight = numbers(3, 2)
        return Case(
            name,
            dict(loss=loss, weight=weight),
            by_differences(loss, weight),
            {"through the far branch": ("row", "column"), "through the window": ("row", "column")},
            explain_gradients,
            both_parts,
        )

    a, b, y = numbers(4, 3), numbers(4, 3), numbers(4, 2)
    x, q = numbers(6, 3), numbers(6, 2)
    t = torch.arange(6)
    near = (t <= t[:, None]) & (t > t[:, None] - 2)
    far = t <= t[:, None] // 2

    def two_attentions(far_weight, window_weight):
        out = read(q, x @ far_weight, q, far) + read(q, x @ window_weight, q, near)
        return (out - q.flip(0)).square().sum()

    return [
        case("a sum", lambda far, window: (a @ far).sum() + 5 * (b @ window).sum()),
        case("a squared error", lambda far, window: (a @ far + b @ window - y).square().sum()),
        case("the window's gate is shut", lambda far, window: (a @ far - y).square().sum()),
        case("two attentions", two_attentions),
    ]


def by_differences(loss, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients from the loss itself, moving one number at a time."""
    parts, step = torch.zeros(2, *weight.shape, dtype=weight.dtype), 1e-5
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
    for name, part in zip(("far branch", "window"), got, strict=True):
        if part.isnan().all():
            return (
                f"the gradient through the {name} is None: the loss does not use that weight, "
                "so its gradient is 0"
            )
    far, window = expected
    both = far + window
    with torch.enable_grad():
        far_alone, window_alone = weight.clone().requires_grad_(), weight.clone().requires_grad_()
        nothing = torch.zeros_like(weight)
        alone = (
            gradient(loss(far_alone, nothing), far_alone),
            gradient(loss(nothing, window_alone), window_alone),
        )
    return recognise(
        got,
        {
            "both results are the sum of the two parts: one weight stood in both places": (
                both,
                both,
            ),
            "both results are half of the sum: the parts were not told apart": (both / 2, both / 2),
            "the two parts are in the wrong order": (window, far),
            "one branch's weight was set to 0 to measure the other: that changes the loss, and the "
            "gradient with it": alone,
        },
    )


def gradient(loss: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a loss with respect to one weight, 0 where it is not used."""
    if not loss.requires_grad:
        return torch.zeros_like(weight)
    found = torch.autograd.grad(loss, weight, allow_unused=True)[0]
    return torch.zeros_like(weight) if found is None else found


# --- 04.5 ---


def decode_cases(generator: torch.Generator) -> list[Case]:
    def case(name, length, window, l, d, open=(None, None), memory=False):
        q = torch.randn(length, 4, generator=generator)
        k, v = (torch.randn(2, length, n, generator=generator) for n in (4, 3))
        gates = torch.rand(length, 2, generator=generator)
        for column, value in enumerate(open):
            if value is not None:
                gates[:, column] = value
        arguments = dict(q=q, k=k, v=v, gates=gates, window=window, block_size=l, stride=d)
        expected = prefill(**arguments)
        axes, call, explain = ("query", "channel"), decode, explain_decoding
        if memory:
            expected = (expected, numbers_needed(**arguments))
            axes, call = {"output": axes, "cache": ()}, decode_and_weigh
            explain = explain_cache
        return Case(name, arguments, expected, axes, explain, call)

    return [
        case("before the first block ends", 3, 4, 4, 2),
        case("the window alone", 9, 3, 4, 2, open=(0.0, 1.0)),
        case("compression alone", 11, 3, 4, 2, open=(1.0, 0.0)),
        case("both branches", 13, 5, 4, 2),
        case("blocks side by side", 13, 2, 4, 4),
        case("the size of the cache", 40, 4, 8, 4, memory=True),
    ]


def ends_of_blocks(length, block_size, stride):
    return range(block_size - 1, length, stride)


def prefill(
    q,
    k,
    v,
    gates,
    window,
    block_size,
    stride,
    *,
    late=0,
    whose=(0, 1),
    own=True,
    over=0,
    every=None,
    first=None,
):
    """Both branches for every query at once: the definition, and some mistakes by keyword."""
    t, (slow, near) = torch.arange(len(q))[:, None], whose
    last = torch.arange(block_size - 1 if first is None else first, len(q), every or stride)
    token = torch.arange(len(q))
    block = ((token <= last[:, None]) & (token > last[:, None] - block_size)).float()
    block = block / block.sum(1, keepdim=True)  # a row of weights for the mean of each block
    short_k, short_v = block @ k[slow], block @ v[slow]
    compressed = read(q, short_k, short_v, last + late <= t)
    s = token[None]
    band = (s <= t if own else s < t) & (s > t - window - over)
    local = read(q, k[near], v[near], band)
    return gates[:, :1] * compressed + gates[:, 1:] * local


def decode(answer, q, k, v, gates, window, block_size, stride, cache=None):
    """One call a token, with one cache."""
    cache, rows = {} if cache is None else cache, []
    for t in range(len(q)):
        row = answer(
            cache,
            q[t].clone(),
            k[:, t].clone(),
            v[:, t].clone(),
            gates[t].clone(),
            window,
            block_size,
            stride,
        )
        if not isinstance(row, Tensor):
            return row
        rows.append(row)
    return torch.stack(rows)


def decode_and_weigh(answer, *arguments):
    cache = {}
    out = decode(answer, *arguments, cache=cache)
    names = ("q", "k", "v", "gates", "window", "block_size", "stride")
    needed = numbers_needed(**dict(zip(names, arguments, strict=True)))
    return out, max(needed, sum(x.numel() for x in tensors(cache)))


def numbers_needed(q, k, v, gates, window, block_size, stride):
    """Keys and values of w tokens, of l raw tokens and of N blocks, and two rows to spare."""
    blocks = len(ends_of_blocks(len(q), block_size, stride))
    return (window + block_size + blocks + 2) * (k.shape[-1] + v.shape[-1])


def explain_cache(got, expected, q, k, v, gates, window, block_size, stride):
    if got[1] > expected[1] and close(got[0], expected[0]).all():
        width = k.shape[-1] + v.shape[-1]
        return (
            f"the output is right, but after {len(q)} tokens the cache holds {got[1]} "
            f"numbers, {got[1] / width:.0f} rows of a key and a value: more than the window, "
            "one block and the compressed tokens"
        )
    return None


def explain_decoding(got, expected, q, k, v, gates, window, block_size, stride):
    row, given = first_wrong(got, expected), (q, k, v, gates, window, block_size, stride)
    plain_sum = (q, k, v, torch.ones_like(gates), *given[4:])
    swapped = (q, k, v, gates.flip(1), *given[4:])
    return recognise(
        got,
        {
            f"query {row}: the window reads {window + 1} keys": prefill(*given, over=1),
            f"query {row}: the window reads {window - 1} keys, and the oldest is missing": prefill(
                *given, over=-1
            ),
            f"query {row}: the window reads all keys so far": prefill(*given, over=len(q)),
            f"query {row}: the window does not hold the query's own key": prefill(
                *given, own=False
            ),
            f"query {row} ends a block, and does not read it yet": prefill(*given, late=1),
            f"query {row} reads a block of fewer than {block_size} tokens": prefill(
                *given, first=stride - 1
            ),
            f"query {row}: the blocks lie side by side, and one should begin every {stride} tokens": prefill(
                *given, every=block_size
            ),
            f"query {row}: a block is compressed at every token": prefill(*given, every=1),
            "the window reads the compressed branch's keys and values": prefill(
                *given, whose=(0, 0)
            ),
            "the compressed branch reads the window's keys and values": prefill(
                *given, whose=(1, 1)
            ),
            "the two branches read each other's keys and values": prefill(*given, whose=(1, 0)),
            "the branches are added without their gates": prefill(*plain_sum),
            "each branch has the other one's gate": prefill(*swapped),
        },
    )


EXERCISES = [
    Exercise(
        "04.1",
        "The keys of a window",
        "warm-up",
        5,
        key_cases,
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
        gate_cases,
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
