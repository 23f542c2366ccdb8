"""What notebook 14 looks at: a model while it trains, and a trained one for the reader's own text.

python -m nsa_lite.lab.experiments selection_recall     traces
python -m nsa_lite.lab.experiments selection_text       weights, which text_model() loads
"""

import shutil
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_lite.config import NSAConfig
from nsa_lite.lab import training
from nsa_lite.lab.checkpoint import load, save_weights, weights
from nsa_lite.lab.logs import read_log
from nsa_lite.lab.runs import RECORDED, Run
from nsa_lite.lab.tasks import Recall, Task
from nsa_lite.lab.text import Text
from nsa_lite.layer import Choice, Known, NSAttention, Rule
from nsa_lite.model import DecoderLM, ModelConfig
from nsa_lite.rivals import rules
from nsa_lite.selection import choose_blocks
from nsa_lite.show.explorer import save_traces
from nsa_lite.show.explorer.sequence import TracedSequence

KEYS = ("test_accuracy", "hit_rate", "bits_per_byte")
TEXT_MODEL = RECORDED / "text.safetensors"
# A text that no model has trained on: a part of our own source, nsa_lite/checks.py.
SOURCE = Path(__file__).parents[1] / "checks.py"
FIRST_WORDS = "def require_float_tensor"

Sequence = tuple[Tensor, list[str], Tensor | None]  # tokens (1, T, ...), labels, answers (T,)


class Look(NamedTuple):
    """One training that is looked at.

    kept: the steps at which we look, 0 is the untrained model, others are steps with a checkpoint
    (every 50, and the last); shown: those of them whose traces are recorded; minutes: about what
    the training takes on one core; changes: to the task's preset.
    """

    task: str
    kept: tuple[int, ...]
    shown: tuple[int, ...]
    minutes: float
    changes: dict[str, Any]

    @property
    def config(self) -> training.TrainConfig:
        """The training that is looked at."""
        fields = {"steps": self.kept[-1], "threads": 1, **self.changes}
        return training.TrainConfig.preset(self.task, "nsa", **fields)


def runs(look: Look) -> list[Run]:
    """One training that keeps its weights at each step of `kept`; its result is what they score."""
    config = {**look.config.everything(), "kept": list(look.kept)}
    work = partial(train_and_keep, look)
    return [Run("training", look.kept[-1], work, config, look.minutes)]


def train_and_keep(look: Look, folder: Path) -> Generator[dict, None, None]:
    """Train, or go on, and copy the checkpoint at each step of `kept`."""
    for record in training.steps(look.config, folder, resume=True):
        if record["step"] in look.kept:
            shutil.copy(folder / "checkpoint.safetensors", weights_file(folder, record["step"]))
        yield record
    kept = [record for record in read_log(folder) if record["step"] in look.kept]
    yield {f"step {r['step']}": {k: v for k, v in r.items() if k in KEYS} for r in kept}


def weights_file(folder: Path, step: int) -> Path:
    """Where the weights after `step` steps lie."""
    return folder / f"step{step}.safetensors"


def model_at(look: Look, folder: Path, step: int) -> DecoderLM:
    """The model as it was after `step` steps."""
    model = training.build(look.config)
    if step:
        model.load_state_dict(weights(load(weights_file(folder, step))[0]))
    return model


def choosing(model: DecoderLM, rule: Rule | None) -> DecoderLM:
    """The same weights, and another rule that chooses the blocks; None is the paper's own.

    Weights of the model's own rule are left out.
    """
    other = DecoderLM(model.config, partial(NSAttention, choose=rule))
    kept = {k: v for k, v in model.state_dict().items() if ".choose." not in k}
    other.load_state_dict(kept)
    return other.eval()


@torch.no_grad()
def write_traces(look: Look, about: dict, results: dict, folder: Path, path: Path) -> None:
    """What a model of recall selects while it trains, and before that, by other rules at last."""
    tokens, labels, answer_at = recall_sequence()
    steps = {f"step {step}": model_at(look, folder / "training", step) for step in look.shown}
    last = f"step {look.shown[-1]}"
    others = {f"{last}, {name}": choosing(steps[last], rule) for name, rule in OTHERS.items()}
    models = others | steps  # the trained model last: it is what the explorer shows first
    torch.manual_seed(0)  # of the random blocks
    traces = {name: model(tokens, return_traces=True)[1] for name, model in models.items()}
    sequence = TracedSequence(traces, labels, answer_at)
    sequence.about = RECALL_ABOUT
    save_traces(path, sequence, origin_of(look, about, results))


def origin_of(look: Look, about: dict, results: dict) -> dict:
    """How a training was made, and what it scored at the steps that were kept."""
    return {
        "command": about["command"],
        "torch": about["versions"]["torch"],
        "made": about["made"]["training"],
        "layers": look.config.layers,
        "batch_size": look.config.batch_size,
        "held_out": results["training"],
    }


def write_model(look: Look, about: dict, results: dict, folder: Path, path: Path) -> None:
    """The trained weights, and how often the model as it is shipped looks back to brackets."""
    save_weights(path, model_at(look, folder / "training", look.kept[-1]), {})
    model = training.build(look.config)
    brackets = {"untrained": bracket_hits(model, look.config.made_task())}
    model.load_state_dict(weights(load(path)[0]))
    brackets["trained"] = bracket_hits(model, look.config.made_task())
    # The texts that notebook 14 reads are kept too: this file and Python's library change.
    told = origin_of(look, about, results) | {
        "brackets": brackets,
        "passage": source_text(look.config.made_task().longest),
        "held_out_texts": held_out_texts(look.config.made_task()),
    }
    save_weights(path, model, {"config": look.config.everything(), "about": told})


