"""Set 09's answers, for teachers: right ones in several styles, and wrong ones to be named.

The mistakes of mistakes.py are planted as they stand. The others are written by hand, in other
styles or with faults of another kind, so that no mistake is judged by itself alone.
"""

import functools
import math

import torch

from exercises.records import Wrong, planted

from . import mistakes

# --- 09.1 ---


def blocks_by_ends(length, block_size, stride):
    """As many as there are ends within the sequence."""
    return len(range(block_size, length + 1, stride))


def blocks_by_unfold(length, block_size, stride):
    """PyTorch cuts them."""
    if length < block_size:
        return 0
    return torch.arange(length).unfold(0, block_size, stride).shape[0]


def blocks_by_walking(length, block_size, stride):
    """One block after the other."""
    count = 0
    while count * stride + block_size <= length:
        count += 1
    return count


def blocks_by_floor(length, block_size, stride):
    """In floating point, rounded down; a tensor of no axes."""
    return torch.tensor(max(math.floor((length - block_size) / stride) + 1, 0))


def blocks_by_starts(length, block_size, stride):
    """Every start counts."""
    return len(range(0, length, stride))


def blocks_of_starts_that_fit(length, block_size, stride):
    """The last block's last token is not asked for."""
    return sum(start + block_size < length for start in range(0, length, stride))


def not_cut_at_0(length, block_size, stride):
    """Short sequences have fewer than no block."""
    return (length - block_size) // stride + 1


BLOCKS = [
    *planted(mistakes.BLOCKS),
    Wrong("every start, by range", blocks_by_starts, "a block counts from its first token on"),
    Wrong("last token left out", blocks_of_starts_that_fit, "a block counts one token late"),
    Wrong("below 0", not_cut_at_0, "got -2, and nothing is counted below 0"),
    Wrong(
        "paper's sizes, whatever is given",
        lambda length, block_size, stride: blocks_by_ends(length, 32, 16),
        "block 0 does not count, and its last token is token 9",
    ),
    Wrong(
        "block of two strides",
        lambda length, block_size, stride: blocks_by_ends(length, 2 * stride, stride),
        "block 0 counts, and its last token would be token 9",
    ),
    Wrong(
        "not rounded",
        lambda length, block_size, stride: max((length - block_size) / stride + 1, 0),
        "the function returned a float, and an int was asked for",
    ),
]

# --- 09.2 ---


def grow_row_by_row(buffer, new, lengths):
    """One row at a time."""
    for b, n in enumerate(lengths.tolist()):
        for i in range(new.shape[2]):
            buffer[b, :, n + i, :] = new[b, :, i, :]
    return lengths + new.shape[2]


def grow_by_slices(buffer, new, lengths):
    """A slice for each sequence; the lengths as a list made a tensor."""
    ends = []
    for part, rows, n in zip(buffer, new, lengths.tolist(), strict=True):
        ends.append(n + rows.shape[1])
        part[:, n : ends[-1]].copy_(rows)
    return torch.tensor(ends)


def grow_by_scatter(buffer, new, lengths):
    """scatter_ along the rows."""
    rows = lengths[:, None] + torch.arange(new.shape[2])
    buffer.scatter_(2, rows[:, None, :, None].expand_as(new), new)
    return lengths.add(new.shape[2])


def grow_by_index_put(buffer, new, lengths):
    """All four indices in full, by index_put_."""
    batch, groups, count, _ = new.shape
    b = torch.arange(batch)[:, None, None]
    g = torch.arange(groups)[None, :, None]
    rows = lengths[:, None, None] + torch.arange(count)
    buffer.index_put_((b, g, rows), new)
    return lengths + count


def grow_by_mask(buffer, new, lengths):
    """A mask of the rows that are new."""
    row = torch.arange(buffer.shape[2])
    ends = lengths + new.shape[2]
    mask = (row >= lengths[:, None]) & (row < ends[:, None])
    buffer.transpose(1, 2)[mask] = new.transpose(1, 2).flatten(0, 1)
    return ends


def grow_a_copy(buffer, new, lengths):
    """A new buffer is filled, and lost."""
    buffer = buffer.clone()
    return grow_by_scatter(buffer, new, lengths)


