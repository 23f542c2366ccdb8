"""The selection from both sides: what a few neighbouring tokens read, and who reads a block.

    union       tokens 4i .. 4i+3 chose  {0 3 7} {0 3 8} {0 4 8} {0 4 8}
                their union              0:1111  3:0011  7:0001  8:1110  4:1100
                one entry a block, in the order of first appearance, with a bit for each
                token that chose it: the lowest bit is the first token's

    readers     the same table by block: the tokens that chose block j, the last token first,
                cut into chunks of equal length
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

NEIGHBOURS = 4  # most tokens that share a program: an entry keeps a bit for each
CHUNK = 1024  # tokens of a list that one program of the backward walks through


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def list_union(
    ids, entries, counts, T, TILES, BLOCKS, n: tl.constexpr, U: tl.constexpr, E: tl.constexpr,
):
    e = tl.arange(0, E)
    token = tl.program_id(0) * U + e // n
    at = (tl.program_id(1).to(tl.int64) * T + token) * n + e % n
    block = tl.load(ids + at, mask=(e < U * n) & (token < T), other=-1)
    real = (block >= 0) & (block < BLOCKS)
    same = (block[:, None] == block[None, :]) & real[None, :]
    new = real & (tl.sum((same & (e[None, :] < e[:, None])).to(tl.int32), 1) == 0)
    # One bit a token, and a bit counts once even where a token names a block twice.
    who = tl.reduce(tl.where(same, 1 << (e // n)[None, :], 0), 1, either)
    slot = tl.cumsum(new.to(tl.int32), 0) - 1
    tile = tl.program_id(1).to(tl.int64) * TILES + tl.program_id(0)
    tl.store(entries + tile * U * n + slot, block * 16 + who, mask=new)
    tl.store(counts + tile, tl.sum(new.to(tl.int32), 0))


def union(ids: Tensor, neighbours: int, blocks: int) -> tuple[Tensor, Tensor]:
    """The blocks that each run of neighbouring tokens reads: block * 16 + the readers' bits.

    Shapes: ids (B, G, T, n) -> entries (B, G, tiles, neighbours * n) int32, counts (B, G, tiles).
    """
    batch, groups, length, n = ids.shape
    count = triton.cdiv(length, neighbours)
    kind = dict(dtype=torch.int32, device=ids.device)
    entries = torch.empty(batch, groups, count, neighbours * n, **kind)
    counts = torch.empty(batch, groups, count, **kind)
    list_union[(count, batch * groups)](
        ids, entries, counts, length, count, blocks, n=n, U=neighbours,
        E=triton.next_power_of_2(max(16, neighbours * n)), num_warps=1 if n <= 16 else 4,
    )
    return entries, counts


@dataclass(frozen=True)
class Readers:
    """Who reads each block. Lists of all (batch, group) pairs lie end to end, as do the chunks.

    Shapes: tokens (B G T n,), bounds (lists + 1,) into tokens, owner (chunks at most,) the list of
    each chunk, or `lists` where there is none, chunk_bounds (lists + 1,). lists = B G blocks.
    """

    tokens: Tensor
    bounds: Tensor
    owner: Tensor
    chunk_bounds: Tensor


def readers(ids: Tensor, blocks: int) -> Readers:
    """Turn the table around by one stable sort; nothing here waits for the device."""
    batch, groups, length, n = ids.shape
    lists = batch * groups * blocks
    first = torch.arange(batch * groups, dtype=torch.int32, device=ids.device) * blocks
    flat = ids.flip(2).reshape(batch * groups, length * n)  # from the last token to the first
    flat = torch.where((flat >= 0) & (flat < blocks), flat + first[:, None], lists).flatten()
    sorted_lists, order = flat.int().sort(stable=True)
    tokens = (length - 1 - order % (length * n) // n).int()
    every = torch.arange(lists + 1, dtype=torch.int32, device=ids.device)
    bounds = torch.searchsorted(sorted_lists, every, out_int32=True)
    chunks = (bounds.diff() + CHUNK - 1) // CHUNK
    chunk_bounds = torch.nn.functional.pad(chunks.cumsum(0, dtype=torch.int32), (1, 0))
    most = batch * groups * length * n // CHUNK + lists  # a bound, so that no count is read here
    chunk = torch.arange(most, dtype=torch.int32, device=ids.device)
    owner = torch.searchsorted(chunk_bounds[1:], chunk, right=True, out_int32=True)
    return Readers(tokens, bounds, owner, chunk_bounds)
