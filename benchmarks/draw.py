"""Pictures of a recorded benchmark: `python -m benchmarks.draw`, or draw_* in a notebook.

Every number in them comes from benchmarks/results/bench.json, which says where it was measured.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import counts
from benchmarks.bench import KEEP, OUR_DENSE, RESULTS
from benchmarks.cases import CONFIGS
from benchmarks.counts import Work
from benchmarks.roofline import floor, floor_of_any
from nsa_lite import NSAConfig
from nsa_lite.show import plots, tables
from nsa_lite.show.tables import Column

LINES = {  # (name, ids) -> label, colour, dashes, marker
    ("FlashAttention-2", "random"): ("FlashAttention-2", "#000000", "--", "s"),
    ("cuDNN", "random"): ("cuDNN", "#7F7F7F", "--", "^"),
    ("fla-core NSA", "random"): ("fla-core NSA", "#D55E00", "-.", "v"),
    ("NSA", "random"): ("NSA, random blocks", "#0072B2", "-", "o"),
    ("NSA", "coherent .75"): ("NSA, coherent blocks", "#56B4E9", "-", "D"),
}
PIECES = ("window", "compressed", "scores + top-n", "selected")
COLOURS = {
    "window": "window",
    "compressed": "compressed",
    "scores + top-n": "unused",
    "selected": "selected",
}
ROOFLINE = {  # what is timed, and what the roofline calls it
    "window": "window",
    "compressed": "compressed",
    "selected": "selected",
    OUR_DENSE: "dense",
    "scores + top-n": "selection",
}
COLUMNS = (
    Column("milliseconds", 22),
    Column("measured", 8, ".2f"),
    Column("these tiles", 12, ".2f"),
    Column("any kernel", 11, ".2f"),
    Column("measured / these tiles", 24, ".2f"),
)


def load(path: Path = RESULTS / "bench.json") -> dict:
    """The record of the last `make bench`. Errors: FileNotFoundError if there is none."""
    return json.loads(path.read_text("utf-8"))


def find(record: dict, config: str, name: str, ids: str, key: str) -> dict[int, float]:
    """length -> milliseconds (or GiB) of one curve; nothing where a peer refused."""
    return {
        r["length"]: r[key]
        for r in record["rows"]
        if (r["config"], r["name"], r["ids"]) == (config, name, ids) and key in r
    }


def speedup(
    record: dict,
    config: str,
    length: int,
    key: str,
    ids: str = "random",
    over: str = "FlashAttention-2",
) -> float:
    """How many times faster our whole NSA is than a peer, at one length."""
    ours = find(record, config, "NSA", ids, key)[length]
    return find(record, config, over, "random", key)[length] / ours


def seconds(
    record: dict, config: str, length: int, ids: str = "random"
) -> dict[str, dict[str, float]]:
    """Measured times as seconds["window"]["forward"], under the names of the roofline's kernels."""
    times = {}
    for name, branch in ROOFLINE.items():
        kind = ids if name == "selected" else "random"
        for what in ("forward", "backward"):
            found = find(record, config, name, kind, f"{what}_ms")
            if length in found:
                times.setdefault(branch, {})[what] = found[length] / 1e3
    return times


def counted(config: str, length: int, ids: str = "random") -> dict[str, dict[str, Work]]:
    """The counted work of one config's kernels, for ids of that coherence."""
    sizes = CONFIGS[config]
    layer = NSAConfig(
        heads=sizes.heads, kv_heads=sizes.groups, head_dim=sizes.width, value_dim=sizes.value
    )
    counted_sizes = counts.Sizes(layer, length)
    neighbours = counts.neighbours(counted_sizes)
    union = counts.expected_union(layer, length, neighbours, KEEP.get(ids, 0.0))
    return counts.works(counted_sizes, union)


def timed_together(branch: str, what: str, kernels: dict[str, Work]) -> tuple[str, list[Work]]:
    """The name of one measured time, and the kernels whose floors it is compared with."""
    if branch == "selection":
        return "scores + top-n", list(kernels.values())
    parts = ("forward",) if what == "forward" else ("dq", "dk dv")
    return f"{branch} {what}", [kernels[part] for part in parts]


