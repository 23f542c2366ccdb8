"""Set 01, dense attention and its cost: heads, softmax, pieces, a cache, and what it all costs."""

import torch

from exercises.compare import name_mistake, plain
from exercises.records import Case, Exercise, in_turn
from nsa_lite import loops

from . import mistakes

# --- 01.1 ---

# By hand: heads of a group stand side by side, R = H / G of them.
HEADS = {
    "two groups of four": dict(heads=8, kv_heads=2, groups_of=[0, 0, 0, 0, 1, 1, 1, 1]),
    "three groups of two": dict(heads=6, kv_heads=3, groups_of=[0, 0, 1, 1, 2, 2]),
    "two groups of three": dict(heads=6, kv_heads=2, groups_of=[0, 0, 0, 1, 1, 1]),
    "one group": dict(heads=4, kv_heads=1, groups_of=[0, 0, 0, 0]),
    "as many groups as heads": dict(heads=4, kv_heads=4, groups_of=[0, 1, 2, 3]),
}


def head_case(generator, name, heads, kv_heads, groups_of) -> Case:
    """The group of each head, written down by hand."""
    return Case(name, dict(heads=heads, kv_heads=kv_heads), groups_of, explain=explain_heads)


def explain_heads(got, expected, heads, kv_heads):
    """What is wrong with a list of groups."""
    groups = plain(got)
    if len(groups) != heads:
        return f"{heads} query heads, and the list has {len(groups)} entries"
    if not all(isinstance(g, int) for g in groups):
        return None
    for head, g in enumerate(groups):
        if not 0 <= g < kv_heads:
            return f"head {head} reads key/value head {g}, and there are 0 to {kv_heads - 1}"
    if groups == [h % kv_heads for h in range(heads)]:
        return (
            f"heads 0 and 1 of {heads} read different key/value heads: a group's heads are "
            "neighbours"
        )
    sizes = [groups.count(g) for g in range(kv_heads)]
    if len(set(sizes)) > 1:
        return f"the key/value heads serve {sizes} query heads: each serves equally many"
    head = next(h for h in range(heads) if groups[h] != expected[h])
    return f"head {head} reads key/value head {groups[head]}, which belongs to other heads"


# --- 01.2 ---

ATTENTION = {
    "one token": dict(length=1, width=4, value_width=4),
    "causal": dict(length=12, width=4, value_width=4),
    "values of another width": dict(length=8, width=4, value_width=6),
    "scale": dict(length=8, width=16, value_width=4, scale=2.0),
    "large scores": dict(length=8, width=4, value_width=4, scale=20.0),
}


def attention_case(generator, name, length, width, value_width, scale=1.0) -> Case:
    """Random q, k and v of one head, and the package's loop over them."""
    q = scale * torch.randn(length, width, generator=generator)
    k = scale * torch.randn(length, width, generator=generator)
    v = torch.randn(length, value_width, generator=generator)
    expected = loops.window_attention(q[None, None], k[None, None], v[None, None])[0, 0]
    return Case(name, dict(q=q, k=k, v=v), expected, ("query", "channel"), explain_attention)


def explain_attention(got, expected, q, k, v):
    """A row that is not finite, or a known mistake."""
    if not got.isfinite().all():
        t = int((~got.isfinite()).any(-1).nonzero()[0])
        if q.abs().max() > 15:
            return f"query {t} is not finite: exp of a large score overflows"
        return f"query {t} is not finite: does it see no key at all?"
    return name_mistake(got, mistakes.ATTENTION, (q, k, v), length=len(q))


# --- 01.3 ---

PIECES = {
    "two halves": dict(sizes=(4, 4)),
    "pieces of unequal weight": dict(sizes=(1, 9), scale=3.0),
    "four pieces": dict(sizes=(3, 3, 3, 3)),
    "an empty piece": dict(sizes=(4, 0, 4)),
    "nothing but empty pieces": dict(sizes=(0, 0)),
    "large log-sum-exps": dict(sizes=(4, 4), shift=500.0),
}


