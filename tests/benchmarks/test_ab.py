"""benchmarks.ab judges made-up times as it should, and takes its turns in the order that it says.

No test here looks at a real time.
"""

import sys
from random import Random

import pytest
import torch

from benchmarks import ab


class Clock:
    """A clock that only made-up work moves: `run(ms)` is work that takes so long."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def run(self, name, ms, drift=0.0):
        def work():
            self.log.append(name)
            self.now += ms * (1 + drift * self.now)

        return work


@pytest.fixture
def clock(monkeypatch):
    made_up = Clock()
    monkeypatch.setattr(ab, "mark", lambda: made_up.now)
    monkeypatch.setattr(ab, "between", lambda first, second: second - first)
    return made_up


def test_turns_go_there_and_back_after_a_warm_up_that_does_not_count(clock):
    runs = {"A": clock.run("A", 2.0), "B": clock.run("B", 3.0)}
    times = ab.in_turns(runs, rounds=3, warm_up=2, before=clock.run("cold", 100.0))
    assert clock.log[:4] == ["A", "A", "B", "B"]
    turns = [name for name in clock.log[4:] if name != "cold"]
    assert turns == ["A", "B", "B", "A", "A", "B"]
    assert clock.log[4::2] == ["cold"] * 6  # ahead of each run
    assert times == {"A": pytest.approx([2.0] * 3), "B": pytest.approx([3.0] * 3)}


def test_a_drifting_clock_misleads_whoever_takes_all_of_a_first(clock):
    """Work gets slower all the time: in turns the ratio is still that of the work, 1."""
    runs = {name: clock.run(name, 1.0, drift=2e-3) for name in "AB"}
    one_after_the_other = {}
    for name in "AB":
        one_after_the_other |= ab.in_turns({name: runs[name]}, rounds=20, warm_up=0)
    assert ab.compare(*one_after_the_other.values()).differs
    verdict = ab.compare(*ab.in_turns(runs, rounds=20, warm_up=0).values())
    assert not verdict.differs and verdict.ratio == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("count, r", [(1, 0), (5, 0), (6, 1), (9, 2), (20, 6), (100, 40)])
def test_the_medians_ranks_are_those_of_the_tables(count, r):
    """Ranks of the 95% interval of a median: 6 values 1..6, 9 2..8, 20 6..15, 100 40..61."""
    assert ab.rank(count) == r


def test_the_range_holds_the_median_as_often_as_it_says():
    """2,000 runs of 20 turns whose true ratio is 1: about 96% (ranks 6 and 15 of 20)."""
    draw = Random(0)
    held = 0
    for _ in range(2000):
        a = [draw.lognormvariate(0, 0.1) for _ in range(20)]
        b = [draw.lognormvariate(0, 0.1) for _ in range(20)]
        verdict = ab.compare(a, b)
        held += verdict.low <= 1 <= verdict.high
    assert 0.94 < held / 2000 < 0.98


def test_a_difference_is_found_and_noise_is_not():
    draw = Random(1)
    a = [10 * draw.lognormvariate(0, 0.03) for _ in range(20)]
    same = [10 * draw.lognormvariate(0, 0.03) for _ in range(20)]
    faster = [9 * draw.lognormvariate(0, 0.03) for _ in range(20)]
    assert not ab.compare(a, same).differs
    found = ab.compare(a, faster)
    assert found.differs and 0.85 < found.ratio < 0.95
    back = ab.compare(faster, a)
    assert back.ratio == pytest.approx(1 / found.ratio, rel=0.02)


def test_by_hand():
    """Six turns: the range is from the smallest ratio to the largest."""
    verdict = ab.compare([10.0] * 6, [8.0, 8.1, 8.2, 8.4, 8.5, 9.0])
    assert verdict == (pytest.approx(0.83), pytest.approx(0.8), pytest.approx(0.9), True)
    assert ab.words(verdict) == "differs: B takes 17.0% less"
    assert not ab.compare(
        [10.0] * 6, [8.0, 8.1, 8.2, 8.4, 8.5, 9.95]
    ).differs  # 1% is no difference
    assert not ab.compare([10.0] * 5, [5.0] * 5).differs  # five turns are too few for .95
    with pytest.raises(ValueError, match="turns = 2 and 1: A and B need as many"):
        ab.compare([1.0, 1.0], [1.0])


def test_the_spread_is_the_middle_half():
    assert ab.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
    assert ab.spread([7.0]) == (7.0, 7.0)


def test_the_report_names_both_and_the_verdict():
    text = ab.report({"old": [2.0] * 6, "new": [1.0] * 6})
    a, b, ratio, verdict = text.splitlines()
    assert a.split()[:4] == ["A", "old", "2.000", "ms,"]
    assert b.split()[:3] == ["B", "new", "1.000"]
    assert ratio == "B / A 0.500, from 0.500 to 0.500 over 6 turns"
    assert verdict == "differs: B takes 50.0% less"


# --- the card and the command ---


@pytest.mark.parametrize(
    "said, found",
    [
        ("1755, 612.34, 61\n", ab.Card(1755.0, 612.34, 61.0)),
        ("NVIDIA-SMI has failed\n", None),
        ("1755, [N/A], 61\n", None),
    ],
)
def test_the_card_is_read_from_nvidia_smi(monkeypatch, said, found):
    monkeypatch.setattr(ab.shutil, "which", lambda name: f"/usr/bin/{name}")
    answer = type("Done", (), {"stdout": said})
    monkeypatch.setattr(ab.subprocess, "run", lambda *_, **__: answer)
    assert ab.card() == found


def test_without_nvidia_smi_the_card_is_not_read(monkeypatch):
    monkeypatch.setattr(ab.shutil, "which", lambda name: None)
    assert ab.card() is None
    assert ab.card_line("before", None).startswith("before: no nvidia-smi")
    assert ab.card_line("after", ab.Card(1755, 612.3, 61)) == "after: 1755 MHz, 612 W, 61 C"


def test_the_command_compares_two_functions(tmp_path, monkeypatch, capsys):
    (tmp_path / "two_makers.py").write_text(
        "import torch\n"
        "def small():\n    x = torch.ones(4)\n    return lambda: x + x\n"
        "def large():\n    x = torch.ones(4096)\n    return lambda: x + x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "two_makers", raising=False)
    words = ["two_makers:small", "two_makers:large", "--rounds", "6", "--warm-cache"]
    assert ab.main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("before: ") and printed[-1].startswith("after: ")
    assert "over 6 turns" in printed[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_steps_are_not_timed_interpreted(capsys):
    assert ab.main(["forward_1_pointers", "forward_2_descriptors"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
