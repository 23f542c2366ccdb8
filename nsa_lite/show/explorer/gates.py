"""Gates as whole numbers: levels for the bars, hundredths for the words."""

import torch
from torch import Tensor

GATE_LEVELS = 254  # a bar has at most 50 pixels
NO_GATE = 255  # stands for NaN, as a level and as hundredths


def gate_levels(gates: Tensor) -> Tensor:
    """Gates 0 .. 1 as whole numbers 0 .. GATE_LEVELS, or NO_GATE; of any shape."""
    return _whole(gates, GATE_LEVELS)


def gate_hundredths(gates: Tensor) -> Tensor:
    """The mean over a group's heads as 0 .. 100, or NO_GATE: (..., R, T, 3) -> (..., T, 3)."""
    return _whole(gates.double().mean(-3), 100)


def words(hundredths: list[int]) -> str:
    """Some hundredths as a reader sees them: ".41 .88 1.00"."""
    return " ".join(
        "NaN" if x == NO_GATE else f"{x / 100:.2f}".removeprefix("0") for x in hundredths
    )


def _whole(gates: Tensor, most: int) -> Tensor:
    nearest = (gates.double().cpu().clamp(0, 1) * most + 0.5).floor()
    return nearest.nan_to_num(nan=NO_GATE).to(torch.uint8)