def merge_case(generator, name, sizes, scale=1.0, shift=0.0) -> Case:
    """A row of keys is cut into pieces; the merged pieces must be attention to the whole row."""
    keys = sum(sizes)
    q = torch.randn(3, 4, generator=generator) * scale
    k = torch.randn(keys, 4, generator=generator)
    v = torch.randn(keys, 2, generator=generator)
    pieces = [
        attention_by_rows(q, one_k, one_v)
        for one_k, one_v in zip(k.split(sizes), v.split(sizes), strict=True)
    ]
    outs = torch.stack([out for out, _ in pieces])
    lses = torch.stack([lse for _, lse in pieces]) + shift
    out, lse = attention_by_rows(q, k, v)
    axes = {"out": ("query", "channel"), "lse": ("query",)}
    return Case(name, dict(outs=outs, lses=lses), (out, lse + shift), axes, explain_merge)


def attention_by_rows(q, k, v):
    """The package's softmax of each row: out (T, Dv) and lse (T,)."""
    rows = [loops.softmax_rows(query, k, v, 0.5) for query in q]
    return torch.stack([out for out, _ in rows]), torch.tensor([lse for _, lse in rows])


def explain_merge(got, expected, outs, lses):
    """NaN, or a known mistake in the output or else in the lse."""
    empty = expected[1] == -torch.inf
    if empty.any():
        if got[0].isnan().any() or got[1].isnan().any():
            return "the merge is NaN where all pieces are empty: -inf minus -inf"
        return None
    if got[0].isnan().any() or not got[1].isfinite().all():
        if (lses == -torch.inf).any():
            return "NaN or infinite: a piece is empty"
        return "not finite: exp of a large log-sum-exp overflows"
    pieces = (outs, lses)
    said = name_mistake(got, mistakes.SHARES, pieces, part=lambda result: result[0])
    return said or name_mistake(got, mistakes.TOTALS, pieces)


# --- 01.4 ---

COSTS = {
    "one head": dict(length=10, heads=1, kv_heads=1, head_dim=6, value_dim=6),
    "heads with their own keys": dict(length=10, heads=4, kv_heads=4, head_dim=6, value_dim=6),
    "heads that share keys": dict(length=10, heads=6, kv_heads=2, head_dim=6, value_dim=6),
    "values of another width": dict(length=10, heads=6, kv_heads=2, head_dim=8, value_dim=5),
    "two bytes a number": dict(
        length=7, heads=6, kv_heads=2, head_dim=8, value_dim=5, bytes_per_number=2
    ),
}


def cost_case(generator, name, bytes_per_number=4, **sizes) -> Case:
    """Work and bytes, counted one by one."""
    arguments = dict(**sizes, bytes_per_number=bytes_per_number)
    return Case(name, arguments, counted(**arguments), {"flops": (), "bytes": ()}, explain_cost)


def counted(length, heads, kv_heads, head_dim, value_dim, bytes_per_number) -> tuple[int, int]:
    """One multiplication and one addition at a time, one number loaded at a time."""
    flops = 0
    loaded = 0
    for _head in range(heads):
        for _key in range(length):
            flops += sum(2 for _ in range(head_dim))  # the score
            flops += sum(2 for _ in range(value_dim))  # the weighted value
    for _group in range(kv_heads):
        for _key in range(length):
            loaded += head_dim + value_dim
    return flops, loaded * bytes_per_number


def explain_cost(got, expected, **sizes):
    """A known mistake in the work, or else in the bytes."""
    arguments = tuple(sizes.values())
    if got[0] != expected[0]:
        return name_mistake(got, mistakes.FLOPS, arguments, part=lambda result: result[0])
    return name_mistake(got, mistakes.BYTES, arguments, part=lambda result: result[1])


# --- 01.5 ---

