"""Many faults in one run of a notebook: each begins where what it replaces is first called.

The notebook runs once as it stands, in a process of its own, and before each cell the process is
copied (os.fork). If the cell is the first to call what some fault replaces, the copy made before it
puts the fault in and goes on from there. Files that cells wrote are put back with it.
"""

import functools
import gc
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.notebooks.running import CellError, run_cell, untouched

Names = dict[str, object]
Files = dict[Path, bytes | None]  # None for a folder
Outcome = tuple[int | None, str]  # the number of the first cell that failed, and how
OURS = ("nsa_lite", "kernels", "benchmarks")
NEVER: Outcome = (None, "no cell calls what it replaces")
LOST: Outcome = (None, "its process ended before it said anything")


class Spot(NamedTuple):
    """Where a function lies: a module or class, and its name there."""

    holder: object
    name: str

    def get(self) -> object:
        """What lies there."""
        return getattr(self.holder, self.name)


def put(new: dict[Spot, object], names: Names) -> None:
    """Put other things there, and wherever a module of ours or the notebook imported the old."""
    instead = {id(spot.get()): thing for spot, thing in new.items()}
    for spot, thing in new.items():
        setattr(spot.holder, spot.name, thing)
    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] in OURS]
    for holder in [names, *map(vars, modules)]:
        for alias, value in list(holder.items()):
            if id(value) in instead:
                holder[alias] = instead[id(value)]


class Fault(NamedTuple):
    """Where it begins: a cell by number, or a function's first call. It ends at `last`.

    put_in(sources, names) changes the cells' texts, the notebook's names, or modules.
    """

    begins: int | Spot
    put_in: Callable[[list[str], Names], None]
    last: int


class Run(NamedTuple):
    """A notebook that runs: its cells' texts, its names so far, and the folder for its files."""

    sources: list[str]
    names: Names
    folder: Path


def outcomes(sources: list[str], faults: dict[str, Fault]) -> dict[str, Outcome]:
    """What each fault does to a notebook; nothing of it is left in this process."""
    with tempfile.TemporaryDirectory() as name:
        run = Run(sources, {"__name__": "__main__"}, Path(name))
        found = copy_of_this_process(lambda _: run_once(run, faults))([])
    return {name: tuple(found[name]) if name in found else LOST for name in faults}


def run_once(run: Run, faults: dict[str, Fault]) -> dict[str, Outcome]:
    """Run the notebook as it stands, as far as faults wait for their cell."""
    tempfile.tempdir = str(run.folder)
    os.chdir(run.folder)
    found: dict[str, Outcome] = {}
    called: set[Spot] = set()
    note_calls({f.begins for f in faults.values() if isinstance(f.begins, Spot)}, called)
    with untouched():
        for place in range(len(run.sources)):
            waiting = {name: fault for name, fault in faults.items() if name not in found}
            if not waiting:
                break
            found |= run_with_copies(run, place, waiting, called)
    return dict.fromkeys(faults, NEVER) | found


def run_with_copies(
    run: Run, place: int, waiting: dict[str, Fault], called: set[Spot]
) -> dict[str, Outcome]:
    """Run one cell as it stands; what the faults do that begin in it."""
    before = files_in(run.folder)
    copy = copy_of_this_process(lambda due: each_alone(run, place, waiting, due, before))
    run_cell(place, run.sources[place], run.names)
    due = [name for name, f in waiting.items() if f.begins == place or f.begins in called]
    after = files_in(run.folder)
    found = dict.fromkeys(due, LOST) | copy(due)
    put_back(run.folder, after)
    return found


def each_alone(
    run: Run, place: int, faults: dict[str, Fault], due: list[str], files: Files
) -> dict[str, Outcome]:
    """What each fault does from one cell on, each beginning with the same names and files."""
    found = {}
    for name in due:
        put_back(run.folder, files)
        fault = faults[name]
        copy = copy_of_this_process(lambda due, fault=fault: {due[0]: run_on(run, place, fault)})
        found |= copy([name])
    return found


def run_on(run: Run, place: int, fault: Fault) -> Outcome:
    """Put a fault in and run from one cell to the fault's last."""
    texts = list(run.sources)
    fault.put_in(texts, run.names)
    try:
        for at in range(place, fault.last + 1):
            run_cell(at, texts[at], run.names)
    except CellError as error:
        return error.place, f"{error}: {error.__cause__!r}"
    return None, "no cell fails"


def files_in(folder: Path) -> Files:
    """Everything below a folder, a folder before what it holds."""
    paths = sorted(folder.rglob("*"))
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def put_back(folder: Path, files: Files) -> None:
    """Make a folder hold these again, and nothing else."""
    if files_in(folder) == files:
        return
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path, data in files.items():
        path.mkdir() if data is None else path.write_bytes(data)


def note_calls(spots: set[Spot], called: set[Spot]) -> None:
    """Have functions note in `called` that they are called."""
    put({spot: noting(spot.get(), spot, called) for spot in spots}, {})


def noting(old: Callable, spot: Spot, called: set[Spot]) -> Callable:
    """The same function, which notes that it is called."""

    @functools.wraps(old)
    def noted(*args, **kwargs):
        called.add(spot)
        return old(*args, **kwargs)

    return noted


def copy_of_this_process(
    work: Callable[[list[str]], dict[str, Outcome]],
) -> Callable[[list[str]], dict[str, Outcome]]:
    """Copy this process now; the copy waits, and works once it is handed some names."""
    order, hand_over = os.pipe()
    answer, say = os.pipe()
    gc.freeze()  # a collection in a copy would write to, and so copy, what all share
    child = os.fork()
    if child == 0:
        os.close(hand_over)
        os.close(answer)
        try:
            with open(order) as read, open(say, "w") as written:
                json.dump(work(json.load(read)), written)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(order)
    os.close(say)

    def hand(names: list[str]) -> dict[str, Outcome]:
        with open(hand_over, "w") as written:
            json.dump(names, written)
        with open(answer) as read:
            said = read.read()
        os.waitpid(child, 0)
        return json.loads(said) if said else {}

    return hand
