"""Planted wrong answers that the checks of set 02 must name, and right ones they must accept."""

import torch
import torch.nn.functional as F

from exercises.records import Wrong

# --- 02.1 ---


def count_by_listing(length, block_size, stride):
    return len([i for i in range(length) if i * stride + block_size <= length])


def count_by_unfold(length, block_size, stride):
    if length < block_size:
        return 0
    return torch.zeros(length).unfold(0, block_size, stride).shape[0]


def count_by_walking(length, block_size, stride):
    count, end = 0, block_size
    while end <= length:
        count, end = count + 1, end + stride
    return count


COUNTS = [
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
    mask = torch.zeros(length, count, dtype=torch.bool)
    for i in range(count):
        mask[i * stride + block_size - 1 :, i] = True
    return mask


def visible_by_counting(length, count, block_size, stride):
    # int division rounds towards 0 in the tensor case, so floor it
    seen = torch.div(torch.arange(length) + 1 - block_size, stride, rounding_mode="floor") + 1
    return torch.arange(count).expand(length, count) < seen.unsqueeze(1)


def visible_by_lists(length, count, block_size, stride):
    ends = [i * stride + block_size for i in range(count)]
    return torch.tensor([[end < t + 2 for end in ends] for t in range(length)])


def compare(rule):
    """A mask from a rule on query t (T, 1) and block i (1, N)."""

    def answer(length, count, block_size, stride):
        return rule(torch.arange(length)[:, None], torch.arange(count)[None], block_size, stride)

    return answer


VISIBLE = [
    Wrong(
        "seen once it has begun", compare(lambda t, i, l, d: i * d <= t), "comes after the query"
    ),
    Wrong(
        "one query too early",
        compare(lambda t, i, l, d: i * d + l - 2 <= t),
        "comes after the query",
    ),
    Wrong(
        "one query too late",
        compare(lambda t, i, l, d: i * d + l <= t),
        "although it has passed all",
    ),
    Wrong(
        "strictly before the query",
        compare(lambda t, i, l, d: i * d + l - 1 < t),
        "although it has passed all",
    ),
    Wrong(
        "the stride taken for the size",
        compare(lambda t, i, l, d: i * d + d - 1 <= t),
        "comes after the query",
    ),
    Wrong(
        "the size taken for the stride",
        compare(lambda t, i, l, d: i * l + l - 1 <= t),
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
    blocks = x.unfold(0, block_size, stride)  # (N, D, l)
    blocks = blocks + position.T
    return torch.einsum("nel,lec->nc", blocks, weight.view(block_size, x.shape[1], -1))


def summary_by_matrix(x, position, weight, block_size, stride):
    starts = torch.arange(0, len(x) - block_size + 1, stride)
    blocks = x[starts[:, None] + torch.arange(block_size)]  # (N, l, D)
    return (blocks + position).reshape(len(starts), -1) @ weight


def summary_in_double(x, position, weight, block_size, stride):
    x, position, weight = x.double(), position.double(), weight.double()
    bias = position.flatten() @ weight  # phi is linear: its answer to the encoding, once
    starts = range(0, len(x) - block_size + 1, stride)
    return torch.stack([x[s : s + block_size].flatten() @ weight for s in starts]) + bias


def summaries(
    change=lambda block: block,
    position_of=lambda position, i, d: position,
    step=lambda l, d: d,
    tail=False,
):
    """The right answer with one step changed."""

    def answer(x, position, weight, block_size, stride):
        if tail:
            x = F.pad(x, (0, 0, 0, -(len(x) - block_size) % stride))
        out, every = [], step(block_size, stride)
        for i, first in enumerate(range(0, len(x) - block_size + 1, every)):
            block = x[first : first + block_size] + position_of(position, i, stride)
            out.append(change(block).flatten() @ weight)
        return torch.stack(out)

    return answer


def mean_then_repeat(block):
    return block.mean(0, keepdim=True).expand_as(block)


SUMMARIES = [
    Wrong(
        "no position encoding",
        summaries(position_of=lambda p, i, d: torch.zeros_like(p)),
        "position encoding is missing",
    ),
    Wrong(
        "flattened channel by channel",
        summaries(lambda block: block.T.contiguous()),
        "went channel by channel",
    ),
    Wrong("tokens in reverse", summaries(lambda block: block.flip(0)), "reverse order"),
    Wrong("mean, then the weight", summaries(mean_then_repeat), "averaged before the weight"),
    Wrong("stride ignored", summaries(step=lambda l, d: l), "overlapping blocks: the shape is"),
    Wrong(
        "a block at each token", summaries(step=lambda l, d: 1), "blocks side by side: the shape is"
    ),
    Wrong(
        "tail filled with zeros", summaries(tail=True), "a tail too short for a block: the shape is"
    ),
    Wrong(
        "position encoding moves with the block",
        summaries(position_of=lambda p, i, d: p.roll(-i * d, 0)),
        "places in the block, not in the sequence",
    ),
    Wrong(
        "input changed in place",
        lambda x, *others: summary_by_matrix(x.add_(others[0][0]), *others),
        "changed its input x",
    ),
]

# --- 02.4 ---


def seen_by(q, k, block_size, stride):
    return torch.arange(len(k)) * stride + block_size - 1 <= torch.arange(len(q))[:, None]


def seen_once_begun(q, k, block_size, stride):
    return torch.arange(len(k)) * stride <= torch.arange(len(q))[:, None]


def seen_all_after_the_first(q, k, block_size, stride):
    return seen_by(q, k, block_size, stride).any(-1, keepdim=True).expand(len(q), len(k))


def attention_by_loop(q, k, v, block_size, stride):
    out, lse = [], []
    for t in range(len(q)):
        n = max(0, (t + 1 - block_size) // stride + 1)
        scores = k[:n] @ q[t] / q.shape[1] ** 0.5
        out.append(torch.softmax(scores, 0) @ v[:n])
        lse.append(torch.logsumexp(scores, 0))
    return torch.stack(out), torch.stack(lse)


def attention_with_a_sink(q, k, v, block_size, stride):
    # one more key, read by the empty rows only, whose value is 0
    seen = seen_by(q, k, block_size, stride)
    empty = ~seen.any(1, keepdim=True)
    scores = q @ F.pad(k, (0, 0, 0, 1)).T / q.shape[1] ** 0.5
    scores = scores.masked_fill(~torch.cat([seen, empty], 1), -torch.inf)
    out = scores.softmax(-1) @ F.pad(v, (0, 0, 0, 1))
    return out, scores.logsumexp(-1).masked_fill(empty[:, 0], -torch.inf)


def attention_by_hand(q, k, v, block_size, stride):
    q, k, v = q.double(), k.double(), v.double()
    seen = seen_by(q, k, block_size, stride)
    scores = torch.einsum("td,nd->tn", q, k) / q.shape[1] ** 0.5
    top = scores.masked_fill(~seen, -1e30).amax(-1, keepdim=True)
    e = torch.where(seen, scores - top, 0).exp() * seen
    total = e.sum(-1, keepdim=True)
    alive = total > 0
    out = torch.where(alive, e @ v / torch.where(alive, total, 1), 0)
    return out, (total.log() + top)[:, 0]


def attention(
    scale=lambda width: width**-0.5,
    seen=seen_by,
    fill=-torch.inf,
    zero=True,
    dim=-1,
    base=1.0,
    late_zero=False,
):
    """The right answer with one step changed."""

    def answer(q, k, v, block_size, stride):
        mask = seen(q, k, block_size, stride)
        alive = mask.any(-1, keepdim=True)
        scores = q @ k.T * scale(q.shape[1])
        scores = scores.masked_fill(~mask & (alive if zero else True), fill)
        p = scores.softmax(dim)
        out = p.masked_fill(~alive, 0) @ v if zero else p @ v
        lse = scores.logsumexp(-1) / base
        if zero or late_zero:
            out, lse = out.masked_fill(~alive, 0), lse.masked_fill(~alive[:, 0], -torch.inf)
        return out, lse

    return answer


def exp_without_the_largest(q, k, v, block_size, stride):
    seen = seen_by(q, k, block_size, stride)
    e = (q @ k.T * q.shape[1] ** -0.5).exp() * seen
    total = e.sum(-1, keepdim=True)
    return e @ v / total.clamp(min=1e-30), total.log()[:, 0]


ATTENTION = [
    Wrong(
        "NaN in empty rows", attention(zero=False), "query 0 sees no block, and its output is NaN"
    ),
    Wrong(
        "empty rows average everything",
        attention(zero=False, fill=-1e9),
        "query 0 sees no block, and its output is not 0",
    ),
    Wrong(
        "empty rows zeroed too late", attention(zero=False, late_zero=True), "0 times NaN is NaN"
    ),
    Wrong(
        "no mask", attention(seen=seen_all_after_the_first), "reads all 7 blocks, and has passed 1"
    ),
    Wrong(
        "seen once begun",
        attention(seen=seen_once_begun),
        "query 0 sees no block, and its output is not 0",
    ),
    Wrong("no scale", attention(scale=lambda width: 1.0), "not divided by the root of the width"),
    Wrong(
        "scale by the width",
        attention(scale=lambda width: 1 / width),
        "divided by the width, not by its root",
    ),
    Wrong("lse in base 2", attention(base=0.6931471805599453), "another base than e"),
    Wrong("softmax over the queries", attention(dim=0, zero=False), "do not sum to 1"),
    Wrong(
        "exp without the largest score", exp_without_the_largest, "exp of a large score overflows"
    ),
    Wrong(
        "keys detached",
        lambda q, k, *others: attention()(q, k.detach(), *others),
        "no gradient reaches k",
    ),
    Wrong("output only", lambda *x: attention()(*x)[0], "2 results were asked for"),
]

RIGHT = {
    "02.1": [count_by_listing, count_by_unfold, count_by_walking],
    "02.2": [visible_by_loops, visible_by_counting, visible_by_lists],
    "02.3": [summary_by_einsum, summary_by_matrix, summary_in_double],
    "02.4": [attention_by_loop, attention_with_a_sink, attention_by_hand],
}
WRONG = {"02.1": COUNTS, "02.2": VISIBLE, "02.3": SUMMARIES, "02.4": ATTENTION}
