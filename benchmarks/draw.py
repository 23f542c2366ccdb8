"""Pictures and tables of the recorded benchmarks: `python -m benchmarks.draw`, or a notebook.

Every number in them comes from benchmarks/results, whose records say where they were measured. The
command also writes the tables of README.md and NOTES.md anew, between their marks.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import counts, records
from benchmarks.bench import IDS, KEEP, OUR_DENSE
from benchmarks.cases import CONFIGS
from benchmarks.counts import Work
from benchmarks.records import RESULTS, recorded_on, unpinned
from benchmarks.roofline import H100, floor, floor_of_any
from nsa_lite.show import plots, tables
from nsa_lite.show.tables import Column

LINES = {  # (name, ids) -> label, colour, dashes, marker
    ("FlashAttention-2", "random"): ("FlashAttention-2", "#000000", "--", "s"),
    ("cuDNN", "random"): ("cuDNN", "#7F7F7F", "--", "^"),
    ("fla-core NSA", "random"): ("fla-core NSA", "#D55E00", "-.", "v"),
    ("NSA", "random"): ("NSA, random blocks", "#0072B2", "-", "o"),
    ("NSA", "coherent .36"): ("NSA, coherent blocks", "#56B4E9", "-", "D"),
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


def load() -> dict:
    """The record of the last `make bench`. Errors: FileNotFoundError if there is none."""
    return records.load("bench")


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
    sizes = counts.Sizes(CONFIGS[config].layer(), length)
    neighbours = counts.neighbours(sizes)
    union = counts.expected_union(sizes.config, length, neighbours, KEEP.get(ids, 0.0))
    return counts.works(sizes, union)


def timed_together(branch: str, what: str, kernels: dict[str, Work]) -> tuple[str, list[Work]]:
    """The name of one measured time, and the kernels whose floors it is compared with."""
    if branch == "selection":
        return "scores + top-n", list(kernels.values())
    parts = ("forward",) if what == "forward" else ("dq", "dk dv")
    return f"{branch} {what}", [kernels[part] for part in parts]


class Beside(NamedTuple):
    """A measured time and its floors, in milliseconds."""

    branch: str
    name: str
    measured: float
    tiles: float  # floor of these tiles
    least: float  # floor of any kernel


def beside(record: dict, config: str, length: int, ids: str = "random") -> list[Beside]:
    """Each branch's measured times beside their floors, forward and backward.

    A backward is two kernels, dq and dk dv: their floors are added up. So are scores and top-n.
    """
    works = counted(config, length, ids)
    found = []
    for branch, times in seconds(record, config, length, ids).items():
        for what, time in times.items():
            name, kernels = timed_together(branch, what, works[branch])
            tiles = sum(floor(work) for work in kernels)
            least = sum(floor_of_any(work) for work in kernels)
            found.append(Beside(branch, name, 1e3 * time, 1e3 * tiles, 1e3 * least))
    return found


def beside_floors(record: dict, config: str, length: int, ids: str = "random") -> str:
    """The same as a table of plain text, with how far each time is above the floor of its tiles."""
    rows = [
        (x.name, x.measured, x.tiles, x.least, x.measured / x.tiles)
        for x in beside(record, config, length, ids)
    ]
    return tables.table(COLUMNS, rows)


def heading(record: dict, what: str) -> str:
    """Two lines above a picture: where and for what it was recorded, and with which versions."""
    return f"Recorded: {record['device']}, {what}\n{unpinned(record)}".strip()


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
    figure.suptitle(heading(record, f"config {config}"), fontsize=10)
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
        xlabel="milliseconds",
    )
    figure.suptitle(heading(record, f"config {config}, T = {length}"), fontsize=10)
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


# --- tables of the README and the notes ---

TIMES = {  # label -> name, ids
    "FlashAttention-2": ("FlashAttention-2", "random"),
    "cuDNN": ("cuDNN", "random"),
    "fla-core NSA, less compression and no window": ("fla-core NSA", "random"),
    "NSA, blocks chosen at random": ("NSA", "random"),
    "NSA, neighbours keep .36 of their blocks": ("NSA", "coherent .36"),
}
PEERS = ("FlashAttention-2", "cuDNN")
KEYS = ("forward_ms", "backward_ms")
MARK = "<!-- {name} -->\n{text}\n<!-- end of {name} -->"


def short(length: int) -> str:
    """64k for 65536."""
    return f"{length // 1024}k" if length >= 1024 else str(length)


def readable(milliseconds: float) -> str:
    """Three digits or so."""
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.1f}"


def both_ways(
    record: dict, config: str, name: str, ids: str, length: int
) -> tuple[float, float] | None:
    """(forward, backward) milliseconds, or None where it was not measured, or refused."""
    times = [find(record, config, name, ids, key).get(length) for key in KEYS]
    return None if None in times else tuple(times)


def written(pair: tuple[float, float] | None, unit: str = "") -> str:
    """Forward / backward, or a dash."""
    if pair is None:
        return "-"
    form = readable if not unit else "{:.2f}".format
    return " / ".join(form(number) + unit for number in pair)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of a page."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def times_table(record: dict, config: str = "A", lengths: Sequence[int] = (8192, 65536)) -> str:
    """Milliseconds forward / backward of ours and of the peers, as markdown."""
    head = ["milliseconds", *(short(length) for length in lengths)]
    rows = [
        [label, *(written(both_ways(record, config, *which, length)) for length in lengths)]
        for label, which in TIMES.items()
    ]
    return markdown(head, rows)


def ratio(
    record: dict, config: str, ids: str, length: int, peer: str
) -> tuple[float, float] | None:
    """How many times faster our whole NSA is than a peer, forward and backward."""
    ours = both_ways(record, config, "NSA", ids, length)
    theirs = both_ways(record, config, peer, "random", length)
    if ours is None or theirs is None:
        return None
    return theirs[0] / ours[0], theirs[1] / ours[1]


def places(record: dict) -> list[tuple[str, int]]:
    """Every config and length of a record, short sequences first."""
    return sorted({(row["config"], row["length"]) for row in record["rows"]})


def ends(found: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Of each config the shortest and the longest sequence."""
    lengths = {config: [n for c, n in found if c == config] for config, _ in found}
    return [(c, n) for c, n in found if n in (min(lengths[c]), max(lengths[c]))]


