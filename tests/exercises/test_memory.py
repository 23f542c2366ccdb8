"""The measure of memory sees a square of scores, and does not count a view twice."""

import torch

from exercises.memory import largest_made, stored, tensors


def test_the_largest_tensor_is_found_though_the_result_is_small():
    q = torch.randn(20, 3)
    result, largest = largest_made(lambda: (q @ q.T).softmax(-1) @ q)
    assert result.shape == (20, 3) and largest == 20 * 20


def test_a_mask_counts_like_any_other_tensor():
    t = torch.arange(30)
    assert largest_made(lambda: (t[:, None] < t).any())[1] == 30 * 30


def test_a_view_holds_nothing_of_its_own():
    row = torch.randn(1, 5)
    assert largest_made(lambda: row.expand(1000, 5))[1] == 5
    assert largest_made(lambda: torch.zeros(12).unfold(0, 4, 1) + 0)[1] == 9 * 4
    assert stored(torch.zeros(7, 3)[:, :1]) == 7 * 3


def test_tensors_are_found_in_any_nesting():
    one = torch.zeros(2)
    other = torch.zeros(3)
    assert tensors({"a": [one, (other, 5)], "b": "text"}) == [one, other]
