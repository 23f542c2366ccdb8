"""What every public function asks of its arguments, and how it says no.

Each message names the argument, the value it got and the rule it broke. The kernels ask the same
in the same words (kernels/checks.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from nsa_lite.blocks import num_compressed, num_select_blocks

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.int32, torch.int64)
MOST = 2**53  # above it a float, which weighs and divides sizes, leaves whole numbers out
Pair = tuple[Tensor, Tensor]  # one branch's keys and values


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


def named(value: object) -> str:
    """What was given in place of something else: its type, or its name if it is a class."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return type(value).__name__


def require_instance(argument: str, value: object, kind: type | tuple, what: str) -> None:
    """Raise unless `value` is of this kind; `what` says in words what that is."""
    if not isinstance(value, kind):
        raise TypeError(f"{argument}: must be {what}, got {named(value)}")


def require_rule(choose: object) -> None:
    """Raise unless `choose` is None or can be asked: a function or a module, but no class."""
    if isinstance(choose, type) or not (choose is None or callable(choose)):
        what = "a function or a module that is made already"
        raise TypeError(f"choose: must be {what}, got {named(choose)}")


def require_int(argument: str, value: object, *, at_least: int) -> None:
    """Raise unless `value` is an int (not a bool) of at least `at_least`, and no absurd one.

    A size that torch.export leaves open is an int too.
    """
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{argument} = {value!r}: must be an int, got {type(value).__name__}")
    require(value >= at_least, argument, value, f"must be at least {at_least}")
    if not torch.compiler.is_compiling():  # there it would be one more condition on a size
        require(value <= MOST, argument, value, f"must be at most {MOST}")


def require_number(argument: str, value: object) -> None:
    """Raise unless `value` is an int or a float (not a bool)."""
    numbers = int | float | torch.SymInt | torch.SymFloat
    if isinstance(value, bool) or not isinstance(value, numbers):
        raise TypeError(f"{argument} = {value!r}: must be a number, got {type(value).__name__}")


def require_positive(argument: str, value: float) -> None:
    """Raise unless `value` is a number above 0 that float32 can hold with room to spare."""
    require_number(argument, value)
    require(0 < value <= 1e38, argument, value, "must be positive and at most 1e38")


def require_scale(scale: float | None) -> None:
    """Raise unless `scale` is None or a positive number."""
    if scale is not None:
        require_positive("scale", scale)


def require_floats(argument: str, value: Tensor, dims: str) -> None:
    """Raise unless `value` is a plain floating-point tensor; `dims` says of which shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: must be a torch.Tensor ({dims}), got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{argument}.dtype = {value.dtype}: must be a floating-point type")
    dense = value.layout == torch.strided
    require(dense, f"{argument}.layout", value.layout, "must be torch.strided")


def require_float_tensor(argument: str, value: Tensor, dims: str) -> None:
    """Raise unless `value` is a floating-point tensor with one dimension per word of `dims`."""
    require_floats(argument, value, dims)
    names = dims.split(", ")
    require(value.dim() == len(names), f"{argument}.shape", tuple(value.shape), f"must be ({dims})")


def require_int_tensor(argument: str, value: object, dims: str) -> None:
    """Raise unless `value` is a tensor of int32 or int64; `dims` says of which shape."""
    if not isinstance(value, Tensor) or value.dtype not in INTS:
        got = getattr(value, "dtype", named(value))
        raise TypeError(f"{argument}: must be an int32 or int64 tensor {dims}, got {got}")


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
    shape = tuple(v.shape)
    rule = f"batch, heads and length must be {k_name}'s, {{}}"
    require(shape[:3] == expected, f"{v_name}.shape", shape, rule, expected)
    require(shape[3] >= 1, f"{v_name}.shape", shape, "width must be at least 1")


def require_pair(q: Tensor, pair: Pair, name: str) -> None:
    """Raise unless `pair` is keys (B, G, S, D) and values (B, G, S, Dv) that fit q."""
    require_instance(name, pair, (tuple, list), "a pair (k, v) of tensors")
    require(len(pair) == 2, f"len({name})", len(pair), "must be 2: a pair (k, v) of tensors")
    require_attention_inputs(q, *pair, names=(f"{name}[0]", f"{name}[1]"))


def require_pair_like(name: str, pair: Pair, like: str, other: Pair) -> None:
    """Raise unless two branches have the same heads and the same width of values."""
    k, v = pair
    expected = (other[0].shape[1], other[1].shape[3])
    fits = (k.shape[1], v.shape[3]) == expected
    rule = f"heads and value width must be those of {like}, {{}}"
    require(fits, f"{name}[1].shape", tuple(v.shape), rule, expected)


def require_keys_for_every_query(q: Tensor, k: Tensor, start: int, name: str = "k") -> None:
    """Raise unless the S keys reach the last query's position, start + T - 1."""
    require_int("start", start, at_least=0)
    last = start + q.shape[2]
    rule = "must hold at least start + T = {} keys, one for each position up to the last query"
    require(k.shape[2] >= last, f"{name}.shape", tuple(k.shape), rule, last)


def require_every_block(
    q: Tensor, k: Tensor, block_size: int, stride: int, start: int, name: str = "k"
) -> None:
    """Raise unless k holds each compressed block that the last query sees.

    Not in a graph: the number of blocks would be one more condition on an open length.
    """
    if not torch.compiler.is_compiling():
        blocks = num_compressed(start + q.shape[2], block_size, stride)
        rule = "must hold the {} blocks that the last query sees"
        require(k.shape[2] >= blocks, f"{name}.shape", tuple(k.shape), rule, blocks)


