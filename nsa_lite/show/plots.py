"""The course's pictures: queries are rows, keys are columns, the origin is top left.

One colour and one hatch for each thing a block can be, so that no picture needs colour alone.
"""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from torch import Tensor

from nsa_lite.blocks import forced_blocks, num_compressed, num_select_blocks
from nsa_lite.checks import require, require_int, require_int_tensor
from nsa_lite.config import NSAConfig, require_config

# Okabe-Ito colours: told apart with the common kinds of colour blindness.
COLOURS = {
    "compressed": "#56B4E9",
    "selected": "#0072B2",
    "forced": "#E69F00",
    "window": "#009E73",
    "masked": "#FFFFFF",
    "unused": "#F2F2F2",
}
HATCHES = {"selected": "//", "forced": "xx", "window": ".."}
WIDTH = 7.0  # inches


def use_style() -> None:
    """Set matplotlib to the course's size, resolution and letters (9 points or more)."""
    plt.rcParams.update({
        "figure.figsize": (WIDTH, 3.0), "figure.dpi": 96, "savefig.dpi": 96,
        "font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10,
        "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
        "image.cmap": "cividis", "hatch.linewidth": 0.6, "figure.constrained_layout.use": True,
        "axes.spines.top": False, "axes.spines.right": False,
    })  # fmt: skip


def cell(ax: Axes, x: float, y: float, width: float, kind: str, height: float = 1.0) -> None:
    """One box in the colour and hatch of `kind`, its left edge at x, its top edge at y."""
    ax.add_patch(
        Rectangle(
            (x, y),
            width,
            height,
            facecolor=COLOURS[kind],
            edgecolor="#444444",
            linewidth=0.5,
            hatch=HATCHES.get(kind),
        )
    )


def legend(figure: Figure, kinds: list[str]) -> None:
    """One legend for the whole figure, below it."""
    boxes = [
        Patch(facecolor=COLOURS[k], edgecolor="#444444", hatch=HATCHES.get(k), label=k)
        for k in kinds
    ]
    figure.legend(handles=boxes, loc="outside lower center", ncols=len(kinds), frameon=False)


MAP = {  # box -> (left edge, lower edge, width, text)
    "x": (0.0, 1.35, 0.8, "x"),
    "query": (1.5, 3.9, 1.6, "query q"),
    "keys compressed": (1.5, 2.7, 1.6, "K, V, then φ"),
    "keys selected": (1.5, 1.35, 1.6, "K, V of its own"),
    "keys window": (1.5, 0.0, 1.6, "K, V of its own"),
    "compressed": (4.0, 2.7, 2.5, "compressed: every block,\nas one token"),
    "selected": (4.0, 1.35, 2.5, "selected: n blocks,\nevery token"),
    "window": (4.0, 0.0, 2.5, "window: last w tokens"),
    "gates": (1.5, -1.2, 1.6, "gates"),
    "sum": (7.4, 1.35, 1.4, "sum of\ngate x branch"),
}
MAP_ARROWS = [  # (from, to)
    *(("x", to) for to in ("query", "keys compressed", "keys selected", "keys window", "gates")),
    *((f"keys {name}", name) for name in ("compressed", "selected", "window")),
    *((name, "sum") for name in ("compressed", "selected", "window")),
]


def draw_course_map(here: str | None = None) -> Figure:
    """The layer with its arrows; branches up to `here`, in the course's order, are filled."""
    names = ["compressed", "selected", "window"]
    require(here in (None, *names), "here", repr(here), f"must be None or one of {names}")
    built = names if here is None else names[: names.index(here) + 1]
    figure, ax = plt.subplots(figsize=(WIDTH, 3.6))
    for name, (x, y, width, text) in MAP.items():
        on = name in built
        plain = "#F2F2F2" if name in names else "#FFFFFF"
        colour = COLOURS[name] if on else plain
        hatch = HATCHES.get(name) if on else None
        _box(ax, x, y, text, colour, width, hatch, "bold" if here == name else "normal")
    for start, end in MAP_ARROWS:
        x, y, width, _ = MAP[start]
        _arrow(ax, (x + width, y + 0.4), (MAP[end][0], MAP[end][1] + 0.4))
    for y in (3.15, 1.8, 0.45):  # q is the same for all three; it enters each at its upper left
        _arrow(ax, (3.1, 4.3), (4.0, y + 0.15))
    _arrow(ax, (4.6, 2.7), (4.6, 2.15))
    ax.text(4.75, 2.42, "importance, top n", va="center", fontsize=9)
    _arrow(ax, (3.1, -0.8), (8.1, 1.35), "angle,angleA=0,angleB=90,rad=4")
    ax.set(xlim=(-0.1, 8.9), ylim=(-1.3, 4.8))
    ax.axis("off")
    return figure


