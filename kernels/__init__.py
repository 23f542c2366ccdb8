"""NSA's four operations as tiled Triton kernels, with the names and keywords of nsa_lite.

Without a CUDA device Triton interprets the kernels on the CPU: slow, and right in float32 and
float16. Read the files in this order: tile, boxes, flash, flash_backward, select, routes,
selected, selected_backward, gates; then launch, which starts the kernels, and attention and whole,
which make functions of them.
"""

import os
import sys
from importlib.util import find_spec

import torch

if find_spec("triton") is None:
    raise ImportError(
        "kernels: Part II needs triton, which exists for Linux only (on Windows use WSL, elsewhere "
        "a container or Binder); Part I and notebook 07 run without it."
    )
if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise ImportError(
            "kernels: triton was imported before the kernels, so it cannot interpret them on this "
            "CPU: restart Python (or the notebook's kernel) and import kernels first."
        )
    os.environ["TRITON_INTERPRET"] = "1"  # for triton's own functions: read at its import

from kernels.attention import compressed_attention, selected_attention, window_attention
from kernels.gates import gated_sum
from kernels.select import select_blocks
from kernels.whole import nsa_attention

__all__ = [
    "compressed_attention", "gated_sum", "nsa_attention", "select_blocks", "selected_attention",
    "window_attention",
]