def require_compression(block_size: int, stride: int) -> None:
    """Raise unless d divides l."""
    require_int("block_size", block_size, at_least=1)
    require_int("stride", stride, at_least=1)
    require(block_size % stride == 0, "stride", stride, f"must divide block_size = {block_size}")


def require_geometry(block_size: int, stride: int, select_block_size: int) -> None:
    """Raise unless d divides l and l', and l <= l' (the paper's conditions on Eq. 9)."""
    require_compression(block_size, stride)
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
    """Raise unless lse is (B, H, T) on q's device, float32, or float64 as q is."""
    require_float_tensor("lse", lse, "B, H, T")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if lse.dtype != dtype:
        raise TypeError(f"lse.dtype = {lse.dtype}: must be {dtype} where q.dtype = {q.dtype}")
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
    scale: float | None,
    start: int,
) -> None:
    """Raise unless these can score blocks: compressed keys and their branch's lse, and sizes."""
    require_queries_and_keys(q, k)
    require_geometry(block_size, stride, select_block_size)
    require_scale(scale)
    require_int("start", start, at_least=0)
    require_every_block(q, k, block_size, stride, start)
    require_lse(lse, q)


def require_score(score: Tensor, select_block_size: int, start: int) -> None:
    """Raise unless score holds one number for each block that the tokens up to the last touch."""
    require_float_tensor("score", score, "B, G, T, blocks")
    shape = tuple(score.shape)
    empty = "must hold at least one query, and no axis may be empty"
    require(min(shape[:3]) >= 1, "score.shape", shape, empty)
    last = start + shape[2]
    blocks = num_select_blocks(last, select_block_size)
    rule = "{} tokens lie in {} blocks of {}"
    require(shape[3] == blocks, "score.shape", shape, rule, last, blocks, select_block_size)


def require_ids(ids: Tensor, q: Tensor, k: Tensor, select_block_size: int, start: int) -> None:
    """Raise unless ids is int (B, G, T, n) on q's device and names blocks, none twice in a row.

    The numbers are looked at only where they are readable.
    """
    require_int_tensor("ids", ids, "(B, G, T, n)")
    expected = (k.shape[0], k.shape[1], q.shape[2])
    fits = ids.dim() == 4 and ids.shape[:3] == expected
    rule = "must be (B, G, T, n) with (B, G, T) = {}"
    require(fits, "ids.shape", tuple(ids.shape), rule, expected)
    some = "must name at least one block a query, -1 for none"
    require(ids.shape[3] >= 1, "ids.shape", tuple(ids.shape), some)
    require(ids.device == q.device, "ids.device", ids.device, f"must be q.device = {q.device}")
    last = num_select_blocks(start + q.shape[2], select_block_size) - 1
    require_range("ids", ids, -1, last, "must lie in -1 .. {}, the blocks of this sequence")
    if readable(ids):
        ordered = ids.sort(dim=-1).values
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        rule = "a query's ids must differ from one another, but for -1"
        require(not twice.any(), "ids", ids[twice.any(-1)][:1].tolist(), rule)


def require_rotation(x: Tensor, positions: Tensor) -> None:
    """Raise unless x (.., T, D) has pairs of channels, and each of its tokens a position."""
    require_floats("x", x, ".., T, D")
    require(x.dim() >= 2, "x.shape", tuple(x.shape), "must be (.., T, D)")
    require(x.shape[-1] % 2 == 0, "x.shape", tuple(x.shape), "the last axis must be even")
    require_int_tensor("positions", positions, "(T,) or (B, T)")
    shape = tuple(positions.shape)
    own = x.dim() == 4 and shape == (x.shape[0], x.shape[2])
    fits = own or shape == (x.shape[-2],)
    require(fits, "positions.shape", shape, "must be (T,) or (B, T), one for each token")
    here = positions.device == x.device
    require(here, "positions.device", positions.device, f"must be x.device = {x.device}")


def require_gates(gates: Tensor, q: Tensor, name: str = "q") -> None:
    """Raise unless gates is a float (B, H, T, 3) beside q (B, H, T, width), called `name`."""
    require_float_tensor("gates", gates, "B, H, T, 3")
    expected = (*q.shape[:3], 3)
    rule = "must be {}: one gate for each branch and head"
    require(gates.shape == expected, "gates.shape", tuple(gates.shape), rule, expected)
    here = gates.device == q.device
    require(here, "gates.device", gates.device, "must be {}.device = {}", name, q.device)


def require_outputs(outputs: Sequence[Tensor]) -> None:
    """Raise unless these are three tensors (B, H, T, Dv), one a branch, all alike."""
    require_instance("outputs", outputs, (tuple, list), "three tensors, one a branch")
    rule = "must be 3, one output a branch"
    require(len(outputs) == 3, "len(outputs)", len(outputs), rule)
    for i, x in enumerate(outputs):
        require_float_tensor(f"outputs[{i}]", x, "B, H, T, Dv")
        require_alike(f"outputs[{i}]", x, "outputs[0]", outputs[0])
        expected = tuple(outputs[0].shape)
        shape = tuple(x.shape)
        require(
            shape == expected, f"outputs[{i}].shape", shape, "must be outputs[0]'s, {}", expected
        )
        require(min(shape) >= 1, f"outputs[{i}].shape", shape, "no axis may be empty")
