"""Traces in a small file, so that a training run can be looked at without running it again.

A compressed .npz of plain arrays, read without pickle. Ids are kept exactly, and so are the
importances of each query's best blocks (of all, unless they are very many), so that every choice
stays what it was; probabilities in 63 steps of their row's largest, dense attention's mass in 255,
gates as float16; the branches' outputs, queries and keys are left out.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import pad

from nsa_lite import NSAConfig, Trace
from nsa_lite.blocks import num_select_blocks
from nsa_lite.checks import require
from nsa_lite.show.explorer.arrays import bytes_of_rows, bytes_that_add_up
from nsa_lite.show.explorer.sequence import Beyond, Kept, TracedSequence

FORMAT = "nsa_lite traces 3"  # 2 held every query, every importance, and no dense mass
STEPS = 63  # as fine as a bar of 60 pixels


def save_traces(path: str | Path, sequence: TracedSequence, about: dict | None = None) -> None:
    """Write a sequence's traces; `about` (JSON) is for the command that made them, and results.

    Of the importances those of the sequence's `ranks` best blocks of each query are kept.
    """
    header = {
        "format": FORMAT,
        "config": sequence.config.as_dict(),
        "length": sequence.length,
        "ranks": sequence.ranks,
        "checkpoints": list(sequence.checkpoints),
        "tokens": sequence.tokens,
        "says": sequence.about,
        "about": about or {},
    }
    layers = [x for xs in sequence.checkpoints.values() for x in xs]
    rankings = [x for xs in sequence.rankings for x in xs]
    p, p_scale = bytes_of_rows(_stacked(sequence, [x.probabilities for x in layers]), STEPS)
    arrays = {
        "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
        "positions": sequence.positions.numpy().astype(np.int32),
        "answer_at": sequence.answer_at.numpy().astype(np.int32),
        "p": p,
        "p_scale": p_scale,
        "ids": _stacked(sequence, _one_width([x.ids for x in layers])).numpy().astype(np.int16),
        "order": torch.stack([x.order for x in rankings]).numpy().astype(np.int16),
        "score": torch.stack([x.score for x in rankings]).numpy(),
        "gates": _stacked(sequence, [x.gates for x in layers]).numpy().astype(np.float16),
    }
    if sequence.beyond is not None:
        each = [torch.stack(masses) for masses in sequence.beyond]
        same = all(masses.equal(each[0]) for masses in each)
        kept = each[0] if same else torch.cat(each)  # one model under several rules has one mass
        arrays["beyond"], arrays["beyond_scale"] = bytes_that_add_up(kept)
    np.savez_compressed(path, **arrays)


def load_traces(path: str | Path) -> tuple[TracedSequence, dict]:
    """The sequence that save_traces wrote, and what it says about it.

    Errors: ValueError for a file that something else wrote.
    """
    with np.load(path) as file:
        header = json.loads(file["header"].tobytes()) if "header" in file else {}
        require(header.get("format") == FORMAT, "path", str(path), f"holds no {FORMAT!r}")
        arrays = {name: torch.from_numpy(file[name]) for name in file if name != "header"}
    names = header["checkpoints"]
    layers = len(arrays["ids"]) // len(names)
    traces = _by_checkpoint(_traces_of(header, arrays), layers)
    positions = arrays["positions"].long()
    beyond = _beyond_of(arrays, len(names), layers)
    kept = Kept(positions, header["length"], header["ranks"], beyond, header["says"])
    checkpoints = dict(zip(names, traces, strict=True))
    sequence = TracedSequence(checkpoints, header["tokens"], arrays["answer_at"], kept=kept)
    return sequence, header["about"]


def _stacked(sequence: TracedSequence, each: list[torch.Tensor]) -> torch.Tensor:
    """The sequence's row of each layer's tensor."""
    return torch.stack([x[sequence.row].float().cpu() for x in each])


def _one_width(ids: list[torch.Tensor]) -> list[torch.Tensor]:
    """Ids filled up with -1, for one rule may take more blocks than another."""
    widest = max(x.shape[-1] for x in ids)
    return [pad(x, (0, widest - x.shape[-1]), value=-1) for x in ids]


def _by_checkpoint(each: list, layers: int) -> list[list]:
    """One list a checkpoint, of so many layers."""
    return [each[first : first + layers] for first in range(0, len(each), layers)]


def _beyond_of(arrays: dict[str, torch.Tensor], checkpoints: int, layers: int) -> Beyond | None:
    """Dense attention's mass, where the file holds it: of each checkpoint, or one for all."""
    if "beyond" not in arrays:
        return None
    mass = arrays["beyond"].float() / 255 * arrays["beyond_scale"][..., None]
    each = _by_checkpoint(list(mass), layers)
    return each * (checkpoints // len(each))


def _traces_of(header: dict, arrays: dict[str, torch.Tensor]) -> list[Trace]:
    """The traces of a file in the order in which they were written, each a batch of one.

    An importance that was not kept is 0: the sequence knows how many were, and shows no other.
    """
    config = NSAConfig(**header["config"])
    p = arrays["p"].float() / STEPS * arrays["p_scale"][..., None]
    blocks = num_select_blocks(header["length"], config.select_block_size)
    importance = torch.zeros(*arrays["score"].shape[:-1], blocks)
    importance.scatter_(-1, arrays["order"].long(), arrays["score"])
    return [
        Trace(
            config,
            int(arrays["positions"][0]),
            ids=arrays["ids"][i].int()[None],
            probabilities=p[i][None],
            importance=importance[i][None],
            gates=arrays["gates"][i].float()[None],
            outputs={},
        )
        for i in range(len(p))
    ]
