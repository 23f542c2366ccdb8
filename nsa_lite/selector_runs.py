"""The runs of notebook 06: rules for choosing blocks, on recall, beside the recorded controls.

The controls (NSA itself, random blocks, the oracle, no selection, dense attention) are the runs
of notebook 15, recorded with the same task, sizes, steps and seeds.
"""

from nsa_lite.experiments import Run, training_run
from nsa_lite.tasks import Recall
from nsa_lite.train import TrainConfig

ATTENTIONS = (
    "nsa-shut", "nsa-bce", "nsa-kl", "nsa-straight-through", "nsa-gumbel", "nsa-quest", "nsa-moba",
)
SEEDS = (0, 1, 2)


def config(attention: str, seed: int) -> TrainConfig:
    """recall's preset, with queries at the questions only: no other position has a target.

    That saves three quarters of the time, and the loss and its gradient stay the same.
    """
    return TrainConfig.preset("recall", attention, seed, threads=1,
                              last_positions=Recall.questions)


def runs() -> list[Run]:
    """Every attention with every seed; all attentions of a seed come before the next seed."""
    return [training_run(config(name, seed)) for seed in SEEDS for name in ATTENTIONS]
