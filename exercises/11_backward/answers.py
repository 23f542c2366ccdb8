"""Set 11's answers, for teachers: right ones in several styles, and wrong ones to be named.

The mistakes of mistakes.py are planted as they stand. The others are written by hand, in other
styles or with faults of another kind, so that no mistake is judged by itself alone.
"""

import torch

from exercises.records import Wrong, planted

from . import mistakes

# --- 11.1 ---


def delta_by_einsum(out, dout, dlse):
    """One contraction in double."""
    return torch.einsum("tc,tc->t", out.double(), dout.double()) - dlse


def delta_by_rows(out, dout, dlse):
    """A dot product a row."""
    rows = [o.float() @ d.float() for o, d in zip(out, dout, strict=True)]
    return torch.stack(rows) - dlse


def delta_by_matmul(out, dout, dlse):
    """Batched products of a row and a column."""
    return (out.float()[:, None] @ dout.float()[:, :, None])[:, 0, 0] - dlse


def delta_by_diagonal(out, dout, dlse):
    """All pairs of rows, of which the diagonal is needed."""
    return (out.float() @ dout.float().T).diagonal() - dlse


def delta_in_bfloat16(out, dout, dlse):
    """Float32 comes last."""
    return torch.einsum("tc,tc->t", out, dout).float() - dlse


DELTAS = [
    *planted(mistakes.DELTAS),
    Wrong("float32 at the end", delta_in_bfloat16, "bfloat16: "),
    Wrong(
        "einsum without dlse",
        lambda out, dout, dlse: torch.einsum("tc,tc->t", out.float(), dout.float()),
        "the gradient of the log-sum-exp is left out",
    ),
    Wrong(
        "dlse with the other sign",
        lambda out, dout, dlse: torch.einsum("tc,tc->t", out.float(), dout.float()) + dlse,
        "the gradient of the log-sum-exp is added",
    ),
    Wrong(
        "all pairs of rows",
        lambda out, dout, dlse: (out.float() @ dout.float().T).sum(1) - dlse,
        "query 0: got",
    ),
    Wrong(
        "columns added",
        lambda out, dout, dlse: (out.float() * dout.float()).sum(0) - dlse[:1],
        "no gradient of the log-sum-exp: the shape is (4,), and (5,) was asked for",
    ),
    Wrong(
        "axis kept",
        lambda out, dout, dlse: (out.float() * dout.float()).sum(1, keepdim=True) - dlse[:, None],
        "the shape is (5, 1), and (5,) was asked for",
    ),
    Wrong(
        "dlse broadcast over columns",
        lambda out, dout, dlse: (out.float() * dout.float()).sum(1, keepdim=True) - dlse,
        "the shape is (5, 5), and (5,) was asked for",
    ),
    Wrong(
        "largest product",
        lambda out, dout, dlse: (out.float() * dout.float()).amax(1) - dlse,
        "entries are wrong",
    ),
    Wrong(
        "out changed in place",
        lambda out, dout, dlse: out.mul_(dout).float().sum(1) - dlse,
        "the function changed its input out in place",
    ),
]

# --- 11.2 ---


def gate_by_autograd(logits, outs, dout):
    """PyTorch's own gradients."""
    leaves = [x.clone().requires_grad_() for x in (logits, outs)]
    with torch.enable_grad():
        gated = torch.einsum("tc,ctd->td", leaves[0].sigmoid(), leaves[1])
    return torch.autograd.grad(gated, leaves, dout)


def gate_by_einsum(logits, outs, dout):
    """Two contractions, and the slope as g - g^2."""
    g = torch.sigmoid(logits)
    dgates = torch.einsum("ctd,td->tc", outs, dout)
    return (g - g * g) * dgates, torch.einsum("tc,td->ctd", g, dout)


def gate_by_branches(logits, outs, dout):
    """One branch after the other, with sigmoid(x) sigmoid(-x) for the slope."""
    dlogits = torch.empty_like(logits)
    douts = torch.empty_like(outs)
    for c in range(3):
        x = logits[:, c]
        dlogits[:, c] = x.sigmoid() * (-x).sigmoid() * (outs[c] * dout).sum(1)
        douts[c] = x.sigmoid()[:, None] * dout
    return dlogits, douts


def gate_by_exp(logits, outs, dout):
    """exp of the logits themselves."""
    e = logits.exp()
    g = e / (1 + e)
    dlogits = e / (1 + e) ** 2 * (outs * dout).sum(2).T
    return dlogits, g.T[:, :, None] * dout


def softmaxed_gates(logits, outs, dout):
    """Autograd through a softmax."""
    leaves = [x.clone().requires_grad_() for x in (logits, outs)]
    with torch.enable_grad():
        gated = torch.einsum("tc,ctd->td", leaves[0].softmax(1), leaves[1])
    return torch.autograd.grad(gated, leaves, dout)


