"""Real text that every machine has: the source of Python's own standard library, byte by byte."""

import math
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from nsa_lite.checks import require
from nsa_lite.config import NSAConfig
from nsa_lite.lab.tasks import Batch, Common

NSA = NSAConfig.small(
    dim=128,
    kv_heads=1,
    head_dim=32,
    value_dim=32,
    block_size=16,
    stride=8,
    select_block_size=32,
    num_selected=6,
    window=64,
)
HELD_OUT = ("argparse.py", "inspect.py", "tarfile.py", "typing.py")  # larger modules, whole


@cache
def library_bytes(split: str) -> Tensor:
    """The modules at the top of the standard library, joined; split is "train" or "validation".

    Shapes: uint8 (bytes,). Split by file: HELD_OUT is the validation text, all else training.
    """
    require(split in ("train", "validation"), "split", repr(split), "train or validation")
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    chosen = [f for f in files if (f.name in HELD_OUT) == (split == "validation")]
    require(len(chosen) > 0, "split", split, "this Python ships no library source")
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in chosen)), dtype=torch.uint8)


@dataclass(frozen=True)
class Text(Common):
    """Predict the next byte of Python source; tokens are bytes, every position has a target.

    tokens     d  e  f     m  a  i
    target     e  f     m  a  i  n
    """

    length: int = 1024
    stages: tuple[int, ...] = (1,)
    vocab_size: int = 256
    name: ClassVar[str] = "text"
    preset: ClassVar[dict] = dict(nsa=NSA, layers=2, steps=400, batch_size=4, lr=3e-3)
    held_out_size: int = 8
    solved_at: ClassVar[float | None] = None

    @property
    def longest(self) -> int:
        """The tokens of every sequence."""
        return self.length

    def batch(self, size: int, seed: int, stage: int = -1) -> Batch:  # noqa: ARG002  one stage
        """Random stretches of the training text."""
        return self.stretches("train", size, seed)

    def held_out(self, size: int, seed: int = 0) -> Batch:
        """Random stretches of the validation text."""
        return self.stretches("validation", size, seed)

    def score(self, loss: float) -> dict[str, float]:
        """Bits per byte: the loss with the logarithm to base 2."""
        return {"bits_per_byte": round(loss / math.log(2), 4)}

    def guess(self) -> float:
        """All bytes are equally likely."""
        return math.log(self.vocab_size)

    def baseline(self) -> str:
        """What needs no attention at all."""
        return f"a bigram model: {bigram_bits_per_byte():.3f} bits per byte"

    def stretches(self, split: str, size: int, seed: int) -> Batch:
        """`size` stretches of one split, drawn from the seed; every next byte is a target."""
        text = library_bytes(split)
        rng = torch.Generator().manual_seed(seed)
        first = torch.randint(len(text) - self.length, (size, 1), generator=rng)
        window = text[first + torch.arange(self.length + 1)].long()
        tokens = window[:, :-1]
        return Batch(tokens, window[:, 1:], torch.full_like(tokens, -1))


def bigram_bits_per_byte(smoothing: float = 0.1) -> float:
    """Bits per validation byte of a model that knows the previous byte only, counted in training.

    The baseline that attention must beat: it needs no context beyond one byte.
    """
    train = library_bytes("train").long()
    test = library_bytes("validation").long()
    counts = torch.bincount(train[:-1] * 256 + train[1:], minlength=256 * 256).view(256, 256)
    p = (counts + smoothing) / (counts + smoothing).sum(-1, keepdim=True)
    return float(-p[test[:-1], test[1:]].log2().mean())
