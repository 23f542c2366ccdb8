"""Rotary position encoding: turn each pair of channels by an angle that grows with position."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa_lite.checks import require_positive, require_rotation


def rotate(
    x: Float[Tensor, "*heads T D"],
    positions: Int[Tensor, " T"] | Int[Tensor, "B T"],
    theta: float = 10_000.0,
) -> Float[Tensor, "*heads T D"]:
    """Rotate channel pairs (c, c + D/2) of x by position * theta^(-2c/D) (RoPE, 2104.09864).

    The product of a rotated query and a rotated key then depends on their distance only. Positions
    (B, T) are each sequence's own, for x (B, heads, T, D).
    Errors: ValueError or TypeError that names the argument.
    """
    require_rotation(x, positions)
    require_positive("theta", theta)
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[..., None] * speed
    if positions.dim() == 2:
        angle = angle[:, None]  # all heads of a sequence alike
    cos = angle.cos().to(x.dtype)
    sin = angle.sin().to(x.dtype)
    a = x[..., :half]
    b = x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
