"""What the kernels ask of their arguments; a message names the argument, its value and the rule.

Where nsa_lite has the same rule, it says so in the same words.
"""

import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from kernels.tile_sizes import HALF, tile_for, widths_of

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require(ok: bool, argument: str, value: object, rule: str, *sizes: object) -> None:
    """Raise a ValueError that names the argument, its value and the rule, unless `ok`.

    Each {} of the rule stands for one of `sizes`. A size is written out only when the rule is
    broken: torch.compile takes a size that is written into a string for a constant.
    """
    if not ok:
        raise ValueError(f"{argument} = {value}: {rule.format(*sizes) if sizes else rule}")


def check_int(argument: str, value: object, *, at_least: int) -> None:
    """Raise unless value is an int (not a bool) of at least `at_least`.

    A size that torch.export leaves open is an int too.
    """
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{argument} = {value!r}: must be an int, got {type(value).__name__}")
    require(value >= at_least, argument, value, f"must be at least {at_least}")


def check_float_tensor(argument: str, value: object, dims: str) -> None:
    """Raise unless value is a floating-point tensor with one dimension per word of `dims`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: must be a torch.Tensor ({dims}), got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{argument}.dtype = {value.dtype}: must be a floating-point type")
    shape = tuple(value.shape)
    require(len(shape) == len(dims.split(", ")), f"{argument}.shape", shape, f"must be ({dims})")


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
    num_selected: int,
) -> str | None:
    """Why the kernels cannot run on such tensors and sizes, or None if they can."""
    reasons = {
        f"{dtype}: the kernels take float16, bfloat16 and float32": dtype == torch.float64,
        f"{group_size} heads a group: they take 64": group_size > 64,
        f"widths {head_dim} and {value_dim}: they take 256": max(head_dim, value_dim) > 256,
        f"blocks of {select_block_size}: they take 256": select_block_size > 256,
        f"{num_selected} blocks a query: they take 64": num_selected > 64,
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
    return why_no_tile_fits(device, dtype, group_size, head_dim, value_dim, select_block_size)


@cache
def why_no_tile_fits(
    device: torch.device,
    dtype: torch.dtype,
    group_size: int,
    head_dim: int,
    value_dim: int,
    select_block_size: int,
) -> str | None:
    """What tile_for says where a kernel's tiles are too large for the device's fast memory."""
    q = torch.empty(1, group_size, 1, head_dim, dtype=dtype, device=device)
    widths = widths_of(q, q[:, :1], q.new_empty(1, 1, 1, value_dim))
    try:
        for kernel in HALF:
            block = select_block_size if kernel.startswith("selected") else None
            window = 1 if kernel.endswith("_window") else None
            tile_for(kernel.removesuffix("_window"), widths, q, window=window, block=block)
    except ValueError as error:
        return str(error)
    return None


def check_runs_here(argument: str, x: Tensor) -> None:
    """Raise unless the kernels run on x's device and with its type, and in backward mode."""
    if not torch.compiler.is_compiling() and unpack_dual(x).tangent is not None:
        raise NotImplementedError(
            f"{argument}: the kernels have no derivative in forward mode; nsa_lite has one"
        )
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
    rule = f"heads ({{}}) must be 1 to 64 times {k_name}'s heads ({{}})"
    require(heads // groups <= 64, "q.shape", tuple(q.shape), rule, heads, groups)
    check_width("q", q)


def check_width(argument: str, x: Tensor) -> None:
    """Raise unless a row of x fits into a tile."""
    require(1 <= x.shape[3] <= 256, f"{argument}.shape", tuple(x.shape), "width must be 1 to 256")


def check_start(start: int) -> None:
    """Raise unless start is the position of a first query."""
    check_int("start", start, at_least=0)


def check_keys_reach(q: Tensor, k: Tensor, start: int, name: str = "k") -> None:
    """Raise unless the S keys reach the last query's position, start + T - 1."""
    check_start(start)
    last = start + q.shape[2]
    rule = "must hold at least start + T = {} keys, one for each position up to the last query"
    require(k.shape[2] >= last, f"{name}.shape", tuple(k.shape), rule, last)


def check_geometry(block_size: int, stride: int, select_block_size: int | None = None) -> None:
    """Raise unless d divides l and l', and l <= l'."""
    check_int("block_size", block_size, at_least=1)
    check_int("stride", stride, at_least=1)
    rule = f"must divide block_size = {block_size}"
    require(block_size % stride == 0, "stride", stride, rule)
    if select_block_size is None:
        return
    check_int("select_block_size", select_block_size, at_least=1)
    rule = f"must be a multiple of stride = {stride}"
    require(select_block_size % stride == 0, "select_block_size", select_block_size, rule)
    rule = f"must not exceed select_block_size = {select_block_size}"
    require(block_size <= select_block_size, "block_size", block_size, rule)


def check_select_block_size(select_block_size: int) -> None:
    """Raise unless a selected block fits into a tile."""
    check_int("select_block_size", select_block_size, at_least=1)
    rule = "must be at most 256"
    require(select_block_size <= 256, "select_block_size", select_block_size, rule)


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
    require(num_selected <= 64, "num_selected", num_selected, "n must be 1 to 64")


def check_lse(lse: Tensor, q: Tensor) -> None:
    """Raise unless lse is the float32 (B, H, T) of the compressed branch."""
    if not isinstance(lse, Tensor) or lse.dtype != torch.float32:
        raise TypeError(f"lse: must be a float32 tensor, got {getattr(lse, 'dtype', type(lse))}")
    expected = tuple(q.shape[:3])
    require(
        lse.shape == expected, "lse.shape", tuple(lse.shape), "must be (B, H, T) = {}", expected
    )
    require(lse.device == q.device, "lse.device", lse.device, f"must be q.device = {q.device}")


def check_lengths(lengths: Tensor, q: Tensor) -> None:
    """Raise unless lengths is (B,) of int32 or int64, and q has 1 to 8 tokens a sequence.

    Their values are not read: that would wait for the device.
    """
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        got = getattr(lengths, "dtype", type(lengths).__name__)
        raise TypeError(f"cache.lengths: must be an int32 or int64 tensor (B,), got {got}")
    expected = (q.shape[0],)
    shape = tuple(lengths.shape)
    require(shape == expected, "cache.lengths.shape", shape, "must be (B,) = {}", expected)
    rule = f"must be q.device = {q.device}"
    require(lengths.device == q.device, "cache.lengths.device", lengths.device, rule)
    rule = "must hold 1 to 8 new tokens a sequence"
    require(q.shape[2] <= 8, "q.shape", tuple(q.shape), rule)


def check_pair_like_blocks(name: str, pair: Sequence[Tensor], blocks: Sequence[Tensor]) -> None:
    """Raise unless a branch has the heads and the value width of phi's blocks, as programs read."""
    k, v = pair
    expected = (blocks[0].shape[1], blocks[1].shape[3])
    rule = "heads and value width must be those of cache.blocks, {}"
    fits = (k.shape[1], v.shape[3]) == expected
    require(fits, f"{name}[1].shape", tuple(v.shape), rule, expected)


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
    """Raise unless ids is (B, G, T, n) of int32 or int64. Its values are not read: that would wait.

    An id outside -1 .. blocks - 1 is read as padding.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        got = getattr(ids, "dtype", type(ids).__name__)
        raise TypeError(f"ids: must be an int32 or int64 tensor (B, G, T, n), got {got}")
    expected = (k.shape[0], k.shape[1], q.shape[2])
    shape = tuple(ids.shape)
    rule = "must be (B, G, T, n) with (B, G, T) = {}"
    require(len(shape) == 4 and shape[:3] == expected, "ids.shape", shape, rule, expected)
    require(1 <= shape[3] <= 64, "ids.shape", shape, "n must be 1 to 64")
    require(ids.device == q.device, "ids.device", ids.device, f"must be q.device = {q.device}")


def check_write(buffers: Sequence[Tensor], new: Sequence[Tensor], places: Tensor) -> None:
    """Raise unless each new (B, G, n, width) fits its buffer (B, G, capacity, width), and places.

    The values of places (B, n) are not read: that would wait for the device.
    """
    count = len(new)
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
    if places.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"places.dtype = {places.dtype}: must be int32 or int64")
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
    if not isinstance(positions, Tensor) or positions.dtype not in (torch.int32, torch.int64):
        got = getattr(positions, "dtype", type(positions).__name__)
        raise TypeError(f"positions: must be an int32 or int64 tensor (T,) or (B, T), got {got}")
    shape = tuple(positions.shape)
    fits = shape in ((x.shape[2],), (x.shape[0], x.shape[2]))
    require(fits, "positions.shape", shape, "must be (T,) or (B, T), one for each token")
    rule = f"must be x.device = {x.device}"
    require(positions.device == x.device, "positions.device", positions.device, rule)


def check_gates(gates: Tensor, x: Tensor) -> None:
    """Raise unless gates is (B, H, T, 3) for x (B, H, T, width)."""
    check_float_tensor("gates", gates, "B, H, T, 3")
    expected = (*x.shape[:3], 3)
    rule = "must be {}: one gate for each branch and head"
    require(gates.shape == expected, "gates.shape", tuple(gates.shape), rule, expected)


def scale_or_default(scale: float | None, width: int) -> float:
    """1 / sqrt(D) unless given; positive, since the running maximum is taken before scaling."""
    if scale is None:
        return width**-0.5
    require(scale > 0, "scale", scale, "must be positive")
    return float(scale)
