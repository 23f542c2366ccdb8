"""What every attention kernel here does with one tile: load rows, score them, fold them in.

The R heads of a group read the same keys, so a tile packs them as rows: those of some tokens, head
after head (boxes.py). One load of a key then serves all of them.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x log2(e)): the hardware has exp2
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_offsets(strides, b, head, token):
    """Where rows of a (B, H, T, width) tensor begin; 64 bits, for tensors beyond 2^31 elements."""
    base = b.to(tl.int64) * strides[0]
    return base + head.to(tl.int64) * strides[1] + token.to(tl.int64) * strides[2]


@triton.jit
def number_offsets(b, g, head, token, G, T, R: tl.constexpr):
    """Where the numbers of a group's rows lie in a contiguous (B, H, T) tensor; 64 bits."""
    return ((b.to(tl.int64) * G + g) * R + head) * T + token


@triton.jit
def load_rows(x, offsets, real, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """A (rows, PADDED) tile of x: 0 outside WIDTH and in unreal rows."""
    column = tl.arange(0, PADDED)
    at = x + offsets[:, None] + column[None, :]
    return tl.load(at, mask=real[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(x, offsets, tile, real, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Write the real rows and columns of a tile, in the type of x."""
    column = tl.arange(0, PADDED)
    at = x + offsets[:, None] + column[None, :]
    tl.store(at, tile.to(x.dtype.element_ty), mask=real[:, None] & (column < WIDTH)[None, :])


@triton.jit
def add_rows(x, offsets, tile, real, WIDTH: tl.constexpr, PADDED: tl.constexpr, ADD: tl.constexpr):
    """Write the tile, or with ADD the sum of it and what is there."""
    if ADD:
        tile += load_rows(x, offsets, real, WIDTH, PADDED).to(tl.float32)
    store_rows(x, offsets, tile, real, WIDTH, PADDED)


@triton.jit
def fold_in(q, k, v, visible, scale, m, total, out):
    """One step of the online softmax, in powers of 2; `scale` holds the log2(e).

    m is the largest score so far, total the sum of exp2(score - m), out the weighted values.
    The float32 scores are scaled, not q, which would be rounded to half precision.
    """
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if visible is not None:
        s = tl.where(visible, s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    # A row that has seen nothing has m = -inf: exp2(-inf - -inf) would be NaN.
    safe = m_new if visible is None else tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.exp2(s * scale - safe[:, None])
    shrink = tl.exp2(m - safe)
    total = total * shrink + tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
    return m_new, total, out


@triton.jit
def finish(m, total, out):
    """The softmax-weighted mean and its natural log-sum-exp: 0 and -inf where nothing was seen."""
    seen = total > 0
    out = out / tl.where(seen, total, 1.0)[:, None]
    return out, tl.where(seen, (m + tl.log2(tl.where(seen, total, 1.0))) * LN2, -float("inf"))


@triton.jit
def row_products(a, b):
    """The sum of a * b in each row.

    Without the 0 the compiler may fuse the last product into the sum. Then two threads that hold
    one row could round differently, and which of them writes it would be a race.
    """
    return tl.sum(a.to(tl.float32) * b.to(tl.float32) + 0.0, 1)


@triton.jit
def load_gate(gates, at, real, BRANCH: tl.constexpr):
    """A row's gate in float32; branch 0 is the compressed one, 1 the selected, 2 the window."""
    return tl.load(gates + at * 3 + BRANCH, mask=real, other=0.0).to(tl.float32)


@triton.jit
def prepare_gradient(
    o, do, lse, dlse, gates, dgates, row_lse, row_delta, at, by_row, real, BRANCH: tl.constexpr,
):
    """A row's log-sum-exp (in powers of 2), delta = sum(o do) - dlse, and its gate (1 if None).

    Writes dgates, which is sum(o do), and for dk and dv two numbers in the order in which they load
    rows: delta, and lse - log2(gate). exp2(s - that) is gate * p, so they get the true dout, gate *
    do, without a multiplication. A gate of 0 gives p = 0, a negative one NaN.
    """
    log_sum, delta = load_lse(lse, at, real), row_products(o, do)
    gate = tl.full(delta.shape, 1.0, tl.float32)
    if gates is not None:
        gate = load_gate(gates, at, real, BRANCH)
        tl.store(dgates + at * 3 + BRANCH, delta.to(dgates.dtype.element_ty), mask=real)
    if dlse is not None:
        delta -= tl.load(dlse + at, mask=real, other=0.0)
    tl.store(row_lse + by_row, log_sum - tl.log2(gate), mask=real)
    tl.store(row_delta + by_row, delta, mask=real)
    return log_sum, delta, gate


@triton.jit
def score_gradient(q, k, v, dout, lse, delta, visible, scale):
    """p and ds of one tile, recomputed from the log-sum-exp: ds = p (dout v - delta).

    Rows are q's. lse comes in powers of 2, with 0 for rows that saw nothing.
    """
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    p = tl.exp2(s * scale - lse[:, None])
    if visible is not None:
        p = tl.where(visible, p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    return p, p * (dp - delta[:, None])


@triton.jit
def score_gradient_by_key(q, k, v, dout, lse, delta, visible, scale):
    """The same with a row for each key, as the sums over queries want it."""
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    p = tl.exp2(s * scale - lse[None, :])
    if visible is not None:
        p = tl.where(visible, p, 0.0)
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
    return p, p * (dp - delta[None, :])


@triton.jit
def load_lse(lse, at, real):
    """A log-sum-exp in powers of 2; 0 instead of -inf, since all its weights are masked anyway."""
    x = tl.load(lse + at, mask=real, other=0.0)
    return tl.where(x == -float("inf"), 0.0, x) * LOG2E