def grow_by_cat(buffer, new, lengths):
    """The rows that are held, the new ones, the rest: a longer tensor, and lost."""
    rows = [
        torch.cat([held[:, :n], more, held[:, n + more.shape[1] :]], 1)
        for held, more, n in zip(buffer, new, lengths.tolist(), strict=True)
    ]
    buffer = torch.stack(rows)
    return lengths + new.shape[2]


def grow_a_copy_and_back(buffer, new, lengths):
    """Right, by way of a copy of all."""
    copied = buffer.clone()
    lengths = grow_by_slices(copied, new, lengths)
    buffer.copy_(copied)
    return lengths


def grow_with_what_is_held(buffer, new, lengths):
    """Right, but the rows that are held are written again."""
    for part, rows, n in zip(buffer, new, lengths.tolist(), strict=True):
        part[:, : n + rows.shape[1]] = torch.cat([part[:, :n], rows], 1)
    return lengths + new.shape[2]


def grow_by_where(buffer, new, lengths):
    """Right, by a choice for every row that there is."""
    row = torch.arange(buffer.shape[2])
    i = row - lengths[:, None]
    mask = (i >= 0) & (i < new.shape[2])
    i = i.clamp(0, new.shape[2] - 1)[:, None, :, None].expand_as(buffer)
    buffer[:] = torch.where(mask[:, None, :, None], new.gather(2, i), buffer)
    return lengths + new.shape[2]


def grow_through_a_list(buffer, new, lengths):
    """Right, by way of Python's lists."""
    rows = buffer.tolist()
    for b, n in enumerate(lengths.tolist()):
        for g, group in enumerate(rows[b]):
            group[n : n + new.shape[2]] = new[b, g].tolist()
    buffer.copy_(torch.tensor(rows))
    return lengths + new.shape[2]


def grow_by_a_product(buffer, new, lengths):
    """One-hot rows: inf behind the lengths turns into NaN."""
    rows = lengths[:, None] + torch.arange(new.shape[2])
    hot = torch.nn.functional.one_hot(rows, buffer.shape[2]).to(new)  # (B, T, capacity)
    keep = 1 - hot.sum(1)[:, None, :, None]
    buffer.mul_(keep).add_(torch.einsum("btc,bgtw->bgcw", hot, new))
    return lengths + new.shape[2]


def grow_through_reshape(buffer, new, lengths):
    """Rows of all sequences in one list: a copy, where the buffer has gaps."""
    batch, groups, count, width = new.shape
    first = torch.arange(batch * groups).view(batch, groups, 1) * buffer.shape[2]
    rows = first + lengths[:, None, None] + torch.arange(count)
    buffer.reshape(-1, width)[rows.flatten()] = new.reshape(-1, width)
    return lengths + count


def grow_with_lengths_in_place(buffer, new, lengths):
    """The caller's lengths grow too."""
    grow_by_slices(buffer, new, lengths)
    lengths += new.shape[2]
    return lengths


def grow_behind_the_first(buffer, new, lengths):
    """One slice for the whole batch."""
    n = int(lengths[0])
    buffer[:, :, n : n + new.shape[2]] = new[:, :, : buffer.shape[2] - n]
    return lengths + new.shape[2]


def grow_first_group_only(buffer, new, lengths):
    """Only one group is written."""
    grow_by_slices(buffer[:, :1], new[:, :1], lengths)
    return lengths + new.shape[2]


def grow_last_token_only(buffer, new, lengths):
    """Only the last new token is written, where it belongs."""
    last = new.shape[2] - 1
    grow_by_slices(buffer, new[:, :, last:], lengths + last)
    return lengths + new.shape[2]


def grow_without_lengths(buffer, new, lengths):
    """Written, and nothing comes back."""
    grow_by_slices(buffer, new, lengths)


