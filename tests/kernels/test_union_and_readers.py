"""The union and the readers against Python sets and lists."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.union_and_readers import readers, union

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SOME = settings(max_examples=15, deadline=None, derandomize=True)


@st.composite
def tables(draw):
    """ids (B, G, T, n) with distinct ids, -1 and ids beyond the last block among them."""
    shape = [
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 20)),
        draw(st.integers(1, 6)),
    ]
    make = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    table = torch.rand(*shape[:3], 9, generator=make).argsort(-1)[..., : shape[3]] - 1
    return table.int().to(DEVICE)


BLOCKS = 6  # ids 6 and 7 lie outside


@SOME
@given(tables(), st.integers(1, 4))
def test_union(ids, neighbours):
    entries, counts = union(ids, neighbours, BLOCKS)
    for pair, (table, lists, sizes) in enumerate(
        zip(
            ids.flatten(0, 1).tolist(),
            entries.flatten(0, 1).tolist(),
            counts.flatten(0, 1).tolist(),
            strict=True,
        )
    ):
        for tile, (entry, size) in enumerate(zip(lists, sizes, strict=True)):
            expected = {}
            for u, row in enumerate(table[tile * neighbours : (tile + 1) * neighbours]):
                for block in row:
                    if 0 <= block < BLOCKS:
                        expected[block] = expected.get(block, 0) + 2**u
            got = [(x // 16, x % 16) for x in entry[:size]]
            assert len(got) == len(expected) and dict(got) == expected, (pair, tile)


@SOME
@given(tables(), st.integers(1, 5))
def test_readers(ids, chunk):
    who = readers(ids, BLOCKS, chunk)
    seen = []
    for pair, table in enumerate(ids.flatten(0, 1).tolist()):
        for block in range(BLOCKS):
            row = pair * BLOCKS + block
            expected = [t for t in reversed(range(len(table))) if block in table[t]]
            assert who.indices[who.indptr[row] : who.indptr[row + 1]].tolist() == expected
            count = int(who.chunk_indptr[row + 1] - who.chunk_indptr[row])
            assert count == -(-len(expected) // chunk)
            seen += [row] * count
    assert who.chunk_list[: len(seen)].tolist() == seen
    assert who.lists == len(who.indptr) - 1
    assert all(x == who.lists for x in who.chunk_list[len(seen) :].tolist())
