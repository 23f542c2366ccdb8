"""The runs of notebook 06: rules for choosing blocks, on recall, beside the recorded controls.

The controls (NSA itself, random blocks, the oracle, no selection, dense attention) are the runs
of notebook 15, recorded with the same task, sizes, steps and seeds.
"""

from torch.utils.flop_counter import FlopCounterMode

from nsa_lite.experiments import Run, recorded, training_run
from nsa_lite.train import TASKS, TrainConfig, asked_span, build, loss_and_accuracy

ATTENTIONS = (
    "nsa-shut", "nsa-bce", "nsa-kl", "nsa-straight-through", "nsa-gumbel", "nsa-quest", "nsa-moba",
)
SEEDS = (0, 1, 2)


def runs() -> list[Run]:
    """Every attention with every seed; all attentions of a seed come before the next seed."""
    return [training_run(TrainConfig.preset("recall", name, seed, threads=1))
            for seed in SEEDS for name in ATTENTIONS]


def results() -> dict[str, list[list[dict]]]:
    """The recorded evaluations of rules and controls: attention -> one list for each seed."""
    by_attention: dict[str, list[list[dict]]] = {}
    for name in ("recall_controls", "selectors"):
        for run, result in recorded(name)["runs"].items():
            by_attention.setdefault(run.rsplit("-seed", 1)[0], []).append(result["evaluations"])
    return by_attention


def steps_to(evaluations: list[dict], accuracy: float) -> int | None:
    """The first evaluated step with at least this held-out accuracy; None if there is none."""
    reached = (r["step"] for r in evaluations if r["test_accuracy"] >= accuracy)
    return next(reached, None)


def step_flops(attention: str) -> int:
    """Floating-point operations of one training step's matrix products, backward included."""
    config = TrainConfig.preset("recall", attention)
    model, batch = build(config), TASKS["recall"]().batch(config.batch_size, 0)
    last = asked_span(batch)
    with FlopCounterMode(display=False) as counter:
        loss, _ = loss_and_accuracy(model(batch.tokens, last=last), batch.targets[:, -last:])
        (loss + model.auxiliary_loss()).backward()
    return counter.get_total_flops()
