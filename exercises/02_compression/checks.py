"""Set 02, compression: how many blocks, who sees them, what they hold, what they answer."""

import torch
from torch import Tensor

from exercises.compare import recognise
from exercises.records import Case, Exercise
from nsa_lite import loops

# --- 02.1 ---


def count_cases(generator: torch.Generator) -> list[Case]:
    # By hand: the blocks of 4 every 2 tokens are 0-3, 2-5, 4-7, ...
    numbers = [
        ("one block exactly", 4, 4, 2, 1),
        ("overlapping blocks", 10, 4, 2, 4),
        ("blocks side by side", 12, 4, 4, 3),
        ("a tail too short for a block", 11, 4, 2, 4),
        ("a sequence too short for any block", 1, 4, 2, 0),
        ("the paper's sizes", 65_536, 32, 16, 4095),
    ]
    return [
        Case(name, dict(length=length, block_size=l, stride=d), count, explain=explain_count)
        for name, length, l, d, count in numbers
    ]


def explain_count(got, expected, length, block_size, stride):
    given = f"{length} tokens, blocks of {block_size} every {stride}"
    if got < 0:
        return f"{given}: got {got}, and no sequence has fewer than 0 blocks"
    if got > expected:
        end = (int(got) - 1) * stride + block_size
        return f"{given}: got {got}, but block {got - 1} would need token {end - 1}"
    return f"{given}: got {got}, but another whole block fits"


# --- 02.2 ---


def visible_cases(generator: torch.Generator) -> list[Case]:
    def case(name, length, count, l, d):
        expected = torch.tensor([[i * d + l - 1 <= t for i in range(count)] for t in range(length)])
        return Case(
            name,
            dict(length=length, count=count, block_size=l, stride=d),
            expected,
            axes=("query", "block"),
            explain=explain_visible,
        )

    return [
        case("before the first block ends", 5, 1, 4, 2),
        case("causal", 16, 7, 4, 2),
        case("the query on a block's last token", 8, 2, 4, 4),
        case("overlapping blocks", 16, 13, 4, 1),
        case("more blocks than the queries reach", 6, 5, 4, 2),
    ]


def explain_visible(got, expected, length, count, block_size, stride):
    t, i = (got != expected).nonzero()[0].tolist()
    tokens = f"block {i}, tokens {i * stride} to {i * stride + block_size - 1}"
    if got[t, i]:
        return f"query {t} sees {tokens}: the last of them comes after the query"
    return f"query {t} does not see {tokens}, although it has passed all of them"


# --- 02.3 ---


def summary_cases(generator: torch.Generator) -> list[Case]:
    def numbers(*shape):
        return torch.randn(*shape, generator=generator)

    def case(name, length, l, d, width=3, position=None, x=None):
        x = numbers(length, width) if x is None else x
        position = numbers(l, width) if position is None else position
        weight = numbers(l * width, width)
        arguments = dict(x=x, position=position, weight=weight, block_size=l, stride=d)
        return Case(
            name,
            arguments,
            summaries(**arguments),
            axes=("block", "channel"),
            explain=explain_summary,
        )

    return [
        case("one block", 4, 4, 4),
        case("position encoding", 4, 4, 4, x=torch.zeros(4, 3)),
        case("order inside a block", 2, 2, 2, width=2, position=torch.zeros(2, 2)),
        case("blocks side by side", 12, 4, 4),
        case("overlapping blocks", 12, 4, 2),
        case("a tail too short for a block", 11, 4, 2),
    ]


def summaries(x: Tensor, position: Tensor, weight: Tensor, block_size: int, stride: int) -> Tensor:
    """Eq. 7 with a linear phi, number by number: phi(k)_c = sum over s, e of (k + position)[s, e]
    times the weight in row s D + e."""
    width, rows = x.shape[1], []
    for first in range(0, len(x) - block_size + 1, stride):
        row = torch.zeros(weight.shape[1])
        for s in range(block_size):
            for e in range(width):
                row += (x[first + s, e] + position[s, e]) * weight[s * width + e]
        rows.append(row)
    return torch.stack(rows)


def explain_summary(got, expected, x, position, weight, block_size, stride):
    by_token = weight.unflatten(0, (block_size, -1))  # (l, D, D')
    by_channel = weight.unflatten(0, (-1, block_size)).transpose(0, 1)
    mean = by_token.mean(0, keepdim=True).expand_as(by_token)

    moving = torch.cat(
        [
            summaries(
                x[first : first + block_size], position.roll(-first, 0), weight, block_size, 1
            )
            for first in range(0, len(x) - block_size + 1, stride)
        ]
    )

    def with_weight(rows):
        return summaries(x, position, rows.flatten(0, 1), block_size, stride)

    return recognise(
        got,
        {
            "the position encoding is missing": summaries(
                x, torch.zeros_like(position), weight, block_size, stride
            ),
            "the weight's rows go token by token, these went channel by channel": with_weight(
                by_channel
            ),
            "the tokens of a block are in the reverse order": with_weight(by_token.flip(0)),
            "the tokens of a block are averaged before the weight, so their order is lost": with_weight(
                mean
            ),
            "the position encoding belongs to places in the block, not in the sequence": moving,
        },
    )


