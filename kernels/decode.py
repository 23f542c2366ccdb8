"""One decoding step: a few new tokens a sequence read their three branches from the cache.

With one query there is little to share and little to do: what counts is that all of the GPU reads,
and that nothing is read twice. So the keys of a sequence are cut into shares, a program for each,
and their partial softmaxes are put together afterwards, in a fixed order:

    kernel             program owns                       leaves
    compressed_share   some compressed keys of a group    the softmax of its share; each head's sums
                                                          over blocks (Eq. 9)
    scores_of_blocks   some blocks of a group             the heads' sums, now that the log-sum-exp
                                                          is known (Eq. 10)
    branch_share       some selected blocks (Eq. 11), or  the softmax of its share
                       some keys of the window
    combine            one row                            gates * the branches (Eq. 5)

The compressed keys are read once. Eq. 8's probabilities need the log-sum-exp of all keys, which no
share knows; but Eq. 9 only adds them up, so a share may add exp(s - its own maximum) over each
block, and scores_of_blocks multiplies these sums by exp(maximum - log-sum-exp).

The lengths of the sequences are read on the device, so a CUDA graph of a step can be replayed while
the cache grows. Read rows.py, online_softmax.py and shares.py first.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

from kernels.checks import (
    MOST_BLOCKS,
    check_counts,
    check_gates,
    check_geometry,
    check_int,
    check_lengths,
    check_most_blocks,
    check_pair,
    check_pair_like,
    check_parts,
    check_range,
    check_select_block_size,
    require,
    scale_or_default,
)
from kernels.importance import best_of, sums_of_blocks
from kernels.launching import Again, kept, launch, looks_of
from kernels.online_softmax import LOG2E, fold_in, fold_in_with_weights
from kernels.operations import MOST_PROGRAMS, in_batches, operation, watched
from kernels.pieces import load_pieces, store_pieces, zeros
from kernels.rows import (
    Rows,
    empty_beside,
    number_offsets,
    row_offsets,
    rows,
    rows_contiguous,
    rows_of_a_tile,
)
from kernels.shares import (
    Cut,
    Room,
    StepPlan,
    cut_of,
    in_room,
    room_of,
    shapes_of_room,
)
from kernels.tile_sizes import Tile, Widths, cdiv, power_of_two, widths_of
from kernels.visible_keys import Keys, keys_seen, may_read

PAIRS = "cache.blocks", "cache.raw['selected']", "cache.raw['window']"
MOST_SELECTED = tl.constexpr(MOST_BLOCKS)


@runtime_checkable
class Cached(Protocol):
    """What decode_step reads of a cache: blocks and raw["selected"], raw["window"] are (k, v)."""

    blocks: tuple[Tensor, Tensor]
    raw: dict[str, tuple[Tensor, Tensor]]
    lengths: Tensor


class Sizes(NamedTuple):
    """Runtime sizes: groups, new tokens of a sequence, the scale.

    Of a sequence there is room for S compressed keys, and in the sums for num_blocks blocks.
    """

    G: int
    T: int
    S: int
    num_blocks: int
    scale: float


class SumsTile(NamedTuple):
    """Compile-time: heads, tiles of the shares, and the blocks of each."""

    BLOCK_H: int
    BLOCK_C: int
    BLOCK_J: int


class Pair(NamedTuple):
    """A branch's keys and values in the cache."""

    k: Rows
    v: Rows


# --- the kernels ---


@triton.jit
def store_part(parts, part, at, acc, m_i, l_i, sizes, WIDTHS: tl.constexpr):
    """Leave one share's softmax of the rows `at`; of an empty one m = -inf, l = 0 and no acc."""
    number = part * (tl.num_programs(1) * WIDTHS.R * sizes.T).to(tl.int64)
    number += number_offsets(at, sizes, WIDTHS.R)
    tl.store(parts.m + number, m_i, mask=at.mask)
    tl.store(parts.l + number, l_i, mask=at.mask)
    some = at.mask & (l_i > 0)
    store_pieces(parts.acc, number * WIDTHS.DV, acc, some, WIDTHS.DV, WIDTHS.BLOCK_DV)


