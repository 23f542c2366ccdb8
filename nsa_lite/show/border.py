"""When a choice starts: hit rates over the sizes that decide it, and what helps, seed by seed."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nsa_lite.show.plots import WIDTH

FACTS = {1: ("#0072B2", "o", "-"), 2: ("#D55E00", "s", "--"), 4: ("#009E73", "^", ":")}
JITTER = 0.05  # seeds of one value stand beside each other

Points = Mapping[int, Mapping[int, Sequence[float]]]  # facts a block -> l -> one value a seed


def draw_hits(hits: Points, chance: float, ax: Axes) -> None:
    """The hit rate at the end over l, a line for each number of facts in a block, a dot a seed."""
    for facts, by_size in hits.items():
        colour, marker, dashes = FACTS[facts]
        sizes = list(by_size)
        means = [sum(by_size[size]) / len(by_size[size]) for size in sizes]
        label = f"{facts} fact{'s' * (facts > 1)} a block"
        ax.plot(sizes, means, color=colour, linestyle=dashes, marker=marker, label=label)
        for size in sizes:
            values = by_size[size]
            shift = [size * (1 + JITTER * (i - len(values) / 2)) for i in range(len(values))]
            ax.plot(shift, values, color=colour, marker=marker, linestyle="", alpha=0.4)
    ax.axhline(chance, color="#444444", linewidth=0.8, linestyle=(0, (1, 2)))
    ax.text(40, chance, "chance", fontsize=9, color="#444444", va="center")
    ax.set_xscale("log", base=2)
    ax.set_xticks([4, 8, 16, 32], ["4", "8", "16", "32"])
    ax.set_xlim(3.2, 80)
    ax.set(xlabel="l, tokens in a compressed key", ylabel="hit rate at the end", ylim=(0, 1.05))
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)


def draw_starts(starts: Mapping[str, Sequence[int | None]], steps: int, ax: Axes) -> None:
    """For each arm the step at which each seed began to find answers.

    A cross behind the last of `steps` stands for seeds that never did.
    """
    for row, begun in enumerate(starts.values()):
        found = [step for step in begun if step is not None]
        never = len(begun) - len(found)
        ax.plot(found, [row] * len(found), "o", color="#0072B2", alpha=0.6)
        ax.plot([1.06 * steps] * (never > 0), [row] * (never > 0), "x", color="#D55E00")
        if never:
            ax.text(1.1 * steps, row, f"{never} of {len(begun)}", va="center", fontsize=9)
    ax.set_yticks(range(len(starts)), list(starts))
    ax.invert_yaxis()
    ax.set_xlim(0, 1.3 * steps)
    ax.set_xlabel("first step with half of the answers")


def draw_border(
    hits: Points, chance: float, starts: Mapping[str, Sequence[int | None]], steps: int
) -> Figure:
    """Where NSA's own choice starts, and what gets it started, in two panels."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.6), width_ratios=(1, 1.2))
    draw_hits(hits, chance, left)
    draw_starts(starts, steps, right)
    return figure