def beside_floors(record: dict, config: str, length: int, ids: str = "random") -> str:
    """Each branch's measured milliseconds, the floors of its tiles and of any kernel.

    A backward is two kernels, dq and dk dv: their floors are added up. So are scores and top-n.
    """
    works = counted(config, length, ids)
    rows = []
    for branch, times in seconds(record, config, length, ids).items():
        for what, time in times.items():
            name, kernels = timed_together(branch, what, works[branch])
            tiles = sum(floor(work) for work in kernels)
            least = sum(floor_of_any(work) for work in kernels)
            rows.append((name, 1e3 * time, 1e3 * tiles, 1e3 * least, time / tiles))
    return tables.table(COLUMNS, rows)


def draw_scaling(record: dict, config: str = "A") -> Figure:
    """Milliseconds against length on log-log axes, forward and backward."""
    figure, axes = plt.subplots(1, 2, figsize=(plots.WIDTH, 3.4), sharey=True)
    lengths = sorted({row["length"] for row in record["rows"] if row["config"] == config})
    for ax, key in zip(axes, ("forward_ms", "backward_ms"), strict=True):
        draw_curves(ax, record, config, key)
        ax.set(title=key.removesuffix("_ms"), xlabel="T, tokens", xscale="log", yscale="log")
        ax.set_xticks(lengths, [f"{t // 1024}k" if t >= 1024 else str(t) for t in lengths])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Recorded: {record['device']}, config {config}", fontsize=10)
    return figure


def draw_curves(ax: Axes, record: dict, config: str, key: str) -> None:
    """One curve for each of LINES that was measured."""
    for (name, ids), (label, colour, dashes, marker) in LINES.items():
        points = sorted(find(record, config, name, ids, key).items())
        if points:
            lengths, times = zip(*points, strict=True)
            ax.plot(
                lengths,
                times,
                color=colour,
                linestyle=dashes,
                marker=marker,
                markersize=4,
                label=label,
            )


def draw_pieces(record: dict, config: str, length: int, ids: str = "random") -> Figure:
    """What the whole consists of: one bar forward, one backward, a segment for each piece."""
    figure, ax = plt.subplots(figsize=(plots.WIDTH, 2.4))
    for y, key in enumerate(("forward_ms", "backward_ms")):
        left = 0.0
        for piece in PIECES:
            kind = ids if piece == "selected" else "random"
            width = find(record, config, piece, kind, key).get(length, 0.0)
            draw_piece(ax, y, left, width, piece)
            left += width
    ax.set(
        yticks=(0, 1),
        yticklabels=("forward", "backward"),
        ylim=(1.6, -0.6),
        xlabel=f"milliseconds; recorded: {record['device']}, config {config}, T = {length}",
    )
    figure.legend(loc="outside lower center", ncols=len(PIECES), frameon=False)
    return figure


def draw_piece(ax: Axes, y: int, left: float, width: float, piece: str) -> None:
    """One segment of a bar; the legend takes its names from the first bar."""
    colour = COLOURS[piece]
    ax.barh(
        y,
        width,
        left=left,
        color=plots.COLOURS[colour],
        edgecolor="#444444",
        hatch=plots.HATCHES.get(colour),
        label=piece if y == 0 else None,
    )


def main(argv: Sequence[str] = ()) -> int:
    argparse.ArgumentParser(
        prog="python -m benchmarks.draw",
        description="Draw the recorded times, and print the floors.",
    ).parse_args(argv)
    try:
        record = load()
    except FileNotFoundError as error:
        print(
            f"error: {error.filename}: no record; `make bench` on a GPU makes one", file=sys.stderr
        )
        return 2
    plots.use_style()
    draw_scaling(record).savefig(RESULTS / "scaling.png")
    longest = max(r["length"] for r in record["rows"] if r["config"] == "A")
    draw_pieces(record, "A", longest).savefig(RESULTS / "pieces.png")
    for key in ("forward_ms", "backward_ms"):
        times = [
            f"{speedup(record, 'A', longest, key, ids):.1f}x ({ids})"
            for ids in ("random", "coherent .75")
        ]
        what = key.removesuffix("_ms")
        print(f"NSA over FlashAttention-2 at {longest}, {what}: {', '.join(times)}")
    print(beside_floors(record, "A", longest))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