def detached_gates(logits, outs, dout):
    """The gates count as numbers."""
    return torch.zeros_like(logits), torch.sigmoid(logits).T[:, :, None] * dout


def gate_with(slope=lambda g: g - g * g, gated=False, whole=False, gate=torch.sigmoid):
    """Written anew by contractions, with one step changed."""

    def answer(logits, outs, dout):
        g = gate(logits)
        through = torch.einsum("tc,ctd->ctd", g, outs) if gated else outs
        if whole:
            through = torch.einsum("tc,ctd->td", g, outs).expand_as(outs)
        dgates = torch.einsum("ctd,td->tc", through, dout)
        return slope(g) * dgates, torch.einsum("tc,td->ctd", g, dout)

    return answer


GATES = [
    *planted(mistakes.LOGITS),
    *planted(mistakes.BRANCHES),
    Wrong("g for the slope", gate_with(slope=lambda g: g), "and 1 - g is left out"),
    Wrong("gated once more", gate_with(gated=True), "multiplied by their gates once more"),
    Wrong("the whole output, by einsum", gate_with(whole=True), "not with its own branch"),
    Wrong(
        "softmax, and a sigmoid's slope",
        gate_with(gate=lambda logits: logits.softmax(-1)),
        "the gates went through a softmax",
    ),
    Wrong("exp of the logits", gate_by_exp, "dlogits is not finite: exp of a large logit"),
    Wrong("softmax by autograd", softmaxed_gates, "and do not compete"),
    Wrong("gates detached", detached_gates, "dlogits: query 0, branch 0: got 0"),
    Wrong(
        "dlogits only",
        lambda *x: gate_by_einsum(*x)[0],
        "the function returned a Tensor, and 2 results were asked for",
    ),
    Wrong(
        "dlogits by branch",
        lambda *x: (gate_by_einsum(*x)[0].T, gate_by_einsum(*x)[1]),
        "result 1: the shape is (3, 2), and (2, 3) was asked for",
    ),
    Wrong(
        "douts added up",
        lambda *x: (gate_by_einsum(*x)[0], gate_by_einsum(*x)[1].sum(0)),
        "result 2: the shape is (2, 4), and (3, 2, 4) was asked for",
    ),
    Wrong(
        "gradients of the gates, by autograd",
        lambda logits, outs, dout: (
            torch.einsum("ctd,td->tc", outs, dout),
            gate_by_einsum(logits, outs, dout)[1],
        ),
        "this is the gradient of the gates",
    ),
    Wrong(
        "dout for every branch",
        lambda logits, outs, dout: (
            gate_by_einsum(logits, outs, dout)[0],
            dout.expand_as(outs).clone(),
        ),
        "a branch gets dout as it is",
    ),
]

# --- 11.3 ---


def query_by_keys(q, k, v, ids, dout, saved, t, scale):
    """One key after the other."""
    lse, delta = saved
    dq = torch.zeros_like(q)
    l = k.shape[1]
    for key in range(t + 1):
        j, i = divmod(key, l)
        if j in ids:
            p = torch.exp(q @ k[j, i] * scale - lse)
            ds = p * (dout @ v[j, i] - delta)
            dq += ds[:, None] * k[j, i] * scale
    return dq


def query_by_gather(q, k, v, ids, dout, saved, t, scale):
    """All chosen keys at once, those that may not be read as zeros."""
    lse, delta = saved
    l = k.shape[1]
    legal = ids >= 0
    at = ids[:, None] * l + torch.arange(l)
    seen = ((at <= t) & legal[:, None]).flatten()
    keys = k[ids.clamp(min=0)].flatten(0, 1)
    values = v[ids.clamp(min=0)].flatten(0, 1)
    keys = torch.where(seen[:, None], keys, 0.0)
    values = torch.where(seen[:, None], values, 0.0)
    s = (q @ keys.T * scale).masked_fill(~seen, -torch.inf)
    lse = torch.where(lse == -torch.inf, 0.0, lse)
    p = torch.exp(s - lse[:, None])
    ds = p * (dout @ values.T - delta[:, None])
    return ds @ keys * scale


def query_by_softmax(q, k, v, ids, dout, saved, t, scale):
    """The forward again, and autograd."""
    rows = [(j, i) for j in ids.tolist() if j >= 0 for i in range(k.shape[1])]
    rows = [(j, i) for j, i in rows if j * k.shape[1] + i <= t]
    if not rows:
        return torch.zeros_like(q)
    keys = torch.stack([k[row] for row in rows])
    values = torch.stack([v[row] for row in rows])
    leaf = q.double().requires_grad_()
    with torch.enable_grad():
        out = (leaf @ keys.double().T * scale).softmax(1) @ values.double()
    return torch.autograd.grad(out, leaf, dout.double())[0]


