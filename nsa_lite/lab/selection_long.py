"""What the questions of a long haystack select: a recording of a run of long_runs.

    python -m nsa_lite.lab.experiments selection_haystack

It trains as `haystack` does, at up to 16,384 tokens, and then reads 65,536. Of so many tokens a
recording cannot hold everything; what it leaves out stands in ABOUT, which the explorer shows.
"""

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from nsa_lite.lab import long_runs, training
from nsa_lite.lab.checkpoint import load, weights
from nsa_lite.lab.evaluate import asked, asked_span
from nsa_lite.lab.haystack import Haystack, Stage
from nsa_lite.lab.runs import Run
from nsa_lite.lab.selection_runs import choosing
from nsa_lite.lab.tasks import Batch
from nsa_lite.layer import Known, NSAttention
from nsa_lite.model import Block, DecoderLM
from nsa_lite.rivals import rules
from nsa_lite.rivals.taught import Indexer, importance_by
from nsa_lite.show.explorer import save_traces
from nsa_lite.show.explorer.sequence import Kept, TracedSequence
from nsa_lite.traces import Trace

RUN = "nsa-kl-seed0"
LENGTH = 65_536
RANKS = 96  # of 8,192 blocks; three times as many as a query selects
ABOUT = (
    "A model that trained on up to 16,384 tokens reads 65,536. Of its queries the 32 that ask are "
    f"recorded, of each query's 8,192 importances the {RANKS} best, and no compressed scores. "
    "'KL indexer' chose as the model was trained to, by scores of an indexer of its own, which are "
    "the importances there; 'own scores' is the same model by Eq. 8-10, which nothing trained to "
    "choose; 'oracle' takes the blocks that dense attention weighs most."
)


def runs() -> list[Run]:
    """The one run of the experiment `haystack` that is looked at."""
    return [run for run in long_runs.laptop_runs() if run.name == RUN]


def write_traces(about: dict, results: dict[str, dict], folder: Path, path: Path) -> None:
    """What the trained model's questions select in the first held-out sequence."""
    config = next(c for c in long_runs.laptop_configs() if c.name == RUN)
    task = config.made_task()
    assert isinstance(task, Haystack)
    model = training.build(config)
    model.load_state_dict(weights(load(folder / RUN / "checkpoint.safetensors")[0]))
    batch = task.draw(Stage(LENGTH), 1, seed=0)
    count = asked_span(batch)
    with asked(model, seed=0):
        checkpoints = traces_by_rule(model, batch.tokens, count)
    sequence = sequence_of(task, batch, checkpoints, count)
    told = {
        "command": about["command"],
        "torch": about["versions"]["torch"],
        "made": about["made"][RUN],
        "depths": [d for d in results[RUN]["depths"] if d["length"] == LENGTH],
    }
    save_traces(path, sequence, told)


def sequence_of(
    task: Haystack, batch: Batch, checkpoints: dict[str, list[Trace]], count: int
) -> TracedSequence:
    """The batch's one sequence, of which the newest `count` tokens were traced."""
    length = batch.tokens.shape[1]
    kept = Kept(torch.arange(length - count, length), length, RANKS, about=ABOUT)
    answer_at = batch.answer_at[0, -count:]
    return TracedSequence(checkpoints, labels(task, batch.tokens[0]), answer_at, kept=kept)


def labels(task: Haystack, tokens: Tensor) -> list[str]:
    """A key and a value a position: "k3 v7", "k3 ?"."""
    keys = [f"k{i}" for i in range(task.keys)]
    values = [f"v{i}" for i in range(task.values)]
    names = [".", "?", *keys, *values]
    return [f"{names[a]} {names[b]}" for a, b in tokens.tolist()]


@torch.no_grad()
def traces_by_rule(model: DecoderLM, tokens: Tensor, count: int) -> dict[str, list[Trace]]:
    """The newest queries of a model of one layer, with its own choice and two others.

    The importances are the scores that chose.
    """
    known = known_of(model, tokens, count)
    (layer,) = model.attentions
    assert isinstance(layer.choose, Indexer)
    by_indexer = importance_by(known, *layer.choose.own(known))
    own = traced(choosing(model, None), tokens, count)
    oracle = traced(choosing(model, rules.by_true_mass), tokens, count)
    return {  # the model as it was trained last: it is what the explorer shows first
        "own scores": [own],
        "oracle": [replace(oracle, importance=rules.true_mass(known))],
        "KL indexer": [replace(traced(model, tokens, count), importance=by_indexer)],
    }


def known_of(model: DecoderLM, tokens: Tensor, count: int) -> Known:
    """What the rule of a model of one layer is told of the newest `count` queries."""
    (block,) = model.blocks
    layer = cast(Block, block).attention
    assert isinstance(layer, NSAttention)
    x = cast(Block, block).norm_attention(model.embedding(tokens).sum(2))
    new = layer.project(x, None, count)
    compressed = layer.compress(new.raw["compressed"]).k
    return Known(layer.config, x, new.q, new.raw["selected"].k, compressed, new.start)


def traced(model: DecoderLM, tokens: Tensor, count: int) -> Trace:
    """The trace of the newest queries of a model of one layer, without compressed scores."""
    (trace,) = model(tokens, last=count, return_traces=True)[1]
    return replace(trace, probabilities=trace.probabilities[..., :0])
