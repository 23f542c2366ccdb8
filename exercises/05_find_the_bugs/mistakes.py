"""Set 05's mistakes that the checks know by what they give: the right one, one step changed."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import nsa_lite
from exercises.records import Mistake
from nsa_lite import BRANCHES

# --- 05.1: blocks with a stride ---


def cut(x: Tensor, block_size: int, stride: int, first=0, stop: int | None = None) -> Tensor:
    """Blocks from token `first` on; stop bounds where a block may begin."""
    stop = len(x) - block_size + 1 if stop is None else stop
    rows = [x[i : i + block_size] for i in range(first, stop, stride)]
    return torch.stack(rows) if rows else x.new_empty(0, block_size, x.shape[1])


SPLITS = [
    Mistake(
        "tokens in reverse",
        lambda x, l, d: cut(x, l, d).flip(1),
        "the tokens of a block are in the reverse order",
    ),
    Mistake(
        "unfold, then view",
        lambda x, l, d: cut(x, l, d).transpose(1, 2).reshape(-1, l, x.shape[1]),
        "the numbers of a block are in another order than its tokens and channels",
    ),
]

# --- 05.3: from scores to importance ---


def has_passed(i: Tensor, t: Tensor, l: int, d: int) -> Tensor:
    """Whether query t has passed compression block i."""
    return i * d + l - 1 <= t


def softmax_of_each_head(heads=lambda p: p.sum(0), dead=0.0) -> Callable:
    """From scores (H, T, N) to (T, N); heads joins the heads, dead stands where nothing is seen."""

    def weigh(scores: Tensor, mask: Tensor) -> Tensor:
        p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return heads(p.masked_fill(~mask.any(-1, keepdim=True), dead))

    return weigh


SUM_OF_HEADS = softmax_of_each_head()


def one_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """One softmax over the keys of all heads."""
    rows = scores.masked_fill(~mask, -torch.inf).transpose(0, 1)  # (T, H, N)
    p = rows.flatten(1).softmax(1).nan_to_num(nan=0.0)
    return p.unflatten(1, rows.shape[1:]).sum(1)


def shared_tokens(i: Tensor, j: Tensor, l: int, d: int, l_sel: int) -> Tensor:
    """How many tokens compression block i and selection block j share."""
    ends = torch.minimum(i * d + l, (j + 1) * l_sel)
    return (ends - torch.maximum(i * d, j * l_sel)).clamp(min=0)


def half_and_half(i: Tensor, j: Tensor, l: int, d: int, l_sel: int) -> Tensor:
    """All of a block inside, and half of one that lies across a border, in strides."""
    shared = shared_tokens(i, j, l, d, l_sel)
    return ((shared > 0).float() + (shared == l).float()) / 2 * l / d


def printed(i: Tensor, j: Tensor, l: int, d: int, l_sel: int) -> Tensor:
    """How often Eq. 9, as printed for blocks from 1, reads compression block i."""
    pairs = [(m, n) for m in range(l_sel // d) for n in range(l // d)]
    return sum((i == l_sel // d * j - m - n).long() for m, n in pairs)


def heaviest(p: Tensor, share: Tensor) -> Tensor:
    """The largest probability among the compression blocks that touch a selection block."""
    return torch.stack([p.masked_fill(column == 0, 0).amax(1) for column in share.T], 1)


def importance(
    seen=has_passed,
    scale=lambda width: width**-0.5,
    weigh=SUM_OF_HEADS,
    share=lambda i, j, l, d, l_sel: shared_tokens(i, j, l, d, l_sel) / d,
    collect=torch.matmul,
) -> Callable:
    """Scores, probabilities, and what each selection block gets of them by its share."""

    def answer(q: Tensor, k: Tensor, l: int, d: int, l_sel: int) -> Tensor:
        i = torch.arange(len(k))
        t = torch.arange(q.shape[1])[:, None]
        p = weigh(q @ k.T * scale(q.shape[-1]), seen(i, t, l, d))
        j = torch.arange(-(-q.shape[1] // l_sel))
        return collect(p, share(i[:, None], j, l, d, l_sel).float())

    return answer


IMPORTANCES = [
    Mistake(
        "no mask",
        importance(seen=lambda i, t, l, d: (i >= 0) & (t >= 0)),
        "a query's scores reach compressed keys whose blocks it has not passed",
    ),
    Mistake(
        "seen once begun",
        importance(seen=lambda i, t, l, d: i * d <= t),
        "a compressed key counts from the token on at which its block begins",
    ),
    Mistake(
        "logits",
        importance(weigh=lambda scores, mask: scores.masked_fill(~mask, 0.0).sum(0)),
        "the logits are summed, and Eq. 8 turns them into probabilities first",
    ),
    Mistake(
        "no scale",
        importance(scale=lambda width: 1.0),
        "the scores are not divided by the root of the width",
    ),
    Mistake(
        "head 0 only",
        importance(weigh=softmax_of_each_head(lambda p: p[0])),
        "only head 0 counts",
    ),
    Mistake(
        "mean over heads",
        importance(weigh=softmax_of_each_head(lambda p: p.mean(0))),
        "the mean over the heads is taken, and Eq. 10 sums",
    ),
    Mistake(
        "one softmax for all heads",
        importance(weigh=one_softmax),
        "one softmax runs over the keys of all heads",
    ),
    Mistake(
        "logits summed over heads",
        importance(weigh=lambda scores, mask: SUM_OF_HEADS(scores.sum(0)[None], mask)),
        "the heads' logits are summed before the softmax",
    ),
    Mistake(
        "tokens, not strides",
        importance(share=shared_tokens),
        "an overlap counts its tokens, and it should count strides",
    ),
    Mistake(
        "half and half",
        importance(share=half_and_half),
        "a block across a border is split half and half, and it lies there with more or less",
    ),
    Mistake(
        "strides of two tokens",
        importance(share=lambda *blocks: shared_tokens(*blocks) / 2),
        "an overlap is divided by 2, whatever the stride is",
    ),
    Mistake(
        "scores halved",
        importance(scale=lambda width: 0.5),
        "the scores are halved, and the root of the width is not always 2",
    ),
    Mistake(
        "no overlap",
        importance(share=lambda i, j, l, d, l_sel: i * d // l_sel == j),
        "each compression block counts once, for the selection block that it begins in",
    ),
    Mistake(
        "the heaviest, not the sum",
        importance(collect=heaviest),
        "a selection block gets its heaviest compression block, not the sum",
    ),
    Mistake(
        "Eq. 9 as printed, from 0",
        importance(share=printed),
        "the weights land one block too early or too late: Eq. 9 as printed counts from 1",
    ),
]

# --- 05.5: wire the layer anew ---


def compress(x: Tensor, phi: dict, sizes: dict, bend=F.gelu) -> Tensor:
    """phi of each block of x (T, D), with one MLP: (1, 1, N, D)."""
    rows = cut(x, sizes["block_size"], sizes["stride"]) + phi["position"]
    return (bend(rows.flatten(1) @ phi["first"]) @ phi["second"])[None, None]


def query_heads(x: Tensor, p: dict) -> Tensor:
    """The queries of all heads, (1, H, T, D)."""
    width = p["keys"]["window"].shape[1]
    return (x @ p["query"]).unflatten(1, (-1, width)).transpose(0, 1)[None]


def branch_outputs(ops, x: Tensor, p: dict, sizes: dict, bend=F.gelu, num_local=1) -> list[Tensor]:
    """The outputs of the three branches, (1, H, T, D) each, by the operations of `ops`."""
    blocks = dict(block_size=sizes["block_size"], stride=sizes["stride"])
    select = dict(select_block_size=sizes["select_block_size"])
    q = query_heads(x, p)
    k = {b: x @ weight for b, weight in p["keys"].items()}
    v = {b: x @ weight for b, weight in p["values"].items()}
    short_k = compress(k["compressed"], p["phi_k"], sizes, bend)
    short_v = compress(v["compressed"], p["phi_v"], sizes, bend)
    far, lse = ops.compressed_attention(q, short_k, short_v, **blocks)
    limits = dict(num_selected=sizes["num_selected"], num_local=num_local)
    ids = ops.select_blocks(q, short_k, lse, **blocks, **select, **limits)
    k, v = ({b: y[None, None] for b, y in part.items()} for part in (k, v))
    return [
        far,
        ops.selected_attention(q, k["selected"], v["selected"], ids, **select),
        ops.window_attention(q, k["window"], v["window"], window=sizes["window"]),
    ]


def layer(
    ops=nsa_lite,
    bend=F.gelu,
    num_local=1,
    gate_input=lambda x, p: x,
    gate_bend=F.gelu,
    gate=torch.sigmoid,
) -> Callable:
    """The gated sum of the branches; bend stands between phi's matrices, gate_bend in the gate."""

    def answer(x: Tensor, p: dict, sizes: dict) -> Tensor:
        outs = branch_outputs(ops, x, p, sizes, bend, num_local)
        hidden = gate_bend(gate_input(x, p) @ p["gate"]["first"])
        logits = (hidden @ p["gate"]["second"]).unflatten(1, (-1, 3))  # (T, H, 3)
        gates = gate(logits).transpose(0, 1)
        return sum(gates[..., [c]] * out[0] for c, out in enumerate(outs))

    return answer


