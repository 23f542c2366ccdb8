"""Attention to a run of keys: dense, to a window (section 3.3.3), to compressed keys (Eq. 7).

One program owns a tile of rows (BLOCK_T tokens of BLOCK_H heads) and walks over the keys that any
of them sees, BLOCK_N at a time; `Keys` of visible_keys.py says which those are. The gradients are
recomputed from the log-sum-exp that the forward stored:

    dq      one program owns a tile of rows and walks over their keys, as the forward does;
    dk, dv  one program owns BLOCK_N keys and walks over the tokens that see them

With ds = p (dout v - delta), delta = sum(out dout) - dlse, and ' for the transpose:
dq = scale ds k,  dk = scale ds' q,  dv = p' dout.
The rows of one key tile can be many: they are cut into chunks, one program each, whose sums are
added up afterwards in a fixed order. No atomics, so two runs agree bit by bit. dq also leaves each
row's log-sum-exp and delta, tile after tile as dk and dv load them: a tile's numbers lie in one
piece then, and the copy engine (TMA, descriptors.py) fetches them, so that no thread has to.

dlse is the gradient of lse, which compressed_attention hands out: d lse / d s = p, so it joins
delta. H query heads in G groups of R = H / G; T queries, S keys. Read rows.py (why the heads of a
group are rows of one tile), visible_keys.py (the picture of a walk) and online_softmax.py first.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

from kernels.checks import (
    check_compression,
    check_inputs,
    check_int,
    check_keys_reach,
    check_start,
    scale_or_default,
)
from kernels.descriptors import (
    descriptor,
    group_argument,
    hold,
    load_group,
    load_numbers,
    load_tile,
    number_descriptor,
    place_in_tiles,
    room_for_numbers,
)
from kernels.launching import grid_of, launch
from kernels.online_softmax import (
    LOG2E,
    GatedBranch,
    Read,
    RowNumbers,
    Saved,
    finish,
    fold_in,
    prepare_gradient,
    score_gradient,
    score_gradient_by_key,
)
from kernels.operations import in_batches, operation
from kernels.pieces import add_pieces, add_products, store_pieces, times, zeros
from kernels.rows import (
    batch_and_group,
    empty_gradient,
    empty_key_gradient,
    empty_output,
    number_offsets,
    row_offsets,
    rows,
    rows_contiguous,
    rows_of_a_tile,
    rows_to_read,
    tokens_and_heads,
)
from kernels.tile_sizes import Tile, cdiv, power_of_two, tile_for, widths_of
from kernels.visible_keys import Keys, count_keys, key_range, may_read, token_range

ENOUGH = 1024  # programs (key tiles x groups) from which on no walk of dk and dv is cut
PROGRAMS = 4096  # with fewer, walks are cut into chunks until there are about so many
SHORTEST = 256  # tokens of a chunk of that walk


class Run(NamedTuple):
    """What attention to a run of keys needs beside its tensors; query i is token start + i."""

    keys: Keys
    scale: float
    start: int


# --- the kernels ---


class Sizes(NamedTuple):
    """Runtime sizes: groups, queries, keys, the first query's position, and the scale."""

    G: int
    T: int
    S: int
    start: int
    scale: float


class KeyGradients(NamedTuple):
    """dk and dv as (chunks * batch, G, S, width): each chunk of a walk has its own sums.

    The fields lie as the assembler likes them: as two Rows they cost it four more spills.
    """

    dk: Tensor
    dv: Tensor
    dk_strides: tuple[int, ...]
    dv_strides: tuple[int, ...]
    batch: int


