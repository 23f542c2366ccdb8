"""The selection from both sides: what a few neighbouring tokens read, and who reads a block.

union       tokens 4i .. 4i+3 chose  {0 3 7} {0 3 8} {0 4 8} {0 4 8}
            their union              0:1111  3:0011  7:0001  8:1110  4:1100
            one entry a block, in the order of first appearance, with a bit for each
            token that chose it: the lowest bit is the first token's

readers     the same table by block, as a CSR matrix: the tokens that chose block j are
            indices[indptr[j] : indptr[j + 1]], the first token first; cut into chunks

Both orders are fixed, so that sums over them come out the same in every run. In both, tokens behind
a token come after it: they (the padding of a shorter sequence, say) move nothing in its walk over a
union, nor in the chunks that its block's readers are cut into, and its sums stay the same to the
last bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launching import grid_of, launch
from kernels.tile_sizes import cdiv, padded

NEIGHBOURS = 32  # most tokens that share a program: an entry keeps a bit for each
CHUNK = 1024  # tokens of a list that one program of the backward walks through


class Union(NamedTuple):
    """The blocks that each tile of U neighbouring tokens reads; an entry is block * 2^U + U bits.

    Shapes: entries (B, G, tiles, U n) int64, counts (B, G, tiles) int32, the entries that are
    filled.
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
    BLOCK_S: tl.constexpr,
):
    """The union of the n blocks of each of BLOCK_T neighbouring tokens.

    Tiles: all ids, BLOCK_T * n padded to [BLOCK_E], below some of one token's, [BLOCK_S]; which
    are the same, [BLOCK_S, BLOCK_E], a column a thread.
    """
    e = tl.arange(0, BLOCK_E)
    first = tl.program_id(0) * BLOCK_T
    ids += (tl.program_id(1).to(tl.int64) * T + first) * n
    count = tl.minimum(T - first, BLOCK_T) * n
    block = tl.load(ids + e, mask=e < count, other=-1)
    real = (block >= 0) & (block < num_blocks)
    who = tl.zeros([BLOCK_E], tl.int64)
    again = tl.zeros([BLOCK_E], tl.int32)  # its own token named it before
    for some in range(0, n, BLOCK_S):
        s = some + tl.arange(0, BLOCK_S)
        for u in range(BLOCK_T):
            theirs = tl.load(ids + u * n + s, mask=(s < n) & (u * n < count), other=-1)
            who |= tl.max((block[None, :] == theirs[:, None]).to(tl.int32), 0).to(tl.int64) << u
        earlier = (s[:, None] < (e % n)[None, :]) & real[None, :]
        own = tl.load(ids + (e - e % n)[None, :] + s[:, None], mask=earlier, other=-1)
        again |= tl.max((block[None, :] == own).to(tl.int32), 0)
    before = who & ((1 << (e // n).to(tl.int64)) - 1)
    new = real & (again == 0) & (before == 0)
    slot = tl.cumsum(new.to(tl.int32), 0) - 1
    tile = tl.program_id(1).to(tl.int64) * tiles + tl.program_id(0)
    entry = (block.to(tl.int64) << BLOCK_T) + who
    tl.store(entries + tile * BLOCK_T * n + slot, entry, mask=new)
    tl.store(counts + tile, tl.sum(new.to(tl.int32), 0))


def empty_union(ids: Tensor, neighbours: int) -> Union:
    """Room for the Union of ids (B, G, T, n); 0 where no entry comes."""
    batch, groups, length, n = ids.shape
    tiles = cdiv(length, neighbours)
    entries = ids.new_zeros(batch, groups, tiles, neighbours * n, dtype=torch.int64)
    return Union(entries, ids.new_empty(batch, groups, tiles, dtype=torch.int32))


def union(ids: Tensor, neighbours: int, blocks: int) -> Union:
    """What each tile of neighbouring tokens reads, of so many blocks. Shapes: ids (B, G, T, n)."""
    batch, groups, length, n = ids.shape
    entries, counts = empty_union(ids, neighbours)
    tiles = counts.shape[2]
    BLOCK_E = padded(neighbours * n)
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
        BLOCK_E=BLOCK_E,
        BLOCK_S=16,
        num_warps=max(1, min(16, BLOCK_E // 64)),
    )
    return Union(entries, counts)


def readers(ids: Tensor, blocks: int, chunk: int = CHUNK) -> Readers:
    """Turn the table around by one stable sort; nothing here waits for the device."""
    batch, groups, length, n = ids.shape
    lists = batch * groups * blocks
    first = torch.arange(batch * groups, dtype=torch.int32, device=ids.device) * blocks
    flat = ids.reshape(batch * groups, length * n)
    flat = torch.where((flat >= 0) & (flat < blocks), flat + first[:, None], lists).flatten()
    sorted_lists, order = flat.int().sort(stable=True)
    indices = (order % (length * n) // n).int()
    every = torch.arange(lists + 1, dtype=torch.int32, device=ids.device)
    indptr = torch.searchsorted(sorted_lists, every, out_int32=True)
    chunks = (indptr.diff() + chunk - 1) // chunk
    chunk_indptr = torch.nn.functional.pad(chunks.cumsum(0, dtype=torch.int32), (1, 0))
    most = batch * groups * length * n // chunk + lists  # a bound, so that no count is read here
    each = torch.arange(most, dtype=torch.int32, device=ids.device)
    chunk_list = torch.searchsorted(chunk_indptr[1:], each, right=True, out_int32=True)
    return Readers(indices, indptr, chunk_list, chunk_indptr, lists, blocks)
