"""What every public function asks of its arguments, and how it says no.

Each message names the argument, the value it got and the rule it broke.
"""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require(ok: bool, argument: str, value: object, rule: str) -> None:
    """Raise a ValueError that names the argument, its value and the rule, unless `ok`."""
    if not ok:
        raise ValueError(f"{argument} = {value}: {rule}")


def require_int(argument: str, value: object, *, at_least: int) -> None:
    """Raise unless `value` is an int (not a bool) of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} = {value!r}: must be an int, got {type(value).__name__}")
    require(value >= at_least, argument, value, f"must be at least {at_least}")


def require_float_tensor(argument: str, value: object, dims: str) -> None:
    """Raise unless `value` is a floating-point tensor with one dimension per word of `dims`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: must be a torch.Tensor ({dims}), got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{argument}.dtype = {value.dtype}: must be a floating-point type")
    names = dims.split(", ")
    require(value.dim() == len(names), f"{argument}.shape", tuple(value.shape), f"must be ({dims})")


def require_alike(argument: str, value: Tensor, like: str, other: Tensor) -> None:
    """Raise unless two tensors have the same dtype and device."""
    if value.dtype != other.dtype:
        raise TypeError(f"{argument}.dtype = {value.dtype}: must be {like}.dtype = {other.dtype}")
    require(
        value.device == other.device,
        f"{argument}.device",
        value.device,
        f"must be {like}.device = {other.device}",
    )


def require_queries_and_keys(q: Tensor, k: Tensor) -> None:
    """Raise unless q is (B, H, T, D) and k is (B, G, S, D), alike, with T >= 1 and H % G == 0."""
    require_float_tensor("q", q, "B, H, T, D")
    require_float_tensor("k", k, "B, G, S, D")
    require_alike("k", k, "q", q)
    require(
        min(q.shape) >= 1,
        "q.shape",
        tuple(q.shape),
        "must hold at least one query, and no axis may be empty",
    )
    require(k.shape[0] == q.shape[0], "k.shape", tuple(k.shape), f"batch must be q's, {q.shape[0]}")
    require(k.shape[3] == q.shape[3], "k.shape", tuple(k.shape), f"width must be q's, {q.shape[3]}")
    heads, groups = q.shape[1], k.shape[1]
    require(
        groups >= 1 and heads % groups == 0,
        "q.shape",
        tuple(q.shape),
        f"query heads ({heads}) must be a multiple of k's heads ({groups})",
    )


def require_attention_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless q (B, H, T, D), k (B, G, S, D) and v (B, G, S, Dv) fit together."""
    require_queries_and_keys(q, k)
    require_float_tensor("v", v, "B, G, S, Dv")
    require_alike("v", v, "q", q)
    require(
        v.shape[:3] == k.shape[:3],
        "v.shape",
        tuple(v.shape),
        f"batch, heads and length must be k's, {tuple(k.shape[:3])}",
    )


def require_keys_for_every_query(q: Tensor, k: Tensor, start: int) -> None:
    """Raise unless the S keys reach the last query's position, start + T - 1."""
    require_int("start", start, at_least=0)
    last = start + q.shape[2]
    require(
        k.shape[2] >= last,
        "k.shape",
        tuple(k.shape),
        f"must hold at least start + T = {last} keys, one for each position up to the last query",
    )
