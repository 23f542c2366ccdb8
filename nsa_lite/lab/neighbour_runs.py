"""The recorded runs of notebook 15: train dense and NSA models, then sweep the budgets.

python -m nsa_lite.lab.experiments neighbours
"""

from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_lite import cost
from nsa_lite.lab import training
from nsa_lite.lab.checkpoint import load, require_config, weights
from nsa_lite.lab.runs import Run, training_run
from nsa_lite.lab.tasks import Batch, Task
from nsa_lite.lab.training import TrainConfig
from nsa_lite.model import DecoderLM
from nsa_lite.rivals.budgets import (
    NEIGHBOURS,
    at_budget,
    kept_by_nsa,
    read_by_group,
    read_by_head,
    reading,
    with_blocks,
)


class Sweep(NamedTuple):
    """One task's sweep: trained with `changes` to its preset, read on `held_out` sequences.

    budgets in tokens, pages of `page` tokens, shares and `samples` of SampleAttention, the n of NSA
    (`blocks`), and the sizes of an NSA that reads less than dense attention does (`thin`).
    minutes: about what one of its trainings takes on one core, and the sweep of one seed.
    """

    seeds: tuple[int, ...]
    changes: dict[str, int]
    held_out: int
    budgets: tuple[int, ...]
    page: int
    shares: tuple[float, ...]
    samples: dict[str, int]
    blocks: tuple[int, ...]
    thin: dict[str, int]
    minutes: dict[str, float]


SWEEPS = {
    "recall": Sweep(
        seeds=(0, 1, 2),
        changes={},
        held_out=256,
        budgets=(16, 24, 32, 48, 64, 80, 104),
        page=4,
        shares=(0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 1.0),
        samples=dict(window=16, every=8),
        blocks=(3, 4, 5, 6, 8, 10, 13),
        thin=dict(block_size=8, stride=8, num_selected=5, window=8),
        minutes=dict(training=7, sweep=2),
    ),
    "text": Sweep(
        seeds=(0,),
        changes=dict(batch_size=2),  # half the time
        held_out=8,
        budgets=(16, 32, 64, 128, 256, 512),
        page=16,
        shares=(0.3, 0.6, 0.8, 0.9, 0.95, 0.99),
        samples=dict(window=64, every=32),
        blocks=(3, 4, 6, 12, 32),
        thin={},
        minutes=dict(training=63, sweep=10),
    ),
}


def configs(task: str, seed: int) -> dict[str, TrainConfig]:
    """What is trained: a dense model, NSA with the trainer's sizes, and a thin NSA if there is."""
    dense = TrainConfig.preset(task, "dense", seed, threads=1, **SWEEPS[task].changes)
    nsa = replace(dense, attention="nsa")
    chosen = {"dense": dense, "nsa": nsa}
    if thin := SWEEPS[task].thin:
        chosen["nsa-thin"] = replace(nsa, nsa=replace(nsa.nsa, **thin))
    return chosen


def runs() -> list[Run]:
    """For each task and seed: the trainings, then one sweep of their weights."""
    listed = []
    for task, swept in SWEEPS.items():
        for seed in swept.seeds:
            chosen = configs(task, seed)
            for label, config in chosen.items():
                name = f"{task}-{label}-seed{seed}"
                listed.append(training_run(config, name, swept.minutes["training"]))
            listed.append(sweep_run(task, seed, chosen))
    return listed


def sweep_run(task: str, seed: int, chosen: dict[str, TrainConfig]) -> Run:
    """The sweep of one seed's models; it depends on how they were trained too."""
    count = len(cases(task, list(chosen)))
    settings = {key: x for key, x in SWEEPS[task]._asdict().items() if key != "minutes"}
    trainings = {label: config.everything() for label, config in chosen.items()}
    config = {"seed": seed, "sweep": settings, "trainings": trainings}
    minutes = SWEEPS[task].minutes["sweep"]
    return Run(f"{task}-sweep-seed{seed}", count, sweep(task, seed), config, minutes)


def cases(task: str, labels: list[str]) -> list[tuple[str, dict]]:
    """Every method with every setting of its sweep; NSA's models take several n."""
    swept = SWEEPS[task]
    listed: list[tuple[str, dict]] = [("dense", {})]
    for method in ("StreamingLLM", "H2O", "Quest"):
        listed += [(method, at_budget(method, b, swept.page)) for b in swept.budgets]
    listed += [("SampleAttention", dict(share=share, **swept.samples)) for share in swept.shares]
    for label in labels:
        if label != "dense":
            listed += [(label, dict(num_selected=n)) for n in swept.blocks]
    return listed


