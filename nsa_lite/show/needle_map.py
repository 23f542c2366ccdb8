"""The needle map: how much of what stands at each depth a model finds, length by length."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nsa_lite.show.plots import WIDTH


def draw_needle_maps(
    maps: dict[str, list[dict]], key: str = "accuracy", columns: int = 2
) -> Figure:
    """One panel a run: lengths from left to right, depths from top to bottom, `key` in each cell.

    maps holds what lab.depths.by_depth returns, for each run its lengths. A bin without an answer,
    and a length at which the run was not asked, stay empty.
    """
    rows = -(-len(maps) // columns)
    columns = min(columns, len(maps))
    size = (WIDTH, 0.5 + 2.0 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False)
    for ax in axes.flat[len(maps) :]:
        ax.axis("off")
    for place, (name, ax) in enumerate(zip(maps, axes.flat, strict=False)):
        draw_map(ax, maps[name], key)
        ax.set_title(name)
        if place + columns < len(maps):  # the panel below says it
            ax.tick_params(labelbottom=False)
        elif columns > 3:  # panels are narrower than their lengths in a row
            ax.tick_params(axis="x", labelrotation=45)
    for ax in axes[:, 0]:
        ax.set_ylabel("depth of the answer")
    figure.supxlabel(f"tokens; each number is the {key.replace('_', ' ')}", fontsize=9)
    return figure


def draw_map(ax: Axes, results: list[dict], key: str) -> None:
    """One run's cells; each holds its number too, so that none needs the colour."""
    missing = [None] * len(results[0]["accuracy_by_depth"])
    cells = np.array([r.get(f"{key}_by_depth", missing) for r in results], dtype=float).T
    ax.imshow(cells, vmin=0, vmax=1, aspect="auto")
    for (depth, at), value in np.ndenumerate(cells):
        if not np.isnan(value):
            colour = "white" if value < 0.6 else "black"
            ax.text(at, depth, short(value), ha="center", va="center", color=colour, fontsize=9)
    bins = len(cells)
    ax.set_xticks(range(len(results)), [spoken(r["length"]) for r in results])
    ax.set_yticks([-0.5, (bins - 1) / 2, bins - 0.5], ["start", "middle", "end"])
    ax.spines[["left", "bottom"]].set_visible(False)


def short(value: float) -> str:
    """0.984 as '.98', what rounds to 1.00 as '1': forty to a panel can be read, and are small."""
    digits = f"{value:.2f}"
    return "1" if digits == "1.00" else digits.removeprefix("0")


def spoken(length: int) -> str:
    """4096 as '4k', 300 as it is."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
