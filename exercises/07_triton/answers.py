"""Set 07's answers, for teachers: right ones in several styles, and wrong ones to be named.

The mistakes of mistakes.py are planted as they stand, and so are other flaws of its kernels, which
a check names by what they leave in memory. A few are written by hand, in other styles, so that no
mistake is judged by itself alone.
"""

import kernels  # before triton: without a GPU it turns the interpreter on

# isort: split
import torch
import triton
import triton.language as tl

from exercises.records import Wrong, planted
from kernels.online_softmax import LOG2E, finish, fold_in
from kernels.rows import load_rows, store_rows

from . import mistakes

# --- 07.1 ---


@triton.jit
def add_by_pointers(x, y, out, a, size, BLOCK: tl.constexpr):
    """The pointers move to the block, and places count from there."""
    first = tl.program_id(0) * BLOCK
    place = tl.arange(0, BLOCK)
    mask = place < size - first
    value = a * tl.load(x + first + place, mask=mask, other=0.0)
    value += tl.load(y + first + place, mask=mask, other=0.0)
    tl.store(out + first + place, value, mask=mask)


@triton.jit
def add_by_fma(x, y, out, a, size, BLOCK: tl.constexpr):
    """Product and sum in one instruction."""
    at = tl.arange(0, BLOCK) + BLOCK * tl.program_id(0)
    mask = at < size
    x_tile = tl.load(x + at, mask=mask)
    y_tile = tl.load(y + at, mask=mask)
    tl.store(out + at, tl.fma(x_tile, tl.full([BLOCK], a, tl.float32), y_tile), mask=mask)


@triton.jit
def add_one_by_one(x, y, out, a, size, BLOCK: tl.constexpr):
    """A loop over single numbers."""
    first = tl.program_id(0) * BLOCK
    for place in range(first, tl.minimum(first + BLOCK, size)):
        tl.store(out + place, tl.load(y + place) + tl.load(x + place) * a)


def a_times_the_sum(x, y, out, a, block):
    """No kernel at all."""
    out.copy_(a * (x + y))


def unknown_name(x, y, out, a, block):
    """What a typing error gives."""
    raise NameError("name 'program_id' is not defined")


@triton.jit
def add_everything(x, y, out, a, size, BLOCK: tl.constexpr):
    """Every program goes over all blocks."""
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        mask = at < size
        value = a * tl.load(x + at, mask=mask) + tl.load(y + at, mask=mask)
        tl.store(out + at, value, mask=mask)


@triton.jit
def add_in_fours(x, y, out, a, size, BLOCK: tl.constexpr):
    """Programs begin 4 places after one another."""
    at = tl.program_id(0) * 4 + tl.arange(0, BLOCK)
    mask = at < size
    value = a * tl.load(x + at, mask=mask) + tl.load(y + at, mask=mask)
    tl.store(out + at, value, mask=mask)


@triton.jit
def add_loaded_without_mask(x, y, out, a, size, BLOCK: tl.constexpr):
    """Only the store is masked."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, a * tl.load(x + at) + tl.load(y + at), mask=at < size)


@triton.jit
def add_into_x_too(x, y, out, a, size, BLOCK: tl.constexpr):
    """The sum is left in x as well."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    value = a * tl.load(x + at, mask=mask) + tl.load(y + at, mask=mask)
    tl.store(x + at, value, mask=mask)
    tl.store(out + at, value, mask=mask)


@triton.jit
def nothing(x):
    """No work."""


@triton.jit
def copy(x, out, size, BLOCK: tl.constexpr):
    """What was made elsewhere."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < size), mask=at < size)


def in_pytorch(x, y, out, a, block):
    """Right, and no kernel."""
    torch.add(y, x, alpha=a, out=out)


def in_numpy(x, y, out, a, block):
    """Right, in an array that shares out's memory."""
    out.cpu().numpy()[:] = a * x.cpu().numpy() + y.cpu().numpy()


def beside_a_kernel(x, y, out, a, block):
    """A kernel that does nothing, then PyTorch."""
    nothing[(triton.cdiv(len(x), block),)](x)
    in_pytorch(x, y, out, a, block)


def copied_by_a_kernel(x, y, out, a, block):
    """PyTorch computes, and a kernel copies."""
    copy[(triton.cdiv(len(x), block),)](a * x + y, out, len(x), BLOCK=block)


