"""The union and the readers against Python sets and lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.union_and_readers import NEIGHBOURS, readers, union

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


def listed(found):
    """The entries of each tile, one list a tile, in order."""
    lists = zip(found.entries.flatten(0, 2).tolist(), found.counts.flatten().tolist(), strict=True)
    return [entries[:count] for entries, count in lists]


def expected_lists(ids, neighbours, blocks):
    """The same from sets: blocks as they first appear, each with the tokens that chose it."""
    lists = []
    for table in ids.flatten(0, 1).tolist():
        for first in range(0, len(table), neighbours):
            tokens = table[first : first + neighbours]
            seen = dict.fromkeys(block for row in tokens for block in row if 0 <= block < blocks)
            who = {j: sum(2**u for u, row in enumerate(tokens) if j in row) for j in seen}
            lists.append([j * 2**neighbours + bits for j, bits in who.items()])
    return lists


@SOME
@given(tables(), st.sampled_from([1, 2, 3, 4, 8, 16, 32]))
def test_union(ids, neighbours):
    assert listed(union(ids, neighbours, BLOCKS)) == expected_lists(ids, neighbours, BLOCKS)


def test_the_union_by_hand():
    ids = torch.tensor([[0, 3, 7], [0, 3, 8], [0, 4, 8], [0, 4, 8]], device=DEVICE)
    got = listed(union(ids[None, None].int(), 4, blocks=9))
    assert got == [
        [0b0000_1111, 3 * 16 + 0b0011, 7 * 16 + 0b0001, 8 * 16 + 0b1110, 4 * 16 + 0b1100]
    ]


@pytest.mark.parametrize(("neighbours", "n"), [(4, 64), (16, 16), (16, 64), (32, 16)])
def test_the_union_of_many_and_of_long_choices(neighbours, n):
    make = torch.Generator().manual_seed(0)
    ids = torch.rand(1, 1, neighbours + 3, 100, generator=make).argsort(-1)[..., :n] - 1
    ids = ids.to(DEVICE)  # int64 here
    assert listed(union(ids, neighbours, 98)) == expected_lists(ids, neighbours, 98)


def test_a_bit_counts_once_where_a_token_names_a_block_twice():
    ids = torch.tensor([[5, 2, 5], [5, 5, 5], [-1, 2, 2]], dtype=torch.int32, device=DEVICE)
    assert listed(union(ids[None, None], 4, blocks=6)) == [[5 * 16 + 0b0011, 2 * 16 + 0b0101]]


def test_an_entry_holds_all_bits_beside_the_last_block_of_a_long_sequence():
    last = 2**30  # 2^32 tokens in blocks of 4
    ids = torch.full((1, 1, NEIGHBOURS, 1), last, dtype=torch.int32, device=DEVICE)
    assert listed(union(ids, NEIGHBOURS, last + 1)) == [[last * 2**NEIGHBOURS + 2**NEIGHBOURS - 1]]
    beyond = torch.full((1, 1, 1, 1), 2**32 + 3, device=DEVICE)  # in 32 bits it would be block 3
    assert listed(union(beyond, 1, 9)) == [[]]


@SOME
@given(tables(), st.integers(1, 5))
def test_readers(ids, chunk):
    who = readers(ids, BLOCKS, chunk)
    seen = []
    for pair, table in enumerate(ids.flatten(0, 1).tolist()):
        for block in range(BLOCKS):
            row = pair * BLOCKS + block
            expected = [t for t in range(len(table)) if block in table[t]]
            assert who.indices[who.indptr[row] : who.indptr[row + 1]].tolist() == expected
            count = int(who.chunk_indptr[row + 1] - who.chunk_indptr[row])
            assert count == -(-len(expected) // chunk)
            seen += [row] * count
    assert who.chunk_list[: len(seen)].tolist() == seen
    assert who.lists == len(who.indptr) - 1
    assert all(x == who.lists for x in who.chunk_list[len(seen) :].tolist())