def peers_table(
    record: dict, where: Sequence[tuple[str, int]], kinds: Sequence[str] = ("random",)
) -> str:
    """NSA's milliseconds at some configs and lengths, and how many times faster than each peer.

    A dash where a peer refuses: FlashAttention-2 wants values as wide as keys.
    """
    head = ["heads in groups, widths", "T", "blocks", "NSA, ms", *(f"over {p}" for p in PEERS)]
    rows = []
    for config, length in where:
        sizes = CONFIGS[config]
        label = f"{config}: {sizes.heads} in {sizes.groups}, {sizes.width} and {sizes.value}"
        for ids in kinds:
            ours = both_ways(record, config, "NSA", ids, length)
            ratios = (written(ratio(record, config, ids, length, p), "x") for p in PEERS)
            if ours is not None:
                rows.append([label, short(length), ids, written(ours), *ratios])
    return markdown(head, rows)


def floors_table(record: dict, config: str = "A", length: int = 65536) -> str:
    """Milliseconds forward / backward beside their floors, branch by branch, as markdown.

    Below them the whole, and the peers.
    """
    head = ["forward / backward", "measured", "floor of these tiles", "floor of any kernel"]
    found = {ids: beside(record, config, length, ids) for ids in IDS}
    rows = [
        floors_row(branch, "", found["random"])
        for branch in ("window", "compressed", "selection", "dense")
    ]
    rows += [floors_row("selected", f", {ids}", found[ids]) for ids in IDS]
    others = [(f"whole, {ids}", "NSA", ids) for ids in IDS]
    others += [(label, name, ids) for label, (name, ids) in TIMES.items() if name != "NSA"]
    for label, name, ids in others:
        rows.append([label, written(both_ways(record, config, name, ids, length)), "", ""])
    return markdown(head, rows)


def floors_row(branch: str, which: str, found: list[Beside]) -> list[str]:
    """One branch's line: its times, the floors of its tiles, of any kernel; dashes if not timed."""
    own = [x for x in found if x.branch == branch]
    label = {"selection": "scores + top-n, no backward", "dense": OUR_DENSE}.get(branch, branch)
    columns = zip(*((x.measured, x.tiles, x.least) for x in own), strict=True)
    cells = [" / ".join(map(readable, column)) for column in columns]
    return [label + which, *(cells or ["-"] * 3)]


def put(text: str, name: str, table: str) -> str:
    """A page's text with a table in place of what stood between its marks.

    Errors: ValueError for a page without these marks.
    """
    there = re.compile(MARK.format(name=name, text=".*?"), re.DOTALL)
    if not there.search(text):
        raise ValueError(f"name = {name}: the page has no marks for this table")
    return there.sub(lambda _: MARK.format(name=name, text=table), text)


