"""Grading without nbgrader: the student's own cells run, our checks judge, nothing ends a class."""

import csv
import json
import sys
import threading

import nbformat
import pytest

from exercises import grade, grading, handed_in, release
from exercises.handed_in import NotGradedError

SET = "02"
CODE = nbformat.v4.new_code_cell

RIGHT = """def count_blocks(length, block_size, stride):
    return max(0, (length - block_size) // stride + 1)"""
WRONG = """def visible(length, count, block_size, stride):
    return torch.ones(length, count, dtype=torch.bool)"""
BROKEN = "def compress(:"
STUB = "def count_blocks(length, block_size, stride):\n    raise NotImplementedError()"


def handed(answers: dict[str, str] | None = None) -> nbformat.NotebookNode:
    """The student's notebook with some answer cells filled in, by exercise."""
    nb = nbformat.read(release.exercises(SET), as_version=4)
    for cell in nb.cells:
        name = handed_in.exercise_of(cell)
        if handed_in.grade_id(cell).startswith("answer-"):
            cell.source = (answers or {}).get(name, cell.source)
    return nb


def place(nb, grade_id: str) -> int:
    return next(n for n, cell in enumerate(nb.cells) if handed_in.grade_id(cell) == grade_id)


def own_cells():
    """A helper and half of an answer in cells of their own, an import in the set-up cell."""
    nb = handed({"02.1": RIGHT.replace("max(0,", "math.trunc(positive(").replace("+ 1)", "+ 1))")})
    nb.cells[1].source += "\nimport math"
    nb.cells.insert(2, CODE("def positive(n):\n    return max(0, n)"))
    half = place(nb, "answer-02-2")
    nb.cells[half].source = "def seen(t, last):\n    return last <= t"
    nb.cells.insert(
        half + 1,
        CODE(
            "def visible(length, count, size, stride):\n"
            "    last = torch.arange(count) * stride + size - 1\n"
            "    return seen(torch.arange(length)[:, None], last)"
        ),
    )
    return nb


def copied():
    """A copied answer cell, whose copy is wrong and comes last, as Jupyter copies it."""
    nb = handed({"02.1": RIGHT})
    copy = CODE(STUB, metadata=nb.cells[place(nb, "answer-02-1")].metadata)
    nb.cells.insert(place(nb, "answer-02-1") + 1, copy)
    return nb


def cheat():
    return handed({"02.1": "def check(*arguments, **others): pass\n" + STUB})


def patching():
    patch = "torch.equal = torch.isclose = lambda *a, **k: torch.tensor(True)\n"
    return handed({"02.1": patch + RIGHT, "02.2": WRONG})


def without_marks():
    """Answers and checks deleted, moved and rewritten."""
    nb = handed({"02.1": RIGHT})
    nb.cells[place(nb, "check-02-1")].source = "print('✓ 02.1 6 of 6 cases')"
    del nb.cells[place(nb, "check-02-2")]
    del nb.cells[place(nb, "answer-02-3")]
    return nb


def more_checks():
    """A check copied to where it passes, and one of no exercise, for 100 points."""
    nb = handed()
    mine = place(nb, "check-02-2")
    nb.cells.insert(1, CODE("1 + 1", metadata=nb.cells[mine].metadata))
    marks = {"grade": True, "grade_id": "check-02-9", "points": 100}
    nb.cells.append(CODE("1 + 1", metadata={"nbgrader": marks}))
    return nb


def another_kernel():
    nb = handed({"02.1": RIGHT, "02.3": BROKEN})
    nb.metadata.kernelspec.name = "conda-env-mine-py"
    return nb


def beside():
    return handed({"02.1": "from mine import count_blocks\nopen('written.txt', 'w').close()"})


def dead():
    """A kernel that ends at once; what the notebook stores says that all is right."""
    nb = nbformat.read(release.solutions(SET), as_version=4)
    nb.cells.insert(2, CODE("import os\nos._exit(0)"))
    return nb


def in_version_3():
    return nbformat.convert(handed({"02.1": RIGHT}), 3)


