"""The runs of notebooks 06 and 16 on recall: NSA, its controls, other rules for choosing blocks.

All have the same task, sizes and steps, and at least the same three seeds.
"""

from dataclasses import replace

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nsa_lite.lab.evaluate import asked_span, loss_and_accuracy
from nsa_lite.lab.runs import Run, recorded, training_run
from nsa_lite.lab.training import TASKS, TrainConfig, build
from nsa_lite.show.tables import Column, table

CONTROLS = ("nsa", "nsa-random", "nsa-no-selection", "nsa-oracle", "dense", "window")
RULES = (
    "nsa-shut",
    "nsa-bce",
    "nsa-kl",
    "nsa-straight-through",
    "nsa-gumbel",
    "nsa-quest",
    "nsa-moba",
)
SEEDS = (0, 1, 2)
PHI_SEEDS = (0, 1, 2, 3, 4)
# Without selection some seeds learn to keep a block's facts in its summary and others do not: three
# cannot say how many.
MORE_SEEDS = (3, 4, 5, 6, 7, 8, 9)


def controls() -> list[Run]:
    """NSA and what it must be held beside, every seed."""
    return [trained_on_recall(name, seed, minutes=1) for name in CONTROLS for seed in SEEDS]


def with_the_papers_phi() -> list[Run]:
    """NSA with phi an MLP alone, as the paper has it, where recall's preset adds the mean."""
    return [papers_phi(seed) for seed in PHI_SEEDS]


def papers_phi(seed: int) -> Run:
    """One seed of it; its name says what differs from the preset."""
    config = TrainConfig.preset("recall", "nsa", seed, threads=1)
    changed = replace(config, nsa=replace(config.nsa, phi="mlp"))
    return training_run(changed, f"nsa-phi-mlp-seed{seed}", minutes=1)


def without_selection() -> list[Run]:
    """The control whose seeds end apart, with more of them."""
    return [trained_on_recall("nsa-no-selection", seed, minutes=1) for seed in MORE_SEEDS]


def runs() -> list[Run]:
    """Every other rule with every seed; all rules of a seed come before the next seed."""
    return [trained_on_recall(name, seed, minutes=5) for seed in SEEDS for name in RULES]


def successor_runs() -> list[Run]:
    """The rules that came after NSA (notebook 18), trained in the same way."""
    names = ("nsa-infllm", "nsa-msa", "nsa-qsa")
    return [trained_on_recall(name, seed, minutes=2) for seed in SEEDS for name in names]


def trained_on_recall(attention: str, seed: int, minutes: float) -> Run:
    """A training with the task's own sizes."""
    config = TrainConfig.preset("recall", attention, seed, threads=1)
    return training_run(config, minutes=minutes)


def results() -> dict[str, list[list[dict]]]:
    """The recorded evaluations of controls and rules: attention -> one list for each seed."""
    by_attention: dict[str, list[list[dict]]] = {}
    for name in ("recall_controls", "rules"):
        for run, result in recorded(name)["runs"].items():
            by_attention.setdefault(run.rsplit("-seed", 1)[0], []).append(result["evaluations"])
    return by_attention


def steps_to(evaluations: list[dict], least: float, key: str = "test_accuracy") -> int | None:
    """The first evaluated step that scores at least so much; None if there is none."""
    reached = (r["step"] for r in evaluations if r[key] >= least)
    return next(reached, None)


def step_flops(attention: str) -> int:
    """Floating-point operations of one training step's matrix products, backward included."""
    config = TrainConfig.preset("recall", attention)
    model = build(config)
    batch = TASKS["recall"]().batch(config.batch_size, 0)
    last = asked_span(batch)
    # torch counts the products of its plain attention, not those of the fused one for CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits, rules_loss = model(batch.tokens, last=last, return_loss=True)
        loss, _ = loss_and_accuracy(logits, batch.targets[:, -last:])
        (loss + rules_loss).backward()
    return counter.get_total_flops()


COLUMNS = (
    Column("rule", 20),
    Column("accuracy", 20),
    Column("hit rate", 8, ".2f"),
    Column("steps to .90", 14),
    Column("cost", 5, ".2f"),
)


def rules_table(results: dict[str, list[list[dict]]]) -> str:
    """One line an attention: accuracy and hit rate at the end, steps to 90% of each seed, cost.

    The cost is step_flops as a share of NSA's.
    """
    nsa = step_flops("nsa")
    rows = []
    for name, seeds in results.items():
        last = [records[-1] for records in seeds]
        accuracy = [r["test_accuracy"] for r in last]
        hits = [r["hit_rate"] for r in last if "hit_rate" in r]
        mean = sum(accuracy) / len(accuracy)
        spread = f"{mean:.2f} ({min(accuracy):.2f} to {max(accuracy):.2f})"
        hit = sum(hits) / len(hits) if hits else None
        to = "/".join(str(steps_to(records, 0.9) or "-") for records in seeds)
        rows.append([name, spread, hit, to, step_flops(name) / nsa])
    return table(COLUMNS, rows)
