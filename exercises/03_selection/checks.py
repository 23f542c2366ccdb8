"""Set 03, importance and selection: Eq. 8 to 12, one step an exercise."""

import math
from math import log

import torch
from torch import Tensor

from exercises.compare import name_mistake
from exercises.records import Case, Exercise, in_turn
from exercises.scores import APART, OVERFLOW, far_below, places, rising
from nsa_lite import loops

from . import mistakes

# --- 03.1 ---

NOTHING = -math.inf
PROBABILITIES = {
    "by hand": dict(scores=[[log(2), log(6)]], lse=[log(8)], p=[[0.25, 0.75]]),
    "random scores": {},
    "blocks not seen": dict(
        scores=[[log(3), NOTHING], [log(3), log(5)]],
        lse=[log(3), log(8)],
        p=[[1.0, 0.0], [0.375, 0.625]],
    ),
    "a query that sees nothing": dict(
        scores=[[NOTHING, NOTHING], [log(3), NOTHING]],
        lse=[NOTHING, log(3)],
        p=[[0.0, 0.0], [1.0, 0.0]],
    ),
    "large scores": dict(scores=[[300.0, 300.0 + log(3)]], lse=[300.0 + log(4)], p=[[0.25, 0.75]]),
    "part of a row": dict(scores=[[log(2)]], lse=[log(8)], p=[[0.25]]),
    "very negative scores": dict(  # whole numbers, which float32 holds as they are
        scores=[[-20_001.0, NOTHING, -20_002.0], [NOTHING, -301.0, -340.0], [NOTHING] * 3],
        lse=[-20_000.0, -300.0, NOTHING],
        p=[[math.exp(-1), 0.0, math.exp(-2)], [0.0, math.exp(-1), 0.0], [0.0] * 3],
    ),
    "log-sum-exps of either sign": dict(
        scores=[[-3.0, -2.0], [2.0, 1.0], [-1.0, -2.0], [3.0, -13.0]],
        lse=[-1.0, 3.0, 0.0, 4.0],
        p=[[math.exp(s) for s in row] for row in ([-2, -1], [-1, -2], [-1, -2], [-1, -17])],
    ),
    "equal scores": dict(scores=[[7.0] * 4] * 3, lse=[7 + log(4)] * 3, p=[[0.25] * 4] * 3),
}


def probability_case(generator, name, scores=None, lse=None, p=None) -> Case:
    """Scores with their lse and probabilities by hand, or random ones."""
    if scores is None:
        scores = (3 * torch.randn(4, 5, generator=generator)).tolist()
        sums = [sum(math.exp(s) for s in row) for row in scores]
        lse = [log(total) for total in sums]
        p = [[math.exp(s) / total for s in row] for row, total in zip(scores, sums, strict=True)]
    arguments = dict(scores=torch.tensor(scores), lse=torch.tensor(lse))
    return Case(name, arguments, torch.tensor(p), ("query", "block"), explain_probabilities)


def explain_probabilities(got, expected, scores, lse):
    """A number that is not finite, or a known mistake in the rows that see a block."""
    dead = lse == -torch.inf
    if got[dead].isnan().any():
        t = int(dead.nonzero()[0])
        return f"query {t} sees no block, and -inf minus -inf is NaN"
    if not got.isfinite().all():
        return "exp of a large score overflows: make the number small before exp, not after"
    return name_mistake(
        got, mistakes.PROBABILITIES, (scores, lse), part=lambda result: result[~dead]
    )


# --- 03.2 ---

SPREAD = {
    "compression blocks side by side": dict(length=64, l=4, d=4, l_sel=16),
    "overlapping compression blocks": dict(length=64, l=8, d=4, l_sel=16),
    "one probability at a time": dict(length=48, l=8, d=4, l_sel=16, p=torch.eye(11)),
    "a ragged end": dict(length=44, l=8, d=4, l_sel=16),
    "blocks of one size": dict(length=32, l=8, d=4, l_sel=8),
    "the paper's sizes": dict(length=256, l=32, d=16, l_sel=64),
    "three strides a block": dict(length=60, l=12, d=4, l_sel=16, queries=2),
    "four strides a block": dict(length=43, l=12, d=3, l_sel=15, queries=4),
    "blocks that nothing reaches": dict(length=30, l=9, d=3, l_sel=9, more=2, queries=1),
}


