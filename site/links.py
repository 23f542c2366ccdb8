"""Addresses: of the repository, of a line in it, of Colab and Binder; and links between pages.

The repository's address stands in one place, pyproject.toml's [project.urls].
"""

import os
import re
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path

from course import ROOT, pages, sets, solutions_of

BRANCH = "main"
SITE_BRANCH = "gh-pages"  # the workflow puts the built site there, Colab's copies with it
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)  # what looks like a link in code is none


@cache
def repository() -> str:
    """Where the project lives: https://github.com/owner/name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return project["urls"]["Repository"].rstrip("/")


def owner_and_name() -> str:
    """The last two parts of the address: owner/name."""
    return "/".join(repository().split("/")[-2:])


def in_repository(path: Path, lines: tuple[int, int] | None = None) -> str:
    """The address of a file or folder, or of some of a file's lines."""
    kind = "tree" if path.is_dir() else "blob"
    address = f"{repository()}/{kind}/{BRANCH}/{path.relative_to(ROOT).as_posix()}"
    return f"{address}#L{lines[0]}-L{lines[1]}" if lines else address


def colab(notebook: Path) -> str:
    """Colab, with the copy whose first cell installs the course."""
    copy = f"blob/{SITE_BRANCH}/colab/{notebook.name}"
    return f"https://colab.research.google.com/github/{owner_and_name()}/{copy}"


def binder(notebook: Path) -> str:
    """Binder, in JupyterLab."""
    place = f"urlpath=lab/tree/{notebook.relative_to(ROOT).as_posix()}"
    return f"https://mybinder.org/v2/gh/{owner_and_name()}/{BRANCH}?{place}"


def badges() -> str:
    """The README's two badges."""
    first = ROOT / "notebooks/00_start_here.ipynb"
    on_colab = "https://colab.research.google.com/assets/colab-badge.svg"
    on_binder = "https://mybinder.org/badge_logo.svg"
    return (
        f"[![Open in Colab]({on_colab})]({colab(first)})\n"
        f"[![Open in Binder]({on_binder})]({binder(first)})"
    )


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Markdown with its prose changed and its code left as it is."""
    pieces = CODE.split(text)
    return "".join(piece if i % 2 else change(piece) for i, piece in enumerate(pieces))


def rewritten(text: str, folder: Path, here: Path | None = None) -> str:
    """Markdown from `folder` whose links lead to the site's pages, else to the repository.

    `here` is the folder that the page is written in, where that is another one.
    """

    def follow(found: re.Match) -> str:
        start, link, end = found.groups()
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link) or not path:
            return found[0]
        place = (folder / path).resolve()
        if not place.exists():
            return found[0]  # math in brackets, say; the test of links would find a broken one
        if place in solved():
            place = solved()[place]
        if place not in pages() and place.suffix != ".png":
            return start + in_repository(place) + end
        near = os.path.relpath(place, here or folder).replace(os.sep, "/")
        return start + near + (f"#{anchor}" if anchor else "") + end

    return outside_code(text, lambda prose: LINK.sub(follow, prose))


@cache
def solved() -> dict[Path, Path]:
    """The page of each solutions notebook, which is its set's."""
    return {solutions_of(path): path for path in sets()}
