"""From tensors to launches: shapes, grids, tiles and buffers; no mathematics."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.boxes import box, number_box
from kernels.flash import flash_forward
from kernels.flash_backward import flash_dkdv, flash_dq
from kernels.routes import CHUNK, NEIGHBOURS, readers, union
from kernels.selected import selected_forward
from kernels.selected_backward import USES, add_chunks, selected_dkdv, selected_dq
from kernels.tiles import fitting, padded, row_name, tiles

ENOUGH = 1024  # programs (key tiles x groups) from which on no walk of dk and dv is cut
PROGRAMS = 4096  # with fewer, walks are cut into chunks until there are about so many
SHORTEST = 256  # tokens of a chunk of that walk


@dataclass(frozen=True)
class Run:
    """A run of keys: key j ends at token j * stride + block_size - 1.

    Query i stands at token start + i and sees keys of the last `window` tokens (None: of all).
    """

    block_size: int
    stride: int
    window: int | None
    scale: float
    start: int


@dataclass(frozen=True)
class Blocks:
    """Selected blocks of `size` keys; scale and start as in Run."""

    size: int
    scale: float
    start: int


class Gated(NamedTuple):
    """One of three branches whose gated outputs were added up: where its share of gradients goes.

    Shapes: gates and dgates (B, H, T, 3). dq is shared: the first branch writes, others add.
    """

    gates: Tensor
    dgates: Tensor
    branch: int
    dq: Tensor


class Mix(NamedTuple):
    """Eq. 5: the gates, the outputs of the other two branches, and where the sum goes."""

    gates: Tensor
    compressed: Tensor
    window: Tensor
    out: Tensor


def rows_contiguous(x: Tensor) -> Tensor:
    """x, copied only if its last axis is strided: the kernels step freely along the others."""
    return x if x.stride(-1) == 1 else x.contiguous()


def widths(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """The compile-time sizes that every kernel takes."""
    return dict(R=q.shape[1] // k.shape[1], D=q.shape[3], DV=v.shape[3],
                DP=padded(q.shape[3]), DVP=padded(v.shape[3]))


def tiles_for(kernel: str, q: Tensor, v: Tensor) -> dict[str, int]:
    """The tile sizes of a kernel for these widths and this type."""
    return tiles(kernel, max(padded(q.shape[3]), padded(v.shape[3])), q.dtype)


def fit(tile: dict[str, int], q: Tensor, v: Tensor, kept: tuple, each: tuple) -> dict[str, int]:
    """The tile with as many stages as fit; `kept` and `each` are (rows of D, rows of Dv).

    kept: what a program keeps in shared memory for all its walk; with HOLD, nothing. each: what a
    step of the walk loads.
    """
    width, value = padded(q.shape[3]), padded(v.shape[3])
    kept_bytes, step_bytes = ((rows * width + values * value) * q.element_size()
                              for rows, values in (kept, each))
    return fitting(tile, 0 if tile.get("HOLD") else kept_bytes, step_bytes)


def empty_like_rows(q: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Room for an output (B, H, T, width) and its float32 log-sum-exp."""
    out = torch.empty(*q.shape[:3], width, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def gated_arguments(gated: Gated | None) -> tuple[tuple, dict]:
    """What a dq kernel takes for gates: its pointers, and its compile-time options."""
    if gated is None:
        return (None, None), dict(BRANCH=0, ADD=False)
    return (gated.gates, gated.dgates), dict(BRANCH=gated.branch, ADD=gated.branch > 0)


def room_for_rows(q: Tensor, groups: int, heads: int, step: int) -> tuple[Tensor, Tensor]:
    """row_lse and row_delta, (B G, rows), box after box of heads x step; 0 where no row is."""
    shape = q.shape[0] * groups, triton.cdiv(q.shape[2], step) * step * heads
    return tuple(torch.zeros(shape, dtype=torch.float32, device=q.device) for _ in range(2))


def group_box(x: Tensor, heads: int, step: int, tile: dict) -> Tensor | TensorDescriptor:
    """What `load_group` takes for x: boxes with HOLD, else the tensor itself."""
    return box(x, heads, step) if tile["HOLD"] else x


# --- a run of keys ---


def run_sizes(q: Tensor, k: Tensor, v: Tensor, run: Run) -> tuple[tuple, dict]:
    """The numbers and the compile-time sizes that the flash kernels take."""
    sizes = widths(q, k, v) | dict(BLOCK=run.block_size, STRIDE=run.stride, WINDOW=run.window)
    return (k.shape[1], q.shape[2], k.shape[2], run.start, run.scale), sizes


def box_sides(R: int, M: int) -> tuple[int, int]:
    """How many heads and tokens a box of about M rows has; heads are a power of two."""
    heads = triton.next_power_of_2(R)
    return heads, max(M // heads, 1)


def flash(q: Tensor, k: Tensor, v: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """Attention to a run of keys: out (B, H, T, Dv) and its log-sum-exp (B, H, T)."""
    numbers, sizes = run_sizes(q, k, v, run)
    out, lse = empty_like_rows(q, v.shape[3])
    tile = tiles_for(row_name("forward", run.window), q, v)
    heads, step = box_sides(sizes["R"], tile.pop("M"))
    tile = fit(tile, q, v, (heads * step, 0), (tile["N"], tile["N"]))
    flash_forward[(triton.cdiv(q.shape[2], step), k.shape[0] * k.shape[1])](
        group_box(q, heads, step, tile), box(k, 1, tile["N"]), box(v, 1, tile["N"]), out, lse,
        q.stride(), out.stride(), *numbers, **sizes, **tile, HEADS=heads, STEP=step,
    )
    return out, lse


def flash_gradients(q, k, v, out, lse, dout, dlse, run: Run, gated: Gated | None = None):
    """dq, dk and dv of `flash`; all tensors with rows that are contiguous."""
    numbers, sizes = run_sizes(q, k, v, run)
    tile = tiles_for(row_name("dq", run.window), q, v)
    heads, step = box_sides(sizes["R"], tile.pop("M"))
    tile = fit(tile, q, v, (heads * step, heads * step), (tile["N"], tile["N"]))
    gates, options = gated_arguments(gated)
    dq = torch.empty_like(q) if gated is None else gated.dq
    row_step = box_sides(sizes["R"], key_tile(q, v, run)["M"])[1]
    row_lse, row_delta = room_for_rows(q, k.shape[1], heads, row_step)
    flash_dq[(triton.cdiv(q.shape[2], step), k.shape[0] * k.shape[1])](
        group_box(q, heads, step, tile), box(k, 1, tile["N"]), box(v, 1, tile["N"]), out,
        group_box(dout, heads, step, tile), lse, dlse, *gates, row_lse, row_delta, dq, q.stride(),
        out.stride(), dout.stride(), dq.stride(), row_lse.stride(0), *numbers, **sizes, **tile,
        **options, HEADS=heads, STEP=step, ROW_STEP=row_step,
    )
    return dq, *flash_key_gradients(q, k, v, dout, row_lse, row_delta, run)


def key_tile(q: Tensor, v: Tensor, run: Run) -> dict[str, int]:
    """The tile of dk and dv."""
    return tiles_for(row_name("dkdv", run.window), q, v)


def flash_key_gradients(q, k, v, dout, row_lse, row_delta, run: Run) -> tuple[Tensor, Tensor]:
    """dk and dv; sums that are cut into chunks are added up here, in order."""
    numbers, sizes = run_sizes(q, k, v, run)
    (batch, groups, keys, _), length = k.shape, q.shape[2]
    tile = key_tile(q, v, run)
    N, key_tiles = tile["N"], triton.cdiv(keys, tile["N"])
    heads, step, chunk, chunks = token_walk(
        length, run.window, sizes["R"], tile.pop("M"), N, key_tiles * batch * groups)
    tile = fit(tile, q, v, (N, N), (heads * step, heads * step))
    kind = k.dtype if chunks == 1 else torch.float32
    dk, dv = (torch.empty(chunks * batch, *x.shape[1:], dtype=kind, device=x.device)
              for x in (k, v))
    flash_dkdv[(key_tiles, batch * groups, chunks)](
        box(q, heads, step), box(k, 1, N), box(v, 1, N), box(dout, heads, step),
        number_box(row_lse, heads * step), number_box(row_delta, heads * step), dk, dv,
        dk.stride(), dv.stride(), batch, *numbers, **sizes, **tile, HEADS=heads, STEP=step,
        CHUNK=chunk,
    )
    if chunks == 1:
        return dk, dv
    return tuple(x.unflatten(0, (chunks, batch)).sum(0).to(k.dtype) for x in (dk, dv))


def token_walk(
    length: int, window: int | None, R: int, M: int, N: int, programs: int
) -> tuple[int, int, int, int]:
    """How dk and dv walk: (heads, step) of a box of about M rows, a chunk's tokens, and the chunks.

    N keys a tile; programs = key tiles x batch x groups. A chunk costs a sum in memory, so nothing
    is cut where there are ENOUGH of them.
    """
    heads, step = box_sides(R, M)
    reach = length if window is None else min(length, window + N + step)
    wanted = 1 if programs >= ENOUGH else PROGRAMS // max(programs, 1)
    chunks = min(wanted, triton.cdiv(reach, SHORTEST))
    chunk = triton.cdiv(triton.cdiv(reach, chunks), step) * step
    return heads, step, chunk, triton.cdiv(reach, chunk)


# --- chosen blocks ---


def block_sizes(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> tuple[tuple, dict, int]:
    """The numbers and compile-time sizes that the selected kernels take, and how many blocks."""
    sizes = widths(q, k, v) | dict(SELECT=blocks.size, N=padded(blocks.size))
    count = triton.cdiv(blocks.start + q.shape[2], blocks.size)
    return (k.shape[1], q.shape[2], blocks.start, blocks.scale), sizes, count


def walk_sizes(R: int, n: int) -> dict[str, int]:
    """How many tokens share a program and its walk over the union of their blocks."""
    heads = triton.next_power_of_2(R)
    neighbours = max(1, min(NEIGHBOURS, 64 // heads))
    return dict(n=n, U=neighbours, HEADS=max(heads, 16 // neighbours))


def selected(q, k, v, ids, blocks: Blocks, mix: Mix | None = None):
    """Attention to chosen blocks: out, its log-sum-exp, and the union that `dq` walks too."""
    numbers, sizes, count = block_sizes(q, k, v, blocks)
    walk, N = walk_sizes(sizes["R"], ids.shape[3]), sizes["N"]
    entries, counts = union(ids, walk["U"], count)
    out, lse = empty_like_rows(q, v.shape[3])
    selected_forward[(counts.shape[2], k.shape[0] * k.shape[1])](
        q, box(k, 1, N), box(v, 1, N), entries, counts, out, lse,
        *(mix or (None,) * len(Mix._fields)), q.stride(), out.stride(), *numbers, **sizes, **walk,
        **fit(tiles_for("selected", q, v), q, v, (walk["HEADS"] * walk["U"], 0), (N, N)),
    )
    return out, lse, (entries, counts)


def selected_gradients(
    q, k, v, ids, route, out, lse, dout, blocks: Blocks, gated: Gated | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of `selected`; all tensors with rows that are contiguous."""
    numbers, sizes, count = block_sizes(q, k, v, blocks)
    gates, options = gated_arguments(gated)
    dq = torch.empty_like(q) if gated is None else gated.dq
    walk, N, heads = walk_sizes(sizes["R"], ids.shape[3]), sizes["N"], padded(sizes["R"])
    row_lse, row_delta = room_for_rows(q, k.shape[1], heads, 1)
    size, kept = (walk["HEADS"], walk["U"]), walk["HEADS"] * walk["U"]
    tile = fit(tiles_for("selected_dq", q, v), q, v, (kept, kept), (N, N))
    selected_dq[(route[1].shape[2], k.shape[0] * k.shape[1])](
        group_box(q, *size, tile), box(k, 1, N), box(v, 1, N), *route, out,
        group_box(dout, *size, tile), lse, *gates, row_lse, row_delta, dq, q.stride(), out.stride(),
        dout.stride(), dq.stride(), row_lse.stride(0), *numbers, **sizes, **walk, **tile, **options,
        ROW_HEADS=heads,
    )
    return dq, *selected_key_gradients(q, k, v, ids, dout, row_lse, row_delta, blocks)


def selected_key_gradients(
    q, k, v, ids, dout, row_lse, row_delta, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """dk and dv of each block from its readers, whose chunks are added up in order."""
    numbers, sizes, count = block_sizes(q, k, v, blocks)
    N, heads, who = sizes["N"], padded(sizes["R"]), readers(ids, count)
    parts = [torch.empty(len(who.owner), blocks.size, x.shape[3], device=x.device)
             for x in (k, v)]
    tile = tiles_for("selected_dkdv", q, v)
    rows = heads * USES.value if tile["HOLD"] else heads
    selected_dkdv[(len(who.owner),)](
        box(q, heads, 1), box(k, 1, N), box(v, 1, N), box(dout, heads, 1), row_lse, row_delta,
        who.tokens, who.bounds, who.owner, who.chunk_bounds, *parts, *numbers,
        k.shape[0] * k.shape[1] * count, count, **sizes, HEADS=heads, CHUNK=CHUNK,
        **fit(tile, q, v, (N, N), (rows, rows)),
    )
    return tuple(add_up(x, part, who.chunk_bounds, count, blocks.size)
                 for x, part in zip((k, v), parts, strict=True))


def add_up(x: Tensor, parts: Tensor, chunk_bounds: Tensor, count: int, size: int) -> Tensor:
    """One gradient like x from the sums of its blocks' chunks; 0 beyond the last query's block."""
    dx = torch.empty_like(x)
    batch, groups, keys, width = x.shape
    dx[:, :, count * size :].zero_()
    add_chunks[(count, batch * groups)](
        parts, chunk_bounds, dx, dx.stride(), groups, keys, count, WIDTH=width,
        PADDED=padded(width), SELECT=size, N=padded(size),
    )
    return dx
