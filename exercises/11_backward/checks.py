"""Set 11, the backward: delta, a gate, dq by query, who reads a block, dk and dv, the same bits."""

import torch
from torch import Tensor

from exercises.compare import matches, name_mistake
from exercises.records import Case, Exercise, in_turn

from . import mistakes, watching

# --- 11.1 ---

DELTAS = {
    "no gradient of the log-sum-exp": dict(rows=5, width=4, dlse=0.0),
    "a gradient of the log-sum-exp": dict(rows=4, width=3),
    "as many rows as channels": dict(rows=6, width=6),
    "one channel": dict(rows=7, width=1),
    "bfloat16": dict(rows=3, width=130, dtype=torch.bfloat16),
    "bfloat16, far from 0": dict(rows=5, width=40, dtype=torch.bfloat16, shift=8.0),
}


def delta_case(generator, name, rows, width, dlse=1.0, dtype=torch.float32, shift=0.0) -> Case:
    """Random rows; delta in double."""
    out = (torch.randn(rows, width, generator=generator) + shift).to(dtype)
    dout = (torch.randn(rows, width, generator=generator) + shift).to(dtype)
    gradient = torch.randn(rows, generator=generator) * dlse
    expected = (out.double() * dout.double()).sum(1).float() - gradient
    arguments = dict(out=out, dout=dout, dlse=gradient)
    return Case(name, arguments, expected, ("query",), explain_delta)


def explain_delta(got, expected, out, dout, dlse):
    """A known mistake."""
    return name_mistake(got, mistakes.DELTAS, (out, dout, dlse))


# --- 11.2 ---

GATES = {
    "three branches": dict(logits=[[0.5, -1.0, 2.0], [0.0, 1.0, -2.0]], width=4),
    "equal logits": dict(logits=[[0.75, 0.75, 0.75]] * 4, width=3),
    "as many channels as queries": dict(
        logits=[[0.2, 0.4, -0.6], [3.0, 0.1, 0.0], [1.0, -1.0, 0.3]], width=3
    ),
    "one channel": dict(logits=[[0.3, 0.9, -0.4]] * 5, width=1),
    "very large and very negative logits": dict(
        logits=[[200.0, 200.0, -200.0], [-1000.0, 0.5, 0.5]], width=5
    ),
    "gates that are shut": dict(logits=[[-160.0, -170.0, -180.0]] * 3, width=2),
    "a branch that saw nothing": dict(
        logits=[[0.7, 0.1, -0.2], [-0.5, 0.25, 0.75]], width=6, empty=[(0, 0), (2, 1)]
    ),
}


def gate_case(generator, name, logits, width, empty=()) -> Case:
    """Gradients by autograd, in double, of the sum of gated outputs."""
    given = torch.tensor(logits)
    outs = torch.randn(3, len(logits), width, generator=generator)
    for branch, row in empty:
        outs[branch, row] = 0.0
    dout = torch.randn(len(logits), width, generator=generator)
    with torch.enable_grad():
        leaves = [x.double().requires_grad_() for x in (given, outs)]
        gated = (leaves[0].sigmoid().T[:, :, None] * leaves[1]).sum(0)
        expected = torch.autograd.grad(gated, leaves, dout.double())
    arguments = dict(logits=given, outs=outs, dout=dout)
    axes = {"dlogits": ("query", "branch"), "douts": ("branch", "query", "channel")}
    return Case(name, arguments, tuple(x.float() for x in expected), axes, explain_gate)


def explain_gate(got, expected, logits, outs, dout):
    """Numbers lost by exp, or a known mistake in one of the two gradients."""
    arguments = (logits, outs, dout)
    for part, name in zip(got, ("dlogits", "douts"), strict=True):
        if not part.isfinite().all():
            return f"{name} is not finite: exp of a large logit overflows, and inf / inf is NaN"
    if not matches(got[0], expected[0]):
        said = name_mistake(got, mistakes.LOGITS, arguments, part=lambda result: result[0])
        return said and f"dlogits: {said}"
    said = name_mistake(got, mistakes.BRANCHES, arguments, part=lambda result: result[1])
    return said and f"douts: {said}"


# --- 11.3 ---

