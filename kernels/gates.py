"""Eq. 5's sum over the branches, gate * output, in one pass over memory.

    program:  M rows of (B H T, Dv);  forward reads 3 outputs, writes 1 sum
                                      backward reads 3 outputs and dout, writes 3 douts, 3 dgates

For branches that ran apart; nsa_attention adds the outputs up in its selected kernel (selected.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check, check_tensor
from kernels.tile import load_gate, load_rows, row_products, store_rows
from kernels.tiles import padded

ROWS = 32


@triton.jit
def mix(gates, a, b, c, out, ROWS_IN_ALL, WIDTH: tl.constexpr, PADDED: tl.constexpr,
        M: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    real = row < ROWS_IN_ALL
    total = tl.zeros([M, PADDED], tl.float32)
    for i in tl.static_range(3):
        branch = load_rows(a if i == 0 else b if i == 1 else c, row * WIDTH, real, WIDTH, PADDED)
        gate = load_gate(gates, row, real, i)
        total += gate[:, None] * branch.to(tl.float32)
    store_rows(out, row * WIDTH, total, real, WIDTH, PADDED)


@triton.jit
def mix_backward(gates, a, b, c, dout, dgates, da, db, dc, ROWS_IN_ALL,
                 WIDTH: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    real = row < ROWS_IN_ALL
    do = load_rows(dout, row * WIDTH, real, WIDTH, PADDED).to(tl.float32)
    for i in tl.static_range(3):
        branch = load_rows(a if i == 0 else b if i == 1 else c, row * WIDTH, real, WIDTH, PADDED)
        gate = load_gate(gates, row, real, i)
        dgate = row_products(do, branch)
        tl.store(dgates + row * 3 + i, dgate.to(dgates.dtype.element_ty), mask=real)
        store_rows(da if i == 0 else db if i == 1 else dc, row * WIDTH, gate[:, None] * do, real,
                   WIDTH, PADDED)


def mix_rows(gates: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The gated sum of contiguous tensors."""
    out, width = torch.empty_like(a), a.shape[-1]
    rows = a.numel() // width
    mix[(triton.cdiv(rows, ROWS),)](
        gates, a, b, c, out, rows, WIDTH=width, PADDED=padded(width), M=ROWS)
    return out


class GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates, a, b, c):
        saved = [x.contiguous() for x in (gates, a, b, c)]
        ctx.save_for_backward(*saved)
        return mix_rows(*saved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        saved, dout = ctx.saved_tensors, dout.contiguous()
        grads = [torch.empty_like(x) for x in saved]
        rows, width = dout.numel() // dout.shape[-1], dout.shape[-1]
        mix_backward[(triton.cdiv(rows, ROWS),)](
            *saved, dout, *grads, rows, WIDTH=width, PADDED=padded(width), M=ROWS)
        return tuple(grads)


def check_gates(gates: Tensor, x: Tensor) -> None:
    """Raise unless gates is (B, H, T, 3) for x (B, H, T, width)."""
    check(gates.shape == (*x.shape[:3], 3), "gates.shape", tuple(gates.shape),
          f"must be {(*x.shape[:3], 3)}: one gate for each branch and head")


def gated_sum(gates: Tensor, outputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Each branch's output times its gate, added up (Eq. 5).

    Shapes: gates (B, H, T, 3), outputs: three of (B, H, T, Dv) -> out (B, H, T, Dv).
    Errors: ValueError or TypeError that names the argument.
    """
    for i, x in enumerate(outputs):
        check_tensor(f"outputs[{i}]", x, outputs[0])
        check(x.shape == outputs[0].shape, f"outputs[{i}].shape", tuple(x.shape),
              f"must be outputs[0]'s, {tuple(outputs[0].shape)}")
    check_gates(gates, outputs[0])
    return GatedSum.apply(gates, *outputs)