GROWN = [
    *planted(mistakes.WRITES),
    *planted(mistakes.LENGTHS),
    Wrong("a copy", grow_a_copy, "were the rows written into a copy of it?"),
    Wrong("a new tensor by cat", grow_by_cat, "were the rows written into a copy of it?"),
    Wrong("a copy and back", grow_a_copy_and_back, "5400 numbers were made at once to write 54"),
    Wrong("held rows written again", grow_with_what_is_held, "or with what is held"),
    Wrong("where over all rows", grow_by_where, "must not grow with the capacity"),
    Wrong("through a list", grow_through_a_list, "must not grow with the capacity"),
    Wrong(
        "one-hot product",
        grow_by_a_product,
        "group 0, is NaN: what stood there may be anything",
    ),
    Wrong(
        "through reshape",
        grow_through_reshape,
        "one sequence of a larger memory: buffer is as it was",
    ),
    Wrong(
        "the caller's lengths",
        grow_with_lengths_in_place,
        "the function changed its input lengths in place",
    ),
    Wrong(
        "one slice for the batch",
        grow_behind_the_first,
        "every sequence is written behind the length of sequence 0",
    ),
    Wrong(
        "group 0 only",
        grow_first_group_only,
        "row 3 of sequence 0, group 1, does not hold the new token 0",
    ),
    Wrong(
        "last new token only",
        grow_last_token_only,
        "row 3 of sequence 0, group 0, does not hold the new token 0",
    ),
    Wrong("nothing returned", grow_without_lengths, "result 1: the function returned None"),
    Wrong(
        "the place of the last token, by hand",
        lambda *x: grow_by_slices(*x) - 1,
        "the place of the last token was returned",
    ),
    Wrong(
        "buffer returned too",
        lambda buffer, *x: (buffer, grow_by_slices(buffer, *x)),
        "result 1: the function returned a tuple, and a torch.Tensor was asked for",
    ),
]

# --- 09.3 ---


def combine_one_by_one(outs, maxima, sums):
    """Row by row and part by part, in Python's numbers."""
    result = torch.zeros(outs.shape[1:])
    for r in range(outs.shape[1]):
        parts = [p for p in range(len(outs)) if sums[p, r] > 0]
        if not parts:
            continue
        top = max(float(maxima[p, r]) for p in parts)
        weights = [2.0 ** (float(maxima[p, r]) - top) for p in parts]
        total = sum(w * float(sums[p, r]) for w, p in zip(weights, parts, strict=True))
        for w, p in zip(weights, parts, strict=True):
            result[r] += w * outs[p, r] / total
    return result


def combine_by_log_sums(outs, maxima, sums):
    """A part's log-sum-exp says what share of the whole it is; in double."""
    lse = maxima.double() + sums.double().log2()
    dead = lse == -torch.inf
    shares = (lse * math.log(2)).masked_fill(dead.all(0), 0.0).softmax(0).masked_fill(dead, 0.0)
    means = outs.double() / sums[:, :, None]
    return torch.einsum("pr,prc->rc", shares, means.masked_fill(dead[:, :, None], 0.0))


def combine_in_turn(outs, maxima, sums):
    """An online softmax over the parts."""
    m = torch.full_like(maxima[0], -torch.inf)
    total = torch.zeros_like(m)
    out = torch.zeros_like(outs[0])
    for more, its_m, its_sum in zip(outs, maxima, sums, strict=True):
        new = torch.maximum(m, its_m)
        safe = new.clamp(min=torch.finfo(new.dtype).min)
        old, factor = (torch.exp2(x - safe) for x in (m, its_m))
        seen = (its_sum > 0)[:, None]
        total = total * old + its_sum * factor
        out = out * old[:, None] + torch.where(seen, more * factor[:, None], 0.0)
        m = new
    return torch.where(total[:, None] > 0, out / total[:, None], 0.0)


def combine_masked(outs, maxima, sums):
    """Empty parts first, then one product; powers of e."""
    empty = maxima == -torch.inf
    outs = outs.masked_fill(empty[..., None], 0)
    top = maxima.max(0).values.nan_to_num(neginf=0.0)
    weights = torch.exp((maxima - top) * math.log(2))
    total = (weights * sums).sum(0)
    return (weights[..., None] * outs).sum(0) / total.masked_fill(total == 0, 1)[:, None]


def combined(outs, maxima, sums, top=None):
    """Nothing is looked after: no part may be empty, no row either."""
    top = maxima.amax(0) if top is None else top
    weights = torch.exp2(maxima - top)
    return (weights[:, :, None] * outs).sum(0) / (weights * sums).sum(0)[:, None]


