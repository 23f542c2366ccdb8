"""Settings that have to come before anything imports triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels' tests run interpreted


def pytest_collection_modifyitems(items):
    """The kernels' tests last: what runs after them in one process was seen to take longer."""
    items.sort(key=lambda item: "kernels" in item.path.parts)
