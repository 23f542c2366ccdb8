"""The runs of notebook 06: every rule for choosing blocks, on recall, with the same budget."""

from nsa_lite.experiments import Run, training_run
from nsa_lite.tasks import Recall
from nsa_lite.train import TrainConfig

ATTENTIONS = (
    "nsa", "nsa-shut", "nsa-random", "nsa-oracle", "nsa-bce", "nsa-kl", "nsa-straight-through",
    "nsa-gumbel", "nsa-quest", "nsa-moba", "dense",
)
SEEDS = (0, 1, 2, 3, 4)


def config(attention: str, seed: int) -> TrainConfig:
    """recall's preset; the questions are the last positions, and no other has a target."""
    return TrainConfig.preset("recall", attention, seed, threads=1,
                              last_positions=Recall.questions)


def runs() -> list[Run]:
    """Every attention with every seed; all attentions of a seed come before the next seed."""
    return [training_run(config(name, seed)) for seed in SEEDS for name in ATTENTIONS]
