"""Eq. 5's gates: how much of each branch a query takes, for each head its own."""

from jaxtyping import Float
from torch import Tensor, nn

from nsa_lite.checks import require_gates, require_outputs
from nsa_lite.config import NSAConfig, require_config

BRANCHES = ("compressed", "selected", "window")


class Gate(nn.Module):
    """sigmoid(MLP(x)), one number for each branch and head, not normalised (our choice)."""

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        require_config(config)
        hidden = config.dim // 2
        self.heads = config.heads
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, hidden), nn.GELU(), nn.Linear(hidden, 3 * config.heads)
        )

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B H T 3"]:
        """The gates in the order of BRANCHES, each between 0 and 1."""
        return self.mlp(x).sigmoid().unflatten(-1, (self.heads, 3)).transpose(1, 2)


def gated_sum(
    gates: Float[Tensor, "B H T 3"],
    outputs: tuple[Float[Tensor, "B H T Dv"], ...],
) -> Float[Tensor, "B H T Dv"]:
    """Each branch's output times its gate, added up (Eq. 5), in the outputs' type.

    Errors: ValueError or TypeError that names the argument.
    """
    require_outputs(outputs)
    require_gates(gates, outputs[0], "outputs[0]")
    return add_gated(gates, outputs)


def add_gated(gates: Tensor, outputs: tuple[Tensor, ...]) -> Tensor:
    """gated_sum without its checks."""
    compressed, selected, window = outputs
    total = (
        gates[..., 0, None] * compressed
        + gates[..., 1, None] * selected
        + gates[..., 2, None] * window
    )
    return total.to(compressed.dtype)
