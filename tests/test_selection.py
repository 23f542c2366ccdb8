"""Which blocks are chosen: the rules of Eq. 8-12 that can be stated without a formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_lite import block_importance, choose_blocks, compressed_attention, select_blocks

MANY = settings(max_examples=60, deadline=None, derandomize=True)
UNIT = dict(block_size=1, stride=1, select_block_size=1)  # a token is a block of both kinds


@st.composite
def choices(draw):
    """A random score (1, 1, T, blocks) with ties, and the numbers of a choice."""
    size, length = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    initial, local = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    count = draw(st.integers(max(1, initial + local), 12))
    make = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    score = torch.randint(0, 4, (1, 1, length, -(-length // size)), generator=make).float()
    return score, dict(
        select_block_size=size, num_selected=count, num_initial=initial, num_local=local
    )


def rows(score, choice):
    """(t, chosen ids without padding, all ids) of each query."""
    ids = choose_blocks(score, **choice)
    assert ids.dtype == torch.int32
    assert ids.shape == (*score.shape[:3], choice["num_selected"])
    return [(t, [j for j in row if j != -1], row) for t, row in enumerate(ids[0, 0].tolist())]


@MANY
@given(choices())
def test_ids_are_legal_ascending_without_repeats_then_padding(case):
    score, choice = case
    for t, chosen, row in rows(score, choice):
        assert chosen == sorted(set(chosen))
        assert row == chosen + [-1] * (len(row) - len(chosen))
        assert all(0 <= j * choice["select_block_size"] <= t for j in chosen)


@MANY
@given(choices())
def test_n_blocks_are_chosen_or_all_that_have_begun(case):
    score, choice = case
    for t, chosen, _ in rows(score, choice):
        assert len(chosen) == min(choice["num_selected"], t // choice["select_block_size"] + 1)


@MANY
@given(choices())
def test_forced_blocks_are_always_chosen(case):
    score, choice = case
    for t, chosen, _ in rows(score, choice):
        own = t // choice["select_block_size"]
        first = range(min(choice["num_initial"], own + 1))
        last = range(max(0, own + 1 - choice["num_local"]), own + 1)
        assert set(first) | set(last) <= set(chosen)


@MANY
@given(choices())
def test_the_free_places_go_to_the_highest_scores_ties_to_the_lower_id(case):
    score, choice = case
    for t, chosen, _ in rows(score, choice):
        own = t // choice["select_block_size"]
        free = [
            j
            for j in range(own + 1)
            if j >= choice["num_initial"] and j <= own - choice["num_local"]
        ]
        ranked = sorted(free, key=lambda j: (-score[0, 0, t, j].item(), j))
        places = min(choice["num_selected"], own + 1) - (own + 1 - len(free))
        assert set(chosen) & set(free) == set(ranked[:places])


def test_block_0_counts_once_when_it_is_also_local():
    score = torch.tensor([5.0, 1, 2, 3]).expand(1, 1, 8, 4)  # l' = 2, n = 3, 1 initial, 2 local
    ids = choose_blocks(score, select_block_size=2, num_selected=3)
    by_hand = [[0, -1, -1]] * 2 + [[0, 1, -1]] * 2 + [[0, 1, 2]] * 2 + [[0, 2, 3]] * 2
    assert ids[0, 0].tolist() == by_hand


def test_equal_scores_choose_the_lowest_free_ids():
    ids = choose_blocks(torch.zeros(1, 1, 10, 10), select_block_size=1, num_selected=6)
    assert ids[0, 0, 9].tolist() == [0, 1, 2, 3, 8, 9]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_harms_no_forced_block_and_adds_no_illegal_one(bad):
    score = torch.rand(1, 1, 12, 12)
    score[..., ::2] = bad
    ids = choose_blocks(score, select_block_size=1, num_selected=5)
    for t, row in enumerate(ids[0, 0].tolist()):
        chosen = [j for j in row if j >= 0]
        assert len(set(chosen)) == len(chosen) == min(5, t + 1)
        assert max(chosen) <= t
        assert {0, max(0, t - 1), t} <= set(chosen)


def test_nan_never_beats_a_number():
    score = torch.tensor([0.0, 0.2, torch.nan, 0.1, torch.nan, 0.3]).expand(1, 1, 6, 6)
    ids = choose_blocks(score, select_block_size=1, num_selected=3, num_initial=0, num_local=0)
    assert ids[0, 0, 5].tolist() == [1, 3, 5]


def test_a_huge_n_chooses_every_block_that_has_begun():
    ids = choose_blocks(torch.rand(1, 1, 9, 3), select_block_size=4, num_selected=10_000)
    assert ids.shape[-1] == 10_000
    assert ids[0, 0, 8, :4].tolist() == [0, 1, 2, -1]
    assert (ids[0, 0, 8, 3:] == -1).all()


def test_one_token_chooses_its_own_block():
    q, k = torch.randn(1, 2, 1, 4), torch.randn(1, 1, 0, 4)  # no whole compressed block yet
    lse = torch.full((1, 2, 1), -torch.inf)
    ids = select_blocks(q, k, lse, block_size=4, stride=2, select_block_size=4, num_selected=3)
    assert ids.tolist() == [[[[0, -1, -1]]]]


def summed_probabilities_case():
    """Two blocks, three heads with logits (20, 0), (-3, 0), (-3, 0) at query 1.

    Probabilities sum to 1.09 and 1.91: block 1. Logits sum to 14 and 0, and head 0 alone has
    1 and 0: block 0.
    """
    q = torch.tensor([20.0, -3.0, -3.0])[None, :, None, None].expand(1, 3, 2, 1)
    k = torch.tensor([1.0, 0.0])[None, None, :, None]
    lse = compressed_attention(q, k, k, block_size=1, stride=1, scale=1.0)[1]
    return q, k, lse


def test_probabilities_are_summed_over_heads_not_logits():
    q, k, lse = summed_probabilities_case()
    importance = block_importance(q, k, lse, **UNIT, scale=1.0)[0, 0, 1]
    low = 1 / (1 + torch.tensor(3.0).exp())  # the probability of logit -3 beside 0
    torch.testing.assert_close(importance, torch.stack([1 + 2 * low, 2 - 2 * low]))
    ids = select_blocks(q, k, lse, **UNIT, num_selected=1, num_initial=0, num_local=0, scale=1.0)
    assert ids[0, 0, 1].tolist() == [1]


def random_selection(q, k):
    choice = dict(block_size=4, stride=2, select_block_size=4, num_selected=4)
    lse = compressed_attention(q, k, k, block_size=4, stride=2)[1]
    return select_blocks(q, k, lse, **choice)


def test_heads_of_a_group_choose_together_in_any_order():
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 40, 8), torch.randn(2, 2, 19, 8)
    ids = random_selection(q, k)
    assert ids.shape == (2, 2, 40, 4)
    assert torch.equal(ids, random_selection(q[:, [2, 0, 1, 5, 3, 4]], k))


def test_a_group_takes_no_notice_of_another_groups_heads():
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 40, 8), torch.randn(2, 2, 19, 8)
    other = q.clone()
    other[:, 3:] = torch.randn(2, 3, 40, 8)
    ids, changed = random_selection(q, k), random_selection(other, k)
    assert torch.equal(ids[:, 0], changed[:, 0])
    assert not torch.equal(ids[:, 1], changed[:, 1])
