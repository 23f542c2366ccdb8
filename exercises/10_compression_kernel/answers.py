"""Set 10's answers, for teachers: right ones in several styles, and wrong ones to be named.

The mistakes of mistakes.py are planted as they stand. The others are written by hand, in other
styles or with faults of another kind, so that no mistake is judged by itself alone.
"""

import heapq

import torch

from exercises.records import Wrong, planted
from nsa_lite.blocks import overlap_in_strides

from . import mistakes

# --- 10.1 ---


def load_by_slice(memory, first, rows, count):
    """What exists, copied into zeros."""
    tile = torch.zeros(rows, memory.shape[1])
    real = memory[first:count][:rows]
    tile[: len(real)] = real
    return tile


def load_row_by_row(memory, first, rows, count):
    """One row at a time."""
    zero = torch.zeros(memory.shape[1])
    return torch.stack([memory[at] if at < count else zero for at in range(first, first + rows)])


def load_by_mask(memory, first, rows, count):
    """Addresses that do not exist become 0, and their rows too."""
    at = first + torch.arange(rows)
    mask = at < count
    return memory[at * mask].masked_fill(~mask[:, None], 0.0)


def load_by_padding(memory, first, rows, count):
    """As many rows of zeros behind what exists as a tile has."""
    padded = torch.nn.functional.pad(memory[:count], (0, 0, 0, first + rows))
    return padded[first : first + rows]


def load_times_mask(memory, first, rows, count):
    """The mask as a factor."""
    at = (first + torch.arange(rows)).clamp(max=len(memory) - 1)
    mask = (first + torch.arange(rows) < count).float()
    return memory[at] * mask[:, None]


def load_without_clamp(memory, first, rows, count):
    """Every address is touched."""
    at = first + torch.arange(rows)
    return torch.where((at < count)[:, None], memory[at], 0.0)


def load_short(memory, first, rows, count):
    """Only what exists."""
    return memory[first : min(first + rows, count)]


def load_and_cut(memory, first, rows, count):
    """The rows of the tile from `count` on become 0."""
    tile = torch.cat([memory, memory])[first : first + rows].clone()
    tile[count:] = 0
    return tile


def load_one_more(memory, first, rows, count):
    """Up to row `count`, itself included."""
    tile = torch.zeros(rows, memory.shape[1])
    for i in range(rows):
        if first + i <= count and first + i < len(memory):
            tile[i] = memory[first + i]
    return tile


LOADS = [
    *planted(mistakes.LOADS),
    Wrong("the mask as a factor", load_times_mask, "it does not exist, and 0 times NaN is NaN"),
    Wrong("every address", load_without_clamp, "the end of the memory too: the function raised"),
    Wrong("a short tile", load_short, "the shape is (3, 6), and (7, 6) was asked for"),
    Wrong(
        "unmasked slice",
        lambda memory, first, rows, count: torch.cat([memory, memory])[first : first + rows],
        "rows are returned that do not exist",
    ),
    Wrong("cut at the tile's row", load_and_cut, "the mask counts rows from the first of the tile"),
    Wrong("one row more", load_one_more, "one row too many is taken for real"),
    Wrong(
        "zeros",
        lambda memory, first, rows, count: torch.zeros(rows, memory.shape[1]),
        "a tile that is not whole is returned empty",
    ),
    Wrong(
        "mask in place",
        lambda memory, first, rows, count: load_by_slice(
            memory.index_fill_(0, torch.arange(count, len(memory)), 0.0), first, rows, count
        ),
        "the function changed its input memory in place",
    ),
    Wrong(
        "nan_to_num",
        lambda memory, first, rows, count: memory[
            (first + torch.arange(rows)).clamp(max=len(memory) - 1)
        ].nan_to_num(),
        "a number stands behind: rows are returned that do not exist",
    ),
    Wrong(
        "first and rows exchanged",
        lambda memory, first, rows, count: load_by_slice(memory, rows, first, count),
        "the shape is",
    ),
]

# --- 10.2 ---


def group_head_by_head(q, k, lse, first_token, first_key, block_size, stride):
    """One head after the other, hidden keys as 0 at the end."""
    t = first_token + torch.arange(q.shape[1])[:, None]
    i = first_key + torch.arange(len(k))
    seen = i * stride + block_size - 1 <= t
    total = torch.zeros(seen.shape)
    for head, its_lse in zip(q, lse, strict=True):
        s = head @ k.T / q.shape[2] ** 0.5
        total = total + torch.where(seen, (s - its_lse[:, None]).exp(), 0.0)
    return total


