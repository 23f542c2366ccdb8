"""Set 08's answers, for teachers: right ones in several styles, and wrong ones to be named.

The mistakes of mistakes.py are planted as they stand. The others are written by hand, in other
styles or with faults of another kind, so that no mistake is judged by itself alone.
"""

import torch

from exercises.contest import BlockMeans, MinAndMax, MostRecent
from exercises.records import Wrong, planted
from nsa_lite.rivals.taught import kl_to_mass

from . import mistakes

# --- 08.1 ---


def covered_by_loop(mass, ids):
    """One id at a time."""
    shares = torch.zeros(len(mass))
    for t, row in enumerate(ids.tolist()):
        for j in row:
            if j >= 0:
                shares[t] += mass[t, j]
    return shares


def covered_by_mask(mass, ids):
    """A mask of the chosen blocks."""
    chosen = (ids[:, :, None] == torch.arange(mass.shape[1])).any(1)
    return torch.einsum("tj,tj->t", mass, chosen.to(mass))


def covered_in_a_wider_table(mass, ids):
    """One column of zeros more, to which -1 leads; in double."""
    wider = torch.cat([mass, torch.zeros(len(mass), 1)], 1).double()
    return wider[torch.arange(len(mass))[:, None], ids.long()].sum(1)


def last_block_for_padding(mass, ids):
    """Python reads -1 as the last block."""
    return mass[torch.arange(len(mass))[:, None], ids.long()].sum(1)


def mean_by_loop(mass, ids):
    """The mean of the blocks that were chosen."""
    return covered_by_loop(mass, ids) / (ids >= 0).sum(1).clamp(min=1)


def covered_by_scatter(mass, ids):
    """The chosen blocks marked in a table with one column more, for -1."""
    marks = torch.zeros(len(mass), mass.shape[1] + 1)
    marks.scatter_(1, ids.long() % marks.shape[1], 1.0)
    return (marks[:, :-1] * mass).sum(1)


COVERED = [
    *planted(mistakes.COVERED),
    Wrong("-1 as an index", last_block_for_padding, "was read as the last block"),
    Wrong("mean of the chosen, by loop", mean_by_loop, "the mean of the chosen blocks"),
    Wrong(
        "never all",
        lambda mass, ids: covered_by_loop(mass, ids).clamp(max=0.99),
        "everything chosen: query 0: got 0.99",
    ),
    Wrong(
        "padding in the last place only",
        lambda mass, ids: covered_by_loop(
            mass, torch.cat([ids[:, :-1].clamp(min=0), ids[:, -1:]], 1)
        ),
        "query ",
    ),
    Wrong(
        "the padding of query 0 for all",
        lambda mass, ids: covered_by_loop(mass, ids[:, ids[0] >= 0]),
        "query ",
    ),
    Wrong(
        "ids changed in place",
        lambda mass, ids: covered_by_loop(mass, ids.masked_fill_(ids < 0, 0)),
        "the function changed its input ids in place",
    ),
    Wrong(
        "mean of the queries",
        lambda mass, ids: covered_by_loop(mass, ids).mean(),
        "the shape is ()",
    ),
]

# --- 08.2 ---


def choose_by_sort(score, own, kept, budget, block_size):
    """Forced blocks, then the rest by falling score."""
    forced = [j for j in dict.fromkeys((0, own - 1, own)) if j >= 0]
    free = sorted(set(range(own)) - set(forced), key=lambda j: (-score[j].item(), j))
    room = (budget - kept * own) // block_size - len(forced)
    return sorted(forced + free[: max(room, 0)])


