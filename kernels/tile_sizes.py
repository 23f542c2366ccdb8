"""The tile sizes of each kernel with products, and why.

BLOCK_M rows or tokens, BLOCK_N keys. The H100's fast matrix unit takes 64 rows with 4 warps, 128
with 8. Larger tiles load less, until the registers spill: `python -m benchmarks.compiled` counts
that. Each line of HALF and WIDE is the fastest of those that `python -m benchmarks.tune` times, at
64k tokens; WIDEST and FLOAT32 were only made to fit.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

SHARED = 225 * 1024  # an H100's, for tensors that are on no device: kernels compiled or interpreted
BESIDE = 2 * 1024  # bytes of fast memory that Triton needs beside tiles
SMALLEST = 32  # rows or keys: the copy engine takes no fewer numbers at a time (descriptors.py)

# A held tile waits in registers (descriptors.hold). If one product alone uses it, Triton moves the
# copy into the loop and fills the registers anew in every step. So two products must use it: dq
# cuts its walk into two loops, dk and dv take two readers a step.
PRODUCTS_OF_HELD = tl.constexpr(2)


@dataclass(frozen=True)
class TileSizes:
    """One kernel's tile: rows, keys, the warps of a program, the stages of its loads.

    hold: what a program owns waits in registers, not in shared memory. The matrix unit then reads
    half as much from there, and more stages fit: tiles on their way at once.
    The selected branch takes its keys from the blocks: None here. Forward and dq share one union,
    so they have the same BLOCK_M.
    """

    BLOCK_M: int
    BLOCK_N: int | None
    warps: int
    stages: int
    hold: bool = False

    def with_rows(self, rows: int) -> "TileSizes":
        """The tile with so many rows, and as many warps for each; 4 warps at least."""
        warps = max(4, self.warps * rows // self.BLOCK_M)
        return replace(self, BLOCK_M=rows, warps=warps)

    def launch_options(self) -> dict[str, int]:
        """What Triton wants to know at a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


class Widths(NamedTuple):
    """Compile-time sizes of the rows: heads of a group, columns of q and k, columns of v and out.

    BLOCK_D and BLOCK_DV are the columns of one piece of D and of DV (pieces.py).
    """

    R: int
    D: int
    DV: int
    BLOCK_D: int
    BLOCK_DV: int


class Tile(NamedTuple):
    """Compile-time sizes of a tile: heads x tokens, that many keys, and TileSizes' hold."""

    BLOCK_H: int
    BLOCK_T: int
    BLOCK_N: int
    HOLD: bool


