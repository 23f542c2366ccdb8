"""The tokens of a sequence as text, each underlined by how one query reads it."""

import unicodedata

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nsa_lite.show import plots
from nsa_lite.show.explorer.sequence import Place, TracedSequence

COLUMNS = 84  # signs in a line


def draw_tokens(sequence: TracedSequence, place: Place, t: int, columns: int = COLUMNS) -> Figure:
    """The tokens in lines, each underlined by how query t reads its block; a box marks the query.

    A line end begins a new line, and a longer line goes on in the next.
    """
    rows = len(lines_of(sequence.tokens, columns))
    with plt.rc_context():
        plots.use_style()
        figure, ax = plt.subplots(figsize=(plots.WIDTH, 0.5 + 0.24 * rows))
        mark_tokens(ax, sequence, place, t, rows, columns)
        plots.legend(figure, ["forced", "selected", "window", "unused", "masked"])
        figure.canvas.draw()
    return figure


def mark_tokens(
    ax: Axes, sequence: TracedSequence, place: Place, t: int, rows: int, columns: int = COLUMNS
) -> None:
    """Draw as many lines of tokens as there is room for, those before the query and its own."""
    lines = lines_of(sequence.tokens, columns)
    own = next(i for i, line in enumerate(lines) if t in line)
    lines = lines[max(0, own + 1 - rows) :][:rows]
    spaced = _are_words(sequence.tokens)
    kinds = _kinds(sequence, place, t, range(lines[0][0], lines[-1][-1] + 1))
    for y, line in enumerate(lines):
        x = 0
        for s in line:
            sign = visible(sequence.tokens[s])[:columns]
            _draw_token(ax, sign, kinds[s], (x, y))
            if s == t:
                box = Rectangle((x, y), len(sign), 0.7, fill=False, edgecolor="black", linewidth=2)
            x += len(sign) + spaced
    ax.add_patch(box)  # above its neighbours
    ax.set(xlim=(0, columns), ylim=(rows, 0))
    ax.axis("off")


def lines_of(tokens: list[str], columns: int = COLUMNS) -> list[range]:
    """The positions in each line; words have a space between them, single signs have none."""
    spaced = _are_words(tokens)
    lines = []
    first = x = 0
    for s, token in enumerate(tokens):
        wide = min(len(token), columns)
        if x + wide > columns:
            lines.append(range(first, s))
            first, x = s, 0
        x += wide + spaced
        if token == "\n":
            lines.append(range(first, s + 1))
            first, x = s + 1, 0
    return [*lines, range(first, len(tokens))] if first < len(tokens) else lines


def visible(token: str) -> str:
    """A token as a picture can show it: a box for each sign that prints nothing or turns others."""
    return "".join(
        sign if sign in " \n" or unicodedata.category(sign)[0] != "C" else "\u25a1"
        for sign in token
    )


def _are_words(tokens: list[str]) -> bool:
    return any(len(token) > 1 for token in tokens)


def _kinds(sequence: TracedSequence, place: Place, t: int, tokens: range) -> dict[int, str]:
    """How query t reads each of these tokens: through its block first, else through the window."""
    forced = sequence.forced(t)
    blocks = {j: "forced" if j in forced else "selected" for j in sequence.selected(place, t)}
    first = sequence.window_first(t)
    kinds = {}
    for s in tokens:
        outside = "window" if s >= first else "unused"
        j = s // sequence.config.select_block_size
        kinds[s] = "masked" if s > t else blocks.get(j, outside)
    return kinds


def _draw_token(ax: Axes, sign: str, kind: str, corner: tuple[int, int]) -> None:
    x, y = corner
    line = Rectangle(
        (x, y + 0.7),
        len(sign),
        0.3,
        facecolor=plots.COLOURS[kind],
        linewidth=0,
        edgecolor="white",
        hatch=plots.HATCHES.get(kind),
    )
    ax.add_patch(line)
    for i, letter in enumerate(sign):
        ax.text(
            x + i + 0.5,
            y + 0.4,
            letter.strip(),
            ha="center",
            va="center",
            family="monospace",
            fontsize=9,
        )
