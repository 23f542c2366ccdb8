"""The trainer on several processes, one a device: each takes a part of every batch (torch's DDP).

    torchrun --nproc-per-node 2 -m nsa_lite.lab.train --task recall --attention nsa

    one step, batch_size = 4 and accumulate = 2:     sequences  0 1 | 2 3   4 5 | 6 7
                                                     rank        0  |  1     0  |  1

Every rank draws the whole batch from its seed and keeps its own sequences. DDP gives all ranks the
mean of their gradients; losses and accuracies are added up, so that all ranks decide alike, and
what needs doing once (a held-out score, a checkpoint, the log) rank 0 does. To rounding the result
is one process's; only rules that draw at random draw otherwise. Without torchrun, or some other
process group, there is one rank, and nothing here does anything.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group, which its defaults would keep
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nsa_lite.checks import require

T = TypeVar("T")


# --- who is here ---


@contextmanager
def processes() -> Iterator[None]:
    """Those that torchrun started are one group inside; without torchrun there is none.

    An error that leaves it leaves the group as it is: a rank that failed alone waits for no other.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    yield
    leave()


def leave() -> None:
    """End the group and its threads: one that still holds a tensor as Python ends aborts it."""
    gc.collect()  # DDP is a circle of references, and holds the group
    dist.destroy_process_group()


def in_group() -> bool:
    """Whether this process belongs to a group."""
    return dist.is_available() and dist.is_initialized()


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if in_group() else 1


def rank() -> int:
    """Which of them this is; rank 0 writes and prints."""
    return dist.get_rank() if in_group() else 0


def take_own_device(device: str) -> None:
    """Make "cuda" mean the GPU of this process's number on this machine.

    Errors: ValueError for a device with a number, and for more processes than GPUs.
    """
    gpus = torch.cuda.device_count()
    if world() == 1 or gpus == 0 or not device.startswith("cuda"):
        return
    require(device == "cuda", "device", repr(device), "must be cuda: each process takes its own")
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    require(local <= gpus, "--nproc-per-node", local, f"must not exceed the GPUs here, {gpus}")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


# --- what they tell each other ---


def everyone(x: T) -> list[T]:
    """What each rank has for x, in the order of ranks: the same list on all."""
    if world() == 1:
        return [x]
    found: list = [None] * world()
    dist.all_gather_object(found, x)
    return found


def together(work: Callable[[], T]) -> T:
    """What a rank's own work gives; what it raises on one rank, all raise."""
    if world() == 1:
        return work()
    given, error = outcome(work)
    errors = [e for e in everyone(error) if e is not None]
    if errors:
        raise errors[0]
    return cast(T, given)


def once(work: Callable[[], T]) -> T:
    """What rank 0's work gives, on all ranks, which do none; what it raises, all raise."""
    given = together(work if rank() == 0 else lambda: None)
    return cast(T, everyone(given)[0])


def outcome(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What work gives, or what it raises."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def added_up(*numbers: float) -> tuple[float, ...]:
    """Each number summed over ranks, always in their order: all ranks get the same bits."""
    return tuple(sum(column) for column in zip(*everyone(numbers), strict=True))


def require_alike(name: str, x: object) -> None:
    """Raise a ValueError on all ranks unless they have the same x."""
    found = everyone(x)
    rule = "must be the same on every rank: do they all see the checkpoint?"
    require(all(y == x for y in found), name, found, rule)


# --- how they share the work ---


def own_size(batch_size: int) -> int:
    """How many sequences of a batch a rank takes. Errors: ValueError unless they divide."""
    rule = f"must be a multiple of the number of processes, {world()}"
    require(batch_size % world() == 0, "batch_size", batch_size, rule)
    return batch_size // world()


def own(parts: list[T]) -> list[T]:
    """A rank's parts of those that are dealt out, one to each rank in turn."""
    return parts[rank() :: world()]


def spread(model: nn.Module) -> nn.Module:
    """The model to call in training: its backward leaves the mean of all ranks' gradients."""
    return model if world() == 1 else DistributedDataParallel(model)


def bare(model: nn.Module) -> nn.Module:
    """The model that was spread, to evaluate it on one rank alone."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def exchange(model: nn.Module, now: bool) -> AbstractContextManager:
    """Where forward and backward run: only with now=True do ranks exchange the gradients so far."""
    if isinstance(model, DistributedDataParallel) and not now:
        return model.no_sync()
    return nullcontext()


def draw_apart(seed: int) -> None:
    """Let several ranks draw different random numbers, which depend on nothing but the seed."""
    if world() > 1:
        torch.manual_seed(world() * seed + rank())
