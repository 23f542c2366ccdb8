"""Is this computer ready? `python nsa_lite/lab/environment.py` asks without a notebook."""

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version

PYTHON = (3, 11)
REQUIRED = (
    "torch",
    "numpy",
    "matplotlib",
    "jaxtyping",
    "safetensors",
    "tqdm",
    "ipywidgets",
    "nbval",
    "jupyterlab",
)


def check() -> bool:
    """Print an [OK] or [FAIL] line for each need; True if nothing required is missing."""
    need, have = (".".join(map(str, v)) for v in (PYTHON, sys.version_info[:3]))
    results = [_report(sys.version_info >= PYTHON, f"Python {have}", f"install {need} or newer")]
    results += [_report(_imports(p), f"{p} {_version(p)}", f"pip install {p}") for p in REQUIRED]
    print(
        f"[OK] triton {_version('triton')}"
        if _imports("triton")
        else "[OK] no triton: fine for Part I; Part II needs it, on Linux"
    )
    gpu = _imports("torch") and importlib.import_module("torch").cuda.is_available()
    print("[OK] CUDA GPU found" if gpu else "[OK] no GPU: fine for Part I")
    return all(results)


def _imports(package: str) -> bool:
    try:
        importlib.import_module(package)
    except (ImportError, OSError):  # OSError: found, but a library of its own is missing
        return False
    return True


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not found"


def _report(ok: bool, what: str, remedy: str) -> bool:
    print(f"[OK] {what}" if ok else f"[FAIL] {what} : {remedy}")
    return ok


if __name__ == "__main__":
    sys.path.pop(0)  # this folder's modules must not hide other packages
    sys.exit(not check())
