"""How long a sequence RoPE's base can tell apart."""

import math

from nsa_lite.checks import require, require_int
from nsa_lite.config import NSAConfig


def smallest_rope_base(length: int, head_dim: int, slow_pairs: int = 1) -> int:
    """The smallest RoPE base with which some pairs of channels tell `length` positions apart.

    Of h = D/2 pairs, pair c turns by base^(-c/h) a position. A pair that turns past half a turn
    makes far look near again, so the slowest pairs, from c = h - slow_pairs on, must not:
    T base^(-(h - slow_pairs) / h) <= pi, that is base >= (T / pi)^(h / (h - slow_pairs)).
    Errors: ValueError or TypeError that names the argument.
    """
    pairs = head_dim // 2
    require_int("length", length, at_least=1)
    require_int("slow_pairs", slow_pairs, at_least=1)
    rule = f"must be below head_dim / 2 = {pairs}: pair 0 turns by 1 a position, whatever the base"
    require(slow_pairs < pairs, "slow_pairs", slow_pairs, rule)
    return math.ceil(max(1.0, length / math.pi) ** (pairs / (pairs - slow_pairs)))


def require_rope_reaches(config: NSAConfig, length: int) -> None:
    """Raise a ValueError unless RoPE's slowest pair stays within half a turn over `length`."""
    base = smallest_rope_base(length, config.head_dim)
    rule = (
        f"over {length} positions all {config.head_dim // 2} pairs of channels turn past half a "
        f"turn, so far looks near; at least {base} is needed, and more leaves more pairs slow"
    )
    require(config.rope_theta >= base, "rope_theta", config.rope_theta, rule)
