"""What attention costs: tokens read, floating-point operations and bytes, counted, not timed."""

from dataclasses import dataclass

from nsa_lite.blocks import num_compressed
from nsa_lite.checks import require, require_int, require_positive
from nsa_lite.config import NSAConfig, require_config

KINDS = ("nsa", "dense", "window")


@dataclass(frozen=True)
class Cost:
    """One query, or one sequence: keys read by branch (per group), FLOPs, bytes of K/V read."""

    tokens: dict[str, float]
    flops: float
    bytes: float

    @property
    def total_tokens(self) -> float:
        """Keys read by all branches together."""
        return sum(self.tokens.values())


def paper_tokens(config: NSAConfig, length: int) -> int:
    """Tokens NSA loads to decode one token after `length`: T/d + n l' + w (Table 4)."""
    require_config(config)
    require_int("length", length, at_least=1)
    return length // config.stride + config.num_selected * config.select_block_size + config.window


def tokens_read(config: NSAConfig, position: int, kind: str = "nsa") -> dict[str, int]:
    """Keys that the query at `position` reads in each branch, ragged ends counted exactly."""
    require_config(config)
    require_int("position", position, at_least=0)
    require(kind in KINDS, "kind", repr(kind), f"must be one of {KINDS}")
    seen = position + 1
    if kind == "dense":
        return {"dense": seen}
    if kind == "window":
        return {"window": min(config.window, seen)}
    own_block = position % config.select_block_size + 1  # tokens of its own block it may read
    others = min(config.num_selected - 1, position // config.select_block_size)
    return {
        "compressed": num_compressed(seen, config.block_size, config.stride),
        "selected": own_block + others * config.select_block_size,
        "window": min(config.window, seen),
    }


def query_cost(
    config: NSAConfig, position: int, kind: str = "nsa", bytes_per_number: int = 2
) -> Cost:
    """The attention of one query, all heads: what decoding one token costs.

    FLOPs: 2 D for each score, 2 Dv for each value, in every head; NSA's scores for the choice
    are the compressed branch's, so they are not counted twice. Bytes: each key and value once
    for a group, since its heads share them. Projections, phi and gates are left out.
    """
    require_positive("bytes_per_number", bytes_per_number)
    tokens = {name: float(count) for name, count in tokens_read(config, position, kind).items()}
    read = sum(tokens.values())
    width = config.head_dim + config.value_dim
    return Cost(
        tokens,
        flops=2 * width * config.heads * read,
        bytes=bytes_per_number * width * config.kv_heads * read,
    )


def sequence_cost(
    config: NSAConfig,
    length: int,
    kind: str = "nsa",
    *,
    training: bool = False,
    bytes_per_number: int = 2,
) -> Cost:
    """The attention of all T queries of a sequence; bytes as if no two queries shared a load.

    training adds the backward: five matrix products where the forward has two, so 3.5 times the
    FLOPs in all, and K and V read once more (as in FlashAttention-2, section 3.1).
    """
    require_config(config)
    require_int("length", length, at_least=1)
    costs = [query_cost(config, t, kind, bytes_per_number) for t in range(length)]
    tokens = {name: sum(c.tokens[name] for c in costs) for name in costs[0].tokens}
    return Cost(
        tokens,
        flops=sum(c.flops for c in costs) * (3.5 if training else 1.0),
        bytes=sum(c.bytes for c in costs) * (2.0 if training else 1.0),
    )


def compression_flops(config: NSAConfig, length: int) -> int:
    """phi's two matrix products for the keys and values of every group and block."""
    require_config(config)
    require_int("length", length, at_least=1)
    blocks = num_compressed(length, config.block_size, config.stride)

    def phi(width: int) -> int:
        return 2 * (config.block_size * width * 2 * width + 2 * width * width)

    return blocks * config.kv_heads * (phi(config.head_dim) + phi(config.value_dim))


def cache_bytes(
    config: NSAConfig, length: int, kind: str = "nsa", bytes_per_number: int = 2
) -> int:
    """The K/V cache of one layer after `length` tokens; a window keeps only its last w keys.

    NSA keeps raw keys and values for selection, the last w for the window (none of its own with
    share_window), the compressed ones, and the last l raw ones that phi still needs. This is what
    must be kept at least; a Cache keeps all raw ones, so that it can be cut (Cache.memory).
    """
    require_config(config)
    require_int("length", length, at_least=1)
    require(kind in KINDS, "kind", repr(kind), f"must be one of {KINDS}")
    require_positive("bytes_per_number", bytes_per_number)
    window = min(config.window, length)
    kept = {"dense": length, "window": window}.get(kind)
    if kept is None:
        compressed = num_compressed(length, config.block_size, config.stride)
        own_window = 0 if config.share_window else window
        kept = length + own_window + compressed + min(config.block_size, length)
    return bytes_per_number * kept * config.kv_heads * (config.head_dim + config.value_dim)
