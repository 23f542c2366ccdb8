"""Grade notebooks that students handed in, without nbgrader.

    python -m exercises.grade handed_in/*.ipynb    a line for each notebook: points by exercise

Only the answers are taken from a student's notebook; text, checks and hidden tests are ours.
"""

import argparse
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from exercises import release
from exercises.records import load, sets


def set_of(nb: NotebookNode) -> str:
    """The set that a notebook is of, from its checks. Errors: ValueError if it has none."""
    for cell in nb.cells:
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if grade_id.startswith("check-") and grade_id[6:8] in sets():
            return grade_id[6:8]
    raise ValueError("no cell is marked as the check of an exercise set")


def with_answers(ours: NotebookNode, theirs: NotebookNode) -> NotebookNode:
    """Our notebook with a student's answer cells; an answer that is gone is the stub."""
    answers = {
        cell.metadata.get("nbgrader", {}).get("grade_id"): cell.source for cell in theirs.cells
    }
    stubs = release.student_version(ours)
    for cell, stub in zip(ours.cells, stubs.cells, strict=True):
        marks = cell.metadata.get("nbgrader", {})
        if marks.get("solution"):
            cell.source = answers.get(marks["grade_id"], stub.source)
    return ours


def points(path: Path) -> tuple[str, dict[str, int]]:
    """The set of a notebook, and its points for each exercise: all of them, or 0."""
    theirs = nbformat.read(path, as_version=4)
    number = set_of(theirs)
    ours = nbformat.read(release.solutions(number), as_version=4)
    ran = release.run(with_answers(ours, theirs), strict=True, allow_errors=True)
    got = {}
    for cell in ran.cells:
        marks = cell.metadata.get("nbgrader", {})
        if marks.get("grade"):
            right = cell.execution_count and not any(
                output.output_type == "error" for output in cell.outputs
            )
            name = marks["grade_id"].removeprefix("check-").replace("-", ".")
            got[name] = marks["points"] if right else 0
    return number, got


def main() -> None:
    """Print the points of each notebook that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    for path in parser.parse_args().notebooks:
        try:
            number, got = points(path)
        except (OSError, ValueError, nbformat.reader.NotJSONError) as error:
            print(f"{path}  not graded: {error}")
            continue
        full = sum(release.POINTS[e.tier] for e in load(number).EXERCISES)
        each = "  ".join(f"{name}: {n}" for name, n in got.items())
        print(f"{path}  {each}  sum: {sum(got.values())} of {full}")


if __name__ == "__main__":
    main()
