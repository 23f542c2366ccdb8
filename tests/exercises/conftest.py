"""Each planted answer judged once, and the table of those caught, printed at the run's end."""

import functools
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from exercises.checking import judge as judge_anew

COUNTS = pytest.StashKey[dict]()


def pytest_configure(config):
    config.stash[COUNTS] = {}


@pytest.fixture(scope="session")
def judge():
    """The verdict on an answer, remembered: several tests ask for the same one."""
    remembered = functools.cache(judge_anew)
    return lambda exercise, answer, seed=0: remembered(made_once(exercise), answer, seed)


@functools.cache
def made_once(exercise):
    """The exercise with cases that are made once a seed; each time they are copies."""

    @functools.cache
    def cases(seed):
        return exercise.cases(torch.Generator().manual_seed(seed))

    return replace(exercise, cases=lambda generator: deepcopy(cases(generator.initial_seed())))


@pytest.fixture
def caught(request):
    """Note how many of an exercise's planted wrong answers its check rejected by name."""

    def note(exercise, found: int, planted: int) -> None:
        request.config.stash[COUNTS][exercise] = (found, planted)

    return note


def pytest_terminal_summary(terminalreporter, config):
    counts = config.stash.get(COUNTS, {})
    if not counts:
        return
    terminalreporter.section("planted wrong answers caught")
    for exercise, (found, planted) in counts.items():
        terminalreporter.line(f"{exercise.number}  {exercise.title:<40} {found:3} of {planted}")
    found, planted = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
    terminalreporter.line(f"{'all':<45} {found:3} of {planted}, {100 * found // planted}%")
