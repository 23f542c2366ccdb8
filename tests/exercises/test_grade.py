"""Grading without nbgrader: points follow the hidden tests, and nothing of the student's checks."""

import sys

import nbformat
import pytest

from exercises import grade, release

SET = "02"


def handed_in(answers: dict[str, str]) -> nbformat.NotebookNode:
    """The student's notebook with some answer cells filled in, by exercise."""
    nb = nbformat.read(release.exercises(SET), as_version=4)
    for cell in nb.cells:
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        cell.source = answers.get(grade_id.removeprefix("answer-").replace("-", "."), cell.source)
        if grade_id.startswith("check-"):
            cell.source = "print('✓ all right')"  # a student may write what they like here
    return nb


RIGHT = """def count_blocks(length, block_size, stride):
    return max(0, (length - block_size) // stride + 1)"""
WRONG = """def visible(length, count, block_size, stride):
    return torch.ones(length, count, dtype=torch.bool)"""
BROKEN = "def compress(:"


def test_points_follow_our_checks_and_a_broken_cell_costs_its_own(tmp_path, monkeypatch, capsys):
    nbformat.write(
        handed_in({"02.1": RIGHT, "02.2": WRONG, "02.3": BROKEN}), tmp_path / "one.ipynb"
    )
    (tmp_path / "other.ipynb").write_text("no notebook", "utf-8")
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "third.ipynb")
    names = [str(tmp_path / name) for name in ("one.ipynb", "other.ipynb", "third.ipynb")]
    monkeypatch.setattr(sys, "argv", ["grade", *names])
    grade.main()
    one, other, third = capsys.readouterr().out.splitlines()
    assert one == f"{names[0]}  02.1: 1  02.2: 0  02.3: 0  02.4: 0  sum: 1 of 8"
    assert other.startswith(f"{names[1]}  not graded: ")
    assert third == f"{names[2]}  not graded: no cell is marked as the check of an exercise set"


def test_an_answer_cell_that_is_gone_counts_as_not_attempted():
    theirs = handed_in({})
    theirs.cells = [c for c in theirs.cells if not c.source.startswith("def visible")]
    ours = grade.with_answers(nbformat.read(release.solutions(SET), as_version=4), theirs)
    assert [c.source for c in ours.cells if "def visible" in c.source] == [
        c.source
        for c in nbformat.read(release.exercises(SET), as_version=4).cells
        if "def visible" in c.source
    ]
    assert not any("BEGIN SOLUTION" in c.source for c in ours.cells)


@pytest.mark.parametrize("number", ["02", "03"])
def test_the_set_is_read_from_the_marks(number):
    assert grade.set_of(nbformat.read(release.exercises(number), as_version=4)) == number
