"""The form that every notebook keeps, and proof that strict nbval compares what is stored.

Each message starts with the notebook's name and the rule that it breaks.
"""

import base64
import io
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from PIL import Image, ImageChops, ImageStat

ROOT = Path(__file__).parents[1]
PATHS = sorted(ROOT.glob("notebooks/*.ipynb"))
LONG = ("16_train", "17_long_context")  # the notebooks that may train for minutes


class Notebook:
    """One notebook's cells, and `rule`, an assertion that names the notebook."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.cells = nbformat.read(path, as_version=4).cells
        self.code = [cell for cell in self.cells if cell.cell_type == "code"]
        self.markdown = [cell.source for cell in self.cells if cell.cell_type == "markdown"]

    def rule(self, holds: object, rule: str) -> None:
        assert holds, f"{self.name}: {rule}"

    def ideas(self) -> list[tuple[str, list[NotebookNode]]]:
        """(heading, its cells) for each heading `## 1. A question?`, up to the next heading."""
        sections, inside = [], False
        for cell in self.cells:
            heading = cell.cell_type == "markdown" and re.search(r"^## (.+)", cell.source, re.M)
            if heading:
                inside = re.match(r"\d+\.", heading[1])
                if inside:
                    sections.append((heading[1], []))
            if inside:
                sections[-1][1].append(cell)
        return sections


@pytest.fixture(scope="module", params=PATHS, ids=lambda path: path.stem)
def notebook(request):
    return Notebook(request.param)


def starting(cells: list[NotebookNode], first_words: str) -> list[NotebookNode]:
    return [c for c in cells if c.cell_type == "code" and c.source.startswith(first_words)]


def printed(cell: NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def pictures(cell: NotebookNode) -> list[NotebookNode]:
    return [output for output in cell.outputs if "image/png" in output.get("data", {})]


def text_after(picture: NotebookNode, cell: NotebookNode) -> str:
    """What the cell printed between this picture and its next: a print may come in pieces."""
    after = cell.outputs[cell.outputs.index(picture) + 1 :]
    pieces = itertools.takewhile(lambda output: output.output_type == "stream", after)
    return "".join(piece.text for piece in pieces).strip()


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def test_there_are_notebooks():
    assert PATHS, "notebooks/ holds no notebook"


# --- the top: title, goals, imports, course map ---


def test_title_and_part(notebook):
    lines = [line for line in notebook.markdown[0].splitlines() if line.strip()]
    number = notebook.name[:2]
    notebook.rule(notebook.cells[0].cell_type == "markdown", "the first cell is markdown")
    notebook.rule(re.match(rf"# {number} · \S", lines[0]), f"the title begins '# {number} · '")
    part = re.fullmatch(
        r"Part I{1,3} · about \d+ minutes(?:, exercises \d+ more)? · "
        r"runs on a CPU in (\d+) (seconds?|minutes?)",
        lines[1],
    )
    notebook.rule(
        part,
        "line 2 is 'Part I · about 40 minutes, exercises 30 more · runs on a CPU in 5 seconds'",
    )
    seconds = int(part[1]) * (60 if "minute" in part[2] else 1)
    limit = 300 if notebook.path.stem in LONG else 60
    notebook.rule(seconds <= limit, f"it runs in {limit} seconds at most, not {seconds}")


def test_goals_needs_and_paper_map(notebook):
    top = notebook.markdown[0]
    headings = ("**You will be able to**", "**You need**", "**Paper map**")
    for heading in headings:
        notebook.rule(heading in top, f"the first cell has {heading}")
    goals, paper = top.split(headings[0])[1].split("**")[0], top.split(headings[2])[1]
    count = len(re.findall(r"^[-*] ", goals, re.M))
    notebook.rule(3 <= count <= 4, f"{headings[0]} has 3-4 bullets, not {count}")
    notebook.rule(re.search(r"^\|.*\|", paper, re.M), "the Paper map is a table")


def test_import_cell_and_course_map(notebook):
    cell = notebook.cells[1]
    notebook.rule(cell.cell_type == "code" and "import " in cell.source, "cell 1 imports")
    notebook.rule(
        "draw_course_map" in notebook.code[1].source, "the second code cell draws the course map"
    )


# --- the middle: ideas, checkpoints, errors, figures ---


def test_three_to_five_numbered_questions(notebook):
    headings = [heading for heading, _ in notebook.ideas()]
    notebook.rule(3 <= len(headings) <= 5, f"it has 3-5 ideas, not {len(headings)}: {headings}")
    for number, heading in enumerate(headings, 1):
        notebook.rule(heading.startswith(f"{number}. "), f"idea {number} is numbered: {heading}")
        notebook.rule(heading.rstrip().endswith("?"), f"the heading is a question: {heading}")


def test_each_idea_has_a_prediction_that_runs_without_a_guess(notebook):
    for heading, cells in notebook.ideas():
        found = starting(cells, "# Predict: ")
        notebook.rule(found, f"'{heading}' has a cell that begins '# Predict: '")
        for cell in found:
            if "guess = None" in cell.source:  # the older form
                notebook.rule(
                    printed(cell).strip() in ("", "your guess: None"),
                    f"'{heading}': the Predict cell prints nothing but 'your guess: None'",
                )
                continue
            call = re.search(r'^predict\("(\d\d\.[a-z])"\)$', cell.source, re.M)
            notebook.rule(call, f"'{heading}' ends its Predict cell with predict(number), no guess")
            notebook.rule(
                printed(cell).startswith(f"○ {call[1]}: no guess yet"),
                f"'{heading}': the Predict cell says that there is no guess yet",
            )
            compared = [c for c in cells if f'came_out("{call[1]}", ' in c.source]
            notebook.rule(len(compared) == 1, f"one cell says what came out for {call[1]}")


def test_each_idea_has_a_folded_what_you_should_see(notebook):
    folded = r"<details>\s*<summary>What you should see</summary>\n\n.+?\n\n</details>"
    for heading, cells in notebook.ideas():
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        notebook.rule(re.search(folded, text, re.S), f"'{heading}' has What you should see, folded")


def test_each_idea_ends_in_a_checkpoint_that_prints_one_fixed_line(notebook):
    for number, (heading, cells) in enumerate(notebook.ideas(), 1):
        found = starting(cells, "# Checkpoint")
        notebook.rule(len(found) == 1, f"'{heading}' has one Checkpoint cell, not {len(found)}")
        cell = found[0]
        notebook.rule(
            re.match(rf"# Checkpoint {number}\b", cell.source),
            f"the checkpoint of '{heading}' begins '# Checkpoint {number}'",
        )
        notebook.rule("assert" in cell.source, f"Checkpoint {number} asserts something")
        notebook.rule(
            re.fullmatch(rf"Checkpoint {number} passed: .+\n?", printed(cell)),
            f"Checkpoint {number} prints one line, 'Checkpoint {number} passed: ...', "
            f"not {printed(cell)!r}",
        )
        notebook.rule(
            "nbval-ignore-output" not in tags(cell), f"Checkpoint {number}'s line is compared"
        )


def test_errors_are_lessons(notebook):
    lessons = starting(notebook.code, "# Break it: ")
    notebook.rule(1 <= len(lessons) <= 2, f"it has 1-2 Break it cells, not {len(lessons)}")
    for cell in notebook.code:
        errors = sum(output.output_type == "error" for output in cell.outputs)
        place = f"code cell {cell.execution_count}"
        if cell in lessons:
            notebook.rule("raises-exception" in tags(cell), f"{place} is tagged raises-exception")
            notebook.rule(errors == 1, f"{place}, Break it, has its error stored")
        else:
            notebook.rule("raises-exception" not in tags(cell), f"{place} is no Break it cell")
            notebook.rule(not errors, f"{place} has an error stored but is no Break it cell")


def test_figures_are_pictures_with_a_sentence(notebook):
    count = sum(len(pictures(cell)) for cell in notebook.code)
    notebook.rule(4 <= count <= 8, f"it has 4-8 figures, not {count}")
    for cell in notebook.code:
        place = f"code cell {cell.execution_count}"
        for output in cell.outputs:
            other = {"image/svg+xml", "image/jpeg"} & set(output.get("data", {}))
            notebook.rule(not other, f"{place}: figures are PNG, not {other}")
        for picture in pictures(cell):
            data = base64.b64decode(picture.data["image/png"])
            notebook.rule(data.startswith(b"\x89PNG"), f"{place} holds a PNG")
            sentence = text_after(picture, cell)
            notebook.rule(
                len(re.findall(r"[A-Za-z]{2,}", sentence)) >= 3,
                f"{place}: a printed sentence follows its figure, not {sentence!r}",
            )


# --- the end, and the size ---


def test_summary_exercises_references(notebook):
    text = "\n".join(notebook.markdown)
    headings = re.findall(r"^## (.+)", text, re.M)
    notebook.rule(
        headings[-3:] == ["Summary", "Exercises", "References"],
        f"it ends in Summary, Exercises, References, not {headings[-3:]}",
    )
    summary, rest = text.split("## Summary\n")[1].split("## Exercises\n")
    exercises, references = rest.split("## References\n")
    bullets = len(re.findall(r"^[-*] ", summary, re.M))
    notebook.rule(1 <= bullets <= 5, f"the Summary has 1-5 bullets, not {bullets}")
    notebook.rule(re.search(r"^\|.*\|", summary, re.M), "the Summary has a table of shapes")
    notebook.rule(re.search(r"\d+ min", exercises), "the Exercises say how many minutes they take")
    notebook.rule("2502.11089" in references, "the References name the paper, arXiv 2502.11089")


def without_turns(cells: list[NotebookNode]) -> list[str]:
    """The markdown, less the folded hints and solutions of the Your turn cells."""
    hints = r"<details><summary>(?:Hint \d|A solution).+?</details>"
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    return [re.sub(hints, "", text, flags=re.S) for text in texts]


def test_size(notebook):
    def between(value: float, low: float, high: float, what: str) -> None:
        notebook.rule(low <= value <= high, f"{what}: {low} to {high}, not {value}")

    texts = [text for text in without_turns(notebook.cells) if text.strip()]
    between(len(notebook.code) + len(texts), 40, 70, "cells, but for folded solutions")
    between(len(" ".join(texts).split()), 1200, 2500, "words of markdown, folded hints left out")
    between(notebook.path.stat().st_size / 1024, 1, 400, "KB of the file")


def test_prose_is_calm(notebook):
    not_prose = r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|!\[|<!--"
    for text in notebook.markdown:
        prose = re.sub(not_prose, "", text, flags=re.S)
        notebook.rule("!" not in prose, f"no exclamation marks in prose: {text[:60]!r}")


# --- nbval: what is stored is compared ---


def uncounted(cells: list[NotebookNode]) -> list[int]:
    """The code cells, from 1, whose count is not their place. nbval compares none without count."""
    return [n for n, cell in enumerate(cells, 1) if cell.execution_count != n]


def test_every_code_cell_has_its_count(notebook):
    wrong = uncounted(notebook.code)
    notebook.rule(not wrong, f"code cells {wrong} lack their count; run `make notebooks`")


def nbval(path: Path) -> subprocess.CompletedProcess:
    """Strict nbval on one notebook, as `make test` runs it."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-rf", "--color=no",
         "-p", "no:cacheprovider", "--rootdir", path.parent, path],
        cwd=path.parent, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def change_one_number(nb: NotebookNode) -> int:
    """Change a digit in the last compared line that has one; the code cell's place, from 0."""
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    for place, cell in reversed(list(enumerate(code))):
        for output in cell.outputs:
            if "nbval-ignore-output" not in tags(cell) and re.search(r"\d", output.get("text", "")):
                other = str((int(re.search(r"\d", output.text)[0]) + 1) % 10)
                output.text = re.sub(r"\d", other, output.text, count=1)
                return place
    raise AssertionError("no stored output holds a number")


