"""What a device makes of the counted work: floors, the table and the picture."""

import re
import sys

import matplotlib.pyplot as plt
import pytest

from benchmarks import counts, records, roofline, roofline_picture
from benchmarks.counts import Sizes, Work
from nsa_lite import NSAConfig
from tests.benchmarks.device import DEVICE

PAPER = Sizes(NSAConfig(head_dim=128), 65536)  # H = 64, G = 4, D = Dv = 128


@pytest.fixture(scope="module")
def works():
    return counts.works(PAPER)


@pytest.mark.parametrize(
    ("branch", "what", "milliseconds"),
    [
        ("dense", "forward", 94.7),  # 2147516416 x 64 x 512 / 743e12
        ("window", "forward", 1.47),
        ("compressed", "forward", 5.92),
        ("selection", "scores", 2.96),  # half the products of the compressed forward
        ("selected", "forward", 2.85),  # 2.96 if the query's own block counted as read whole
        ("gated sum", "forward", 1.43),  # 65536 x 64 x (4 x 128 + 3) x 2 bytes / 3.03e12
        ("gated sum", "backward", 2.50),
    ],
)
def test_floors_of_any_kernel_at_64k(works, branch, what, milliseconds):
    assert roofline.floor_of_any(works[branch][what], DEVICE) * 1e3 == pytest.approx(
        milliseconds, rel=3e-3
    )


def test_the_slowest_resource_is_the_floor():
    device = {"arithmetic": 10.0, "memory": 1.0, "cache": 2.0, "shared": 2.0}
    work = Work(operations=10.0, executed=50.0, memory=2.0, cache=8.0, shared=9.0)
    times = {"arithmetic": 5.0, "memory": 2.0, "cache": 4.0, "shared": 4.5}
    assert roofline.bounds(work, device) == times
    assert roofline.floor(work, device) == 5.0 and roofline.bound_by(work, device) == "arithmetic"
    assert roofline.floor_of_any(work, device) == 2.0


@pytest.mark.parametrize(("shared", "names"), [(9.7, "arithmetic"), (9.9, "arithmetic, shared")])
def test_what_the_count_cannot_tell_apart_is_named_together(shared, names):
    device = {"arithmetic": 10.0, "memory": 1.0, "cache": 2.0, "shared": 2.0}
    work = Work(operations=10.0, executed=50.0, memory=2.0, cache=8.0, shared=shared)
    assert roofline.bound_by(work, device) == names


# --- the rates come from the record ---


def test_a_ceiling_is_the_best_of_its_rows():
    """A floor below which some kernel was measured would be none."""
    rates = {"copy": (2e12, 3e12), "matmul": (600e12, 540.672e12), "L2 reads": (4e12, 7e12, 8e12)}
    rows = [{"what": what, "rate": rate} for what, found in rates.items() for rate in found]
    record = {"device": "an H100", "versions": {"triton": "0.1"}, "rows": rows}
    found = roofline.ceilings(record)
    assert (found["arithmetic"], found["memory"], found["cache"]) == (600e12, 3e12, 8e12)
    # 132 multiprocessors at 1.1097 GHz: 4096 operations and 128 bytes a clock.
    clock = 600e12 / (132 * 4096)
    assert found["shared"] == pytest.approx(132 * 128 * clock)
    assert "an H100 (triton 0.1, not the pinned" in found["source"]


def test_reads_apart_are_told_from_reads_in_turn():
    """What no program has just read comes more slowly: not the ceiling, which is the best."""
    how = "pointers, 8 MiB live, {}, 6 programs of 4 warps, 1 stages"
    rates = (("in turn", 9e12), ("apart", 5e12), ("apart", 6e12), ("in turn", 8e12))
    rows = [{"what": "L2 reads", "how": how.format(o), "rate": rate} for o, rate in rates]
    assert roofline.reads_apart({"rows": rows}) == 6e12


def test_some_recorded_reads_are_apart():
    assert 0 < roofline.reads_apart(records.load("ceilings")) < roofline.H100["cache"]


def test_the_roofline_divides_by_the_recorded_ceilings():
    record = records.load("ceilings")
    assert set(roofline.RESOURCES) < set(roofline.H100)
    for resource, what in roofline.RECORDED.items():
        rates = [row["rate"] for row in record["rows"] if row["what"] == what]
        assert roofline.H100[resource] == max(rates)


# --- what is printed and drawn ---


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["roofline", *words])
    roofline.main()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "heading"),
    [
        ("A", "64 heads, 4 groups, 128 and 128 wide, 2048 tokens"),
        ("B", "32 heads, 8 groups, 128 and 128 wide, 2048 tokens"),
        ("paper", "64 heads, 4 groups, 192 and 128 wide, 2048 tokens"),
    ],
)
def test_any_config_has_a_table(monkeypatch, capsys, config, heading):
    text = run(monkeypatch, capsys, "--config", config, "--length", "2048")
    assert text.startswith(heading)
    assert re.search(r"^window dk dv .* (arithmetic|memory|cache|shared)$", text, re.M)


def test_what_sharing_gives_to_small_groups(monkeypatch, capsys):
    """By hand: a program's union of 64 keys and values, 32 KB, for each 4, 8 or 16 tokens."""
    config = NSAConfig(heads=32, kv_heads=8, head_dim=128)
    works = roofline.sharing(config, 32768, keep=0.0, tokens=[4, 16])
    rows = 32768 * 32 * (256 * 2 + 4)
    for U in (4, 16):
        union = counts.expected_union(config, 32768, U)
        keys = 8 * 32768 / U * union * 64 * 256 * 2
        assert works[f"{U} tokens"]["forward"].cache == pytest.approx(rows + keys)
    assert roofline.floor(works["4 tokens"]["forward"], DEVICE) == pytest.approx(13.7e-3, rel=5e-3)
    assert roofline.floor(works["16 tokens"]["forward"], DEVICE) == pytest.approx(9.3e-3, rel=5e-3)
    text = run(monkeypatch, capsys, "--config", "B", "--length", "2048", "--tokens", "4", "16")
    assert re.findall(r"^(\d+ tokens \w+) ", text, re.M) == [
        "4 tokens forward",
        "4 tokens dq",
        "16 tokens forward",
        "16 tokens dq",
    ]
    assert len(re.findall(r"^\d+ neighbours read [\d.]+ blocks together$", text, re.M)) == 2


def test_the_table_has_a_line_for_each_kernel(monkeypatch, capsys):
    text = run(monkeypatch, capsys, "--length", "2048", "--keep", "0.5")
    assert "computed bounds, no timings" in text
    for name in ("dense dk dv", "selected forward", "selection top-n", "gated sum backward"):
        assert re.search(rf"^{name} .* (arithmetic|memory|cache|shared)$", text, re.M), name


def test_the_picture_marks_both_floors_and_a_measured_time(works):
    figure = roofline_picture.draw(works, measured={"dense": {"forward": 0.2}})
    points = {
        (round(float(x), 1), round(float(y), 1))
        for line in figure.axes[0].lines
        for x, y in line.get_xydata()
    }
    work = works["dense"]["forward"]
    x = work.operations / work.memory
    for seconds in (roofline.floor_of_any(work), roofline.floor(work), 0.2):
        assert (round(x, 1), round(work.operations / seconds / 1e12, 1)) in points
    names = [text.get_text() for text in figure.axes[0].texts]
    assert "dense forward" in names and "gated sum forward: 0.7 a byte" in names[-1]
    plt.close(figure)
