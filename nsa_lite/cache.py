"""What a layer keeps of the tokens it has read, so that the next ones need not read them again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nsa_lite.attention import KV
from nsa_lite.checks import require


class Cache:
    """One layer's keys and values so far; empty at first, and each call of the layer grows it.

    raw: each branch's KV by name, (B, G, S, width); blocks: phi's finished blocks (B, G, N, width);
    x (B, S, C): the layer's inputs, kept only where a rule for choosing blocks may read them.
    A call that fails leaves it as it was.
    """

    def __init__(self) -> None:
        self.raw: dict[str, KV] = {}
        self.blocks: KV | None = None
        self.x: Tensor | None = None
        self.owner: int | None = None  # id of the layer that fills it

    def __getstate__(self) -> dict:
        """What a copy or a file of the cache has: a layer's id would mean nothing there."""
        return vars(self) | {"owner": None}

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

    def require_whole(self, layer: nn.Module, batch: int, blocks: int, inputs: bool) -> None:
        """Raise unless `layer`, its owner from now on, filled all of it, for `batch` sequences.

        blocks: how many phi has finished of so many tokens; inputs: whether a rule reads x.
        """
        mine = self.owner in (None, id(layer))
        require(mine, "cache", type(self).__name__, "another layer fills it; each has its own")
        self.owner = id(layer)
        length = self.length
        for name, kv in self.raw.items():
            require_rows(f"cache.raw[{name!r}]", kv, batch, length, "tokens")
        held = 0 if self.blocks is None else blocks
        require(held == blocks, "cache.blocks", None, "must hold {} blocks", blocks)
        if self.blocks is not None:
            require_rows("cache.blocks", self.blocks, batch, blocks, "blocks")
        if inputs and length:
            shape = None if self.x is None else tuple(self.x.shape)
            rule = "must hold (B, S) = {}: a rule for choosing blocks may read all inputs"
            fits = shape is not None and shape[:2] == (batch, length)
            require(fits, "cache.x.shape", shape, rule, (batch, length))

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


def require_rows(argument: str, kv: KV, batch: int, count: int, what: str) -> None:
    """Raise unless k and v hold `count` rows for each of `batch` sequences."""
    for name, x in zip(("k", "v"), kv, strict=True):
        shape = tuple(x.shape)
        fits = x.shape[0] == batch
        require(fits, f"{argument}.{name}.shape", shape, "batch must be x's, {}", batch)
        rule = f"must hold {{}} {what}, as the rest of the cache does"
        require(x.shape[2] == count, f"{argument}.{name}.shape", shape, rule, count)


@contextmanager
def kept_on_error(caches: Sequence[Cache | None]) -> Iterator[None]:
    """Put caches back to what they were if what is done with them fails."""
    given = [cache for cache in caches if cache is not None]
    before = [{**vars(cache), "raw": dict(cache.raw)} for cache in given]
    try:
        yield
    except BaseException:
        for cache, fields in zip(given, before, strict=True):
            vars(cache).update(fields)
        raise


def joined(old: KV | None, new: KV) -> KV:
    """The new keys and values behind the old ones, along the token axis."""
    if old is None:
        return new
    return KV(torch.cat([old.k, new.k], dim=2), torch.cat([old.v, new.v], dim=2))
