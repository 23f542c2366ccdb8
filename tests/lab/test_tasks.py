"""The toy tasks can fail: answers lie out of easy reach, and each is the one its rows show."""

import pytest
import torch

from nsa_lite.lab.tasks import IGNORE, Copy, Needle, Recall
from nsa_lite.lab.text import HELD_OUT, Text, bigram_bits_per_byte, library_bytes


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_recall_answers_are_the_values_beside_their_keys(stage):
    task = Recall()
    batch = task.batch(5, seed=1, stage=stage)
    for row, targets, at in zip(batch.tokens, batch.targets, batch.answer_at, strict=True):
        book = {int(k): int(v) for k, v in row if k > 1 and v > 1}
        assert len(book) == task.stages[stage] * task.blocks  # no key twice
        asked = (targets != IGNORE).nonzero().flatten().tolist()
        assert asked == list(range(len(row) - task.questions, len(row)))
        for t in asked:
            key, mark = row[t].tolist()
            assert mark == 1 and int(targets[t]) == book[key]
            assert row[at[t]].tolist() == [key, book[key]]


def test_recall_answers_are_outside_the_initial_local_and_window_reach():
    task, c = Recall(), Recall.preset["nsa"]
    batch = task.batch(20, seed=2)
    for at, targets in zip(batch.answer_at, batch.targets, strict=True):
        for t in (targets != IGNORE).nonzero().flatten().tolist():
            block, own = int(at[t]) // c.select_block_size, t // c.select_block_size
            assert block >= c.num_initial
            assert block <= own - c.num_local
            assert int(at[t]) <= t - c.window


def test_recall_leaves_free_blocks_and_more_blocks_than_it_may_choose():
    task, c = Recall(), Recall.preset["nsa"]
    length = task.batch(1, seed=0).tokens.shape[1]
    assert length > c.num_selected * c.select_block_size
    assert c.num_selected > c.num_initial + c.num_local
    assert task.block == c.select_block_size


def test_recall_spreads_answers_evenly_over_the_blocks():
    batch = Recall().batch(2000, seed=3)
    blocks = batch.answer_at[batch.answer_at >= 0] // 8
    share = torch.bincount(blocks, minlength=9)[1:] / len(blocks)
    assert len(share) == 8
    assert share.sub(1 / 8).abs().max() < 0.01  # 32000 draws: about six standard deviations


@pytest.mark.parametrize("task", [Recall(), Needle(), Copy(), Text(length=64)])
def test_a_batch_is_a_function_of_its_seed(task):
    a, b, other = task.batch(3, seed=5), task.batch(3, seed=5), task.batch(3, seed=6)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
    assert not torch.equal(a.tokens, other.tokens)
    assert a.tokens.min() >= 0 and a.tokens.max() < task.vocab_size
    assert a.targets.max() < task.vocab_size


def test_needle_asks_for_the_one_value_behind_the_sign():
    batch = Needle(length=40).batch(200, seed=0)
    for row, targets, at in zip(batch.tokens, batch.targets, batch.answer_at, strict=True):
        (place,) = (row[:-1, 0] == 2).nonzero().flatten().tolist()
        assert int(at[-1]) == place and int(targets[-1]) == int(row[place, 1])
        assert (targets[:-1] == IGNORE).all() and row[-1].tolist() == [2, 1]
    assert batch.answer_at[:, -1].unique().numel() > 35  # any depth


def test_copy_repeats_its_string():
    task = Copy(string=5, gap=3)
    batch = task.batch(4, seed=0)
    assert torch.equal(batch.targets[:, -5:], batch.tokens[:, :5])
    assert torch.equal(batch.tokens[:, -4:], batch.tokens[:, :4])
    assert batch.answer_at[0, -5:].tolist() == [0, 1, 2, 3, 4]


def test_text_targets_are_the_next_bytes_and_the_split_is_by_file():
    batch = Text(length=32).batch(2, seed=0)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    train, held = (bytes(library_bytes(s).tolist()) for s in ("train", "validation"))
    assert len(held) > 200_000 and len(train) > len(held)
    assert HELD_OUT[0] == "argparse.py" and b"class ArgumentParser(" in held
    assert b"class ArgumentParser(" not in train


def test_the_bigram_baseline_lies_between_nothing_and_a_good_model():
    assert 3.0 < bigram_bits_per_byte() < 4.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recall(stages=(2, 9)), "no block holds more facts than block = 8"),
        (lambda: Recall(keys=10), "keys = 10: must be at least 64: no key repeats"),
        (lambda: Recall(questions=17), "questions = 17: must not exceed 16, the facts"),
        (lambda: Needle(length=1), "length = 1: must be at least 2"),
        (lambda: library_bytes("test"), "split = 'test': train or validation"),
    ],
)
def test_bad_sizes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
