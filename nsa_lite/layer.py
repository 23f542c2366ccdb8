"""The whole NSA layer: one query, three branches with their own keys and values, gates."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nsa_lite.attention import window_attention
from nsa_lite.backend import operations
from nsa_lite.checks import require, require_alike, require_float_tensor, require_int
from nsa_lite.compression import Phi
from nsa_lite.config import NSAConfig
from nsa_lite.rivals.rules import Choice, Known
from nsa_lite.rivals.taught import ROUTINGS, scaled_selected_attention
from nsa_lite.rope import rotate
from nsa_lite.selection import block_importance, compressed_probabilities

BRANCHES = ("compressed", "selected", "window")
Cache = dict[str, Tensor]


@dataclass(frozen=True)
class Trace:
    """What one pass through a layer did, detached: the data behind every picture.

    Shapes: ids (B, G, T, n), probabilities (B, G, R, T, N), importance (B, G, T, blocks),
    gates (B, H, T, 3) in the order of BRANCHES, outputs: each branch's (B, H, T, Dv).
    """

    config: NSAConfig
    start: int
    ids: Tensor
    probabilities: Tensor
    importance: Tensor
    gates: Tensor
    outputs: dict[str, Tensor]


class NSAttention(nn.Module):
    """Native Sparse Attention (Eq. 5): out = sum over branches of gate * branch.

    Shapes: x (B, T, C) -> y (B, T, C), or (y, Trace) with return_trace=True. With a cache (an
    empty dict at first) x holds the next tokens only, and the cache grows by them. With
    last=m only the m newest tokens are queries: y is (B, m, C), and the rest costs nothing.
    `routing` names the rule that chooses blocks; `closed` names branches whose gates stay 0.
    Errors: ValueError or TypeError that names the argument.
    """

    def __init__(
        self,
        config: NSAConfig,
        backend: str = "auto",
        routing: str = "importance",
        closed: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        require(routing in ROUTINGS, "routing", repr(routing), f"must be one of {list(ROUTINGS)}")
        require(set(closed) <= set(BRANCHES), "closed", closed, f"must be among {BRANCHES}")
        operations(backend, torch.device("cpu"))  # an unknown or missing backend fails here
        self.config, self.backend, self.routing = config, backend, routing
        dim, heads, groups = config.dim, config.heads, config.kv_heads
        self.query = nn.Linear(dim, heads * config.head_dim, bias=False)
        self.keys = nn.ModuleDict(
            {b: nn.Linear(dim, groups * config.head_dim, bias=False) for b in BRANCHES}
        )
        self.values = nn.ModuleDict(
            {b: nn.Linear(dim, groups * config.value_dim, bias=False) for b in BRANCHES}
        )
        self.phi_k = Phi(config.head_dim, config.block_size, config.stride, config.phi)
        self.phi_v = Phi(config.value_dim, config.block_size, config.stride, config.phi)
        self.gate = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, 3 * heads)
        )
        self.output = nn.Linear(heads * config.value_dim, dim, bias=False)
        self.closed = closed
        rule = ROUTINGS[routing]
        self.selector = rule(config) if isinstance(rule, type) else None  # a rule with weights
        self.auxiliary_loss: Tensor | None = None  # of the newest pass, where its rule has one

    def forward(
        self,
        x: Tensor,
        cache: Cache | None = None,
        return_trace: bool = False,
        last: int | None = None,
    ) -> Tensor | tuple[Tensor, Trace]:
        require_input(x, self.query.weight)
        c, start = self.config, cache_length(cache)
        raw = self._project(x, start)
        if cache is not None:
            raw = extend_cache(cache, raw)
        short = self._compress(raw["compressed"], {} if cache is None else cache)
        keep_x = self.selector is not None and cache is not None  # it may read every input so far
        seen = append(cache, "x", x, dim=1) if keep_x else x
        x, start = newest(x, start, last)
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        q = rotate(split_heads(self.query(x), c.heads), positions, c.rope_theta)

        gates = split_heads(self.gate(x).sigmoid(), c.heads)  # (B, H, T, 3)
        if self.closed:
            gates = gates * gates.new_tensor([branch not in self.closed for branch in BRANCHES])

        ops = operations(self.backend, x.device)
        if self.routing == "importance" and not return_trace and hasattr(ops, "nsa_attention"):
            self.auxiliary_loss = None
            mixed = ops.nsa_attention(  # the lines below as one function, for the kernels' speed
                q, short, raw["selected"], raw["window"], gates, **self._sizes(), start=start
            )
            return self.output(mixed.transpose(1, 2).flatten(2))
        out_c, lse = ops.compressed_attention(
            q, *short, block_size=c.block_size, stride=c.stride, start=start
        )
        choice = self._choose(
            Known(c, ops, seen, q, short[0], lse, raw["selected"][0], start, self.training)
        )
        out_s = self._read(ops, q, raw["selected"], choice, start)
        out_w = ops.window_attention(q, *raw["window"], window=c.window, start=start)

        outputs = (out_c, out_s, out_w)
        mixed = ops.gated_sum(gates, outputs)
        y = self.output(mixed.transpose(1, 2).flatten(2))
        if not return_trace:
            return y
        return y, self._trace(q, short[0], lse, choice.ids, gates, outputs, start)

    def _sizes(self) -> dict[str, int]:
        c = self.config
        return dict(
            block_size=c.block_size,
            stride=c.stride,
            select_block_size=c.select_block_size,
            num_selected=c.num_selected,
            num_initial=c.num_initial,
            num_local=c.num_local,
            window_size=c.window,
        )

    def _choose(self, known: Known) -> Choice:
        rule = ROUTINGS[self.routing]  # looked up anew: a trained layer may be given another one
        choice = (self.selector if isinstance(rule, type) else rule)(known)
        self.auxiliary_loss = choice.loss
        return choice

    def _read(self, ops, q: Tensor, raw: tuple[Tensor, Tensor], choice: Choice, start: int):
        """The chosen blocks; a choice with weights is read by the reference, on any backend."""
        sizes = dict(select_block_size=self.config.select_block_size, start=start)
        if choice.weight is None:
            return ops.selected_attention(q, *raw, choice.ids, **sizes)
        return scaled_selected_attention(q, *raw, choice.ids, choice.weight, **sizes)

    def _project(self, x: Tensor, start: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Each branch's own raw keys and values, rotated but for phi's."""
        c = self.config
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        raw = {}
        for branch in BRANCHES:
            k = split_heads(self.keys[branch](x), c.kv_heads)
            v = split_heads(self.values[branch](x), c.kv_heads)
            raw[branch] = (k if branch == "compressed" else rotate(k, positions, c.rope_theta), v)
        return raw

    def _compress(self, raw: tuple[Tensor, Tensor], cache: Cache) -> tuple[Tensor, Tensor]:
        """phi of every whole block, once: a cache keeps the ones of earlier calls."""
        c, (k, v) = self.config, raw
        done = cache["phi.k"].shape[2] if "phi.k" in cache else 0
        k, v = self.phi_k(k[:, :, done * c.stride :]), self.phi_v(v[:, :, done * c.stride :])
        first_token = torch.arange(done, done + k.shape[2], device=k.device) * c.stride
        k = rotate(k, first_token, c.rope_theta)
        return append(cache, "phi.k", k), append(cache, "phi.v", v)

    def _trace(self, q, k_short, lse, ids, gates, outputs, start) -> Trace:
        c = self.config
        blocks = dict(block_size=c.block_size, stride=c.stride, start=start)
        p = compressed_probabilities(q, k_short, lse, **blocks)
        importance = block_importance(
            q, k_short, lse, select_block_size=c.select_block_size, **blocks
        )
        named = {b: out.detach() for b, out in zip(BRANCHES, outputs, strict=True)}
        return Trace(c, start, ids, p, importance, gates.detach(), named)


