"""Set 05, find the bugs: five parts of a faulty skeleton, and a test that sees the future."""

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
    "a tail too short for a block": dict(length=11, block_size=4, stride=2),
    "exactly one token too few": dict(length=3, block_size=4, stride=2),
    "one token": dict(length=1, block_size=4, stride=2),
}


def split_case(generator, name, length, block_size, stride, width=3) -> Case:
    """Random tokens, and their blocks as slices."""
    x = torch.randn(length, width, generator=generator)
    rows = [x[i : i + block_size] for i in range(0, length - block_size + 1, stride)]
    expected = torch.stack(rows) if rows else torch.empty(0, block_size, width)
    arguments = dict(x=x, block_size=block_size, stride=stride)
    return Case(name, arguments, expected, ("block", "place", "channel"), explain_split)


def explain_split(got, expected, x, block_size, stride):
    """Which tokens the first wrong block holds, or a known mistake."""
    i = int((~close(got, expected)).flatten(1).any(1).nonzero()[0])
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


def one_leak(x):
    """Row 6 reads token 7."""
    out = x.cumsum(0)
    if len(x) > 7:
        out[6] = out[6] + x[7]
    return out


def small_leak(x):
    """Every row reads a little of its successor."""
    return x.cumsum(0) + 1e-6 * F.pad(x[1:], (0, 0, 0, 1))


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
        says="this function multiplies later tokens by 0, and 0 times NaN or infinity is NaN",
    ),
    "a leak inside blocks of 4": dict(
        f=block_sum,
        causal=False,
        says="rows 0 to 7 read their whole block, and the last token, 8, is alone in its block",
    ),
    "a leak at one place": dict(
        f=one_leak,
        causal=False,
        says="row 6 reads token 7, and nothing else is wrong",
    ),
    "a leak of a millionth": dict(
        f=small_leak,
        causal=False,
        says="each row reads its successor times 0.000001, and causal means exactly 0",
    ),
    "a leak through a choice": dict(
        f=leak_by_choice,
        causal=False,
        says="each row learns whether it holds the largest number of the whole sequence; no "
        "gradient and no small change shows that",
    ),
}


def causality_cases(generator: torch.Generator) -> list[Case]:
    """All functions at the same numbers."""
    # Whole numbers, so that every sum is exact; one clear maximum, in the middle of channel 0.
    x = torch.randint(-5, 6, (9, 3), generator=generator).double()
    x[4, 0] = 50.0
    return [causality_case(name, x, **row) for name, row in CAUSALITY.items()]


def causality_case(name, x, f, causal, says) -> Case:
    """A function, whether it is causal, and what to say to a wrong verdict."""

    def explain(got, *_, **__):
        return f"the test returned {got}: {says}"

    return Case(name, dict(f=f, x=x), causal, explain=explain)


# --- 05.3 ---

IMPORTANCES = {
    "one head, blocks side by side": dict(length=12, heads=1, l=2, d=2, l_sel=4),
    "one head, overlapping blocks": dict(length=16, heads=1, l=4, d=2, l_sel=4),
    "two heads": dict(length=16, heads=2, l=4, d=2, l_sel=8, scale=2.0),
    "a tail": dict(length=11, heads=2, l=4, d=2, l_sel=4),
    "before the first block ends": dict(length=3, heads=2, l=4, d=2, l_sel=4),
}