def query_by_heads(q, k, v, ids, dout, saved, t, scale):
    """One head after the other, each with its own walk."""
    rows = []
    for head, lse, delta, do in zip(q, *saved, dout, strict=True):
        row = torch.zeros_like(head)
        for j in ids[ids >= 0]:
            count = min(k.shape[1], t + 1 - int(j) * k.shape[1])
            keys = k[j][:count]
            p = (keys @ head * scale - lse).exp()
            row = row + (p * (v[j][:count] @ do - delta)) @ keys
        rows.append(row * scale)
    return torch.stack(rows)


def whole_own_block(q, k, v, ids, dout, saved, t, scale):
    """Every chosen block whole."""
    lse, delta = saved
    dq = torch.zeros_like(q)
    for j in ids[ids >= 0].tolist():
        p = torch.exp(q @ k[j].T * scale - lse[:, None])
        dq = dq + p * (dout @ v[j].T - delta[:, None]) @ k[j] * scale
    return dq


def masked_product(q, k, v, ids, dout, saved, t, scale):
    """Hidden keys have the weight 0, and are multiplied all the same."""
    lse, delta = saved
    dq = torch.zeros_like(q)
    for j in ids[ids >= 0].tolist():
        hidden = j * k.shape[1] + torch.arange(k.shape[1]) > t
        p = torch.exp(q @ k[j].T * scale - lse[:, None]).masked_fill(hidden, 0.0)
        dq = dq + p * (dout @ v[j].T - delta[:, None]) @ k[j] * scale
    return dq


def gather_with_nan(q, k, v, ids, dout, saved, t, scale):
    """A query that reads nothing has a log-sum-exp of -inf."""
    safe = torch.where(saved[0] == -torch.inf, torch.nan, saved[0])
    return query_by_gather(q, k, v, ids, dout, (safe, saved[1]), t, scale)


def without_delta(q, k, v, ids, dout, saved, t, scale):
    """Delta is forgotten."""
    return query_by_keys(q, k, v, ids, dout, (saved[0], 0 * saved[1]), t, scale)


def one_too_few(q, k, v, ids, dout, saved, t, scale):
    """Only the tokens before the query."""
    return query_by_keys(q, k, v, ids, dout, saved, t - 1, scale)


def padding_from_the_end(q, k, v, ids, dout, saved, t, scale):
    """-1 as Python reads it, each block whole up to the query."""
    lse, delta = saved
    dq = torch.zeros_like(q)
    l = k.shape[1]
    for j in ids.tolist():
        keys = k[j, : max(0, t + 1 - (j % len(k)) * l)]
        values = v[j, : len(keys)]
        p = torch.exp(q @ keys.T * scale - lse[:, None])
        dq = dq + (p * (dout @ values.T - delta[:, None])) @ keys * scale
    return dq


def softmax_by_block(q, k, v, ids, dout, saved, t, scale):
    """Each block alone, added up."""
    parts = [
        query_by_softmax(q, k, v, ids[n : n + 1], dout, saved, t, scale) for n in range(len(ids))
    ]
    return sum(parts)


def scaled_by_the_width(q, k, v, ids, dout, saved, t, scale):
    """The root of the width for the scale that was given."""
    return query_by_keys(q, k, v, ids, dout, saved, t, q.shape[1] ** -0.5)


def query_walk(
    weights=lambda s, lse: (s - lse).exp(),
    ds=lambda p, dp, delta: p * (dp - delta),
    scales=(True, True),
    first_only=False,
):
    """Written anew, block by block; scales says whether scores and dq get theirs."""

    def answer(q, k, v, ids, dout, saved, t, scale):
        lse, delta = (x[:, None] for x in saved)
        dq = torch.zeros_like(q)
        for j in ids[ids >= 0].tolist()[: 1 if first_only else None]:
            keys = k[j][: t + 1 - j * k.shape[1]]
            values = v[j][: len(keys)]
            p = weights(q @ keys.T * (scale if scales[0] else 1), lse)
            dq += ds(p, dout @ values.T, delta) @ keys * (scale if scales[1] else 1)
        return dq

    return answer


