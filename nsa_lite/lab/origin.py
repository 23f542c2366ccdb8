"""Under what a result was made: the commit, the versions, the machine."""

import os
import platform
import subprocess
from pathlib import Path

import torch


def origin() -> dict:
    """What is noted beside every recorded run: a change in it explains numbers that differ."""
    return {"commit": commit(), "versions": versions(), "machine": machine()}


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of a folder, ending in -dirty if files differ from it; None outside git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True)
    except OSError:  # no git here
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Of Python and torch."""
    return {"python": platform.python_version(), "torch": torch.__version__}


def machine() -> dict[str, str | int | None]:
    """The system, its processor's kind, how many cores it has, and its first GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    system = f"{platform.system()} {platform.machine()}"
    return {"system": system, "cores": os.cpu_count(), "gpu": gpu}
