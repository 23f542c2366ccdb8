"""The layer that NSA is compared with: one branch of causal attention, dense or windowed."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nsa_lite.attention import KV, window_attention
from nsa_lite.cache import Cache
from nsa_lite.checks import require_int
from nsa_lite.config import NSAConfig
from nsa_lite.layer import join_heads, newest, require_input, split_heads, with_extras
from nsa_lite.rope import rotate


class DenseAttention(nn.Module):
    """Causal attention to every key, or to the last `window`, with RoPE.

    x (B, T, C) -> y (B, T, C). Heads, widths, cache, `last` and what is returned as in
    NSAttention; the loss is 0 and the trace is None.
    """

    def __init__(self, config: NSAConfig, window: int | None = None) -> None:
        super().__init__()
        if window is not None:
            require_int("window", window, at_least=1)
        self.config = config
        self.window = window
        self.query = nn.Linear(config.dim, config.heads * config.head_dim, bias=False)
        self.key = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.value = nn.Linear(config.dim, config.kv_heads * config.value_dim, bias=False)
        self.output = nn.Linear(config.heads * config.value_dim, config.dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        cache: Cache | None = None,
        *,
        last: int | None = None,
        return_loss: bool = False,
        return_trace: bool = False,
    ) -> Tensor | tuple:
        require_input(x, self.query.weight)
        theta = self.config.rope_theta
        seen = 0 if cache is None else cache.length
        positions = torch.arange(seen, seen + x.shape[1], device=x.device)
        k = rotate(split_heads(self.key(x), self.config.kv_heads), positions, theta)
        kv = KV(k, split_heads(self.value(x), self.config.kv_heads))
        if cache is not None:
            kv = cache.grow({"window": kv})["window"]
        asking = newest(x, last)
        positions = positions[-asking.shape[1] :]
        q = rotate(split_heads(self.query(asking), self.config.heads), positions, theta)
        start = kv.k.shape[2] - asking.shape[1]
        out = window_attention(q, *kv, window=self.window, start=start)
        return with_extras(self.output(join_heads(out)), None, None, return_loss, return_trace)