def rewired(change: Callable) -> Callable:
    """The right layer, of weights that are in the wrong places."""
    return lambda x, p, sizes: layer()(x, {**p, **change(p)}, sizes)


def all_of(branch: str, *kinds: str) -> Callable:
    """One branch's keys, values or both in all three places."""
    return rewired(lambda p: {kind: dict.fromkeys(BRANCHES, p[kind][branch]) for kind in kinds})


CROSSED = {"compressed": "selected", "selected": "compressed", "window": "window"}


def crossed(p: dict) -> dict:
    """The keys and values of two branches in each other's place."""
    return {kind: {b: p[kind][CROSSED[b]] for b in BRANCHES} for kind in ("keys", "values")}


def no_position(p: dict) -> dict:
    """Both phi with a position encoding of zeros."""
    zero = torch.zeros_like(p["phi_k"]["position"])
    return {phi: {**p[phi], "position": zero} for phi in ("phi_k", "phi_v")}


def resized(change: Callable) -> Callable:
    """The right layer with other sizes; the weights' blocks stay as long as they are."""
    return lambda x, p, sizes: layer()(x, p, {**sizes, **change(sizes)})


def branch_by_branch(p: dict) -> dict:
    """The gate's columns as they would go branch by branch."""
    second = p["gate"]["second"].unflatten(1, (3, -1)).transpose(1, 2).flatten(1)
    return {"gate": {**p["gate"], "second": second}}


