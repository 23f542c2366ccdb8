"""Set 10's mistakes that the checks know by what they give: the right one, one step changed."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from exercises.records import Mistake

# --- 10.1: a tile that reaches beyond the end ---


def load(
    real=lambda at, i, count: at < count,
    address=lambda at, count: at.clamp(max=count - 1),
    other=0.0,
    start=lambda first, rows: first,
) -> Callable:
    """Rows from `start` on; those that are not real become `other`."""

    def answer(memory: Tensor, first: int, rows: int, count: int) -> Tensor:
        i = torch.arange(rows)
        at = start(first, rows) + i
        tile = memory[address(at, len(memory))]
        return torch.where(real(at, i, count)[:, None], tile, other)

    return answer


LOADS = [
    Mistake(
        "no mask",
        load(real=lambda at, i, count: at >= 0),
        "rows are returned that do not exist: what stands there is not yours",
    ),
    Mistake(
        "last row again",
        lambda memory, first, rows, count: memory[
            (first + torch.arange(rows)).clamp(max=count - 1)
        ],
        "the last row that exists stands again in the places behind it",
    ),
    Mistake(
        "counted in the tile",
        load(real=lambda at, i, count: i < count),
        "the mask counts rows from the first of the tile, not of the memory",
    ),
    Mistake(
        "one row too many",
        load(real=lambda at, i, count: at <= count),
        "one row too many is taken for real: rows count from 0",
    ),
    Mistake(
        "one row too few",
        load(real=lambda at, i, count: at < count - 1),
        "the last row that exists is masked",
    ),
    Mistake(
        "whole or nothing",
        load(real=lambda at, i, count: (at[-1] < count).expand(len(at))),
        "a tile that is not whole is returned empty, and some of its rows exist",
    ),
    Mistake(
        "ones behind the end",
        load(other=1.0),
        "rows that do not exist are 1, and were asked for as 0",
    ),
    Mistake(
        "-inf behind the end",
        load(other=-math.inf),
        "rows that do not exist are -inf: that is for scores, and a row of 0 has the score 0",
    ),
    Mistake(
        "moved back",
        load(start=lambda first, rows: max(first - rows, 0)),
        "the tile before this one was loaded",
    ),
    Mistake(
        "always the first tile",
        load(start=lambda first, rows: 0),
        "the tile begins at row 0, wherever it was asked for",
    ),
]

# --- 10.2: the probabilities of a group ---


def group(
    hidden=lambda key, token, l, d: key * d + l - 1 > token,
    scale=lambda width: width**-0.5,
    weight=lambda s, lse: (s - lse).exp(),
    heads=lambda p: p.sum(0),
    first_token=lambda first: first,
    first_key=lambda first: first,
) -> Callable:
    """The summed probabilities (T, N) of a tile of queries and keys."""

    def answer(q, k, lse, token, key, l, d):
        t = first_token(token) + torch.arange(q.shape[1])
        i = first_key(key) + torch.arange(len(k))
        gone = hidden(i, t[:, None], l, d)
        s = (q @ k.T * scale(q.shape[2])).masked_fill(gone, -torch.inf)
        safe = lse.masked_fill(lse == -torch.inf, 0.0)
        return heads(weight(s, safe[:, :, None]))

    return answer


def logits_added(q, k, lse, *others):
    """The heads' exponents are added before exp."""
    return group(weight=lambda s, lse: s - lse, heads=lambda s: s.sum(0).exp())(q, k, lse, *others)


