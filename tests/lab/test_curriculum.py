"""A run goes through its stages in order, ends each for the reason it names, and repeats."""

import json
from dataclasses import replace

import pytest
import torch

from nsa_lite.lab import train_long
from nsa_lite.lab.curriculum import Place, evaluate, train
from nsa_lite.lab.haystack import Haystack, Stage

SIZES = replace(Haystack.preset["nsa"], dim=16, heads=2, head_dim=8, value_dim=8)
NEVER = 2.0
TASK = Haystack(
    stages=(Stage(256, 0.0, None, 2, 3, NEVER), Stage(320, 1.0, None, 1, 2, NEVER, 0.5))
)


def made(attention="nsa-kl", task=TASK, **changes):
    small = {**Haystack.preset, "nsa": replace(SIZES, **changes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Haystack, "preset", small)
        model = train_long.build(task, attention, seed=0)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def test_a_stage_that_is_not_learned_lasts_its_steps():
    records = list(train(TASK, *made(), lr=1e-3))
    assert [r["length"] for r in records] == [256, 256, 256, 320, 320]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    assert [r["done"] for r in records] == [False, False, True, False, True]


def test_a_stage_ends_when_its_accuracy_is_reached():
    assert Place(accuracy=0.95, step_of_stage=1).ends(Stage(256, until=0.95, steps=9))
    assert not Place(accuracy=0.94, step_of_stage=8).ends(Stage(256, until=0.95, steps=9))
    assert Place(accuracy=0.0, step_of_stage=9).ends(Stage(256, until=0.95, steps=9))


def test_the_running_accuracy_starts_anew_with_each_stage():
    for record in train(TASK, *made("dense"), lr=1e-3):
        if record["step"] in (1, 4):
            assert record["running_accuracy"] == pytest.approx(0.1 * record["accuracy"])


def test_a_run_repeats_from_its_seed():
    def losses(seed):
        return [r["loss"] for r in train(TASK, *made(), lr=1e-3, seed=seed)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_the_warm_up_and_a_stages_rate_reach_the_optimiser():
    model, optimizer = made("dense")
    rates = []
    for _ in train(TASK, model, optimizer, lr=1e-3):
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([2e-5, 4e-5, 6e-5, 4e-5, 5e-5])


def test_evaluation_speaks_of_any_length_and_of_the_choice():
    model, _ = made("nsa-kl")
    result = evaluate(TASK, model, Stage(1000), sequences=2)
    assert 0 <= result["hit_rate"] <= 1
    assert result == evaluate(TASK, model, Stage(1000), sequences=2)
    assert model.training
    assert "hit_rate" not in evaluate(TASK, made("window")[0], Stage(300), sequences=1)


def test_where_everything_is_selected_everything_is_hit():
    model, _ = made("nsa-random")
    assert evaluate(TASK, model, Stage(256), sequences=2)["hit_rate"] == 1.0
    assert evaluate(TASK, model, Stage(2048), sequences=2)["hit_rate"] < 0.5


def test_a_base_that_cannot_reach_stops_before_the_first_step():
    run = train(TASK, *made("dense", rope_theta=100), lr=1e-3)
    with pytest.raises(ValueError, match="rope_theta = 100: over 320 positions"):
        next(run)


def test_the_command_leaves_a_table_and_a_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_long, "Haystack", lambda: TASK)
    words = ["--attention", "dense", "--attention", "nsa-kl", "--threads", "1"]
    assert train_long.main([*words, "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [
        ["dense", "256", "3"],
        ["dense", "320", "5"],
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["runs"]) == {"dense", "nsa-kl"}
    assert summary["runs"]["nsa-kl"]["stages"][1]["length"] == 320


def test_stages_that_are_too_long_are_left_out():
    assert train_long.up_to(256, TASK).stages == TASK.stages[:1]
    assert train_long.up_to(None, TASK) == TASK
    assert train_long.main(["--length", "100"]) == 2
