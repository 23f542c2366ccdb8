"""Planted wrong answers that the checks of set 07 must name, and right ones they must accept.

A wrong kernel is the right one with one step changed, by a flag that the compiler sees.
"""

import kernels  # noqa: F401, I001  before triton: without a GPU it turns the interpreter on
import triton
import triton.language as tl
from exercises.records import Wrong
from kernels.tile import LOG2E, finish, fold_in

# --- 07.1 ---


@triton.jit
def add_by_pointers(x, y, out, a, size, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    x, y, out = x + first, y + first, out + first
    place = tl.arange(0, BLOCK)
    value = a * tl.load(x + place, mask=place < size - first, other=0.0)
    value += tl.load(y + place, mask=place < size - first, other=0.0)
    tl.store(out + place, value, mask=place < size - first)


@triton.jit
def add_by_fma(x, y, out, a, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK) + BLOCK * tl.program_id(0)
    b = tl.load(y + at, mask=at < size)
    tl.store(out + at, tl.fma(tl.load(x + at, mask=at < size), tl.full([BLOCK], a, tl.float32), b),
             mask=at < size)


@triton.jit
def add_one_by_one(x, y, out, a, size, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    for place in range(first, tl.minimum(first + BLOCK, size)):
        tl.store(out + place, tl.load(y + place) + tl.load(x + place) * a)


@triton.jit
def wrong_add(x, y, out, a, size, BLOCK: tl.constexpr, FLAW: tl.constexpr):
    program, place = tl.program_id(0), tl.arange(0, BLOCK)
    at = program * BLOCK + place
    if FLAW == "first block only":
        at = place
    elif FLAW == "steps of one":
        at = program + place
    real = at < size
    if FLAW == "one too many":
        real = at <= size
    elif FLAW == "place in the block":
        real = place < size
    elif FLAW == "last left out":
        real = at < size - 1
    x_, y_ = tl.load(x + at, mask=real, other=0.0), tl.load(y + at, mask=real, other=0.0)
    value = a * x_ + y_
    if FLAW == "sum times a":
        value = a * (x_ + y_)
    elif FLAW == "y times a":
        value = x_ + a * y_
    if FLAW == "no mask":
        tl.store(out + at, value)
    elif FLAW == "into y":
        tl.store(y + at, value, mask=real)
    else:
        tl.store(out + at, value, mask=real)


def add(kernel, **flaw):
    def scaled_add(x, y, out, a, block):
        kernel[(triton.cdiv(len(x), block),)](x, y, out, a, len(x), BLOCK=block, **flaw)

    scaled_add.__name__ = kernel.__name__
    return scaled_add


def unknown_name(x, y, out, a, block):
    raise NameError("name 'program_id' is not defined")


ADD = [
    Wrong("no mask at the store", add(wrong_add, FLAW="no mask"),
          "outside of out was changed, 2 places:"),
    Wrong("mask one too long", add(wrong_add, FLAW="one too many"),
          "outside of out was changed, 1 place:"),
    Wrong("mask on the place in the block", add(wrong_add, FLAW="place in the block"),
          "outside of out was changed, 2 places:"),
    Wrong("last number left out", add(wrong_add, FLAW="last left out"),
          "place 7 of out was never written"),
    Wrong("program number not used", add(wrong_add, FLAW="first block only"),
          "only the first block was written"),
    Wrong("programs one place apart", add(wrong_add, FLAW="steps of one"), "was never written"),
    Wrong("a times the sum", add(wrong_add, FLAW="sum times a"), "a multiplied the sum"),
    Wrong("a times y", add(wrong_add, FLAW="y times a"), "a multiplied y"),
    Wrong("written into y", add(wrong_add, FLAW="into y"), "place 0 of out was never written"),
    Wrong("a name that is not there", unknown_name, "NameError"),
]

# --- 07.2 ---


@triton.jit
def softmax_in_powers_of_2(s, seen, out, s_row, out_row, scale, WIDTH: tl.constexpr,
                           PADDED: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, PADDED)
    real = column < tl.load(seen + row)
    x = tl.load(s + row * s_row + column, mask=real, other=0.0)
    x = tl.where(real, x * (scale * 1.4426950408889634), -float("inf"))
    p = tl.where(real, tl.exp2(x - tl.max(tl.where(real, x, -1e30), 0)), 0.0)
    p = p / tl.maximum(tl.sum(p, 0), 1e-30)
    tl.store(out + row * out_row + column, p, mask=column < WIDTH)


@triton.jit
def softmax_by_log_sum(s, seen, out, s_row, out_row, scale, WIDTH: tl.constexpr,
                       PADDED: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, PADDED)
    count = tl.load(seen + row)
    if count == 0:
        tl.store(out + row * out_row + column, tl.zeros([PADDED], tl.float32), mask=column < WIDTH)
    else:
        real = column < count
        x = tl.load(s + row * s_row + column, mask=real, other=-float("inf")).to(tl.float64) * scale
        top = tl.max(x, 0)
        p = tl.exp(x - (top + tl.log(tl.sum(tl.exp(x - top), 0))))
        tl.store(out + row * out_row + column, p, mask=column < WIDTH)


@triton.jit
def softmax_by_walking(s, seen, out, s_row, out_row, scale, WIDTH: tl.constexpr,
                       PADDED: tl.constexpr):
    s, out = s + tl.program_id(0) * s_row, out + tl.program_id(0) * out_row
    count = tl.load(seen + tl.program_id(0))
    m, total = -float("inf"), 0.0
    for i in range(count):
        x = tl.load(s + i) * scale
        new = tl.maximum(m, x)
        total = total * tl.exp(m - new) + tl.exp(x - new)
        m = new
    for i in range(WIDTH):
        if i < count:
            tl.store(out + i, tl.exp(tl.load(s + i) * scale - m) / total)
        else:
            tl.store(out + i, 0.0)


@triton.jit
def wrong_softmax(s, seen, out, s_row, out_row, scale, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                  FLAW: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, PADDED)
    count, hidden, factor = tl.load(seen + row), -float("inf"), scale
    if FLAW == "whole row":
        count = WIDTH
    elif FLAW == "last left out":
        count = count - 1
    if FLAW == "zero":
        hidden = 0.0
    if FLAW == "no scale":
        factor = 1.0
    start = row * WIDTH if FLAW == "rows side by side" else row * s_row
    x = tl.load(s + start + column, mask=column < count, other=hidden)
    if FLAW == "no load mask":
        x = tl.load(s + start + column)
    top = tl.max(x, 0) if FLAW == "unscaled maximum" else tl.max(x * factor, 0)
    if FLAW == "no maximum":
        top = 0.0
    if FLAW != "empty row":
        top = tl.where(top == -float("inf"), 0.0, top)
    if FLAW == "base 2":
        p = tl.exp2(x * factor - top)
    else:
        p = tl.exp(x * factor - top)
    total = tl.sum(p, 0)
    if FLAW != "empty row":
        total = tl.where(total > 0, total, 1.0)
    if FLAW == "not divided":
        total = 1.0
    p = p / total
    if FLAW == "zero":
        p = tl.where(column < count, p, 0.0)
    limit = PADDED if FLAW == "no store mask" else WIDTH
    tl.store(out + row * out_row + column, p, mask=column < limit)


@triton.jit
def seen_numbers_only(s, seen, out, s_row, out_row, scale, WIDTH: tl.constexpr,
                      PADDED: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, PADDED)
    real = column < tl.load(seen + row)
    x = tl.load(s + row * s_row + column, mask=real, other=-float("inf")) * scale
    p = tl.exp(x - tl.max(x, 0))
    tl.store(out + row * out_row + column, p / tl.sum(p, 0), mask=real)


def softmax(kernel, **flaw):
    def masked_softmax(s, seen, out, scale):
        kernel[(len(s),)](s, seen, out, s.stride(0), out.stride(0), scale, WIDTH=s.shape[1],
                          PADDED=triton.next_power_of_2(s.shape[1]), **flaw)

    masked_softmax.__name__ = kernel.__name__
    return masked_softmax


SOFTMAX = [
    Wrong("0 for masked scores", softmax(wrong_softmax, FLAW="zero"),
          "0 stands in the place of numbers"),
    Wrong("count ignored", softmax(wrong_softmax, FLAW="whole row"),
          "row 0 may use its first 3 numbers, and column 3 got weight"),
    Wrong("last allowed number left out", softmax(wrong_softmax, FLAW="last left out"),
          "the last number that the row may use was left out"),
    Wrong("no mask at the load", softmax(wrong_softmax, FLAW="no load mask"),
          "row 0 may use its first 3 numbers, and column 3 got weight"),
    Wrong("no mask at the store", softmax(wrong_softmax, FLAW="no store mask"),
          "memory outside of out was changed"),
    Wrong("stride of the rows ignored", softmax(wrong_softmax, FLAW="rows side by side"),
          "NaN lies in memory around the inputs"),
    Wrong("unscaled maximum", softmax(wrong_softmax, FLAW="unscaled maximum"),
          "the weights are all 0"),
    Wrong("no maximum", softmax(wrong_softmax, FLAW="no maximum"), "the weights are not finite"),
    Wrong("exp2 for exp", softmax(wrong_softmax, FLAW="base 2"), "of another base"),
    Wrong("no scale", softmax(wrong_softmax, FLAW="no scale"), "not multiplied by scale"),
    Wrong("not divided", softmax(wrong_softmax, FLAW="not divided"), "not divided by their sum"),
    Wrong("empty row", softmax(wrong_softmax, FLAW="empty row"),
          "row 0 may use nothing, and its weights are NaN"),
    Wrong("only allowed places written", softmax(seen_numbers_only),
          "row 0 of out was never written"),
]

# --- 07.3 ---


@triton.jit
def flash_in_powers_of_2(q, k, v, out, T, scale, D: tl.constexpr, DV: tl.constexpr,
                         M: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0) * M + tl.arange(0, M)
    d, e = tl.arange(0, D), tl.arange(0, DV)
    q_tile = tl.load(q + row[:, None] * D + d[None, :], mask=(row < T)[:, None], other=0.0)
    m, total = tl.full([M], -float("inf"), tl.float32), tl.zeros([M], tl.float32)
    o = tl.zeros([M, DV], tl.float32)
    for first in range(0, tl.minimum(tl.program_id(0) * M + M, T), N):
        key = first + tl.arange(0, N)
        k_tile = tl.load(k + key[:, None] * D + d[None, :], mask=(key < T)[:, None], other=0.0)
        v_tile = tl.load(v + key[:, None] * DV + e[None, :], mask=(key < T)[:, None], other=0.0)
        m, total, o = fold_in(q_tile, k_tile, v_tile, key[None, :] <= row[:, None], scale * LOG2E,
                              m, total, o)
    o, _ = finish(m, total, o)
    tl.store(out + row[:, None] * DV + e[None, :], o, mask=(row < T)[:, None])


@triton.jit
def flash_backwards(q, k, v, out, T, scale, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr,
                    N: tl.constexpr):
    # from the newest tile of keys to the oldest, and the keys come transposed
    row, d, e = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, D), tl.arange(0, DV)
    real = (row < T)[:, None]
    q_tile = tl.load(q + row[:, None] * D + d[None, :], mask=real, other=0.0) * scale
    high, m = tl.minimum(tl.program_id(0) * M + M, T), tl.full([M], -1e30, tl.float32)
    total, o = tl.zeros([M], tl.float32), tl.zeros([M, DV], tl.float32)
    for step in range(tl.cdiv(high, N)):
        key = (tl.cdiv(high, N) - 1 - step) * N + tl.arange(0, N)
        inside = key < high
        k_tile = tl.load(k + key[None, :] * D + d[:, None], mask=inside[None, :], other=0.0)
        v_tile = tl.load(v + key[:, None] * DV + e[None, :], mask=inside[:, None], other=0.0)
        visible = (key[None, :] <= row[:, None]) & inside[None, :]
        s = tl.where(visible, tl.dot(q_tile, k_tile, input_precision="ieee"), -1e30)
        new = tl.maximum(m, tl.max(s, 1))
        p = tl.where(visible, tl.exp(s - new[:, None]), 0.0)
        o = o * tl.exp(m - new)[:, None] + tl.dot(p, v_tile, input_precision="ieee")
        total, m = total * tl.exp(m - new) + tl.sum(p, 1), new
    o = o / tl.where(real, total[:, None], 1.0)
    tl.store(out + row[:, None] * DV + e[None, :], o, mask=real)


@triton.jit
def flash_in_two_walks(q, k, v, out, T, scale, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr,
                       N: tl.constexpr):
    # first the largest score of each row, then one sum with it
    row, d, e = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, D), tl.arange(0, DV)
    q_tile = tl.load(q + row[:, None] * D + d[None, :], mask=(row < T)[:, None], other=0.0)
    top, total = tl.full([M], -float("inf"), tl.float32), tl.zeros([M], tl.float32)
    o, high = tl.zeros([M, DV], tl.float32), tl.minimum(tl.program_id(0) * M + M, T)
    for first in range(0, high, N):
        key = first + tl.arange(0, N)
        k_tile = tl.load(k + key[:, None] * D + d[None, :], mask=(key < T)[:, None], other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        s = tl.where(key[None, :] <= row[:, None], s, -float("inf"))
        top = tl.maximum(top, tl.max(s, 1))
    for first in range(0, high, N):
        key = first + tl.arange(0, N)
        k_tile = tl.load(k + key[:, None] * D + d[None, :], mask=(key < T)[:, None], other=0.0)
        v_tile = tl.load(v + key[:, None] * DV + e[None, :], mask=(key < T)[:, None], other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        p = tl.where(key[None, :] <= row[:, None], tl.exp(s - top[:, None]), 0.0)
        total += tl.sum(p, 1)
        o = tl.dot(p, v_tile, o, input_precision="ieee")
    tl.store(out + row[:, None] * DV + e[None, :], o / total[:, None], mask=(row < T)[:, None])


@triton.jit
def wrong_flash(q, k, v, out, T, scale, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr,
                N: tl.constexpr, FLAW: tl.constexpr):
    program = tl.program_id(0)
    row, d, e = program * M + tl.arange(0, M), tl.arange(0, D), tl.arange(0, DV)
    real = (row < T)[:, None]
    q_tile = tl.load(q + row[:, None] * D + d[None, :], mask=real, other=0.0)
    m, total = tl.full([M], -float("inf"), tl.float32), tl.zeros([M], tl.float32)
    o, high = tl.zeros([M, DV], tl.float32), tl.minimum(program * M + M, T)
    if FLAW == "all tiles":
        high = T
    elif FLAW == "own tile left out":
        high = program * M
    elif FLAW == "as many tiles as programs":
        high = (program + 1) * N
    for first in range(0, high, N):
        key = first + tl.arange(0, N)
        inside = (key < (T + N if FLAW == "no mask on keys" else T))[:, None]
        k_tile = tl.load(k + key[:, None] * D + d[None, :], mask=inside, other=0.0)
        v_tile = tl.load(v + key[:, None] * DV + e[None, :], mask=inside, other=0.0)
        raw = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        s = raw if FLAW == "no scale" else raw * scale
        visible = key[None, :] <= row[:, None]
        if FLAW == "not causal":
            visible = (key < T)[None, :] & (row >= 0)[:, None]
        elif FLAW == "strictly before":
            visible = key[None, :] < row[:, None]
        elif FLAW == "one ahead":
            visible = key[None, :] <= row[:, None] + 1
        s, raw = tl.where(visible, s, -float("inf")), tl.where(visible, raw, -float("inf"))
        new = tl.maximum(m, tl.max(raw if FLAW == "unscaled maximum" else s, 1))
        if FLAW == "no maximum":
            new = tl.zeros([M], tl.float32)
        if FLAW == "base 2":
            p, shrink = tl.exp2(s - new[:, None]), tl.exp2(m - new)
        elif FLAW == "mixed bases":
            p, shrink = tl.exp2((s - new[:, None]) * LOG2E), tl.exp2(m - new)
        else:
            p, shrink = tl.exp(s - new[:, None]), tl.exp(m - new)
        if FLAW == "no maximum":
            shrink = tl.full([M], 1.0, tl.float32)
        total = (total if FLAW == "total not shrunk" else total * shrink) + tl.sum(p, 1)
        o = o if FLAW == "out not shrunk" else o * shrink[:, None]
        o = o + tl.dot(p, v_tile, input_precision="ieee")
        m = new
    if FLAW != "not divided":
        o = o / total[:, None]
    if FLAW == "no store mask":
        tl.store(out + row[:, None] * DV + e[None, :], o)
    else:
        tl.store(out + row[:, None] * DV + e[None, :], o, mask=real)


def flash(kernel, **flaw):
    def flash_attention(q, k, v, out, scale, M, N):
        kernel[(triton.cdiv(len(q), M),)](q, k, v, out, len(q), scale, D=q.shape[1], DV=v.shape[1],
                                          M=M, N=N, **flaw)

    flash_attention.__name__ = kernel.__name__
    return flash_attention


FLASH = [
    Wrong("not causal", flash(wrong_flash, FLAW="not causal"), "query 0 reads all 16 keys"),
    Wrong("strictly before the query", flash(wrong_flash, FLAW="strictly before"),
          "query 0 is NaN: did it find no key"),
    Wrong("one token ahead", flash(wrong_flash, FLAW="one ahead"), "query 0 reads key 1"),
    Wrong("no scale", flash(wrong_flash, FLAW="no scale"), "not multiplied by scale"),
    Wrong("exp2 for exp", flash(wrong_flash, FLAW="base 2"), "of another base"),
    Wrong("unscaled maximum", flash(wrong_flash, FLAW="unscaled maximum"), "not finite"),
    Wrong("no maximum", flash(wrong_flash, FLAW="no maximum"), "not finite"),
    Wrong("out not shrunk", flash(wrong_flash, FLAW="out not shrunk"), "out was not made smaller"),
    Wrong("total not shrunk", flash(wrong_flash, FLAW="total not shrunk"),
          "total was not made smaller"),
    Wrong("shrunk in base 2, weights in base e", flash(wrong_flash, FLAW="mixed bases"),
          "made smaller in base 2"),
    Wrong("not divided", flash(wrong_flash, FLAW="not divided"), "out was not divided by total"),
    Wrong("no mask on keys and values", flash(wrong_flash, FLAW="no mask on keys"),
          "NaN lies in memory around the inputs"),
    Wrong("no mask at the store", flash(wrong_flash, FLAW="no store mask"),
          "memory outside of out was changed"),
    Wrong("own tile left out", flash(wrong_flash, FLAW="own tile left out"),
          "the walk ends before the program's own queries"),
    Wrong("as many tiles as programs", flash(wrong_flash, FLAW="as many tiles as programs"),
          "query 16 does not read key 16: the walk takes as many tiles"),
    Wrong("tiles after the last query loaded", flash(wrong_flash, FLAW="all tiles"),
          "and loaded more keys"),
]

# --- 07.4 ---


@triton.jit
def selected_with_a_branch(q, k, v, ids, out, T, S, start, scale, n, R: tl.constexpr,
                           D: tl.constexpr, SELECT: tl.constexpr):
    i, d = tl.program_id(0), tl.arange(0, D)
    rows = (tl.arange(0, R) * T + i)[:, None] * D + d[None, :]
    q_tile = tl.load(q + rows)
    m, total = tl.full([R], -float("inf"), tl.float32), tl.zeros([R], tl.float32)
    o = tl.zeros([R, D], tl.float32)
    for e in range(n):
        j = tl.load(ids + i * n + e)
        if j >= 0:
            key = j * SELECT + tl.arange(0, SELECT)
            seen = key <= start + i  # a query's own token is the last: no key beyond the end
            at = key[:, None] * D + d[None, :]
            k_tile = tl.load(k + at, mask=seen[:, None], other=0.0)
            v_tile = tl.load(v + at, mask=seen[:, None], other=0.0)
            m, total, o = fold_in(q_tile, k_tile, v_tile, seen[None, :], scale * LOG2E, m, total, o)
    o, _ = finish(m, total, o)
    tl.store(out + rows, o)


@triton.jit
def selected_by_hand(q, k, v, ids, out, T, S, start, scale, n, R: tl.constexpr, D: tl.constexpr,
                     SELECT: tl.constexpr):
    i, d = tl.program_id(0), tl.arange(0, D)
    q_tile = tl.load(q + tl.arange(0, R)[:, None] * T * D + i * D + d[None, :]) * scale
    m, total = tl.full([R], -1e30, tl.float32), tl.zeros([R], tl.float32)
    o = tl.zeros([R, D], tl.float32)
    for e in range(n):
        j = tl.load(ids + i * n + e)
        key = tl.where(j < 0, S, j * SELECT) + tl.arange(0, SELECT)  # padding: beyond the end
        real = (key < S) & (key <= start + i)
        k_tile = tl.load(k + key[None, :] * D + d[:, None], mask=real[None, :], other=0.0)
        v_tile = tl.load(v + key[:, None] * D + d[None, :], mask=real[:, None], other=0.0)
        s = tl.where(real[None, :], tl.dot(q_tile, k_tile, input_precision="ieee"), -1e30)
        new = tl.maximum(m, tl.max(s, 1))
        p = tl.where(real[None, :], tl.exp(s - new[:, None]), 0.0)
        o = o * tl.exp(m - new)[:, None] + tl.dot(p, v_tile, input_precision="ieee")
        total, m = total * tl.exp(m - new) + tl.sum(p, 1), new
    o = o / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + tl.arange(0, R)[:, None] * T * D + i * D + d[None, :], o)


@triton.jit
def selected_by_sums(q, k, v, ids, out, T, S, start, scale, n, R: tl.constexpr, D: tl.constexpr,
                     SELECT: tl.constexpr):
    # sums in place of matrix products, and plain weights first: two walks over the ids
    i, d, key = tl.program_id(0), tl.arange(0, D), tl.arange(0, SELECT)
    rows = (tl.arange(0, R) * T + i)[:, None] * D + d[None, :]
    q_tile = tl.load(q + rows)[:, None, :]  # (R, 1, D)
    top, total = tl.full([R, 1], -float("inf"), tl.float32), tl.zeros([R, 1], tl.float32)
    o = tl.zeros([R, D], tl.float32)
    for step in range(2 * n):
        j = tl.load(ids + i * n + step % n)
        at = tl.maximum(j, 0) * SELECT + key
        inside = (at < S)[:, None]
        k_tile = tl.load(k + at[:, None] * D + d[None, :], mask=inside, other=0.0)
        s = tl.sum(k_tile[None, :, :] * q_tile, 2) * scale
        s = tl.where(((at <= start + i) & (j >= 0))[None, :], s, -float("inf"))
        if step < n:
            top = tl.maximum(top, tl.max(s, 1)[:, None])
        else:
            v_tile = tl.load(v + at[:, None] * D + d[None, :], mask=inside, other=0.0)
            p = tl.exp(s - tl.where(top == -float("inf"), 0.0, top))
            total += tl.sum(p, 1)[:, None]
            o += tl.sum(p[:, :, None] * v_tile[None, :, :], 1)
    tl.store(out + rows, o / tl.where(total > 0, total, 1.0))


@triton.jit
def wrong_selected(q, k, v, ids, out, T, S, start, scale, n, R: tl.constexpr, D: tl.constexpr,
                   SELECT: tl.constexpr, FLAW: tl.constexpr):
    i, d, head = tl.program_id(0), tl.arange(0, D), tl.arange(0, R)
    rows = (head * T + i)[:, None] * D + d[None, :]
    q_tile = tl.load(q + (rows * 0 + i * D + d[None, :] if FLAW == "one head" else rows))
    m, total = tl.full([R], -float("inf"), tl.float32), tl.zeros([R], tl.float32)
    o, t = tl.zeros([R, D], tl.float32), start + i
    if FLAW == "start forgotten":
        t = i
    factor = scale * LOG2E
    if FLAW == "base 2":
        factor = scale
    elif FLAW == "no scale":
        factor = LOG2E
    for e in range(n - 1 if FLAW == "one id too few" else n):
        j = tl.load(ids + (e if FLAW == "ids of query 0" else i * n + e))
        block = j if FLAW == "not clamped" else tl.maximum(j, 0)
        key = block * (1 if FLAW == "ids as tokens" else SELECT) + tl.arange(0, SELECT)
        inside = (key < (S + SELECT if FLAW == "no mask at the end" else S))[:, None]
        at = key[:, None] * D + d[None, :]
        k_tile = tl.load(k + at, mask=inside, other=0.0)
        v_tile = tl.load(v + at, mask=inside, other=0.0)
        seen = key <= t
        if FLAW == "not causal":
            seen = key < S
        elif FLAW == "strictly before":
            seen = key < t
        elif FLAW == "one ahead":
            seen = key <= t + 1
        if FLAW != "clamped only":
            seen = seen & (j >= 0)
        m, total, o = fold_in(q_tile, k_tile, v_tile, seen[None, :], factor, m, total, o)
    if FLAW == "bare division":
        o = o / total[:, None]
    else:
        o, _ = finish(m, total, o)
    tl.store(out + rows, o)


def selected(kernel, **flaw):
    def selected_attention(q, k, v, ids, out, start, scale, block):
        R, T, D = q.shape
        kernel[(T,)](q, k, v, ids, out, T, len(k), start, scale, ids.shape[1], R=R, D=D,
                     SELECT=block, **flaw)

    selected_attention.__name__ = kernel.__name__
    return selected_attention


SELECTED = [
    Wrong("-1 read before it is masked", selected(wrong_selected, FLAW="not clamped"),
          "block -1 lies before the first key"),
    Wrong("-1 clamped, not masked", selected(wrong_selected, FLAW="clamped only"),
          "was read as block 0"),
    Wrong("not causal in the own block", selected(wrong_selected, FLAW="not causal"),
          "reads to the end of its own block"),
    Wrong("does not read itself", selected(wrong_selected, FLAW="strictly before"),
          "does not read itself"),
    Wrong("one token ahead", selected(wrong_selected, FLAW="one ahead"), "reads token 2"),
    Wrong("start forgotten", selected(wrong_selected, FLAW="start forgotten"),
          "was taken for token 0"),
    Wrong("ids read as tokens", selected(wrong_selected, FLAW="ids as tokens"),
          "were read as tokens"),
    Wrong("no mask at the end of the keys", selected(wrong_selected, FLAW="no mask at the end"),
          "NaN lies in memory around the inputs"),
    Wrong("log2(e) forgotten", selected(wrong_selected, FLAW="base 2"), "of another base"),
    Wrong("no scale", selected(wrong_selected, FLAW="no scale"), "not multiplied by scale"),
    Wrong("one head for all", selected(wrong_selected, FLAW="one head"),
          "all heads got the output of head 0"),
    Wrong("ids of query 0 for all", selected(wrong_selected, FLAW="ids of query 0"),
          "read the ids of query 0"),
    Wrong("last id left out", selected(wrong_selected, FLAW="one id too few"),
          "one id too early"),
    Wrong("divided by 0", selected(wrong_selected, FLAW="bare division"),
          "query 0 chose nothing, and its output is NaN"),
]

RIGHT = {
    "07.1": [add(add_by_pointers), add(add_by_fma), add(add_one_by_one)],
    "07.2": [softmax(softmax_in_powers_of_2), softmax(softmax_by_log_sum),
             softmax(softmax_by_walking)],
    "07.3": [flash(flash_in_powers_of_2), flash(flash_backwards), flash(flash_in_two_walks)],
    "07.4": [selected(selected_with_a_branch), selected(selected_by_hand),
             selected(selected_by_sums)],
}
WRONG = {"07.1": ADD, "07.2": SOFTMAX, "07.3": FLASH, "07.4": SELECTED}
