"""How fast could each kernel be? Its operations, its bytes, and the time a device needs for them.

    python -m benchmarks.roofline                   the paper's heads, 64k tokens, random selection
    python -m benchmarks.roofline --length 8192 --keep 0.9

Counted, not timed. Every kernel has two bounds:

    any kernel     the products of the query-key pairs that the mask lets through, and every tensor
                   through device memory once
    these tiles    what the tiles of kernels/ multiply, masked corners included, and what they load
                   again and again through the L2 cache

A sum that our kernels add up in parts is counted so: its parts go to memory and come back. Matrix
products count, and the gates' multiply-adds; exponentials and work on ids do not.
"""

import argparse
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kernels.block_sparse_attention import union_tile
from kernels.flash_attention import row_tile, token_chunks
from kernels.importance import blocks_in_a_tile
from kernels.tile_sizes import TileSizes, padded, row_name, tile_sizes
from kernels.union_and_readers import CHUNK
from nsa_lite.blocks import num_compressed, num_select_blocks
from nsa_lite.checks import require
from nsa_lite.config import NSAConfig
from nsa_lite.cost import sequence_cost
from nsa_lite.show import plots

# What a device gives at most: operations a second in bf16 matrix products, bytes a second.
H100 = {
    "arithmetic": 743e12,  # the best of several shapes; the least good gave 672e12
    "memory": 3.03e12,  # a copy, bytes read and written together
    "cache": 7.5e12,  # reads from L2 while under 32 MB are live; 4.3e12 at 128 MB
    "source": "measured on one H100 80 GB (HBM3, 700 W), torch 2.11, triton 3.6, November 2026",
}
# How often a query-key pair meets a vector of D and one of Dv numbers.
PRODUCTS = {
    "forward": (1, 1),  # s = q k, out += p v
    "dq": (2, 1),  # s and dp = dout v again, dq += ds k
    "dk dv": (2, 2),  # s and dp again, dk += ds q, dv += p dout
}


@dataclass(frozen=True)
class Work:
    """What one kernel does: floating-point operations, and bytes."""

    operations: float  # for pairs that the mask lets through
    executed: float  # for whole tiles
    memory: float  # each tensor, and each part of a sum, once: no order of programs moves less
    cache: float  # what all programs load and store


def bounds(work: Work, device: dict = H100) -> dict[str, float]:
    """Seconds that each resource needs for these tiles."""
    return {
        "arithmetic": work.executed / device["arithmetic"],
        "memory": work.memory / device["memory"],
        "cache": work.cache / device["cache"],
    }


def floor(work: Work, device: dict = H100) -> float:
    """Seconds that these tiles need at least."""
    return max(bounds(work, device).values())


def floor_of_any(work: Work, device: dict = H100) -> float:
    """Seconds that any kernel with these products needs at least, whatever its tiles."""
    return max(work.operations / device["arithmetic"], work.memory / device["memory"])


def bound_by(work: Work, device: dict = H100) -> str:
    """The resource that these tiles keep busy longest: arithmetic, memory or cache."""
    times = bounds(work, device)
    return max(times, key=times.get)


# --- which tiles meet ---


