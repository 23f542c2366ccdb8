"""The online softmax and its gradient: what every attention kernel does with one tile of keys.

    forward     fold_in, tile after tile, then finish
    gradient    prepare_gradient once a row, then score_gradient (or its transpose) tile after tile

All in powers of 2, since the hardware has exp2: exp(x) = exp2(x log2(e)). Only what a forward
leaves, the log-sum-exp, is a natural one; load_lse brings it back to powers of 2. dk and dv get it
less log2(gate) (prepare_gradient).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.pieces import add_products, over, products, products_of_rows, times
from kernels.rows import load_gate

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Saved(NamedTuple):
    """What a branch's forward leaves to its backward; all with contiguous rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


class Read(NamedTuple):
    """What dk and dv are made of; all with contiguous rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


class RowNumbers(NamedTuple):
    """A float32 number for each row: what dq reads, and what it leaves for dk and dv.

    Shapes: lse and dlse (B, H, T), row_lse and row_delta (B G, rows), `stride` from group to group.
    """

    lse: Tensor
    dlse: Tensor | None
    row_lse: Tensor
    row_delta: Tensor
    stride: int


class Gates(NamedTuple):
    """Eq. 5's gates inside a branch's dq. Shapes: gates and dgates (B, H, T, 3), contiguous."""

    gates: Tensor
    dgates: Tensor


class GatedBranch(NamedTuple):
    """One of three branches whose gated outputs were added up: where its share of gradients goes.

    dq is shared: branch 0 writes it, the others add to it.
    """

    gates: Gates
    branch: int
    dq: Tensor


@triton.jit
def fold_in(q, k, v, mask, scale, m_i, l_i, acc):
    """One step of the online softmax; `scale` holds the log2(e).

    m_i [M] is the largest score so far, l_i [M] the sum of exp2(score - m_i), acc [M, DV] the
    weighted values. The float32 scores are scaled, not q, which would be rounded to half precision.
    """
    m_i, l_i, acc, _ = fold_in_with_weights(q, k, v, mask, scale, m_i, l_i, acc)
    return m_i, l_i, acc


@triton.jit
def fold_in_with_weights(q, k, v, mask, scale, m_i, l_i, acc):
    """fold_in, and also this tile's p [M, N] = exp2(score - m_i), 0 where nothing was seen."""
    s = products(q, k)  # [M, N]
    if mask is not None:
        s = tl.where(mask, s, -float("inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
    # A row that has seen nothing has m_i = -inf: exp2(-inf - -inf) would be NaN.
    m_safe = m_new if mask is None else tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.exp2(s * scale - m_safe[:, None])
    alpha = tl.exp2(m_i - m_safe)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = add_products(times(acc, alpha[:, None]), p, v)
    return m_new, l_i, acc, p


@triton.jit
def finish(m_i, l_i, acc):
    """The softmax-weighted mean and its natural log-sum-exp: 0 and -inf where nothing was seen."""
    seen = l_i > 0
    acc = over(acc, tl.where(seen, l_i, 1.0)[:, None])
    return acc, tl.where(seen, (m_i + tl.log2(tl.where(seen, l_i, 1.0))) * LN2, -float("inf"))


@triton.jit
def load_lse(lse, at, row_mask):
    """A log-sum-exp in powers of 2; 0 instead of -inf, since all its weights are masked anyway."""
    x = tl.load(lse + at, mask=row_mask, other=0.0)
    return tl.where(x == -float("inf"), 0.0, x) * LOG2E


@triton.jit
def prepare_gradient(o, do, numbers, gating, number, by_row, row_mask, BRANCH: tl.constexpr):
    """A row's log-sum-exp (in powers of 2), delta = sum(o do) - dlse, and its gate (1 if None).

    o, do [M, DV]; numbers: RowNumbers; gating: Gates or None; `number` is a row's place in
    (B, H, T), `by_row` that in the order in which dk and dv load rows. Writes dgates, which is
    sum(o do), and for dk and dv two numbers in that order: delta, and lse - log2(gate).
    exp2(s - that) is gate * p, so they get the true dout, gate * do, without a multiplication. A
    gate of 0 gives p = 0, a negative one NaN.
    """
    lse = load_lse(numbers.lse, number, row_mask)
    delta = products_of_rows(o, do)
    gate = tl.full(delta.shape, 1.0, tl.float32)
    if gating is not None:
        gate = load_gate(gating.gates, number, row_mask, BRANCH)
        dgate = delta.to(gating.dgates.dtype.element_ty)
        tl.store(gating.dgates + number * 3 + BRANCH, dgate, mask=row_mask)
    if numbers.dlse is not None:
        delta -= tl.load(numbers.dlse + number, mask=row_mask, other=0.0)
    tl.store(numbers.row_lse + by_row, lse - tl.log2(gate), mask=row_mask)
    tl.store(numbers.row_delta + by_row, delta, mask=row_mask)
    return lse, delta, gate


@triton.jit
def score_gradient(q, k, v, do, lse, delta, mask, scale):
    """p and ds [M, N] of one tile, recomputed from the log-sum-exp: ds = p (do v - delta).

    Rows are q's. lse [M] comes in powers of 2, with 0 for rows that saw nothing.
    """
    s = products(q, k)
    p = tl.exp2(s * scale - lse[:, None])
    if mask is not None:
        p = tl.where(mask, p, 0.0)
    dp = products(do, v)
    return p, p * (dp - delta[:, None])


@triton.jit
def score_gradient_by_key(q, k, v, do, lse, delta, mask, scale):
    """The same as [N, M], with a row for each key, as the sums over queries want it."""
    s = products(k, q)
    p = tl.exp2(s * scale - lse[None, :])
    if mask is not None:
        p = tl.where(mask, p, 0.0)
    dp = products(v, do)
    return p, p * (dp - delta[None, :])
