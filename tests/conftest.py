"""Settings that have to come before anything imports triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels' tests run interpreted


def pytest_collection_modifyitems(items):
    """Last what leaves its process slower: endless answers that were stopped, and the kernels."""
    last = {"test_bank.py", "test_check.py", "test_contest.py", "test_guide.py"}
    items.sort(key=lambda item: (item.path.name in last, "kernels" in item.path.parts))
