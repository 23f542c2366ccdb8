"""Set 02, compression: how many blocks, who sees them, what they hold, what they answer."""

import torch
from torch import Tensor

from exercises.compare import name_mistake
from exercises.records import Case, Exercise, in_turn
from exercises.scores import OVERFLOW, far_below, rising
from nsa_lite import loops

from . import mistakes

# --- 02.1 ---

# By hand: the blocks of 5 every 3 tokens are 0-4, 3-7, 6-10, ...
COUNTS = {
    "one block exactly": dict(length=4, block_size=4, stride=2, count=1),
    "overlapping blocks": dict(length=20, block_size=6, stride=2, count=8),
    "blocks side by side": dict(length=12, block_size=4, stride=4, count=3),
    "a tail too short for a block": dict(length=12, block_size=5, stride=3, count=3),
    "a sequence too short for any block": dict(length=1, block_size=4, stride=2, count=0),
    "a sequence one token too short": dict(length=3, block_size=4, stride=2, count=0),
}


def count_case(generator, name, count, **sizes) -> Case:
    """A number of blocks, counted by hand."""
    return Case(name, sizes, count, explain=explain_count)


def explain_count(got, expected, length, block_size, stride):
    """A number below 0, too large or too small."""
    given = f"{length} tokens, blocks of {block_size} every {stride}"
    if got < 0:
        return f"{given}: got {got}, and no sequence has fewer than 0 blocks"
    if got > expected:
        end = (int(got) - 1) * stride + block_size
        return f"{given}: got {got}, but block {got - 1} would need token {end - 1}"
    return f"{given}: got {got}, but another whole block fits"


# --- 02.2 ---

VISIBLE = {
    "before the first block ends": dict(length=5, count=1, block_size=7, stride=2),
    "causal": dict(length=17, count=6, block_size=6, stride=2),
    "the query on a block's last token": dict(length=8, count=2, block_size=4, stride=4),
    "overlapping blocks": dict(length=16, count=13, block_size=4, stride=1),
    "more blocks than the queries reach": dict(length=14, count=6, block_size=5, stride=3),
}


def visible_case(generator, name, length, count, block_size, stride) -> Case:
    """The mask, one query and one block at a time."""
    expected = [[i * stride + block_size - 1 <= t for i in range(count)] for t in range(length)]
    return Case(
        name,
        dict(length=length, count=count, block_size=block_size, stride=stride),
        torch.tensor(expected),
        axes=("query", "block"),
        explain=explain_visible,
    )


def explain_visible(got, expected, length, count, block_size, stride):
    """The first query and block that are wrong."""
    t, i = (got != expected).nonzero()[0].tolist()
    tokens = f"block {i}, tokens {i * stride} to {i * stride + block_size - 1}"
    if got[t, i]:
        return f"query {t} sees {tokens}: the last of them comes after the query"
    return f"query {t} does not see {tokens}, although it has passed all of them"


# --- 02.3 ---

SUMMARIES = {
    "one block": dict(length=4, block_size=4, stride=4),
    "position encoding": dict(length=4, block_size=4, stride=4, x=torch.zeros(4, 3)),
    "order inside a block": dict(
        length=2, block_size=2, stride=2, width=2, position=torch.zeros(2, 2)
    ),
    "blocks side by side": dict(length=12, block_size=4, stride=4),
    "overlapping blocks": dict(length=12, block_size=4, stride=2),
    "a tail too short for a block": dict(length=11, block_size=4, stride=2, tail=torch.nan),
    "summaries of another width": dict(length=14, block_size=5, stride=3, width=2, out=6),
    "three strides a block": dict(length=12, block_size=6, stride=2, width=5, out=4),
    "columns of a larger tensor": dict(length=9, block_size=3, stride=2, out=2, more=4),
    "a sequence too short for any block": dict(length=3, block_size=4, stride=2, out=5),
    "a sequence one token too short": dict(length=5, block_size=6, stride=3, width=2, out=4),
}


def summary_case(  # noqa: PLR0913  what a row of the table may say
    generator,
    name,
    length,
    block_size,
    stride,
    *,
    width=3,
    out=3,
    position=None,
    x=None,
    more=0,
    tail=None,
) -> Case:
    """Random tokens, position encoding and weight, but for what is given.

    x is cut from a tensor with `more` columns; tail stands in for tokens of no whole block.
    """

    def numbers(*shape):
        return torch.randn(*shape, generator=generator)

    if x is None:
        x = numbers(length, width + more)[:, :width]
    if tail is not None:
        count = (length - block_size) // stride + 1
        x[(count - 1) * stride + block_size :] = tail
    arguments = dict(
        x=x,
        position=numbers(block_size, width) if position is None else position,
        weight=numbers(block_size * width, out),
        block_size=block_size,
        stride=stride,
    )
    return Case(name, arguments, summaries(**arguments), ("block", "channel"), explain_summary)


