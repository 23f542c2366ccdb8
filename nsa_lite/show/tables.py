"""One way to print a table: columns of fixed width, text to the left, numbers to the right."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Column(NamedTuple):
    """A column's heading, its width in letters, and how its numbers are written (".3f")."""

    heading: str
    width: int
    form: str = ""


def table(columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> str:
    """The heading and a line for each row; None is printed as a dash.

    The first column stands to the left, all others to the right.
    """
    lines = [[column.heading for column in columns]]
    lines += [
        [_written(value, c.form) for value, c in zip(row, columns, strict=True)] for row in rows
    ]
    return "\n".join(_line(cells, columns) for cells in lines)


def _written(value: object, form: str) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, str) else format(value, form)


def _line(cells: Sequence[str], columns: Sequence[Column]) -> str:
    first = f"{cells[0]:{columns[0].width}}"
    rest = [f"{cell:>{c.width}}" for cell, c in zip(cells[1:], columns[1:], strict=True)]
    return " ".join([first, *rest]).rstrip()