def means_averaged(outs, maxima, sums):
    """Every part that saw something counts alike."""
    means = torch.where(sums[:, :, None] > 0, outs / sums[:, :, None], torch.nan)
    return means.nanmean(0).nan_to_num(0.0)


def running_maximum_from_0(outs, maxima, sums):
    """The largest maximum is no lower than 0."""
    top = maxima.amax(0).clamp(min=0)
    outs = torch.where(sums[:, :, None] > 0, outs, 0.0)
    total = (torch.exp2(maxima - top) * sums).sum(0)
    out = (torch.exp2(maxima - top)[:, :, None] * outs).sum(0)
    return out / torch.where(total > 0, total, 1.0)[:, None]


def no_minus_infinity(outs, maxima, sums):
    """-1e9 in place of -inf; what is no number is left out."""
    outs = outs.nan_to_num(0.0, posinf=0.0)
    maxima = maxima.clamp(min=-1e9)
    weights = torch.exp2(maxima - maxima.amax(0))
    total = (weights * sums).sum(0)
    return (weights[:, :, None] * outs).sum(0) / torch.where(total > 0, total, 1.0)[:, None]


def only_nan_left_out(outs, maxima, sums):
    """An empty part is known by its NaN."""
    outs = torch.where(outs.isnan(), 0.0, outs)
    top = maxima.amax(0).nan_to_num(neginf=0.0)
    weights = torch.exp2(maxima - top)
    total = (weights * sums).sum(0)
    return (weights[:, :, None] * outs).sum(0) / torch.where(total > 0, total, 1.0)[:, None]


def no_maximum(outs, maxima, sums):
    """exp2 of the maxima themselves."""
    outs = torch.where(sums[:, :, None] > 0, outs, 0.0)
    return combined(outs, maxima, sums, top=torch.zeros(()))


COMBINED = [
    *planted(mistakes.COMBINES),
    Wrong("mean of the parts, by nanmean", means_averaged, "and the parts were averaged"),
    Wrong("NaN of empty parts", combined, "it saw nothing in part 0, and what stands there is no"),
    Wrong(
        "NaN where nothing was seen",
        lambda outs, maxima, sums: combined(outs.nan_to_num(0.0), maxima, sums),
        "saw nothing in any part, and its output is NaN",
    ),
    Wrong(
        "NaN made 0 at the end",
        lambda *x: combined(*x).nan_to_num(0.0),
        "row 1 is 0: it saw nothing in part 0, and something in others",
    ),
    Wrong("largest maximum from 0 on", running_maximum_from_0, "subtract the row's own largest"),
    Wrong(
        "-1e9 for an empty maximum",
        no_minus_infinity,
        "saw nothing in any part, and its output is not 0",
    ),
    Wrong(
        "only NaN is left out",
        only_nan_left_out,
        "is NaN: it saw nothing in part 1, and what stands there is no number",
    ),
    Wrong("no maximum", no_maximum, "is not finite: exp2 of a large number is inf"),
    Wrong(
        "one maximum for all rows",
        mistakes.combine(top=lambda maxima: maxima.max().expand(maxima.shape[1])),
        "is 0, and it has seen keys",
    ),
    Wrong(
        "maximum of part 0",
        mistakes.combine(top=lambda maxima: maxima[0]),
        "is not finite",
    ),
    Wrong(
        "average where nothing was seen",
        lambda outs, *x: torch.where(
            (x[1].sum(0) == 0)[:, None], 1.0, mistakes.combine()(outs, *x)
        ),
        "saw nothing in any part, and its output is not 0",
    ),
    Wrong(
        "parts as they are",
        lambda outs, maxima, sums: outs,
        "the shape is (2, 3, 4), and (3, 4) was asked for",
    ),
]

# --- 09.4 ---


def step_by_sets(config, length, number_bytes):
    """Sets of tokens."""
    l, d = config.block_size, config.stride
    size = config.select_block_size
    own = (length - 1) // size
    chosen = [own, *range(own)][: config.num_selected]
    counts = [
        length,
        len([i for i in range(length) if i * d + l <= length]),
        len({t for j in chosen for t in range(j * size, (j + 1) * size) if t < length}),
        len(range(max(0, length - config.window), length)),
    ]
    one = config.kv_heads * (config.head_dim + config.value_dim) * number_bytes
    return tuple(one * count for count in counts)