@dataclass(frozen=True)
class Keys:
    """A run of keys as kernels/flash_attention.py walks it: j ends at token j * stride + block - 1."""

    count: int
    block: int = 1
    stride: int = 1
    window: int | None = None

    def seen(self, t: int) -> int:
        """How many keys end at or before token t."""
        return min(max(t + 1 - self.block + self.stride, 0) // self.stride, self.count)


def key_tiles(keys: Keys, length: int, step: int, N: int) -> int:
    """Tiles of N keys that the boxes of `step` tokens load, all together."""
    loaded = 0
    for first in range(0, length, step):
        last = min(first + step, length) - 1
        low = 0 if keys.window is None else max(first - keys.window + 1, 0) // N
        loaded += max(-(-keys.seen(last) // N) - low, 0)
    return loaded


def token_steps(keys: Keys, length: int, step: int, N: int) -> int:
    """Steps of so many tokens that the tiles of N keys take, from the first that sees one."""
    taken = 0
    for key in range(0, keys.count, N):
        end = key * keys.stride + keys.block - 1
        stop = length if keys.window is None else end + (N - 1) * keys.stride + keys.window
        taken += max(-(-min(stop, length) // step) - end // step, 0)
    return taken


def neighbours(config: NSAConfig) -> int:
    """How many tokens share a program of the selected branch: with their heads, 64 rows at most."""
    return union_tile(config.group_size)[1]


def expected_union(config: NSAConfig, length: int, U: int, keep: float = 0.0) -> float:
    """Blocks that U queries in a row read together, on average over the sequence.

    The free blocks are drawn at random from the legal ones, and each is kept from one query to
    the next with probability `keep`; the neighbours lie in one block, so they share the forced.
    Errors: ValueError for a `keep` outside 0 .. 1.
    """
    require(0 <= keep <= 1, "keep", keep, "must be a probability")
    forced = config.num_initial + config.num_local
    free, total = config.num_selected - forced, 0.0
    blocks = num_select_blocks(length, config.select_block_size)
    for legal in range(1, blocks + 1):
        if legal <= config.num_selected:
            total += legal
            continue
        missed = 1 - free / (legal - forced)  # a block that the first query does not draw
        drawn_later = (1 - keep) * free / (legal - forced)
        total += forced + (legal - forced) * (1 - missed * (1 - drawn_later) ** (U - 1))
    return total / blocks


# --- the kernels ---


@dataclass(frozen=True)
class Sizes:
    """What the counts below share: rows are queries x heads, numbers are elements of a tensor."""

    config: NSAConfig
    length: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def groups(self) -> int:
        return self.batch * self.config.kv_heads

    @property
    def rows(self) -> int:
        return self.batch * self.config.heads * self.length

    @property
    def width(self) -> int:
        """D + Dv: a key and its value, or a query and its output."""
        return self.config.head_dim + self.config.value_dim

    def bytes(self, numbers: float) -> float:
        """Bytes of `numbers` elements of q, k, v and their like."""
        return numbers * self.dtype.itemsize

    def tile(self, kernel: str) -> TileSizes:
        """The line of kernels/tile_sizes.py."""
        widest = max(padded(self.config.head_dim), padded(self.config.value_dim))
        return tile_sizes(kernel, widest, self.dtype)

    def operations(self, what: str, pairs: float, whole_tiles: bool = False) -> float:
        """Of the matrix products for this many pairs of one query head and one key."""
        widths = self.config.head_dim, self.config.value_dim
        if whole_tiles:
            widths = padded(widths[0]), padded(widths[1])
        return sum(2 * pairs * times * w for times, w in zip(PRODUCTS[what], widths, strict=True))

    def row_bytes(self, vectors: int, numbers: int) -> float:
        """Bytes of rows with so many vectors of D and of Dv, and so many float32 numbers."""
        return self.rows * (self.bytes(vectors * self.width) + 4 * numbers)


def flash(sizes: Sizes, keys: Keys, pairs: float) -> dict[str, Work]:
    """flash_forward, flash_dq and flash_dkdv; pairs of queries and keys that may meet, a head."""
    group, key_bytes = sizes.config.group_size, sizes.bytes(sizes.groups * keys.count * sizes.width)
    rows = {
        "forward": sizes.row_bytes(1, 1),  # q and out; lse
        "dq": sizes.row_bytes(2, 3),
    }  # q, dq, out and dout; lse, row_lse and row_delta
    works = {}
    for what in rows:
        tile = sizes.tile(row_name(f"flash_{what}", keys.window))
        N = tile.BLOCK_N
        heads, step = row_tile(group, tile.BLOCK_M)
        M, met = heads * step, sizes.groups * key_tiles(keys, sizes.length, step, N)
        works[what] = Work(
            operations=sizes.operations(what, sizes.batch * sizes.config.heads * pairs),
            executed=sizes.operations(what, met * M * N, whole_tiles=True),
            memory=rows[what] + key_bytes,
            cache=rows[what] + sizes.bytes(met * N * sizes.width),
        )
    return works | {"dk dv": flash_dkdv(sizes, keys, pairs, key_bytes)}


def flash_dkdv(sizes: Sizes, keys: Keys, pairs: float, key_bytes: float) -> Work:
    """Key tiles walk over tokens; where the walk is cut, float32 parts are written and read."""
    tile = sizes.tile(row_name("flash_dkdv", keys.window))
    N = tile.BLOCK_N
    heads, step = row_tile(sizes.config.group_size, tile.BLOCK_M)
    programs = -(-keys.count // N) * sizes.groups
    _, chunks = token_chunks(sizes.length, keys.window, step, N, programs)
    met = sizes.groups * token_steps(keys, sizes.length, step, N)
    M = heads * step
    parts = 0 if chunks == 1 else 2 * 4 * chunks * sizes.groups * keys.count * sizes.width
    return Work(
        operations=sizes.operations("dk dv", sizes.batch * sizes.config.heads * pairs),
        executed=sizes.operations("dk dv", met * M * N, whole_tiles=True),
        memory=sizes.row_bytes(1, 2) + 2 * key_bytes + parts,
        cache=met * M * (sizes.bytes(sizes.width) + 8) + (chunks + 1) * key_bytes + parts,
    )


def selected(sizes: Sizes, pairs: float, union: float, U: int | None = None) -> dict[str, Work]:
    """selected_forward, selected_dq and selected_dkdv; `union` blocks a program on average.

    U tokens share a program; None takes what the kernels take.
    """
    config, group = sizes.config, sizes.config.group_size
    U = neighbours(config) if U is None else U
    M, N = max(16, U * row_tile(group, 1)[0]), padded(config.select_block_size)
    met = sizes.groups * -(-sizes.length // U) * union  # programs x blocks
    key_bytes = sizes.bytes(sizes.groups * sizes.length * sizes.width)
    rows = {"forward": sizes.row_bytes(1, 1), "dq": sizes.row_bytes(2, 3)}  # as in flash
    works = {}
    for what in rows:
        works[what] = Work(
            operations=sizes.operations(what, sizes.batch * config.heads * pairs),
            executed=sizes.operations(what, met * M * N, whole_tiles=True),
            memory=rows[what] + key_bytes + 4 * met,  # an entry of the union takes 4 bytes
            cache=rows[what] + sizes.bytes(met * N * sizes.width) + 4 * met,
        )
    return works | {"dk dv": selected_dkdv(sizes, pairs, key_bytes)}


def selected_dkdv(sizes: Sizes, pairs: float, key_bytes: float) -> Work:
    """Each block gathers its readers' rows; the chunks of a list leave float32 parts.

    memory is a far bound here: readers lie all over the sequence, and a cache that cannot hold
    their rows until the next block asks for them has to load them again.
    """
    config, l_sel = sizes.config, sizes.config.select_block_size
    M = padded(config.group_size)  # rows: one reader's, in a tile of 16 at least
    readers = sizes.groups * sum(
        min(config.num_selected, t // l_sel + 1) for t in range(sizes.length)
    )
    blocks = sizes.groups * num_select_blocks(sizes.length, l_sel)
    chunks = readers // CHUNK + blocks  # at most
    parts = 2 * 4 * chunks * l_sel * sizes.width
    return Work(
        operations=sizes.operations("dk dv", sizes.batch * config.heads * pairs),
        executed=sizes.operations("dk dv", readers * M * padded(l_sel), whole_tiles=True),
        memory=sizes.row_bytes(1, 2) + 2 * key_bytes + parts + 4 * readers,
        cache=readers * (M * sizes.bytes(sizes.width) + 8 * config.group_size + 4)
        + chunks * sizes.bytes(l_sel * sizes.width)
        + parts
        + key_bytes,
    )


def selection(sizes: Sizes, pairs: float) -> dict[str, Work]:
    """block_scores and top_blocks: one product for each pair, then no matrix product at all."""
    config, length = sizes.config, sizes.length
    tile = sizes.tile("block_scores")
    M, N = tile.BLOCK_M, tile.BLOCK_N
    J = blocks_in_a_tile(N, config.select_block_size, config.stride)
    first_tokens = range(
        0,
        num_select_blocks(length, config.select_block_size) * config.select_block_size,
        J * config.select_block_size,
    )
    programs = sizes.groups * sum(
        sum(first <= token + M - 1 for first in first_tokens) for token in range(0, length, M)
    )
    # Of a block's own keys, and of what the block before passes on: two numbers.
    scores = 8 * sizes.groups * sum(t // config.select_block_size + 1 for t in range(length))
    ids = 4 * sizes.groups * length * config.num_selected
    short = num_compressed(length, config.block_size, config.stride)
    D, group = config.head_dim, config.group_size
    return {
        "scores": Work(
            operations=2 * D * sizes.batch * config.heads * pairs,
            executed=2 * padded(D) * programs * M * N * group,
            memory=sizes.bytes((sizes.rows + sizes.groups * short) * D) + 4 * sizes.rows + scores,
            cache=programs * (sizes.bytes((N + group * M) * D) + 4 * (group * M + 2 * M * J)),
        ),
        # The ids are written twice: -1 everywhere, then the chosen ones.
        "top-n": Work(0, 0, memory=scores + 2 * ids, cache=scores + 2 * ids),
    }


def gated_sum(sizes: Sizes) -> dict[str, Work]:
    """mix and mix_backward: nothing is loaded twice, and hardly anything is computed."""
    width, works = sizes.config.value_dim, {}
    # Three branches in, one sum out; or three and dout in, three douts out. Gates, then dgates too.
    for what, tensors, gates, per_number in (("forward", 4, 3, 6), ("backward", 7, 6, 9)):
        moved = sizes.bytes(sizes.rows * (tensors * width + gates))
        counted = per_number * sizes.rows * width
        works[what] = Work(counted, counted, moved, moved)
    return works


def works(sizes: Sizes, union: float | None = None) -> dict[str, dict[str, Work]]:
    """Every kernel, as works["window"]["dq"]; `union` is that of random selection by default."""
    config, length = sizes.config, sizes.length
    pairs = sequence_cost(config, length).tokens | sequence_cost(config, length, "dense").tokens
    if union is None:
        union = expected_union(config, length, neighbours(config))
    short = num_compressed(length, config.block_size, config.stride)
    compressed = Keys(short, config.block_size, config.stride)
    return {
        "dense": flash(sizes, Keys(length), pairs["dense"]),
        "window": flash(sizes, Keys(length, window=config.window), pairs["window"]),
        "compressed": flash(sizes, compressed, pairs["compressed"]),
        "selected": selected(sizes, pairs["selected"], union),
        "selection": selection(sizes, pairs["compressed"]),
        "gated sum": gated_sum(sizes),
    }


# --- the table and the picture ---


def table(by_branch: dict[str, dict[str, Work]], device: dict = H100) -> str:
    """A line for each kernel: TFLOP that it needs and executes, GB it moves, its two floors."""
    lines = [
        f"{'':20}   needed executed    memory     cache   any kernel  these tiles  bound by",
        f"{'':20}    TFLOP    TFLOP        GB        GB           ms           ms",
    ]
    for branch, kernels in by_branch.items():
        for what, work in kernels.items():
            lines.append(
                f"{branch + ' ' + what:20} {work.operations / 1e12:8.2f} "
                f"{work.executed / 1e12:8.2f} {work.memory / 1e9:9.2f} {work.cache / 1e9:9.2f} "
                f"{floor_of_any(work, device) * 1e3:12.2f} {floor(work, device) * 1e3:12.2f}  "
                f"{bound_by(work, device)}"
            )
    return "\n".join(lines)


MARKERS = {"forward": "o", "dq": "s", "dk dv": "^", "scores": "D", "backward": "v"}
COLOURS = plots.COLOURS | {"dense": "#000000", "selection": "#D55E00", "gated sum": "#CC79A7"}


def draw(
    by_branch: dict[str, dict[str, Work]],
    device: dict = H100,
    measured: dict[str, dict[str, float]] | None = None,
) -> Figure:
    """The roofline: operations for a byte of device memory against operations a second, log-log.

    Hollow marks are the floor of any kernel: they lie on the roof. Filled marks are the floor of
    these tiles. measured[branch][kernel], in seconds, adds stars. Kernels far out on the slope are
    named in the corner; one without operations has no place.
    """
    figure, ax = plt.subplots(figsize=(plots.WIDTH, 4.8))
    points = [
        (work.operations / work.memory, branch, what, work)
        for branch, kernels in by_branch.items()
        for what, work in kernels.items()
        if work.operations
    ]
    left = device["arithmetic"] / device["memory"] / 4  # the slope's last bit
    near = [point for point in points if point[0] >= left]
    for x, branch, what, work in near:
        seconds = (measured or {}).get(branch, {}).get(what)
        _draw_marks(ax, x, work, device, seconds, COLOURS[branch], MARKERS[what])
    _draw_roof(ax, device, left, right=2 * max(x for x, *_ in near))
    _draw_labels(
        ax,
        sorted(
            (x, work.operations / floor_of_any(work, device) / 1e12, f"{branch} {what}")
            for x, branch, what, work in near
        ),
    )
    far = [
        f"{branch} {what}: {x:.1f} a byte, {work.operations / floor(work, device) / 1e12:.1f} "
        "TFLOP/s"
        for x, branch, what, work in points
        if x < left
    ]
    if far:
        ax.text(
            0.02,
            0.03,
            "\n".join(["on the slope, left of here:", *far]),
            transform=ax.transAxes,
            fontsize=9,
        )
    _draw_legend(ax, measured)
    return figure


def _draw_marks(
    ax: Axes, x: float, work: Work, device: dict, seconds: float | None, colour: str, marker: str
) -> None:
    """One kernel's floors, joined by a line, and its measured rate."""
    top, reached = (work.operations / f(work, device) / 1e12 for f in (floor_of_any, floor))
    ax.plot([x, x], [reached, top], color=colour, linewidth=0.8)
    ax.plot(x, top, marker, color=colour, markerfacecolor="white", markersize=5)
    ax.plot(x, reached, marker, color=colour, markersize=5)
    if seconds is not None:
        ax.plot(x, work.operations / seconds / 1e12, "*", color=colour, markersize=9)


def _draw_roof(ax: Axes, device: dict, left: float, right: float) -> None:
    """The slope, which memory sets, and the roof, which arithmetic sets; room for names above."""
    roof = device["arithmetic"] / 1e12
    low = ax.dataLim.ymin / 1.6
    ax.loglog([left, 4 * left, right], [roof / 4, roof, roof], color="#999999", zorder=0)
    ax.set(
        xlim=(left, right),
        ylim=(low, roof * (roof / low) ** 0.9),
        xlabel="operations for each byte of device memory",
        ylabel="TFLOP/s",
    )
    ax.set_yticks([*(y for y in (1, 3, 10, 30, 100, 300) if low < y < roof), roof])
    ax.yaxis.set_major_formatter("{x:.0f}")
    ax.minorticks_off()


def _draw_labels(ax: Axes, labels: list[tuple[float, float, str]]) -> None:
    """Names above the roof, each with a line to its mark, far enough apart to be read."""
    left, right = ax.get_xlim()
    gap = (right / left) ** (1 / 22)  # of 22 places, in the log
    at = left
    for x, y, name in labels:
        at = max(at * gap, x / gap**2)
        ax.annotate(
            name,
            (x, y * 1.03),
            (at, 0.68),
            textcoords=ax.get_xaxis_transform(),
            rotation=60,
            rotation_mode="anchor",
            fontsize=9,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6},
        )


def _draw_legend(ax: Axes, measured: object) -> None:
    """What a mark means, whatever its shape and colour."""
    ax.plot([], [], "o", color="#444444", markerfacecolor="white", label="any kernel, computed")
    ax.plot([], [], "o", color="#444444", label="these tiles, computed")
    if measured:
        ax.plot([], [], "*", color="#444444", label="measured")
    ax.legend(loc="lower right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=65536, help="tokens (65536)")
    parser.add_argument("--width", type=int, default=128, help="of queries and keys (128)")
    parser.add_argument(
        "--keep",
        type=float,
        default=0.0,
        help="how likely a query keeps a free block of the one before (0: random)",
    )
    args = parser.parse_args()
    config = NSAConfig(head_dim=args.width)
    union = expected_union(config, args.length, neighbours(config), args.keep)
    print(
        f"{config.heads} heads, {config.kv_heads} groups, {args.length} tokens, bf16; "
        f"{neighbours(config)} neighbours read {union:.1f} blocks together"
    )
    print(f"computed bounds, no timings; the device's rates: {H100['source']}\n")
    print(table(works(Sizes(config, args.length), union)))


if __name__ == "__main__":
    main()
