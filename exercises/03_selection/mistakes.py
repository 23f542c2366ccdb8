"""Set 03's mistakes that the checks know by what they give: the right one, one step changed."""

from collections.abc import Callable

import torch
from torch import Tensor

from exercises.records import Mistake

# --- 03.1: probabilities from the log-sum-exp ---

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
    chosen=True,
    own=True,
    scale=lambda width: width**-0.5,
) -> Callable:
    """Attention to the tokens of the chosen blocks; padding gives the tokens that -1 stands for."""

    def answer(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, size: int) -> Tensor:
        rows = []
        every = list(range(-(-len(k) // size)))
        for t, row in enumerate(ids.tolist()):
            tokens = tokens_of(row if chosen else every, size, len(k), padding)
            if causal:
                tokens = [s for s in tokens if s <= t]
            if not own:
                tokens = [s for s in tokens if s // size != t // size] or [t]
            rows.append((k[tokens] @ q[t] * scale(q.shape[1])).softmax(0) @ v[tokens])
        return torch.stack(rows)

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
        attend(chosen=False),
        "every token up to the query was read, chosen or not",
    ),
    Mistake(
        "no scale",
        attend(scale=lambda width: 1.0),
        "the scores are not divided by the root of the width",
    ),
    Mistake(
        "scale by the width",
        attend(scale=lambda width: 1 / width),
        "the scores are divided by the width, not by its root",
    ),
    Mistake(
        "own block left out",
        attend(own=False),
        "the query's own block was left out",
    ),
]
