"""What the steps of one chain share: the tensors that each takes, and the sizes of its tiles."""

from kernels import launching  # before triton, which kernels may set to interpret

# isort: split
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton import KernelInterface

from benchmarks.bench import KEEP
from benchmarks.cases import CONFIGS, coherent_ids, inputs, random_ids
from benchmarks.cases import Sizes as Layer
from benchmarks.steps import chain
from kernels.block_sparse_attention import (
    Blocks,
    ChunkSums,
    add_up,
    block_sparse,
    block_sparse_gradients,
)
from kernels.online_softmax import LOG2E
from kernels.tile_sizes import power_of_two
from kernels.union_and_readers import CHUNK, Readers, Union, readers, union

KINDS = ("random", "coherent .75")  # which blocks the tokens chose
LENGTH = 65536
TOKENS = 4  # that share a program, as the package's kernels have it for 16 heads a group


class Sizes(NamedTuple):
    """Runtime sizes: heads, tokens, blocks that a token chose, the factor before every score."""

    H: int
    T: int
    n: int
    scale: float


class Tile(NamedTuple):
    """Compile-time sizes: heads of a group, tokens of a program, columns, keys of a block (l')."""

    R: int
    U: int
    D: int
    L: int


class RowNumbers(NamedTuple):
    """A float32 number for each row, (1, T, H): the log-sum-exp in powers of 2, and delta.

    A token's heads lie side by side, since dk and dv read them together.
    """

    lse: Tensor
    delta: Tensor


class Case(NamedTuple):
    """What a step is handed, made before any clock runs; one sequence, contiguous tensors.

    Shapes: q, out, dout (1, H, T, D), k, v (1, G, T, D), ids (1, G, T, n), lse (1, H, T).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    ids: Tensor
    dout: Tensor
    union: Union
    readers: Readers
    out: Tensor
    lse: Tensor
    numbers: RowNumbers
    sizes: Sizes
    tile: Tile


def case_of(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, dout: Tensor, block: int) -> Case:
    """A case from its tensors and l'; what the backward needs comes from the package's forward.

    Shapes: those of Case. Errors: ValueError for sizes that the steps, kept short, cannot take.
    """
    R = q.shape[1] // k.shape[1]
    width = q.shape[3]
    for name, size in (("heads of a group", R), ("width", width), ("block", block)):
        if size != power_of_two(size) or size < 16:
            raise ValueError(f"{name} = {size}: the steps take powers of two from 16 on")
    T = q.shape[2]
    scale = width**-0.5
    saved, _ = block_sparse(q, k, v, ids, Blocks(block, scale, 0))
    out = saved.out.contiguous()
    blocks = -(-T // block)
    return Case(
        q=q,
        k=k,
        v=v,
        ids=ids,
        dout=dout,
        union=union(ids, TOKENS, blocks),
        readers=readers(ids, blocks, CHUNK),
        out=out,
        lse=saved.lse,
        numbers=row_numbers(out, saved.lse, dout),
        sizes=Sizes(q.shape[1], T, ids.shape[3], scale),
        tile=Tile(R, TOKENS, width, block),
    )


def row_numbers(out: Tensor, lse: Tensor, dout: Tensor) -> RowNumbers:
    """RowNumbers by torch; 0 in place of -inf, since all weights of such a row are masked."""
    base_2 = lse.masked_fill(lse == -torch.inf, 0.0) * LOG2E.value
    heads = zip(out[0], dout[0], strict=True)  # head by head: products in float32 are large
    delta = torch.stack([(o.float() * do.float()).sum(-1) for o, do in heads], dim=-1)
    return RowNumbers(base_2.transpose(1, 2).contiguous(), delta[None])


@cache
def drawn(kind: str, length: int = LENGTH, layer: Layer = CONFIGS["A"]) -> Case:
    """The case that steps are timed on: random tensors, and ids of a kind; bf16 on a GPU."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    x = inputs(layer, length, device, dtype)
    ids = (
        random_ids(layer, length, device)
        if kind == "random"
        else coherent_ids(layer, length, device, KEEP[kind])
    )
    tensors = (x[name].detach() for name in ("q", "selected.k", "selected.v"))
    return case_of(*tensors, ids, x["dout"], layer.select_block_size)


def empty_sums(x: Case) -> ChunkSums:
    """Room for the sums of every chunk of readers."""
    shape = len(x.readers.chunk_list), x.tile.L, x.tile.D
    return ChunkSums(*(x.k.new_empty(shape, dtype=torch.float32) for _ in range(2)))


def added_up(sums: ChunkSums, x: Case) -> tuple[Tensor, Tensor]:
    """dk and dv (1, G, T, D): each block's chunks, added in order by the package's kernel."""
    dk = torch.empty_like(x.k)
    dv = torch.empty_like(x.v)
    blocks = Blocks(x.tile.L, x.sizes.scale, 0)
    add_up(sums.dk, dk, x.readers, blocks)
    add_up(sums.dv, dv, x.readers, blocks)
    return dk, dv


# --- the package's own kernels on the same case ---

SHIPPED = {
    "forward": ("selected_forward",),
    "dq": ("selected_dq",),
    "dkdv": ("selected_dkdv", "add_chunks"),
}


def shipped(x: Case, family: str) -> Callable[[], None]:
    """The package's launches of one family on this case, to be made again and again."""
    before = launching.starter
    launches = []

    def keep(kernel: KernelInterface, grid: tuple, arguments: tuple, options: dict) -> None:
        if kernel.__name__ in SHIPPED[family]:
            launches.append((kernel, grid, arguments, options))
        before(kernel, grid, arguments, options)

    blocks = Blocks(x.tile.L, x.sizes.scale, 0)
    with launching.launching_by(keep):
        saved, shared = block_sparse(x.q, x.k, x.v, x.ids, blocks)
        block_sparse_gradients(saved, x.ids, shared, x.dout, blocks)

    def run() -> None:
        for kernel, grid, arguments, options in launches:
            launching.launch(kernel, grid, *arguments, **options)

    return run


def runner(x: Case, name: str) -> Callable[[], object]:
    """What runs one step on this case; "forward_shipped" is the package's own kernel."""
    if name.endswith("_shipped"):
        return shipped(x, chain.family_of(name))
    run = chain.step(name).run
    return lambda: run(x)


def at_64k(name: str) -> Callable[[], object]:
    """A step at 64k tokens on random blocks."""
    return runner(drawn("random"), name)
