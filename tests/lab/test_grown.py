"""A run whose blocks grow: what it keeps, what is new, and that it survives an interruption."""

import json
from dataclasses import replace

import pytest
import torch

from nsa_lite.lab import runs
from nsa_lite.lab.border_runs import Arm, run
from nsa_lite.lab.checkpoint import load
from nsa_lite.lab.grown import grown_run
from nsa_lite.lab.logs import read_log
from nsa_lite.lab.training import TrainConfig, build

SMALL = replace(
    TrainConfig.preset("recall", "nsa", steps=6, batch_size=2, threads=1),
    nsa=replace(TrainConfig.preset("recall", "nsa").nsa, block_size=4, stride=4),
)
LARGE = replace(SMALL, nsa=replace(SMALL.nsa, block_size=8, stride=4))
AT = 4


@pytest.fixture
def run_of_two():
    return grown_run(SMALL, LARGE, AT, "grown", minutes=1)


def test_all_but_phi_goes_on_and_phi_is_a_new_runs(run_of_two, tmp_path):
    work = run_of_two.work(tmp_path)
    for record in work:
        if record["step"] == AT + 1:
            break
    work.close()
    before, state = load(tmp_path / "small" / "checkpoint.safetensors")
    assert (state["step"], state["config"]) == (AT, as_json(SMALL))
    new = {f"model.{name}": t for name, t in build(LARGE).state_dict().items()}
    of_phi = {name for name in new if new[name].shape != before[name].shape}
    assert of_phi and all("phi_" in name for name in of_phi)
    after, state = load(tmp_path / "checkpoint.safetensors")
    assert (state["step"], state["config"]) == (AT + 1, as_json(LARGE))
    for name in new:  # one step moves a weight by about the learning rate
        begun = new[name] if name in of_phi else before[name]
        torch.testing.assert_close(after[name], begun, rtol=0, atol=5 * LARGE.lr)
    steps = {float(t) for name, t in after.items() if name.endswith(".step")}
    assert steps == {1.0, AT + 1.0}  # AdamW knows the kept ones longer


def test_its_steps_are_those_of_one_run(run_of_two, tmp_path):
    result = run_of_two.work(tmp_path)
    *_, last = result
    both = read_log(tmp_path / "small") + read_log(tmp_path)
    assert [record["step"] for record in both] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in last["evaluations"]] == [6]


def test_interrupted_anywhere_it_ends_alike(run_of_two, tmp_path):
    whole = weights_after(run_of_two, tmp_path / "whole")
    for broken_off in (2, AT, AT + 1):
        folder = tmp_path / str(broken_off)
        work = run_of_two.work(folder)
        while next(work)["step"] < broken_off:
            pass
        work.close()
        for name, t in weights_after(run_of_two, folder).items():
            assert torch.equal(t, whole[name]), (broken_off, name)


def test_a_record_names_both_configs(run_of_two, tmp_path):
    runs.do(run_of_two, tmp_path / "grown", [])
    about = json.loads((tmp_path / "grown" / "about.json").read_text())
    assert about["config"]["first"]["nsa"]["block_size"] == 4
    assert about["config"]["then"]["nsa"]["block_size"] == 8
    other = grown_run(SMALL, LARGE, AT + 1, "grown", minutes=1)
    assert "at = 4, asked for 5" in runs.stale(other, tmp_path / "grown")


def test_the_borders_growing_arms_have_one_curriculum():
    config = run(Arm(16, first_size=4), 0, "cpu").config
    assert config["first"]["curriculum"] == config["then"]["curriculum"]
    assert (config["first"]["nsa"]["block_size"], config["then"]["nsa"]["block_size"]) == (4, 16)
    assert config["first"]["steps"] == config["then"]["steps"] == 2 * config["at"]


def weights_after(made, folder):
    for _ in made.work(folder):
        pass
    tensors, _ = load(folder / "checkpoint.safetensors")
    return {name: t for name, t in tensors.items() if name.startswith("model.")}


def as_json(config):
    return json.loads(json.dumps(config.everything()))
