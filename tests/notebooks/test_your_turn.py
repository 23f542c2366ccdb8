"""Your turn cells: stubs that run through, and folded solutions that the notebook can use."""

import ast
import re

import pytest

from exercises import check
from exercises.records import Wrong, load
from tests.notebooks.running import PATHS, code_of, printed_by, solutions, stored, turns

WITH_TURNS = [path for path in PATHS if turns(path)]
TURNS = [(path, number) for path in WITH_TURNS for number in turns(path)]
NAMES = [f"{path.stem}-{number}" for path, number in TURNS]


def functions(source: str) -> list[ast.FunctionDef]:
    """The functions that a Your turn cell defines: one, or a kernel and its launch."""
    return [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]


def solved(path, number: str) -> str:
    """The Your turn cell with the solution in place of the stub, and of its launch if any."""
    source = turns(path)[number].source
    stubs = functions(source)
    first = min([stubs[0].lineno, *(node.lineno for node in stubs[0].decorator_list)])
    lines = source.splitlines()
    solution = solutions(path)[number].splitlines()
    return "\n".join([*lines[: first - 1], *solution, *lines[stubs[-1].end_lineno :]])


@pytest.fixture(autouse=True)
def no_strictness(monkeypatch):
    monkeypatch.delenv("NSA_LITE_STRICT", raising=False)


@pytest.mark.parametrize(("path", "number"), TURNS, ids=NAMES)
def test_a_stub_says_what_and_how_long_and_runs_unanswered(path, number):
    cell = turns(path)[number]
    assert re.match(r"# Your turn \(exercise \d\d\.\d\): .+, about \d+ lines?$", cell.source, re.M)
    assert "    raise NotImplementedError" in cell.source
    assert stored(cell).strip() == f"○ {number} not attempted"
    last = functions(cell.source)[-1].name
    assert cell.source.splitlines()[-1] == f'check("{number}", {last})'


@pytest.mark.parametrize(("path", "number"), TURNS, ids=NAMES)
def test_the_check_names_wrong_answers(path, number, capsys):
    bank: list[Wrong] = load(number[:2], "answers").WRONG[number]
    for wrong in bank[:: max(1, len(bank) // 3)][:3]:
        check(number, wrong.answer)
        line = capsys.readouterr().out
        assert line.startswith(f"✗ {number}"), wrong.mistake
        assert wrong.is_named_in(line), f"{wrong.mistake}: {line}"


@pytest.mark.parametrize("path", WITH_TURNS, ids=lambda path: path.stem)
def test_with_every_solution_filled_in_the_notebook_prints_the_same(path):
    """The checks say ✓, and what the learner wrote gives the numbers that are stored."""
    cells = code_of(path)
    answered = {cell.source: number for number, cell in turns(path).items()}
    sources = [
        solved(path, answered[c.source]) if c.source in answered else c.source for c in cells
    ]
    for cell, text in zip(cells, printed_by(sources), strict=True):
        if number := answered.get(cell.source):
            assert re.fullmatch(rf"✓ {number} (\d+) of \1 cases\n", text), text
        elif not {"raises-exception", "nbval-ignore-output"} & set(cell.metadata.get("tags", [])):
            assert text == stored(cell), cell.source
