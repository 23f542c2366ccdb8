"""Set 01, dense attention and its cost: heads, softmax, pieces, a cache, and what it all costs."""

import math

import torch
from torch import Tensor

from exercises.compare import matches, name_mistake, plain
from exercises.records import Case, Exercise, in_turn
from exercises.scores import EXTREME, OVERFLOW, far_below, rising
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
    "two groups of five": dict(heads=10, kv_heads=2, groups_of=[0] * 5 + [1] * 5),
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
    "causal": dict(length=12, width=6, value_width=4),
    "values of another width": dict(length=8, width=4, value_width=6),
    "scale": dict(length=8, width=16, value_width=3, scale=2.0),
    "large scores": dict(length=8, width=6, value_width=5, scale=20.0),
    "very negative scores": dict(length=9, width=4, value_width=5, below=30_000),
    "later keys far above": dict(length=10, width=4, value_width=7, rise=20_000),
    "equal scores": dict(length=70, width=6, value_width=3, scale=0.0),
}


def attention_case(  # noqa: PLR0913  what a row of the table may say
    generator, name, length, width, value_width, *, scale=1.0, below=0, rise=0
) -> Case:
    """Random q, k and v of one head, or scores of extreme sizes, and the package's loop."""
    q = scale * torch.randn(length, width, generator=generator)
    k = scale * torch.randn(length, width, generator=generator)
    if below:
        q, k = far_below(q, k, below)
    if rise:
        q, k = rising(q, k, rise)
    v = torch.randn(length, value_width, generator=generator)
    expected = loops.window_attention(q[None, None], k[None, None], v[None, None])[0, 0]
    return Case(name, dict(q=q, k=k, v=v), expected, ("query", "channel"), explain_attention)


def explain_attention(got, expected, q, k, v):
    """A row that is not finite, or a known mistake."""
    if not got.isfinite().all():
        t = int((~got.isfinite()).any(-1).nonzero()[0])
        if (q @ k.T * q.shape[1] ** -0.5).abs().max() > EXTREME:
            return f"query {t} is not finite: {OVERFLOW}"
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
    "one piece": dict(sizes=(5,), queries=5, width=3),
}
MERGED = {"out": ("query", "channel"), "lse": ("query",)}
E = -math.inf  # of an empty piece
LOGS = {  # the log-sum-exps of each piece
    "very negative log-sum-exps": dict(
        lses=[[-200, -201, -240], [-202, -199, E], [-203, E, -230]], width=5
    ),
    "very negative for some": dict(lses=[[-200, 0], [-202, 1]], width=4),
    "below every finite stand-in for -inf": dict(
        lses=[
            [-20_000, -20_040, E, 1, E],
            [-20_040, -20_000, -30_000, 0, E],
            [E, E, E, E, E],
            [E, -60_000, E, 2, E],
        ],
        width=6,
    ),
    "queries far apart": dict(
        lses=[[300, -300, 1, -150], [301, -302, 0, 2], [E, -301, E, 1]], width=7
    ),
    "a piece that is empty for some": dict(
        lses=[[E, -1, 2, E, 0], [1, E, 1, E, -2], [0, 2, E, E, E]], width=3
    ),
    "equal log-sum-exps": dict(lses=[[-150, -150, -150]] * 5, width=2),
}


def merge_cases(generator: torch.Generator) -> list[Case]:
    """Pieces of a whole row, and pieces of which only the log-sum-exps are given."""
    return [*in_turn(merge_case, PIECES)(generator), *in_turn(weighed_case, LOGS)(generator)]


def merge_case(generator, name, sizes, scale=1.0, shift=0.0, queries=3, width=2) -> Case:
    """A row of keys is cut into pieces; the merged pieces must be attention to the whole row."""
    keys = sum(sizes)
    q = torch.randn(queries, 4, generator=generator) * scale
    k = torch.randn(keys, 4, generator=generator)
    v = torch.randn(keys, width, generator=generator)
    pieces = [
        attention_by_rows(q, one_k, one_v)
        for one_k, one_v in zip(k.split(sizes), v.split(sizes), strict=True)
    ]
    outs = torch.stack([out for out, _ in pieces])
    lses = torch.stack([lse for _, lse in pieces]) + shift
    out, lse = attention_by_rows(q, k, v)
    return Case(name, dict(outs=outs, lses=lses), (out, lse + shift), MERGED, explain_merge)


def weighed_case(generator, name, lses, width) -> Case:
    """Random outputs of pieces, merged number by number; an empty one is 0."""
    lses = torch.tensor(lses, dtype=torch.float32)
    outs = torch.randn(*lses.shape, width, generator=generator)
    outs[lses == -torch.inf] = 0.0
    arguments = dict(outs=outs, lses=lses)
    return Case(name, arguments, weighed(outs, lses), MERGED, explain_merge)


