"""Set 02's mistakes that the checks know by what they give: the right one, one step changed."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from exercises.records import Mistake

# --- 02.3: a block becomes one token ---


def summaries(
    change=lambda block: block,
    position_of=lambda position, first: position,
    step=lambda l, d: d,
    tail=False,
) -> Callable:
    """phi of each block; change acts on a block with its position encoding, tail pads with 0."""

    def answer(x: Tensor, position: Tensor, weight: Tensor, block_size: int, stride: int) -> Tensor:
        if tail:
            x = F.pad(x, (0, 0, 0, -(len(x) - block_size) % stride))
        rows = []
        for i, first in enumerate(range(0, len(x) - block_size + 1, step(block_size, stride))):
            block = x[first : first + block_size] + position_of(position, i * stride)
            rows.append(change(block).flatten() @ weight)
        return torch.stack(rows) if rows else weight.new_zeros(0, weight.shape[1])

    return answer


def mean_then_repeat(block: Tensor) -> Tensor:
    """Every token of a block is replaced by their mean."""
    return block.mean(0, keepdim=True).expand_as(block)


SUMMARIES = [
    Mistake(
        "no position encoding",
        summaries(position_of=lambda position, first: torch.zeros_like(position)),
        "the position encoding is missing",
    ),
    Mistake(
        "flattened channel by channel",
        summaries(lambda block: block.T.contiguous()),
        "the weight's rows go token by token, these went channel by channel",
    ),
    Mistake(
        "tokens in reverse",
        summaries(lambda block: block.flip(0)),
        "the tokens of a block are in the reverse order",
    ),
    Mistake(
        "mean, then the weight",
        summaries(mean_then_repeat),
        "the tokens of a block are averaged before the weight, so their order is lost",
    ),
    Mistake(
        "position encoding moves with the block",
        summaries(position_of=lambda position, first: position.roll(-first, 0)),
        "the position encoding belongs to places in the block, not in the sequence",
    ),
    Mistake(
        "one position for all tokens",
        summaries(position_of=lambda position, first: position[:1]),
        "every token of a block got the position encoding of place 0",
    ),
    Mistake(
        "position encoding subtracted",
        summaries(position_of=lambda position, first: -position),
        "the position encoding was subtracted",
    ),
    Mistake(
        "position encoding in block 0 only",
        summaries(position_of=lambda position, first: position * (first == 0)),
        "only block 0 got the position encoding",
    ),
]

# --- 02.4: attend to what is compressed ---


def seen_by(q: Tensor, k: Tensor, block_size: int, stride: int) -> Tensor:
    """Whether query t has passed all of block i, (T, N)."""
    return torch.arange(len(k)) * stride + block_size - 1 <= torch.arange(len(q))[:, None]


def seen_once_begun(q: Tensor, k: Tensor, block_size: int, stride: int) -> Tensor:
    """Whether block i has begun at query t."""
    return torch.arange(len(k)) * stride <= torch.arange(len(q))[:, None]


def where_one_is_seen(rule: Callable) -> Callable:
    """The rule for the queries that see a block, so that the others are right."""

    def seen(*arguments) -> Tensor:
        return rule(*arguments) & seen_by(*arguments).any(-1, keepdim=True)

    return seen


def attention(
    scale=lambda d, dv: d**-0.5,
    seen=seen_by,
    fill=-torch.inf,
    zero=True,
    dim=-1,
    finish=lambda lse: lse,
    late_zero=False,
) -> Callable:
    """Attention to the blocks; zero spares a query that sees none, late_zero only repairs it."""

    def answer(q, k, v, block_size, stride):
        mask = seen(q, k, block_size, stride)
        alive = mask.any(-1, keepdim=True)
        scores = q @ k.T * scale(q.shape[1], v.shape[1])
        scores = scores.masked_fill(~mask & (alive if zero else True), fill)
        p = scores.softmax(dim)
        out = p.masked_fill(~alive, 0) @ v if zero else p @ v
        lse = finish(scores.logsumexp(-1))
        if zero or late_zero:
            out = out.masked_fill(~alive, 0)
            lse = lse.masked_fill(~alive[:, 0], -torch.inf)
        return out, lse

    return answer


LEAKS = [
    Mistake(
        "no mask",
        attention(seen=where_one_is_seen(lambda q, k, l, d: torch.ones(len(q), len(k)).bool())),
        "query {alive} reads all {blocks} blocks, and has passed 1",
    ),
    Mistake(
        "seen once begun, empty rows apart",
        attention(seen=where_one_is_seen(seen_once_begun)),
        "query {alive} reads block 1, whose last token is {last}",
    ),
    Mistake(
        "stride taken for half a block",
        attention(seen=lambda q, k, l, d: seen_by(q, k, l, l // 2)),
        "blocks begin every {stride} tokens, and were taken to begin every half block",
    ),
    Mistake(
        "two strides taken for a block",
        attention(seen=lambda q, k, l, d: seen_by(q, k, 2 * d, d)),
        "a block has {size} tokens, and was taken to have two strides",
    ),
    Mistake(
        "softmax over the queries",
        attention(dim=0, zero=False),
        "the weights that one query gives to its blocks do not sum to 1",
    ),
]
SCALES = [
    Mistake(
        "no scale",
        attention(scale=lambda d, dv: 1.0),
        "the scores are not divided by the root of the width",
    ),
    Mistake(
        "scale by the width",
        attention(scale=lambda d, dv: 1 / d),
        "the scores are divided by the width, not by its root",
    ),
    Mistake(
        "scale by the values' width",
        attention(scale=lambda d, dv: dv**-0.5),
        "the scores are divided by the root of the values' width, not the keys'",
    ),
    Mistake(
        "lse in base 2",
        attention(finish=lambda lse: lse / math.log(2)),
        "the output is right, but lse has another base than e",
    ),
    Mistake(
        "lse without logarithm",
        attention(finish=torch.exp),
        "the output is right, but lse is the sum itself, without its logarithm",
    ),
    Mistake(
        "lse never negative",
        attention(finish=torch.relu),
        "the output is right, but a negative lse became 0: a sum of exponentials may be below 1",
    ),
]
SIZES = [  # of scores: right where they are tame
    Mistake(
        "masked with -1e4",
        attention(fill=-1e4),
        "a masked block has a finite score, and the true ones lie below it: fill with -inf",
    ),
    Mistake(
        "masked with -100",
        attention(fill=-100.0),
        "a masked block has the score -100, and the true ones may lie below it: fill with -inf",
    ),
]
