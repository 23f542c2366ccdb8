"""What every recorded measurement says about itself, and how it is read back.

A record is a file in benchmarks/results with the command, the device, the versions of what ran, and
the measurements. constraints.txt pins versions for a CPU; `unpinned` says where a record, made on
some GPU machine, has others.
"""

import json
import platform
import re
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
PACKAGES = ("torch", "triton", "fla-core", "flash-attn")


def installed(package: str) -> str:
    """A package's version, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def what_was_run(arguments: list[str], out: Path | None) -> list[str]:
    """A command's words without `--out` and its path: where a record goes is no part of the run."""
    return [word for word in arguments if word not in ("--out", str(out))]


def about(arguments: list[str], module: str) -> dict:
    """Where and how a record was made."""
    cuda = torch.cuda.is_available()
    return {
        "command": shlex.join(["python", "-m", module, *arguments]),
        "device": torch.cuda.get_device_name() if cuda else "cpu, interpreted",
        "versions": {"python": platform.python_version()}
        | {package: installed(package) for package in PACKAGES}
        | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if cuda else None},
    }


def load(name: str) -> dict:
    """The record results/`name`.json. Errors: FileNotFoundError if there is none."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def save(record: dict, out: Path) -> None:
    """Write a record, and its folder if there is none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def earlier(out: Path, now: dict, same: tuple[str, ...] = ("device", "versions")) -> dict | None:
    """The record in `out`, if what `same` names has not changed since, so that it can go on."""
    before = json.loads(out.read_text("utf-8")) if out.exists() else {}
    return before if all(before.get(key) == now[key] for key in same) else None


def begin(out: Path, now: dict, replaced: set[tuple[str, int]]) -> dict:
    """A record for this run, with what an earlier one left on the same device and versions."""
    before = earlier(out, now)
    if before is None:
        return now | {"rows": []}
    kept = [row for row in before["rows"] if (row["config"], row["length"]) not in replaced]
    command = f"{before['command']}; {now['command']}" if kept else now["command"]
    return now | {"command": command, "rows": kept}


# --- which versions ---


def pinned() -> dict[str, str]:
    """Each package's version in constraints.txt."""
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", CONSTRAINTS.read_text("utf-8"), re.MULTILINE)
    return dict(pins)


def unpinned(record: dict) -> str:
    """ "(triton 3.6.0, not the pinned 3.7.1)" for a record made with that; "" with the pinned ones.

    Versions of a build, as in 2.13.0+cpu, are those of the release.
    """
    pins = pinned()
    others = [
        f"{package} {found}, not the pinned {pins[package]}"
        for package, found in release_versions(record).items()
        if package in pins and found != pins[package]
    ]
    return f"({'; '.join(others)})" if others else ""


def release_versions(record: dict) -> dict[str, str]:
    """Those of PACKAGES that a record ran with, without the names of builds."""
    versions = record.get("versions", {})
    found = {package: versions.get(package, "not installed") for package in PACKAGES}
    return {
        package: name.split("+")[0] for package, name in found.items() if name != "not installed"
    }


def recorded_on(record: dict) -> str:
    """A record's device and, where its versions are not the pinned ones, which: for any heading."""
    return f"{record['device']} {unpinned(record)}".strip()
