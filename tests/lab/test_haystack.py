"""The haystack can fail at any length: answers by brute force, nothing leaks near the questions."""

import math
from dataclasses import replace

import pytest
import torch

from nsa_lite.config import NSAConfig
from nsa_lite.lab.haystack import (
    LONGEST,
    Haystack,
    Stage,
)
from nsa_lite.lab.positions import require_rope_reaches, smallest_rope_base
from nsa_lite.lab.tasks import IGNORE
from nsa_lite.rope import rotate

SCATTERED = Stage(512, noise=0.5)
TOGETHER = Stage(512, noise=0.5, facts_a_block=4)
FULL = Stage(512)
TASK = Haystack(stages=(SCATTERED, TOGETHER, FULL))


def is_key(task, symbol):
    return 2 <= symbol < 2 + task.keys


@pytest.mark.parametrize("stage", range(3))
def test_answers_are_the_values_beside_their_keys(stage):
    batch = TASK.batch(5, seed=1, stage=stage)
    for row, targets, at in zip(batch.tokens, batch.targets, batch.answer_at, strict=True):
        asked = (targets != IGNORE).nonzero().flatten().tolist()
        assert asked == list(range(len(row) - TASK.questions, len(row)))
        assert (at[: asked[0]] == -1).all()
        keys = [int(row[t, 0]) for t in asked]
        assert len(set(keys)) == TASK.questions
        for t, key in zip(asked, keys, strict=True):
            assert int(row[t, 1]) == 1
            places = (row[: asked[0], 0] == key).nonzero().flatten().tolist()
            assert places == [int(at[t])]  # no noise pair has a fact's key
            assert int(targets[t]) == int(row[places[0], 1])


@pytest.mark.parametrize("stage", [SCATTERED, Stage(512, facts_a_block=2)])
def test_a_fact_of_several_positions_says_the_same_at_each(stage):
    task = Haystack(stages=(stage,), facts=16, questions=16, span=4)
    batch = task.batch(5, seed=1)
    for row, targets, at in zip(batch.tokens, batch.targets, batch.answer_at, strict=True):
        for t in (targets != IGNORE).nonzero().flatten().tolist():
            places = (row[: 512 - 16, 0] == row[t, 0]).nonzero().flatten().tolist()
            first = int(at[t])
            assert places == [first, first + 1, first + 2, first + 3]
            assert first % 4 == 0
            assert all(int(row[place, 1]) == int(targets[t]) for place in places)
            assert task.before <= first and first + 3 < 512 - 16 - task.gap


@pytest.mark.parametrize("stage", range(3))
def test_no_fact_stands_in_the_initial_block_the_window_or_a_local_block(stage):
    batch = TASK.batch(20, seed=2, stage=stage)
    nearest = batch.answer_at[batch.answer_at >= 0]
    first_question = batch.tokens.shape[1] - TASK.questions
    assert int(nearest.min()) >= TASK.before
    assert int(nearest.max()) < first_question - TASK.gap


