"""Where blocks lie: which tokens each one covers, and which queries may look at it.

Positions and blocks count from 0. Compression block i covers tokens [i d, i d + l);
selection block j covers tokens [j l', (j + 1) l'). Sizes are taken as they are: whoever has them
from a caller has checked them.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def num_compressed(length: int, block_size: int, stride: int) -> int:
    """How many whole compression blocks fit in `length` tokens: N = max(0, (T - l) // d + 1)."""
    return max(0, (length - block_size) // stride + 1)


def num_select_blocks(length: int, select_block_size: int) -> int:
    """How many selection blocks `length` tokens touch; the last one may be cut short."""
    return -(-length // select_block_size)


def query_positions(q: Float[Tensor, "B H T D"], start: int = 0) -> Int[Tensor, " T"]:
    """Positions start .. start + T - 1 of the queries."""
    return torch.arange(start, start + q.shape[2], device=q.device)


def visible_compressed(
    positions: Int[Tensor, " T"], count: int, block_size: int, stride: int
) -> Bool[Tensor, "T {count}"]:
    """Which compression blocks end at or before each query: i d + l - 1 <= t."""
    last = torch.arange(count, device=positions.device) * stride + block_size - 1
    return last <= positions[:, None]


def visible_select_blocks(
    positions: Int[Tensor, " T"], count: int, select_block_size: int
) -> Bool[Tensor, "T {count}"]:
    """Which selection blocks start at or before each query: j l' <= t."""
    first = torch.arange(count, device=positions.device) * select_block_size
    return first <= positions[:, None]


def forced_blocks(
    positions: Int[Tensor, " T"],
    count: int,
    select_block_size: int,
    num_initial: int,
    num_local: int,
) -> Bool[Tensor, "T {count}"]:
    """Blocks that every query selects: the first few, and the last few up to its own.

    A mask, so a block that is both counts once.
    """
    j = torch.arange(count, device=positions.device)
    own = (positions // select_block_size)[:, None]
    local = (j <= own) & (j > own - num_local)
    return (j <= own) & (local | (j < num_initial))


def overlap_in_strides(
    compressed: int,
    selected: int,
    block_size: int,
    stride: int,
    select_block_size: int,
    device: torch.device | None = None,
) -> Float[Tensor, "{compressed} {selected}"]:
    """How much of selection block j compression block i covers: |C_i ∩ S_j| / d (Eq. 9).

    Whole numbers, in float32 for a matrix product. With l=32, d=16, l'=64 a column holds 1 2 2 2 1:
    the weights that Eq. 9 reaches by summing p twice. Its printed index counts from 1: from 0 it is
    (l'/d) j + m - n.
    """
    first_c = torch.arange(compressed, dtype=torch.float32, device=device)[:, None] * stride
    first_s = torch.arange(selected, dtype=torch.float32, device=device) * select_block_size
    end_c = first_c + block_size
    end_s = first_s + select_block_size
    tokens = torch.minimum(end_c, end_s) - torch.maximum(first_c, first_s)
    return tokens.clamp(min=0) / stride
