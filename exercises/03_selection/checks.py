"""Set 03, importance and selection: Eq. 8 to 12, one step an exercise."""

import math

import torch
from torch import Tensor

from exercises.compare import recognise
from exercises.records import Case, Exercise
from nsa_lite import loops

# --- 03.1 ---


def probability_cases(generator: torch.Generator) -> list[Case]:
    def case(name, scores, lse, p):
        arguments = dict(scores=torch.tensor(scores), lse=torch.tensor(lse))
        return Case(name, arguments, torch.tensor(p), ("query", "block"), explain_probabilities)

    ln, nothing = math.log, -math.inf
    logits = (3 * torch.randn(4, 5, generator=generator)).tolist()
    sums = [sum(math.exp(s) for s in row) for row in logits]
    return [
        case("by hand", [[ln(2), ln(6)]], [ln(8)], [[0.25, 0.75]]),
        case(
            "random scores",
            logits,
            [ln(total) for total in sums],
            [[math.exp(s) / total for s in row] for row, total in zip(logits, sums, strict=True)],
        ),
        case(
            "blocks not seen",
            [[ln(3), nothing], [ln(3), ln(5)]],
            [ln(3), ln(8)],
            [[1.0, 0.0], [0.375, 0.625]],
        ),
        case(
            "a query that sees nothing",
            [[nothing, nothing], [ln(3), nothing]],
            [nothing, ln(3)],
            [[0.0, 0.0], [1.0, 0.0]],
        ),
        case("large scores", [[300.0, 300.0 + ln(3)]], [300.0 + ln(4)], [[0.25, 0.75]]),
        case("part of a row", [[ln(2)]], [ln(8)], [[0.25]]),
    ]


def explain_probabilities(got, expected, scores, lse):
    dead = lse == -torch.inf
    if got[dead].isnan().any():
        t = int(dead.nonzero()[0])
        return f"query {t} sees no block, and -inf minus -inf is NaN"
    if not got.isfinite().all():
        return "exp of a large score overflows: make the number small before exp, not after"
    return recognise(
        got[~dead],
        {
            "the row was normalised again, but lse also counts blocks that are not in these scores": scores.softmax(
                -1
            )[~dead],
            "a difference of logarithms is still a logarithm": (scores - lse[:, None])[~dead],
            "the sum of exponentials was divided by lse, which is its logarithm": (
                scores.exp() / lse[:, None]
            )[~dead],
            "nothing was divided by the sum of the row": scores.exp()[~dead],
        },
    )


# --- 03.2 ---


def spread_cases(generator: torch.Generator) -> list[Case]:
    def case(name, length, l, d, l_sel, p=None):
        count, blocks = (length - l) // d + 1, -(-length // l_sel)
        p = torch.rand(3, count, generator=generator) if p is None else p
        arguments = dict(p=p, block_size=l, stride=d, select_block_size=l_sel, blocks=blocks)
        by_tokens = by_weight(**arguments, weight=lambda i, j: shared(i, j, l, d, l_sel) / d)
        return Case(name, arguments, by_tokens, ("query", "selection block"), explain_spread)

    return [
        case("compression blocks side by side", 64, 4, 4, 16),
        case("overlapping compression blocks", 64, 8, 4, 16),
        case("one probability at a time", 48, 8, 4, 16, torch.eye(11)),
        case("a ragged end", 44, 8, 4, 16),
        case("blocks of one size", 32, 8, 4, 8),
        case("the paper's sizes", 256, 32, 16, 64),
    ]


