"""The three attentions as differentiable functions: shapes, grids and launches, no mathematics."""

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.boxes import box
from kernels.checks import (
    check,
    check_geometry,
    check_ids,
    check_inputs,
    check_int,
    check_keys_reach,
    check_start,
    scale_or_default,
)
from kernels.flash import flash_forward
from kernels.flash_backward import flash_dkdv, flash_dq
from kernels.routes import CHUNK, NEIGHBOURS, readers, union
from kernels.selected import selected_forward
from kernels.selected_backward import add_chunks, selected_dkdv, selected_dq
from kernels.tiles import padded, tiles

ROWS_A_PROGRAM = 65536  # of the dk, dv walk: enough programs to fill a GPU, few sums to add


def rows_contiguous(x: Tensor) -> Tensor:
    """x, copied only if its last axis is strided: the kernels step freely along the others."""
    return x if x.stride(-1) == 1 else x.contiguous()


def widths(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """The compile-time sizes that every kernel takes."""
    return dict(R=q.shape[1] // k.shape[1], D=q.shape[3], DV=v.shape[3],
                DP=padded(q.shape[3]), DVP=padded(v.shape[3]))


def empty_like_rows(q: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Room for an output (B, H, T, width) and its float32 log-sum-exp."""
    out = torch.empty(*q.shape[:3], width, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


class Flash(torch.autograd.Function):
    """Attention to a run of keys; see flash.py and flash_backward.py."""

    @staticmethod
    def forward(ctx, q, k, v, block_size, stride, window, scale, start):
        q, k, v = (rows_contiguous(x) for x in (q, k, v))
        (batch, _, length, _), (groups, keys) = q.shape, k.shape[1:3]
        ctx.sizes = widths(q, k, v) | dict(BLOCK=block_size, STRIDE=stride, WINDOW=window)
        ctx.numbers = (groups, length, keys, start, scale)
        out, lse = empty_like_rows(q, v.shape[3])
        tile = tiles("forward", max(ctx.sizes["DP"], ctx.sizes["DVP"]), q.dtype)
        flash_forward[(triton.cdiv(length * ctx.sizes["R"], tile["M"]), batch * groups)](
            q, box(k, 1, tile["N"]), box(v, 1, tile["N"]), out, lse, q.stride(), out.stride(),
            *ctx.numbers, **ctx.sizes, **tile,
        )
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        dout, dlse = rows_contiguous(dout), dlse.contiguous()
        dq, row_lse, row_delta = torch.empty_like(q), torch.empty_like(lse), torch.empty_like(lse)
        tile = tiles("dq", max(ctx.sizes["DP"], ctx.sizes["DVP"]), q.dtype)
        grid = (triton.cdiv(q.shape[2] * ctx.sizes["R"], tile["M"]), k.shape[0] * k.shape[1])
        flash_dq[grid](
            q, box(k, 1, tile["N"]), box(v, 1, tile["N"]), out, dout, lse, dlse, row_lse, row_delta,
            dq, q.stride(), out.stride(), dout.stride(), dq.stride(), *ctx.numbers, **ctx.sizes,
            **tile,
        )
        dk, dv = key_gradients(ctx, q, k, v, dout, row_lse, row_delta)
        return dq, dk, dv, None, None, None, None, None


def key_gradients(ctx, q, k, v, dout, row_lse, row_delta) -> tuple[Tensor, Tensor]:
    """dk and dv of a run of keys; sums that are cut into chunks are added up here, in order."""
    (batch, groups, keys, _), length, sizes = k.shape, q.shape[2], ctx.sizes
    tile = tiles("dkdv", max(sizes["DP"], sizes["DVP"]), q.dtype)
    heads, M, N = triton.next_power_of_2(sizes["R"]), tile.pop("M"), tile["N"]
    step = max(M // heads, 1)
    chunk = max(ROWS_A_PROGRAM // (heads * step), 1) * step
    reach = length if sizes["WINDOW"] is None else min(length, sizes["WINDOW"] + N + step)
    chunks = triton.cdiv(reach, chunk)
    kind = k.dtype if chunks == 1 else torch.float32
    dk, dv = (torch.empty(chunks * batch, *x.shape[1:], dtype=kind, device=x.device)
              for x in (k, v))
    flash_dkdv[(triton.cdiv(keys, N), batch * groups, chunks)](
        box(q, heads, step), box(k, 1, N), box(v, 1, N), box(dout, heads, step), row_lse, row_delta,
        dk, dv, dk.stride(), dv.stride(), batch, *ctx.numbers, **sizes, **tile, HEADS=heads,
        STEP=step, CHUNK=chunk,
    )
    if chunks == 1:
        return dk, dv
    return tuple(x.unflatten(0, (chunks, batch)).sum(0).to(k.dtype) for x in (dk, dv))


class Selected(torch.autograd.Function):
    """Attention to chosen blocks; see routes.py, selected.py and selected_backward.py."""

    @staticmethod
    def forward(ctx, q, k, v, ids, select_block_size, scale, start):
        q, k, v, ids = *(rows_contiguous(x) for x in (q, k, v)), ids.contiguous()
        (batch, _, length, _), groups = q.shape, k.shape[1]
        sizes = widths(q, k, v)
        neighbours = max(1, min(NEIGHBOURS, 64 // sizes["R"]))
        N = padded(select_block_size)
        ctx.blocks = triton.cdiv(start + length, select_block_size)
        entries, counts = union(ids, neighbours, ctx.blocks)
        ctx.sizes = sizes | dict(SELECT=select_block_size, N=N)
        ctx.walk = dict(n=ids.shape[3], U=neighbours, M=padded(neighbours * sizes["R"]))
        ctx.numbers = (groups, length, start, scale)
        out, lse = empty_like_rows(q, v.shape[3])
        selected_forward[(counts.shape[2], batch * groups)](
            q, box(k, 1, N), box(v, 1, N), entries, counts, out, lse, q.stride(), out.stride(),
            *ctx.numbers, **ctx.sizes, **ctx.walk,
            **tiles("selected", max(sizes["DP"], sizes["DVP"]), q.dtype),
        )
        ctx.save_for_backward(q, k, v, ids, entries, counts, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, ids, entries, counts, out, lse = ctx.saved_tensors
        dout, width = rows_contiguous(dout), max(ctx.sizes["DP"], ctx.sizes["DVP"])
        k_box, v_box = box(k, 1, ctx.sizes["N"]), box(v, 1, ctx.sizes["N"])
        dq, row_lse, row_delta = torch.empty_like(q), torch.empty_like(lse), torch.empty_like(lse)
        selected_dq[(counts.shape[2], k.shape[0] * k.shape[1])](
            q, k_box, v_box, entries, counts, out, dout, lse, row_lse, row_delta, dq, q.stride(),
            out.stride(), dout.stride(), dq.stride(), *ctx.numbers, **ctx.sizes, **ctx.walk,
            **tiles("selected_dq", width, q.dtype),
        )
        who, lists = readers(ids, ctx.blocks), k.shape[0] * k.shape[1] * ctx.blocks
        parts = [torch.empty(len(who.owner), ctx.sizes["SELECT"], x.shape[3], device=x.device)
                 for x in (k, v)]
        heads = padded(ctx.sizes["R"])
        selected_dkdv[(len(who.owner),)](
            box(q, heads, 1), k_box, v_box, box(dout, heads, 1), row_lse, row_delta, who.tokens,
            who.bounds, who.owner, who.chunk_bounds, *parts, *ctx.numbers, lists, ctx.blocks,
            **ctx.sizes, **tiles("selected_dkdv", width, q.dtype), HEADS=heads, CHUNK=CHUNK,
        )
        dk, dv = (add_up(ctx, x, part, who.chunk_bounds)
                  for x, part in zip((k, v), parts, strict=True))
        return dq, dk, dv, None, None, None, None


def add_up(ctx, x: Tensor, parts: Tensor, chunk_bounds: Tensor) -> Tensor:
    """One gradient like x from the sums of its blocks' chunks; 0 beyond the last query's block."""
    dx = torch.empty_like(x)
    batch, groups, keys, width = x.shape
    dx[:, :, ctx.blocks * ctx.sizes["SELECT"] :].zero_()
    add_chunks[(ctx.blocks, batch * groups)](
        parts, chunk_bounds, dx, dx.stride(), groups, keys, ctx.blocks, WIDTH=width,
        PADDED=padded(width), SELECT=ctx.sizes["SELECT"], N=ctx.sizes["N"],
    )
    return dx


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    window: int | None = None, scale: float | None = None, start: int = 0,
) -> Tensor:
    """Causal attention to the last `window` keys, the query's own included; None is dense.

    Shapes: q (B, H, T, D), k (B, G, S, D), v (B, G, S, Dv) -> out (B, H, T, Dv).
    Errors: ValueError or TypeError that names the argument. Source: section 3.3.3.
    """
    check_inputs(q, k, v)
    check_keys_reach(q, k, start)
    if window is not None:
        check_int("window", window, 1)
        window = None if window >= start + q.shape[2] else window
    return Flash.apply(q, k, v, 1, 1, window, scale_or_default(scale, q.shape[3]), start)[0]


def compressed_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    block_size: int, stride: int, scale: float | None = None, start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention to the compressed keys of blocks that ended at or before the query (Eq. 7).

    Shapes: q (B, H, T, D), compressed k (B, G, N, D), v (B, G, N, Dv) -> out (B, H, T, Dv),
    lse (B, H, T) float32; a query that sees no block gets out 0 and lse -inf.
    Errors: ValueError or TypeError that names the argument.
    """
    check_inputs(q, k, v)
    check_geometry(block_size, stride)
    check_start(start)
    scale = scale_or_default(scale, q.shape[3])
    return Flash.apply(q, k, v, block_size, stride, None, scale, start)


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, *,
    select_block_size: int, scale: float | None = None, start: int = 0,
) -> Tensor:
    """Attention to the raw tokens of the selected blocks, causal inside the own block (Eq. 12).

    Shapes: q (B, H, T, D), k (B, G, S, D), v (B, G, S, Dv), ids (B, G, T, n) int, distinct,
    -1 is padding -> out (B, H, T, Dv).
    Errors: ValueError or TypeError that names the argument.
    """
    check_inputs(q, k, v)
    check_keys_reach(q, k, start)
    check_int("select_block_size", select_block_size, 1)
    check(select_block_size <= 256, "select_block_size", select_block_size, "must be at most 256")
    check_ids(ids, q, k)
    scale = scale_or_default(scale, q.shape[3])
    return Selected.apply(q, k, v, ids, select_block_size, scale, start)
