"""benchmarks.counters asks ncu for one launch, keeps its report, and says when there is none."""

import json
import subprocess

import pytest

from benchmarks import counters, records

REPORT = """==PROF== Connected to process 1
  forward (16384, 4, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: Occupancy
    Theoretical Occupancy           %        12.50

==PROF== Disconnected from process 1
"""
NOT_ALLOWED = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to read counters\n"


def answer(text, status=0):
    return lambda command, **_: subprocess.CompletedProcess(command, status, text, "")


def test_without_ncu_nothing_is_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    assert counters.main(["--out", str(tmp_path / "c.json")]) == 3
    assert "not installed here" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, status", [(NOT_ALLOWED, 0), ("", 9)])
def test_a_refusal_is_told_and_not_recorded(tmp_path, monkeypatch, capsys, text, status):
    monkeypatch.setattr(counters.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(counters.subprocess, "run", answer(text, status))
    assert counters.main(["--out", str(tmp_path / "c.json")]) == 3
    assert "nothing is recorded" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_report_is_kept_without_ncus_own_words(tmp_path, monkeypatch):
    monkeypatch.setattr(counters.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(counters.subprocess, "run", answer(REPORT))
    path = tmp_path / "c.json"
    assert counters.main(["dq_1_walk", "--out", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["command"] == "python -m benchmarks.counters dq_1_walk"
    assert [line.split()[0] for line in record["reports"]["dq_1_walk"]] == [
        "forward",
        "Section:",
        "Theoretical",
    ]


def test_one_launch_of_the_right_kernel_is_looked_at():
    words = counters.command("dkdv_shipped")
    assert "regex:^selected_dkdv$" in words and words[-2:] == ["--once", "dkdv_shipped"]
    assert "regex:^dq$" in counters.command("dq_1_walk")


def test_the_recorded_report_is_of_every_kernel_shown():
    reports = records.load("counters")["reports"]
    assert list(reports) == list(counters.SHOWN)
    for name, lines in reports.items():
        assert sum("Section:" in line for line in lines) == len(counters.SECTIONS), name
