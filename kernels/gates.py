"""Eq. 5's sum over the branches, gate * output, in one pass over memory.

    program:  BLOCK_M rows of (B H T, Dv);  forward reads 3 outputs, writes 1 sum
                                            backward reads 3 outputs and dout, writes 3 douts,
                                            3 dgates

For branches that ran apart; nsa_attention adds the outputs up in its selected kernel
(block_sparse_attention.py), and its gradient has the gates in prepare_gradient (online_softmax.py).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import check_alike, check_float_tensor, check_gates, check_width, require
from kernels.launching import launch
from kernels.rows import load_gate, load_rows, row_products, store_rows
from kernels.tile_sizes import cdiv, padded

BLOCK_M = 32


class Outputs(NamedTuple):
    """The outputs of the three branches, or their gradients: contiguous (B, H, T, Dv)."""

    compressed: Tensor
    selected: Tensor
    window: Tensor


@triton.jit
def mix(
    gates,
    outputs,
    out,
    num_rows,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The gated sum of BLOCK_M rows. Tiles: each branch's output and the sum [M, DV]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < num_rows
    total = tl.zeros([BLOCK_M, BLOCK_WIDTH], tl.float32)
    for i in tl.static_range(3):
        output = load_rows(outputs[i], row * WIDTH, row_mask, WIDTH, BLOCK_WIDTH)
        gate = load_gate(gates, row, row_mask, i)
        total += gate[:, None] * output.to(tl.float32)
    store_rows(out, row * WIDTH, total, row_mask, WIDTH, BLOCK_WIDTH)


@triton.jit
def mix_backward(
    gates,
    outputs,
    dout,
    dgates,
    doutputs,
    num_rows,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """dgates and each branch's gate * dout of BLOCK_M rows. Tiles: outputs and douts [M, DV]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < num_rows
    do = load_rows(dout, row * WIDTH, row_mask, WIDTH, BLOCK_WIDTH).to(tl.float32)
    for i in tl.static_range(3):
        output = load_rows(outputs[i], row * WIDTH, row_mask, WIDTH, BLOCK_WIDTH)
        gate = load_gate(gates, row, row_mask, i)
        dgate = row_products(do, output)
        tl.store(dgates + row * 3 + i, dgate.to(dgates.dtype.element_ty), mask=row_mask)
        store_rows(doutputs[i], row * WIDTH, gate[:, None] * do, row_mask, WIDTH, BLOCK_WIDTH)


class GatedSum(torch.autograd.Function):
    """The gated sum: (gates, compressed, selected, window) -> out."""

    @staticmethod
    def forward(ctx, gates, *outputs):
        gates = gates.contiguous()
        outputs = Outputs(*(x.contiguous() for x in outputs))
        ctx.save_for_backward(gates, *outputs)
        out = torch.empty_like(outputs.compressed)
        width = out.shape[-1]
        num_rows = out.numel() // width
        launch(
            mix,
            (cdiv(num_rows, BLOCK_M),),
            gates,
            outputs,
            out,
            num_rows,
            WIDTH=width,
            BLOCK_WIDTH=padded(width),
            BLOCK_M=BLOCK_M,
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        gates, *outputs = ctx.saved_tensors
        dgates = torch.empty_like(gates)
        doutputs = Outputs(*(torch.empty_like(x) for x in outputs))
        width = dout.shape[-1]
        num_rows = dout.numel() // width
        launch(
            mix_backward,
            (cdiv(num_rows, BLOCK_M),),
            gates,
            Outputs(*outputs),
            dout.contiguous(),
            dgates,
            doutputs,
            num_rows,
            WIDTH=width,
            BLOCK_WIDTH=padded(width),
            BLOCK_M=BLOCK_M,
        )
        return dgates, *doutputs


def gated_sum(
    gates: Float[Tensor, "B H T 3"],
    outputs: tuple[Float[Tensor, "B H T Dv"], Float[Tensor, "B H T Dv"], Float[Tensor, "B H T Dv"]],
) -> Float[Tensor, "B H T Dv"]:
    """Each branch's output times its gate, added up.

    Eq. 5: out = sum over the branches c of gates[..., c] * outputs[c].
    Errors: ValueError or TypeError that names the argument.
    """
    for i, x in enumerate(outputs):
        check_float_tensor(f"outputs[{i}]", x, "B, H, T, Dv")
        check_alike(f"outputs[{i}]", x, "outputs[0]", outputs[0])
        check_width(f"outputs[{i}]", x)
        require(
            x.shape == outputs[0].shape,
            f"outputs[{i}].shape",
            tuple(x.shape),
            f"must be outputs[0]'s, {tuple(outputs[0].shape)}",
        )
    check_gates(gates, outputs[0])
    return GatedSum.apply(gates, *outputs)
