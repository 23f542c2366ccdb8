"""The long runs: trained up to 16,384 tokens on a laptop, up to 65,536 on a GPU, asked up to 256k.

    python -m nsa_lite.lab.experiments train_long haystack haystack_controls
    python -m nsa_lite.lab.experiments haystack_64k haystack_64k_short        on a GPU

Each run's result holds its evaluations, its needle map at lengths it was never trained on too, and
how coherent its choices are. What a step at the longest length costs is a run of its own.
"""

import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from nsa_lite.config import NSAConfig
from nsa_lite.lab import distributed
from nsa_lite.lab.checkpoint import load, weights
from nsa_lite.lab.coherence import kept_by_layer
from nsa_lite.lab.depths import by_depth
from nsa_lite.lab.haystack import LONGEST, SHORTEST, Haystack, curriculum
from nsa_lite.lab.logs import read_log
from nsa_lite.lab.positions import smallest_rope_base
from nsa_lite.lab.runs import Run, training_result, training_run
from nsa_lite.lab.training import Progress, TrainConfig, autocast_of, build, one_step, steps

SEEDS = (0, 1, 2)
LAPTOP = ("dense", "nsa-kl", "window")
LAPTOP_CONTROLS = ("nsa-no-selection", "nsa-random", "nsa-oracle")
GPU = ("dense", "nsa-kl", "nsa-own-kl-first", "nsa")
CONTROLS = ("window", "nsa-no-selection", "nsa-random")
SHORT_GPU = ("dense", "nsa-kl", "nsa-own-kl", "nsa-own-kl-first", "nsa", *CONTROLS)
LENGTHS = (4096, 16_384, 65_536, 131_072, LONGEST)
LENGTH = 65_536
ASKED = 2**19  # tokens that are read at each length to draw a needle map; two sequences at least
ASKED_ON_GPU = 2**20
TIMED = 5  # steps, after as many to warm up
NEEDLES = 16
SENTENCE = 16  # tokens of a needle: half of what a compressed key sums up
SHORT = 4  # tokens of a short one: an eighth of that
FROM = 4096  # tokens of a first stage in which most blocks are not chosen
# The paper's blocks and budget, one group of 16 heads.
SIZES = NSAConfig(
    dim=128,
    heads=16,
    kv_heads=1,
    head_dim=64,
    value_dim=64,
    rope_theta=smallest_rope_base(LONGEST, head_dim=64, slow_pairs=16),
    phi="mean+mlp",
)


def laptop_runs() -> list[Run]:
    """The trainer's preset, every seed; needle maps up to 256k too."""
    return [long_run(config, minutes=12) for config in laptop_configs()]


def make_train_long() -> list[Run]:
    """What `make train-long` trains, on two threads as it does: how long a laptop takes."""
    configs = [TrainConfig.preset("haystack", name, threads=2) for name in LAPTOP]
    return [training_run(config, minutes=2) for config in configs]


def laptop_controls() -> list[Run]:
    """The same without a choice, with a random one, with the best: is the choice what answers?"""
    return [
        long_run(TrainConfig.preset("haystack", name, seed, threads=1), minutes=6)
        for seed in SEEDS
        for name in LAPTOP_CONTROLS
    ]


def laptop_configs() -> list[TrainConfig]:
    """Of each of the laptop's runs its config."""
    return [
        TrainConfig.preset("haystack", name, seed, threads=1) for seed in SEEDS for name in LAPTOP
    ]


def gpu_runs() -> list[Run]:
    """Two layers that attend from every position of up to 65,536; then what their steps cost."""
    trained = [gpu_config(name, seed) for seed in SEEDS for name in GPU + CONTROLS]
    costs = [cost_run(gpu_config(name, 0)) for name in GPU + CONTROLS]
    return [long_run(config, minutes=3, asked=ASKED_ON_GPU) for config in trained] + costs


def cost_run(config: TrainConfig) -> Run:
    """cost_of_step as a run of its own, best done with nothing else on the GPU."""

    def work(folder: Path) -> Generator[dict, None, None]:  # noqa: ARG001  there is nothing to keep
        yield cost_of_step(config)

    return Run(f"{config.attention}-cost", 1, work, config.everything(), 0.2)