def step_by_formulas(config, length, number_bytes):
    """Whole blocks less what the own one lacks; a list."""
    size = config.select_block_size
    begun = -(-length // size)
    lacking = begun * size - length
    tokens = [
        length,
        max(0, (length - config.block_size) // config.stride + 1),
        min(begun, config.num_selected) * size - lacking,
        min(length, config.window),
    ]
    keys = config.kv_heads * config.head_dim * number_bytes
    values = config.kv_heads * config.value_dim * number_bytes
    return [keys * n + values * n for n in tokens]


def step_by_a_tensor(config, length, number_bytes):
    """A product of tensors, and its numbers."""
    last = length - 1
    own = last % config.select_block_size + 1
    others = min(last // config.select_block_size, config.num_selected - 1)
    tokens = torch.tensor(
        [
            length,
            blocks_by_ends(length, config.block_size, config.stride),
            own + others * config.select_block_size,
            min(config.window, length),
        ]
    )
    widths = torch.tensor([config.head_dim, config.value_dim]) * config.kv_heads
    return tuple((tokens * widths.sum() * number_bytes).tolist())


def papers_count(config, length, number_bytes):
    """T/d + n l' + w, as in Table 4."""
    one = config.kv_heads * (config.head_dim + config.value_dim) * number_bytes
    selected = config.num_selected * config.select_block_size
    return tuple(one * n for n in (length, length // config.stride, selected, config.window))


def every_head(config, length, number_bytes):
    """Each query head reads its own copy."""
    group = config.heads // config.kv_heads
    return tuple(group * x for x in step_by_sets(config, length, number_bytes))


def bits(config, length, number_bytes):
    """8 times too many."""
    return tuple(8 * x for x in step_by_sets(config, length, number_bytes))


BYTES = [
    *planted(mistakes.BYTES),
    Wrong("the paper's count", papers_count, "compressed: length / stride is the paper's rough"),
    Wrong("every head, by sets", every_head, "every head reads for itself"),
    Wrong("bits", bits, "dense: got 331296, which is wrong"),
    Wrong(
        "branches in another order",
        lambda *x: tuple(step_by_sets(*x)[n] for n in (0, 3, 2, 1)),
        "the four numbers are right, and stand in another order",
    ),
    Wrong("three numbers", lambda *x: step_by_sets(*x)[1:], "3 results, and 4 were asked for"),
]

# --- 09.5 ---


def read_in_turn(read, shares):
    """An online softmax over the shares, and the block sums shrink along."""
    state = None
    for p in range(shares):
        scores, values, overlap = read(p)
        values = values.masked_fill((scores[0] == -torch.inf)[:, None], 0.0)
        if state is None:
            m = torch.full((len(scores),), -torch.inf)
            state = torch.zeros(len(scores), values.shape[1] + overlap.shape[1] + 1)
        new = torch.maximum(m, scores.amax(1))
        safe = torch.where(new == -torch.inf, 0.0, new)[:, None]
        columns = torch.cat([torch.ones(len(values), 1), values, overlap], 1)
        state = state * torch.exp2(m[:, None] - safe) + torch.exp2(scores - safe) @ columns
        m = new
        width = values.shape[1]
    total = state[:, :1]
    state = state[:, 1:] / torch.where(total > 0, total, 1.0)
    return state[:, :width], state[:, width:].sum(0)


def read_by_heads(read, shares):
    """Seen keys only; each head in turn, and its shares in dicts, in double."""
    parts = []
    for p in range(shares):
        scores, values, overlap = read(p)
        seen = scores[0] > -torch.inf
        if seen.any():
            some = scores[:, seen].double()
            m = some.max(1).values
            weights = torch.exp2(some - m[:, None])
            both = torch.cat([values[seen], overlap[seen]], 1).double()
            parts.append(dict(m=m, sum=weights.sum(1), both=weights @ both))
    width, blocks = values.shape[1], overlap.shape[1]
    out = torch.zeros(len(scores), width + blocks, dtype=torch.float64)
    for h in range(len(scores)):
        top = max((part["m"][h] for part in parts), default=0.0)
        total = sum(torch.exp2(part["m"][h] - top) * part["sum"][h] for part in parts)
        for part in parts:
            out[h] += torch.exp2(part["m"][h] - top) / total * part["both"][h]
    return out[:, :width], out[:, width:].sum(0)


def read_with_lse(read, shares):
    """A log-sum-exp of each share, and of all; the shares from the last to the first."""
    parts = [one_share(*read(p)) for p in reversed(range(shares))]
    lse, out, sums = (torch.stack(x) for x in zip(*parts, strict=True))  # lse (P, H)
    whole = torch.logsumexp(lse * math.log(2), 0) / math.log(2)
    share = torch.exp2(lse - torch.where(whole == -torch.inf, 0.0, whole))
    return torch.einsum("ph,phc->hc", share, out), torch.einsum("ph,phj->j", share, sums)


def one_share(scores, values, overlap):
    """The log-sum-exp, the output and the block sums of a softmax over one share."""
    values = torch.where(scores[:1].T > -torch.inf, values, 0.0)
    m = scores.amax(1).nan_to_num(neginf=0.0)
    p = torch.exp2(scores - m[:, None])
    total = p.sum(1)
    p = p / torch.where(total > 0, total, 1.0)[:, None]
    return m + total.log2(), p @ values, p @ overlap


def read_twice(read, shares):
    """Right: once for the output, and again for the scores."""
    parts = [one_share(*read(p))[:2] for p in range(shares)]
    lse, out = (torch.stack(x) for x in zip(*parts, strict=True))
    whole = torch.logsumexp(lse * math.log(2), 0) / math.log(2)
    whole = torch.where(whole == -torch.inf, 0.0, whole)
    block_scores = 0.0
    for p in range(shares):
        scores, _, overlap = read(p)
        block_scores = block_scores + (torch.exp2(scores - whole[:, None]) @ overlap).sum(0)
    return torch.einsum("ph,phc->hc", torch.exp2(lse - whole), out), block_scores


def read_and_keep(read, shares):
    """Right: copies of all shares, and one softmax over them."""
    kept = [tuple(x.clone() for x in read(p)) for p in range(shares)]
    scores, values, overlap = zip(*kept, strict=True)
    lse, out, sums = one_share(torch.cat(scores, 1), torch.cat(values), torch.cat(overlap))
    return out, sums.sum(0)


def read_and_keep_scores(read, shares):
    """The output on the way, the scores of all keys for afterwards."""
    kept = []
    parts = []
    for p in range(shares):
        scores, values, overlap = read(p)
        parts.append(one_share(scores, values, overlap)[:2])
        kept.append((scores + 0.0, overlap + 0.0))
    scores, overlap = zip(*kept, strict=True)
    lse, out = (torch.stack(x) for x in zip(*parts, strict=True))
    whole = torch.logsumexp(lse * math.log(2), 0) / math.log(2)
    whole = torch.where(whole == -torch.inf, 0.0, whole)
    p = torch.exp2(torch.cat(scores, 1) - whole[:, None])
    return torch.einsum("ph,phc->hc", torch.exp2(lse - whole), out), (p @ torch.cat(overlap)).sum(0)


def read_and_keep_elsewhere(kept_as, read, shares):
    """Right: what was read is kept, and not as a tensor."""
    kept = [tuple(kept_as(x) for x in read(p)) for p in range(shares)]
    return read_with_lse(lambda p: tuple(torch.tensor(x) for x in kept[p]), shares)


def read_from_behind(read, shares):
    """Right, past the function that was given."""
    return read_with_lse(lambda p: tuple(x.clone() for x in read.shares[p]), shares)


def read_and_trust(read, shares):
    """What read returns is kept as it is: all shares turn into the last one."""
    kept = [read(p) for p in range(shares)]
    parts = [one_share(*share) for share in kept]
    lse, out, sums = (torch.stack(x) for x in zip(*parts, strict=True))
    whole = torch.logsumexp(lse * math.log(2), 0) / math.log(2)
    share = torch.exp2(lse - torch.where(whole == -torch.inf, 0.0, whole))
    return torch.einsum("ph,phc->hc", share, out), torch.einsum("ph,phj->j", share, sums)


def shares_alone_by_softmax(read, shares):
    """A softmax of each share, added up; the output is right."""
    parts = [one_share(*read(p)) for p in range(shares)]
    lse, out, sums = (torch.stack(x) for x in zip(*parts, strict=True))
    share = torch.exp2(lse - lse.amax(0).nan_to_num(neginf=0.0))
    share = share / share.sum(0).clamp(min=1e-30)
    return torch.einsum("ph,phc->hc", share, out), sums.sum((0, 1))


def heads_first(read, shares):
    """The heads' block sums are added before the softmax is known."""
    parts = [mistakes.part(torch.exp2, *read(p)) for p in range(shares)]
    outs, m, sums, block_sums = (torch.stack(x) for x in zip(*parts, strict=True))
    top = m.amax(0).nan_to_num(neginf=0.0)
    total = (torch.exp2(m - top) * sums).sum(0).clamp(min=1e-30)
    factor = (torch.exp2(m - top) / total)[:, :1]
    scores = (factor * block_sums.sum(1)).sum(0)
    return mistakes.combine()(outs, m, sums), scores


def without_a_mask(read, shares):
    """Weights of 0, and values that are NaN."""
    parts = []
    for p in range(shares):
        scores, values, overlap = read(p)
        m = scores.amax(1).nan_to_num(neginf=0.0)
        w = torch.exp2(scores - m[:, None])
        parts.append((m.masked_fill(w.sum(1) == 0, -torch.inf), w.sum(1), w @ values, w @ overlap))
    m, sums, outs, block_sums = (torch.stack(x) for x in zip(*parts, strict=True))
    top = m.amax(0).nan_to_num(neginf=0.0)
    total = (torch.exp2(m - top) * sums).sum(0)
    factor = torch.exp2(m - top) / torch.where(total > 0, total, 1.0)
    return (factor[:, :, None] * outs).sum(0), (factor[:, :, None] * block_sums).sum((0, 1))


def without_a_safe_maximum(read, shares):
    """-inf minus -inf in a share that sees nothing."""
    parts = []
    for p in range(shares):
        scores, values, overlap = read(p)
        values = torch.where((scores[0] > -torch.inf)[:, None], values, 0.0)
        m = scores.amax(1)
        w = torch.exp2(scores - m[:, None])
        parts.append((m, w.sum(1), w @ values, w @ overlap))
    m, sums, outs, block_sums = (torch.stack(x) for x in zip(*parts, strict=True))
    top = m.amax(0)
    factor = torch.exp2(m - top) / (torch.exp2(m - top) * sums).sum(0)
    return (factor[:, :, None] * outs).sum(0), (factor[:, :, None] * block_sums).sum((0, 1))


def without_a_maximum(read, shares):
    """exp2 of the scores as they are."""
    total = out = block_scores = torch.zeros(())
    for p in range(shares):
        scores, values, overlap = read(p)
        w = torch.exp2(scores)
        total = total + w.sum(1, keepdim=True)
        out = out + w @ values.nan_to_num(0.0)
        block_scores = block_scores + w @ overlap
    safe = torch.where(total > 0, total, 1.0)
    return out / safe, (block_scores / safe).sum(0)


def maximum_from(top, read, shares):
    """The maximum so far, top(scores), is no lower than 0."""
    m = torch.zeros(())
    total = out = block_scores = torch.zeros(())
    for p in range(shares):
        scores, values, overlap = read(p)
        values = values.masked_fill((scores[0] == -torch.inf)[:, None], 0.0)
        new = torch.maximum(m, top(scores))
        w = torch.exp2(scores - new)
        shrink = torch.exp2(m - new)
        total = total * shrink + w.sum(1, keepdim=True)
        out = out * shrink + w @ values
        block_scores = block_scores * shrink + w @ overlap
        m = new
    safe = torch.where(total > 0, total, 1.0)
    return out / safe, (block_scores / safe).sum(0)


def block_sums_not_shrunk(read, shares):
    """The output shrinks with a new maximum, the block sums do not."""
    m = torch.full((1, 1), -torch.inf)
    total = out = block_sums = torch.zeros(())
    for p in range(shares):
        scores, values, overlap = read(p)
        values = values.masked_fill((scores[0] == -torch.inf)[:, None], 0.0)
        new = torch.maximum(m, scores.amax(1, keepdim=True))
        safe = new.nan_to_num(neginf=0.0)
        w = torch.exp2(scores - safe)
        shrink = torch.exp2(m - safe)
        total = total * shrink + w.sum(1, keepdim=True)
        out = out * shrink + w @ values
        block_sums = block_sums + w @ overlap
        m = new
    total = torch.where(total > 0, total, 1.0)
    return out / total, (block_sums / total).sum(0)


def output_averaged(read, shares):
    """Right scores; the shares' outputs count alike."""
    parts = [one_share(*read(p)) for p in range(shares)]
    lse, out, sums = (torch.stack(x) for x in zip(*parts, strict=True))
    whole = torch.logsumexp(lse * math.log(2), 0) / math.log(2)
    share = torch.exp2(lse - torch.where(whole == -torch.inf, 0.0, whole))
    mean = out.sum(0) / (lse > -torch.inf).sum(0).clamp(min=1)[:, None]
    return mean, torch.einsum("ph,phj->j", share, sums)


def last_share(read, shares):
    """Only one share is read."""
    _, out, sums = one_share(*read(shares - 1))
    return out, sums.sum(0)


READ = [
    *planted(mistakes.SCORES),
    *planted(mistakes.OUTPUTS),
    Wrong("read twice", read_twice, "out and scores are right, and a share was read 2 times"),
    Wrong("everything kept", read_and_keep, "scores or values of 5 shares are still held"),
    Wrong("scores kept", read_and_keep_scores, "scores or values of 5 shares are still held"),
    Wrong(
        "kept as lists",
        functools.partial(read_and_keep_elsewhere, torch.Tensor.tolist),
        "scores or values of 5 shares are still held",
    ),
    Wrong(
        "kept as arrays",
        functools.partial(read_and_keep_elsewhere, lambda x: x.numpy().copy()),
        "scores or values of 5 shares are still held",
    ),
    Wrong("nothing read", read_from_behind, "out and scores are right, and a share was never read"),
    Wrong(
        "what read returns is kept",
        read_and_trust,
        "was a share kept as it came?",
    ),
    Wrong(
        "a softmax of each share",
        shares_alone_by_softmax,
        "are divided by the sum of that share alone",
    ),
    Wrong("heads added first", heads_first, "multiplied by the factor of head 0"),
    Wrong("values not masked", without_a_mask, "the value may be NaN, and 0 times NaN is NaN"),
    Wrong(
        "-inf minus -inf",
        without_a_safe_maximum,
        "out is not finite: no key of share 2 may be read",
    ),
    Wrong("no maximum", without_a_maximum, "subtract a maximum first"),
    Wrong(
        "maximum from 0 on",
        functools.partial(maximum_from, lambda scores: scores.amax(1, keepdim=True)),
        "a head's result is 0: exp2 of a large number is inf",
    ),
    Wrong(
        "one maximum for all heads",
        functools.partial(maximum_from, lambda scores: scores.max()),
        "a head's result is 0: exp2 of a large number is inf",
    ),
    Wrong(
        "block sums not shrunk, by hand",
        block_sums_not_shrunk,
        "are not brought to a later, larger maximum",
    ),
    Wrong("output averaged, by hand", output_averaged, "out is the mean of the shares"),
    Wrong("one share", last_share, "only the last share's block sums count"),
    Wrong("out only", lambda *x: read_with_lse(*x)[0], "2 results were asked for"),
    Wrong(
        "scores of each head",
        lambda read, shares: (one_share(*read(0))[1], one_share(*read(0))[2]),
        "result 2: the shape is (4, 8), and (8,) was asked for",
    ),
]

RIGHT = {
    "09.1": [blocks_by_ends, blocks_by_unfold, blocks_by_walking, blocks_by_floor],
    "09.2": [
        grow_row_by_row,
        grow_by_slices,
        grow_by_scatter,
        grow_by_index_put,
        grow_by_mask,
    ],
    "09.3": [combine_one_by_one, combine_by_log_sums, combine_in_turn, combine_masked],
    "09.4": [step_by_sets, step_by_formulas, step_by_a_tensor],
    "09.5": [read_in_turn, read_by_heads, read_with_lse],
}
WRONG = {"09.1": BLOCKS, "09.2": GROWN, "09.3": COMBINED, "09.4": BYTES, "09.5": READ}
