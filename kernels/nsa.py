"""Eq. 5 in one function: three branches, the choice between them, gates.

    forward    compressed -> lse -> ids          backward    compressed, selected, window: the
               window                                        first writes dq, the others add to
               selected(ids), and gates * outputs            it; each fills its column of dgates

Apart, each branch would get its own gate * dout and give its own dq: six tensors as large as q that
are written only to be read once more. Here the kernels of dq multiply by the gate themselves, and
the selected forward, whose own work waits for the cache, adds up the three outputs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.block_sparse_attention import Blocks, Mix, block_sparse, block_sparse_gradients
from kernels.checks import (
    check_counts,
    check_gates,
    check_geometry,
    check_ids,
    check_inputs,
    check_int,
    check_keys_reach,
    scale_or_default,
)
from kernels.flash_attention import Run, compressed_run, flash, flash_gradients, window_run
from kernels.importance import Choice, best_blocks, importance_scores
from kernels.online_softmax import GatedBranch, Gates, Saved
from kernels.rows import rows_contiguous
from kernels.union_and_readers import Union


class Runs(NamedTuple):
    """What each of the three branches needs beside its tensors."""

    compressed: Run
    selected: Blocks
    window: Run


class Branches(NamedTuple):
    """What the gates add up and what chose it, without gradient.

    Shapes: compressed, selected and window (B, H, T, Dv), lse (B, H, T), ids (B, G, T, n).
    """

    compressed: Tensor
    selected: Tensor
    window: Tensor
    lse: Tensor
    ids: Tensor


class NSA(torch.autograd.Function):
    """Eq. 5: (q, gates, k and v of each branch, choose, runs) -> out, and the Branches."""

    @staticmethod
    def forward(ctx, q, gates, k_c, v_c, k_s, v_s, k_w, v_w, choose, runs):
        q = rows_contiguous(q)  # once for all three
        gates = gates.contiguous()
        compressed = flash(q, k_c, v_c, runs.compressed)
        ids = choose(compressed.lse).contiguous()
        window = flash(q, k_w, v_w, runs.window)
        out = torch.empty_like(compressed.out)
        mix = Mix(gates, compressed.out, window.out, out)
        selected, union = block_sparse(q, k_s, v_s, ids, runs.selected, mix)
        ctx.runs = runs
        ctx.save_for_backward(gates, ids, *union, *compressed, *selected, *window)
        branches = Branches(compressed.out, selected.out, window.out, compressed.lse, ids)
        ctx.mark_non_differentiable(*branches)
        ctx.set_materialize_grads(False)  # nobody differentiates the branches
        return out, *branches

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *_):
        gates, ids, entries, counts, *saved = ctx.saved_tensors
        compressed, selected, window = (Saved(*saved[i : i + 5]) for i in (0, 5, 10))
        dout = torch.zeros_like(compressed.out) if dout is None else rows_contiguous(dout)
        dq = torch.empty_like(compressed.q)
        dgates = torch.empty_like(gates)
        c, s, w = (GatedBranch(Gates(gates, dgates), i, dq) for i in range(3))
        runs = ctx.runs
        _, dk_c, dv_c = flash_gradients(compressed, dout, None, runs.compressed, c)
        _, dk_s, dv_s = block_sparse_gradients(
            selected, ids, Union(entries, counts), dout, runs.selected, s
        )
        _, dk_w, dv_w = flash_gradients(window, dout, None, runs.window, w)
        return dq, dgates, dk_c, dv_c, dk_s, dv_s, dk_w, dv_w, None, None


def nsa_attention(
    q: Float[Tensor, "B H T D"],
    compressed: tuple[Float[Tensor, "B G N D"], Float[Tensor, "B G N Dv"]],
    selected: tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S Dv"]],
    window: tuple[Float[Tensor, "B G W D"], Float[Tensor, "B G W Dv"]],
    gates: Float[Tensor, "B H T 3"],
    *,
    block_size: int,
    stride: int,
    select_block_size: int,
    num_selected: int,
    window_size: int,
    num_initial: int = 1,
    num_local: int = 2,
    scale: float | None = None,
    start: int = 0,
    choose: Callable[[Tensor], Tensor] | None = None,
    return_branches: bool = False,
) -> Float[Tensor, "B H T Dv"] | tuple[Float[Tensor, "B H T Dv"], Branches]:
    """The gated sum of the three branches, each with its own keys and values (k, v).

    Eq. 5: out = sum over the branches c of gates[..., c] * attention_c(q, k_c, v_c), with gates at
    least 0, as a sigmoid gives them. `choose` may replace the choice of Eq. 8-11: it gets the
    compressed branch's lse (B, H, T) and returns ids (B, G, T, n). With return_branches the
    Branches come too.
    Errors: ValueError or TypeError that names the argument.
    """
    pairs = {"compressed": compressed, "selected": selected, "window": window}
    for name, (k, v) in pairs.items():
        check_inputs(q, k, v, names=(f"{name}[0]", f"{name}[1]"))
        if name != "compressed":
            check_keys_reach(q, k, start, name=f"{name}[0]")
    check_geometry(block_size, stride, select_block_size)
    check_counts(num_selected, num_initial, num_local)
    check_int("window_size", window_size, at_least=1)
    check_gates(gates, q)
    scale = scale_or_default(scale, q.shape[3])

    runs = Runs(
        compressed_run(block_size, stride, scale, start),
        Blocks(select_block_size, scale, start),
        window_run(q, window_size, scale, start),
    )
    choice = Choice(select_block_size, num_selected, num_initial, num_local)

    def best(lse: Tensor) -> Tensor:
        keys = runs.compressed.keys
        score = importance_scores(q, compressed[0], lse, keys, select_block_size, scale, start)
        return best_blocks(score, choice, start)

    def chosen(lse: Tensor) -> Tensor:
        ids = (choose or best)(lse)
        check_ids(ids, q, selected[0])  # its own too: the kernels take 64 blocks at most
        return ids

    out, *branches = NSA.apply(q, gates, *compressed, *selected, *window, chosen, runs)
    return (out, Branches(*branches)) if return_branches else out
