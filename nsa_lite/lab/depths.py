"""Where a trained model finds the answer: by its depth in the haystack, at any length.

    python -m nsa_lite.lab.depths runs/haystack/*-seed0 --length 4096 --length 16384

It reads the checkpoints that the trainer left, and prints a table and draws the needle map.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa_lite.checks import require, require_int
from nsa_lite.config import NSAConfig
from nsa_lite.lab.checkpoint import load, weights
from nsa_lite.lab.evaluate import Answers, answers, asked, share
from nsa_lite.lab.haystack import Haystack, Stage
from nsa_lite.lab.training import TrainConfig, build
from nsa_lite.model import DecoderLM
from nsa_lite.show.tables import Column, table

BINS = 8
LENGTHS = (4096, 16_384, 65_536)


def by_depth(
    model: DecoderLM, task: Haystack, length: int, sequences: int, bins: int = BINS, seed: int = 0
) -> dict[str, Any]:
    """What a model answers at a length: its accuracy and hit rate, and both by the answer's depth.

    Depth 0 is the start of the sequence; a bin that no answer fell into holds None. Sequences are
    read one at a time, so memory is that of one. The hit rate is missing where nothing is selected.
    Errors: ValueError or TypeError that names the argument.
    """
    require_int("sequences", sequences, at_least=1)
    require_int("bins", bins, at_least=1)
    stage = Stage(length)
    with asked(model, seed):
        each = [answers(model, task.draw(stage, 1, seed + i)) for i in range(sequences)]
    answer_at = torch.cat([given.answer_at for given in each])
    found = {"accuracy": torch.cat([right(given) for given in each])}
    hits = [given.hit for given in each if given.hit is not None]
    if hits:
        found["hit_rate"] = torch.cat(hits)
    result: dict[str, Any] = {"length": length, "sequences": sequences}
    for name, marks in found.items():
        result[name] = round(share(marks, answer_at), 4)
        result[f"{name}_by_depth"] = in_bins(marks, answer_at, length, bins)
    return result


def right(given: Answers) -> Tensor:
    """Which answers are right: (B, m), False where nothing is asked."""
    return given.logits.argmax(-1) == given.targets


def in_bins(marks: Tensor, answer_at: Tensor, length: int, bins: int) -> list[float | None]:
    """The share of marks in each of equal bins of the answer's depth."""
    there = answer_at >= 0
    which = answer_at[there] * bins // length
    counts = torch.bincount(which, minlength=bins).tolist()
    sums = torch.bincount(which, weights=marks[there].double(), minlength=bins).tolist()
    return [round(s / n, 4) if n else None for s, n in zip(sums, counts, strict=True)]


def trained(checkpoint: Path, device: str = "cpu") -> tuple[DecoderLM, Haystack, dict]:
    """The model that a run on haystacks left, its task, and the run's config.

    Errors: ValueError for a run on another task; CheckpointError for a file that cannot be used.
    """
    tensors, state = load(checkpoint)
    saved = state["config"]
    require(saved["task"] == Haystack.name, "task", repr(saved["task"]), "must be 'haystack'")
    sizes = {k: v for k, v in saved["sizes"].items() if k not in ("stages", "device")}
    task = Haystack(**sizes, stages=tuple(Stage(**s) for s in saved["sizes"]["stages"]))
    config = TrainConfig.preset(
        Haystack.name,
        saved["attention"],
        saved["seed"],
        nsa=NSAConfig(**saved["nsa"]),
        layers=saved["layers"],
        device=device,
    )
    model = build(config)
    model.load_state_dict(weights(tensors))
    return model, replace(task, device=device), saved


COLUMNS = (
    Column("run", 26),
    Column("tokens", 7),
    Column("accuracy", 9, ".3f"),
    Column("hit rate", 9, ".3f"),
    Column("lowest by depth", 16, ".3f"),
)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    words = parse(arguments)
    maps: dict[str, list[dict]] = {}
    try:
        for run in words.run:
            model, task, _ = trained(run / "checkpoint.safetensors", words.device)
            maps[run.name] = [
                by_depth(model, task, length, words.sequences) for length in words.length or LENGTHS
            ]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    words.out.mkdir(parents=True, exist_ok=True)
    (words.out / "depths.json").write_text(json.dumps(maps, indent=1) + "\n")
    print(table(COLUMNS, rows_of(maps)))
    picture = words.out / "depths.png"
    draw(maps, picture)
    print(f"needle map: {picture}")
    return 0


def rows_of(maps: dict[str, list[dict]]) -> list[Sequence]:
    """One line a run and length."""
    rows = []
    for name, results in maps.items():
        for r in results:
            lowest = min(x for x in r["accuracy_by_depth"] if x is not None)
            rows.append([name, r["length"], r["accuracy"], r.get("hit_rate"), lowest])
    return rows


def draw(maps: dict[str, list[dict]], picture: Path) -> None:
    """The needle map of each run, in one picture."""
    from nsa_lite.show import needle_map, plots  # matplotlib is slow to import

    plots.use_style()
    needle_map.draw_needle_maps(maps).savefig(picture)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The words of the command line."""
    p = argparse.ArgumentParser(
        prog="python -m nsa_lite.lab.depths",
        description="Where trained models find the answer: accuracy by length and depth.",
    )
    p.add_argument("run", nargs="+", type=Path, help="folders of runs on haystacks")
    p.add_argument("--length", type=int, action="append", help="repeat for several")
    p.add_argument("--sequences", type=int, default=8, help="read at each length; 8 if not given")
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", type=Path, default=Path("runs/haystack"))
    return p.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
