"""Notebook 12's Your turn cells: stubs that run through, and folded solutions that are right."""

import re
from collections.abc import Callable
from math import log
from pathlib import Path

import nbformat
import pytest
import torch

from nsa_lite.blocks import num_compressed

PATH = Path(__file__).parents[1] / "notebooks/12_decoding.ipynb"
CELLS = nbformat.read(PATH, as_version=4).cells


def folded() -> dict[str, str]:
    """The exercise's number -> the python text in the fold that follows its cell."""
    found = {}
    for cell, after in zip(CELLS, CELLS[1:], strict=False):
        number = re.match(r"# Your turn \(exercise (\d\d\.\d)\)", cell.source)
        if number:
            found[number[1]] = re.search(r"```python\n(.+?)```", after.source, re.S)[1]
    return found


def solution(number: str, name: str) -> Callable:
    names: dict = {"torch": torch}
    exec(folded()[number], names)
    return names[name]


def test_each_your_turn_cell_runs_unfilled_and_has_a_solution():
    cells = [cell for cell in CELLS if cell.source.startswith("# Your turn")]
    printed = ["".join(o.get("text", "") for o in cell.outputs).strip() for cell in cells]
    assert printed == [f"○ {number} not attempted" for number in folded()]
    assert sorted(folded()) == ["09.1", "09.2", "09.3"]


@pytest.mark.parametrize(("block_size", "stride"), [(4, 2), (32, 16), (5, 3), (7, 2), (3, 3)])
def test_the_visible_blocks_are_those_that_have_ended(block_size, stride):
    visible_blocks = solution("09.1", "visible_blocks")
    for length in range(4 * block_size):
        ended = [i for i in range(length) if i * stride + block_size <= length]
        assert visible_blocks(length, block_size, stride) == len(ended)
        assert num_compressed(length, block_size, stride) == len(ended)


def test_each_sequence_grows_behind_its_own_length():
    grow = solution("09.2", "grow")
    buffer = torch.full((3, 2, 9, 5), -1.0)
    lengths = torch.tensor([0, 4, 6])
    new = torch.randn(3, 2, 3, 5)
    expected = buffer.clone()
    for b, length in enumerate((0, 4, 6)):
        expected[b, :, length : length + 3] = new[b]
    assert grow(buffer, new, lengths).tolist() == [3, 7, 9]
    assert torch.equal(buffer, expected)
    assert lengths.tolist() == [0, 4, 6]


def test_shares_combine_to_one_softmax_even_empty_ones_and_rows_that_see_nothing():
    combine = solution("09.3", "combine")
    s = torch.randn(4, 10, dtype=torch.float64) * 400
    s[3] = -torch.inf  # a row that no share sees
    v = torch.randn(10, 3, dtype=torch.float64)
    expected = torch.softmax(s * log(2), 1) @ v  # 2**s = e**(s ln 2)
    outs, maxima, sums = [], [], []
    for keys in (range(4), range(4, 9), range(9, 10), ()):
        at = list(keys)
        m = s[:, at].amax(1) if at else torch.full((4,), -torch.inf, dtype=torch.float64)
        p = torch.exp2(s[:, at] - torch.where(m == -torch.inf, 0, m)[:, None])
        seen = p.sum(1) > 0
        outs.append(torch.where(seen[:, None], p @ v[at], torch.nan))
        maxima.append(m)
        sums.append(p.sum(1))
    out = combine(*(torch.stack(x) for x in (outs, maxima, sums)))
    torch.testing.assert_close(out[:3], expected[:3])
    assert (out[3] == 0).all()
