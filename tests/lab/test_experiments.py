"""Experiments go on after any interruption, are done once, and record what they did."""

import json
import threading

import pytest

from nsa_lite.lab import experiments, rule_runs, training
from nsa_lite.lab.experiments import EXPERIMENTS, Experiment, main, write_results
from nsa_lite.lab.runs import Run, do, recorded, training_run

QUICK = dict(batch_size=2, threads=1, steps=20)


def counting(folder):
    """Counts to 3 over any number of calls, keeping its place in a file."""
    place = folder / "place"
    while (n := int(place.read_text()) if place.exists() else 0) < 3:
        place.write_text(str(n + 1))
        yield {"count": n + 1}


def failing(folder):
    yield {}
    raise AssertionError("a finished run was done again")


@pytest.fixture
def small(monkeypatch):
    """An experiment of two runs in the place of the real ones; returns main's arguments."""
    runs = [Run("a-seed0", 3, counting), Run("b-seed0", 3, counting)]
    experiment = Experiment("small", lambda: runs, "small.json", write_results)
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"small": experiment})

    def arguments(folder, *more):
        return ["small", "--out", str(folder / "out"), "--record", str(folder), *more]

    return arguments


def test_the_record_holds_each_runs_last_dict_the_command_and_the_versions(tmp_path, small):
    assert main(small(tmp_path)) == 0
    record = recorded("small", tmp_path)
    assert record["runs"] == {"a-seed0": {"count": 3}, "b-seed0": {"count": 3}}
    assert record["command"] == "python -m nsa_lite.lab.experiments small"
    assert set(record["versions"]) == {"python", "torch"}


def test_runs_may_be_shared_and_are_recorded_when_all_are_finished(tmp_path, small, capsys):
    assert main(small(tmp_path, "--only", "a-*")) == 0
    assert "1 of 2 runs finished" in capsys.readouterr().out
    assert not (tmp_path / "small.json").exists()
    assert main(small(tmp_path, "--only", "b-*")) == 0
    assert "2 of 2 runs finished; wrote" in capsys.readouterr().out
    assert set(recorded("small", tmp_path)["runs"]) == {"a-seed0", "b-seed0"}


def test_a_finished_run_is_not_done_again(tmp_path):
    do(Run("a", 3, counting), tmp_path, threading.Event())
    do(Run("a", 3, failing), tmp_path, threading.Event())
    assert json.loads((tmp_path / "result.json").read_text()) == {"count": 3}


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    stop = threading.Event()
    stop.set()  # as Ctrl-C does: heeded after the first step
    with pytest.raises(KeyboardInterrupt):
        do(Run("a", 3, counting), tmp_path, stop)
    assert (tmp_path / "place").read_text() == "1" and not (tmp_path / "result.json").exists()
    do(Run("a", 3, counting), tmp_path, threading.Event())
    assert json.loads((tmp_path / "result.json").read_text()) == {"count": 3}


def test_a_training_run_interrupted_and_resumed_records_what_an_unbroken_one_does(tmp_path):
    run = training_run(training.TrainConfig.preset("recall", "nsa-gumbel", 3, **QUICK))
    do(run, tmp_path / "whole", threading.Event())
    stop = threading.Event()
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        do(run, tmp_path / "parts", stop)
    do(run, tmp_path / "parts", threading.Event())
    whole, parts = (
        json.loads((tmp_path / x / "result.json").read_text()) for x in ("whole", "parts")
    )
    assert whole["evaluations"] == parts["evaluations"]
    (last,) = whole["evaluations"]
    assert last["step"] == 20 and 0 <= last["hit_rate"] <= 1 and last["solved"] is False
    assert whole["seconds"] >= 0


def test_an_unknown_experiment_is_named(capsys):
    assert main(["chess"]) == 2
    assert "experiment = 'chess': must be one of" in capsys.readouterr().err


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_lists_runs_of_different_names(name):
    names = [run.name for run in EXPERIMENTS[name].runs()]
    assert names and len(set(names)) == len(names)


def evaluations(*accuracies):
    return [
        {"step": 50 * (i + 1), "test_accuracy": a, "hit_rate": a / 2}
        for i, a in enumerate(accuracies)
    ]


def test_steps_to_an_accuracy_is_the_first_evaluation_that_has_it():
    assert rule_runs.steps_to(evaluations(0.2, 0.9, 0.8, 0.95), 0.9) == 100
    assert rule_runs.steps_to(evaluations(0.2, 0.89), 0.9) is None


def test_the_table_by_hand():
    header, line = rule_runs.rules_table(
        {"nsa": [evaluations(0.95, 1.0), evaluations(0.1, 0.6)]}
    ).splitlines()
    assert header.split() == ["rule", "accuracy", "hit", "rate", "steps", "to", ".90", "cost"]
    assert line.split() == ["nsa", "0.80", "(0.60", "to", "1.00)", "0.40", "50/-", "1.00"]


def test_a_steps_operations_are_three_times_its_forwards_and_the_indexer_adds_to_them():
    """Dense, by hand: 2 operations a multiplication, and twice the forward's in the backward."""
    batch, tokens, asked, dim, heads, width, value = 32, 104, 16, 64, 4, 32, 14
    project = tokens * dim * (width + value) + asked * dim * heads * width
    attend = asked * heads * tokens * (width + value)
    mix = asked * (heads * value * dim + 2 * dim * 4 * dim + dim * 130)
    assert rule_runs.step_flops("dense") == 3 * 2 * batch * (project + attend + mix)
    assert rule_runs.step_flops("nsa-kl") > 1.1 * rule_runs.step_flops("nsa")
