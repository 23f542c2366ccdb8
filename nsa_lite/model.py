"""A small decoder language model; its attention is NSA unless another layer is given."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nsa_lite.cache import Cache, growing
from nsa_lite.checks import named, require, require_instance, require_int, require_range
from nsa_lite.config import NSAConfig
from nsa_lite.layer import NSAttention, require_last, with_extras
from nsa_lite.traces import Trace

# Makes a layer that is called as NSAttention is: layer(x, cache, last=, return_loss=,
# return_trace=) gives y, or a tuple of y, the loss and the trace, as far as they were asked for.
MakeAttention = Callable[[NSAConfig], nn.Module]


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a DecoderLM; `nsa` sizes its attention, of whatever kind."""

    vocab_size: int
    layers: int = 2
    nsa: NSAConfig = field(default_factory=NSAConfig.small)

    def __post_init__(self) -> None:
        require_int("vocab_size", self.vocab_size, at_least=1)
        require_int("layers", self.layers, at_least=1)
        require_instance("nsa", self.nsa, NSAConfig, "an NSAConfig")

    def as_dict(self) -> dict:
        """The fields by name, nested, for a log or a checkpoint."""
        return asdict(self)


class Block(nn.Module):
    """Attention, then an MLP, each on a normalised input and added to the stream."""

    def __init__(self, config: NSAConfig, attention: MakeAttention) -> None:
        super().__init__()
        dim = config.dim
        self.norm_attention = nn.RMSNorm(dim)
        self.norm_mlp = nn.RMSNorm(dim)
        self.attention = made(attention, config)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, x: Tensor, cache: Cache | None, last: int | None, trace: bool
    ) -> tuple[Tensor, Tensor, list[Trace | None]]:
        """The stream (B, m, C) of the m = last newest positions, the rule's loss, a trace."""
        h = self.norm_attention(x)
        given = self.attention(h, cache, last=last, return_loss=True, return_trace=trace)
        if not isinstance(given, tuple):
            raise TypeError(
                f"attention: {type(self.attention).__name__} must return (y, loss) with "
                f"return_loss=True, got {type(given).__name__}"
            )
        y, loss, *traced = given
        x = x[:, -y.shape[1] :] + y
        return x + self.mlp(self.norm_mlp(x)), loss, traced


def made(attention: MakeAttention, config: NSAConfig) -> nn.Module:
    """The layer that `attention` makes. Errors: TypeError if it makes none, or is one itself."""
    name = getattr(attention, "__name__", type(attention).__name__)
    if isinstance(attention, nn.Module) or not callable(attention):
        raise TypeError(
            f"attention: must make a layer of an NSAConfig, as NSAttention does, got a {name}"
        )
    layer = attention(config)
    if not isinstance(layer, nn.Module):
        raise TypeError(f"attention: {name} must make an nn.Module, got {type(layer).__name__}")
    return layer


def require_caches(caches: object, layers: int) -> Sequence[Cache]:
    """The caches; raise unless there is one for each layer: without its cache one would forget.

    And unless all hold the same tokens, which the layers read together.
    """
    require_instance("caches", caches, (list, tuple), "a list, as new_caches makes it")
    given = cast(Sequence[Cache], caches)
    rule = f"must hold one for each of {layers} layers"
    require(len(given) == layers, "len(caches)", len(given), rule)
    first: dict[int, int] = {}
    for i, cache in enumerate(given):
        require_instance(f"caches[{i}]", cache, Cache, "a Cache")
        owner = first.setdefault(id(cache.lengths), i)
        rule = "must have memory of its own, not that of caches[{}]"
        require(owner == i, f"caches[{i}]", cache, rule, owner)
    require_same_tokens(given)
    return given


def require_same_tokens(caches: Sequence[Cache]) -> None:
    """Raise unless all caches of a model hold as many tokens of each sequence as the first."""
    first = caches[0].lengths_on_host
    for i, cache in enumerate(caches[1:], 1):
        held = cache.lengths_on_host
        same = torch.equal(held, first)
        require(same, f"caches[{i}].lengths", held, "must be those of caches[0], {}", first)


