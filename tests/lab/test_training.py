"""Runs repeat, resume bit for bit after any interruption, and refuse what is not theirs."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nsa_lite.lab import tasks, training
from nsa_lite.lab.checkpoint import CheckpointError, checksum, load, save
from nsa_lite.lab.evaluate import asked_span, hit_rate, hits, loss_and_accuracy
from nsa_lite.lab.logs import read_log
from nsa_lite.lab.tasks import Batch, Recall
from nsa_lite.lab.train import command as command_of
from nsa_lite.lab.train import main
from nsa_lite.lab.training import DivergedError, TrainConfig, steps
from nsa_lite.model import Block
from nsa_lite.traces import Trace

QUICK = dict(batch_size=2, threads=1)


def weights(directory):
    return load_file(directory / "checkpoint.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("attention", ["nsa", "nsa-random", "dense"])
def test_a_run_stopped_and_resumed_ends_with_the_same_bits(tmp_path, attention):
    config = TrainConfig.preset("recall", attention, seed=3, steps=12, **QUICK)
    whole = list(steps(config, tmp_path / "whole"))
    run = steps(config, tmp_path / "parts")
    for _ in range(5):
        next(run)
    run.close()
    rest = list(steps(config, tmp_path / "parts", resume=True))
    assert [r["step"] for r in rest] == list(range(6, 13))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "parts") == whole


def test_other_seeds_give_other_weights(tmp_path):
    for seed in (0, 1):
        config = TrainConfig.preset("recall", "dense", seed, steps=2, **QUICK)
        list(steps(config, tmp_path / str(seed)))
    assert not same(weights(tmp_path / "0"), weights(tmp_path / "1"))


def command(out, *more):
    return [
        sys.executable,
        "-m",
        "nsa_lite.lab.train",
        "--task",
        "recall",
        "--attention",
        "dense",
        "--steps",
        "120",
        "--batch-size",
        "2",
        "--threads",
        "1",
        "--out",
        str(out),
        *more,
    ]


def wait_for_step(log, step, process):
    for _ in range(600):
        if log.exists() and log.read_text().count("\n") >= step:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise AssertionError("the run did not come that far in a minute")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_interrupted_then_resumed_is_an_unbroken_run(tmp_path, number):
    process = subprocess.Popen(command(tmp_path / "a"), stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path / "a/dense-seed0/log.jsonl", 60, process)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "Stopped and saved. To go on: python -m nsa_lite.lab.train --task recall" in err
    for out in ("a", "b"):
        more = ["--resume"] if out == "a" else []
        subprocess.run(command(tmp_path / out, *more), check=True, capture_output=True)
    assert same(weights(tmp_path / "a/dense-seed0"), weights(tmp_path / "b/dense-seed0"))
    assert read_log(tmp_path / "a/dense-seed0") == read_log(tmp_path / "b/dense-seed0")


def test_the_command_line_leaves_a_log_curves_a_table_and_a_summary(tmp_path, capsys):
    arguments = [
        "--task",
        "recall",
        "--steps",
        "50",
        "--batch-size",
        "2",
        "--threads",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for name in ("nsa-seed0", "dense-seed0", "window-seed0"):
        assert name in printed
        assert len(read_log(tmp_path / name)) == 50
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["command"].endswith(f"--out {tmp_path}")
    assert {"commit", "versions", "machine"} <= summary.keys()
    assert summary["runs"]["window-seed0"]["config"]["attention"] == "window"
    last = summary["runs"]["nsa-seed0"]["evaluations"][-1]
    assert last["step"] == 50 and 0 <= last["hit_rate"] <= 1


def test_an_existing_run_is_not_overwritten(tmp_path, capsys):
    config = TrainConfig.preset("recall", "dense", steps=1, **QUICK)
    list(steps(config, tmp_path / config.name))
    before = (tmp_path / config.name / "checkpoint.safetensors").read_bytes()
    assert main(["--attention", "dense", "--steps", "1", "--out", str(tmp_path)]) == 2
    assert "this run exists; continue it with --resume" in capsys.readouterr().err
    assert (tmp_path / config.name / "checkpoint.safetensors").read_bytes() == before


def damaged(path):
    path.write_bytes(path.read_bytes()[:1000])


def foreign(path):
    save_file({"x": torch.zeros(1)}, path)


def pickled(path):
    torch.save({"x": torch.zeros(1)}, path)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (damaged, "damaged or unreadable"),
        (foreign, "not a checkpoint of this program"),
        (pickled, "damaged or unreadable"),
    ],
)
def test_a_bad_checkpoint_is_refused_and_left_untouched(tmp_path, spoil, reason):
    config = TrainConfig.preset("recall", "dense", steps=2, **QUICK)
    list(steps(config, tmp_path))
    path = tmp_path / "checkpoint.safetensors"
    spoil(path)
    before, log = path.read_bytes(), (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=reason):
        list(steps(config, tmp_path, resume=True))
    assert path.read_bytes() == before and (tmp_path / "log.jsonl").read_bytes() == log


def test_a_checkpoint_of_another_config_is_refused_by_field(tmp_path):
    list(steps(TrainConfig.preset("recall", "dense", steps=2, **QUICK), tmp_path))
    other = TrainConfig.preset("recall", "dense", steps=2, lr=0.5, **QUICK)
    with pytest.raises(CheckpointError, match=r"made with lr = 0.004, asked for 0.5"):
        list(steps(other, tmp_path, resume=True))


def test_a_checkpoint_from_before_a_field_of_the_layer_goes_on(tmp_path):
    config = TrainConfig.preset("recall", "dense", steps=3, **QUICK)
    run = steps(config, tmp_path)
    next(run)
    run.close()
    path = tmp_path / "checkpoint.safetensors"
    tensors, state = load(path)
    assert state["config"]["nsa"].pop("share_window") is False
    header = {"format": "nsa_lite checkpoint 2", "state": json.dumps(state)}
    save_file(tensors, path, metadata={**header, "sha256": checksum(tensors, header["state"])})
    assert list(steps(config, tmp_path, resume=True))[-1]["step"] == 3


def test_no_half_written_checkpoint_takes_the_name(tmp_path, monkeypatch):
    config = TrainConfig.preset("recall", "dense", steps=2, **QUICK)
    run = steps(config, tmp_path)
    next(run)
    run.close()
    before = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("nsa_lite.lab.checkpoint.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        list(steps(config, tmp_path, resume=True))
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    load(tmp_path / "checkpoint.safetensors")


def test_an_error_in_the_middle_of_a_step_leaves_the_last_whole_checkpoint(tmp_path, monkeypatch):
    config = TrainConfig.preset("recall", "dense", steps=4, **QUICK)
    run = steps(config, tmp_path / "torn")
    next(run)
    run.close()
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr("nsa_lite.lab.training.nn.utils.clip_grad_norm_", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(steps(config, tmp_path / "torn", resume=True))
    monkeypatch.setattr("nsa_lite.lab.training.nn.utils.clip_grad_norm_", clip)
    list(steps(config, tmp_path / "torn", resume=True))
    list(steps(config, tmp_path / "whole"))
    assert same(weights(tmp_path / "torn"), weights(tmp_path / "whole"))


def test_hit_rate_counts_questions_whose_block_any_group_selects():
    ids = torch.tensor([[[[0, 2], [0, 1], [0, -1]], [[0, 3], [0, 2], [0, 2]]]])  # (1, 2, 3, 2)
    trace = Trace(Recall.preset["nsa"], 0, ids, None, None, None, {})
    at = torch.tensor([[8 * 3, 8 * 3 + 7, -1]])  # blocks 3 and 3; the third asks nothing
    assert hits([trace], at)[0, :2].tolist() == [True, False]
    assert hit_rate([trace], Batch(None, None, at)) == 0.5


def test_the_asked_span_reaches_from_the_first_target_to_the_end():
    targets = torch.tensor([[-100, -100, 3, -100], [-100, -100, -100, 5]])
    assert asked_span(Batch(None, targets, None)) == 2
    assert asked_span(Recall().batch(2, 0)) == Recall().questions
    assert asked_span(Batch(None, torch.full((1, 4), -100), None)) == 4


def test_loss_and_accuracy_skip_what_is_not_asked():
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 2] = logits[0, 2, 3] = 100.0
    loss, accuracy = loss_and_accuracy(logits, torch.tensor([[-100, 2, 1]]))
    assert accuracy == 0.5 and float(loss) == pytest.approx(50.0)


def test_the_curriculum_goes_on_when_its_stage_is_learned(tmp_path, monkeypatch):
    monkeypatch.setattr("nsa_lite.lab.tasks.NEXT_STAGE_AT", -1.0)  # any accuracy is enough
    config = TrainConfig.preset("recall", "dense", steps=4, **QUICK)
    assert [r["stage"] for r in steps(config, tmp_path)] == [0, 1, 2, 2]
    assert len(Recall().stages) == 3


def test_the_curriculum_goes_on_when_its_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr("nsa_lite.lab.tasks.NEXT_STAGE_AT", 2.0)  # no accuracy is enough
    config = TrainConfig.preset("recall", "dense", steps=8, **QUICK)
    assert [r["stage"] for r in steps(config, tmp_path)] == [0, 0, 1, 1, 2, 2, 2, 2]


def test_a_solved_run_stops_and_stays_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("nsa_lite.lab.tasks.NEXT_STAGE_AT", -1.0)
    monkeypatch.setattr(Recall, "solved_at", 0.0)
    config = TrainConfig.preset("recall", "dense", steps=60, **QUICK)
    assert len(list(steps(config, tmp_path))) == 50  # the first evaluation is good enough
    assert list(steps(config, tmp_path, resume=True)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(task="chess"), "task = 'chess': must be one of"),
        (dict(attention="flash"), "attention = 'flash': must be one of"),
        (dict(steps=0), "steps = 0: must be at least 1"),
        (dict(lr=0.0), "lr = 0.0: must be positive"),
        (dict(accumulate=0), "accumulate = 0: must be at least 1"),
        (dict(autocast="float16"), "autocast = 'float16': must be None or one of"),
    ],
)
def test_bad_settings_are_named(change, message):
    settings = {"task": "recall", "attention": "nsa", **change}
    with pytest.raises(ValueError, match=message):
        TrainConfig.preset(**settings)


# --- a run that diverges ---


def spoiled(monkeypatch, step, what):
    """The loss, or one weight's gradient alone, is not finite at one step of a new run."""
    backward = training.backward
    done = []

    def spoil(*given):
        loss, accuracy = backward(*given)
        done.append(loss)
        if len(done) == step and what == "gradient":
            model = given[1]
            model.embedding.weight.grad[0, 0] = torch.inf
        return torch.nan if len(done) == step and what == "loss" else loss, accuracy

    monkeypatch.setattr(training, "backward", spoil)