def importance_case(generator, name, length, heads, l, d, l_sel, scale=1.0) -> Case:
    """Random q and compressed keys, and the package's loops over them."""
    q = torch.randn(heads, length, 4, generator=generator) * scale
    count = max(0, (length - l) // d + 1)
    k = torch.randn(count, 4, generator=generator) * scale
    sizes = dict(block_size=l, stride=d)
    one = k[None, None]
    _, lse = loops.compressed_attention(q[None], one, one, **sizes)
    expected = loops.block_importance(q[None], one, lse, **sizes, select_block_size=l_sel)[0, 0]
    arguments = dict(q=q, k=k, **sizes, select_block_size=l_sel)
    return Case(name, arguments, expected, ("query", "block"), explain_importance)


def explain_importance(got, expected, q, k, block_size, stride, select_block_size):
    """NaN, a known mistake where something is seen, or a number where nothing is."""
    seen = [max(0, (t - block_size + 1) // stride + 1) for t in range(len(got))]
    if got.isnan().any():
        row = int(got.isnan().any(1).nonzero()[0])
        return f"query {row} sees {seen[row]} compressed keys, and its importance is NaN"
    alive = torch.tensor(seen) > 0
    if not close(got[alive], expected[alive]).all():
        arguments = (q, k, block_size, stride, select_block_size)
        return name_mistake(got, mistakes.IMPORTANCES, arguments, part=lambda result: result[alive])
    for t in (~alive).nonzero().flatten().tolist():
        if got[t].any():
            return f"query {t} sees no compressed key, and its importance is not 0"
    return None


# --- 05.4 ---

NEWEST_FIRST = torch.arange(24.0).repeat(24, 1)
CHOICES = {
    "blocks that have not begun": dict(length=24, l_sel=1, n=4, score=NEWEST_FIRST),
    "forced blocks": dict(length=24, l_sel=4, n=4),
    "forced blocks with the lowest scores": dict(length=24, l_sel=4, n=4, low=True),
    "ties": dict(length=24, l_sel=3, n=5, score=torch.zeros(24, 8)),
    "fewer blocks than n": dict(length=10, l_sel=4, n=5),
    "one token": dict(length=1, l_sel=4, n=3),
}


def choice_case(generator, name, length, l_sel, n, score=None, low=False) -> Case:
    """Scores as large as 16 heads make them, or given ones; low leaves two blocks above 0.1."""
    if score is None:
        score = torch.rand(length, -(-length // l_sel), generator=generator) * 16
    if low:
        score = score / 160
        score[:, [1, 2]] = 3.0
    expected = loops.choose_blocks(score[None, None], select_block_size=l_sel, num_selected=n)
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
        f"query {t} chose block {taken} with score {score[taken]:.2f}, and left out block "
        f"{missed} with {score[missed]:.2f}"
    )


# --- 05.5 ---

SIZES = dict(block_size=2, stride=1, select_block_size=2, num_selected=3, window=3)
PAIRS = [f"{b} {kind}" for b in BRANCHES for kind in ("keys", "values")]


def layer_cases(generator: torch.Generator) -> list[Case]:
    """Outputs of three lengths, and which weights a gradient reaches; one set of weights."""
    p = weights(generator)
    lengths = {"whole blocks": 10, "a tail": 9, "one token, so no block yet": 1}
    return [
        *(layer_case(generator, name, p, length) for name, length in lengths.items()),
        gradient_case(generator, "which weights each branch trains", p, 10),
    ]


def layer_case(generator, name, p, length) -> Case:
    """Random tokens, and the layer by the package's loops."""
    arguments = dict(x=clear_tokens(generator, p, length), p=p, sizes=SIZES)
    expected = mistakes.layer(loops)(**arguments)
    return Case(name, arguments, expected, ("head", "query", "channel"), explain_layer)


def gradient_case(generator, name, p, length) -> Case:
    """The names of all keys and values, which a gradient must reach."""
    arguments = dict(x=clear_tokens(generator, p, length), p=p, sizes=SIZES)
    return Case(name, arguments, PAIRS, explain=explain_trained, call=trained)


def weights(generator: torch.Generator, dim=8, heads=2, width=4) -> dict:
    """A layer's weights: one query, a key and a value for each branch, two phi, one gate."""

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=generator) * 1.5 * rows**-0.5

    def phi():
        l = SIZES["block_size"]
        return {
            "position": torch.randn(l, width, generator=generator),
            "first": matrix(l * width, 2 * width),
            "second": matrix(2 * width, width),
        }

    return {
        "query": matrix(dim, heads * width) * 2,
        "keys": {b: matrix(dim, width) for b in BRANCHES},
        "values": {b: matrix(dim, width) for b in BRANCHES},
        "phi_k": phi(),
        "phi_v": phi(),
        "gate": {"first": matrix(dim, dim), "second": matrix(dim, 3 * heads) * 2},
    }


def clear_tokens(generator: torch.Generator, p: dict, length: int) -> Tensor:
    """Random tokens whose choice of blocks does not hang on rounding."""
    while True:
        x = torch.randn(length, 8, generator=generator)
        if clear_choice(x, p):
            return x


def clear_choice(x, p) -> bool:
    """Whether no two blocks that compete for the free place have nearly the same importance."""
    blocks = dict(block_size=SIZES["block_size"], stride=SIZES["stride"])
    q = mistakes.query_heads(x, p)
    k = mistakes.compress(x @ p["keys"]["compressed"], p["phi_k"], SIZES)
    _, lse = nsa_lite.compressed_attention(q, k, k, **blocks)
    score = nsa_lite.block_importance(q, k, lse, **blocks, select_block_size=2)[0, 0]
    rows = [score[t, 1 : t // 2].sort().values for t in range(len(x))]  # 0 and the own are forced
    return all(row.diff().min() > 0.01 for row in rows if len(row) > 1)


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
    """A known mistake."""
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
        causality_cases,
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
