"""How a decoding step is cut into programs, and the memory that they leave their parts in.

    a sequence's compressed keys   | share | share | .. |    tiles of blocks in each
    its chosen blocks              | share | .. |
    its window                     | share | .. |

One query a sequence gives few programs, so the keys of each branch are cut into shares until there
are about PROGRAMS. Sizes follow from the room in the cache, not from how full it is: a step
allocates one piece of memory, and a CUDA graph can be replayed while the cache grows.
"""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.tile_sizes import TileSizes, Widths, blocks_in_a_tile, cdiv, power_of_two, tile_for

PROGRAMS = 264  # of a branch, all sequences together: two for each of an H100's 132 multiprocessors
MOST_SHARES = 64  # of one branch: one tile of the combine holds those of all three
MOST_TILES = 16  # of compressed keys, whose scores one program adds up
MOST_NUMBERS = 8192  # of a tile of scores: heads x blocks
ROWS = 64  # of a tile at most: heads of a group x new tokens


class StepPlan(NamedTuple):
    """The sizes of Eq. 5 as whole numbers."""

    block_size: int
    stride: int
    window_size: int
    select_block_size: int
    num_selected: int
    num_initial: int
    num_local: int


# --- how it is cut ---


class Shares(NamedTuple):
    """Compile-time: how many programs share a branch's keys."""

    compressed: int
    selected: int
    window: int


def shares_of(plan: StepPlan, queries: int, row_tiles: int, tiles: int, keys: int) -> Shares:
    """How many programs share the keys of each branch.

    Each of the queries, a group's heads of one new token, has shares of its own of the blocks and
    the window, of tiles of so many raw keys; each tile of rows has its own of the compressed keys,
    of which there are `tiles`.
    """
    of_blocks = plan.num_selected * cdiv(plan.select_block_size, keys)
    of_window = cdiv(plan.window_size, keys)
    steps = max(1, cdiv((of_blocks + of_window) * queries, PROGRAMS))  # of one program
    steps = max(steps, cdiv(max(of_blocks, of_window), MOST_SHARES))
    compressed = min(max(1, PROGRAMS // row_tiles), tiles, MOST_SHARES)
    return Shares(compressed, cdiv(of_blocks, steps), cdiv(of_window, steps))


def rows_of_a_step(tokens: int, heads: int) -> tuple[int, int]:
    """BLOCK_H and BLOCK_T of a tile of new tokens: ROWS at most, and 16 at least."""
    block_h = power_of_two(heads)
    block_t = min(power_of_two(tokens), max(1, ROWS // block_h))
    return max(block_h, 16 // block_t), block_t


class Cut(NamedTuple):
    """How a step is cut into programs, and the sizes that follow."""

    tile: TileSizes
    of_rows: tuple[int, int]  # heads and tokens of a tile
    blocks_of_tile: int  # selection blocks that a tile of compressed keys holds
    tiles_of_score: int  # such tiles whose scores one program adds up
    num_tiles: int  # of a sequence, where the cache is full
    shares: Shares

    @property
    def num_blocks(self) -> int:
        """Of a sequence; the last tiles may reach beyond the last block."""
        return self.num_tiles * self.blocks_of_tile


def cut_of(q: Tensor, widths: Widths, groups: int, capacity: int, plan: StepPlan) -> Cut:
    """The Cut of a step where a sequence has room for so many tokens."""
    batch, _, tokens, _ = q.shape
    tile = tile_for("decode", widths, q)
    of_rows = rows_of_a_step(tokens, widths.R)
    blocks_of_tile = blocks_in_a_tile(tile.BLOCK_N, plan.select_block_size, plan.stride)
    num_tiles = cdiv(cdiv(capacity, plan.select_block_size), blocks_of_tile)
    queries = batch * groups * tokens
    wanted = power_of_two(max(1, num_tiles * queries // PROGRAMS))
    fitting = max(1, MOST_NUMBERS // (power_of_two(widths.R) * blocks_of_tile))
    tiles_of_score = min(wanted, power_of_two(num_tiles), MOST_TILES, fitting)
    row_tiles = batch * groups * cdiv(tokens, of_rows[1])
    shares = shares_of(plan, queries, row_tiles, num_tiles, tile.BLOCK_N)
    num_tiles = cdiv(num_tiles, tiles_of_score) * tiles_of_score
    return Cut(tile, of_rows, blocks_of_tile, tiles_of_score, num_tiles, shares)


# --- what its kernels leave ---


class Parts(NamedTuple):
    """Each share's softmax, float32 and contiguous: acc (P, B, H, T, Dv), m and l (P, B, H, T).

    P counts the shares of all three branches.
    """

    acc: Tensor
    m: Tensor
    l: Tensor  # noqa: E741  the field's name for the sum


class BlockSums(NamedTuple):
    """Eq. 9 before the softmax is known, float32 and contiguous.

    Shapes: sums (B, H, T, blocks), each tile's divided by exp2 of its row's maximum so far; maxima
    (B, H, T, tiles), those maxima; passed_on (B, H, T, tiles), what reaches into the next tile's
    blocks.
    """

    sums: Tensor
    maxima: Tensor
    passed_on: Tensor
    num_tiles: int


class Room(NamedTuple):
    """Where the kernels of a step leave what the next ones read, all of it float32 but the ids."""

    parts: Parts
    block_sums: BlockSums
    scores: Tensor  # (B, G, T, blocks)
    ids: Tensor  # (B, G, T, n) int32


def shapes_of_room(q: Tensor, groups: int, width: int, cut: Cut, plan: StepPlan) -> list[tuple]:
    """The shapes of what Room holds: acc, m, l, sums, maxima, passed on, scores, ids."""
    batch, _, tokens, _ = q.shape
    each_row = tuple(q.shape[:3])
    part = sum(cut.shares), *each_row
    tiles = *each_row, cut.num_tiles
    scores = batch, groups, tokens, cut.num_blocks
    ids = batch, groups, tokens, plan.num_selected
    return [(*part, width), part, part, (*each_row, cut.num_blocks), tiles, tiles, scores, ids]


def in_room(shape: tuple) -> int:
    """The numbers that a tensor takes of the Room's memory: a multiple of 64."""
    return cdiv(prod(shape), 64) * 64


def room_of(memory: Tensor, shapes: list[tuple]) -> Room:
    """The Room in one piece of float32 memory."""
    pieces = memory.split([in_room(shape) for shape in shapes])
    acc, m, l_i, sums, maxima, passed_on, scores, ids = (
        piece[: prod(shape)].view(shape) for piece, shape in zip(pieces, shapes, strict=True)
    )
    parts = Parts(acc, m, l_i)
    block_sums = BlockSums(sums, maxima, passed_on, maxima.shape[3])
    return Room(parts, block_sums, scores, ids.view(torch.int32))
