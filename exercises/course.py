"""What a learner guessed, tried and got right over the course, in one small file that stays here.

predict("02.a", 7)      before a cell computes it; without the 7 it is left open
came_out("02.a", 7)     after it: the guess beside what came out
progress()              what was guessed and tried, and what is open
"""

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from exercises.records import FOLDER, sets
from nsa_lite.show.tables import Column, table

ROOT = FOLDER.parent
NAME = "NSA_LITE_PROGRESS"  # names another file, or none with "off"
KINDS = ("guessed", "checked")


def file() -> Path | None:
    """Where the learner's progress is kept; None where nobody learns, as in a test."""
    said = os.environ.get(NAME, "")
    if said == "off":
        return None
    return Path(said) if said else ROOT / "progress.json"


def noted() -> dict[str, dict[str, Any]]:
    """What was noted so far, by kind and number; nothing where the file is missing or damaged."""
    path = file()
    try:
        kept = json.loads(path.read_text("utf-8")) if path else {}
    except (OSError, ValueError):
        kept = {}
    if not isinstance(kept, dict):
        kept = {}
    return {kind: found if isinstance(found := kept.get(kind), dict) else {} for kind in KINDS}


def note(kind: str, number: str, what: object) -> None:
    """Keep one thing; a folder that cannot be written to keeps nothing, and nobody is stopped."""
    path = file()
    if path is None:
        return
    kept = noted()
    kept[kind][number] = what
    part = path.with_suffix(".part")
    try:
        part.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
        os.replace(part, path)
    except OSError:
        pass


guesses: dict[str, object] = {}  # of this notebook


def predict(number: str, guess: object = None) -> None:
    """Keep a guess about what the next cells compute; without one, say how to make it."""
    if guess is None:
        guesses.pop(number, None)
        print(f'○ {number}: no guess yet. Write it as predict("{number}", ...) and run this again')
        return
    guesses[number] = guess
    note("guessed", number, None)
    print(f"{number}: your guess is {guess}")


def came_out(number: str, value: object) -> None:
    """Print what came out, and beside it what was guessed; a wrong guess is no error."""
    if number not in guesses:
        print(f"{number} came out: {value}")
        return
    same = alike(guesses[number], value)
    note("guessed", number, same)
    beside = ", as you guessed" if same else f"; your guess was {guesses[number]}"
    print(f"{number} came out: {value}{beside}")


def alike(guess: object, value: object) -> bool | None:
    """Whether a guess is what came out; None for words, which nothing here can judge."""
    if isinstance(guess, int) and isinstance(value, int):
        return guess == value  # one off is the mistake that many questions are about
    if isinstance(guess, int | float) and isinstance(value, int | float):
        return abs(guess - value) <= 0.01 * abs(value)
    if isinstance(guess, list | tuple) and isinstance(value, list | tuple):
        return list(guess) == list(value)
    return guess == value if type(guess) is type(value) and not isinstance(value, str) else None


passed: dict[str, object] = {}  # by number, the last answer of this notebook that was right


def checked(number: str, answer: object, right: bool) -> None:
    """Keep what a check said of an answer."""
    passed.pop(number, None)
    if right:
        passed[number] = answer
    note("checked", number, right)


def yours(number: str, answer: object, ours: object) -> object:
    """The learner's own function once its check has passed, the package's until then.

    So a notebook goes on with what the learner wrote, and runs through with nothing written.
    """
    return answer if passed.get(number, ours) is answer else ours


PREDICTION = re.compile(r'^predict\("(\d\d\.[a-z])"', re.M)
TURN = re.compile(r'^check\("(\d\d\.\d+)"', re.M)
EXERCISE = re.compile(r'^    Exercise\(\s+"(\d\d\.\d+)"', re.M)


@cache
def asked() -> dict[str, tuple[list[str], list[str]]]:
    """Each notebook's predictions and Your turn cells, by the number that its name begins with."""
    found = {}
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        # Not by nbformat, whose import takes longer than torch's: every first cell would wait.
        cells = json.loads(path.read_text("utf-8"))["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        found[path.stem] = (PREDICTION.findall(code), TURN.findall(code))
    return found


COLUMNS = (
    Column("", 34),
    Column("guesses", 9),
    Column("your turn", 9),
    Column("right", 7),
)


def progress() -> None:
    """Print a line a notebook and exercise set: how much was guessed, tried, and is right."""
    kept = noted()
    rows = []
    for name, (predictions, turns) in asked().items():
        if predictions or turns:
            rows.append([name, share_of(predictions, kept["guessed"]), *tried(turns, kept)])
    for number, folder in sets().items():
        # Read, not imported: some sets need triton, which not every computer has.
        numbers = EXERCISE.findall((folder / "checks.py").read_text("utf-8"))
        rows.append([f"exercise set {number}", None, *tried(numbers, kept)])
    print(table(COLUMNS, rows))
    if (path := file()) is not None:
        print(f"kept in {path.name}, which you may delete; it goes nowhere")


def tried(numbers: list[str], kept: dict[str, dict]) -> list[str | None]:
    """ "2 of 4" tried and "1 of 4" right; dashes where there is nothing to try."""
    if not numbers:
        return [None, None]
    right = {number: ok for number, ok in kept["checked"].items() if ok}
    return [share_of(numbers, kept["checked"]), share_of(numbers, right)]


def share_of(numbers: list[str], among: dict) -> str | None:
    """ "2 of 4": how many of the numbers are noted."""
    if not numbers:
        return None
    return f"{sum(number in among for number in numbers)} of {len(numbers)}"
