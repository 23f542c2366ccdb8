"""Run a notebook's code cells in one plain namespace: no Jupyter, and nothing is drawn."""

import contextlib
import io
import linecache
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
from nbformat import NotebookNode

from exercises import course
from nsa_lite.rivals.attentions import ATTENTIONS

ROOT = Path(__file__).parents[2]
PATHS = sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))
TURN = re.compile(r"# Your turn \(exercise (\d\d\.\d)\)")


@cache
def read(path: Path) -> list[NotebookNode]:
    """The cells of a notebook."""
    return nbformat.read(path, as_version=4).cells


def code_of(path: Path) -> list[NotebookNode]:
    """The code cells of a notebook."""
    return [cell for cell in read(path) if cell.cell_type == "code"]


def turns(path: Path) -> dict[str, NotebookNode]:
    """Each Your turn cell of a notebook, by the number of its exercise."""
    return {found[1]: cell for cell in code_of(path) if (found := TURN.match(cell.source))}


def solutions(path: Path) -> dict[str, str]:
    """The python text in the fold behind each Your turn cell, by the number of its exercise."""
    cells = read(path)
    found = {}
    for cell, after in zip(cells, cells[1:], strict=False):
        if number := TURN.match(cell.source):
            fold = re.search(r"```python\n(.+?)```", after.source, re.S)
            found[number[1]] = fold[1] if fold else ""
    return found


def stored(cell: NotebookNode) -> str:
    """What a cell printed when the notebook was stored."""
    return "".join(output.get("text", "") for output in cell.outputs)


class CellError(Exception):
    """A cell failed that should not; `place` counts the code cells from 0."""

    def __init__(self, place: int, source: str) -> None:
        super().__init__(f"code cell {place + 1} failed: {source.splitlines()[0]}")
        self.place = place


def kept(source: str, place: int) -> str:
    """A file name under which Triton finds the cell's text: it reads what it interprets."""
    name = f"cell {place + 1}"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    return name


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """A notebook may add an attention of its own, and what was guessed is its own too."""
    matplotlib.use("Agg")
    course.guesses.clear()
    course.passed.clear()
    known = dict(ATTENTIONS)
    try:
        yield
    finally:
        ATTENTIONS.clear()
        ATTENTIONS.update(known)


def printed_by(sources: list[str]) -> Iterator[str]:
    """What each cell prints, one after the other; a Break it cell's error is swallowed."""
    names: dict[str, object] = {"__name__": "__main__"}
    with untouched():
        for place, source in enumerate(sources):
            yield run_cell(place, source, names)


def run_cell(place: int, source: str, names: dict[str, object]) -> str:
    """What one cell prints, run among the names that the cells before it have left."""
    plain = re.sub(r"^%.*$", "", source, flags=re.M)
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(plain, kept(plain, place), "exec"), names)
    except Exception as error:
        if not source.startswith("# Break it"):
            raise CellError(place, source) from error
    finally:
        plt.close("all")
    return out.getvalue()
