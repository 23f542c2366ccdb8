"""Eq. 5 in one function: three branches, the choice between them, gates.

    forward    compressed -> lse -> ids          backward    compressed, selected, window: the
               window                                        first writes dq, the others add to
               selected(ids), and gates * outputs            it; each fills its column of dgates

Apart, each branch would get its own gate * dout and give its own dq: six tensors as large as q that
are written only to be read once more. Here the kernels of dq multiply by the gate themselves, and
the selected forward, whose own work waits for the cache, adds up the three outputs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.block_sparse_attention import (
    Blocks,
    Mix,
    block_sparse,
    block_sparse_gradients,
    tokens_of_a_union,
)
from kernels.checks import (
    check_counts,
    check_every_block,
    check_gates,
    check_geometry,
    check_ids,
    check_int,
    check_keys_reach,
    check_most_blocks,
    check_no_gate_below_0,
    check_pair,
    check_pair_like,
    check_rule,
    check_select_block_size,
    scale_or_default,
)
from kernels.flash_attention import Run, attend_to_keys, flash, flash_gradients, run_of
from kernels.importance import choose_blocks
from kernels.online_softmax import GatedBranch, Gates, Saved
from kernels.operations import in_batches, operation
from kernels.rows import empty_gradient, empty_output, laid_out_as
from kernels.union_and_readers import Union, empty_union


class Branches(NamedTuple):
    """What the gates add up and what chose it, without gradient.

    Shapes: compressed, selected and window (B, H, T, Dv), lse (B, H, T), ids (B, G, T, n).
    """

    compressed: Tensor
    selected: Tensor
    window: Tensor
    lse: Tensor
    ids: Tensor


class Plan(NamedTuple):
    """The sizes of Eq. 5 as whole numbers; query i is token start + i."""

    block_size: int
    stride: int
    select_block_size: int
    window_size: int
    start: int

    def runs(self, q: Tensor, scale: float) -> tuple[Run, Blocks, Run]:
        """What each of the three branches needs beside its tensors."""
        return (
            run_of(q, self.block_size, self.stride, None, scale, self.start),
            Blocks(self.select_block_size, scale, self.start),
            run_of(q, 1, 1, self.window_size, scale, self.start),
        )


@operation
@in_batches
def attend_to_branches(
    q: Tensor,
    gates: Tensor,
    pairs: Sequence[Tensor],
    compressed: Sequence[Tensor],
    ids: Tensor,
    plan: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Eq. 5, once the compressed branch has its out and lse and the blocks are chosen.

    pairs: k and v of compressed, selected, window; the first two for the gradient's sake, which is
    one function for all three branches. Returns the gated sum, out and lse of the selected branch
    and of the window, and the Union.
    """
    _, _, k_s, v_s, k_w, v_w = pairs
    _, blocks, run = Plan(*plan).runs(q, scale)
    window = flash(q, k_w, v_w, run)
    out = torch.empty_like(window.out)
    mix = Mix(gates.contiguous(), laid_out_as(compressed[0], out), window.out, out)
    selected, shared = block_sparse(q, k_s, v_s, ids.contiguous(), blocks, mix)
    return out, selected.out, selected.lse, window.out, window.lse, *shared


@operation
@in_batches
def attend_to_branches_backward(
    q: Tensor,
    gates: Tensor,
    pairs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    ids: Tensor,
    shared: Sequence[Tensor],
    dout: Tensor,
    plan: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, the gates and pairs; outputs are each branch's out and lse."""
    gates = gates.contiguous()
    dgates = torch.empty_like(gates)
    dq = empty_gradient(q)
    c, s, w = (Saved(q, *pairs[i : i + 2], *outputs[i : i + 2]) for i in (0, 2, 4))
    for_c, for_s, for_w = (GatedBranch(Gates(gates, dgates), i, dq) for i in range(3))
    compressed, blocks, window = Plan(*plan).runs(q, scale)
    _, *of_c = flash_gradients(c, dout, None, compressed, for_c)
    _, *of_s = block_sparse_gradients(s, ids.contiguous(), Union(*shared), dout, blocks, for_s)
    _, *of_w = flash_gradients(w, dout, None, window, for_w)
    return dq, dgates, *of_c, *of_s, *of_w


@attend_to_branches.register_fake
def _(q, _gates, pairs, _compressed, ids, *_):
    _, _, k_s, v_s, _, v_w = pairs
    tokens = tokens_of_a_union(q, k_s, v_s)
    selected = empty_output(q, v_s.shape[3])
    window = empty_output(q, v_w.shape[3])
    return torch.empty_like(window[0]), *selected, *window, *empty_union(ids, tokens)


@attend_to_branches_backward.register_fake
def _(q, gates, pairs, *_):
    dgates = torch.empty_like(gates, memory_format=torch.contiguous_format)
    return empty_gradient(q), dgates, *(empty_gradient(x) for x in pairs)


def save(ctx, inputs, output):
    q, gates, pairs, compressed, ids, ctx.plan, ctx.scale = inputs
    ctx.save_for_backward(q, gates, ids, *pairs, *compressed, *output[1:])
    ctx.set_materialize_grads(False)


def backward(ctx, dout, *_):  # nobody differentiates the branches
    q, gates, ids, *saved = ctx.saved_tensors
    pairs, outputs, shared = saved[:6], saved[6:12], saved[12:]
    dq, dgates, *dpairs = attend_to_branches_backward(
        q, gates, pairs, outputs, ids, shared, dout, ctx.plan, ctx.scale
    )
    return dq, dgates, dpairs, [None, None], None, None, None


attend_to_branches.register_autograd(backward, setup_context=save)


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
    compressed branch's lse (B, H, T) and returns ids (B, G, T, n), distinct as selected_attention
    takes them. With return_branches the Branches come too. Keys and values behind the last query
    are not read. Sequences of a batch may end early: padding behind one, with finite scores,
    changes nothing before it; leave it out of the loss.
    Errors: ValueError or TypeError that names the argument.
    """
    pairs = {"compressed": compressed, "selected": selected, "window": window}
    for name, pair in pairs.items():
        check_pair(q, pair, name)
        check_pair_like(name, pair, "compressed", compressed)
        if name != "compressed":
            check_keys_reach(q, pair[0], start, name=f"{name}[0]")
    check_geometry(block_size, stride, select_block_size)
    check_select_block_size(select_block_size)
    check_every_block(q, compressed[0], block_size, stride, start, "compressed[0]")
    check_counts(num_selected, num_initial, num_local)
    check_most_blocks(num_selected)
    check_int("window_size", window_size, at_least=1)
    check_rule(choose)
    check_gates(gates, q)
    check_no_gate_below_0(gates)
    scale = scale_or_default(scale, q.shape[3])

    with torch.no_grad():  # its gradient is a part of attend_to_branches
        out_c, lse = attend_to_keys(q, *compressed, block_size, stride, None, scale, start)
    if choose is None:
        choice = select_block_size, num_selected, num_initial, num_local
        ids = choose_blocks(q, compressed[0], lse, block_size, stride, *choice, scale, start)
    else:
        ids = choose(lse)
        check_ids(ids, q, selected[0])
    plan = Plan(block_size, stride, select_block_size, window_size, start)
    pairs = [*compressed, *selected, *window]
    out, out_s, _, out_w, *_ = attend_to_branches(q, gates, pairs, [out_c, lse], ids, plan, scale)
    if not return_branches:
        return out
    return out, Branches(out_c, out_s.detach(), out_w.detach(), lse, ids)