LAYERS = [
    *(
        Mistake(
            f"the {b} keys and values everywhere",
            all_of(b, "keys", "values"),
            f"all branches read the {b} branch's keys and values",
        )
        for b in BRANCHES
    ),
    *(
        Mistake(
            f"the {b} {kind} everywhere",
            all_of(b, kind),
            f"all branches read the {b} branch's {kind}",
        )
        for b in BRANCHES
        for kind in ("keys", "values")
    ),
    Mistake(
        "two branches crossed",
        rewired(crossed),
        "the compressed and the selected branch read each other's keys and values",
    ),
    Mistake(
        "two local blocks",
        layer(num_local=2),
        "two local blocks are forced, and one was asked for",
    ),
    Mistake("no position encoding", rewired(no_position), "phi has no position encoding"),
    Mistake(
        "a linear phi",
        layer(bend=lambda z: z),
        "phi is linear: nothing bends between its two matrices",
    ),
    Mistake("relu", layer(bend=F.relu), "phi bends with relu, and the layer uses gelu"),
    Mistake(
        "phi_k for the values",
        rewired(lambda p: {"phi_v": p["phi_k"]}),
        "phi_k makes the compressed values too",
    ),
    Mistake(
        "gate on q",
        layer(gate_input=lambda x, p: x @ p["query"]),
        "the gates are made from the query, and Eq. 5 makes them from the layer's input",
    ),
    Mistake(
        "a linear gate",
        layer(gate_bend=lambda z: z),
        "the gate's MLP is linear: nothing bends between its two matrices",
    ),
    Mistake(
        "softmax gates",
        layer(gate=lambda z: z.softmax(-1)),
        "the gates are a softmax over the branches",
    ),
    Mistake(
        "no sigmoid",
        layer(gate=lambda z: z),
        "the gates are logits: the sigmoid is missing",
    ),
    Mistake(
        "columns branch by branch",
        rewired(branch_by_branch),
        "the gate's columns were read branch by branch, and they go head by head",
    ),
    Mistake(
        "number and window exchanged",
        resized(lambda s: {"num_selected": s["window"], "window": s["num_selected"]}),
        "num_selected and window are exchanged",
    ),
    Mistake(
        "selection blocks of the short size",
        resized(lambda s: {"select_block_size": s["block_size"]}),
        "selection blocks have block_size tokens, and select_block_size was asked for",
    ),
    Mistake(
        "three blocks always",
        resized(lambda s: {"num_selected": 3}),
        "three blocks are selected, whatever num_selected says",
    ),
    Mistake(
        "a window of one more",
        resized(lambda s: {"window": s["window"] + 1}),
        "the window holds the query's own token already, and one more was read",
    ),
]
