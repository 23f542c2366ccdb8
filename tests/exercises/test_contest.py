"""The contest of set 08: its data keep their promises, and its table survives any rule."""

import pytest
import torch

from exercises import contest
from exercises.records import load

WORLDS = contest.worlds((7, 8))


def test_dense_mass_by_hand():
    # Equal scores: query 33 has one whole block of 32 and two tokens of the next.
    mass = contest.dense_mass(torch.zeros(1, 4, 16), torch.randn(96, 16), torch.tensor([33]))
    assert torch.allclose(mass, torch.tensor([[32 / 34, 2 / 34, 0.0]]))


def test_no_answer_is_forced_and_no_mass_lies_after_the_query():
    for w in WORLDS:
        assert ((w.answer >= 1) & (w.answer <= w.own - 2)).all()
        after = torch.arange(w.mass.shape[1]) > w.own[:, None]
        assert (w.mass[after] == 0).all() and after.any()
        assert torch.allclose(w.mass.sum(1), torch.ones(len(w.mass)))


@pytest.mark.parametrize("kept, budget", [(0, 192), (1, 256), (2, 192), (3, 384)])
def test_the_choice_is_the_one_by_hand(kept, budget):
    by_hand = load("08").best_by_hand
    for own in (1, 2, 16, 31):
        score = torch.randint(0, 5, (own,), generator=torch.Generator().manual_seed(own)).float()
        ids = contest.choose(score, own, kept, budget)
        assert ids == by_hand(score, own, kept, budget, contest.BLOCK)


def test_the_oracle_is_the_ceiling_and_random_the_floor_of_what_reads_keys():
    rows = {name: contest.play(rule, WORLDS) for name, rule in contest.RULES.items()}
    oracle = contest.play(None, WORLDS)
    for budget in contest.BUDGETS:
        assert all(row[budget][0] < oracle[budget][0] for row in rows.values())
        assert all(
            rows[name][budget][0] > rows["random"][budget][0]
            for name in ("block means", "compressed importance", "minimum and maximum")
        )


def test_the_board_has_a_line_for_a_rule_that_is_not_there_or_fails(capsys):
    class Stub(contest.BlockMeans):
        def keep(self, block):
            raise NotImplementedError()

    class Broken(contest.BlockMeans):
        def score(self, q, kept):
            return q[99]

    contest.board({"yours": Stub, "hers": Broken})
    said = capsys.readouterr().out
    assert "yours                  not attempted" in said
    assert "hers                   not valid: IndexError" in said
    assert said.splitlines()[1].startswith("oracle")