QUERIES = {
    "one whole block": dict(t=11, ids=[0, 1], heads=2, widths=(3, 4), l=4, blocks=5),
    "the own block, in its middle": dict(t=14, ids=[0, 2, 3], heads=3, widths=(5, 2), l=4),
    "blocks of 6": dict(t=28, ids=[1, 3, 4], heads=2, widths=(4, 4), l=6, blocks=7, scale=0.25),
    "the first token": dict(t=0, ids=[0, -1, -1], heads=4, widths=(2, 3), l=3),
    "padding, at the end of the last block": dict(
        t=9, ids=[0, 1, -1, -1, -1], heads=3, widths=(4, 3), l=5, blocks=2
    ),
    "another scale": dict(t=20, ids=[0, 3, 4], heads=3, widths=(6, 5), l=5, scale=2.0),
    "equal scores": dict(t=17, ids=[0, 2, 3], heads=2, widths=(3, 2), l=5, equal=True),
    "large scores": dict(t=19, ids=[0, 3, 4], heads=3, widths=(4, 2), l=4, level=50.0),
    "very negative scores": dict(t=22, ids=[1, 4, 5], heads=2, widths=(3, 5), l=4, level=-50.0),
    "blocks out of order": dict(t=26, ids=[6, 0, 4], heads=2, widths=(5, 3), l=4, blocks=8),
    "nothing is read": dict(t=7, ids=[-1, -1], heads=2, widths=(4, 3), l=3),
}


def eighths(generator, *shape) -> Tensor:
    """Random whole eighths, so that no product of two is rounded."""
    return (torch.randn(*shape, generator=generator) * 8).round() / 8


def query_case(  # noqa: PLR0913  a case's sizes
    generator, name, t, ids, heads, widths, l, blocks=6, scale=0.5, level=0.0, equal=False
) -> Case:
    """One query's heads and blocks of keys; those behind token t are NaN."""
    q = eighths(generator, heads, widths[0])
    k = eighths(generator, blocks, l, widths[0])
    v = eighths(generator, blocks, l, widths[1])
    dout = eighths(generator, heads, widths[1])
    if equal:
        q.zero_()
    if level:  # a score is level * 8 * scale higher
        q[:, 0] = level
        k[..., 0] = 8.0
    at = torch.arange(blocks * l).view(blocks, l)
    seen = (at <= t) & torch.isin(torch.arange(blocks), torch.tensor(ids))[:, None]
    expected, lse, delta = gradient_of_q(q, k[seen], v[seen], dout, scale)
    for x in (k, v):
        x[at > t] = torch.nan
    arguments = dict(q=q, k=k, v=v, ids=torch.tensor(ids), dout=dout, saved=(lse, delta))
    arguments |= dict(t=t, scale=scale)
    return Case(name, arguments, expected, ("head", "channel"), explain_query)


def gradient_of_q(q, k, v, dout, scale) -> tuple[Tensor, Tensor, Tensor]:
    """dq by autograd in double, and what the forward saved: lse and delta."""
    if len(k) == 0:
        return torch.zeros_like(q), torch.full((len(q),), -torch.inf), torch.zeros(len(q))
    with torch.enable_grad():
        leaf = q.double().requires_grad_()
        s = leaf @ k.double().T * scale
        out = s.softmax(1) @ v.double()
        (dq,) = torch.autograd.grad(out, leaf, dout.double())
    delta = (out.detach() * dout.double()).sum(1)
    return dq.float(), s.detach().logsumexp(1).float(), delta.float()


def explain_query(got, expected, ids, t, **others):
    """NaN, something where nothing is read, or a known mistake."""
    if got.isnan().any():
        if (ids < 0).all():
            return "the query reads nothing, and its gradient is NaN"
        padding = ", for an id of -1 perhaps" if (ids < 0).any() else ""
        return f"dq is NaN: were keys behind token {t} read{padding}? They hold no number"
    if (ids < 0).all():
        return f"the query reads nothing, and its gradient is {float(got.flatten()[0]):.4g}, not 0"
    if not got.isfinite().all():
        return "dq is not finite: exp of a large score overflows; take the log-sum-exp off first"
    q, k, v, dout, saved, scale = others.values()
    return name_mistake(got, mistakes.QUERIES, (q, k, v, ids, dout, saved, t, scale))


# --- 11.4 ---

IDS = {
    "each query reads one block": dict(ids=[[0], [0], [1], [0], [2]], blocks=3),
    "padding": dict(ids=[[0, -1, -1], [0, -1, -1], [0, 1, -1], [0, 1, 2], [1, 2, 3]], blocks=4),
    "a block that nobody reads": dict(
        ids=[[0, 2], [0, 2], [2, 4], [0, 4], [0, 2], [2, 4]], blocks=6
    ),
    "blocks out of order": dict(ids=[[3, 0], [1, 0], [2, 1], [0, 3], [-1, 2], [3, 1]], blocks=5),
    "a query that reads nothing": dict(ids=[[-1, -1, -1], [1, -1, -1], [0, 1, 4]], blocks=5),
    "one query": dict(ids=[[0, 2, 3, 6, -1]], blocks=7),
    "nothing is read": dict(ids=[[-1, -1], [-1, -1]], blocks=3),
    "many queries": dict(ids=None, blocks=23),
}


