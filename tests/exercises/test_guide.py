"""The instructor's guide: true tables, and plans whose minutes add up."""

import re

import pytest

from exercises import guide
from exercises.records import find, load, sets

TEXT = guide.GUIDE.read_text("utf-8")


def unstable(text: str) -> str:
    """Without what may differ on another machine: digits after a point, other people's errors."""
    text = re.sub(r"the function raised .*", "the function raised", text)
    return re.sub(r"\d+\.\d+(?!\d* \|)", "#", text)


@pytest.mark.parametrize("number", sets())
def test_the_tables_of_a_set_are_those_of_its_records(number, judge):
    block = next((m[0] for m in guide.BLOCK.finditer(TEXT) if m[1] == number), None)
    assert block, f"INSTRUCTOR.md has no block for set {number}"
    renewed = guide.renewed(block, judge)
    assert unstable(block) == unstable(renewed), "run `python -m exercises.guide`"


def test_the_sample_of_a_check_is_what_a_check_says(judge):
    exercise = find("03.4")
    answers = load("03", "answers")
    (mistaken,) = [w.answer for w in answers.WRONG["03.4"] if w.mistake == "forced by adding 1.0"]
    wrong = judge(exercise, mistaken).line()
    right = judge(exercise, answers.RIGHT["03.4"][0]).line()
    readme = (guide.GUIDE.parents[1] / "README.md").read_text("utf-8")
    assert wrong in readme
    assert f"not attempted\n{wrong}\n{right}\n" in TEXT


@pytest.mark.parametrize("number", sets())
def test_a_set_has_its_text_and_folded_questions(number):
    section = re.search(rf"^### {number} (.*?)(?=^### |\Z)", TEXT, re.M | re.S)
    assert section, f"INSTRUCTOR.md has no section for set {number}"
    questions = section[1].split("Questions to discuss:")[1]
    assert questions.count("<details><summary>") == questions.count("</details>") >= 2


def test_the_readme_lists_every_set_with_its_minutes():
    readme = guide.README.read_text("utf-8")
    assert readme == guide.listed(readme), "run `python -m exercises.guide`"
    assert all(f"| [{number} " in readme for number in sets())


def rows_of(plan: str) -> list[list[str]]:
    section = TEXT.split(f"## {plan}\n")[1].split("\n## ")[0]
    return [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in re.findall(r"^\|.*\|$", section, re.M)[2:]
    ]


def test_each_session_has_90_minutes():
    sessions = []
    for session, minutes, _ in rows_of("Plan: four sessions of 90 minutes"):
        sessions += [0] if session else []
        sessions[-1] += int(minutes)
    assert sessions == [90] * 4


def test_the_day_has_no_gap():
    rows = rows_of("Plan: one full day")
    clock = [int(h) * 60 + int(m) for h, m in (row[0].split(":") for row in rows)]
    for begin, end, (_, minutes, _) in zip(clock, clock[1:], rows, strict=False):
        assert end - begin == int(minutes)


@pytest.mark.parametrize("plan", ["Plan: four sessions of 90 minutes", "Plan: one full day"])
def test_the_exercises_of_a_row_fit_into_its_minutes(plan):
    for *_, minutes, what in rows_of(plan):
        work = re.match(r"\d\d\.\d(, \d\d\.\d)*", what)  # a row of work begins with its exercises
        numbers = work[0].split(", ") if work else []
        known = [find(number).minutes for number in numbers if number[:2] in sets()]
        assert sum(known) <= int(minutes), f"{what}: {sum(known)} minutes"


def test_no_exclamation_marks():
    assert "!" not in re.sub(r"<!--|`[^`]*`", "", TEXT)
