"""Set 04's answers, for teachers: right ones in several styles, and wrong ones to be named.

The mistakes of mistakes.py are planted as they stand. The others are written by hand, in other
styles or with faults of another kind, so that no mistake is judged by itself alone.
"""

import numpy as np
import torch
import torch.nn.functional as F

from exercises.records import Wrong, planted

from . import mistakes

# --- 04.1 ---


def keys_by_listing(t, window):
    """All keys so far that are near enough."""
    return [s for s in range(t + 1) if t - s < window]


def keys_by_walking_back(t, window):
    """From the query back, key by key."""
    keys = []
    while len(keys) < window and t - len(keys) >= 0:
        keys.append(t - len(keys))
    return keys[::-1]


def keys_by_slice(t, window):
    """The end of all keys so far; a tensor."""
    return torch.arange(t + 1)[-window:]


def keys_from(first, last=lambda t, w: t):
    """All keys from first to last, both included."""
    return lambda t, w: list(range(first(t, w), last(t, w) + 1))


def key_0_lost(t, window):
    """Key 0 is never read, but by itself."""
    return list(range(max(min(1, t), t - window + 1), t + 1))


KEYS = [
    Wrong("key 0 lost", key_0_lost, "reads 2 of the keys that the window holds"),
    Wrong(
        "the oldest w keys", lambda t, w: list(range(t + 1))[:w], "does not read the query's own"
    ),
    Wrong("a window of 4 always", lambda t, w: keys_by_listing(t, 4), "query 5, window 1: reads 4"),
    Wrong("its chunk", keys_from(lambda t, w: t // w * w), "reads 3 of the keys"),
    Wrong(
        "itself until it is full", lambda t, w: keys_by_listing(t, w if t >= w - 1 else 1), "1 of"
    ),
    Wrong(
        "half windows twice", keys_from(lambda t, w: max(0, t - 2 * (w // 2) + 1)), "does not read"
    ),
    Wrong("a set", lambda t, w: set(keys_by_listing(t, w)), "a set, and a list was asked for"),
    Wrong(
        "a generator", lambda t, w: (s for s in keys_by_listing(t, w)), "a generator, and a list"
    ),
    Wrong(
        "one key too many",
        keys_from(lambda t, w: max(0, t - w)),
        "a full window: query 10, window 4: reads 5 keys",
    ),
    Wrong(
        "own key left out",
        keys_from(lambda t, w: max(0, t - w), lambda t, w: t - 1),
        "does not read the query's own key",
    ),
    Wrong(
        "one key too few",
        keys_from(lambda t, w: max(0, t - w + 2)),
        "reads 3 of the keys that the window holds",
    ),
    Wrong("keys before the first", keys_from(lambda t, w: t - w + 1), "reads key -3"),
    Wrong(
        "window around the query",
        keys_from(lambda t, w: max(0, t - w // 2), lambda t, w: t + w // 2),
        "reads key 12, which comes after the query",
    ),
    Wrong(
        "window after the query",
        keys_from(lambda t, w: t, lambda t, w: t + w - 1),
        "reads key 13, which comes after the query",
    ),
    Wrong("newest first", lambda t, w: keys_by_listing(t, w)[::-1], "not in ascending order"),
    Wrong("the number of keys", lambda t, w: min(w, t + 1), "an int, and a list was asked for"),
    Wrong("no window", lambda t, w: list(range(t + 1)), "reads 11 keys"),
]

# --- 04.2 ---


def window_by_loop(q, k, v, window):
    """One query at a time."""
    out = []
    for t in range(len(q)):
        first = max(0, t + 1 - window)
        p = torch.softmax(k[first : t + 1] @ q[t] / q.shape[1] ** 0.5, 0)
        out.append(p @ v[first : t + 1])
    return torch.stack(out)


def window_by_unfold(q, k, v, window):
    """Empty places in front, so that every query has exactly w keys."""
    keys = F.pad(k, (0, 0, window - 1, 0)).unfold(0, window, 1)  # (T, D, w)
    values = F.pad(v, (0, 0, window - 1, 0)).unfold(0, window, 1)
    scores = torch.einsum("td,tdw->tw", q, keys) * q.shape[1] ** -0.5
    key = torch.arange(len(q))[:, None] - window + 1 + torch.arange(window)
    p = scores.masked_fill(key < 0, -torch.inf).softmax(-1)
    return torch.einsum("tw,tcw->tc", p, values)


def window_in_double(q, k, v, window):
    """Chunks from the last query on, in double."""
    q, k, v = (x.double() for x in (q, k, v))
    out = torch.zeros_like(v)
    for end in range(len(q), 0, -window):  # chunks from the last query on
        begin = max(0, end - window)
        low = max(0, begin - window + 1)
        behind = torch.arange(begin, end)[:, None] - torch.arange(low, end)
        scores = q[begin:end] @ k[low:end].T / q.shape[1] ** 0.5
        scores = scores.masked_fill((behind < 0) | (behind >= window), -torch.inf)
        e = (scores - scores.amax(1, keepdim=True)).exp()
        out[begin:end] = e @ v[low:end] / e.sum(1, keepdim=True)
    return out


def window_by_vmap(q, k, v, window):
    """One chunk, for all chunks at once by vmap; the last one is filled up."""
    count = -(-len(q) // window)
    more = count * window - len(q)
    queries = F.pad(q, (0, 0, 0, more)).unflatten(0, (count, window))
    keys, values = (
        F.pad(x, (0, 0, window - 1, more)).unfold(0, 2 * window - 1, window) for x in (k, v)
    )
    i = torch.arange(window)[:, None]
    j = torch.arange(2 * window - 1)

    def chunk(c, q, k, v):
        seen = (j >= i) & (j < i + window) & (c * window + j >= window - 1)
        scores = (q @ k / q.shape[1] ** 0.5).masked_fill(~seen, -torch.inf)
        return scores.softmax(-1).nan_to_num() @ v.mT

    out = torch.vmap(chunk)(torch.arange(count), queries, keys, values)
    return out.flatten(0, 1)[: len(q)]


def all_scores(q, k, v, window):
    """Right, but with a square of scores."""
    behind = torch.arange(len(q))[:, None] - torch.arange(len(k))
    scores = (q @ k.T * q.shape[1] ** -0.5).masked_fill(behind < 0, -torch.inf)
    return scores.masked_fill(behind >= window, -torch.inf).softmax(-1) @ v


def scaled_in_place(q, k, v, window):
    """Right, but for q, which the caller still needs."""
    q *= q.shape[1] ** -0.5
    return mistakes.chunks(scale=lambda d, dv: 1.0)(q, k, v, window)


def one_key_more_by_loop(q, k, v, window):
    """Each query reads one key more than the window holds."""
    return window_by_loop(q, k, v, window + 1)


def dense_by_loop(q, k, v, window):
    """Each query reads its whole past."""
    return window_by_loop(q, k, v, len(q))


def window_by_exp(largest):
    """Chunks, with exp of the scores less `largest` of them, over its sum."""

    def answer(q, k, v, window):
        out = []
        for first in range(0, len(q), window):
            end = min(first + window, len(q))
            low = max(0, first - window + 1)
            behind = torch.arange(first, end)[:, None] - torch.arange(low, end)
            scores = q[first:end] @ k[low:end].T * q.shape[1] ** -0.5
            scores = scores.masked_fill((behind < 0) | (behind >= window), -torch.inf)
            e = (scores - largest(scores)).exp()
            out.append(e @ v[low:end] / e.sum(1, keepdim=True))
        return torch.cat(out)

    return answer


def all_scores_in_numpy(q, k, v, window):
    """A square of scores that PyTorch does not see."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    behind = np.arange(len(q))[:, None] - np.arange(len(q))
    scores = np.where((behind >= 0) & (behind < window), q @ k.T / q.shape[1] ** 0.5, -np.inf)
    e = np.exp(scores - scores.max(1, keepdims=True))
    return torch.from_numpy(e @ v / e.sum(1, keepdims=True))


def all_scores_in_lists(q, k, v, window):
    """A square of scores in Python's own lists."""
    scores = [row.tolist() for row in (x @ k.T * q.shape[1] ** -0.5 for x in q)]
    first = [max(0, t - window + 1) for t in range(len(q))]
    rows = [
        torch.tensor(row[a : t + 1]) for t, (row, a) in enumerate(zip(scores, first, strict=True))
    ]
    return torch.stack([p.softmax(0) @ v[a : a + len(p)] for p, a in zip(rows, first, strict=True)])


def all_scores_row_by_row(q, k, v, window):
    """A square of scores as T tensors."""
    rows = [k @ x * q.shape[1] ** -0.5 for x in q]
    out = []
    for t, row in enumerate(rows):
        behind = t - torch.arange(len(k))
        out.append(row.masked_fill((behind < 0) | (behind >= window), -torch.inf).softmax(0) @ v)
    return torch.stack(out)


def band_for_torch(q, k, v, window):
    """PyTorch's fused attention with a square mask."""
    behind = torch.arange(len(q))[:, None] - torch.arange(len(k))
    seen = (behind >= 0) & (behind < window)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen)[0]


def one_row_of_all_keys(q, k, v, window):
    """Query by query, with all keys for each."""
    out = []
    for t in range(len(q)):
        behind = t - torch.arange(len(k))
        row = (k @ q[t] * q.shape[1] ** -0.5).masked_fill(
            (behind < 0) | (behind >= window), -torch.inf
        )
        out.append(row.softmax(0) @ v)
    return torch.stack(out)


def lowered(q, k, v, window):
    """Keys that are not read are lowered by a fixed number, and may still be above."""
    out = []
    for first in range(0, len(q), window):
        end = min(first + window, len(q))
        low = max(0, first - window + 1)
        behind = torch.arange(first, end)[:, None] - torch.arange(low, end)
        hidden = (behind < 0) | (behind >= window)
        scores = q[first:end] @ k[low:end].T * q.shape[1] ** -0.5 - 1e4 * hidden
        out.append(scores.softmax(-1) @ v[low:end])
    return torch.cat(out)


WINDOWS = [
    Wrong("others lowered by 1e4", lowered, "later keys far above: query 0"),
    Wrong(
        "largest score from 0 on",
        window_by_exp(lambda scores: scores.amax(1, keepdim=True).clamp(min=0)),
        "of a very negative one it is 0",
    ),
    Wrong("no largest score", window_by_exp(lambda scores: 0.0), "exp of a large score overflows"),
    Wrong("one largest score a chunk", window_by_exp(torch.amax), "of a very negative one it is 0"),
    Wrong(
        "windows of 4 always", lambda q, k, v, w: window_by_loop(q, k, v, 4), "there is no window"
    ),
    Wrong("scale for a width of 4", mistakes.chunks(scale=lambda *d: 0.5), "which is wrong"),
    Wrong("all scores in NumPy", all_scores_in_numpy, "numbers were held at once for 400"),
    Wrong("all scores in lists", all_scores_in_lists, "numbers were held at once for 400"),
    Wrong("all scores row by row", all_scores_row_by_row, "numbers were held at once for 400"),
    Wrong("a square mask for PyTorch", band_for_torch, "numbers were held at once for 400"),
    Wrong(
        "all earlier keys for each chunk",
        mistakes.chunks(low=lambda first, w: 0),
        "key 0 or 29 was read for query 8, which needs keys 5 to 8",
    ),
    Wrong(
        "two chunks back",
        mistakes.chunks(low=lambda first, w: max(0, first - 2 * w)),
        "key 0 or 29 was read for query 8",
    ),
    Wrong("all keys for each query", one_row_of_all_keys, "key 0 or 29 was read for query 8"),
    *planted(
        mistakes.WINDOWS,
        {
            "w + 1 keys": "query 4 reads key 0 too: that makes 5 keys",
            "own key left out": "query 0 does not read its own key",
            "only the window's edge": "query 0 reads keys that come after it",
            "the chunk's own keys only": "query 4 reads only keys of its own chunk",
        },
    ),
    Wrong(
        "w + 1 keys, by loop",
        one_key_more_by_loop,
        "query 4 reads key 0 too: that makes 5 keys",
    ),
    Wrong("dense", dense_by_loop, "there is no window"),
    Wrong(
        "the short chunk dropped",
        mistakes.chunks(count=lambda length, w: length // w),
        "a last chunk that is short: the shape is (8, 3)",
    ),
    Wrong("all scores, then the band", all_scores, "numbers were held at once for 400"),
    Wrong("queries scaled in place", scaled_in_place, "changed its input q"),
]

# --- 04.3 ---


def gates_by_einsum(logits, compressed, selected, window):
    """The three branches stacked, and one contraction."""
    gates = torch.sigmoid(logits).view(len(logits), -1, 3)
    return torch.einsum("thc,chtd->htd", gates, torch.stack([compressed, selected, window]))


def gates_by_columns(logits, compressed, selected, window):
    """One column of gates at a time."""
    out = torch.zeros_like(compressed)
    for column, gate in enumerate(logits.sigmoid().T):
        head, branch = divmod(column, 3)
        out[head] += gate[:, None] * (compressed, selected, window)[branch][head]
    return out


def gates_in_double(logits, compressed, selected, window):
    """Every third column is a branch; the sigmoid by another name, in double."""
    g = 0.5 + 0.5 * torch.tanh(logits.double() / 2)  # the sigmoid by another name
    parts = [
        g[:, c::3].T.unsqueeze(-1) * branch
        for c, branch in enumerate((compressed, selected, window))
    ]
    return parts[2] + parts[1] + parts[0]


def softmax_by_columns(logits, compressed, selected, window):
    """Each head's three columns through a softmax, head after head."""
    out = torch.zeros_like(compressed)
    for h, columns in enumerate(logits.split(3, 1)):
        gates = columns.softmax(1)
        for c, branch in enumerate((compressed, selected, window)):
            out[h] += gates[:, c, None] * branch[h]
    return out


def gates_by(gate):
    """The gated sum with another gate."""
    return mistakes.mix(gate)


def summed_into_compressed(logits, compressed, selected, window):
    """Right, but for a branch, which the caller still needs."""
    out = gates_by_einsum(logits, compressed, selected, window)
    return compressed.copy_(out)


GATES = [
    *planted(mistakes.GATES),
    Wrong("exp / (1 + exp)", gates_by(lambda x: x.exp() / (1 + x.exp())), "a gate is not finite"),
    Wrong(
        "exp relative to one largest",
        gates_by(lambda x: (x - x.amax()).exp() / ((-x.amax()).exp() + (x - x.amax()).exp())),
        "a gate is not finite",
    ),
    Wrong("between bounds", gates_by(lambda x: x.clamp(-5, 5).sigmoid()), "0.99 times the sum"),
    Wrong("a broken line", gates_by(F.hardsigmoid), "which is wrong"),
    Wrong("base 2", gates_by(lambda x: 1 / (1 + torch.exp2(-x))), "which is wrong"),
    Wrong("tanh", gates_by(lambda x: (1 + torch.tanh(x)) / 2), "one of twice its slope"),
    Wrong(
        "two heads always",
        lambda logits, *x: gates_by_einsum(logits.unflatten(1, (2, 3)).flatten(1), *x),
        "raised RuntimeError",
    ),
    Wrong("summed into a branch", summed_into_compressed, "changed its input compressed"),
    Wrong(
        "gates in place",
        lambda logits, *x: mistakes.mix(lambda g: g)(logits.sigmoid_(), *x),
        "changed its input logits",
    ),
    Wrong("softmax, by columns", softmax_by_columns, "the three gates are a softmax"),
    Wrong(
        "branches in reverse, by einsum",
        lambda logits, *branches: gates_by_einsum(logits, *reversed(branches)),
        "in the reverse order",
    ),
    Wrong(
        "queries before heads",
        lambda *x: gates_by_einsum(*x).transpose(0, 1),
        "the shape is",
    ),
    Wrong("nothing returned", lambda *x: None, "returned None"),
]

# --- 04.4 ---


def parts_by_two_leaves(loss, weight):
    """Two copies of the weight, and one backward pass."""
    leaves = [weight.detach().clone().requires_grad_() for _ in range(2)]
    loss(*leaves).backward()
    return tuple(torch.zeros_like(weight) if x.grad is None else x.grad for x in leaves)


def parts_one_at_a_time(loss, weight):
    """One copy at a time; the other place holds the weight itself."""
    far, window = (weight.clone().requires_grad_() for _ in range(2))
    losses = (loss(far, weight), far), (loss(weight, window), window)
    return [
        torch.autograd.grad(x, leaf)[0] if x.requires_grad else torch.zeros_like(weight)
        for x, leaf in losses
    ]


def parts_from_a_stack(loss, weight):
    """One leaf that holds both."""
    both = torch.stack([weight, weight]).requires_grad_()
    return torch.autograd.grad(loss(both[0], both[1]), both)[0].unbind()


def shared(finish):
    """One leaf in both places, so that its gradient is the sum of the two."""

    def answer(loss, weight):
        leaf = weight.clone().requires_grad_()
        return finish(torch.autograd.grad(loss(leaf, leaf), leaf)[0])

    return answer


def others_zero(loss, weight):
    """Each gradient where the other branch's weight is 0, by two backward passes."""
    nothing = torch.zeros_like(weight)
    far, window = (weight.clone().requires_grad_() for _ in range(2))
    loss(far, nothing).backward()
    alone = loss(nothing, window)
    if alone.requires_grad:
        alone.backward()
    return far.grad, nothing if window.grad is None else window.grad


def unused_is_none(loss, weight):
    """None where a weight is not used."""
    leaves = [weight.clone().requires_grad_() for _ in range(2)]
    return torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)


def unused_raises(loss, weight):
    """An error where a weight is not used."""
    leaves = [weight.clone().requires_grad_() for _ in range(2)]
    return torch.autograd.grad(loss(*leaves), leaves)


def weight_as_a_leaf(loss, weight):
    """The weight itself is one of the leaves."""
    weight.requires_grad_()
    window = weight.detach().clone().requires_grad_()
    loss(weight, window).backward()
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in (weight, window)]


def parts_by_steps_of(size):
    """Differences of the loss at two weights, `size` away on both sides."""

    def answer(loss, weight):
        found = torch.zeros(2, *weight.shape, dtype=weight.dtype)
        for index in range(weight.numel()):
            step = torch.zeros_like(weight)
            step.view(-1)[index] = size
            far = loss(weight + step, weight) - loss(weight - step, weight)
            window = loss(weight, weight + step) - loss(weight, weight - step)
            found[0].view(-1)[index] = far / (2 * size)
            found[1].view(-1)[index] = window / (2 * size)
        return found[0], found[1]

    return answer


def of_the_first_weight():
    """The parts of the first call, for all later ones of the same shape."""
    found = {}
    return lambda loss, w: found.setdefault(w.shape, parts_by_two_leaves(loss, w))


PARTS = [
    Wrong("the weight itself as a leaf", weight_as_a_leaf, "requires gradients now"),
    Wrong("steps of 0.01", parts_by_steps_of(0.01), "which is wrong"),
    Wrong("steps of 1", parts_by_steps_of(1.0), "which is wrong"),
    Wrong("kept from the first weight", of_the_first_weight(), "which is wrong"),
    Wrong(
        "far twice",
        lambda loss, w: [parts_by_two_leaves(loss, w)[0]] * 2,
        "are the sum of the two parts",
    ),
    *planted(mistakes.PARTS),
    Wrong(
        "the sum, twice, from one leaf", shared(lambda g: (g, g)), "are the sum of the two parts"
    ),
    Wrong("the sum, halved, from one leaf", shared(lambda g: (g / 2, g / 2)), "half of the sum"),
    Wrong("the other weight 0, by backward", others_zero, "was set to 0 to measure the other"),
    Wrong("the sum, once", shared(lambda g: g), "a Tensor, and 2 results were asked for"),
    Wrong("an unused weight gives None", unused_is_none, "through the window is None"),
    Wrong("an unused weight raises", unused_raises, "raised RuntimeError"),
    Wrong(
        "sizes of the gradients",
        lambda loss, w: [g.norm() for g in parts_by_two_leaves(loss, w)],
        "the shape is (), and (3, 2) was asked for",
    ),
]

# --- 04.5 ---


def attend(q, k, v):
    """Attention of one query."""
    return torch.softmax(k @ q / q.shape[0] ** 0.5, 0) @ v


def decode_with_lists(cache, q, k, v, gates, window, block_size, stride):
    """Lists of rows; the window drops its oldest."""
    if not cache:
        cache.update(window=[], tail=[], blocks=[], seen=0)
    cache["seen"] += 1
    cache["window"].append((k[1], v[1]))
    cache["tail"].append((k[0], v[0]))
    if len(cache["window"]) > window:
        cache["window"].pop(0)
    if len(cache["tail"]) == block_size:
        cache["blocks"].append(
            [torch.stack(rows).mean(0) for rows in zip(*cache["tail"], strict=True)]
        )
        cache["tail"] = cache["tail"][stride:]
    out = torch.zeros_like(v[0])
    for gate, rows in zip(gates, (cache["blocks"], cache["window"]), strict=True):
        if rows:
            out = out + gate * attend(q, *(torch.stack(x) for x in zip(*rows, strict=True)))
    return out


def decode_with_a_ring(cache, q, k, v, gates, window, block_size, stride):
    """Token t lies in place t % w: the order of keys does not matter to a softmax."""
    if not cache:
        cache["t"] = 0
        for name, size in (("near", window), ("raw", block_size)):
            cache[name] = torch.zeros(size, k.shape[1]), torch.zeros(size, v.shape[1])
        cache["short"] = k[:0, :], v[:0, :]
    t = cache["t"]
    for name, branch, size in (("near", 1, window), ("raw", 0, block_size)):
        for buffer, new in zip(cache[name], (k[branch], v[branch]), strict=True):
            buffer[t % size] = new
    if t >= block_size - 1 and (t - block_size + 1) % stride == 0:
        cache["short"] = tuple(
            torch.cat([old, raw.mean(0, keepdim=True)])
            for old, raw in zip(cache["short"], cache["raw"], strict=True)
        )
    cache["t"] = t + 1
    near = [x[: t + 1] for x in cache["near"]]
    return gates[0] * attend(q, *cache["short"]) + gates[1] * attend(q, *near)


def decode_in_double(cache, q, k, v, gates, window, block_size, stride):
    """Keys and values side by side, in double."""
    row = torch.cat([k, v], 1).double()  # keys and values side by side
    for name, new in (("raw", row[0]), ("near", row[1])):
        cache[name] = torch.cat([cache.get(name, row[:0]), new[None]])
    cache["near"] = cache["near"][-window:]
    if len(cache["raw"]) == block_size:
        cache.setdefault("short", []).append(cache["raw"].sum(0) / block_size)
        cache["raw"] = cache["raw"][stride:].clone()
    out = torch.zeros(v.shape[1], dtype=torch.float64)
    width = k.shape[1]
    for gate, rows in ((gates[1], list(cache["near"])), (gates[0], cache.get("short", []))):
        if rows:
            both = torch.stack(rows)
            out += gate * attend(q.double(), both[:, :width], both[:, width:])
    return out


def decode_without_gates(cache, q, k, v, gates, window, block_size, stride):
    """Lists as in a right answer, and both gates open."""
    return decode_with_lists(cache, q, k, v, torch.ones(2), window, block_size, stride)


def decode_with_a_longer_window(cache, q, k, v, gates, window, block_size, stride):
    """A ring with one place more."""
    return decode_with_a_ring(cache, q, k, v, gates, window + 1, block_size, stride)


def all_tokens_kept(store):
    """Everything from the past, in what store(cache) gives: a list of keys and values."""

    def answer(cache, q, k, v, gates, window, block_size, stride):
        rows = store(cache)
        rows.append((k.clone(), v.clone()))
        keys = torch.stack([row[0] for row in rows], 1)
        values = torch.stack([row[1] for row in rows], 1)
        out = gates[1] * attend(q, keys[1, -window:], values[1, -window:])
        starts = range(0, len(rows) - block_size + 1, stride)
        if starts:
            means = [[x[0, s : s + block_size].mean(0) for s in starts] for x in (keys, values)]
            out = out + gates[0] * attend(q, *map(torch.stack, means))
        return out

    return answer


class Box:
    """Something that holds a list."""

    def __init__(self):
        self.rows = []


class Arrays(list):
    """A list of pairs of tensors that holds NumPy's arrays."""

    def append(self, pair):
        super().append(tuple(x.numpy() for x in pair))

    def __iter__(self):
        return (tuple(map(torch.from_numpy, pair)) for pair in super().__iter__())


def in_a_closure(cache):
    """The list that a function in the cache remembers."""
    if not cache:
        rows = []
        cache["rows"] = lambda: rows
    return cache["rows"]()


def state_outside():
    """One cache for all sequences, emptied when a new one begins."""
    own = {}

    def answer(cache, *token):
        if not cache:
            own.clear()
            cache["begun"] = True
        return decode_with_lists(own, *token)

    return answer


def state_by_id():
    """The state of each cache lies outside of it, under its id, so that it looks small."""
    own = {}

    def answer(cache, *token):
        if not cache:
            own[id(cache)] = {}
            cache["begun"] = True
        return decode_with_lists(own.setdefault(id(cache), {}), *token)

    return answer


def decode_by_exp(largest):
    """As in a right answer, but for exp of the scores less `largest` of them."""

    def weigh(q, k, v):
        scores = k @ q / q.shape[0] ** 0.5
        e = (scores - largest(scores)).exp()
        return e @ v / e.sum()

    def answer(cache, q, k, v, gates, window, block_size, stride):
        decode_with_lists(cache, q, k, v, gates, window, block_size, stride)
        near = weigh(q, *(torch.stack(x) for x in zip(*cache["window"], strict=True)))
        if not cache["blocks"]:
            return gates[1] * near
        short = weigh(q, *(torch.stack(x) for x in zip(*cache["blocks"], strict=True)))
        return gates[0] * short + gates[1] * near

    return answer


def query_scaled_in_place(cache, q, k, v, gates, window, block_size, stride):
    """Right, but for q, which the caller still needs."""
    q *= 2
    return decode_with_lists(cache, q / 2, k, v, gates, window, block_size, stride)


STEPS = [
    Wrong("state outside the cache", state_outside(), "keep all state in `cache`"),
    Wrong("state of each cache's id", state_by_id(), "keep all state in `cache`"),
    Wrong("all tokens kept", all_tokens_kept(lambda c: c.setdefault("x", [])), "the cache holds"),
    Wrong(
        "all tokens kept by NumPy",
        all_tokens_kept(lambda cache: cache.setdefault("rows", Arrays())),
        "the cache holds",
    ),
    Wrong(
        "all tokens kept in an object",
        all_tokens_kept(lambda cache: cache.setdefault("box", Box()).rows),
        "the cache holds",
    ),
    Wrong("all tokens kept in a closure", all_tokens_kept(in_a_closure), "the cache holds"),
    Wrong("no largest score", decode_by_exp(lambda scores: 0.0), "exp of a large score"),
    Wrong(
        "largest score from 0 on",
        decode_by_exp(lambda scores: scores.max().clamp(min=0)),
        "of a very negative one it is 0",
    ),
    Wrong("q in place", query_scaled_in_place, "changed its input q"),
    Wrong(
        "blocks of 4 always",
        lambda cache, q, k, v, g, w, l, d: decode_with_lists(cache, q, k, v, g, w, 4, d),
        "which is wrong",
    ),
    Wrong(
        "the last token for its block",
        lambda cache, q, k, v, g, w, l, d: mistakes.step(tail=lambda _: 1)(
            cache, q, k, v, g, w, l, d
        ),
        "which is wrong",
    ),
    *planted(
        mistakes.STEPS,
        {
            "w + 1 keys": "query 3: the window reads 4 keys",
            "blocks before they are whole": "query 1 reads a block of fewer than 4 tokens",
            "a block is read one token late": "query 3 ends a block",
        },
    ),
    Wrong("no gates, by lists", decode_without_gates, "added without their gates"),
    Wrong("w + 1 keys, in a ring", decode_with_a_longer_window, "the window reads 4 keys"),
    Wrong("keeps every raw token", mistakes.step(tail=lambda l: None), "the cache holds"),
    Wrong("nothing returned", lambda cache, *x: None, "returned None"),
]

RIGHT = {
    "04.1": [keys_by_listing, keys_by_walking_back, keys_by_slice],
    "04.2": [window_by_loop, window_by_unfold, window_in_double, window_by_vmap],
    "04.3": [gates_by_einsum, gates_by_columns, gates_in_double],
    "04.4": [parts_by_two_leaves, parts_one_at_a_time, parts_from_a_stack],
    "04.5": [decode_with_lists, decode_with_a_ring, decode_in_double],
}
WRONG = {"04.1": KEYS, "04.2": WINDOWS, "04.3": GATES, "04.4": PARTS, "04.5": STEPS}
