"""The log of a training run, one JSON record a step, and the table that sums runs up."""

import json
from pathlib import Path

from nsa_lite.show.tables import Column, table


def read_log(directory: Path) -> list[dict]:
    """The records of a run, in order."""
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def cut_log(log: Path, step: int) -> None:
    """Drop the records after the checkpoint: the resumed run will write them again."""
    if not log.exists():
        return
    lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    log.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def evaluations(records: list[dict]) -> list[dict]:
    """The records that hold a held-out result, without the numbers of their training batch."""
    return [
        {k: v for k, v in r.items() if k not in ("loss", "accuracy")}
        for r in records
        if "test_loss" in r
    ]


def last_evaluation(records: list[dict]) -> dict:
    """The newest record that holds a held-out result."""
    return next(r for r in reversed(records) if "test_loss" in r)


COLUMNS = (
    Column("run", 26),
    Column("steps", 5),
    Column("loss", 7, ".3f"),
    Column("accuracy", 9, ".3f"),
    Column("hit rate", 9, ".3f"),
    Column("bits/byte", 9, ".3f"),
    Column("seconds", 8, ".1f"),
)


def runs_table(runs: dict[str, list[dict]], seconds: dict[str, float]) -> str:
    """One line a run: how far it came, what it scores, how often it selects the answer."""
    rows = []
    for name, records in runs.items():
        r = last_evaluation(records)
        scores = [r.get(key) for key in ("test_accuracy", "hit_rate", "bits_per_byte")]
        rows.append([name, r["step"], r["test_loss"], *scores, seconds.get(name, 0.0)])
    return table(COLUMNS, rows)
