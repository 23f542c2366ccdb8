"""Rotary position encoding (RoPE, arXiv 2104.09864) of all heads in one pass over memory.

    program:  BLOCK_T tokens of one batch entry: cos and sin of their angles once, then head by head
              (all of them, or a share where there are few tokens)
              [a | b] -> [a cos - b sin | a sin + b cos]        a, b: the halves of a head's row

It reads rows wherever they lie and writes a token's heads side by side, so what a linear map made,
(B, T, heads * D), needs no copy before or after. Its gradient turns back: the same pass with the
opposite sign.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from kernels.checks import check_positive, check_rotation, check_width
from kernels.launching import launch
from kernels.operations import operation, watched
from kernels.rows import empty_beside, load_rows, row_offsets, rows, rows_contiguous, store_rows
from kernels.tile_sizes import cdiv, power_of_two

BLOCK_T = 16
PROGRAMS = 528  # at least, as far as there are heads to share: four for each multiprocessor


@triton.jit
def rotate_rows(
    x,
    positions,
    speed,
    out,
    heads,
    share,  # of the heads, for one program
    T,
    stride,  # of positions, from one batch entry to the next: 0 if all have the same
    sign,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A share of the heads of BLOCK_T tokens.

    Tiles: the angles, and the halves a, b of a head's rows, all [T, C] with C = D / 2 padded.
    Grid: batch x tiles of tokens, shares of the heads.
    """
    tiles = tl.cdiv(T, BLOCK_T)
    b = tl.program_id(0) // tiles
    token = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = token < T
    channel = tl.arange(0, BLOCK_HALF)
    turns = tl.load(speed + channel, mask=channel < HALF, other=0.0)
    position = tl.load(positions + b * stride + token, mask=mask, other=0).to(tl.float32)
    angle = position[:, None] * turns[None, :]  # [T, C]
    cos = tl.cos(angle)
    sin = tl.sin(angle) * sign
    first = tl.program_id(1) * share
    at = row_offsets(x.strides, b, tl.zeros_like(token) + first, token)
    to = row_offsets(out.strides, b, tl.zeros_like(token) + first, token)
    for _ in range(first, tl.minimum(first + share, heads)):
        a_tile = load_rows(x.ptr, at, mask, HALF, BLOCK_HALF).to(tl.float32)
        b_tile = load_rows(x.ptr, at + HALF, mask, HALF, BLOCK_HALF).to(tl.float32)
        store_rows(out.ptr, to, a_tile * cos - b_tile * sin, mask, HALF, BLOCK_HALF)
        store_rows(out.ptr, to + HALF, a_tile * sin + b_tile * cos, mask, HALF, BLOCK_HALF)
        at += x.strides[1]
        to += out.strides[1]


known: dict[tuple, Tensor] = {}


def speeds(half: int, theta: float, device: torch.device) -> Tensor:
    """How far each channel pair turns from one position to the next; made once for each size.

    What is made while a CUDA graph is captured is that graph's: nothing is in it before a replay.
    """
    found = known.get((half, theta, device))
    if found is None:
        found = theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            known[half, theta, device] = found
    return found


def turned(x: Tensor, positions: Tensor, theta: float, sign: int) -> Tensor:
    """x (B, H, T, D) turned by sign * position * theta^(-2c/D) in channel pair c."""
    x = rows_contiguous(x)
    batch, heads, length, width = x.shape
    half = width // 2
    out = empty_beside(x, width)
    programs = cdiv(length, BLOCK_T) * batch
    share = min(heads, cdiv(heads * programs, PROGRAMS))
    launch(
        rotate_rows,
        (programs, cdiv(heads, share)),
        rows(x),
        positions.contiguous(),
        speeds(half, theta, x.device),
        rows(out),
        heads,
        share,
        length,
        0 if positions.dim() == 1 else length,
        float(sign),
        HALF=half,
        BLOCK_HALF=power_of_two(half),
        BLOCK_T=BLOCK_T,
    )
    return out


@operation
def turn(x: Tensor, positions: Tensor, theta: float, sign: int) -> Tensor:
    """turned, as an operation of torch."""
    return turned(x, positions, theta, sign)


@turn.register_fake
def _(x, *_):
    return empty_beside(x, x.shape[3])


def save(ctx, inputs, output):  # noqa: ARG001  torch gives both
    _, positions, ctx.theta, ctx.sign = inputs
    ctx.save_for_backward(positions)


def backward(ctx, dout):
    return turn(dout, *ctx.saved_tensors, ctx.theta, -ctx.sign), None, None, None


turn.register_autograd(backward, setup_context=save)


def rotate(
    x: Float[Tensor, "B H T D"],
    positions: Int[Tensor, " T"] | Int[Tensor, "B T"],
    theta: int | float = 10_000.0,
) -> Float[Tensor, "B H T D"]:
    """Rotate channel pairs (c, c + D/2) of x by position * theta^(-2c/D).

    Positions (B, T) are each sequence's own.
    Errors: ValueError or TypeError that names the argument.
    """
    check_rotation(x, positions)
    check_width("x", x)
    check_positive("theta", theta)
    if watched(x) or (x.requires_grad and torch.is_grad_enabled()):
        return turn(x, positions, float(theta), 1)
    with torch.cuda.device_of(x):
        return turned(x, positions, float(theta), 1)
