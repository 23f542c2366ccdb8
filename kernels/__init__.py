"""NSA's operations as tiled Triton kernels, with the names and keywords of nsa_lite.

Without a CUDA device Triton interprets the kernels on the CPU: slow, and right in float32 and
float16. An operation is one file, from its kernels to its public function:

    flash_attention          dense, window and compressed attention (Eq. 7), and their gradients
    importance               block scores and the top n (Eq. 8-11)
    block_sparse_attention   attention to the selected blocks (Eq. 12), and its gradients
    gates                    the gated sum (Eq. 5)
    nsa                      all of it in one function
    decode                   all of it for a few new tokens, from a cache; shares: how it is cut
    rope                     rotary position encoding of all heads in one pass
    cache_rows               new keys and values into a cache, in one pass
    flops                    how many operations each one needs

What they share, in the order in which to read it: tile_sizes, rows, pieces (rows of 192 columns),
descriptors, online_softmax, visible_keys (masks of a run of keys), union_and_readers (the selection
from both sides), launching, operations (what torch calls), checks; interpreting, for a CPU.
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

if os.environ.get("TRITON_INTERPRET") == "1":
    from kernels import interpreting

    interpreting.hasten()

from kernels.block_sparse_attention import selected_attention
from kernels.cache_rows import write_rows
from kernels.checks import why_not
from kernels.decode import decode_step
from kernels.flash_attention import compressed_attention, window_attention
from kernels.gates import gated_sum
from kernels.importance import select_blocks
from kernels.nsa import nsa_attention
from kernels.rope import rotate

# isort: split
from kernels import flops  # noqa: F401  once all operations are there, torch's counter hears of them

__all__ = [
    "compressed_attention",
    "decode_step",
    "gated_sum",
    "nsa_attention",
    "rotate",
    "select_blocks",
    "selected_attention",
    "why_not",
    "window_attention",
    "write_rows",
]