def with_block(size):
    """The right kernel with blocks of its own; size(length) is theirs."""

    def scaled_add(x, y, out, a, block):
        own = size(len(x))
        add_by_pointers[(triton.cdiv(len(x), own),)](x, y, out, a, len(x), BLOCK=own)

    return scaled_add


ADD = [
    *planted(mistakes.ADD),
    *planted(
        mistakes.flaws(
            mistakes.add,
            {
                "no mask at the store": "outside of out was changed, 2 places:",
                "mask one too long": "outside of out was changed, 1 place:",
                "mask on the place in the block": "outside of out was changed, 2 places:",
                "last number left out": "place 7 of out was never written",
                "program number not used": "only the first block was written",
                "programs one place apart": "was never written",
                "written into y": "place 0 of out was never written",
            },
        )
    ),
    Wrong(
        "every program does everything", mistakes.launch_add(add_everything), "another one wrote"
    ),
    Wrong("blocks 4 places apart", mistakes.launch_add(add_in_fours), "was never written"),
    Wrong(
        "only the store masked",
        mistakes.launch_add(add_loaded_without_mask),
        "places outside of the tensors were loaded: mask these loads",
    ),
    Wrong("x overwritten", mistakes.launch_add(add_into_x_too), "the kernel changed its input x"),
    Wrong("no kernel", in_pytorch, "no kernel was launched"),
    Wrong("no kernel, in NumPy", in_numpy, "no kernel was launched"),
    Wrong("PyTorch beside a kernel", beside_a_kernel, "written by something else than the kernel"),
    Wrong("a kernel that copies", copied_by_a_kernel, "PyTorch made a tensor of"),
    Wrong(
        "one program for all",
        with_block(triton.next_power_of_2),
        "1 programs were launched, and 3 were asked for",
    ),
    Wrong("blocks of 4", with_block(lambda length: 4), "2 programs were launched, and 1 were"),
    Wrong("a program for each", with_block(lambda length: 1), "8 programs were launched, and 1"),
    Wrong("a times the sum, in PyTorch", a_times_the_sum, "a multiplied the sum"),
    Wrong("a name that is not there", unknown_name, "NameError"),
]

# --- 07.2 ---


