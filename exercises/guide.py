"""Keep the tables of INSTRUCTOR.md true: a set's exercises, and what the checks say to mistakes.

    python -m exercises.guide    writes them anew; the text around them is written by hand
"""

import re

from exercises.checking import judge
from exercises.records import FOLDER, load, sets
from exercises.release import POINTS

GUIDE = FOLDER / "INSTRUCTOR.md"
BLOCK = re.compile(r"<!-- set (\d\d) -->\n.*?<!-- end of set -->", re.S)


def tables(number: str) -> str:
    """The exercises of a set, and its planted mistakes with the message of each, folded."""
    exercises = load(number).EXERCISES
    wrong = load(number, "answers").WRONG
    lines = ["| exercise | tier | minutes | points |", "|---|---|---|---|"]
    lines += [f"| {e.number} {e.title} | {e.tier} | {e.minutes} | {POINTS[e.tier]} |"
              for e in exercises]
    lines += ["", "<details><summary>Mistakes, and what the check says</summary>", "",
              "| exercise | mistake | the check says |", "|---|---|---|"]
    lines += [f"| {e.number} | {_cell(w.mistake)} | {_cell(judge(e, w.answer).message)} |"
              for e in exercises for w in wrong[e.number]]
    return "\n".join([*lines, "", "</details>"])


def _cell(text: str) -> str:
    """Text that cannot end a cell of a Markdown table or begin HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def renewed(text: str) -> str:
    """The guide with the tables of each set between its two marks."""
    def block(found: re.Match) -> str:
        number = found[1]
        if number not in sets():
            return found[0]
        return f"<!-- set {number} -->\n{tables(number)}\n<!-- end of set -->"

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    GUIDE.write_text(renewed(GUIDE.read_text("utf-8")), "utf-8")
