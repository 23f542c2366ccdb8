"""Set 03's mistakes that the checks know by what they give: the right one, one step changed."""

from collections.abc import Callable

import torch
from torch import Tensor

from exercises.records import Mistake

# --- 03.1: probabilities from the log-sum-exp ---


def bounded(scores: Tensor, lse: Tensor) -> Tensor:
    """The logarithms of the probabilities, none of them below -10."""
    return (scores - lse.masked_fill(lse == -torch.inf, 0.0)[:, None]).clamp(min=-10.0)


PROBABILITIES = [
    Mistake(
        "softmax again",
        lambda scores, lse: scores.softmax(-1).nan_to_num(nan=0.0),
        "the row was normalised again, but lse also counts blocks that are not in these scores",
    ),
    Mistake(
        "no exp",
        lambda scores, lse: scores - lse[:, None],
        "a difference of logarithms is still a logarithm",
    ),
    Mistake(
        "divided by the logarithm",
        lambda scores, lse: scores.exp() / lse[:, None],
        "the sum of exponentials was divided by lse, which is its logarithm",
    ),
    Mistake(
        "not divided",
        lambda scores, lse: scores.exp(),
        "nothing was divided by the sum of the row",
    ),
    Mistake(
        "lse held above 0",
        lambda scores, lse: (scores - lse.clamp(min=0.0)[:, None]).exp(),
        "a negative lse was raised to 0: only -inf stands for a query that sees nothing",
    ),
    Mistake(
        "lse held above -1e4",
        lambda scores, lse: (scores - lse.clamp(min=-1e4)[:, None]).exp(),
        "a very negative lse was raised: only -inf stands for a query that sees nothing",
    ),
    Mistake(
        "differences held above -10",
        lambda scores, lse: bounded(scores, lse).exp() * (scores > -torch.inf),
        "a small probability was raised to a least one",
    ),
]

# --- 03.2: Eq. 9, 0-based ---


def spread(weight: Callable) -> Callable:
    """Each probability times a weight that depends on block i, block j and the sizes l, d, l'."""

    def answer(p: Tensor, l: int, d: int, l_sel: int, blocks: int) -> Tensor:
        weights = [
            [float(weight(i, j, l, d, l_sel)) for j in range(blocks)] for i in range(p.shape[1])
        ]
        return p @ torch.tensor(weights)

    return answer


def common(i: int, j: int, l: int, d: int, l_sel: int) -> int:
    """How many tokens compression block i and selection block j share."""
    return max(0, min(i * d + l, (j + 1) * l_sel) - max(i * d, j * l_sel))


