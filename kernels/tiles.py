"""The tile sizes of each kernel, and why."""

import torch
import triton

# M rows or tokens, N keys. The H100's fast matrix unit takes 64 rows with 4 warps, 128 with 8.
# Larger tiles load less, until the registers spill: `python -m benchmarks.compiled` counts that.
HALF = {  # half precision, keys and values up to 128 wide
    "forward": dict(M=128, N=128, num_warps=8, num_stages=3),
    "window": dict(M=128, N=32, num_warps=4, num_stages=3),  # few keys: smaller edges
    "dq": dict(M=64, N=64, num_warps=4, num_stages=2),
    "dkdv": dict(M=64, N=128, num_warps=8, num_stages=3),  # N = 64 loads the rows twice as often
    "scores": dict(M=64, N=128, num_warps=4, num_stages=2),
    "selected": dict(num_warps=4, num_stages=3),
    "selected_dq": dict(num_warps=4, num_stages=2),
    "selected_dkdv": dict(num_warps=4, num_stages=8),  # a stage is one token's rows: small
}
WIDE = {  # half precision, wider than 128: 256 columns in memory and registers
    "forward": dict(M=128, N=64, num_warps=8, num_stages=2),
    "window": dict(M=128, N=64, num_warps=8, num_stages=2),
    "dq": dict(M=128, N=32, num_warps=8, num_stages=1),
    "dkdv": dict(M=32, N=64, num_warps=8, num_stages=1),
    "scores": dict(M=64, N=128, num_warps=8, num_stages=1),
    "selected": dict(num_warps=4, num_stages=1),
    "selected_dq": dict(num_warps=4, num_stages=1),
    "selected_dkdv": dict(num_warps=8, num_stages=2),
}
FLOAT32 = {  # no fast matrix unit for exact float32, and twice the bytes
    "forward": dict(M=64, N=32, num_warps=4, num_stages=1),
    "window": dict(M=64, N=32, num_warps=4, num_stages=1),
    "dq": dict(M=32, N=32, num_warps=4, num_stages=1),
    "dkdv": dict(M=32, N=32, num_warps=4, num_stages=1),
    "scores": dict(M=32, N=128, num_warps=4, num_stages=1),
    "selected": dict(num_warps=8, num_stages=1),
    "selected_dq": dict(num_warps=8, num_stages=1),
    "selected_dkdv": dict(num_warps=8, num_stages=2),
}


def tiles(kernel: str, width: int, dtype: torch.dtype) -> dict[str, int]:
    """The tile sizes of `kernel` for keys of this width and type."""
    if dtype == torch.float32:
        return dict(FLOAT32[kernel])
    return dict((WIDE if width > 128 else HALF)[kernel])


def padded(width: int) -> int:
    """The power of two, 16 at least, that a tile needs to hold `width` columns."""
    return max(16, triton.next_power_of_2(width))
