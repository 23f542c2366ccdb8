"""The runs on haystacks: what their settings promise, and that a small one records everything."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from nsa_lite.lab import long_runs
from nsa_lite.lab.border_runs import Arm, arms
from nsa_lite.lab.coherence import kept, kept_by_layer
from nsa_lite.lab.haystack import Haystack, Stage
from nsa_lite.lab.runs import do
from nsa_lite.lab.tasks import IGNORE
from nsa_lite.lab.training import TrainConfig, build

SIZES = replace(Haystack.preset["nsa"], dim=16, heads=2, head_dim=8, value_dim=8)


ARMS = [Arm(4, 1), Arm(16, 4, noise=0.0), Arm(32, 8), Arm(select=8), Arm(select=32), Arm(facts=4)]


@pytest.mark.parametrize("arm", ARMS)
def test_facts_stand_where_a_query_must_choose_them(arm):
    config = arm.config(0, "cpu")
    c = config.nsa
    batch = config.made_task().batch(8, seed=0)
    asked = batch.targets != IGNORE
    first = batch.answer_at[asked]
    last = first + arm.span - 1
    t = asked.nonzero()[:, 1]
    size = c.select_block_size
    assert first.min() >= c.num_initial * size
    assert (last // size <= t // size - c.num_local).all()
    assert (last <= t - c.window).all()
    free = c.num_selected - c.num_initial - c.num_local
    legal = 1024 / size - c.num_initial - c.num_local
    chance = {
        8: 29 / 125,
        16: 13 / 61,
        32: 5 / 29,
    }  # by hand, of 1,024 tokens and 256 that are read
    assert free / legal == pytest.approx(chance[size])
    assert (c.block_size, c.stride) == (arm.block_size, arm.block_size // 2)


@pytest.mark.parametrize("arm", ARMS)
def test_a_fact_takes_its_span_and_stands_nowhere_else(arm):
    batch = arm.config(0, "cpu").made_task().batch(4, seed=1)
    keys = batch.tokens[:, :-16, 0]
    for row, asked, at in zip(
        keys, batch.tokens[:, -16:, 0], batch.answer_at[:, -16:], strict=True
    ):
        for key, first in zip(asked.tolist(), at.tolist(), strict=True):
            places = (row == key).nonzero().flatten().tolist()
            assert places == list(range(first, first + arm.span))


def test_the_first_stage_of_the_border_is_selected_whole_and_has_no_noise():
    config = Arm().config(0, "cpu")
    c = config.nsa
    whole, long = config.made_task().stages
    assert whole.length == c.num_selected * c.select_block_size == 256
    assert (whole.noise, long.noise, long.length) == (0.0, 1.0, 1024)
    assert [s.length for s in Arm(starts_whole=False).config(0, "cpu").made_task().stages] == [1024]


def test_every_arm_has_a_name_and_trains_one_step_of_its_model():
    listed = list(arms())
    assert len({arm.name for arm in listed}) == len(listed)
    config = Arm(16, attention="nsa-own-kl-first").config(0, "cpu")
    model = build(config)
    batch = config.made_task().batch(2, 1000)
    logits, loss = model(batch.tokens, last=16, return_loss=True)
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


def test_short_needles_lie_where_only_a_choice_or_a_summary_can_read_them():
    config = long_runs.short_config("nsa", 0)
    c = config.nsa
    task = replace(config.made_task(), device="cpu")
    lengths = [stage.length for stage in task.stages]
    assert lengths == [1024 << i for i in range(7)]
    assert lengths[0] == c.num_selected * c.select_block_size  # there all blocks are chosen
    assert long_runs.short_config("nsa", 0, first=4096).made_task().stages[0].length == 4096
    assert task.span == c.block_size // 8
    assert config.steps == 1500
    for number, stage in enumerate(task.stages[:4]):
        batch = task.draw(stage, 2, seed=number)
        asked = batch.answer_at >= 0
        answer = batch.answer_at[asked]
        query = asked.nonzero()[:, 1]
        assert len(query) == 2 * task.questions
        assert (answer >= c.select_block_size).all()  # not in the initial block
        assert (answer + task.span - 1 <= query - c.window).all()  # nor in the window


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