def printed(shift: int = 0) -> Callable:
    """How often the printed Eq. 9, whose blocks count from 1, reads p[i] for block j + shift."""

    def weight(i: int, j: int, l: int, d: int, l_sel: int) -> int:
        first = l_sel // d * (j + shift)
        return sum(first - m - n == i for m in range(l_sel // d) for n in range(l // d))

    return weight


def half_and_half(i: int, j: int, l: int, d: int, l_sel: int) -> float:
    """All of a compression block inside a selection block, half of one across a border."""
    shared = common(i, j, l, d, l_sel)
    whole = l / d
    return 0.0 if shared == 0 else whole if shared == l else whole / 2


SPREAD = [
    Mistake(
        "the printed Eq. 9 with j from 0",
        spread(printed()),
        "these are the indices of the printed Eq. 9, in which blocks count from 1: selection block "
        "0 gets only p[0], and misses others of its tokens 0 to {last}",
    ),
    Mistake(
        "j from 1, blocks from 0",
        spread(printed(shift=1)),
        "the blocks lie one compression block late: selection block 0 gets a share of block "
        "{next_block}, which starts at token {next_token}",
    ),
    Mistake(
        "every touched block counts alike",
        spread(lambda *sizes: common(*sizes) > 0),
        "a compression block gives the same share to each selection block it touches, however many "
        "tokens they have in common",
    ),
    Mistake(
        "whole blocks only",
        spread(lambda i, j, l, d, l_sel: (common(i, j, l, d, l_sel) == l) * l / d),
        "only compression blocks that lie wholly inside a selection block count",
    ),
    Mistake(
        "to the block in which it starts",
        spread(lambda i, j, l, d, l_sel: (i * d // l_sel == j) * l / d),
        "each compression block goes as a whole to the selection block in which it starts",
    ),
    Mistake(
        "tokens, not strides",
        spread(common),
        "the overlap is counted in tokens, not in strides",
    ),
    Mistake(
        "divided by l",
        spread(lambda i, j, l, d, l_sel: common(i, j, l, d, l_sel) / l),
        "the overlap is divided by l, not by d",
    ),
    Mistake(
        "to the block in which it ends",
        spread(lambda i, j, l, d, l_sel: ((i * d + l - 1) // l_sel == j) * l / d),
        "each compression block goes as a whole to the selection block in which it ends",
    ),
    Mistake(
        "to the block of its middle",
        spread(lambda i, j, l, d, l_sel: ((i * d + l // 2) // l_sel == j) * l / d),
        "each compression block goes as a whole to the selection block of its middle",
    ),
    Mistake(
        "half and half across a border",
        spread(half_and_half),
        "a compression block across a border was halved, wherever the border cuts it",
    ),
    Mistake(
        "two strides a block",
        spread(lambda i, j, l, d, l_sel: common(i, j, 2 * d, d, l_sel) / d),
        "a compression block was taken to have two strides, whatever l and d are",
    ),
    Mistake(
        "selection blocks of four strides",
        spread(lambda i, j, l, d, l_sel: common(i, j, l, d, 4 * d) / d),
        "a selection block was taken to have four strides, whatever l' and d are",
    ),
    Mistake(
        "sizes swapped",
        spread(lambda i, j, l, d, l_sel: common(i, j, l_sel, d, l) / d),
        "the sizes of compression blocks and of selection blocks were swapped",
    ),
]

# --- 03.3: one score for a group ---


def group(combine: Callable) -> Callable:
    """Scores split into groups, (G, R, T, N), and combined to (G, T, N)."""
    return lambda scores, kv_heads: combine(scores.unflatten(0, (kv_heads, -1)))


GROUP = [
    Mistake(
        "logits summed",
        group(lambda s: s.sum(1).softmax(-1)),
        "logits were summed before the softmax, so a head with large logits drowns its neighbours",
    ),
    Mistake(
        "logits averaged",
        group(lambda s: s.mean(1).softmax(-1)),
        "logits were averaged before the softmax, so heads that disagree cancel out",
    ),
    Mistake(
        "one head only",
        group(lambda s: s[:, 0].softmax(-1)),
        "only the first of the {sharing} heads of a group counts",
    ),
    Mistake(
        "mean of the heads",
        group(lambda s: s.softmax(-1).mean(1)),
        "the {sharing} heads of a group were averaged, and Eq. 10 adds them",
    ),
    Mistake(
        "largest of the heads",
        group(lambda s: s.softmax(-1).amax(1)),
        "the largest probability of the group was taken, and Eq. 10 adds all",
    ),
    Mistake(
        "heads dealt out in turn",
        lambda scores, kv_heads: scores.unflatten(0, (-1, kv_heads)).softmax(-1).sum(0),
        "head h was put into group h % G: a group's heads are neighbours",
    ),
    Mistake(
        "softmax over the heads",
        group(lambda s: s.softmax(1).sum(1)),
        "the softmax ran over the heads, not over the blocks",
    ),
    Mistake(
        "no softmax",
        group(lambda s: s.sum(1)),
        "logits were added up, and no softmax taken",
    ),
    Mistake(
        "all heads in every group",
        lambda scores, kv_heads: scores.softmax(-1).sum(0).expand(kv_heads, *scores.shape[1:]),
        "the heads of all groups were added up",
    ),
    Mistake(
        "the first two heads only",
        group(lambda s: s[:, :2].softmax(-1).sum(1)),
        "two heads of each group count, and there are {sharing}",
    ),
    Mistake(
        "softmax over the queries",
        group(lambda s: s.softmax(2).sum(1)),
        "the softmax ran over the queries, not over the blocks",
    ),
    Mistake(
        "scores held between bounds",
        group(lambda s: s.clamp(-20, 20).softmax(-1).sum(1)),
        "the scores are held between bounds, so that blocks far apart count the same",
    ),
]

# --- 03.5: attend to the chosen blocks ---


def tokens_of(ids: list[int], size: int, length: int, padding: Callable) -> list[int]:
    """The tokens of all blocks in a list of ids, with what stands for -1."""
    tokens = []
    for j in ids:
        tokens += padding(size) if j < 0 else range(j * size, min((j + 1) * size, length))
    return tokens


def attend(
    causal=True,
    padding=lambda size: (),
    blocks=lambda row, own: row,
    itself=True,
    scale=lambda d, dv: d**-0.5,
) -> Callable:
    """Attention to the tokens of the chosen blocks; padding gives the tokens that -1 stands for.

    blocks makes, of the ids and of the query's own block, those that are read.
    """

    def answer(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, size: int) -> Tensor:
        rows = []
        for t, row in enumerate(ids.tolist()):
            tokens = tokens_of(blocks(row, t // size), size, len(k), padding)
            if causal:
                tokens = [s for s in tokens if s <= t]
            if not itself:
                tokens = [s for s in tokens if s != t]
            scores = k[tokens] @ q[t] * scale(q.shape[1], v.shape[1])
            rows.append(scores.softmax(0) @ v[tokens])
        return torch.stack(rows)

    return answer


def masked_with(fill: float) -> Callable:
    """All scores, and a finite one for every token that is not read."""

    def answer(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, size: int) -> Tensor:
        block = torch.arange(len(k)) // size
        seen = (ids[:, :, None] == block).any(1).tril()
        return (q @ k.T * q.shape[1] ** -0.5).masked_fill(~seen, fill).softmax(-1) @ v

    return answer


ATTENTION = [
    Mistake(
        "not causal in the own block",
        attend(causal=False),
        "query 0 reads tokens after itself, in its own block",
    ),
    Mistake(
        "-1 read as block 0",
        attend(padding=range),
        "-1 is padding, and was read as block 0, whose tokens then count twice or more",
    ),
    Mistake(
        "-1 read from the end",
        attend(padding=lambda size: range(-size, 0)),
        "-1 is padding, and was read as block -1: tokens -{size} to -1, the end of the sequence",
    ),
    Mistake(
        "the choice ignored",
        attend(blocks=lambda row, own: range(own + 1)),
        "every token up to the query was read, chosen or not",
    ),
    Mistake(
        "no scale",
        attend(scale=lambda d, dv: 1.0),
        "the scores are not divided by the root of the width",
    ),
    Mistake(
        "scale by the width",
        attend(scale=lambda d, dv: 1 / d),
        "the scores are divided by the width, not by its root",
    ),
    Mistake(
        "own block left out",
        attend(blocks=lambda row, own: [j for j in row if j != own] or [own]),
        "the query's own block was left out",
    ),
    Mistake(
        "own block always",
        attend(blocks=lambda row, own: {*row, own}),
        "the query's own block was read, chosen or not",
    ),
    Mistake(
        "block 0 always",
        attend(blocks=lambda row, own: {*row, 0}),
        "block 0 was read, chosen or not",
    ),
    Mistake(
        "the first two ids only",
        attend(blocks=lambda row, own: row[:2]),
        "only the first two ids of a query were read",
    ),
    Mistake(
        "scale by the values' width",
        attend(scale=lambda d, dv: dv**-0.5),
        "the scores are divided by the root of the values' width, not the keys'",
    ),
    Mistake(
        "masked with -1e4",
        masked_with(-1e4),
        "a token that is not read has a finite score, and the true ones lie below it: fill with "
        "-inf",
    ),
]
