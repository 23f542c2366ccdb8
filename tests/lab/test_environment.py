"""The environment check says what is there, what is missing and what to do about it."""

import subprocess
import sys
from pathlib import Path

from nsa_lite.lab import environment

SCRIPT = Path(environment.__file__)


def test_this_environment_is_complete(capsys):
    assert environment.check() is True
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(environment.REQUIRED) + 2
    assert all(line.startswith("[OK] ") for line in lines)


def test_a_missing_package_fails_with_the_remedy(capsys, monkeypatch):
    monkeypatch.setattr(environment, "REQUIRED", ("torch", "no_such_package"))
    assert environment.check() is False
    failed = [x for x in capsys.readouterr().out.splitlines() if x.startswith("[FAIL]")]
    assert failed == ["[FAIL] no_such_package not found : pip install no_such_package"]


def test_an_old_python_fails_with_the_remedy(capsys, monkeypatch):
    monkeypatch.setattr(environment, "PYTHON", (9, 0))
    assert environment.check() is False
    assert "install 9.0 or newer" in capsys.readouterr().out


def test_it_runs_as_a_script_where_nothing_is_installed():
    run = subprocess.run([sys.executable, "-I", "-S", SCRIPT], capture_output=True, text=True)
    assert run.returncode == 1
    assert "[FAIL] torch not found : pip install torch" in run.stdout
    assert run.stderr == ""