GROUPS = [
    Mistake(
        "softmax of the tile",
        group(weight=lambda s, lse: s.softmax(2).nan_to_num()),
        "each tile has a softmax of its own: lse is that of all keys, in other tiles too",
    ),
    Mistake(
        "not normalised",
        group(weight=lambda s, lse: s.exp()),
        "the log-sum-exp is not taken off",
    ),
    Mistake(
        "base 2",
        group(weight=lambda s, lse: torch.exp2(s - lse)),
        "the probabilities are powers of 2, and lse is a natural logarithm",
    ),
    Mistake(
        "logits added",
        logits_added,
        "the heads are added before exp, and Eq. 10 adds probabilities",
    ),
    Mistake(
        "mean of the heads",
        group(heads=lambda p: p.mean(0)),
        "the heads are averaged, and Eq. 10 adds them",
    ),
    Mistake(
        "divided by their sum",
        lambda *x: (p := group()(*x)) / p.sum(1, keepdim=True).clamp(min=1e-30),
        "each row is divided by its sum: over all keys a head's probabilities sum to 1 already",
    ),
    Mistake(
        "largest head",
        group(heads=lambda p: p.amax(0)),
        "of each key the largest head was taken, and Eq. 10 adds them",
    ),
    Mistake(
        "head 0 only",
        group(heads=lambda p: p[0]),
        "only head 0 counts, and the group shares one choice",
    ),
    Mistake(
        "lse of head 0",
        group(weight=lambda s, lse: (s - lse[:1]).exp()),
        "every head's probabilities are taken with the log-sum-exp of head 0",
    ),
    Mistake(
        "no scale",
        group(scale=lambda width: 1.0),
        "the scores are not divided by the root of the width",
    ),
    Mistake(
        "scale by the width",
        group(scale=lambda width: 1 / width),
        "the scores are divided by the width, not by its root",
    ),
    Mistake(
        "seen once begun",
        group(hidden=lambda key, token, l, d: key * d > token),
        "a key counts from the token on at which its block begins",
    ),
    Mistake(
        "one token late",
        group(hidden=lambda key, token, l, d: key * d + l - 1 >= token),
        "the query at a block's last token does not see it",
    ),
    Mistake(
        "blocks side by side",
        group(hidden=lambda key, token, l, d: (key + 1) * l - 1 > token),
        "the mask puts the blocks side by side, and one begins every `stride` tokens",
    ),
    Mistake(
        "tokens counted in their tile",
        group(first_token=lambda first: 0),
        "the mask counts tokens from the first of the tile, not of the sequence",
    ),
    Mistake(
        "keys counted in their tile",
        group(first_key=lambda first: 0),
        "the mask counts keys from the first of the tile, not of all",
    ),
]

# --- 10.3: Eq. 9 as two sums a block ---


