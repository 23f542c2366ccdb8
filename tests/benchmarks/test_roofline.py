"""What a device makes of the counted work: floors, the table and the picture."""

import re
import sys

import matplotlib.pyplot as plt
import pytest

from benchmarks import counts, roofline, roofline_picture
from benchmarks.counts import Sizes, Work
from nsa_lite import NSAConfig

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
    assert roofline.floor_of_any(works[branch][what]) * 1e3 == pytest.approx(milliseconds, rel=3e-3)


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


def test_the_four_rates_share_what_they_must():
    assert set(roofline.RESOURCES) < set(roofline.H100)
    clock = roofline.H100["arithmetic"] / (132 * 4096)
    assert roofline.H100["shared"] == pytest.approx(132 * 128 * clock)
    assert clock == pytest.approx(1.374e9, rel=1e-3)


def test_the_table_has_a_line_for_each_kernel(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["roofline", "--length", "2048", "--keep", "0.5"])
    roofline.main()
    text = capsys.readouterr().out
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
