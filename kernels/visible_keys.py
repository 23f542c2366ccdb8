"""Which keys a query sees, and which queries see a key, in a run of keys that end in order.

Key j ends at token j * stride + block_size - 1 and may be read from there on: raw keys have
block_size = stride = 1, compressed keys l and d. With a window only the last `window` tokens count.

           keys ->    0  ..  low           full_low        full_high     high
    some queries    |  unread  |  edge: masked  |  all see all  |  edge: masked  |  unread  |

A walk goes over the three parts that are read, and only the edges need a mask.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Keys(NamedTuple):
    """Compile-time: when a key may be read. window None: no limit."""

    block_size: int
    stride: int
    window: int | None


def count_keys(t: int, S: int, keys: Keys) -> int:
    """How many of S keys end at or before token t."""
    return min(max(t + 1 - keys.block_size + keys.stride, 0) // keys.stride, S)


@triton.jit
def keys_seen(t, S, KEYS: tl.constexpr):
    """How many of the S keys end at or before token t."""
    return tl.minimum(tl.maximum(t + 1 - KEYS.block_size + KEYS.stride, 0) // KEYS.stride, S)


@triton.jit
def may_read(key, t, S, KEYS: tl.constexpr):
    """The mask of an edge tile; key and t are broadcast against each other."""
    end = key * KEYS.stride + KEYS.block_size - 1
    mask = (end <= t) & (key < S)
    if KEYS.window is not None:
        mask = mask & (end > t - KEYS.window)
    return mask


@triton.jit
def key_range(first, last, S, KEYS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys that queries first .. last read: low, full_low, full_high, high (the picture)."""
    low = 0
    full_low = 0
    if KEYS.window is not None:
        low = tl.maximum(first - KEYS.window + 1, 0) // BLOCK_N * BLOCK_N
        full_low = (tl.maximum(last - KEYS.window + 1, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    full_high = tl.maximum(keys_seen(first, S, KEYS) // BLOCK_N * BLOCK_N, full_low)
    return low, full_low, full_high, keys_seen(last, S, KEYS)


@triton.jit
def token_range(
    first_key, T, start, KEYS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr
):
    """The tokens that read keys first_key .. + BLOCK_N - 1: low, full_low, full_high, high."""
    first_end = first_key * KEYS.stride + KEYS.block_size - 1
    last_end = first_end + (BLOCK_N - 1) * KEYS.stride
    low = tl.minimum(tl.maximum(first_end - start, 0), T)
    full_low = tl.minimum(tl.maximum(last_end - start, 0), T)
    full_high = T
    high = T
    if KEYS.window is not None:
        full_high = tl.minimum(tl.maximum(first_end + KEYS.window - start, 0), T)
        high = tl.minimum(tl.maximum(last_end + KEYS.window - start, 0), T)
    low = low // BLOCK_T * BLOCK_T
    full_low = (full_low + BLOCK_T - 1) // BLOCK_T * BLOCK_T
    return low, full_low, tl.maximum(full_high // BLOCK_T * BLOCK_T, full_low), high
