"""Curves of trainings and sweeps: one line a run, in the colours of its attention's record."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nsa_lite.rivals.attentions import ATTENTIONS, Line
from nsa_lite.rivals.budgets import NEIGHBOURS, TRAINED
from nsa_lite.show.plots import WIDTH

BELOW: dict[str, Any] = dict(
    loc="outside lower center", frameon=False
)  # one legend for the whole figure


def draw_curves(runs: dict[str, list[dict]]) -> Figure:
    """Held-out loss, accuracy (or bits per byte) and hit rate over the steps, one line a run.

    runs maps a name such as "nsa-seed0" to the records of its log.
    """
    found = {key for records in runs.values() for record in records for key in record}
    score = "bits_per_byte" if "bits_per_byte" in found else "test_accuracy"
    panels = [key for key in ("test_loss", score, "hit_rate") if key in found or key == score]
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.8), squeeze=False)
    for ax, key in zip(axes[0], panels, strict=True):
        for name, records in runs.items():
            draw_run(ax, name, [(r["step"], r[key]) for r in records if key in r])
        ax.set(title=title_of(key), xlabel="step")
        if key in ("test_accuracy", "hit_rate"):
            ax.set_ylim(-0.03, 1.03)
    handles = {line.get_label(): line for ax in axes[0] for line in ax.get_lines()}
    if handles:
        figure.legend(handles.values(), handles.keys(), ncols=min(3, len(handles)), **BELOW)
    return figure


def draw_run(ax: Axes, name: str, points: list[tuple[int, float]]) -> None:
    """One run's line through its (step, value) points, if it has any."""
    if not points:
        return
    line = ATTENTIONS[name.rsplit("-seed", 1)[0]].line
    step, value = zip(*points, strict=True)
    ax.plot(
        step,
        value,
        color=line.colour,
        linestyle=line.dashes,
        marker=line.marker,
        markersize=3,
        markevery=0.2,
        label=name,
    )


def title_of(key: str) -> str:
    """A record's key as a reader's words."""
    return key.replace("test_", "held-out ").replace("_", " ")


def draw_seeds(
    results: dict[str, list[list[dict]]], key: str, *, beside: str = "nsa", columns: int = 4
) -> Figure:
    """A small panel each: the mean of `key` over seeds, and a band from lowest to highest.

    results maps an attention to one list of evaluations a seed; `beside` is drawn in every panel.
    A run that stopped early, because it had solved its task, keeps its last value.
    """
    names = [name for name in results if name != beside]
    rows = -(-len(names) // columns)
    size = (WIDTH, 0.4 + 1.6 * rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False
    )
    for ax in axes.flat[len(names) :]:
        ax.axis("off")
    for ax, name in zip(axes.flat, names, strict=False):
        for each in (beside, name):
            draw_band(ax, ATTENTIONS[each].line, *by_seed(results[each], key))
        ax.set(ylim=(-0.03, 1.03))
        ax.set_title(name, fontsize=9)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel(title_of(key), fontsize=10)
    return figure


def draw_band(ax: Axes, line: Line, step: list[int], values: np.ndarray) -> None:
    """The mean over seeds, and a band from the lowest to the highest; values (seeds, steps)."""
    ax.fill_between(step, values.min(0), values.max(0), color=line.colour, alpha=0.25, lw=0)
    ax.plot(step, values.mean(0), color=line.colour, linestyle=line.dashes, linewidth=1.6)


def by_seed(evaluations: list[list[dict]], key: str) -> tuple[list[int], np.ndarray]:
    """The steps of the longest run, and each seed's values there (seeds, steps)."""
    step = max(([r["step"] for r in records] for records in evaluations), key=len)
    values = [[r[key] for r in records] for records in evaluations]
    return step, np.array([v + v[-1:] * (len(step) - len(v)) for v in values])


def draw_sweep(
    table: dict[str, list[dict]], ylabel: str, trained: dict[str, int] | None = None, **axis
) -> Figure:
    """Score against three costs, one line a system; bars reach from the lowest to the highest seed.

    table is budgets.sweep_table's; a large ring marks the n that `trained` names for a system.
    """
    costs = {
        "read_by_head": "read by a head",
        "read_by_group": "loaded for a group",
        "kept": "kept",
    }
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.9), sharey=True)
    for (cost, words), ax in zip(costs.items(), axes, strict=True):
        for system, points in table.items():
            draw_system(ax, system, points, cost, (trained or {}).get(system))
        ax.set(xlabel=f"tokens {words}", **axis)
    axes[0].set_ylabel(ylabel)
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=4, **BELOW)
    return figure


def draw_system(ax: Axes, system: str, points: list[dict], cost: str, ring: int | None) -> None:
    """One system's scores over one cost; a ring marks the point with n = ring."""
    line = NEIGHBOURS[system].line if system in NEIGHBOURS else TRAINED[system]
    style: dict[str, Any] = dict(color=line.colour, linestyle=line.dashes)
    x = [p[cost] for p in points]
    y = [p["score"] for p in points]
    ax.plot(x, y, marker=line.marker, ms=4, label=system, **style)
    ax.vlines(x, [p["low"] for p in points], [p["high"] for p in points], color=line.colour)
    for p in points:
        if p["settings"].get("num_selected", 0) == ring:
            ax.plot(p[cost], p["score"], "o", ms=11, mfc="none", mec=line.colour)
    if system == "dense":  # the baseline of every other
        ax.axhline(y[0], linewidth=0.8, **style)
