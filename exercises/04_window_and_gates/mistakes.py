"""Set 04's mistakes that the checks know by what they give: the right one, one step changed."""

from collections.abc import Callable

import torch
from torch import Tensor

from exercises.records import Mistake

# --- 04.2: a window in chunks ---


def chunks(
    sees=lambda t, s, w: (s <= t) & (s > t - w),
    scale=lambda d, dv: d**-0.5,
    low=lambda first, w: max(0, first - w + 1),
    count=lambda length, w: -(-length // w),
    fill=-torch.inf,
) -> Callable:
    """Attention chunk by chunk; low is the first key of its slice, a row without keys is 0."""

    def answer(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        out = []
        for first in range(0, count(len(q), window) * window, window):
            end = min(first + window, len(q))
            keys = slice(low(first, window), end)
            t = torch.arange(first, end)[:, None]
            s = torch.arange(len(k))[keys]
            scores = q[first:end] @ k[keys].T * scale(q.shape[1], v.shape[1])
            scores = scores.masked_fill(~sees(t, s, window), fill)
            out.append(scores.softmax(-1).nan_to_num(nan=0.0) @ v[keys])
        return torch.cat(out)

    return answer


WINDOWS = [
    Mistake(
        "w + 1 keys",
        chunks(lambda t, s, w: (s <= t) & (s >= t - w), low=lambda first, w: max(0, first - w)),
        "query {row} reads key {before} too: that makes {more} keys",
    ),
    Mistake(
        "w + 1 keys, but not at a chunk's start",
        chunks(lambda t, s, w: (s <= t) & (s >= t - w)),
        "query {row} reads key {before} too, which makes {more} keys, and only the first query of "
        "a chunk is right",
    ),
    Mistake(
        "own key left out",
        chunks(lambda t, s, w: (s < t) & (s > t - w)),
        "query {row} does not read its own key",
    ),
    Mistake(
        "no mask",
        chunks(lambda t, s, w: (s >= 0) & (t >= 0)),
        "query {row} reads every key of its chunk's slice, keys after it included",
    ),
    Mistake(
        "only the causal mask",
        chunks(lambda t, s, w: s <= t),
        "query {row} reads keys that are older than its window, from where its chunk's slice "
        "begins",
    ),
    Mistake(
        "only the window's edge",
        chunks(lambda t, s, w: s > t - w),
        "query {row} reads keys that come after it",
    ),
    Mistake(
        "the chunk's own keys only",
        chunks(low=lambda first, w: first),
        "query {row} reads only keys of its own chunk",
    ),
    Mistake(
        "no window",
        chunks(lambda t, s, w: s <= t, low=lambda first, w: 0),
        "query {row} reads its whole past: there is no window",
    ),
    Mistake(
        "no scale",
        chunks(scale=lambda d, dv: 1.0),
        "the scores are not divided by the root of the width",
    ),
    Mistake(
        "scale by the width",
        chunks(scale=lambda d, dv: 1 / d),
        "the scores are divided by the width, not by its root",
    ),
    Mistake(
        "scale by the values' width",
        chunks(scale=lambda d, dv: dv**-0.5),
        "the scores are divided by the root of the values' width, not the keys'",
    ),
    Mistake(
        "masked with -1e4",
        chunks(fill=-1e4),
        "a masked key has a finite score, and the true ones lie below it: fill with -inf",
    ),
]

# --- 04.3: three gates for each head ---


def mix(
    gate=torch.sigmoid,
    split=lambda logits, heads: logits.unflatten(1, (heads, 3)).transpose(0, 1),
    after=lambda out: out,
) -> Callable:
    """The gated sum; split cuts the columns (T, 3 H) into (H, T, 3)."""

    def answer(logits: Tensor, *branches: Tensor) -> Tensor:
        g = gate(split(logits, len(branches[0])))  # (H, T, 3)
        return after(sum(g[..., c, None] * branch for c, branch in enumerate(branches)))

    return answer


def normalised(logits: Tensor) -> Tensor:
    """Sigmoids divided by their sum."""
    g = logits.sigmoid()
    return g / g.sum(-1, keepdim=True)


GATES = [
    Mistake(
        "softmax",
        mix(lambda logits: logits.softmax(-1)),
        "the three gates are a softmax: they sum to 1, and opening one shuts the others",
    ),
    Mistake(
        "sigmoid, then normalised",
        mix(normalised),
        "the sigmoids are divided by their sum, and Eq. 5 does not normalise them",
    ),
    Mistake(
        "no sigmoid",
        mix(lambda logits: logits),
        "the logits themselves weigh the branches: a gate lies between 0 and 1",
    ),
    Mistake(
        "mean of the branches",
        mix(after=lambda out: out / 3),
        "the sum of the three gated branches is divided by 3",
    ),
    Mistake(
        "branch by branch",
        mix(split=lambda logits, heads: logits.unflatten(1, (3, heads)).permute(2, 0, 1)),
        "the columns were read branch by branch, and they go head by head",
    ),
    Mistake(
        "a view instead of a transpose",
        mix(split=lambda logits, heads: logits.reshape(heads, -1, 3)),
        "the columns were cut without moving the axis of queries: head 1 gets the gates of other "
        "queries",
    ),
    Mistake(
        "one gate for all heads",
        mix(lambda logits: logits[:1].sigmoid().expand_as(logits)),
        "every head uses the gates of head 0",
    ),
    Mistake(
        "gates averaged over heads",
        mix(lambda logits: logits.sigmoid().mean(0, True).expand_as(logits)),
        "every head uses the mean of all heads' gates",
    ),
    Mistake(
        "branches in reverse",
        mix(lambda logits: logits.sigmoid().flip(-1)),
        "the three gates are in the reverse order of the branches",
    ),
    Mistake(
        "gates of query 0",
        mix(lambda logits: logits[:, :1].sigmoid().expand_as(logits)),
        "every query uses the gates of query 0",
    ),
    Mistake(
        "gates of a sharper slope",
        mix(lambda logits: (2 * logits).sigmoid()),
        "the gates are not the sigmoid, but one of twice its slope, as tanh is",
    ),
]

# --- 04.4: who trains shared keys ---


def gradient(loss: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a loss with respect to one weight, 0 where it is not used."""
    if not loss.requires_grad:
        return torch.zeros_like(weight)
    found = torch.autograd.grad(loss, weight, allow_unused=True)[0]
    return torch.zeros_like(weight) if found is None else found


def parts(finish: Callable) -> Callable:
    """Both gradients, each with a leaf of its own, and what finish makes of them."""

    def answer(loss: Callable, weight: Tensor):
        far = weight.clone().requires_grad_()
        window = weight.clone().requires_grad_()
        return finish(gradient(loss(far, weight), far), gradient(loss(weight, window), window))

    return answer


def with_the_other_at_zero(loss: Callable, weight: Tensor):
    """Each gradient where the other branch's weight is 0."""
    far = weight.clone().requires_grad_()
    window = weight.clone().requires_grad_()
    nothing = torch.zeros_like(weight)
    return gradient(loss(far, nothing), far), gradient(loss(nothing, window), window)


def at_one(loss: Callable, weight: Tensor):
    """Both gradients where all weights are 1."""
    return parts(lambda far, window: (far, window))(loss, torch.ones_like(weight))


def after_a_step(loss: Callable, weight: Tensor):
    """The gradient through the window after a step of training of the far branch."""
    far = weight.clone().requires_grad_()
    window = weight.clone().requires_grad_()
    first = gradient(loss(far, weight), far)
    return first, gradient(loss(weight - first, window), window)


PARTS = [
    Mistake(
        "the sum, twice",
        parts(lambda far, window: (far + window, far + window)),
        "both results are the sum of the two parts: one weight stood in both places",
    ),
    Mistake(
        "the sum, halved",
        parts(lambda far, window: ((far + window) / 2, (far + window) / 2)),
        "both results are half of the sum: the parts were not told apart",
    ),
    Mistake(
        "window first",
        parts(lambda far, window: (window, far)),
        "the two parts are in the wrong order",
    ),
    Mistake(
        "the other weight 0",
        with_the_other_at_zero,
        "one branch's weight was set to 0 to measure the other: that changes the loss, and the "
        "gradient with it",
    ),
    Mistake(
        "at ones",
        at_one,
        "the gradients are those of a weight of ones, not of the one that was given",
    ),
    Mistake(
        "after a step of the far branch",
        after_a_step,
        "the far branch's weight had moved before the window's gradient was taken",
    ),
    Mistake(
        "clipped",
        parts(lambda far, window: (far.clamp(-10, 10), window.clamp(-10, 10))),
        "large gradients were clipped",
    ),
    Mistake(
        "made of length 1",
        parts(lambda far, window: (far / far.norm(), window / window.norm())),
        "the gradients were divided by their length",
    ),
]

# --- 04.5: decode one token at a time ---


def attend(q: Tensor, rows: Tensor) -> Tensor:
    """Attention of one query to rows of a key and a value side by side; 0 where there are none."""
    keys = rows[:, : len(q)]
    values = rows[:, len(q) :]
    return torch.softmax(keys @ q / len(q) ** 0.5, 0) @ values


def append(cache: dict, name: str, row: Tensor, keep: int | None = None) -> Tensor:
    """The rows under this name with one more behind them; the newest `keep` stay."""
    rows = torch.cat([cache.get(name, row[None][:0]), row[None]])
    cache[name] = rows if keep is None else rows[-keep:]
    return cache[name]


def step(
    keep=lambda w: w,
    ends=lambda t, l, d: t + 1 >= l and (t + 1 - l) % d == 0,
    whose=(0, 1),
    own=True,
    gate=lambda gates: gates,
    tail=lambda l: l,
    late=False,
) -> Callable:
    """One decoded token; ends says whether a block ends at t, whose gives each branch its keys."""

    def answer(cache, q, k, v, gates, window, block_size, stride):
        t = cache.get("t", 0)
        cache["t"] = t + 1
        rows = torch.cat([k, v], 1)  # the compressed branch's and the window's, key and value
        before = cache.get("near", rows[:0])
        near = append(cache, "near", rows[whose[1]], keep(window))
        raw = append(cache, "raw", rows[whose[0]], tail(block_size))
        short = cache.get("short", rows[:0])
        if ends(t, block_size, stride):
            longer = append(cache, "short", raw[-block_size:].mean(0))
            short = short if late else longer
        return gate(gates) @ torch.stack([attend(q, short), attend(q, near if own else before)])

    return answer


STEPS = [
    Mistake(
        "w + 1 keys",
        step(keep=lambda w: w + 1),
        "query {row}: the window reads {more} keys",
    ),
    Mistake(
        "w - 1 keys",
        step(keep=lambda w: w - 1),
        "query {row}: the window reads {fewer} keys, and the oldest is missing",
    ),
    Mistake(
        "the window never forgets",
        step(keep=lambda w: None),
        "query {row}: the window reads all keys so far",
    ),
    Mistake(
        "attends before it appends",
        step(keep=lambda w: w - 1, own=False),
        "query {row}: the window does not hold the query's own key",
    ),
    Mistake(
        "a block is read one token late",
        step(late=True),
        "query {row} ends a block, and does not read it yet",
    ),
    Mistake(
        "blocks before they are whole",
        step(ends=lambda t, l, d: (t + 1) % d == 0),
        "query {row} reads a block of fewer than {size} tokens",
    ),
    Mistake(
        "blocks side by side",
        step(ends=lambda t, l, d: (t + 1) % l == 0),
        "query {row}: the blocks lie side by side, and one should begin every {stride} tokens",
    ),
    Mistake(
        "a block at every token",
        step(ends=lambda t, l, d: t + 1 >= l),
        "query {row}: a block is compressed at every token",
    ),
    Mistake(
        "the window reads what is compressed",
        step(whose=(0, 0)),
        "the window reads the compressed branch's keys and values",
    ),
    Mistake(
        "one pair of keys for both",
        step(whose=(1, 1)),
        "the compressed branch reads the window's keys and values",
    ),
    Mistake(
        "keys crossed",
        step(whose=(1, 0)),
        "the two branches read each other's keys and values",
    ),
    Mistake(
        "no gates",
        step(gate=torch.ones_like),
        "the branches are added without their gates",
    ),
    Mistake(
        "gates crossed",
        step(gate=lambda gates: gates.flip(0)),
        "each branch has the other one's gate",
    ),
    Mistake(
        "blocks end at multiples of the stride",
        step(ends=lambda t, l, d: t + 1 >= l and (t + 1) % d == 0),
        "query {row}: block i ends at token i d + l - 1, and {stride} need not divide that plus 1",
    ),
    Mistake(
        "two strides a block",
        step(ends=lambda t, l, d: t + 1 >= 2 * d and (t + 1) % d == 0),
        "query {row}: a block has {size} tokens, and was taken to have two strides",
    ),
    Mistake(
        "gates through a softmax",
        step(gate=lambda gates: gates.softmax(0)),
        "the two gates went through a softmax, and they are gates already",
    ),
]
