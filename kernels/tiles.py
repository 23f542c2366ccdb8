"""The tile sizes of each kernel, and why."""

import torch
import triton

# M rows or tokens, N keys. The product of a 64-row tile is the smallest that runs on the H100's
# fast matrix unit with 4 warps; more rows or stages only pay while registers and memory last.
WIDE = {  # half precision, keys up to 128 wide
    "forward": dict(M=128, N=64, num_warps=8, num_stages=2),  # 4 warps spill registers
    "dq": dict(M=64, N=64, num_warps=4, num_stages=2),
    "dkdv": dict(M=64, N=128, num_warps=8, num_stages=2),  # 64 keys load the rows twice as often
    "scores": dict(M=64, N=128, num_warps=4, num_stages=2),
    "selected": dict(num_warps=4, num_stages=2),
    "selected_dq": dict(num_warps=4, num_stages=2),
    "selected_dkdv": dict(M=64, num_warps=4, num_stages=2),
}
# float32, or keys wider than 128: twice the bytes, so half the rows and no second stage.
NARROW = {
    "forward": dict(M=64, N=32, num_warps=4, num_stages=1),
    "dq": dict(M=32, N=32, num_warps=4, num_stages=1),
    "dkdv": dict(M=32, N=32, num_warps=4, num_stages=1),
    "scores": dict(M=32, N=128, num_warps=4, num_stages=1),
    "selected": dict(num_warps=4, num_stages=1),
    "selected_dq": dict(num_warps=4, num_stages=1),
    "selected_dkdv": dict(M=64, num_warps=8, num_stages=1),
}


def tiles(kernel: str, width: int, dtype: torch.dtype) -> dict[str, int]:
    """The tile sizes of `kernel` for keys of this width and type."""
    narrow = dtype == torch.float32 or width > 128
    return (NARROW if narrow else WIDE)[kernel]


def padded(width: int) -> int:
    """The power of two, 16 at least, that a tile needs to hold `width` columns."""
    return max(16, triton.next_power_of_2(width))