@triton.jit
def softmax_in_powers_of_2(
    s, seen, out, s_row, out_row, scale, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """exp2, with log2(e) in the scale."""
    row = tl.program_id(0)
    column = tl.arange(0, PADDED)
    mask = column < tl.load(seen + row)
    x = tl.load(s + row * s_row + column, mask=mask, other=0.0) * (scale * LOG2E)
    top = tl.max(tl.where(mask, x, -1e30), 0)
    p = tl.where(mask, tl.exp2(tl.where(mask, x, -float("inf")) - top), 0.0)
    p = p / tl.maximum(tl.sum(p, 0), 1e-30)
    tl.store(out + row * out_row + column, p, mask=column < WIDTH)


@triton.jit
def softmax_by_log_sum(
    s, seen, out, s_row, out_row, scale, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """The log-sum-exp in float64; an empty row goes its own way."""
    row = tl.program_id(0)
    column = tl.arange(0, PADDED)
    count = tl.load(seen + row)
    to = out + row * out_row + column
    if count == 0:
        tl.store(to, tl.zeros([PADDED], tl.float32), mask=column < WIDTH)
    else:
        x = tl.load(s + row * s_row + column, mask=column < count, other=-float("inf"))
        x = x.to(tl.float64) * scale
        top = tl.max(x, 0)
        p = tl.exp(x - (top + tl.log(tl.sum(tl.exp(x - top), 0))))
        tl.store(to, p, mask=column < WIDTH)


@triton.jit
def softmax_by_walking(
    s, seen, out, s_row, out_row, scale, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """The online softmax, number by number."""
    row = tl.program_id(0)
    count = tl.load(seen + row)
    m_i = -float("inf")
    l_i = 0.0
    for i in range(count):
        x = tl.load(s + row * s_row + i) * scale
        m_new = tl.maximum(m_i, x)
        l_i = l_i * tl.exp(m_i - m_new) + tl.exp(x - m_new)
        m_i = m_new
    for i in range(WIDTH):
        to = out + row * out_row + i
        if i < count:
            tl.store(to, tl.exp(tl.load(s + row * s_row + i) * scale - m_i) / l_i)
        else:
            tl.store(to, 0.0)


@triton.jit
def seen_numbers_only(
    s, seen, out, s_row, out_row, scale, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """The mask of the load at the store too."""
    row = tl.program_id(0)
    column = tl.arange(0, PADDED)
    mask = column < tl.load(seen + row)
    x = tl.load(s + row * s_row + column, mask=mask, other=-float("inf")) * scale
    p = tl.exp(x - tl.max(x, 0))
    tl.store(out + row * out_row + column, p / tl.sum(p, 0), mask=mask)


def scale_lost_at_the_launch(s, seen, out, scale):
    """A right kernel, and 1 in place of scale."""
    mistakes.launch_softmax(softmax_by_log_sum)(s, seen, out, 1.0)


def softmax_in_pytorch(s, seen, out, scale):
    """Right, and no kernel."""
    for row, count in enumerate(seen.tolist()):
        out[row] = 0.0
        out[row, :count] = (s[row, :count] * scale).softmax(0)


def softmax_beside_a_kernel(s, seen, out, scale):
    """A kernel that does nothing, then PyTorch."""
    nothing[(len(s),)](s)
    softmax_in_pytorch(s, seen, out, scale)


SOFTMAX = [
    *planted(mistakes.SOFTMAX),
    *planted(
        mistakes.flaws(
            mistakes.softmax,
            {
                "count ignored": "row 0 may use its first 3 numbers, and column 3 got weight",
                "no mask at the load": "row 0 may use its first 3 numbers, and column 3 got weight",
                "no mask at the store": "memory outside of out was changed",
                "stride of the rows ignored": "NaN lies in memory around the inputs",
                "unscaled maximum": "the weights are all 0",
                "no maximum": "the weights are not finite",
                "empty row": "may use nothing, and its weights are NaN",
                "maximum from 0 on": "the weights are all 0",
                "maximum from -10000 on": "scores far below -10000: the weights are all 0",
                "the smallest": "the weights are not finite",
                "the first one": "the weights are not finite",
                "the largest size": "the weights are all 0",
                "-inf added": "NaN in numbers that a row may not use: row 0 is NaN",
                "masked after the load": "outside of the tensors were loaded: mask these loads",
                "rows of s as far apart as those of out": "NaN lies in memory around the inputs",
                "rows of out as far apart as those of s": "memory outside of out was changed",
            },
        )
    ),
    Wrong("scale lost at the launch", scale_lost_at_the_launch, "not multiplied by scale"),
    Wrong("no kernel", softmax_in_pytorch, "no kernel was launched"),
    Wrong("PyTorch beside a kernel", softmax_beside_a_kernel, "by something else than the kernel"),
    Wrong(
        "only allowed places written",
        mistakes.launch_softmax(seen_numbers_only),
        "row 0 of out was never written",
    ),
]

# --- 07.3 ---


@triton.jit
def flash_in_powers_of_2(
    q, k, v, out, T, scale, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """As the package does it: load_rows, fold_in, finish, store_rows."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    q_tile = load_rows(q, row * D, row < T, D, D)
    m_i = tl.full([M], -float("inf"), tl.float32)
    l_i = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV], tl.float32)
    for first in range(0, tl.minimum(tl.program_id(0) * M + M, T), N):
        key = first + tl.arange(0, N)
        k_tile = load_rows(k, key * D, key < T, D, D)
        v_tile = load_rows(v, key * DV, key < T, DV, DV)
        mask = key[None, :] <= row[:, None]
        m_i, l_i, acc = fold_in(q_tile, k_tile, v_tile, mask, scale * LOG2E, m_i, l_i, acc)
    acc, _ = finish(m_i, l_i, acc)
    store_rows(out, row * DV, acc, row < T, DV, DV)


@triton.jit
def flash_backwards(
    q, k, v, out, T, scale, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """From the newest tile of keys to the oldest, and -1e30 for -inf."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    q_tile = load_rows(q, row * D, row < T, D, D) * scale
    high = tl.minimum(tl.program_id(0) * M + M, T)
    m_i = tl.full([M], -1e30, tl.float32)
    l_i = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV], tl.float32)
    for step in range(tl.cdiv(high, N)):
        key = (tl.cdiv(high, N) - 1 - step) * N + tl.arange(0, N)
        k_tile = load_rows(k, key * D, key < high, D, D)
        v_tile = load_rows(v, key * DV, key < high, DV, DV)
        mask = (key[None, :] <= row[:, None]) & (key < high)[None, :]
        s = tl.where(mask, tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"), -1e30)
        m_new = tl.maximum(m_i, tl.max(s, 1))
        p = tl.where(mask, tl.exp(s - m_new[:, None]), 0.0)
        acc = acc * tl.exp(m_i - m_new)[:, None] + tl.dot(p, v_tile, input_precision="ieee")
        l_i = l_i * tl.exp(m_i - m_new) + tl.sum(p, 1)
        m_i = m_new
    acc = acc / tl.where(row < T, l_i, 1.0)[:, None]
    store_rows(out, row * DV, acc, row < T, DV, DV)


@triton.jit
def flash_in_two_walks(
    q, k, v, out, T, scale, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """First the largest score of each row, then one sum with it."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    high = tl.minimum(tl.program_id(0) * M + M, T)
    q_tile = load_rows(q, row * D, row < T, D, D) * scale
    top = tl.full([M], -float("inf"), tl.float32)
    for first in range(0, high, N):
        top = tl.maximum(top, tl.max(causal_scores(q_tile, k, row, first, T, D, N), 1))
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV], tl.float32)
    for first in range(0, high, N):
        key = first + tl.arange(0, N)
        p = tl.exp(causal_scores(q_tile, k, row, first, T, D, N) - top[:, None])
        total += tl.sum(p, 1)
        v_tile = load_rows(v, key * DV, key < T, DV, DV)
        acc = tl.dot(p, v_tile, acc, input_precision="ieee")
    store_rows(out, row * DV, acc / total[:, None], row < T, DV, DV)


@triton.jit
def causal_scores(q_tile, k, row, first, T, D: tl.constexpr, N: tl.constexpr):
    """The scores [M, N] of one tile of keys, -inf after the query."""
    key = first + tl.arange(0, N)
    k_tile = load_rows(k, key * D, key < T, D, D)
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    return tl.where(key[None, :] <= row[:, None], s, -float("inf"))


def keys_before_the_tile(q, k, v, out, scale, M, N):
    """Query by query in PyTorch; nothing of the query's own tile."""
    for t in range(len(q)):
        seen = t // M * M
        p = (k[:seen] @ q[t] * scale).softmax(0)
        out[t] = p @ v[:seen] if seen else torch.nan


def scale_lost(q, k, v, out, scale, M, N):
    """A right kernel, and 1 in place of scale."""
    mistakes.launch_flash(flash_backwards)(q, k, v, out, 1.0, M, N)


@triton.jit
def flash_by_sums(
    q, k, v, out, T, scale, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """One key at a time: sums in place of matrix products, and the mask as a weight of 0."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    d = tl.arange(0, D)
    e = tl.arange(0, DV)
    real = row < T
    q_tile = tl.load(q + row[:, None] * D + d[None, :], mask=real[:, None], other=0.0)
    m_i = tl.full([M], -1e30, tl.float32)
    l_i = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV], tl.float32)
    for key in range(tl.minimum(tl.program_id(0) * M + M, T)):
        s = tl.sum(q_tile * tl.load(k + key * D + d)[None, :], 1) * scale
        seen = key <= row
        m_new = tl.where(seen, tl.maximum(m_i, s), m_i)
        p = tl.where(seen, tl.exp(tl.where(seen, s, m_new) - m_new), 0.0)
        alpha = tl.exp(m_i - m_new)
        l_i = l_i * alpha + p
        acc = acc * alpha[:, None] + p[:, None] * tl.load(v + key * DV + e)[None, :]
        m_i = m_new
    to = out + row[:, None] * DV + e[None, :]
    tl.store(to, acc / tl.where(real, l_i, 1.0)[:, None], mask=real[:, None])


@triton.jit
def flash_of_all_queries(
    q, k, v, out, T, scale, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """Every program goes over all tiles of queries."""
    for first_query in range(0, T, M):
        row = first_query + tl.arange(0, M)
        q_tile = load_rows(q, row * D, row < T, D, D) * scale
        top = tl.full([M], -float("inf"), tl.float32)
        for first in range(0, tl.minimum(first_query + M, T), N):
            top = tl.maximum(top, tl.max(causal_scores(q_tile, k, row, first, T, D, N), 1))
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, DV], tl.float32)
        for first in range(0, tl.minimum(first_query + M, T), N):
            key = first + tl.arange(0, N)
            p = tl.exp(causal_scores(q_tile, k, row, first, T, D, N) - top[:, None])
            total += tl.sum(p, 1)
            v_tile = load_rows(v, key * DV, key < T, DV, DV)
            acc = tl.dot(p, v_tile, acc, input_precision="ieee")
        store_rows(out, row * DV, acc / total[:, None], row < T, DV, DV)


def flash_in_pytorch(q, k, v, out, scale, M, N):
    """Right, tile of queries by tile of queries, and no kernel."""
    for t in torch.arange(len(q)).split(M):
        seen = slice(0, int(t[-1]) + 1)
        hidden = torch.arange(seen.stop) > t[:, None]
        p = (q[t] @ k[seen].T * scale).masked_fill(hidden, -torch.inf).softmax(1)
        out[t] = p @ v[seen]


def flash_beside_a_kernel(q, k, v, out, scale, M, N):
    """A kernel that does nothing, then PyTorch."""
    nothing[(triton.cdiv(len(q), M),)](q)
    flash_in_pytorch(q, k, v, out, scale, M, N)


def flash_with_tiles(change):
    """A right kernel with tiles of its own."""
    right = mistakes.launch_flash(flash_in_two_walks)
    return lambda q, k, v, out, scale, M, N: right(q, k, v, out, scale, *change(M, N))


def scale_from_the_width(q, k, v, out, scale, M, N):
    """A right kernel, and the root of the width in place of scale."""
    mistakes.launch_flash(flash_in_two_walks)(q, k, v, out, q.shape[1] ** -0.5, M, N)


FLASH = [
    *planted(mistakes.FLASH, {"not causal": "query 0 reads all 16 keys"}),
    *planted(
        mistakes.WALKS,
        {
            "as many tiles as programs": (
                "query 16 does not read key 16: the walk takes as many tiles"
            )
        },
    ),
    *planted(
        mistakes.flaws(
            mistakes.flash,
            {
                "last tile left out": "the walk ends before the program's own queries",
                "strictly before the query": "query 0 is NaN: did it find no key",
                "unscaled maximum": "not finite",
                "no maximum": "not finite",
                "no mask on keys and values": "NaN lies in memory around the inputs",
                "no mask at the store": "memory outside of out was changed",
                "tiles after the last query loaded": "and loaded more keys",
            },
        )
    ),
    *planted(
        mistakes.flaws(
            mistakes.flash,
            {
                "maximum from 0 on": "the result is not finite",
                "maximum of the newest tile": "query 0 is NaN",
                "one maximum for all queries": "the result is not finite",
                "-100 for masked scores": "very negative scores: the result is 0",
                "-10000 for masked scores": "scores far below -10000: the result is 0",
            },
        )
    ),
    Wrong("fold_in", mistakes.launch_flash(flash_in_powers_of_2), "fold_in was called"),
    Wrong(
        "every program does everything",
        mistakes.launch_flash(flash_of_all_queries),
        "the last program was left out, and another one wrote its places",
    ),
    Wrong("no kernel", flash_in_pytorch, "no kernel was launched"),
    Wrong("PyTorch beside a kernel", flash_beside_a_kernel, "by something else than the kernel"),
    Wrong(
        "M and N exchanged",
        flash_with_tiles(lambda M, N: (N, M)),
        "1 programs were launched, and 2 were asked for",
    ),
    Wrong(
        "tiles of 16 by 16",
        flash_with_tiles(lambda M, N: (16, 16)),
        "2 programs were launched, and 1 were asked for",
    ),
    Wrong("scale from the width", scale_from_the_width, "wide tiles of keys: out: query 1"),
    Wrong("keys before the tile, in PyTorch", keys_before_the_tile, "before the program's own"),
    Wrong("scale lost at the launch", scale_lost, "not multiplied by scale"),
]

# --- 07.4 ---


@triton.jit
def selected_with_a_branch(
    q,
    k,
    v,
    ids,
    out,
    T,
    S,
    start,
    scale,
    n,
    R: tl.constexpr,
    D: tl.constexpr,
    SELECT_BLOCK_SIZE: tl.constexpr,
):
    """Padding is left out of the walk."""
    i = tl.program_id(0)
    head = tl.arange(0, R)
    rows = (head * T + i) * D
    q_tile = load_rows(q, rows, head < R, D, D)
    m_i = tl.full([R], -float("inf"), tl.float32)
    l_i = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, D], tl.float32)
    for step in range(n):
        j = tl.load(ids + i * n + step)
        if j >= 0:
            key = j * SELECT_BLOCK_SIZE + tl.arange(0, SELECT_BLOCK_SIZE)
            mask = key <= start + i  # a query's own token is the last: no key beyond the end
            k_tile = load_rows(k, key * D, mask, D, D)
            v_tile = load_rows(v, key * D, mask, D, D)
            m_i, l_i, acc = fold_in(
                q_tile, k_tile, v_tile, mask[None, :], scale * LOG2E, m_i, l_i, acc
            )
    acc, _ = finish(m_i, l_i, acc)
    store_rows(out, rows, acc, head < R, D, D)


@triton.jit
def selected_by_hand(
    q,
    k,
    v,
    ids,
    out,
    T,
    S,
    start,
    scale,
    n,
    R: tl.constexpr,
    D: tl.constexpr,
    SELECT_BLOCK_SIZE: tl.constexpr,
):
    """Without fold_in; padding lies beyond the end, and -1e30 stands for -inf."""
    i = tl.program_id(0)
    head = tl.arange(0, R)
    rows = (head * T + i) * D
    q_tile = load_rows(q, rows, head < R, D, D) * scale
    m_i = tl.full([R], -1e30, tl.float32)
    l_i = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, D], tl.float32)
    for step in range(n):
        j = tl.load(ids + i * n + step)
        key = tl.where(j < 0, S, j * SELECT_BLOCK_SIZE) + tl.arange(0, SELECT_BLOCK_SIZE)
        mask = (key < S) & (key <= start + i)
        k_tile = load_rows(k, key * D, mask, D, D)
        v_tile = load_rows(v, key * D, mask, D, D)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        m_new = tl.maximum(m_i, tl.max(tl.where(mask[None, :], s, -1e30), 1))
        p = tl.where(mask[None, :], tl.exp(s - m_new[:, None]), 0.0)
        acc = acc * tl.exp(m_i - m_new)[:, None] + tl.dot(p, v_tile, input_precision="ieee")
        l_i = l_i * tl.exp(m_i - m_new) + tl.sum(p, 1)
        m_i = m_new
    store_rows(out, rows, acc / tl.where(l_i > 0, l_i, 1.0)[:, None], head < R, D, D)


@triton.jit
def selected_by_sums(
    q,
    k,
    v,
    ids,
    out,
    T,
    S,
    start,
    scale,
    n,
    R: tl.constexpr,
    D: tl.constexpr,
    SELECT_BLOCK_SIZE: tl.constexpr,
):
    """Sums in place of matrix products; the first walk over the ids only finds the maximum."""
    i = tl.program_id(0)
    head = tl.arange(0, R)
    rows = (head * T + i) * D
    q_tile = load_rows(q, rows, head < R, D, D)
    top = tl.full([R], -float("inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, D], tl.float32)
    for step in range(2 * n):
        j = tl.load(ids + i * n + step % n)
        key = tl.maximum(j, 0) * SELECT_BLOCK_SIZE + tl.arange(0, SELECT_BLOCK_SIZE)
        k_tile = load_rows(k, key * D, (key < S) & (j >= 0), D, D)
        v_tile = load_rows(v, key * D, (key < S) & (j >= 0), D, D)
        s = tl.sum(k_tile[None, :, :] * q_tile[:, None, :], 2) * scale  # [R, l']
        s = tl.where(((key <= start + i) & (j >= 0))[None, :], s, -float("inf"))
        if step < n:
            top = tl.maximum(top, tl.max(s, 1))
        else:
            p = tl.exp(s - tl.where(top == -float("inf"), 0.0, top)[:, None])
            total += tl.sum(p, 1)
            acc += tl.sum(p[:, :, None] * v_tile[None, :, :], 1)
    store_rows(out, rows, acc / tl.where(total > 0, total, 1.0)[:, None], head < R, D, D)


def position_lost(q, k, v, ids, out, start, scale, select_block_size):
    """A right kernel, and 0 in place of start."""
    mistakes.launch_selected(selected_by_hand)(q, k, v, ids, out, 0, scale, select_block_size)


def selected_in_pytorch(q, k, v, ids, out, start, scale, select_block_size):
    """Right, query by query, and no kernel."""
    for i, row in enumerate(ids.tolist()):
        tokens = range(start + i + 1)
        seen = [s for s in tokens if s // select_block_size in row]
        out[:, i] = (q[:, i] @ k[seen].T * scale).softmax(1) @ v[seen] if seen else 0.0


def selected_beside_a_kernel(q, *others):
    """A kernel that does nothing, then PyTorch."""
    nothing[(q.shape[1],)](q)
    selected_in_pytorch(q, *others)


def selected_by_package(q, k, v, ids, out, start, scale, select_block_size):
    """The package's own launcher, and a copy."""
    sizes = dict(select_block_size=select_block_size, scale=scale, start=start)
    out[:] = kernels.selected_attention(
        q[None], k[None, None], v[None, None], ids[None, None], **sizes
    )[0]


def selected_with(**own):
    """A right kernel with sizes of its own."""

    def selected_attention(q, k, v, ids, out, start, scale, select_block_size):
        R, T, D = q.shape
        sizes = dict(R=R, D=D, SELECT_BLOCK_SIZE=select_block_size) | own
        numbers = (T, len(k), start, scale, ids.shape[1])
        selected_with_a_branch[(T,)](q, k, v, ids, out, *numbers, **sizes)

    return selected_attention


@triton.jit
def selected_of_block_0(
    q,
    k,
    v,
    ids,
    out,
    T,
    S,
    start,
    scale,
    n,
    R: tl.constexpr,
    D: tl.constexpr,
    SELECT_BLOCK_SIZE: tl.constexpr,
):
    """For -1 block 0 is loaded, and masked."""
    i = tl.program_id(0)
    head = tl.arange(0, R)
    rows = (head * T + i) * D
    q_tile = load_rows(q, rows, head < R, D, D)
    m_i = tl.full([R], -float("inf"), tl.float32)
    l_i = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, D], tl.float32)
    for step in range(n):
        j = tl.load(ids + i * n + step)
        key = tl.maximum(j, 0) * SELECT_BLOCK_SIZE + tl.arange(0, SELECT_BLOCK_SIZE)
        k_tile = load_rows(k, key * D, key < S, D, D)
        v_tile = load_rows(v, key * D, key < S, D, D)
        mask = ((j >= 0) & (key <= start + i))[None, :]
        m_i, l_i, acc = fold_in(q_tile, k_tile, v_tile, mask, scale * LOG2E, m_i, l_i, acc)
    acc, _ = finish(m_i, l_i, acc)
    store_rows(out, rows, acc, head < R, D, D)


SELECTED = [
    *planted(mistakes.SELECTED, {"one token ahead": "query 0 is token 1, and reads token 2"}),
    *planted([mistakes.LAST_ID]),
    *planted(
        mistakes.flaws(
            mistakes.selected,
            {
                "-1 read before it is masked": "before the first key or of block 0",
                "no mask at the end of the keys": "NaN lies in memory around the inputs",
                "divided by 0": "query 0 chose nothing, and its output is NaN",
            },
        )
    ),
    Wrong(
        "block 0 loaded for -1",
        mistakes.launch_selected(selected_of_block_0),
        "before the first key or of block 0",
    ),
    Wrong("no kernel", selected_in_pytorch, "no kernel was launched"),
    Wrong("PyTorch beside a kernel", selected_beside_a_kernel, "by something else than the kernel"),
    Wrong("the package's", selected_by_package, "by something else than the kernel"),
    Wrong("heads of width 16", selected_with(D=16), "wide heads: query 0 of out was never written"),
    Wrong("16 heads", selected_with(R=16), "many heads: query 0 of out was never written"),
    Wrong("blocks of 16", selected_with(SELECT_BLOCK_SIZE=16), "large blocks: out: head 0, query"),
    Wrong("start lost at the launch", position_lost, "was taken for token 0"),
]

# --- 07.5 ---


def union_by_pairs(ids):
    """All pairs of ids."""
    block = ids.flatten()
    token = torch.arange(len(block)) // ids.shape[1]
    same = (block[:, None] == block) & (block >= 0)
    new = (block >= 0) & ~same.tril(-1).any(1)
    bits = sum((same[:, token == u].any(1).int() << u for u in range(len(ids))), 0 * block)
    return (block * 16 + bits)[new].tolist()


def union_by_sets(ids):
    """A set for each token, and one walk over all."""
    rows = ids.tolist()
    sets = [set(row) for row in rows]
    found = []
    for row in rows:
        for j in row:
            entry = 16 * j + sum((j in s) << u for u, s in enumerate(sets))
            if j >= 0 and entry not in found:
                found.append(entry)
    return found


def union_by_table(ids):
    """A table of tokens and blocks; the order from where each block stands first."""
    if int(ids.max()) < 0:
        return []
    reads = (ids[:, :, None] == torch.arange(int(ids.max()) + 1)).any(1)  # (U, J)
    bits = (reads.int() * 2 ** torch.arange(len(ids))[:, None]).sum(0)
    flat = ids.flatten().tolist()
    blocks = sorted(reads.any(0).nonzero().flatten().tolist(), key=flat.index)
    return [16 * j + int(bits[j]) for j in blocks]


def union_by_unique(ids):
    """torch.unique: the blocks ascend."""
    real, place = torch.unique(ids[ids >= 0], return_inverse=True)
    token = (torch.arange(ids.numel()) // ids.shape[1]).view(ids.shape)[ids >= 0]
    bits = torch.zeros(len(real), dtype=torch.int64).index_add_(0, place, 2**token)
    return (16 * real + bits).tolist()


def union_with_padding(ids):
    """-1 as a block like others."""
    return union_by_sets(ids + 1)


def union_by_columns(ids):
    """The first blocks of all tokens, then the second ones."""
    entries = {entry // 16: entry for entry in union_by_sets(ids)}
    flat = ids.T.flatten().tolist()
    return [entries[j] for j in dict.fromkeys(flat) if j >= 0]


def union_of_two(ids):
    """Bits of the first two tokens."""
    return [entry // 16 * 16 + entry % 4 for entry in union_by_sets(ids)]


UNIONS = [
    *planted(mistakes.UNIONS),
    Wrong("by torch.unique", union_by_unique, "in order of the blocks, not of their first"),
    Wrong("one block on", union_with_padding, "nothing shared: entry 0: got 17, which is wrong"),
    Wrong("column by column", union_by_columns, "place by place, not token by token"),
    Wrong("two tokens", union_of_two, "the bits are left out"),
    Wrong(
        "bits in base 2",
        lambda ids: [f"{entry:b}" for entry in union_by_sets(ids)],
        "the function returned a str, and an int was asked for",
    ),
    Wrong(
        "pairs",
        lambda ids: [(entry // 16, entry % 16) for entry in union_by_sets(ids)],
        "entry 0: the function returned a",
    ),
    Wrong(
        "how many",
        lambda ids: len(union_by_sets(ids)),
        "the function returned an int, and a list was asked for",
    ),
    Wrong(
        "one too few",
        lambda ids: union_by_sets(ids)[:-1],
        "the list has 3 entries: too few",
    ),
]

RIGHT = {
    "07.1": [
        mistakes.launch_add(kernel) for kernel in (add_by_pointers, add_by_fma, add_one_by_one)
    ],
    "07.2": [
        mistakes.launch_softmax(kernel)
        for kernel in (softmax_in_powers_of_2, softmax_by_log_sum, softmax_by_walking)
    ],
    "07.3": [
        mistakes.launch_flash(kernel)
        for kernel in (flash_by_sums, flash_backwards, flash_in_two_walks)
    ],
    "07.4": [
        mistakes.launch_selected(kernel)
        for kernel in (selected_with_a_branch, selected_by_hand, selected_by_sums)
    ],
    "07.5": [union_by_pairs, union_by_sets, union_by_table],
}
WRONG = {"07.1": ADD, "07.2": SOFTMAX, "07.3": FLASH, "07.4": SELECTED, "07.5": UNIONS}
