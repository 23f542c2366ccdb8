"""The runs of notebook 06: rules for choosing blocks, on recall, beside the recorded controls.

The controls (NSA itself, random blocks, the oracle, no selection, dense attention) are the runs
of notebook 15, recorded with the same task, sizes, steps and seeds.
"""

from nsa_lite.experiments import Run, training_run
from nsa_lite.train import TrainConfig

ATTENTIONS = (
    "nsa-shut", "nsa-bce", "nsa-kl", "nsa-straight-through", "nsa-gumbel", "nsa-quest", "nsa-moba",
)
SEEDS = (0, 1, 2)


def runs() -> list[Run]:
    """Every attention with every seed; all attentions of a seed come before the next seed."""
    return [training_run(TrainConfig.preset("recall", name, seed, threads=1))
            for seed in SEEDS for name in ATTENTIONS]
