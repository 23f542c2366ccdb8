"""The project's shell: three lists of packages in step, set-up errors that say what to do."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
ENVIRONMENT = (ROOT / "environment.yml").read_text("utf-8")


def package(requirement: str) -> tuple[str, str]:
    """("pyyaml", "") from "PyYAML==6.0.3", ("triton", marker) from one with a marker."""
    name, _, marker = requirement.partition(";")
    name = re.match(r"[\w.-]+", name.strip()).group()
    return re.sub(r"[-_.]+", "-", name).lower(), marker.strip()


def pins() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


# --- the three files in step ---


def test_every_named_package_has_one_pin_with_the_same_marker():
    named = PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])
    pinned = [package(pin) for pin in pins()]
    names = [name for name, _ in pinned]
    assert len(names) == len(set(names)), "constraints.txt pins a package twice"
    for requirement in named:
        assert package(requirement) in pinned, f"constraints.txt has no pin for {requirement}"
        version = re.search(r"[<=>~]", requirement.split(";")[0])
        assert not version, f"pyproject.toml: {requirement}: versions belong in constraints.txt"


def test_every_pin_is_one_exact_version_that_every_build_of_it_meets():
    for pin in pins():
        assert re.match(r"[\w.-]+==[\w.]+(;|$)", pin), f"constraints.txt: {pin} is no exact pin"


def test_torch_and_triton_are_a_tested_pair():
    pinned = dict(pin.split(";")[0].split("==") for pin in pins())
    assert (pinned["torch"], pinned["triton"]) == ("2.13.0", "3.7.1")


def test_conda_binder_and_make_install_the_same():
    conda = yaml.safe_load(ENVIRONMENT)["dependencies"]
    python = next(d for d in conda if str(d).startswith("python="))
    assert f">={python.removeprefix('python=')}" == PROJECT["requires-python"]
    section = next(d["pip"] for d in conda if isinstance(d, dict))
    others = ("browser", "bench", "site")  # installed by their own targets
    extras = [extra for extra in PROJECT["optional-dependencies"] if extra not in others]
    extra = f"-e .[{','.join(extras)}]"
    assert section == ["-c constraints.txt", extra]
    command = " ".join((ROOT / "Makefile").read_text("utf-8").replace('"', "").split())
    assert f"-c constraints.txt {extra}" in command, "the Makefile installs something else"


def test_every_line_of_the_conda_environment_gives_its_reason():
    for line in ENVIRONMENT.splitlines():
        if re.match(r"\s*- (?!pip:)", line):
            assert "  # " in line, f"environment.yml: no reason for {line.strip()}"


def test_ci_does_what_a_reader_does():
    script = (ROOT / ".ci/run").read_text("utf-8")
    assert "\nmake test\n" in script and "\nmake test-browser\n" in script
    assert os.access(ROOT / ".ci/run", os.X_OK), ".ci/run is not executable"
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    assert {"run": ".ci/run"} in workflow["jobs"]["test"]["steps"]


# --- set-up errors, on a machine of our making: a PATH with a fake python3, or with none ---

# What the Makefile's set-up itself calls. `id` is for `make lab`.
TOOLS = ["sh", "make", "rm", "touch", "mkdir", "cp", "chmod", "id"]
OLD = 'case "$1" in -c) exit 1;; --version) echo Python 3.9.18;; esac'
NO_VENV = 'case "$2" in venv) mkdir -p .venv/bin; echo "ensurepip is not available"; exit 1;; esac'
# `-m venv` makes a .venv whose pip does what the file `pip` in the project folder says.
WORKING = """
case "$2" in venv) mkdir -p .venv/bin; echo made >> made
  printf '#!/bin/sh\\ncase "$2" in pip) . ./pip;; *) echo ran "$2";; esac\\n' > .venv/bin/python
  chmod +x .venv/bin/python;; esac"""


@pytest.fixture
def machine(tmp_path):
    """A copy of the set-up's files, and a function that runs make there with a fake python3."""
    if not shutil.which("make"):
        pytest.skip("needs make")
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    project = tmp_path / "a project"
    project.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, project)

    def run(python: str | None, *, pip: str = "exit 0", target: str = "lab"):
        fake = tmp_path / "bin" / "python3"
        fake.unlink(missing_ok=True)
        if python is not None:
            fake.write_text(f"#!/bin/sh\n{python}\n", "utf-8")
            fake.chmod(0o755)
        (project / "pip").write_text(pip, "utf-8")
        # Nothing of the outer make, which runs this test, may reach the inner one.
        return subprocess.run(
            ["make", target], cwd=project, env={"PATH": str(tmp_path / "bin")},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    run.project = project
    return run


@pytest.mark.parametrize(
    ("python", "pip", "sentence"),
    [
        (None, "", "There is no python3 here: install Python 3.11 or newer, then run make again."),
        (OLD, "", "python3 is Python 3.9.18, but 3.11 or newer is needed: install one and name it, "
         "as in 'make lab PYTHON=python3.12'."),
        (NO_VENV, "", "python3 cannot make the folder .venv: install its venv module (on Debian "
         "and Ubuntu: apt install python3-venv) or free some disk space, then run make again."),
        (WORKING, "exit 1", "pip could not install the packages, for the reason above: no network, "
         "or no build of a package for this Python and system. Mend that, then run make again."),
    ],
    ids=["no-python", "old-python", "no-venv-module", "no-network"],
)  # fmt: skip
def test_a_failed_set_up_says_what_to_do_and_the_next_try_works(machine, python, pip, sentence):
    failed = machine(python, pip=pip)
    assert failed.returncode != 0
    # make adds its own line, "make: *** [...] Error 1"; ours is the only other one.
    ours = [line for line in failed.stderr.splitlines() if not line.startswith("make")]
    assert ours == [sentence]
    assert not (machine.project / ".venv/ready").exists(), "a failed set-up left its stamp"
    again = machine(WORKING)
    assert again.returncode == 0, again.stderr
    assert "ran jupyterlab" in again.stdout


def test_a_finished_set_up_is_not_repeated(machine):
    assert machine(WORKING).returncode == 0
    second = machine(None, pip="exit 1")  # neither Python nor the network is needed any more
    assert second.returncode == 0, second.stderr
    assert (machine.project / "made").read_text("utf-8") == "made\n"


def test_new_pins_without_network_keep_the_working_venv(machine):
    assert machine(WORKING).returncode == 0
    os.utime(machine.project / ".venv/ready", (0, 0))  # older than constraints.txt
    assert machine(WORKING, pip="exit 1").returncode != 0
    assert (machine.project / ".venv/bin/python").exists()
    assert machine(WORKING).returncode == 0
    assert (machine.project / "made").read_text("utf-8") == "made\n"


def test_a_half_made_venv_and_one_whose_python_has_gone_are_made_anew(machine):
    (machine.project / ".venv/bin").mkdir(parents=True)
    (machine.project / ".venv/made").touch()
    (machine.project / ".venv/half").touch()
    assert machine(WORKING).returncode == 0
    assert not (machine.project / ".venv/half").exists()
    (machine.project / ".venv/bin/python").unlink()
    (machine.project / ".venv/bin/python").symlink_to("/no/such/python")
    assert machine(WORKING).returncode == 0
    assert (machine.project / "made").read_text("utf-8") == "made\nmade\n"


def test_a_venv_that_somebody_made_is_never_deleted(machine):
    theirs = machine.project / ".venv/bin/python"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    refused = machine(WORKING)
    assert refused.returncode != 0 and theirs.exists()
    assert refused.stderr.startswith("There is a .venv here that make did not make: move it away")


def test_every_pin_takes_every_python_that_is_promised():
    """3.11 or newer: its first release and the later ones."""
    for name in pins():
        try:
            asks = metadata.distribution(package(name)[0]).metadata["Requires-Python"]
        except metadata.PackageNotFoundError:  # of another system, or an extra
            continue
        for python in ("3.11.0", "3.12.0", "3.13.0", "3.14.0"):
            assert SpecifierSet(asks or "").contains(python), f"{name} asks for Python {asks}"


# --- what the repository's files say ---


def repository_files() -> list[Path]:
    """Every file that is, or is about to be, in the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in names.split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_folder_of_the_machine_it_was_made_on():
    # Written so that the pattern does not find itself.
    machine_path = re.compile(r"(?<![\w.}])/(?:(?:work|root)/|(?:home|Users)/\w|tmp/ipykernel)")
    picture = re.compile(r'"image/png": "[^"]*"')  # its letters are no text
    found = []
    for path in repository_files():
        try:
            text = picture.sub("", path.read_text("utf-8"))
        except UnicodeDecodeError:
            continue  # not a text
        found += [f"{path.relative_to(ROOT)}: {m.group()}" for m in machine_path.finditer(text)]
    assert not found, f"these files name a folder of one machine: {found}"


def markdown_of(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text("utf-8")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", *sorted(ROOT.glob("notebooks/*.ipynb"))],
    ids=lambda path: path.name,
)
def test_every_relative_link_points_at_a_file(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", markdown_of(page), flags=re.S)
    links = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:|#", link):
            continue  # another site, or a place on the same page
        target = page.parent / link.split("#")[0]
        assert target.exists(), f"{page.name}: the link to {link} points at nothing"


def test_the_readme_gives_the_recorded_accuracies():
    readme = (ROOT / "README.md").read_text("utf-8")
    seeds: dict[str, list[float]] = {}
    for name in ("recall_controls", "no_selection"):
        record = json.loads((ROOT / f"notebooks/recorded/{name}.json").read_text("utf-8"))
        for run, result in record["runs"].items():
            accuracy = result["evaluations"][-1]["test_accuracy"]
            seeds.setdefault(run.rsplit("-seed", 1)[0], []).append(accuracy)
    for name, accuracies in seeds.items():
        assert f"| {name} | {', '.join(f'{a:.2f}' for a in sorted(accuracies))} |" in readme