QUERIES = [
    *planted(mistakes.QUERIES),
    Wrong("exp2", query_walk(weights=lambda s, lse: (s - lse).exp2()), "powers of 2"),
    Wrong("a softmax", query_walk(weights=lambda s, lse: s.softmax(1)), "a softmax of its own"),
    Wrong("no scale for dq", query_walk(scales=(True, False)), "dq is not multiplied by the scale"),
    Wrong("no scale for s", query_walk(scales=(False, True)), "the scores are not multiplied"),
    Wrong("one block", query_walk(first_only=True), "only the first block of the list counts"),
    Wrong(
        "each block's own delta",
        query_walk(ds=lambda p, dp, delta: p * dp - p * (p * dp).sum(1, keepdim=True)),
        "delta is summed block by block",
    ),
    Wrong("whole own block", whole_own_block, "were keys behind token 14 read?"),
    Wrong("hidden keys multiplied", masked_product, "were keys behind token 14 read?"),
    Wrong("NaN where nothing is read", gather_with_nan, "reads nothing, and its gradient is NaN"),
    Wrong("delta forgotten", without_delta, "delta is left out: ds is p (dp - delta)"),
    Wrong("the tokens before", one_too_few, "the query's own token is left out"),
    Wrong("-1 from the end", padding_from_the_end, "was read as the last block"),
    Wrong("scale by the width", scaled_by_the_width, "entries are wrong"),
    Wrong(
        "the heads together",
        lambda *x: query_by_keys(*x).sum(0),
        "the shape is (3,), and (2, 3) was asked for",
    ),
    Wrong(
        "ones where nothing is read",
        lambda *x: query_by_gather(*x) + 1.0 * bool((x[3] < 0).all()),
        "the query reads nothing, and its gradient is 1, not 0",
    ),
]

# --- 11.4 ---


def readers_by_lists(ids, blocks):
    """A list for each block, filled query by query."""
    lists = [[] for _ in range(blocks)]
    for t, row in enumerate(ids.tolist()):
        for j in row:
            if j >= 0:
                lists[j].append(t)
    ends = [0]
    for found in lists:
        ends.append(ends[-1] + len(found))
    flat = [t for found in lists for t in found]
    return torch.tensor(ends), torch.tensor(flat, dtype=torch.int64)


def readers_by_table(ids, blocks):
    """A table of blocks and queries, read row by row."""
    reads = (ids[None] == torch.arange(blocks)[:, None, None]).any(2)  # (J, T)
    ends = torch.nn.functional.pad(reads.sum(1).cumsum(0), (1, 0))
    return ends, reads.nonzero()[:, 1]


def readers_by_key(ids, blocks):
    """Sorted by one number that holds the block and the query."""
    t = torch.arange(len(ids))[:, None].expand(ids.shape)
    legal = ids >= 0
    key = (ids[legal].long() * len(ids) + t[legal]).sort().values
    ends = torch.searchsorted(key, torch.arange(blocks + 1) * len(ids))
    return ends.int(), (key % len(ids)).int()


def readers_by_scatter(ids, blocks):
    """Each pair is put where its list has come to."""
    counts = torch.zeros(blocks, dtype=torch.int64)
    legal = ids[ids >= 0].long()
    counts.index_add_(0, legal, torch.ones_like(legal))
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    indices = torch.empty(len(legal), dtype=torch.int64)
    free = ends[:-1].clone()
    for t, row in enumerate(ids.tolist()):
        for j in row:
            if j >= 0:
                indices[free[j]] = t
                free[j] += 1
    return ends, indices


def readers_with_padding(ids, blocks):
    """The sort keeps -1 in front, and nobody drops it."""
    flat = ids.flatten().long()
    pair = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat.clamp(min=0), minlength=blocks)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)), pair // ids.shape[1]


def readers_in_any_order(ids, blocks):
    """Each list from its middle on."""
    ends, indices = readers_by_lists(ids, blocks)
    parts = indices.split(ends.diff().tolist())
    return ends, torch.cat([part.roll(1) for part in parts])


def readers_of_neighbours(ids, blocks):
    """A block's list is that of the block after it."""
    ends, indices = readers_by_lists(ids, blocks)
    return ends, indices.roll(-1)


def readers_twice(ids, blocks):
    """The first reader stands for the second one too."""
    ends, indices = readers_by_lists(ids, blocks)
    for first, last in zip(ends.tolist(), ends[1:].tolist(), strict=False):
        if last - first > 1:
            indices[first + 1] = indices[first]
    return ends, indices


def readers_by_position(ids, blocks):
    """Only the first id of a query counts."""
    return readers_by_lists(ids[:, :1], blocks)


