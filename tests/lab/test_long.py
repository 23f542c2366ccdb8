"""Long sequences in the trainer: stages as data, questions asked after the rest was read."""

from dataclasses import dataclass, replace

import pytest
import torch

from nsa_lite.lab import evaluate, training
from nsa_lite.lab.checkpoint import load
from nsa_lite.lab.evaluate import answers, answers_to_some, asked_span
from nsa_lite.lab.haystack import Haystack, Stage, curriculum
from nsa_lite.lab.tasks import Batch, Recall
from nsa_lite.lab.training import Progress, TrainConfig, build, learning_rate, steps
from nsa_lite.rivals.attentions import ATTENTIONS

SIZES = replace(Haystack.preset["nsa"], dim=16, heads=2, head_dim=8, value_dim=8)
NEVER = 2.0
SHORT = (
    Stage(256, noise=0.0, batch=2, weight=3, until=NEVER),
    Stage(320, weight=2, until=NEVER, rate=0.5),
)


@dataclass(frozen=True)
class Short(Haystack):
    """Haystacks of 256 and 320 tokens, for small models."""

    stages: tuple[Stage, ...] = SHORT
    evaluate_every: int = 2


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setitem(training.TASKS, "haystack", Short)


def config(attention="nsa-kl", **changes):
    return TrainConfig.preset("haystack", attention, **(dict(nsa=SIZES, threads=1) | changes))


# --- stages ---


def test_a_curriculum_doubles_up_to_its_length():
    assert [s.length for s in curriculum(2048)] == [256, 512, 1024, 2048]
    assert [s.length for s in curriculum(1500)] == [256, 512, 1024, 1500]
    assert [s.length for s in curriculum(256)] == [256]
    assert [s.length for s in curriculum(2048, first=512)] == [512, 1024, 2048]
    with pytest.raises(ValueError, match="length = 500: must be at least 512"):
        curriculum(500, first=512)
    first, *others = curriculum(65_536)
    assert first.noise == 0.0 and all(stage.noise == 1.0 for stage in others)
    assert [s.batch for s in curriculum(65_536)] == [8, 8, 8, 4, 2, 1, 1, 1, 1]
    assert [s.batch for s in curriculum(65_536, 65_536)] == [64, 64, 64, 32, 16, 8, 4, 2, 1]
    assert others[-1].rate == pytest.approx((512 / 65_536) ** 0.5)


@pytest.mark.usefixtures("short")
def test_stages_last_their_share_and_take_their_batch(tmp_path):
    seen = []
    batch = Haystack.batch

    def watched(task, size, seed, stage=-1):
        made = batch(task, size, seed, stage)
        if seed >= 1000:
            seen.append(tuple(made.tokens.shape))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Haystack, "batch", watched)
        records = list(steps(config(steps=5, batch_size=2), tmp_path))
    assert [r["stage"] for r in records] == [0, 0, 0, 1, 1]
    assert seen == 3 * [(4, 256, 2)] + 2 * [(2, 320, 2)]
    assert [r["step"] for r in records if "hit_rate" in r] == [2, 4, 5]


@pytest.mark.usefixtures("short")
def test_a_stage_ends_when_its_accuracy_is_reached(tmp_path, monkeypatch):
    stages = (replace(SHORT[0], until=-1.0 + 2.0), *SHORT[1:])
    monkeypatch.setattr(training, "loss_and_accuracy", always_right)
    task = Haystack(stages=stages)
    monkeypatch.setattr(TrainConfig, "made_task", lambda _: task)
    records = list(steps(config("dense", steps=20), tmp_path))
    # After 12 steps the average stands at 1 - 0.8^12 = .93, after 18 at .98; 12 is 3/5 of 20.
    assert [r["stage"] for r in records].count(0) == 12
    monkeypatch.setattr(
        TrainConfig,
        "made_task",
        lambda _: Haystack(stages=(replace(SHORT[0], until=0.5), SHORT[1])),
    )
    records = list(steps(config("dense", steps=20), tmp_path / "sooner"))
    assert [r["stage"] for r in records].count(0) == 4  # 1 - 0.8^4 = .59


def always_right(logits, targets):
    return evaluate.loss_and_accuracy(logits, targets)[0], 1.0


@pytest.mark.usefixtures("short")
def test_the_warm_up_and_a_stages_rate_make_the_learning_rate():
    run = config(steps=1000, lr=1e-3)
    task = run.made_task()
    assert learning_rate(run, task, Progress(step=0)) == pytest.approx(1e-3 / 50)
    assert learning_rate(run, task, Progress(step=500)) == pytest.approx(1e-3)
    assert learning_rate(run, task, Progress(step=500, stage=1)) == pytest.approx(5e-4)


