"""Planted wrong answers that the checks of set 05 must name, and right ones they must accept."""

import torch
import torch.nn.functional as F

import nsa_lite
from exercises.records import Wrong
from nsa_lite import BRANCHES

# --- 05.1 ---


def split_by_index(x, block_size, stride):
    count = max(0, (len(x) - block_size) // stride + 1)
    first = torch.arange(count)[:, None] * stride
    return x[first + torch.arange(block_size)]


def split_by_unfold(x, block_size, stride):
    if len(x) < block_size:
        return x.new_empty(0, block_size, x.shape[1])
    return x.unfold(0, block_size, stride).movedim(-1, 1)


def split_by_matrix(x, block_size, stride):
    rows = [
        torch.eye(len(x))[i : i + block_size]
        for i in range(0, len(x), stride)
        if i + block_size <= len(x)
    ]
    picks = torch.stack(rows) if rows else torch.zeros(0, block_size, len(x))
    return picks @ x


def cut(x, block_size, stride, first=0, stop=None):
    """Blocks from token `first` on; stop bounds where a block may begin."""
    stop = len(x) - block_size + 1 if stop is None else stop
    rows = [x[i : i + block_size] for i in range(first, stop, stride)]
    return torch.stack(rows) if rows else x.new_empty(0, block_size, x.shape[1])


def padded(x, block_size, stride):
    short = -(len(x) - block_size) % stride if len(x) > block_size else block_size - len(x)
    return cut(F.pad(x, (0, 0, 0, short)), block_size, stride)


SPLITS = [
    Wrong(
        "the skeleton's",
        lambda x, l, d: x.reshape(-1, l, x.shape[1]),
        "overlapping blocks: the shape is (3, 4, 2)",
    ),
    Wrong(
        "reshape, the tail cut off",
        lambda x, l, d: x[: len(x) // l * l].reshape(-1, l, x.shape[1]),
        "the shape is (3, 4",
    ),
    Wrong(
        "unfold's order of axes",
        lambda x, l, d: x.unfold(0, l, d) if len(x) >= l else x.new_empty(0, x.shape[1], l),
        "one block: the shape is (1, 3, 4)",
    ),
    Wrong(
        "unfold, then view",
        lambda x, l, d: split_by_unfold(x, l, d).transpose(1, 2).reshape(-1, l, x.shape[1]),
        "in another order than its tokens and channels",
    ),
    Wrong("tail filled up with zeros", padded, "a tail too short for a block: the shape is"),
    Wrong(
        "the last block forgotten",
        lambda x, l, d: cut(x, l, d, stop=len(x) - l),
        "one block: the shape is (0, 4, 3)",
    ),
    Wrong(
        "crash when too short",
        lambda x, l, d: x.unfold(0, l, d).transpose(1, 2),
        "exactly one token too few: the function raised RuntimeError",
    ),
    Wrong(
        "ends aligned, not beginnings",
        lambda x, l, d: cut(x, l, d, first=(len(x) - l) % d if len(x) >= l else 0),
        "block 0 holds tokens 1 to 4",
    ),
    Wrong(
        "newest block first", lambda x, l, d: cut(x, l, d).flip(0), "block 0 holds tokens 8 to 11"
    ),
    Wrong("tokens in reverse", lambda x, l, d: cut(x, l, d).flip(1), "in the reverse order"),
]

# --- 05.2 ---


def causal_by_replacing(f, x):
    out = f(x)
    for t in range(len(x) - 1):
        other = x.clone()
        other[t + 1 :] = 1000.0 * torch.randn_like(x[t + 1 :]) + 500.0
        if (f(other)[: t + 1] != out[: t + 1]).any():
            return False
    return True


def causal_one_token_at_a_time(f, x):
    out, leaks = f(x), []
    for s in range(1, len(x)):
        for value in (1e4, -1e4):
            other = torch.cat([x[:s], torch.full_like(x[:1], value), x[s + 1 :]])
            leaks.append(not torch.equal(f(other)[:s], out[:s]))
    return not any(leaks)


def causal_by_cutting(f, x):
    out = f(x)
    return all(torch.equal(f(x[:t]), out[:t]) for t in range(1, len(x) + 1))


def perturb(change=lambda rest: rest * 0 + 1e4, places=range, own=0, alike=torch.equal):
    """The right test with one step changed; places(n) are the tokens t, of n that have a future."""

    def answer(f, x):
        out = f(x)
        for t in places(len(x) - 1):
            other = x.clone()
            other[t + 1 :] = change(x[t + 1 :])
            if not alike(f(other)[: t + 1 + own], out[: t + 1 + own]):
                return False
        return True

    return answer


def by_jacobian(f, x):
    j = torch.autograd.functional.jacobian(lambda y: f(y).sum(1), x)  # (row, token, channel)
    return not j.abs().sum(-1).triu(1).any()


TESTS = [
    Wrong(
        "only the last token",
        perturb(places=lambda n: [n - 1]),
        "the last token, 8, is alone in its block",
    ),
    Wrong("only the middle", perturb(places=lambda n: [n // 2]), "row 6 reads token 7"),
    Wrong(
        "allclose",
        perturb(
            change=lambda rest: rest + torch.randn_like(rest),
            alike=lambda a, b: torch.allclose(a, b, atol=1e-3),
        ),
        "causal means exactly 0",
    ),
    Wrong(
        "a tolerance of 1e-4",
        perturb(change=lambda rest: rest + 10, alike=lambda a, b: bool((a - b).abs().max() < 1e-4)),
        "causal means exactly 0",
    ),
    Wrong("a small change", perturb(change=lambda rest: rest + 0.01), "no small change"),
    Wrong("a gradient", by_jacobian, "no gradient and no small change shows that"),
    Wrong("NaN as poison", perturb(change=lambda rest: rest * torch.nan), "0 times NaN"),
    Wrong("own row compared to its future", perturb(own=1), "with token t itself"),
    Wrong("all rows compared", lambda f, x: torch.equal(f(x + 1e4), f(x)), "token t itself"),
    Wrong("never False", lambda f, x: True, "the test returned True"),
    Wrong(
        "the wrong way round", lambda f, x: not causal_by_replacing(f, x), "the test returned False"
    ),
    Wrong(
        "a tensor",
        lambda f, x: torch.tensor([causal_by_replacing(f, x)]),
        "and a bool was asked for",
    ),
]

# --- 05.3 ---


def importance_by_loop(q, k, block_size, stride, select_block_size):
    heads, length, width = q.shape
    out = torch.zeros(length, -(-length // select_block_size))
    for t in range(block_size - 1, length):
        seen = (t + 1 - block_size) // stride + 1
        for h in range(heads):
            p = torch.softmax(k[:seen] @ q[h, t] / width**0.5, 0)
            for i in range(seen):
                for strip in range(block_size // stride):  # d tokens each
                    out[t, (i + strip) * stride // select_block_size] += p[i]
    return out


def importance_by_package(q, k, block_size, stride, select_block_size):
    sizes = dict(block_size=block_size, stride=stride)
    _, lse = nsa_lite.compressed_attention(q[None], k[None, None], k[None, None], **sizes)
    return nsa_lite.block_importance(
        q[None], k[None, None], lse, **sizes, select_block_size=select_block_size
    )[0, 0]


def importance_in_double(q, k, block_size, stride, select_block_size):
    q, k = q.double(), k.double()
    i, t = torch.arange(len(k)), torch.arange(q.shape[1])[:, None]
    e = torch.exp(q @ k.T / q.shape[-1] ** 0.5) * (i * stride + block_size <= t + 1)
    p = (e / e.sum(-1, keepdim=True).clamp(min=1e-300)).sum(0)
    token = i[:, None] * stride + torch.arange(0, block_size, stride)  # the strips of a block
    blocks = -(-q.shape[1] // select_block_size)
    return p @ F.one_hot(token // select_block_size, blocks).sum(1).double()


def seen_by(i, t, l, d):
    return i * d + l - 1 <= t


def shared_tokens(i, j, l, d, l_sel):
    ends = torch.minimum(i * d + l, (j + 1) * l_sel)
    return (ends - torch.maximum(i * d, j * l_sel)).clamp(min=0)


def scores_to_importance(
    seen=seen_by,
    scale=lambda width: width**-0.5,
    heads=lambda p: p.sum(0),
    table=shared_tokens,
    divide=True,
    before=lambda scores: scores,
    softmax=True,
    dead=0.0,
):
    """The right answer with one step changed."""

    def answer(q, k, l, d, l_sel):
        i, t = torch.arange(len(k)), torch.arange(q.shape[1])[:, None]
        mask = seen(i, t, l, d)
        scores = before(q @ k.T * scale(q.shape[-1]))
        if softmax:
            p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            p = p.masked_fill(~mask.any(-1, keepdim=True), dead)
        else:
            p = scores.masked_fill(~mask, 0.0)
        j = torch.arange(-(-q.shape[1] // l_sel))
        weight = table(i[:, None], j, l, d, l_sel).float()
        return heads(p) @ weight / (d if divide else 1)

    return answer


def eq_9_as_printed(i, j, l, d, l_sel):
    # how often i = l'/d j - m - n, times d because the answer divides by it
    pairs = [(m, n) for m in range(l_sel // d) for n in range(l // d)]
    return d * sum((i == l_sel // d * j - m - n).long() for m, n in pairs)


def begins_in(i, j, l, d, l_sel):
    return d * (i * d // l_sel == j).long()


def heaviest(q, k, l, d, l_sel):
    p = scores_to_importance(table=lambda i, j, l, d, l_sel: (i == j).long(), divide=False)
    p = p(q, k, l, d, d)[:, : len(k)]  # one column a compression block
    i, j = torch.arange(len(k))[:, None], torch.arange(-(-q.shape[1] // l_sel))
    touch = shared_tokens(i, j, l, d, l_sel) > 0
    return torch.stack([p.masked_fill(~column, 0).amax(1) for column in touch.T], 1)


def finite_mask(q, k, l, d, l_sel):
    i, t = torch.arange(len(k)), torch.arange(q.shape[1])[:, None]
    scores = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(~seen_by(i, t, l, d), -1e4)
    j = torch.arange(-(-q.shape[1] // l_sel))
    return scores.softmax(-1).sum(0) @ shared_tokens(i[:, None], j, l, d, l_sel).float() / d


def one_softmax(q, k, l, d, l_sel):
    i, t = torch.arange(len(k)), torch.arange(q.shape[1])[:, None]
    scores = torch.einsum("htd,nd->thn", q, k) * q.shape[-1] ** -0.5
    mask = seen_by(i, t, l, d)[:, None]
    p = scores.masked_fill(~mask & mask.any(-1, True), -torch.inf).flatten(1).softmax(1)
    p = p.unflatten(1, (len(q), len(k))).sum(1) * mask[:, 0]
    j = torch.arange(-(-q.shape[1] // l_sel))
    return p @ shared_tokens(i[:, None], j, l, d, l_sel).float() / d


IMPORTANCES = [
    Wrong("the skeleton's", lambda q, k, l, d, l_sel: q[0] @ k.T, "the shape is (12, 6)"),
    Wrong(
        "no mask",
        scores_to_importance(seen=lambda i, t, l, d: (i >= 0) & (t >= 0)),
        "whose blocks it has not passed",
    ),
    Wrong("a finite number for the mask", finite_mask, "its importance is not 0"),
    Wrong("one softmax for all heads", one_softmax, "one softmax runs over the keys of all heads"),
    Wrong(
        "seen once begun",
        scores_to_importance(seen=lambda i, t, l, d: i * d <= t),
        "from the token on at which its block begins",
    ),
    Wrong("logits", scores_to_importance(softmax=False), "the logits are summed"),
    Wrong("no scale", scores_to_importance(scale=lambda width: 1.0), "root of the width"),
    Wrong("head 0 only", scores_to_importance(heads=lambda p: p[0]), "only head 0 counts"),
    Wrong(
        "mean over heads",
        scores_to_importance(heads=lambda p: p.mean(0)),
        "the mean over the heads",
    ),
    Wrong(
        "logits summed over heads",
        scores_to_importance(before=lambda scores: scores.sum(0, keepdim=True)),
        "summed before the softmax",
    ),
    Wrong(
        "Eq. 9 as printed, from 0",
        scores_to_importance(table=eq_9_as_printed),
        "Eq. 9 as printed counts from 1",
    ),
    Wrong("tokens, not strides", scores_to_importance(divide=False), "counts its tokens"),
    Wrong("no overlap", scores_to_importance(table=begins_in), "that it begins in"),
    Wrong("the heaviest, not the sum", heaviest, "heaviest compression block"),
    Wrong(
        "NaN where nothing is seen",
        scores_to_importance(dead=torch.nan),
        "query 0 sees 0 compressed keys, and its importance is NaN",
    ),
]

# --- 05.4 ---


def choice_by_sets(score, select_block_size, num_selected):
    out = []
    for t, row in enumerate(score.tolist()):
        own = t // select_block_size
        forced = {0, own, max(own - 1, 0)}
        rest = sorted(set(range(own + 1)) - forced, key=lambda j, row=row: (-row[j], j))
        ids = sorted([*forced, *rest[: num_selected - len(forced)]])
        out.append(ids + [-1] * (num_selected - len(ids)))
    return torch.tensor(out)


def choice_one_at_a_time(score, select_block_size, num_selected):
    score = score.double().clone()
    t, j = torch.arange(len(score))[:, None], torch.arange(score.shape[1])
    own = t // select_block_size
    score[((j == 0) | (j == own) | (j == own - 1)).expand_as(score)] = 1e30
    score[(j > own).expand_as(score)] = -1e30
    end = score.shape[1]
    columns = []
    for _ in range(num_selected):
        best = score.argmax(1)  # argmax returns the first of several
        found = score.gather(1, best[:, None])[:, 0] > -1e30
        columns.append(torch.where(found, best, end))
        score.scatter_(1, best[:, None], -1e30)
    ids = torch.stack(columns, 1).sort(1).values
    return torch.where(ids == end, -1, ids).int()


def choice_by_package(score, select_block_size, num_selected):
    return nsa_lite.choose_blocks(
        score[None, None], select_block_size=select_block_size, num_selected=num_selected
    )[0, 0]


def choice(
    initial=torch.inf,
    local=torch.inf,
    num_local=2,
    mask=True,
    mask_again=True,
    stable=True,
    ascending=True,
    room=0,
):
    """The right answer with one step changed."""

    def answer(score, l_sel, n):
        t, j = torch.arange(len(score))[:, None], torch.arange(score.shape[1])
        own, rank = t // l_sel, score.clone()
        if initial is not None:
            rank[:, 0] = initial
        if local is not None:
            rank = rank.masked_fill((j <= own) & (j > own - num_local), local)
        if mask:
            rank = rank.masked_fill(j > own, -torch.inf)
        if stable:
            order = rank.sort(dim=1, descending=True, stable=True).indices
        else:  # ties to the higher id
            order = rank.flip(1).sort(dim=1, descending=True, stable=True).indices
            order = rank.shape[1] - 1 - order
        ids = F.pad(order[:, : n - room], (0, max(0, n - rank.shape[1]) + room), value=10**6)
        if mask_again:
            ids = ids.masked_fill(ids > own, 10**6)
        if ascending:
            ids = ids.sort(1).values
        return ids.masked_fill(ids == 10**6, -1)

    return answer


def block_0_twice(score, l_sel, n):
    out = []
    for t, row in enumerate(score.tolist()):
        own = t // l_sel
        ids = [0, max(own - 1, 0), own]  # a list, not a set
        rest = sorted(set(range(own + 1)) - set(ids), key=lambda j, row=row: (-row[j], j))
        ids = sorted(ids + rest[: n - 3])
        out.append(ids + [-1] * (n - len(ids)))
    return torch.tensor(out)


CHOICES = [
    Wrong(
        "the skeleton's",
        lambda score, l_sel, n: score.topk(n, dim=-1).indices,
        "query 0 chose block 23, which begins at token 23",
    ),
    Wrong("no mask at all", choice(mask=False, mask_again=False), "which begins at token"),
    Wrong(
        "masked before the sort only",
        choice(mask_again=False),
        "query 0 chose block 3, which begins at token 3",
    ),
    Wrong(
        "masked after the sort only",
        choice(mask=False),
        "query 3 chose 3 blocks; 4 have begun and n is 4",
    ),
    Wrong("forced by a score of 1", choice(initial=1.0, local=1.0), "it is forced"),
    Wrong("no initial block", choice(initial=None), "did not choose its initial block, 0"),
    Wrong("no local blocks", choice(local=None), "it is forced"),
    Wrong("the own block only", choice(num_local=1), "did not choose its block before its own"),
    Wrong("block 0 twice", block_0_twice, "query 0 chose block 0 3 times"),
    Wrong("ties to the higher id", choice(stable=False), "tie, and the higher one was chosen"),
    Wrong("in order of rank", choice(ascending=False), "but not ascending"),
    Wrong("one block too few", choice(room=1), "query 3 chose 3 blocks"),
    Wrong(
        "crash when blocks are few",
        lambda score, l_sel, n: (
            choice()(score, l_sel, n) if score.shape[1] >= n else score.topk(n).indices
        ),
        "the function raised RuntimeError",
    ),
]

# --- 05.5 ---


def layer_by_package(x, p, sizes):
    # nsa_lite's own pieces wherever it has one
    s = {name: sizes[name] for name in ("block_size", "stride")}
    heads = p["gate"]["second"].shape[1] // 3
    q = (x @ p["query"]).unflatten(1, (heads, -1)).transpose(0, 1)[None]
    k, v = ({b: (x @ w)[None, None] for b, w in p[kind].items()} for kind in ("keys", "values"))
    short = []
    for weights, name in ((k, "phi_k"), (v, "phi_v")):
        phi = nsa_lite.Phi(q.shape[-1], **s)
        raw = nsa_lite.compression.split_blocks(weights["compressed"], phi.block_size, phi.stride)
        raw = (raw + p[name]["position"]).flatten(-2)
        short.append(F.gelu(raw @ p[name]["first"]) @ p[name]["second"])
    out_c, lse = nsa_lite.compressed_attention(q, *short, **s)
    ids = nsa_lite.select_blocks(
        q,
        short[0],
        lse,
        **s,
        num_local=1,
        select_block_size=sizes["select_block_size"],
        num_selected=sizes["num_selected"],
    )
    out_s = nsa_lite.selected_attention(
        q, k["selected"], v["selected"], ids, select_block_size=sizes["select_block_size"]
    )
    out_w = nsa_lite.window_attention(q, k["window"], v["window"], window=sizes["window"])
    gates = torch.sigmoid(F.gelu(x @ p["gate"]["first"]) @ p["gate"]["second"])
    gates = gates.unflatten(1, (heads, 3)).transpose(0, 1)[None]
    return nsa_lite.gated_sum(gates, (out_c, out_s, out_w))[0]


def layer_with_masks(x, p, sizes):
    l, d, l_sel = sizes["block_size"], sizes["stride"], sizes["select_block_size"]
    width, length = p["keys"]["window"].shape[1], len(x)
    heads = p["query"].shape[1] // width
    q = torch.stack((x @ p["query"]).chunk(heads, 1))
    t, s = torch.arange(length)[:, None], torch.arange(length)

    def attend(k, v, mask):
        scores = (q @ k.T / width**0.5).masked_fill(~mask & mask.any(-1, True), -torch.inf)
        weight = scores.softmax(-1) * mask
        return weight @ v, weight

    def short(branch, phi):
        rows = split_by_index(x @ branch["compressed"], l, d) + phi["position"]
        return F.gelu(rows.flatten(1) @ phi["first"]) @ phi["second"]

    short_k, short_v = short(p["keys"], p["phi_k"]), short(p["values"], p["phi_v"])
    i = torch.arange(len(short_k))
    out_c, weight = attend(short_k, short_v, i * d + l - 1 <= t)
    j = torch.arange(-(-length // l_sel))
    with torch.no_grad():
        score = weight.sum(0) @ (shared_tokens(i[:, None], j, l, d, l_sel) / d)
        own = t // l_sel
        score = score.masked_fill((j == 0) | (j == own), torch.inf).masked_fill(j > own, -1.0)
        ids = score.sort(dim=1, descending=True, stable=True).indices[:, : sizes["num_selected"]]
    chosen = (s // l_sel == ids[..., None]).any(1) & (s <= t)
    out_s, _ = attend(x @ p["keys"]["selected"], x @ p["values"]["selected"], chosen)
    near = (s <= t) & (s > t - sizes["window"])
    out_w, _ = attend(x @ p["keys"]["window"], x @ p["values"]["window"], near)
    gates = torch.sigmoid(F.gelu(x @ p["gate"]["first"]) @ p["gate"]["second"])
    out = torch.zeros(heads, length, width)
    for h in range(heads):
        for c, branch in enumerate((out_c, out_s, out_w)):
            out[h] = out[h] + gates[:, 3 * h + c, None] * branch[h]
    return out


def layer_in_double(x, p, sizes):
    def double(value):
        if isinstance(value, dict):
            return {name: double(part) for name, part in value.items()}
        return value.double()

    return layer_by_package(x.double(), double(p), sizes)


def wire(
    keys=lambda b: b,
    values=lambda b: b,
    bend=F.gelu,
    gate_bend=F.gelu,
    gate=torch.sigmoid,
    phi_v="phi_v",
    position=1.0,
    gate_of_query=False,
    columns=None,
    num_local=1,
):
    """The right answer with one step changed: it rewires the weights before the layer runs."""

    def answer(x, p, sizes):
        heads = p["query"].shape[1] // p["keys"]["window"].shape[1]
        k, v = (
            {b: p[kind][whose(b)] for b in BRANCHES}
            for kind, whose in (("keys", keys), ("values", values))
        )
        q = (x @ p["query"]).unflatten(1, (heads, -1)).transpose(0, 1)[None]
        short = []
        for w, phi in ((k["compressed"], p["phi_k"]), (v["compressed"], p[phi_v])):
            rows = split_by_index(x @ w, sizes["block_size"], sizes["stride"])
            rows = (rows + position * phi["position"]).flatten(1)
            short.append((bend(rows @ phi["first"]) @ phi["second"])[None, None])
        s = dict(block_size=sizes["block_size"], stride=sizes["stride"])
        out_c, lse = nsa_lite.compressed_attention(q, *short, **s)
        l_sel = sizes["select_block_size"]
        ids = nsa_lite.select_blocks(
            q,
            short[0],
            lse,
            **s,
            select_block_size=l_sel,
            num_selected=sizes["num_selected"],
            num_local=num_local,
        )
        raw = {b: ((x @ k[b])[None, None], (x @ v[b])[None, None]) for b in BRANCHES}
        out_s = nsa_lite.selected_attention(q, *raw["selected"], ids, select_block_size=l_sel)
        out_w = nsa_lite.window_attention(q, *raw["window"], window=sizes["window"])
        z = x @ p["query"] if gate_of_query else x
        z = gate_bend(z @ p["gate"]["first"]) @ p["gate"]["second"]
        z = z.unflatten(1, (heads, 3)) if columns is None else columns(z, heads)
        gates = gate(z).transpose(0, 1)[None]
        return nsa_lite.gated_sum(gates, (out_c, out_s, out_w))[0]

    return answer


def swap(b):
    return {"compressed": "selected", "selected": "compressed", "window": "window"}[b]


LAYERS = [
    Wrong(
        "one pair of keys and values",
        wire(keys=lambda b: "compressed", values=lambda b: "compressed"),
        "all branches read the compressed branch's keys and values",
    ),
    Wrong(
        "one pair, the window's",
        wire(keys=lambda b: "window", values=lambda b: "window"),
        "all branches read the window branch's keys and values",
    ),
    Wrong(
        "own keys, shared values",
        wire(values=lambda b: "selected"),
        "all branches read the selected branch's values",
    ),
    Wrong("two branches crossed", wire(keys=swap, values=swap), "read each other's"),
    Wrong("two local blocks", wire(num_local=2), "two local blocks are forced"),
    Wrong("no position encoding", wire(position=0.0), "phi has no position encoding"),
    Wrong("a linear phi", wire(bend=lambda z: z), "phi is linear"),
    Wrong("relu", wire(bend=F.relu), "phi bends with relu"),
    Wrong("phi_k for the values", wire(phi_v="phi_k"), "phi_k makes the compressed values too"),
    Wrong("gate on q", wire(gate_of_query=True), "made from the query"),
    Wrong("a linear gate", wire(gate_bend=lambda z: z), "the gate's MLP is linear"),
    Wrong("softmax gates", wire(gate=lambda z: z.softmax(-1)), "are a softmax"),
    Wrong("no sigmoid", wire(gate=lambda z: z), "the sigmoid is missing"),
    Wrong(
        "columns branch by branch",
        wire(columns=lambda z, heads: z.unflatten(1, (3, heads)).transpose(1, 2)),
        "they go head by head",
    ),
    Wrong(
        "keys detached",
        lambda x, p, sizes: layer_by_package(
            x, {**p, "keys": {b: w.detach() for b, w in p["keys"].items()}}, sizes
        ),
        "no gradient reaches the compressed keys",
    ),
    Wrong(
        "rows before heads", lambda x, p, sizes: wire()(x, p, sizes).transpose(0, 1), "the shape is"
    ),
]

RIGHT = {
    "05.1": [split_by_index, split_by_unfold, split_by_matrix],
    "05.2": [causal_by_replacing, causal_one_token_at_a_time, causal_by_cutting],
    "05.3": [importance_by_loop, importance_by_package, importance_in_double],
    "05.4": [choice_by_sets, choice_one_at_a_time, choice_by_package],
    "05.5": [layer_by_package, layer_with_masks, layer_in_double],
}
WRONG = {"05.1": SPLITS, "05.2": TESTS, "05.3": IMPORTANCES, "05.4": CHOICES, "05.5": LAYERS}
