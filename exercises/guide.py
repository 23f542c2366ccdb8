"""Keep the tables of INSTRUCTOR.md and README.md true: exercises, and what checks say to mistakes.

python -m exercises.guide          writes them anew; the text around them is written by hand
python -m exercises.guide 03 12    those of these sets only: all of them take minutes
"""

import argparse
import re
from collections.abc import Collection

import nbformat

from exercises import release
from exercises.checking import judge
from exercises.records import FOLDER, TIERS, load, sets
from exercises.release import POINTS

GUIDE = FOLDER / "INSTRUCTOR.md"
README = FOLDER.parent / "README.md"
BLOCK = re.compile(r"<!-- set (\d\d) -->\n.*?<!-- end of set -->", re.S)
LIST = re.compile(r"<!-- exercises -->\n.*?<!-- end of exercises -->", re.S)


def tables(number: str, judge=judge) -> str:
    """The exercises of a set, and its planted mistakes with the message of each, folded."""
    exercises = load(number).EXERCISES
    wrong = load(number, "answers").WRONG
    lines = ["| exercise | tier | minutes | points |", "|---|---|---|---|"]
    lines += [
        f"| {e.number} {e.title} | {e.tier} | {e.minutes} | {POINTS[e.tier]} |" for e in exercises
    ]
    lines += [
        "",
        "<details><summary>Mistakes, and what the check says</summary>",
        "",
        "| exercise | mistake | the check says |",
        "|---|---|---|",
    ]
    lines += [
        f"| {e.number} | {_cell(w.mistake)} | {_cell(judge(e, w.answer).message)} |"
        for e in exercises
        for w in wrong[e.number]
    ]
    return "\n".join([*lines, "", "</details>"])


def _cell(text: str) -> str:
    """Text that cannot end a cell of a Markdown table or begin HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def renewed(text: str, judge=judge, only: Collection[str] = ()) -> str:
    """The guide with the tables of each set, or of some, between its two marks."""

    def block(found: re.Match) -> str:
        number = found[1]
        if number not in (only or sets()):
            return found[0]
        return f"<!-- set {number} -->\n{tables(number, judge)}\n<!-- end of set -->"

    return BLOCK.sub(block, text)


def row(number: str) -> str:
    """A set's line in the README: its name, its notebooks, and its minutes by tier."""
    nb = nbformat.read(release.exercises(number), as_version=4)
    name = re.match(r"# Exercises \d\d · (.+)", nb.cells[0].source)[1]
    after = re.findall(r"notebooks/(\d\d)_\w+\.ipynb", nb.cells[0].source)
    exercises = load(number).EXERCISES
    minutes = [sum(e.minutes for e in exercises if e.tier == tier) for tier in TIERS]
    link = release.exercises(number).relative_to(README.parent).as_posix()
    numbers = " | ".join(str(n) for n in (len(exercises), sum(minutes), *minutes))
    return f"| [{number} {name}]({link}) | {', '.join(after)} | {numbers} |"


def listed(text: str) -> str:
    """The README with its table of the sets between its two marks."""
    head = "| set | after notebook | exercises | minutes | warm-up | core | stretch |"
    lines = [head, "|---|---|---|---|---|---|---|", *(row(number) for number in sets())]
    return LIST.sub("\n".join(["<!-- exercises -->", *lines, "<!-- end of exercises -->"]), text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m exercises.guide", description="Fill the tables of INSTRUCTOR.md anew."
    )
    parser.add_argument("sets", nargs="*", metavar="SET", help="all sets if none is named")
    only = parser.parse_args().sets
    if unknown := set(only) - set(sets()):
        parser.error(f"there is no set {sorted(unknown)[0]!r}: they are {', '.join(sets())}")
    README.write_text(listed(README.read_text("utf-8")), "utf-8")
    GUIDE.write_text(renewed(GUIDE.read_text("utf-8"), only=only), "utf-8")