def sweep(task_name: str, seed: int) -> Callable[[Path], Generator[dict, None, None]]:
    """The work of a sweep: yields the measurements so far, after each new one."""

    def work(folder: Path) -> Generator[dict, None, None]:
        torch.set_num_threads(1)
        models = {
            label: trained(config, folder.parent / f"{task_name}-{label}-seed{seed}")
            for label, config in configs(task_name, seed).items()
        }
        task = training.TASKS[task_name]()
        batch = task.held_out(SWEEPS[task_name].held_out)
        results: list[dict] = []
        for method, settings in cases(task_name, list(models)):
            if method in NEIGHBOURS:
                result = measure(models["dense"], task, batch, method, settings)
            else:
                result = measure_nsa(models[method], task, batch, settings["num_selected"])
            results.append({"method": method, **result})
            yield {"results": results}

    return work


def trained(config: TrainConfig, folder: Path) -> DecoderLM:
    """The model of a run that nsa_lite.lab.train left in `folder`.

    Errors: CheckpointError where the folder holds a run of another config.
    """
    path = folder / "checkpoint.safetensors"
    tensors, state = load(path)
    require_config(path, state, config.everything())
    model = training.build(config)
    model.load_state_dict(weights(tensors))
    return model.eval()


def counted_positions(batch: Batch) -> Tensor:
    """The queries that are scored: the questions, or the second half where every position asks.

    Where every position asks, as in a text, only late ones have a past longer than a budget.
    """
    asked = batch.answer_at[0] >= 0
    length = len(asked)
    return asked.nonzero().flatten() if asked.any() else torch.arange(length // 2, length)


@torch.no_grad()
def measure(model: DecoderLM, task: Task, batch: Batch, method: str, settings: dict) -> dict:
    """What a dense model scores on `batch` read as a neighbour does, and what that costs."""
    at = counted_positions(batch)
    c = model.config.nsa
    neighbour = NEIGHBOURS[method]
    logits, read = reading(model, method, **settings)(batch.tokens, return_traces=True)
    groups = [read_by_group(r, at, c, neighbour, settings) for r in read]
    costs = {
        "read_by_head": sum(read_by_head(r, at) for r in read) / len(read),
        "read_by_group": sum(groups) / len(groups),
        "kept": neighbour.kept(c, batch.tokens.shape[1], settings),
    }
    return {"settings": settings, **rounded(costs), **score(task, logits, batch, at, read)}


@torch.no_grad()
def measure_nsa(model: DecoderLM, task: Task, batch: Batch, num_selected: int) -> dict:
    """What an NSA model scores on `batch` when it selects n blocks, and what that costs."""
    at = counted_positions(batch)
    model = with_blocks(model, num_selected)
    c = model.config.nsa
    tokens = sum(sum(cost.tokens_read(c, t).values()) for t in at.tolist()) / len(at)
    kept = kept_by_nsa(c, batch.tokens.shape[1])
    costs = {"read_by_head": tokens, "read_by_group": tokens, "kept": kept}  # a group reads as one
    settings = {"num_selected": num_selected}
    scores = score(task, model(batch.tokens), batch, at, [])
    return {"settings": settings, **rounded(costs), **scores}


def rounded(costs: dict[str, float]) -> dict[str, float]:
    """As they are recorded."""
    return {name: round(float(tokens), 3) for name, tokens in costs.items()}


def score(task: Task, logits: Tensor, batch: Batch, at: Tensor, read: list[Tensor]) -> dict:
    """The task's own score at the positions `at`, or how many questions are answered right."""
    targets = batch.targets[:, at].flatten()
    loss = F.cross_entropy(logits[:, at].flatten(0, 1).double(), targets)
    own = task.score(float(loss))
    return {**own, "bytes": len(targets)} if own else answers(logits, batch, at, read)


def answers(logits: Tensor, batch: Batch, at: Tensor, read: list[Tensor]) -> dict:
    """How many questions are asked and answered right, in all and by the answer's block of 8.

    With `read` of a model of one layer: of how many the answer was read, by any head, and how
    many of those are right.
    """
    right = logits[:, at].argmax(-1) == batch.targets[:, at]
    answer_at = batch.answer_at[:, at]
    block = answer_at.flatten() // 8
    result = {
        "asked": right.numel(),
        "right": int(right.sum()),
        "asked_by_block": block.bincount().tolist(),
        "right_by_block": block.bincount(right.flatten()).int().tolist(),
    }
    if len(read) == 1:
        seen = read[0].any(dim=1)[:, at].gather(-1, answer_at[..., None])[..., 0]
        result |= {"answer_read": int(seen.sum()), "right_of_read": int(right[seen].sum())}
    return result
