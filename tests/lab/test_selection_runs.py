"""A recorded look at the selection, in small: what it keeps, and what it leaves behind."""

import math

import pytest
import torch

from nsa_lite.lab import long_runs, selection_long, selection_runs, training
from nsa_lite.lab.checkpoint import CheckpointError
from nsa_lite.lab.haystack import Stage
from nsa_lite.lab.runs import do
from nsa_lite.show.explorer import load_traces, save_traces
from nsa_lite.show.explorer.sequence import Place

ABOUT = {
    "command": "a command",
    "versions": {"torch": torch.__version__},
    "made": {"training": {"config": {"lr": 1.0}, "under": []}},
}


RECALL = selection_runs.RECALL._replace(  # checkpoints come every 50 steps and at the end
    kept=(0, 50, 60), shown=(0, 60), changes={**selection_runs.OF_RECALL, "batch_size": 2}
)
TEXT = selection_runs.TEXT._replace(kept=(2,), changes={**selection_runs.OF_TEXT, "batch_size": 1})
RESULTS = {"training": {"step 60": {"hit_rate": 0.5}}}


def test_a_look_at_recall_keeps_its_steps_and_writes_traces_that_load(tmp_path):
    (run,) = selection_runs.runs(RECALL)
    do(run, tmp_path / run.name, [])
    path = tmp_path / "traces.npz"
    selection_runs.write_traces(RECALL, ABOUT, RESULTS, tmp_path, path)
    sequence, about = load_traces(path)
    others = ["step 60, random", "step 60, oracle", "step 60, dense"]
    assert list(sequence.checkpoints) == [*others, "step 0", "step 60"]
    assert about["command"] == "a command" and about["held_out"] == RESULTS["training"]
    assert about["made"] == {"config": {"lr": 1.0}, "under": []}
    assert len(sequence.tokens) == sequence.length == 104 and sequence.groups == 2
    first = sequence.checkpoints["step 60"][0]
    dense = sequence.checkpoints["step 60, dense"][0]
    assert first.importance.equal(dense.importance)  # the same weights
    assert sequence.missed(Place(2, 0, 0, 6), 103) == 0
    assert dense.ids[0, 0, 103].tolist() == list(range(13))
    oracle = sequence.checkpoints["step 60, oracle"][0]
    assert not oracle.ids.equal(first.ids)


def test_the_models_at_two_steps_differ_and_the_first_is_untrained(tmp_path):
    (run,) = selection_runs.runs(RECALL)
    do(run, tmp_path, [])
    steps = RECALL.kept
    first, middle, last = (selection_runs.model_at(RECALL, tmp_path, step) for step in steps)
    untrained = selection_runs.training.build(RECALL.config)
    weight = "embedding.weight"
    assert torch.equal(first.state_dict()[weight], untrained.state_dict()[weight])
    assert not torch.equal(middle.state_dict()[weight], first.state_dict()[weight])
    assert not torch.equal(last.state_dict()[weight], middle.state_dict()[weight])


def test_a_text_model_is_written_in_16_bits_and_loads_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(selection_runs, "bracket_hits", lambda model, task: {"pairs": 0})  # noqa: ARG005
    (run,) = selection_runs.runs(TEXT)
    do(run, tmp_path / run.name, [])
    path = tmp_path / "text.safetensors"
    selection_runs.write_model(TEXT, ABOUT, RESULTS, tmp_path, path)
    model, about = selection_runs.text_model(path)
    assert about["brackets"] == {"untrained": {"pairs": 0}, "trained": {"pairs": 0}}
    trained = selection_runs.model_at(TEXT, tmp_path / run.name, 2)
    for name, weight in trained.state_dict().items():
        assert model.state_dict()[name].equal(weight.half().float())
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="text.safetensors"):
        selection_runs.text_model(path)


def test_the_shipped_text_model_is_small_and_has_two_layers_of_two_groups():
    model, about = selection_runs.text_model()
    assert selection_runs.TEXT_MODEL.stat().st_size < 800_000
    assert len(model.attentions) == model.config.nsa.kv_heads == 2
    assert about["command"] == "python -m nsa_lite.lab.experiments selection_text"
    text = selection_runs.source_text(384)
    tokens = torch.tensor([list(text.encode())])
    with torch.no_grad():
        logits = model(tokens)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    assert float(loss) / math.log(2) < 3  # bits a byte; of a bigram model 3.6


def test_brackets_are_counted_where_there_is_a_choice():
    task = selection_runs.Text(length=384)
    torch.manual_seed(0)
    counted = selection_runs.bracket_hits(selection_runs.training.build(TEXT.config), task, 8)
    assert counted["pairs"] > 3
    assert len(counted["hit_rate"]) == len(counted["same_distance"]) == 4  # layers times groups
    assert 3 / 21 < counted["chance"] < 3 / 4  # 3 free places for 4 to 21 blocks


def test_a_long_haystack_is_recorded_with_its_questions_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(selection_long, "LENGTH", 1024)
    monkeypatch.setattr(selection_long, "RANKS", 40)
    config = next(c for c in long_runs.laptop_configs() if c.name == selection_long.RUN)
    model = training.build(config)
    task = config.made_task()
    batch = task.draw(Stage(1024), 1, seed=0)
    model.eval()
    checkpoints = selection_long.traces_by_rule(model, batch.tokens, 32)
    sequence = selection_long.sequence_of(task, batch, checkpoints, 32)
    assert list(checkpoints) == ["own scores", "oracle", "KL indexer"]
    assert sequence.by_score == [[True]] * 3  # each by the scores that are recorded
    assert sequence.positions.tolist() == list(range(992, 1024)) and sequence.ranks == 40
    assert bool((sequence.answer_at >= 0).all())
    save_traces(tmp_path / "hay.npz", sequence)
    again, _ = load_traces(tmp_path / "hay.npz")
    for k in range(3):
        place = Place(k, 0, 0, 32)
        for t in (992, 1023):
            assert again.selected(place, t) == sequence.selected(place, t)
    (whole,) = model(batch.tokens, return_traces=True)[1]
    (some,) = checkpoints["KL indexer"]
    assert some.ids.equal(whole.ids[:, :, -32:])
