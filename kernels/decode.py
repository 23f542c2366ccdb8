"""One decoding step: a few new tokens a sequence read their three branches from the cache.

With one query there is little to share and little to do: what counts is that all of the GPU reads,
and that nothing is read twice. So the keys of a sequence are cut into shares, a program for each,
and their partial softmaxes are put together afterwards, in a fixed order:

    compressed   share 0  share 1 ..   ->  out, maximum, sum of each share  --.
                    '--------'-------->  each head's sums over blocks         |
    scores       the heads' sums, once the log-sum-exp is known (Eq. 10)      |
    best         ids (Eq. 11)                                                 |
    branches     selected: share 0 ..  window: share 0 ..  ->  out, ..        |
    combine      gates * the branches (Eq. 5)  <--------------'---------------'

The compressed keys are read once. Eq. 8's probabilities need the log-sum-exp of all keys, which no
share knows; but Eq. 9 only adds them up, so a share may add exp(s - its own maximum) over each
block, and the choice multiplies these sums by exp(maximum - log-sum-exp).

The lengths of the sequences are read on the device, so a CUDA graph of a step can be replayed while
the cache grows. Read rows.py and online_softmax.py first.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

from kernels.checks import (
    check_counts,
    check_gates,
    check_geometry,
    check_inputs,
    check_int,
    check_lengths,
    check_most_blocks,
    scale_or_default,
)
from kernels.importance import Choice, best_of, blocks_in_a_tile, sums_of_blocks
from kernels.launching import launch
from kernels.online_softmax import LOG2E, fold_in, fold_in_with_weights
from kernels.operations import in_batches, operation
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
from kernels.tile_sizes import Tile, cdiv, power_of_two, tile_for, widths_of
from kernels.visible_keys import Keys, keys_seen, may_read

PROGRAMS = 264  # that the shares of all sequences make together: two for each multiprocessor
MOST_SHARES = 64  # of one branch: one tile of the combine holds them
MOST_SELECTED = tl.constexpr(64)  # blocks that a token reads, as check_most_blocks says
BLOCKS = 64  # whose scores one program adds up
ROWS = 64  # of a tile at most: heads of a group x new tokens


class Cached(Protocol):
    """What decode_step reads of a cache: blocks and raw["selected"], raw["window"] are (k, v)."""

    blocks: tuple[Tensor, Tensor]
    raw: dict[str, tuple[Tensor, Tensor]]
    lengths: Tensor


class Sizes(NamedTuple):
    """Runtime sizes: groups, new tokens of a sequence, compressed keys there is room for, scale."""

    G: int
    T: int
    S: int
    scale: float


class Parts(NamedTuple):
    """Each share's softmax, float32 and contiguous: acc (P, B, H, T, Dv), m and l (P, B, H, T)."""

    acc: Tensor
    m: Tensor
    l: Tensor  # noqa: E741  the field's name for the sum


class BlockSums(NamedTuple):
    """Eq. 9 before the softmax is known, float32 and contiguous.

    Shapes: sums (2, B, H, T, blocks), what lies in a block and what it passes on to the next one;
    maxima (B, H, T, tiles), what a tile's scores were taken relative to.
    """

    sums: Tensor
    maxima: Tensor
    num_blocks: int
    num_tiles: int


class ScoreTile(NamedTuple):
    """Compile-time: heads and blocks of a tile; as many blocks had a share's tile of keys."""

    BLOCK_H: int
    BLOCK_J: int
    OF_SHARE: int


class Pair(NamedTuple):
    """A branch's keys and values in the cache."""

    k: Rows
    v: Rows


class Shares(NamedTuple):
    """Compile-time: how many programs share a branch's keys."""

    compressed: int
    selected: int
    window: int


# --- the kernels ---