def short_runs() -> list[Run]:
    """As gpu_runs, with short needles that no window sees: does the choice start?"""
    trained = [short_config(name, seed) for seed in SEEDS for name in SHORT_GPU]
    named = {config.name: config for config in trained}
    named |= {f"nsa-from-{FROM}-seed{seed}": short_config("nsa", seed, FROM) for seed in SEEDS}
    return [long_run(each, 2, asked=ASKED_ON_GPU, name=name) for name, each in named.items()]


def short_config(attention: str, seed: int, first: int | None = None) -> TrainConfig:
    """gpu_config with short needles, none of them in the window or in a block that all read.

    first: tokens of the first stage; None for as many as the chosen blocks hold, which are then all
    there are.
    """
    first = first or SIZES.num_selected * SIZES.select_block_size
    return gpu_config(
        attention,
        seed,
        steps=1500,
        stages=curriculum(LENGTH, tokens=LENGTH, first=first),
        span=SHORT,
        before=SIZES.select_block_size,
        gap=SIZES.window,
    )


def gpu_config(
    attention: str, seed: int, batch_size: int = 1, steps: int = 600, **changes: Any
) -> TrainConfig:
    """A run on a GPU: the paper's blocks, bfloat16 products, 65,536 tokens a step or a multiple.

    changes: fields of the task in place of those here.
    """
    return TrainConfig.preset(
        "haystack",
        attention,
        seed,
        nsa=SIZES,
        layers=2,
        sizes=dict(
            stages=curriculum(LENGTH, tokens=LENGTH, first=2 * SHORTEST),
            facts=NEEDLES,
            questions=NEEDLES,
            span=SENTENCE,
            held_out_size=8,
            evaluate_every=50,
        )
        | changes,
        steps=steps,
        batch_size=batch_size,
        lr=2e-3,
        threads=1,
        device="cuda",
        autocast="bfloat16",
        all_queries=True,
    )


def long_run(
    config: TrainConfig, minutes: float, asked: int | None = None, name: str | None = None
) -> Run:
    """A training, what it then finds at each length and depth, and how coherent its choices are.

    asked: tokens that are read at each length, ASKED unless given. name: config's unless given.
    """
    asked = asked or ASKED

    def work(folder: Path) -> Generator[dict, None, None]:
        yield from steps(config, folder, resume=True)
        tensors, state = load(folder / "checkpoint.safetensors")
        model = build(config)
        model.load_state_dict(weights(tensors))
        task = config.made_task()
        assert isinstance(task, Haystack)
        with autocast_of(config):
            maps = [by_depth(model, task, n, max(2, asked // n)) for n in LENGTHS]
            kept = kept_by_layer(model, task.held_out(1))
        result = {
            **training_result(state, read_log(folder)),
            "depths": maps,
            "kept": kept,
        }
        yield result

    settings = {**config.everything(), "lengths": list(LENGTHS), "asked": asked}
    return Run(name or config.name, config.steps, work, settings, minutes)


def cost_of_step(config: TrainConfig) -> dict[str, float]:
    """One step of the last stage: milliseconds, tokens a second, and on a GPU the GiB it takes.

    In a group of processes each does its part, and tokens are those of all.
    """
    task = config.made_task()
    model = distributed.spread(build(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    progress = Progress(stage=len(task.stages) - 1)
    on_gpu = config.device != "cpu"

    def some() -> float:
        began = time.monotonic()
        for _ in range(TIMED):
            progress.step = 0  # no evaluation falls in between
            one_step(config, task, model, optimizer, progress)
        if on_gpu:
            torch.cuda.synchronize()
        return (time.monotonic() - began) / TIMED

    some()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = some()
    tokens = config.batch_size * task.pace(progress.stage).batch * task.longest
    cost = {"milliseconds": round(1000 * seconds, 2), "tokens_a_second": round(tokens / seconds)}
    if on_gpu:
        cost["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return cost