@pytest.mark.parametrize("length", [256, 1000, 16_384])
def test_the_preset_keeps_answers_out_of_nsas_forced_blocks_and_window(length):
    c = Haystack.preset["nsa"]
    batch = Haystack(stages=(Stage(length),)).batch(20, seed=3)
    t = torch.arange(length)[None].expand_as(batch.answer_at)
    asks = batch.answer_at >= 0
    answer, question = batch.answer_at[asks], t[asks]
    assert (answer <= question - c.window).all()
    assert (answer // c.select_block_size >= c.num_initial).all()
    own = question // c.select_block_size
    assert (answer // c.select_block_size <= own - c.num_local).all()


def test_the_preset_has_free_blocks_and_cannot_read_all_of_16k():
    c = Haystack.preset["nsa"]
    assert c.num_selected > c.num_initial + c.num_local
    assert c.num_selected * c.select_block_size < Haystack().stages[-1].length / 32
    assert Haystack().block == c.select_block_size


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_noise_holds_its_share_of_the_other_positions(share):
    task = Haystack(stages=(Stage(4096, noise=share),))
    batch = task.batch(8, seed=4)
    others = 8 * (4096 - task.questions - task.facts)
    pairs = batch.tokens[:, : -task.questions]
    filled = int((pairs > 0).all(-1).sum()) - 8 * task.facts
    assert int((pairs > 0).any(-1).sum()) == filled + 8 * task.facts  # never half a pair
    six_sigma = 6 * math.sqrt(others * share * (1 - share))
    assert abs(filled - share * others) <= six_sigma


def test_noise_takes_every_other_key_and_facts_go_everywhere():
    task = Haystack(stages=(Stage(1024),))
    batch = task.batch(64, seed=5)
    row = batch.tokens[0, : -task.questions, 0]
    assert set(row.tolist()) == set(range(2, 2 + task.keys))
    first, end = task.reach(task.stages[0])
    places = batch.answer_at[batch.answer_at >= 0]
    assert places.unique().numel() > 0.8 * (end - first)  # 2048 draws among about 900
    middle = (first + end - 1) / 2
    spread = (end - first) / math.sqrt(12 * places.numel())
    assert abs(float(places.float().mean()) - middle) < 6 * spread


def test_facts_stand_together_in_the_blocks_they_are_gathered_in():
    batch = TASK.batch(10, seed=6, stage=1)
    for at in batch.answer_at:
        places = at[at >= 0]
        blocks, counts = (places // TASK.block).unique(return_counts=True)
        assert len(places.unique()) == TASK.facts
        assert len(blocks) == TASK.facts // TOGETHER.facts_a_block
        assert (counts == TOGETHER.facts_a_block).all()


def test_a_batch_is_a_function_of_its_seed():
    a = TASK.batch(3, seed=5)
    b = TASK.batch(3, seed=5)
    other = TASK.batch(3, seed=6)
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.targets, b.targets)
    assert torch.equal(a.answer_at, b.answer_at)
    assert not torch.equal(a.tokens, other.tokens)
    assert torch.equal(TASK.held_out(3, seed=5).tokens, a.tokens)


def test_drawing_leaves_torchs_own_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    TASK.batch(2, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_the_alphabet_is_the_same_at_every_length():
    short = Haystack(stages=(Stage(256),))
    long = Haystack(stages=(Stage(LONGEST),))
    assert short.vocab_size == long.vocab_size
    batch = long.batch(1, seed=0)
    assert batch.tokens.shape == (1, LONGEST, 2)
    assert int(batch.tokens.max()) == long.vocab_size - 1
    assert int(batch.targets.max()) < long.vocab_size
    assert int(batch.answer_at.max()) > LONGEST / 2


# --- RoPE ---


def test_the_smallest_base_turns_the_slow_pairs_half_a_turn():
    for slow in (1, 3, 8):
        base = smallest_rope_base(65_536, 32, slow)
        speed = base ** (-(16 - slow) / 16)
        assert 65_536 * speed == pytest.approx(math.pi, rel=1e-3)
    # A hand calculation: 4 channels are 2 pairs, base^(-1/2) T = pi, base = (T / pi)^2.
    assert smallest_rope_base(1000, 4) == math.ceil((1000 / math.pi) ** 2)


def test_the_rule_speaks_of_what_rotate_does():
    """With the base, cosines of the slowest pair fall all the way; with half of it they return."""
    t = torch.arange(4096)
    base = smallest_rope_base(4096, 8)
    x = torch.zeros(4096, 8)
    x[:, 3] = 1  # of pair 3, the slowest
    slow = rotate(x, t, base)[:, 3]
    assert (slow[1:] <= slow[:-1] + 1e-6).all()
    fast = rotate(x, t, base / 4)[:, 3]
    assert (fast[1:] > fast[:-1] + 1e-4).any()


def test_a_base_too_small_is_named():
    c = NSAConfig(head_dim=64)
    require_rope_reaches(c, 16_384)
    with pytest.raises(ValueError, match=r"rope_theta = 10000: over 65536 positions all 32 pairs"):
        require_rope_reaches(c, 65_536)
    needed = smallest_rope_base(65_536, 64)
    require_rope_reaches(replace(c, rope_theta=needed), 65_536)
    with pytest.raises(ValueError, match=f"at least {needed} is needed"):
        require_rope_reaches(replace(c, rope_theta=needed - 1), 65_536)


def test_the_preset_reaches_the_longest_haystack():
    require_rope_reaches(Haystack.preset["nsa"], LONGEST)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stage(255), "length = 255: must lie in 256 .. 262144"),
        (lambda: Stage(256, noise=1.5), "noise = 1.5: must lie in 0 .. 1"),
        (lambda: Stage(256, until=0), "until = 0: must be positive"),
        (lambda: Haystack(stages=()), r"stages = \(\): must hold at least one"),
        (lambda: Haystack(keys=32), "keys = 32: must exceed facts = 32"),
        (lambda: Haystack(questions=33), "questions = 33: must not exceed facts = 32"),
        (lambda: Haystack(gap=190), "length = 256: leaves 26 places for facts = 32 of span = 1"),
        (lambda: Haystack(span=5), "length = 256: leaves 30 places for facts = 32 of span = 5"),
        (lambda: Haystack(span=0), "span = 0: must be at least 1"),
        (
            lambda: Haystack(stages=(Stage(512, facts_a_block=4),), span=4),
            "facts_a_block = 4: must divide facts = 32 and not exceed the 2 places of a block",
        ),
        (
            lambda: Haystack(stages=(Stage(256, facts_a_block=3),)),
            "facts_a_block = 3: must divide facts = 32",
        ),
        (
            lambda: Haystack(stages=(Stage(256, facts_a_block=1),)),
            "length = 256: holds [0-9]+ whole blocks for facts, and 32 are needed",
        ),
        (lambda: smallest_rope_base(256, 8, 4), "slow_pairs = 4: must be below head_dim / 2 = 4"),
    ],
)
def test_bad_sizes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
