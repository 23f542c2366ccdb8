"""The one place that chooses between plain PyTorch and the Triton kernels.

Both sides offer the same operations under the same names.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_lite.attention import window_attention
from nsa_lite.cache import write_rows
from nsa_lite.checks import require
from nsa_lite.compression import compressed_attention
from nsa_lite.config import NSAConfig
from nsa_lite.decode import decode_step
from nsa_lite.nsa import nsa_attention
from nsa_lite.rope import rotate
from nsa_lite.selection import select_blocks

BACKENDS = ("auto", "torch", "triton")


class Operations(NamedTuple):
    """What layers ask their backend for."""

    nsa_attention: Callable
    compressed_attention: Callable
    select_blocks: Callable
    window_attention: Callable
    rotate: Callable
    decode_step: Callable
    write_rows: Callable


PLAIN = Operations(
    nsa_attention,
    compressed_attention,
    select_blocks,
    window_attention,
    rotate,
    decode_step,
    write_rows,
)


def require_backend(backend: str) -> None:
    """Raise unless this backend is known, and here if it was named.

    Errors: ValueError for an unknown name; ImportError for "triton" without the kernels.
    """
    require(backend in BACKENDS, "backend", repr(backend), f"must be one of {BACKENDS}")
    if backend == "triton":
        kernels_or_why_not()


def operations_of(backend: str, x: Tensor, config: NSAConfig) -> Operations:
    """The operations for tensors like x and a layer of these sizes.

    "auto" takes the kernels on a CUDA device where they can be imported and can run this, PyTorch
    otherwise. "triton" takes the kernels, which say what they cannot run.
    Errors: as require_backend.
    """
    if backend == "torch" or (backend == "auto" and x.device.type != "cuda"):
        return PLAIN
    widths = (config.head_dim, config.value_dim)
    blocks = (config.select_block_size, config.stride, config.num_selected)
    sizes = (config.group_size, *widths, *blocks)
    if backend == "auto" and not kernels_run(x.device, x.dtype, sizes):
        return PLAIN
    kernels = kernels_or_why_not()
    return Operations(*(getattr(kernels, name) for name in Operations._fields))


def kernels_run(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> bool:
    """Whether the kernels are here and take such tensors and sizes (why_not of kernels)."""
    try:
        return kernels_or_why_not().why_not(device, dtype, *sizes) is None
    except ImportError:
        return False


def kernels_or_why_not() -> ModuleType:
    """The package `kernels`, if it can be imported and is ours.

    Errors: ImportError that says what to do.
    """
    try:
        import kernels
    except ImportError as error:
        raise ImportError(
            f"backend = 'triton': the kernels package cannot be imported ({error}); "
            "it needs Linux and triton. Use backend='torch'."
        ) from error
    if not hasattr(kernels, "nsa_attention"):
        found = getattr(kernels, "__path__", None) or kernels.__file__
        raise ImportError(
            f"backend = 'triton': Python found another package named kernels at "
            f"{found}; start Python in this project's folder, or remove that package."
        )
    return kernels
