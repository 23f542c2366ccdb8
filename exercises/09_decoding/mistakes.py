"""Set 09's mistakes that the checks know by what they give: the right one, one step changed."""

from collections.abc import Callable

import torch
from torch import Tensor

from exercises.records import Mistake

# --- 09.1: the blocks that are finished ---


def finished(length: int, l: int, d: int) -> int:
    """How many blocks of l tokens, one every d, end within the sequence."""
    return max(0, (length - l) // d + 1)


BLOCKS = [
    Mistake(
        "counted once begun",
        lambda n, l, d: -(-n // d),
        "a block counts from its first token on",
    ),
    Mistake(
        "length over stride",
        lambda n, l, d: n // d,
        "length / stride is the paper's rough count: the last blocks are not finished",
    ),
    Mistake(
        "length over block size",
        lambda n, l, d: n // l,
        "the blocks are counted side by side, and one begins every `stride` tokens",
    ),
    Mistake(
        "one too few",
        lambda n, l, d: max(0, (n - l) // d),
        "the first block, which begins at token 0, is not counted",
    ),
    Mistake(
        "sizes swapped",
        lambda n, l, d: finished(n, d, l),
        "block_size and stride are swapped",
    ),
    Mistake(
        "rounded up",
        lambda n, l, d: max(0, -((l - n) // d) + 1),
        "the division is rounded up: a block that lacks tokens counts",
    ),
    Mistake(
        "rounded towards 0",
        lambda n, l, d: max(0, int((n - l) / d) + 1),
        "below 0 the division is rounded towards 0, not down: a block that is not there counts",
    ),
    Mistake(
        "one token late",
        lambda n, l, d: finished(n - 1, l, d),
        "a block counts one token late, not from its own last token on",
    ),
    Mistake(
        "one token early",
        lambda n, l, d: finished(n + 1, l, d),
        "a block counts one token before its last",
    ),
]

# --- 09.2: a cache that grows in place ---


def grow(
    start=lambda lengths, buffer, new: lengths,
    step=1,
    rows=lambda new: new.transpose(1, 2),
    behind=False,
    result=lambda lengths, count: lengths + count,
) -> Callable:
    """New rows from `start` on, each `step` after the one before; behind clears what follows."""

    def answer(buffer: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
        count = new.shape[2]
        first = start(lengths, buffer, new).expand(len(new))
        at = (first[:, None] + step * torch.arange(count)) % buffer.shape[2]
        if behind:
            for b, n in enumerate(lengths.tolist()):
                buffer[b, :, n:] = 0
        buffer[torch.arange(len(new))[:, None], :, at] = rows(new)
        return result(lengths, count)

    return answer


WRITES = [
    Mistake(
        "length of sequence 0 for all",
        grow(start=lambda lengths, buffer, new: lengths[:1]),
        "every sequence is written behind the length of sequence 0",
    ),
    Mistake(
        "longest length for all",
        grow(start=lambda lengths, buffer, new: lengths.max()),
        "every sequence is written behind the longest one",
    ),
    Mistake(
        "one row too late",
        grow(start=lambda lengths, buffer, new: lengths + 1),
        "the new rows stand one row too late, and leave a gap",
    ),
    Mistake(
        "one row too early",
        grow(start=lambda lengths, buffer, new: lengths - 1),
        "the new rows stand one row too early, on the last row that was held",
    ),
    Mistake(
        "from row 0 on",
        grow(start=lambda lengths, buffer, new: torch.zeros_like(lengths)),
        "the new rows are written from row 0 on, over what the sequence holds",
    ),
    Mistake(
        "at the end of the buffer",
        grow(start=lambda lengths, buffer, new: torch.tensor([buffer.shape[2] - new.shape[2]])),
        "the new rows are written at the end of the buffer",
    ),
    Mistake(
        "all into one row",
        grow(step=0),
        "all new rows of a sequence are written into one row",
    ),
    Mistake(
        "groups and tokens swapped",
        grow(rows=lambda new: new.reshape(len(new), new.shape[2], new.shape[1], -1)),
        "the groups and the tokens of new are swapped",
    ),
    Mistake(
        "last token first",
        grow(rows=lambda new: new.transpose(1, 2).flip(1)),
        "the new rows of a sequence stand in reverse order",
    ),
    Mistake(
        "new rows of sequence 0 for all",
        grow(rows=lambda new: new.transpose(1, 2)[:1]),
        "every sequence got the new rows of sequence 0",
    ),
    Mistake(
        "group 0 for all",
        grow(rows=lambda new: new.transpose(1, 2)[:, :, :1]),
        "every group got the new rows of group 0",
    ),
    Mistake(
        "cleared behind",
        grow(behind=True),
        "the rows behind the new ones were changed as well",
    ),
]
LENGTHS = [  # the buffer is right, the lengths are not
    Mistake(
        "lengths as they were",
        grow(result=lambda lengths, count: lengths.clone()),
        "the lengths from before were returned",
    ),
    Mistake(
        "place of the last token",
        grow(result=lambda lengths, count: lengths + count - 1),
        "the place of the last token was returned: a length is one more",
    ),
    Mistake(
        "one token more",
        grow(result=lambda lengths, count: lengths + 1),
        "the lengths grow by 1, however many tokens are new",
    ),
    Mistake(
        "all as long as the longest",
        grow(result=lambda lengths, count: (lengths.max() + count).repeat(len(lengths))),
        "every sequence was given the length of the longest",
    ),
    Mistake(
        "new tokens only",
        grow(result=lambda lengths, count: torch.full_like(lengths, count)),
        "the number of new tokens was returned, without those from before",
    ),
]

# --- 09.3: parts of one softmax ---


def combine(
    top=lambda maxima: maxima.amax(0),
    weight=lambda m, top: torch.exp2(m - top),
    of_outs=lambda weights, sums: weights,
    of_sums=lambda weights, sums: weights * sums,
    divide=True,
) -> Callable:
    """Weights (P, rows) of the parts; what they do to outs, and to sums, is added up."""

    def answer(outs: Tensor, maxima: Tensor, sums: Tensor) -> Tensor:
        largest = top(maxima)
        weights = weight(maxima, torch.where(largest == -torch.inf, 0.0, largest))
        weights = torch.where(sums > 0, weights, 0.0)
        outs = torch.where(sums[:, :, None] > 0, outs, 0.0)
        total = of_sums(weights, sums).sum(0)
        out = (of_outs(weights, sums)[:, :, None] * outs).sum(0)
        return out / torch.where(total > 0, total, 1.0)[:, None] if divide else out

    return answer


def inverse(sums: Tensor) -> Tensor:
    """1 / sums, and 0 where a part is empty."""
    return torch.where(sums > 0, 1 / sums, 0.0)


def largest_part(m: Tensor, top: Tensor) -> Tensor:
    """1 for the part that has the row's largest maximum."""
    return (m == top).float()


NO_WEIGHTS = combine(weight=lambda m, top: torch.ones_like(m))
MEAN_OF_PARTS = combine(
    weight=lambda m, top: (m > -torch.inf).float(),
    of_outs=lambda weights, sums: weights * inverse(sums),
    of_sums=lambda weights, sums: weights,
)
COMBINES = [
    Mistake(
        "base e",
        combine(weight=lambda m, top: torch.exp(m - top)),
        "the weights are powers of e, and these parts count in powers of 2",
    ),
    Mistake(
        "sums without weights",
        combine(of_sums=lambda weights, sums: sums),
        "the parts' sums are added without their weights",
    ),
    Mistake(
        "outs without weights",
        combine(of_outs=lambda weights, sums: torch.ones_like(sums)),
        "the parts' outs are added without their weights",
    ),
    Mistake(
        "no weights at all",
        NO_WEIGHTS,
        "outs and sums that stand relative to different maxima are added as they are",
    ),
    Mistake(
        "not divided",
        combine(divide=False),
        "the weighted outs are not divided by the weighted sums",
    ),
    Mistake(
        "mean of the parts",
        MEAN_OF_PARTS,
        "each part was finished for itself, and the parts were averaged",
    ),
    Mistake(
        "weighed by maxima alone",
        combine(
            of_outs=lambda weights, sums: weights * inverse(sums),
            of_sums=lambda weights, sums: weights,
        ),
        "each part was finished for itself and weighed by its maximum, without its sum",
    ),
    Mistake(
        "outs taken for averages",
        combine(of_outs=lambda weights, sums: weights * sums),
        "outs are multiplied by sums: they are sums already, not averages",
    ),
    Mistake(
        "largest part only",
        combine(weight=largest_part),
        "only the part with the largest maximum counts",
    ),
    Mistake(
        "upside down",
        combine(weight=lambda m, top: torch.exp2((top - m).clamp(max=100))),
        "the weights are upside down: a part below the largest maximum must shrink",
    ),
]

# --- 09.4: the bytes of a step ---


def step_bytes(
    compressed=lambda c, n: finished(n, c.block_size, c.stride),
    selected=lambda c, n: own_tokens(c, n) + other_blocks(c, n) * c.select_block_size,
    window=lambda c, n: min(c.window, n),
    dense=lambda c, n: n,
    width=lambda c: c.head_dim + c.value_dim,
    readers=lambda c: c.kv_heads,
    size=lambda number_bytes: number_bytes,
) -> Callable:
    """The bytes of dense attention and of each branch: tokens, times what one token takes."""

    def answer(config, length: int, number_bytes: int):
        one = width(config) * readers(config) * size(number_bytes)
        return tuple(
            one * tokens(config, length) for tokens in (dense, compressed, selected, window)
        )

    return answer


def own_tokens(config, length: int) -> int:
    """What the newest token reads of its own block."""
    return (length - 1) % config.select_block_size + 1


def other_blocks(config, length: int) -> int:
    """How many blocks before its own it reads."""
    return min(config.num_selected - 1, (length - 1) // config.select_block_size)


OWN_WHOLE = "the own block is counted whole, and it ends at the new token"
BYTES = [
    Mistake(
        "every head reads",
        step_bytes(readers=lambda c: c.heads),
        "every head reads for itself, and the heads of a group share one load",
    ),
    Mistake(
        "one group",
        step_bytes(readers=lambda c: 1),
        "the keys and values of one group are counted, and there are kv_heads of them",
    ),
    Mistake(
        "keys only",
        step_bytes(width=lambda c: c.head_dim),
        "the keys are counted, and the values are not",
    ),
    Mistake(
        "values as wide as keys",
        step_bytes(width=lambda c: 2 * c.head_dim),
        "the values are counted as wide as the keys",
    ),
    Mistake(
        "numbers, not bytes",
        step_bytes(size=lambda number_bytes: 1),
        "these are numbers, and each takes number_bytes bytes",
    ),
    Mistake(
        "always two bytes",
        step_bytes(size=lambda number_bytes: 2),
        "a number is taken for 2 bytes, whatever number_bytes says",
    ),
    Mistake(
        "without the new token",
        step_bytes(dense=lambda c, n: n - 1),
        "the new token reads its own key and value too, and dense lacks them",
    ),
    Mistake(
        "length over stride",
        step_bytes(compressed=lambda c, n: n // c.stride),
        "length / stride is the paper's rough count: the last blocks are not finished",
    ),
    Mistake(
        "compressed counted once begun",
        step_bytes(compressed=lambda c, n: -(-n // c.stride)),
        "the compressed branch counts blocks from their first token on",
    ),
    Mistake(
        "compressed blocks read token by token",
        step_bytes(compressed=lambda c, n: c.block_size * finished(n, c.block_size, c.stride)),
        "a compressed block is read as one key and one value, not token by token",
    ),
    Mistake(
        "compressed keys read twice",
        step_bytes(compressed=lambda c, n: 2 * finished(n, c.block_size, c.stride)),
        "the compressed branch is counted twice: its scores serve the choice as well",
    ),
    Mistake(
        "own block whole",
        step_bytes(selected=lambda c, n: (1 + other_blocks(c, n)) * c.select_block_size),
        OWN_WHOLE,
    ),
    Mistake(
        "n blocks however short",
        step_bytes(selected=lambda c, n: c.num_selected * c.select_block_size),
        OWN_WHOLE,
    ),
    Mistake(
        "whole blocks, or all tokens",
        step_bytes(selected=lambda c, n: min(c.num_selected * c.select_block_size, n)),
        OWN_WHOLE,
    ),
    Mistake(
        "blocks that have not begun",
        step_bytes(
            selected=lambda c, n: own_tokens(c, n) + (c.num_selected - 1) * c.select_block_size
        ),
        "num_selected blocks are counted, and fewer have begun",
    ),
    Mistake(
        "an own block of 0 tokens",
        step_bytes(
            selected=lambda c, n: (
                n % c.select_block_size
                + min(c.num_selected - 1, n // c.select_block_size) * c.select_block_size
            )
        ),
        "where the newest token is the last of its block, the own block is counted as empty",
    ),
    Mistake(
        "own block on top",
        step_bytes(
            selected=lambda c, n: (
                own_tokens(c, n)
                + min(c.num_selected, (n - 1) // c.select_block_size) * c.select_block_size
            )
        ),
        "the own block is one of the num_selected, and was added to them",
    ),
    Mistake(
        "selected blocks of the compressed size",
        step_bytes(selected=lambda c, n: own_tokens(c, n) + other_blocks(c, n) * c.block_size),
        "the selected blocks are counted with block_size, and have select_block_size tokens",
    ),
    Mistake(
        "whole window always",
        step_bytes(window=lambda c, n: c.window),
        "the window is counted whole, and there are fewer tokens",
    ),
    Mistake(
        "window without the own token",
        step_bytes(window=lambda c, n: min(c.window, n - 1)),
        "the window lacks the new token itself where the sequence is shorter",
    ),
    Mistake(
        "window and one more",
        step_bytes(window=lambda c, n: min(c.window + 1, n)),
        "the window holds the new token already, and one more was counted",
    ),
]

# --- 09.5: keys that are read once ---


def read_once(
    exp=torch.exp2,
    factor=lambda m, top, total: torch.exp2(m - top) / total,
    weights=lambda factor: factor,
    overlap=lambda overlap: overlap,
    of_heads=lambda scores: scores.sum(0),
    shares_counted=lambda shares: shares,
    join=None,
) -> Callable:
    """Parts of each share; scores are the shares' block sums times factor(m, top, total)."""
    join = join or combine(weight=lambda m, top: exp(m - top))

    def answer(read: Callable, shares: int):
        parts = [part(exp, *read(p), overlap) for p in range(shares)]
        outs, maxima, sums, block_sums = (torch.stack(x) for x in zip(*parts, strict=True))
        top = maxima.amax(0)
        top = torch.where(top == -torch.inf, 0.0, top)
        total = (exp(maxima - top) * sums).sum(0)
        by = weights(factor(maxima, top, torch.where(total > 0, total, 1.0)))
        each = by[:, :, None].expand_as(block_sums) * block_sums
        return join(outs, maxima, sums), of_heads(shares_counted(each).sum(0))

    return answer


def part(exp, scores: Tensor, values: Tensor, overlap: Tensor, change=lambda overlap: overlap):
    """One share: out, maximum, sum, and sums over blocks, of each head."""
    m = scores.amax(1)
    p = exp(scores - torch.where(m == -torch.inf, 0.0, m)[:, None])
    values = torch.where((scores > -torch.inf).any(0)[:, None], values, 0.0)
    return p @ values, m, p.sum(1), p @ change(overlap)


def exp_up(x: Tensor) -> Tensor:
    """exp2 that stays finite."""
    return torch.exp2(x.clamp(max=100.0))


def shares_alone(read: Callable, shares: int):
    """Each share's sums are divided by the share's own sum."""
    parts = [part(torch.exp2, *read(p)) for p in range(shares)]
    outs, maxima, sums, block_sums = (torch.stack(x) for x in zip(*parts, strict=True))
    scores = (block_sums * inverse(sums)[:, :, None]).sum((0, 1))
    return combine()(outs, maxima, sums), scores


SCORES = [
    Mistake(
        "base e",
        read_once(exp=torch.exp, factor=lambda m, top, total: torch.exp(m - top) / total),
        "the weights are powers of e, and these scores count in powers of 2",
    ),
    Mistake(
        "block sums added as they are",
        read_once(factor=lambda m, top, total: torch.ones_like(m)),
        "the shares' block sums are added as they are, each relative to another maximum",
    ),
    Mistake(
        "brought to the largest maximum only",
        read_once(factor=lambda m, top, total: torch.exp2(m - top)),
        "the block sums are brought to the largest maximum, and not divided by the whole sum",
    ),
    Mistake(
        "divided, but not brought to one maximum",
        read_once(factor=lambda m, top, total: (m > -torch.inf) / total),
        "the block sums are divided by the whole sum, and not brought to its maximum first",
    ),
    Mistake(
        "block sums not shrunk",
        read_once(factor=lambda m, top, total: torch.exp2(m - m.cummax(0).values) / total),
        "the block sums of earlier shares are not brought to a later, larger maximum",
    ),
    Mistake(
        "each share its own softmax",
        shares_alone,
        "each share's block sums are divided by the sum of that share alone",
    ),
    Mistake(
        "factor upside down",
        read_once(factor=lambda m, top, total: exp_up(top - m) / total),
        "the factor of a share is upside down: exp2 of its maximum less the log-sum-exp",
    ),
    Mistake(
        "log-sum-exp with ln",
        read_once(factor=lambda m, top, total: torch.exp2(m - top - total.log())),
        "the log-sum-exp has a natural logarithm in it, and the base is 2",
    ),
    Mistake(
        "factor of head 0 for all",
        read_once(weights=lambda factor: factor[:, :1]),
        "the block sums of all heads are multiplied by the factor of head 0",
    ),
    Mistake(
        "mean of the heads",
        read_once(of_heads=lambda scores: scores.mean(0)),
        "the heads' scores are averaged, and Eq. 10 adds them",
    ),
    Mistake(
        "head 0 only",
        read_once(of_heads=lambda scores: scores[0]),
        "only the scores of head 0 came back, and Eq. 10 adds all heads",
    ),
    Mistake(
        "largest head",
        read_once(of_heads=lambda scores: scores.amax(0)),
        "of each block the largest head was taken, and Eq. 10 adds them",
    ),
    Mistake(
        "last share only",
        read_once(shares_counted=lambda shares: shares[-1:]),
        "only the last share's block sums count",
    ),
    Mistake(
        "divided by their sum",
        read_once(of_heads=lambda scores: scores.sum(0) / scores.sum()),
        "the scores are divided by their sum; each head's probabilities sum to 1 already",
    ),
    Mistake(
        "touched is covered",
        read_once(overlap=lambda overlap: (overlap > 0).float()),
        "a key counts 1 for every block that it touches, however much of it lies there",
    ),
]
OUTPUTS = [  # the scores are right, out is not
    Mistake(
        "out not divided",
        read_once(join=combine(divide=False)),
        "scores are right, and out is not divided by the whole sum",
    ),
    Mistake(
        "out as the mean of the shares",
        read_once(join=MEAN_OF_PARTS),
        "scores are right, and out is the mean of the shares",
    ),
    Mistake(
        "outs without weights",
        read_once(join=NO_WEIGHTS),
        "scores are right, and the shares' outs are added without their weights",
    ),
]
