"""What two models select while they train: the recorded traces of notebook 14.

    python -m nsa_lite.lab.experiments selection_recall
    python -m nsa_lite.lab.experiments selection_text

About 5 and 30 minutes on one core.
"""

import shutil
from collections.abc import Generator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nsa_lite.lab import training
from nsa_lite.lab.checkpoint import load, weights
from nsa_lite.lab.logs import read_log
from nsa_lite.lab.runs import Run
from nsa_lite.lab.tasks import Recall
from nsa_lite.lab.text import Text
from nsa_lite.model import DecoderLM
from nsa_lite.show.explorer import save_traces
from nsa_lite.show.explorer.sequence import TracedSequence

KEPT = {  # steps at which we look; 0 is the untrained model
    "recall": (0, 50, 100, 150, 200, 300, 400, 600, 800, 1100, 1500),
    "text": (700,),
}
# To the trainer's own settings.
CHANGES: dict[str, dict[str, int]] = {"recall": {}, "text": {"batch_size": 2}}
# The text is our own source, which no model has trained on: a part of nsa_lite/checks.py.
SOURCE = Path(__file__).parents[1] / "checks.py"
FIRST_WORDS = "def require_float_tensor"
LENGTH = 640  # bytes
KEYS = ("test_accuracy", "hit_rate", "bits_per_byte")


def config_of(task: str) -> training.TrainConfig:
    """The training that is looked at."""
    return training.TrainConfig.preset(
        task, "nsa", threads=1, steps=KEPT[task][-1], **CHANGES[task]
    )


def runs(task: str) -> list[Run]:
    """One training that keeps its weights at each step of KEPT; its result is what they score."""
    return [Run("training", KEPT[task][-1], partial(train_and_keep, task))]


def train_and_keep(task: str, folder: Path) -> Generator[dict, None, None]:
    """Train, or go on, and copy the checkpoint at each step of KEPT."""
    for record in training.steps(config_of(task), folder, resume=True):
        if record["step"] in KEPT[task]:
            shutil.copy(folder / "checkpoint.safetensors", weights_file(folder, record["step"]))
        yield record
    kept = [record for record in read_log(folder) if record["step"] in KEPT[task]]
    yield {
        f"step {record['step']}": {k: v for k, v in record.items() if k in KEYS} for record in kept
    }


def weights_file(folder: Path, step: int) -> Path:
    """Where the weights after `step` steps lie."""
    return folder / f"step{step}.safetensors"


def model_at(task: str, folder: Path, step: int) -> DecoderLM:
    """The model as it was after `step` steps."""
    model = training.build(config_of(task))
    if step:
        model.load_state_dict(weights(load(weights_file(folder, step))[0]))
    return model


def sequence_of(task: str) -> tuple[Tensor, list[str], Tensor | None]:
    """The tokens to trace (1, T, ...), their labels, and where the answers stand."""
    if task == "text":
        text = SOURCE.read_text("utf-8")
        part = text[text.index(FIRST_WORDS) :].encode()[:LENGTH]
        return torch.tensor([list(part)]), [chr(b) for b in part], None
    recall = Recall()
    batch = recall.held_out(64)  # as the trainer evaluates
    keys = [f"k{i}" for i in range(recall.keys)]
    values = [f"v{i}" for i in range(recall.values)]
    names = ["", "?", *keys, *values]
    labels = [f"{names[a]} {names[b]}".strip() or "." for a, b in batch.tokens[0].tolist()]
    return batch.tokens[:1], labels, batch.answer_at[0]


@torch.no_grad()
def write_traces(task: str, about: dict, results: dict, folder: Path, path: Path) -> None:
    """What each kept model selects in the sequence, and for the text how it treats brackets."""
    folder = folder / "training"
    tokens, labels, answer_at = sequence_of(task)
    traces = {
        f"step {step}": model_at(task, folder, step)(tokens, return_traces=True)[1]
        for step in KEPT[task]
    }
    config = config_of(task)
    about = {
        "command": about["command"],
        "torch": about["versions"]["torch"],
        "layers": config.layers,
        "batch_size": config.batch_size,
        "held_out": results["training"],
    }
    if task == "text":
        about["brackets"] = {
            "untrained": bracket_hits(model_at(task, folder, 0)),
            "trained": bracket_hits(model_at(task, folder, KEPT[task][-1])),
        }
    save_traces(path, TracedSequence(traces, labels, answer_at), about)


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
