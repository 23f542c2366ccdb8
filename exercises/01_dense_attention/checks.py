"""Set 01, dense attention and its cost: heads, softmax, pieces, a cache, and what it all costs."""

import torch

from exercises.compare import plain, recognise
from exercises.records import Case, Exercise
from nsa_lite import loops

# --- 01.1 ---


def head_cases(generator: torch.Generator) -> list[Case]:
    # By hand: heads of a group stand side by side, R = H / G of them.
    written = [
        ("two groups of four", 8, 2, [0, 0, 0, 0, 1, 1, 1, 1]),
        ("three groups of two", 6, 3, [0, 0, 1, 1, 2, 2]),
        ("two groups of three", 6, 2, [0, 0, 0, 1, 1, 1]),
        ("one group", 4, 1, [0, 0, 0, 0]),
        ("as many groups as heads", 4, 4, [0, 1, 2, 3]),
    ]
    return [
        Case(name, dict(heads=heads, kv_heads=groups), groups_of, explain=explain_heads)
        for name, heads, groups, groups_of in written
    ]


def explain_heads(got, expected, heads, kv_heads):
    got = plain(got)
    if len(got) != heads:
        return f"{heads} query heads, and the list has {len(got)} entries"
    if not all(isinstance(g, int) for g in got):
        return None
    for head, g in enumerate(got):
        if not 0 <= g < kv_heads:
            return f"head {head} reads key/value head {g}, and there are 0 to {kv_heads - 1}"
    if got == [h % kv_heads for h in range(heads)]:
        return (
            f"heads 0 and 1 of {heads} read different key/value heads: a group's heads are "
            "neighbours"
        )
    sizes = [got.count(g) for g in range(kv_heads)]
    if len(set(sizes)) > 1:
        return f"the key/value heads serve {sizes} query heads: each serves equally many"
    head = next(h for h in range(heads) if got[h] != expected[h])
    return f"head {head} reads key/value head {got[head]}, which belongs to other heads"


# --- 01.2 ---


def attention_cases(generator: torch.Generator) -> list[Case]:
    def case(name, length, width, value_width, scale=1.0):
        q, k = (scale * torch.randn(length, width, generator=generator) for _ in range(2))
        v = torch.randn(length, value_width, generator=generator)
        expected = loops.window_attention(q[None, None], k[None, None], v[None, None])[0, 0]
        return Case(name, dict(q=q, k=k, v=v), expected, ("query", "channel"), explain_attention)

    return [
        case("one token", 1, 4, 4),
        case("causal", 12, 4, 4),
        case("values of another width", 8, 4, 6),
        case("scale", 8, 16, 4, scale=2.0),
        case("large scores", 8, 4, 4, scale=20.0),
    ]


def with_scores(q, k, v, seen, scale, dim=-1):
    """Softmax of q k^T over `dim` where seen (T, T) allows, times the values."""
    return (q @ k.T * scale).masked_fill(~seen, -torch.inf).softmax(dim) @ v


def explain_attention(got, expected, q, k, v):
    length, width = q.shape
    if not got.isfinite().all():
        t = int((~got.isfinite()).any(-1).nonzero()[0])
        if q.abs().max() > 15:
            return f"query {t} is not finite: exp of a large score overflows"
        return f"query {t} is not finite: does it see no key at all?"
    causal = torch.ones(length, length).tril().bool()
    everything, scale = torch.ones_like(causal), width**-0.5
    p = (q @ k.T * scale).softmax(-1)
    return recognise(
        got,
        {
            f"query 0 reads all {length} keys, and only key 0 is not after it": with_scores(
                q, k, v, everything, scale
            ),
            "the mask came after the softmax: keys after the query still count in the sum of a row": p.tril()
            @ v,
            "query 0 reads the keys after it: the mask is the other way round": with_scores(
                q, k, v, causal.T, scale
            ),
            "the weights that one query gives to its keys do not sum to 1": with_scores(
                q, k, v, causal, scale, dim=0
            ),
            "the scores are not divided by the root of the width": with_scores(
                q, k, v, causal, 1.0
            ),
            "the scores are divided by the width, not by its root": with_scores(
                q, k, v, causal, 1 / width
            ),
            "the scores are divided by the root of the values' width, not the keys'": with_scores(
                q, k, v, causal, v.shape[1] ** -0.5
            ),
        },
    )


# --- 01.3 ---


