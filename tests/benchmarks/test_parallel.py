"""The benchmark of several ranks: it measures what all did, and checks them against one process."""

import json
import subprocess
import sys

from benchmarks import parallel


def test_two_ranks_on_a_cpu_leave_a_record_and_agree_with_one(tmp_path):
    out = tmp_path / "parallel.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = ["--config", "tiny", "--length", "256", "--out", str(out)]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "benchmarks.parallel", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("context parallel, 2 ranks") == 1  # one rank prints
    record = json.loads(out.read_text())
    assert record["command"].startswith("torchrun --nproc-per-node 2 -m benchmarks.parallel")
    assert 0 <= record["difference"] < 1e-6
    (row,) = record["rows"]
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
