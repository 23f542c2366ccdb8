"""What a record says about itself: which versions, which command, which rows it keeps."""

import json
from pathlib import Path

import pytest

from benchmarks import draw, records

ROOT = Path(__file__).parents[2]


def test_a_later_run_replaces_its_own_cases_only(tmp_path):
    out = tmp_path / "b.json"
    now = {"device": "d", "versions": {"torch": "1"}, "command": "second"}
    old = [{"config": "A", "length": 8, "name": "x"}, {"config": "B", "length": 8, "name": "x"}]
    out.write_text(json.dumps(now | {"command": "first", "rows": old}))
    assert records.begin(out, now, {("A", 8)}) == now | {
        "command": "first; second",
        "rows": old[1:],
    }
    assert records.begin(out, now, {("A", 8), ("B", 8)}) == now | {"rows": []}
    other = now | {"device": "another"}
    assert records.begin(out, other, {("A", 8)}) == other | {"rows": []}


# --- versions ---


def test_a_record_with_other_versions_than_the_pinned_says_so(tmp_path, monkeypatch):
    pins = tmp_path / "constraints.txt"
    pins.write_text("# tested\ntorch==2.13.0  # a pair\ntriton==3.7.1; sys_platform == 'linux'\n")
    monkeypatch.setattr(records, "CONSTRAINTS", pins)

    def note(**versions):
        return records.recorded_on({"device": "an H100", "versions": versions})

    assert note(torch="2.13.0+cu130", triton="3.6.0") == (
        "an H100 (triton 3.6.0, not the pinned 3.7.1)"
    )
    assert note(torch="2.11.0", triton="3.6.0") == (
        "an H100 (torch 2.11.0, not the pinned 2.13.0; triton 3.6.0, not the pinned 3.7.1)"
    )
    # What is not pinned, or was not installed, is no matter; a build of the pinned version is that.
    others = {"cuda": "13.0", "fla-core": "0.6.0", "flash-attn": "not installed"}
    assert note(torch="2.13.0+cpu", triton="3.7.1", **others) == "an H100"


def test_the_pins_are_those_of_the_project():
    pins = records.pinned()
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.7.1")
    assert set(records.PACKAGES) - {"flash-attn"} <= set(pins)


RECORDED = sorted(path.stem for path in records.RESULTS.glob("*.json"))


@pytest.mark.parametrize("name", RECORDED)
def test_every_record_names_its_device_command_and_versions(name):
    record = records.load(name)
    assert record["device"] and record["command"]
    assert "--out" not in record["command"]  # where it was written is no part of what was run
    assert {"torch", "triton"} <= set(record["versions"])
    assert not record["device"].startswith("cpu")


@pytest.mark.parametrize("page", ["README.md", "benchmarks/NOTES.md"])
def test_a_page_with_recorded_times_names_their_versions(page):
    assert f"Recorded on one {records.recorded_on(draw.load())}:" in (ROOT / page).read_text(
        "utf-8"
    )