@triton.jit
def store_sums(block_sums, row, tile, own, passed_on, m, row_mask, sizes, J: tl.constexpr):
    """Leave a tile's sums over J blocks [M, J], relative to exp2(m); the last passes some on."""
    j = tl.arange(0, J)
    before = tl.broadcast_to(tl.maximum(j - 1, 0)[None, :], own.shape)
    sums = own + tl.where((j > 0)[None, :], tl.gather(passed_on, before, 1), 0.0)
    to = block_sums.sums + row[:, None] * sizes.num_blocks + (tile * J + j)[None, :]
    tl.store(to, sums, mask=row_mask[:, None])
    number = row * block_sums.num_tiles + tile
    last = tl.sum(tl.where((j == J - 1)[None, :], passed_on, 0.0), 1)
    tl.store(block_sums.passed_on + number, last, mask=row_mask)
    tl.store(block_sums.maxima + number, m, mask=row_mask)


@triton.jit
def compressed_share(
    q,
    k,
    v,
    lengths,
    parts,
    block_sums,
    sizes,
    KEYS: tl.constexpr,
    WIDTHS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    SELECT_BLOCK_SIZE: tl.constexpr,
):
    """One share of the compressed keys: its softmax, and each row's sums over BLOCK_J blocks.

    Tiles: q [M, D], k [N, D], v [N, DV], p [M, N], the sums [M, J]. Grid: shares, batch x groups,
    tiles of tokens.
    """
    M: tl.constexpr = TILE.BLOCK_H * TILE.BLOCK_T
    N: tl.constexpr = TILE.BLOCK_N
    J: tl.constexpr = BLOCK_J
    D: tl.constexpr = WIDTHS.D
    DV: tl.constexpr = WIDTHS.DV
    KEYS_OF_A_BLOCK: tl.constexpr = SELECT_BLOCK_SIZE // KEYS.stride
    at = rows_of_a_tile(tl.program_id(2) * TILE.BLOCK_T, sizes, WIDTHS.R, TILE)
    length = tl.load(lengths + at.b).to(tl.int32)
    t = length - sizes.T + at.token  # [M]
    count = keys_seen(length - 1, sizes.S, KEYS)
    tiles = tl.cdiv(count, J * KEYS_OF_A_BLOCK)
    share = tl.cdiv(tiles, tl.num_programs(0))
    begin = tl.program_id(0) * share

    q_at = row_offsets(q.strides, at.b, at.g * WIDTHS.R + at.head, at.token)
    q_tile = load_pieces(q.ptr, q_at, at.mask, D, WIDTHS.BLOCK_D)  # [M, D]
    number = number_offsets(at, sizes, WIDTHS.R)
    i = tl.arange(0, N) % (N // J)  # the i-th key that begins in its block
    m_i = tl.full([M], -float("inf"), tl.float32)
    l_i = tl.zeros([M], tl.float32)
    acc = zeros(M, DV, WIDTHS.BLOCK_DV)
    for tile in range(begin, tl.minimum(begin + share, tiles)):
        key = (tile * J + tl.arange(0, N) // (N // J)) * KEYS_OF_A_BLOCK + i
        key_mask = (i < KEYS_OF_A_BLOCK) & (key < count)
        k_at = row_offsets(k.strides, at.b, at.g, key)
        v_at = row_offsets(v.strides, at.b, at.g, key)
        k_tile = load_pieces(k.ptr, k_at, key_mask, D, WIDTHS.BLOCK_D)  # [N, D]
        v_tile = load_pieces(v.ptr, v_at, key_mask, DV, WIDTHS.BLOCK_DV)  # [N, DV]
        mask = key_mask[None, :] & may_read(key[None, :], t[:, None], count, KEYS)
        m_i, l_i, acc, p = fold_in_with_weights(
            q_tile, k_tile, v_tile, mask, sizes.scale * LOG2E, m_i, l_i, acc
        )
        own = sums_of_blocks(p, i, 0, J, KEYS, SELECT_BLOCK_SIZE)
        passed_on = sums_of_blocks(p, i, 1, J, KEYS, SELECT_BLOCK_SIZE)
        store_sums(block_sums, number, tile, own, passed_on, m_i, at.mask, sizes, J)
    store_part(parts, tl.program_id(0), at, acc, m_i, l_i, sizes, WIDTHS)


@triton.jit
def lse_of_parts(parts, number, numbers, row_mask, SHARES: tl.constexpr, BLOCK_P: tl.constexpr):
    """The log-sum-exp [M], in powers of 2, of all shares of the rows; 0 where nothing was seen."""
    p = tl.arange(0, BLOCK_P)
    at = p[None, :] * numbers + number[:, None]
    mask = row_mask[:, None] & (p < SHARES)[None, :]
    m = tl.load(parts.m + at, mask=mask, other=-float("inf"))  # [M, P]
    l_p = tl.load(parts.l + at, mask=mask, other=0.0)
    top = tl.max(m, 1)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(l_p * tl.exp2(m - top[:, None]), 1)
    return top + tl.log2(tl.where(total > 0, total, 1.0))


@triton.jit
def scores_of_blocks(
    lengths,
    parts,
    block_sums,
    scores,
    sizes,
    R: tl.constexpr,
    KEYS: tl.constexpr,
    SELECT_BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Eq. 10 for C tiles of J blocks and one new token, from the sums that the shares have left.

    Tiles: the sums of a group's heads [H, C J], their factors [H, C]. Grid: so many blocks, batch x
    groups, tokens.
    """
    C: tl.constexpr = TILE.BLOCK_C
    J: tl.constexpr = TILE.BLOCK_J
    KEYS_OF_A_TILE: tl.constexpr = J * (SELECT_BLOCK_SIZE // KEYS.stride)
    length = tl.load(lengths + tl.program_id(1) // sizes.G).to(tl.int32)
    tiles = tl.cdiv(keys_seen(length - 1, sizes.S, KEYS), KEYS_OF_A_TILE)
    if tl.program_id(0) * C > tiles:
        return  # no compressed key reaches into these blocks
    tile = tl.program_id(0) * C + tl.arange(0, C)
    j = tl.program_id(0) * (C * J) + tl.arange(0, C * J)
    head = tl.arange(0, TILE.BLOCK_H)
    row = (tl.program_id(1).to(tl.int64) * R + head) * sizes.T + tl.program_id(2)
    all_rows = (tl.num_programs(1) * R * sizes.T).to(tl.int64)
    lse = lse_of_parts(parts, row, all_rows, head < R, SHARES, BLOCK_P)
    sums = block_sums.sums + row[:, None] * sizes.num_blocks + j[None, :]
    sums = tl.load(sums, mask=(head < R)[:, None] & (j < tiles * J)[None, :], other=0.0)
    factor = softmax_factor(block_sums, row, tile, lse, tiles, head < R)  # [H, C]
    score = tl.sum(sums.reshape(TILE.BLOCK_H, C, J) * factor[:, :, None], 0)  # [C, J]
    factor = softmax_factor(block_sums, row, tile - 1, lse, tiles, head < R)
    number = row[:, None] * block_sums.num_tiles + (tile - 1)[None, :]
    from_before = tl.load(block_sums.passed_on + number, mask=factor > 0, other=0.0)
    from_before = tl.sum(from_before * factor, 0)  # [C], for a tile's first block
    score += tl.where((tl.arange(0, J) == 0)[None, :], from_before[:, None], 0.0)
    query = tl.program_id(1).to(tl.int64) * sizes.T + tl.program_id(2)
    tl.store(scores + query * sizes.num_blocks + j, score.reshape(C * J))


@triton.jit
def softmax_factor(block_sums, row, tile, lse, tiles, row_mask):
    """exp2(a tile's maximum - log-sum-exp) [H, C], which makes its sums those of probabilities."""
    mask = row_mask[:, None] & ((tile >= 0) & (tile < tiles))[None, :]
    number = row[:, None] * block_sums.num_tiles + tile[None, :]
    m = tl.load(block_sums.maxima + number, mask=mask, other=-float("inf"))
    return tl.exp2(m - lse[:, None])


@triton.jit
def store_best(scores, ids, t, count, PLAN: tl.constexpr, BLOCK_J: tl.constexpr):
    """Eq. 11: the ids of the n best blocks for token t, ascending, then -1.

    Tile: the scores of all blocks [BLOCK_J]. The newest token sees `count` compressed keys; a block
    that begins where the last of them ends, or later, has no score.
    """
    SELECTED: tl.constexpr = PLAN.num_selected
    j = tl.arange(0, BLOCK_J)
    own = t // PLAN.select_block_size
    taken = j <= own  # all that have begun
    if own >= SELECTED:
        reach = count * PLAN.stride + PLAN.block_size - PLAN.stride  # where the last key ends
        scored = taken & (j * PLAN.select_block_size < reach)
        rank = tl.load(scores + j, mask=scored, other=0.0)
        taken = best_of(rank, j, own, PLAN, BLOCK_J)
    slot = tl.cumsum(taken.to(tl.int32), 0) - 1  # how many chosen ids are smaller
    tl.store(ids + slot, j, mask=taken)
    rest = tl.sum(taken.to(tl.int32), 0) + tl.arange(0, MOST_SELECTED)
    tl.store(ids + rest, tl.full([MOST_SELECTED], -1, tl.int32), mask=rest < SELECTED)
    tl.debug_barrier()  # all warps have stored


@triton.jit
def keys_of_a_step(
    ids, step, low, t, in_blocks, PLAN: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr
):
    """The N keys of a tile, and which of them token t reads.

    Of the window the step-th tile from `low` on; else one of a chosen block's STEPS tiles, where
    the next block's keys are masked.
    """
    block = tl.load(ids + step // STEPS, mask=in_blocks, other=0) * PLAN.select_block_size
    first = tl.where(in_blocks, block + step % STEPS * N, low + step * N)
    end = tl.where(in_blocks, tl.minimum(block + PLAN.select_block_size, t + 1), t + 1)
    key = first + tl.arange(0, N)
    return key, key < end


@triton.jit
def branch_share(
    q,
    selected,
    window,
    lengths,
    scores,
    ids,
    parts,
    sizes,
    PLAN: tl.constexpr,
    WIDTHS: tl.constexpr,
    TILE: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_J: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One share of a token's selected blocks, or of its window: the softmax of a group's heads.

    Tiles: q [M, D], k [N, D], v [N, DV]. Each share of the blocks makes the token's choice for
    itself, all the same one: to wait for another program would take a launch. Grid: shares of the
    selected blocks, then those of the window; batch x groups; tokens.
    """
    M: tl.constexpr = TILE.BLOCK_H
    N: tl.constexpr = TILE.BLOCK_N
    D: tl.constexpr = WIDTHS.D
    DV: tl.constexpr = WIDTHS.DV
    STEPS: tl.constexpr = triton.cdiv(PLAN.select_block_size, N)
    at = rows_of_a_tile(tl.program_id(2), sizes, WIDTHS.R, TILE)
    length = tl.load(lengths + at.b).to(tl.int32)
    t = length - sizes.T + tl.program_id(2)
    query = tl.program_id(1).to(tl.int64) * sizes.T + tl.program_id(2)
    ids += query * PLAN.num_selected
    in_blocks = tl.program_id(0) < SHARES.selected
    if in_blocks:
        k = selected.k
        v = selected.v
        count = keys_seen(length - 1, sizes.S, KEYS)
        store_best(scores + query * sizes.num_blocks, ids, t, count, PLAN, BLOCK_J)
        steps = tl.minimum(t // PLAN.select_block_size + 1, PLAN.num_selected) * STEPS
        share = tl.cdiv(steps, SHARES.selected)
        begin = tl.program_id(0) * share
        low = 0
    else:
        k = window.k
        v = window.v
        low = tl.maximum(t + 1 - PLAN.window_size, 0)
        steps = tl.cdiv(t + 1 - low, N)
        share = tl.cdiv(steps, SHARES.window)
        begin = (tl.program_id(0) - SHARES.selected) * share

    q_at = row_offsets(q.strides, at.b, at.g * WIDTHS.R + at.head, at.token)
    q_tile = load_pieces(q.ptr, q_at, at.mask, D, WIDTHS.BLOCK_D)  # [M, D]
    m_i = tl.full([M], -float("inf"), tl.float32)
    l_i = tl.zeros([M], tl.float32)
    acc = zeros(M, DV, WIDTHS.BLOCK_DV)
    for step in range(begin, tl.minimum(begin + share, steps)):
        key, key_mask = keys_of_a_step(ids, step, low, t, in_blocks, PLAN, N, STEPS)
        k_at = row_offsets(k.strides, at.b, at.g, key)
        v_at = row_offsets(v.strides, at.b, at.g, key)
        k_tile = load_pieces(k.ptr, k_at, key_mask, D, WIDTHS.BLOCK_D)  # [N, D]
        v_tile = load_pieces(v.ptr, v_at, key_mask, DV, WIDTHS.BLOCK_DV)  # [N, DV]
        mask = at.mask[:, None] & key_mask[None, :]
        m_i, l_i, acc = fold_in(q_tile, k_tile, v_tile, mask, sizes.scale * LOG2E, m_i, l_i, acc)
    store_part(parts, SHARES.compressed + tl.program_id(0), at, acc, m_i, l_i, sizes, WIDTHS)


@triton.jit
def combine(
    parts,
    gates,
    out,
    heads,
    T,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One row (b, h, t) of Eq. 5: the gated sum of three branches, each put together from shares.

    out = sum over all shares p of gate * exp2(m_p - m) / l * acc_p, with m and l of p's branch.
    Tile: the shares' acc [P, DV]. Grid: batch x heads x tokens.
    """
    row = tl.program_id(0)
    b = row // (heads * T)
    h = row // T % heads
    p = tl.arange(0, BLOCK_P)
    column = tl.arange(0, BLOCK_DV)
    mask = p < SHARES.compressed + SHARES.selected + SHARES.window
    number = p * tl.num_programs(0).to(tl.int64) + row
    # Nothing waits here: an empty share has m = -inf, and its acc, whatever it is, is left out.
    m_p = tl.load(parts.m + number, mask=mask, other=-float("inf"))
    l_p = tl.load(parts.l + number, mask=mask, other=0.0)
    acc = parts.acc + number[:, None] * DV + column[None, :]
    acc = tl.load(acc, mask=mask[:, None] & (column < DV)[None, :], other=0.0)
    gate_at = row_offsets(gates.strides, b, h, row % T)
    factor = tl.zeros([BLOCK_P], tl.float32)
    first = 0
    for branch in tl.static_range(3):
        m = tl.where((p >= first) & (p < first + SHARES[branch]), m_p, -float("inf"))
        top = tl.max(m, 0)
        weight = tl.exp2(m - tl.where(top == -float("inf"), 0.0, top))
        total = tl.sum(l_p * weight, 0)
        gate = tl.load(gates.ptr + gate_at + branch).to(tl.float32)
        factor += weight * (gate / tl.where(total > 0, total, 1.0))
        first += SHARES[branch]
    total = tl.sum(tl.where((l_p > 0)[:, None], acc, 0.0) * factor[:, None], 0)
    to = row_offsets(out.strides, b, h, row % T)
    tl.store(out.ptr + to + column, total.to(out.ptr.dtype.element_ty), mask=column < DV)


# --- the launches ---


class Step(NamedTuple):
    """All tensors of a step; memory is the Room's."""

    q: Tensor
    gates: Tensor
    k_c: Tensor
    v_c: Tensor
    k_s: Tensor
    v_s: Tensor
    k_w: Tensor
    v_w: Tensor
    lengths: Tensor
    out: Tensor
    memory: Tensor


class Prepared(NamedTuple):
    """What steps whose tensors look alike have in common; numbers: of the Room's memory."""

    plan: StepPlan  # its window is no longer than the cache
    keys: Keys  # when a compressed key may be read
    cut: Cut
    widths: Widths
    sizes: Sizes
    batch_groups: int  # the second axis of the grids
    shapes: list[tuple]
    numbers: int
    copies: bool  # whether some rows are strided
    launches: Again


def launch_all(step: Step, known: Prepared) -> None:
    """The four kernels, one after the other."""
    room = room_of(step.memory, known.shapes)
    q = rows(step.q)  # one object for two launches: Again fills in each object's addresses anew
    launch_compressed(q, step, room, known)
    launch_scores(step, room, known)
    launch_branches(q, step, room, known)
    launch_combine(step, room, known)


def launch_compressed(q: Rows, step: Step, room: Room, known: Prepared) -> None:
    """The shares of the compressed keys."""
    cut = known.cut
    block_h, block_t = cut.of_rows
    launch(
        compressed_share,
        (cut.shares.compressed, known.batch_groups, cdiv(known.sizes.T, block_t)),
        q,
        rows(step.k_c),
        rows(step.v_c),
        step.lengths,
        room.parts,
        room.block_sums,
        known.sizes,
        KEYS=known.keys,
        WIDTHS=known.widths,
        TILE=Tile(block_h, block_t, cut.tile.BLOCK_N, False),
        BLOCK_J=cut.blocks_of_tile,
        SELECT_BLOCK_SIZE=known.plan.select_block_size,
        **cut.tile.launch_options(),
    )


def launch_scores(step: Step, room: Room, known: Prepared) -> None:
    """The scores of all blocks, from what those shares have left."""
    cut = known.cut
    launch(
        scores_of_blocks,
        (cut.num_tiles // cut.tiles_of_score, known.batch_groups, known.sizes.T),
        step.lengths,
        room.parts,
        room.block_sums,
        room.scores,
        known.sizes,
        R=known.widths.R,
        KEYS=known.keys,
        SELECT_BLOCK_SIZE=known.plan.select_block_size,
        TILE=SumsTile(power_of_two(known.widths.R), cut.tiles_of_score, cut.blocks_of_tile),
        SHARES=cut.shares.compressed,
        BLOCK_P=power_of_two(cut.shares.compressed),
    )


def launch_branches(q: Rows, step: Step, room: Room, known: Prepared) -> None:
    """The shares of the chosen blocks and of the window."""
    cut = known.cut
    launch(
        branch_share,
        (cut.shares.selected + cut.shares.window, known.batch_groups, known.sizes.T),
        q,
        Pair(rows(step.k_s), rows(step.v_s)),
        Pair(rows(step.k_w), rows(step.v_w)),
        step.lengths,
        room.scores,
        room.ids,
        room.parts,
        known.sizes,
        PLAN=known.plan,
        WIDTHS=known.widths,
        TILE=Tile(max(16, power_of_two(known.widths.R)), 1, cut.tile.BLOCK_N, False),
        SHARES=cut.shares,
        BLOCK_J=power_of_two(cut.num_blocks),
        KEYS=known.keys,
        **cut.tile.launch_options(),
    )


def launch_combine(step: Step, room: Room, known: Prepared) -> None:
    """Gates times branches, of all shares."""
    batch, heads, tokens, _ = step.q.shape
    shares = known.cut.shares
    launch(
        combine,
        (batch * heads * tokens,),
        room.parts,
        rows(step.gates),
        rows(step.out),
        heads,
        tokens,
        DV=known.widths.DV,
        BLOCK_DV=power_of_two(known.widths.DV),
        SHARES=shares,
        BLOCK_P=power_of_two(sum(shares)),
        num_warps=4 if sum(shares) > 16 else 1,
    )


# --- a step, again and again ---

prepared_steps: dict[tuple, Prepared] = {}


def prepare(tensors: Sequence[Tensor], plan: StepPlan, scale: float | None) -> Prepared:
    """Cut a step of such tensors."""
    q, _, k, v, k_s, *_ = tensors
    batch, groups, short, _ = k.shape
    capacity = k_s.shape[2]
    plan = plan._replace(window_size=min(plan.window_size, capacity))
    widths = widths_of(q, k, v)
    cut = cut_of(q, widths, groups, capacity, plan)
    scale = scale_or_default(scale, q.shape[3])
    shapes = shapes_of_room(q, groups, v.shape[3], cut, plan)
    return Prepared(
        plan,
        Keys(plan.block_size, plan.stride, None),
        cut,
        widths,
        Sizes(groups, q.shape[2], short, cut.num_blocks, scale),
        batch * groups,
        shapes,
        numbers=sum(in_room(shape) for shape in shapes),
        copies=any(x.stride(-1) != 1 for x in tensors),
        launches=Again(),
    )


def check(tensors: Sequence[Tensor], plan: StepPlan, scale: float | None) -> None:
    """Raise unless decode_step can run on them. Errors: ValueError or TypeError."""
    q, gates, *pairs, lengths = tensors
    blocks = pairs[0], pairs[1]
    for name, pair in zip(PAIRS, zip(pairs[::2], pairs[1::2], strict=True), strict=True):
        check_pair(q, pair, name)
        check_pair_like(name, pair, "cache.blocks", blocks)
    check_lengths(lengths, q)
    check_geometry(plan.block_size, plan.stride, plan.select_block_size)
    check_select_block_size(plan.select_block_size)
    check_counts(plan.num_selected, plan.num_initial, plan.num_local)
    check_most_blocks(plan.num_selected)
    check_int("window_size", plan.window_size, at_least=1)
    check_gates(gates, q)
    scale_or_default(scale, q.shape[3])


def check_held(tensors: Sequence[Tensor], plan: StepPlan) -> None:
    """Raise unless the cache holds the new tokens, no more than it has rows for, and their blocks.

    It reads the lengths: ask on a CPU only.
    """
    q, _, *pairs, lengths = tensors
    new = q.shape[2]
    capacity = min(pairs[2].shape[2], pairs[4].shape[2])
    rule = f"must lie between the {new} new tokens and the {capacity} rows of the cache"
    check_range("cache.lengths", lengths, new, capacity, rule)
    whole = max(0, (int(lengths.max()) - plan.block_size) // plan.stride + 1)
    rule = "must hold the {} blocks of the longest sequence"
    shape = tuple(pairs[0].shape)
    require(shape[2] >= whole, "cache.blocks[0].shape", shape, rule, whole)


def pairs_of(cache: Cached) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Keys and values of phi's blocks, the selected branch and the window.

    Errors: ValueError or TypeError that names the part which is none.
    """
    try:
        k_c, v_c = cache.blocks
        k_s, v_s = cache.raw["selected"]
        k_w, v_w = cache.raw["window"]
    except (AttributeError, LookupError, TypeError, ValueError):
        check_parts(cache)
        raise
    return k_c, v_c, k_s, v_s, k_w, v_w


class Attended(NamedTuple):
    """out (B, H, T, Dv), and the Room that the kernels have left."""

    out: Tensor
    memory: Tensor
    shapes: list[tuple]

    def ids(self) -> Tensor:
        """Which blocks were read, (B, G, T, n)."""
        return room_of(self.memory, self.shapes).ids.clone()


def prepared_for(tensors: Sequence[Tensor], plan: StepPlan, scale: float | None) -> Prepared:
    """What depends on shapes alone, once for each: it would take longer than the kernels.

    Errors: ValueError or TypeError, as decode_step.
    """

    def checked() -> Prepared:
        check(tensors, plan, scale)
        return prepare(tensors, plan, scale)

    types = tuple(map(type, (*plan, scale)))  # 5.0 and True are keys like 5 and 1, and refused
    try:
        return kept(prepared_steps, (looks_of(tensors), plan, scale, types), checked)
    except TypeError:  # of something that can be no key, a list, say: the check says which
        check(tensors, plan, scale)
        raise


def attend(tensors: Sequence[Tensor], known: Prepared) -> Attended:
    """decode_step of q, gates, three pairs and lengths."""
    if not tensors[0].is_cuda:
        check_held(tensors, known.plan)
    if known.copies:
        tensors = [rows_contiguous(x) for x in tensors]
    q = tensors[0]
    out = empty_beside(q, tensors[3].shape[3])
    memory = torch.empty(known.numbers, dtype=torch.float32, device=q.device)

    def run(*all_tensors: Tensor) -> None:
        launch_all(Step(*all_tensors), known)

    known.launches(run, (*tensors, out, memory))
    return Attended(out, memory, known.shapes)


# --- as an operation of torch; no gradient flows ---


@operation
@in_batches
def attend_to_cache(
    q: Tensor,
    gates: Tensor,
    pairs: Sequence[Tensor],
    lengths: Tensor,
    plan: Sequence[int],
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """attend; lengths (B, G) has a column for each group, so that all tensors have both axes."""
    tensors = q, gates, *pairs, lengths[:, 0]
    attended = attend(tensors, prepare(tensors, StepPlan(*plan), scale))
    return attended.out, attended.ids()


@attend_to_cache.register_fake
def _(q, _gates, pairs, _lengths, plan, _scale):
    k, v = pairs[:2]
    ids = q.new_empty(*k.shape[:2], q.shape[2], StepPlan(*plan).num_selected, dtype=torch.int32)
    return empty_beside(q, v.shape[3]), ids


# --- for everyone ---


def decode_step(
    q: Float[Tensor, "B H T D"],
    cache: Cached,
    gates: Float[Tensor, "B H T 3"],
    *,
    block_size: int,
    stride: int,
    select_block_size: int,
    num_selected: int,
    window_size: int,
    num_initial: int = 1,
    num_local: int = 2,
    scale: float | None = None,
    return_ids: bool = False,
) -> Float[Tensor, "B H T Dv"] | tuple[Float[Tensor, "B H T Dv"], Int32[Tensor, "B G T n"]]:
    """Eq. 5 for the T newest tokens of each sequence, 1 to 8, whose keys are in the cache already.

    The cache's lengths (B,) count them: query i of sequence b is token lengths[b] - T + i. It
    equals the last rows of nsa_attention; with return_ids the blocks that were read come too. The
    lengths of a GPU are not read here, so they must be T at least, and rows and blocks must be
    there for them. No gradient flows. Errors: ValueError or TypeError that names the argument.
    """
    choice = select_block_size, num_selected, num_initial, num_local
    plan = StepPlan(block_size, stride, window_size, *choice)
    pairs = pairs_of(cache)
    tensors = q, gates, *pairs, cache.lengths
    if watched(q) or too_many(q, pairs[0]):
        check(tensors, plan, scale)
        with torch.no_grad():
            lengths = cache.lengths[:, None].expand(-1, pairs[0].shape[1])
            out, ids = attend_to_cache(q, gates, pairs, lengths, plan, scale)
        return (out, ids) if return_ids else out
    known = prepared_for(tensors, plan, scale)
    attended = attend(tensors, known)
    return (attended.out, attended.ids()) if return_ids else attended.out


def too_many(q: Tensor, k: Tensor) -> bool:
    """Whether a grid has too few programs for all groups of the batch."""
    return q.shape[0] * k.shape[1] > MOST_PROGRAMS
