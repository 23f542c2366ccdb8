"""What the kernels ask of their arguments; a message names the argument, its value and the rule.

Where nsa_lite has the same rule, it says so in the same words.
"""

import os
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from kernels.operations import watched
from kernels.tile_sizes import HALF, blocks_in_a_tile, tile_for, widths_of

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.int32, torch.int64)
MOST = 2**53  # above it a float, which weighs and divides sizes, leaves whole numbers out
MOST_HEADS = 64  # of a group: one tile holds a token's rows
MOST_WIDTH = 256  # of a head's row, and
MOST_BLOCK = 256  # tokens of a selected block, which a tile holds whole
MOST_BLOCKS = 64  # that a query reads: they are compared with one another
MOST_NEW = 8  # tokens of a sequence in one decoding step
Pair = tuple[Tensor, Tensor]  # one branch's keys and values


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


def check_instance(argument: str, value: object, kind: type | tuple, what: str) -> None:
    """Raise unless value is of this kind; `what` says in words what that is."""
    if not isinstance(value, kind):
        raise TypeError(f"{argument}: must be {what}, got {named(value)}")


def check_rule(choose: object) -> None:
    """Raise unless choose is None or can be asked: a function or a module, but no class."""
    if isinstance(choose, type) or not (choose is None or callable(choose)):
        what = "a function or a module that is made already"
        raise TypeError(f"choose: must be {what}, got {named(choose)}")


def check_int(argument: str, value: object, *, at_least: int) -> None:
    """Raise unless value is an int (not a bool) of at least `at_least`, and no absurd one.

    A size that torch.export leaves open is an int too.
    """
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{argument} = {value!r}: must be an int, got {type(value).__name__}")
    require(value >= at_least, argument, value, f"must be at least {at_least}")
    if not torch.compiler.is_compiling():  # there it would be one more condition on a size
        require(value <= MOST, argument, value, f"must be at most {MOST}")


def check_positive(argument: str, value: float) -> None:
    """Raise unless value is a number (not a bool) above 0 that float32 holds with room to spare."""
    numbers = int | float | torch.SymInt | torch.SymFloat
    if isinstance(value, bool) or not isinstance(value, numbers):
        raise TypeError(f"{argument} = {value!r}: must be a number, got {type(value).__name__}")
    require(0 < value <= 1e38, argument, value, "must be positive and at most 1e38")


