"""Many faults in one run of a notebook: each begins where what it replaces is first called.

The notebook runs once as it stands, in a process of its own, and before each cell the process is
copied (os.fork). If the cell is the first to call what some fault replaces, the copy made before it
puts the fault in and goes on from there.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Collection
from types import CodeType
from typing import Any, NamedTuple

from tests.notebooks.running import CellError, run_cell, untouched

Names = dict[str, object]
Outcome = tuple[int | None, str]  # the number of the first cell that failed, and how
NEVER: Outcome = (None, "no cell calls what it replaces")
LOST: Outcome = (None, "its process ended before it said anything")


class Fault(NamedTuple):
    """Where it begins: a cell by number, or the code whose first call decides. It ends at `last`.

    put_in(sources, names) changes the cells' texts, the notebook's names, or modules.
    """

    begins: int | CodeType
    put_in: Callable[[list[str], Names], None]
    last: int


def outcomes(sources: list[str], faults: dict[str, Fault]) -> dict[str, Outcome]:
    """What each fault does to a notebook; nothing of it is left in this process."""
    found = copy_of_this_process(lambda names: run_once(sources, names, faults))(list(faults))
    return {name: tuple(found[name]) if name in found else LOST for name in faults}


def run_once(sources: list[str], due: list[str], faults: dict[str, Fault]) -> dict[str, Outcome]:
    """Run the notebook as it stands, as far as faults wait for their cell."""
    waiting = {name: faults[name] for name in due}
    names: Names = {"__name__": "__main__"}
    found = {}
    with untouched():
        for place in range(len(sources)):
            if not waiting:
                break
            copy = copy_of_this_process(
                lambda due, place=place: each_in_a_copy(sources, names, place, faults, due)
            )
            wanted = {fault.begins for fault in waiting.values()}
            begun = calls_of(wanted, lambda place=place: run_cell(place, sources[place], names))
            due = [name for name, f in waiting.items() if f.begins == place or f.begins in begun]
            found |= copy(due)
            waiting = {name: fault for name, fault in waiting.items() if name not in due}
    return found | dict.fromkeys(waiting, NEVER)


def each_in_a_copy(
    sources: list[str], names: Names, place: int, faults: dict[str, Fault], due: list[str]
) -> dict[str, Outcome]:
    """What each of these faults does from one cell on, each beginning with the same names."""
    found = {}
    for name in due:
        copy = copy_of_this_process(
            lambda due: {due[0]: run_on(sources, names, place, faults[due[0]])}
        )
        found |= copy([name])
    return found


def run_on(sources: list[str], names: Names, place: int, fault: Fault) -> Outcome:
    """Put a fault in and run from one cell to the fault's last."""
    texts = list(sources)
    fault.put_in(texts, names)
    try:
        for at in range(place, fault.last + 1):
            run_cell(at, texts[at], names)
    except CellError as error:
        return error.place, str(error)
    return None, "no cell fails"


def calls_of(wanted: Collection[object], work: Callable[[], object]) -> set[object]:
    """Which of some code objects are called while work runs."""
    called = set()

    def note(frame: Any, event: str, _: object) -> None:
        if event == "call" and frame.f_code in wanted:
            called.add(frame.f_code)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return called


def copy_of_this_process(
    work: Callable[[list[str]], dict[str, Outcome]],
) -> Callable[[list[str]], dict[str, Outcome]]:
    """Copy this process now; the copy waits, and works once it is handed some names."""
    order, hand_over = os.pipe()
    answer, say = os.pipe()
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
