"""The student's notebooks agree with the solutions, the solutions are right, and a set packs."""

import linecache
import os
import re
import subprocess
import sys
import zipfile

import matplotlib
import nbformat
import pytest

from exercises import release
from exercises.records import load, sets

FIRST = next(iter(sets()))


@pytest.fixture(params=sets())
def number(request):
    return request.param


def solutions(number):
    return nbformat.read(release.solutions(number), as_version=4)


def exercises(number):
    return nbformat.read(release.exercises(number), as_version=4)


def essence(nb):
    """What must agree: all but outputs and counts, which differ."""
    return [(cell.id, cell.cell_type, cell.source, cell.metadata) for cell in nb.cells]


def code(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def marks(cell) -> dict:
    return cell.metadata.get("nbgrader", {})


# --- the two notebooks of a set ---


def test_the_students_notebook_is_made_from_the_solutions(number):
    made = release.student_version(solutions(number))
    assert essence(exercises(number)) == essence(made), (
        f"exercises_{number}.ipynb is stale: run `python -m exercises.release {number}`"
    )
    text = release.exercises(number).read_text("utf-8")
    assert "SOLUTION" not in text and "HIDDEN" not in text


def test_the_hints_in_the_notebook_are_those_that_hint_prints(number):
    nb = solutions(number)
    assert essence(nb) == essence(release.with_hints(nb))
    found = [release.HINTS.match(cell.source) for cell in nb.cells]
    assert [m[1] for m in found if m] == [e.number for e in load(number).EXERCISES]


def test_titles_tiers_and_minutes_are_those_of_the_records(number):
    text = "\n".join(c.source for c in solutions(number).cells if c.cell_type == "markdown")
    exercises = load(number).EXERCISES
    assert re.match(rf"# Exercises {number} · \S", text)
    total = sum(e.minutes for e in exercises)
    assert re.search(rf"· about {total} minutes · runs on a CPU in \d+ seconds$", text, re.M), total
    for e in exercises:
        assert f"\n| {e.number} {e.title} | {e.tier} | {e.minutes} |\n" in text, e.number
        head = rf"^## {e.number} {re.escape(e.title)}\n\n{e.tier} · {e.minutes} minutes · about \d+"
        assert re.search(rf"{head} lines?$", text, re.M), f"{e.number}: heading, tier, minutes"
    titles = re.findall(r"^## (\d\d\.\d) ", text, re.M)
    assert titles == [e.number for e in exercises]
    assert text.count("Expected") >= len(exercises), "an exercise lacks its expected result"
    prose = re.sub(r"```.*?```|`[^`\n]*`|\$[^$\n]*\$|<!--", "", text, flags=re.S)
    assert "!" not in prose, "no exclamation marks in prose"


def test_nbgraders_marks(number):
    nb = solutions(number)
    marked = [marks(cell) for cell in nb.cells if marks(cell)]
    ids = [mark["grade_id"] for mark in marked]
    assert len(set(ids)) == len(ids), "grade_ids are unique"
    assert len({cell.id for cell in nb.cells}) == len(nb.cells), "cell ids are unique"
    assert all(mark["schema_version"] == 3 for mark in marked)
    for e in load(number).EXERCISES:
        name = e.number.replace(".", "-")
        answer = next(c for c in nb.cells if marks(c).get("grade_id") == f"answer-{name}")
        judged = next(c for c in nb.cells if marks(c).get("grade_id") == f"check-{name}")
        assert marks(answer)["solution"] and not marks(answer)["grade"]
        assert marks(judged)["grade"] and marks(judged)["locked"]
        assert marks(judged)["points"] == release.POINTS[e.tier], e.number
        assert "### BEGIN SOLUTION" in answer.source and "### END SOLUTION" in answer.source
        hidden = (
            r'check\("(?P<n>%s)", (?P<answer>\w+)\)\n### BEGIN HIDDEN TESTS\n'
            r"from exercises.hidden import hidden_check\n\n"
            r'hidden_check\("(?P=n)", (?P=answer)\)\n### END HIDDEN TESTS'
        )
        assert re.fullmatch(hidden % e.number, judged.source), f"{e.number}: the hidden test"


def test_the_hidden_tests_are_made_from_the_visible_ones(number):
    nb = solutions(number)
    stripped = release.student_version(nb)
    assert essence(release.with_hidden_tests(nb)) == essence(nb)
    made = [c.source for c in release.with_hidden_tests(stripped).cells if marks(c).get("grade")]
    assert made == [c.source for c in nb.cells if marks(c).get("grade")]


def test_outputs_are_stored_and_say_what_they_should(number):
    for nb, line in ((solutions(number), "✓ {} "), (exercises(number), "○ {} not attempted")):
        assert [cell.execution_count for cell in code(nb)] == list(range(1, len(code(nb)) + 1))
        for cell in code(nb):
            assert all(output.output_type != "error" for output in cell.outputs)
            if marks(cell).get("grade"):
                name = marks(cell)["grade_id"].removeprefix("check-").replace("-", ".")
                said = printed(cell).splitlines()
                assert said and all(s.startswith(line.format(name)) for s in said), said
        pictures = [
            cell
            for cell in code(nb)
            if any("image/png" in output.get("data", {}) for output in cell.outputs)
        ]
        assert pictures, "a set has at least one picture"
        for cell in pictures:
            said = printed(cell)
            assert re.search(r"[A-Za-z]{2,} [a-z]{2,}", said), f"no sentence, but {said!r}"


def test_links_lead_somewhere(number):
    text = "\n".join(c.source for c in solutions(number).cells if c.cell_type == "markdown")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", link):
            target = release.exercises(number).parent / link.split("#")[0]
            assert target.exists(), f"{release.exercises(number).name}: {link} leads nowhere"


def run_cells(nb) -> dict:
    """Run the code cells in this process: quicker than a kernel."""
    names = {}
    matplotlib.use("Agg")
    for cell in code(nb):
        # As IPython does: triton.jit reads its kernel's source when it compiles.
        linecache.cache[cell.id] = len(cell.source), None, cell.source.splitlines(True), cell.id
        exec(compile(cell.source, cell.id, "exec"), names)  # noqa: S102
    matplotlib.pyplot.close("all")
    return names


def test_the_solutions_pass_strictly_and_the_stubs_do_not(number, monkeypatch):
    monkeypatch.setenv("NSA_LITE_STRICT", "1")
    run_cells(solutions(number))
    with pytest.raises(AssertionError, match=f"○ {number}.1 not attempted"):
        run_cells(exercises(number))


# --- the generator itself ---


def test_one_changed_word_in_the_solutions_makes_the_students_notebook_stale():
    nb = solutions(FIRST)
    nb.cells[0].source += " more"
    assert essence(exercises(FIRST)) != essence(release.student_version(nb))


def test_the_stub_keeps_the_indentation_and_what_stands_around_the_solution():
    cell = nbformat.v4.new_code_cell(
        "class A:\n    def f(self):\n        ### BEGIN SOLUTION\n        x = 1\n\n"
        "        return x\n        ### END SOLUTION\n\n    y = 2",
        metadata={"nbgrader": {"solution": True, "grade": False}},
    )
    made = release.student_version(nbformat.v4.new_notebook(cells=[cell])).cells[0].source
    assert made == (
        "class A:\n    def f(self):\n        # YOUR CODE HERE\n"
        "        raise NotImplementedError()\n\n    y = 2"
    )


# --- a set for a class, without nbgrader ---


def unpacked(number, tmp_path):
    path = release.pack(number, tmp_path)
    first = path.read_bytes()
    assert release.pack(number, tmp_path).read_bytes() == first, "the same files, the same bytes"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    return tmp_path / f"exercises_{number}"


def test_a_packed_set_holds_no_answers(number, tmp_path):
    folder = unpacked(number, tmp_path)
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert not [f.name for f in files if "answers" in f.name or "solutions" in f.name]
    assert not {f.name for f in files} & {"hidden.py", "grade.py", "grading.py", "handed_in.py"}
    assert not [f for f in files if "### BEGIN SOLUTION" in f.read_text("utf-8")]
    notebook = folder / release.exercises(number).relative_to(release.ROOT)
    assert notebook.exists() and notebook.name in (folder / "README.md").read_text("utf-8")


SCRIPT = """
import sys, nbformat, exercises
from pathlib import Path
assert Path(exercises.__file__).is_relative_to(Path(sys.argv[2]).resolve())
import matplotlib; matplotlib.use('Agg')
for cell in nbformat.read(sys.argv[1], as_version=4).cells:
    if cell.cell_type == 'code': exec(cell.source)
"""


def lines_of(notebook, package) -> list[str]:
    """What the checks of a notebook print in its own folder, as Jupyter runs it."""
    environment = {**os.environ, "PYTHONPATH": str(package), "NSA_LITE_STRICT": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, notebook, package],
        cwd=notebook.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return [line for line in ran.stdout.splitlines() if line.startswith(("○", "✗", "✓"))]


def notebook_of(number, folder):
    return folder / release.exercises(number).relative_to(release.ROOT)


def test_a_packed_set_works_alone(tmp_path):
    folder = unpacked(FIRST, tmp_path)
    lines = lines_of(notebook_of(FIRST, folder), folder)
    assert lines == [f"○ {e.number} not attempted" for e in load(FIRST).EXERCISES]


@pytest.mark.parametrize("installed", [0, 1])
def test_two_sets_in_one_environment_do_not_hide_each_other(tmp_path, installed):
    """The packages of both have one name: only one is installed, and both sets are found."""
    numbers = list(sets())[:2]
    folders = [unpacked(number, tmp_path) for number in numbers]
    for number, folder in zip(numbers, folders, strict=True):
        lines = lines_of(notebook_of(number, folder), folders[installed])
        assert lines == [f"○ {e.number} not attempted" for e in load(number).EXERCISES]


def test_an_unknown_set_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["release", "3", "--zip"])
    with pytest.raises(SystemExit, match="2"):
        release.main()
    assert "there is no exercise set '3'; there are 01, " in capsys.readouterr().err