def pages(record: dict) -> dict[Path, dict[str, str]]:
    """Which tables stand on which page, each behind a line that says where it was measured."""
    root = Path(__file__).parents[1]
    above = f"Recorded on one {recorded_on(record)}:\n\n"
    everywhere = places(record)
    steps = records.load("decode")
    return {
        root / "README.md": {
            "times": above + times_table(record),
            "beside peers": above + peers_table(record, ends(everywhere)),
            "decoding": f"Recorded on one {recorded_on(steps)}:\n\n" + decoding_table(steps),
        },
        root / "benchmarks/NOTES.md": {
            "floors": above + floors_table(record),
            "beside peers": above
            + peers_table(record, everywhere, kinds=("random", "coherent .75")),
        },
    }


def layer_table(record: dict) -> str:
    """The whole layer's times beside the dense layers', as a table of plain text."""
    columns = (
        Column(f"layer, ms; {recorded_on(record)}", 34),
        Column("T", 7, "d"),
        Column("forward", 9, ".2f"),
        Column("backward", 9, ".2f"),
        Column("peak GiB", 9, ".2f"),
    )
    rows = [
        (row["name"], row["length"], *(row.get(key) for key in (*KEYS, "peak_gib")))
        for row in record["rows"]
    ]
    return tables.table(columns, rows)


# --- decoding ---

STEPS = {  # who is timed -> colour, dashes, marker
    name: LINES[name, "random"][1:] for name in ("NSA", "FlashAttention-2", "cuDNN", "fla-core NSA")
}
READS = {"NSA": "NSA", "FlashAttention-2": "dense"}  # whose bytes are drawn, and for whom
OTHER = {"length": "batch", "batch": "length"}


def find_steps(
    record: dict, config: str, name: str, key: str, across: str, at: int
) -> dict[int, float]:
    """length -> microseconds (or bytes) of one curve at one batch, where across is "length".

    Across "batch" it is batch -> microseconds at one length. Nothing where a peer refused.
    """
    return {
        r[across]: r[key]
        for r in record["rows"]
        if (r["config"], r["name"], r[OTHER[across]]) == (config, name, at) and key in r
    }


def draw_decoding(record: dict, rate: float, config: str = "A", length: int = 65536) -> Figure:
    """Microseconds of a step in a CUDA graph, log-log: by context at batch 1, by batch at one.

    Dotted: what a step must read of the cache at `rate` bytes a second. With that of a copy, which
    writes too, it is no floor: who only reads can be faster.
    Alternative text: decoding_in_words.
    """
    figure, axes = plt.subplots(1, 2, figsize=(plots.WIDTH, 3.8), sharey=True, width_ratios=(3, 2))
    for ax, across, at in zip(axes, OTHER, (1, length), strict=True):
        draw_steps(ax, record, rate, config, across, at)
        ax.set(xscale="log", yscale="log")
        places = sorted(find_steps(record, config, "NSA", "graph_us", across, at))
        ax.set_xticks(places, [short(place) for place in places])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set(title="batch 1", xlabel="context, tokens", ylabel="microseconds a step")
    axes[1].set(title=f"context {short(length)}", xlabel="batch, sequences")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(heading(record, f"config {config}, CUDA graph"), fontsize=10)
    return figure


def draw_steps(ax: Axes, record: dict, rate: float, config: str, across: str, at: int) -> None:
    """One curve for each of STEPS that was measured, and what the bytes alone would take."""
    for name, (colour, dashes, marker) in STEPS.items():
        points = find_steps(record, config, name, "graph_us", across, at)
        ax.plot(
            list(points),
            list(points.values()),
            color=colour,
            linestyle=dashes,
            marker=marker,
            markersize=4,
            label=name,
        )
    for name, who in READS.items():
        points = find_steps(record, config, name, "bytes", across, at)
        ideal = [1e6 * amount / rate for amount in points.values()]
        colour, *_ = STEPS[name]
        ax.plot(
            list(points), ideal, color=colour, linestyle=":", label=f"{who}: bytes at the copy rate"
        )


def decoding_in_words(
    record: dict, rate: float, config: str = "A", lengths: Sequence[int] = (8192, 65536)
) -> str:
    """What draw_decoding shows, a line for each of some contexts and of the batches at the last."""
    places = [(1, length) for length in lengths]
    batches = find_steps(record, config, "NSA", "graph_us", "batch", lengths[-1])
    places += [(batch, lengths[-1]) for batch in batches if batch != 1]
    return "\n".join(step_in_words(record, rate, config, *place) for place in places)