def check_float_tensor(argument: str, value: object, dims: str) -> None:
    """Raise unless value is a floating-point tensor with one dimension per word of `dims`.

    The kernels know its gradient, but no tangent: it may have none.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: must be a torch.Tensor ({dims}), got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{argument}.dtype = {value.dtype}: must be a floating-point type")
    dense = value.layout == torch.strided
    require(dense, f"{argument}.layout", value.layout, "must be torch.strided")
    shape = tuple(value.shape)
    require(len(shape) == len(dims.split(", ")), f"{argument}.shape", shape, f"must be ({dims})")
    if not torch.compiler.is_compiling() and unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{argument}: the kernels have no derivative in forward mode; nsa_lite has one"
        )


def check_int_tensor(argument: str, value: object, dims: str) -> None:
    """Raise unless value is a tensor of int32 or int64; `dims` says of which shape."""
    if not isinstance(value, Tensor) or value.dtype not in INTS:
        got = getattr(value, "dtype", named(value))
        raise TypeError(f"{argument}: must be an int32 or int64 tensor {dims}, got {got}")


def check_alike(argument: str, value: Tensor, like: str, other: Tensor) -> None:
    """Raise unless two tensors have the same dtype and device."""
    if value.dtype != other.dtype:
        raise TypeError(f"{argument}.dtype = {value.dtype}: must be {like}.dtype = {other.dtype}")
    same = value.device == other.device
    rule = f"must be {like}.device = {other.device}"
    require(same, f"{argument}.device", value.device, rule)


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor | None = None, names: tuple[str, str] = ("k", "v")
) -> None:
    """Raise unless q (B, H, T, D), k (B, G, S, D) and v (B, G, S, Dv) fit together and run here.

    `names` are what the caller calls k and v.
    """
    k_name, v_name = names
    check_queries_and_keys(q, k, k_name)
    if v is not None:
        check_float_tensor(v_name, v, "B, G, S, Dv")
        check_alike(v_name, v, "q", q)
        expected = tuple(k.shape[:3])
        rule = f"batch, heads and length must be {k_name}'s, {{}}"
        require(v.shape[:3] == expected, f"{v_name}.shape", tuple(v.shape), rule, expected)
    check_runs_here("q", q)
    check_fits_a_tile(q, k_name, k)
    if v is not None:
        check_width(v_name, v)


def check_pair(q: Tensor, pair: Pair, name: str) -> None:
    """Raise unless pair is keys (B, G, S, D) and values (B, G, S, Dv) that fit q and run here."""
    check_instance(name, pair, (tuple, list), "a pair (k, v) of tensors")
    require(len(pair) == 2, f"len({name})", len(pair), "must be 2: a pair (k, v) of tensors")
    check_inputs(q, *pair, names=(f"{name}[0]", f"{name}[1]"))


def check_pair_like(name: str, pair: Pair, like: str, other: Pair) -> None:
    """Raise unless two branches have the same heads and value width, as programs read them."""
    k, v = pair
    expected = (other[0].shape[1], other[1].shape[3])
    fits = (k.shape[1], v.shape[3]) == expected
    rule = f"heads and value width must be those of {like}, {{}}"
    require(fits, f"{name}[1].shape", tuple(v.shape), rule, expected)


def check_queries_and_keys(q: Tensor, k: Tensor, k_name: str) -> None:
    """Raise unless q is (B, H, T, D) and k is (B, G, S, D), alike, with T >= 1 and H % G == 0."""
    check_float_tensor("q", q, "B, H, T, D")
    check_float_tensor(k_name, k, "B, G, S, D")
    check_alike(k_name, k, "q", q)
    q_shape = tuple(q.shape)
    k_shape = tuple(k.shape)
    rule = "must hold at least one query, and no axis may be empty"
    require(min(q_shape) >= 1, "q.shape", q_shape, rule)
    for axis, name in ((0, "batch"), (3, "width")):
        rule = f"{name} must be q's, {{}}"
        require(k_shape[axis] == q_shape[axis], f"{k_name}.shape", k_shape, rule, q_shape[axis])
    heads = q_shape[1]
    groups = k_shape[1]
    rule = f"query heads ({{}}) must be a multiple of {k_name}'s heads ({{}})"
    require(groups >= 1 and heads % groups == 0, "q.shape", q_shape, rule, heads, groups)


def why_not(
    device: torch.device,
    dtype: torch.dtype,
    group_size: int,
    head_dim: int,
    value_dim: int,
    select_block_size: int,
    stride: int,
    num_selected: int,
) -> str | None:
    """Why the kernels cannot run on such tensors and sizes, or None if they can."""
    widest = max(head_dim, value_dim)
    reasons = {
        f"{dtype}: the kernels take float16, bfloat16 and float32": dtype == torch.float64,
        f"{group_size} heads a group: they take {MOST_HEADS}": group_size > MOST_HEADS,
        f"widths {head_dim} and {value_dim}: they take {MOST_WIDTH}": widest > MOST_WIDTH,
        f"blocks of {select_block_size}: they take {MOST_BLOCK}": select_block_size > MOST_BLOCK,
        f"{num_selected} blocks a query: they take {MOST_BLOCKS}": num_selected > MOST_BLOCKS,
        f"{device}: they take CUDA devices": device.type != "cuda",
        f"{device}: there is none here": not torch.cuda.is_available(),  # as for a FakeTensor's
    }
    for reason, holds in reasons.items():
        if holds:
            return reason
    if torch.cuda.get_device_properties(device).major < 8:
        return f"{device}: they take CUDA devices from compute capability 8.0 on"
    if torch.compiler.is_compiling():
        return None  # while it traces, torch.compile can only compare
    widths = head_dim, value_dim
    return why_no_tile_fits(device, dtype, group_size, *widths, select_block_size, stride)


@cache
def why_no_tile_fits(
    device: torch.device,
    dtype: torch.dtype,
    group_size: int,
    head_dim: int,
    value_dim: int,
    select_block_size: int,
    stride: int,
) -> str | None:
    """What the host says of tiles too large for the device's fast memory, or too small a block."""
    q = torch.empty(1, group_size, 1, head_dim, dtype=dtype, device=device)
    widths = widths_of(q, q[:, :1], q.new_empty(1, 1, 1, value_dim))
    try:
        for kernel in HALF:
            block = select_block_size if kernel.startswith("selected") else None
            window = 1 if kernel.endswith("_window") else None
            tile = tile_for(kernel.removesuffix("_window"), widths, q, window=window, block=block)
            if kernel in ("block_scores", "decode"):
                blocks_in_a_tile(tile.BLOCK_N, select_block_size, stride)
    except ValueError as error:
        return str(error)
    return None


