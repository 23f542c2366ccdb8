"""Two one-page maps: the paper's equations and their files, the notebooks and what they teach."""

import ast
import re
import tomllib
from pathlib import Path

from course import ROOT, notebooks, page_name, parts, title, top
from links import in_repository, rewritten

HERE = Path(__file__).parent
KINDS = {"reference": "in PyTorch", "loop": "as a loop", "kernel": "in Triton"}


def equations() -> list[dict]:
    """The records of equations.toml, in order."""
    return tomllib.loads((HERE / "equations.toml").read_text("utf-8"))["equation"]


def lines_of(place: str) -> tuple[Path, tuple[int, int]]:
    """The file of "folder/file.py:name" and the first and last line of that function or class.

    Errors: LookupError when the file has no such name at its top level.
    """
    path, name = place.split(":")
    for node in ast.parse((ROOT / path).read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return ROOT / path, (node.lineno, node.end_lineno or node.lineno)
    raise LookupError(f"equations.toml: {path} has no {name}")


def code_link(place: str) -> str:
    """A Markdown link to the lines of a function."""
    path, lines = lines_of(place)
    name = place.split(":")[1]
    where = f"{path.relative_to(ROOT)}:{lines[0]}"
    return f"[`{name}`]({in_repository(path, lines)}) <small>{where}</small>"


def equations_page() -> str:
    """The map of equations, in Markdown."""
    by_number = {path.name[:2]: path for path in notebooks()}
    text = ["# Equations and files", "", "The paper's equations in this course's letters, counted"]
    text += ["from 0 ([glossary](glossary.md)), and the functions that are those equations."]
    for equation in equations():
        notebook = by_number[equation["notebook"]]
        built = f"[{title(notebook)}]({page_name(notebook)}.ipynb)"
        text += ["", f"## Eq. {equation['number']}", "", f"$${equation['formula']}$$", ""]
        text += [f"{equation['words']} Built in {built}.", ""]
        for kind, words in KINDS.items():
            places = [code_link(place) for place in equation[kind]]
            if places:
                text.append(f"- {words}: {', '.join(places)}")
    return "\n".join(text) + "\n"


def skills_of(path: Path) -> list[str]:
    """A notebook's "You will be able to", one entry a line."""
    listed = re.search(r"\*\*You will be able to\*\*\n(.+?)\n\n(?=\*\*)", top(path), re.S)
    items = re.split(r"^[-*] ", listed[1], flags=re.M)
    return [" ".join(item.split()).rstrip(";.") for item in items if item.strip()]


def skills_page() -> str:
    """The map of skills, in Markdown."""
    text = ["# Notebooks and skills", "", "After each notebook you are able to:"]
    for part, paths in parts().items():
        text += ["", f"## {part}"]
        for path in paths:
            text += ["", f"### [{title(path)}]({page_name(path)}.ipynb)", ""]
            text += [f"- {rewritten(skill, path.parent, ROOT)}" for skill in skills_of(path)]
    return "\n".join(text) + "\n"