def merge_cases(generator: torch.Generator) -> list[Case]:
    """A row of keys is cut into pieces; the merged pieces must be attention to the whole row."""

    def case(name, *sizes, scale=1.0, shift=0.0):
        keys = sum(sizes)
        q = torch.randn(3, 4, generator=generator) * scale
        k, v = torch.randn(keys, 4, generator=generator), torch.randn(keys, 2, generator=generator)
        rows = [
            [loops.softmax_rows(query, one_k, one_v, 0.5) for query in q]
            for one_k, one_v in zip(k.split(sizes), v.split(sizes), strict=True)
        ]
        outs = torch.stack([torch.stack([out for out, _ in piece]) for piece in rows])
        lses = torch.tensor([[lse for _, lse in piece] for piece in rows]) + shift
        whole = [loops.softmax_rows(query, k, v, 0.5) for query in q]
        expected = (
            torch.stack([out for out, _ in whole]),
            torch.tensor([lse for _, lse in whole]) + shift,
        )
        axes = {"out": ("query", "channel"), "lse": ("query",)}
        return Case(name, dict(outs=outs, lses=lses), expected, axes, explain_merge)

    return [
        case("two halves", 4, 4),
        case("pieces of unequal weight", 1, 9, scale=3.0),
        case("four pieces", 3, 3, 3, 3),
        case("an empty piece", 4, 0, 4),
        case("nothing but empty pieces", 0, 0),
        case("large log-sum-exps", 4, 4, shift=500.0),
    ]


def explain_merge(got, expected, outs, lses):
    empty = expected[1] == -torch.inf
    if empty.any():
        if got[0].isnan().any() or got[1].isnan().any():
            return "the merge is NaN where all pieces are empty: -inf minus -inf"
        return None
    if got[0].isnan().any() or not got[1].isfinite().all():
        return (
            "NaN or infinite: a piece is empty"
            if (lses == -torch.inf).any()
            else "not finite: exp of a large log-sum-exp overflows"
        )
    share, out, lse = lses.softmax(0), expected[0], expected[1]

    def mistake(out, lse):
        return (out, lse)

    known = {
        "every piece counts alike, and a piece with more weight must count more": outs.mean(0),
        "the pieces were added up: their shares must sum to 1": outs.sum(0),
        "the shares run over the queries, not over the pieces": (
            lses.softmax(1)[..., None] * outs
        ).sum(0),
        "each piece counts by its lse, which is a logarithm": (
            (lses / lses.sum(0))[..., None] * outs
        ).sum(0),
        "only the piece with the largest lse counts": outs.gather(
            0, lses.argmax(0)[None, :, None].expand(1, *outs.shape[1:])
        )[0],
    }
    if said := recognise(got[0], known):
        return said
    return recognise(
        got,
        {
            "out is right, but the lse of the pieces were added: a log of a sum is no sum of logs": mistake(
                out, lses.sum(0)
            ),
            "out is right, but lse is the largest of the pieces": mistake(out, lses.amax(0)),
            "out is right, but lse is the mean of the pieces": mistake(
                out, (share * lses).nansum(0)
            ),
            "out is right, but lse is the sum itself, without its logarithm": mistake(
                out, lse.exp()
            ),
        },
    )


# --- 01.4 ---


def cost_cases(generator: torch.Generator) -> list[Case]:
    def case(name, length, heads, groups, width, value_width, size):
        arguments = dict(
            length=length,
            heads=heads,
            kv_heads=groups,
            head_dim=width,
            value_dim=value_width,
            bytes_per_number=size,
        )
        return Case(name, arguments, counted(**arguments), {"flops": (), "bytes": ()}, explain_cost)

    return [
        case("one head", 10, 1, 1, 6, 6, 4),
        case("heads with their own keys", 10, 4, 4, 6, 6, 4),
        case("heads that share keys", 10, 6, 2, 6, 6, 4),
        case("values of another width", 10, 6, 2, 8, 5, 4),
        case("two bytes a number", 7, 6, 2, 8, 5, 2),
    ]


def counted(length, heads, kv_heads, head_dim, value_dim, bytes_per_number) -> tuple[int, int]:
    """One multiplication and one addition at a time, one number loaded at a time."""
    flops = loaded = 0
    for _head in range(heads):
        for _key in range(length):
            flops += sum(2 for _ in range(head_dim))  # the score
            flops += sum(2 for _ in range(value_dim))  # the weighted value
    for _group in range(kv_heads):
        for _key in range(length):
            loaded += head_dim + value_dim
    return flops, loaded * bytes_per_number