def text_model(path: Path = TEXT_MODEL) -> tuple[DecoderLM, dict]:
    """The byte-level model of Python source that the course ships, and how it was made.

    Errors: CheckpointError for a file that is damaged, or that something else wrote.
    """
    tensors, state = load(path)
    saved = state["config"]
    sizes = ModelConfig(Text().vocab_size, saved["layers"], NSAConfig(**saved["nsa"]))
    model = DecoderLM(sizes)
    model.load_state_dict(weights(tensors))
    return model.eval(), state["about"]


def recall_sequence() -> Sequence:
    """The first sequence on which the trainer evaluates, with a key and a value a position."""
    recall = Recall()
    batch = recall.held_out(recall.held_out_size)
    keys = [f"k{i}" for i in range(recall.keys)]
    values = [f"v{i}" for i in range(recall.values)]
    names = ["", "?", *keys, *values]
    labels = [f"{names[a]} {names[b]}".strip() or "." for a, b in batch.tokens[0].tolist()]
    return batch.tokens[:1], labels, batch.answer_at[0]


def source_text(length: int) -> str:
    """A part of our own source, so many bytes long."""
    text = SOURCE.read_text("utf-8")
    return text[text.index(FIRST_WORDS) :][:length]


def held_out_texts(task: Task, count: int = 16) -> list[str]:
    """Stretches of held-out library source, a character a byte."""
    return ["".join(map(chr, row)) for row in task.held_out(count).tokens.tolist()]


def brackets(text: str) -> list[tuple[int, int]]:
    """(opening, closing) position of each pair of brackets."""
    open_ones = []
    pairs = []
    for t, letter in enumerate(text):
        if letter in "([{":
            open_ones.append(t)
        elif letter in ")]}" and open_ones:
            pairs.append((open_ones.pop(), t))
    return pairs


@torch.no_grad()
def bracket_hits(model: DecoderLM, task: Task, passages: int = 256) -> dict[str, Any]:
    """How often a closing bracket selects its opening one's block, in held-out library source.

    Counted for pairs whose opening bracket lies in no forced block and outside the window, for
    each layer and group by itself. Beside it what random free blocks would hit, and how often the
    other queries of the stretch select the block that lies as far back: a model may just like that
    distance.
    """
    c = model.config.nsa
    hits = []
    elsewhere = []
    chance = []
    for seed in range(passages):
        tokens = task.held_out(1, seed).tokens
        ids = [x for t in model(tokens, return_traces=True)[1] for x in t.ids[0]]  # each (T, n)
        for s, t in brackets("".join(map(chr, tokens[0].tolist()))):
            block = s // c.select_block_size
            own = t // c.select_block_size
            free = c.num_selected - c.num_initial - c.num_local
            legal = own + 1 - c.num_initial - c.num_local
            if t - s < c.window or not c.num_initial <= block <= own - c.num_local or legal <= free:
                continue
            hits.append([bool((x[t] == block).any()) for x in ids])
            now = choosing_queries(tokens.shape[1], own - block, c)
            back = now // c.select_block_size - (own - block)
            elsewhere.append([float((x[now] == back[:, None]).any(1).float().mean()) for x in ids])
            chance.append(free / legal)
    return {
        "pairs": len(hits),
        "hit_rate": means(hits),
        "same_distance": means(elsewhere),
        "chance": round(sum(chance) / len(chance), 4),
    }


def choosing_queries(length: int, distance: int, c: NSAConfig) -> Tensor:
    """The queries that have a choice, and to whom the block so far back is free."""
    first = max(distance + c.num_initial, c.num_selected + 1)
    return torch.arange(first * c.select_block_size, length)


def means(rows: list[list[float]]) -> list[float]:
    """The mean of each column."""
    return [round(sum(x) / len(x), 4) for x in zip(*rows, strict=True)]


def every_block(known: Known) -> Choice:
    """All blocks that have begun: the selected branch is then dense attention."""
    count = rules.num_blocks(known)
    score = known.q.new_zeros(*known.k.shape[:2], known.q.shape[2], count)
    sizes = {**known.config.choice_sizes, "num_selected": count}
    return Choice(choose_blocks(score, start=known.start, **sizes))


# What the trained weights would read by another rule.
OTHERS = {"random": rules.at_random, "oracle": rules.by_true_mass, "dense": every_block}
STEPS = (0, 50, 100, 150, 200, 300, 400, 600, 800, 1100, 1500)
# Two layers of two groups each, so that both can be compared; the preset has one of each.
OF_RECALL = {
    "nsa": replace(Recall.preset["nsa"], kv_heads=2),
    "layers": 2,
    "batch_size": 16,
}
OF_TEXT = {
    "nsa": NSAConfig.small(
        dim=96, head_dim=24, value_dim=24, select_block_size=16, num_selected=6, window=32
    ),
    "layers": 2,
    "batch_size": 4,
    "sizes": {"length": 384},
}
RECALL = Look("recall", STEPS, (0, 100, 200, 300, 600, 1500), 9, OF_RECALL)
TEXT = Look("text", (1200,), (), 10, OF_TEXT)
RECALL_ABOUT = (
    "Two layers of two groups while they learn recall, at six of their 1,500 steps. 'Random', "
    "'oracle' and 'dense' are the weights of step 1500 with blocks chosen at random, by what dense "
    "attention weighs, and all of them; nothing trained to be read so."
)
