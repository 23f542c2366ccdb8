"""What a run meets on a real machine: damaged files, another run, signals, words of no sense."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nsa_lite.lab import training
from nsa_lite.lab.checkpoint import CheckpointError, checksum, load
from nsa_lite.lab.evaluate import evaluate
from nsa_lite.lab.logs import LogError, read_log
from nsa_lite.lab.tasks import Needle, Recall
from nsa_lite.lab.train import main, train_with_bar, verdict
from nsa_lite.lab.training import TASKS, TrainConfig, build, steps

CONFIG = TrainConfig.preset("recall", "dense", steps=4, batch_size=2, threads=1)


@pytest.fixture
def run(tmp_path):
    """The folder of a run that stands after its second step of four."""
    going = steps(CONFIG, tmp_path)
    next(going), next(going)
    going.close()
    return tmp_path


def rest(folder):
    return [r["step"] for r in steps(CONFIG, folder, resume=True)]


# --- the checkpoint ---


@pytest.mark.parametrize("at", [0.2, 0.5, 0.9, 0.999])
def test_a_flipped_bit_does_not_load(run, at):
    path = run / "checkpoint.safetensors"
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header + int(at * (len(data) - header))] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"checkpoint.safetensors: damaged, its checksum"):
        rest(run)
    assert path.read_bytes() == data


def rewritten(path, change):
    """The checkpoint with its tensors and state changed, and a checksum that fits."""
    tensors, state = load(path)
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    change(tensors, state)
    header["state"] = json.dumps(state)
    save_file(tensors, path, metadata={**header, "sha256": checksum(tensors, header["state"])})


def renamed(tensors, state):
    tensors["model.nothing"] = tensors.pop("model.norm.weight")


def without_moment(tensors, state):
    tensors.pop("optimizer.0.exp_avg")


def of_another_shape(tensors, state):
    tensors["optimizer.0.exp_avg"] = tensors["optimizer.0.exp_avg"][:1].clone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed, 'Missing key.*"norm.weight"'),
        (without_moment, r"optimizer\.0 has"),
        (of_another_shape, r"optimizer\.0 has"),
        (lambda t, s: t.pop("random"), "'random'"),
        (lambda t, s: s.update(step=-5), "step = -5 is no place in this run"),
        (lambda t, s: s.update(step=9), "step = 9 is no place"),
        (lambda t, s: s.update(step=2.5), "step = 2.5 is no place"),
        (lambda t, s: s.update(stage=7), "stage = 7 is no place"),
        (lambda t, s: s.update(solved="no"), "solved = 'no' is no place"),
        (lambda t, s: s.pop("recent_accuracy"), "recent_accuracy = None is no place"),
        (lambda t, s: s.pop("config"), "its header names no config"),
    ],
)
def test_entries_that_are_missing_or_make_no_sense_are_named(run, change, words):
    path = run / "checkpoint.safetensors"
    rewritten(path, change)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=words):
        rest(run)
    assert path.read_bytes() == before


# --- the log beside it ---


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no json\n", r"log.jsonl, line 1: not the record of a step"),
        ('{"step": 1}\n[2]\n', r"log.jsonl, line 2: not the record of a step"),
        ('{"step": 1}\n{"step": "2"}\n', r"log.jsonl, line 2: not the record"),
        ('{"step": 1}\n', r"line 1: it ends with step 1, the checkpoint is of step 2"),
        ('{"step": 1}\n{"step": 3}\n', r"line 2: step 3 follows step 1"),
    ],
)
def test_a_log_of_no_use_is_named_with_its_line_and_left(run, text, words):
    log = run / "log.jsonl"
    log.write_text(text)
    with pytest.raises(LogError, match=words):
        rest(run)
    assert log.read_text() == text
    log.rename(run / "elsewhere")  # as the message says
    assert rest(run) == [3, 4]
    assert [r["step"] for r in read_log(run)] == [3, 4]


def test_a_longer_log_is_cut_to_its_checkpoint_and_half_a_line_does_not_count(run):
    log = run / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "loss": 0.5}\n{"step": 4, "lo')
    assert rest(run) == [3, 4]
    assert [r["step"] for r in read_log(run)] == [1, 2, 3, 4]
    assert read_log(run)[2]["loss"] != 0.5


def test_a_log_without_its_checkpoint_is_never_erased(run):
    text = (run / "log.jsonl").read_text()
    (run / "checkpoint.safetensors").unlink()
    with pytest.raises(CheckpointError, match="a log without its checkpoint"):
        list(steps(CONFIG, run))
    assert (run / "log.jsonl").read_text() == text
    assert rest(run) == [1, 2, 3, 4]
    assert (run / "log.old1.jsonl").read_text() == text


def test_a_finished_run_without_its_log_is_a_line_of_dashes(tmp_path, capsys):
    words = ["--attention", "dense", "--steps", "2", "--batch-size", "2", "--threads", "1"]
    words += ["--out", str(tmp_path)]
    assert main(words) == 0
    (tmp_path / "dense-seed0/log.jsonl").unlink()
    capsys.readouterr()
    assert main([*words, "--resume"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split()[:3] == ["dense-seed0", "-", "-"]


# --- two at once, and signals ---


def test_two_runs_in_one_folder_are_one_too_many(run):
    first = steps(CONFIG, run, resume=True)
    next(first)
    with pytest.raises(CheckpointError, match="another run is at work here"):
        rest(run)
    first.close()
    assert rest(run) == [4]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_kill_and_a_closed_terminal_save_as_ctrl_c_does(tmp_path, number):
    words = ["--attention", "dense", "--steps", "400", "--batch-size", "2", "--threads", "1"]
    start = [sys.executable, "-m", "nsa_lite.lab.train"]
    command = [*start, *words, "--out", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "dense-seed0/log.jsonl"
    until = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Stopped and saved. To go on:" in err
    _, state = load(tmp_path / "dense-seed0/checkpoint.safetensors")
    assert state["step"] == len(read_log(tmp_path / "dense-seed0")) > 0


def test_the_signals_are_what_they_were_afterwards(tmp_path):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    train_with_bar(CONFIG, tmp_path, False)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


# --- words ---


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--seed", str(10**29)], f"seed = {10**29}: must be at most"),
        (["--seed", str(2**41)], f"seed = {2**41}: must not exceed {2**40}"),
        (["--seed", "1", "--seed", "1"], "--seed = 1: is given twice"),
        (["--attention", "nsa", "--attention", "nsa"], "--attention = nsa: is given twice"),
        (["--device", "cuda:77"], "device = 'cuda:77': no device that torch can use here"),
        (["--device", "meta"], "device = 'meta': no device that torch can use here"),
    ],
)
def test_words_that_make_no_sense_are_one_line(tmp_path, capsys, words, sentence):
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {sentence}")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["--out", str(tmp_path / "file")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "file" in line


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), None])
def test_a_full_disk_and_a_full_card_are_one_line(tmp_path, capsys, monkeypatch, error):
    error = error or torch.OutOfMemoryError("CUDA out of memory.\nMany more lines")

    def fails(*_):
        raise error

    monkeypatch.setattr(training, "save", fails)
    words = ["--attention", "dense", "--steps", "1", "--batch-size", "2", "--threads", "1"]
    assert main([*words, "--out", str(tmp_path)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last in ("error: [Errno 28] No space left on device", "error: CUDA out of memory.")


# --- what the numbers say ---


def test_a_model_of_nan_hits_nothing():
    model = build(TrainConfig.preset("recall", "nsa", threads=1))
    with torch.no_grad():
        model.embedding.weight.fill_(torch.nan)
    assert "hit_rate" not in evaluate(model, Recall(), size=2)


@pytest.mark.parametrize("task", [name for name in TASKS if name != "text"])
def test_a_guess_is_a_uniform_one_among_the_answers(task):
    made = TASKS[task]()
    batch = made.batch(1 if task == "haystack" else 64, 1000, 0)
    seen = batch.targets[batch.targets >= 0].unique().numel()
    assert seen <= round(2.718281828459045 ** made.guess())
    assert made.guess() == pytest.approx(
        {"recall": 4.158883, "haystack": 2.772589}.get(task, 2.772589)
    )
    assert Needle().guess() == pytest.approx(2.772589)


def test_a_run_that_found_nothing_says_so():
    assert verdict("a", {"test_loss": 4.15}, 4.1589) == (
        "a: its held-out loss, 4.150, is that of a guess (4.159). It found no answers"
    )
    assert verdict("a", {"test_loss": 1.0}, 4.1589) is None
    assert verdict("a", {}, 4.1589) is None


def test_a_run_that_learned_nothing_says_so_at_its_end(tmp_path, capsys):
    words = ["--task", "copy", "--attention", "dense", "--steps", "2", "--batch-size", "2"]
    assert main([*words, "--threads", "1", "--lr", "1e-9", "--out", str(tmp_path)]) == 0
    assert "dense-seed0: its held-out loss" in capsys.readouterr().out


def test_the_lock_lies_in_the_runs_folder_only(run):
    assert sorted(p.name for p in Path(run).iterdir()) == [
        "checkpoint.safetensors",
        "lock",
        "log.jsonl",
    ]
    assert os.path.getsize(run / "lock") == 0
