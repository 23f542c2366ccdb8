"""A still picture for readers without a running kernel: the text, and what two queries select."""

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from nsa_lite.show import plots
from nsa_lite.show.explorer.sequence import Place, TracedSequence
from nsa_lite.show.explorer.tokens import lines_of, mark_tokens

MANY = 300  # blocks: up to so many are drawn one by one
LINES = 10  # of the text


def two_queries(sequence: TracedSequence, shown: int) -> list[int]:
    """The query that is shown and another: one that asks something too, or one halfway."""
    asked = sequence.positions[sequence.answer_at >= 0]
    pool = asked if len(asked) >= 2 else sequence.positions
    others = [t for t in pool[[len(pool) // 2, 0, -1]].tolist() if t != shown]
    return sorted({shown, *others[:1]})


def draw_queries(sequence: TracedSequence, place: Place, queries: list[int], shown: int) -> Figure:
    """The text as one query reads it; each block's importance to a few queries, and what they read.

    Below the bars stand the blocks, and below these the window.
    """
    rows = -(-len(queries) // 2)
    lines = min(LINES, len(lines_of(sequence.tokens)))
    with plt.rc_context():
        plots.use_style()
        figure = plt.figure(figsize=(plots.WIDTH, 1.0 + 0.22 * lines + 1.9 * rows))
        grid = figure.add_gridspec(rows + 1, 2, height_ratios=[0.3 + 0.22 * lines, *[1.9] * rows])
        _draw_text(figure.add_subplot(grid[0, :]), sequence, place, shown)
        for i, t in enumerate(queries):
            ax = figure.add_subplot(grid[1 + i // 2, i % 2])
            _draw_query(ax, sequence, place, t)
            if i + 2 >= len(queries):
                ax.set_xlabel(f"selection block (of {sequence.config.select_block_size} tokens)")
            if i % 2 == 0:
                ax.set_ylabel("importance")
        plots.legend(figure, ["forced", "selected", "unused", "window"])
        figure.canvas.draw()
    return figure


def _draw_text(ax: Axes, sequence: TracedSequence, place: Place, t: int) -> None:
    mark_tokens(ax, sequence, place, t, rows=LINES)
    missed = sequence.missed(place, t)
    said = "" if missed is None else f"; {missed:.2f} of dense attention's mass is missed"
    ax.set_title(f"the tokens as query {t} reads them{said}", fontsize=10)


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
