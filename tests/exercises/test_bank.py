"""Every planted wrong answer is named, every right one accepted, and no message gives it away."""

import re

import nbformat
import pytest

from exercises import release
from exercises.records import TIERS, Mistake, Wrong, all_exercises, load, planted, sets

EXERCISES = all_exercises()
SEEDS = (0, 1)  # the lesson's numbers, and the hidden tests'


@pytest.fixture(params=EXERCISES, ids=[exercise.number for exercise in EXERCISES])
def exercise(request):
    return request.param


def wrong_answers(exercise):
    return load(exercise.number, "answers").WRONG[exercise.number]


def solution_lines(exercise) -> list[str]:
    """The lines of the solution, without the short ones."""
    nb = nbformat.read(release.solutions(exercise.number[:2]), as_version=4)
    mark = f"answer-{exercise.number.replace('.', '-')}"
    cells = [c for c in nb.cells if c.metadata.get("nbgrader", {}).get("grade_id", "") == mark]
    code = re.findall(r"### BEGIN SOLUTION\n(.*?)### END SOLUTION", cells[0].source, re.S)[0]
    return [line.strip() for line in code.splitlines() if len(line.strip()) > 15]


def test_the_record_is_whole(exercise):
    low, high = TIERS[exercise.tier]
    assert low <= exercise.minutes <= high, f"{exercise.tier} takes {low} to {high} minutes"
    assert len(exercise.hints) == 3 and all(exercise.hints)
    assert len(load(exercise.number, "answers").RIGHT[exercise.number]) >= 3
    assert len(wrong_answers(exercise)) >= 5
    mistakes = [wrong.mistake for wrong in wrong_answers(exercise)]
    assert len(set(mistakes)) == len(mistakes)


def test_every_wrong_answer_is_rejected_with_its_mistake_named(exercise, judge, caught):
    missed = []
    for wrong in wrong_answers(exercise):
        for seed in SEEDS:
            verdict = judge(exercise, wrong.answer, seed)
            if verdict.right or not verdict.attempted or not wrong.is_named_in(verdict.message):
                missed.append(f"{wrong.mistake} (seed {seed}): {verdict.line()}")
                break
    caught(exercise, len(wrong_answers(exercise)) - len(missed), len(wrong_answers(exercise)))
    assert not missed, "\n".join(missed)


def lists_of_mistakes(number: str) -> dict[str, list[Mistake]]:
    """The lists of records in a set's mistakes.py; a set may have none."""
    try:
        module = load(number, "mistakes")
    except ModuleNotFoundError:
        return {}
    lists = {name: value for name, value in vars(module).items() if isinstance(value, list)}
    return {name: value for name, value in lists.items() if isinstance(value[0], Mistake)}


@pytest.mark.parametrize("number", sets())
def test_every_mistake_that_a_check_knows_is_planted(number):
    wrong = [w.answer for answers in load(number, "answers").WRONG.values() for w in answers]
    for name, mistakes in lists_of_mistakes(number).items():
        assert [m.name for m in mistakes if m.answer not in wrong] == [], name


@pytest.mark.parametrize("number", sets())
def test_each_list_of_mistakes_is_also_met_by_an_answer_of_another_make(number, judge):
    """A check that ran a wrong mistake would still know it again; an answer by hand tells."""
    lists = lists_of_mistakes(number)
    records = [m.answer for mistakes in lists.values() for m in mistakes]
    messages = [
        judge(exercise, wrong.answer).message
        for exercise in load(number).EXERCISES
        for wrong in wrong_answers(exercise)
        if wrong.answer not in records
    ]
    for name, mistakes in lists.items():
        as_wrong = planted(mistakes)
        assert any(w.is_named_in(m) for w in as_wrong for m in messages), f"{number}: {name}"


def test_no_message_holds_a_line_of_the_solution(exercise, judge):
    lines = solution_lines(exercise)
    for wrong in wrong_answers(exercise):
        message = judge(exercise, wrong.answer).message
        shown = [line for line in lines if line in message]
        assert not shown, f"{wrong.mistake}: {message!r} shows {shown}"


def test_three_right_answers_in_other_styles_are_accepted(exercise, judge):
    for answer in load(exercise.number, "answers").RIGHT[exercise.number]:
        for seed in SEEDS:
            verdict = judge(exercise, answer, seed)
            assert verdict.right, f"{answer.__name__}: {verdict.line()}"


def test_the_places_of_a_sentence_stand_for_any_text():
    wrong = Wrong("two keys", None, "query {t} reads keys {a} (+ {b})")
    assert wrong.is_named_in("case: query 3 reads keys 1 (+ 2), and more")
    assert not wrong.is_named_in("case: query 3 reads no keys")


def test_each_set_has_three_to_six_exercises_of_all_tiers():
    for number in sets():
        exercises = load(number).EXERCISES
        assert 3 <= len(exercises) <= 6, number
        assert {e.tier for e in exercises} == set(TIERS), f"set {number} lacks a tier"
        assert [e.number for e in exercises] == [f"{number}.{k + 1}" for k in range(len(exercises))]