DECODE = {
    "one token after a cache of nine": dict(start=9, queries=1),
    "a whole sequence": dict(start=0, queries=8),
    "three tokens after five": dict(start=5, queries=3),
    "a cache with room left": dict(start=5, queries=3, room=4),
    "heads of three groups": dict(start=6, queries=2, heads=6, groups=3),
    "two sequences": dict(start=4, queries=2, batch=2),
}


def decode_case(generator, name, start, queries, room=0, heads=4, groups=2, batch=1) -> Case:
    """The last queries of a sequence; `room` places of the cache are not written yet."""

    def numbers(*shape):
        return torch.randn(*shape, generator=generator)

    last = start + queries
    q = numbers(batch, heads, last, 4)
    k = numbers(batch, groups, last, 4)
    v = numbers(batch, groups, last, 3)
    whole = loops.window_attention(q, k, v)  # all queries from position 0 on
    # Places of the cache that are not written yet hold what was left in memory.
    k, v = (torch.cat([x, 50 + numbers(batch, groups, room, x.shape[3])], 2) for x in (k, v))
    return Case(
        name,
        dict(q=q[:, :, start:].contiguous(), k=k, v=v, start=start),
        whole[:, :, start:],
        ("batch", "head", "query", "channel"),
        explain_decode,
    )


def explain_decode(got, expected, q, k, v, start):
    """A known mistake, with the positions of this case."""
    places = k.shape[2]
    return name_mistake(
        got,
        mistakes.DECODE,
        (q, k, v, start),
        start=start,
        places=places,
        last=start + q.shape[2] - 1,
        end=places - 1,
    )


EXERCISES = [
    Exercise(
        "01.1",
        "Which head reads which keys",
        "warm-up",
        5,
        in_turn(head_case, HEADS),
        hints=(
            "How many query heads share one key/value head? Which ones are they?",
            "R = H / G heads form a group; the group of head h is h / R, rounded down.",
            "a list over h of a whole-number division",
        ),
    ),
    Exercise(
        "01.2",
        "Causal attention",
        "core",
        15,
        in_turn(attention_case, ATTENTION),
        hints=(
            "Which keys may query t read? What must a score be for its weight to be exactly 0?",
            "p = softmax over the keys s <= t of q k^T / sqrt(D); out = p v",
            "scores (T, T); a lower triangle of True; fill the rest with -inf; softmax over the "
            "last axis; times v",
        ),
    ),
    Exercise(
        "01.3",
        "Merge the pieces of a softmax",
        "core",
        20,
        in_turn(merge_case, PIECES),
        hints=(
            "The lse is the logarithm of what a softmax divides by. What does the whole row divide "
            "by, if you know the lse of its pieces?",
            "lse = ln sum_p exp(lse_p); piece p has the share exp(lse_p - lse) of the output.",
            "logsumexp over the pieces; share = exp(lses - lse), with 0 where lse is -inf; sum of "
            "share times outs over the pieces",
        ),
    ),
    Exercise(
        "01.4",
        "What one decoded token costs",
        "core",
        10,
        in_turn(cost_case, COSTS),
        hints=(
            "Which numbers are loaded once for a whole group, and which work does every head do?",
            "flops = 2 (D + Dv) H T; bytes = (numbers of all keys and values) times the bytes of "
            "one number.",
            "2 for a multiply and an add, D of them for a score, Dv for a value; K and V hold "
            "G T (D + Dv) numbers",
        ),
    ),
    Exercise(
        "01.5",
        "Decode from a cache",
        "stretch",
        40,
        in_turn(decode_case, DECODE),
        hints=(
            "At which position does the query in row 0 stand? Which keys exist by then?",
            "Row t stands at start + t and reads the keys s <= start + t of key/value head "
            "h // (H / G).",
            "split axis H of q into (G, R), so that k and v broadcast over R; scores (B, G, R, T, "
            "S); mask s <= start + t; softmax; times v; join (G, R) again",
        ),
    ),
]
