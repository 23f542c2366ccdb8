"""Trained on two processes: the weights of one at the same batch, and one decision for both."""

import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from nsa_lite.lab import distributed, tasks, training
from nsa_lite.lab.checkpoint import load
from nsa_lite.lab.logs import read_log
from nsa_lite.lab.tasks import Recall
from nsa_lite.lab.train import train_with_bar
from nsa_lite.lab.training import DivergedError, TrainConfig, steps

WORLD = 2
CONFIGS = {
    "nsa": TrainConfig.preset("recall", "nsa", steps=5, batch_size=4, threads=1),
    "rule with a loss": TrainConfig.preset("recall", "nsa-kl", steps=5, batch_size=4, threads=1),
    "accumulated": TrainConfig.preset(
        "recall", "nsa-kl", steps=5, batch_size=2, accumulate=3, threads=1, checkpoint=True
    ),
    "random": TrainConfig.preset("recall", "nsa-random", steps=5, batch_size=2, threads=1),
    "dense": TrainConfig.preset("recall", "dense", steps=60, batch_size=2, threads=1),
}
EQUAL = ("nsa", "rule with a loss", "accumulated")


# --- what two processes do, one scene after another: they start only once ---


def two_processes(rank, place, folder):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),  # of ranks that wait for each other in vain
    )
    seen = {}
    for scene in (whole_runs, interrupted, diverging, solved, random_rules, bad_input):
        with pytest.MonkeyPatch.context() as patch:
            seen[scene.__name__] = scene(rank, folder, patch)
    distributed.leave()
    seen["threads"] = [Path(x, "comm").read_text() for x in Path("/proc/self/task").glob("*")]
    (folder / f"seen{rank}.json").write_text(json.dumps(seen))


def whole_runs(rank, folder, patch):
    in_double(patch)
    return {name: list(steps(CONFIGS[name], folder / name)) for name in EQUAL}


def in_double(patch):
    """Weights in 64 bits: Adam divides by small gradients, and makes rounding large."""
    build = training.build
    patch.setattr(training, "build", lambda config: build(config).double())


def interrupted(rank, folder, patch):
    """Ctrl-C reaches one rank only, in the middle of its third step."""
    in_double(patch)
    advance = training.advance

    def pressed(progress, *given, **named):
        advance(progress, *given, **named)
        if rank == 1 and progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    patch.setattr(training, "advance", pressed)
    with pytest.raises(KeyboardInterrupt):
        train_with_bar(CONFIGS["nsa"], folder / "parts", False)
    _, state = load(folder / "parts/checkpoint.safetensors")
    patch.setattr(training, "advance", advance)
    rest = list(steps(CONFIGS["nsa"], folder / "parts", resume=True))
    return [state["step"], rest[0]["step"]]


def diverging(rank, folder, patch):
    """The loss of one rank's own sequences is not finite at the second step."""
    score = training.loss_and_accuracy
    calls = []

    def spoiled(*given):
        loss, accuracy = score(*given)
        calls.append(rank)
        return (loss * torch.nan if calls == [1, 1] else loss), accuracy

    patch.setattr(training, "loss_and_accuracy", spoiled)
    with pytest.raises(DivergedError) as caught:
        list(steps(CONFIGS["dense"], folder / "diverging"))
    assert len(calls) == 2
    return str(caught.value)


def solved(rank, folder, patch):
    """Rank 0 finds the run solved, the other scores nothing, and would go on by itself."""
    evaluated = []

    def scores(model, task, size=None, seed=0):
        evaluated.append(seed)
        return {"test_loss": 0.0, "test_accuracy": 1.0 - rank}

    patch.setattr(training, "evaluate", scores)
    patch.setattr(tasks, "NEXT_STAGE_AT", -1.0)
    return [len(list(steps(CONFIGS["dense"], folder / "solved"))), evaluated]


def random_rules(rank, folder, patch):
    """A run in two parts, and what a rank draws first."""
    config = CONFIGS["random"]
    list(steps(config, folder / "random"))
    run = steps(config, folder / "random parts")
    for _ in range(3):
        next(run)
    run.close()
    list(steps(config, folder / "random parts", resume=True))
    distributed.draw_apart(1000)
    return torch.rand(4).tolist()