def shared(i: int, j: int, l: int, d: int, l_sel: int) -> int:
    """How many tokens compression block i and selection block j share, counted one by one."""
    return sum(token // l_sel == j for token in range(i * d, i * d + l))


def by_weight(p, block_size, stride, select_block_size, blocks, weight) -> Tensor:
    """Each probability times the weight that its block i has in selection block j."""
    weights = [[float(weight(i, j)) for j in range(blocks)] for i in range(p.shape[1])]
    return p @ torch.tensor(weights)


def explain_spread(got, expected, p, block_size, stride, select_block_size, blocks):
    l, d, l_sel = block_size, stride, select_block_size

    def printed(i, j):  # the pairs (m, n) for which Eq. 9 as printed reads p[i]
        return sum(l_sel // d * j - m - n == i for m in range(l_sel // d) for n in range(l // d))

    def late(i, j):
        return sum(
            l_sel // d * (j + 1) - m - n == i for m in range(l_sel // d) for n in range(l // d)
        )

    def mistaken(weight):
        return by_weight(p, block_size, stride, select_block_size, blocks, weight)

    return recognise(
        got,
        {
            "these are the indices of the printed Eq. 9, in which blocks count from 1: "
            f"selection block 0 gets only p[0], and misses others of its tokens 0 to {l_sel - 1}": mistaken(
                printed
            ),
            "the blocks lie one compression block late: selection block 0 gets a share of block "
            f"{l_sel // d}, which starts at token {l_sel}": mistaken(late),
            "a compression block gives the same share to each selection block it touches, however "
            "many tokens they have in common": mistaken(lambda i, j: shared(i, j, l, d, l_sel) > 0),
            "only compression blocks that lie wholly inside a selection block count": mistaken(
                lambda i, j: (shared(i, j, l, d, l_sel) == l) * l / d
            ),
            "each compression block goes as a whole to the selection block in which it starts": mistaken(
                lambda i, j: (i * d // l_sel == j) * l / d
            ),
            "the overlap is counted in tokens, not in strides": mistaken(
                lambda i, j: shared(i, j, l, d, l_sel)
            ),
            "the overlap is divided by l, not by d": mistaken(
                lambda i, j: shared(i, j, l, d, l_sel) / l
            ),
        },
    )


# --- 03.3 ---


def group_cases(generator: torch.Generator) -> list[Case]:
    def case(name, heads, groups, blocks=5, scale=1.0):
        scores = scale * torch.randn(heads, 3, blocks, generator=generator)
        arguments = dict(scores=scores, kv_heads=groups)
        return Case(
            name, arguments, summed_by_loop(**arguments), ("group", "query", "block"), explain_group
        )

    loud = torch.ones(4, 1, 1)
    loud[0] = 20.0  # one head with logits far larger than its neighbours'
    return [
        case("one group", 2, 1),
        case("two groups", 4, 2),
        case("three groups of two", 6, 3),
        case("one loud head", 4, 2, scale=loud),
        case("large scores", 4, 2, scale=200.0),
    ]


def summed_by_loop(scores: Tensor, kv_heads: int) -> Tensor:
    """Eq. 10 number by number: each head's own softmax, added up in its group."""
    heads, length, blocks = scores.shape
    total = torch.zeros(kv_heads, length, blocks, dtype=torch.float64)
    for h in range(heads):
        for t in range(length):
            top = float(scores[h, t].max())
            e = [math.exp(float(s) - top) for s in scores[h, t]]
            for i in range(blocks):
                total[h * kv_heads // heads, t, i] += e[i] / sum(e)
    return total.float()


def explain_group(got, expected, scores, kv_heads):
    by_group = scores.unflatten(0, (kv_heads, -1))  # (G, R, T, N)
    p, sharing = by_group.softmax(-1), by_group.shape[1]
    apart = scores.unflatten(0, (-1, kv_heads)).softmax(-1).sum(0)
    if got.isnan().any():
        return "exp of a large score overflows"
    return recognise(
        got,
        {
            "logits were summed before the softmax, so a head with large logits drowns its neighbours": by_group.sum(
                1
            ).softmax(-1),
            "logits were averaged before the softmax, so heads that disagree cancel out": by_group.mean(
                1
            ).softmax(-1),
            f"only the first of the {sharing} heads of a group counts": p[:, 0],
            f"the {sharing} heads of a group were averaged, and Eq. 10 adds them": p.mean(1),
            "the largest probability of the group was taken, and Eq. 10 adds all": p.amax(1),
            "head h was put into group h % G: a group's heads are neighbours": apart,
            "the softmax ran over the heads, not over the blocks": by_group.softmax(1).sum(1),
            "logits were added up, and no softmax taken": by_group.sum(1),
            "the heads of all groups were added up": p.sum((0, 1)).expand_as(expected),
        },
    )


# --- 03.4 ---


def choice_cases(generator: torch.Generator) -> list[Case]:
    def case(name, length, n, initial, local, score=None, l_sel=4):
        blocks = -(-length // l_sel)
        if score is None:
            score = 8 * torch.rand(length, blocks, generator=generator)
        rule = dict(select_block_size=l_sel, num_selected=n, num_initial=initial, num_local=local)
        expected = loops.choose_blocks(score[None, None], **rule)[0, 0]
        return Case(name, dict(score=score, **rule), expected, ("query", "place"), explain_choice)

    rising = torch.arange(8.0).repeat(32, 1)  # the later a block, the better it looks
    dull = 8 * torch.rand(48, 12, generator=generator)
    dull[:, 0] = 0.0  # block 0 and the own block look worst
    dull[torch.arange(48), torch.arange(48) // 4] = 0.0
    return [
        case("causal", 32, 3, 1, 1, rising),
        case("few blocks yet", 9, 4, 1, 2),
        case("forced blocks with low scores", 48, 4, 1, 2, dull),
        case("two initial and three local blocks", 64, 7, 2, 3),
        case("equal scores", 40, 5, 1, 1, torch.ones(40, 10)),
        case("nothing forced", 32, 3, 0, 0),
    ]


def explain_choice(got, expected, score, select_block_size, num_selected, num_initial, num_local):
    t = int((got != expected).any(-1).nonzero()[0])
    own, row = t // select_block_size, got[t].tolist()
    real = [j for j in row if j >= 0]
    first = set(range(min(num_initial, own + 1)))
    last = set(range(max(0, own + 1 - num_local), own + 1))
    for j in row:
        if j < -1 or j >= score.shape[1]:
            return f"query {t} has the id {j}, and blocks are 0 to {score.shape[1] - 1}, padding -1"
        if j * select_block_size > t:
            return f"query {t} selected block {j}, which starts at token {j * select_block_size}"
        if j >= 0 and row.count(j) > 1:
            return f"query {t} selected block {j} twice"
    for j in sorted(first - set(real)):
        return f"query {t} lacks block {j}, one of the first {num_initial}"
    for j in sorted(last - set(real)):
        return f"query {t} lacks block {j}, one of the last {num_local} up to its own, {own}"
    if len(real) < min(num_selected, own + 1):
        return (
            f"query {t} selected {len(real)} of the {own + 1} blocks that have begun, and has "
            f"room for {num_selected}"
        )
    if sorted(row) == sorted(expected[t].tolist()):
        return f"query {t} has the ids {row}: they do not ascend, or -1 is not at the end"
    out = [j for j in range(own + 1) if j not in real]
    best = max(out, key=lambda j: float(score[t, j]))
    worst = min(set(real) - first - last, key=lambda j: float(score[t, j]))
    if score[t, best] > score[t, worst]:
        return f"query {t} selected block {worst}, and left out block {best} with a higher score"
    return f"query {t} selected block {worst}, and left out a lower block with an equal score"


# --- 03.5 ---


def attention_cases(generator: torch.Generator) -> list[Case]:
    def numbers(*shape):
        return torch.randn(*shape, generator=generator)

    def case(name, length, n, l_sel=4, scale=1.0, width=8):
        q, k, v = scale * numbers(length, width), scale * numbers(length, width), numbers(length, 3)
        score = torch.rand(1, 1, length, -(-length // l_sel), generator=generator)
        ids = loops.choose_blocks(
            score, select_block_size=l_sel, num_selected=n, num_initial=1, num_local=1
        )
        expected = loops.selected_attention(
            q[None, None], k[None, None], v[None, None], ids, select_block_size=l_sel
        )[0, 0]
        arguments = dict(q=q, k=k, v=v, ids=ids[0, 0], select_block_size=l_sel)
        return Case(name, arguments, expected, ("query", "channel"), explain_attention)

    return [
        case("one block", 4, 1),
        case("a choice among many blocks", 40, 3),
        case("padding", 12, 3),
        case("a ragged end", 22, 3),
        case("scale", 24, 3, scale=2.0, width=16),
        case("large scores", 24, 3, scale=20.0),
    ]


def read(q, k, v, tokens, scale):
    """Attention of query t to the list tokens(t); a token may stand in it twice."""
    return torch.stack(
        [(k[tokens(t)] @ q[t] * scale).softmax(0) @ v[tokens(t)] for t in range(len(q))]
    )


def explain_attention(got, expected, q, k, v, ids, select_block_size):
    size, length, width = select_block_size, len(q), q.shape[1]
    if got.isnan().any():
        t = int(got.isnan().any(-1).nonzero()[0])
        return f"the output of query {t} is NaN: a row of -inf alone, or exp of a large score"

    def chosen(t, late=False, padding=()):
        tokens = []
        for j in ids[t].tolist():
            tokens += range(j * size, min((j + 1) * size, length)) if j >= 0 else padding
        return [s for s in tokens if late or s <= t]

    values = {
        "query 0 reads tokens after itself, in its own block": read(
            q, k, v, lambda t: chosen(t, late=True), width**-0.5
        ),
        "-1 is padding, and was read as block 0, whose tokens then count twice or more": read(
            q, k, v, lambda t: chosen(t, padding=range(size)), width**-0.5
        ),
        f"-1 is padding, and was read as block -1: tokens {-size} to -1, the end of the sequence": read(
            q, k, v, lambda t: chosen(t, padding=range(-size, 0)), width**-0.5
        ),
        "every token up to the query was read, chosen or not": read(
            q, k, v, lambda t: list(range(t + 1)), width**-0.5
        ),
        "the scores are not divided by the root of the width": read(q, k, v, chosen, 1.0),
        "the scores are divided by the width, not by its root": read(q, k, v, chosen, 1 / width),
        "the query's own block was left out": read(
            q, k, v, lambda t: [s for s in chosen(t) if s < t // size * size] or [t], width**-0.5
        ),
    }
    return recognise(got, values)


EXERCISES = [
    Exercise(
        "03.1",
        "Probabilities from the log-sum-exp",
        "warm-up",
        5,
        probability_cases,
        hints=(
            "By what does a softmax divide exp(s)? What is the logarithm of that number?",
            "p_i = exp(s_i) / sum_u exp(s_u) = exp(s_i - lse)",
            "replace lse by 0 where it is -inf, then exp of the difference; exp(-inf) is 0",
        ),
    ),
    Exercise(
        "03.2",
        "Eq. 9, 0-based",
        "core",
        20,
        spread_cases,
        hints=(
            "Which tokens does compression block i cover, and which selection block j? How many "
            "are in both?",
            "score_j = sum_i p_i |C_i and S_j| / d; or, with blocks and j from 0, "
            "score_j = sum_m sum_n p[l'/d j + m - n], m < l'/d, n < l/d, where the index exists.",
            "for i, for j: tokens in common = min of the ends - max of the starts, at least 0; "
            "weight = that / d; then p times the matrix of weights",
        ),
    ),
    Exercise(
        "03.3",
        "One score for a group",
        "core",
        10,
        group_cases,
        hints=(
            "The heads of a group will read the same blocks. Whose wish counts how much?",
            "p'_g = sum over the R heads h of group g of softmax(scores_h); h belongs to h // R.",
            "softmax over the blocks; split axis H into (G, R); sum over R",
        ),
    ),
    Exercise(
        "03.4",
        "Choose the blocks",
        "core",
        20,
        choice_cases,
        hints=(
            "Which blocks may query t read at all? Which must it read, whatever their score?",
            "own = t // l'. Legal: j <= own. Forced: j < num_initial, or own - num_local < j; both "
            "only if legal. The rest by score; ties to the lower id; at most n in all.",
            "for each query: chosen = forced ones; while there is room and a legal block left, add "
            "the best of the rest; sort; pad with -1",
        ),
    ),
    Exercise(
        "03.5",
        "Attend to the chosen blocks",
        "stretch",
        40,
        attention_cases,
        hints=(
            "Which tokens does query t read, as a list? Where does its own block end for it?",
            "tokens = all s with j l' <= s < (j + 1) l' for an id j >= 0 of the query, and s <= t",
            "for each query: list the tokens; scores = k[tokens] q / sqrt(D); softmax; times "
            "v[tokens]. Vectorised: gather, and a mask for -1, for s > t and for the ragged end.",
        ),
    ),
]
