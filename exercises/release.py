"""Make the student's notebook from the solutions, run both, as `python -m exercises.release 03`.

The format is nbgrader's, and so is the result: its generate_assignment makes the same cells.
"""

import argparse
import copy
import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from exercises.records import FOLDER, Exercise, find, folder, sets

ROOT = FOLDER.parent
STUB = "# YOUR CODE HERE\nraise NotImplementedError()"  # nbgrader's words
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?### END SOLUTION", re.M | re.S)
HIDDEN_TESTS = re.compile(r"^ *### BEGIN HIDDEN TESTS\n.*?### END HIDDEN TESTS\n?", re.M | re.S)
HINTS = re.compile(r"<!-- hints (\d\d\.\d) -->.*", re.S)


def solutions(number: str) -> Path:
    """The notebook from which a set is made."""
    return folder(number) / f"solutions_{number}.ipynb"


def exercises(number: str) -> Path:
    """The student's notebook of a set."""
    return folder(number) / f"exercises_{number}.ipynb"


def folded_hints(exercise: Exercise) -> str:
    """The three hints of an exercise, each folded, for its notebook."""
    titles = ("a question", "the formula", "a sketch of the code")
    parts = [
        f"<details><summary>Hint {n}: {title}</summary>\n\n{text}\n\n</details>"
        for n, (title, text) in enumerate(zip(titles, exercise.hints, strict=True), 1)
    ]
    return "\n".join([f"<!-- hints {exercise.number} -->", *parts])


def with_hints(nb: NotebookNode) -> NotebookNode:
    """The notebook with each hints cell written anew from its exercise's record."""
    nb = copy.deepcopy(nb)
    for cell in nb.cells:
        if found := HINTS.match(cell.source):
            cell.source = folded_hints(find(found[1]))
    return nb


def student_version(nb: NotebookNode) -> NotebookNode:
    """The notebook without its solutions, hidden tests and outputs."""
    nb = copy.deepcopy(nb)
    for cell in nb.cells:
        marks = cell.metadata.get("nbgrader", {})
        if marks.get("solution"):
            cell.source = SOLUTION.sub(lambda m: _indented(STUB, m[1]), cell.source)
        if marks.get("grade"):
            cell.source = HIDDEN_TESTS.sub("", cell.source).rstrip("\n")
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nb


def _indented(text: str, by: str) -> str:
    return "\n".join(by + line for line in text.splitlines())


def run(nb: NotebookNode, strict: bool) -> NotebookNode:
    """The notebook with new outputs and counts; strict makes a failed check an error."""
    nb = copy.deepcopy(nb)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NSA_LITE_STRICT": str(int(strict))}
    client = NotebookClient(nb, timeout=120, record_timing=False,
                            resources={"metadata": {"path": str(ROOT)}})
    client.execute(env=environment)
    return nb


def make(number: str) -> None:
    """Write both notebooks of a set: the solutions run strictly, the student's as it is given."""
    nb = with_hints(nbformat.read(solutions(number), as_version=4))
    nbformat.write(run(nb, strict=True), solutions(number))
    nbformat.write(run(student_version(nb), strict=False), exercises(number))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", nargs="*", help="the numbers of sets, 03 say; none is all")
    for number in parser.parse_args().set or sets():
        make(number)
        print(exercises(number).relative_to(ROOT))
