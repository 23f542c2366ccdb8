"""The one place that chooses between plain PyTorch and the Triton kernels.

Both sides offer the same operations under the same names.
"""

import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch

from nsa_lite.checks import require
from nsa_lite.nsa import nsa_attention

BACKENDS = ("auto", "torch", "triton")


def attention_of(backend: str, device: torch.device) -> Callable:
    """nsa_attention as the reference has it, or as the kernels do.

    "auto" takes the kernels on a CUDA device when they can be imported, PyTorch otherwise.
    Errors: ValueError for an unknown name; ImportError for "triton" without the kernels.
    """
    require(backend in BACKENDS, "backend", repr(backend), f"must be one of {BACKENDS}")
    have_kernels = importlib.util.find_spec("kernels") is not None
    if backend == "torch" or (backend == "auto" and (device.type != "cuda" or not have_kernels)):
        return nsa_attention
    return kernels_or_why_not().nsa_attention


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