def weighed(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Each piece has e^lse of the sum of e^lse, query by query."""
    out = torch.zeros(outs.shape[1:])
    lse = torch.full(lses.shape[1:], -torch.inf)
    for t, row in enumerate(lses.T.tolist()):
        top = max(row)
        if top > -math.inf:
            weights = [math.exp(one - top) for one in row]
            lse[t] = top + math.log(sum(weights))
            out[t] = sum(w / sum(weights) * outs[p, t] for p, w in enumerate(weights))
    return out, lse


def attention_by_rows(q, k, v):
    """The package's softmax of each row: out (T, Dv) and lse (T,)."""
    rows = [loops.softmax_rows(query, k, v, 0.5) for query in q]
    return torch.stack([out for out, _ in rows]), torch.tensor([lse for _, lse in rows])


def explain_merge(got, expected, outs, lses):
    """NaN, or a known mistake in the output or else in the lse."""
    empty = expected[1] == -torch.inf
    if got[0][empty].isnan().any() or got[1][empty].isnan().any():
        return "the merge is NaN where all pieces are empty: -inf minus -inf"
    if empty.all():
        return None
    lost = got[1][~empty] == -torch.inf
    if lost.any() or got[0].isnan().any() or not got[1][~empty].isfinite().all():
        if lses[lses > -torch.inf].abs().max() > EXTREME:
            return (
                "exp of a large log-sum-exp overflows, and of a very negative one it is 0: "
                "subtract the largest of a query's pieces first"
            )
        return "NaN or infinite: a piece is empty"
    pieces = (outs, lses)
    if not matches(got[0], expected[0]):
        return name_mistake(got, mistakes.SHARES, pieces, part=lambda result: result[0])
    return name_mistake(got, mistakes.TOTALS, pieces, part=lambda result: result[1])


# --- 01.4 ---

COSTS = {
    "one head": dict(length=10, heads=1, kv_heads=1, head_dim=6, value_dim=6),
    "heads with their own keys": dict(length=10, heads=4, kv_heads=4, head_dim=6, value_dim=6),
    "heads that share keys": dict(length=10, heads=6, kv_heads=2, head_dim=6, value_dim=6),
    "values of another width": dict(length=10, heads=6, kv_heads=2, head_dim=8, value_dim=5),
    "two bytes a number": dict(
        length=7, heads=6, kv_heads=2, head_dim=8, value_dim=5, bytes_per_number=2
    ),
    "three groups of five": dict(length=9, heads=15, kv_heads=3, head_dim=4, value_dim=7),
    "a long cache": dict(length=3_000, heads=64, kv_heads=4, head_dim=192, value_dim=128),
}


def cost_case(generator, name, bytes_per_number=4, **sizes) -> Case:
    """Work and bytes, counted one by one."""
    arguments = dict(**sizes, bytes_per_number=bytes_per_number)
    return Case(name, arguments, counted(**arguments), {"flops": (), "bytes": ()}, explain_cost)


def counted(length, heads, kv_heads, head_dim, value_dim, bytes_per_number) -> tuple[int, int]:
    """One multiplication and one addition at a time for a key, one key at a time."""
    score = sum(2 for _ in range(head_dim))
    value = sum(2 for _ in range(value_dim))
    flops = 0
    loaded = 0
    for _key in range(length):
        for _head in range(heads):
            flops += score + value
        for _group in range(kv_heads):
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
    "a whole sequence": dict(start=0, queries=8, width=6),
    "three tokens after five": dict(start=5, queries=3),
    "a cache with room left": dict(start=5, queries=3, room=4),
    "heads of three groups": dict(start=6, queries=2, heads=6, groups=3, width=10),
    "two sequences": dict(start=4, queries=2, batch=2),
    "groups of three heads": dict(start=3, queries=5, heads=6, batch=3, room=1, value_width=6),
    "one token, and NaN after it": dict(
        start=7, queries=1, heads=5, groups=1, batch=2, room=3, left=torch.nan
    ),
    "infinity after the last token": dict(start=2, queries=4, groups=4, room=2, left=torch.inf),
    "large scores": dict(start=5, queries=3, heads=3, groups=1, scale=20.0),
    "very negative scores": dict(start=4, queries=4, heads=6, below=30_000),
    "later keys far above": dict(start=3, queries=4, heads=6, groups=3, rise=20_000, room=1),
    "equal scores": dict(start=60, queries=10, heads=6, scale=0.0, room=2, left=torch.nan),
}


def decode_case(  # noqa: PLR0913  what a row of the table may say
    generator,
    name,
    start,
    queries,
    *,
    room=0,
    left=50.0,
    heads=4,
    groups=2,
    batch=1,
    width=4,
    value_width=3,
    scale=1.0,
    below=0,
    rise=0,
) -> Case:
    """The last queries of a sequence; `room` places of the cache hold what was left in memory."""

    def numbers(*shape):
        return torch.randn(*shape, generator=generator)

    last = start + queries
    q = scale * numbers(batch, heads, last, width)
    k = scale * numbers(batch, groups, last, width)
    v = numbers(batch, groups, last, value_width)
    if below:
        q, k = far_below(q, k, below)
    if rise:
        q, k = rising(q, k, rise)
    whole = loops.window_attention(q, k, v)  # all queries from position 0 on
    k, v = (torch.cat([x, left + numbers(batch, groups, room, x.shape[3])], 2) for x in (k, v))
    return Case(
        name,
        dict(q=q[:, :, start:].contiguous(), k=k, v=v, start=start),
        whole[:, :, start:],
        ("batch", "head", "query", "channel"),
        explain_decode,
    )


def explain_decode(got, expected, q, k, v, start):
    """A number that is not finite, or a known mistake, with the positions of this case."""
    places = k.shape[2]
    if not got.isfinite().all():
        end = start + q.shape[2]
        if end < places and not k[:, :, end:].isfinite().all():
            return (
                f"places {end} to {places - 1} of the cache are not written yet and hold anything, "
                "NaN too: a weight of 0 does not help, since 0 times NaN is NaN"
            )
        return OVERFLOW
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
        merge_cases,
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
            "cut k and v off behind the last query; split axis H of q into (G, R), so that k and v "
            "broadcast over R; scores (B, G, R, T, start + T); mask s <= start + t; softmax; times "
            "v; join (G, R) again",
        ),
    ),
]
