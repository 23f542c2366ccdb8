"""Pictures of a recorded benchmark: `python -m benchmarks.draw`, or draw_* in a notebook.

Every number in them comes from benchmarks/results/bench.json, which says where it was measured.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks import roofline
from benchmarks.bench import KEEP, OUR_DENSE, RESULTS
from benchmarks.cases import CONFIGS
from nsa_lite import NSAConfig
from nsa_lite.show import plots

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
    names = {
        "window": "window",
        "compressed": "compressed",
        "selected": "selected",
        OUR_DENSE: "dense",
        "scores + top-n": "selection",
    }
    times = {}
    for name, branch in names.items():
        for what in ("forward", "backward"):
            found = find(
                record, config, name, ids if name == "selected" else "random", f"{what}_ms"
            )
            if length in found:
                times.setdefault(branch, {})[what] = found[length] / 1e3
    return times


def beside_floors(record: dict, config: str, length: int, ids: str = "random") -> str:
    """Each branch's measured milliseconds, the floors of its tiles and of any kernel.

    A backward is two kernels, dq and dk dv: their floors are added up. So are scores and top-n.
    """
    sizes = CONFIGS[config]
    layer = NSAConfig(
        heads=sizes.heads, kv_heads=sizes.groups, head_dim=sizes.width, value_dim=sizes.value
    )
    union = roofline.expected_union(layer, length, roofline.neighbours(layer), KEEP.get(ids, 0.0))
    works = roofline.works(roofline.Sizes(layer, length), union)
    lines = [f"{'milliseconds':22} measured  these tiles  any kernel   measured / these tiles"]
    for branch, times in seconds(record, config, length, ids).items():
        for what, time in times.items():
            kernels = (
                works[branch]
                if branch == "selection"
                else {
                    kernel: works[branch][kernel]
                    for kernel in (("forward",) if what == "forward" else ("dq", "dk dv"))
                }
            )
            tiles, least = (
                sum(map(f, kernels.values())) for f in (roofline.floor, roofline.floor_of_any)
            )
            name = "scores + top-n" if branch == "selection" else f"{branch} {what}"
            lines.append(
                f"{name:22} {1e3 * time:8.2f} {1e3 * tiles:12.2f} {1e3 * least:11.2f} "
                f"{time / tiles:12.2f}"
            )
    return "\n".join(lines)


def draw_scaling(record: dict, config: str = "A") -> Figure:
    """Milliseconds against length on log-log axes, forward and backward."""
    figure, axes = plt.subplots(1, 2, figsize=(plots.WIDTH, 3.4), sharey=True)
    for ax, key in zip(axes, ("forward_ms", "backward_ms"), strict=True):
        for (name, ids), (label, colour, dashes, marker) in LINES.items():
            if points := find(record, config, name, ids, key):
                ax.plot(
                    *zip(*sorted(points.items()), strict=True),
                    color=colour,
                    linestyle=dashes,
                    marker=marker,
                    markersize=4,
                    label=label,
                )
        lengths = sorted({r["length"] for r in record["rows"] if r["config"] == config})
        ax.set(title=key.removesuffix("_ms"), xlabel="T, tokens", xscale="log", yscale="log")
        ax.set_xticks(lengths, [f"{t // 1024}k" if t >= 1024 else str(t) for t in lengths])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    figure.suptitle(f"Recorded: {record['device']}, config {config}", fontsize=10)
    return figure


def draw_pieces(record: dict, config: str, length: int, ids: str = "random") -> Figure:
    """What the whole consists of: one bar forward, one backward, a segment for each piece."""
    figure, ax = plt.subplots(figsize=(plots.WIDTH, 2.4))
    for y, key in enumerate(("forward_ms", "backward_ms")):
        left = 0.0
        for piece in PIECES:
            of = ids if piece == "selected" else "random"
            width = find(record, config, piece, of, key).get(length, 0.0)
            kind = COLOURS[piece]
            ax.barh(
                y,
                width,
                left=left,
                color=plots.COLOURS[kind],
                edgecolor="#444444",
                hatch=plots.HATCHES.get(kind),
                label=piece if y == 0 else None,
            )
            left += width
    ax.set(
        yticks=(0, 1),
        yticklabels=("forward", "backward"),
        ylim=(1.6, -0.6),
        xlabel=f"milliseconds; recorded: {record['device']}, config {config}, T = {length}",
    )
    figure.legend(loc="outside lower center", ncols=len(PIECES), frameon=False)
    return figure


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m benchmarks.draw",
        description="Draw the recorded times, and print the floors.",
    ).parse_args()
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
        print(
            f"NSA over FlashAttention-2 at {longest}, {key.removesuffix('_ms')}: "
            + ", ".join(
                f"{speedup(record, 'A', longest, key, ids):.1f}x ({ids})"
                for ids in ("random", "coherent .75")
            )
        )
    print(beside_floors(record, "A", longest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
