"""What an exercise is: a small record, the cases that judge an answer, and the mistakes they name.

A set lies in one folder, exercises/NN_name:

    checks.py      the list EXERCISES, with the cases of each
    mistakes.py    the mistakes that a check knows by what they give, one record each
    answers.py     for teachers: right answers, and wrong ones, the mistakes among them
"""

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
SET = "[0-9][0-9]_*"  # the name of a set's folder
TIERS = {"warm-up": (1, 5), "core": (10, 20), "stretch": (30, 60)}  # minutes: from, to


@dataclass(frozen=True)
class Case:
    """One call of an answer, with inputs that make one named mistake give a wrong value.

    arguments are passed by position; their names are for the messages. expected is a tensor, a
    number, a bool, a list, or a tuple of those. axes names the axes of a tensor, for the place
    in a message; for a tuple, axes maps the name of each part to its axes. explain(got, expected,
    **arguments) words a wrong value, or returns None. call(answer, *arguments) replaces the plain
    call, for a gradient, say, or for two calls whose results must agree.
    """

    name: str
    arguments: dict[str, object]
    expected: object
    axes: tuple[str, ...] | dict[str, tuple[str, ...]] = ()
    explain: Callable[..., str | None] | None = None
    call: Callable[..., object] | None = None


@dataclass(frozen=True)
class Exercise:
    """One exercise: cases(generator) makes its cases; hints are a question, a formula, a sketch."""

    number: str  # "03.2": the second exercise of set 03
    title: str
    tier: str  # one of TIERS
    minutes: int
    cases: Callable[[torch.Generator], list[Case]]
    hints: tuple[str, str, str]
    seconds: float = 10.0  # all cases together may take this long


@dataclass(frozen=True)
class Wrong:
    """A planted wrong answer: the check must reject it with a message that holds `says`."""

    mistake: str
    answer: Callable[..., object]
    says: str  # {places} in it stand for any text

    def is_named_in(self, message: str) -> bool:
        """Whether a message holds `says`, whatever stands in its {places}."""
        return re.search(re.sub(r"\\{\w+\\}", ".+?", re.escape(self.says)), message) is not None


@dataclass(frozen=True)
class Mistake:
    """A mistake by name: a function that makes it, and the sentence that the check has for it.

    The check runs `answer` on its own inputs and knows the mistake by what it gives; the bank of
    wrong answers plants the same function. {places} in the sentence are filled in by the check.
    """

    name: str
    answer: Callable[..., object]
    says: str


def planted(mistakes: list[Mistake], shown: Mapping[str, str] | None = None) -> list[Wrong]:
    """The mistakes as wrong answers; shown[name] is their sentence with its places filled in."""
    says = shown or {}
    return [Wrong(m.name, m.answer, says.get(m.name, m.says)) for m in mistakes]


def in_turn(
    case: Callable[..., Case], rows: Mapping[str, Mapping[str, object]]
) -> Callable[[torch.Generator], list[Case]]:
    """Cases from a table: each row is a case's name and what case(generator, name, ...) takes."""

    def cases(generator: torch.Generator) -> list[Case]:
        return [case(generator, name, **row) for name, row in rows.items()]

    return cases


def sets() -> dict[str, Path]:
    """The folder of each set, by its number: "03" is exercises/03_selection."""
    return {path.name[:2]: path for path in sorted([*FOLDER.glob(SET), *_beside()], key=_ours_last)}


def _beside() -> list[Path]:
    """The sets beside the folder where the kernel runs, if that is the folder of a set.

    A set that was unpacked on its own is found there, though another's package is installed.
    """
    try:
        here = Path.cwd()
    except FileNotFoundError:  # somebody removed it
        return []
    is_a_set = here.match(SET) and (here / "checks.py").exists()
    return list(here.parent.glob(SET)) if is_a_set else []


def _ours_last(path: Path) -> tuple[str, bool]:
    """An order by number in which a set of this package comes last, and so is taken."""
    return path.name[:2], path.parent == FOLDER


def folder(number: str) -> Path:
    """The folder of set "03", or of exercise "03.2". Errors: LookupError lists what there is."""
    wanted = str(number).split(".")[0]
    found = sets()
    if wanted not in found:
        raise LookupError(f"there is no exercise set {wanted!r}; there are {', '.join(found)}")
    return found[wanted]


def load(number: str, part: str = "checks"):
    """The module checks.py, mistakes.py or answers.py of a set."""
    place = folder(number)
    searched = importlib.import_module("exercises").__path__
    if str(place.parent) not in searched:
        searched.append(str(place.parent))
    return importlib.import_module(f"exercises.{place.name}.{part}")


def find(number: str) -> Exercise:
    """The exercise of this number, "03.2". Errors: LookupError that lists what there is."""
    exercises = {exercise.number: exercise for exercise in load(number).EXERCISES}
    if number not in exercises:
        raise LookupError(f"there is no exercise {number!r}; there are {', '.join(exercises)}")
    return exercises[number]


def all_exercises() -> list[Exercise]:
    """Every exercise of every set, in order."""
    return [exercise for number in sets() for exercise in load(number).EXERCISES]