def group_by_einsum(q, k, lse, first_token, first_key, block_size, stride):
    """The scores of hidden keys are -inf; a log-sum-exp of -inf becomes 0."""
    s = torch.einsum("rtd,nd->rtn", q, k) * q.shape[2] ** -0.5
    end = (first_key + torch.arange(len(k))) * stride + block_size - 1
    hidden = end > first_token + torch.arange(q.shape[1])[:, None]
    s = s.masked_fill(hidden, -torch.inf)
    lse = torch.where(lse == -torch.inf, 0.0, lse)
    return torch.exp(s - lse[..., None]).sum(0)


def group_by_pairs(q, k, lse, first_token, first_key, block_size, stride):
    """One pair after the other, in double."""
    total = torch.zeros(q.shape[1], len(k), dtype=torch.float64)
    for t in range(q.shape[1]):
        for i in range(len(k)):
            if (first_key + i) * stride + block_size <= first_token + t + 1:
                s = q[:, t].double() @ k[i].double() / q.shape[2] ** 0.5
                total[t, i] = (s - lse[:, t]).exp().sum()
    return total


def group_by_count(q, k, lse, first_token, first_key, block_size, stride):
    """How many keys each query sees, as a number."""
    t = first_token + torch.arange(q.shape[1])
    seen = torch.div(t + 1 - block_size + stride, stride, rounding_mode="floor") - first_key
    mask = torch.arange(len(k)) < seen[:, None]
    weights = torch.exp((q * q.shape[2] ** -0.5) @ k.T - lse[:, :, None])
    return weights.masked_fill(~mask, 0.0).sum(dim=0)


def group_times_mask(q, k, lse, first_token, first_key, block_size, stride):
    """The mask as a factor."""
    t = first_token + torch.arange(q.shape[1])[:, None]
    seen = (first_key + torch.arange(len(k))) * stride + block_size - 1 <= t
    s = q @ k.T / q.shape[2] ** 0.5
    return ((s - lse[:, :, None]).exp() * seen).sum(0)


def group_with_nan_rows(q, k, lse, first_token, first_key, block_size, stride):
    """-inf minus -inf where nothing is seen."""
    t = first_token + torch.arange(q.shape[1])[:, None]
    seen = (first_key + torch.arange(len(k))) * stride + block_size - 1 <= t
    s = (q @ k.T / q.shape[2] ** 0.5).masked_fill(~seen, -torch.inf)
    return (s - lse[:, :, None]).exp().sum(0)


def group_with_finite_mask(q, k, lse, first_token, first_key, block_size, stride):
    """Masked scores are 0 where nothing is seen: exp(0) is 1."""
    t = first_token + torch.arange(q.shape[1])[:, None]
    seen = (first_key + torch.arange(len(k))) * stride + block_size - 1 <= t
    safe = lse.clamp(min=-1e30)
    s = (q @ k.T / q.shape[2] ** 0.5 - safe[:, :, None]).masked_fill(~seen, -1e4)
    return torch.where((lse > -torch.inf)[:, :, None], s, 0.0).exp().sum(0)


def group_exp_first(q, k, lse, first_token, first_key, block_size, stride):
    """exp(s) / exp(lse)."""
    t = first_token + torch.arange(q.shape[1])[:, None]
    seen = (first_key + torch.arange(len(k))) * stride + block_size - 1 <= t
    s = q @ k.T / q.shape[2] ** 0.5
    p = torch.where(seen, s.exp(), 0.0) / lse.exp()[:, :, None]
    return torch.where(seen, p, 0.0).sum(0)


def group_softmaxed(q, k, lse, *places):
    """A softmax of what is in the tile."""
    first_token, first_key, l, d = places
    t = first_token + torch.arange(q.shape[1])[:, None]
    seen = (first_key + torch.arange(len(k))) * d + l - 1 <= t
    s = (q @ k.T / q.shape[2] ** 0.5).masked_fill(~seen, -1e30)
    return (s.softmax(2) * seen).sum(0)


