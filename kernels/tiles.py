"""The tile sizes of each kernel, and why."""

import torch
import triton

# M rows or tokens, N keys. The H100's fast matrix unit takes 64 rows with 4 warps, 128 with 8.
# Larger tiles load less, until the registers spill: `python -m benchmarks.compiled` counts that.
# HOLD: what a program owns waits in registers, not in shared memory. The matrix unit then reads
# half as much from there, and `fitting` has room for more num_stages, tiles on their way at once.
# Each line of HALF and WIDE is the fastest of those that `python -m benchmarks.tune` times, at 64k
# tokens; FLOAT32 was only made to fit.
HALF = {  # half precision, keys and values up to 128 wide
    "forward": dict(M=128, N=128, num_warps=8, num_stages=3, HOLD=False),
    "window_forward": dict(M=64, N=32, num_warps=4, num_stages=3, HOLD=True),  # edges waste less
    "dq": dict(M=64, N=64, num_warps=4, num_stages=3, HOLD=True),
    "window_dq": dict(M=64, N=64, num_warps=4, num_stages=3, HOLD=True),
    "dkdv": dict(M=64, N=64, num_warps=4, num_stages=2, HOLD=False),  # two programs overlap
    "window_dkdv": dict(M=64, N=128, num_warps=8, num_stages=3, HOLD=False),
    "scores": dict(M=64, N=128, num_warps=4, num_stages=2),
    "selected": dict(num_warps=4, num_stages=3),  # a block's number, its keys, their product
    "selected_dq": dict(num_warps=4, num_stages=3, HOLD=True),
    "selected_dkdv": dict(num_warps=4, num_stages=4, HOLD=True),
}
WIDE = {  # half precision, wider than 128: 256 columns in memory and registers
    "forward": dict(M=128, N=64, num_warps=8, num_stages=3, HOLD=False),
    "window_forward": dict(M=64, N=32, num_warps=4, num_stages=3, HOLD=False),
    "dq": dict(M=64, N=32, num_warps=4, num_stages=2, HOLD=False),
    "window_dq": dict(M=64, N=32, num_warps=4, num_stages=2, HOLD=False),
    "dkdv": dict(M=64, N=128, num_warps=8, num_stages=2, HOLD=False),
    "window_dkdv": dict(M=64, N=128, num_warps=8, num_stages=2, HOLD=False),
    "scores": dict(M=64, N=128, num_warps=8, num_stages=1),
    "selected": dict(num_warps=4, num_stages=3),
    "selected_dq": dict(num_warps=4, num_stages=3, HOLD=False),
    "selected_dkdv": dict(num_warps=4, num_stages=8, HOLD=False),  # a stage is one token's rows
}
FLOAT32 = {  # no fast matrix unit for exact float32, and twice the bytes
    "forward": dict(M=64, N=32, num_warps=4, num_stages=1, HOLD=False),
    "window_forward": dict(M=64, N=32, num_warps=4, num_stages=1, HOLD=False),
    "dq": dict(M=32, N=32, num_warps=4, num_stages=1, HOLD=False),
    "window_dq": dict(M=32, N=32, num_warps=4, num_stages=1, HOLD=False),
    "dkdv": dict(M=32, N=32, num_warps=4, num_stages=1, HOLD=False),
    "window_dkdv": dict(M=32, N=32, num_warps=4, num_stages=1, HOLD=False),
    "scores": dict(M=32, N=128, num_warps=4, num_stages=1),
    "selected": dict(num_warps=8, num_stages=1),
    "selected_dq": dict(num_warps=8, num_stages=1, HOLD=False),
    "selected_dkdv": dict(num_warps=8, num_stages=2, HOLD=False),
}
SHARED = 225 * 1024  # bytes of fast memory on a multiprocessor, less what Triton needs beside tiles


def tiles(kernel: str, width: int, dtype: torch.dtype) -> dict[str, int]:
    """The tile sizes of `kernel` for keys of this width and type."""
    if dtype == torch.float32:
        return dict(FLOAT32[kernel])
    return dict((WIDE if width > 128 else HALF)[kernel])


def row_name(kernel: str, window: int | None) -> str:
    """The row of a kernel that walks along a run of keys: a window has rows of its own."""
    return kernel if window is None else f"window_{kernel}"


def fitting(tile: dict[str, int], kept: int, each: int) -> dict[str, int]:
    """The tile with as many stages of `each` bytes as fit beside the `kept` bytes.

    Programs of 4 warps share a multiprocessor with another, so they may fill half of it.
    Errors: ValueError if one stage is too large for any.
    """
    if kept + each > SHARED:
        raise ValueError(f"select_block_size, or the width of k and v: tiles of {kept + each} B do "
                         f"not fit into {SHARED} B; take smaller blocks or half precision")
    room = SHARED // 2 if tile["num_warps"] == 4 else SHARED
    return tile | dict(num_stages=max(1, min(tile["num_stages"], (room - kept) // each)))


def padded(width: int) -> int:
    """The power of two, 16 at least, that a tile needs to hold `width` columns."""
    return max(16, triton.next_power_of_2(width))