@pytest.mark.usefixtures("short")
def test_a_run_resumes_bit_for_bit_in_its_second_stage(tmp_path):
    whole = list(steps(config(steps=6), tmp_path / "whole"))
    run = steps(config(steps=6), tmp_path / "parts")
    for _ in range(5):
        next(run)
    run.close()
    rest = list(steps(config(steps=6), tmp_path / "parts", resume=True))
    assert rest == whole[5:]


@pytest.mark.usefixtures("short")
def test_help_for_the_first_passes_is_counted_through_a_checkpoint(tmp_path):
    run = steps(config("nsa-own-kl-first", steps=5), tmp_path)
    for _ in range(3):
        next(run)
    run.close()
    tensors, _ = load(tmp_path / "checkpoint.safetensors")
    assert int(tensors["model.blocks.0.attention.choose._extra_state"]) == 3
    list(steps(config("nsa-own-kl-first", steps=5), tmp_path, resume=True))
    tensors, _ = load(tmp_path / "checkpoint.safetensors")
    assert int(tensors["model.blocks.0.attention.choose._extra_state"]) == 5


def test_a_base_that_cannot_reach_the_longest_sequence_is_refused():
    with pytest.raises(ValueError, match="rope_theta = 100: over 16384 positions"):
        config("dense", nsa=replace(SIZES, rope_theta=100))
    with pytest.raises(ValueError, match="length = 100: must be at least 256"):
        config("dense", length=100)
    with pytest.raises(ValueError, match="length = 300000: must lie in 256 .. 262144"):
        config("dense", length=300_000)


@pytest.mark.usefixtures("short")
def test_all_queries_change_the_cost_and_not_the_loss(tmp_path):
    asked = list(steps(config("nsa", steps=1), tmp_path / "asked"))
    every = list(steps(config("nsa", steps=1, all_queries=True), tmp_path / "all"))
    assert every[0]["loss"] == pytest.approx(asked[0]["loss"], abs=2e-5)


# --- evaluation ---


@pytest.mark.parametrize("attention", [a for a in ATTENTIONS if a != "nsa-random"])
@pytest.mark.parametrize("layers", [1, 2])
def test_questions_asked_after_the_rest_get_the_answers_of_one_pass(attention, layers):
    model = build(config(attention, layers=layers, seed=3)).eval().double()
    batch = Haystack(stages=(Stage(300),)).batch(2, seed=5)
    with torch.no_grad():
        given = answers(model, batch)
        logits, traces = model(batch.tokens, return_traces=True)
    count = asked_span(batch)
    torch.testing.assert_close(given.logits, logits[:, -count:], rtol=1e-6, atol=1e-9)
    assert (given.hit is None) == (not traces)
    if traces:
        assert torch.equal(given.hit, evaluate.hits(traces, batch.answer_at)[:, -count:])


@pytest.mark.parametrize("attention", ["nsa", "nsa-kl", "dense"])
def test_evaluation_goes_with_autocast(attention):
    model = build(config(attention, layers=2)).eval()
    batch = Haystack(stages=(Stage(300),)).batch(2, seed=5)
    expected = answers(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = answers(model, batch)
    torch.testing.assert_close(given.logits.float(), expected.logits, rtol=0.05, atol=0.05)


def test_many_sequences_are_read_a_few_at_a_time(monkeypatch):
    model = build(config("nsa")).eval()
    batch = Haystack(stages=(Stage(256),)).batch(3, seed=0)
    expected = answers(model, batch)
    seen = []

    def watched(model, some):
        seen.append(len(some.tokens))
        return answers_to_some(model, some)

    monkeypatch.setattr(evaluate, "TOKENS", 600)
    monkeypatch.setattr(evaluate, "answers_to_some", watched)
    given = answers(model, batch)
    assert seen == [2, 1]
    torch.testing.assert_close(given.logits, expected.logits)
    assert torch.equal(given.hit, expected.hit)


def test_a_batch_splits_into_its_sequences():
    batch = Recall().batch(5, 0)
    pieces = batch.split(2)
    assert [len(p.tokens) for p in pieces] == [2, 2, 1]
    assert torch.equal(torch.cat([p.targets for p in pieces]), batch.targets)
    assert isinstance(pieces[0], Batch)
