"""The selection from both sides: what a few neighbouring tokens read, and who reads a block.

union       tokens 4i .. 4i+3 chose  {0 3 7} {0 3 8} {0 4 8} {0 4 8}
            their union              0:1111  3:0011  7:0001  8:1110  4:1100
            one entry a block, in the order of first appearance, with a bit for each
            token that chose it: the lowest bit is the first token's

readers     the same table by block, as a CSR matrix: the tokens that chose block j are
            indices[indptr[j] : indptr[j + 1]], in one fixed order (the last token first), so
            that sums over it come out the same in every run; cut into chunks
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launching import grid_of, launch
from kernels.tile_sizes import cdiv, power_of_two

NEIGHBOURS = 4  # most tokens that share a program: an entry keeps a bit for each
BITS = tl.constexpr(1 << NEIGHBOURS)  # an entry is block * BITS + the bits
CHUNK = 1024  # tokens of a list that one program of the backward walks through


class Union(NamedTuple):
    """The blocks that each tile of neighbouring tokens reads; an entry is block * BITS + the bits.

    Shapes: entries (B, G, tiles, neighbours * n) int32, counts (B, G, tiles) int32, the entries
    that are filled.
    """

    entries: Tensor
    counts: Tensor


class Readers(NamedTuple):
    """Who reads each block. Lists of all (batch, group) pairs lie end to end, as do the chunks.

    Shapes: indices (B G T n,) the tokens, indptr (lists + 1,) into them, chunk_list (chunks at
    most,) the list of each chunk, or `lists` where there is none, chunk_indptr (lists + 1,); all
    int32. lists = B G blocks.
    """

    indices: Tensor
    indptr: Tensor
    chunk_list: Tensor
    chunk_indptr: Tensor
    lists: int
    blocks: int


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def list_union(
    ids,
    entries,
    counts,
    T,
    tiles,
    num_blocks,
    n: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The union of the n blocks of each of BLOCK_T neighbouring tokens.

    Tiles: the BLOCK_T * n ids, padded to [BLOCK_E], and which are the same, [BLOCK_E, BLOCK_E].
    """
    e = tl.arange(0, BLOCK_E)
    token = tl.program_id(0) * BLOCK_T + e // n
    at = (tl.program_id(1).to(tl.int64) * T + token) * n + e % n
    block = tl.load(ids + at, mask=(e < BLOCK_T * n) & (token < T), other=-1)
    real = (block >= 0) & (block < num_blocks)
    same = (block[:, None] == block[None, :]) & real[None, :]
    new = real & (tl.sum((same & (e[None, :] < e[:, None])).to(tl.int32), 1) == 0)
    # One bit a token, and a bit counts once even where a token names a block twice.
    who = tl.reduce(tl.where(same, 1 << (e // n)[None, :], 0), 1, either)
    slot = tl.cumsum(new.to(tl.int32), 0) - 1
    tile = tl.program_id(1).to(tl.int64) * tiles + tl.program_id(0)
    tl.store(entries + tile * BLOCK_T * n + slot, block * BITS + who, mask=new)
    tl.store(counts + tile, tl.sum(new.to(tl.int32), 0))


def empty_union(ids: Tensor, neighbours: int) -> Union:
    """Room for the Union of ids (B, G, T, n); 0 where no entry comes."""
    batch, groups, length, n = ids.shape
    tiles = cdiv(length, neighbours)
    entries = ids.new_zeros(batch, groups, tiles, neighbours * n, dtype=torch.int32)
    return Union(entries, ids.new_empty(batch, groups, tiles, dtype=torch.int32))


def union(ids: Tensor, neighbours: int, blocks: int) -> Union:
    """What each tile of neighbouring tokens reads, of so many blocks. Shapes: ids (B, G, T, n)."""
    batch, groups, length, n = ids.shape
    entries, counts = empty_union(ids, neighbours)
    tiles = counts.shape[2]
    launch(
        list_union,
        grid_of(tiles, batch, groups),
        ids,
        entries,
        counts,
        length,
        tiles,
        blocks,
        n=n,
        BLOCK_T=neighbours,
        BLOCK_E=power_of_two(max(16, neighbours * n)),
        num_warps=1 if n <= 16 else 4,
    )
    return Union(entries, counts)


def readers(ids: Tensor, blocks: int, chunk: int = CHUNK) -> Readers:
    """Turn the table around by one stable sort; nothing here waits for the device."""
    batch, groups, length, n = ids.shape
    lists = batch * groups * blocks
    first = torch.arange(batch * groups, dtype=torch.int32, device=ids.device) * blocks
    flat = ids.flip(2).reshape(batch * groups, length * n)  # from the last token to the first
    flat = torch.where((flat >= 0) & (flat < blocks), flat + first[:, None], lists).flatten()
    sorted_lists, order = flat.int().sort(stable=True)
    indices = (length - 1 - order % (length * n) // n).int()
    every = torch.arange(lists + 1, dtype=torch.int32, device=ids.device)
    indptr = torch.searchsorted(sorted_lists, every, out_int32=True)
    chunks = (indptr.diff() + chunk - 1) // chunk
    chunk_indptr = torch.nn.functional.pad(chunks.cumsum(0, dtype=torch.int32), (1, 0))
    most = batch * groups * length * n // chunk + lists  # a bound, so that no count is read here
    each = torch.arange(most, dtype=torch.int32, device=ids.device)
    chunk_list = torch.searchsorted(chunk_indptr[1:], each, right=True, out_int32=True)
    return Readers(indices, indptr, chunk_list, chunk_indptr, lists, blocks)
