"""Forward 2, descriptors: the copy engine (TMA) fetches keys and values.

No thread computes their addresses or masks their end: what lies outside comes as 0.
"""

from kernels.launching import launch  # before triton, which kernels may set to interpret

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.steps.case import Case
from kernels.descriptors import descriptor


@triton.jit
def forward(q, desc_k, desc_v, union, out, lse, sizes, TILE: tl.constexpr):
    """out and lse of U tokens x R heads, M rows, which walk over the union of the tokens' blocks.

    Tiles: q and the output acc [M, D], k and v [L, D], the scores [M, L].
    """
    D: tl.constexpr = TILE.D
    L: tl.constexpr = TILE.L
    R: tl.constexpr = TILE.R
    U: tl.constexpr = TILE.U
    M: tl.constexpr = R * U
    group = tl.program_id(1)
    tile = group.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    row = tl.arange(0, M)
    column = tl.arange(0, D)
    token = tl.program_id(0) * U + row % U
    real = token < sizes.T
    number = (group * R + row // U).to(tl.int64) * sizes.T + token
    rows = number[:, None] * D + column[None, :]  # [M, D]
    q_tile = tl.load(q + rows, mask=real[:, None], other=0.0)
    m_i = tl.full([M], -float("inf"), tl.float32)
    l_i = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for e in range(tl.load(union.counts + tile)):
        entry = tl.load(union.entries + tile * U * sizes.n + e)
        first = (entry >> U).to(tl.int32) * L
        key = first + tl.arange(0, L)
        k_tile = desc_k.load([0, group, first, 0]).reshape(L, D)
        v_tile = desc_v.load([0, group, first, 0]).reshape(L, D)
        chosen = ((entry >> (row % U)) & 1) > 0
        mask = chosen[:, None] & (key[None, :] <= token[:, None])  # [M, L]
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        s = tl.where(mask, s * sizes.scale, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp(s - m_safe[:, None])
        alpha = tl.exp(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")
        m_i = m_new
    seen = tl.where(l_i == 0, 1.0, l_i)
    acc = acc / seen[:, None]
    tl.store(out + rows, acc.to(out.dtype.element_ty), mask=real[:, None])
    tl.store(lse + number, m_i + tl.log(seen), mask=real)


def run(x: Case) -> tuple[Tensor, Tensor]:
    """out (1, H, T, D) and lse (1, H, T) of a case."""
    out = torch.empty_like(x.q)
    lse = x.q.new_empty(x.q.shape[:3], dtype=torch.float32)
    grid = (x.union.counts.shape[2], x.k.shape[1])
    launch(
        forward,
        grid,
        x.q,
        descriptor(x.k, 1, x.tile.L),
        descriptor(x.v, 1, x.tile.L),
        x.union,
        out,
        lse,
        x.sizes,
        TILE=x.tile,
        num_warps=4,
        num_stages=2,
    )
    return out, lse
