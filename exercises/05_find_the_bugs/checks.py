"""Set 05, find the bugs: five parts of a faulty skeleton, and a test that sees the future."""

import torch
import torch.nn.functional as F
from torch import Tensor

import nsa_lite
from exercises.compare import close, matches, recognise
from exercises.records import Case, Exercise
from nsa_lite import BRANCHES, loops

# --- 05.1 ---


def split_cases(generator: torch.Generator) -> list[Case]:
    def case(name, length, l, d, width=3):
        x = torch.randn(length, width, generator=generator)
        rows = [x[i : i + l] for i in range(0, length - l + 1, d)]
        expected = torch.stack(rows) if rows else torch.empty(0, l, width)
        return Case(
            name,
            dict(x=x, block_size=l, stride=d),
            expected,
            ("block", "place", "channel"),
            explain_split,
        )

    return [
        case("one block", 4, 4, 4),
        case("order inside a block", 12, 4, 4, width=4),
        case("overlapping blocks", 12, 4, 2, width=2),
        case("a tail too short for a block", 11, 4, 2),
        case("exactly one token too few", 3, 4, 2),
        case("one token", 1, 4, 2),
    ]


def explain_split(got, expected, x, block_size, stride):
    i = int((~close(got, expected)).flatten(1).any(1).nonzero()[0])
    for first in range(len(x) - block_size + 1):
        if close(got[i], x[first : first + block_size]).all():
            return f"block {i} holds tokens {first} to {first + block_size - 1}"
    return recognise(
        got,
        {
            "the tokens of a block are in the reverse order": expected.flip(1),
            "the blocks are in the reverse order": expected.flip(0),
            "the numbers of a block are in another order than its tokens and channels": expected.transpose(
                1, 2
            ).reshape(expected.shape),
        },
    )


# --- 05.2 ---


def causality_cases(generator: torch.Generator) -> list[Case]:
    # Whole numbers, so that every sum is exact; one clear maximum, in the middle of channel 0.
    x = torch.randint(-5, 6, (9, 3), generator=generator).double()
    x[4, 0] = 50.0

    def case(name, f, expected, says):
        return Case(
            name,
            dict(f=f, x=x),
            expected,
            explain=lambda got, *_, **__: f"the test returned {got}: {says}",
        )

    return [
        case(
            "a running sum",
            running_sum,
            True,
            "row t may change with token t itself, not with the tokens after it",
        ),
        case(
            "a sum by a matrix of zeros and ones",
            sum_by_matrix,
            True,
            "this function multiplies later tokens by 0, and 0 times NaN or infinity is NaN",
        ),
        case(
            "a leak inside blocks of 4",
            block_sum,
            False,
            "rows 0 to 7 read their whole block, and the last token, 8, is alone in its block",
        ),
        case(
            "a leak at one place", one_leak, False, "row 6 reads token 7, and nothing else is wrong"
        ),
        case(
            "a leak of a millionth",
            small_leak,
            False,
            "each row reads its successor times 0.000001, and causal means exactly 0",
        ),
        case(
            "a leak through a choice",
            leak_by_choice,
            False,
            "each row learns whether it holds the largest number of the whole sequence; no "
            "gradient and no small change shows that",
        ),
    ]


def running_sum(x):
    return x.cumsum(0)


def sum_by_matrix(x):
    return torch.ones(len(x), len(x), dtype=x.dtype).tril() @ x


def block_sum(x):
    block = torch.arange(len(x)) // 4
    return (block == block[:, None]).to(x) @ x


def one_leak(x):
    out = x.cumsum(0)
    if len(x) > 7:
        out[6] = out[6] + x[7]
    return out


def small_leak(x):
    return x.cumsum(0) + 1e-6 * F.pad(x[1:], (0, 0, 0, 1))


def leak_by_choice(x):
    largest = torch.arange(len(x)) == x[:, 0].argmax()
    return x.cumsum(0) + largest.to(x)[:, None]


# --- 05.3 ---


