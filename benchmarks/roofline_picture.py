"""The roofline as a picture: each kernel's floors, below the roof that the device sets."""

from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.counts import Work
from benchmarks.roofline import H100, floor, floor_of_any
from nsa_lite.show import plots

MARKERS = {"forward": "o", "dq": "s", "dk dv": "^", "scores": "D", "backward": "v"}
COLOURS = plots.COLOURS | {"dense": "#000000", "selection": "#D55E00", "gated sum": "#CC79A7"}
GREY = "#999999"
DARK = "#444444"
PLACES = 22  # for names, side by side above the roof


class Point(NamedTuple):
    """A kernel's place: operations for each byte of memory, and TFLOP/s."""

    x: float
    top: float  # at the floor of any kernel
    reached: float  # at the floor of these tiles
    measured: float | None
    branch: str
    what: str

    @property
    def name(self) -> str:
        return f"{self.branch} {self.what}"


def draw(
    by_branch: dict[str, dict[str, Work]],
    device: dict = H100,
    measured: dict[str, dict[str, float]] | None = None,
) -> Figure:
    """The roofline: operations for a byte of device memory against operations a second, log-log.

    Hollow marks are the floor of any kernel: they lie on the roof. Filled marks are the floor of
    these tiles. measured[branch][kernel], in seconds, adds stars. Kernels far out on the slope are
    named in the corner; one without operations has no place.
    """
    measured = measured or {}
    points = [
        point_of(branch, what, work, device, measured.get(branch, {}).get(what))
        for branch, kernels in by_branch.items()
        for what, work in kernels.items()
        if work.operations
    ]
    left = device["arithmetic"] / device["memory"] / 4  # the slope's last bit
    near = sorted(point for point in points if point.x >= left)
    figure, ax = plt.subplots(figsize=(plots.WIDTH, 4.8))
    for point in near:
        draw_marks(ax, point)
    draw_roof(ax, device, left, right=2 * near[-1].x)
    draw_names(ax, near)
    draw_corner(ax, [point for point in points if point.x < left])
    draw_legend(ax, stars=bool(measured))
    return figure


def point_of(branch: str, what: str, work: Work, device: dict, seconds: float | None) -> Point:
    """Where a kernel lies; `seconds` were measured, or None."""
    tera = work.operations / 1e12
    return Point(
        x=work.operations / work.memory,
        top=tera / floor_of_any(work, device),
        reached=tera / floor(work, device),
        measured=None if seconds is None else tera / seconds,
        branch=branch,
        what=what,
    )


def draw_marks(ax: Axes, point: Point) -> None:
    """One kernel's floors, joined by a line, and its measured rate."""
    colour = COLOURS[point.branch]
    marker = MARKERS[point.what]
    ax.plot([point.x, point.x], [point.reached, point.top], color=colour, linewidth=0.8)
    ax.plot(point.x, point.top, marker, color=colour, markerfacecolor="white", markersize=5)
    ax.plot(point.x, point.reached, marker, color=colour, markersize=5)
    if point.measured is not None:
        ax.plot(point.x, point.measured, "*", color=colour, markersize=9)


def draw_roof(ax: Axes, device: dict, left: float, right: float) -> None:
    """The slope, which memory sets, and the roof, which arithmetic sets; room for names above."""
    roof = device["arithmetic"] / 1e12
    low = ax.dataLim.ymin / 1.6
    ax.loglog([left, 4 * left, right], [roof / 4, roof, roof], color=GREY, zorder=0)
    ax.set(
        xlim=(left, right),
        ylim=(low, roof * (roof / low) ** 0.9),
        xlabel="operations for each byte of device memory",
        ylabel="TFLOP/s",
    )
    ax.set_yticks([*(y for y in (1, 3, 10, 30, 100, 300) if low < y < roof), roof])
    ax.yaxis.set_major_formatter("{x:.0f}")
    ax.minorticks_off()


def draw_names(ax: Axes, points: list[Point]) -> None:
    """Names above the roof, each with a line to its mark, far enough apart to be read."""
    left, right = ax.get_xlim()
    gap = (right / left) ** (1 / PLACES)  # a factor, since the axis is logarithmic
    at = left
    for point in points:
        at = max(at * gap, point.x / gap**2)
        ax.annotate(
            point.name,
            (point.x, point.top * 1.03),
            (at, 0.68),
            textcoords=ax.get_xaxis_transform(),
            rotation=60,
            rotation_mode="anchor",
            fontsize=9,
            va="center",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6},
        )


def draw_corner(ax: Axes, points: list[Point]) -> None:
    """Kernels too far out on the slope for a place, in words."""
    if not points:
        return
    lines = [f"{p.name}: {p.x:.1f} a byte, {p.reached:.1f} TFLOP/s" for p in points]
    text = "\n".join(["on the slope, left of here:", *lines])
    ax.text(0.02, 0.03, text, transform=ax.transAxes, fontsize=9)


def draw_legend(ax: Axes, stars: bool) -> None:
    """What a mark means, whatever its shape and colour."""
    ax.plot([], [], "o", color=DARK, markerfacecolor="white", label="any kernel, computed")
    ax.plot([], [], "o", color=DARK, label="these tiles, computed")
    if stars:
        ax.plot([], [], "*", color=DARK, label="measured")
    ax.legend(loc="lower right")