def small_notebook() -> NotebookNode:
    """Two executed cells, made by hand: their outputs and counts are what a run would store."""
    cells = []
    for count, (source, text) in enumerate([("x = 6\nprint(x)", "6\n"), ("print(7 * x)", "42\n")]):
        stream = nbformat.v4.new_output("stream", name="stdout", text=text)
        cell = nbformat.v4.new_code_cell(source, execution_count=count + 1, outputs=[stream])
        cells.append(cell)
    return nbformat.v4.new_notebook(cells=cells)


def quickest_notebook() -> NotebookNode:
    """The notebook of the course that says it runs in the fewest seconds."""

    def seconds(path: Path) -> int:
        said = re.search(r"runs on a CPU in (\d+) second", Notebook(path).markdown[0])
        return int(said[1]) if said else 10**6

    return nbformat.read(min(PATHS, key=seconds), as_version=4)


@pytest.mark.parametrize("make", [small_notebook, quickest_notebook])
def test_nbval_passes_what_is_right_and_finds_one_changed_number(tmp_path, make):
    nb = make()
    path = tmp_path / "copy.ipynb"
    nbformat.write(nb, path)
    right = nbval(path)
    assert right.returncode == 0, right.stdout

    place = change_one_number(nb)
    nbformat.write(nb, path)
    wrong = nbval(path)
    assert wrong.returncode == 1, wrong.stdout
    failed = re.findall(r"^FAILED .*::Cell (\d+)", wrong.stdout, re.M)
    assert failed == [str(place)], wrong.stdout


