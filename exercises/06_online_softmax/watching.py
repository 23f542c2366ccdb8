"""What set 06 observes of an answer: its tiles of scores, what it keeps, what leaves PyTorch."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode

from exercises.memory import stored, tensors

PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "einsum", "inner"}
LEAVING = {"numpy", "__array__", "tolist"}
EVERY = 32  # calls from one count of what is kept to the next


class Watch(TorchFunctionMode):
    """Notes how large the tensors are that calls of PyTorch make beside `given`, and what leaves.

    A floating point tensor is one of scores unless its last axis is as long as one of the given.
    """

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given}
        self.no_scores = {size for x in given for size in x.shape}
        self.made: list[weakref.ref] = []
        self.calls = 0
        self.largest = 0  # of one tensor, as all that follow
        self.most = 0  # of all that are alive at once
        self.scores: tuple[int, ...] = (0,)  # the shape of the largest
        self.products = 0  # all scores that came of products
        self.left = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in LEAVING:
            self.left = max(self.left, args[0].numel())
        made = [x for x in tensors(out) if x.untyped_storage().data_ptr() not in self.given]
        for x in made:
            self.note(x, name in PRODUCTS)
        self.calls += 1
        if self.calls % EVERY == 0:
            self.count()
        return out

    def note(self, x: torch.Tensor, is_product: bool) -> None:
        """One tensor that was made."""
        self.made.append(weakref.ref(x))
        self.largest = max(self.largest, stored(x))
        if x.is_floating_point() and x.dim() and x.shape[-1] not in self.no_scores:
            self.scores = max(
                self.scores, tuple(x.shape), key=lambda shape: torch.Size(shape).numel()
            )
            self.products += x.numel() if is_product else 0

    def count(self) -> None:
        """How many numbers are alive; a view counts with what it looks at, once."""
        alive = [x for x in (ref() for ref in self.made) if x is not None]
        memory = {x.untyped_storage().data_ptr(): stored(x) for x in alive}
        self.most = max(self.most, sum(memory.values()))
        self.made = [weakref.ref(x) for x in alive]


@dataclass(frozen=True)
class Limits:
    """How many numbers a tile of scores has, another tensor may have, and products may give.

    At once there may be as many numbers as in one such tensor and in `copies` of the inputs.
    """

    tile: int
    tensor: int
    copies: int
    products: int


def look(answer: Callable, arguments: tuple, limits: Limits) -> tuple[object, str]:
    """The answer's result, and what is wrong with the way to it, in words; "" if nothing is."""
    with Watch(tensors(arguments)) as watch:
        result = answer(*arguments)
    watch.count()
    return result, wrong_way(watch, limits)


def wrong_way(watch: Watch, limits: Limits) -> str:
    """The first limit that was not kept, in words."""
    if watch.left > limits.tile:
        return f"{watch.left} numbers left PyTorch at once, for an array or a list"
    if watch.largest > limits.tensor:
        return f"a tensor of {watch.largest} numbers was made"
    if torch.Size(watch.scores).numel() > limits.tile:
        shape = " x ".join(map(str, watch.scores))
        return f"scores of the shape {shape} were made, and a tile has fewer"
    if watch.most > limits.tensor + limits.copies:
        return f"{watch.most} numbers were kept at once"
    if watch.products > limits.products:
        return f"{watch.products} scores were made: are tiles loaded that nobody sees?"
    return ""
