"""What the site's pages are: notebooks by part, exercise sets, texts. New files need no entry."""

import re
from functools import cache
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
# Texts of the repository that are pages as they stand.
TEXTS = ("benchmarks/NOTES.md", "exercises/INSTRUCTOR.md")


def notebooks() -> list[Path]:
    """The notebooks in reading order."""
    return sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))


def sets() -> list[Path]:
    """The student's notebook of each exercise set."""
    return sorted(ROOT.glob("exercises/[0-9][0-9]_*/exercises_[0-9][0-9].ipynb"))


def solutions_of(exercises: Path) -> Path:
    """The notebook with the solutions of a set."""
    return exercises.with_name(exercises.name.replace("exercises", "solutions"))


def read(path: Path) -> NotebookNode:
    """A notebook with its stored outputs."""
    return nbformat.read(path, as_version=4)


@cache
def top(path: Path) -> str:
    """A notebook's first cell: title, part, what you will be able to do."""
    return read(path).cells[0].source


def page_name(path: Path) -> str:
    """A file's page: its path from the root of the repository, without the ending."""
    return path.relative_to(ROOT).with_suffix("").as_posix()


def title(path: Path) -> str:
    """A notebook's first heading."""
    return re.search(r"^# (.+)", top(path), re.M)[1]


def part_of(path: Path) -> str:
    """A notebook's part, as its second line says: "Part II"."""
    return re.search(r"^(Part I+) ·", top(path), re.M)[1]


@cache
def part_titles() -> dict[str, str]:
    """The parts in the README's order: {"Part I": "Part I, plain PyTorch"}."""
    lines = re.findall(r"^\*\*(Part I+)(, .+?)\.\*\*", README.read_text("utf-8"), re.M)
    return {part: part + words for part, words in lines}


def parts() -> dict[str, list[Path]]:
    """The notebooks of each part, by the part's title."""
    found: dict[str, list[Path]] = {name: [] for name in part_titles().values()}
    for path in notebooks():
        found[part_titles()[part_of(path)]].append(path)
    return found


@cache
def pages() -> set[Path]:
    """Every file of the repository that is a page."""
    return {*notebooks(), *sets(), *(ROOT / text for text in TEXTS)}
