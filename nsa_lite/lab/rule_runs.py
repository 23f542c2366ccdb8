"""The runs of notebook 06: rules for choosing blocks, on recall, beside the recorded controls.

The controls (NSA itself, random blocks, the oracle, no selection, dense attention) are the runs
of notebook 16, recorded with the same task, sizes, steps and seeds.
"""

from torch.utils.flop_counter import FlopCounterMode

from nsa_lite.lab.experiments import Run, recorded, training_run
from nsa_lite.lab.train import TASKS, TrainConfig, asked_span, build, loss_and_accuracy

ATTENTIONS = (
    "nsa-shut",
    "nsa-bce",
    "nsa-kl",
    "nsa-straight-through",
    "nsa-gumbel",
    "nsa-quest",
    "nsa-moba",
)
SEEDS = (0, 1, 2)


def runs() -> list[Run]:
    """Every attention with every seed; all attentions of a seed come before the next seed."""
    return [
        training_run(TrainConfig.preset("recall", name, seed, threads=1))
        for seed in SEEDS
        for name in ATTENTIONS
    ]


def results() -> dict[str, list[list[dict]]]:
    """The recorded evaluations of rules and controls: attention -> one list for each seed."""
    by_attention: dict[str, list[list[dict]]] = {}
    for name in ("recall_controls", "rules"):
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


def table(results: dict[str, list[list[dict]]]) -> str:
    """One line an attention: accuracy and hit rate at the end, steps to 90% of each seed, cost.

    The cost is step_flops as a share of NSA's.
    """
    nsa = step_flops("nsa")
    lines = [f"{'rule':20} {'accuracy':20}  {'hit rate':8}  {'steps to .90':13} {'cost':>5}"]
    for name, seeds in results.items():
        accuracy = [records[-1]["test_accuracy"] for records in seeds]
        hits = [records[-1]["hit_rate"] for records in seeds if "hit_rate" in records[-1]]
        hit = f"{sum(hits) / len(hits):8.2f}" if hits else f"{'-':>8}"
        to = "/".join(str(steps_to(records, 0.9) or "-") for records in seeds)
        lines.append(
            f"{name:20} {sum(accuracy) / len(accuracy):.2f} ({min(accuracy):.2f} to "
            f"{max(accuracy):.2f})  {hit}  {to:13} {step_flops(name) / nsa:5.2f}"
        )
    return "\n".join(lines)
