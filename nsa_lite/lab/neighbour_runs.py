"""The recorded runs of notebook 15: train dense and NSA models, then sweep the budgets.

python -m nsa_lite.lab.experiments neighbours
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from nsa_lite.lab import train
from nsa_lite.lab.experiments import Run, training_run
from nsa_lite.lab.train import TrainConfig
from nsa_lite.rivals.budgets import at_budget, measure, trained, with_blocks

SEEDS = {"recall": (0, 1, 2), "text": (0,)}
CHANGES = {"recall": {}, "text": {"batch_size": 2}}  # to the trainer's own settings: half the time
THIN = dict(block_size=8, stride=8, num_selected=5, window=8)  # NSA that reads less than dense does
SIZE = {"recall": 256, "text": 8}  # held-out sequences
BUDGETS = {"recall": (16, 24, 32, 48, 64, 80, 104), "text": (16, 32, 64, 128, 256, 512)}
PAGE = {"recall": 4, "text": 16}
SHARES = {"recall": (0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 1.0), "text": (0.3, 0.6, 0.8, 0.9, 0.95, 0.99)}
SAMPLES = {"recall": dict(window=16, every=8), "text": dict(window=64, every=32)}
BLOCKS = {"recall": (3, 4, 5, 6, 8, 10, 13), "text": (3, 4, 6, 12, 32)}  # n


def configs(task: str, seed: int) -> dict[str, TrainConfig]:
    """What is trained: a dense model, NSA with the trainer's sizes, and on recall a thin NSA."""
    dense, nsa = (
        TrainConfig.preset(task, attention, seed, threads=1, **CHANGES[task])
        for attention in ("dense", "nsa")
    )
    thin = {"nsa-thin": replace(nsa, nsa=replace(nsa.nsa, **THIN))} if task == "recall" else {}
    return {"dense": dense, "nsa": nsa, **thin}


def runs() -> list[Run]:
    """For each task and seed: the trainings, then one sweep of their weights."""
    listed = []
    for task, seeds in SEEDS.items():
        for seed in seeds:
            chosen = configs(task, seed)
            for label, config in chosen.items():
                training = training_run(config)
                listed.append(replace(training, name=f"{task}-{label}-seed{seed}"))
            count = len(cases(task, list(chosen)))
            listed.append(Run(f"{task}-sweep-seed{seed}", count, sweep(task, seed)))
    return listed


def cases(task: str, labels: list[str]) -> list[tuple[str, dict]]:
    """Every method with every setting of its sweep; NSA's models take several n."""
    listed = [("dense", {})]
    for method in ("StreamingLLM", "H2O", "Quest"):
        listed += [(method, at_budget(method, b, PAGE[task])) for b in BUDGETS[task]]
    listed += [("SampleAttention", dict(share=share, **SAMPLES[task])) for share in SHARES[task]]
    return listed + [
        (label, dict(num_selected=n)) for label in labels if label != "dense" for n in BLOCKS[task]
    ]


def sweep(task: str, seed: int) -> Callable[[Path], Iterator[dict]]:
    """The work of a sweep: yields the measurements so far, after each new one."""

    def work(folder: Path) -> Iterator[dict]:
        torch.set_num_threads(1)
        models = {
            label: trained(config, folder.parent / f"{task}-{label}-seed{seed}")
            for label, config in configs(task, seed).items()
        }
        split = {"split": "validation"} if task == "text" else {}
        batch = train.TASKS[task]().batch(SIZE[task], seed=0, **split)
        results: list[dict] = []
        for method, settings in cases(task, list(models)):
            model = models.get(method, models["dense"])
            if method.startswith("nsa"):
                with_blocks(model, settings["num_selected"])
            rule = "nsa" if method.startswith("nsa") else method
            results.append({"method": method, **measure(model, batch, rule, settings)})
            yield {"results": results}

    return work
