"""When a choice starts: hit rates over the sizes that decide it, and what helps, seed by seed."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nsa_lite.rivals.attentions import Line
from nsa_lite.show.curves import by_seed, draw_band
from nsa_lite.show.plots import WIDTH

SPANS = {
    1: Line("#0072B2", "-", "o"),
    2: Line("#D55E00", "--", "s"),
    4: Line("#009E73", ":", "^"),
    8: Line("#CC79A7", "-.", "D"),
}
LINES = tuple(SPANS.values())
QUIET = "#444444"
JITTER = 0.05  # seeds of one value stand beside each other

Points = Mapping[int, Mapping[int, Sequence[float]]]  # span -> l -> one value a seed
Runs = Mapping[str, Sequence[Sequence[dict]]]  # label -> one list of evaluations a seed


def draw_hits(hits: Points, chance: Mapping[int, float], ax: Axes) -> None:
    """The hit rate at the end over l, a line for each span of a fact, a dot a seed.

    chance: for each l the hit rate of a random choice.
    """
    draw_over_sizes(hits, ax)
    sizes = list(chance)
    ax.plot(sizes, list(chance.values()), color=QUIET, linewidth=1, linestyle=(0, (1, 2)))
    ax.text(sizes[0], chance[sizes[0]] - 0.03, "chance", fontsize=9, color=QUIET, va="top")
    ax.set_ylabel("hit rate at the end")


def draw_answers(answers: Points, ax: Axes) -> None:
    """The accuracy at the end over l, in the same way, and below it the legend for both."""
    draw_over_sizes(answers, ax)
    ax.set(xlabel="l, tokens in a compressed key", ylabel="right without\nselection")
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=2)


def draw_over_sizes(points: Points, ax: Axes) -> None:
    """A line for each span over the l of its values, which the lowest axis names."""
    for span, by_size in points.items():
        draw_span(span, by_size, ax)
    sizes = list(next(iter(points.values())))
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    ax.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    ax.set_ylim(0, 1.05)


def draw_span(span: int, by_size: Mapping[int, Sequence[float]], ax: Axes) -> None:
    """The means of one span over l, and beside each mean its seeds."""
    line = SPANS[span]
    means = [sum(values) / len(values) for values in by_size.values()]
    style: dict[str, Any] = dict(color=line.colour, linestyle=line.dashes, marker=line.marker)
    ax.plot(list(by_size), means, label=f"span {span}", **style)
    for size, values in by_size.items():
        beside = [size * (1 + JITTER * (i - (len(values) - 1) / 2)) for i in range(len(values))]
        ax.plot(beside, values, line.marker, color=line.colour, markersize=4, alpha=0.4)


def draw_starts(starts: Mapping[str, Sequence[int | None]], steps: int, ax: Axes) -> None:
    """For each arm the step at which each seed first hit half of the answers.

    A cross behind the last of `steps` stands for seeds that never did.
    """
    for row, begun in enumerate(starts.values()):
        found = [step for step in begun if step is not None]
        never = len(begun) - len(found)
        ax.plot(found, [row] * len(found), "o", color="#0072B2", alpha=0.5)
        ax.plot([1.06 * steps] * (never > 0), [row] * (never > 0), "x", color="#D55E00")
        if never:
            ax.text(1.12 * steps, row, f"{never} never", va="center", fontsize=9)
    ax.set_yticks(range(len(starts)), list(starts))
    ax.invert_yaxis()
    ax.set_xlim(0, 1.45 * steps)
    ax.set_xticks(range(0, steps + 1, steps // 3))
    ax.set_xlabel("first step with half of the answers hit")


def draw_border(
    hits: Points,
    answers: Points,
    chance: Mapping[int, float],
    starts: Mapping[str, Sequence[int | None]],
    steps: int,
) -> Figure:
    """Where NSA's own choice starts, where a summary alone answers, and what gets it started.

    answers: the accuracies of NSA without selection, whose compressed read-out is all it has.
    """
    figure, axes = plt.subplot_mosaic(
        [["hits", "starts"], ["answers", "starts"]],
        figsize=(WIDTH, 4.8),
        width_ratios=(1.15, 1),
    )
    draw_hits(hits, chance, axes["hits"])
    draw_answers(answers, axes["answers"])
    draw_starts(starts, steps, axes["starts"])
    return figure


def draw_over_steps(panels: Mapping[str, Runs], ends: Mapping[str, int]) -> Figure:
    """Accuracy over the steps: a panel for each title, a line and a band of seeds for each label.

    ends: for a title the step at which its teacher stops, drawn as a line.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.0), sharey=True, squeeze=False)
    for ax, (title, runs) in zip(axes[0], panels.items(), strict=True):
        draw_labelled(runs, ax)
        ax.set(title=title, xlabel="step", ylim=(0, 1.05))
        if title in ends:
            ax.axvline(ends[title], color=QUIET, linewidth=1, linestyle=(0, (1, 2)))
            ax.text(ends[title] + 8, 0.03, "the teacher stops", fontsize=9, color=QUIET)
    axes[0][0].set_ylabel("held-out accuracy")
    return figure


def draw_labelled(runs: Runs, ax: Axes) -> None:
    """One panel: each label's mean over seeds, and a band from the lowest to the highest."""
    for line, (label, seeds) in zip(LINES, runs.items(), strict=False):
        step, values = by_seed([list(seed) for seed in seeds], "test_accuracy")
        draw_band(ax, line, step, values)
        ax.lines[-1].set(label=label, marker=line.marker, markersize=4, markevery=2)
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2))
