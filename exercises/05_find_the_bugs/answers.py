"""Set 05's answers, for teachers: right ones in several styles, and wrong ones to be named.

The mistakes of mistakes.py are planted as they stand. The others are written by hand, in other
styles or with faults of another kind, so that no mistake is judged by itself alone.
"""

import torch
import torch.nn.functional as F

import nsa_lite
from exercises.records import Wrong, planted

from . import mistakes

# --- 05.1 ---


def split_by_index(x, block_size, stride):
    """A table of token numbers."""
    count = max(0, (len(x) - block_size) // stride + 1)
    first = torch.arange(count)[:, None] * stride
    return x[first + torch.arange(block_size)]


def split_by_unfold(x, block_size, stride):
    """unfold, whose new axis comes last."""
    if len(x) < block_size:
        return x.new_empty(0, block_size, x.shape[1])
    return x.unfold(0, block_size, stride).movedim(-1, 1)


def split_by_strides(x, block_size, stride):
    """A view, with the strides that x has."""
    count = len(range(block_size, len(x) + 1, stride))
    token, channel = x.stride()
    shape = (count, block_size, x.shape[1])
    return x.as_strided(shape, (token * stride, token, channel))


def split_by_matrix(x, block_size, stride):
    """A matrix of zeros and ones picks the tokens, and multiplies the others by 0."""
    rows = [
        torch.eye(len(x), dtype=x.dtype)[i : i + block_size]
        for i in range(0, len(x), stride)
        if i + block_size <= len(x)
    ]
    picks = torch.stack(rows) if rows else x.new_zeros(0, block_size, len(x))
    return picks @ x


def as_if_without_gaps(x, block_size, stride):
    """A view, with the strides that x would have if its rows touched each other."""
    count = len(range(block_size, len(x) + 1, stride))
    width = x.shape[1]
    return x.as_strided((count, block_size, width), (width * stride, width, 1))


def empty_of_floats(x, block_size, stride):
    """No block of whole numbers becomes no block of floating point numbers."""
    if len(x) < block_size:
        return torch.zeros(0, block_size, x.shape[1])
    return split_by_index(x, block_size, stride)


def padded(x, block_size, stride):
    """Zeros behind the last token, so that a short block becomes whole."""
    short = -(len(x) - block_size) % stride if len(x) > block_size else block_size - len(x)
    return mistakes.cut(F.pad(x, (0, 0, 0, short)), block_size, stride)


def reversed_by_index(x, block_size, stride):
    """Counts each block's tokens backwards."""
    last = torch.arange(block_size - 1, len(x), stride)[:, None]
    return x[last - torch.arange(block_size)]


def ends_aligned(x, block_size, stride):
    """The last block ends at the last token, so the first one may begin late."""
    first = (len(x) - block_size) % stride if len(x) >= block_size else 0
    return mistakes.cut(x, block_size, stride, first)


SPLITS = [
    *planted(mistakes.SPLITS),
    Wrong("tokens in reverse, by index", reversed_by_index, "in the reverse order"),
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
    Wrong("tail filled up with zeros", padded, "a tail too short for a block: the shape is"),
    Wrong(
        "the last block forgotten",
        lambda x, l, d: mistakes.cut(x, l, d, stop=len(x) - l),
        "one block: the shape is (0, 4, 3)",
    ),
    Wrong(
        "crash when too short",
        lambda x, l, d: x.unfold(0, l, d).transpose(1, 2),
        "exactly one token too few: the function raised RuntimeError",
    ),
    Wrong("by a matrix of zeros and ones", split_by_matrix, "block 0 holds NaN: the tail"),
    Wrong(
        "always 4 tokens",
        lambda x, l, d: mistakes.cut(x, 4, d),
        "blocks of three strides: the shape is (6, 4, 3)",
    ),
    Wrong(
        "always two strides",
        lambda x, l, d: mistakes.cut(x, 2 * d, d),
        "one block: the shape is (0, 8, 3)",
    ),
    Wrong(
        "strides of a table without gaps",
        as_if_without_gaps,
        "columns of a wider table: block 0, place 1, channel 0: got",
    ),
    Wrong("empty, and of floats", empty_of_floats, "and integer was asked for"),
    Wrong(
        "floats for whole numbers",
        lambda x, l, d: split_by_index(x.float(), l, d),
        "the dtype is torch.float32, and integer was asked for",
    ),
    Wrong("ends aligned, not beginnings", ends_aligned, "block 0 holds tokens 1 to 4"),
    Wrong(
        "newest block first",
        lambda x, l, d: split_by_index(x, l, d).flip(0),
        "block 0 holds tokens 8 to 11",
    ),
]

# --- 05.2 ---


def causal_by_replacing(f, x):
    """Large random numbers in place of all later tokens."""
    out = f(x)
    for t in range(len(x) - 1):
        other = x.clone()
        other[t + 1 :] = 1000.0 * torch.randn_like(x[t + 1 :]) + 500.0
        if (f(other)[: t + 1] != out[: t + 1]).any():
            return False
    return True


def causal_one_token_at_a_time(f, x):
    """One later token at a time, far up and far down."""
    out = f(x)
    leaks = []
    for s in range(1, len(x)):
        for value in (1e4, -1e4):
            other = torch.cat([x[:s], torch.full_like(x[:1], value), x[s + 1 :]])
            leaks.append(not torch.equal(f(other)[:s], out[:s]))
    return not any(leaks)


def causal_by_own_rows(f, x):
    """All later tokens replaced, from the last row to the first, and row t alone compared."""
    out = f(x).clone()
    for t in reversed(range(len(x) - 1)):
        for value in (1e6, -1e6):
            rest = torch.full_like(x[t + 1 :], value)
            if bool((f(torch.cat([x[: t + 1], rest]))[t] - out[t]).any()):
                return False
    return True


def by_cutting(f, x):
    """The rows so far, from the tokens so far: later tokens are gone, and take no other value."""
    out = f(x)
    return all(torch.equal(f(x[:t]), out[:t]) for t in range(1, len(x) + 1))


def at_numbers_of_its_own(f, x):
    """The right test, at another x."""
    return causal_by_own_rows(f, torch.randn_like(x))


def only_channel_0(rest):
    """Large random numbers in channel 0."""
    return torch.cat([large(rest)[:, :1], rest[:, 1:]], 1)


def large(rest):
    """Large random whole numbers of both signs: no order of a sum rounds them."""
    return (1000.0 * torch.randn_like(rest) + 500.0).round()


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
    """A derivative, which is 0 where only a choice changes."""
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
    Wrong("a gradient", by_jacobian, "and causal means exactly 0"),
    Wrong("NaN as poison", perturb(change=lambda rest: rest * torch.nan), "0 times NaN"),
    Wrong("tokens cut off, not replaced", by_cutting, "other numbers must take its place"),
    Wrong("x of its own", at_numbers_of_its_own, "take the x that is given"),
    Wrong("zeros", perturb(change=torch.zeros_like), "all of x is 0 here"),
    Wrong("the same added to all", perturb(change=lambda rest: rest + 100), "below -60"),
    Wrong("signs turned", perturb(change=torch.neg), "other numbers must take its place"),
    Wrong(
        "multiplied", perturb(change=lambda rest: rest * 1000), "other numbers must take its place"
    ),
    Wrong("another order", perturb(change=lambda rest: rest.flip(0)), "another order of them"),
    Wrong("small numbers", perturb(change=lambda rest: rest * 0 + 0.5), "by large numbers too"),
    Wrong(
        "large numbers of one sign",
        perturb(change=lambda rest: torch.full_like(rest, 1e6)),
        "below -60: replace by such numbers too",
    ),
    Wrong(
        "very negative numbers only",
        perturb(change=lambda rest: torch.full_like(rest, -1e6)),
        "above 60: replace by large numbers too",
    ),
    Wrong("channel 0 changed", perturb(change=only_channel_0), "channel 1 of the next token"),
    Wrong(
        "channel 0 compared",
        perturb(change=large, alike=lambda a, b: torch.equal(a[:, 0], b[:, 0])),
        "added to channel 1 and taken from channel 2",
    ),
    Wrong(
        "sums of rows compared",
        perturb(change=large, alike=lambda a, b: torch.equal(a.sum(1), b.sum(1))),
        "added to channel 1 and taken from channel 2",
    ),
    Wrong(
        "allclose after a large change",
        perturb(change=large, alike=torch.allclose),
        "1e-9 times the sign of its successor",
    ),
    Wrong(
        "every second token",
        perturb(change=large, places=lambda n: range(0, n, 2)),
        "row 1 reads token 2",
    ),
    Wrong(
        "the first 8 tokens",
        perturb(change=large, places=lambda n: range(min(n, 8))),
        "row 12 of 14 reads token 13",
    ),
    Wrong(
        "the second half",
        perturb(change=large, places=lambda n: range(n // 2, n)),
        "row 1 reads token 2",
    ),
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
    """One query, head and strip of d tokens at a time."""
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
    """nsa_lite's own two steps."""
    sizes = dict(block_size=block_size, stride=stride)
    _, lse = nsa_lite.compressed_attention(q[None], k[None, None], k[None, None], **sizes)
    return nsa_lite.block_importance(
        q[None], k[None, None], lse, **sizes, select_block_size=select_block_size
    )[0, 0]


def largest_seen(scores):
    """The largest score of each row; 0 where it sees none."""
    empty = scores.new_full((*scores.shape[:2], 1), -torch.inf)
    top = torch.cat([scores, empty], 2).amax(2, keepdim=True)
    return top.masked_fill(top == -torch.inf, 0.0)


def by_strips(top=largest_seen, kind=torch.float64, hidden=-torch.inf):
    """One-hot strips; top(scores) is subtracted before exp, hidden stands for what is not seen."""

    def answer(q, k, block_size, stride, select_block_size):
        q, k = (x.to(kind) for x in (q, k))
        i = torch.arange(len(k))
        t = torch.arange(q.shape[1])[:, None]
        seen = i * stride + block_size <= t + 1
        scores = (q @ k.T / q.shape[-1] ** 0.5).masked_fill(~seen, hidden)
        e = torch.exp(scores - top(scores)) * seen
        total = e.sum(-1, keepdim=True)
        p = (e / torch.where(total == 0, 1, total)).sum(0)
        token = i[:, None] * stride + torch.arange(0, block_size, stride)  # the strips of a block
        blocks = -(-q.shape[1] // select_block_size)
        return p @ F.one_hot(token // select_block_size, blocks).sum(1).to(kind)

    return answer


def importance_by_vmap(q, k, block_size, stride, select_block_size):
    """Head by head, by torch.vmap, and an einsum."""
    t = torch.arange(q.shape[1])[:, None]
    i = torch.arange(len(k))
    seen = mistakes.has_passed(i, t, block_size, stride)

    def weigh(head):
        scores = (head @ k.T / head.shape[1] ** 0.5).masked_fill(~seen, -torch.inf)
        return torch.where(seen, scores.softmax(-1), 0.0)

    j = torch.arange(-(-q.shape[1] // select_block_size))
    shared = mistakes.shared_tokens(i[:, None], j, block_size, stride, select_block_size)
    return torch.einsum("hti,ij->tj", torch.vmap(weigh)(q), shared / stride)


def columns_from_the_keys(q, k, block_size, stride, select_block_size):
    """As many columns as the compressed keys reach."""
    reach = (len(k) - 1) * stride + block_size
    columns = max(0, -(-reach // select_block_size))
    return importance_by_loop(q, k, block_size, stride, select_block_size)[:, :columns]


def softmax_of_all(q, k, block_size, stride, select_block_size):
    """Weights of seen and unseen keys, and then times 0 or 1: NaN stays NaN."""
    i = torch.arange(len(k))
    seen = mistakes.has_passed(i, torch.arange(q.shape[1])[:, None], block_size, stride)
    scores = q @ k.T / q.shape[-1] ** 0.5
    e = (scores - largest_seen(scores)).exp() * seen
    total = e.sum(-1, keepdim=True)
    p = (e / torch.where(total == 0, 1, total)).sum(0)
    j = torch.arange(-(-q.shape[1] // select_block_size))
    return p @ (
        mistakes.shared_tokens(i[:, None], j, block_size, stride, select_block_size) / stride
    )


def finite_mask(q, k, block_size, stride, select_block_size):
    """A large negative number for the mask: a query that sees nothing averages everything."""
    i = torch.arange(len(k))
    t = torch.arange(q.shape[1])[:, None]
    hidden = ~mistakes.has_passed(i, t, block_size, stride)
    p = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(hidden, -1e4).softmax(-1).sum(0)
    j = torch.arange(-(-q.shape[1] // select_block_size))
    shared = mistakes.shared_tokens(i[:, None], j, block_size, stride, select_block_size)
    return p @ shared.float() / stride


def one_head_at_a_time(q, k, block_size, stride, select_block_size):
    """The mean of the heads, each by the right loop."""
    sizes = (block_size, stride, select_block_size)
    return torch.stack([importance_by_loop(head[None], k, *sizes) for head in q]).mean(0)


IMPORTANCES = [
    *planted(mistakes.IMPORTANCES),
    Wrong("mean over heads, by loop", one_head_at_a_time, "the mean over the heads is taken"),
    Wrong(
        "no scale, by loop",
        lambda q, *others: importance_by_loop(q * q.shape[-1] ** 0.5, *others),
        "not divided by the root of the width",
    ),
    Wrong(
        "no maximum",
        by_strips(top=lambda scores: 0.0, kind=torch.float32),
        "exp of a large score is inf",
    ),
    Wrong("no maximum, in double", by_strips(top=lambda scores: 0.0), "exp of a large score is"),
    Wrong(
        "maximum from 0 on",
        by_strips(top=lambda scores: largest_seen(scores).clamp(min=0)),
        "of a very negative one 0; subtract the row's largest",
    ),
    Wrong(
        "one maximum for all rows",
        by_strips(top=lambda scores: largest_seen(scores.reshape(1, 1, -1))),
        "it has not passed are NaN here",
    ),
    Wrong(
        "-10000 for the mask, 0 after it",
        by_strips(hidden=-1e4),
        "of a very negative one 0; subtract the row's largest",
    ),
    Wrong("masked after exp", softmax_of_all, "it has not passed are NaN here"),
    Wrong(
        "columns from the keys",
        columns_from_the_keys,
        "blocks of four strides: the shape is (37, 3)",
    ),
    Wrong("the skeleton's", lambda q, k, l, d, l_sel: q[0] @ k.T, "the shape is (12, 6)"),
    Wrong("a finite number for the mask", finite_mask, "its importance is not 0"),
    Wrong(
        "NaN where nothing is seen",
        mistakes.importance(weigh=mistakes.softmax_of_each_head(dead=torch.nan)),
        "query 0 sees 0 compressed keys, and its importance is NaN",
    ),
]

# --- 05.4 ---


def choice_by_sets(score, select_block_size, num_selected):
    """A set of forced blocks, then the best of the rest."""
    out = []
    for t, row in enumerate(score.tolist()):
        own = t // select_block_size
        forced = {0, own, max(own - 1, 0)}
        rest = sorted(set(range(own + 1)) - forced, key=lambda j, row=row: (-row[j], j))
        ids = sorted([*forced, *rest[: num_selected - len(forced)]])
        out.append(ids + [-1] * (num_selected - len(ids)))
    return torch.tensor(out)


def choice_one_at_a_time(score, select_block_size, num_selected):
    """The best block, n times."""
    score = score.double().clone()
    j = torch.arange(score.shape[1])
    own = torch.arange(len(score))[:, None] // select_block_size
    score[((j == 0) | (j == own) | (j == own - 1)).expand_as(score)] = torch.inf
    score[(j > own).expand_as(score)] = -torch.inf
    end = score.shape[1]
    columns = []
    for _ in range(num_selected):
        best = score.argmax(1)  # argmax returns the first of several
        found = score.gather(1, best[:, None])[:, 0] > -torch.inf
        columns.append(torch.where(found, best, end))
        score.scatter_(1, best[:, None], -torch.inf)
    ids = torch.stack(columns, 1).sort(1).values
    return torch.where(ids == end, -1, ids).int()


def choice_by_package(score, select_block_size, num_selected):
    """nsa_lite's own choice."""
    return nsa_lite.choose_blocks(
        score[None, None], select_block_size=select_block_size, num_selected=num_selected
    )[0, 0]


def forced_blocks(own, j, initial=True, num_local=2):
    """Whether block j is the first one, or among the last up to block `own`."""
    local = (j <= own) & (j > own - num_local)
    return local | (j == 0) if initial else local


NONE = 10**6  # stands behind every id


def choice(
    boost=torch.inf,
    hidden=-torch.inf,
    forced=forced_blocks,
    mask=True,
    mask_again=True,
    stable=True,
    ascending=True,
    room=0,
):
    """The choice by one sort, with one step changed.

    Forced blocks have the score `boost`, and those that have not begun `hidden`.
    """

    def answer(score, l_sel, n):
        j = torch.arange(score.shape[1])
        own = torch.arange(len(score))[:, None] // l_sel
        rank = torch.where(forced(own, j), boost, score)
        rank = rank.masked_fill((j > own) & mask, hidden)
        order = falling(rank, stable)[:, : n - room]
        ids = F.pad(order, (0, n - order.shape[1]), value=NONE)
        ids = ids.masked_fill((ids > own) & mask_again, NONE)
        if ascending:
            ids = ids.sort(1).values
        return ids.masked_fill(ids == NONE, -1)

    return answer


def falling(rank, stable=True):
    """The ids of each row by falling rank; ties go to the lower id, or else to the higher."""
    if stable:
        return rank.sort(dim=1, descending=True, stable=True).indices
    return rank.shape[1] - 1 - rank.flip(1).sort(dim=1, descending=True, stable=True).indices


def scores_times_the_mask(score, l_sel, n):
    """0 for what has not begun, by a product."""
    legal = torch.arange(score.shape[1]) * l_sel <= torch.arange(len(score))[:, None]
    return choice(mask=False)(score * legal, l_sel, n)


def block_0_twice(score, l_sel, n):
    """A list of forced blocks, in which block 0 may stand three times."""
    out = []
    for t, row in enumerate(score.tolist()):
        own = t // l_sel
        ids = [0, max(own - 1, 0), own]  # a list, not a set
        rest = sorted(set(range(own + 1)) - set(ids), key=lambda j, row=row: (-row[j], j))
        ids = sorted(ids + rest[: n - 3])
        out.append(ids + [-1] * (n - len(ids)))
    return torch.tensor(out)


def crash_when_blocks_are_few(score, l_sel, n):
    """topk, as long as it has n blocks to choose from."""
    if score.shape[1] < n:
        return score.topk(n).indices
    return choice_by_sets(score, l_sel, n)


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
    Wrong("forced by a score of 1", choice(boost=1.0), "it is forced"),
    Wrong(
        "no initial block",
        choice(forced=lambda own, j: forced_blocks(own, j, initial=False)),
        "did not choose its initial block, 0",
    ),
    Wrong(
        "no local blocks",
        choice(forced=lambda own, j: forced_blocks(own, j, num_local=0)),
        "it is forced",
    ),
    Wrong(
        "the own block only",
        choice(forced=lambda own, j: forced_blocks(own, j, num_local=1)),
        "did not choose its block before its own",
    ),
    Wrong("block 0 twice", block_0_twice, "query 0 chose block 0 3 times"),
    Wrong("ties to the higher id", choice(stable=False), "tie, and the higher one was chosen"),
    Wrong("in order of rank", choice(ascending=False), "but not ascending"),
    Wrong("forced by a score of 1e9", choice(boost=1e9), "it is forced"),
    Wrong("0 for what has not begun", choice(hidden=0.0), "blocks; "),
    Wrong("-1e9 for what has not begun", choice(hidden=-1e9), "blocks; "),
    Wrong(
        "scores times the mask",
        scores_times_the_mask,
        "blocks; ",
    ),
    Wrong(
        "sizes of scores, not scores",
        lambda score, l_sel, n: choice_by_sets(score.abs(), l_sel, n),
        "with score -",
    ),
    Wrong(
        "scores in half precision",
        lambda score, l_sel, n: choice_by_sets(score.half(), l_sel, n),
        "scores that differ by little: query",
    ),
    Wrong(
        "size of a block from the shape",
        lambda score, l_sel, n: choice_by_sets(score, len(score) // score.shape[1], n),
        "which begins at token",
    ),
    Wrong(
        "size of a block from the shape, rounded up",
        lambda score, l_sel, n: choice_by_sets(score, -(-len(score) // score.shape[1]), n),
        "a last block of one token: query 5 chose block 1, which begins at token 6",
    ),
    Wrong("one block too few", choice(room=1), "query 3 chose 3 blocks"),
    Wrong(
        "crash when blocks are few",
        crash_when_blocks_are_few,
        "the function raised RuntimeError",
    ),
]

# --- 05.5 ---


def layer_by_package(x, p, sizes):
    """nsa_lite's own pieces wherever it has one."""
    blocks = {name: sizes[name] for name in ("block_size", "stride")}
    select = {name: sizes[name] for name in ("select_block_size",)}
    heads = p["gate"]["second"].shape[1] // 3
    q = (x @ p["query"]).unflatten(1, (heads, -1)).transpose(0, 1)[None]
    k, v = ({b: (x @ w)[None, None] for b, w in p[kind].items()} for kind in ("keys", "values"))
    short_k = short_by_package(k["compressed"], p["phi_k"], **blocks)
    short_v = short_by_package(v["compressed"], p["phi_v"], **blocks)
    out_c, lse = nsa_lite.compressed_attention(q, short_k, short_v, **blocks)
    number = sizes["num_selected"]
    ids = nsa_lite.select_blocks(
        q, short_k, lse, **blocks, **select, num_local=1, num_selected=number
    )
    out_s = nsa_lite.selected_attention(q, k["selected"], v["selected"], ids, **select)
    out_w = nsa_lite.window_attention(q, k["window"], v["window"], window=sizes["window"])
    gates = gates_of(x, p).unflatten(1, (heads, 3)).transpose(0, 1)[None]
    return nsa_lite.gated_sum(gates, (out_c, out_s, out_w))[0]


def short_by_package(x, phi, block_size, stride):
    """phi of each block of x, cut by the package."""
    raw = nsa_lite.compression.split_blocks(x, block_size, stride)
    rows = (raw + phi["position"]).flatten(-2)
    return F.gelu(rows @ phi["first"]) @ phi["second"]


def gates_of(x, p):
    """All gates of each token, (T, 3 H)."""
    return torch.sigmoid(F.gelu(x @ p["gate"]["first"]) @ p["gate"]["second"])


def layer_with_masks(x, p, sizes):
    """Every branch a dense attention with a mask of its own."""
    width = p["keys"]["window"].shape[1]
    q = torch.stack((x @ p["query"]).split(width, 1))
    t = torch.arange(len(x))[:, None]
    s = torch.arange(len(x))
    k = {b: x @ w for b, w in p["keys"].items()}
    v = {b: x @ w for b, w in p["values"].items()}
    short_k = short_by_index(k["compressed"], p["phi_k"], sizes)
    short_v = short_by_index(v["compressed"], p["phi_v"], sizes)
    i = torch.arange(len(short_k))
    passed = i * sizes["stride"] + sizes["block_size"] - 1 <= t
    out_c, weight = attend_masked(q, short_k, short_v, passed)
    chosen = chosen_tokens(weight.detach().sum(0), i, t, sizes) & (s <= t)
    out_s, _ = attend_masked(q, k["selected"], v["selected"], chosen)
    near = (s <= t) & (s > t - sizes["window"])
    out_w, _ = attend_masked(q, k["window"], v["window"], near)
    gates = gates_of(x, p)
    heads = []
    for h in range(len(q)):
        parts = enumerate((out_c, out_s, out_w))
        heads.append(sum(gates[:, 3 * h + c, None] * branch[h] for c, branch in parts))
    return torch.stack(heads)


def short_by_index(x, phi, sizes):
    """phi of each block of x, (N, D)."""
    rows = split_by_index(x, sizes["block_size"], sizes["stride"]) + phi["position"]
    return F.gelu(rows.flatten(1) @ phi["first"]) @ phi["second"]


def attend_masked(q, k, v, mask):
    """The output and the weights (H, T, S); both are 0 in rows that see nothing."""
    scores = q @ k.T / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask & mask.any(-1, True), -torch.inf)
    weight = scores.softmax(-1) * mask
    return weight @ v, weight


def chosen_tokens(p, i, t, sizes):
    """Whether token s lies in a chosen block of query t, from probabilities (T, N)."""
    l_sel = sizes["select_block_size"]
    j = torch.arange(-(-len(p) // l_sel))
    own = t // l_sel
    blocks = (sizes["block_size"], sizes["stride"], l_sel)
    score = p @ (mistakes.shared_tokens(i[:, None], j, *blocks) / sizes["stride"])
    score = score.masked_fill((j == 0) | (j == own), torch.inf).masked_fill(j > own, -1.0)
    ids = score.sort(dim=1, descending=True, stable=True).indices[:, : sizes["num_selected"]]
    return (torch.arange(len(p)) // l_sel == ids[..., None]).any(1)


def layer_in_double(x, p, sizes):
    """The same in double."""

    def double(value):
        if isinstance(value, dict):
            return {name: double(part) for name, part in value.items()}
        return value.double()

    return layer_by_package(x.double(), double(p), sizes)


def with_crossed_branches(x, p, sizes):
    """The compressed branch's keys and values under the selected one's name, and back."""
    crossed = {
        kind: {**p[kind], "selected": p[kind]["compressed"], "compressed": p[kind]["selected"]}
        for kind in ("keys", "values")
    }
    return layer_by_package(x, {**p, **crossed}, sizes)


def with_two_heads(x, p, sizes):
    """H and D as the notebook has them."""
    q = (x @ p["query"]).unflatten(1, (2, 4))
    assert q.shape[1] * 3 == p["gate"]["second"].shape[1]
    return layer_by_package(x, p, sizes)


FIRST_SIZES = {}


def with_the_first_sizes(x, p, sizes):
    """The sizes are looked up once."""
    FIRST_SIZES.update(FIRST_SIZES or sizes)
    return layer_by_package(x, p, FIRST_SIZES)


def with_detached_keys(x, p, sizes):
    """The right output, whose keys get no gradient."""
    keys = {b: w.detach() for b, w in p["keys"].items()}
    return layer_by_package(x, {**p, "keys": keys}, sizes)


LAYERS = [
    *planted(mistakes.LAYERS),
    Wrong("two branches crossed, by package", with_crossed_branches, "read each other's"),
    Wrong(
        "phi_k for the values, by package",
        lambda x, p, sizes: layer_by_package(x, {**p, "phi_v": p["phi_k"]}, sizes),
        "phi_k makes the compressed values too",
    ),
    Wrong("two heads of width 4", with_two_heads, "three heads, blocks of three strides: the"),
    Wrong(
        "the first sizes for ever",
        with_the_first_sizes,
        "three heads, blocks of three strides: the",
    ),
    Wrong(
        "x scaled in place",
        lambda x, p, sizes: layer_by_package(x.mul_(0.5), p, sizes),
        "the function changed its input x in place",
    ),
    Wrong(
        "number and window exchanged, by package",
        lambda x, p, sizes: layer_by_package(
            x, p, {**sizes, "window": sizes["num_selected"], "num_selected": sizes["window"]}
        ),
        "num_selected and window are exchanged",
    ),
    Wrong(
        "half a block for a stride",
        mistakes.resized(lambda s: {"stride": s["block_size"] // 2}),
        "must be a multiple of stride = 3",
    ),
    Wrong("keys detached", with_detached_keys, "no gradient reaches the compressed keys"),
    Wrong(
        "rows before heads",
        lambda x, p, sizes: layer_by_package(x, p, sizes).transpose(0, 1),
        "the shape is",
    ),
]

importance_in_double = by_strips()
importance_in_double.__name__ = "importance_in_double"

RIGHT = {
    "05.1": [split_by_index, split_by_unfold, split_by_strides],
    "05.2": [causal_by_replacing, causal_one_token_at_a_time, causal_by_own_rows],
    "05.3": [importance_by_loop, importance_by_package, importance_by_vmap, importance_in_double],
    "05.4": [choice_by_sets, choice_one_at_a_time, choice_by_package],
    "05.5": [layer_by_package, layer_with_masks, layer_in_double],
}
WRONG = {"05.1": SPLITS, "05.2": TESTS, "05.3": IMPORTANCES, "05.4": CHOICES, "05.5": LAYERS}