def spread_case(  # noqa: PLR0913  what a row of the table may say
    generator, name, length, l, d, l_sel, *, p=None, queries=3, more=0
) -> Case:
    """Random probabilities, or given ones, spread over their tokens; `more` blocks get nothing."""
    count = (length - l) // d + 1
    blocks = -(-length // l_sel) + more
    if p is None:
        p = torch.rand(queries, count, generator=generator)
    shares = [[shared(i, j, l, d, l_sel) / d for j in range(blocks)] for i in range(count)]
    arguments = dict(p=p, block_size=l, stride=d, select_block_size=l_sel, blocks=blocks)
    axes = ("query", "selection block")
    return Case(name, arguments, p @ torch.tensor(shares), axes, explain_spread)


def shared(i: int, j: int, l: int, d: int, l_sel: int) -> int:
    """How many tokens compression block i and selection block j share, counted one by one."""
    return sum(token // l_sel == j for token in range(i * d, i * d + l))


def explain_spread(got, expected, p, block_size, stride, select_block_size, blocks):
    """A known mistake, with the sizes of this case."""
    return name_mistake(
        got,
        mistakes.SPREAD,
        (p, block_size, stride, select_block_size, blocks),
        last=select_block_size - 1,
        next_block=select_block_size // stride,
        next_token=select_block_size,
    )


# --- 03.3 ---

LOUD = torch.tensor([20.0, 1.0, 1.0, 1.0])[:, None, None]  # head 0 has far larger logits
GROUPS = {
    "one group": dict(heads=2, kv_heads=1),
    "two groups": dict(heads=4, kv_heads=2),
    "three groups of two": dict(heads=6, kv_heads=3),
    "one loud head": dict(heads=4, kv_heads=2, scale=LOUD),
    "large scores": dict(heads=4, kv_heads=2, scale=200.0),
    "groups of three": dict(heads=6, kv_heads=2, queries=4, blocks=3),
    "groups of five": dict(heads=15, kv_heads=3, queries=2, blocks=7),
    "every head for itself": dict(heads=4, kv_heads=4, queries=5, blocks=6),
    "very negative scores": dict(heads=6, kv_heads=2, below=30_000, blocks=4),
    "equal scores": dict(heads=8, kv_heads=2, scale=0.0, queries=7),
}


def group_case(  # noqa: PLR0913  what a row of the table may say
    generator, name, heads, kv_heads, scale=1.0, below=0, queries=3, blocks=5
) -> Case:
    """Random scores, or whole numbers about `below` under 0."""
    scores = scale * torch.randn(heads, queries, blocks, generator=generator)
    if below:
        scores = APART * places(scores) - below
    expected = summed_by_loop(scores, kv_heads)
    arguments = dict(scores=scores, kv_heads=kv_heads)
    return Case(name, arguments, expected, ("group", "query", "block"), explain_group)


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
    """NaN, or a known mistake."""
    if got.isnan().any():
        return OVERFLOW
    sharing = len(scores) // kv_heads
    return name_mistake(got, mistakes.GROUP, (scores, kv_heads), sharing=sharing)


# --- 03.4 ---

RISING = torch.arange(8.0).repeat(32, 1)  # the later a block, the better it looks
CHOICES = {
    "causal": dict(length=32, n=3, initial=1, local=1, score=RISING),
    "few blocks yet": dict(length=9, n=4, initial=1, local=2),
    "forced blocks with low scores": dict(length=48, n=4, initial=1, local=2, dull=True),
    "two initial and three local blocks": dict(length=64, n=7, initial=2, local=3),
    "equal scores": dict(length=40, n=5, initial=1, local=1, score=torch.ones(40, 10)),
    "nothing forced": dict(length=32, n=3, initial=0, local=0),
    "negative scores": dict(length=45, n=4, initial=1, local=1, size=5, add=-9.0),
    "very negative scores": dict(length=38, n=4, initial=1, local=1, size=5, times=1e5, add=-1e6),
    "large scores": dict(length=36, n=4, initial=1, local=1, size=3, times=1e6, dull=True),
    "nearly equal scores": dict(length=60, n=3, initial=1, local=0, size=6, times=1e-5, add=1.0),
    "more places than blocks": dict(length=26, n=9, initial=3, local=1, size=5),
    "nothing but forced blocks": dict(length=49, n=3, initial=1, local=2, size=7),
    "NaN after the query": dict(length=30, n=5, initial=1, local=2, size=3, late=torch.nan),
    "infinity after the query": dict(length=27, n=4, initial=0, local=1, size=3, late=torch.inf),
    "one query": dict(length=1, n=2, initial=1, local=1, size=8),
}


def choice_case(  # noqa: PLR0913  what a row of the table may say
    generator,
    name,
    length,
    n,
    initial,
    local,
    *,
    size=4,
    score=None,
    times=8.0,
    add=0.0,
    dull=False,
    late=None,
) -> Case:
    """Random scores, or given ones; dull makes block 0 and the own block worst.

    late stands in for the scores of blocks that start after the query.
    """
    own = torch.arange(length) // size
    if score is None:
        score = add + times * torch.rand(length, -(-length // size), generator=generator)
    if dull:
        score[:, 0] = 0.0
        score[torch.arange(length), own] = 0.0
    if late is not None:
        score[torch.arange(score.shape[1]) > own[:, None]] = late
    rule = dict(select_block_size=size, num_selected=n, num_initial=initial, num_local=local)
    expected = loops.choose_blocks(score[None, None], **rule)[0, 0]
    return Case(name, dict(score=score, **rule), expected, ("query", "place"), explain_choice)


def explain_choice(got, expected, score, select_block_size, num_selected, num_initial, num_local):
    """What is wrong with the first wrong row: an id, a forced block, how many, which."""
    t = int((got != expected).any(-1).nonzero()[0])
    own = t // select_block_size
    row = got[t].tolist()
    first = set(range(min(num_initial, own + 1)))
    last = set(range(max(0, own + 1 - num_local), own + 1))
    if said := strange_id(t, row, select_block_size, score.shape[1]):
        return said
    for j in sorted(first - set(row)):
        return f"query {t} lacks block {j}, one of the first {num_initial}"
    for j in sorted(last - set(row)):
        return f"query {t} lacks block {j}, one of the last {num_local} up to its own, {own}"
    real = [j for j in row if j >= 0]
    if len(real) < min(num_selected, own + 1):
        return (
            f"query {t} selected {len(real)} of the {own + 1} blocks that have begun, and has "
            f"room for {num_selected}"
        )
    if sorted(row) == sorted(expected[t].tolist()):
        return f"query {t} has the ids {row}: they do not ascend, or -1 is not at the end"
    return better_block(
        t, score[t].tolist(), set(range(own + 1)) - set(real), set(real) - first - last
    )


def strange_id(t: int, row: list[int], size: int, blocks: int) -> str | None:
    """An id that no row may hold: out of range, of a block that has not begun, or twice."""
    for j in row:
        if j < -1 or j >= blocks:
            return f"query {t} has the id {j}, and blocks are 0 to {blocks - 1}, padding -1"
        if j * size > t:
            return f"query {t} selected block {j}, which starts at token {j * size}"
        if j >= 0 and row.count(j) > 1:
            return f"query {t} selected block {j} twice"
    return None


def better_block(t: int, score: list[float], left_out: set[int], free: set[int]) -> str:
    """A block that was left out, against the worst of those that were free to choose."""
    best = max(sorted(left_out), key=lambda j: score[j])
    worst = min(sorted(free), key=lambda j: score[j])
    if score[best] > score[worst]:
        return f"query {t} selected block {worst}, and left out block {best} with a higher score"
    return f"query {t} selected block {worst}, and left out a lower block with an equal score"


# --- 03.5 ---

CHOSEN = {
    "one block": dict(length=4, n=1),
    "a choice among many blocks": dict(length=40, n=3),
    "padding": dict(length=12, n=3),
    "a ragged end": dict(length=22, n=3),
    "scale": dict(length=24, n=3, scale=2.0, width=16),
    "large scores": dict(length=24, n=3, scale=20.0),
    "not the own block": dict(length=35, n=2, size=5, local=0, width=6, value_width=4),
    "not the first block": dict(length=33, n=4, size=3, initial=0, value_width=2),
    "a block that nobody chose": dict(length=47, n=3, size=6, width=5, value_width=7, never=2),
    "very negative scores": dict(length=27, n=4, size=4, width=4, below=30_000),
    "later keys far above": dict(length=23, n=3, size=5, width=4, value_width=2, rise=20_000),
    "equal scores": dict(length=31, n=5, size=3, width=3, scale=0.0),
}


def attention_case(  # noqa: PLR0913  what a row of the table may say
    generator,
    name,
    length,
    n,
    *,
    size=4,
    initial=1,
    local=1,
    scale=1.0,
    width=8,
    value_width=3,
    below=0,
    rise=0,
    never=None,
) -> Case:
    """Random q, k and v of one head, and a random choice of blocks.

    No query chooses the block `never` but its own ones, which see it as their past; the others
    would be drowned by it. Scores lie about `below` under 0.
    """

    def numbers(*shape):
        return torch.randn(*shape, generator=generator)

    q = scale * numbers(length, width)
    k = scale * numbers(length, width)
    v = numbers(length, value_width)
    score = torch.rand(1, 1, length, -(-length // size), generator=generator)
    if below:
        q, k = far_below(q, k, below)
    if rise:
        q, k = rising(q, k, rise)
    if never is not None:
        k[never * size : (never + 1) * size] = 1e4
        v[never * size : (never + 1) * size] = 1e4
        score[..., never] = -1.0
    ids = loops.choose_blocks(
        score, select_block_size=size, num_selected=n, num_initial=initial, num_local=local
    )
    expected = loops.selected_attention(
        q[None, None], k[None, None], v[None, None], ids, select_block_size=size
    )[0, 0]
    arguments = dict(q=q, k=k, v=v, ids=ids[0, 0], select_block_size=size)
    return Case(name, arguments, expected, ("query", "channel"), explain_attention)


def explain_attention(got, expected, q, k, v, ids, select_block_size):
    """NaN, or a known mistake."""
    if got.isnan().any():
        t = int(got.isnan().any(-1).nonzero()[0])
        return (
            f"the output of query {t} is NaN: a row of -inf alone, or exp of a large score, which "
            "overflows, or of a very negative one, which is 0"
        )
    arguments = (q, k, v, ids, select_block_size)
    return name_mistake(got, mistakes.ATTENTION, arguments, size=select_block_size)


EXERCISES = [
    Exercise(
        "03.1",
        "Probabilities from the log-sum-exp",
        "warm-up",
        5,
        in_turn(probability_case, PROBABILITIES),
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
        in_turn(spread_case, SPREAD),
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
        in_turn(group_case, GROUPS),
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
        in_turn(choice_case, CHOICES),
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
        in_turn(attention_case, CHOSEN),
        hints=(
            "Which tokens does query t read, as a list? Where does its own block end for it?",
            "tokens = all s with j l' <= s < (j + 1) l' for an id j >= 0 of the query, and s <= t",
            "for each query: list the tokens; scores = k[tokens] q / sqrt(D); softmax; times "
            "v[tokens]. Vectorised: gather, and a mask for -1, for s > t and for the ragged end.",
        ),
    ),
]
