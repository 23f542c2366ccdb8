"""Real text that every machine has: the source of Python's own standard library, byte by byte."""

import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from nsa_lite.checks import require
from nsa_lite.lab.tasks import Batch

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
class Text:
    """Predict the next byte of Python source; tokens are bytes, every position has a target.

    tokens     d  e  f     m  a  i
    target     e  f     m  a  i  n
    """

    length: int = 1024
    stages: tuple[int, ...] = (1,)
    name: ClassVar[str] = "text"
    vocab_size: ClassVar[int] = 256

    def batch(self, size: int, seed: int, stage: int = -1, split: str = "train") -> Batch:
        """Random stretches of the text."""
        text = library_bytes(split)
        rng = torch.Generator().manual_seed(seed)
        first = torch.randint(len(text) - self.length, (size, 1), generator=rng)
        window = text[first + torch.arange(self.length + 1)].long()
        tokens, targets = window[:, :-1], window[:, 1:]
        return Batch(tokens, targets, torch.full_like(tokens, -1))


def bigram_bits_per_byte(smoothing: float = 0.1) -> float:
    """Bits per validation byte of a model that knows the previous byte only, counted in training.

    The baseline that attention must beat: it needs no context beyond one byte.
    """
    train, test = library_bytes("train").long(), library_bytes("validation").long()
    counts = torch.bincount(train[:-1] * 256 + train[1:], minlength=256 * 256).view(256, 256)
    p = (counts + smoothing) / (counts + smoothing).sum(-1, keepdim=True)
    return float(-p[test[:-1], test[1:]].log2().mean())
