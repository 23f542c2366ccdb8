"""The exercises in real nbgrader: the same student notebooks, and marks that follow the checks."""

import copy
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest

from exercises import release
from exercises.records import load, sets
from tests.exercises.test_grade import own_cells

pytest.importorskip("nbgrader", reason="nbgrader is in the extra [test]: run `make test`")
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")  # nbgrader's own

GRADED = "02"  # the set that is handed in
# A planted mistake, as a learner would write it into exercise 02.2: seen once the block has begun.
MISTAKE = "return torch.arange(count) * stride <= torch.arange(length)[:, None]"

# An answer cell that takes the check's name, and breaks what judges: all other cells are stubs.
CHEAT = """import exercises
def check(*arguments, **others): pass
exercises.check = exercises.checking.check = exercises.checking.judge = check
"""


def assignment(number: str) -> str:
    return f"exercises_{number}"


def answered(nb: nbformat.NotebookNode, answers: dict[str, str]) -> nbformat.NotebookNode:
    """The released notebook with whole answer cells filled in, by grade_id."""
    for cell in nb.cells:
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id")
        cell.source = answers.get(grade_id, cell.source)
    return nb


def solution_cells(number: str) -> dict[str, str]:
    nb = nbformat.read(release.solutions(number), as_version=4)
    marked = [(c.metadata.get("nbgrader", {}), c.source) for c in nb.cells]
    return {marks["grade_id"]: source for marks, source in marked if marks.get("solution")}


@pytest.fixture(scope="module")
def found():
    """What nbgrader starts by name is found: alembic, and in the notebooks our own modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        patch.setenv("PYTHONPATH", str(release.ROOT))
        yield


@pytest.fixture(scope="module")
def course(tmp_path_factory, found):
    """A copy of the course in nbgrader's folders, and nbgrader's own interface to it."""
    from nbgrader.apps import NbGraderAPI
    from traitlets.config import Config

    root = tmp_path_factory.mktemp("course")
    for number in sets():
        source = root / "source" / assignment(number)
        source.mkdir(parents=True)
        nb = nbformat.read(release.solutions(number), as_version=4)
        nbformat.write(nb, source / f"exercises_{number}.ipynb")
    config = Config()
    config.CourseDirectory.root = str(root)
    config.CourseDirectory.db_url = f"sqlite:///{root}/gradebook.db"
    return root, NbGraderAPI(config=config)


@pytest.fixture(scope="module")
def released(course):
    """What generate_assignment makes of each set."""
    root, api = course
    for number in sets():
        result = api.generate_assignment(assignment(number))
        assert result["success"], result
    return {
        number: nbformat.read(
            root / "release" / assignment(number) / f"exercises_{number}.ipynb", as_version=4
        )
        for number in sets()
    }


@pytest.fixture(scope="module")
def marks(course, released):
    """The scores of some students, and the feedback that they get."""
    root, api = course
    right = solution_cells(GRADED)
    wrong = re.sub(
        r"### BEGIN SOLUTION\n.*?### END SOLUTION", MISTAKE, right["answer-02-2"], flags=re.S
    )
    answers = {
        "right": right,
        "stub": {},
        "one-mistake": {**right, "answer-02-2": wrong},
        "cheat": {"answer-02-1": CHEAT},
    }
    handed_in = {
        student: answered(copy.deepcopy(released[GRADED]), cells)
        for student, cells in answers.items()
    }
    handed_in["own-cells"] = own_cells()
    scores = {}
    for student, nb in handed_in.items():
        folder = root / "submitted" / student / assignment(GRADED)
        folder.mkdir(parents=True)
        nbformat.write(nb, folder / f"exercises_{GRADED}.ipynb")
        graded = api.autograde(assignment(GRADED), student)
        assert graded["success"], graded
        feedback = api.generate_feedback(assignment(GRADED), student)
        assert feedback["success"], feedback
        scores[student] = api.get_submission(assignment(GRADED), student)
    return root, scores


def test_nbgrader_makes_the_students_notebook_that_we_commit(released):
    for number, nb in released.items():
        ours = nbformat.read(release.exercises(number), as_version=4)
        assert [(c.cell_type, c.source) for c in nb.cells] == [
            (c.cell_type, c.source) for c in ours.cells
        ], number


def test_make_lab_shows_none_of_nbgraders_menus():
    installed = Path(sys.prefix) / "etc/jupyter/jupyter_server_config.d/nbgrader.json"
    servers = json.loads(installed.read_text("utf-8"))["ServerApp"]["jpserver_extensions"]
    ours = release.ROOT / ".jupyter"
    hidden = json.loads((ours / "jupyter_server_config.json").read_text("utf-8"))
    hidden = hidden["ServerApp"]["jpserver_extensions"]
    assert all(hidden[name] is False for name in servers)
    page = json.loads((ours / "labconfig/page_config.json").read_text("utf-8"))
    assert page["disabledExtensions"]["@jupyter/nbgrader"]
    assert "$(CURDIR)/.jupyter" in (release.ROOT / "Makefile").read_text("utf-8")


def test_solutions_get_full_marks_stubs_none_and_one_mistake_a_part(marks):
    _, scores = marks
    points = release.POINTS
    full = sum(points[e.tier] for e in load(GRADED).EXERCISES)
    assert {name: (s["score"], s["max_score"]) for name, s in scores.items()} == {
        "right": (full, full),
        "stub": (0, full),
        # 02.4 calls the function of 02.2, so both lose their points
        "one-mistake": (full - points["core"] - points["stretch"], full),
        "cheat": (0, full),
        # helpers, an import and an answer in cells of their own: as test_grade.py has it from ours
        "own-cells": (points["warm-up"] + points["core"], full),
    }
    assert not any(score["needs_manual_grade"] for score in scores.values())


def test_the_feedback_names_the_mistake(marks):
    root, _ = marks
    page = root / "feedback" / "one-mistake" / assignment(GRADED) / f"exercises_{GRADED}.html"
    assert "query 0 sees block 0, tokens 0 to 6: the last of them comes after" in page.read_text(
        "utf-8"
    )