def importance_cases(generator: torch.Generator) -> list[Case]:
    def case(name, length, heads, l, d, l_sel, scale=1.0):
        q = torch.randn(heads, length, 4, generator=generator) * scale
        count = max(0, (length - l) // d + 1)
        k = torch.randn(count, 4, generator=generator) * scale
        sizes = dict(block_size=l, stride=d)
        _, lse = loops.compressed_attention(q[None], k[None, None], k[None, None], **sizes)
        expected = loops.block_importance(
            q[None], k[None, None], lse, **sizes, select_block_size=l_sel
        )[0, 0]
        arguments = dict(q=q, k=k, **sizes, select_block_size=l_sel)
        return Case(name, arguments, expected, ("query", "block"), explain_importance)

    return [
        case("one head, blocks side by side", 12, 1, 2, 2, 4),
        case("one head, overlapping blocks", 16, 1, 4, 2, 4),
        case("two heads", 16, 2, 4, 2, 8, scale=2.0),
        case("a tail", 11, 2, 4, 2, 4),
        case("before the first block ends", 3, 2, 4, 2, 4),
    ]


def overlaps(count, blocks, l, d, l_sel):
    """Tokens that compression block i (row) shares with selection block j (column)."""
    table = torch.zeros(count, blocks)
    for i in range(count):
        for token in range(i * d, i * d + l):
            table[i, token // l_sel] += 1
    return table


def printed_formula(p, blocks, l, d, l_sel):
    """Eq. 9 with the paper's indices, from 1, used as if they counted from 0."""
    out = torch.zeros(len(p), blocks)
    for j in range(blocks):
        for m in range(l_sel // d):
            for n in range(l // d):
                i = l_sel // d * j - m - n
                if 0 <= i < p.shape[1]:
                    out[:, j] += p[:, i]
    return out


def explain_importance(got, expected, q, k, block_size, stride, select_block_size):
    l, d, l_sel = block_size, stride, select_block_size
    (heads, length, width), (count, blocks) = q.shape, (len(k), expected.shape[1])
    if got.isnan().any():
        row = int(got.isnan().any(1).nonzero()[0])
        seen = max(0, (row - l + 1) // d + 1)
        return f"query {row} sees {seen} compressed keys, and its importance is NaN"
    scores = q @ k.T * width**-0.5
    i, t = torch.arange(count), torch.arange(length)[:, None]
    seen, begun = i * d + l - 1 <= t, i * d <= t
    table = overlaps(count, blocks, l, d, l_sel)

    def weights(mask, scores=scores):
        return scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num()

    p = weights(seen)
    total = p.sum(0)
    where = F.one_hot(i * d // l_sel, blocks).float() if count else table
    heaviest = (
        torch.stack([torch.where(table[:, j] > 0, total, 0).amax(1) for j in range(blocks)], 1)
        if count
        else expected
    )
    whole_heads = scores.masked_fill(~seen, -torch.inf).transpose(0, 1).flatten(1)
    pooled = whole_heads.softmax(1).nan_to_num().unflatten(1, (heads, count)).sum(1)
    known = {
        "a query's scores reach compressed keys whose blocks it has not passed": weights(
            seen | True
        ).sum(0)
        @ table
        / d,
        "a compressed key counts from the token on at which its block begins": weights(begun).sum(0)
        @ table
        / d,
        "the logits are summed, and Eq. 8 turns them into probabilities first": scores.masked_fill(
            ~seen, 0.0
        ).sum(0)
        @ table
        / d,
        "the scores are not divided by the root of the width": weights(seen, q @ k.T).sum(0)
        @ table
        / d,
        "only head 0 counts": p[0] @ table / d,
        "the mean over the heads is taken, and Eq. 10 sums": p.mean(0) @ table / d,
        "one softmax runs over the keys of all heads": pooled @ table / d,
        "the heads' logits are summed before the softmax": weights(seen, scores.sum(0)) @ table / d,
        "an overlap counts its tokens, and it should count strides": total @ table,
        "each compression block counts once, for the selection block that it begins in": total
        @ where,
        "a selection block gets its heaviest compression block, not the sum": heaviest,
        "the weights land one block too early or too late: Eq. 9 as printed counts from 1": printed_formula(
            total, blocks, l, d, l_sel
        ),
    }
    alive = seen.any(1)
    if not close(got[alive], expected[alive]).all():
        return recognise(got[alive], {says: value[alive] for says, value in known.items()})
    for t in (~alive).nonzero().flatten().tolist():
        if got[t].any():
            return f"query {t} sees no compressed key, and its importance is not 0"
    return None


# --- 05.4 ---


def choice_cases(generator: torch.Generator) -> list[Case]:
    def case(name, length, l_sel, n, score=None):
        blocks = -(-length // l_sel)
        if score is None:  # probabilities of 16 heads: far more than 1
            score = torch.rand(length, blocks, generator=generator) * 16
        expected = loops.choose_blocks(score[None, None], select_block_size=l_sel, num_selected=n)
        arguments = dict(score=score, select_block_size=l_sel, num_selected=n)
        return Case(name, arguments, expected[0, 0], ("query", "place"), explain_choice)

    low = torch.rand(24, 6, generator=generator) * 0.1
    newest_first = torch.arange(24.0).repeat(24, 1)
    return [
        case("blocks that have not begun", 24, 1, 4, newest_first),
        case("forced blocks", 24, 4, 4),
        case(
            "forced blocks with the lowest scores",
            24,
            4,
            4,
            low.index_fill(1, torch.tensor([1, 2]), 3.0),
        ),
        case("ties", 24, 3, 5, torch.zeros(24, 8)),
        case("fewer blocks than n", 10, 4, 5),
        case("one token", 1, 4, 3),
    ]


def explain_choice(got, expected, score, select_block_size, num_selected):
    for t, (ids, right) in enumerate(zip(got.tolist(), expected.tolist(), strict=True)):
        if ids != right:
            return _fault_of_choice(t, ids, right, score[t].tolist(), select_block_size)
    return None


def _fault_of_choice(t, ids, right, score, l_sel):
    """What is wrong with one query's ids."""
    own, real = t // l_sel, [j for j in ids if j >= 0]
    if max(real, default=0) > own:
        j = max(real)
        return f"query {t} chose block {j}, which begins at token {j * l_sel}"
    if twice := [j for j in real if real.count(j) > 1]:
        return f"query {t} chose block {twice[0]} {real.count(twice[0])} times"
    for kind, j in (("initial block", 0), ("own block", own), ("block before its own", own - 1)):
        if j >= 0 and j not in real:
            return f"query {t} did not choose its {kind}, {j}: it is forced"
    if len(real) != sum(j >= 0 for j in right):
        return f"query {t} chose {len(real)} blocks; {own + 1} have begun and n is {len(right)}"
    if sorted(real) == [j for j in right if j >= 0]:
        return f"query {t}: the right blocks, but not ascending with -1 behind them: {ids}"
    missed = next(j for j in right if j >= 0 and j not in real)
    taken = next(j for j in real if j not in right)
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

BLOCKS = dict(block_size=2, stride=1)
SELECT = dict(select_block_size=2, num_selected=3)
SIZES = dict(**BLOCKS, **SELECT, window=3)


def layer_cases(generator: torch.Generator) -> list[Case]:
    p = weights(generator)

    def case(name, length, call=None, explain=None, expected=None, axes=None):
        x = torch.randn(length, 8, generator=generator)
        while not clear_choice(x, p):  # rounding must not decide which block is chosen
            x = torch.randn(length, 8, generator=generator)
        out = forward(loops, x, p) if expected is None else expected
        return Case(
            name,
            dict(x=x, p=p, sizes=SIZES),
            out,
            axes or ("head", "query", "channel"),
            explain or explain_layer,
            call,
        )

    return [
        case("whole blocks", 10),
        case("a tail", 9),
        case("one token, so no block yet", 1),
        case(
            "which weights each branch trains",
            10,
            trained,
            explain_trained,
            [b + " " + kind for b in BRANCHES for kind in ("keys", "values")],
        ),
    ]


def weights(generator: torch.Generator, dim=8, heads=2, width=4) -> dict:
    """A layer's weights: one query, a key and a value for each branch, two phi, one gate."""

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=generator) * 1.5 * rows**-0.5

    def phi():
        l = SIZES["block_size"]
        position = torch.randn(l, width, generator=generator)
        return {
            "position": position,
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


def forward(
    ops,
    x,
    p,
    *,
    keys=BRANCHES,
    values=BRANCHES,
    bend=F.gelu,
    gate_bend=F.gelu,
    position=True,
    phi_of_values="phi_v",
    gate_from=None,
    gate=torch.sigmoid,
    head_first=True,
    num_local=1,
):
    """The layer with the operations of `ops`, and some mistakes by keyword; (H, T, D)."""
    width = p["keys"]["window"].shape[1]
    q = (x @ p["query"]).unflatten(1, (-1, width)).transpose(0, 1)[None]
    k, v = (
        [(x @ p[kind][b])[None, None] for b in whose]
        for kind, whose in (("keys", keys), ("values", values))
    )
    short_k = _phi(k[0][0, 0], p["phi_k"], bend, position)[None, None]
    short_v = _phi(v[0][0, 0], p[phi_of_values], bend, position)[None, None]
    out_c, lse = ops.compressed_attention(q, short_k, short_v, **BLOCKS)
    ids = ops.select_blocks(q, short_k, lse, **BLOCKS, **SELECT, num_local=num_local)
    out_s = ops.selected_attention(q, k[1], v[1], ids, select_block_size=2)
    out_w = ops.window_attention(q, k[2], v[2], window=SIZES["window"])
    hidden = gate_bend((x if gate_from is None else gate_from(q)) @ p["gate"]["first"])
    logits = hidden @ p["gate"]["second"]
    heads = q.shape[1]
    logits = (
        logits.unflatten(1, (heads, 3))
        if head_first
        else logits.unflatten(1, (3, heads)).transpose(1, 2)
    )
    g = gate(logits).transpose(0, 1)  # (H, T, 3)
    return sum(g[..., [c]] * out[0] for c, out in enumerate((out_c, out_s, out_w)))


def clear_choice(x, p) -> bool:
    """Whether no two blocks that compete for the free place have nearly the same importance."""
    q = (x @ p["query"]).unflatten(1, (-1, 4)).transpose(0, 1)[None]
    k = _phi(x @ p["keys"]["compressed"], p["phi_k"], F.gelu, True)[None, None]
    _, lse = nsa_lite.compressed_attention(q, k, k, **BLOCKS)
    score = nsa_lite.block_importance(q, k, lse, **BLOCKS, select_block_size=2)[0, 0]
    rows = [score[t, 1 : t // 2].sort().values for t in range(len(x))]  # 0 and the own are forced
    return all(row.diff().min() > 0.01 for row in rows if len(row) > 1)


def _phi(x, p, bend, position):
    l, d = SIZES["block_size"], SIZES["stride"]
    rows = [x[i : i + l] for i in range(0, len(x) - l + 1, d)]
    if not rows:
        return x.new_empty(0, x.shape[1])
    rows = [row + p["position"] if position else row for row in rows]
    return bend(torch.stack([row.flatten() for row in rows]) @ p["first"]) @ p["second"]


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
    missing = [name for name in expected if name not in got]
    return f"no gradient reaches the {', '.join(missing)}" if missing else None


def explain_layer(got, expected, x, p, sizes):
    def linear(z):
        return z

    known = {
        f"all branches read the {b} branch's keys and values": dict(keys=[b] * 3, values=[b] * 3)
        for b in BRANCHES
    }
    known |= {
        f"all branches read the {b} branch's {kind}": {kind: [b] * 3}
        for b in BRANCHES
        for kind in ("keys", "values")
    }
    crossed = "selected", "compressed", "window"
    known |= {
        "the compressed and the selected branch read each other's keys and values": dict(
            keys=crossed, values=crossed
        ),
        "two local blocks are forced, and one was asked for": dict(num_local=2),
        "phi has no position encoding": dict(position=False),
        "phi is linear: nothing bends between its two matrices": dict(bend=linear),
        "phi bends with relu, and the layer uses gelu": dict(bend=F.relu),
        "phi_k makes the compressed values too": dict(phi_of_values="phi_k"),
        "the gates are made from the query, and Eq. 5 makes them from the layer's input": dict(
            gate_from=lambda q: q[0].transpose(0, 1).flatten(1)
        ),
        "the gate's MLP is linear: nothing bends between its two matrices": dict(gate_bend=linear),
        "the gates are a softmax over the branches": dict(gate=lambda z: z.softmax(-1)),
        "the gates are logits: the sigmoid is missing": dict(gate=linear),
        "the gate's columns were read branch by branch, and they go head by head": dict(
            head_first=False
        ),
    }
    return next(
        (
            says
            for says, changes in known.items()
            if matches(got, forward(nsa_lite, x, p, **changes))
        ),
        None,
    )


EXERCISES = [
    Exercise(
        "05.1",
        "Blocks with a stride",
        "warm-up",
        5,
        split_cases,
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
        importance_cases,
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
        choice_cases,
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