class DecoderLM(nn.Module):
    """Token ids in, next-token logits out.

    tokens (B, T) int64 -> logits (B, T, vocab_size); tokens (B, T, S) puts S symbols at a position
    and sums their embeddings. With last=m only the m newest positions get logits, and the last
    layer computes no others. return_loss adds the sum of the losses of the layers' rules, a
    scalar; return_traces adds one Trace a layer (none for attentions that leave none). With caches,
    of new_caches, tokens are each sequence's next ones, as in NSAttention. With recompute=True a
    block keeps only its input for the backward, which computes the rest once more.
    """

    def __init__(self, config: ModelConfig, attention: MakeAttention = NSAttention) -> None:
        super().__init__()
        require_instance("config", config, ModelConfig, "a ModelConfig")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.nsa.dim)
        nn.init.normal_(self.embedding.weight, std=0.1)  # small: Adam's steps then turn it sooner
        self.blocks = nn.ModuleList(Block(config.nsa, attention) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.nsa.dim)
        self.unembedding = nn.Linear(config.nsa.dim, config.vocab_size, bias=False)

    def forward(
        self,
        tokens: Int[Tensor, "B T"] | Int[Tensor, "B T S"],
        caches: list[Cache] | None = None,
        *,
        last: int | None = None,
        return_loss: bool = False,
        return_traces: bool = False,
        recompute: bool = False,
    ) -> Tensor | tuple:
        self.require_tokens(tokens)
        require_last(tokens, last)
        layers = len(self.blocks)
        given = [None] * layers if caches is None else require_caches(caches, layers)
        x = self.embedding(tokens)
        x = x.sum(dim=2) if tokens.dim() == 3 else x
        losses = []
        traces = []
        with growing(given):
            for block, cache in zip(self.blocks, given, strict=True):
                at_end = block is self.blocks[-1]  # the layers below feed every position's keys
                run = partial(checkpoint, block, use_reentrant=False) if recompute else block
                x, loss, trace = run(x, cache, last if at_end else None, return_traces)
                losses.append(loss)
                traces += [t for t in trace if t is not None]
            logits = self.unembedding(self.norm(x))
        return with_extras(logits, torch.stack(losses).sum(), traces, return_loss, return_traces)

    @property
    def attentions(self) -> list[nn.Module]:
        """Each block's attention, the lowest first."""
        return [cast(Block, block).attention for block in self.blocks]

    def new_caches(
        self, batch: int, capacity: int, *, dtype: torch.dtype | None = None
    ) -> list[Cache]:
        """One empty cache a layer, for so many sequences of up to `capacity` tokens.

        Errors: TypeError for an attention that has no new_cache; as NSAttention.new_cache.
        """
        caches = []
        for layer in self.attentions:
            make = getattr(layer, "new_cache", None)
            if make is None:
                name = type(layer).__name__
                raise TypeError(f"attention: {name} has no new_cache, so it cannot decode")
            caches.append(make(batch, capacity, dtype=dtype))
        return caches

    def require_tokens(self, tokens: Tensor, name: str = "tokens") -> None:
        """Raise unless tokens are int64 (B, T) or (B, T, S), not empty, and in the vocabulary.

        `name` is what the caller calls them.
        """
        if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
            got = getattr(tokens, "dtype", named(tokens))
            raise TypeError(f"{name}: must be an int64 tensor (B, T), got {got}")
        fits = tokens.dim() in (2, 3) and min(tokens.shape) >= 1
        rule = "must be (B, T) or (B, T, S) with at least one token"
        require(fits, f"{name}.shape", tuple(tokens.shape), rule)
        home = self.embedding.weight.device
        where = tokens.device
        require(where == home, f"{name}.device", where, "must be the model's, {}", home)
        top = self.config.vocab_size - 1
        require_range(name, tokens, 0, top, "must lie in 0 .. vocab_size - 1 = {}")
