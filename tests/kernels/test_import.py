"""What `import kernels` says where the kernels cannot run: one sentence with what to do."""

import subprocess
import sys

import pytest
import torch


def import_after(line: str) -> str:
    """The error of a fresh Python that runs `line` and then imports kernels, its last line."""
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; {line}; import kernels"],
        capture_output=True,
        text=True,
    )
    return (run.stderr.strip() or "no error").splitlines()[-1]


def test_without_triton_it_says_what_part_two_needs():
    said = import_after("sys.modules['triton'] = None")  # what is None there cannot be imported
    assert said.startswith("ImportError: kernels: Part II needs triton, which exists for Linux")
    assert "WSL" in said and "Part I and notebook 07 run without it" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels may come second")
def test_after_triton_on_a_cpu_it_says_to_restart():
    said = import_after("import os; os.environ.pop('TRITON_INTERPRET', None); import triton")
    assert said.startswith("ImportError: kernels: triton was imported before the kernels")
    assert "restart Python (or the notebook's kernel) and import kernels first" in said
