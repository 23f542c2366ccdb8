"""Branch 1: each block of tokens becomes one key and one value, and queries read those."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nsa_lite.attention import attend
from nsa_lite.blocks import num_compressed, query_positions, visible_compressed
from nsa_lite.checks import (
    autocasts,
    require,
    require_alike,
    require_attention_inputs,
    require_compression,
    require_float_tensor,
    require_int,
    require_scale,
)
from nsa_lite.config import PHIS


class Phi(nn.Module):
    """phi of Eq. 7: add an intra-block position encoding, then a two-layer MLP, (l, D) -> (D).

    kind="mean+mlp" adds the block's mean to the result: ours, not the paper's. It starts as
    a fair summary, so short trainings learn to choose blocks sooner. kind="mean" is the mean alone,
    without weights, as in later methods.
    """

    def __init__(self, width: int, block_size: int, stride: int, kind: str = "mlp") -> None:
        super().__init__()
        require_int("width", width, at_least=1)
        require_compression(block_size, stride)
        require(kind in PHIS, "kind", repr(kind), f"must be one of {PHIS}")
        self.width = width
        self.block_size = block_size
        self.stride = stride
        self.kind = kind
        if kind == "mean":
            return
        self.position = nn.Parameter(torch.randn(block_size, width) * 0.02)
        self.mlp = nn.Sequential(
            nn.Linear(block_size * width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Float[Tensor, "B G T D"]) -> Float[Tensor, "B G N D"]:
        """N = max(0, (T - l) // d + 1) whole blocks, one row each."""
        require_float_tensor("x", x, "B, G, T, D")
        fits = x.shape[3] == self.width
        require(fits, "x.shape", tuple(x.shape), f"its width must be {self.width}")
        blocks = split_blocks(x, self.block_size, self.stride)  # (B, G, N, l, D)
        if self.kind == "mean":
            return blocks.mean(-2)
        if not autocasts(x.device.type):
            require_alike("x", x, "position", self.position)
        summary = self.mlp((blocks + self.position).flatten(-2))
        return summary + blocks.mean(-2) if self.kind == "mean+mlp" else summary


def split_blocks(
    x: Float[Tensor, "B G T D"], block_size: int, stride: int
) -> Float[Tensor, "B G N {block_size} D"]:
    """The overlapping compression blocks of a sequence; a tail too short for a block is left out.

    Block i is x[:, :, i*d : i*d + l].
    """
    if x.shape[2] < block_size:  # no block, but one that x gets its gradient (of 0) through
        return x[:, :, :0, None].expand(-1, -1, -1, block_size, -1)
    return x.unfold(2, block_size, stride).transpose(-1, -2)


def compressed_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G N D"],
    v: Float[Tensor, "B G N Dv"],
    *,
    block_size: int,
    stride: int,
    scale: float | None = None,
    start: int = 0,
) -> tuple[Float[Tensor, "B H T Dv"], Float[Tensor, "B H T"]]:
    """Attention to compressed keys and values whose whole block the query has passed (Eq. 7).

    Returns the output and the natural log-sum-exp; a query that sees no block (t < l - 1) gets
    0 and -inf. k and v are phi's blocks, all of them or the first ones: rows behind those that the
    last query sees are not read, so raw keys in their place are read as if they were blocks.
    Errors: ValueError or TypeError that names the argument.
    """
    require_attention_inputs(q, k, v)
    require_compression(block_size, stride)
    require_scale(scale)
    require_int("start", start, at_least=0)
    return attend_compressed(q, k, v, block_size, stride, scale, start)


def finished_blocks(
    x: Float[Tensor, "B G N D"], q: Tensor, block_size: int, stride: int, start: int
) -> Float[Tensor, "B G _ D"]:
    """The compressed keys or values that the last query sees: what lies behind may be anything."""
    return x[:, :, : num_compressed(start + q.shape[2], block_size, stride)]


def attend_compressed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    stride: int,
    scale: float | None,
    start: int,
) -> tuple[Tensor, Tensor]:
    """compressed_attention without its checks."""
    k = finished_blocks(k, q, block_size, stride, start)
    v = finished_blocks(v, q, block_size, stride, start)
    mask = visible_compressed(query_positions(q, start), k.shape[2], block_size, stride)
    return attend(q, k, v, mask, scale)
