"""The log of a training run, one JSON record a step, and the table that sums runs up."""

import json
from itertools import pairwise
from pathlib import Path

from nsa_lite.show.tables import Column, table


class LogError(ValueError):
    """A log that cannot be used: the message names the file, the line and the reason."""


def read_log(directory: Path) -> list[dict]:
    """The records of a run, in order; none if there is no log. Errors: LogError."""
    return records_of(directory / "log.jsonl")


def records_of(log: Path) -> list[dict]:
    """The records of a log, one a line; a last line that was cut off in writing does not count."""
    if not log.exists():
        return []
    text = log.read_text("utf-8", errors="replace")
    whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [record_of(log, number, line) for number, line in enumerate(whole, start=1)]


def record_of(log: Path, number: int, line: str) -> dict:
    """One line's record. Errors: LogError unless it is one of a step."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        record = None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise LogError(f"{log}, line {number}: not the record of a step; {AWAY}")
    return record


AWAY = "left untouched. The checkpoint beside it is good: move the log away to go on without it"


def cut_log(log: Path, step: int) -> None:
    """Drop the records after the checkpoint's step: the resumed run will write them again.

    Errors: LogError for a log that is not of this run: some line is no record, or does not follow
    the one before it, or the log ends before the checkpoint.
    """
    records = records_of(log)
    for number, (before, record) in enumerate(pairwise(records), start=2):
        if record["step"] != before["step"] + 1:
            reason = f"step {record['step']} follows step {before['step']}"
            raise LogError(f"{log}, line {number}: {reason}; {AWAY}")
    if records and records[-1]["step"] < step:
        ends = f"it ends with step {records[-1]['step']}, the checkpoint is of step {step}"
        raise LogError(f"{log}, line {len(records)}: {ends}; {AWAY}")
    if log.exists():
        kept = [json.dumps(record) + "\n" for record in records if record["step"] <= step]
        log.write_text("".join(kept), "utf-8")


def evaluations(records: list[dict]) -> list[dict]:
    """The records that hold a held-out result, without the numbers of their training batch."""
    return [
        {k: v for k, v in r.items() if k not in ("loss", "accuracy")}
        for r in records
        if "test_loss" in r
    ]


def last_evaluation(records: list[dict]) -> dict:
    """The newest record that holds a held-out result; empty if there is none."""
    return next((r for r in reversed(records) if "test_loss" in r), {})


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
        rows.append([name, r.get("step"), r.get("test_loss"), *scores, seconds.get(name, 0.0)])
    return table(COLUMNS, rows)
