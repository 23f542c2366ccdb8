"""What set 07 observes of a launch: its programs, what they load, and who writes into out."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
from triton.runtime.jit import KernelInterface

from exercises.memory import stored, tensors


class Memory:
    """One tensor in the middle of larger memory, and which places of that memory are its own."""

    def __init__(self, part: Tensor, whole: Tensor, first: int) -> None:
        self.part = part
        self.whole = whole
        self.before = whole.clone()
        self.own = torch.zeros(whole.shape, dtype=torch.bool)
        self.own.as_strided(part.shape, part.stride(), first).fill_(True)

    def is_changed(self) -> bool:
        """Whether any number of the memory is another one than at first."""
        same = (self.whole == self.before) | (self.whole.isnan() & self.before.isnan())
        return not bool(same.all())

    def places(self, addresses: np.ndarray) -> np.ndarray:
        """The places of these addresses in the memory; some may lie outside of it."""
        return (addresses.astype(np.int64) - self.whole.data_ptr()) // self.whole.element_size()

    def owns(self, addresses: np.ndarray) -> np.ndarray:
        """Which addresses are those of the tensor's own numbers."""
        at = self.places(addresses)
        inside = (at >= 0) & (at < self.whole.numel())
        return inside & self.own.numpy()[np.where(inside, at, 0)]


class Launches(TorchFunctionMode):
    """Notes the launches of kernels while it is entered.

    The last `skipped` programs of a launch are left out. What is loaded, and how often `forbidden`
    is called, is known where Triton interprets.
    """

    def __init__(self, inputs: list[Memory], out: Memory, skipped=0, forbidden=None) -> None:
        super().__init__()
        self.memories = [*inputs, out]
        self.out = out
        self.skipped = skipped
        self.forbidden = forbidden
        self.programs: list[int] = []
        self.written_by_others = False
        self.made = 0  # numbers in the largest tensor that PyTorch made outside of a launch
        self.outside = 0  # loads from places that are no tensor's
        self.called = 0  # the forbidden function
        self.is_running = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.is_running:
            given = {x.whole.untyped_storage().data_ptr() for x in self.memories}
            made = [x for x in tensors(out) if x.untyped_storage().data_ptr() not in given]
            self.made = max([self.made, *map(stored, made)])
        return out

    def __enter__(self):
        self.old = [(owner, name, getattr(owner, name)) for owner, name in PATCHED]
        launch, load, call = (function for _, _, function in self.old)
        watch = self
        KernelInterface.__getitem__ = lambda kernel, grid: watch.launcher(launch, kernel, grid)

        def watched_load(builder, pointers, mask, *others, **named):
            watch.note_load(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)])
            return load(builder, pointers, mask, *others, **named)

        def watched_call(function, *args, **kwargs):
            watch.called += function is watch.forbidden
            return call(function, *args, **kwargs)

        InterpreterBuilder.create_masked_load = watched_load
        InterpretedFunction.__call__ = watched_call
        self.state = self.out.whole.clone()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for owner, name, function in self.old:
            setattr(owner, name, function)
        self.look_at_out()

    def launcher(self, launch: Callable, kernel, grid) -> Callable:
        """What kernel[grid] is: a launch that is noted."""

        def run(*args, **kwargs):
            self.look_at_out()
            self.is_running = True
            sizes = tuple(grid(kwargs) if callable(grid) else grid)
            self.programs.append(int(np.prod(sizes)))
            if sizes[0] > self.skipped:
                launch(kernel, (sizes[0] - self.skipped, *sizes[1:]))(*args, **kwargs)
            self.state = self.out.whole.clone()
            self.is_running = False

        return run

    def look_at_out(self) -> None:
        """Whether out is still as the last launch left it."""
        self.written_by_others |= not torch.equal(self.state, self.out.whole)

    def note_load(self, addresses: np.ndarray) -> None:
        """Count the loads from places that are no tensor's."""
        owned = np.zeros(addresses.shape, dtype=bool)
        for memory in self.memories:
            owned |= memory.owns(addresses)
        self.outside += int((~owned).sum())

    def wrong_way(self, programs: int) -> str:
        """What is wrong with the way to the result, in words; "" if nothing is."""
        if not self.programs:
            return "no kernel was launched"
        if self.written_by_others:
            return "out was written by something else than the kernel"
        if self.made >= self.out.part.numel():
            return f"PyTorch made a tensor of {self.made} numbers beside the kernel"
        if self.programs != [programs]:
            launched = " and ".join(map(str, self.programs))
            return f"{launched} programs were launched, and {programs} were asked for"
        if self.called:
            return f"{self.forbidden.__name__} was called, and its steps were to be written"
        if self.outside:
            places = "place" if self.outside == 1 else "places"
            return f"{self.outside} {places} outside of the tensors were loaded: mask these loads"
        return ""


PATCHED = [
    (KernelInterface, "__getitem__"),
    (InterpreterBuilder, "create_masked_load"),
    (InterpretedFunction, "__call__"),
]
