"""Checkpoints that bite: a fault in the step that a checkpoint guards turns that checkpoint red.

mutations_NN.py lists faults for notebook NN: what is wrong; the function that is replaced, as
"nsa_lite.selection.block_importance"; old -> faulty new; and words of the cell that must fail. A
fault in a notebook's own code is ("cell", old text, new text) in place of the two in the middle.
"""

import importlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import exercises
import nsa_lite.loops  # noqa: F401  every module that may hold what is replaced
from nsa_lite.lab import training
from tests.notebooks import trainings
from tests.notebooks.running import PATHS, CellError, code_of, printed_by

TABLES = sorted(Path(__file__).parent.glob("mutations_[0-9][0-9].py"))


def mutations() -> list:
    """(notebook, name, fault, words) of every table, as pytest's parameters."""
    found = []
    for table in TABLES:
        number = table.stem[-2:]
        path = next(path for path in PATHS if path.name.startswith(number))
        for name, *fault, words in importlib.import_module(
            f"tests.notebooks.{table.stem}"
        ).MUTATIONS:
            found.append(pytest.param(path, fault, words, id=f"{number}: {name}"))
    return found


def module_of(name: str) -> str:
    """The module in "nsa_lite.cache.Cache.next_positions", say."""
    parts = name.split(".")
    return ".".join(itertools.takewhile(lambda part: part.islower(), parts[:-1]))


def replace(monkeypatch, name: str, fault: Callable) -> None:
    """Put fault(old) where a function lies, and wherever else a module of ours has imported it."""
    module_name = module_of(name)
    place = importlib.import_module(module_name)
    *inner, last = name.removeprefix(f"{module_name}.").split(".")
    for part in inner:
        place = getattr(place, part)
    old = getattr(place, last)
    new = fault(old)
    monkeypatch.setattr(place, last, new)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").partition(".")[0] == "nsa_lite":
            for alias, value in list(vars(module).items()):
                if value is old:
                    monkeypatch.setattr(module, alias, new)


@pytest.mark.parametrize(("path", "fault", "words"), mutations())
def test_the_checkpoint_turns_red(path, fault, words, monkeypatch, tmp_path):
    monkeypatch.setattr(exercises, "check", lambda *_: None)  # its own tests are elsewhere
    if path.name[:2] in trainings.NOTEBOOKS:
        monkeypatch.setattr(training, "steps", trainings.once(training.steps))
        monkeypatch.chdir(tmp_path)  # 16 leaves a run in the folder where it is
    # No checkpoint reads what 08 compiles for a GPU, which takes half a minute.
    sources = ["" if "subprocess.run" in cell.source else cell.source for cell in code_of(path)]
    expected = [place for place, source in enumerate(sources) if words in source]
    assert len(expected) == 1, f"{len(expected)} cells hold {words!r}"
    if fault[0] == "cell":
        _, old, new = fault
        holding = [place for place, source in enumerate(sources) if old in source]
        assert len(holding) == 1, f"{len(holding)} cells hold {old!r}"
        sources[holding[0]] = sources[holding[0]].replace(old, new)
    else:
        replace(monkeypatch, *fault)
    with pytest.raises(CellError) as raised:
        for _ in printed_by(sources[: expected[0] + 1]):
            pass
    assert raised.value.place == expected[0], raised.value