def check_runs_here(argument: str, x: Tensor) -> None:
    """Raise unless the kernels run on x's device and with its type."""
    if x.dtype == torch.float64:
        raise TypeError(
            f"{argument}.dtype = {x.dtype}: the kernels take float16, bfloat16 and float32; "
            "nsa_lite takes float64"
        )
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    rule = "compiled kernels read CUDA tensors; nsa_lite takes CPU tensors"
    require(interpreted or x.device.type == "cuda", f"{argument}.device", x.device, rule)
    rule = "Triton's interpreter computes bfloat16 wrongly; use float32 or float16 on a CPU"
    bad = interpreted and x.dtype == torch.bfloat16
    require(not bad, f"{argument}.dtype", x.dtype, rule)


def check_fits_a_tile(q: Tensor, k_name: str, k: Tensor) -> None:
    """Raise unless a group's heads and the rows' width fit into a tile."""
    heads = q.shape[1]
    groups = k.shape[1]
    rule = f"heads ({{}}) must be 1 to {MOST_HEADS} times {k_name}'s heads ({{}})"
    require(heads // groups <= MOST_HEADS, "q.shape", tuple(q.shape), rule, heads, groups)
    check_width("q", q)


def check_width(argument: str, x: Tensor) -> None:
    """Raise unless a row of x fits into a tile."""
    shape = tuple(x.shape)
    require(shape[3] >= 1, f"{argument}.shape", shape, "width must be at least 1")
    rule = f"width must be 1 to {MOST_WIDTH}"
    require(shape[3] <= MOST_WIDTH, f"{argument}.shape", shape, rule)


def check_start(start: int) -> None:
    """Raise unless start is the position of a first query."""
    check_int("start", start, at_least=0)


def check_keys_reach(q: Tensor, k: Tensor, start: int, name: str = "k") -> None:
    """Raise unless the S keys reach the last query's position, start + T - 1."""
    check_start(start)
    last = start + q.shape[2]
    rule = "must hold at least start + T = {} keys, one for each position up to the last query"
    require(k.shape[2] >= last, f"{name}.shape", tuple(k.shape), rule, last)


def check_every_block(
    q: Tensor, k: Tensor, block_size: int, stride: int, start: int, name: str = "k"
) -> None:
    """Raise unless k holds each compressed block that the last query sees.

    Not in a graph: the number of blocks would be one more condition on an open length.
    """
    if not torch.compiler.is_compiling():
        blocks = max(0, (start + q.shape[2] - block_size) // stride + 1)
        rule = "must hold the {} blocks that the last query sees"
        require(k.shape[2] >= blocks, f"{name}.shape", tuple(k.shape), rule, blocks)


def check_compression(block_size: int, stride: int) -> None:
    """Raise unless d divides l."""
    check_int("block_size", block_size, at_least=1)
    check_int("stride", stride, at_least=1)
    rule = f"must divide block_size = {block_size}"
    require(block_size % stride == 0, "stride", stride, rule)


def check_geometry(block_size: int, stride: int, select_block_size: int) -> None:
    """Raise unless d divides l and l', and l <= l'."""
    check_compression(block_size, stride)
    check_int("select_block_size", select_block_size, at_least=1)
    rule = f"must be a multiple of stride = {stride}"
    require(select_block_size % stride == 0, "select_block_size", select_block_size, rule)
    rule = f"must not exceed select_block_size = {select_block_size}"
    require(block_size <= select_block_size, "block_size", block_size, rule)


def check_select_block_size(select_block_size: int) -> None:
    """Raise unless a selected block fits into a tile."""
    check_int("select_block_size", select_block_size, at_least=1)
    rule = f"must be at most {MOST_BLOCK}"
    require(select_block_size <= MOST_BLOCK, "select_block_size", select_block_size, rule)


def check_counts(num_selected: int, num_initial: int, num_local: int) -> None:
    """Raise unless the forced blocks fit inside the n selected ones."""
    check_int("num_selected", num_selected, at_least=1)
    check_int("num_initial", num_initial, at_least=0)
    check_int("num_local", num_local, at_least=0)
    forced = num_initial + num_local
    rule = f"must be at least num_initial + num_local = {forced}"
    require(num_selected >= forced, "num_selected", num_selected, rule)


def check_most_blocks(num_selected: int) -> None:
    """Raise unless a query reads no more blocks than the kernels take."""
    rule = f"n must be 1 to {MOST_BLOCKS}"
    require(num_selected <= MOST_BLOCKS, "num_selected", num_selected, rule)


def check_lse(lse: Tensor, q: Tensor) -> None:
    """Raise unless lse is the float32 (B, H, T) of the compressed branch."""
    if not isinstance(lse, Tensor) or lse.dtype != torch.float32:
        raise TypeError(f"lse: must be a float32 tensor, got {getattr(lse, 'dtype', type(lse))}")
    expected = tuple(q.shape[:3])
    require(
        lse.shape == expected, "lse.shape", tuple(lse.shape), "must be (B, H, T) = {}", expected
    )
    require(lse.device == q.device, "lse.device", lse.device, f"must be q.device = {q.device}")


def check_parts(cache: object) -> None:
    """Raise unless an object has what a step reads: blocks, raw with its branches, and lengths."""
    if not all(hasattr(cache, part) for part in ("blocks", "raw", "lengths")):
        what = "a Cache, or have blocks, raw and lengths as it has"
        raise TypeError(f"cache: must be {what}, got {named(cache)}")
    if cache.blocks is None:
        raise ValueError("cache.blocks = None: must be phi's blocks, keys and values")
    check_instance("cache.raw", cache.raw, Mapping, "a dict of pairs (k, v), by branch")
    missing = sorted({"selected", "window"} - set(cache.raw))
    require(not missing, "cache.raw", sorted(cache.raw), f"must have the branches {missing} too")
    pairs = {"cache.blocks": cache.blocks}
    pairs |= {f"cache.raw[{name!r}]": cache.raw[name] for name in ("selected", "window")}
    for name, pair in pairs.items():
        check_instance(name, pair, (tuple, list), "a pair (k, v) of tensors")
        require(len(pair) == 2, f"len({name})", len(pair), "must be 2: a pair (k, v) of tensors")


def check_lengths(lengths: Tensor, q: Tensor) -> None:
    """Raise unless lengths is (B,) of int32 or int64, and q has 1 to 8 tokens a sequence.

    Their values are not read: that would wait for the device.
    """
    check_int_tensor("cache.lengths", lengths, "(B,)")
    expected = (q.shape[0],)
    shape = tuple(lengths.shape)
    require(shape == expected, "cache.lengths.shape", shape, "must be (B,) = {}", expected)
    rule = f"must be q.device = {q.device}"
    require(lengths.device == q.device, "cache.lengths.device", lengths.device, rule)
    rule = f"must hold 1 to {MOST_NEW} new tokens a sequence"
    require(q.shape[2] <= MOST_NEW, "q.shape", tuple(q.shape), rule)


def check_range(argument: str, values: Tensor, low: int, high: int, rule: str) -> None:
    """Raise if a number lies outside low .. high. It reads them: ask on a CPU only.

    There an interpreted kernel would read or write memory of somebody else, and Python crash.
    """
    if not values.numel():
        return
    lowest = int(values.min())
    highest = int(values.max())
    require(lowest >= low and highest <= high, argument, f"{lowest} .. {highest}", rule)


def check_ids(ids: Tensor, q: Tensor, k: Tensor) -> None:
    """Raise unless ids is (B, G, T, n) of int32 or int64, on a CPU none twice in a row.

    Elsewhere its values are not read: that would wait. An id outside -1 .. blocks - 1 is read as
    padding.
    """
    check_int_tensor("ids", ids, "(B, G, T, n)")
    expected = (k.shape[0], k.shape[1], q.shape[2])
    shape = tuple(ids.shape)
    rule = "must be (B, G, T, n) with (B, G, T) = {}"
    require(len(shape) == 4 and shape[:3] == expected, "ids.shape", shape, rule, expected)
    some = "must name at least one block a query, -1 for none"
    require(shape[3] >= 1, "ids.shape", shape, some)
    require(shape[3] <= MOST_BLOCKS, "ids.shape", shape, f"n must be 1 to {MOST_BLOCKS}")
    require(ids.device == q.device, "ids.device", ids.device, f"must be q.device = {q.device}")
    if ids.is_cpu and not watched(ids):
        ordered = ids.sort(dim=-1).values
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        rule = "a query's ids must differ from one another, but for -1"
        require(not twice.any(), "ids", ids[twice.any(-1)][:1].tolist(), rule)


def check_write(buffers: Sequence[Tensor], new: Sequence[Tensor], places: Tensor) -> None:
    """Raise unless each new (B, G, n, width) fits its buffer (B, G, capacity, width), and places.

    The values of places (B, n) are not read: that would wait for the device.
    """
    for name, tensors in {"buffers": buffers, "new": new}.items():
        check_instance(name, tensors, (tuple, list), "a list of tensors")
    count = len(new)
    require(count >= 1, "new", "0 of them", "must hold at least one tensor")
    require(len(buffers) == count, "buffers", f"{len(buffers)} of them", "must be {}", count)
    first = new[0]
    for i, (buffer, x) in enumerate(zip(buffers, new, strict=True)):
        check_float_tensor(f"new[{i}]", x, "B, G, n, width")
        check_float_tensor(f"buffers[{i}]", buffer, "B, G, capacity, width")
        check_runs_here(f"new[{i}]", x)
        check_alike(f"new[{i}]", x, "new[0]", first)
        check_alike(f"buffers[{i}]", buffer, f"new[{i}]", x)
        expected = tuple(first.shape[:3])
        rule = "must be (B, G, n, width) with (B, G, n) = {}"
        require(x.shape[:3] == expected, f"new[{i}].shape", tuple(x.shape), rule, expected)
        expected = (*x.shape[:2], "capacity", x.shape[3])
        fits = (*buffer.shape[:2], buffer.shape[3]) == (*x.shape[:2], x.shape[3])
        rule = "must be (B, G, capacity, width) = {}"
        require(fits, f"buffers[{i}].shape", tuple(buffer.shape), rule, expected)
        contiguous = buffer.stride(3) == 1
        rule = "its rows must be contiguous"
        require(contiguous, f"buffers[{i}].stride()", buffer.stride(), rule)
    check_int_tensor("places", places, "(B, n)")
    expected = (first.shape[0], first.shape[2])
    shape = tuple(places.shape)
    require(shape == expected, "places.shape", shape, "must be (B, n) = {}", expected)
    rule = f"must be new[0].device = {first.device}"
    require(places.device == first.device, "places.device", places.device, rule)


def check_rotation(x: Tensor, positions: Tensor) -> None:
    """Raise unless x (B, H, T, D) has pairs of channels, and each of its tokens a position."""
    check_float_tensor("x", x, "B, H, T, D")
    check_runs_here("x", x)
    require(x.shape[3] % 2 == 0, "x.shape", tuple(x.shape), "the last axis must be even")
    require(min(x.shape[:3]) >= 1, "x.shape", tuple(x.shape), "no axis may be empty")
    check_int_tensor("positions", positions, "(T,) or (B, T)")
    shape = tuple(positions.shape)
    fits = shape in ((x.shape[2],), (x.shape[0], x.shape[2]))
    require(fits, "positions.shape", shape, "must be (T,) or (B, T), one for each token")
    rule = f"must be x.device = {x.device}"
    require(positions.device == x.device, "positions.device", positions.device, rule)


def check_outputs(outputs: Sequence[Tensor]) -> None:
    """Raise unless these are three tensors (B, H, T, Dv), one a branch, all alike."""
    check_instance("outputs", outputs, (tuple, list), "three tensors, one a branch")
    rule = "must be 3, one output a branch"
    require(len(outputs) == 3, "len(outputs)", len(outputs), rule)
    for i, x in enumerate(outputs):
        name = f"outputs[{i}]"
        check_float_tensor(name, x, "B, H, T, Dv")
        check_alike(name, x, "outputs[0]", outputs[0])
        expected = tuple(outputs[0].shape)
        shape = tuple(x.shape)
        require(shape == expected, f"{name}.shape", shape, "must be outputs[0]'s, {}", expected)
        require(min(shape) >= 1, f"{name}.shape", shape, "no axis may be empty")
    check_runs_here("outputs[0]", outputs[0])
    check_width("outputs[0]", outputs[0])


def check_gates(gates: Tensor, x: Tensor, name: str = "q") -> None:
    """Raise unless gates is (B, H, T, 3) beside x (B, H, T, width), called `name`."""
    check_float_tensor("gates", gates, "B, H, T, 3")
    expected = (*x.shape[:3], 3)
    rule = "must be {}: one gate for each branch and head"
    require(gates.shape == expected, "gates.shape", tuple(gates.shape), rule, expected)
    here = gates.device == x.device
    require(here, "gates.device", gates.device, "must be {}.device = {}", name, x.device)


def check_no_gate_below_0(gates: Tensor) -> None:
    """Raise if a gate on a CPU is negative; elsewhere they are not read: that would wait.

    dk and dv get the logarithm of a gate (online_softmax.prepare_gradient).
    """
    if gates.is_cpu and not watched(gates):
        lowest = float(gates.detach().min())
        rule = "must be at least 0, or the gradients of keys and values would be NaN"
        require(not lowest < 0, "gates", lowest, rule)  # NaN passes, as everywhere


def scale_or_default(scale: float | None, width: int) -> float:
    """1 / sqrt(D) unless given; positive, since the running maximum is taken before scaling."""
    if scale is None:
        return width**-0.5
    check_positive("scale", scale)
    return float(scale)
