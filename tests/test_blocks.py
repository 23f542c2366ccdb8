"""Where blocks lie, against sets of tokens written out one by one, and Eq. 9 against the overlap.

Expected values: the definitions of SPEC.md as Python sets, or counted by hand.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_lite.blocks import (
    forced_blocks,
    num_compressed,
    num_select_blocks,
    overlap_in_strides,
    visible_compressed,
    visible_select_blocks,
)

MANY = settings(max_examples=60, deadline=None, derandomize=True)
LENGTHS = st.integers(1, 60)


@st.composite
def geometries(draw):
    """(l, d, l') with d dividing l and l', and l <= l'."""
    stride = draw(st.integers(1, 4))
    block = draw(st.integers(1, 4))
    select = draw(st.integers(block, 6))
    return block * stride, stride, select * stride


def tokens_of(block, step, size):
    """The positions that a block covers."""
    return set(range(block * step, block * step + size))


@MANY
@given(LENGTHS, geometries())
def test_a_compressed_block_counts_when_the_sequence_holds_all_its_tokens(length, geometry):
    size, stride, _ = geometry
    whole = [i for i in range(length) if tokens_of(i, stride, size) <= set(range(length))]
    assert num_compressed(length, size, stride) == len(whole)


@MANY
@given(LENGTHS, st.integers(1, 9))
def test_a_selection_block_counts_when_the_sequence_touches_it(length, size):
    assert num_select_blocks(length, size) == len({t // size for t in range(length)})


@MANY
@given(LENGTHS, geometries())
def test_a_query_sees_a_compressed_block_once_it_has_passed_all_of_it(length, geometry):
    size, stride, _ = geometry
    count = num_compressed(length, size, stride)
    visible = visible_compressed(torch.arange(length), count, size, stride)
    expected = [
        [tokens_of(i, stride, size) <= set(range(t + 1)) for i in range(count)]
        for t in range(length)
    ]
    assert visible.tolist() == expected


@MANY
@given(LENGTHS, st.integers(1, 9))
def test_a_query_sees_a_selection_block_once_it_has_begun(length, size):
    count = num_select_blocks(length, size)
    visible = visible_select_blocks(torch.arange(length), count, size)
    expected = [
        [bool(tokens_of(j, size, size) & set(range(t + 1))) for j in range(count)]
        for t in range(length)
    ]
    assert visible.tolist() == expected


@MANY
@given(LENGTHS, st.integers(1, 9), st.integers(0, 4), st.integers(0, 4))
def test_forced_blocks_are_the_first_ones_and_the_last_ones(length, size, initial, local):
    count = num_select_blocks(length, size)
    forced = forced_blocks(torch.arange(length), count, size, initial, local)
    for t in range(length):
        begun = list(range(t // size + 1))
        expected = set(begun[:initial]) | set(begun[len(begun) - min(local, len(begun)) :])
        assert set(forced[t].nonzero().flatten().tolist()) == expected


def test_forced_blocks_by_hand():
    # l' = 4: queries 0, 3 | 4 | 11, 12 own blocks 0 | 1 | 2, 3; one initial, two local.
    forced = forced_blocks(torch.tensor([0, 3, 4, 11, 12]), 4, 4, 1, 2)
    sets = [set(row.nonzero().flatten().tolist()) for row in forced]
    assert sets == [{0}, {0}, {0, 1}, {0, 1, 2}, {0, 2, 3}]


@MANY
@given(LENGTHS, geometries())
def test_the_overlap_matrix_counts_the_shared_tokens(length, geometry):
    size, stride, select = geometry
    rows, columns = num_compressed(length, size, stride), num_select_blocks(length, select)
    expected = [
        [
            len(tokens_of(i, stride, size) & tokens_of(j, select, select)) / stride
            for j in range(columns)
        ]
        for i in range(rows)
    ]
    overlap = overlap_in_strides(rows, columns, size, stride, select)
    assert overlap.shape == (rows, columns)
    assert overlap.tolist() == expected


def test_paper_sizes_give_the_weights_1_2_2_2_1():
    overlap = overlap_in_strides(40, 10, 32, 16, 64)
    for j in range(1, 9):  # p[4j-1] + 2 p[4j] + 2 p[4j+1] + 2 p[4j+2] + p[4j+3]
        expected = torch.zeros(40)
        expected[4 * j - 1 : 4 * j + 4] = torch.tensor([1.0, 2, 2, 2, 1])
        assert torch.equal(overlap[:, j], expected)
    assert overlap[:5, 0].tolist() == [2, 2, 2, 1, 0]  # block 0 has no neighbour before it


def equation_9(rows, columns, geometry, index):
    """The double sum of Eq. 9 as weights; index(l'/d, j, m, n) is the 0-based compressed block."""
    size, stride, select = geometry
    weights = torch.zeros(rows, columns)
    for j in range(columns):
        for m in range(select // stride):
            for n in range(size // stride):
                i = index(select // stride, j, m, n)
                if 0 <= i < rows:
                    weights[i, j] += 1
    return weights


def printed_one_based(a, j, m, n):
    return a * (j + 1) - m - n - 1  # j and the index both count from 1


def corrected_zero_based(a, j, m, n):
    return a * j + m - n


def printed_zero_based(a, j, m, n):
    return a * j - m - n


@MANY
@given(LENGTHS, geometries())
def test_equation_9_is_the_overlap_printed_from_1_or_corrected_from_0(length, geometry):
    size, stride, select = geometry
    rows, columns = num_compressed(length, size, stride), num_select_blocks(length, select)
    overlap = overlap_in_strides(rows, columns, *geometry)
    assert torch.equal(equation_9(rows, columns, geometry, printed_one_based), overlap)
    assert torch.equal(equation_9(rows, columns, geometry, corrected_zero_based), overlap)


def test_equation_9_printed_but_read_from_0_lands_a_block_early():
    paper, overlap = (32, 16, 64), overlap_in_strides(40, 10, 32, 16, 64)
    wrong = equation_9(40, 10, paper, printed_zero_based)
    assert not torch.equal(wrong, overlap)
    # Block 5 holds tokens 320..383, but the centre of these weights lies at 4 * 5 - 2 = block 18,
    # tokens 288..319: inside selection block 4.
    assert wrong[:, 5].nonzero().flatten().tolist() == [16, 17, 18, 19, 20]
    assert overlap[:, 5].nonzero().flatten().tolist() == [19, 20, 21, 22, 23]