# --- 02.4 ---


def attention_cases(generator: torch.Generator) -> list[Case]:
    def case(name, length, l, d, explain=None, call=None, wanted=None, scale=1.0, width=8):
        count = max(0, (length - l) // d + 1)
        q, k = (torch.randn(n, width, generator=generator) * scale for n in (length, count))
        v = torch.randn(count, 3, generator=generator)
        axes = {"out": ("query", "channel"), "lse": ("query",)}
        expected = by_loop(q, k, v, l, d) if wanted is None else wanted(q, k, v, l, d)
        if wanted is not None:
            axes = {
                "gradient of q": ("query", "channel"),
                "gradient of k": ("block", "channel"),
                "gradient of v": ("block", "channel"),
            }
        arguments = dict(q=q, k=k, v=v, block_size=l, stride=d)
        return Case(name, arguments, expected, axes, explain, call)

    return [
        case("empty rows", 6, 4, 2, explain_empty),
        case("causal", 16, 4, 2, explain_leak),
        case("scale", 16, 4, 4, explain_scale, scale=3.0),
        case("large scores", 12, 4, 2, explain_large, scale=30.0),
        case("gradient", 8, 4, 2, explain_gradient, gradients, gradients_by_loop),
    ]


def by_loop(q, k, v, block_size, stride):
    """The package's loop, for one head."""
    out, lse = loops.compressed_attention(
        q[None, None], k[None, None], v[None, None], block_size=block_size, stride=stride
    )
    return out[0, 0], lse[0, 0]


def gradients(answer, q, k, v, block_size, stride):
    """The gradients of the sum of the squared outputs."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, _ = answer(*leaves, block_size, stride)
    if not out.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    return torch.autograd.grad(out.square().sum(), leaves, materialize_grads=True)


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
    for name, part in zip("qkv", got, strict=True):
        if not part.any():
            return f"no gradient reaches {name}: was it detached, or turned into plain numbers?"
        if part.isnan().any():
            return (
                f"the gradient of {name} is NaN: the rows that see no block were set to 0 "
                "after the softmax had made them NaN, and 0 times NaN is NaN"
            )
    return None


def explain_leak(got, expected, q, k, v, block_size, stride):
    t, i = torch.arange(len(q))[:, None], torch.arange(len(k))[None]
    alive = block_size - 1  # the first query that sees a block
    scores = q @ k.T * q.shape[1] ** -0.5
    begun = scores.masked_fill(i * stride > t, -torch.inf)
    ended = scores.masked_fill(i * stride + block_size - 1 > t, -torch.inf)
    known = {
        f"query {alive} reads all {len(k)} blocks, and has passed 1": scores.softmax(1) @ v,
        f"query {alive} reads block 1, whose last token is {stride + block_size - 1}": begun.softmax(
            1
        )
        @ v,
        "the weights that one query gives to its blocks do not sum to 1": ended.softmax(0) @ v,
    }
    return recognise(got[0][alive:], {says: value[alive:] for says, value in known.items()})


def explain_scale(got, expected, q, k, v, block_size, stride):
    known = {
        "the scores are not divided by the root of the width": by_loop(
            q * q.shape[1] ** 0.5, k, v, block_size, stride
        ),
        "the scores are divided by the width, not by its root": by_loop(
            q * q.shape[1] ** -0.5, k, v, block_size, stride
        ),
        "the output is right, but lse has another base than e": (
            expected[0],
            expected[1] / torch.log(torch.tensor(2.0)),
        ),
        "the output is right, but lse is the sum itself, without its logarithm": (
            expected[0],
            expected[1].exp(),
        ),
    }
    return recognise(got, known)


def explain_large(got, expected, q, k, v, block_size, stride):
    for name, part in zip(("output", "lse"), got, strict=True):
        bad = ~part.isfinite() & expected[1].isfinite().view(-1, *[1] * (part.dim() - 1))
        if bad.any():
            t = int(bad.nonzero()[0][0])
            return f"the {name} of query {t} is not finite: exp of a large score overflows"
    return None


EXERCISES = [
    Exercise(
        "02.1",
        "Count the blocks",
        "warm-up",
        5,
        count_cases,
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
        visible_cases,
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
        summary_cases,
        hints=(
            "How many numbers does a block hold, and in which order does the weight want them?",
            "phi(block) = flatten(block + position) W, with W (l D, D'); row s D + e belongs to "
            "channel e of token s.",
            "for each whole block: take its l tokens, add the position encoding, flatten, multiply "
            "by W; stack the results",
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
