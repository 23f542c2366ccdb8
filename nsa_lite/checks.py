"""What every public function asks of its arguments, and how it says no.

Each message names the argument, the value it got and the rule it broke. The kernels ask the same
in the same words (kernels/checks.py).
"""

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from nsa_lite.blocks import num_select_blocks

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def autocasts(device_type: str) -> bool:
    """Whether torch.autocast is on for a type of device; "meta" has none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def readable(x: Tensor) -> bool:
    """Whether a check may look at x's numbers: it may not where there are none yet.

    Those of a graph that is compiled, exported or captured come later; a tensor on meta, a fake
    one and one under vmap have none.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type == "meta":
        return False
    if is_functorch_wrapped_tensor(x):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def require_range(argument: str, values: Tensor, low: int, high: int, rule: str) -> None:
    """Raise if a number lies outside low .. high, the rule's {}, where numbers are readable."""
    if values.numel() and readable(values):
        lowest = int(values.min())
        highest = int(values.max())
        inside = lowest >= low and highest <= high
        require(inside, argument, f"{lowest} .. {highest}", rule, high)


def require(ok: bool, argument: str, value: object, rule: str, *sizes: object) -> None:
    """Raise a ValueError that names the argument, its value and the rule, unless `ok`.

    Each {} of the rule stands for one of `sizes`. A size is written out only when the rule is
    broken: torch.compile takes a size that is written into a string for a constant.
    """
    if not ok:
        raise ValueError(f"{argument} = {value}: {rule.format(*sizes) if sizes else rule}")


def require_int(argument: str, value: object, *, at_least: int) -> None:
    """Raise unless `value` is an int (not a bool) of at least `at_least`.

    A size that torch.export leaves open is an int too.
    """
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
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
    same = value.device == other.device
    require(same, f"{argument}.device", value.device, f"must be {like}.device = {other.device}")


def require_queries_and_keys(q: Tensor, k: Tensor, name: str = "k") -> None:
    """Raise unless q is (B, H, T, D) and k is (B, G, S, D), alike, with T >= 1 and H % G == 0.

    `name` is what the caller calls k.
    """
    require_float_tensor("q", q, "B, H, T, D")
    require_float_tensor(name, k, "B, G, S, D")
    require_alike(name, k, "q", q)
    empty = "must hold at least one query, and no axis may be empty"
    require(min(q.shape) >= 1, "q.shape", tuple(q.shape), empty)
    shape = tuple(k.shape)
    require(k.shape[0] == q.shape[0], f"{name}.shape", shape, "batch must be q's, {}", q.shape[0])
    require(k.shape[3] == q.shape[3], f"{name}.shape", shape, "width must be q's, {}", q.shape[3])
    heads, groups = q.shape[1], k.shape[1]
    rule = f"query heads ({{}}) must be a multiple of {name}'s heads ({{}})"
    fits = groups >= 1 and heads % groups == 0
    require(fits, "q.shape", tuple(q.shape), rule, heads, groups)


def require_attention_inputs(
    q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str] = ("k", "v")
) -> None:
    """Raise unless q (B, H, T, D), k (B, G, S, D) and v (B, G, S, Dv) fit together.

    `names` are what the caller calls k and v.
    """
    k_name, v_name = names
    require_queries_and_keys(q, k, k_name)
    require_float_tensor(v_name, v, "B, G, S, Dv")
    require_alike(v_name, v, "q", q)
    expected = tuple(k.shape[:3])
    rule = f"batch, heads and length must be {k_name}'s, {{}}"
    require(v.shape[:3] == expected, f"{v_name}.shape", tuple(v.shape), rule, expected)


def require_keys_for_every_query(q: Tensor, k: Tensor, start: int, name: str = "k") -> None:
    """Raise unless the S keys reach the last query's position, start + T - 1."""
    require_int("start", start, at_least=0)
    last = start + q.shape[2]
    rule = "must hold at least start + T = {} keys, one for each position up to the last query"
    require(k.shape[2] >= last, f"{name}.shape", tuple(k.shape), rule, last)


