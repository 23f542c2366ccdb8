"""The recorded runs of notebook 14: train dense and NSA models, then sweep the budgets.

    python -m nsa_lite.experiments neighbours
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from nsa_lite import train
from nsa_lite.budgets import at_budget, measure, trained, with_blocks
from nsa_lite.experiments import Run, training_run

SEEDS = {"recall": (0, 1, 2), "text": (0,)}
CHANGES = {"recall": {}, "text": {"batch_size": 2}}  # to the trainer's own settings: half the time
SIZE = {"recall": 256, "text": 16}  # held-out sequences
BUDGETS = {"recall": (16, 24, 32, 48, 64, 80, 104), "text": (16, 32, 64, 128, 256, 512, 1024)}
PAGE = {"recall": 4, "text": 16}
SHARES = (0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 1.0)
SAMPLES = {"recall": dict(window=16, every=8), "text": dict(window=64, every=32)}
BLOCKS = {"recall": (3, 4, 5, 6, 8, 10, 13), "text": (3, 4, 6, 8, 12, 16, 32)}  # n; 6 is trained


def runs() -> list[Run]:
    """For each task and seed: two trainings, then one sweep of their weights."""
    listed = []
    for task, seeds in SEEDS.items():
        for seed in seeds:
            pair = [train.TrainConfig.preset(task, attention, seed, threads=1, **CHANGES[task])
                    for attention in ("dense", "nsa")]
            trainings = [training_run(config) for config in pair]
            listed += [Run(f"{task}-{t.name}", t.steps, t.work) for t in trainings]
            listed.append(Run(f"{task}-sweep-seed{seed}", len(cases(task)), sweep(*pair)))
    return listed


def cases(task: str) -> list[tuple[str, dict]]:
    """Every method with every setting of its sweep."""
    listed = [("dense", {})]
    for method in ("StreamingLLM", "H2O", "Quest"):
        listed += [(method, at_budget(method, b, PAGE[task])) for b in BUDGETS[task]]
    listed += [("SampleAttention", dict(share=share, **SAMPLES[task])) for share in SHARES]
    return listed + [("nsa", dict(num_selected=n)) for n in BLOCKS[task]]


def sweep(dense: train.TrainConfig, nsa: train.TrainConfig):
    """The work of a sweep: yields the measurements so far, after each new one."""

    def work(folder: Path) -> Iterator[dict]:
        torch.set_num_threads(dense.threads)
        models = {c.attention: trained(c, folder.parent / f"{c.task}-{c.name}")
                  for c in (dense, nsa)}
        split = {"split": "validation"} if dense.task == "text" else {}
        batch = train.TASKS[dense.task]().batch(SIZE[dense.task], seed=0, **split)
        results: list[dict] = []
        for method, settings in cases(dense.task):
            if method == "nsa":
                with_blocks(models["nsa"], settings["num_selected"])
            result = measure(models["nsa" if method == "nsa" else "dense"], batch, method, settings)
            results.append({"method": method, **result})
            yield {"results": results}

    return work