def step_in_words(record: dict, rate: float, config: str, batch: int, length: int) -> str:
    """All times of one batch and context in microseconds, and what the bytes alone would take."""
    times = {}
    for name in STEPS:
        times[name] = find_steps(record, config, name, "graph_us", "length", batch).get(length)
    for name, who in READS.items():
        amount = find_steps(record, config, name, "bytes", "length", batch).get(length)
        times[f"{who}, its bytes at the copy rate"] = (
            None if amount is None else 1e6 * amount / rate
        )
    said = [f"{name} {readable(time)}" for name, time in times.items() if time is not None]
    return f"batch {batch}, {short(length)}, microseconds: {'; '.join(said)}"


def decoding_table(record: dict, config: str = "A") -> str:
    """Microseconds of a step in a CUDA graph, a line for each batch and context, as markdown."""
    places = sorted({(r["batch"], r["length"]) for r in record["rows"] if r["config"] == config})
    head = ["microseconds", *STEPS]
    rows = []
    for batch, length in places:
        found = {n: find_steps(record, config, n, "graph_us", "length", batch) for n in STEPS}
        times = [found[name].get(length) for name in STEPS]
        if times[0] is not None:
            label = f"batch {batch}, {short(length)}"
            rows.append([label, *("-" if time is None else readable(time) for time in times)])
    return markdown(head, rows)


def draw_host_time(record: dict, config: str = "A", batch: int = 1, length: int = 65536) -> Figure:
    """Microseconds of a step, called from Python and replayed from a CUDA graph: two bars each.

    Alternative text: host_time_in_words.
    """
    figure, ax = plt.subplots(figsize=(plots.WIDTH, 2.9))
    names = [
        n for n in STEPS if length in find_steps(record, config, n, "graph_us", "length", batch)
    ]
    looks = {"eager_us": ("called from Python", "forced"), "graph_us": ("CUDA graph", "selected")}
    for place, (key, (label, kind)) in enumerate(looks.items()):
        times = [find_steps(record, config, n, key, "length", batch)[length] for n in names]
        bars = ax.barh(
            [y + 0.4 * place for y in range(len(names))],
            times,
            height=0.4,
            color=plots.COLOURS[kind],
            edgecolor="#444444",
            hatch=plots.HATCHES[kind],
            label=label,
        )
        ax.bar_label(bars, [readable(time) for time in times], padding=3)
    ax.set(yticks=[y + 0.2 for y in range(len(names))], yticklabels=names)
    ax.set(ylim=(len(names) - 0.2, -0.4), xlabel="microseconds a step")
    ax.margins(x=0.1)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    what = f"config {config}, batch {batch}, context {short(length)}"
    figure.suptitle(heading(record, what), fontsize=10)
    return figure


def host_time_in_words(record: dict, config: str = "A", batch: int = 1, length: int = 65536) -> str:
    """How many times as long each takes that is called from Python, in numbers."""
    said = []
    for name in STEPS:
        eager, graph = (
            find_steps(record, config, name, key, "length", batch).get(length)
            for key in ("eager_us", "graph_us")
        )
        if eager and graph:
            said.append(f"{name} {readable(eager)} us called, {readable(graph)} in a graph")
    return "; ".join(said)


# --- the command ---


def draw_all(record: dict) -> None:
    """The pictures of results/, and the tables of the pages."""
    plots.use_style()
    draw_scaling(record).savefig(RESULTS / "scaling.png")
    longest = max(row["length"] for row in record["rows"] if row["config"] == "A")
    draw_pieces(record, "A", longest).savefig(RESULTS / "pieces.png")
    for page, found in pages(record).items():
        text = page.read_text("utf-8")
        for name, table in found.items():
            text = put(text, name, table)
        page.write_text(text, "utf-8")
    print(f"Recorded on one {recorded_on(record)}")
    print(peers_table(record, places(record), kinds=IDS))
    print(beside_floors(record, "A", longest))


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
    draw_all(record)
    if (RESULTS / "layer.json").exists():
        print(layer_table(records.load("layer")))
    if (RESULTS / "decode.json").exists():
        steps = records.load("decode")
        draw_decoding(steps, H100["memory"]).savefig(RESULTS / "decoding.png")
        print(decoding_in_words(steps, H100["memory"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
