"""The recorded sweep of notebook 15, in small: its order, its cases, and what it leaves behind."""

import json
from dataclasses import replace

import pytest
import torch

from nsa_lite.cost import tokens_read
from nsa_lite.lab import checkpoint, neighbour_runs, training


def test_every_sweep_comes_after_the_trainings_that_it_reads():
    names = [run.name for run in neighbour_runs.runs()]
    assert len(set(names)) == len(names)
    for i, name in enumerate(names):
        task, kind, *_, seed = name.split("-")
        if kind == "sweep":
            labels = neighbour_runs.configs(task, int(seed[4:]))
            assert {f"{task}-{label}-{seed}" for label in labels} <= set(names[:i])
    assert sum("sweep" in name for name in names) == 4  # recall three times, text once


def test_thin_nsa_reads_less_than_dense_attention_at_the_questions():
    config = neighbour_runs.configs("recall", 0)["nsa-thin"].nsa
    assert all(sum(tokens_read(config, t).values()) < t + 1 for t in range(88, 104))
    assert "nsa-thin" not in neighbour_runs.configs("text", 0)


def test_a_sweep_measures_every_case_and_its_result_is_json(tmp_path, monkeypatch):
    chosen = [
        ("dense", {}),
        ("H2O", dict(recent=4, heavy=4)),
        ("nsa-thin", dict(num_selected=3)),
        ("nsa-thin", dict(num_selected=6)),
    ]
    monkeypatch.setattr(neighbour_runs, "cases", lambda task, labels: chosen)
    few = neighbour_runs.SWEEPS["recall"]._replace(held_out=2)
    monkeypatch.setitem(neighbour_runs.SWEEPS, "recall", few)
    for label, config in neighbour_runs.configs("recall", 1).items():
        model, folder = training.build(config), tmp_path / f"recall-{label}-seed1"
        folder.mkdir()
        checkpoint.save(
            folder / "checkpoint.safetensors",
            model,
            torch.optim.AdamW(model.parameters()),
            {"config": config.everything()},
        )
    *_, last = neighbour_runs.sweep("recall", 1)(tmp_path / "recall-sweep-seed1")
    results = json.loads(json.dumps(last))["results"]
    assert [(r["method"], r["settings"]) for r in results] == chosen
    assert results[3]["read_by_head"] == results[2]["read_by_head"] + 3 * 8
    assert results[1]["kept"] < 9 and results[0]["kept"] == 104


def test_a_model_of_another_config_is_not_swept(tmp_path):
    config = neighbour_runs.configs("recall", 1)["dense"]
    model = training.build(config)
    checkpoint.save(
        tmp_path / "checkpoint.safetensors",
        model,
        torch.optim.AdamW(model.parameters()),
        {"config": config.everything()},
    )
    assert neighbour_runs.trained(config, tmp_path).training is False
    with pytest.raises(checkpoint.CheckpointError, match=r"lr = 0.004, asked for 0.1"):
        neighbour_runs.trained(replace(config, lr=0.1), tmp_path)


def test_a_sweep_is_another_when_its_trainings_or_its_budgets_are():
    runs = {run.name: run for run in neighbour_runs.runs()}
    swept = runs["recall-sweep-seed0"].config
    chosen = neighbour_runs.configs("recall", 0)
    faster = {label: replace(config, lr=0.1) for label, config in chosen.items()}
    again = neighbour_runs.sweep_run("recall", 0, chosen).config
    assert checkpoint.difference(swept, again) is None
    what = checkpoint.difference(swept, neighbour_runs.sweep_run("recall", 0, faster).config)
    assert what == "trainings.dense.lr = 0.004, asked for 0.1"