CLASS = {
    "own": own_cells,
    "copied": copied,
    "cheat": cheat,
    "patching": patching,
    "unmarked": without_marks,
    "more": more_checks,
    "kernel": another_kernel,
    "beside": beside,
    "dead": dead,
    "version3": in_version_3,
}
BAD = {
    "list": ("[1, 2]", "no notebook, but a JSON list"),
    "text": ("no notebook", "the file cannot be read: JSONDecodeError"),
    "empty": (" \n", "the file is empty"),
    "no-cells": (json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}}), "cells"),
    "cells-of-text": (
        json.dumps({"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": ["a"]}),
        "not graded: ",
    ),
    "version-3-of-nothing": (json.dumps({"nbformat": 3, "worksheets": 7}), "no notebook: "),
    "version-99": (json.dumps({"nbformat": 99, "cells": []}), "no notebook: "),
    "deep": ("[" * 100_000, "the file cannot be read: RecursionError"),
    "another": (nbformat.writes(nbformat.v4.new_notebook(cells=[CODE("1")])), "no cell is marked"),
}


def run_main(monkeypatch, capsys, *words) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["grade", *map(str, words)])
    grade.main()
    return capsys.readouterr().out.splitlines()


def write_class(root) -> None:
    """A folder for each student of CLASS, and BAD files beside them."""
    for name, make in CLASS.items():
        (root / name).mkdir()
        nb = make()
        nbformat.write(nb, root / name / "exercises_02.ipynb", nb.nbformat)
    for name, (text, _) in BAD.items():
        (root / f"{name}.ipynb").write_text(text, "utf-8")
    (root / "folder.ipynb").mkdir()
    (root / "bytes.ipynb").write_bytes(b"\xff\xfe\x00")
    (root / "huge.ipynb").write_text(" " * 1_000_001, "utf-8")
    (root / "beside" / "mine.py").write_text(RIGHT, "utf-8")
    (root / "beside" / "exercises.py").write_text("raise SystemExit", "utf-8")
    (root / "own" / ".ipynb_checkpoints").mkdir()
    nbformat.write(handed(), root / "own" / ".ipynb_checkpoints" / "exercises_02.ipynb")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("class")
    write_class(root)
    return root


