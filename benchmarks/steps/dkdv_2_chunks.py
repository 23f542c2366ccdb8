"""dk and dv 2, lists in chunks: no program walks over more than CHUNK readers.

Each chunk has sums of its own, float32, which a second kernel adds in list order: the same bits in
every run.
"""

from kernels.launching import launch  # before triton, which kernels may set to interpret

# isort: split
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.steps.case import Case, added_up, empty_sums
from kernels.block_sparse_attention import chunk_of_readers
from kernels.online_softmax import LOG2E
from kernels.union_and_readers import CHUNK


@triton.jit
def dkdv(
    q,
    k,
    v,
    dout,
    numbers,
    readers,
    sums,
    sizes,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """dk and dv of one block from one chunk of its readers; a reader is a token's R rows.

    Tiles: k, v and their gradients [L, D], a reader's q and dout [R, D], the scores [L, R].
    """
    D: tl.constexpr = TILE.D
    L: tl.constexpr = TILE.L
    R: tl.constexpr = TILE.R
    chunk = tl.program_id(0)
    list_id = tl.load(readers.chunk_list + chunk)
    if list_id >= readers.lists:
        return  # more programs are started than there are chunks
    group = list_id // readers.blocks
    heads = group * R + tl.arange(0, R)
    column = tl.arange(0, D)
    key = list_id % readers.blocks * L + tl.arange(0, L)
    inside = (key < sizes.T)[:, None]
    at = (group.to(tl.int64) * sizes.T + key)[:, None] * D + column[None, :]  # [L, D]
    k_tile = tl.load(k + at, mask=inside, other=0.0)
    v_tile = tl.load(v + at, mask=inside, other=0.0)
    scale = sizes.scale * LOG2E
    dk = tl.zeros([L, D], tl.float32)
    dv = tl.zeros([L, D], tl.float32)
    begin, end = chunk_of_readers(readers, list_id, CHUNK)
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
    slot = (chunk.to(tl.int64) * L + tl.arange(0, L))[:, None] * D + column[None, :]
    tl.store(sums.dk + slot, dk * sizes.scale)
    tl.store(sums.dv + slot, dv)


def run(x: Case) -> tuple[Tensor, Tensor]:
    """dk and dv (1, G, T, D) of a case."""
    sums = empty_sums(x)
    launch(
        dkdv,
        (len(x.readers.chunk_list),),
        x.q,
        x.k,
        x.v,
        x.dout,
        x.numbers,
        x.readers,
        sums,
        x.sizes,
        TILE=x.tile,
        CHUNK=CHUNK,
        num_warps=4,
        num_stages=2,
    )
    return added_up(sums, x)
