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

from kernels.checks import check_gates, check_outputs
from kernels.launching import launch
from kernels.operations import operation
from kernels.rows import empty_beside, load_gate, load_rows, row_products, store_rows
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


def flat(x: Tensor) -> Tensor:
    """x (B, H, T, width) with its rows in one piece, a token's heads side by side."""
    return x.transpose(1, 2).contiguous()


@operation
def add_gated(gates: Tensor, compressed: Tensor, selected: Tensor, window: Tensor) -> Tensor:
    """Eq. 5's sum: (B, H, T, Dv)."""
    outputs = Outputs(*(flat(x) for x in (compressed, selected, window)))
    out = torch.empty_like(outputs.compressed)
    width = out.shape[-1]
    num_rows = out.numel() // width
    launch(
        mix,
        (cdiv(num_rows, BLOCK_M),),
        flat(gates),
        outputs,
        out,
        num_rows,
        WIDTH=width,
        BLOCK_WIDTH=padded(width),
        BLOCK_M=BLOCK_M,
    )
    return out.transpose(1, 2)


@operation
def add_gated_backward(
    gates: Tensor, compressed: Tensor, selected: Tensor, window: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dgates and the gradient of each output."""
    outputs = Outputs(*(flat(x) for x in (compressed, selected, window)))
    gates = flat(gates)
    dgates = torch.empty_like(gates)
    doutputs = Outputs(*(torch.empty_like(x) for x in outputs))
    width = dout.shape[-1]
    num_rows = dout.numel() // width
    launch(
        mix_backward,
        (cdiv(num_rows, BLOCK_M),),
        gates,
        outputs,
        flat(dout),
        dgates,
        doutputs,
        num_rows,
        WIDTH=width,
        BLOCK_WIDTH=padded(width),
        BLOCK_M=BLOCK_M,
    )
    return tuple(x.transpose(1, 2) for x in (dgates, *doutputs))


@add_gated.register_fake
def _(_gates, compressed, *_):
    return empty_beside(compressed, compressed.shape[3])


@add_gated_backward.register_fake
def _(gates, *outputs_and_dout):
    return tuple(empty_beside(x, x.shape[3]) for x in (gates, *outputs_and_dout[:3]))


def save(ctx, inputs, output):  # noqa: ARG001  torch gives both
    ctx.save_for_backward(*inputs)


def backward(ctx, dout):
    return add_gated_backward(*ctx.saved_tensors, dout)


add_gated.register_autograd(backward, setup_context=save)


def gated_sum(
    gates: Float[Tensor, "B H T 3"],
    outputs: tuple[Float[Tensor, "B H T Dv"], Float[Tensor, "B H T Dv"], Float[Tensor, "B H T Dv"]],
) -> Float[Tensor, "B H T Dv"]:
    """Each branch's output times its gate, added up, in the outputs' type.

    Eq. 5: out = sum over the branches c of gates[..., c] * outputs[c].
    Errors: ValueError or TypeError that names the argument.
    """
    check_outputs(outputs)
    check_gates(gates, outputs[0], "outputs[0]")
    return add_gated(gates, *outputs)