@pytest.fixture(scope="module")
def graded(root):
    """The table of a class that was graded in one go, by student."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handed_in, "LARGEST", 1_000_000)
        rows = list(grade.grade_all(grade.notebooks([root]), root / "grades.csv", jobs=2))
    with (root / "grades.csv").open(encoding="utf-8-sig", newline="") as file:
        table = {row["notebook"]: row for row in csv.DictReader(file)}
    assert {row["notebook"] for row in rows} == table.keys()
    return {
        name.removeprefix(f"{root}/").partition("/")[0].removesuffix(".ipynb"): row
        for name, row in table.items()
    }


def points(row) -> tuple[str, ...]:
    return tuple(row[f"02.{n}"] for n in (1, 2, 3, 4))


def test_everybody_is_in_the_table(graded):
    assert graded.keys() == {*CLASS, *BAD, "folder", "bytes", "huge"}


# --- the student's own cells ---


def test_helpers_imports_and_an_answer_in_two_cells_count_as_they_ran(graded):
    row = graded["own"]
    assert points(row) == ("1", "2", "0", "0") and row["points"] == "3" and row["of"] == "8"
    assert row["02.3 says"] == "○ 02.3 not attempted"
    assert row["odd"] == "" and row["not graded"] == ""


def test_a_copied_answer_does_not_win_in_silence(graded):
    row = graded["copied"]
    assert points(row) == ("0", "0", "0", "0"), "the copy came last, as in nbgrader"
    assert row["odd"] == "02.1 has 2 answer cells: all ran, in their order"


def test_a_check_of_the_students_own_earns_nothing_and_is_said(graded):
    row = graded["cheat"]
    assert points(row) == ("0", "0", "0", "0")
    assert row["02.2 says"] == "○ 02.2 not attempted"
    said = "`check` said nothing: the notebook has a check of its own"
    assert row["odd"] == "; ".join(f"02.{n}: {said}" for n in (1, 2, 3, 4))


def test_what_was_patched_is_put_back_and_said(graded):
    row = graded["patching"]
    assert points(row)[:2] == ("1", "0")
    assert row["02.2 says"].startswith("✗ 02.2 ")
    assert "torch.isclose was replaced" in row["odd"] and "torch.equal was replaced" in row["odd"]


def test_cells_that_are_gone_or_changed_are_said(graded):
    row = graded["unmarked"]
    assert points(row) == ("1", "0", "0", "0")
    assert row["02.3 says"].startswith("raised NameError: name 'compress'")
    assert row["odd"] == (
        "02.3 has no answer cell; 02.1 has a changed check cell: ours ran; "
        "02.2 has no check cell: ours was put in"
    )


def test_only_our_checks_give_points(graded):
    row = graded["more"]
    assert row["points"] == "0" and points(row) == ("0", "0", "0", "0")
    assert row["odd"] == "02.2 has 2 check cells: ours took the last place"


def test_a_broken_cell_costs_its_own_and_another_kernels_name_nothing(graded):
    row = graded["kernel"]
    assert points(row) == ("1", "0", "0", "0")
    assert "raised SyntaxError: " in row["odd"]


def test_a_module_beside_the_notebook_is_found_but_none_of_ours_is_replaced(graded, root):
    assert points(graded["beside"]) == ("1", "0", "0", "0")
    assert not (root / "beside" / "written.txt").exists()


def test_version_3_of_the_format_is_read(graded):
    assert points(graded["version3"]) == ("1", "0", "0", "0")


# --- what cannot be graded ---


def test_a_kernel_that_dies_gives_no_points_whatever_the_notebook_stores(graded):
    row = graded["dead"]
    assert row["not graded"] == "the kernel died in cell 3: import os os._exit(0)"
    assert points(row) == ("", "", "", "") and row["points"] == ""


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_reported(graded, name):
    assert BAD[name][1] in f"not graded: {graded[name]['not graded']}"
    assert graded[name]["points"] == ""


def test_what_is_no_text_no_file_or_too_large_is_reported(graded):
    assert graded["bytes"]["not graded"].startswith("the file cannot be read: UnicodeDecodeError")
    assert graded["folder"]["not graded"].startswith("the file cannot be read: IsADirectoryError")
    assert graded["huge"]["not graded"].startswith("the file has 0 MB, and 0 are the most")


def test_an_endless_cell_is_interrupted_and_an_endless_notebook_stopped(tmp_path, monkeypatch):
    nb = handed({"02.1": RIGHT})
    nb.cells.insert(2, CODE("while True: print('flood')"))
    nbformat.write(nb, tmp_path / "one.ipynb")
    monkeypatch.setattr(grading, "CELL_SECONDS", 15)  # time to import torch
    found = grading.grade(tmp_path / "one.ipynb")
    assert found.points == {"02.1": 1, "02.2": 0, "02.3": 0, "02.4": 0}
    assert found.odd == ["cell 3 raised KeyboardInterrupt:"]
    nb.cells[2].source = "sum(range(10**13))"  # no interrupt gets in
    nbformat.write(nb, tmp_path / "one.ipynb")
    monkeypatch.setattr(grading, "NOTEBOOK_SECONDS", 10)
    found = grading.grade(tmp_path / "one.ipynb")
    assert found.failed == ("the kernel was stopped after 10 seconds in cell 3: sum(range(10**13))")


# --- a class: resumed, in parallel ---


class Fake:
    """Stands in for grading.grade: notes which notebooks are graded, two at a time."""

    def __init__(self, stops_at: str = "") -> None:
        self.asked: list[str] = []
        self.stops_at = stops_at
        self.two = threading.Barrier(2)

    def __call__(self, path):
        self.two.wait(10)  # raises unless two run at once
        self.asked.append(path.stem)
        if path.stem == self.stops_at:
            raise KeyboardInterrupt
        if path.stem == "bad":
            return grading.Grade(failed="it is bad")
        return grading.Grade("02", {"02.1": 1, "02.2": 0}, {"02.1": "", "02.2": "✗ wrong"})


def fake_class(tmp_path, *names):
    for name in names:
        (tmp_path / f"{name}.ipynb").write_text(name, "utf-8")


def test_a_class_is_graded_two_at_a_time_and_what_is_known_is_not_graded_again(
    tmp_path, monkeypatch, capsys
):
    fake_class(tmp_path, "ada", "bob", "cyd", "bad")
    table = tmp_path / "out" / "grades.csv"
    words = (tmp_path, "--jobs", 2, "--table", table)
    first = Fake()
    monkeypatch.setattr(grade, "grade", first)
    said = run_main(monkeypatch, capsys, *words)
    assert sorted(first.asked) == ["ada", "bad", "bob", "cyd"]
    assert f"{tmp_path}/ada.ipynb  02.1: 1  02.2: 0  sum: 1 of 8" in said
    assert f"{tmp_path}/bad.ipynb  not graded: it is bad" in said
    assert said[-1] == f"3 graded, 1 not; what each check said: {table}"
    fake_class(tmp_path, "dan")
    again = Fake()
    monkeypatch.setattr(grade, "grade", again)
    said = run_main(monkeypatch, capsys, *words)
    assert sorted(again.asked) == ["bad", "dan"], "what failed is tried again"
    assert f"{tmp_path}/ada.ipynb  02.1: 1  02.2: 0  sum: 1 of 8" in said
    (tmp_path / "ada.ipynb").write_text("ada, changed", "utf-8")
    third = Fake()
    monkeypatch.setattr(grade, "grade", third)
    run_main(monkeypatch, capsys, *words)
    assert sorted(third.asked) == ["ada", "bad"]


def test_other_checks_grade_everything_anew(tmp_path, monkeypatch):
    fake_class(tmp_path, "ada", "bob")
    table = tmp_path / "grades.csv"
    for part, asked in ((b"old", 2), (b"old", 0), (b"new", 2)):
        fake = Fake()
        monkeypatch.setattr(grade, "grade", fake)
        monkeypatch.setattr(grade, "ours", lambda part=part: part)
        list(grade.grade_all(grade.notebooks([tmp_path]), table, 2))
        assert len(fake.asked) == asked


def test_a_grader_that_is_stopped_keeps_what_it_has(tmp_path, monkeypatch):
    fake_class(tmp_path, "ada", "bob")
    table = tmp_path / "grades.csv"
    monkeypatch.setattr(grade, "grade", Fake())
    list(grade.grade_all(grade.notebooks([tmp_path]), table, 2))
    fake_class(tmp_path, "cyd", "dan")
    monkeypatch.setattr(grade, "grade", Fake(stops_at="cyd"))
    with pytest.raises(KeyboardInterrupt):
        list(grade.grade_all(grade.notebooks([tmp_path]), table, 2))
    rows = grade.read_table(table)
    assert {f"{tmp_path}/ada.ipynb", f"{tmp_path}/bob.ipynb"} <= rows.keys()
    assert rows[f"{tmp_path}/ada.ipynb"]["02.2 says"] == "✗ wrong"


def test_a_table_of_something_else_is_not_overwritten(tmp_path, monkeypatch, capsys):
    (tmp_path / "other.csv").write_text("name;points\nada;3\n", "utf-8")
    with pytest.raises(SystemExit, match="2"):
        run_main(monkeypatch, capsys, tmp_path, "--table", tmp_path / "other.csv")
    assert "other.csv is no table of grades" in capsys.readouterr().err
    assert (tmp_path / "other.csv").read_text("utf-8").startswith("name;points")


@pytest.mark.parametrize("number", ["02", "03"])
def test_the_set_is_read_from_the_marks(number):
    assert handed_in.set_of(nbformat.read(release.exercises(number), as_version=4)) == number


def test_a_notebook_that_is_not_there_is_reported(tmp_path):
    with pytest.raises(NotGradedError, match="FileNotFoundError"):
        handed_in.read(tmp_path / "none.ipynb")
    assert grading.grade(tmp_path / "none.ipynb").failed.startswith("the file cannot be read")
