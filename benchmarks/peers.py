"""The public kernels that ours are held beside: dense attention three times, and fla's NSA.

Each maker returns a function of no arguments that runs the forward, or raises an error that says
why this peer cannot run here. A peer is measured, never used.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import Sizes

Forward = Callable[[], Tensor]


def scaled_dot_product(x: dict[str, Tensor], backend: SDPBackend) -> Forward:
    """torch's attention, dense and causal, held to one backend."""
    q, k, v = x["q"], x["window.k"], x["window.v"]

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return forward


def flash_attention_2(x: dict[str, Tensor], sizes: Sizes, ids: Tensor) -> Forward:
    """FlashAttention-2 as torch ships it."""
    return scaled_dot_product(x, SDPBackend.FLASH_ATTENTION)


def cudnn(x: dict[str, Tensor], sizes: Sizes, ids: Tensor) -> Forward:
    """cuDNN's fused attention."""
    return scaled_dot_product(x, SDPBackend.CUDNN_ATTENTION)


def flex_attention(x: dict[str, Tensor], sizes: Sizes, ids: Tensor) -> Forward:
    """torch's flex_attention, compiled, with a causal block mask."""
    import torch._functorch.config as functorch
    from torch.nn.attention import flex_attention as flex

    functorch.donated_buffer = False  # its backward is run more than once
    q, k, v = x["q"], x["window.k"], x["window.v"]
    length = q.shape[2]
    mask = flex.create_block_mask(
        lambda b, h, t, s: t >= s, None, None, length, length, device=q.device
    )
    compiled = torch.compile(flex.flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def fla_inputs(x: dict[str, Tensor]) -> list[Tensor]:
    """q, k, v of the selected branch with the heads behind the tokens, as fla wants them.

    The copies are leaves, so that a backward ends at them as ours ends at x.
    """
    return [
        x[name].detach().transpose(1, 2).contiguous().requires_grad_()
        for name in ("q", "selected.k", "selected.v")
    ]


def fla_selected(x: dict[str, Tensor], sizes: Sizes, ids: Tensor) -> Forward:
    """The selected branch of fla-core, on the same blocks."""
    from fla.ops.nsa.parallel import ParallelNSAFunction

    q, k, v = fla_inputs(x)
    chosen = ids.transpose(1, 2).contiguous()
    return lambda: ParallelNSAFunction.apply(
        q, k, v, chosen, sizes.num_selected, sizes.select_block_size, sizes.width**-0.5, None
    )


def fla_whole(x: dict[str, Tensor], sizes: Sizes, ids: Tensor) -> Forward:
    """fla-core's NSA: mean-pooled blocks with l = d = 64, its own top-n, gates.

    That is a quarter of the paper's compression. Its window needs flash-attn: where that is
    not installed the window is left out, which favours fla.
    """
    from fla.ops.nsa.parallel import flash_attn_func, parallel_nsa

    q, k, v = fla_inputs(x)
    gates = [
        x["gates"][..., i].detach().transpose(1, 2).contiguous().requires_grad_() for i in range(3)
    ]
    window = sizes.window if flash_attn_func is not None else 0
    return lambda: parallel_nsa(
        q,
        k,
        v,
        *gates,
        block_counts=sizes.num_selected,
        block_size=sizes.select_block_size,
        window_size=window,
    )


DENSE = {"FlashAttention-2": flash_attention_2, "cuDNN": cudnn}
SLOW_TO_START = {
    "flex_attention": flex_attention,
    "fla-core selected": fla_selected,
    "fla-core NSA": fla_whole,
}


IN_FULL = ("A", "tiny")  # the configs that take the peers that are slow to start too


def beside(slow: bool, again: bool) -> dict[str, Callable]:
    """The peers to time; `again`: those that depend on which blocks were selected.

    flex_attention and fla-core take up to a minute to compile or tune for each length, so they
    come after all others. fla-core's NSA makes its own choice of blocks.
    """
    if not slow:
        return {} if again else DENSE
    return {"fla-core selected": fla_selected} if again else SLOW_TO_START