@triton.jit
def flash_forward(
    q,  # with HOLD a descriptor, else Rows
    desc_k,
    desc_v,
    out,
    lse,
    sizes,
    KEYS: tl.constexpr,
    WIDTHS: tl.constexpr,
    TILE: tl.constexpr,
):
    """out and lse of a tile of M = BLOCK_H * BLOCK_T rows, which walks over the keys they see.

    Tiles: q [M, D], k [N, D], v [N, DV], the output acc [M, DV], each width padded.
    """
    M: tl.constexpr = TILE.BLOCK_H * TILE.BLOCK_T
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    D: tl.constexpr = WIDTHS.D
    DV: tl.constexpr = WIDTHS.DV
    BLOCK_D: tl.constexpr = WIDTHS.BLOCK_D
    BLOCK_DV: tl.constexpr = WIDTHS.BLOCK_DV
    # The last tokens walk over the most keys: they come first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE.BLOCK_T
    at = rows_of_a_tile(first, sizes, WIDTHS.R, TILE)
    t = sizes.start + at.token  # [M]
    last = sizes.start + tl.minimum(first + TILE.BLOCK_T, sizes.T) - 1
    edges = key_range(sizes.start + first, last, sizes.S, KEYS, BLOCK_N)

    q_tile = load_group(q, at, WIDTHS.R, D, BLOCK_D, TILE.HOLD)  # [M, D]
    m_i = tl.full([M], -float("inf"), tl.float32)
    l_i = tl.zeros([M], tl.float32)
    acc = zeros(M, DV, BLOCK_DV)
    # edges are low, full_low, full_high, high: between the two full_ ones every row sees every key,
    # so that part needs no mask. Three loops, compiled apart.
    for part in tl.static_range(3):
        for first_key in range(edges[part], edges[part + 1], BLOCK_N):
            k_tile = load_tile(desc_k, at.b, at.g, first_key, BLOCK_N, D, BLOCK_D)  # [N, D]
            v_tile = load_tile(desc_v, at.b, at.g, first_key, BLOCK_N, DV, BLOCK_DV)  # [N, DV]
            key = first_key + tl.arange(0, BLOCK_N)
            mask = None if part == 1 else may_read(key[None, :], t[:, None], sizes.S, KEYS)
            m_i, l_i, acc = fold_in(
                q_tile, k_tile, v_tile, mask, sizes.scale * LOG2E, m_i, l_i, acc
            )
    acc, row_lse = finish(m_i, l_i, acc)
    to = row_offsets(out.strides, at.b, at.g * WIDTHS.R + at.head, at.token)
    store_pieces(out.ptr, to, acc, at.mask, DV, BLOCK_DV)
    tl.store(lse + number_offsets(at, sizes, WIDTHS.R), row_lse, mask=at.mask)


