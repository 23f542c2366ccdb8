"""The runs on haystacks: what their settings promise, and that a small one records everything."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from nsa_lite.lab import border_runs, long_runs
from nsa_lite.lab.border_runs import Arm, arms
from nsa_lite.lab.coherence import kept, kept_by_layer
from nsa_lite.lab.haystack import Haystack, Stage
from nsa_lite.lab.runs import do
from nsa_lite.lab.tasks import IGNORE
from nsa_lite.lab.training import TrainConfig, build

SIZES = replace(Haystack.preset["nsa"], dim=16, heads=2, head_dim=8, value_dim=8)


@pytest.mark.parametrize(
    "arm", [Arm(4, 1), Arm(16, 4, noise=0.0), Arm(32, 2), Arm(8, select=8), Arm(8, select=24)]
)
def test_facts_stand_in_fourteen_blocks_that_a_query_may_choose_freely(arm):
    config = arm.config(0, "cpu")
    c = config.nsa
    batch = config.made_task().batch(8, seed=0)
    asked = batch.targets != IGNORE
    block = batch.answer_at[asked] // c.select_block_size
    own = asked.nonzero()[:, 1] // c.select_block_size
    assert block.min() >= c.num_initial and (block <= own - c.num_local).all()
    free = c.num_selected - c.num_initial - c.num_local
    if arm.select is None:
        assert set(block.tolist()) == set(range(1, 15))
        assert free / border_runs.BLOCKS == pytest.approx(0.21, abs=0.005)
    assert free > 0 and c.num_selected * c.select_block_size == 6 * max(16, arm.block_size)
    assert c.num_selected * c.select_block_size < batch.tokens.shape[1]  # not all is read
    assert (batch.answer_at[asked] <= asked.nonzero()[:, 1] - c.window).all()
    facts = batch.tokens[:, :, 0].unsqueeze(-1) == batch.tokens[:, None, -14:, 0]
    counts = facts[0, :-14].any(-1).view(-1)
    assert counts.sum() == 14  # each asked key stands once
    compressed = (c.block_size, c.stride)
    assert compressed == (arm.block_size, arm.block_size // 2)


def test_every_arm_has_a_name_and_trains_one_step_of_its_model():
    listed = list(arms())
    assert len({arm.name for arm in listed}) == len(listed)
    config = Arm(16, attention="nsa-own-kl-first").config(0, "cpu")
    model = build(config)
    batch = config.made_task().batch(2, 1000)
    logits, loss = model(batch.tokens, last=14, return_loss=True)
    (logits.sum() + loss).backward()
    assert loss > 0


def test_a_long_run_records_its_map_and_what_a_step_costs(tmp_path, monkeypatch):
    monkeypatch.setattr(long_runs, "LENGTHS", (256, 300))
    monkeypatch.setattr(long_runs, "TIMED", 1)
    monkeypatch.setattr(long_runs, "kept_by_layer", partial(kept_by_layer, queries=64))
    monkeypatch.setattr(long_runs, "ASKED", 600)
    sizes = dict(stages=(Stage(256, noise=0.0, batch=2),), held_out_size=2)
    config = TrainConfig.preset("haystack", "nsa-kl", nsa=SIZES, steps=2, threads=1, sizes=sizes)
    run = long_runs.long_run(config, minutes=1)
    do(run, tmp_path / "a", [])
    result = json.loads((tmp_path / "a/result.json").read_text())
    assert [r["length"] for r in result["depths"]] == [256, 300]
    assert [r["sequences"] for r in result["depths"]] == [2, 2]
    assert all(0 <= r["hit_rate"] <= 1 for r in result["depths"])
    assert len(result["kept"]) == 1  # layer
    assert "cost" not in result
    cost = long_runs.cost_of_step(config)
    assert cost["tokens_a_second"] == pytest.approx(512 / (cost["milliseconds"] / 1000), rel=0.01)
    assert result["evaluations"][-1]["step"] == 2


def test_the_gpus_runs_are_of_the_papers_blocks_and_every_position_asks():
    config = long_runs.gpu_config("nsa", 0)
    c = config.nsa
    paper = (c.block_size, c.stride, c.select_block_size, c.num_selected, c.window)
    assert paper == (32, 16, 64, 16, 512)
    assert config.all_queries and config.layers == 2 and config.autocast == "bfloat16"
    task = config.made_task()
    assert task.longest == 65_536
    batch = replace(task, device="cpu").draw(task.stages[-1], 1, 0)
    asked = batch.answer_at >= 0
    own = asked.nonzero()[:, 1] // c.select_block_size
    assert torch.cuda.is_available() or config.device == "cuda"
    # Few answers lie where a query reads whatever its scores say.
    forced = (batch.answer_at[asked] < 64) | (batch.answer_at[asked] // 64 > own - 2)
    assert forced.float().mean() < 0.05


def test_coherence_of_the_newest_queries_is_that_of_a_whole_trace():
    sizes = dict(stages=(Stage(600, noise=1.0),), held_out_size=1)
    config = TrainConfig.preset("haystack", "nsa-kl", nsa=SIZES, threads=1, sizes=sizes, layers=2)
    model = build(config).double()
    batch = config.made_task().held_out(1)
    given = kept_by_layer(model, batch, queries=100)
    with torch.no_grad():
        _, traces = model.eval()(batch.tokens, return_traces=True)
    whole = [kept(t.ids[:, :, 500:], 8, start=500) for t in traces]
    assert given == pytest.approx(whole, abs=1e-4)
    dense = build(TrainConfig.preset("haystack", "dense", nsa=SIZES, threads=1, sizes=sizes))
    assert kept_by_layer(dense, batch, queries=100) == []
