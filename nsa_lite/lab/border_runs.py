"""When NSA's own choice starts, and what gets it started: many short trainings, one axis each.

    python -m nsa_lite.lab.experiments border

All share one task: facts gathered in 14 blocks of 16 positions (32 where l is 32), of which a query
may choose three freely, so that chance hits .21. What changes from arm to arm: the tokens that one
compressed key sums up (l, with d = l/2), the facts in a block, noise beside them, phi, the width of
values, and what trains the choice.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from nsa_lite.config import NSAConfig
from nsa_lite.lab.haystack import Stage
from nsa_lite.lab.rule_runs import steps_to
from nsa_lite.lab.runs import Run, training_run
from nsa_lite.lab.training import TrainConfig
from nsa_lite.show.tables import Column, table

SEEDS = (0, 1, 2, 3, 4)
BLOCKS = 14  # that hold facts
STARTED_AT = 0.5  # held-out accuracy from which a run has started, far above a guess's 1 in 64
REMEDIES = (
    "nsa-own-kl-first",
    "nsa-own-kl",
    "nsa-kl",
    "nsa-bce",
    "nsa-all-first",
    "nsa-score",
)
# What trains the keys that score, with the compressed read-out (gate open) and without (shut).
KEYS = (
    "nsa-shut",
    "nsa-moba",
    "nsa-moba-shut",
    "nsa-quest",
    "nsa-quest-shut",
    "nsa-kl",
    "nsa-kl-shut",
    "nsa-own-kl-first-shut",
)


@dataclass(frozen=True)
class Arm:
    """One setting, trained with several seeds.

    block_size is l, facts are those of a block, select is l' where it is not the facts' block: a
    query then reads as many tokens as before.
    """

    block_size: int = 16
    facts: int = 2
    noise: float = 1.0
    phi: str = "mean+mlp"
    value_dim: int = 32
    select: int | None = None
    attention: str = "nsa"

    @property
    def name(self) -> str:
        """All that sets it apart: 'nsa-l16-f2-noise1-mean+mlp-v32'."""
        sizes = f"l{self.block_size}-f{self.facts}-noise{self.noise:g}"
        cut = "" if self.select is None else f"-select{self.select}"
        return f"{self.attention}-{sizes}-{self.phi}-v{self.value_dim}{cut}"

    def config(self, seed: int, device: str) -> TrainConfig:
        """The training of one seed."""
        block = max(16, self.block_size)
        select = self.select or block
        nsa = NSAConfig.small(
            kv_heads=1,
            head_dim=32,
            value_dim=self.value_dim,
            block_size=self.block_size,
            stride=self.block_size // 2,
            select_block_size=select,
            num_selected=6 * block // select,
            window=16,
            phi=self.phi,
        )
        # A first block and the last two hold no fact: they are read whatever the scores say.
        edge = -(-select // block) * block
        sizes = dict(
            stages=(Stage(BLOCKS * block + 3 * edge, self.noise, self.facts),),
            keys=2 * BLOCKS * self.facts,
            values=64,
            facts=BLOCKS * self.facts,
            questions=BLOCKS,
            block=block,
            before=edge,
            gap=2 * edge - BLOCKS,
            held_out_size=32,
            evaluate_every=50,
        )
        return TrainConfig.preset(
            "haystack",
            self.attention,
            seed,
            nsa=nsa,
            sizes=sizes,
            steps=1500,
            batch_size=32,
            lr=4e-3,
            threads=1,
            device=device,
        )


def arms() -> Iterator[Arm]:
    """Every arm: the grid of l and facts a block, one axis at a time, remedies, keys, and l'."""
    for block_size in (4, 8, 16, 32):
        for facts in (1, 2, 4):
            yield Arm(block_size, facts)
        yield Arm(block_size, noise=0.0)
    for phi in ("mean", "mlp"):
        yield Arm(phi=phi)
    for value_dim in (8, 128):
        yield Arm(value_dim=value_dim)
    for attention in REMEDIES:
        for facts in (1, 2):
            yield Arm(facts=facts, attention=attention)
    for attention in KEYS:
        yield Arm(block_size=8, attention=attention)
    for select in (8, 24):
        yield Arm(block_size=8, select=select)


def runs(device: str = "cuda") -> list[Run]:
    """All arms with all seeds; all arms of a seed come before the next seed."""
    return [run(arm, seed, device) for seed in SEEDS for arm in arms()]


def few_runs() -> list[Run]:
    """What a CPU can do in an hour: the ends of the axis l, and one remedy."""
    few = (Arm(4), Arm(16), Arm(16, attention="nsa-own-kl-first"))
    return [run(arm, seed, "cpu") for seed in SEEDS[:2] for arm in few]


def run(arm: Arm, seed: int, device: str) -> Run:
    """One training."""
    return training_run(arm.config(seed, device), f"{arm.name}-seed{seed}", minutes=8)


def results(record: dict) -> dict[Arm, list[list[dict]]]:
    """Each arm's evaluations, one list a seed, of what the experiment recorded."""
    found = {}
    for arm in arms():
        names = [f"{arm.name}-seed{seed}" for seed in SEEDS]
        seeds = [record["runs"][name]["evaluations"] for name in names if name in record["runs"]]
        if seeds:
            found[arm] = seeds
    return found


COLUMNS = (
    Column("arm", 44),
    Column("started", 8),
    Column("at step", 14),
    Column("accuracy", 9, ".2f"),
    Column("hit rate", 9, ".2f"),
)


def border_table(results: dict[Arm, list[list[dict]]]) -> str:
    """One line an arm: how many seeds started and when, and their mean scores at the end."""
    rows = []
    for arm, seeds in results.items():
        begun = sorted(step for step in (steps_to(s, STARTED_AT) for s in seeds) if step)
        when = f"{begun[0]} to {begun[-1]}" if begun else None
        last = [evaluations[-1] for evaluations in seeds]
        scores = [sum(r[key] for r in last) / len(last) for key in ("test_accuracy", "hit_rate")]
        rows.append([arm.name, f"{len(begun)} of {len(seeds)}", when, *scores])
    return table(COLUMNS, rows)