@triton.jit
def flash_dq(
    q,  # with HOLD a descriptor, else Rows; dout too
    desc_k,
    desc_v,
    dout,
    out,
    dq,
    numbers,
    gating,
    sizes,
    KEYS: tl.constexpr,
    WIDTHS: tl.constexpr,
    TILE: tl.constexpr,
    KEY_TILE_T: tl.constexpr,
    BRANCH: tl.constexpr,
):
    """dq of a tile of M = BLOCK_H * BLOCK_T rows, by the forward's walk; lse and delta for dk, dv.

    Tiles: q and dq [M, D], out and dout [M, DV], k [N, D], v [N, DV]. `gating` is Gates or None.
    With it the three branches share one dq: compressed (BRANCH 0) is launched first and writes it,
    selected (1) and window (2) add to it. KEY_TILE_T is flash_dkdv's BLOCK_T.
    """
    M: tl.constexpr = TILE.BLOCK_H * TILE.BLOCK_T
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    D: tl.constexpr = WIDTHS.D
    DV: tl.constexpr = WIDTHS.DV
    BLOCK_D: tl.constexpr = WIDTHS.BLOCK_D
    BLOCK_DV: tl.constexpr = WIDTHS.BLOCK_DV
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE.BLOCK_T
    at = rows_of_a_tile(first, sizes, WIDTHS.R, TILE)
    t = sizes.start + at.token  # [M]
    last = sizes.start + tl.minimum(first + TILE.BLOCK_T, sizes.T) - 1
    edges = key_range(sizes.start + first, last, sizes.S, KEYS, BLOCK_N)

    q_tile = load_group(q, at, WIDTHS.R, D, BLOCK_D, TILE.HOLD)  # [M, D]
    do_tile = load_group(dout, at, WIDTHS.R, DV, BLOCK_DV, TILE.HOLD)  # [M, DV]
    o_tile = load_group(out, at, WIDTHS.R, DV, BLOCK_DV, False)  # [M, DV]
    number = number_offsets(at, sizes, WIDTHS.R)
    by_row = tl.program_id(1).to(tl.int64) * numbers.stride
    by_row += place_in_tiles(at, TILE.BLOCK_H, KEY_TILE_T)
    lse, delta, gate = prepare_gradient(
        o_tile, do_tile, numbers, gating, number, by_row, at.mask, BRANCH
    )
    acc = zeros(M, D, BLOCK_D)
    for part in tl.static_range(3):
        for first_key in range(edges[part], edges[part + 1], BLOCK_N):
            k_tile = load_tile(desc_k, at.b, at.g, first_key, BLOCK_N, D, BLOCK_D)  # [N, D]
            v_tile = load_tile(desc_v, at.b, at.g, first_key, BLOCK_N, DV, BLOCK_DV)  # [N, DV]
            key = first_key + tl.arange(0, BLOCK_N)
            mask = None if part == 1 else may_read(key[None, :], t[:, None], sizes.S, KEYS)
            _, ds = score_gradient(
                q_tile, k_tile, v_tile, do_tile, lse, delta, mask, sizes.scale * LOG2E
            )
            acc = add_products(acc, ds, k_tile)
    to = row_offsets(dq.strides, at.b, at.g * WIDTHS.R + at.head, at.token)
    acc = times(acc, (sizes.scale * gate)[:, None])
    add_pieces(dq.ptr, to, acc, at.mask, D, BLOCK_D, BRANCH > 0)


