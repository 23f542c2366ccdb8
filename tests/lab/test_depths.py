"""Accuracy by depth: counted by hand, and told from a checkpoint."""

import json
from dataclasses import replace

import pytest
import torch

from nsa_lite.lab import depths
from nsa_lite.lab.depths import by_depth, in_bins
from nsa_lite.lab.haystack import Haystack, Stage
from nsa_lite.lab.training import TrainConfig, build, steps
from nsa_lite.show.needle_map import draw_needle_maps, spoken

SIZES = replace(Haystack.preset["nsa"], dim=16, heads=2, head_dim=8, value_dim=8)
SHORT = {"stages": (Stage(256, noise=0.0, batch=2),), "held_out_size": 2}


def config(attention, **changes):
    sizes = dict(nsa=SIZES, threads=1, sizes=SHORT, steps=2)
    return TrainConfig.preset("haystack", attention, **(sizes | changes))


def test_bins_hold_shares_by_hand():
    answer_at = torch.tensor([[0, 9, 10, 39, -1], [-1, 19, 39, 30, 5]])
    marks = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 0, 1, 1]]).bool()
    # Of 40 positions in 4 bins: 0, 9, 5 | 10, 19 | - | 39, 39, 30.
    assert in_bins(marks, answer_at, 40, 4) == [0.6667, 1.0, None, 0.6667]


def test_a_model_that_reads_one_half_finds_one_half(monkeypatch):
    task = Haystack(**SHORT)
    model = build(config("window"))

    def first_half(model, batch):
        answer_at, targets = batch.answer_at[:, -32:], batch.targets[:, -32:]
        said = torch.where(answer_at < 256, targets, targets + 1)
        logits = torch.nn.functional.one_hot(said, 80).float()
        return depths.Answers(logits, targets, answer_at, answer_at % 2 == 0)

    monkeypatch.setattr(depths, "answers", first_half)
    result = by_depth(model, task, 512, sequences=20, bins=4)
    assert result["accuracy_by_depth"] == [1.0, 1.0, 0.0, 0.0]
    # Facts stand at 8 .. 415 of 512: 248 places of 408 are in the first half.
    assert result["accuracy"] == pytest.approx(248 / 408, abs=0.06)
    assert result["hit_rate"] == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("attention", ["dense", "nsa-kl"])
def test_it_is_told_from_a_checkpoint(tmp_path, capsys, attention):
    run = tmp_path / f"{attention}-seed0"
    list(steps(config(attention), run))
    words = [str(run), "--length", "300", "--length", "512", "--sequences", "2"]
    assert depths.main([*words, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"{attention}-seed0" in printed and "needle map:" in printed
    maps = json.loads((tmp_path / "depths.json").read_text())
    results = maps[run.name]
    assert [r["length"] for r in results] == [300, 512]
    assert ("hit_rate" in results[0]) == (attention == "nsa-kl")
    model, task, saved = depths.trained(run / "checkpoint.safetensors")
    assert saved["steps"] == 2 and task.stages == SHORT["stages"]
    assert by_depth(model, task, 300, 2) == results[0]
    assert model.training
    assert (tmp_path / "depths.png").exists()


def test_bad_input_is_one_line(tmp_path, capsys):
    assert depths.main([str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err
    task = Haystack(**SHORT)
    model = build(config("window"))
    with pytest.raises(ValueError, match="length = 100: must lie in 256"):
        by_depth(model, task, 100, 1)
    with pytest.raises(ValueError, match="sequences = 0: must be at least 1"):
        by_depth(model, task, 300, 0)


def test_the_map_has_a_cell_for_each_length_and_depth():
    results = [
        {"length": n, "accuracy": 0.5, "accuracy_by_depth": [0.1, None, 0.9]} for n in (300, 4096)
    ]
    figure = draw_needle_maps({"dense-seed0": results})
    ax = figure.axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["300", "4k"]
    assert sorted(t.get_text() for t in ax.texts) == [".10", ".10", ".90", ".90"]
    assert spoken(262_144) == "256k"


def test_a_cell_says_1_only_for_what_rounds_to_it():
    results = [{"length": 4096, "accuracy_by_depth": [1.0, 0.9951, 0.9949, 0.0]}]
    ax = draw_needle_maps({"dense-seed0": results}).axes[0]
    assert [t.get_text() for t in ax.texts] == ["1", "1", ".99", ".00"]


def test_each_column_of_maps_names_its_lengths_once_and_every_map_its_run():
    results = [{"length": 4096, "accuracy_by_depth": [1.0, 0.5]}]
    names = ["a-seed0", "b-seed0", "c-seed0"]
    figure = draw_needle_maps(dict.fromkeys(names, results))
    figure.canvas.draw()
    assert [ax.get_title() for ax in figure.axes] == [*names, ""]
    shown = [ax.xaxis.get_tick_params()["labelbottom"] for ax in figure.axes[:3]]
    assert shown == [False, True, True]  # c stands below a, nothing below b
    assert "accuracy" in figure.get_supxlabel()


def test_a_map_of_hits_says_so():
    results = [{"length": 300, "accuracy_by_depth": [1.0, 1.0], "hit_rate_by_depth": [0.25, None]}]
    figure = draw_needle_maps({"nsa-seed0": results}, key="hit_rate")
    assert [t.get_text() for t in figure.axes[0].texts] == [".25"]
    assert "hit rate" in figure.get_supxlabel()
