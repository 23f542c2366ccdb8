"""dk and dv 1, lists: notebook 11's kernel, for every group, any length, and half precision.

A program owns a block and walks over all its readers, one token's heads a step. Every token reads
block 0, so one program in each group walks over the whole sequence.
"""

from kernels.launching import launch  # before triton, which kernels may set to interpret

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.steps.case import Case
from kernels.block_sparse_attention import ChunkSums
from kernels.online_softmax import LOG2E


@triton.jit
def dkdv(
    q,
    k,
    v,
    dout,
    numbers,
    readers,
    grads,
    sizes,
    TILE: tl.constexpr,
):
    """dk and dv of one block from all its readers; a reader is a token's R rows.

    Tiles: k, v and their gradients [L, D], a reader's q and dout [R, D], the scores [L, R].
    """
    D: tl.constexpr = TILE.D
    L: tl.constexpr = TILE.L
    R: tl.constexpr = TILE.R
    group = tl.program_id(0) // readers.blocks
    heads = group * R + tl.arange(0, R)
    column = tl.arange(0, D)
    key = tl.program_id(0) % readers.blocks * L + tl.arange(0, L)
    inside = (key < sizes.T)[:, None]
    at = (group.to(tl.int64) * sizes.T + key)[:, None] * D + column[None, :]  # [L, D]
    k_tile = tl.load(k + at, mask=inside, other=0.0)
    v_tile = tl.load(v + at, mask=inside, other=0.0)
    scale = sizes.scale * LOG2E
    dk = tl.zeros([L, D], tl.float32)
    dv = tl.zeros([L, D], tl.float32)
    begin = tl.load(readers.indptr + tl.program_id(0))
    end = tl.load(readers.indptr + tl.program_id(0) + 1)
    for reader in range(begin, end):
        token = tl.load(readers.indices + reader)
        rows = (heads.to(tl.int64) * sizes.T + token)[:, None] * D + column[None, :]  # [R, D]
        q_tile = tl.load(q + rows)
        do_tile = tl.load(dout + rows)
        number = token.to(tl.int64) * sizes.H + heads
        row_lse = tl.load(numbers.lse + number)
        delta = tl.load(numbers.delta + number)
        mask = (key <= token)[:, None]  # [L, 1]
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        p = tl.where(mask, tl.exp2(s * scale - row_lse[None, :]), 0.0)
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    tl.store(grads.dk + at, (dk * sizes.scale).to(grads.dk.dtype.element_ty), mask=inside)
    tl.store(grads.dv + at, dv.to(grads.dv.dtype.element_ty), mask=inside)


def run(x: Case) -> tuple[Tensor, Tensor]:
    """dk and dv (1, G, T, D) of a case."""
    grads = ChunkSums(torch.empty_like(x.k), torch.empty_like(x.v))
    launch(
        dkdv,
        (x.readers.lists,),
        x.q,
        x.k,
        x.v,
        x.dout,
        x.numbers,
        x.readers,
        grads,
        x.sizes,
        TILE=x.tile,
        num_warps=4,
        num_stages=2,
    )
    return grads.dk, grads.dv