def readers_sorted(rows, name=lambda place, n, T: place // n, descending=False):
    """By one sort of the ids, flattened by rows(ids)."""

    def answer(ids, blocks):
        flat = rows(ids).flatten().long()
        place = torch.sort(flat, stable=True, descending=descending).indices
        place = place[flat[place] >= 0]
        counts = torch.bincount(flat[flat >= 0], minlength=blocks)
        ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return ends, name(place, ids.shape[1], len(ids))

    return answer


def readers_by_index(ids, blocks):
    """A list for each block; -1 is an index like others."""
    lists = [[] for _ in range(blocks)]
    for t, row in enumerate(ids.tolist()):
        for j in row:
            lists[j].append(t)
    ends = torch.tensor([0, *map(len, lists)]).cumsum(0)
    return ends, torch.tensor(sum(lists, []), dtype=torch.int64)


READERS = [
    *planted(mistakes.STARTS),
    *planted(mistakes.INDICES),
    Wrong(
        "places, by a sort",
        readers_sorted(lambda ids: ids, name=lambda place, n, T: place),
        "a place divided by n is the query",
    ),
    Wrong(
        "columns flattened",
        readers_sorted(lambda ids: ids.T, name=lambda place, n, T: place % T),
        "and they do not ascend",
    ),
    Wrong(
        "descending",
        readers_sorted(lambda ids: ids, descending=True),
        "the lists stand from the last block to the first",
    ),
    Wrong("-1 as an index", readers_by_index, "was counted for the last block"),
    Wrong("padding kept", readers_with_padding, "-1 is padding, and was counted for block 0"),
    Wrong("lists not in order", readers_in_any_order, "and they do not ascend"),
    Wrong("one place on", readers_of_neighbours, "is in the list of block 0, and does not read it"),
    Wrong("a reader twice", readers_twice, "a query stands twice in the list of block 0"),
    Wrong(
        "first id only", readers_by_position, "block 1 has 3 readers, and indptr gives its list 1"
    ),
    Wrong(
        "lists of lists",
        lambda ids, blocks: [[t for t in range(len(ids)) if j in ids[t]] for j in range(blocks)],
        "the function returned 3 results, and 2 were asked for",
    ),
    Wrong(
        "one list too few",
        lambda ids, blocks: (
            readers_by_table(ids, blocks)[0][1:],
            readers_by_table(ids, blocks)[1],
        ),
        "result 1: the shape is (3,), and (4,) was asked for",
    ),
    Wrong(
        "as many blocks as are read",
        lambda ids, blocks: readers_by_lists(ids, int(ids.max()) + 1),
        "the shape is (6,), and (7,) was asked for",
    ),
    Wrong(
        "floats",
        lambda ids, blocks: tuple(x.float() for x in readers_by_table(ids, blocks)),
        "the dtype is torch.float32, and integer was asked for",
    ),
    Wrong(
        "counts, by hand",
        lambda ids, blocks: (
            torch.nn.functional.pad(readers_by_lists(ids, blocks)[0].diff(), (0, 1)),
            readers_by_lists(ids, blocks)[1],
        ),
        "indptr holds how many readers each block has, not where its list begins",
    ),
]

# --- 11.5 ---


def block_by_einsum(q, k, v, dout, saved, tokens, j, scale):
    """All readers and heads at once."""
    q, dout, lse, delta = (x[tokens] for x in (q, dout, *saved))
    seen = j * len(k) + torch.arange(len(k)) <= tokens[:, None]
    seen = seen[:, None]  # (m, 1, l)
    s = torch.einsum("mrd,ld->mrl", q, k) * scale
    p = torch.where(seen, torch.exp(s - lse[..., None]), 0.0)
    dp = torch.einsum("mrc,lc->mrl", dout, v)
    ds = torch.where(seen, p * (dp - delta[..., None]), 0.0)
    dk = torch.einsum("mrl,mrd->ld", ds, q) * scale
    return dk, torch.einsum("mrl,mrc->lc", p, dout)


def block_by_matrices(q, k, v, dout, saved, tokens, j, scale):
    """Readers and heads as the rows of one matrix; hidden keys by their scores."""
    heads = q.shape[1]
    q = q[tokens].flatten(0, 1)
    dout = dout[tokens].flatten(0, 1)
    lse, delta = (x[tokens].flatten()[:, None] for x in saved)
    last = tokens.repeat_interleave(heads)[:, None] - j * len(k)
    hidden = torch.arange(len(k)) > last
    p = (q @ k.T * scale).masked_fill(hidden, -torch.inf).sub(lse).exp()
    dp = (dout @ v.T).masked_fill(hidden, 0.0)
    ds = p * (dp - delta)
    return (ds.T @ q) * scale, p.T @ dout


def block_by_readers(q, k, v, dout, saved, tokens, j, scale):
    """One reader after the other, cut at its own key."""
    lse, delta = saved
    dk = torch.zeros_like(k)
    dv = torch.zeros_like(v)
    for t in tokens.tolist():
        count = min(len(k), t - j * len(k) + 1)
        keys = k[:count]
        p = torch.exp(q[t] @ keys.T * scale - lse[t][:, None])
        ds = p * (dout[t] @ v[:count].T - delta[t][:, None])
        dk[:count] += ds.T @ q[t] * scale
        dv[:count] += p.T @ dout[t]
    return dk, dv


def block_in_double(*arguments):
    """The same in double."""
    q, k, v, dout, saved, tokens, j, scale = arguments
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    return block_by_einsum(q, k, v, dout, tuple(x.double() for x in saved), tokens, j, scale)


def all_queries(q, k, v, dout, saved, tokens, j, scale):
    """Every query, those that do not read the block with the weight 0."""
    reads = torch.zeros(len(q), 1, 1)
    reads[tokens] = 1
    at = j * len(k) + torch.arange(len(k))
    seen = at <= torch.arange(len(q))[:, None, None]
    s = torch.einsum("mrd,ld->mrl", q, k) * scale
    p = torch.exp(s - saved[0][..., None]).where(seen, 0.0) * reads
    ds = p * (torch.einsum("mrc,lc->mrl", dout, v) - saved[1][..., None])
    return torch.einsum("mrl,mrd->ld", ds, q) * scale, torch.einsum("mrl,mrc->lc", p, dout)


def times_the_mask(q, k, v, dout, saved, tokens, j, scale):
    """The mask as a factor."""
    q, dout, lse, delta = (x[tokens] for x in (q, dout, *saved))
    seen = (j * len(k) + torch.arange(len(k)) <= tokens[:, None])[:, None].float()
    p = torch.exp(torch.einsum("mrd,ld->mrl", q, k) * scale - lse[..., None]) * seen
    ds = p * (torch.einsum("mrc,lc->mrl", dout, v) - delta[..., None]) * seen
    return torch.einsum("mrl,mrd->ld", ds, q) * scale, torch.einsum("mrl,mrc->lc", p, dout)


def first_rows(q, k, v, dout, saved, tokens, j, scale):
    """As many rows as there are readers, from row 0 on."""
    count = len(tokens)
    rows = (q[:count], k, v, dout[:count], tuple(x[:count] for x in saved))
    return block_by_einsum(*rows, torch.arange(count), j, scale)


def softmax_anew(q, k, v, dout, saved, tokens, j, scale):
    """A softmax over this block alone."""
    at = j * len(k) + torch.arange(len(k))
    s = torch.einsum("trd,ld->trl", q, k) * scale
    s = s.masked_fill((at > torch.arange(len(q))[:, None])[:, None], -torch.inf)
    return block_by_einsum(q, k, v, dout, (s.logsumexp(2), saved[1]), tokens, j, scale)


def unmasked(q, k, v, dout, saved, tokens, j, scale):
    """Readers see the block whole."""
    return block_by_matrices(q, k, v, dout, saved, tokens, 0, scale)


def head_by_head(q, k, v, dout, saved, tokens, j, scale):
    """The last head overwrites those before."""
    for h in range(q.shape[1]):
        one = (x[:, h : h + 1] for x in (q, dout, *saved))
        q_h, dout_h, *saved_h = one
        result = block_by_einsum(q_h, k, v, dout_h, tuple(saved_h), tokens, j, scale)
    return result


def block_walk(
    keys=lambda t, j, l: t - j * l + 1,
    ds=lambda p, dp, delta: p * (dp - delta),
    exchange=False,
    stores=False,
):
    """Written anew, reader by reader; exchange takes p for ds, stores forgets what was added."""

    def answer(q, k, v, dout, saved, tokens, j, scale):
        lse, delta = saved
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        for t in tokens.tolist():
            n = min(len(k), keys(t, j, len(k)))
            p = (q[t] @ k[:n].T * scale - lse[t, :, None]).exp()
            grad = ds(p, dout[t] @ v[:n].T, delta[t, :, None])
            for_keys, for_values = (p, grad) if exchange else (grad, p)
            if stores:
                dk[:n] = 0
                dv[:n] = 0
            dk[:n] += for_keys.T @ q[t] * scale
            dv[:n] += for_values.T @ dout[t]
        return dk, dv

    return answer


GRADIENTS = [
    *planted(mistakes.BLOCKS),
    Wrong("whole blocks", block_walk(keys=lambda t, j, l: l), "count for keys after them"),
    Wrong("one key less", block_walk(keys=lambda t, j, l: t - j * l), "for its own key"),
    Wrong("p and ds exchanged", block_walk(exchange=True), "dv is summed with ds"),
    Wrong("stored, not added", block_walk(stores=True), "reader"),
    Wrong(
        "dp for dp - delta",
        block_walk(ds=lambda p, dp, delta: p * dp),
        "delta is left out of ds",
    ),
    Wrong("every query times 0", all_queries, "was a query read that is no reader"),
    Wrong("times the mask", times_the_mask, "0 times NaN is NaN"),
    Wrong("rows from 0 on", first_rows, "was a query read that is no reader"),
    Wrong("a softmax of the block alone", softmax_anew, "entries are wrong"),
    Wrong("keys from token 0 on", unmasked, "count for keys after them"),
    Wrong("last head only", head_by_head, "entries are wrong"),
    Wrong(
        "delta dropped, by einsum",
        lambda q, k, v, dout, saved, *x: block_by_einsum(
            q, k, v, dout, (saved[0], 0 * saved[1]), *x
        ),
        "delta is left out of ds",
    ),
    Wrong(
        "dv first",
        lambda *x: block_by_einsum(*x)[::-1],
        "result 1: the shape is (4, 5), and (4, 3) was asked for",
    ),
    Wrong("dk only", lambda *x: block_by_einsum(*x)[0], "2 results were asked for"),
]

# --- 11.6 ---


def cut(indptr, chunk):
    """The chunks of all lists: block, first reader, last."""
    starts = indptr.tolist()
    return [
        (j, first, min(first + chunk, end))
        for j, (start, end) in enumerate(zip(starts, starts[1:], strict=False))
        for first in range(start, end, chunk)
    ]


def bits_by_slots(partial, indptr, chunk, run, width):
    """A slot for each chunk, a running sum for each block."""
    chunks = cut(indptr, chunk)
    slots = torch.zeros(len(chunks), width)

    def program(i):
        _, first, last = chunks[i]
        slots[i] = partial(first, last)

    run(len(chunks), program)
    sums = torch.zeros(len(indptr) - 1, width)
    for (j, _, _), slot in zip(chunks, slots, strict=True):
        sums[j] += slot
    return sums


def bits_by_dictionary(partial, indptr, chunk, run, width):
    """Parts by the number of their program, added from the last to the first."""
    chunks = cut(indptr, chunk)
    parts = {}

    def program(i):
        parts[i] = partial(*chunks[i][1:])

    run(len(chunks), program)
    sums = torch.zeros(len(indptr) - 1, width)
    for i in reversed(range(len(chunks))):
        sums[chunks[i][0]] += parts[i]
    return sums


def bits_in_two_runs(partial, indptr, chunk, run, width):
    """A second run of programs, one a block, adds its slots."""
    blocks = len(indptr) - 1
    most = -(-int(indptr.diff().max()) // chunk)
    slots = torch.zeros(blocks, most, width)
    chunks = cut(indptr, chunk)
    sums = torch.zeros(blocks, width)

    def fill(i):
        j, first, last = chunks[i]
        slots[j, (first - int(indptr[j])) // chunk] = partial(first, last)

    def add(j):
        sums[j] = slots[j].sum(0)

    run(len(chunks), fill)
    run(blocks, add)
    return sums


def bits_by_position(partial, indptr, chunk, run, width):
    """One launch for each block."""
    sums = []
    for first, last in zip(indptr.tolist(), indptr[1:].tolist(), strict=False):
        count = -(-(last - first) // chunk)
        slots = [torch.zeros(width)] * count

        def program(i, first=first, last=last, slots=slots):
            start = first + i * chunk
            slots[i] = partial(start, min(start + chunk, last))

        run(count, program)
        sums.append(sum(slots, torch.zeros(width)))
    return torch.stack(sums)


def by_atomics(partial, indptr, chunk, run, width):
    """Every program adds to its block."""
    chunks = cut(indptr, chunk)
    sums = torch.zeros(len(indptr) - 1, width)

    def program(i):
        j, first, last = chunks[i]
        sums[j] += partial(first, last)

    run(len(chunks), program)
    return sums


def by_arrival(partial, indptr, chunk, run, width):
    """Parts in a list, in the order in which programs end."""
    chunks = cut(indptr, chunk)
    parts = []
    run(len(chunks), lambda i: parts.append((chunks[i][0], partial(*chunks[i][1:]))))
    sums = torch.zeros(len(indptr) - 1, width)
    for j, part in parts:
        sums[j] += part
    return sums


def by_block_programs(partial, indptr, chunk, run, width):
    """One program a block walks over its chunks."""
    chunks = cut(indptr, chunk)
    sums = torch.zeros(len(indptr) - 1, width)

    def program(j):
        for block, first, last in chunks:
            if block == j:
                sums[j] += partial(first, last)

    run(len(sums), program)
    return sums


def by_whole_lists(partial, indptr, chunk, run, width):
    """One program a block takes its list at once."""
    sums = torch.zeros(len(indptr) - 1, width)
    starts = indptr.tolist()

    def program(j):
        sums[j] = partial(starts[j], starts[j + 1])

    run(len(sums), program)
    return sums


def without_programs(partial, indptr, chunk, run, width):
    """A loop outside of the machine."""
    sums = torch.zeros(len(indptr) - 1, width)
    for j, first, last in cut(indptr, chunk):
        sums[j] += partial(first, last)
    return sums


def across_blocks(partial, indptr, chunk, run, width):
    """Chunks of all readers, whatever their block."""
    total = int(indptr[-1])
    starts = list(range(0, total, chunk))
    slots = torch.zeros(len(starts), width)

    def program(i):
        slots[i] = partial(starts[i], min(starts[i] + chunk, total))

    run(len(starts), program)
    sums = torch.zeros(len(indptr) - 1, width)
    for start, slot in zip(starts, slots, strict=True):
        sums[int(torch.searchsorted(indptr, start, right=True)) - 1] += slot
    return sums


def overwritten(partial, indptr, chunk, run, width):
    """A program stores into its block, and does not add."""
    sums = torch.zeros(len(indptr) - 1, width)
    chunks = cut(indptr, chunk)

    def program(i):
        sums[chunks[i][0]] = partial(*chunks[i][1:])

    run(len(chunks), program)
    return sums


def last_slot(partial, indptr, chunk, run, width):
    """Slots are right; only a block's last one is taken."""
    chunks = cut(indptr, chunk)
    slots = torch.zeros(len(chunks), width)

    def program(i):
        slots[i] = partial(*chunks[i][1:])

    run(len(chunks), program)
    sums = torch.zeros(len(indptr) - 1, width)
    for (j, _, _), slot in zip(chunks, slots, strict=True):
        sums[j] = slot
    return sums


def first_slot(partial, indptr, chunk, run, width):
    """Slots are right; only a block's first one is taken."""
    seen = set()
    chunks = cut(indptr, chunk)
    slots = torch.zeros(len(chunks), width)

    def program(i):
        slots[i] = partial(*chunks[i][1:])

    run(len(chunks), program)
    sums = torch.zeros(len(indptr) - 1, width)
    for (j, _, _), slot in zip(chunks, slots, strict=True):
        if j not in seen:
            sums[j] = slot
        seen.add(j)
    return sums


def mean_of_slots(partial, indptr, chunk, run, width):
    """The mean of the chunks."""
    sums = bits_by_slots(partial, indptr, chunk, run, width)
    counts = torch.tensor([-(-c // chunk) for c in indptr.diff().tolist()])
    return sums / counts.clamp(min=1)[:, None]


def whole_chunks_only(partial, indptr, chunk, run, width):
    """The short last chunk is left out."""
    chunks = [c for c in cut(indptr, chunk) if c[2] - c[1] == chunk]
    slots = torch.zeros(len(chunks), width)

    def program(i):
        slots[i] = partial(*chunks[i][1:])

    run(len(chunks), program)
    sums = torch.zeros(len(indptr) - 1, width)
    for (j, _, _), slot in zip(chunks, slots, strict=True):
        sums[j] += slot
    return sums


def too_many_readers(partial, indptr, chunk, run, width):
    """Each chunk begins one reader early."""
    chunks = cut(indptr, chunk)
    slots = torch.zeros(len(chunks), width)

    def program(i):
        _, first, last = chunks[i]
        slots[i] = partial(max(first - 1, 0), last)

    run(len(chunks), program)
    return torch.zeros(len(indptr) - 1, width)


def uneven_slots(partial, indptr, chunk, run, width):
    """Empty slots hold what memory held."""
    sums = bits_in_two_runs(partial, indptr, chunk, run, width)
    return torch.where(indptr.diff()[:, None] > 0, sums, 7.0)


BITS = [
    Wrong("added as programs end", by_atomics, "in the order in which programs end"),
    Wrong("a list of parts as they come", by_arrival, "in the order in which programs end"),
    Wrong("one program a block", by_block_programs, "a program took two chunks"),
    Wrong("whole lists", by_whole_lists, "a program took 7 readers, and a chunk has at most 4"),
    Wrong("no programs", without_programs, "partial was called outside of a program"),
    Wrong("chunks across blocks", across_blocks, "which belong to two blocks"),
    Wrong("stored, not added", overwritten, "holds its last chunk only"),
    Wrong("last slot", last_slot, "block 0 holds its last chunk only"),
    Wrong("first slot", first_slot, "block 0 holds its first chunk only"),
    Wrong("mean of the chunks", mean_of_slots, "block 0 is not the sum of its 2 chunks"),
    Wrong("whole chunks only", whole_chunks_only, "reader 0 was read 0 times"),
    Wrong("one reader early", too_many_readers, "which belong to two blocks"),
    Wrong("a number for nobody", uneven_slots, "nobody reads block 0, and its sum is 7, not 0"),
    Wrong(
        "slots returned",
        lambda *x: list(bits_by_slots(*x)),
        "the function returned a list, and a torch.Tensor was asked for",
    ),
]

RIGHT = {
    "11.1": [delta_by_einsum, delta_by_rows, delta_by_matmul, delta_by_diagonal],
    "11.2": [gate_by_autograd, gate_by_einsum, gate_by_branches],
    "11.3": [query_by_keys, query_by_gather, query_by_softmax, query_by_heads],
    "11.4": [readers_by_lists, readers_by_table, readers_by_key, readers_by_scatter],
    "11.5": [block_by_einsum, block_by_matrices, block_by_readers, block_in_double],
    "11.6": [bits_by_slots, bits_by_dictionary, bits_in_two_runs, bits_by_position],
}
WRONG = {
    "11.1": DELTAS,
    "11.2": GATES,
    "11.3": QUERIES,
    "11.4": READERS,
    "11.5": GRADIENTS,
    "11.6": BITS,
}
