"""Checkpoints that bite: a fault in the step that a checkpoint guards turns that checkpoint red.

mutations_NN.py lists faults for notebook NN: what is wrong; the function that is replaced, as
"nsa_lite.selection.block_importance"; old -> faulty new; and words of the cell that must fail. A
fault in a notebook's own code is ("cell", old text, new text) in place of the two in the middle.
"""

import importlib
import inspect
import itertools
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import exercises
import nsa_lite.loops  # noqa: F401  every module that may hold what is replaced
from nsa_lite.lab import training
from tests.notebooks import trainings
from tests.notebooks.running import PATHS, code_of
from tests.notebooks.snapshots import Fault, Outcome, Spot, outcomes, put

# Its first call imports for half a second: here once, not in the copied process of each fault.
assert_close(torch.zeros(1), torch.zeros(1))

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
            found.append(pytest.param(path, name, fault, words, id=f"{number}: {name}"))
    return found


def module_of(name: str) -> str:
    """The module in "nsa_lite.cache.Cache.next_positions", say."""
    parts = name.split(".")
    return ".".join(itertools.takewhile(lambda part: part.islower(), parts[:-1]))


def spot_of(name: str) -> Spot:
    """Where a function lies."""
    module_name = module_of(name)
    holder: object = importlib.import_module(module_name)
    *inner, last = name.removeprefix(f"{module_name}.").split(".")
    for part in inner:
        holder = getattr(holder, part)
    return Spot(holder, last)


def begins(spot: Spot) -> int | Spot:
    """A fault waits for the first call of a plain function; for anything else it begins at once."""
    return spot if inspect.isfunction(vars(spot.holder).get(spot.name)) else 0


def only(sources: list[str], words: str) -> int:
    """The one cell that holds some words."""
    holding = [place for place, source in enumerate(sources) if words in source]
    assert len(holding) == 1, f"{len(holding)} cells hold {words!r}"
    return holding[0]


def planted(sources: list[str], fault: list, words: str) -> Fault:
    """A fault of a table, as what is put into a run."""
    last = only(sources, words)
    if fault[0] != "cell":
        name, change = fault
        found = spot_of(name)

        def put_in(_: list[str], names: dict[str, object]) -> None:
            put({found: change(found.get())}, names)

        return Fault(begins(found), put_in, last)
    _, old, new = fault
    place = only(sources, old)

    def rewrite(texts: list[str], _: object) -> None:
        texts[place] = texts[place].replace(old, new)

    return Fault(place, rewrite, last)


def sources_of(path: Path) -> list[str]:
    """The cells that are run: as they are, but for what takes long and no fault is in.

    No checkpoint reads what 08 compiles, nor what two processes do in 17, but that they agree; and
    17's live runs learn 256 tokens as they learn 1,024.
    """
    sources = [cell.source for cell in code_of(path)]
    instead = {"08": "", "17": "difference = 0.0"}.get(path.name[:2])
    if instead is not None:
        sources = [instead if "subprocess.run" in source else source for source in sources]
    if path.name.startswith("17"):
        sources = [
            source.replace("length=1024, steps=400", "length=256, steps=400") for source in sources
        ]
    return sources


@pytest.fixture(scope="module")
def outcome(request, tmp_path_factory):
    """What a fault does, of one run of its notebook for all its faults that pytest selected."""
    selected = [
        item.callspec.params for item in request.session.items if item.fspath == request.fspath
    ]
    found = {}

    def of(path: Path, name: str) -> Outcome:
        if path not in found:
            faults = {
                x["name"]: planted(sources_of(path), x["fault"], x["words"])
                for x in selected
                if x["path"] == path
            }
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(exercises, "check", lambda *_: None)  # its own tests are elsewhere
                if experiment := trainings.OF_RECORD.get(path.name[:2]):
                    patch.setattr(training, "steps", trainings.of_record(experiment))
                if path.name[:2] in trainings.NOTEBOOKS:
                    kept = tmp_path_factory.mktemp("trainings")
                    patch.setattr(training, "steps", trainings.once(training.steps, kept))
                found[path] = outcomes(sources_of(path), faults)
        return found[path][name]

    return of


@pytest.mark.parametrize(("path", "name", "fault", "words"), mutations())
def test_the_checkpoint_turns_red(path, name, fault, words, outcome):
    place, said = outcome(path, name)
    assert place == only(sources_of(path), words), said