def summaries(x: Tensor, position: Tensor, weight: Tensor, block_size: int, stride: int) -> Tensor:
    """Eq. 7 with a linear phi, number by number: phi(k)_c = sum over s, e of (k + position)[s, e]
    times the weight in row s D + e."""
    width = x.shape[1]
    rows = []
    for first in range(0, len(x) - block_size + 1, stride):
        row = torch.zeros(weight.shape[1])
        for s in range(block_size):
            for e in range(width):
                row += (x[first + s, e] + position[s, e]) * weight[s * width + e]
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros(0, weight.shape[1])


def explain_summary(got, expected, **arguments):
    """NaN, or a known mistake."""
    if got.isnan().any():
        return "a token was read that lies in no whole block: the tail is left out"
    return name_mistake(got, mistakes.SUMMARIES, tuple(arguments.values()))


# --- 02.4 ---


def attention_cases(generator: torch.Generator) -> list[Case]:
    """Each case of the outputs has its own words; the last ones compare gradients."""
    return [
        *in_turn(attention_case, OUTPUTS)(generator),
        *in_turn(gradient_case, GRADIENTS)(generator),
    ]


def random_qkv(  # noqa: PLR0913  what a row of the table may say
    generator,
    length,
    block_size,
    stride,
    *,
    width=8,
    value_width=3,
    scale=1.0,
    below=0,
    rise=0,
    unseen=0,
) -> dict:
    """The arguments of an attention of `length` queries to all their blocks, and to some more."""
    count = max(0, (length - block_size) // stride + 1)
    q = torch.randn(length, width, generator=generator) * scale
    k = torch.randn(count, width, generator=generator) * scale
    v = torch.randn(count, value_width, generator=generator)
    if below:
        q, k = far_below(q, k, below)
    if rise:
        q, k = rising(q, k, rise)
    # Blocks that end after the last query: what they hold outweighs all else, where it is read.
    k, v = (torch.cat([x, torch.full((unseen, x.shape[1]), 1e4)]) for x in (k, v))
    return dict(q=q, k=k, v=v, block_size=block_size, stride=stride)


def attention_case(generator, name, explain, **sizes) -> Case:
    """The output and the lse, by the package's loop."""
    arguments = random_qkv(generator, **sizes)
    axes = {"out": ("query", "channel"), "lse": ("query",)}
    return Case(name, arguments, by_loop(**arguments), axes, explain)


def gradient_case(generator, name, **sizes) -> Case:
    """The gradients of q, k and v, by a loop without empty rows."""
    arguments = random_qkv(generator, **sizes)
    axes = {
        "gradient of q": ("query", "channel"),
        "gradient of k": ("block", "channel"),
        "gradient of v": ("block", "channel"),
    }
    expected = gradients_by_loop(**arguments)
    return Case(name, arguments, expected, axes, explain_gradient, gradients)


def by_loop(q, k, v, block_size, stride):
    """The package's loop, for one head."""
    out, lse = loops.compressed_attention(
        q[None, None], k[None, None], v[None, None], block_size=block_size, stride=stride
    )
    return out[0, 0], lse[0, 0]


def gradients(answer, q, k, v, block_size, stride):
    """The gradients of the sum of the squared outputs; NaN where that of a lse is NaN."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = answer(*leaves, block_size, stride)
    if not out.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    every = dict(materialize_grads=True, retain_graph=True)
    parts = torch.autograd.grad(out.square().sum(), leaves, **every)
    if lse is None or not lse.requires_grad:
        return parts
    others = torch.autograd.grad(lse[lse > -torch.inf].sum(), leaves, **every)
    return [
        part.masked_fill(other.isnan(), torch.nan)
        for part, other in zip(parts, others, strict=True)
    ]


def gradients_by_loop(q, k, v, block_size, stride):
    """The same for an attention over each query's own list of blocks, so no row is empty."""

    def one_query_at_a_time(q, k, v, block_size, stride):
        rows = []
        for t in range(len(q)):
            seen = [i for i in range(len(k)) if i * stride + block_size - 1 <= t]
            if seen:
                rows.append((k[seen] @ q[t] * q.shape[1] ** -0.5).softmax(0) @ v[seen])
        return torch.stack(rows), None

    return gradients(one_query_at_a_time, q, k, v, block_size, stride)


def explain_empty(got, expected, q, k, v, block_size, stride):
    """A query without blocks whose output is not 0, or whose lse is not -inf."""
    out, lse = got
    empty = expected[1] == -torch.inf
    for t in empty.nonzero().flatten().tolist():
        if out[t].ne(0).any():
            shown = "NaN" if out[t].isnan().any() else "not 0"
            return f"query {t} sees no block, and its output is {shown}"
        if lse[t] != -torch.inf:
            return f"query {t} sees no block, and its lse is {float(lse[t]):.4g}"
    return None


def explain_gradient(got, expected, q, k, v, block_size, stride):
    """A gradient that is 0 everywhere, or NaN."""
    for name, part in zip("qkv", got, strict=True):
        if not part.any() and part.numel():
            return f"no gradient reaches {name}: was it detached, or turned into plain numbers?"
        if part.isnan().any():
            return (
                f"the gradient of {name} is NaN: the rows that see no block were set to 0 "
                "after the softmax had made them NaN, and 0 times NaN is NaN"
            )
    return None


def explain_leak(got, expected, q, k, v, block_size, stride):
    """A known mistake in the outputs of the queries that see a block."""
    alive = block_size - 1  # the first query that sees a block
    return name_mistake(
        got,
        mistakes.LEAKS,
        (q, k, v, block_size, stride),
        part=lambda result: result[0][alive:],
        alive=alive,
        blocks=len(k),
        last=stride + block_size - 1,
        stride=stride,
        size=block_size,
    )


def explain_scale(got, expected, **arguments):
    """A known mistake in the scale or in the lse."""
    return name_mistake(got, mistakes.SCALES, tuple(arguments.values()))


def explain_large(got, expected, q, k, v, block_size, stride):
    """A number that should be finite and is not, or a known mistake in a score's size."""
    for name, part in zip(("output", "lse"), got, strict=True):
        bad = ~part.isfinite() & expected[1].isfinite().view(-1, *[1] * (part.dim() - 1))
        if bad.any():
            t = int(bad.nonzero()[0][0])
            return f"the {name} of query {t} is not finite: {OVERFLOW}"
    return name_mistake(got, mistakes.SIZES, (q, k, v, block_size, stride))


OUTPUTS = {
    "empty rows": dict(length=6, block_size=4, stride=2, explain=explain_empty),
    "causal": dict(length=16, block_size=4, stride=2, explain=explain_leak),
    "scale": dict(length=16, block_size=4, stride=4, scale=3.0, explain=explain_scale),
    "large scores": dict(length=12, block_size=4, stride=2, scale=30.0, explain=explain_large),
    "no block at all": dict(length=3, block_size=5, stride=2, explain=explain_empty),
    "a stride that does not divide the block": dict(
        length=17, block_size=5, stride=3, width=6, value_width=4, explain=explain_leak
    ),
    "three strides a block": dict(
        length=15, block_size=6, stride=2, width=12, value_width=5, explain=explain_scale
    ),
    "more blocks than the queries reach": dict(
        length=11, block_size=3, stride=3, unseen=2, width=6, value_width=6, explain=explain_leak
    ),
    "very negative scores": dict(
        length=13, block_size=4, stride=2, width=4, below=30_000, explain=explain_large
    ),
    "later blocks far above": dict(
        length=19, block_size=3, stride=1, width=4, rise=20_000, explain=explain_scale
    ),
    "equal scores": dict(
        length=21, block_size=6, stride=3, scale=0.0, width=5, explain=explain_scale
    ),
}
GRADIENTS = {
    "gradient": dict(length=8, block_size=4, stride=2),
    "gradient of large scores": dict(length=10, block_size=6, stride=2, width=3, scale=4.0),
}


EXERCISES = [
    Exercise(
        "02.1",
        "Count the blocks",
        "warm-up",
        5,
        in_turn(count_case, COUNTS),
        hints=(
            "Which token does block i end at? Which is the last token there is?",
            "Block i fits iff i d + l <= T. The largest such i is (T - l) / d, rounded down.",
            "the largest i that fits, plus one for block 0; and 0 if T < l",
        ),
    ),
    Exercise(
        "02.2",
        "Who sees which block",
        "core",
        10,
        in_turn(visible_case, VISIBLE),
        hints=(
            "A block's key mixes all its tokens. Which of them is the last that a query may use?",
            "Query t sees block i iff i d + l - 1 <= t.",
            "a column of queries (T, 1), a row of last tokens (1, N), one comparison",
        ),
    ),
    Exercise(
        "02.3",
        "A block becomes one token",
        "core",
        15,
        in_turn(summary_case, SUMMARIES),
        hints=(
            "How many numbers does a block hold, and in which order does the weight want them?",
            "phi(block) = flatten(block + position) W, with W (l D, D'); row s D + e belongs to "
            "channel e of token s.",
            "a tensor of zeros (N, D'); for each whole block: take its l tokens, add the position "
            "encoding, flatten, multiply by W, and write the result into its row",
        ),
    ),
    Exercise(
        "02.4",
        "Attend to what is compressed",
        "stretch",
        40,
        attention_cases,
        hints=(
            "What does softmax make of a row that is -inf everywhere? And its gradient?",
            "out_t = sum_i p_ti v_i and lse_t = ln sum_i exp(s_ti), over the blocks that t sees; "
            "out_t = 0 and lse_t = -inf where t sees none.",
            "scores; mask; fill with -inf only in rows that see something; softmax; set the empty "
            "rows of p to 0; then p times v. The lse the same way.",
        ),
    ),
]