@triton.jit
def flash_dkdv(
    desc_q,
    desc_k,
    desc_v,
    desc_dout,
    desc_lse,
    desc_delta,
    gradients,
    sizes,
    KEYS: tl.constexpr,
    WIDTHS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """dk and dv of N = BLOCK_N keys, from one chunk of the tokens that see them.

    Tiles: k and dk [N, D], v and dv [N, DV], q [M, D], dout [M, DV], the scores [N, M], with
    M = BLOCK_H * BLOCK_T rows a step. `gradients` are KeyGradients.
    """
    M: tl.constexpr = TILE.BLOCK_H * TILE.BLOCK_T
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    D: tl.constexpr = WIDTHS.D
    DV: tl.constexpr = WIDTHS.DV
    BLOCK_D: tl.constexpr = WIDTHS.BLOCK_D
    BLOCK_DV: tl.constexpr = WIDTHS.BLOCK_DV
    b, g = batch_and_group(sizes.G)
    chunk = tl.program_id(2)
    first_key = tl.program_id(0) * BLOCK_N
    key = first_key + tl.arange(0, BLOCK_N)
    k_tile = load_tile(desc_k, b, g, first_key, BLOCK_N, D, BLOCK_D)
    k_tile = hold(k_tile, key < sizes.S, TILE.HOLD)
    v_tile = load_tile(desc_v, b, g, first_key, BLOCK_N, DV, BLOCK_DV)
    v_tile = hold(v_tile, key < sizes.S, TILE.HOLD)
    edges = token_range(first_key, sizes.T, sizes.start, KEYS, BLOCK_N, TILE.BLOCK_T)
    # Without a window all key tiles cut their tokens at the same places, to meet in the cache.
    begin = chunk * CHUNK if KEYS.window is None else edges[0] + chunk * CHUNK

    dk = zeros(BLOCK_N, D, BLOCK_D)
    dv = zeros(BLOCK_N, DV, BLOCK_DV)
    for part in tl.static_range(3):
        until = tl.minimum(edges[part + 1], edges[3])
        since = tl.maximum(edges[part], begin)
        for first in range(since, tl.minimum(until, begin + CHUNK), TILE.BLOCK_T):
            q_tile = load_tile(desc_q, b, g * WIDTHS.R, first, M, D, BLOCK_D)  # [M, D]
            do_tile = load_tile(desc_dout, b, g * WIDTHS.R, first, M, DV, BLOCK_DV)  # [M, DV]
            token, _, row_mask = tokens_and_heads(first, sizes.T, WIDTHS.R, TILE)
            mask = None
            # Heads beyond R are the next group's rows, which would enter the sums here; in the
            # forward and in dq they keep to themselves. Tokens beyond T load as 0.
            if part != 1 or TILE.BLOCK_H != WIDTHS.R:
                mask = row_mask[None, :] & may_read(
                    key[:, None], sizes.start + token[None, :], sizes.S, KEYS
                )
            # lse holds lse - log2(gate), so that p is gate * p and dk and dv carry the gate.
            lse = load_numbers(desc_lse, tl.program_id(1), first * TILE.BLOCK_H, M)
            delta = load_numbers(desc_delta, tl.program_id(1), first * TILE.BLOCK_H, M)
            p, ds = score_gradient_by_key(
                q_tile, k_tile, v_tile, do_tile, lse, delta, mask, sizes.scale * LOG2E
            )
            dv = add_products(dv, p, do_tile)
            dk = add_products(dk, ds, q_tile)
    slot = chunk * gradients.batch + b
    to = row_offsets(gradients.dk_strides, slot, g, key)
    store_pieces(gradients.dk, to, times(dk, sizes.scale), key < sizes.S, D, BLOCK_D)
    to = row_offsets(gradients.dv_strides, slot, g, key)
    store_pieces(gradients.dv, to, dv, key < sizes.S, DV, BLOCK_DV)


# --- their launches ---


def row_tile(R: int, BLOCK_M: int) -> tuple[int, int]:
    """How many heads and tokens a tile of about BLOCK_M rows has; heads are a power of two."""
    heads = power_of_two(R)
    return heads, max(BLOCK_M // heads, 1)


def sizes_of(q: Tensor, k: Tensor, run: Run) -> Sizes:
    """The runtime sizes that every kernel here takes."""
    return Sizes(k.shape[1], q.shape[2], k.shape[2], run.start, run.scale)


def prepared(q: Tensor, k: Tensor, v: Tensor, run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels read: of the keys those that end at or before the last query."""
    count = count_keys(run.start + q.shape[2] - 1, k.shape[2], run.keys)
    return rows_to_read(q, k, v, count)


def flash(q: Tensor, k: Tensor, v: Tensor, run: Run) -> Saved:
    """Attention to a run of keys; out (B, H, T, Dv) and its log-sum-exp (B, H, T) are in it."""
    q, k, v = prepared(q, k, v, run)
    out, lse = empty_output(q, v.shape[3])
    widths = widths_of(q, k, v)
    tuned = tile_for("flash_forward", widths, q, window=run.keys.window)
    heads, tokens = row_tile(widths.R, tuned.BLOCK_M)
    BLOCK_N = tuned.BLOCK_N
    launch(
        flash_forward,
        grid_of(cdiv(q.shape[2], tokens), k.shape[0], k.shape[1]),
        group_argument(q, heads, tokens, tuned.hold),
        descriptor(k, 1, BLOCK_N),
        descriptor(v, 1, BLOCK_N),
        rows(out),
        lse,
        sizes_of(q, k, run),
        KEYS=run.keys,
        WIDTHS=widths,
        TILE=Tile(heads, tokens, BLOCK_N, tuned.hold),
        **tuned.launch_options(),
    )
    return Saved(q, k, v, out, lse)


def flash_gradients(
    saved: Saved, dout: Tensor, dlse: Tensor | None, run: Run, gated: GatedBranch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of `flash`."""
    q, k, v = prepared(*saved[:3], run)
    out, lse = saved[3:]
    dout = rows_contiguous(dout)
    dlse = None if dlse is None else dlse.contiguous()
    widths = widths_of(q, k, v)
    tuned = tile_for("flash_dq", widths, q, window=run.keys.window)
    heads, tokens = row_tile(widths.R, tuned.BLOCK_M)
    BLOCK_N = tuned.BLOCK_N
    key_tuned = tile_for("flash_dkdv", widths, q, window=run.keys.window)
    key_tile_t = row_tile(widths.R, key_tuned.BLOCK_M)[1]
    row_lse, row_delta = room_for_numbers(q, k.shape[1], heads, key_tile_t)
    dq = empty_gradient(saved.q) if gated is None else gated.dq
    launch(
        flash_dq,
        grid_of(cdiv(q.shape[2], tokens), k.shape[0], k.shape[1]),
        group_argument(q, heads, tokens, tuned.hold),
        descriptor(k, 1, BLOCK_N),
        descriptor(v, 1, BLOCK_N),
        group_argument(dout, heads, tokens, tuned.hold),
        rows(out),
        rows(dq),
        RowNumbers(lse, dlse, row_lse, row_delta, row_lse.stride(0)),
        None if gated is None else gated.gates,
        sizes_of(q, k, run),
        KEYS=run.keys,
        WIDTHS=widths,
        TILE=Tile(heads, tokens, BLOCK_N, tuned.hold),
        KEY_TILE_T=key_tile_t,
        BRANCH=0 if gated is None else gated.branch,
        **tuned.launch_options(),
    )
    dk, dv = (empty_key_gradient(x, k.shape[2]) for x in saved[1:3])
    key_gradients(Read(q, k, v, dout), row_lse, row_delta, run, dk, dv)
    return dq, dk, dv


def key_gradients(
    read: Read, row_lse: Tensor, row_delta: Tensor, run: Run, dk: Tensor, dv: Tensor
) -> None:
    """Write dk and dv; sums that are cut into chunks are added up here, in order."""
    q, k, v, dout = read
    batch, groups, key_count, _ = k.shape
    widths = widths_of(q, k, v)
    tuned = tile_for("flash_dkdv", widths, q, window=run.keys.window)
    BLOCK_N = tuned.BLOCK_N
    key_tiles = cdiv(key_count, BLOCK_N)
    heads, tokens = row_tile(widths.R, tuned.BLOCK_M)
    M = heads * tokens
    chunk, chunks = token_chunks(
        q.shape[2], run.keys.window, tokens, BLOCK_N, key_tiles * batch * groups
    )
    whole = dk[:, :, :key_count], dv[:, :, :key_count]
    sums = whole if chunks == 1 else tuple(room_for_chunks(x, chunks) for x in (k, v))
    launch(
        flash_dkdv,
        grid_of(key_tiles, batch, groups, chunks),
        descriptor(q, heads, tokens),
        descriptor(k, 1, BLOCK_N),
        descriptor(v, 1, BLOCK_N),
        descriptor(dout, heads, tokens),
        number_descriptor(row_lse, M),
        number_descriptor(row_delta, M),
        KeyGradients(*sums, *(x.stride()[:3] for x in sums), batch),
        sizes_of(q, k, run),
        KEYS=run.keys,
        WIDTHS=widths,
        TILE=Tile(heads, tokens, BLOCK_N, tuned.hold),
        CHUNK=chunk,
        **tuned.launch_options(),
    )
    if chunks > 1:
        for x, parts in zip(whole, sums, strict=True):
            x.copy_(parts.unflatten(0, (chunks, batch)).sum(0))


def room_for_chunks(x: Tensor, chunks: int) -> Tensor:
    """float32 room for the sums of each chunk: (chunks * B, G, S, width)."""
    return x.new_empty(chunks * x.shape[0], *x.shape[1:], dtype=torch.float32)


def token_chunks(
    length: int, window: int | None, tokens: int, keys: int, programs: int
) -> tuple[int, int]:
    """How dk and dv cut their walk over tokens: a chunk's tokens, and how many chunks there are.

    A step has so many tokens, a tile so many keys; programs = key tiles x batch x groups. A chunk
    costs a sum in memory, so nothing is cut where there are ENOUGH of them.
    """
    reach = length if window is None else min(length, window + keys + tokens)
    wanted = 1 if programs >= ENOUGH else PROGRAMS // max(programs, 1)
    chunks = min(wanted, cdiv(reach, SHORTEST))
    chunk = cdiv(cdiv(reach, chunks), tokens) * tokens
    return chunk, cdiv(reach, chunk)


# --- as an operation of torch ---


def run_of(
    q: Tensor, block_size: int, stride: int, window: int | None, scale: float, start: int
) -> Run:
    """The Run of these queries; a window that cuts nothing off is dense attention."""
    if window is not None and window >= start + q.shape[2]:
        window = None
    return Run(Keys(block_size, stride, window), scale, start)


@operation
@in_batches
def attend_to_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    stride: int,
    window: int | None,
    scale: float,
    start: int,
) -> tuple[Tensor, Tensor]:
    """Attention to a run of keys: out (B, H, T, Dv) and its log-sum-exp (B, H, T)."""
    saved = flash(q, k, v, run_of(q, block_size, stride, window, scale, start))
    return saved.out, saved.lse


@operation
@in_batches
def attend_to_keys_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    block_size: int,
    stride: int,
    window: int | None,
    scale: float,
    start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of attend_to_keys."""
    run = run_of(q, block_size, stride, window, scale, start)
    return flash_gradients(Saved(q, k, v, out, lse), dout, dlse, run)


@attend_to_keys.register_fake
def _(q, _k, v, *_):
    return empty_output(q, v.shape[3])


@attend_to_keys_backward.register_fake
def _(q, k, v, *_):
    return empty_gradient(q), empty_gradient(k), empty_gradient(v)


def save(ctx, inputs, output):
    q, k, v, *ctx.sizes = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def backward(ctx, dout, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    gradients = attend_to_keys_backward(q, k, v, out, lse, dout, dlse, *ctx.sizes)
    return *gradients, None, None, None, None, None


attend_to_keys.register_autograd(backward, setup_context=save)


# --- for everyone ---


def window_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S Dv"],
    *,
    window: int | None = None,
    scale: float | None = None,
    start: int = 0,
) -> Float[Tensor, "B H T Dv"]:
    """Causal attention to the last `window` keys, the query's own included; None is dense.

    Section 3.3.3: out_t = softmax(scale q_t k_s) v_s over s = t - window + 1 .. t.
    Errors: ValueError or TypeError that names the argument.
    """
    check_inputs(q, k, v)
    check_keys_reach(q, k, start)
    if window is not None:
        check_int("window", window, at_least=1)
    scale = scale_or_default(scale, q.shape[3])
    one_token = 1  # a raw key is a block of one token
    return attend_to_keys(q, k, v, one_token, one_token, window, scale, start)[0]


def compressed_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G N D"],
    v: Float[Tensor, "B G N Dv"],
    *,
    block_size: int,
    stride: int,
    scale: float | None = None,
    start: int = 0,
) -> tuple[Float[Tensor, "B H T Dv"], Float32[Tensor, "B H T"]]:
    """Attention to the compressed keys of blocks that ended at or before the query, and its lse.

    Eq. 7: query t sees block i iff i * stride + block_size - 1 <= t. A query that sees no block
    gets out 0 and lse -inf; lse is the natural log of the sum of exp(scale q_t k_i). Rows behind
    the blocks that the last query sees are not read, so raw keys are read as if they were blocks.
    Errors: ValueError or TypeError that names the argument.
    """
    check_inputs(q, k, v)
    check_compression(block_size, stride)
    check_start(start)
    scale = scale_or_default(scale, q.shape[3])
    return attend_to_keys(q, k, v, block_size, stride, None, scale, start)
