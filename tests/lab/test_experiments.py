"""Experiments go on after any interruption, are done once, and record what they did."""

import json
import os
import re
import signal
import subprocess
from dataclasses import replace
from functools import partial

import pytest
import torch

from nsa_lite.lab import experiments, origin, rule_runs, runs, tasks, training
from nsa_lite.lab.checkpoint import difference, load
from nsa_lite.lab.experiments import EXPERIMENTS, Experiment, main, write_results
from nsa_lite.lab.runs import RECORDED, Run, do, recorded, training_run
from nsa_lite.lab.tasks import Recall

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
    do(Run("a", 3, counting), tmp_path, [])
    do(Run("a", 3, failing), tmp_path, [])
    assert json.loads((tmp_path / "result.json").read_text()) == {"count": 3}


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    stop = [signal.SIGINT]  # as Ctrl-C does: heeded after the first step
    with pytest.raises(KeyboardInterrupt):
        do(Run("a", 3, counting), tmp_path, stop)
    assert (tmp_path / "place").read_text() == "1" and not (tmp_path / "result.json").exists()
    do(Run("a", 3, counting), tmp_path, [])
    assert json.loads((tmp_path / "result.json").read_text()) == {"count": 3}


# --- whose result it is ---


def lines(run, folder, capsys):
    """What do() prints."""
    do(run, folder, [])
    return capsys.readouterr().out.splitlines()


def test_a_run_whose_config_changed_is_done_anew_and_says_so(tmp_path, capsys):
    folder = tmp_path / "a"
    first = Run("a", 3, counting, {"lr": 0.1, "nsa": {"dim": 64}})
    assert lines(first, folder, capsys) == []
    changed = Run("a", 3, counting, {"lr": 0.1, "nsa": {"dim": 32}})
    assert lines(changed, folder, capsys) == [
        "a: made with nsa.dim = 64, asked for 32. Done anew; "
        f"the old run is now in {tmp_path / 'a.old1'}"
    ]
    assert json.loads((folder / "result.json").read_text()) == {"count": 3}
    about = json.loads((folder / "about.json").read_text())
    assert about["config"] == changed.config
    assert json.loads((tmp_path / "a.old1/about.json").read_text())["config"] == first.config
    assert lines(changed, folder, capsys) == []
    assert "a.old2" in lines(first, folder, capsys)[0]


def test_an_unfinished_run_whose_config_changed_begins_anew(tmp_path):
    stop = [signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        do(Run("a", 3, counting, {"lr": 0.1}), tmp_path / "a", stop)
    with pytest.raises(KeyboardInterrupt):
        do(Run("a", 3, counting, {"lr": 0.2}), tmp_path / "a", stop)
    assert (tmp_path / "a/place").read_text() == "1"


def test_a_result_that_does_not_say_how_it_was_made_is_not_taken(tmp_path, capsys):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "result.json").write_text('{"count": 1}')
    assert lines(Run("a", 3, counting), folder, capsys)[0].startswith("a: made before configs")
    assert json.loads((folder / "result.json").read_text()) == {"count": 3}


def test_a_changed_learning_rate_does_not_take_the_old_training(tmp_path):
    config = training.TrainConfig.preset("recall", "dense", **QUICK)
    for lr in (4e-3, 1e-3):
        run = training_run(replace(config, lr=lr, steps=2))
        do(run, tmp_path / "a", [])
        _, state = load(tmp_path / "a/checkpoint.safetensors")
        assert state["config"]["lr"] == lr


def test_a_changed_task_or_curriculum_is_another_training(monkeypatch):
    config = training.TrainConfig.preset("recall", "dense", **QUICK)
    before = config.everything()
    monkeypatch.setattr(tasks, "NEXT_STAGE_AT", 0.9)
    changed = difference(before, config.everything())
    assert changed.startswith("curriculum = [{'until': 0.7, 'by'")
    monkeypatch.undo()
    monkeypatch.setitem(training.TASKS, "recall", partial(Recall, gap=24))
    assert difference(before, config.everything()) == "sizes.gap = 16, asked for 24"


def test_what_is_recorded_with_a_changed_config_is_missing_from_the_record(
    tmp_path, small, capsys, monkeypatch
):
    assert main(small(tmp_path)) == 0
    (tmp_path / "small.json").unlink()
    changed = [Run("a-seed0", 3, counting, {"lr": 1}), Run("b-seed0", 3, counting)]
    experiment = Experiment("small", lambda: changed, "small.json", write_results)
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"small": experiment})
    capsys.readouterr()
    assert main(small(tmp_path, "--only", "b-*")) == 0
    assert "1 of 2 runs finished" in capsys.readouterr().out
    assert not (tmp_path / "small.json").exists()


