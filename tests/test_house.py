"""The house: imports run one way, names collide with nobody's, what is imported is declared."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.asking import ask

ROOT = Path(__file__).parents[1]
OURS = ("nsa_lite", "kernels", "exercises", "benchmarks")
# A room may use the rooms before it; the paper, at nsa_lite's top level, is the first.
ROOMS = ("paper", "rivals", "show", "lab")
# What the import name says differently from the package's.
PACKAGES = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "fla": "fla-core",
    "jupyter_client": "jupyter-client",
}
# Scripts that stand in no package; the tests import them from their folders.
SCRIPTS = {path.stem for folder in ("notebooks", "site") for path in (ROOT / folder).glob("*.py")}
# Looked for, and done without where they are missing.
OPTIONAL = {"flash_attn"}


def modules(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def is_module(name: str) -> bool:
    """Whether a dotted name is a file or a folder of ours."""
    place = ROOT.joinpath(*name.split("."))
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it: of `from a import b` a.b if it is ours."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if is_module(name) else node.module for name in inside)


def room_of(module: str) -> str | None:
    """The room of a module of nsa_lite, by its dotted name."""
    name = module.split(".")
    if name[0] != "nsa_lite":
        return None
    return name[1] if len(name) > 1 and name[1] in ROOMS else "paper"


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


# --- one direction ---


@pytest.mark.parametrize("path", modules("nsa_lite"), ids=dotted)
def test_a_room_uses_only_the_rooms_before_it(path):
    own = ROOMS.index(room_of(dotted(path)))
    later = {m for m in imported(path) if (r := room_of(m)) and ROOMS.index(r) > own}
    assert not later, f"{dotted(path)} is in {ROOMS[own]} and imports {sorted(later)}"


@pytest.mark.parametrize("path", modules("nsa_lite"), ids=dotted)
def test_no_module_of_the_paper_imports_its_own_package(path):
    if room_of(dotted(path)) == "paper" and path.name != "__init__.py":
        files = {p.stem for p in (ROOT / "nsa_lite").glob("*.py")}
        faces = [m for m in imported(path) if m.startswith("nsa_lite") and m.count(".") == 0]
        inside = [m for m in imported(path) if re.fullmatch(r"nsa_lite\.\w+", m)]
        assert all(m.split(".")[1] in files for m in inside)
        assert not faces, f"{dotted(path)} imports the face of its own package"


def test_the_kernels_import_nothing_of_the_course():
    for path in modules("kernels"):
        others = {
            m for m in imported(path) if m.split(".")[0] in {*OURS, "notebooks"} - {"kernels"}
        }
        assert not others, f"{dotted(path)} imports {sorted(others)}"


def test_nsa_lite_uses_the_kernels_in_one_place():
    users = [dotted(p) for p in modules("nsa_lite") if any(m == "kernels" for m in imported(p))]
    assert users == ["nsa_lite.backend"]


def test_there_are_no_circles():
    names = {dotted(p).removesuffix(".__init__"): p for p in modules(*OURS)}
    uses = {name: {m for m in imported(p) if m in names and m != name} for name, p in names.items()}
    free: set[str] = set()
    while ready := {name for name, used in uses.items() if name not in free and used <= free}:
        free |= ready
    assert set(uses) == free, f"these import each other in a circle: {sorted(set(uses) - free)}"


def test_the_package_names_its_files_in_reading_order():
    text = ast.get_docstring(ast.parse((ROOT / "nsa_lite/__init__.py").read_text("utf-8")))
    files = {p.stem for p in (ROOT / "nsa_lite").glob("*.py")} - {"__init__"}
    unnamed = {name for name in files if not re.search(rf"\b{name}\b", text)}
    assert not unnamed, f"nsa_lite/__init__.py does not say when to read {sorted(unnamed)}"


# --- names ---


def test_no_module_is_named_like_one_of_pythons_own():
    """A script in its folder would find ours first: `python nsa_lite/lab/environment.py`."""
    taken = [dotted(p) for p in modules(*OURS) if p.stem in sys.stdlib_module_names]
    assert not taken


# --- what is imported is declared ---


def test_every_direct_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    declared = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in named}
    for path in modules(*OURS, "tests", "notebooks"):
        roots = {m.split(".")[0] for m in imported(path)}
        others = roots - set(sys.stdlib_module_names) - {*OURS, *OPTIONAL, *SCRIPTS, "tests"}
        packages = {PACKAGES.get(name, name) for name in others}
        assert packages <= declared, f"{dotted(path)} imports {sorted(packages - declared)}"


# --- commands, as a reader types them ---

TEXTS = [ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("exercises/*.md")]
TEXTS += [*ROOT.glob("benchmarks/*.md"), *ROOT.glob("notebooks/*.ipynb"), *modules(*OURS)]
MODULE = re.compile(r"(?:python3?|_PYTHON\)) -m ((?:nsa_lite|benchmarks|exercises)[\w.]*\w)")
SCRIPT = re.compile(r"python3? ((?:nsa_lite|notebooks|benchmarks|exercises)/[\w/]+\.py)")


def commands(pattern: re.Pattern) -> list[str]:
    found = {match for path in TEXTS for match in pattern.findall(path.read_text("utf-8"))}
    return sorted(found)


def run(*words: str | Path) -> subprocess.CompletedProcess:
    """A command in the project's folder, with nothing in its way but what a reader has."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_the_texts_name_the_commands_that_matter():
    named = set(commands(MODULE)) | set(commands(SCRIPT))
    assert {"nsa_lite.lab.train", "nsa_lite.lab.experiments", "exercises.grade"} <= named
    assert "nsa_lite/lab/environment.py" in named


@pytest.mark.parametrize("module", commands(MODULE))
def test_a_named_module_answers_to_help(module):
    said = ask(module, "--help")
    assert said.code in (0, None), said.err
    assert "usage:" in said.out


@pytest.mark.parametrize("script", commands(SCRIPT))
def test_a_named_script_runs(script):
    done = run(script)
    assert done.returncode == 0, done.stderr


def test_the_environment_check_runs_on_a_bare_python():
    """No packages (-S): it says what is missing, and nothing shadows the standard library."""
    done = run("-S", "nsa_lite/lab/environment.py")
    assert done.returncode == 1 and done.stderr == ""
    assert "[FAIL] torch not found : pip install torch" in done.stdout


def test_the_course_does_not_import_the_compiler():
    """torch._dynamo takes seconds, and imports triton before kernels can say how it is to run."""
    code = "import sys, nsa_lite, nsa_lite.rivals.attentions; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr
