"""Set 05, find the bugs: five parts of a faulty skeleton, and a test that sees the future."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import nsa_lite
from exercises.compare import close, name_mistake
from exercises.records import Case, Exercise, in_turn
from nsa_lite import BRANCHES, loops

from . import mistakes

# --- 05.1 ---

SPLITS = {
    "one block": dict(length=4, block_size=4, stride=4),
    "order inside a block": dict(length=12, block_size=4, stride=4, width=4),
    "overlapping blocks": dict(length=12, block_size=4, stride=2, width=2),
    "blocks of three strides": dict(length=14, block_size=6, stride=2),
    "a tail too short for a block": dict(length=11, block_size=4, stride=2, tail=torch.nan),
    "exactly one token too few": dict(length=5, block_size=6, stride=3, width=5),
    "one token": dict(length=1, block_size=3, stride=1),
    "columns of a wider table": dict(length=10, block_size=5, stride=5, width=2, make=lambda x: x),
    "whole numbers, too few for a block": dict(
        length=2, block_size=7, stride=7, make=lambda x: (10 * x).long()
    ),
}


def split_case(
    generator, name, length, block_size, stride, width=3, tail=None, make=torch.clone
) -> Case:
    """Tokens from columns of a random table, and their blocks as slices; `tail` is in no block."""
    x = make(torch.randn(length, width + 3, generator=generator)[:, 2 : 2 + width])
    starts = range(0, length - block_size + 1, stride)
    if tail is not None:
        x[starts[-1] + block_size :] = tail
    rows = [x[i : i + block_size] for i in starts]
    expected = torch.stack(rows) if rows else x.new_empty(0, block_size, width)
    arguments = dict(x=x, block_size=block_size, stride=stride)
    return Case(name, arguments, expected, ("block", "place", "channel"), explain_split)


def explain_split(got, expected, x, block_size, stride):
    """NaN of the tail, which tokens the first wrong block holds, or a known mistake."""
    i = int((~close(got, expected)).flatten(1).any(1).nonzero()[0])
    if got[i].isnan().any():
        return f"block {i} holds NaN: the tail is NaN here and is left out, and 0 NaN is NaN"
    for first in range(len(x) - block_size + 1):
        if close(got[i], x[first : first + block_size]).all():
            return f"block {i} holds tokens {first} to {first + block_size - 1}"
    return name_mistake(got, mistakes.SPLITS, (x, block_size, stride))


# --- 05.2 ---


def running_sum(x):
    """Causal."""
    return x.cumsum(0)


def sum_by_matrix(x):
    """Causal, although it multiplies later tokens by 0."""
    return torch.ones(len(x), len(x), dtype=x.dtype).tril() @ x


def block_sum(x):
    """Every row reads its whole block of 4."""
    block = torch.arange(len(x)) // 4
    return (block == block[:, None]).to(x) @ x


def mean_of_all(x):
    """Every row reads everything."""
    return x.cumsum(0) + x.mean(0)


def leak_at(row):
    """One row reads the token after it."""

    def one_leak(x):
        out = x.cumsum(0)
        if len(x) > row + 1:
            out[row] = out[row] + x[row + 1]
        return out

    return one_leak


def with_later(read, ahead=1):
    """Every row reads something of the token so far ahead of it; the last rows read zeros."""

    def leaky(x):
        return x.cumsum(0) + F.pad(read(x)[ahead:], (0, 0, 0, min(ahead, len(x))))

    return leaky


def channel_1(x):
    """Channel 1, added to one channel and taken from another."""
    return torch.stack([0 * x[:, 0], x[:, 1], -x[:, 1]], 1)


def leak_at_a_number(x):
    """Only a row that holds 50 reads its successor."""
    return x.cumsum(0) + F.pad(x[1:], (0, 0, 0, 1)) * (x[:, :1] == 50)


def leak_by_choice(x):
    """Every row learns whether it holds the largest number."""
    largest = torch.arange(len(x)) == x[:, 0].argmax()
    return x.cumsum(0) + largest.to(x)[:, None]


CAUSALITY = {
    "a running sum": dict(
        f=running_sum,
        causal=True,
        says="row t may change with token t itself, not with the tokens after it",
    ),
    "a sum by a matrix of zeros and ones": dict(
        f=sum_by_matrix,
        causal=True,
        length=11,
        width=4,
        says="this function multiplies later tokens by 0, and 0 times NaN or infinity is NaN",
    ),
    "x itself": dict(
        f=lambda x: x,
        causal=True,
        length=7,
        width=2,
        says="each row is its token; the function returns x itself, and not a copy",
    ),
    "a mean of all": dict(
        f=mean_of_all,
        causal=False,
        length=6,
        says="every row reads the mean of all tokens; another order of them does not change it",
    ),
    "a mean of zeros": dict(
        f=mean_of_all,
        causal=False,
        zeros=True,
        says="every row reads the mean, and all of x is 0 here: other numbers must take its place",
    ),
    "a leak inside blocks of 4": dict(
        f=block_sum,
        causal=False,
        says="rows 0 to 7 read their whole block, and the last token, 8, is alone in its block",
    ),
    "a leak at one place": dict(
        f=leak_at(6),
        causal=False,
        says="row 6 reads token 7, and nothing else is wrong",
    ),
    "a leak near the beginning": dict(
        f=leak_at(1),
        causal=False,
        width=2,
        says="row 1 reads token 2, and nothing else is wrong",
    ),
    "a leak near the end": dict(
        f=leak_at(12),
        causal=False,
        length=14,
        width=5,
        says="row 12 of 14 reads token 13, and nothing else is wrong",
    ),
    "a leak of a millionth": dict(
        f=with_later(lambda x: 1e-6 * x),
        causal=False,
        says="each row reads its successor times 0.000001, and causal means exactly 0",
    ),
    "a leak of a sign": dict(
        f=with_later(lambda x: 1e-9 * x.sign()),
        causal=False,
        says="each row reads 1e-9 times the sign of its successor, and causal means exactly 0",
    ),
    "a leak through a choice": dict(
        f=leak_by_choice,
        causal=False,
        says="each row learns whether it holds the largest number of the whole sequence; no "
        "gradient and no small change shows that",
    ),
    "a leak from three tokens ahead": dict(
        f=with_later(lambda x: x, ahead=3),
        causal=False,
        says="each row reads the third token after it, and not the next one",
    ),
    "a leak between channels": dict(
        f=with_later(channel_1),
        causal=False,
        says="channel 1 of the next token is added to channel 1 and taken from channel 2",
    ),
    "a leak of a size": dict(
        f=with_later(torch.abs),
        causal=False,
        says="each row reads how large its successor is, whatever its sign",
    ),
    "a leak of large numbers": dict(
        f=with_later(lambda x: (x - 60).relu()),
        causal=False,
        says="each row reads how far its successor lies above 60: replace by large numbers too",
    ),
    "a leak of very negative numbers": dict(
        f=with_later(lambda x: (-x - 60).relu()),
        causal=False,
        says="each row reads how far its successor lies below -60: replace by such numbers too",
    ),
    "a leak where x is 50": dict(
        f=leak_at_a_number,
        causal=False,
        says="a row that holds 50 reads its successor: take the x that is given",
    ),
}


def causality_case(generator, name, f, causal, says, length=9, width=3, zeros=False) -> Case:
    """A function, whether it is causal, and what to say to a wrong verdict."""
    # Whole numbers, so that every sum is exact; one clear maximum, in the middle of channel 0.
    x = torch.randint(-5, 6, (length, width), generator=generator).double()
    x[4, 0] = 50.0
    if zeros:
        x = torch.zeros_like(x)

    def explain(got, *_, **__):
        return f"the test returned {got}: {says}"

    return Case(name, dict(f=f, x=x), causal, explain=explain)


# --- 05.3 ---


def far_from_0(*levels):
    """Move the scores of each head to its level, without rounding: whole eighths, times 256."""

    def move(q, k):
        q, k = ((8 * x).round() / 8 for x in (q, k))
        q[:, :, 0] = torch.tensor(levels)[:, None] * q.shape[2] ** 0.5 / 256
        k[:, 0] = 256.0
        return q, k

    return move


def beyond_finite_masks(q, k):
    """Scores around -32768, one of them at least 64 above the others: a key gets all or nothing."""
    q = torch.zeros_like(q)
    k = torch.zeros_like(k)
    q[:, :, 0] = -128.0 * q.shape[2] ** 0.5
    k[:, 0] = 256.0
    q[:, :, 1] = 64.0 * q.shape[2] ** 0.5
    k[:, 1] = torch.arange(len(k)) * 5 % 7
    return q, k


IMPORTANCES = {
    "one head, blocks side by side": dict(length=12, heads=1, l=2, d=2, l_sel=4),
    "one head, overlapping blocks": dict(length=16, heads=1, l=4, d=2, l_sel=4),
    "two heads": dict(length=16, heads=2, l=4, d=2, l_sel=8, width=3, scale=2.0),
    "blocks of three strides": dict(length=26, heads=3, l=6, d=2, l_sel=6, width=5),
    "blocks of four strides": dict(length=37, heads=2, l=12, d=3, l_sel=12, width=6),
    "a tail": dict(length=13, heads=2, l=4, d=2, l_sel=4),
    "before the first block ends": dict(length=3, heads=2, l=4, d=2, l_sel=4),
    "equal scores": dict(length=20, heads=3, l=6, d=3, l_sel=9, width=2, scale=0.0),
    "NaN in keys that are not passed": dict(length=18, heads=2, l=4, d=2, l_sel=4, unseen=2),
    "large scores": dict(length=14, heads=1, l=3, d=3, l_sel=3, move=far_from_0(1024.0)),
    "very negative scores": dict(
        length=15, heads=2, l=4, d=2, l_sel=6, move=far_from_0(-1024.0, -1024.0)
    ),
    "heads far apart": dict(
        length=17, heads=3, l=5, d=5, l_sel=5, move=far_from_0(512.0, -512.0, 0.0)
    ),
    "scores below any mask": dict(length=19, heads=2, l=5, d=5, l_sel=10, move=beyond_finite_masks),
}


def importance_case(generator, name, l_sel, unseen=0, move=None, **shape) -> Case:
    """Random q and compressed keys; move(q, k) moves the scores.

    The last `unseen` keys are NaN, and the queries that have passed one of them are cut off.
    """
    q, k, l, d = random_scores(generator, **shape)
    if move is not None:
        q, k = move(q, k)
    expected = importance_by_definition(q, k, l, d, l_sel)
    rows = len(expected)
    if unseen:
        rows = (len(k) - unseen) * d + l - 1  # the first query that has passed one of them
        k[-unseen:] = torch.nan
    arguments = dict(q=q, k=k, block_size=l, stride=d, select_block_size=l_sel)
    call = functools.partial(first_rows, rows=rows)
    return Case(name, arguments, expected[:rows], ("query", "block"), explain_importance, call)


def random_scores(generator, length, heads, l, d, width=4, scale=1.0):
    """Random q (H, T, D) and the keys (N, D) of whole blocks, and their sizes."""
    q = torch.randn(heads, length, width, generator=generator) * scale
    count = max(0, (length - l) // d + 1)
    return q, torch.randn(count, width, generator=generator) * scale, l, d


def importance_by_definition(q, k, l, d, l_sel) -> Tensor:
    """Query by query, head by head and token by token, in double."""
    heads, length, width = q.shape
    out = torch.zeros(length, -(-length // l_sel), dtype=torch.float64)
    for t in range(l - 1, length):
        seen = [i for i in range(len(k)) if i * d + l - 1 <= t]
        for head in q.double():
            p = (k[seen].double() @ head[t] / width**0.5).softmax(0)
            for i in seen:
                for token in range(i * d, i * d + l):
                    out[t, token // l_sel] += p[i] / d
    return out.float()


def first_rows(answer, *arguments, rows):
    """The answer's first rows."""
    result = answer(*arguments)
    return result[:rows] if isinstance(result, Tensor) and result.dim() == 2 else result


