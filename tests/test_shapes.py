"""What the signatures of nsa_lite promise about shapes is true."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What calls every public operation, every layer and every rule with valid inputs of many shapes.
CALLERS = ["tests/test_operations.py", "tests/test_layer.py", "tests/rivals/test_rules.py"]
CALLERS += ["tests/test_decode.py", "tests/test_cache.py"]
# One of each kind, and valid arguments only.
FEW = "not gradient and not later and not chunks and not newest and not argmax and not refused"


def checked(*words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_every_signature_holds_where_the_tests_call_it():
    done = checked(
        "-m", "pytest", "-q", "-p", "tests.shapes", "-p", "no:cacheprovider", *CALLERS, "-k", FEW
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "call",
    [
        "attention.attend(q, k[..., :3], k, mask, None)",  # another width
        "attention.masked_softmax(q, mask[:5])",  # another number of rows
        "blocks.query_positions(q[0])",  # an axis too few
        "gates.gated_sum(q[..., :2], (q, q, q))",  # two gates
    ],
)
def test_the_checks_are_on(call):
    """A call that breaks a signature's promise fails at the door."""
    code = (
        "import tests.shapes, torch\n"
        "from nsa_lite import attention, blocks, gates\n"
        "q = torch.randn(1, 4, 9, 6)\n"
        "k = torch.randn(1, 2, 9, 6)\n"
        "mask = torch.ones(9, 9, dtype=torch.bool)\n"
        f"{call}\n"
    )
    done = checked("-c", code)
    assert done.returncode != 0 and "TypeCheckError" in done.stderr, done.stderr