@triton.jit
def store_part(parts, part, at, acc, m_i, l_i, sizes, WIDTHS: tl.constexpr):
    """Leave one share's softmax of the rows `at`; of an empty one only the sum, 0."""
    number = part * (tl.num_programs(1) * WIDTHS.R * sizes.T).to(tl.int64)
    number += number_offsets(at, sizes, WIDTHS.R)
    tl.store(parts.m + number, m_i, mask=at.mask)
    tl.store(parts.l + number, l_i, mask=at.mask)
    some = at.mask & (l_i > 0)
    store_pieces(parts.acc, number * WIDTHS.DV, acc, some, WIDTHS.DV, WIDTHS.BLOCK_DV)


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
        m_i, l_i, acc, p, m = fold_in_with_weights(
            q_tile, k_tile, v_tile, mask, sizes.scale * LOG2E, m_i, l_i, acc
        )
        tl.store(block_sums.maxima + number * block_sums.num_tiles + tile, m, mask=at.mask)
        block = tile * J + tl.arange(0, J)
        keep = at.mask[:, None] & (block < block_sums.num_blocks)[None, :]
        for part in tl.static_range(2):
            sums = sums_of_blocks(p, i, part, J, KEYS, SELECT_BLOCK_SIZE)
            row = part * (tl.num_programs(1) * WIDTHS.R * sizes.T).to(tl.int64) + number
            to = block_sums.sums + row[:, None] * block_sums.num_blocks + block[None, :]
            tl.store(to, sums, mask=keep)
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
    score,
    sizes,
    R: tl.constexpr,
    KEYS: tl.constexpr,
    SELECT_BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Eq. 10 for BLOCK_J blocks and one new token, from the sums that the shares have left.

    Tiles: the sums of a group's heads [H, J]. Grid: tiles of blocks, batch x groups, tokens.
    """
    J: tl.constexpr = TILE.BLOCK_J
    KEYS_OF_A_TILE: tl.constexpr = TILE.OF_SHARE * (SELECT_BLOCK_SIZE // KEYS.stride)
    length = tl.load(lengths + tl.program_id(1) // sizes.G).to(tl.int32)
    seen = tl.cdiv(keys_seen(length - 1, sizes.S, KEYS), KEYS_OF_A_TILE) * TILE.OF_SHARE
    if tl.program_id(0) * J > seen:
        return  # no compressed key reaches into these blocks
    j = tl.program_id(0) * J + tl.arange(0, J)
    head = tl.arange(0, TILE.BLOCK_H)
    number = (tl.program_id(1).to(tl.int64) * R + head) * sizes.T + tl.program_id(2)
    numbers = (tl.num_programs(1) * R * sizes.T).to(tl.int64)
    lse = lse_of_parts(parts, number, numbers, head < R, SHARES, BLOCK_P)
    total = tl.zeros([J], tl.float32)
    for part in tl.static_range(2):  # what lies in block j, and what the one before passes on
        block = j - part
        mask = (head < R)[:, None] & ((block >= 0) & (block < seen))[None, :]
        row = part * numbers + number
        sums = block_sums.sums + row[:, None] * block_sums.num_blocks + block[None, :]
        maxima = block_sums.maxima + number[:, None] * block_sums.num_tiles
        m = tl.load(maxima + (block // TILE.OF_SHARE)[None, :], mask=mask, other=-float("inf"))
        p = tl.load(sums, mask=mask, other=0.0) * tl.exp2(m - lse[:, None])  # [H, J]
        total += tl.sum(p, 0)
    query = tl.program_id(1).to(tl.int64) * sizes.T + tl.program_id(2)
    tl.store(score + query * block_sums.num_blocks + j, total, mask=j < block_sums.num_blocks)


@triton.jit
def best_of_a_token(
    lengths,
    score,
    ids,
    sizes,
    num_blocks,
    KEYS: tl.constexpr,
    CHOICE: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Eq. 11 for one new token: the ids of its n best blocks, ascending, then -1.

    Tile: the scores of all blocks [BLOCK_J]. Grid: tokens, batch x groups.
    """
    SELECTED: tl.constexpr = CHOICE.num_selected
    length = tl.load(lengths + tl.program_id(1) // sizes.G).to(tl.int32)
    own = (length - sizes.T + tl.program_id(0)) // CHOICE.select_block_size
    query = tl.program_id(1).to(tl.int64) * sizes.T + tl.program_id(0)
    j = tl.arange(0, BLOCK_J)
    taken = j <= own  # all that have begun
    if own >= SELECTED:
        reach = keys_seen(length - 1, sizes.S, KEYS) * KEYS.stride + KEYS.block_size - KEYS.stride
        scored = taken & (j * CHOICE.select_block_size < reach)  # others have no keys: 0
        rank = tl.load(score + query * num_blocks + j, mask=scored, other=0.0)
        taken = best_of(rank, j, own, CHOICE, BLOCK_J)
    count = tl.sum(taken.to(tl.int32), 0)
    slot = tl.cumsum(taken.to(tl.int32), 0) - 1  # how many chosen ids are smaller
    to = ids + query * SELECTED
    tl.store(to + slot, j, mask=taken)
    rest = count + tl.arange(0, MOST_SELECTED)
    tl.store(to + rest, tl.full([MOST_SELECTED], -1, tl.int32), mask=rest < SELECTED)


@triton.jit
def branch_share(
    q,
    selected,
    window,
    lengths,
    ids,
    parts,
    sizes,
    WIDTHS: tl.constexpr,
    TILE: tl.constexpr,
    CHOICE: tl.constexpr,
    WINDOW: tl.constexpr,
    SHARES: tl.constexpr,
):
    """One share of a token's selected blocks, or of its window: the softmax of a group's heads.

    Tiles: q [M, D], k [N, D], v [N, DV]. A block takes STEPS tiles; the last may reach beyond it.
    Grid: shares of the selected blocks, then those of the window; batch x groups; tokens.
    """
    M: tl.constexpr = TILE.BLOCK_H
    N: tl.constexpr = TILE.BLOCK_N
    D: tl.constexpr = WIDTHS.D
    DV: tl.constexpr = WIDTHS.DV
    STEPS: tl.constexpr = triton.cdiv(CHOICE.select_block_size, N)
    at = rows_of_a_tile(tl.program_id(2), sizes, WIDTHS.R, TILE)
    t = tl.load(lengths + at.b).to(tl.int32) - sizes.T + tl.program_id(2)
    low = tl.maximum(t + 1 - WINDOW, 0)
    in_blocks = tl.program_id(0) < SHARES.selected
    k = window.k
    v = window.v
    share = tl.cdiv(tl.cdiv(t + 1 - low, N), SHARES.window)
    steps = tl.cdiv(t + 1 - low, N)
    begin = (tl.program_id(0) - SHARES.selected) * share
    if in_blocks:
        k = selected.k
        v = selected.v
        steps = tl.minimum(t // CHOICE.select_block_size + 1, CHOICE.num_selected) * STEPS
        share = tl.cdiv(steps, SHARES.selected)
        begin = tl.program_id(0) * share
    ids += (tl.program_id(1).to(tl.int64) * sizes.T + tl.program_id(2)) * CHOICE.num_selected

    q_at = row_offsets(q.strides, at.b, at.g * WIDTHS.R + at.head, at.token)
    q_tile = load_pieces(q.ptr, q_at, at.mask, D, WIDTHS.BLOCK_D)  # [M, D]
    m_i = tl.full([M], -float("inf"), tl.float32)
    l_i = tl.zeros([M], tl.float32)
    acc = zeros(M, DV, WIDTHS.BLOCK_DV)
    for step in range(begin, tl.minimum(begin + share, steps)):
        block = tl.load(ids + step // STEPS, mask=in_blocks, other=0) * CHOICE.select_block_size
        first = tl.where(in_blocks, block + step % STEPS * N, low + step * N)
        end = tl.where(in_blocks, tl.minimum(block + CHOICE.select_block_size, t + 1), t + 1)
        key = first + tl.arange(0, N)
        k_at = row_offsets(k.strides, at.b, at.g, key)
        v_at = row_offsets(v.strides, at.b, at.g, key)
        k_tile = load_pieces(k.ptr, k_at, key < end, D, WIDTHS.BLOCK_D)  # [N, D]
        v_tile = load_pieces(v.ptr, v_at, key < end, DV, WIDTHS.BLOCK_DV)  # [N, DV]
        mask = at.mask[:, None] & (key < end)[None, :]
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
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    column = tl.arange(0, BLOCK_DV)
    mask = p < SHARES.compressed + SHARES.selected + SHARES.window
    number = p * tl.num_programs(0).to(tl.int64) + row
    # Nothing waits here: an empty share has m = -inf, and its acc, whatever it is, is left out.
    m_p = tl.load(parts.m + number, mask=mask, other=-float("inf"))
    l_p = tl.load(parts.l + number, mask=mask, other=0.0)
    acc = parts.acc + number[:, None] * DV + column[None, :]
    acc = tl.load(acc, mask=mask[:, None] & (column < DV)[None, :], other=0.0)
    factor = tl.zeros([BLOCK_P], tl.float32)
    first = 0
    for branch in tl.static_range(3):
        m = tl.where((p >= first) & (p < first + SHARES[branch]), m_p, -float("inf"))
        top = tl.max(m, 0)
        weight = tl.exp2(m - tl.where(top == -float("inf"), 0.0, top))
        total = tl.sum(l_p * weight, 0)
        gate = tl.load(gates + row * 3 + branch).to(tl.float32)
        factor += weight * (gate / tl.where(total > 0, total, 1.0))
        first += SHARES[branch]
    total = tl.sum(tl.where((l_p > 0)[:, None], acc, 0.0) * factor[:, None], 0)
    to = row_offsets(out.strides, row // (heads * T), row // T % heads, row % T)
    tl.store(out.ptr + to + column, total.to(out.ptr.dtype.element_ty), mask=column < DV)


# --- on the host ---


class Plan(NamedTuple):
    """The sizes of Eq. 5 as whole numbers; the last four are those of Choice."""

    block_size: int
    stride: int
    window_size: int
    select_block_size: int
    num_selected: int
    num_initial: int
    num_local: int


def shares_of(plan: Plan, sequences: int, tiles: int, room: int, keys: int) -> Shares:
    """How many programs share the keys of each branch, where so many groups of heads ask.

    Of compressed keys there are `tiles`; a tile holds so many raw `keys`, of `room` in all.
    """
    of_blocks = plan.num_selected * cdiv(plan.select_block_size, keys)
    of_window = cdiv(min(plan.window_size, room), keys)
    steps = max(1, cdiv((of_blocks + of_window) * sequences, PROGRAMS))  # of one program
    steps = max(steps, cdiv(max(of_blocks, of_window), MOST_SHARES))
    compressed = min(max(1, PROGRAMS // sequences), tiles, MOST_SHARES)
    return Shares(compressed, cdiv(of_blocks, steps), cdiv(of_window, steps))


def rows_of_a_step(tokens: int, heads: int) -> tuple[int, int]:
    """BLOCK_H and BLOCK_T of a tile of new tokens: ROWS at most, and 16 at least."""
    block_h = power_of_two(heads)
    block_t = min(power_of_two(tokens), max(1, ROWS // block_h))
    return max(block_h, 16 // block_t), block_t


def room_for_parts(q: Tensor, width: int, shares: Shares) -> Parts:
    """Parts for all shares of a step."""
    shape = sum(shares), *q.shape[:3]
    numbers = q.new_empty(2, *shape, dtype=torch.float32)
    return Parts(q.new_empty(*shape, width, dtype=torch.float32), *numbers.unbind())


def room_for_sums(q: Tensor, num_blocks: int, num_tiles: int) -> BlockSums:
    """BlockSums of a step."""
    sums = q.new_empty(2, *q.shape[:3], num_blocks, dtype=torch.float32)
    maxima = q.new_empty(*q.shape[:3], num_tiles, dtype=torch.float32)
    return BlockSums(sums, maxima, num_blocks, num_tiles)


# --- as an operation of torch; no gradient flows ---


@operation
@in_batches
def attend_to_cache(
    q: Tensor,
    gates: Tensor,
    pairs: Sequence[Tensor],
    lengths: Tensor,
    plan: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """decode_step: out (B, H, T, Dv) and ids (B, G, T, n). lengths (B, G): one for each group."""
    plan = Plan(*plan)
    k_c, v_c, k_s, v_s, k_w, v_w = (rows(rows_contiguous(x)) for x in pairs)
    batch, heads, tokens, _ = q.shape
    groups = pairs[0].shape[1]
    room = pairs[2].shape[2]
    choice = Choice(*plan[3:])
    keys = Keys(plan.block_size, plan.stride, None)
    widths = widths_of(q, pairs[0], pairs[1])
    tile = tile_for("decode", widths, q)
    block_h, block_t = rows_of_a_step(tokens, widths.R)
    tiles_of_tokens = cdiv(tokens, block_t)
    blocks_of_tile = blocks_in_a_tile(tile.BLOCK_N, plan.select_block_size, plan.stride)
    num_blocks = cdiv(room, plan.select_block_size)
    num_tiles = cdiv(num_blocks, blocks_of_tile)
    shares = shares_of(plan, batch * groups * tokens, num_tiles, room, tile.BLOCK_N)

    q_rows = rows(rows_contiguous(q))
    lengths = lengths[:, 0].contiguous()
    parts = room_for_parts(q, widths.DV, shares)
    sums = room_for_sums(q, num_blocks, num_tiles)
    score = q.new_empty(batch, groups, tokens, num_blocks, dtype=torch.float32)
    ids = q.new_empty(batch, groups, tokens, plan.num_selected, dtype=torch.int32)
    out = empty_beside(q, widths.DV)
    sizes = Sizes(groups, tokens, pairs[0].shape[2], scale)
    launch(
        compressed_share,
        (shares.compressed, batch * groups, tiles_of_tokens),
        q_rows,
        k_c,
        v_c,
        lengths,
        parts,
        sums,
        sizes,
        KEYS=keys,
        WIDTHS=widths,
        TILE=Tile(block_h, block_t, tile.BLOCK_N, False),
        BLOCK_J=blocks_of_tile,
        SELECT_BLOCK_SIZE=plan.select_block_size,
        **tile.launch_options(),
    )
    launch(
        scores_of_blocks,
        (cdiv(num_blocks, BLOCKS), batch * groups, tokens),
        lengths,
        parts,
        sums,
        score,
        sizes,
        R=widths.R,
        KEYS=keys,
        SELECT_BLOCK_SIZE=plan.select_block_size,
        TILE=ScoreTile(power_of_two(widths.R), BLOCKS, blocks_of_tile),
        SHARES=shares.compressed,
        BLOCK_P=power_of_two(shares.compressed),
    )
    launch(
        best_of_a_token,
        (tokens, batch * groups),
        lengths,
        score,
        ids,
        sizes,
        num_blocks,
        KEYS=keys,
        CHOICE=choice,
        BLOCK_J=power_of_two(num_blocks),
        num_warps=1 if num_blocks <= 1024 else 4,
    )
    launch(
        branch_share,
        (shares.selected + shares.window, batch * groups, tokens),
        q_rows,
        Pair(k_s, v_s),
        Pair(k_w, v_w),
        lengths,
        ids,
        parts,
        sizes,
        WIDTHS=widths,
        TILE=Tile(max(16, power_of_two(widths.R)), 1, tile.BLOCK_N, False),
        CHOICE=choice,
        WINDOW=plan.window_size,
        SHARES=shares,
        **tile.launch_options(),
    )
    launch(
        combine,
        (batch * heads * tokens,),
        parts,
        gates.contiguous(),
        rows(out),
        heads,
        tokens,
        DV=widths.DV,
        BLOCK_DV=power_of_two(widths.DV),
        SHARES=shares,
        BLOCK_P=power_of_two(sum(shares)),
    )
    return out, ids


@attend_to_cache.register_fake
def _(q, _gates, pairs, _lengths, plan, _scale):
    k, v = pairs[:2]
    ids = q.new_empty(*k.shape[:2], q.shape[2], Plan(*plan).num_selected, dtype=torch.int32)
    return empty_beside(q, v.shape[3]), ids


# --- for everyone ---


@torch.no_grad()
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
    lengths lie on the device and are not read here, so they must be T at least, and fit. No
    gradient flows. Errors: ValueError or TypeError that names the argument.
    """
    pairs = {
        "cache.blocks": cache.blocks,
        "cache.raw['selected']": cache.raw["selected"],
        "cache.raw['window']": cache.raw["window"],
    }
    for name, (k, v) in pairs.items():
        check_inputs(q, k, v, names=(f"{name}[0]", f"{name}[1]"))
    check_lengths(cache.lengths, q)
    check_geometry(block_size, stride, select_block_size)
    check_counts(num_selected, num_initial, num_local)
    check_most_blocks(num_selected)
    check_int("window_size", window_size, at_least=1)
    check_gates(gates, q)
    scale = scale_or_default(scale, q.shape[3])
    plan = Plan(
        block_size, stride, window_size, select_block_size, num_selected, num_initial, num_local
    )
    tensors = [x for pair in pairs.values() for x in pair]
    by_group = cache.lengths[:, None].expand(-1, tensors[0].shape[1])
    out, ids = attend_to_cache(q, gates, tensors, by_group, plan, scale)
    return (out, ids) if return_ids else out
