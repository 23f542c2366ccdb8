"""How torch gets to know of the kernels: each function on tensors becomes one of its operations.

torch.compile, torch.export and FakeTensor take an operation as one step that they need not look
into: they ask its `register_fake` for the shapes of its outputs. Autograd asks what was registered
with it for its gradient, which is an operation too.

    @operation          nsa::attend_to_keys, run on the device of its first tensor
    @in_batches         part after part, if the batch is too large for one grid
    def attend_to_keys(q, k, v, ..) -> (out, lse)
"""

from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op
from torch.utils._pytree import tree_leaves, tree_map_only

MOST_PROGRAMS = 65_535  # on a grid's second axis, CUDA's limit


def in_batches(run: Callable) -> Callable:
    """Let `run` take any batch: part after part, where a grid's second axis ends before its groups.

    All tensors that it takes and returns begin with the batch; the fewest heads are the groups.
    """

    @wraps(run)
    def run_all(*args: object) -> object:
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        batch = len(tensors[0])
        most = MOST_PROGRAMS // min(x.shape[1] for x in tensors)
        if batch <= most:
            return run(*args)
        parts = [run(*of_batch(args, i, i + most)) for i in range(0, batch, most)]
        if isinstance(parts[0], Tensor):
            return joined(parts)
        return tuple(joined(same) for same in zip(*parts, strict=True))

    return run_all


def of_batch(args: tuple, first: int, end: int) -> tuple:
    """The arguments with these entries of the batch only."""
    return tree_map_only(Tensor, lambda x: x[first:end], args)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts of a batch in one tensor, its axes in memory in the order of theirs."""
    first = parts[0]
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    outermost_first = sorted(range(first.dim()), key=first.stride, reverse=True)
    whole = torch.empty_permuted(shape, outermost_first, dtype=first.dtype, device=first.device)
    return torch.cat(parts, out=whole)


def operation(run: Callable) -> CustomOpDef:
    """Make `run` the operation nsa::<its name> of torch; it runs on its first tensor's device.

    What it returns is new memory. A kernel starts on the current device, whatever its tensors say.
    """

    @wraps(run)
    def run_on_its_device(first: Tensor, *others: object) -> object:
        with torch.cuda.device_of(first):
            return run(first, *others)

    return custom_op(f"nsa::{run.__name__}", run_on_its_device, mutates_args=())


def watched(x: Tensor) -> bool:
    """Whether somebody looks on: a compiler, a transform, or a mode that wants to see operations.

    To call an operation takes the host longer than a small kernel runs. Where nobody looks on, its
    function may be called directly.
    """
    return (
        type(x) not in (Tensor, torch.nn.Parameter)
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