@pytest.mark.parametrize(("what", "named"), [("loss", "loss is nan"), ("gradient", "norm is inf")])
def test_a_diverging_run_stops_with_a_sentence_and_goes_on_from_its_last_good_checkpoint(
    tmp_path, monkeypatch, capsys, what, named
):
    out = tmp_path / "torn"
    arguments = ["--attention", "dense", "--steps", "60", "--batch-size", "2", "--threads", "1"]
    arguments += ["--out", str(out)]
    with monkeypatch.context() as patch:
        spoiled(patch, 53, what)
        assert main(arguments) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: step 53: the ") and named in said
    assert "still holds step 50" in said
    _, state = load(out / "dense-seed0/checkpoint.safetensors")
    assert state["step"] == 50
    assert [r["step"] for r in read_log(out / "dense-seed0")] == list(range(1, 53))
    assert main([*arguments, "--resume"]) == 0
    config = TrainConfig.preset("recall", "dense", steps=60, **QUICK)
    list(steps(config, tmp_path / "whole"))
    assert same(weights(out / "dense-seed0"), weights(tmp_path / "whole"))
    assert read_log(out / "dense-seed0") == read_log(tmp_path / "whole")


def test_before_the_first_checkpoint_a_diverging_run_says_that_there_is_none(tmp_path):
    config = TrainConfig.preset("recall", "dense", steps=60, lr=1e38, **QUICK)
    with pytest.raises(DivergedError, match=r"step \d: .* There is no checkpoint yet"):
        list(steps(config, tmp_path))
    assert not (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("value", [torch.nan, 1e38], ids=["not finite", "too large to compute"])
def test_weights_that_cannot_compute_never_reach_the_checkpoint(tmp_path, value):
    config = TrainConfig.preset("recall", "dense", steps=60, **QUICK)
    run = steps(config, tmp_path)
    next(run)
    run.close()
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    run = steps(config, tmp_path, resume=True)
    next(run)
    model = run.gi_yieldfrom.gi_frame.f_locals["model"]
    torch.nn.init.constant_(model.blocks[0].mlp[0].weight, value)
    with pytest.raises(DivergedError, match=r"step 2: .*still holds step 1"):
        run.close()
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_checkpoint_of_weights_that_are_not_finite_is_refused(tmp_path):
    config = TrainConfig.preset("recall", "dense", steps=1, **QUICK)
    list(steps(config, tmp_path))
    path = tmp_path / "checkpoint.safetensors"
    model = training.build(config)
    torch.nn.init.constant_(model.embedding.weight, torch.nan)
    _, state = load(path)
    save(path, model, torch.optim.AdamW(model.parameters()), state)
    with pytest.raises(CheckpointError, match="some weights are not finite"):
        list(steps(config, tmp_path, resume=True))


# --- what ends a run ---


def test_a_run_is_ended_by_another_batch_than_the_one_that_is_reported(tmp_path, monkeypatch):
    """A scorer that knows the reported batch by heart solves nothing."""
    seen = []
    held_out = Recall.held_out

    def watched(task, size, seed=0):
        seen.append(seed)
        return held_out(task, size, seed)

    def scores(model, task, size=None, seed=0):
        task.held_out(2, seed)
        return {"test_loss": 0.0, "test_accuracy": 1.0 if seed == training.REPORTED else 0.5}

    monkeypatch.setattr(Recall, "held_out", watched)
    monkeypatch.setattr(training, "evaluate", scores)
    monkeypatch.setattr(tasks, "NEXT_STAGE_AT", -1.0)
    config = TrainConfig.preset("recall", "dense", steps=60, **QUICK)
    records = list(steps(config, tmp_path))
    assert len(records) == 60
    assert records[49]["test_accuracy"] == 1.0 and records[49]["deciding_accuracy"] == 0.5
    assert records[49]["solved"] is False
    assert set(seen) == {training.REPORTED, training.DECIDING}


# --- the command line's words ---


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_a_device_that_is_not_here_is_one_line_and_exit_2(tmp_path, capsys, device):
    assert main(["--device", device, "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: device = '{device}': no device that torch can use here")
    assert list(tmp_path.iterdir()) == []


def test_the_command_to_go_on_survives_pasting():
    words = ["--out", "my runs/it's $HOME", "--resume", "--seed", "3"]
    pasted = shlex.split(command_of(words))
    assert pasted[:3] == ["python", "-m", "nsa_lite.lab.train"]
    assert pasted[3:] == ["--out", "my runs/it's $HOME", "--seed", "3"]


# --- checkpoint files ---


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists what is mapped")
def test_a_loaded_checkpoint_is_not_kept_mapped(tmp_path):
    config = TrainConfig.preset("recall", "dense", steps=1, **QUICK)
    list(steps(config, tmp_path))
    path = tmp_path / "checkpoint.safetensors"
    tensors, _ = load(path)
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert tensors


def test_what_is_flushed_to_disk_is_open_for_writing(tmp_path, monkeypatch):
    """Windows refuses to flush a file that may only be read; so does this."""

    def flush(descriptor):
        os.write(descriptor, b"")

    monkeypatch.setattr("nsa_lite.lab.checkpoint.os.fsync", flush)
    model = torch.nn.Linear(1, 1)
    path = tmp_path / "checkpoint.safetensors"
    save(path, model, torch.optim.AdamW(model.parameters()), {"config": {}})
    assert set(load(path)[0]) == {"model.weight", "model.bias", "random"}


# --- length, accumulation, 16 bits, recomputed blocks ---


def test_a_length_reaches_the_batches_and_is_refused_where_a_task_has_one_only(tmp_path):
    config = TrainConfig.preset("needle", "dense", length=40, **QUICK)
    assert config.made_task().batch(2, 0).tokens.shape == (2, 40, 2)
    with pytest.raises(ValueError, match="length = 40: recall has one length only"):
        TrainConfig.preset("recall", "dense", length=40)
    with pytest.raises(ValueError, match="length = 1: must be at least 2"):
        TrainConfig.preset("needle", "dense", length=1)
    out = ["--out", str(tmp_path), "--steps", "1", "--attention", "dense"]
    assert main(["--task", "needle", "--length", "40", "--batch-size", "2", *out]) == 0
    _, state = load(tmp_path / "dense-seed0/checkpoint.safetensors")
    assert state["config"]["length"] == 40


@pytest.mark.parametrize("attention", ["nsa", "nsa-kl", "dense"])
def test_accumulated_batches_are_one_batch_of_their_size(tmp_path, attention):
    """The same sequences, and to rounding the same gradients, losses and accuracy."""
    whole = TrainConfig.preset("recall", attention, batch_size=6, threads=1)
    split = replace(whole, batch_size=2, accumulate=3)
    batch = Recall().batch(6, 1000)
    numbers = []
    gradients = []
    for config in (whole, split):
        model = training.build(config)
        numbers.append(training.backward(config, model, batch))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-6)
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 1e-5
    first = [next(steps(c, tmp_path / str(c.accumulate))) for c in (whole, split)]
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], abs=2e-5)


