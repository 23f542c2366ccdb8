"""Set 07's answers, for teachers: right ones in several styles, and wrong ones to be named.

The mistakes of mistakes.py are planted as they stand, and so are other flaws of its kernels, which
a check names by what they leave in memory. A few are written by hand, in other styles, so that no
mistake is judged by itself alone.
"""

import kernels  # noqa: F401  before triton: without a GPU it turns the interpreter on

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
                "empty row": "row 0 may use nothing, and its weights are NaN",
            },
        )
    ),
    Wrong("scale lost at the launch", scale_lost_at_the_launch, "not multiplied by scale"),
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
        k_tile = load_rows(k, key * D, key < S, D, D)
        v_tile = load_rows(v, key * D, key < S, D, D)
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


SELECTED = [
    *planted(mistakes.SELECTED, {"one token ahead": "query 0 is token 1, and reads token 2"}),
    *planted([mistakes.LAST_ID]),
    *planted(
        mistakes.flaws(
            mistakes.selected,
            {
                "-1 read before it is masked": "block -1 lies before the first key",
                "no mask at the end of the keys": "NaN lies in memory around the inputs",
                "divided by 0": "query 0 chose nothing, and its output is NaN",
            },
        )
    ),
    Wrong("start lost at the launch", position_lost, "was taken for token 0"),
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
        for kernel in (flash_in_powers_of_2, flash_backwards, flash_in_two_walks)
    ],
    "07.4": [
        mistakes.launch_selected(kernel)
        for kernel in (selected_with_a_branch, selected_by_hand, selected_by_sums)
    ],
}
WRONG = {"07.1": ADD, "07.2": SOFTMAX, "07.3": FLASH, "07.4": SELECTED}