def require_geometry(block_size: int, stride: int, select_block_size: int | None = None) -> None:
    """Raise unless d divides l and l', and l <= l' (the paper's conditions on Eq. 9)."""
    require_int("block_size", block_size, at_least=1)
    require_int("stride", stride, at_least=1)
    require(block_size % stride == 0, "stride", stride, f"must divide block_size = {block_size}")
    if select_block_size is None:
        return
    require_int("select_block_size", select_block_size, at_least=1)
    whole = select_block_size % stride == 0
    rule = f"must be a multiple of stride = {stride}"
    require(whole, "select_block_size", select_block_size, rule)
    rule = f"must not exceed select_block_size = {select_block_size}"
    require(block_size <= select_block_size, "block_size", block_size, rule)


def require_counts(num_selected: int, num_initial: int, num_local: int) -> None:
    """Raise unless the forced blocks fit inside the n selected ones."""
    require_int("num_selected", num_selected, at_least=1)
    require_int("num_initial", num_initial, at_least=0)
    require_int("num_local", num_local, at_least=0)
    forced = num_initial + num_local
    rule = f"must be at least num_initial + num_local = {forced}"
    require(num_selected >= forced, "num_selected", num_selected, rule)


def require_lse(lse: Tensor, q: Tensor) -> None:
    """Raise unless lse is a float (B, H, T) on q's device."""
    require_float_tensor("lse", lse, "B, H, T")
    expected = tuple(q.shape[:3])
    fits = lse.shape == expected
    require(fits, "lse.shape", tuple(lse.shape), "must be (B, H, T) = {}", expected)
    require(lse.device == q.device, "lse.device", lse.device, f"must be q.device = {q.device}")


def require_scoring(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_size: int,
    stride: int,
    select_block_size: int,
    start: int,
) -> None:
    """Raise unless these can score blocks: compressed keys and their branch's lse, and sizes."""
    require_queries_and_keys(q, k)
    require_geometry(block_size, stride, select_block_size)
    require_int("start", start, at_least=0)
    require_lse(lse, q)


def require_score(score: Tensor, select_block_size: int, start: int) -> None:
    """Raise unless score holds one number for each block that the tokens up to the last touch."""
    require_float_tensor("score", score, "B, G, T, blocks")
    shape = tuple(score.shape)
    require(shape[2] >= 1, "score.shape", shape, "must hold at least one query")
    last = start + shape[2]
    blocks = num_select_blocks(last, select_block_size)
    rule = "{} tokens lie in {} blocks of {}"
    require(shape[3] == blocks, "score.shape", shape, rule, last, blocks, select_block_size)


def require_ids(ids: Tensor, q: Tensor, k: Tensor, select_block_size: int, start: int) -> None:
    """Raise unless ids is int (B, G, T, n) on q's device and names blocks, none twice in a row.

    The numbers are looked at only where they are readable.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        got = getattr(ids, "dtype", type(ids).__name__)
        raise TypeError(f"ids: must be an int32 or int64 tensor (B, G, T, n), got {got}")
    expected = (k.shape[0], k.shape[1], q.shape[2])
    fits = ids.dim() == 4 and ids.shape[:3] == expected
    rule = "must be (B, G, T, n) with (B, G, T) = {}"
    require(fits, "ids.shape", tuple(ids.shape), rule, expected)
    require(ids.device == q.device, "ids.device", ids.device, f"must be q.device = {q.device}")
    last = num_select_blocks(start + q.shape[2], select_block_size) - 1
    require_range("ids", ids, -1, last, "must lie in -1 .. {}, the blocks of this sequence")
    if readable(ids):
        ordered = ids.sort(dim=-1).values
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        rule = "a query's ids must differ from one another, but for -1"
        require(not twice.any(), "ids", ids[twice.any(-1)][:1].tolist(), rule)


def require_gates(gates: Tensor, q: Tensor) -> None:
    """Raise unless gates is a float (B, H, T, 3) for the queries q (B, H, T, D)."""
    require_float_tensor("gates", gates, "B, H, T, 3")
    expected = (*q.shape[:3], 3)
    rule = "must be {}: one gate for each branch and head"
    require(gates.shape == expected, "gates.shape", tuple(gates.shape), rule, expected)
