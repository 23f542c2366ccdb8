"""What a learner guessed and wrote is kept, shown, and never in the way."""

import json
import subprocess
import sys

import nbformat
import pytest

from exercises import came_out, check, course, predict, progress, release, yours
from exercises.records import load, sets


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The learner's file, empty at first, in a notebook that has just begun."""
    path = tmp_path / "progress.json"
    monkeypatch.setenv(course.NAME, str(path))
    course.guesses.clear()
    course.passed.clear()
    return path


@pytest.mark.parametrize(
    ("guess", "value", "said", "noted"),
    [
        (7, 7, "02.a came out: 7, as you guessed", True),
        (8, 7, "02.a came out: 7; your guess was 8", False),
        (204, 203, "02.a came out: 203; your guess was 204", False),
        (203, 203.4, "02.a came out: 203.4, as you guessed", True),
        (0.333, 1 / 3, f"02.a came out: {1 / 3}, as you guessed", True),
        (0, 0.0, "02.a came out: 0.0, as you guessed", True),
        ((1, 2), [1, 2], "02.a came out: [1, 2], as you guessed", True),
        ([2, 1], [1, 2], "02.a came out: [1, 2]; your guess was [2, 1]", False),
        ({"a": 1}, {"a": 1}, "02.a came out: {'a': 1}, as you guessed", True),
        ("early", "early on", "02.a came out: early on; your guess was early", None),
        ("seven", 7, "02.a came out: 7; your guess was seven", None),
    ],
)
def test_a_guess_stands_beside_what_came_out(kept, capsys, guess, value, said, noted):
    predict("02.a", guess)
    came_out("02.a", value)
    assert capsys.readouterr().out.splitlines() == [f"02.a: your guess is {guess}", said]
    assert json.loads(kept.read_text())["guessed"] == {"02.a": noted}


def test_notebook_00_stores_what_progress_prints_at_the_beginning(monkeypatch, capsys):
    """The learner's own is printed there, so nbval compares nothing."""
    monkeypatch.setenv("NSA_LITE_PROGRESS", "off")
    cells = nbformat.read(release.ROOT / "notebooks/00_start_here.ipynb", as_version=4).cells
    (cell,) = [cell for cell in cells if cell.source == "progress()"]
    course.progress()
    assert cell.outputs[0].text == capsys.readouterr().out


def test_without_a_guess_everything_runs_and_nothing_is_kept(kept, capsys):
    predict("02.a")
    came_out("02.a", 7)
    assert capsys.readouterr().out.splitlines() == [
        '○ 02.a: no guess yet. Write it as predict("02.a", ...) and run this again',
        "02.a came out: 7",
    ]
    assert not kept.exists()


def right_answer(number="01.1"):
    return load(number[:2], "answers").RIGHT[number][0]


def test_the_learners_function_is_used_once_it_is_right(kept, capsys):
    def stub(*_):
        raise NotImplementedError

    check("01.1", stub)
    assert yours("01.1", stub, print) is print and not kept.exists()
    check("01.1", lambda *_: 0)
    assert yours("01.1", stub, print) is print
    assert json.loads(kept.read_text())["checked"] == {"01.1": False}
    answer = right_answer()
    check("01.1", answer)
    assert yours("01.1", answer, print) is answer
    assert yours("01.1", stub, print) is print  # another one, not checked
    assert json.loads(kept.read_text())["checked"] == {"01.1": True}
    check("01.1", stub)
    assert yours("01.1", answer, print) is answer  # what is not attempted takes nothing back
    capsys.readouterr()


def test_progress_counts_what_the_notebooks_and_sets_ask(kept, capsys, monkeypatch):
    predict("01.b", 3)
    check("01.1", lambda *_: 0)  # it puts back what is replaced, so it comes first
    monkeypatch.setattr(
        course,
        "asked",
        lambda: {"01_a": (["01.a", "01.b"], ["01.1"]), "02_b": ([], []), "03_c": ([], ["03.1"])},
    )
    capsys.readouterr()
    progress()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["01_a", "1", "of", "2", "1", "of", "1", "0", "of", "1"]
    assert lines[2].split() == ["03_c", "-", "0", "of", "1", "0", "of", "1"]
    count = len(load("01").EXERCISES)
    assert lines[3].split() == f"exercise set 01 - 1 of {count} 0 of {count}".split()
    assert lines[-1] == "kept in progress.json, which you may delete; it goes nowhere"


@pytest.mark.parametrize("text", ["no json", "[1]", '{"checked": 3}', ""])
def test_a_damaged_file_stops_nobody(kept, capsys, text):
    kept.write_text(text)
    predict("02.a", 7)
    assert json.loads(kept.read_text())["guessed"] == {"02.a": None}
    capsys.readouterr()


def test_a_folder_that_takes_no_file_stops_nobody(kept, capsys, monkeypatch):
    monkeypatch.setenv(course.NAME, str(kept / "in/no/folder"))
    predict("02.a", 7)
    came_out("02.a", 7)
    assert "as you guessed" in capsys.readouterr().out


def test_a_test_keeps_nothing(kept, monkeypatch, capsys):
    monkeypatch.setenv(course.NAME, "off")
    predict("02.a", 7)
    check("01.1", right_answer())
    progress()
    assert course.file() is None and not kept.exists()
    assert "goes nowhere" not in capsys.readouterr().out


def test_what_the_notebooks_ask_is_found():
    found = course.asked()
    assert all(
        turn in {e.number for e in load(turn[:2]).EXERCISES}
        for _, t in found.values()
        for turn in t
    )


def test_the_exercises_of_a_set_are_found_without_importing_it():
    for number, folder in sets().items():
        found = course.EXERCISE.findall((folder / "checks.py").read_text("utf-8"))
        assert found == [exercise.number for exercise in load(number).EXERCISES]


def test_the_first_cell_of_a_notebook_does_not_wait_for_a_checker_of_notebooks():
    """nbformat's import takes longer than torch's; only teachers' commands need it."""
    code = "import exercises, sys; print({'nbformat', 'jsonschema'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
