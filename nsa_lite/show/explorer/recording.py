"""Traces in a small file, so that a training run can be looked at without running it again.

A compressed .npz of plain arrays, read without pickle. Importances and ids are kept exactly, so
that every choice stays what it was; probabilities in 63 steps of their row's largest, gates as
float16; the branches' outputs are left out.
"""

import json
from pathlib import Path

import numpy as np
import torch

from nsa_lite import NSAConfig, Trace
from nsa_lite.checks import require
from nsa_lite.show.explorer.sequence import TracedSequence

FORMAT = "nsa_lite traces 2"  # 1 had probabilities in 255 steps
STEPS = 63  # as fine as a bar of 60 pixels


def save_traces(path: str | Path, sequence: TracedSequence, about: dict | None = None) -> None:
    """Write a sequence's traces; `about` (JSON) is for the command that made them, and results."""
    header = {
        "format": FORMAT,
        "config": sequence.config.as_dict(),
        "start": sequence.start,
        "checkpoints": list(sequence.checkpoints),
        "tokens": sequence.tokens,
        "about": about or {},
    }
    layers = [x for xs in sequence.checkpoints.values() for x in xs]

    def stack(each: list[torch.Tensor]) -> np.ndarray:
        return np.stack([x[sequence.row].float().cpu().numpy() for x in each])

    p, scale = _to_bytes(stack([x.probabilities for x in layers]))
    np.savez_compressed(
        path,
        header=np.frombuffer(json.dumps(header).encode(), np.uint8),
        p=p,
        p_scale=scale,
        ids=stack([x.ids for x in layers]).astype(np.int16),
        importance=stack([x.importance for x in layers]),
        gates=stack([x.gates for x in layers]).astype(np.float16),
        answer_at=sequence.answer_at.numpy().astype(np.int32),
    )


def load_traces(path: str | Path) -> tuple[TracedSequence, dict]:
    """The sequence that save_traces wrote, and what it says about it.

    Errors: ValueError for a file that something else wrote.
    """
    with np.load(path) as file:
        header = json.loads(file["header"].tobytes()) if "header" in file else {}
        require(header.get("format") == FORMAT, "path", str(path), f"holds no {FORMAT!r}")
        arrays = {name: torch.from_numpy(file[name]) for name in file if name != "header"}
    traces = _traces_of(header, arrays)
    names = header["checkpoints"]
    layers = len(traces) // len(names)
    checkpoints = {name: traces[i * layers : (i + 1) * layers] for i, name in enumerate(names)}
    return TracedSequence(checkpoints, header["tokens"], arrays["answer_at"]), header["about"]


def _traces_of(header: dict, arrays: dict[str, torch.Tensor]) -> list[Trace]:
    """The traces of a file in the order in which they were written, each a batch of one."""
    config = NSAConfig(**header["config"])
    p = arrays["p"].float() / STEPS * arrays["p_scale"][..., None]
    return [
        Trace(
            config,
            header["start"],
            ids=arrays["ids"][i].int()[None],
            probabilities=p[i][None],
            importance=arrays["importance"][i][None],
            gates=arrays["gates"][i].float()[None],
            outputs={},
        )
        for i in range(len(p))
    ]


def _to_bytes(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row in STEPS of its largest entry, and that entry."""
    scale = p.max(-1, initial=0.0)
    levels = np.rint(STEPS * p / np.where(scale > 0, scale, 1)[..., None])
    return levels.astype(np.uint8), scale
