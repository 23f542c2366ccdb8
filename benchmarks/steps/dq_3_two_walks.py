"""dq 3, two walks: what two products use stays in registers.

Where one product alone uses it, Triton moves the copy into the loop and fills the registers anew.
"""

from kernels.launching import launch  # before triton, which kernels may set to interpret

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.steps.case import Case, RowNumbers
from kernels.descriptors import descriptor
from kernels.online_softmax import LOG2E, load_lse
from kernels.rows import row_products


@triton.jit
def dq(
    desc_q,
    desc_k,
    desc_v,
    desc_do,
    union,
    out,
    lse,
    numbers,
    grad,
    sizes,
    TILE: tl.constexpr,
):
    """dq of U tokens x R heads, M rows; and for dk and dv the two numbers of each row.

    Tiles: q, dout, out and the sum acc [M, D], k and v [L, D], the scores [M, L].
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
    place = [0, group * R, tl.program_id(0) * U, 0]
    q_tile = tl.where(real[:, None], desc_q.load(place).reshape(M, D), 0.0)
    do_tile = tl.where(real[:, None], desc_do.load(place).reshape(M, D), 0.0)
    o_tile = tl.load(out + rows, mask=real[:, None], other=0.0)
    scale = sizes.scale * LOG2E
    row_lse = load_lse(lse, number, real)  # in powers of 2
    delta = row_products(o_tile, do_tile)
    by_token = token.to(tl.int64) * sizes.H + group * R + row // U
    tl.store(numbers.lse + by_token, row_lse, mask=real)
    tl.store(numbers.delta + by_token, delta, mask=real)
    acc = tl.zeros([M, D], tl.float32)
    count = tl.load(union.counts + tile)
    for part in tl.static_range(2):
        for e in range(part * count // 2, (part + 1) * count // 2):
            entry = tl.load(union.entries + tile * U * sizes.n + e)
            first = (entry >> U).to(tl.int32) * L
            k_tile = desc_k.load([0, group, first, 0]).reshape(L, D)
            v_tile = desc_v.load([0, group, first, 0]).reshape(L, D)
            chosen = ((entry.to(tl.int32) >> (row % U)) & 1) > 0
            limit = tl.where(chosen & real, token, -1)  # the last key to read
            mask = (first + tl.arange(0, L))[None, :] <= limit[:, None]  # [M, L]
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            p = tl.where(mask, tl.exp2(s * scale - row_lse[:, None]), 0.0)
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
            ds = p * (dp - delta[:, None])
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    tl.store(grad + rows, (acc * sizes.scale).to(grad.dtype.element_ty), mask=real[:, None])


def run(x: Case) -> tuple[Tensor, Tensor, Tensor]:
    """dq (1, H, T, D) of a case, and its RowNumbers lse and delta."""
    grad = torch.empty_like(x.q)
    numbers = RowNumbers(torch.empty_like(x.numbers.lse), torch.empty_like(x.numbers.delta))
    grid = (x.union.counts.shape[2], x.k.shape[1])
    launch(
        dq,
        grid,
        descriptor(x.q, x.tile.R, x.tile.U),
        descriptor(x.k, 1, x.tile.L),
        descriptor(x.v, 1, x.tile.L),
        descriptor(x.dout, x.tile.R, x.tile.U),
        x.union,
        x.out,
        x.lse,
        numbers,
        grad,
        x.sizes,
        TILE=x.tile,
        num_warps=4,
        num_stages=3,
    )
    return grad, *numbers