def group_with(seen=lambda end, token: end < token + 1, scale=0.5, adds_first=False):
    """Written anew: `end` is where a key's block ends; scale is the power of the width."""

    def answer(q, k, lse, first_token, first_key, block_size, stride):
        s = torch.einsum("rtd,nd->rtn", q, k) / q.shape[-1] ** scale
        token = torch.arange(q.shape[1])[:, None] + first_token
        end = (torch.arange(len(k)) + first_key) * stride + block_size - 1
        exponent = s - lse[..., None]
        p = exponent.sum(0).exp() if adds_first else exponent.exp()
        p = torch.where(seen(end, token), p, 0.0)
        return p if adds_first else p.sum(0)

    return answer


def group_of_begun(q, k, lse, first_token, first_key, block_size, stride):
    """A block counts from its first token on."""
    late = first_token + block_size - 1
    lse = torch.where(lse == -torch.inf, 0.0, lse)
    return group_with()(q, k, lse, late, first_key, block_size, stride)


def group_renormalised(q, k, lse, *others):
    """Divided by the sum over heads and keys, times the heads."""
    p = group_by_count(q, k, lse, *others)
    return p / p.sum(1, keepdim=True).clamp(min=1e-9)


GROUPS = [
    *planted(mistakes.GROUPS),
    Wrong("the mask as a factor", group_times_mask, "a key that may not be read holds no number"),
    Wrong("-inf minus -inf", group_with_nan_rows, "sees no key, and it is NaN: its lse is -inf"),
    Wrong("exp(0) is 1", group_with_finite_mask, "sees no key, and its probabilities are not 0"),
    Wrong("exp before the division", group_exp_first, "NaN: a key that may not be read"),
    Wrong("softmax, by hand", group_softmaxed, "lse is that of all keys, in other tiles too"),
    Wrong("begun, by a later token", group_of_begun, "from the token on at which its block begins"),
    Wrong("divided by the row's sum", group_renormalised, "each row is divided by its sum"),
    Wrong(
        "before its last token",
        group_with(seen=lambda end, token: end < token),
        "the query at a block's last token does not see it",
    ),
    Wrong("width, not its root", group_with(scale=1.0), "by the width, not by its root"),
    Wrong("exponents added", group_with(adds_first=True), "the heads are added before exp"),
    Wrong(
        "heads kept apart",
        lambda q, k, lse, *x: torch.stack(
            [group_by_einsum(q[h : h + 1], k, lse[h : h + 1], *x) for h in range(len(q))]
        ),
        "the shape is (2, 3, 4), and (3, 4) was asked for",
    ),
    Wrong(
        "divided by the number of heads",
        lambda q, *x: group_by_count(q, *x) / len(q),
        "the heads are averaged, and Eq. 10 adds them",
    ),
    Wrong(
        "keys by queries",
        lambda *x: group_by_count(*x).T,
        "the shape is (4, 3), and (3, 4) was asked for",
    ),
]

# --- 10.3 ---


