"""Eq. 5 in one function: three branches, the choice between them, gates.

    forward    compressed -> lse -> ids          backward    compressed, selected, window: the
               window                                        first writes dq, the others add to
               selected(ids), and gates * outputs            it; each fills its column of dgates

Apart, each branch would get its own gate * dout and give its own dq: six tensors as large as q that
are written only to be read once more. Here the kernels of dq multiply by the gate themselves, and
the selected forward, whose own work waits for the cache, adds up the three outputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import launch
from kernels.checks import (
    check_geometry,
    check_ids,
    check_inputs,
    check_int,
    check_keys_reach,
    scale_or_default,
)
from kernels.gates import check_gates
from kernels.launch import Blocks, Gated, Run, rows_contiguous
from kernels.select import select_blocks

Pair = tuple[Tensor, Tensor]


class Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, gates, choose, run_c, blocks, run_w, *keys_values):
        q, *kv = (rows_contiguous(x) for x in (q, *keys_values))
        gates = gates.contiguous()
        out_c, lse_c = launch.flash(q, *kv[:2], run_c)
        ids = choose(lse_c).contiguous()
        out_w, lse_w = launch.flash(q, *kv[4:], run_w)
        mixed = torch.empty_like(out_c)
        out_s, lse_s, route = launch.selected(
            q, *kv[2:4], ids, blocks, launch.Mix(gates, out_c, out_w, mixed))
        ctx.sizes = run_c, blocks, run_w
        ctx.save_for_backward(q, gates, *kv, ids, *route, out_c, lse_c, out_s, lse_s, out_w, lse_w)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, gates, *kv, ids, entries, counts = ctx.saved_tensors[:11]
        out_c, lse_c, out_s, lse_s, out_w, lse_w = ctx.saved_tensors[11:]
        run_c, blocks, run_w = ctx.sizes
        dout, dq, dgates = rows_contiguous(dout), torch.empty_like(q), torch.empty_like(gates)
        gated = [Gated(gates, dgates, i, dq) for i in range(3)]
        _, *d_c = launch.flash_gradients(q, *kv[:2], out_c, lse_c, dout, None, run_c, gated[0])
        _, *d_s = launch.selected_gradients(
            q, *kv[2:4], ids, (entries, counts), out_s, lse_s, dout, blocks, gated[1])
        _, *d_w = launch.flash_gradients(q, *kv[4:], out_w, lse_w, dout, None, run_w, gated[2])
        return dq, dgates, None, None, None, None, *d_c, *d_s, *d_w


def nsa_attention(
    q: Tensor, compressed: Pair, selected: Pair, window: Pair, gates: Tensor, *,
    block_size: int, stride: int, select_block_size: int, num_selected: int, window_size: int,
    num_initial: int = 1, num_local: int = 2, scale: float | None = None, start: int = 0,
    choose: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Eq. 5: the gated sum of the three branches; each has its own keys and values.

    Shapes: q (B, H, T, D), a pair k (B, G, N or S, D), v (B, G, N or S, Dv) for each branch, gates
    (B, H, T, 3) at least 0, as a sigmoid gives them -> out (B, H, T, Dv). `choose` may replace
    the choice of Eq. 8-11: it gets the compressed branch's lse and returns ids (B, G, T, n).
    Errors: ValueError or TypeError that names the argument.
    """
    pairs = {"compressed": compressed, "selected": selected, "window": window}
    for name, (k, v) in pairs.items():
        check_inputs(q, k, v, (f"{name}[0]", f"{name}[1]"))
        if name != "compressed":
            check_keys_reach(q, k, start, f"{name}[0]")
    check_geometry(block_size, stride, select_block_size)
    check_int("window_size", window_size, 1)
    check_gates(gates, q)
    scale = scale_or_default(scale, q.shape[3])
    window_or_none = None if window_size >= start + q.shape[2] else window_size

    def best(lse: Tensor) -> Tensor:
        return select_blocks(
            q, compressed[0], lse, block_size=block_size, stride=stride, scale=scale, start=start,
            select_block_size=select_block_size, num_selected=num_selected,
            num_initial=num_initial, num_local=num_local)

    def chosen(lse: Tensor) -> Tensor:
        ids = (choose or best)(lse)
        check_ids(ids, q, selected[0])
        return ids

    return Whole.apply(
        q, gates, chosen, Run(block_size, stride, None, scale, start),
        Blocks(select_block_size, scale, start), Run(1, 1, window_or_none, scale, start),
        *compressed, *selected, *window)
