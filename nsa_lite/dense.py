"""The layer that NSA is compared with: one branch of causal attention, dense or windowed."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from nsa_lite.attention import KV
from nsa_lite.backend import operations_of
from nsa_lite.cache import Cache, growing, new_cache
from nsa_lite.checks import require_int
from nsa_lite.config import NSAConfig, require_config
from nsa_lite.layer import (
    join_heads,
    newest,
    require_input,
    require_last,
    split_heads,
    with_extras,
)


class DenseAttention(nn.Module):
    """Causal attention to every key, or to the last `window`, with RoPE.

    Dense attention is torch's own, which makes no T x T scores where torch has a fused kernel; the
    window's, and RoPE, are the kernels' on a CUDA device, where they can run.
    x (B, T, C) -> y (B, T, C). Heads, widths, cache, `last` and what is returned as in
    NSAttention; the loss is 0 and the trace is None.
    """

    def __init__(self, config: NSAConfig, window: int | None = None) -> None:
        super().__init__()
        require_config(config)
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
        require_input(x, self.config.dim, self.query)
        require_last(x, last)
        with growing([cache]):
            y = self.output(join_heads(self.attend(x, cache, last)))
        return with_extras(y, None, None, return_loss, return_trace)

    @torch.inference_mode(False)  # a cache that is made in that mode could not grow outside it
    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype | None = None) -> Cache:
        """An empty cache, as NSAttention.new_cache: one branch, "window", and no blocks."""
        c = self.config
        shape = (c.kv_heads, c.head_dim, c.value_dim)
        return new_cache(self, batch, capacity, shape, ["window"], dtype)

    def attend(self, x: Tensor, cache: Cache | None, last: int | None) -> Tensor:
        """The outputs (B, H, m, Dv) of the m = last newest tokens, all of them if last is None."""
        theta = self.config.rope_theta
        rotate = operations_of("auto", x, self.config).rotate
        if cache is None:
            positions = torch.arange(x.shape[1], device=x.device)
        else:
            cache.require_room(self, x)
            positions = cache.next_positions(x.shape[1])
        k = rotate(split_heads(self.key(x), self.config.kv_heads), positions, theta)
        kv = KV(k, split_heads(self.value(x), self.config.kv_heads))
        asking = newest(x, last)
        positions = positions[..., -asking.shape[1] :]
        q = rotate(split_heads(self.query(asking), self.config.heads), positions, theta)
        if cache is None:
            return self.read(q, kv)
        cache.grow({"window": kv}, write=operations_of("auto", x, self.config).write_rows)
        parts = cache.of_one_length()
        return torch.cat([self.read(q[some], part.held()["window"]) for some, part in parts])

    def read(self, q: Tensor, kv: KV) -> Tensor:
        """Attention of the newest tokens to all of them, or to each one's window."""
        if self.window is None:
            return newest_attention(q, *kv)
        window_attention = operations_of("auto", q, self.config).window_attention
        start = kv.k.shape[2] - q.shape[2]
        return window_attention(q, *kv, window=self.window, start=start)


def newest_attention(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S Dv"]
) -> Float[Tensor, "B H T Dv"]:
    """dense_attention of the T newest of S tokens (start = S - T), by torch's own kernels.

    Those of a CUDA device want one width: there the narrower of D and Dv is filled up with zeros,
    which add nothing.
    """
    length, total = q.shape[2], k.shape[2]
    scale = q.shape[3] ** -0.5
    value_width = v.shape[3]
    more = value_width - q.shape[3] if q.is_cuda else 0
    if more > 0:
        q = pad(q, (0, more))
        k = pad(k, (0, more))
    if more < 0:
        v = pad(v, (0, -more))
    options = dict(scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if length == total:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    else:
        seen = torch.ones(length, total, dtype=torch.bool, device=q.device).tril(total - length)
        mask = None if length == 1 else seen
        out = scaled_dot_product_attention(q, k, v, mask, **options)
    return out[..., :value_width]