# fmt: off
HALF = {  # half precision, keys and values up to 128 wide
    #                                  BLOCK_M  BLOCK_N  warps  stages
    "flash_forward":        TileSizes(     128,     128,     8,      3),
    "flash_forward_window": TileSizes(      64,      32,     4,      3, hold=True),  # less waste
    "flash_dq":             TileSizes(      64,      64,     4,      3, hold=True),
    "flash_dq_window":      TileSizes(      64,      64,     4,      3, hold=True),
    "flash_dkdv":           TileSizes(      64,      64,     4,      2),  # two programs overlap
    "flash_dkdv_window":    TileSizes(      64,     128,     8,      3),
    "block_scores":         TileSizes(      64,     128,     4,      2),
    "selected_forward":     TileSizes(      64,    None,     4,      3),  # block, keys, product
    "selected_dq":          TileSizes(      64,    None,     4,      3, hold=True),
    "selected_dkdv":        TileSizes(      16,    None,     4,      4, hold=True),  # one reader
    "selected_dkdv_small":  TileSizes(      16,    None,     4,      6, hold=True),  # a few
    "decode":               TileSizes(      64,      64,     4,      3),
}
WIDE = {  # half precision, up to 192 columns: three pieces of 64 (pieces.py)
    #                                  BLOCK_M  BLOCK_N  warps  stages
    "flash_forward":        TileSizes(     128,     128,     8,      2, hold=True),
    "flash_forward_window": TileSizes(      64,      64,     4,      2, hold=True),
    "flash_dq":             TileSizes(      64,      32,     4,      4, hold=True),
    "flash_dq_window":      TileSizes(      64,      32,     4,      3),
    "flash_dkdv":           TileSizes(      32,      64,     4,      3),
    "flash_dkdv_window":    TileSizes(      32,     128,     8,      4),
    "block_scores":         TileSizes(      64,     128,     4,      2),
    "selected_forward":     TileSizes(      64,    None,     4,      2),
    "selected_dq":          TileSizes(      64,    None,     4,      2, hold=True),
    "selected_dkdv":        TileSizes(      16,    None,     4,      4),
    "selected_dkdv_small":  TileSizes(      16,    None,     4,      4),
    "decode":               TileSizes(      64,      64,     4,      2),
}
WIDEST = {  # half precision, 256 columns; dk and dv spill
    #                                  BLOCK_M  BLOCK_N  warps  stages
    "flash_forward":        TileSizes(     128,      64,     8,      3),
    "flash_forward_window": TileSizes(      64,      32,     4,      3),
    "flash_dq":             TileSizes(      64,      32,     4,      2),
    "flash_dq_window":      TileSizes(      64,      32,     4,      2),
    "flash_dkdv":           TileSizes(      64,     128,     8,      2),
    "flash_dkdv_window":    TileSizes(      64,     128,     8,      2),
    "block_scores":         TileSizes(      64,     128,     8,      1),
    "selected_forward":     TileSizes(      64,    None,     4,      3),
    "selected_dq":          TileSizes(      64,    None,     4,      3),
    "selected_dkdv":        TileSizes(      16,    None,     4,      8),  # of one token's rows
    "selected_dkdv_small":  TileSizes(      16,    None,     4,      8),
    "decode":               TileSizes(      64,      64,     4,      2),
}
FLOAT32 = {  # no fast matrix unit for exact float32, and twice the bytes
    #                                  BLOCK_M  BLOCK_N  warps  stages
    "flash_forward":        TileSizes(      64,      32,     4,      1),
    "flash_forward_window": TileSizes(      64,      32,     4,      1),
    "flash_dq":             TileSizes(      32,      32,     4,      1),
    "flash_dq_window":      TileSizes(      32,      32,     4,      1),
    "flash_dkdv":           TileSizes(      32,      32,     4,      1),
    "flash_dkdv_window":    TileSizes(      32,      32,     4,      1),
    "block_scores":         TileSizes(      32,     128,     4,      1),
    "selected_forward":     TileSizes(      64,    None,     8,      1),
    "selected_dq":          TileSizes(      64,    None,     8,      1),
    "selected_dkdv":        TileSizes(      16,    None,     8,      2),
    "selected_dkdv_small":  TileSizes(      16,    None,     8,      2),
    "decode":               TileSizes(      64,      64,     4,      1),
}
# fmt: on


def tile_sizes(kernel: str, width: int, dtype: torch.dtype) -> TileSizes:
    """The tile of a kernel, for rows whose widest is `width`, in this type."""
    if dtype == torch.float32:
        return FLOAT32[kernel]
    if width <= 128:
        return HALF[kernel]
    return (WIDE if columns(width) <= 192 else WIDEST)[kernel]


def row_name(kernel: str, window: int | None) -> str:
    """The line of a kernel that walks along a run of keys: a window has lines of its own."""
    return kernel if window is None else f"{kernel}_window"


def shared_memory(device: torch.device) -> int:
    """Bytes of fast memory that the tiles of one program may fill, on this device."""
    if device.type != "cuda":
        return SHARED
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin - BESIDE


