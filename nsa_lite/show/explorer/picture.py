"""Four queries as a still picture, for readers without a running kernel."""

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from nsa_lite.show import plots
from nsa_lite.show.explorer.sequence import Place, TracedSequence

MANY = 300  # blocks: up to so many are drawn one by one


def four_queries(sequence: TracedSequence, shown: int) -> list[int]:
    """The query that is shown and up to three more: ones that ask something, or evenly spread."""
    asked = sequence.positions[sequence.answer_at >= 0]
    pool = asked if len(asked) >= 4 else sequence.positions
    spread = pool[torch.linspace(len(pool) - 1, 0, 5).long()].tolist()
    others = [t for t in dict.fromkeys(spread) if t != shown]
    return sorted([shown, *others[:3]])


def draw_queries(sequence: TracedSequence, place: Place, queries: list[int]) -> Figure:
    """The importance of each block to each of a few queries, and below it what the query reads."""
    with plt.rc_context():
        plots.use_style()
        columns = min(2, len(queries))
        rows = -(-len(queries) // columns)
        figure, axes = plt.subplots(
            rows, columns, figsize=(plots.WIDTH, 0.6 + 1.9 * rows), squeeze=False
        )
        for ax in axes.flat[len(queries) :]:
            ax.axis("off")
        for ax, t in zip(axes.flat, queries, strict=False):
            _draw_query(ax, sequence, place, t)
        for ax in axes[-1]:
            ax.set_xlabel(f"selection block (of {sequence.config.select_block_size} tokens)")
        for ax in axes[:, 0]:
            ax.set_ylabel("importance")
        plots.legend(figure, ["forced", "selected", "unused", "window"])
        figure.canvas.draw()
    return figure


def _draw_query(ax: Axes, sequence: TracedSequence, place: Place, t: int) -> None:
    chosen = sequence.selected(place, t)
    forced = sequence.forced(t)
    score = sequence.trace(place).importance[sequence.row, place.group, sequence.index[t]]
    score = score.cpu().nan_to_num(nan=0.0)
    top = float(score.max()) or 1.0
    _draw_unused(ax, score[: sequence.begun(t)], chosen, top)
    wide = max(1, sequence.blocks // 120)  # among thousands a block is seen too
    for j in chosen:
        kind = "forced" if j in forced else "selected"
        plots.cell(ax, j, 0, wide, kind, float(score[j]))
        plots.cell(ax, j, -0.26 * top, wide, kind, 0.2 * top)
    first = sequence.window_first(t)
    size = sequence.config.select_block_size
    plots.cell(ax, first / size, -0.52 * top, (t + 1 - first) / size, "window", 0.2 * top)
    if (answer := sequence.answer_block(t)) is not None:
        ax.plot(answer + 0.5, 1.12 * top, marker="v", color="black", clip_on=False)
    ax.set(xlim=(0, sequence.blocks), ylim=(-0.55 * top, 1.2 * top))
    ax.spines["bottom"].set_visible(False)
    step = -(-sequence.blocks // 8)
    ids = range(0, sequence.blocks, step)
    ax.set_xticks([j + 0.5 for j in ids], [str(j) for j in ids])
    ax.set_yticks([0, top], ["0", f"{top:.2g}"])
    ax.set_title(_title(sequence, chosen, t), fontsize=10)


def _draw_unused(ax: Axes, score: Tensor, chosen: list[int], top: float) -> None:
    """A box for each block that is not chosen, or one outline of steps for thousands of them."""
    blocks = len(score)
    if blocks > MANY:
        for heights, base in ((score, 0.0), (torch.full_like(score, -0.06 * top), -0.26 * top)):
            ax.stairs(heights.numpy(), baseline=base, fill=True, color=plots.COLOURS["unused"])
        return
    for j in set(range(blocks)) - set(chosen):
        plots.cell(ax, j, 0, 1, "unused", float(score[j]))
        plots.cell(ax, j, -0.26 * top, 1, "unused", 0.2 * top)


def _title(sequence: TracedSequence, chosen: list[int], t: int) -> str:
    """As many ids as there is room for beside the next picture's title."""
    answer = sequence.answer_block(t)
    asks = "" if answer is None else f"; answer in {answer}"
    words = list(map(str, chosen))
    while len(" ".join(words)) > 34 - len(f"{t}{asks}"):
        words.pop()
    more = " ..." if len(words) < len(chosen) else ""
    return f"query {t}: {' '.join(words) + more or 'nothing selected'}{asks}"


def draw_tokens(sequence: TracedSequence, place: Place, t: int, columns: int = 84) -> Figure:
    """The tokens of a text in lines, each underlined by how query t reads its block.

    A box marks the query. Tokens must be single characters; a longer line goes on in the next.
    """
    kinds = _kinds_of_tokens(sequence, place, t)
    where = _positions(sequence.tokens, columns)
    rows = where[-1][1] + 1
    with plt.rc_context():
        plots.use_style()
        figure, ax = plt.subplots(figsize=(plots.WIDTH, 0.5 + 0.24 * rows))
        for token, kind, corner in zip(sequence.tokens, kinds, where, strict=True):
            _draw_token(ax, token.strip(), kind, corner)
        ax.add_patch(Rectangle(where[t], 1, 0.7, facecolor="none", edgecolor="black", linewidth=2))
        ax.set(xlim=(0, columns), ylim=(rows, 0))
        ax.axis("off")
        plots.legend(figure, ["forced", "selected", "window", "unused", "masked"])
        figure.canvas.draw()
    return figure


def _kinds_of_tokens(sequence: TracedSequence, place: Place, t: int) -> list[str]:
    """How query t reads each token: through its block first, else through the window."""
    chosen = sequence.selected(place, t)
    forced = sequence.forced(t)
    kinds = []
    for s in range(sequence.length):
        j = s // sequence.config.select_block_size
        if s > t:
            kinds.append("masked")
        elif j in forced:
            kinds.append("forced")
        elif j in chosen:
            kinds.append("selected")
        elif s >= sequence.window_first(t):
            kinds.append("window")
        else:
            kinds.append("unused")
    return kinds


def _draw_token(ax: Axes, sign: str, kind: str, corner: tuple[int, int]) -> None:
    x, y = corner
    line = Rectangle(
        (x, y + 0.7),
        1,
        0.3,
        facecolor=plots.COLOURS[kind],
        linewidth=0,
        edgecolor="white",
        hatch=plots.HATCHES.get(kind),
    )
    ax.add_patch(line)
    ax.text(x + 0.5, y + 0.4, sign, ha="center", va="center", family="monospace", fontsize=9)


def _positions(tokens: list[str], columns: int) -> list[tuple[int, int]]:
    """Column and row of each character; a line end stands at the end of its own line."""
    places = []
    x = 0
    y = 0
    for token in tokens:
        if x == columns:
            x = 0
            y += 1
        places.append((x, y))
        x += 1
        if token == "\n":
            x = 0
            y += 1
    return places