def readers_case(generator, name, ids, blocks) -> Case:
    """The lists by asking every block and query."""
    if ids is None:
        ids = [sorted({t % 5, t // 13, t // 9}) for t in range(200)]
        ids = [row + [-1] * (3 - len(row)) for row in ids]
    indptr = [0]
    indices = []
    for j in range(blocks):
        indices += [t for t, row in enumerate(ids) if j in row]
        indptr.append(len(indices))
    arguments = dict(ids=torch.tensor(ids, dtype=torch.int32), blocks=blocks)
    expected = (torch.tensor(indptr), indices)  # a list, so that its length is no form
    axes = {"indptr": ("entry",), "indices": ()}
    return Case(name, arguments, expected, axes, explain_readers)


def explain_readers(got, expected, ids, blocks):
    """A known mistake in indptr, or else in indices, or the first wrong list."""
    if not matches(got[0], expected[0]):
        said = name_mistake(got, mistakes.STARTS, (ids, blocks), part=lambda result: result[0])
        return said or first_wrong_length(got[0], expected[0])
    said = name_mistake(got, mistakes.INDICES, (ids, blocks), part=lambda result: result[1])
    listed = torch.as_tensor(got[1]).tolist()
    return said or first_wrong_list(listed, *expected)


def first_wrong_length(got: Tensor, expected: Tensor) -> str | None:
    """The first block whose list has another length than it has readers."""
    lengths = got.diff()
    right = expected.diff()
    if torch.equal(lengths, right):
        return f"indptr begins with {int(got[0])}, and the first list begins at place 0"
    j = int((lengths != right).nonzero()[0])
    return f"block {j} has {int(right[j])} readers, and indptr gives its list {int(lengths[j])}"


def first_wrong_list(got: list[int], indptr: Tensor, indices: list[int]) -> str | None:
    """The first block whose list is not that of its readers."""
    for j, (first, last) in enumerate(zip(indptr.tolist(), indptr[1:].tolist(), strict=False)):
        mine = got[first:last]
        right = indices[first:last]
        if mine == right:
            continue
        if sorted(mine) == right:
            return f"block {j} has the right readers, {right[:6]}, and they do not ascend"
        wrong = next((t for t in mine if t not in right), None)
        if wrong is not None:
            return f"query {wrong} is in the list of block {j}, and does not read it"
        if len(mine) < len(right):
            return f"the list of block {j} ends too early: {len(right)} queries read it"
        return f"a query stands twice in the list of block {j}"
    return None


# --- 11.5 ---

BLOCKS = {
    "readers behind the block": dict(
        j=1, l=4, tokens=[9, 12, 13], heads=2, widths=(3, 5), length=17
    ),
    "readers inside the block": dict(j=2, l=5, tokens=[10, 12, 14, 19], heads=3, widths=(4, 2)),
    "block 0, and most queries": dict(
        j=0, l=3, tokens=[0, 1, 2, 4, 5, 7, 11], heads=2, widths=(5, 3), length=13
    ),
    "one reader": dict(j=3, l=6, tokens=[21], heads=4, widths=(2, 3), length=26, scale=0.25),
    "nobody": dict(j=2, l=4, tokens=[], heads=3, widths=(6, 4), length=18),
    "a last block that is short": dict(
        j=4, l=5, tokens=[20, 21, 22], heads=2, widths=(3, 3), length=23, scale=2.0
    ),
    "equal scores": dict(
        j=1, l=6, tokens=[6, 9, 11, 15], heads=2, widths=(4, 5), length=19, equal=True
    ),
    "large scores": dict(
        j=2, l=4, tokens=[9, 10, 13], heads=3, widths=(3, 2), length=15, level=50.0
    ),
    "very negative scores": dict(
        j=1, l=7, tokens=[8, 13, 20], heads=2, widths=(4, 3), length=22, level=-50.0
    ),
}


def block_case(  # noqa: PLR0913  a case's sizes
    generator, name, j, l, tokens, heads, widths, length=21, scale=0.5, level=0.0, equal=False
) -> Case:
    """One block's readers among `length` queries; what nobody may read is NaN.

    The readers read other blocks too, so that lse is no log-sum-exp of this block alone.
    """
    q = eighths(generator, length, heads, widths[0])
    k = eighths(generator, l, widths[0])
    v = eighths(generator, l, widths[1])
    dout = eighths(generator, length, heads, widths[1])
    if equal:
        q.zero_()
    if level:
        q[..., 0] = 8.0
        k[:, 0] = level
    at = j * l + torch.arange(l)
    seen = at <= torch.tensor(tokens, dtype=torch.int64)[:, None]
    chosen = (q[tokens], dout[tokens], seen[:, None].expand(-1, heads, -1))
    dk, dv, lse, delta = gradients_of_block(*chosen, k, v, scale)
    saved = [torch.full((length, heads), torch.nan) for _ in range(2)]
    for whole, part in zip(saved, (lse, delta), strict=True):
        whole[tokens] = part
    others = torch.ones(length, dtype=torch.bool)
    others[tokens] = False
    for x, gone in ((q, others), (dout, others), (k, at >= length), (v, at >= length)):
        x[gone] = torch.nan
    arguments = dict(q=q, k=k, v=v, dout=dout, saved=tuple(saved))
    arguments |= dict(tokens=torch.tensor(tokens, dtype=torch.int64), j=j, scale=scale)
    axes = {"dk": ("key", "channel"), "dv": ("key", "channel")}
    return Case(name, arguments, (dk, dv), axes, explain_block)


def gradients_of_block(q, dout, seen, k, v, scale):
    """dk and dv by autograd in double, where one more key, which all see, stands for the others."""
    with torch.enable_grad():
        leaves = [x.double().requires_grad_() for x in (k, v)]
        s = torch.einsum("mrd,ld->mrl", q.double(), leaves[0]) * scale
        s = s.masked_fill(~seen, -torch.inf)
        other = s.detach().amax(2, keepdim=True)
        s = torch.cat([s, other], 2)
        values = torch.cat([leaves[1], leaves[1].new_ones(1, v.shape[1])])
        out = s.softmax(2) @ values
        dk, dv = torch.autograd.grad(out, leaves, dout.double())
    delta = (out.detach() * dout.double()).sum(2)
    return tuple(x.float() for x in (dk, dv, s.detach().logsumexp(2), delta))


def explain_block(got, expected, **arguments):
    """NaN, something where nobody reads, or a known mistake."""
    for part, name in zip(got, ("dk", "dv"), strict=True):
        if part.isnan().any():
            key = int(part.isnan().any(1).nonzero()[0])
            return (
                f"{name} of key {key} is NaN: was a query read that is no reader, or a masked "
                "number multiplied? 0 times NaN is NaN"
            )
        if not part.isfinite().all():
            return f"{name} is not finite: take the log-sum-exp off before exp, and mask"
        if len(arguments["tokens"]) == 0 and part.any():
            return f"nobody reads the block, and its {name} is not 0"
    return name_mistake(got, mistakes.BLOCKS, tuple(arguments.values()))


# --- 11.6 ---

LARGE = 2.0**24  # 1 is lost when it is added to this in float32, and 1 + 1 is not
LISTS = {
    "one chunk each": dict(readers=[3, 2, 4], chunk=5, width=2),
    "two chunks": dict(readers=[7, 4], chunk=4, width=3),
    "three chunks, in whole numbers": dict(readers=[9, 2, 7], chunk=3, width=4, large=True),
    "a block without readers": dict(readers=[0, 5, 0, 8, 0], chunk=3, width=5),
    "chunks of one reader": dict(readers=[4, 1, 6], chunk=1, width=2, large=True),
    "a long list": dict(readers=[64, 3], chunk=6, width=1, large=True),
    "no reader at all": dict(readers=[0, 0], chunk=2, width=6),
}


def bits_case(generator, name, readers, chunk, width, large=False) -> Case:
    """One row a reader; large puts 2^24 into the first chunk of a list and 1 into the others."""
    rows = torch.rand(sum(readers), width, generator=generator) + 0.5
    indptr = [0]
    for count in readers:
        if large:
            list_rows = rows[indptr[-1] : indptr[-1] + count]
            list_rows[:] = 0
            list_rows[::chunk] = 1.0
            list_rows[:1] = LARGE
        indptr.append(indptr[-1] + count)
    sums = [part.double().sum(0) for part in rows.split(readers)]
    arguments = dict(rows=rows, indptr=torch.tensor(indptr), chunk=chunk)
    axes = {"sums": ("block", "channel"), "the way": ()}
    expected = (torch.stack(sums).float(), "")
    return Case(name, arguments, expected, axes, explain_bits, on_machines)


def on_machines(answer, rows, indptr, chunk):
    """The sums, and what is wrong with the way to them on three machines."""
    results = []
    for order in watching.ORDERS:
        machine = watching.Machine(rows, indptr, chunk, order)
        results.append(answer(machine.partial, indptr, chunk, machine.run, rows.shape[1]))
        if said := machine.end():
            return results[0], said
    if not watching.same_bits(results):
        return results[0], BITS
    return results[0], ""


BITS = (
    "two machines gave other bits: the parts are added in the order in which programs end; give "
    "each program a place of its own"
)


def explain_bits(got, expected, rows, indptr, chunk):
    """What is wrong with the way, before a wrong sum; that bits differ only after it."""
    if got[1] and (got[1] != BITS or matches(got[0], expected[0])):
        return got[1]
    for j, (mine, right) in enumerate(zip(got[0], expected[0], strict=True)):
        if matches(mine, right):
            continue
        first, last = indptr[j : j + 2].tolist()
        if first == last:
            return f"nobody reads block {j}, and its sum is {float(mine[0]):.4g}, not 0"
        parts = [part.sum(0) for part in rows[first:last].split(chunk)]
        if matches(mine, parts[-1]):
            return f"block {j} holds its last chunk only"
        if matches(mine, parts[0]):
            return f"block {j} holds its first chunk only"
        return f"block {j} is not the sum of its {len(parts)} chunks"
    return None


EXERCISES = [
    Exercise(
        "11.1",
        "Delta",
        "warm-up",
        5,
        in_turn(delta_case, DELTAS),
        hints=(
            "delta is the mean of a row's dp, weighted with p. Why is that dout times out?",
            "delta_t = sum_c out_tc dout_tc - dlse_t, in float32.",
            "both to float32; multiply; add over the channels; take dlse off",
        ),
    ),
    Exercise(
        "11.2",
        "The gradient of a gate",
        "core",
        10,
        in_turn(gate_case, GATES),
        hints=(
            "out is a sum of gate times branch. What is the derivative by one gate, and by one "
            "number of a branch?",
            "dgate_tc = outs_ct . dout_t; dlogit = g (1 - g) dgate; douts_ct = g_tc dout_t.",
            "sigmoid of the logits; product of outs and dout, added over the channels, turned to "
            "(T, 3); times g (1 - g); gates turned to (3, T, 1) times dout",
        ),
    ),
    Exercise(
        "11.3",
        "dq of one query",
        "core",
        20,
        in_turn(query_case, QUERIES),
        hints=(
            "How do the weights come back from the scores and one saved number a head? Which keys "
            "of the own block may be read?",
            "p = exp(s - lse), ds = p (dout v^T - delta), dq = scale * sum over the blocks of ds "
            "k; block j counts its keys up to token t: t - j l + 1 of them, at most l.",
            "for each id that is not -1: keys and values of the block, cut at the query; scores; "
            "weights; dp; ds; add ds times keys. At the end the scale",
        ),
    ),
    Exercise(
        "11.4",
        "Who reads a block",
        "core",
        15,
        in_turn(readers_case, IDS),
        hints=(
            "Each entry of ids is a pair (query, block). In which order must the pairs stand?",
            "indptr[j + 1] - indptr[j] = how many entries of ids are j; indices are the queries "
            "of the pairs, sorted by block, equal blocks by query: a stable sort.",
            "flatten ids; the query of each place; drop -1; sort by block, stable; count the "
            "blocks; running sum behind a 0",
        ),
    ),
    Exercise(
        "11.5",
        "dk and dv of one block",
        "core",
        20,
        in_turn(block_case, BLOCKS),
        hints=(
            "For dq a row of ds met the keys. What meets a column of ds, and a column of p?",
            "dv = sum over readers and heads of p dout, dk = scale * sum of ds q, with p = exp(s - "
            "lse) where key j l + i <= token, else 0; ds likewise.",
            "take the readers' rows of q, dout, lse, delta; the mask (m, 1, l) from positions; p "
            "and ds with torch.where; two sums over readers and heads; dk times the scale",
        ),
    ),
    Exercise(
        "11.6",
        "The same bits twice",
        "stretch",
        40,
        in_turn(bits_case, LISTS),
        hints=(
            "Three numbers are added in two orders. When do the bits differ? Who decides in which "
            "order programs end?",
            "A list of c readers is cut into ceil(c / chunk) chunks. Each has one slot; block j's "
            "slots lie side by side. Sum of block j = slot + slot + ..., from the first on.",
            "a list of (block, first, last); a tensor with a row for each; a program that writes "
            "its row; run; then a loop over the rows in their order, each added to its block",
        ),
    ),
]