def test_the_record_says_of_each_run_its_config_commit_versions_and_machine(tmp_path, small):
    assert main(small(tmp_path)) == 0
    made = recorded("small", tmp_path)["made"]
    assert set(made) == {"a-seed0", "b-seed0"}
    for run in made.values():
        assert run["config"] == {}
        (under,) = run["under"]
        assert set(under) == {"commit", "versions", "machine"}
        assert under["versions"]["torch"] == torch.__version__
        assert under["machine"]["cores"] == os.cpu_count()


def test_a_run_done_in_parts_under_two_commits_names_both(tmp_path, monkeypatch):
    stop = [signal.SIGINT]
    commits = iter(["a" * 40, "b" * 40])
    monkeypatch.setattr(runs, "origin", lambda: {"commit": next(commits)})
    with pytest.raises(KeyboardInterrupt):
        do(Run("a", 3, counting), tmp_path, stop)
    do(Run("a", 3, counting), tmp_path, [])
    under = json.loads((tmp_path / "about.json").read_text())["under"]
    assert under == [{"commit": "a" * 40}, {"commit": "b" * 40}]


def test_a_commit_says_whether_files_differ_from_it(tmp_path):
    assert origin.commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "x").write_text("1")
    subprocess.run([*git, "add", "x"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    subprocess.run([*git, "tag", "v1"], check=True)
    assert re.fullmatch(r"[0-9a-f]{40}", origin.commit(tmp_path))
    (tmp_path / "x").write_text("2")
    assert re.fullmatch(r"[0-9a-f]{40}-dirty", origin.commit(tmp_path))


# --- what it costs ---


def test_the_cost_of_what_is_left_is_said_before_a_run(tmp_path, small, capsys, monkeypatch):
    listed = [Run("a", 3, counting, {}, 100.0), Run("b", 3, counting, {}, 50.0)]
    experiment = Experiment("small", lambda: listed, "small.json", write_results)
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"small": experiment})
    assert main(small(tmp_path, "--only", "b")) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == "small: 1 of 2 runs to do, about 50 minutes on one core"
    assert main(small(tmp_path)) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == "small: 1 of 2 runs to do, about 1.7 hours on one core"
    assert main(small(tmp_path)) == 0
    assert "to do" not in capsys.readouterr().out


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_run_says_its_cost_and_all_that_its_result_depends_on(name):
    for run in EXPERIMENTS[name].runs():
        assert run.minutes > 0 and run.config
        assert difference(json.loads(json.dumps(run.config)), run.config) is None


def test_every_record_is_of_an_experiment_and_every_experiment_has_its_record():
    files = {path.name for path in RECORDED.iterdir()}
    assert files == {experiment.file for experiment in EXPERIMENTS.values()}


@pytest.mark.parametrize("name", [e.name for e in EXPERIMENTS.values() if e.file.endswith("json")])
def test_what_is_recorded_was_made_with_todays_configs(name):
    made = recorded(name)["made"]
    runs_of_it = EXPERIMENTS[name].runs()
    assert made.keys() == recorded(name)["runs"].keys() == {run.name for run in runs_of_it}
    for run in runs_of_it:
        config = made[run.name]["config"]
        if name == "haystack":  # from before a fact could take more positions than one
            config["sizes"].setdefault("span", 1)
        assert difference(config, run.config) is None, run.name
        for under in made[run.name]["under"]:
            assert under["commit"] and under["versions"]["torch"] and under["machine"]["cores"]


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.json")), ids=lambda path: path.stem)
def test_a_record_is_json_for_any_reader(path):
    def refuse(word):
        raise ValueError(word)

    json.loads(path.read_text("utf-8"), parse_constant=refuse)  # NaN and Infinity are Python's own


def test_an_experiment_that_needs_a_gpu_is_left_out_without_one(tmp_path, capsys, monkeypatch):
    experiment = Experiment("small", list, "small.json", write_results, on_gpu=True)
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"small": experiment})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["small", "--out", str(tmp_path), "--record", str(tmp_path)]) == 0
    assert "small: its runs need a GPU" in capsys.readouterr().out


def test_a_run_that_diverges_ends_the_command_with_a_sentence(tmp_path, small, capsys, monkeypatch):
    def diverging(folder):
        yield {}
        raise training.DivergedError("step 2: the loss is nan")

    experiment = Experiment("small", lambda: [Run("a", 3, diverging)], "small.json", write_results)
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"small": experiment})
    assert main(small(tmp_path)) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: step 2: the loss is nan"


# --- trainings ---


def test_a_training_run_interrupted_and_resumed_records_what_an_unbroken_one_does(tmp_path):
    run = training_run(training.TrainConfig.preset("recall", "nsa-gumbel", 3, **QUICK))
    do(run, tmp_path / "whole", [])
    stop = [signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        do(run, tmp_path / "parts", stop)
    do(run, tmp_path / "parts", [])
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