def sums_by_overlap(total, block_size, stride, select_block_size):
    """The matrix of overlaps, its diagonal of blocks and the one beside it."""
    keys = total.shape[1]
    blocks = -(-keys * stride // select_block_size)
    overlap = overlap_in_strides(keys, blocks + 1, block_size, stride, select_block_size)
    begins = torch.arange(keys) * stride // select_block_size
    own = torch.where(begins[:, None] == torch.arange(blocks + 1), overlap, 0.0)
    return (total @ own)[:, :blocks], (total @ (overlap - own))[:, 1:]


def sums_by_keys(total, block_size, stride, select_block_size):
    """One key after the other, its strides counted one by one."""
    per = select_block_size // stride
    own = torch.zeros(len(total), -(-total.shape[1] // per))
    passed = torch.zeros_like(own)
    for i in range(total.shape[1]):
        for stride_of_key in range(i, i + block_size // stride):
            target = own if stride_of_key // per == i // per else passed
            target[:, i // per] += total[:, i]
    return own, passed


def sums_by_unflatten(total, block_size, stride, select_block_size):
    """Whole blocks, and a product with each key's weight."""
    per = select_block_size // stride
    whole = torch.nn.functional.pad(total, (0, -total.shape[1] % per)).unflatten(1, (-1, per))
    to_next = torch.tensor(
        [max(0, k * stride + block_size - select_block_size) / stride for k in range(per)]
    )
    return whole @ (block_size / stride - to_next), whole @ to_next


def sums_by_columns(total, block_size, stride, select_block_size):
    """The k-th keys of all blocks at once."""
    per = select_block_size // stride
    blocks = -(-total.shape[1] // per)
    own = torch.zeros(len(total), blocks)
    passed = torch.zeros(len(total), blocks)
    for k in range(per):
        column = total[:, k::per]
        inside = min(block_size, select_block_size - k * stride) // stride
        own[:, : column.shape[1]] += inside * column
        passed[:, : column.shape[1]] += (block_size // stride - inside) * column
    return own, passed


def sums_of_whole_blocks(total, block_size, stride, select_block_size):
    """A last block with fewer keys is left out."""
    per = select_block_size // stride
    whole = total[:, : total.shape[1] // per * per]
    return sums_by_unflatten(whole, block_size, stride, select_block_size)


def sums_of_a_whole_last(total, block_size, stride, select_block_size):
    """What the last block has no keys for is taken from the keys before."""
    per = select_block_size // stride
    lacking = -total.shape[1] % per
    padded = torch.cat([total, total[:, -1:].expand(-1, lacking)], 1)
    return sums_by_unflatten(padded, block_size, stride, select_block_size)


def sums_of_ends(total, block_size, stride, select_block_size):
    """Keys belong to the block in which they end."""
    per = select_block_size // stride
    blocks = -(-total.shape[1] // per)
    end = torch.arange(total.shape[1]) * stride + block_size - 1
    block = (end // select_block_size).clamp(max=blocks - 1)
    own = torch.zeros(len(total), blocks).index_add(1, block, total * (block_size // stride))
    return own, torch.zeros_like(own)


def sums_in_tokens(total, block_size, stride, select_block_size):
    """Tokens, not strides."""
    return tuple(
        stride * part for part in sums_by_columns(total, block_size, stride, select_block_size)
    )


def sums_halved(total, block_size, stride, select_block_size):
    """Blocks of two strides, whatever is given."""
    return sums_by_columns(total, 2 * stride, stride, max(2 * stride, select_block_size))


def sums_as_in_the_notebook(total, block_size, stride, select_block_size):
    """Two keys a block."""
    total = torch.nn.functional.pad(total, (0, total.shape[1] % 2)).unflatten(1, (-1, 2))
    to_next = torch.tensor([0.0, max(0, stride + block_size - select_block_size) / stride])
    return total @ (block_size / stride - to_next), total @ to_next


def sums_all_own(total, block_size, stride, select_block_size):
    """Each key counts whole where it begins."""
    own, passed = sums_by_keys(total, block_size, stride, select_block_size)
    return own + passed, torch.zeros_like(own)


def sums_added_early(total, block_size, stride, select_block_size):
    """What the block before passes on is in own already."""
    own, passed = sums_by_keys(total, block_size, stride, select_block_size)
    own[:, 1:] += passed[:, :-1]
    return own, passed


SUMS = [
    *planted(mistakes.OWN),
    *planted(mistakes.PASSED),
    Wrong("whole blocks only", sums_of_whole_blocks, "the shape is (4, 2), and (4, 3) was asked"),
    Wrong("the last key again", sums_of_a_whole_last, "a last block with fewer keys: own: query"),
    Wrong("whole where it begins", sums_all_own, "counts whole in its own"),
    Wrong("added early", sums_added_early, "own holds what the block before passes on"),
    Wrong("by their ends", sums_of_ends, "own: query 0, block 0"),
    Wrong("in tokens", sums_in_tokens, "tokens are counted"),
    Wrong("two strides", sums_halved, "the shape is (3, 3), and (3, 6) was asked for"),
    Wrong("two keys", sums_as_in_the_notebook, "result 1: the shape is (2, 4), and (2, 2) was"),
    Wrong("exchanged", lambda *x: sums_by_keys(*x)[::-1], "own and passed_on are exchanged"),
    Wrong(
        "added at once",
        lambda *x: sum(sums_by_keys(*x)),
        "the function returned a Tensor, and 2 results were asked for",
    ),
    Wrong(
        "passed on by one",
        lambda *x: (sums_by_keys(*x)[0], sums_by_keys(*x)[1].roll(1, 1)),
        "and belongs to the one that gives it",
    ),
    Wrong(
        "weights of the keys reversed",
        lambda *x: tuple(part.flip(1) for part in sums_by_keys(x[0].flip(1), *x[1:])),
        "own: query 0, block 0",
    ),
    Wrong(
        "lists",
        lambda *x: tuple(part.tolist() for part in sums_by_keys(*x)),
        "result 1: the function returned a list, and a torch.Tensor was asked for",
    ),
]

# --- 10.4 ---


def keep_by_pairs(best, ids, scores, first):
    """Python's sort of (score, id) pairs."""
    rows = []
    for old, names, new in zip(best.tolist(), ids.tolist(), scores.tolist(), strict=True):
        pairs = list(zip(old, names, strict=True))
        pairs += [(x, first + c) for c, x in enumerate(new)]
        pairs = sorted((p for p in pairs if p[0] > -torch.inf), key=lambda p: (-p[0], p[1]))
        pairs += [(-torch.inf, -1)] * len(old)
        rows.append(pairs[: len(old)])
    return (
        torch.tensor([[x for x, _ in row] for row in rows]),
        torch.tensor([[j for _, j in row] for row in rows]),
    )


def keep_one_by_one(best, ids, scores, first):
    """Each block of the chunk replaces the worst, if it is better."""
    best = best.clone()
    ids = ids.clone()
    for t in range(len(best)):
        for c in range(scores.shape[1]):
            worst = min(range(best.shape[1]), key=lambda s: (best[t, s], -ids[t, s]))
            mine = (float(scores[t, c]), -(first + c))
            if mine[0] > -torch.inf and mine > (float(best[t, worst]), -int(ids[t, worst])):
                best[t, worst] = scores[t, c]
                ids[t, worst] = first + c
    return best, ids


def keep_by_maxima(best, ids, scores, first):
    """n maxima, each the lowest id among the best that are left."""
    every = torch.cat([ids, (first + torch.arange(scores.shape[1])).expand(len(ids), -1)], 1)
    rest = torch.cat([best, scores], 1)
    found = []
    for _ in range(best.shape[1]):
        top = rest.amax(1, keepdim=True)
        name = torch.where(rest == top, every, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
        place = ((rest == top) & (every == name)).long().argmax(1, keepdim=True)
        found.append((top, torch.where(top == -torch.inf, -1, name)))
        rest = rest.scatter(1, place, -torch.inf)
    tops, names = zip(*found, strict=True)
    return torch.cat(tops, 1), torch.cat(names, 1)


def keep_by_heap(best, ids, scores, first):
    """The n largest of (score, -id), kept in no order that matters."""
    new_best = torch.full_like(best, -torch.inf)
    new_ids = torch.full_like(ids, -1)
    for t in range(len(best)):
        pairs = [(float(x), -int(j)) for x, j in zip(best[t], ids[t], strict=True) if j >= 0]
        pairs += [(float(x), -(first + c)) for c, x in enumerate(scores[t]) if x > -torch.inf]
        for slot, (x, j) in enumerate(reversed(heapq.nlargest(best.shape[1], pairs))):
            new_best[t, slot] = x
            new_ids[t, slot] = -j
    return new_best, new_ids


def keep_whatever_there_is(best, ids, scores, first):
    """The first n of all, by score; -inf is a score like others."""
    rows = []
    for old, names, new in zip(best.tolist(), ids.tolist(), scores.tolist(), strict=True):
        pairs = [(x, first + c) for c, x in enumerate(new)]
        pairs += [(x, j) for x, j in zip(old, names, strict=True) if j >= 0]
        pairs = sorted(pairs, key=lambda p: (-p[0], p[1])) + [(-torch.inf, -1)] * len(old)
        rows.append(pairs[: len(old)])
    return torch.tensor(rows)[..., 0], torch.tensor(rows)[..., 1].long()


def keep_from_zero(best, ids, scores, first):
    """What has no block yet counts as 0."""
    best, ids = keep_by_pairs(best.clamp(min=0.0), ids, scores, first)
    return best.masked_fill(ids < 0, -torch.inf), ids


def keep_half(best, ids, scores, first):
    """The best of the chunk replaces the worst that is kept, one a chunk."""
    top, place = scores.max(1)
    worst = best.argmin(1, keepdim=True)
    better = top[:, None] > best.gather(1, worst)
    return (
        best.scatter(1, worst, torch.where(better, top[:, None], best.gather(1, worst))),
        ids.scatter(1, worst, torch.where(better, first + place[:, None], ids.gather(1, worst))),
    )


def keep_the_ids_alone(best, ids, scores, first):
    """The ids are right, and the scores are not kept."""
    return torch.zeros_like(best), keep_by_pairs(best, ids, scores, first)[1]


def keep_twice(best, ids, scores, first):
    """The best block takes two places."""
    best, ids = keep_by_pairs(best, ids, scores, first)
    best[:, 1] = best[:, 0]
    ids[:, 1] = ids[:, 0]
    return best, ids


def keep_with_a_margin(best, ids, scores, first):
    """A block must be better by 1 to be kept."""
    return keep_by_pairs(best, ids, scores.round(), first)


def keep_if_better(best, ids, scores, first):
    """A block of the chunk takes the place of the worst that is kept, if it is better."""
    best = best.clone()
    ids = ids.clone()
    for t in range(len(best)):
        for c in range(scores.shape[1]):
            worst = int(best[t].argmin())
            if scores[t, c] > best[t, worst]:
                best[t, worst] = scores[t, c]
                ids[t, worst] = first + c
    return best, ids


def keep_the_chunk(best, ids, scores, first):
    """The best n of the chunk."""
    n = best.shape[1]
    padded = torch.nn.functional.pad(scores, (0, n), value=-torch.inf)
    kept, place = torch.sort(padded, dim=1, descending=True, stable=True)
    kept = kept[:, :n]
    return kept, (place[:, :n] + first).masked_fill(kept == -torch.inf, -1)


KEPT = [
    *planted(mistakes.KEPT),
    Wrong("-inf like any score", keep_whatever_there_is, "no query may read them"),
    Wrong("better than the worst", keep_if_better, "among equal scores those stay that came first"),
    Wrong("the chunk's best", keep_the_chunk, "only the last chunk counts"),
    Wrong("from 0 on", keep_from_zero, "scores below 0 are dropped"),
    Wrong("one a chunk", keep_half, "only the best block can be kept"),
    Wrong(
        "scores are lost", keep_the_ids_alone, "one chunk: ids are right, and the scores in best"
    ),
    Wrong("the best twice", keep_twice, "twice"),
    Wrong("scores rounded", keep_with_a_margin, "the scores in best are not theirs"),
    Wrong(
        "joined only",
        lambda best, ids, scores, first: (
            torch.cat([best, scores], 1),
            torch.cat([ids, (first + torch.arange(scores.shape[1])).expand(len(ids), -1)], 1),
        ),
        "result 1: the shape is (4, 7), and (4, 2) was asked for",
    ),
    Wrong(
        "ids first",
        lambda *x: keep_by_pairs(*x)[::-1],
        "the dtype is torch.int64, and floating point was asked for",
    ),
    Wrong(
        "one block less, by hand",
        lambda best, ids, scores, first: tuple(
            torch.cat([part[:, :-1], last.to(part)], 1)
            for part, last in zip(
                keep_by_pairs(best, ids, scores, first),
                (torch.full((len(best), 1), -torch.inf), torch.full((len(best), 1), -1)),
                strict=True,
            )
        ),
        "one block too few is kept",
    ),
    Wrong(
        "within the chunk",
        lambda best, ids, scores, first: keep_by_pairs(best, ids, scores, 0),
        "blocks are counted from the first of their chunk",
    ),
]

# --- 10.5 ---

KEEP = mistakes.keep()


def by_tiles(  # noqa: PLR0913  each is one step
    total=group_by_count,
    sums=sums_by_unflatten,
    keep=KEEP,
    carried=True,
    forced=True,
    begun=True,
    finish=lambda ids: ids,
    initial=lambda j, rule: j < rule["num_initial"],
    local=lambda j, own, rule: j > own - rule["num_local"],
    count=lambda q, rule: -(-q.shape[1] // rule["select_block_size"]),
):
    """Tile by tile; carried adds what the tile before passed on."""

    def answer(q, k, lse, sizes, tile):
        l, d, select = (sizes[x] for x in ("block_size", "stride", "select_block_size"))
        own_block = torch.arange(q.shape[1])[:, None] // select
        best = torch.full((q.shape[1], sizes["num_selected"]), -torch.inf)
        ids = torch.full(best.shape, -1)
        carry = torch.zeros(q.shape[1], 1)
        for first in range(0, count(q, sizes), tile):
            j = torch.arange(first, min(first + tile, count(q, sizes)))
            keys = k[first * (select // d) : (first + len(j)) * (select // d)]
            own = torch.zeros(q.shape[1], len(j))
            passed = torch.zeros(q.shape[1], len(j))
            if len(keys):
                p = total(q, keys, lse, 0, first * (select // d), l, d)
                mine, on = sums(p, l, d, select)
                own[:, : mine.shape[1]] = mine
                passed[:, : on.shape[1]] = on
            score = own + torch.cat([carry * carried, passed[:, :-1]], 1)
            carry = passed[:, -1:]
            if forced:
                score = score.masked_fill(initial(j, sizes) | local(j, own_block, sizes), torch.inf)
            if begun:
                score = score.masked_fill(j > own_block, -torch.inf)
            best, ids = keep(best, ids, score, first)
        return finish(ids)

    return answer


def ascending(ids):
    """Ascending, -1 at the end."""
    big = torch.iinfo(torch.int64).max
    ids = torch.where(ids < 0, big, ids).sort(1).values
    return torch.where(ids == big, -1, ids)


def choose_by_tiles(q, k, lse, sizes, tile):
    """The steps of the set."""
    return by_tiles(finish=ascending)(q, k, lse, sizes, tile)


def choose_by_queries(q, k, lse, sizes, tile):
    """Some queries at a time, each by a sort of its own row."""
    l, d, select, n = (
        sizes[x] for x in ("block_size", "stride", "select_block_size", "num_selected")
    )
    blocks = -(-q.shape[1] // select)
    overlap = overlap_in_strides(len(k), blocks, l, d, select)
    rows = []
    for t in range(q.shape[1]):
        own = t // select
        score = torch.zeros(blocks)
        seen = max(0, (t + 1 - l) // d + 1)
        if seen:
            p = (q[:, t] @ k[:seen].T * q.shape[2] ** -0.5 - lse[:, t, None]).exp().sum(0)
            score = p @ overlap[:seen]
        score[own + 1 :] = -torch.inf
        score[: min(sizes["num_initial"], own + 1)] = torch.inf
        score[max(own + 1 - sizes["num_local"], 0) : own + 1] = torch.inf
        ids = torch.sort(score, descending=True, stable=True).indices[: min(n, own + 1)]
        rows.append(torch.nn.functional.pad(ids.sort().values, (0, n - len(ids)), value=-1))
    return torch.stack(rows)


def choose_with_overlap(q, k, lse, sizes, tile):
    """Keys that touch the tile's blocks, and a product with the overlaps."""
    l, d, select = (sizes[x] for x in ("block_size", "stride", "select_block_size"))
    own = torch.arange(q.shape[1])[:, None] // select
    best = torch.full((q.shape[1], sizes["num_selected"]), -torch.inf)
    ids = torch.full(best.shape, -1)
    blocks = -(-q.shape[1] // select)
    overlap = overlap_in_strides(len(k), blocks, l, d, select)
    for first in range(0, blocks, tile):
        j = torch.arange(first, min(first + tile, blocks))
        low = max(0, (first * select - l) // d + 1)
        high = (first + len(j)) * select // d
        score = torch.zeros(q.shape[1], len(j))
        if len(k[low:high]):
            p = group_head_by_head(q, k[low:high], lse, 0, low, l, d)
            score = p @ overlap[low:high, j]
        forced = (j < sizes["num_initial"]) | (j > own - sizes["num_local"])
        score = score.masked_fill(forced, torch.inf)
        best, ids = keep_by_maxima(best, ids, score.masked_fill(j > own, -torch.inf), first)
    return ascending(ids).int()


def choose_at_once(q, k, lse, sizes, tile):
    """Right, with all scores."""
    return choose_by_tiles(q, k, lse, sizes, -(-q.shape[1] // sizes["select_block_size"]))


def choose_from_a_row(q, k, lse, sizes, tile):
    """Right, tile by tile into one row of scores for each query."""
    rows = []

    def note(best, ids, score, first):
        rows.append(score)
        return best, ids

    by_tiles(keep=note)(q, k, lse, sizes, tile)
    best = torch.full((q.shape[1], sizes["num_selected"]), -torch.inf)
    ids = torch.full(best.shape, -1)
    return ascending(keep_by_maxima(best, ids, torch.cat(rows, 1), 0)[1])


def forced_as_one(q, k, lse, sizes, tile):
    """Forced blocks get the score 1."""

    def keep(best, ids, score, first):
        return keep_by_maxima(best, ids, score.masked_fill(score == torch.inf, 1.0), first)

    return by_tiles(keep=keep, finish=ascending)(q, k, lse, sizes, tile)


def negated(q, k, lse, sizes, tile):
    """The worst free blocks."""

    def sums(*arguments):
        return tuple(-part for part in sums_by_unflatten(*arguments))

    return by_tiles(sums=sums, finish=ascending)(q, k, lse, sizes, tile)


def total_of_head_0(q, k, lse, *others):
    """One head chooses."""
    return group_by_count(q[:1], k, lse[:1], *others)


def total_of_logits(q, k, lse, *others):
    """Scores added, not probabilities."""
    p = group_by_count(q, k, torch.where(lse == -torch.inf, 0.0, lse), *others)
    s = (q @ k.T * q.shape[2] ** -0.5).sum(0)
    return torch.where(p > 0, s, 0.0)


CHOSEN = [
    Wrong("all at once", choose_at_once, "keep the best of each query, not all scores"),
    Wrong("a row of scores", choose_from_a_row, "keep the best of each query, not all scores"),
    Wrong(
        "nothing carried over",
        by_tiles(carried=False, finish=ascending),
        "one of the best, and chose block",
    ),
    Wrong("no forced blocks", by_tiles(forced=False, finish=ascending), "one of the forced blocks"),
    Wrong("forced as 1", forced_as_one, "one of the forced blocks"),
    Wrong(
        "blocks of the future",
        by_tiles(begun=False, finish=ascending),
        "chose block 1, which begins at token 8",
    ),
    Wrong("not sorted", by_tiles(), "is not ascending with -1 at the end"),
    Wrong("-1 first", by_tiles(finish=lambda ids: ids.sort(1).values), "is not ascending"),
    Wrong("the worst", negated, "one of the best, and chose block"),
    Wrong("head 0 chooses", by_tiles(total_of_head_0, finish=ascending), "one of the best"),
    Wrong("logits added", by_tiles(total_of_logits, finish=ascending), "one of the best"),
    Wrong(
        "one local block",
        by_tiles(local=lambda j, own, rule: j > own - 1, finish=ascending),
        "one of the forced blocks",
    ),
    Wrong(
        "no initial block",
        by_tiles(initial=lambda j, rule: j < 0, finish=ascending),
        "lacks block 0, one of the forced blocks",
    ),
    Wrong(
        "touched is covered",
        by_tiles(sums=lambda p, l, d, select: sums_by_unflatten(p, d, d, select), finish=ascending),
        "one of the best",
    ),
    Wrong(
        "the last block left out",
        by_tiles(count=lambda q, rule: q.shape[1] // rule["select_block_size"], finish=ascending),
        "one of the forced blocks",
    ),
    Wrong(
        "one block too many",
        lambda *x: torch.nn.functional.pad(choose_by_tiles(*x), (0, 1), value=-1),
        "the shape is (40, 5), and (40, 4) was asked for",
    ),
    Wrong(
        "floats",
        lambda *x: choose_by_tiles(*x).float(),
        "the dtype is torch.float32, and integer was asked for",
    ),
]

RIGHT = {
    "10.1": [load_by_slice, load_row_by_row, load_by_mask, load_by_padding],
    "10.2": [group_head_by_head, group_by_einsum, group_by_pairs, group_by_count],
    "10.3": [sums_by_overlap, sums_by_keys, sums_by_unflatten, sums_by_columns],
    "10.4": [keep_by_pairs, keep_one_by_one, keep_by_maxima, keep_by_heap],
    "10.5": [choose_by_tiles, choose_by_queries, choose_with_overlap],
}
WRONG = {"10.1": LOADS, "10.2": GROUPS, "10.3": SUMS, "10.4": KEPT, "10.5": CHOSEN}
