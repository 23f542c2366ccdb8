"""A small decoder language model whose attention is NSA, dense, a window, or a control."""

from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from nsa_lite.checks import require, require_int
from nsa_lite.config import NSAConfig
from nsa_lite.layer import Cache, DenseAttention, NSAttention, Trace

# The name of an attention -> how to build it.
ATTENTIONS = {
    "nsa": lambda c: NSAttention(c),
    "dense": lambda c: DenseAttention(c),
    "window": lambda c: DenseAttention(c, window=c.window),
    "nsa-no-selection": lambda c: NSAttention(c, routing="none"),
    "nsa-random": lambda c: NSAttention(c, routing="random"),
    "nsa-oracle": lambda c: NSAttention(c, routing="oracle"),
    "nsa-shut": lambda c: NSAttention(c, closed=("compressed",)),  # scores blocks, is not read
    "nsa-quest": lambda c: NSAttention(c, routing="quest"),
    "nsa-moba": lambda c: NSAttention(c, routing="moba"),
    "nsa-bce": lambda c: NSAttention(c, routing="bce"),
    "nsa-kl": lambda c: NSAttention(c, routing="kl"),
    "nsa-straight-through": lambda c: NSAttention(c, routing="straight-through"),
    "nsa-gumbel": lambda c: NSAttention(c, routing="gumbel"),
}


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a DecoderLM; `attention` is one of ATTENTIONS, `nsa` sizes every kind of it."""

    vocab_size: int
    layers: int = 2
    attention: str = "nsa"
    nsa: NSAConfig = field(default_factory=NSAConfig.small)

    def __post_init__(self) -> None:
        require_int("vocab_size", self.vocab_size, at_least=1)
        require_int("layers", self.layers, at_least=1)
        require(
            self.attention in ATTENTIONS,
            "attention",
            repr(self.attention),
            f"must be one of {list(ATTENTIONS)}",
        )
        if not isinstance(self.nsa, NSAConfig):
            raise TypeError(f"nsa: must be an NSAConfig, got {type(self.nsa).__name__}")

    def as_dict(self) -> dict:
        """The fields by name, nested, for a log or a checkpoint."""
        return asdict(self)


class Block(nn.Module):
    """Attention, then an MLP, each on a normalised input and added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.nsa.dim
        self.norm_attention, self.norm_mlp = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.attention = ATTENTIONS[config.attention](config.nsa)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self,
        x: Tensor,
        cache: Cache | None = None,
        traces: list | None = None,
        last: int | None = None,
    ) -> Tensor:
        h = self.norm_attention(x)
        if traces is not None and isinstance(self.attention, NSAttention):
            y, trace = self.attention(h, cache, return_trace=True, last=last)
            traces.append(trace)
        else:
            y = self.attention(h, cache, last=last)
        x = x[:, -y.shape[1] :] + y
        return x + self.mlp(self.norm_mlp(x))


class DecoderLM(nn.Module):
    """Token ids in, next-token logits out.

    Shapes: tokens (B, T) int64 -> logits (B, T, vocab_size); tokens (B, T, S) puts S symbols at
    a position and sums their embeddings. With return_traces=True also one Trace a layer (none
    for attentions that are not NSA). With last=m only the m newest positions get logits
    (B, m, vocab_size), and the last layer computes no others.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.nsa.dim)
        nn.init.normal_(self.embedding.weight, std=0.1)  # small: Adam's steps then turn it sooner
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.nsa.dim)
        self.unembedding = nn.Linear(config.nsa.dim, config.vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,
        caches: list[Cache] | None = None,
        return_traces: bool = False,
        last: int | None = None,
    ) -> Tensor | tuple[Tensor, list[Trace]]:
        self._check_tokens(tokens)
        if caches is not None:
            require(
                len(caches) == len(self.blocks),
                "len(caches)",
                len(caches),
                f"must hold one for each of {len(self.blocks)} layers",
            )
        traces = [] if return_traces else None
        x = self.embedding(tokens)
        x = x.sum(dim=2) if tokens.dim() == 3 else x
        for i, block in enumerate(self.blocks):
            at_end = i == len(self.blocks) - 1  # the layers below feed every position's keys
            x = block(x, None if caches is None else caches[i], traces, last if at_end else None)
        logits = self.unembedding(self.norm(x))
        return (logits, traces) if return_traces else logits

    def auxiliary_loss(self) -> Tensor | float:
        """What the layers' rules for choosing blocks add to the task's loss, newest pass; or 0."""
        losses = [getattr(block.attention, "auxiliary_loss", None) for block in self.blocks]
        return sum(loss for loss in losses if loss is not None)

    def new_caches(self) -> list[Cache]:
        """One empty cache a layer, for decoding token by token."""
        return [{} for _ in self.blocks]

    def _check_tokens(self, tokens: Tensor) -> None:
        if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
            got = getattr(tokens, "dtype", type(tokens).__name__)
            raise TypeError(f"tokens: must be an int64 tensor (B, T), got {got}")
        require(
            tokens.dim() in (2, 3) and tokens.shape[1] >= 1,
            "tokens.shape",
            tuple(tokens.shape),
            "must be (B, T) or (B, T, S) with at least one token",
        )
        if tokens.numel():
            low, high = int(tokens.min()), int(tokens.max())
            require(
                low >= 0 and high < self.config.vocab_size,
                "tokens",
                f"{low} .. {high}",
                f"must lie in 0 .. vocab_size - 1 = {self.config.vocab_size - 1}",
            )


@torch.no_grad()
def generate(model: DecoderLM, prompt: Tensor, count: int) -> Tensor:
    """Greedy continuation of prompt (B, T) by `count` tokens, decoded with a cache."""
    require_int("count", count, at_least=0)
    caches, tokens = model.new_caches(), prompt
    logits = model(prompt, caches)
    for _ in range(count):
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        logits = model(tokens[:, -1:], caches)
    return tokens
