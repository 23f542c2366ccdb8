"""Make the student's notebook of a set from its solutions, and pack a set for a class.

    python -m exercises.release 03         exercises_03.ipynb, and both notebooks run anew
    python -m exercises.release 03 --zip   build/exercises_03.zip, which works alone

The format is nbgrader's, and so is the result: its generate_assignment makes the same cells.
"""

import argparse
import copy
import os
import re
import zipfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from exercises.records import FOLDER, TIERS, Exercise, find, folder, sets

ROOT = FOLDER.parent
POINTS = dict(zip(TIERS, (1, 2, 3), strict=True))  # warm-up, core, stretch
STUB = "# YOUR CODE HERE\nraise NotImplementedError()"  # nbgrader's words
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?### END SOLUTION", re.M | re.S)
HIDDEN_TESTS = re.compile(r"^ *### BEGIN HIDDEN TESTS\n.*?### END HIDDEN TESTS\n?", re.M | re.S)
CHECK = re.compile(r"^check\((.*)\)$", re.M)
HIDDEN = """### BEGIN HIDDEN TESTS
from exercises.hidden import hidden_check

hidden_check({})
### END HIDDEN TESTS"""
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


def with_hidden_tests(nb: NotebookNode) -> NotebookNode:
    """The notebook with the hidden test of each check written anew: the same, by another name."""
    nb = copy.deepcopy(nb)
    for cell in nb.cells:
        if cell.metadata.get("nbgrader", {}).get("grade"):
            shown = HIDDEN_TESTS.sub("", cell.source).rstrip("\n")
            cell.source = f"{shown}\n{HIDDEN.format(CHECK.search(shown)[1])}"
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
            cell.outputs = []
            cell.execution_count = None
    return nb


def _indented(text: str, by: str) -> str:
    """The text with `by` before each line."""
    return "\n".join(by + line for line in text.splitlines())


def run(nb: NotebookNode, strict: bool) -> NotebookNode:
    """The notebook with new outputs and counts; strict makes a failed check an error."""
    nb = copy.deepcopy(nb)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NSA_LITE_STRICT": str(int(strict))}
    client = NotebookClient(
        nb,
        timeout=120,
        record_timing=False,
        resources={"metadata": {"path": str(ROOT)}},
    )
    client.execute(env=environment)
    return nb


def make(number: str) -> None:
    """Write both notebooks of a set: the solutions run strictly, the student's as it is given."""
    nb = with_hidden_tests(with_hints(nbformat.read(solutions(number), as_version=4)))
    nbformat.write(run(nb, strict=True), solutions(number))
    nbformat.write(run(student_version(nb), strict=False), exercises(number))


FOR_TEACHERS = (
    "answers.py",
    "grade.py",
    "grading.py",
    "guide.py",
    "handed_in.py",
    "hidden.py",
    "release.py",
)
PACK_README = """# Exercises {number}

You need Python 3.11 or newer. In this folder:

    python3 -m venv .venv
    .venv/bin/python -m pip install -c constraints.txt -e ".[lab]"
    .venv/bin/python -m jupyterlab {notebook}

On Windows use WSL. The links in the notebook lead to other parts of the course, which are not in
this folder.
"""


def packed(number: str) -> dict[str, bytes]:
    """What a student gets: path -> content. No solutions, and nothing that is for teachers.

    mistakes.py is in it, since the checks run the mistakes that they know.
    """
    paths = [ROOT / name for name in ("pyproject.toml", "constraints.txt", "LICENSE")]
    for pattern in (
        "exercises/*.py",
        "nsa_lite/**/*.py",
        "kernels/**/*.py",
        f"exercises/{number}_*/*.*",
    ):
        paths += sorted(ROOT.glob(pattern))
    hidden = {*FOR_TEACHERS, solutions(number).name}
    files = {
        path.relative_to(ROOT).as_posix(): path.read_bytes()
        for path in paths
        if path.name not in hidden
    }
    notebook = exercises(number).relative_to(ROOT).as_posix()
    readme = PACK_README.format(number=number, notebook=notebook)
    return {"README.md": readme.encode(), **files}


def pack(number: str, target: Path = ROOT / "build") -> Path:
    """Write exercises_NN.zip into `target`: the same bytes for the same files."""
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"exercises_{number}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in packed(number).items():
            archive.writestr(
                zipfile.ZipInfo(f"exercises_{number}/{name}"), content, zipfile.ZIP_DEFLATED
            )
    return path


def main() -> None:
    """Make or pack the sets that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="*", help="numbers of sets, 03 say; none is all")
    parser.add_argument("--zip", action="store_true", help="only pack the student's files")
    arguments = parser.parse_args()
    if unknown := [number for number in arguments.sets if number not in sets()]:
        parser.error(f"there is no exercise set {unknown[0]!r}; there are {', '.join(sets())}")
    for number in arguments.sets or sets():
        if arguments.zip:
            print(os.path.relpath(pack(number)))
        else:
            make(number)
            print(os.path.relpath(exercises(number)))


if __name__ == "__main__":
    main()
