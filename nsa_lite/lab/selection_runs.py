"""What two models select while they train: the recorded traces of notebook 14.

    python -m nsa_lite.lab.experiments selection_recall
    python -m nsa_lite.lab.experiments selection_text

A recording without `made` is older: it lacks its config, commit and machine.
"""

import shutil
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_lite.config import NSAConfig
from nsa_lite.lab import training
from nsa_lite.lab.checkpoint import load, weights
from nsa_lite.lab.logs import read_log
from nsa_lite.lab.runs import Run
from nsa_lite.lab.tasks import Recall
from nsa_lite.lab.text import Text
from nsa_lite.layer import Choice, Known, NSAttention, Rule
from nsa_lite.model import DecoderLM
from nsa_lite.rivals import rules
from nsa_lite.selection import choose_blocks
from nsa_lite.show.explorer import save_traces
from nsa_lite.show.explorer.sequence import TracedSequence

KEYS = ("test_accuracy", "hit_rate", "bits_per_byte")
# The text is our own source, which no model has trained on: a part of nsa_lite/checks.py.
SOURCE = Path(__file__).parents[1] / "checks.py"
FIRST_WORDS = "def require_float_tensor"
LENGTH = 640  # bytes

Sequence = tuple[Tensor, list[str], Tensor | None]  # tokens (1, T, ...), labels, answers (T,)


class Look(NamedTuple):
    """One recorded look at a model while it trains.

    kept: the steps at which we look, 0 is the untrained model, others are steps with a checkpoint
    (every 50, and the last); minutes: about what the training takes on one core; changes: to the
    task's preset;
    sequence(): what is traced; also(look, folder): what else is measured of the kept models.
    """

    task: str
    kept: tuple[int, ...]
    minutes: float
    changes: dict[str, Any]
    sequence: Callable[[], Sequence]
    also: Callable[["Look", Path], dict]

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
    """What each kept model selects in the sequence, and what else is measured of it."""
    folder = folder / "training"
    tokens, labels, answer_at = look.sequence()
    models = {f"step {step}": model_at(look, folder, step) for step in look.kept}
    last = f"step {look.kept[-1]}"
    for name, rule in OTHERS.items():
        models[f"{last}, {name}"] = choosing(models[last], rule)
    torch.manual_seed(0)  # of the random blocks
    traces = {name: model(tokens, return_traces=True)[1] for name, model in models.items()}
    about = {
        "command": about["command"],
        "torch": about["versions"]["torch"],
        "made": about["made"]["training"],
        "layers": look.config.layers,
        "batch_size": look.config.batch_size,
        "held_out": results["training"],
        **look.also(look, folder),
    }
    save_traces(path, TracedSequence(traces, labels, answer_at), about)


def recall_sequence() -> Sequence:
    """The first sequence on which the trainer evaluates, with a key and a value a position."""
    recall = Recall()
    batch = recall.held_out(recall.held_out_size)
    keys = [f"k{i}" for i in range(recall.keys)]
    values = [f"v{i}" for i in range(recall.values)]
    names = ["", "?", *keys, *values]
    labels = [f"{names[a]} {names[b]}".strip() or "." for a, b in batch.tokens[0].tolist()]
    return batch.tokens[:1], labels, batch.answer_at[0]


def text_sequence() -> Sequence:
    """A part of our own source, a byte a position."""
    text = SOURCE.read_text("utf-8")
    part = text[text.index(FIRST_WORDS) :].encode()[:LENGTH]
    return torch.tensor([list(part)]), [chr(b) for b in part], None


def nothing_else(look: Look, folder: Path) -> dict:  # noqa: ARG001
    """The hit rate of a recall says it all."""
    return {}


def brackets_of(look: Look, folder: Path) -> dict:
    """How the untrained and the trained model treat brackets."""
    untrained = bracket_hits(model_at(look, folder, 0))
    trained = bracket_hits(model_at(look, folder, look.kept[-1]))
    return {"brackets": {"untrained": untrained, "trained": trained}}


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
def bracket_hits(model: DecoderLM, passages: int = 192) -> dict[str, int | float | list[float]]:
    """How often a closing bracket selects its opening one's block, in held-out library source.

    Counted for pairs whose opening bracket lies in no forced block and outside the window, by
    layer. Beside it what random free blocks would hit, and how often the other queries of the
    stretch select the block that lies as far back: a model may just like that distance.
    """
    c = model.config.nsa
    hits = []
    elsewhere = []
    chance = []
    for seed in range(passages):
        tokens = Text().held_out(1, seed).tokens
        traces = model(tokens, return_traces=True)[1]
        for s, t in brackets("".join(map(chr, tokens[0].tolist()))):
            block = s // c.select_block_size
            own = t // c.select_block_size
            free = c.num_selected - c.num_initial - c.num_local
            legal = own + 1 - c.num_initial - c.num_local
            if t - s < c.window or not c.num_initial <= block <= own - c.num_local or legal <= free:
                continue
            hits.append([bool((trace.ids[0, :, t] == block).any()) for trace in traces])
            now = torch.arange((own - block + c.num_initial) * c.select_block_size, Text.length)
            now = now[now >= (c.num_selected + 1) * c.select_block_size]  # a choice to make
            back = now // c.select_block_size - (own - block)
            elsewhere.append(
                [
                    float((trace.ids[0, 0, now] == back[:, None]).any(1).float().mean())
                    for trace in traces
                ]
            )
            chance.append(free / legal)

    def mean(columns: list[list[float]]) -> list[float]:
        return [round(sum(x) / len(x), 4) for x in zip(*columns, strict=True)]

    return {
        "pairs": len(hits),
        "hit_rate": mean(hits),
        "same_distance": mean(elsewhere),
        "chance": round(sum(chance) / len(chance), 4),
    }


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
LOOKS = (
    Look("recall", STEPS, 9, OF_RECALL, recall_sequence, nothing_else),
    Look("text", (1200,), 10, OF_TEXT, text_sequence, brackets_of),
)
