"""The benchmark of several ranks: it measures what all did, and checks them against one process."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import parallel, records


def test_two_ranks_on_a_cpu_leave_a_record_and_agree_with_one(tmp_path):
    out = tmp_path / "parallel.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = ["--config", "tiny", "--length", "256", "--out", str(out)]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "benchmarks.parallel", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("context parallel, 2 ranks") == 1  # one rank prints
    record = json.loads(out.read_text())
    given = "--config tiny --length 256"  # where it is written is no part of what was run
    assert record["command"] == f"torchrun --nproc-per-node 2 -m benchmarks.parallel {given}"
    (row,) = record["rows"]
    assert 0 <= row["difference"] < 1e-6
    assert row["length"] == 256 and row["forward_ms"] > 0 and row["backward_ms"] > 0


def test_the_worst_rank_is_told_and_a_refusal_is_everyones(monkeypatch):
    others = [{"forward_ms": 3.0, "peak_gib": 1.0}, {"forward_ms": 2.0, "peak_gib": 4.0}]
    monkeypatch.setattr(parallel.distributed, "everyone", lambda mine: others)
    assert parallel.together(lambda: others[0]) == {"forward_ms": 3.0, "peak_gib": 4.0}
    monkeypatch.setattr(
        parallel.distributed, "everyone", lambda _: [others[0], {"refused": "full"}]
    )
    assert parallel.together(lambda: others[0]) == {"refused": "full"}


def test_without_torchrun_it_says_what_to_do(capsys):
    assert parallel.main(["--config", "tiny", "--length", "256"]) == 2
    assert "start it with torchrun" in capsys.readouterr().err


def test_the_notes_and_the_readme_give_the_recorded_ranks():
    root = Path(__file__).parents[2]
    record = records.load("parallel")
    spread = [row for row in record["rows"] if row["name"] == "context parallel"]
    assert {row["ranks"] for row in spread} == {1, 2, 4}
    assert all(row["difference"] == 0.0 for row in spread)
    notes = " ".join((root / "benchmarks/NOTES.md").read_text("utf-8").split())
    readme = " ".join((root / "README.md").read_text("utf-8").split())
    rows = {(r["name"], r["ranks"], r["length"]): r for r in record["rows"]}
    for length in (65_536, 262_144, 524_288, 786_432, 1_048_576):
        shared = [rows.get(("context parallel", ranks, length)) for ranks in (1, 2, 4)]
        cells = " | ".join(said(row) if row else "not run" for row in shared)
        assert f"| {length // 1024}k | {cells} |" in notes
    one = rows["context parallel", 1, 65_536]
    for ranks in (2, 4):
        row = rows["context parallel", ranks, 65_536]
        times = [one[key] / row[key] for key in ("forward_ms", "backward_ms")]
        assert "{:.2f} and {:.2f} times".format(*times) in notes
        assert f"{row['forward_ms']:.0f} / {row['backward_ms']:.0f} ms" in readme
        row = rows["context parallel", ranks, 1_048_576]
        seconds = f"{row['forward_ms'] / 1000:.1f} / {row['backward_ms'] / 1000:.1f} s"
        assert f"{seconds} and {row['peak_gib']:.0f} GiB" in readme
    steps = [rows["data parallel", ranks, 65_536] for ranks in (1, 2, 4)]
    for step in steps:
        assert f"{step['step_ms']:.1f} ms and {step['peak_gib']:.1f} GiB" in notes
    less = [steps[0]["step_ms"] / step["step_ms"] for step in steps[1:]]
    assert "{:.2f} and {:.2f} times less".format(*less) in notes


def said(row):
    return f"{row['forward_ms']:.1f} / {row['backward_ms']:.1f}, {row['peak_gib']:.1f} GiB"
