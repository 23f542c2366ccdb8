"""A recorded look at the selection, in small: what it keeps, and what it leaves behind."""

import pytest
import torch

from nsa_lite.lab import selection_runs
from nsa_lite.lab.runs import do
from nsa_lite.show.explorer import load_traces

ABOUT = {
    "command": "a command",
    "versions": {"torch": torch.__version__},
    "made": {"training": {"config": {"lr": 1.0}, "under": []}},
}


SMALL = [  # checkpoints come every 50 steps and at the end
    selection_runs.LOOKS[0]._replace(kept=(0, 50, 60), changes={"batch_size": 2}),
    selection_runs.LOOKS[1]._replace(kept=(0, 2), changes={"batch_size": 1}),
]


@pytest.mark.parametrize("look", SMALL, ids=lambda look: look.task)
def test_a_look_keeps_its_steps_and_writes_traces_that_load(look, tmp_path, monkeypatch):
    monkeypatch.setattr(selection_runs, "bracket_hits", lambda model: {"pairs": 0})
    (run,) = selection_runs.runs(look)
    do(run, tmp_path / run.name, [])
    path = tmp_path / "traces.npz"
    results = {"training": {"step 60": {"hit_rate": 0.5}}}
    selection_runs.write_traces(look, ABOUT, results, tmp_path, path)
    sequence, about = load_traces(path)
    assert list(sequence.checkpoints) == [f"step {step}" for step in look.kept]
    assert about["command"] == "a command" and about["held_out"] == results["training"]
    assert about["made"] == {"config": {"lr": 1.0}, "under": []}
    assert ("brackets" in about) == (look.task == "text")
    tokens, labels, _ = look.sequence()
    assert sequence.length == tokens.shape[1] == len(labels)


def test_the_models_at_two_steps_differ_and_the_first_is_untrained(tmp_path):
    look = SMALL[0]
    (run,) = selection_runs.runs(look)
    do(run, tmp_path, [])
    first, middle, last = (selection_runs.model_at(look, tmp_path, step) for step in look.kept)
    untrained = selection_runs.training.build(look.config)
    weight = "embedding.weight"
    assert torch.equal(first.state_dict()[weight], untrained.state_dict()[weight])
    assert not torch.equal(middle.state_dict()[weight], first.state_dict()[weight])
    assert not torch.equal(last.state_dict()[weight], middle.state_dict()[weight])