def test_an_accumulated_loss_weighs_each_target_alike():
    """Parts with 1 and 3 targets: the mean over 4, not the mean of two means."""
    config = TrainConfig.preset("recall", "dense", batch_size=1, accumulate=2, threads=1)
    batch = Recall().batch(2, 0)
    targets = batch.targets.clone()
    targets[0, :-1] = -100
    targets[1, :-3] = -100
    batch = replace(batch, targets=targets)
    model = training.build(config)
    logits = model(batch.tokens).detach()
    expected, accuracy = loss_and_accuracy(logits, targets)
    found = training.backward(config, model, batch)
    assert found == pytest.approx((float(expected), accuracy), rel=1e-6)


@pytest.mark.parametrize("attention", ["nsa", "nsa-random", "nsa-gumbel", "dense"])
def test_recomputed_blocks_give_the_same_bits_and_are_computed_twice(
    tmp_path, monkeypatch, attention
):
    calls = []
    forward = Block.forward

    def counted(block, *given):
        calls.append(block)
        return forward(block, *given)

    monkeypatch.setattr(Block, "forward", counted)
    kept = TrainConfig.preset("recall", attention, steps=4, layers=2, **QUICK)
    counts = []
    for config in (kept, replace(kept, checkpoint=True)):
        calls.clear()
        run = steps(config, tmp_path / str(config.checkpoint))
        next(run)
        counts.append(len(calls))
        list(run)
    assert counts == [2, 4]
    assert read_log(tmp_path / "True") == read_log(tmp_path / "False")
    assert same(weights(tmp_path / "True"), weights(tmp_path / "False"))