def bad_input(rank, folder, patch):
    """A batch of 3, a disk that is full for rank 0, and a checkpoint that rank 1 cannot see."""
    config = replace(CONFIGS["dense"], steps=1)
    said = []

    def fails(config, place, resume=False):
        with pytest.raises((ValueError, OSError)) as caught:
            list(steps(config, place, resume))
        said.append(str(caught.value))

    def full_disk(*_):
        raise OSError("No space left on device")

    fails(replace(config, batch_size=3), folder / "three")
    with pytest.MonkeyPatch.context() as inner:
        inner.setattr("nsa_lite.lab.checkpoint.os.fsync", full_disk)
        fails(config, folder / "full")
    list(steps(config, folder / "blind"))
    fails(config, folder / "blind" if rank == 0 else folder / "elsewhere", resume=True)
    fails(config, folder / "blind" if rank == 1 else folder / "elsewhere")
    return said


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder that two processes left, and what each of them saw."""
    folder = tmp_path_factory.mktemp("distributed")
    mp.start_processes(
        two_processes, (folder / "meeting", folder), nprocs=WORLD, start_method="spawn"
    )
    return folder, [json.loads((folder / f"seen{r}.json").read_text()) for r in range(WORLD)]


# --- what must be true of it ---


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_end_with_the_weights_of_one(ran, tmp_path, monkeypatch, name):
    folder, seen = ran
    in_double(monkeypatch)
    alone = list(steps(CONFIGS[name], tmp_path))
    ours, theirs = (load_file(x / "checkpoint.safetensors") for x in (folder / name, tmp_path))
    first = dict(training.build(CONFIGS[name]).named_parameters())
    for key, weight in first.items():
        expected = theirs[f"model.{key}"]
        torch.testing.assert_close(ours[f"model.{key}"], expected, rtol=1e-9, atol=1e-9)
        assert not torch.equal(expected, weight)
    assert seen[0]["whole_runs"][name] == seen[1]["whole_runs"][name] == read_log(folder / name)
    for record, expected in zip(read_log(folder / name), alone, strict=True):
        assert record == pytest.approx(expected, abs=1.1e-5)  # they are rounded


def test_ctrl_c_on_one_rank_stops_both_after_the_same_step(ran):
    folder, seen = ran
    assert [s["interrupted"] for s in seen] == [[3, 4]] * WORLD
    assert same(folder / "nsa", folder / "parts")


def same(a, b):
    x, y = (load_file(place / "checkpoint.safetensors") for place in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_a_loss_that_is_not_finite_on_one_rank_stops_both(ran):
    for s in ran[1]:
        assert s["diverging"].startswith("step 2: the loss is nan; stopped.")


def test_a_run_is_solved_when_rank_0_says_so(ran):
    both = [training.REPORTED, training.DECIDING]
    assert [s["solved"] for s in ran[1]] == [[50, both], [50, []]]


def test_random_rules_draw_apart_and_resume_bit_for_bit(ran):
    folder, seen = ran
    assert same(folder / "random", folder / "random parts")
    assert seen[0]["random_rules"] != seen[1]["random_rules"]


def test_what_fails_on_one_rank_fails_on_both_in_the_same_words(ran):
    folder, seen = ran
    said = seen[0]["bad_input"]
    assert said == seen[1]["bad_input"]
    assert said[0] == "batch_size = 3: must be a multiple of the number of processes, 2"
    assert not (folder / "three").exists()
    assert said[1] == "No space left on device"
    assert said[2].startswith("step = [1, 0]: must be the same on every rank")
    assert "this run exists" in said[3]


def test_no_thread_of_the_group_outlives_it(ran):
    """Else one that still drops a tensor when Python ends calls abort, once in a hundred runs."""
    for seen in ran[1]:
        assert not [name for name in seen["threads"] if "gloo" in name]


# --- without a group, and with torchrun ---


def test_one_process_alone_deals_everything_to_itself():
    assert (distributed.world(), distributed.rank()) == (1, 0)
    assert distributed.own([3, 1, 4]) == [3, 1, 4]
    assert distributed.everyone("x") == ["x"]
    assert distributed.added_up(0.1, 0.7) == (0.1, 0.7)
    model = torch.nn.Linear(1, 1)
    assert distributed.spread(model) is distributed.bare(model) is model
    before = torch.get_rng_state()
    distributed.draw_apart(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_rank_has_its_own_sequences_of_every_accumulated_batch(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    batch = Recall().batch(8, 1000)
    dealt = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        dealt.append(distributed.own(batch.split(distributed.own_size(4))))
    rows = [torch.cat([part.tokens for part in parts]) for parts in dealt]
    assert torch.equal(rows[0], batch.tokens[[0, 1, 4, 5]])
    assert torch.equal(rows[1], batch.tokens[[2, 3, 6, 7]])


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda:1", 2, "device = 'cuda:1': must be cuda: each process takes its own"),
        ("cuda", 1, "--nproc-per-node = 2: must not exceed the GPUs here, 1"),
    ],
)
def test_a_gpu_for_each_process(monkeypatch, device, gpus, message):
    taken = []
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=message):
        distributed.take_own_device(device)
    distributed.take_own_device("cpu")
    assert taken == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    distributed.take_own_device("cuda")
    assert taken == [1]


def test_torchrun_trains_prints_once_and_says_how_to_go_on(tmp_path):
    words = ["--attention", "dense", "--steps", "3", "--batch-size", "2", "--threads", "1"]
    words = ["-m", "nsa_lite.lab.train", *words, "--out", str(tmp_path)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("curves:") == done.stderr.count(" 0/3 ") == 1  # one bar begins
    assert [r["step"] for r in read_log(tmp_path / "dense-seed0")] == [1, 2, 3]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert shlex.split(summary["command"]) == ["torchrun", "--nproc-per-node", "2", *words]