def explain_importance(got, expected, q, k, block_size, stride, select_block_size):
    """NaN, a known mistake where something is seen, or a number where nothing is."""
    seen = [max(0, (t - block_size + 1) // stride + 1) for t in range(len(got))]
    if not got.isfinite().all():
        row = int((~got.isfinite()).any(1).nonzero()[0])
        bad = "NaN" if got[row].isnan().any() else "infinite"
        said = f"query {row} sees {seen[row]} compressed keys, and its importance is {bad}"
        return said + why_not_finite(q, k)
    alive = torch.tensor(seen) > 0
    if not close(got[alive], expected[alive]).all():
        call = functools.partial(first_rows, rows=len(got))
        arguments = (q, k, block_size, stride, select_block_size)
        known = dict(call=call, part=lambda result: result[alive])
        said = name_mistake(got, mistakes.IMPORTANCES, arguments, **known)
        return said or lost_by_exp(got, expected, q, k)
    for t in (~alive).nonzero().flatten().tolist():
        if got[t].any():
            return f"query {t} sees no compressed key, and its importance is not 0"
    return None


def lost_by_exp(got: Tensor, expected: Tensor, q: Tensor, k: Tensor) -> str | None:
    """The first query whose importances sum to less than they must, where scores are far from 0."""
    sums = got.sum(1)
    right = expected.sum(1)
    lost = (sums < 0.99 * right).nonzero().flatten().tolist()
    if not lost or not are_far(q, k):
        return None
    t = lost[0]
    return f"query {t} gives out {sums[t]:.4g}, and has {right[t]:.4g}{BY_EXP}"


BY_EXP = ": exp of a large score is inf, of a very negative one 0; subtract the row's largest"


def why_not_finite(q: Tensor, k: Tensor) -> str:
    """What in the inputs may have made it so."""
    if k.isnan().any():
        return ": keys that it has not passed are NaN here, and 0 times NaN is NaN"
    return BY_EXP if are_far(q, k) else ""


def are_far(q: Tensor, k: Tensor) -> bool:
    """Whether a score is so large, or so negative, that exp of it is inf or 0."""
    scores = (q @ k.T).nan_to_num()
    return scores.numel() > 0 and bool(scores.abs().max() > 500)


# --- 05.4 ---


def two_above_01(random):
    """Only blocks 1 and 2 have scores above 0.1."""
    score = random / 10
    score[:, [1, 2]] = 3.0
    return score


CHOICES = {
    "blocks that have not begun": dict(
        length=24, l_sel=1, n=4, make=lambda random: torch.arange(24.0).repeat(24, 1)
    ),
    "forced blocks": dict(length=24, l_sel=4, n=4),
    "forced blocks with the lowest scores": dict(length=24, l_sel=4, n=4, make=two_above_01),
    "ties": dict(length=24, l_sel=3, n=5, make=torch.zeros_like),
    "fewer blocks than n": dict(length=10, l_sel=4, n=5),
    "one token": dict(length=1, l_sel=4, n=3),
    "a tail": dict(length=27, l_sel=5, n=4),
    "a last block of one token": dict(length=13, l_sel=6, n=3),
    "scores on both sides of 0": dict(length=26, l_sel=3, n=6, make=lambda random: random - 0.5),
    "scores that differ by little": dict(
        length=30, l_sel=3, n=5, make=lambda random: 5000 + 16 * random
    ),
    "very large scores": dict(length=23, l_sel=2, n=6, make=lambda random: 1e38 * random),
    "very negative scores": dict(length=25, l_sel=3, n=7, make=lambda random: -1e38 * random),
    "NaN or inf for blocks that have not begun": dict(length=22, l_sel=3, n=5, garbage=True),
}


def choice_case(
    generator, name, length, l_sel, n, make=lambda random: 16 * random, garbage=False
) -> Case:
    """Scores made from random numbers below 1; as they come, they are those of 16 heads."""
    score = make(torch.rand(length, -(-length // l_sel), generator=generator))
    expected = loops.choose_blocks(score[None, None], select_block_size=l_sel, num_selected=n)
    if garbage:
        j = torch.arange(score.shape[1])
        later = j * l_sel > torch.arange(length)[:, None]
        score = torch.where(later, torch.where(j % 2 == 0, torch.nan, torch.inf), score)
    arguments = dict(score=score, select_block_size=l_sel, num_selected=n)
    return Case(name, arguments, expected[0, 0], ("query", "place"), explain_choice)


def explain_choice(got, expected, score, select_block_size, num_selected):
    """What is wrong with the first wrong row."""
    for t, (ids, right) in enumerate(zip(got.tolist(), expected.tolist(), strict=True)):
        if ids != right:
            said = lacking_or_strange(t, ids, select_block_size)
            return said or other_blocks(t, ids, right, score[t].tolist(), select_block_size)
    return None


def lacking_or_strange(t, ids, l_sel):
    """A block that has not begun or stands twice, or a forced one that is missing."""
    own = t // l_sel
    real = [j for j in ids if j >= 0]
    if max(real, default=0) > own:
        return f"query {t} chose block {max(real)}, which begins at token {max(real) * l_sel}"
    if twice := [j for j in real if real.count(j) > 1]:
        return f"query {t} chose block {twice[0]} {real.count(twice[0])} times"
    for kind, j in (("initial block", 0), ("own block", own), ("block before its own", own - 1)):
        if j >= 0 and j not in real:
            return f"query {t} did not choose its {kind}, {j}: it is forced"
    return None


def other_blocks(t, ids, right, score, l_sel):
    """Too few or too many blocks, another order, or another choice among those that are free."""
    real = [j for j in ids if j >= 0]
    wanted = [j for j in right if j >= 0]
    if len(real) != len(wanted):
        begun = t // l_sel + 1
        return f"query {t} chose {len(real)} blocks; {begun} have begun and n is {len(right)}"
    if sorted(real) == wanted:
        return f"query {t}: the right blocks, but not ascending with -1 behind them: {ids}"
    missed = next(j for j in wanted if j not in real)
    taken = next(j for j in real if j not in wanted)
    if score[missed] == score[taken]:
        return (
            f"query {t}: blocks {min(missed, taken)} and {max(missed, taken)} tie, and the "
            "higher one was chosen"
        )
    return (
        f"query {t} chose block {taken} with score {score[taken]:.6g}, and left out block "
        f"{missed} with {score[missed]:.6g}"
    )


# --- 05.5 ---

PAIRS = [f"{b} {kind}" for b in BRANCHES for kind in ("keys", "values")]
SIZES = dict(block_size=2, stride=1, select_block_size=2, num_selected=3, window=5)
LAYERS = {
    "whole blocks": dict(length=10, sizes=SIZES),
    "a tail": dict(length=9, sizes={**SIZES, "window": 3}, hidden=7),
    "one token, so no block yet": dict(length=1, sizes={**SIZES, "select_block_size": 3}, dim=6),
    "three heads, blocks of three strides": dict(
        length=45,
        sizes=dict(block_size=6, stride=2, select_block_size=8, num_selected=4, window=3),
        dim=7,
        heads=3,
        width=5,
        hidden=9,
    ),
    "a window beyond the beginning": dict(
        length=21,
        sizes=dict(block_size=3, stride=3, select_block_size=6, num_selected=2, window=30),
        dim=5,
        heads=1,
        width=3,
        hidden=4,
    ),
    "equal tokens": dict(
        length=13,
        sizes=dict(block_size=4, stride=2, select_block_size=4, num_selected=2, window=6),
        heads=4,
        width=2,
        equal=True,
    ),
}


def layer_cases(generator: torch.Generator) -> list[Case]:
    """Outputs, and last which weights a gradient reaches."""
    outputs = in_turn(layer_case, LAYERS)(generator)
    last = layer_case(generator, "which weights each branch trains", **LAYERS["whole blocks"])
    return [*outputs, Case(last.name, last.arguments, PAIRS, explain=explain_trained, call=trained)]


def layer_case(generator, name, length, sizes, equal=False, **shape) -> Case:
    """Random weights and tokens, and the layer by the package's loops."""
    p = weights(generator, sizes["block_size"], **shape)
    x = clear_tokens(generator, p, sizes, length)
    if equal:
        x = x[:1].expand_as(x).clone()
    arguments = dict(x=x, p=p, sizes=sizes)
    expected = mistakes.layer(loops)(**arguments)
    return Case(name, arguments, expected, ("head", "query", "channel"), explain_layer)


def weights(generator: torch.Generator, l, dim=8, heads=2, width=4, hidden=8) -> dict:
    """A layer's weights: one query, a key and a value for each branch, two phi, one gate."""

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=generator) * 1.5 * rows**-0.5

    def phi():
        return {
            "position": torch.randn(l, width, generator=generator),
            "first": matrix(l * width, hidden + 3),
            "second": matrix(hidden + 3, width),
        }

    return {
        "query": matrix(dim, heads * width) * 2,
        "keys": {b: matrix(dim, width) for b in BRANCHES},
        "values": {b: matrix(dim, width) for b in BRANCHES},
        "phi_k": phi(),
        "phi_v": phi(),
        "gate": {"first": matrix(dim, hidden), "second": matrix(hidden, 3 * heads) * 2},
    }


def clear_tokens(generator: torch.Generator, p: dict, sizes: dict, length: int) -> Tensor:
    """Random tokens whose choice of blocks does not hang on rounding."""
    while True:
        x = torch.randn(length, len(p["query"]), generator=generator)
        if clear_choice(x, p, sizes):
            return x


def clear_choice(x, p, sizes) -> bool:
    """Whether no block is left out that has nearly the importance of one that is chosen."""
    blocks = dict(block_size=sizes["block_size"], stride=sizes["stride"])
    l_sel = sizes["select_block_size"]
    q = mistakes.query_heads(x, p)
    k = mistakes.compress(x @ p["keys"]["compressed"], p["phi_k"], sizes)
    _, lse = nsa_lite.compressed_attention(q, k, k, **blocks)
    score = nsa_lite.block_importance(q, k, lse, **blocks, select_block_size=l_sel)[0, 0]
    rows = [score[t, 1 : t // l_sel] for t in range(len(x))]  # 0 and the own are forced
    free = sizes["num_selected"] - 2
    edges = [row.sort(descending=True).values[free - 1 : free + 1] for row in rows if free > 0]
    return all(edge[0] - edge[1] > 1e-3 for edge in edges if len(edge) == 2)


def trained(answer, x, p, sizes):
    """The weights among the keys and values that get a gradient from the layer."""
    leaves = {
        f"{b} {kind}": p[kind][b].requires_grad_() for b in BRANCHES for kind in ("keys", "values")
    }
    out = answer(x, p, sizes)
    if not isinstance(out, Tensor) or not out.requires_grad:
        return out if out is None else []
    found = torch.autograd.grad(out.square().sum(), list(leaves.values()), allow_unused=True)
    for leaf in leaves.values():
        leaf.requires_grad_(False)
    return [name for name, g in zip(leaves, found, strict=True) if g is not None and g.any()]


def explain_trained(got, expected, x, p, sizes):
    """The weights that no gradient reaches."""
    missing = [name for name in expected if name not in got]
    return f"no gradient reaches the {', '.join(missing)}" if missing else None


def explain_layer(got, expected, x, p, sizes):
    """A known mistake, if the tokens differ: of equal ones several mistakes give the same."""
    if (x == x[0]).all():
        return None
    return name_mistake(got, mistakes.LAYERS, (x, p, sizes))


EXERCISES = [
    Exercise(
        "05.1",
        "Blocks with a stride",
        "warm-up",
        5,
        in_turn(split_case, SPLITS),
        hints=(
            "Where does block 1 begin, and where does it end? What if the sequence ends before "
            "block 0 does?",
            "Block i holds tokens i d .. i d + l - 1; there are max(0, (T - l) // d + 1) blocks.",
            "slice out each whole block and stack them; with no block at all, make an empty "
            "tensor of the right shape (or look up torch.Tensor.unfold and its order of axes)",
        ),
    ),
    Exercise(
        "05.2",
        "A test that sees the future",
        "core",
        15,
        in_turn(causality_case, CAUSALITY),
        hints=(
            "If you change only the last token, which leaks do you not see? If you ask for "
            "closeness, which? If your change is small, which?",
            "f is causal iff for every t: f(x') and f(x) agree exactly in rows 0 .. t, for any x' "
            "that agrees with x in rows 0 .. t.",
            "once: the true output. For each t: a copy of x whose tokens after t are replaced by "
            "large finite numbers; run f; compare the rows up to t bit by bit; any difference "
            "means False",
        ),
    ),
    Exercise(
        "05.3",
        "From scores to importance",
        "core",
        20,
        in_turn(importance_case, IMPORTANCES),
        hints=(
            "Which compressed keys has the query passed? What do two heads have in common that "
            "may be added? How many columns must the result have?",
            "p = softmax of the scaled scores over the visible keys, per head. importance[t, j] "
            "= sum over heads and over i of p[t, i] |C_i and S_j| / d.",
            "mask scores by i d + l - 1 <= t; softmax; rows that see nothing to 0; add the heads; "
            "build a table (N, blocks) of shared tokens, min of the ends minus max of the starts, "
            "not below 0; divide by d; multiply",
        ),
    ),
    Exercise(
        "05.4",
        "Choose the blocks",
        "core",
        20,
        in_turn(choice_case, CHOICES),
        hints=(
            "Which blocks has query t begun? Which must it take whatever their score? How large "
            "can a score become?",
            "Legal: j l' <= t. Forced: 0, own, own - 1, as a set, where own = t // l'. Then the "
            "best legal ones until n are chosen or none is left; ties to the lower id.",
            "per query: a set of forced ids; sort the other legal ids by falling score (a stable "
            "sort keeps ties in order); fill up to n; sort ascending; pad with -1. Or for all at "
            "once: +inf for forced, -inf for illegal, a stable descending sort, and mask again",
        ),
    ),
    Exercise(
        "05.5",
        "Wire the layer anew",
        "stretch",
        45,
        layer_cases,
        hints=(
            "Follow each weight in p: which branch may use it? What goes into the gate?",
            "out = sum over branches c of sigmoid(MLP(x))_c times Attn(q, K_c, V_c); phi(block) = "
            "gelu(flatten(block + position) first) second; the MLP of the gate is gelu(x first) "
            "second.",
            "project the query once and each branch's keys and values; split and compress the "
            "compressed branch's; compressed_attention gives out and lse; select_blocks takes "
            "lse; selected_attention and window_attention take their own keys; the gate's columns "
            "go head by head, three each",
        ),
    ),
]