def explain_cost(got, expected, length, heads, kv_heads, head_dim, value_dim, bytes_per_number):
    (flops, loaded), width = got, head_dim + value_dim
    if flops != expected[0]:
        return recognise(
            flops,
            {
                "flops: a multiply and an add count as one": width * heads * length,
                "flops: counted for the key/value heads, and every query head computes": 2
                * width
                * kv_heads
                * length,
                "flops: the scores are counted, the weighted values are not": 2
                * head_dim
                * heads
                * length,
                "flops: counted as if the values were as wide as the keys": 2
                * 2
                * head_dim
                * heads
                * length,
                "flops: counted for a whole sequence of queries, and one token is decoded": 2
                * width
                * heads
                * length
                * length,
                "flops: counted for a single head": 2 * width * length,
            },
        )
    return recognise(
        loaded,
        {
            "bytes: counted for each query head, and heads of a group share one load": bytes_per_number
            * width
            * heads
            * length,
            "bytes: numbers were counted, not bytes": width * kv_heads * length,
            "bytes: the keys are counted, the values are not": bytes_per_number
            * head_dim
            * kv_heads
            * length,
            "bytes: counted as if every number took 2 bytes": 2 * width * kv_heads * length,
            "bytes: counted as if the values were as wide as the keys": bytes_per_number
            * 2
            * head_dim
            * kv_heads
            * length,
        },
    )


# --- 01.5 ---


def decode_cases(generator: torch.Generator) -> list[Case]:
    def case(name, start, queries, room=0, heads=4, groups=2, batch=1):
        def numbers(*shape):
            return torch.randn(*shape, generator=generator)

        last = start + queries
        q, k, v = (
            numbers(batch, heads, last, 4),
            numbers(batch, groups, last, 4),
            numbers(batch, groups, last, 3),
        )
        whole = loops.window_attention(q, k, v)  # all queries from position 0 on
        # Places of the cache that are not written yet hold what was left in memory.
        k, v = (torch.cat([x, 50 + numbers(batch, groups, room, x.shape[3])], 2) for x in (k, v))
        arguments = dict(q=q[:, :, start:].contiguous(), k=k, v=v, start=start)
        return Case(
            name,
            arguments,
            whole[:, :, start:],
            ("batch", "head", "query", "channel"),
            explain_decode,
        )

    return [
        case("one token after a cache of nine", 9, 1),
        case("a whole sequence", 0, 8),
        case("three tokens after five", 5, 3),
        case("a cache with room left", 5, 3, room=4),
        case("heads of three groups", 6, 2, heads=6, groups=3),
        case("two sequences", 4, 2, batch=2),
    ]


def attend_with(q, k, v, seen, group=None):
    """Grouped attention where seen (T, S) allows; group(h) is the key/value head of head h."""
    heads, groups = q.shape[1], k.shape[1]
    picks = [group(h) if group else h * groups // heads for h in range(heads)]
    scores = torch.einsum("bhtd,bhsd->bhts", q, k[:, picks]) * q.shape[3] ** -0.5
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bhsv->bhtv", p, v[:, picks])


def explain_decode(got, expected, q, k, v, start):
    t, s = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    last = start + q.shape[2]
    known = {
        f"the first query stands at position {start}, and was masked as if it stood at 0": attend_with(
            q, k, v, s <= t
        ),
        f"query 0, at position {start}, reads all {k.shape[2]} keys": attend_with(
            q, k, v, (s >= 0).expand(len(t), -1)
        ),
        f"query 0, at position {start}, reads the keys of later queries, up to {last - 1}": attend_with(
            q, k, v, (s < last).expand(len(t), -1)
        ),
        f"query 0 stands at position {start}, and does not read its own key": attend_with(
            q, k, v, s < (t + start).clamp(min=1)
        ),
        "head h reads key/value head h % G: a group's heads are neighbours": attend_with(
            q, k, v, s <= t + start, lambda h: h % k.shape[1]
        ),
        f"the last query was aligned with the last place of the cache, {k.shape[2] - 1}, and that "
        "is not written yet": attend_with(q, k, v, s <= t + k.shape[2] - q.shape[2]),
        "the scores are not divided by the root of the width": attend_with(
            q * q.shape[3] ** 0.5, k, v, s <= t + start
        ),
    }
    return recognise(got, known)


EXERCISES = [
    Exercise(
        "01.1",
        "Which head reads which keys",
        "warm-up",
        5,
        head_cases,
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
        attention_cases,
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
        cost_cases,
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
        decode_cases,
        hints=(
            "At which position does the query in row 0 stand? Which keys exist by then?",
            "Row t stands at start + t and reads the keys s <= start + t of key/value head "
            "h // (H / G).",
            "split axis H of q into (G, R), so that k and v broadcast over R; scores (B, G, R, T, "
            "S); mask s <= start + t; softmax; times v; join (G, R) again",
        ),
    ),
]
