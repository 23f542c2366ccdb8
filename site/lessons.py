"""From a notebook of the repository to the notebook that a page is made of.

Nothing is run: outputs are the stored ones. Added are the ways to open the notebook, words for each
picture, a mark on the cells that the course names (Predict, Your turn, ...), the recorded explorers
in place of widgets, and on the page of an exercise set its solutions, folded.
"""

import ast
import html
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

import alt_text
from course import part_of, read, solutions_of
from links import binder, colab, in_repository, repository, rewritten

# How a cell begins that the course has a name for, and the class that its page shows it by.
MARKS = {
    "# Predict": "predict",
    "# Your turn": "your-turn",
    "# Checkpoint": "checkpoint",
    "# Break it": "break-it",
}
SOLUTION = re.compile(r"^ *### (?:BEGIN|END) SOLUTION\n?", re.M)


def lesson(path: Path) -> NotebookNode:
    """The page of a notebook of the course."""
    nb = prepared(path)
    found = explorers_of(nb)
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            recording = found.get(shown_name(cell.source))
            if recording and "image/png" in output.get("data", {}):
                show_explorer(output, recording)
    return nb


def exercise_set(path: Path) -> NotebookNode:
    """The page of a set: the student's notebook, each solution folded below its hints."""
    nb = prepared(path)
    answers = answers_of(solutions_of(path))
    cells = []
    waiting: list[str] = []
    for cell in nb.cells:
        cells.append(cell)
        if grade_id(cell):
            waiting.append(answers[grade_id(cell)])
        if cell.source.startswith("<!-- hints"):
            cells += [folded(answer) for answer in waiting]
            waiting = []
    nb.cells = [*cells, *(folded(answer) for answer in waiting)]
    return nb


def prepared(path: Path) -> NotebookNode:
    """A notebook with its links followed, its pictures described and its cells marked."""
    nb = read(path)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = rewritten(cell.source, path.parent)
            continue
        mark = next((name for start, name in MARKS.items() if cell.source.startswith(start)), None)
        cell.metadata["tags"] = [mark] if mark else []
        printed = "".join(output.get("text", "") for output in cell.outputs)
        words = alt_text.described(cell.source, printed)
        cell.metadata["mystnb"] = {"image": {"alt": words}}
    heading, rest = nb.cells[0].source.split("\n", 1)
    nb.cells[0].source = f"{heading}\n\n{ways_to_open(path)}\n{rest}"
    return nb


def ways_to_open(path: Path) -> str:
    """A line of links: Colab, Binder, the file. Exercises are in Binder, beside their checks."""
    ways = {"Open in Binder": binder(path), "On GitHub": in_repository(path)}
    if path.parent.name == "notebooks":
        gpu = " (GPU)" if part_of(path) == "Part II" else ""
        ways = {f"Open in Colab{gpu}": colab(path), **ways}
    links = "".join(f'<a href="{url}">{name}</a>' for name, url in ways.items())
    return f'<p class="ways-to-open">{links}</p>'


# --- explorers ---


def explorers_of(nb: NotebookNode) -> dict[str, str]:
    """The names that hold recorded traces, each with the name of its recording.

    A notebook says `recorded, about = load_traces(RECORDED / "selection_recall.npz")`, and later
    `SelectionExplorer(recorded)`: the explorer of that name shows that recording.
    """
    found: dict[str, str] = {}
    for cell in nb.cells:
        if cell.cell_type == "code":
            for names, call in assigned(alt_text.parsed(cell.source)):
                first = call.args[0] if call.args else None
                if first is not None and called(call) == "load_traces":
                    file = [x.value for x in ast.walk(first) if isinstance(x, ast.Constant)][-1]
                    found[names[0]] = Path(file).stem
                if isinstance(first, ast.Name) and called(call) == "SelectionExplorer":
                    found[names[0]] = found.get(first.id, "")
    return found


def assigned(tree: ast.AST) -> list[tuple[list[str], ast.Call]]:
    """(names, call) of each assignment of what a call returns."""
    pairs = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            names = [name.id for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)]
            if names:
                pairs.append((names, node.value))
    return pairs


def called(call: ast.Call) -> str:
    """The name of the function that is called, without its module."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def shown_name(source: str) -> str:
    """What `display(...)` shows, by its name."""
    found = re.search(r"\bdisplay\((\w+)\)", source)
    return found[1] if found else ""


def show_explorer(output: NotebookNode, recording: str) -> None:
    """Put the page of a recording in the place of its picture, which stays for want of scripts."""
    picture = f"data:image/png;base64,{output.data.pop('image/png')}"
    sentence = html.escape(output.data.get("text/plain", ""))
    fallback = f'<noscript><img alt="{sentence}" src="{picture}"></noscript>'
    output.data["text/html"] = framed(recording, "../") + fallback


def about(recording: str) -> str:
    """What a recording is of, in words: "recall" for selection_recall."""
    return recording.removeprefix("selection_").replace("_", " ")


def framed(recording: str, up: str = "") -> str:
    """The page of a recording in a frame, and a link to the page alone."""
    page = f"{up}explorers/{recording}.html"
    words = about(recording)
    return (
        f'<iframe class="explorer" src="{page}" title="Explorer: {words}" loading="lazy">'
        "</iframe>\n"
        f'<p class="full-page"><a href="{page}">The explorer of {words} on a page of its own</a>'
        "</p>\n"
    )


# --- exercises ---


def grade_id(cell: NotebookNode) -> str:
    """nbgrader's name for a cell that is to be answered; "" for others."""
    marks = cell.metadata.get("nbgrader", {})
    return marks["grade_id"] if marks.get("solution") else ""


def answers_of(solutions: Path) -> dict[str, str]:
    """The Markdown of each answer, by nbgrader's name of its cell. Tests are no answers."""
    found = {}
    for cell in read(solutions).cells:
        if name := grade_id(cell):
            text = SOLUTION.sub("", cell.source).strip()
            code = cell.cell_type == "code"
            found[name] = f"```python\n{text}\n```" if code else rewritten(text, solutions.parent)
    return found


def folded(answer: str) -> NotebookNode:
    """A cell that shows an answer when it is opened."""
    summary = "<details><summary>A solution</summary>"
    return nbformat.v4.new_markdown_cell(f"{summary}\n\n{answer}\n\n</details>")


# --- Colab ---

INSTALL = """# Only on Colab: fetch the course and what it needs, about a minute; then go on below.
import sys

!git clone --quiet --depth 1 {repository}.git /content/course
%cd /content/course/notebooks
%pip install --quiet -e "..[lab]" nbval
sys.path.insert(0, "/content/course")

from google.colab import output

output.enable_custom_widget_manager()"""


def colab_copy(path: Path) -> NotebookNode:
    """A notebook with a first cell that installs the course on Colab; Part II asks for a GPU."""
    nb = read(path)
    install = nbformat.v4.new_code_cell(INSTALL.format(repository=repository()))
    install.metadata["tags"] = ["colab"]
    install["id"] = "colab-install"
    nb.cells.insert(1, install)
    if part_of(path) == "Part II":
        nb.metadata["accelerator"] = "GPU"
        nb.metadata["colab"] = {"gpuType": "T4"}
    return nb
