"""Arrays as few bytes, and where each begins among them."""

import zlib

import numpy as np

from nsa_lite.show.explorer.arrays import (
    DETAILS,
    Arrays,
    Detail,
    arrays_of,
    facts_of,
    unpacked_bytes,
)
from nsa_lite.show.explorer.sequence import TracedSequence

MOST_UNPACKED = 100_000_000  # bytes: what a browser opens in a second or two


def packed_within(sequence: TracedSequence, limit: int) -> tuple[dict, bytes]:
    """Facts and packed arrays with as much detail as `limit` bytes allow.

    At least what is selected and its scores, however much that is. facts["about"] says what was
    left out.
    """
    *details, least = dict.fromkeys(detail.of(sequence) for detail in DETAILS)
    for detail in details:
        if unpacked_bytes(sequence, detail) > MOST_UNPACKED:
            continue
        facts, data = _packed_with(sequence, detail)
        if len(data) <= limit:
            return facts, data
    return _packed_with(sequence, least)


def page_limit(length: int) -> int:
    """How many bytes a page of so many tokens may have: 2 MB up to 4,096, 8 MB from 16,384 on."""
    return min(max(2_000_000, 2_000_000 * length // 4096), 8_000_000)


def _packed_with(sequence: TracedSequence, detail: Detail) -> tuple[dict, bytes]:
    arrays = arrays_of(sequence, detail)
    facts = facts_of(sequence, detail) | {"arrays": places_of(arrays)}
    return facts, packed(arrays)


def places_of(arrays: Arrays) -> dict[str, dict]:
    """Of each array its type, its shape and the byte at which it begins once unpacked."""
    places = {}
    begins = 0
    for name, array in arrays.items():
        places[name] = {"type": array.dtype.name, "shape": array.shape, "begins": begins}
        begins += _padded(array.nbytes)
    return places


def packed(arrays: Arrays) -> bytes:
    """The arrays one after the other, each begun at a multiple of 8 bytes, compressed (zlib).

    Of a uint16 array first all low bytes, then all high ones: like beside like packs better.
    """
    joined = b"".join(_bytes(a).ljust(_padded(a.nbytes), b"\0") for a in arrays.values())
    return zlib.compress(joined, 6)


def _bytes(array: np.ndarray) -> bytes:
    if array.dtype != np.uint16:
        return array.tobytes()
    return array.reshape(-1, 1).view(np.uint8).T.tobytes()


def _padded(count: int) -> int:
    return -(-count // 8) * 8
