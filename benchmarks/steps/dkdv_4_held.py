"""dk and dv 4, operands in registers: k and v are held, two readers a step use them.

The compiler is told that the walk has a step: not knowing it, it lets each product wait.
"""

from kernels.launching import launch  # before triton, which kernels may set to interpret

# isort: split
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.steps.case import Case, added_up, empty_sums
from kernels.block_sparse_attention import chunk_of_readers
from kernels.descriptors import descriptor
from kernels.online_softmax import LOG2E
from kernels.union_and_readers import CHUNK


@triton.jit
def dkdv(
    desc_q,
    desc_k,
    desc_v,
    desc_do,
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
    first = list_id % readers.blocks * L
    key = first + tl.arange(0, L)
    held = (tl.arange(0, L) < L)[:, None]
    k_tile = tl.where(held, desc_k.load([0, group, first, 0]).reshape(L, D), 0.0)
    v_tile = tl.where(held, desc_v.load([0, group, first, 0]).reshape(L, D), 0.0)
    scale = sizes.scale * LOG2E
    dk = tl.zeros([L, D], tl.float32)
    dv = tl.zeros([L, D], tl.float32)
    begin, end = chunk_of_readers(readers, list_id, CHUNK)
    tl.assume(end > begin)
    for some in range(begin, end, 2):
        for i in tl.static_range(2):
            reader = some + i
            token = tl.load(readers.indices + tl.minimum(reader, end - 1))
            q_tile = desc_q.load([0, group * R, token, 0]).reshape(R, D)
            do_tile = desc_do.load([0, group * R, token, 0]).reshape(R, D)
            number = token.to(tl.int64) * sizes.H + heads
            row_lse = tl.load(numbers.lse + number)
            delta = tl.load(numbers.delta + number)
            limit = tl.where(reader < end, token, -1)  # a step that is not filled: nothing
            mask = (key <= limit)[:, None]  # [L, 1]
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
        descriptor(x.q, x.tile.R, 1),
        descriptor(x.k, 1, x.tile.L),
        descriptor(x.v, 1, x.tile.L),
        descriptor(x.dout, x.tile.R, 1),
        x.numbers,
        x.readers,
        sums,
        x.sizes,
        TILE=x.tile,
        CHUNK=CHUNK,
        num_warps=4,
        num_stages=4,
    )
    return added_up(sums, x)