def choose_by_infinity(score, own, kept, budget, block_size):
    """Forced blocks have an infinite score."""
    number = torch.arange(own + 1)
    forced = (number == 0) | (number >= own - 1)
    full = torch.cat([score.double(), torch.zeros(1)]).masked_fill(forced, torch.inf)
    room = max((budget - kept * own) // block_size, int(forced.sum()))
    best = torch.sort(full, descending=True, stable=True).indices[:room]
    return best.sort().values.tolist()


def choose_by_paying(score, own, kept, budget, block_size):
    """Block after block is paid for; a tuple."""
    left = budget - kept * own
    chosen = []
    rest = list(range(own + 1))
    for j in (own, own - 1, 0):
        if j in rest:
            rest.remove(j)
            chosen.append(j)
            left -= block_size
    while rest and left >= block_size:
        best = rest[0]
        for j in rest:
            if score[j] > score[best]:
                best = j
        rest.remove(best)
        chosen.append(best)
        left -= block_size
    return tuple(sorted(chosen))


def choice(
    forced=lambda own: {0, max(own - 1, 0), own},
    room=lambda own, kept, budget, size: (budget - kept * own) // size,
    order=lambda s, j: (-s, j),
    pool=lambda own: range(own),
    ids=sorted,
):
    """The right answer with one step changed."""

    def answer(score, own, kept, budget, block_size):
        chosen = list(dict.fromkeys(forced(own)))
        free = sorted(
            (j for j in pool(own) if j not in chosen),
            key=lambda j: order(score[j].item() if j < own else 9.0, j),
        )
        paid = room(own, kept, budget, block_size)
        return ids(chosen + free[: max(paid - len(chosen), 0)])

    return answer


def forced_on_top(score, own, kept, budget, block_size):
    """The forced blocks cost nothing."""
    more = 8 * len({0, max(own - 1, 0), own})
    return choose_by_sort(score, own, kept, budget + more, block_size)


def forced_twice(score, own, kept, budget, block_size):
    """Block 0 stands twice where it is local too."""
    ids = choose_by_sort(score, own, kept, budget, block_size)
    return ids if own > 1 else sorted([0, *ids])


def above_0_only(score, own, *others):
    """The right choice without free blocks of a score below 0."""
    ids = choose_by_sort(score, own, *others)
    return [j for j in ids if j in (0, own - 1, own) or score[j] >= 0]


def forced_by_1e9(score, own, kept, budget, block_size):
    """Forced blocks have a large score."""
    number = torch.arange(own)
    rank = torch.where((number == 0) | (number == own - 1), 1e9, score)
    room = (budget - kept * own) // block_size - 1
    return sorted([*rank.sort(descending=True, stable=True).indices[:room].tolist(), own])


def score_in_place(score, own, kept, budget, block_size):
    """Forced blocks get an infinite score, and keep it."""
    score[[j for j in (0, own - 1) if 0 <= j < own]] = torch.inf
    return choose_by_sort(score, own, kept, budget, block_size)


CHOICES = [
    Wrong(
        "kept vectors are free",
        choice(room=lambda own, kept, budget, size: budget // size),
        "vectors, and the budget is 50",
    ),
    Wrong(
        "one kept vector counted, whatever m",
        choice(room=lambda own, kept, budget, size: (budget - (kept > 0) * own) // size),
        "vectors, and the budget is 63",
    ),
    Wrong("forced blocks on top", forced_on_top, "vectors, and the budget is 40"),
    Wrong(
        "rounded up",
        choice(room=lambda own, kept, budget, size: -((kept * own - budget) // size)),
        "vectors, and the budget is 50",
    ),
    Wrong(
        "one block too few",
        choice(room=lambda own, kept, budget, size: (budget - kept * own) // size - 1),
        "one more block can be paid",
    ),
    Wrong(
        "kept of the own block too",
        choice(room=lambda own, kept, budget, size: (budget - kept * (own + 1)) // size),
        "blocks of 5: 1 x 11 vectors kept and 6 blocks of 5 are 41 of 46 vectors: one more",
    ),
    Wrong(
        "one block less kept",
        choice(room=lambda own, kept, budget, size: (budget - kept * max(own - 1, 0)) // size),
        "one vector short: 2 x 10 vectors kept and 5 blocks of 9 are 65",
    ),
    Wrong(
        "kept times the size of a block",
        choice(room=lambda own, kept, budget, size: (budget - kept * size) // size),
        "blocks of 5: 1 x 11 vectors kept and 8 blocks of 5 are 51 vectors",
    ),
    Wrong(
        "blocks of 8",
        choice(room=lambda own, kept, budget, size: (budget - kept * own) // 8),
        "one more block can be paid",
    ),
    Wrong(
        "rounded twice",
        choice(room=lambda own, kept, budget, size: budget // size - kept * own // size),
        "one vector short: 2 x 10 vectors kept and 5 blocks of 9 are 65 vectors",
    ),
    Wrong(
        "one block besides the forced ones, always",
        choice(room=lambda own, kept, budget, size: max((budget - kept * own) // size, 4)),
        "just the forced blocks: 1 x 8 vectors kept and 4 blocks of 6 are 32",
    ),
    Wrong(
        "kept only of the chosen",
        choice(room=lambda own, kept, budget, size: budget // (size + kept)),
        "vectors",
    ),
    Wrong("sizes of scores", choice(order=lambda s, j: (-abs(s), j)), "has a higher score"),
    Wrong("scores in tenths", choice(order=lambda s, j: (-round(s, 1), j)), "has a higher score"),
    Wrong("scores above 0 only", above_0_only, "one more block can be paid"),
    Wrong("forced by a score of 1e9", forced_by_1e9, "one of the forced blocks [0, 7, 8]"),
    Wrong("score changed in place", score_in_place, "the function changed its input score"),
    Wrong(
        "no first block",
        choice(forced=lambda own: {max(own - 1, 0), own}),
        "block 0 is missing, one of the forced",
    ),
    Wrong(
        "own block only",
        choice(forced=lambda own: {0, own}),
        "block 8 is missing, one of the forced",
    ),
    Wrong("block 0 twice when it is local too", forced_twice, "block 0 was chosen twice"),
    Wrong(
        "a block after the query",
        choice(pool=lambda own: range(own + 2)),
        "block 10 was chosen, and the query is in block 9",
    ),
    Wrong("lowest scores", choice(order=lambda s, j: (s, j)), "has a higher score"),
    Wrong(
        "ties to the higher id",
        choice(order=lambda s, j: (-s, -j)),
        "equal scores: the lower id comes first",
    ),
    Wrong("best first, not ascending", choice(ids=list), "do not ascend"),
    Wrong("a tensor of scores", lambda score, *others: score[:3].sum(), "a list was asked for"),
]

# --- 08.3 ---


class TwoFarKeys:
    """The mean and the two keys farthest from it; 30 keys near the mean count 30 times."""

    def keep(self, block):
        far = (block - block.mean(0)).norm(dim=1).topk(2).indices
        return torch.cat([block.mean(0, keepdim=True), block[far]])

    def score(self, q, kept):
        s = torch.einsum("hd,jmd->hjm", q, kept) / q.shape[1] ** 0.5
        s = s + torch.tensor([30.0, 1.0, 1.0]).log()
        return s.logsumexp(-1).softmax(-1).sum(0)


class LongestKey:
    """The mean and the longest key, head by head and block by block."""

    def keep(self, block):
        longest = max(range(len(block)), key=lambda i: float(block[i] @ block[i]))
        return torch.stack((block.mean(0), block[longest]))

    def score(self, q, kept):
        total = torch.zeros(len(kept))
        for head in q.double():
            s = kept.double() @ head / 4  # (own, 2)
            weight = 31 * s[:, 0].exp() + s[:, 1].exp()
            total += weight / weight.sum()
        return total


def bound():
    """Quest's bound, made by a function in place of a class."""
    return MinAndMax()


class KeepsAll(MinAndMax):
    """Every key."""

    def keep(self, block):
        return block.clone()


class KeepsWhatIsLong(LongestKey):
    """More of one block than of another."""

    def keep(self, block):
        return block[block.norm(dim=1) > 5.5]


class KeepsAFlatMean(BlockMeans):
    """One vector, not a row."""

    def keep(self, block):
        return block.mean(0)


class KeepsAMeanOfEachChannel(BlockMeans):
    """The mean over the wrong axis."""

    def keep(self, block):
        return block.mean(1, keepdim=True)


class ScoresEachHead(BlockMeans):
    """A score for each head."""

    def score(self, q, kept):
        return q @ kept[:, 0].T


class ScoresInPlace(BlockMeans):
    """q is changed."""

    def score(self, q, kept):
        return super().score(q.mul_(0.25), kept)


class DrawsLots(MostRecent):
    """Chance."""

    def score(self, q, kept):
        return torch.rand(len(kept))


class Remembers(BlockMeans):
    """Keeps a mean for show and every key in secret."""

    secret: list = []

    def keep(self, block):
        self.secret.append(block)
        return super().keep(block)

    def score(self, q, kept):
        keys = torch.stack(self.secret[-32:][: len(kept)])
        return (q @ keys.flatten(0, 1).T / 4).softmax(-1).sum(0).unflatten(0, (-1, 32)).sum(-1)


class FindsAgain(BlockMeans):
    """Every key in secret, found again by the vector that was kept."""

    secret: dict = {}

    def keep(self, block):
        mean = super().keep(block)
        self.secret[tuple(mean.flatten().tolist())] = block.clone()
        return mean

    def score(self, q, kept):
        keys = torch.stack([self.secret[tuple(x.flatten().tolist())] for x in kept])
        return (q @ keys.flatten(0, 1).T / 4).softmax(-1).sum(0).unflatten(0, (-1, 32)).sum(-1)


class KeepsALot(BlockMeans):
    """A key that is drawn anew at every call."""

    def keep(self, block):
        return block[torch.randint(len(block), (1,))]


class ChangesItsBlock(LongestKey):
    """The mean is taken away in place."""

    def keep(self, block):
        return super().keep(block.sub_(block.mean(0)))


class Divides(BlockMeans):
    """NaN as long as there is one block."""

    def score(self, q, kept):
        s = (q @ kept[:, 0].T).sum(0)
        return (s - s.mean()) / s.std(correction=0)  # one block: 0 / 0


class SmallestFirst(MinAndMax):
    """Quest's bound, the wrong way round."""

    def score(self, q, kept):
        return -super().score(q, kept)


OPEN = [
    Wrong("keeps every key", KeepsAll, "32 vectors of 31 blocks and 3 forced blocks are 1088"),
    Wrong("keeps what is long", KeepsWhatIsLong, "must be kept of each block: of block 0"),
    Wrong("one vector, not a row", KeepsAFlatMean, "and (m, 16) was asked for"),
    Wrong("mean of the channels", KeepsAMeanOfEachChannel, "keep returned the shape (32, 1)"),
    Wrong("a score for each head", ScoresEachHead, "score returned the shape (4, 1) for 1"),
    Wrong("q changed in place", ScoresInPlace, "score changed its inputs in place"),
    Wrong("draws lots", DrawsLots, "gave different scores"),
    Wrong("keys hidden in the class", Remembers, "once other blocks were kept"),
    Wrong("keys found by what was kept", FindsAgain, "stopped at vectors that keep never returned"),
    Wrong("keeps a key by lot", KeepsALot, "two calls of keep with the same block"),
    Wrong("block changed in place", ChangesItsBlock, "changed its input blocks in place"),
    Wrong("NaN for one block", Divides, "the score of block 0 is NaN"),
    Wrong("smallest first", SmallestFirst, "block means cover"),
    Wrong("only the newest", MostRecent, "block means cover"),
    Wrong("block means again", BlockMeans, "block means cover"),
]

# --- 08.4 ---


def teach_row_by_row(z, mass, among):
    """One query after the other, its candidates alone."""
    losses = []
    for scores, weights, legal in zip(z, mass, among, strict=True):
        if not legal.any():
            losses.append(0.0 * scores.nan_to_num(neginf=0.0).sum())
            continue
        p = weights[legal] / weights[legal].sum()
        s = torch.log_softmax(scores[legal], 0)
        losses.append((torch.xlogy(p, p) - p * s).sum())
    return torch.stack(losses)


def teach_by_kl_div(z, mass, among):
    """PyTorch's own divergence."""
    log_s = torch.where(among, z, -1e9).log_softmax(1)
    p = torch.where(among, mass, 0.0)
    p = p / p.sum(1, keepdim=True).clamp(min=1e-30)
    return torch.nn.functional.kl_div(log_s, p, reduction="none").where(among, 0.0).sum(1)


def teach_by_logsumexp(z, mass, among):
    """The logarithm of a share as a difference; the package's own function does so too."""
    return kl_to_mass(z, mass, among)


def teach_in_double(z, mass, among):
    """Everything in double, with an epsilon that is lost."""
    z = torch.where(among, z.double(), -1e9)
    top = z.amax(1, keepdim=True)
    log_s = z - top - (z - top).exp().sum(1, keepdim=True).log()
    p = mass.double() * among
    p = p / (p.sum(1, keepdim=True) + 1e-12)
    terms = p * ((p + 1e-12).log() - log_s)
    return torch.where(among, terms, 0.0).sum(1)


def teach_by_log_of_softmax(z, mass, among):
    """A share can become 0, and its logarithm -inf."""
    s = torch.where(among, z, -torch.inf).softmax(1)
    p = torch.where(among, mass, 0.0)
    p = p / p.sum(1, keepdim=True)
    return torch.where(among, torch.xlogy(p, p) - p * s.log(), 0.0).sum(1)


def teach_with_log_p(z, mass, among):
    """log p of a block without mass."""
    log_s = torch.where(among, z, -1e9).log_softmax(1)
    p = torch.where(among, mass, 0.0)
    p = p / p.sum(1, keepdim=True).clamp(min=1e-30)
    return torch.where(among, p * (p.log() - log_s), 0.0).sum(1)


def teach_detached(z, mass, among):
    """Made of numbers."""
    return teach_by_kl_div(z.detach(), mass, among)


def teach_clamped(z, mass, among):
    """Shares held above 1e-6: no gradient where the score is low."""
    s = torch.where(among, z, -1e9).softmax(1).clamp(min=1e-6)
    p = torch.where(among, mass, 0.0)
    p = p / p.sum(1, keepdim=True).clamp(min=1e-30)
    return torch.where(among, torch.xlogy(p, p) - p * s.log(), 0.0).sum(1)


def teach_with_nan_rows(z, mass, among):
    """0 / 0 where nothing is a candidate."""
    log_s = torch.where(among, z, -1e9).log_softmax(1)
    p = torch.where(among, mass, 0.0)
    p = p / p.sum(1, keepdim=True)
    return (torch.xlogy(p, p) - p * log_s).sum(1)


def teach_by_bce(z, mass, among):
    """PyTorch's loss for yes and no."""
    s = torch.where(among, z, -1e9).softmax(1)
    p = torch.where(among, mass, 0.0)
    p = p / p.sum(1, keepdim=True).clamp(min=1e-30)
    loss = torch.nn.functional.binary_cross_entropy(s, p, reduction="none")
    return loss.where(among, 0.0).sum(1)


TAUGHT = [
    *planted(mistakes.TEACHERS),
    Wrong("log of a softmax", teach_by_log_of_softmax, "log of a share that has become 0"),
    Wrong("log p", teach_with_log_p, "a block without mass adds 0, and 0 log 0 is NaN"),
    Wrong("detached", teach_detached, "the loss has no gradient by z"),
    Wrong("shares clamped", teach_clamped, "scores far apart: loss: query 0"),
    Wrong("0 / 0", teach_with_nan_rows, "it has no candidate, and its loss is 0"),
    Wrong("binary, by PyTorch", teach_by_bce, "this is a binary cross-entropy, block by block"),
    Wrong(
        "one loss",
        lambda *x: teach_by_kl_div(*x).mean(),
        "result 1: the shape is (), and (2,) was asked for",
    ),
    Wrong(
        "kl_div the wrong way",
        lambda z, mass, among: teach_by_kl_div(
            torch.where(among, mass, 1e-9).log(), z.exp(), among
        ),
        "the divergence is the other way round",
    ),
    Wrong(
        "mass in place",
        lambda z, mass, among: teach_by_kl_div(z, mass.mul_(among), among),
        "the function changed its input mass in place",
    ),
]

RIGHT = {
    "08.1": [covered_by_loop, covered_by_mask, covered_in_a_wider_table, covered_by_scatter],
    "08.2": [choose_by_sort, choose_by_infinity, choose_by_paying],
    "08.3": [TwoFarKeys, LongestKey, bound],
    "08.4": [teach_row_by_row, teach_by_kl_div, teach_by_logsumexp, teach_in_double],
}
WRONG = {"08.1": COVERED, "08.2": CHOICES, "08.3": OPEN, "08.4": TAUGHT}