def fit_stages(tile: TileSizes, kept: int, step: int, shared: int) -> TileSizes:
    """The tile with as many stages as fit: `step` bytes each, beside `kept` bytes.

    kept: what a program keeps in shared memory for all its walk; nothing with `hold`. step: what
    one step of the walk loads. Programs of 4 warps share a multiprocessor with another, so they may
    fill half of it.
    Errors: ValueError if one stage is too large for any.
    """
    kept = 0 if tile.hold else kept
    if kept + step > shared:
        raise ValueError(
            f"select_block_size, or the width of k and v: tiles of {kept + step} B do "
            f"not fit into {shared} B; take smaller blocks or half precision"
        )
    room = shared // 2 if tile.warps == 4 else shared
    return replace(tile, stages=max(1, min(tile.stages, (room - kept) // step)))


def padded(width: int) -> int:
    """The power of two, 16 at least, that a tile needs to hold `width` columns."""
    return max(16, power_of_two(width))


def piece_width(width: int) -> int:
    """The columns of one piece of `width`: all, padded, unless a quarter or more would be empty.

    Then a quarter of them: three pieces hold 192 columns. No piece has fewer than 32.
    """
    whole = padded(width)
    return whole // 4 if whole >= 128 and width <= whole * 3 // 4 else whole


def columns(width: int) -> int:
    """The columns that all pieces of `width` have together."""
    return cdiv(width, piece_width(width)) * piece_width(width)


def widest(D: int, DV: int) -> int:
    """The width whose tiles fit rows of D and DV: the tables leave room for a DV of 128."""
    return max(D, DV, columns(D) + columns(DV) - 128)


# Triton has both, made for kernels too: on the host a call takes them 5 microseconds.


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def cdiv(size: int, part: int) -> int:
    """How many parts it takes to hold `size`."""
    return -(-size // part)


def widths_of(q: Tensor, k: Tensor, v: Tensor) -> Widths:
    """The compile-time sizes of q (B, H, T, D), k (B, G, S, D) and v (B, G, S, Dv)."""
    R = q.shape[1] // k.shape[1]
    D = q.shape[3]
    DV = v.shape[3]
    return Widths(R, D, DV, piece_width(D), piece_width(DV))


def needs(kernel: str, tile: TileSizes, R: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many (rows of D, rows of Dv) a kernel keeps for all its walk, and loads in a step."""
    M = tile.BLOCK_M if kernel == "block_scores" else max(tile.BLOCK_M, power_of_two(R))
    N = tile.BLOCK_N
    a_reader_or_two = M * (PRODUCTS_OF_HELD.value if tile.hold else 1)
    return {
        "flash_forward": ((M, 0), (N, N)),
        "flash_dq": ((M, M), (N, N)),
        "flash_dkdv": ((N, N), (M, M)),
        "block_scores": ((N, 0), (M, 0)),
        "selected_forward": ((M, 0), (N, N)),
        "selected_dq": ((M, M), (N, N)),
        "selected_dkdv": ((N, N), (a_reader_or_two, a_reader_or_two)),
        "selected_dkdv_small": ((N, N), (a_reader_or_two, a_reader_or_two)),
        "decode": ((M, 0), (N, N)),
    }[kernel]


def smaller(tile: TileSizes) -> TileSizes | None:
    """The tile with half as many keys or rows, whichever are more; None below 32 of both."""
    larger = "BLOCK_N" if tile.BLOCK_N >= tile.BLOCK_M else "BLOCK_M"
    size = getattr(tile, larger) // 2
    return replace(tile, **{larger: size}) if size >= SMALLEST else None


def fit(tile: TileSizes, kernel: str, widths: Widths, itemsize: int, shared: int) -> TileSizes:
    """The tile, or a smaller one, with as many stages as fit into `shared` bytes.

    The selected branch's tiles are as large as its blocks: they fit or they do not.
    Errors: ValueError if none fits.
    """
    kept, step = (
        (of_d * columns(widths.D) + of_dv * columns(widths.DV)) * itemsize
        for of_d, of_dv in needs(kernel, tile, widths.R)
    )
    another = None if kernel.startswith("selected") else smaller(tile)
    if another is not None and (0 if tile.hold else kept) + step > shared:
        return fit(another, kernel, widths, itemsize, shared)
    return fit_stages(tile, kept, step, shared)


def tile_for(
    kernel: str,
    widths: Widths,
    q: Tensor,
    *,
    window: int | None = None,
    block: int | None = None,
) -> TileSizes:
    """The tile of a kernel for rows of these widths, of q's type and on q's device.

    With a window the kernel has a line of its own; `block` is l', whose keys are one tile.
    Errors: ValueError if it does not fit there.
    """
    tile = tile_sizes(row_name(kernel, window), widest(widths.D, widths.DV), q.dtype)
    if block is not None:
        tile = replace(tile, BLOCK_N=padded(block))
    return fit(tile, kernel, widths, q.dtype.itemsize, shared_memory(q.device))


def blocks_in_a_tile(BLOCK_N: int, select_block_size: int, stride: int) -> int:
    """How many selection blocks a tile of BLOCK_N keys holds, each padded to a power of two.

    Errors: ValueError if it cannot hold one.
    """
    if select_block_size // stride > BLOCK_N:
        raise ValueError(
            f"select_block_size = {select_block_size}: with stride = {stride} a block "
            f"has more than {BLOCK_N} keys; take a longer stride or smaller blocks"
        )
    return BLOCK_N // power_of_two(select_block_size // stride)
