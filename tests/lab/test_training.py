"""Runs repeat, resume bit for bit after any interruption, and refuse what is not theirs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from nsa_lite.lab.checkpoint import CheckpointError, load
from nsa_lite.lab.evaluate import asked_span, hit_rate, loss_and_accuracy
from nsa_lite.lab.logs import read_log
from nsa_lite.lab.tasks import Batch, Recall
from nsa_lite.lab.train import main
from nsa_lite.lab.training import TrainConfig, steps
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
    header = {"format": "nsa_lite checkpoint 1", "state": json.dumps(state)}
    save_file(tensors, path, metadata=header)
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
    monkeypatch.setattr("nsa_lite.lab.training.NEXT_STAGE_AT", -1.0)  # any accuracy is enough
    config = TrainConfig.preset("recall", "dense", steps=4, **QUICK)
    assert [r["stage"] for r in steps(config, tmp_path)] == [0, 1, 2, 2]
    assert len(Recall().stages) == 3


def test_the_curriculum_goes_on_when_its_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr("nsa_lite.lab.training.NEXT_STAGE_AT", 2.0)  # no accuracy is enough
    config = TrainConfig.preset("recall", "dense", steps=8, **QUICK)
    assert [r["stage"] for r in steps(config, tmp_path)] == [0, 0, 1, 1, 2, 2, 2, 2]


def test_a_solved_run_stops_and_stays_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("nsa_lite.lab.training.NEXT_STAGE_AT", -1.0)
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
    ],
)
def test_bad_settings_are_named(change, message):
    settings = {"task": "recall", "attention": "nsa", **change}
    with pytest.raises(ValueError, match=message):
        TrainConfig.preset(**settings)
