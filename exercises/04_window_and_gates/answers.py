"""Planted wrong answers that the checks of set 04 must name, and right ones they must accept."""

import torch
import torch.nn.functional as F

from exercises.records import Wrong

# --- 04.1 ---


def keys_by_listing(t, window):
    return [s for s in range(t + 1) if t - s < window]


def keys_by_walking_back(t, window):
    keys = []
    while len(keys) < window and t - len(keys) >= 0:
        keys.append(t - len(keys))
    return keys[::-1]


def keys_by_slice(t, window):
    return torch.arange(t + 1)[-window:]


def keys_from(first, last=lambda t, w: t):
    """All keys from first to last, both included."""
    return lambda t, w: list(range(first(t, w), last(t, w) + 1))


KEYS = [
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
    out = []
    for t in range(len(q)):
        first = max(0, t + 1 - window)
        p = torch.softmax(k[first : t + 1] @ q[t] / q.shape[1] ** 0.5, 0)
        out.append(p @ v[first : t + 1])
    return torch.stack(out)


def window_by_unfold(q, k, v, window):
    # w - 1 empty places in front, so that every query has exactly w keys
    keys = F.pad(k, (0, 0, window - 1, 0)).unfold(0, window, 1)  # (T, D, w)
    values = F.pad(v, (0, 0, window - 1, 0)).unfold(0, window, 1)
    scores = torch.einsum("td,tdw->tw", q, keys) * q.shape[1] ** -0.5
    key = torch.arange(len(q))[:, None] - window + 1 + torch.arange(window)
    p = scores.masked_fill(key < 0, -torch.inf).softmax(-1)
    return torch.einsum("tw,tcw->tc", p, values)


def window_in_double(q, k, v, window):
    q, k, v, out = q.double(), k.double(), v.double(), v.double().clone()
    for end in range(len(q), 0, -window):  # chunks from the last query on
        begin = max(0, end - window)
        low = max(0, begin - window + 1)
        behind = torch.arange(begin, end)[:, None] - torch.arange(low, end)
        e = (q[begin:end] @ k[low:end].T / q.shape[1] ** 0.5).exp()
        e = e * (behind >= 0) * (behind < window)
        out[begin:end] = e @ v[low:end] / e.sum(1, keepdim=True)
    return out


def chunks(
    sees=lambda t, s, w: (s <= t) & (s > t - w),
    scale=lambda width: width**-0.5,
    low=lambda first, w: max(0, first - w + 1),
    count=lambda length, w: -(-length // w),
):
    """The right answer with one step changed."""

    def answer(q, k, v, window):
        out = []
        for i in range(count(len(q), window)):
            first, end = i * window, min((i + 1) * window, len(q))
            keys = slice(low(first, window), end)
            t, s = torch.arange(first, end)[:, None], torch.arange(len(k))[keys]
            scores = q[first:end] @ k[keys].T * scale(q.shape[1])
            scores = scores.masked_fill(~sees(t, s, window), -torch.inf)
            out.append(scores.softmax(-1) @ v[keys])
        return torch.cat(out)

    return answer


def all_scores(q, k, v, window):
    behind = torch.arange(len(q))[:, None] - torch.arange(len(k))
    scores = (q @ k.T * q.shape[1] ** -0.5).masked_fill(behind < 0, -torch.inf)
    return scores.masked_fill(behind >= window, -torch.inf).softmax(-1) @ v


def scaled_in_place(q, k, v, window):
    q *= q.shape[1] ** -0.5
    return chunks(scale=lambda width: 1.0)(q, k, v, window)


WINDOWS = [
    Wrong(
        "w + 1 keys",
        chunks(lambda t, s, w: (s <= t) & (s >= t - w), low=lambda first, w: max(0, first - w)),
        "query 4 reads key 0 too: that makes 5 keys",
    ),
    Wrong(
        "w + 1 keys, but not at a chunk's start",
        chunks(lambda t, s, w: (s <= t) & (s >= t - w)),
        "only the first query of a chunk is right",
    ),
    Wrong(
        "no mask",
        chunks(lambda t, s, w: (s >= 0) & (t >= 0)),
        "reads every key of its chunk's slice",
    ),
    Wrong(
        "only the causal mask",
        chunks(lambda t, s, w: s <= t),
        "older than its window, from where its chunk's slice begins",
    ),
    Wrong(
        "only the window's edge",
        chunks(lambda t, s, w: s > t - w),
        "query 0 reads keys that come after it",
    ),
    Wrong(
        "the chunk's own keys only",
        chunks(low=lambda first, w: first),
        "query 4 reads only keys of its own chunk",
    ),
    Wrong("dense", lambda q, k, v, w: window_by_loop(q, k, v, len(q)), "there is no window"),
    Wrong("no scale", chunks(scale=lambda width: 1.0), "not divided by the root"),
    Wrong(
        "scale by the width",
        chunks(scale=lambda width: 1 / width),
        "divided by the width, not by its root",
    ),
    Wrong(
        "the short chunk dropped",
        chunks(count=lambda length, w: length // w),
        "a last chunk that is short: the shape is (8, 3)",
    ),
    Wrong("all scores, then the band", all_scores, "a tensor of 16384 numbers"),
    Wrong("queries scaled in place", scaled_in_place, "changed its input q"),
]

# --- 04.3 ---


def gates_by_einsum(logits, compressed, selected, window):
    gates = torch.sigmoid(logits).view(len(logits), -1, 3)
    return torch.einsum("thc,chtd->htd", gates, torch.stack([compressed, selected, window]))


def gates_by_columns(logits, compressed, selected, window):
    out = torch.zeros_like(compressed)
    for column, gate in enumerate(logits.sigmoid().T):
        head, branch = divmod(column, 3)
        out[head] += gate[:, None] * (compressed, selected, window)[branch][head]
    return out


def gates_in_double(logits, compressed, selected, window):
    g = 0.5 + 0.5 * torch.tanh(logits.double() / 2)  # the sigmoid by another name
    parts = [
        g[:, c::3].T.unsqueeze(-1) * x
        for c, x in enumerate((window, selected, compressed))
        for c in (2 - c,)
    ]
    return parts[0] + parts[1] + parts[2]


def mix(
    gate=torch.sigmoid,
    split=lambda logits, heads: logits.unflatten(1, (heads, 3)).transpose(0, 1),
    after=lambda out: out,
):
    """The right answer with one step changed."""

    def answer(logits, *branches):
        g = gate(split(logits, len(branches[0])))  # (H, T, 3)
        return after(sum(g[..., c, None] * branch for c, branch in enumerate(branches)))

    return answer


def normalised(logits):
    g = logits.sigmoid()
    return g / g.sum(-1, keepdim=True)


GATES = [
    Wrong("softmax", mix(lambda logits: logits.softmax(-1)), "the three gates are a softmax"),
    Wrong("sigmoid, then normalised", mix(normalised), "divided by their sum"),
    Wrong("no sigmoid", mix(lambda logits: logits), "the logits themselves weigh the branches"),
    Wrong("mean of the branches", mix(after=lambda out: out / 3), "is divided by 3"),
    Wrong(
        "branch by branch",
        mix(split=lambda x, heads: x.unflatten(1, (3, heads)).permute(2, 0, 1)),
        "they go head by head",
    ),
    Wrong(
        "a view instead of a transpose",
        mix(split=lambda x, heads: x.reshape(heads, -1, 3)),
        "without moving the axis of queries",
    ),
    Wrong(
        "one gate for all heads",
        mix(lambda x: x[:1].sigmoid().expand_as(x)),
        "every head uses the gates of head 0",
    ),
    Wrong(
        "gates averaged over heads",
        mix(lambda x: x.sigmoid().mean(0, True).expand_as(x)),
        "the mean of all heads' gates",
    ),
    Wrong("branches in reverse", mix(lambda x: x.sigmoid().flip(-1)), "in the reverse order"),
    Wrong("queries before heads", mix(after=lambda out: out.transpose(0, 1)), "the shape is"),
    Wrong("nothing returned", lambda *x: None, "returned None"),
]

# --- 04.4 ---


def parts_by_two_leaves(loss, weight):
    leaves = [weight.detach().clone().requires_grad_() for _ in range(2)]
    loss(*leaves).backward()
    return tuple(torch.zeros_like(weight) if x.grad is None else x.grad for x in leaves)


def parts_one_at_a_time(loss, weight):
    far, window = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    losses = (loss(far, weight), far), (loss(weight, window), window)
    return [
        torch.autograd.grad(x, leaf)[0] if x.requires_grad else torch.zeros_like(weight)
        for x, leaf in losses
    ]


def parts_from_a_stack(loss, weight):
    both = torch.stack([weight, weight]).requires_grad_()
    return torch.autograd.grad(loss(both[0], both[1]), both)[0].unbind()


def shared(finish):
    """One leaf in both places."""

    def answer(loss, weight):
        leaf = weight.clone().requires_grad_()
        return finish(torch.autograd.grad(loss(leaf, leaf), leaf)[0])

    return answer


def others_zero(loss, weight):
    nothing = torch.zeros_like(weight)
    far, window = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    loss(far, nothing).backward()
    alone = loss(nothing, window)
    if alone.requires_grad:
        alone.backward()
    return far.grad, nothing if window.grad is None else window.grad


def unused_is_none(loss, weight):
    leaves = [weight.clone().requires_grad_() for _ in range(2)]
    return torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)


def unused_raises(loss, weight):
    leaves = [weight.clone().requires_grad_() for _ in range(2)]
    return torch.autograd.grad(loss(*leaves), leaves)


PARTS = [
    Wrong("the sum, twice", shared(lambda g: (g, g)), "are the sum of the two parts"),
    Wrong("the sum, halved", shared(lambda g: (g / 2, g / 2)), "half of the sum"),
    Wrong("the sum, once", shared(lambda g: g), "a Tensor, and 2 results were asked for"),
    Wrong("window first", lambda loss, w: parts_by_two_leaves(loss, w)[::-1], "wrong order"),
    Wrong("the other weight 0", others_zero, "was set to 0 to measure the other"),
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
    return torch.softmax(k @ q / q.shape[0] ** 0.5, 0) @ v


def decode_with_lists(cache, q, k, v, gates, window, block_size, stride):
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
    # token t lies in place t % w: the order of keys does not matter to a softmax
    if not cache:
        cache["t"] = 0
        for name, size in (("near", window), ("raw", block_size)):
            cache[name] = torch.zeros(size, k.shape[1]), torch.zeros(size, v.shape[1])
        cache["short"] = k[:0, :], v[:0, :]
    t = cache["t"]
    for name, branch, size in (("near", 1, window), ("raw", 0, block_size)):
        cache[name][0][t % size], cache[name][1][t % size] = k[branch], v[branch]
    if t >= block_size - 1 and (t - block_size + 1) % stride == 0:
        cache["short"] = tuple(
            torch.cat([old, raw.mean(0, keepdim=True)])
            for old, raw in zip(cache["short"], cache["raw"], strict=True)
        )
    cache["t"] = t + 1
    near = [x[: t + 1] for x in cache["near"]]
    return gates[0] * attend(q, *cache["short"]) + gates[1] * attend(q, *near)


def decode_in_double(cache, q, k, v, gates, window, block_size, stride):
    row = torch.cat([k, v], 1).double()  # keys and values side by side
    for name, new in (("raw", row[0]), ("near", row[1])):
        cache[name] = torch.cat([cache.get(name, row[:0]), new[None]])
    cache["near"] = cache["near"][-window:]
    if len(cache["raw"]) == block_size:
        cache.setdefault("short", []).append(cache["raw"].sum(0) / block_size)
        cache["raw"] = cache["raw"][stride:].clone()
    out, width = torch.zeros(v.shape[1], dtype=torch.float64), k.shape[1]
    for gate, rows in ((gates[1], cache["near"]), (gates[0], cache.get("short"))):
        if rows is not None:
            rows = torch.stack(rows) if isinstance(rows, list) else rows
            out += gate * attend(q.double(), rows[:, :width], rows[:, width:])
    return out


def step(
    keep=lambda w: w,
    ends=lambda t, l, d: t + 1 >= l and (t + 1 - l) % d == 0,
    whose=(0, 1),
    own=True,
    gate=lambda gates: gates,
    tail=lambda l: l,
    late=False,
):
    """The right answer with one step changed."""

    def answer(cache, q, k, v, gates, window, block_size, stride):
        t = cache["t"] = cache.get("t", -1) + 1

        def rows(name, new=None, size=None):
            x = cache.get(name, k[:0] if name.endswith("k") else v[:0])
            if new is not None:
                x = torch.cat([x, new[None]])
                cache[name] = x[-size:] if size else x
            return cache.get(name, x)

        def compress():
            if ends(t, block_size, stride):
                rows("short k", raw_k[-block_size:].mean(0))
                rows("short v", raw_v[-block_size:].mean(0))

        before = rows("near k"), rows("near v")
        near = (
            rows("near k", k[whose[1]], keep(window)),
            rows("near v", v[whose[1]], keep(window)),
        )
        raw_k = rows("raw k", k[whose[0]], tail(block_size))
        raw_v = rows("raw v", v[whose[0]], tail(block_size))
        if not late:
            compress()
        short = rows("short k"), rows("short v")
        if late:
            compress()
        g = gate(gates)
        return g[0] * attend(q, *short) + g[1] * attend(q, *(near if own else before))

    return answer


def no_gates(gates):
    return torch.ones_like(gates)


STEPS = [
    Wrong("w + 1 keys", step(keep=lambda w: w + 1), "the window reads 4 keys"),
    Wrong("w - 1 keys", step(keep=lambda w: w - 1), "and the oldest is missing"),
    Wrong("the window never forgets", step(keep=lambda w: None), "the window reads all keys"),
    Wrong(
        "attends before it appends",
        step(keep=lambda w: w - 1, own=False),
        "does not hold the query's own key",
    ),
    Wrong(
        "blocks before they are whole",
        step(ends=lambda t, l, d: (t + 1) % d == 0),
        "query 1 reads a block of fewer than 4 tokens",
    ),
    Wrong(
        "blocks side by side",
        step(ends=lambda t, l, d: (t + 1) % l == 0),
        "the blocks lie side by side",
    ),
    Wrong(
        "a block at every token",
        step(ends=lambda t, l, d: t + 1 >= l),
        "a block is compressed at every token",
    ),
    Wrong("a block is read one token late", step(late=True), "query 3 ends a block"),
    Wrong("one pair of keys for both", step(whose=(1, 1)), "reads the window's keys and values"),
    Wrong("keys crossed", step(whose=(1, 0)), "keys and values"),
    Wrong("no gates", step(gate=no_gates), "added without their gates"),
    Wrong("gates crossed", step(gate=lambda gates: gates.flip(0)), "the other one's gate"),
    Wrong("keeps every raw token", step(tail=lambda l: None), "the cache holds"),
    Wrong("nothing returned", lambda cache, *x: None, "returned None"),
]

RIGHT = {
    "04.1": [keys_by_listing, keys_by_walking_back, keys_by_slice],
    "04.2": [window_by_loop, window_by_unfold, window_in_double],
    "04.3": [gates_by_einsum, gates_by_columns, gates_in_double],
    "04.4": [parts_by_two_leaves, parts_one_at_a_time, parts_from_a_stack],
    "04.5": [decode_with_lists, decode_with_a_ring, decode_in_double],
}
WRONG = {"04.1": KEYS, "04.2": WINDOWS, "04.3": GATES, "04.4": PARTS, "04.5": STEPS}
