"""What the kernels ask of their arguments; a message names the argument, its value and the rule."""

import os

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check(ok: bool, argument: str, value: object, rule: str) -> None:
    """Raise a ValueError that names the argument, its value and the rule, unless `ok`."""
    if not ok:
        raise ValueError(f"{argument} = {value}: {rule}")


def check_tensor(name: str, x: Tensor, like: Tensor) -> None:
    """Raise unless x is a 4-dimensional tensor of a supported type, on the device of `like`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype != like.dtype:
        raise TypeError(f"{name}.dtype = {x.dtype}: must be q.dtype = {like.dtype}")
    check(x.dim() == 4, f"{name}.shape", tuple(x.shape), "must have 4 dimensions")
    check(x.device == like.device, f"{name}.device", x.device, f"must be q.device = {like.device}")
    check(1 <= x.shape[3] <= 256, f"{name}.shape", tuple(x.shape), "width must be 1 to 256")


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor | None = None, names: tuple[str, str] = ("k", "v")
) -> None:
    """Raise unless q (B, H, T, D), k (B, G, S, D) and v (B, G, S, Dv) fit together and run here.

    `names` are what the caller calls k and v.
    """
    k_name, v_name = names
    check_tensor("q", q, q)
    check_tensor(k_name, k, q)
    if q.dtype not in FLOATS:
        raise TypeError(f"q.dtype = {q.dtype}: the kernels take float16, bfloat16 and float32; "
                        "nsa_lite takes float64")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    check(interpreted or q.device.type == "cuda", "q.device", q.device,
          "compiled kernels read CUDA tensors; nsa_lite takes CPU tensors")
    check(not (interpreted and q.dtype == torch.bfloat16), "q.dtype", q.dtype,
          "Triton's interpreter computes bfloat16 wrongly; use float32 or float16 on a CPU")
    check(q.shape[0] >= 1 and q.shape[2] >= 1, "q.shape", tuple(q.shape), "must not be empty")
    k_shape = (f"{k_name}.shape", tuple(k.shape))
    check(k.shape[0] == q.shape[0], *k_shape, f"batch must be {q.shape[0]}")
    check(k.shape[3] == q.shape[3], *k_shape, f"width must be {q.shape[3]}")
    heads, groups = q.shape[1], k.shape[1]
    check(groups >= 1 and heads % groups == 0 and 1 <= heads // groups <= 64, "q.shape",
          tuple(q.shape), f"heads ({heads}) must be 1 to 64 times {k_name}'s heads ({groups})")
    if v is not None:
        check_tensor(v_name, v, q)
        check(v.shape[:3] == k.shape[:3], f"{v_name}.shape", tuple(v.shape),
              f"batch, heads and length must be {k_name}'s, {tuple(k.shape[:3])}")


def check_int(name: str, value: object, at_least: int) -> None:
    """Raise unless value is an int (no bool) of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} = {value!r}: must be an int, got {type(value).__name__}")
    check(value >= at_least, name, value, f"must be at least {at_least}")


def check_start(start: int) -> None:
    """Raise unless start is the position of a first query."""
    check_int("start", start, 0)


def check_keys_reach(q: Tensor, k: Tensor, start: int, name: str = "k") -> None:
    """Raise unless there is a key for every query's position."""
    check_start(start)
    check(k.shape[2] >= start + q.shape[2], f"{name}.shape", tuple(k.shape),
          f"must hold at least start + T = {start + q.shape[2]} keys")


def check_geometry(block_size: int, stride: int, select_block_size: int | None = None) -> None:
    """Raise unless d divides l and l', and l <= l'."""
    check_int("block_size", block_size, 1)
    check_int("stride", stride, 1)
    check(block_size % stride == 0, "stride", stride, f"must divide block_size = {block_size}")
    if select_block_size is not None:
        check_int("select_block_size", select_block_size, 1)
        check(select_block_size % stride == 0, "select_block_size", select_block_size,
              f"must be a multiple of stride = {stride}")
        check(block_size <= select_block_size, "block_size", block_size,
              f"must not exceed select_block_size = {select_block_size}")


def check_counts(num_selected: int, num_initial: int, num_local: int) -> None:
    """Raise unless the forced blocks fit inside the n selected ones."""
    check_int("num_selected", num_selected, 1)
    check_int("num_initial", num_initial, 0)
    check_int("num_local", num_local, 0)
    check(num_selected >= num_initial + num_local, "num_selected", num_selected,
          f"must be at least num_initial + num_local = {num_initial + num_local}")


def check_lse(lse: Tensor, q: Tensor) -> None:
    """Raise unless lse is the float32 (B, H, T) of the compressed branch."""
    if not isinstance(lse, Tensor) or lse.dtype != torch.float32:
        raise TypeError(f"lse: must be a float32 tensor, got {getattr(lse, 'dtype', type(lse))}")
    check(lse.shape == q.shape[:3], "lse.shape", tuple(lse.shape),
          f"must be (B, H, T) = {tuple(q.shape[:3])}")
    check(lse.device == q.device, "lse.device", lse.device, f"must be q.device = {q.device}")


def check_ids(ids: Tensor, q: Tensor, k: Tensor) -> None:
    """Raise unless ids is (B, G, T, n) of int32 or int64. Its values are not read: that would wait.

    An id outside -1 .. blocks - 1 is read as padding.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        got = getattr(ids, "dtype", type(ids).__name__)
        raise TypeError(f"ids: must be an int32 or int64 tensor (B, G, T, n), got {got}")
    expected = (k.shape[0], k.shape[1], q.shape[2])
    check(ids.dim() == 4 and ids.shape[:3] == expected, "ids.shape", tuple(ids.shape),
          f"must be (B, G, T, n) with (B, G, T) = {expected}")
    check(1 <= ids.shape[3] <= 64, "ids.shape", tuple(ids.shape), "n must be 1 to 64")
    check(ids.device == q.device, "ids.device", ids.device, f"must be q.device = {q.device}")


def scale_or_default(scale: float | None, width: int) -> float:
    """1 / sqrt(D) unless given; positive, since the running maximum is taken before scaling."""
    if scale is None:
        return width**-0.5
    check(scale > 0, "scale", scale, "must be positive")
    return float(scale)
