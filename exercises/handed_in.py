"""Read a notebook that a student handed in, and put our checks into it, as nbgrader does.

Everything else runs as the student wrote it: helpers in cells of their own, imports, answers in
two cells. What a teacher may want to look at is said.
"""

import copy
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from exercises import release
from exercises.records import sets

LARGEST = 50 * 2**20  # bytes of a file


class NotGradedError(Exception):
    """Why a file cannot be graded, in a sentence."""


@dataclass(frozen=True)
class HandedIn:
    """A student's notebook with our checks, its set, and what is odd about it."""

    number: str
    nb: NotebookNode
    odd: list[str]


def handed_in(path: Path) -> HandedIn:
    """A student's notebook, ready to run. Errors: NotGradedError."""
    theirs = read(path)
    number = set_of(theirs)
    ours = nbformat.read(release.solutions(number), as_version=4)
    nb, odd = with_our_checks(ours, theirs)
    return HandedIn(number, nb, odd)


def read(path: Path) -> NotebookNode:
    """A notebook of any version as one of version 4. Errors: NotGradedError."""
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise NotGradedError(f"the file has {size >> 20} MB, and {LARGEST >> 20} are the most")
        text = path.read_text("utf-8-sig")
        content = json.loads(text) if text.strip() else None
    except (OSError, ValueError, RecursionError) as error:
        raise NotGradedError(f"the file cannot be read: {type(error).__name__}: {error}") from None
    if content is None:
        raise NotGradedError("the file is empty")
    if not isinstance(content, dict):
        raise NotGradedError(f"no notebook, but a JSON {type(content).__name__}")
    return _of_version_4(text)


def _of_version_4(text: str) -> NotebookNode:
    """The notebook in a JSON text; with cells, and each with what running it needs."""
    try:
        nb = nbformat.reads(text, as_version=4)
    except Exception as error:  # nbformat raises what it stumbles over
        raise NotGradedError(f"no notebook: {type(error).__name__}: {error}") from None
    if not isinstance(nb.get("cells"), list) or not nb.cells:
        raise NotGradedError("the notebook has no cells")
    for n, cell in enumerate(nb.cells, 1):
        fit = isinstance(cell, dict) and isinstance(cell.get("source"), str)
        if not fit or not isinstance(cell.get("metadata"), dict):
            raise NotGradedError(f"cell {n} of the notebook has no source or no metadata")
    return nb


def set_of(nb: NotebookNode) -> str:
    """The set that a notebook is of, from its checks. Errors: NotGradedError if it has none."""
    for cell in nb.cells:
        name = grade_id(cell)
        if name.startswith("check-") and name[6:8] in sets():
            return name[6:8]
    raise NotGradedError("no cell is marked as the check of an exercise set")


def grade_id(cell: NotebookNode) -> str:
    """nbgrader's name of a cell, "check-03-2", or ""."""
    marks = cell.metadata.get("nbgrader")
    return str(marks.get("grade_id", "")) if isinstance(marks, dict) else ""


def exercise_of(cell: NotebookNode) -> str:
    """ "03.2" for the cells answer-03-2 and check-03-2."""
    return grade_id(cell).partition("-")[2].replace("-", ".")


def with_our_checks(ours: NotebookNode, theirs: NotebookNode) -> tuple[NotebookNode, list[str]]:
    """The student's notebook with our check cells in place of theirs, and what is odd about it."""
    checks = {grade_id(cell): cell for cell in ours.cells if _is_check(cell)}
    nb = nbformat.v4.new_notebook(cells=[copy.deepcopy(cell) for cell in theirs.cells])
    odd = [*odd_answers(ours, theirs), *odd_checks(ours, theirs)]
    last = {grade_id(cell): n for n, cell in enumerate(nb.cells)}
    for cell in nb.cells:
        if _is_check(cell):  # only ours give points
            del cell.metadata["nbgrader"]
    for name, check in checks.items():
        if name in last:
            nb.cells[last[name]] = copy.deepcopy(check)
    for name, check in checks.items():
        if name not in last:
            nb.cells.insert(_place(nb, name), copy.deepcopy(check))
    for cell in nb.cells:
        if cell.cell_type == "code":  # what the student's kernel said, or ours, counts for nothing
            cell.outputs = []
            cell.execution_count = None
    return nb, odd


def _is_check(cell: NotebookNode) -> bool:
    return grade_id(cell).startswith("check-")


def _place(nb: NotebookNode, check: str) -> int:
    """Behind the last answer cell of this check, or at the end."""
    answer = check.replace("check", "answer")
    found = [n for n, cell in enumerate(nb.cells, 1) if grade_id(cell) == answer]
    return found[-1] if found else len(nb.cells)


def odd_answers(ours: NotebookNode, theirs: NotebookNode) -> list[str]:
    """Answers that are gone, that stand there twice, or that are no code."""
    count = Counter(grade_id(cell) for cell in theirs.cells if cell.cell_type == "code")
    names = [grade_id(cell) for cell in ours.cells if grade_id(cell).startswith("answer-")]
    odd = []
    for name in names:
        exercise = name.removeprefix("answer-").replace("-", ".")
        if count[name] == 0:
            odd.append(f"{exercise} has no answer cell")
        if count[name] > 1:
            odd.append(f"{exercise} has {count[name]} answer cells: all ran, in their order")
    return odd


def odd_checks(ours: NotebookNode, theirs: NotebookNode) -> list[str]:
    """Checks that are gone, that stand there twice, or were changed."""
    odd = []
    for cell in filter(_is_check, release.student_version(ours).cells):
        found = [c.source.strip() for c in theirs.cells if grade_id(c) == grade_id(cell)]
        if not found:
            odd.append(f"{exercise_of(cell)} has no check cell: ours was put in")
        elif len(found) > 1:
            odd.append(
                f"{exercise_of(cell)} has {len(found)} check cells: ours took the last place"
            )
        elif found[0] != cell.source.strip():
            odd.append(f"{exercise_of(cell)} has a changed check cell: ours ran")
    return odd