def two_sums(
    begins=lambda i, per: i // per,
    into_next=lambda k, l, d, select: (k * d + l - select).clamp(min=0) // d,
    own=lambda whole, into_next: whole - into_next,
    finish=lambda own, passed: (own, passed),
    whole=lambda l, d: l // d,
) -> Callable:
    """Own sums and those for the next block; the k-th key of a block begins k strides in."""

    def answer(total: Tensor, l: int, d: int, select: int) -> tuple[Tensor, Tensor]:
        per = select // d
        i = torch.arange(total.shape[1])
        block = begins(i, per)
        to_next = into_next(i % per, l, d, select)
        shape = (len(total), -(-total.shape[1] // per))
        sums = [
            total.new_zeros(shape).index_add(1, block, total * weight)
            for weight in (own(whole(l, d), to_next), to_next)
        ]
        return finish(*sums)

    return answer


def moved_on(own: Tensor, passed: Tensor) -> Tensor:
    """What is passed on stands at the block that gets it; the last block's is lost."""
    return torch.nn.functional.pad(passed, (1, 0))[:, :-1]


OWN = [
    Mistake(
        "all in the own block",
        two_sums(own=lambda whole, into_next: whole + 0 * into_next),
        "a key that reaches into the next block counts whole in its own",
    ),
    Mistake(
        "touched is covered",
        two_sums(own=lambda whole, into_next: 1 + 0 * into_next),
        "a key counts 1 for its block, and it covers l / d strides",
    ),
    Mistake(
        "tokens",
        lambda *x: (two_sums()(*x)[0] * x[2], two_sums()(*x)[1]),
        "tokens are counted, and Eq. 9 counts strides",
    ),
    Mistake(
        "passed on added already",
        two_sums(finish=lambda own, passed: (own + moved_on(own, passed), passed)),
        "own holds what the block before passes on, and that comes later",
    ),
    Mistake(
        "passed on taken off twice",
        two_sums(finish=lambda own, passed: (own - passed, passed)),
        "what is passed on is taken off twice",
    ),
]
PASSED = [
    Mistake(
        "nothing passed on",
        two_sums(finish=lambda own, passed: (own, 0 * passed)),
        "nothing is passed on, and the last keys of a block reach into the next",
    ),
    Mistake(
        "at the block that gets it",
        two_sums(finish=lambda own, passed: (own, moved_on(own, passed))),
        "what is passed on stands at the block that gets it, and belongs to the one that gives it",
    ),
    Mistake(
        "once a key",
        lambda *x: (
            two_sums()(*x)[0],
            two_sums(into_next=lambda k, l, d, select: (k * d + l > select).long())(*x)[1],
        ),
        "a key passes on 1, however many strides of it lie in the next block",
    ),
    Mistake(
        "the whole key",
        two_sums(finish=lambda own, passed: (own, own)),
        "passed_on equals own",
    ),
    Mistake(
        "tokens for strides",
        lambda total, l, d, select: (
            two_sums()(total, l, d, select)[0],
            two_sums()(total, l, d, select)[1] * d,
        ),
        "tokens are counted, and Eq. 9 counts strides",
    ),
]

# --- 10.4: the best n so far ---


def keep(
    join=lambda best, scores: torch.cat([best, scores], 1),
    names=lambda first, count: first + torch.arange(count),
    order=lambda ids: ids,
    key=lambda scores: scores,
    forbid=True,
    most=lambda n: n,
) -> Callable:
    """The n largest of the state and a chunk, equal ones by `order` of their ids."""

    def answer(best: Tensor, ids: Tensor, scores: Tensor, first: int) -> tuple[Tensor, Tensor]:
        n = best.shape[1]
        every = torch.cat([ids, names(first, scores.shape[1]).expand(len(ids), -1).to(ids)], 1)
        joined = join(best, scores)
        by_id = torch.sort(order(every), dim=1, stable=True).indices
        joined = joined.gather(1, by_id)
        every = every.gather(1, by_id)
        place = torch.sort(key(joined), dim=1, descending=True, stable=True).indices[:, : most(n)]
        new = torch.nn.functional.pad(joined.gather(1, place), (0, n - most(n)), value=-torch.inf)
        taken = torch.nn.functional.pad(every.gather(1, place), (0, n - most(n)), value=-1)
        if forbid:
            taken = taken.masked_fill(new == -torch.inf, -1)
        return new, taken

    return answer


def only_this_chunk(best, ids, scores, first):
    """What was kept before is forgotten."""
    return keep()(torch.full_like(best, -torch.inf), torch.full_like(ids, -1), scores, first)


def stay_when_equal(best, ids, scores, first):
    """A block that was kept stays where another one is as good."""
    every = torch.cat([ids, (first + torch.arange(scores.shape[1])).expand(len(ids), -1)], 1)
    joined = torch.cat([best, scores], 1)
    place = torch.sort(joined, dim=1, descending=True, stable=True).indices[:, : best.shape[1]]
    new = joined.gather(1, place)
    return new, every.gather(1, place).masked_fill(new == -torch.inf, -1)


KEPT = [
    Mistake(
        "only this chunk",
        only_this_chunk,
        "only the last chunk counts: what was kept before is forgotten",
    ),
    Mistake(
        "counted in the chunk",
        keep(names=lambda first, count: torch.arange(count)),
        "blocks are counted from the first of their chunk",
    ),
    Mistake(
        "higher id first",
        keep(order=lambda ids: -ids),
        "among equal scores the higher ids are kept",
    ),
    Mistake(
        "what was kept stays",
        stay_when_equal,
        "among equal scores those stay that came first, and chunks may come in any order",
    ),
    Mistake(
        "-inf taken",
        keep(order=lambda ids: ids.masked_fill(ids < 0, 10**6), forbid=False),
        "blocks with the score -inf are kept: no query may read them",
    ),
    Mistake(
        "smallest",
        keep(key=lambda scores: -scores.masked_fill(scores == -torch.inf, torch.inf)),
        "the smallest scores are kept",
    ),
    Mistake(
        "by size",
        keep(key=lambda scores: scores.abs().masked_fill(scores == -torch.inf, -1.0)),
        "scores are compared without their sign",
    ),
    Mistake(
        "one too few",
        keep(most=lambda n: max(n - 1, 0)),
        "one block too few is kept",
    ),
    Mistake(
        "0 is the least",
        keep(
            join=lambda best, scores: torch.cat(
                [best, scores.masked_fill(scores < 0, -torch.inf)], 1
            )
        ),
        "scores below 0 are dropped",
    ),
    Mistake(
        "the best of a chunk alone",
        lambda best, ids, scores, first: keep()(
            best,
            ids,
            scores.masked_fill(scores < scores.amax(1, keepdim=True), -torch.inf),
            first,
        ),
        "of each chunk only the best block can be kept",
    ),
]