def _arrow(ax: Axes, start: tuple, end: tuple, path: str = "arc3") -> None:
    style = {"arrowstyle": "->", "color": "#444444", "connectionstyle": path}
    ax.annotate("", end, start, arrowprops={**style, "shrinkA": 0, "shrinkB": 0})


def _box(ax, x, y, text, colour, width=1.7, hatch=None, weight="normal") -> None:
    ax.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            0.8,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=colour,
            edgecolor="#444444",
            hatch=hatch,
        )
    )
    ax.text(
        x + width / 2,
        y + 0.4,
        text,
        ha="center",
        va="center",
        weight=weight,
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
    )


def draw_query_reads(config: NSAConfig, ids: Tensor, t: int) -> Figure:
    """Which tokens query t reads, one strip a branch; ids (n,) are its selected blocks.

    Errors: ValueError or TypeError that names the argument.
    """
    require_config(config)
    require_int("t", t, at_least=0)
    require_int_tensor("ids", ids, "(n,)")
    require(ids.dim() == 1, "ids.shape", tuple(ids.shape), "must be (n,)")
    l, d, l_sel = config.block_size, config.stride, config.select_block_size
    length = num_select_blocks(t + 1, l_sel) * l_sel
    figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 2.9), sharex=True)
    for i in range(num_compressed(t + 1, l, d)):
        cell(axes[0], i * d, i % (l // d), l, "compressed")
    axes[0].set_ylim(l // d, 0)
    kinds = block_kinds(config, ids[None, None, None], t)[0, 0, 0]
    for j, kind in enumerate(kinds):
        cell(axes[1], j * l_sel, 0, min(l_sel, t + 1 - j * l_sel), kind)
    first = max(0, t + 1 - config.window)
    cell(axes[2], 0, 0, first, "unused")
    cell(axes[2], first, 0, t + 1 - first, "window")
    for ax, name in zip(axes, ("compressed", "selected", "window"), strict=True):
        ax.set(yticks=[], xlim=(0, length))
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.axvline(t + 0.5, color="black", linewidth=1.2)
    for ax in axes[1:]:
        ax.set_ylim(1, 0)
    axes[2].set_xlabel(f"token; the line is query {t}")
    legend(figure, ["compressed", "forced", "selected", "window", "unused"])
    return figure


def block_kinds(config: NSAConfig, ids: Tensor, start: int = 0) -> np.ndarray:
    """What each block is to each query: "forced", "selected", "unused" or "masked" (not begun).

    Shapes: ids (B, G, T, n) -> str (B, G, T, blocks).
    """
    positions = torch.arange(start, start + ids.shape[2])
    count = num_select_blocks(start + ids.shape[2], config.select_block_size)
    j = torch.arange(count)
    chosen = (ids[..., None].cpu() == j).any(-2).numpy()
    forced = forced_blocks(
        positions, count, config.select_block_size, config.num_initial, config.num_local
    ).numpy()
    legal = (j * config.select_block_size <= positions[:, None]).numpy()
    kinds = np.where(chosen & forced, "forced", np.where(chosen, "selected", "unused"))
    return np.where(legal, kinds, "masked")


def draw_block_map(config: NSAConfig, ids: Tensor, title: str = "") -> Figure:
    """Queries down, blocks across: what each query of one group reads; ids (T, n).

    Errors: ValueError or TypeError that names the argument.
    """
    require_config(config)
    require_int_tensor("ids", ids, "(T, n)")
    require(ids.dim() == 2, "ids.shape", tuple(ids.shape), "must be (T, n)")
    kinds = block_kinds(config, ids[None, None])[0, 0]
    order = ["masked", "unused", "selected", "forced"]
    figure, ax = plt.subplots(figsize=(WIDTH, 4.2))
    image = np.vectorize(order.index)(kinds)
    ax.imshow(
        image,
        cmap=ListedColormap([COLOURS[k] for k in order]),
        vmin=0,
        vmax=3,
        aspect="auto",
        interpolation="nearest",
        extent=(0, kinds.shape[1], kinds.shape[0], 0),
    )
    for j, column in enumerate(image.T):  # one hatched box for a run of queries, not one each
        edges = np.flatnonzero(np.diff(column, prepend=-1, append=-1))
        for first, end in itertools.pairwise(edges.tolist()):
            if (kind := order[column[first]]) in HATCHES:
                cell(ax, j, first, 1, kind, end - first)
    for j in range(kinds.shape[1]):
        ax.axvline(j, color="#BBBBBB", linewidth=0.4)
    ax.set(
        xlabel=f"selection block (of {config.select_block_size} tokens)",
        ylabel="query",
        title=title,
    )
    legend(figure, ["forced", "selected", "unused", "masked"])
    return figure


def figure_and_axes(ax: Axes | None, height: float) -> tuple[Figure, Axes]:
    """A new figure and its one panel, or the panel that is given and its figure."""
    if ax is None:
        figure = plt.figure(figsize=(WIDTH, height))
        return figure, figure.subplots()
    figure = ax.get_figure(root=True)
    assert figure is not None, "the panel belongs to a figure"
    return figure, ax


def draw_scores(
    scores: Tensor,
    title: str = "",
    *,
    xlabel: str = "key",
    ylabel: str = "query",
    every: int = 0,
    numbers: bool = False,
    difference: bool = False,
    ax: Axes | None = None,
) -> Figure:
    """A matrix (rows, columns) as colours; NaN is left white; `every` draws block borders.

    difference=True centres the colours on 0 (PuOr); numbers=True prints each entry.
    """
    require(scores.dim() == 2, "scores.shape", tuple(scores.shape), "must be (rows, columns)")
    matrix = scores.detach().cpu().double().numpy()
    figure, ax = figure_and_axes(ax, height=3.4)
    limit = float(np.nanmax(np.abs(matrix))) if difference else None
    lowest = None if limit is None else -limit
    image = ax.imshow(
        matrix,
        cmap="PuOr" if difference else "cividis",
        aspect="auto",
        interpolation="nearest",
        vmin=lowest,
        vmax=limit,
    )
    figure.colorbar(image, ax=ax, shrink=0.9)
    for edge in range(every, matrix.shape[1], every) if every else ():
        ax.axvline(edge - 0.5, color="#444444", linewidth=0.8)
    if numbers:
        for (row, column), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                _number(ax, column, row, value)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure


def _number(ax: Axes, x: int, y: int, value: float) -> None:
    ax.text(
        x,
        y,
        f"{value:.2g}",
        ha="center",
        va="center",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.75},
    )


def draw_read_map(masks: dict[str, Tensor], ax: Axes | None = None, title: str = "") -> Figure:
    """Which keys each query reads, by branch: masks maps a kind to bool (T, S); later ones win."""
    kinds = list(masks)
    shape = next(iter(masks.values())).shape
    causal = np.tri(*shape, dtype=int)  # 0 masked, 1 unused, then one number a kind
    for number, kind in enumerate(kinds, start=2):
        causal[masks[kind].cpu().numpy()] = number
    alone = ax is None
    figure, ax = figure_and_axes(ax, height=3.6)
    colours = ListedColormap([COLOURS[k] for k in ("masked", "unused", *kinds)])
    ax.imshow(
        causal,
        cmap=colours,
        vmin=0,
        vmax=len(kinds) + 1,
        interpolation="nearest",
        extent=(0, shape[1], shape[0], 0),
    )
    if shape[0] * shape[1] <= 1500:
        for (t, s), number in np.ndenumerate(causal):
            cell(ax, s, t, 1, ("masked", "unused", *kinds)[number])
    ax.set(xlabel="key", ylabel="query", title=title)
    if alone:
        legend(figure, [*kinds, "unused", "masked"])
    return figure
