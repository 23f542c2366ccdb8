"""The measure of memory sees a square of scores, and does not count a view twice."""

import numpy as np
import torch

from exercises.memory import largest_made, most_held, numbers_in, stored, tensors


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


def test_vmap_is_seen_from_below():
    x = torch.randn(10, 3)
    square = torch.vmap(lambda row: x @ row)
    assert largest_made(lambda: square(x))[1] == 10 * 10


def test_many_small_tensors_are_held_together_and_a_view_counts_once():
    rows = most_held(lambda: [torch.zeros(500) for _ in range(40)])[1]
    assert 40 * 500 <= rows < 40 * 520

    def one_by_one():
        return sum(torch.ones(500).sum() for _ in range(40))

    most_held(one_by_one)  # what torch's Python makes once, when first used, counts in no other run
    assert most_held(one_by_one)[1] < 4 * 500
    assert most_held(lambda: [torch.zeros(9000)[:n] for n in (1, 2)])[1] < 3 * 9000


def test_lists_and_arrays_count_as_tensors_do():
    assert most_held(lambda: np.zeros((300, 300)))[1] > 300 * 300 // 3
    assert most_held(lambda: [[float(i * j) for i in range(200)] for j in range(200)])[1] > 200**2


def test_numbers_are_found_in_whatever_holds_them():
    kept = torch.zeros(7)

    class Box:
        def __init__(self):
            self.inside = [np.zeros(3), {"more": (1.0, 2)}]

    def generator(rows):
        yield rows

    walk = generator([kept, torch.zeros(4)])
    next(walk)
    assert numbers_in({"t": 3, "box": Box()}) == 1 + 3 + 2
    assert numbers_in(lambda: kept) == 7
    assert numbers_in(walk) == 11
    assert numbers_in({"k": kept[2:], "name": "text", "type": Box}) == 5
