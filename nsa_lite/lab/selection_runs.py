"""Record what two models select while they train: the data of notebook 14.

    python notebooks/recorded/record_selection.py recall
    python notebooks/recorded/record_selection.py text

About 5 and 30 minutes on one core. Weights go to runs/selection and are used again if they are
there; the traces go beside this file, as selection_recall.npz and selection_text.npz.
"""

import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from nsa_lite.lab import train
from nsa_lite.lab.checkpoint import load, weights
from nsa_lite.lab.tasks import Recall
from nsa_lite.lab.text import Text
from nsa_lite.model import DecoderLM
from nsa_lite.show.explorer import save_traces
from nsa_lite.show.explorer.sequence import TracedSequence

HERE = Path(__file__).parent
RUNS = Path("runs/selection")
KEPT = {  # steps at which we look; 0 is the untrained model
    "recall": (0, 50, 100, 150, 200, 300, 400, 600, 800, 1100, 1500),
    "text": (700,),
}
CHANGES = {"recall": {}, "text": {"batch_size": 2}}  # to the trainer's own settings
# The text is our own source, which no model has trained on: a part of nsa_lite/checks.py.
TEXT = (HERE.parents[1] / "nsa_lite/checks.py", "def require_float_tensor", 640)


def train_and_keep(config: train.TrainConfig) -> dict[int, dict]:
    """Train, or go on, and copy the checkpoint at each step of KEPT; the held-out results there."""
    directory, results = RUNS / config.task, {}
    for record in train.steps(config, directory, resume=True):
        if "test_loss" in record:
            print(record, flush=True)
            if (step := record["step"]) in KEPT[config.task]:
                shutil.copy(directory / "checkpoint.safetensors", weights_file(config, step))
    for record in train.read_log(directory):
        if record["step"] in KEPT[config.task]:
            results[record["step"]] = {
                k: v
                for k, v in record.items()
                if k in ("test_accuracy", "hit_rate", "bits_per_byte")
            }
    return results


def weights_file(config: train.TrainConfig, step: int) -> Path:
    return RUNS / config.task / f"step{step}.safetensors"


def model_at(config: train.TrainConfig, step: int) -> DecoderLM:
    """The model as it was after `step` steps."""
    model = train.build(config)
    if step:
        model.load_state_dict(weights(load(weights_file(config, step))[0]))
    return model


def sequence_of(task: str) -> tuple[Tensor, list[str], Tensor | None]:
    """The tokens to trace (1, T, ...), their labels, and where the answers stand."""
    if task == "text":
        path, first_words, length = TEXT
        text = path.read_text("utf-8")
        part = text[text.index(first_words) :].encode()[:length]
        return torch.tensor([list(part)]), [chr(b) for b in part], None
    batch, recall = Recall().batch(64, seed=0), Recall()  # the held-out batch of the trainer
    names = [
        "",
        "?",
        *(f"k{i}" for i in range(recall.keys)),
        *(f"v{i}" for i in range(recall.values)),
    ]
    labels = [f"{names[a]} {names[b]}".strip() or "." for a, b in batch.tokens[0].tolist()]
    return batch.tokens[:1], labels, batch.answer_at[0]


def brackets(text: str) -> list[tuple[int, int]]:
    """(opening, closing) position of each pair of brackets."""
    open_ones, pairs = [], []
    for t, letter in enumerate(text):
        if letter in "([{":
            open_ones.append(t)
        elif letter in ")]}" and open_ones:
            pairs.append((open_ones.pop(), t))
    return pairs


@torch.no_grad()
def bracket_hits(model: DecoderLM, passages: int = 192) -> dict[str, list]:
    """How often a closing bracket selects its opening one's block, in held-out library source.

    Counted for pairs whose opening bracket lies in no forced block and outside the window, by
    layer. Beside it what random free blocks would hit, and how often the other queries of the
    stretch select the block that lies as far back: a model may just like that distance.
    """
    c, hits, elsewhere, chance = model.config.nsa, [], [], []
    for seed in range(passages):
        tokens = Text().batch(1, seed, split="validation").tokens
        traces = model(tokens, return_traces=True)[1]
        for s, t in brackets("".join(map(chr, tokens[0].tolist()))):
            block, own = s // c.select_block_size, t // c.select_block_size
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


def main(task: str) -> None:
    steps = KEPT[task]
    config = train.TrainConfig.preset(task, "nsa", threads=1, steps=steps[-1], **CHANGES[task])
    results = train_and_keep(config)
    tokens, labels, answer_at = sequence_of(task)
    with torch.no_grad():
        traces = {
            f"step {step}": model_at(config, step)(tokens, return_traces=True)[1] for step in steps
        }
    about = {
        "command": f"python notebooks/recorded/record_selection.py {task}",
        "torch": torch.__version__,
        "layers": config.layers,
        "batch_size": config.batch_size,
        "held_out": {f"step {step}": result for step, result in results.items()},
    }
    if task == "text":
        about["brackets"] = {
            name: bracket_hits(model_at(config, step))
            for name, step in {"untrained": 0, "trained": steps[-1]}.items()
        }
    save_traces(HERE / f"selection_{task}.npz", TracedSequence(traces, labels, answer_at), about)


if __name__ == "__main__":
    main(sys.argv[1])