def require_input(x: Tensor, weight: Tensor) -> None:
    """Raise unless x is (B, T, C), not empty, and fits a layer's first weight (..., C)."""
    require_float_tensor("x", x, "B, T, C")
    require(x.shape[1] >= 1, "x.shape", tuple(x.shape), "the sequence must not be empty")
    require(
        x.shape[2] == weight.shape[1],
        "x.shape",
        tuple(x.shape),
        f"C must be config.dim = {weight.shape[1]}",
    )
    if not torch.is_autocast_enabled(weight.device.type):  # autocast mixes dtypes on purpose
        require_alike("x", x, "weight", weight)


def gated_sum(gates: Tensor, outputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Each branch's output times its gate, added up (Eq. 5).

    Shapes: gates (B, H, T, 3), outputs: three of (B, H, T, Dv) -> (B, H, T, Dv).
    """
    return sum(gates[..., i, None] * out for i, out in enumerate(outputs))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * width) -> (B, heads, T, width)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def newest(x: Tensor, start: int, last: int | None) -> tuple[Tensor, int]:
    """The m = last newest of the tokens x (B, T, C) that begin at `start`, and their start."""
    if last is None:
        return x, start
    require_int("last", last, at_least=1)
    require(last <= x.shape[1], "last", last, f"must not exceed the {x.shape[1]} tokens of x")
    return x[:, -last:], start + x.shape[1] - last


def append(cache: Cache, name: str, new: Tensor, dim: int = 2) -> Tensor:
    """Everything stored under `name` with `new` behind it, along the token axis; stores it too."""
    cache[name] = torch.cat([cache[name], new], dim=dim) if name in cache else new
    return cache[name]


def extend_cache(
    cache: Cache, raw: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Append each branch's new keys and values; return all of them, old and new."""
    return {
        branch: (append(cache, f"{branch}.k", k), append(cache, f"{branch}.v", v))
        for branch, (k, v) in raw.items()
    }


def cache_length(cache: Cache | None) -> int:
    """Tokens that a cache holds."""
    return cache["window.k"].shape[2] if cache else 0


class DenseAttention(nn.Module):
    """What NSA is compared with: one branch of causal attention, dense or windowed, with RoPE.

    Shapes: x (B, T, C) -> y (B, T, C). Same heads, widths, cache and `last` as NSAttention.
    """

    # Another way to read a trained layer: q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv), none of
    # them rotated, and theta -> out (B, H, T, Dv). Set it to compare methods on the same weights.
    instead: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None

    def __init__(self, config: NSAConfig, window: int | None = None) -> None:
        super().__init__()
        if window is not None:
            require_int("window", window, at_least=1)
        self.config, self.window = config, window
        self.query = nn.Linear(config.dim, config.heads * config.head_dim, bias=False)
        self.key = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.value = nn.Linear(config.dim, config.kv_heads * config.value_dim, bias=False)
        self.output = nn.Linear(config.heads * config.value_dim, config.dim, bias=False)

    def forward(self, x: Tensor, cache: Cache | None = None, last: int | None = None) -> Tensor:
        require_input(x, self.query.weight)
        if self.instead is not None:
            return newest(self._read_by(self.instead, x, cache), 0, last)[0]
        c, start = self.config, cache_length(cache)
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        k = rotate(split_heads(self.key(x), c.kv_heads), positions, c.rope_theta)
        v = split_heads(self.value(x), c.kv_heads)
        if cache is not None:
            k, v = extend_cache(cache, {"window": (k, v)})["window"]
        x, start = newest(x, start, last)
        q = rotate(split_heads(self.query(x), c.heads), positions[-x.shape[1] :], c.rope_theta)
        out = window_attention(q, k, v, window=self.window, start=start)
        return self.output(out.transpose(1, 2).flatten(2))

    def _read_by(self, instead: Callable, x: Tensor, cache: Cache | None) -> Tensor:
        require(cache is None, "cache", "a dict", "must be None while `instead` is set")
        c = self.config
        q = split_heads(self.query(x), c.heads)
        k, v = split_heads(self.key(x), c.kv_heads), split_heads(self.value(x), c.kv_heads)
        return self.output(instead(q, k, v, c.rope_theta).transpose(1, 2).flatten(2))
