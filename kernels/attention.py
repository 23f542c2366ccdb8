"""The three attentions as differentiable functions, with the names of nsa_lite."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import launch
from kernels.checks import (
    check,
    check_geometry,
    check_ids,
    check_inputs,
    check_int,
    check_keys_reach,
    check_start,
    scale_or_default,
)
from kernels.launch import Blocks, Run, rows_contiguous


class Flash(torch.autograd.Function):
    """Attention to a run of keys; see flash.py and flash_backward.py."""

    @staticmethod
    def forward(ctx, q, k, v, run):
        q, k, v = (rows_contiguous(x) for x in (q, k, v))
        out, lse = launch.flash(q, k, v, run)
        ctx.run = run
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else rows_contiguous(dout)
        dlse = None if dlse is None else dlse.contiguous()
        return *launch.flash_gradients(q, k, v, out, lse, dout, dlse, ctx.run), None


class Selected(torch.autograd.Function):
    """Attention to chosen blocks; see routes.py, selected.py and selected_backward.py."""

    @staticmethod
    def forward(ctx, q, k, v, ids, blocks):
        q, k, v = (rows_contiguous(x) for x in (q, k, v))
        out, lse, route = launch.selected(q, k, v, ids, blocks)
        ctx.blocks = blocks
        ctx.save_for_backward(q, k, v, ids, *route, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, ids, entries, counts, out, lse = ctx.saved_tensors
        gradients = launch.selected_gradients(
            q, k, v, ids, (entries, counts), out, lse, rows_contiguous(dout), ctx.blocks)
        return *gradients, None, None


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    window: int | None = None, scale: float | None = None, start: int = 0,
) -> Tensor:
    """Causal attention to the last `window` keys, the query's own included; None is dense.

    Shapes: q (B, H, T, D), k (B, G, S, D), v (B, G, S, Dv) -> out (B, H, T, Dv).
    Errors: ValueError or TypeError that names the argument. Source: section 3.3.3.
    """
    check_inputs(q, k, v)
    check_keys_reach(q, k, start)
    if window is not None:
        check_int("window", window, 1)
        window = None if window >= start + q.shape[2] else window
    return Flash.apply(q, k, v, Run(1, 1, window, scale_or_default(scale, q.shape[3]), start))[0]


def compressed_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    block_size: int, stride: int, scale: float | None = None, start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention to the compressed keys of blocks that ended at or before the query (Eq. 7).

    Shapes: q (B, H, T, D), compressed k (B, G, N, D), v (B, G, N, Dv) -> out (B, H, T, Dv),
    lse (B, H, T) float32; a query that sees no block gets out 0 and lse -inf.
    Errors: ValueError or TypeError that names the argument.
    """
    check_inputs(q, k, v)
    check_geometry(block_size, stride)
    check_start(start)
    scale = scale_or_default(scale, q.shape[3])
    return Flash.apply(q, k, v, Run(block_size, stride, None, scale, start))


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, *,
    select_block_size: int, scale: float | None = None, start: int = 0,
) -> Tensor:
    """Attention to the raw tokens of the selected blocks, causal inside the own block (Eq. 12).

    Shapes: q (B, H, T, D), k (B, G, S, D), v (B, G, S, Dv), ids (B, G, T, n) int, distinct,
    -1 is padding -> out (B, H, T, Dv).
    Errors: ValueError or TypeError that names the argument.
    """
    check_inputs(q, k, v)
    check_keys_reach(q, k, start)
    check_int("select_block_size", select_block_size, 1)
    check(select_block_size <= 256, "select_block_size", select_block_size, "must be at most 256")
    check_ids(ids, q, k)
    scale = scale_or_default(scale, q.shape[3])
    return Selected.apply(q, k, v, ids.contiguous(), Blocks(select_block_size, scale, start))
