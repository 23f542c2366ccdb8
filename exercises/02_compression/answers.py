"""Set 02's answers, for teachers: right ones in several styles, and wrong ones to be named.

The mistakes of mistakes.py are planted as they stand. The others are written by hand, in other
styles or with faults of another kind, so that no mistake is judged by itself alone.
"""

import torch
import torch.nn.functional as F

from exercises.records import Wrong, planted

from . import mistakes

# --- 02.1 ---


def count_by_listing(length, block_size, stride):
    """The blocks that end in time, listed."""
    return len([i for i in range(length) if i * stride + block_size <= length])


def count_by_unfold(length, block_size, stride):
    """The blocks that PyTorch's unfold cuts."""
    if length < block_size:
        return 0
    return torch.zeros(length).unfold(0, block_size, stride).shape[0]


def count_by_walking(length, block_size, stride):
    """From the end of one block to the end of the next."""
    count = 0
    end = block_size
    while end <= length:
        count += 1
        end += stride
    return count


COUNTS = [
    Wrong("not if it fits exactly", lambda T, l, d: (T - l) // d + 1 if T > l else 0, "fits"),
    Wrong("cut towards 0", lambda T, l, d: max(0, int((T - l) / d) + 1), "would need token 3"),
    Wrong("as if d divided l", lambda T, l, d: max(0, T // d - l // d + 1), "would need token 13"),
    Wrong("two strides a block", lambda T, l, d: max(0, T // d - 1), "would need token 21"),
    Wrong("always every 2", lambda T, l, d: max(0, (T - l) // 2 + 1), "would need token"),
    Wrong("blocks of 4 always", lambda T, l, d: max(0, (T - 4) // d + 1), "would need token"),
    Wrong("rounded up", lambda T, l, d: max(0, -(-(T - l) // d) + 1), "would need token 13"),
    Wrong("size and stride swapped", lambda T, l, d: max(0, (T - d) // l + 1), "block fits"),
    Wrong("block 0 forgotten", lambda T, l, d: max(0, (T - l) // d), "another whole block fits"),
    Wrong("tail counted as a block", lambda T, l, d: -(-T // d), "would need token"),
    Wrong("strides counted, not blocks", lambda T, l, d: T // d, "would need token"),
    Wrong("blocks side by side only", lambda T, l, d: T // l, "another whole block fits"),
    Wrong("negative when too short", lambda T, l, d: (T - l) // d + 1, "fewer than 0 blocks"),
    Wrong(
        "true division",
        lambda T, l, d: max(0, (T - l) / d + 1),
        "a float, and an int was asked for",
    ),
    Wrong("too short not noticed", lambda T, l, d: max(1, (T - l) // d + 1), "would need token 3"),
]

# --- 02.2 ---


def visible_by_loops(length, count, block_size, stride):
    """From its last token on, every query sees a block."""
    mask = torch.zeros(length, count, dtype=torch.bool)
    for i in range(count):
        mask[i * stride + block_size - 1 :, i] = True
    return mask


def visible_by_counting(length, count, block_size, stride):
    """How many blocks each query has passed."""
    # int division rounds towards 0 in the tensor case, so floor it
    seen = torch.div(torch.arange(length) + 1 - block_size, stride, rounding_mode="floor") + 1
    return torch.arange(count).expand(length, count) < seen.unsqueeze(1)


def visible_by_lists(length, count, block_size, stride):
    """One comparison for each query and block."""
    ends = [i * stride + block_size for i in range(count)]
    return torch.tensor([[end < t + 2 for end in ends] for t in range(length)])


def mask_by(rule):
    """A mask from a rule on query t (T, 1) and block i (1, N)."""

    def answer(length, count, block_size, stride):
        return rule(torch.arange(length)[:, None], torch.arange(count)[None], block_size, stride)

    return answer


def count_from_the_queries(T, N, l, d):
    """As many blocks as the queries reach, whatever was given."""
    return visible_by_loops(T, max(0, (T - l) // d + 1), l, d)


def cut_towards_zero(t, i, l, d):
    """How many blocks a query has passed, by a division that rounds towards 0."""
    return i < torch.div(t + 1 - l, d, rounding_mode="trunc") + 1


VISIBLE = [
    Wrong("blocks of 4 always", mask_by(lambda t, i, l, d: i * d + 3 <= t), "comes after"),
    Wrong("always every 2", mask_by(lambda t, i, l, d: i * 2 + l - 1 <= t), "comes after"),
    Wrong("two strides a block", mask_by(lambda t, i, l, d: (i + 2) * d - 1 <= t), "comes after"),
    Wrong(
        "half a block from one to the next",
        mask_by(lambda t, i, l, d: i * (l // 2) + l - 1 <= t),
        "although it has passed all",
    ),
    Wrong(
        "as if d divided l", mask_by(lambda t, i, l, d: i <= (t + 1) // d - l // d), "comes after"
    ),
    Wrong("cut towards 0", mask_by(cut_towards_zero), "query 4 sees block 0"),
    Wrong("size and stride swapped", mask_by(lambda t, i, l, d: i * l + d - 1 <= t), "comes after"),
    Wrong("as many blocks as the queries reach", count_from_the_queries, "the shape is (5, 0)"),
    Wrong(
        "seen once it has begun", mask_by(lambda t, i, l, d: i * d <= t), "comes after the query"
    ),
    Wrong(
        "one query too early",
        mask_by(lambda t, i, l, d: i * d + l - 2 <= t),
        "comes after the query",
    ),
    Wrong(
        "one query too late",
        mask_by(lambda t, i, l, d: i * d + l <= t),
        "although it has passed all",
    ),
    Wrong(
        "strictly before the query",
        mask_by(lambda t, i, l, d: i * d + l - 1 < t),
        "although it has passed all",
    ),
    Wrong(
        "the stride taken for the size",
        mask_by(lambda t, i, l, d: i * d + d - 1 <= t),
        "comes after the query",
    ),
    Wrong(
        "the size taken for the stride",
        mask_by(lambda t, i, l, d: i * l + l - 1 <= t),
        "although it has passed all",
    ),
    Wrong("transposed", lambda T, N, l, d: visible_by_loops(T, N, l, d).T, "the shape is"),
    Wrong(
        "numbers, not truths",
        lambda T, N, l, d: visible_by_loops(T, N, l, d).int(),
        "bool was asked for",
    ),
    Wrong(
        "masked, not seen",
        lambda T, N, l, d: ~visible_by_loops(T, N, l, d),
        "comes after the query",
    ),
]

# --- 02.3 ---


def summary_by_einsum(x, position, weight, block_size, stride):
    """Blocks from unfold, contracted over tokens and channels at once."""
    if len(x) < block_size:
        return weight.new_zeros(0, weight.shape[1])
    blocks = x.unfold(0, block_size, stride)  # (N, D, l)
    blocks = blocks + position.T
    return torch.einsum("nel,lec->nc", blocks, weight.view(block_size, x.shape[1], -1))


def summary_by_matrix(x, position, weight, block_size, stride):
    """All blocks flattened into the rows of one matrix."""
    starts = torch.arange(0, max(0, len(x) - block_size + 1), stride)
    blocks = x[starts[:, None] + torch.arange(block_size)]  # (N, l, D)
    return (blocks + position).flatten(1) @ weight


def summary_in_double(x, position, weight, block_size, stride):
    """Block by block, with the position encoding as a constant, in double."""
    x, position, weight = (part.double() for part in (x, position, weight))
    bias = position.flatten() @ weight  # phi is linear: its answer to the encoding, once
    rows = [x[s : s + block_size].flatten() for s in range(0, len(x) - block_size + 1, stride)]
    blocks = torch.stack(rows) if rows else x.new_zeros(0, len(weight))
    return blocks @ weight + bias


def summary_without_position(x, position, weight, block_size, stride):
    """The position encoding is never used."""
    return summary_by_matrix(x, position * 0, weight, block_size, stride)


def summary_of_sums(x, position, weight, block_size, stride):
    """One sum a block, in place of its tokens; phi is linear, so the weight's rows are averaged."""
    sums = (x.unfold(0, block_size, stride) + position.T).sum(-1)  # (N, D)
    return sums @ weight.unflatten(0, (block_size, -1)).mean(0)


def as_wide_as_the_tokens(x, position, weight, block_size, stride):
    """The weight is split by token, and taken to be as wide as x."""
    blocks = x.unfold(0, block_size, stride) + position.T  # (N, D, l)
    return torch.einsum("nel,lec->nc", blocks, weight.view(block_size, x.shape[1], x.shape[1]))


def stack_of_nothing(x, position, weight, block_size, stride):
    """Right, but for a sequence without a block."""
    starts = range(0, len(x) - block_size + 1, stride)
    rows = [(x[s : s + block_size] + position).flatten() @ weight for s in starts]
    return torch.stack(rows)


def as_if_in_one_piece(x, position, weight, block_size, stride):
    """Strides of memory computed from the shape: x may be a part of a larger tensor."""
    count = max(0, (len(x) - block_size) // stride + 1)
    width = x.shape[1]
    blocks = x.as_strided((count, block_size, width), (stride * width, width, 1))
    return (blocks + position).flatten(1) @ weight


def positions_added_for_good(x, position, weight, block_size, stride):
    """The position encoding is added to the tokens themselves, and to some of them twice."""
    rows = []
    for first in range(0, len(x) - block_size + 1, stride):
        x[first : first + block_size] += position
        rows.append(x[first : first + block_size].flatten() @ weight)
    return torch.stack(rows) if rows else weight.new_zeros(0, weight.shape[1])


def last_block_missing(x, position, weight, block_size, stride):
    """A block that ends with the last token is left out."""
    return summary_by_matrix(x[:-1], position, weight, block_size, stride)


SUMMARIES = [
    Wrong("as wide as the tokens", as_wide_as_the_tokens, "raised RuntimeError"),
    Wrong("a stack of nothing", stack_of_nothing, "too short for any block: the function raised"),
    Wrong("as if x lay in one piece", as_if_in_one_piece, "which is wrong"),
    Wrong("position added for good", positions_added_for_good, "changed its input x"),
    Wrong("the last block missing", last_block_missing, "the shape is (0, 3)"),
    Wrong(
        "half a block from one to the next",
        mistakes.summaries(step=lambda l, d: l // 2),
        "the shape is",
    ),
    Wrong(
        "one row of zeros without a block",
        lambda x, *others: (
            summary_by_matrix(x, *others)
            if len(x) > 3
            else others[1].new_zeros(1, others[1].shape[1])
        ),
        "the shape is (1, 5)",
    ),
    *planted(mistakes.SUMMARIES),
    Wrong(
        "no position encoding, by matrix",
        summary_without_position,
        "position encoding is missing",
    ),
    Wrong("sum, then the mean weight", summary_of_sums, "averaged before the weight"),
    Wrong(
        "stride ignored",
        mistakes.summaries(step=lambda l, d: l),
        "overlapping blocks: the shape is",
    ),
    Wrong(
        "a block at each token",
        mistakes.summaries(step=lambda l, d: 1),
        "blocks side by side: the shape is",
    ),
    Wrong(
        "tail filled with zeros",
        mistakes.summaries(tail=True),
        "a tail too short for a block: the shape is",
    ),
    Wrong(
        "input changed in place",
        lambda x, *others: summary_by_matrix(x.add_(others[0][0]), *others),
        "changed its input x",
    ),
]

# --- 02.4 ---


def attention_by_loop(q, k, v, block_size, stride):
    """One query at a time, over the blocks that it has passed."""
    out = []
    lse = []
    for t in range(len(q)):
        n = max(0, (t + 1 - block_size) // stride + 1)
        scores = k[:n] @ q[t] / q.shape[1] ** 0.5
        out.append(torch.softmax(scores, 0) @ v[:n])
        lse.append(torch.logsumexp(scores, 0))
    return torch.stack(out), torch.stack(lse)


def attention_with_a_sink(q, k, v, block_size, stride):
    """One key more, whose value is 0, for the queries that see no block."""
    seen = mistakes.seen_by(q, k, block_size, stride)
    empty = ~seen.any(1, keepdim=True)
    scores = q @ F.pad(k, (0, 0, 0, 1)).T / q.shape[1] ** 0.5
    scores = scores.masked_fill(~torch.cat([seen, empty], 1), -torch.inf)
    out = scores.softmax(-1) @ F.pad(v, (0, 0, 0, 1))
    return out, scores.logsumexp(-1).masked_fill(empty[:, 0], -torch.inf)


def attention_by_hand(q, k, v, block_size, stride):
    """exp and its sum written out, in double."""
    q, k, v = (x.double() for x in (q, k, v))
    seen = mistakes.seen_by(q, k, block_size, stride)
    scores = torch.einsum("td,nd->tn", q, k) / q.shape[1] ** 0.5
    top = F.pad(scores.masked_fill(~seen, -1e30), (0, 1), value=-1e30).amax(-1, keepdim=True)
    e = torch.where(seen, scores - top, 0).exp() * seen
    total = e.sum(-1, keepdim=True)
    alive = total > 0
    out = torch.where(alive, e @ v / torch.where(alive, total, 1), 0)
    return out, (total.log() + top)[:, 0]


def exp_without_the_largest(q, k, v, block_size, stride):
    """Right as long as no score is large."""
    seen = mistakes.seen_by(q, k, block_size, stride)
    e = (q @ k.T * q.shape[1] ** -0.5).exp() * seen
    total = e.sum(-1, keepdim=True)
    return e @ v / total.clamp(min=1e-30), total.log()[:, 0]


def scaled_by_the_root_twice(q, k, v, block_size, stride):
    """Divides by the width in two steps."""
    return attention_by_loop(q / q.shape[1] ** 0.5, k, v, block_size, stride)


def without_a_mask(q, k, v, block_size, stride):
    """Every query that has passed a block reads them all."""
    out, lse = attention_by_loop(q, k, v, block_size, stride)
    for t in range(block_size - 1, len(q)):
        weights = (k @ q[t] / q.shape[1] ** 0.5).exp()
        out[t] = weights @ v / weights.sum()
    return out, lse


def attention_by_exp(largest):
    """exp of the scores less `largest` of them (0 for a row that sees nothing), over its sum."""

    def answer(q, k, v, block_size, stride):
        seen = mistakes.seen_by(q, k, block_size, stride)
        scores = (q @ k.T * q.shape[1] ** -0.5).masked_fill(~seen, -torch.inf)
        alive = seen.any(1, keepdim=True)
        top = torch.zeros(len(q), 1)
        if len(k):
            top = torch.where(alive, largest(scores), 0.0)
        e = (scores - top).exp()
        total = e.sum(1, keepdim=True)
        lse = (total.log() + top).masked_fill(~alive, -torch.inf)
        return torch.where(alive, e @ v / total.clamp(min=1e-38), 0.0), lse[:, 0]

    return answer


def masked_by_a_bias(q, k, v, block_size, stride):
    """A finite bias stands for the mask, and the true scores may lie below it."""
    seen = mistakes.seen_by(q, k, block_size, stride)
    alive = seen.any(1, keepdim=True)
    scores = torch.where(seen, q @ k.T / q.shape[1] ** 0.5, -1e4)
    lse = scores.logsumexp(1).masked_fill(~alive[:, 0], -torch.inf)
    return alive * torch.softmax(scores, 1) @ v, lse


def at_least_one_block(q, k, v, block_size, stride):
    """Takes the largest score of every row, and there may be none."""
    out, lse = attention_with_a_sink(q, k, v, block_size, stride)
    return out + 0 * (q @ k.T).amax(1, keepdim=True), lse


def lowered(q, k, v, block_size, stride):
    """Blocks that no query may see are lowered by a fixed number, and may still be above."""
    seen = mistakes.seen_by(q, k, block_size, stride)
    alive = seen.any(1, keepdim=True)
    scores = q @ k.T / q.shape[1] ** 0.5 - 1e4 * ~seen
    lse = scores.logsumexp(1).masked_fill(~alive[:, 0], -torch.inf)
    return alive * torch.softmax(scores, 1) @ v, lse


ATTENTION = [
    Wrong("late blocks lowered by 1e4", lowered, "query 2, channel 0: got"),
    Wrong(
        "largest score from 0 on",
        attention_by_exp(lambda scores: scores.amax(1, keepdim=True).clamp(min=0)),
        "of a very negative one it is 0",
    ),
    Wrong("one largest score for all", attention_by_exp(torch.amax), "exp of a large score"),
    Wrong("at least one block", at_least_one_block, "no block at all: the function raised"),
    Wrong(
        "values detached",
        lambda q, k, v, *sizes: attention_by_loop(q, k, v.detach(), *sizes),
        "no gradient reaches v",
    ),
    Wrong(
        "blocks of 4 always",
        lambda q, k, v, l, d: attention_by_loop(q, k, v, 4, d),
        "query 3, channel 0",
    ),
    *planted(
        mistakes.LEAKS,
        {
            "no mask": "query 3 reads all 7 blocks, and has passed 1",
            "seen once begun, empty rows apart": "query 3 reads block 1, whose last token is 5",
        },
    ),
    *planted(mistakes.SCALES),
    *planted(mistakes.SIZES),
    Wrong(
        "a bias of -1e4",
        masked_by_a_bias,
        "a masked block has a finite score, and the true ones lie below it",
    ),
    Wrong("no mask, by loop", without_a_mask, "query 3 reads all 7 blocks, and has passed 1"),
    Wrong(
        "scale by the width, in two steps",
        scaled_by_the_root_twice,
        "divided by the width, not by its root",
    ),
    Wrong(
        "NaN in empty rows",
        mistakes.attention(zero=False),
        "query 0 sees no block, and its output is NaN",
    ),
    Wrong(
        "empty rows average everything",
        mistakes.attention(zero=False, fill=-1e9),
        "query 0 sees no block, and its output is not 0",
    ),
    Wrong(
        "empty rows zeroed too late",
        mistakes.attention(zero=False, late_zero=True),
        "0 times NaN is NaN",
    ),
    Wrong(
        "seen once begun",
        mistakes.attention(seen=mistakes.seen_once_begun),
        "query 0 sees no block, and its output is not 0",
    ),
    Wrong(
        "exp without the largest score", exp_without_the_largest, "exp of a large score overflows"
    ),
    Wrong(
        "keys detached",
        lambda q, k, *others: attention_by_loop(q, k.detach(), *others),
        "no gradient reaches k",
    ),
    Wrong("output only", lambda *x: attention_by_loop(*x)[0], "2 results were asked for"),
]

RIGHT = {
    "02.1": [count_by_listing, count_by_unfold, count_by_walking],
    "02.2": [visible_by_loops, visible_by_counting, visible_by_lists],
    "02.3": [summary_by_einsum, summary_by_matrix, summary_in_double],
    "02.4": [attention_by_loop, attention_with_a_sink, attention_by_hand],
}
WRONG = {"02.1": COUNTS, "02.2": VISIBLE, "02.3": SUMMARIES, "02.4": ATTENTION}
