"""Native Sparse Attention (arXiv 2502.11089) in plain PyTorch: the definition of every step.

Read the files in the paper's order: config (the sizes), blocks (where blocks lie), attention
(softmax with grouped heads, the window), rope, compression (Eq. 7), selection (Eq. 8-12), gates,
nsa (Eq. 5: the whole in one function), cache (what is kept of tokens), decode (Eq. 5 for the newest
ones), layer (projections around them), dense (what it is compared with), model (a small decoder),
generation (what it writes), cost. loops has the operations on blocks and queries once more, as
plain loops: keep it open beside attention, compression and selection. What all of them lean on:
checks (what arguments must be), traces (what a pass read), backend (PyTorch or Triton).
The rooms lab, rivals and show use these files; none of these files uses them.
"""

from nsa_lite.attention import KV, dense_attention, window_attention
from nsa_lite.cache import Cache
from nsa_lite.compression import Phi, compressed_attention
from nsa_lite.config import NSAConfig
from nsa_lite.decode import decode_step
from nsa_lite.dense import DenseAttention
from nsa_lite.gates import BRANCHES, gated_sum
from nsa_lite.generation import generate, stream
from nsa_lite.layer import Choice, Known, NSAttention
from nsa_lite.model import DecoderLM, ModelConfig
from nsa_lite.nsa import nsa_attention
from nsa_lite.selection import (
    block_importance,
    choose_blocks,
    select_blocks,
    selected_attention,
)
from nsa_lite.traces import Trace

__all__ = [
    "BRANCHES",
    "KV",
    "Cache",
    "Choice",
    "DecoderLM",
    "DenseAttention",
    "Known",
    "ModelConfig",
    "NSAConfig",
    "NSAttention",
    "Phi",
    "Trace",
    "block_importance",
    "choose_blocks",
    "compressed_attention",
    "decode_step",
    "dense_attention",
    "gated_sum",
    "generate",
    "nsa_attention",
    "select_blocks",
    "selected_attention",
    "stream",
    "window_attention",
]
