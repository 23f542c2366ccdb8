"""Build the course as a static site in build/site: `make site`.

The pages' sources are made in build/site-source, laid out as the repository is, so that its links
hold; Sphinx turns them into HTML. No notebook is run.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

import lessons
import maps
from course import README, ROOT, TEXTS, notebooks, page_name, parts, sets, title
from links import repository, rewritten

HERE = Path(__file__).parent
SOURCE = ROOT / "build/site-source"
SITE = ROOT / "build/site"
KATEX = ROOT / ".venv/katex/node_modules/katex/dist"


def write(name: str, text: str) -> None:
    """A file of the source folder."""
    path = SOURCE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def write_sources() -> None:
    """All pages."""
    for path in notebooks():
        write(f"{page_name(path)}.ipynb", nbformat.writes(lessons.lesson(path)))
    for path in sets():
        write(f"{page_name(path)}.ipynb", nbformat.writes(lessons.exercise_set(path)))
    for name in TEXTS:
        write(name, rewritten((ROOT / name).read_text("utf-8"), (ROOT / name).parent))
    write("equations.md", maps.equations_page())
    write("skills.md", maps.skills_page())
    write("glossary.md", (HERE / "glossary.md").read_text("utf-8"))
    write("explorers.md", explorers_page(write_explorers()))
    write("index.md", index_page())
    for picture in ROOT.glob("notebooks/*.png"):
        shutil.copy(picture, SOURCE / "notebooks")


def write_static() -> None:
    """Style and the letters of equations, and Colab's copies of the notebooks."""
    for folder in ("static", "templates"):
        shutil.copytree(HERE / folder, SOURCE / folder)
    shutil.copytree(KATEX / "fonts", SOURCE / "static/fonts", ignore=not_woff2)
    shutil.copy(KATEX / "katex.min.css", SOURCE / "static")
    for path in notebooks():
        write(f"extra/colab/{path.name}", nbformat.writes(lessons.colab_copy(path)))


def not_woff2(folder: str, names: list[str]) -> list[str]:  # noqa: ARG001  copytree gives both
    """The fonts that only old browsers load."""
    return [name for name in names if not name.endswith(".woff2")]


def index_page() -> str:
    """The first page: the README's tables of notebooks and exercises, and the list of pages."""
    readme = README.read_text("utf-8")
    course = re.search(r"^## The course\n\n(.+?)\n\nEach idea", readme, re.M | re.S)[1]
    exercises = re.search(r"<!-- exercises -->\n(.+?)\n<!--", readme, re.S)[1]
    text = (HERE / "index.md").read_text("utf-8")
    return text.format(
        repository=repository(),
        course=rewritten(with_titles(course), ROOT),
        exercises=rewritten(exercises, ROOT),
        contents=contents(),
    )


def with_titles(table: str) -> str:
    """The README's table with titles in place of names of files, which no narrow page can break."""
    for path in notebooks():
        table = table.replace(f"[{path.stem}]", f"[{title(path)}]")
    return table


def contents() -> str:
    """The sidebar: what stands under which heading, in order."""
    trees = {part: [page_name(path) for path in paths] for part, paths in parts().items()}
    trees["Exercises"] = [page_name(path) for path in sets()]
    trees["Look things up"] = ["equations", "skills", "explorers", "glossary"]
    trees["More"] = [name.removesuffix(".md") for name in TEXTS]
    return "\n\n".join(
        f":::{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n:::"
        for caption, pages in trees.items()
    )


def write_explorers() -> list[str]:
    """A page for each recorded selection, and for the text model's passage; their names."""
    from nsa_lite.lab.selection_runs import text_model
    from nsa_lite.show.explorer import SelectionExplorer, load_traces

    folder = SOURCE / "extra/explorers"
    folder.mkdir(parents=True)
    paths = sorted(ROOT.glob("notebooks/recorded/selection_*.npz"))
    shown = {path.stem: SelectionExplorer(load_traces(path)[0]) for path in paths}
    model, origin = text_model()
    shown["selection_text"] = SelectionExplorer.of_model(model, origin["passage"])
    for name, explorer in shown.items():
        words = f"What a query selects: {lessons.about(name)}"
        explorer.save_html(folder / f"{name}.html", title=words)
    return list(shown)


def explorers_page(names: list[str]) -> str:
    """All explorers on one page."""
    text = "# Explorers\n\nWhat trained models select, live here without a kernel. "
    text += "[14](notebooks/14_see_the_selection.ipynb) says how to read them.\n"
    for name in names:
        text += f"\n## {lessons.about(name).capitalize()}\n\n{lessons.framed(name)}"
    return text


def main() -> int:
    """Build anew; the exit status of Sphinx, which counts a warning as an error."""
    for folder in (SOURCE, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    write_sources()
    write_static()
    shutil.copy(HERE / "conf.py", SOURCE)
    environment = {**os.environ, "NSA_LITE_ROOT": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-b",
        "html",
        "-W",
        "--keep-going",
        "-q",
        "-j",
        "auto",
    ]
    command += ["-d", str(ROOT / "build/site-doctrees"), str(SOURCE), str(SITE)]
    status = subprocess.run(command, env=environment, check=False).returncode
    if status == 0:
        print(f"The site is built: open {SITE.relative_to(ROOT)}/index.html")
    return status


if __name__ == "__main__":
    sys.exit(main())
