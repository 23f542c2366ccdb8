"""Every attention that the course compares, one record each: name, how to build it, its line."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

from torch import Tensor, nn

from nsa_lite.config import NSAConfig, require_config
from nsa_lite.dense import DenseAttention
from nsa_lite.gates import BRANCHES
from nsa_lite.layer import NSAttention, Rule
from nsa_lite.rivals import rules, starters, successors, taught


class Line(NamedTuple):
    """How a curve is drawn: colour, dashes and marker, as matplotlib names them."""

    colour: str
    dashes: str | tuple
    marker: str


class Attention(NamedTuple):
    """A kind of attention: `build(config)` makes its layer.

    A record in ATTENTIONS is all it takes: the trainer offers it, and the pictures draw it.
    """

    name: str
    build: Callable[[NSAConfig], nn.Module]
    line: Line


class Shut(nn.Module):
    """A layer's gate with one branch shut: its scores still choose blocks, nobody reads it."""

    def __init__(self, gate: nn.Module, branch: str) -> None:
        super().__init__()
        self.gate = gate
        self.branch = BRANCHES.index(branch)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x)
        keep = gates.new_ones(len(BRANCHES))
        keep[self.branch] = 0
        return gates * keep


def window(config: NSAConfig) -> nn.Module:
    """NSA's window branch alone."""
    require_config(config)
    return DenseAttention(config, window=config.window)


def shut(build: Callable[[NSAConfig], nn.Module]) -> Callable[[NSAConfig], nn.Module]:
    """NSA of some kind whose compressed branch is not read; it may score blocks all the same."""

    def build_shut(config: NSAConfig) -> nn.Module:
        layer = build(config)
        layer.gate = Shut(cast(nn.Module, layer.gate), "compressed")
        return layer

    return build_shut


def nsa_by(rule: Rule) -> Callable[[NSAConfig], nn.Module]:
    """NSA that chooses its blocks by a rule without weights."""
    return lambda config: NSAttention(config, choose=rule)


def nsa_taught(rule: Callable[[NSAConfig], nn.Module]) -> Callable[[NSAConfig], nn.Module]:
    """NSA that chooses its blocks by a rule with weights of its own.

    The layer's weights are drawn first: for one seed they are the same whatever the rule.
    """

    def build(config: NSAConfig) -> nn.Module:
        layer = NSAttention(config)
        layer.choose = rule(config)
        return layer

    return build


def at_first(starter: type[starters.Starting]) -> Callable[[NSAConfig], nn.Module]:
    """NSA whose own choice is helped in the first passes of its training only."""
    return nsa_taught(partial(starter, first=starters.FIRST))


ATTENTIONS = {
    attention.name: attention
    for attention in (
        Attention("nsa", NSAttention, Line("#0072B2", "-", "o")),
        Attention("dense", DenseAttention, Line("#000000", "--", "s")),
        Attention("window", window, Line("#009E73", ":", "^")),
        Attention("nsa-no-selection", nsa_by(rules.nothing), Line("#56B4E9", "-.", "v")),
        Attention("nsa-random", nsa_by(rules.at_random), Line("#D55E00", (0, (3, 1, 1, 1)), "D")),
        Attention("nsa-oracle", nsa_by(rules.by_true_mass), Line("#CC79A7", (0, (5, 1)), "P")),
        Attention("nsa-shut", shut(NSAttention), Line("#7F7F7F", (0, (1, 2)), "x")),
        Attention("nsa-bce", nsa_taught(taught.BCEOverSoftmax), Line("#332288", (0, (2, 2)), "<")),
        Attention(
            "nsa-kl",
            nsa_taught(taught.KLToTrueMass),
            Line("#882255", (0, (6, 1, 1, 1, 1, 1)), ">"),
        ),
        Attention(
            "nsa-straight-through",
            nsa_taught(taught.StraightThrough),
            Line("#117733", (0, (1, 1)), "p"),
        ),
        Attention("nsa-gumbel", nsa_taught(taught.GumbelTopK), Line("#AA4499", (0, (3, 3)), "X")),
        Attention("nsa-quest", nsa_by(rules.by_bound), Line("#E69F00", (0, (4, 2, 1, 2)), "*")),
        Attention("nsa-moba", nsa_by(rules.by_block_mean), Line("#8C564B", (0, (8, 2)), "h")),
        Attention(
            "nsa-infllm",
            nsa_by(successors.by_pooled_windows),
            Line("#44AA99", (0, (7, 2, 1, 2)), "+"),
        ),
        Attention("nsa-msa", nsa_taught(successors.BestToken), Line("#CC3311", (0, (4, 1)), "_")),
        Attention(
            "nsa-qsa",
            nsa_taught(successors.PooledLightning),
            Line("#6699CC", (0, (2, 1, 1, 1)), "."),
        ),
        Attention("nsa-own-kl", nsa_taught(starters.OwnKL), Line("#8B0000", (0, (10, 1)), "4")),
        Attention("nsa-own-kl-first", at_first(starters.OwnKL), Line("#FF69B4", (0, (2, 4)), "3")),
        Attention("nsa-all-first", at_first(starters.AllBlocks), Line("#555555", (0, (1, 4)), "1")),
        Attention(
            "nsa-score", nsa_taught(starters.ScoreInLogits), Line("#999933", (0, (5, 2, 2, 2)), "2")
        ),
        Attention(
            "nsa-moba-shut",
            shut(nsa_by(rules.by_block_mean)),
            Line("#C49C94", (0, (8, 3, 1, 3)), "H"),
        ),
        Attention(
            "nsa-quest-shut", shut(nsa_by(rules.by_bound)), Line("#FFD27F", (0, (4, 4)), "8")
        ),
        Attention(
            "nsa-kl-shut",
            shut(nsa_taught(taught.KLToTrueMass)),
            Line("#D8A6B8", (0, (6, 3)), "d"),
        ),
        Attention(
            "nsa-own-kl-first-shut",
            shut(at_first(starters.OwnKL)),
            Line("#FF1493", (0, (3, 3, 1, 3)), "|"),
        ),
    )
}