@pytest.mark.parametrize("attention", ["nsa", "nsa-kl", "dense"])
def test_autocast_multiplies_in_16_bits_and_keeps_weights_and_loss_in_32(tmp_path, attention):
    config = TrainConfig.preset("recall", attention, steps=3, **QUICK)
    dtypes = []
    model = training.build(replace(config, autocast="bfloat16"))
    model.unembedding.register_forward_hook(lambda *given: dtypes.append(given[-1].dtype))
    loss, _ = training.backward(replace(config, autocast="bfloat16"), model, Recall().batch(2, 0))
    plain, _ = training.backward(config, training.build(config), Recall().batch(2, 0))
    assert dtypes == [torch.bfloat16]
    assert loss != plain and loss == pytest.approx(plain, rel=2e-2)
    out = ["--steps", "3", "--batch-size", "2", "--threads", "1", "--out", str(tmp_path)]
    assert main(["--attention", attention, "--autocast", "bfloat16", *out]) == 0
    tensors, state = load(tmp_path / f"{attention}-seed0" / "checkpoint.safetensors")
    assert state["config"]["autocast"] == "bfloat16"
    assert {t.dtype for n, t in tensors.items() if n.startswith("model.")} == {torch.float32}


def test_a_run_with_all_options_resumes_bit_for_bit(tmp_path):
    options = dict(length=40, autocast="bfloat16", accumulate=2, checkpoint=True)
    config = TrainConfig.preset("needle", "nsa", steps=6, **options, **QUICK)
    list(steps(config, tmp_path / "whole"))
    run = steps(config, tmp_path / "parts")
    next(run)
    run.close()
    list(steps(config, tmp_path / "parts", resume=True))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
