"""Native Sparse Attention (arXiv 2502.11089) in plain PyTorch: the definition of every step."""

from nsa_lite.attention import dense_attention, window_attention
from nsa_lite.compression import Phi, compressed_attention
from nsa_lite.config import NSAConfig
from nsa_lite.layer import BRANCHES, DenseAttention, NSAttention, Trace, gated_sum
from nsa_lite.model import ATTENTIONS, DecoderLM, ModelConfig, generate
from nsa_lite.selection import (
    block_importance,
    choose_blocks,
    select_blocks,
    selected_attention,
)

__all__ = [
    "ATTENTIONS",
    "BRANCHES",
    "DecoderLM",
    "DenseAttention",
    "ModelConfig",
    "NSAConfig",
    "NSAttention",
    "Phi",
    "Trace",
    "block_importance",
    "choose_blocks",
    "compressed_attention",
    "dense_attention",
    "gated_sum",
    "generate",
    "select_blocks",
    "selected_attention",
    "window_attention",
]
