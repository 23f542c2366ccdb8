"""What a layer keeps of the tokens it has read, so that the next ones need not read them again."""

import torch
from torch import Tensor

from nsa_lite.attention import KV
from nsa_lite.checks import require


class Cache:
    """One layer's keys and values so far; empty at first, and each call of the layer grows it.

    raw: each branch's KV by name, (B, G, S, width); blocks: phi's finished blocks (B, G, N, width);
    x (B, S, C): the layer's inputs, kept only where a rule for choosing blocks may read them.
    """

    def __init__(self) -> None:
        self.raw: dict[str, KV] = {}
        self.blocks: KV | None = None
        self.x: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens that the cache holds. Errors: ValueError if its branches do not agree."""
        lengths = {name: kv.k.shape[2] for name, kv in self.raw.items()}
        rule = "every branch must hold the same number of tokens"
        require(len(set(lengths.values())) <= 1, "cache.raw", lengths, rule)
        return next(iter(lengths.values()), 0)

    @property
    def num_blocks(self) -> int:
        """Blocks that phi has finished."""
        return 0 if self.blocks is None else self.blocks.k.shape[2]

    def grow(self, new: dict[str, KV]) -> dict[str, KV]:
        """Put the newest tokens' keys and values behind the others; returns all of them."""
        for name, kv in new.items():
            self.raw[name] = joined(self.raw.get(name), kv)
        return dict(self.raw)

    def grow_blocks(self, new: KV) -> KV:
        """Put newly finished blocks behind the others; returns all of them."""
        self.blocks = joined(self.blocks, new)
        return self.blocks

    def grow_inputs(self, x: Tensor) -> Tensor:
        """Put the newest inputs behind the others; returns all of them."""
        self.x = x if self.x is None else torch.cat([self.x, x], dim=1)
        return self.x


def joined(old: KV | None, new: KV) -> KV:
    """The new keys and values behind the old ones, along the token axis."""
    if old is None:
        return new
    return KV(torch.cat([old.k, new.k], dim=2), torch.cat([old.v, new.v], dim=2))