def test_a_stripped_notebook_passes_nbval_and_is_caught_by_the_count(tmp_path):
    nb = small_notebook()
    for cell in nb.cells:
        cell.outputs, cell.execution_count = [], None
    path = tmp_path / "stripped.ipynb"
    nbformat.write(nb, path)
    assert nbval(path).returncode == 0, "nbval is stricter now: the count test may go"
    assert uncounted(nb.cells) == [1, 2]


def test_the_readme_shows_the_picture_that_notebook_00_drew(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    import finish

    assert (ROOT / "notebooks/query_reads.png").read_bytes() == finish.readme_picture()
    assert "(notebooks/query_reads.png)" in (ROOT / "README.md").read_text("utf-8")


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=0)
    return file.getvalue()


def test_a_packed_picture_looks_the_same_and_is_packed_once(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    import finish

    grey = Image.effect_noise((40, 30), 80).convert("RGB")  # no more than 256 colours
    packed = finish.packed(png(grey))
    assert len(packed) < len(png(grey))
    assert Image.open(io.BytesIO(packed)).convert("RGB").tobytes() == grey.tobytes()
    assert finish.packed(packed) == packed
    slopes = [Image.linear_gradient("L").rotate(turn) for turn in (0, 90, 0)]
    many = Image.merge("RGB", slopes)  # each pixel a colour of its own
    again = Image.open(io.BytesIO(finish.packed(png(many)))).convert("RGB")
    apart = ImageStat.Stat(ImageChops.difference(many, again))
    assert max(apart.mean) < 6  # of 255, with a palette of 256 for 65,536 colours
    seen_through = grey.copy()
    seen_through.putalpha(128)
    assert finish.packed(png(seen_through)) == png(seen_through)


def test_the_readmes_table_names_each_notebook_with_its_minutes(notebook):
    minutes = re.search(r"about (\d+) minutes", notebook.markdown[0])[1]
    row = f"| [{notebook.path.stem}](notebooks/{notebook.name}) | {minutes} |"
    notebook.rule(row in (ROOT / "README.md").read_text("utf-8"), f"the README has '{row}'")
