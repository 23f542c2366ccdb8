"""When NSA's own choice starts, and what gets it started: many short trainings, one axis each.

    python -m nsa_lite.lab.experiments border

All share one task: 16 facts anywhere among 1,024 positions of noise, in 64 blocks of 16 positions
(32 blocks of 32 where l is 32). A query reads 256 tokens of them; of what it chooses freely, chance
hits .21 (.17 where l is 32). A fact takes `span` positions in a row. What changes from arm to arm:
the tokens that one compressed key sums up (l, with d = l/2), the span, noise, phi, the width of
values, the learning rate, the start, and what trains the choice.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nsa_lite.config import NSAConfig
from nsa_lite.lab.grown import grown_run
from nsa_lite.lab.haystack import Stage
from nsa_lite.lab.positions import smallest_rope_base
from nsa_lite.lab.rule_runs import steps_to
from nsa_lite.lab.runs import Run, training_run
from nsa_lite.lab.training import TrainConfig
from nsa_lite.show.tables import Column, table

SEEDS = (0, 1, 2, 3, 4)
LENGTH = 1024
READ = 256  # tokens that are selected, n l'
BLOCK = 16  # l', where l is not larger
FACTS = 16
WINDOW = 32
STEPS = 600
SIZES = (4, 8, 16, 32)  # l
SPANS = (1, 2, 4, 8)
STARTED_AT = 0.5  # held-out hit rate from which a choice has started; at random it is .21
REMEDIES = (
    "nsa-own-kl-first",
    "nsa-own-kl",
    "nsa-kl",
    "nsa-bce",
    "nsa-all-first",
    "nsa-score",
)
# The remedies that are tried where facts are shortest, too.
TEACHERS = ("nsa-own-kl-first", "nsa-kl")
TOGETHER = (2, 4, 8)  # facts in a block of 16: of span 2, eight fill it
# What trains the keys that score, with the compressed read-out (gate open) and without (shut).
KEYS = (
    "nsa-shut",
    "nsa-moba",
    "nsa-moba-shut",
    "nsa-quest",
    "nsa-quest-shut",
    "nsa-kl-shut",
    "nsa-own-kl-first-shut",
)


@dataclass(frozen=True)
class Arm:
    """One setting, trained with several seeds.

    block_size is l. span: the positions that say one fact. facts: how many stand together in one
    block of 16, None where they fall anywhere. select is l' where it is not the usual one: a query
    then reads as many tokens as before. starts_whole: whether a first stage is so short that all
    of it is selected. first_size: the l of the first half of the steps, where it is a smaller one.
    """

    block_size: int = 8
    span: int = 2
    noise: float = 1.0
    phi: str = "mean+mlp"
    value_dim: int = 32
    facts: int | None = None
    select: int | None = None
    starts_whole: bool = True
    first_size: int | None = None
    lr: float = 2e-3
    attention: str = "nsa"

    @property
    def name(self) -> str:
        """All that sets it apart: 'nsa-l8-span2-noise1-mean+mlp-v32'."""
        sizes = f"l{self.block_size}-span{self.span}-noise{self.noise:g}"
        together = "" if self.facts is None else f"-together{self.facts}"
        cut = "" if self.select is None else f"-select{self.select}"
        start = "" if self.starts_whole else "-long"
        grown = "" if self.first_size is None else f"-from{self.first_size}"
        rate = "" if self.lr == Arm.lr else f"-lr{self.lr:g}"
        changed = f"{together}{cut}{start}{grown}{rate}"
        return f"{self.attention}-{sizes}-{self.phi}-v{self.value_dim}{changed}"

    def config(self, seed: int, device: str) -> TrainConfig:
        """The training of one seed; where l grows, with the larger one throughout."""
        select = self.select or max(BLOCK, self.block_size)
        nsa = NSAConfig.small(
            dim=128,
            heads=8,
            kv_heads=1,
            head_dim=32,
            value_dim=self.value_dim,
            block_size=self.block_size,
            stride=self.block_size // 2,
            select_block_size=select,
            num_selected=READ // select,
            window=WINDOW,
            rope_theta=smallest_rope_base(LENGTH, head_dim=32, slow_pairs=8),
            phi=self.phi,
        )
        whole = Stage(READ, noise=0.0, batch=LENGTH // READ, until=0.95)
        long = Stage(LENGTH, self.noise, self.facts, weight=3.0)
        sizes = dict(
            stages=(whole, long) if self.starts_whole else (long,),
            facts=FACTS,
            questions=FACTS,
            block=BLOCK,
            before=2 * BLOCK,
            gap=4 * BLOCK,
            span=self.span,
            held_out_size=16,
            evaluate_every=50,
        )
        return TrainConfig.preset(
            "haystack",
            self.attention,
            seed,
            nsa=nsa,
            sizes=sizes,
            steps=STEPS,
            batch_size=8,
            lr=self.lr,
            threads=1,
            device=device,
        )


def arms() -> Iterator[Arm]:
    """Every arm: the grid of l and span, then one axis at a time, remedies, what trains keys."""
    grid = list(itertools.product(SIZES, SPANS))
    yield from (Arm(block_size, span) for block_size, span in grid)
    for span in (2, 4):
        yield Arm(span=span, noise=0.0)
        yield Arm(span=span, starts_whole=False)
        for lr in (1e-3, 4e-3):
            yield Arm(span=span, lr=lr)
        for phi in ("mean", "mlp"):
            yield Arm(span=span, phi=phi)
    for block_size, facts in itertools.product(SIZES, TOGETHER):
        yield Arm(block_size, facts=facts)
    for value_dim in (8, 128):
        yield Arm(value_dim=value_dim)
    for select in (8, 32):
        yield Arm(select=select)
    for attention in REMEDIES:
        for block_size in (8, 16):
            yield Arm(block_size, attention=attention)
    for attention in TEACHERS:
        for block_size, span in ((8, 1), (16, 1), (32, 2), (32, 4)):
            yield Arm(block_size, span, attention=attention)
    for attention in KEYS:
        yield Arm(attention=attention)
    for block_size, first_size in ((8, 4), (16, 4), (16, 8)):
        yield Arm(block_size, first_size=first_size)
    yield from (Arm(*sizes, attention="nsa-no-selection") for sizes in grid)
    yield Arm(attention="dense")


def runs(device: str = "cuda") -> list[Run]:
    """All arms with all seeds; all arms of a seed come before the next seed."""
    return [run(arm, seed, device) for seed in SEEDS for arm in arms()]


def few_runs() -> list[Run]:
    """What a CPU does in an hour and a half: three spans, a choice taught at first, none; keys."""
    return [run(arm, seed, "cpu") for seed in SEEDS for arm in few_arms()]


def few_arms() -> list[Arm]:
    """The arms of few_runs; some of them are not among arms()."""
    who = ("nsa", "nsa-own-kl-first", "nsa-no-selection")
    spans = [Arm(span=span, attention=attention) for span in (2, 4, 8) for attention in who]
    return spans + [Arm(attention=attention) for attention in KEYS]


def run(arm: Arm, seed: int, device: str) -> Run:
    """The training of one seed; with a first_size, two in a row."""
    minutes = 0.3 if device == "cuda" else 1
    name = f"{arm.name}-seed{seed}"
    config = arm.config(seed, device)
    if arm.first_size is None:
        return training_run(config, name, minutes)
    smaller = replace(arm, block_size=arm.first_size, first_size=None).config(seed, device)
    return grown_run(smaller, config, STEPS // 2, name, minutes)


def results(record: dict) -> dict[Arm, list[list[dict]]]:
    """Each arm's evaluations, one list a seed, of what the experiment recorded."""
    found = {}
    for arm in dict.fromkeys([*arms(), *few_arms()]):
        names = [f"{arm.name}-seed{seed}" for seed in SEEDS]
        seeds = [record["runs"][name]["evaluations"] for name in names if name in record["runs"]]
        if seeds:
            found[arm] = seeds
    return found


def chance(arm: Arm) -> float:
    """The hit rate of a random choice, by a question at the end."""
    c = arm.config(0, "cpu").nsa
    forced = c.num_initial + c.num_local
    return (c.num_selected - forced) / (LENGTH // c.select_block_size - forced)


def label(arm: Arm) -> str:
    """An arm in a table: attention, l and span, then what is not as in most arms."""
    usual = Arm(arm.block_size, arm.span, attention=arm.attention)
    changed = {
        f"noise {arm.noise:g}": arm.noise != usual.noise,
        f"phi {arm.phi}": arm.phi != usual.phi,
        f"values of {arm.value_dim}": arm.value_dim != usual.value_dim,
        f"{arm.facts} together": arm.facts != usual.facts,
        f"l' {arm.select}": arm.select != usual.select,
        f"l {arm.first_size} first": arm.first_size != usual.first_size,
        "one stage": arm.starts_whole != usual.starts_whole,
        f"lr {arm.lr:g}": arm.lr != usual.lr,
    }
    words = [f"{arm.attention} l {arm.block_size} span {arm.span}"]
    return ", ".join(words + [what for what, differs in changed.items() if differs])


COLUMNS = (
    Column("arm", 42),
    Column("accuracy", 19),
    Column("peak", 5, ".2f"),
    Column("hits", 5, ".2f"),
    Column("started", 7),
    Column("at step", 10),
)


def border_table(results: dict[Arm, list[list[dict]]]) -> str:
    """One line an arm: accuracy at the end and its spread, the mean of the seeds' best, hits.

    Then how many seeds started, and when.
    """
    return table(COLUMNS, [row_of(arm, seeds) for arm, seeds in results.items()])


def row_of(arm: Arm, seeds: list[list[dict]]) -> list:
    """An arm's line in the table; no hit rate where nothing is selected."""
    begun = sorted(step for step in map(started, seeds) if step)
    when = f"{begun[0]} to {begun[-1]}" if begun else None
    accuracy = at_the_end(seeds, "test_accuracy")
    hits = at_the_end(seeds, "hit_rate")
    peaks = [max(r["test_accuracy"] for r in seed) for seed in seeds]
    spread = f"{mean(accuracy):.2f} ({spread_of(accuracy)})"
    hit = mean(hits) if hits else None
    return [label(arm), spread, mean(peaks), hit, f"{len(begun)} of {len(seeds)}", when]


def started(evaluations: list[dict]) -> int | None:
    """The first evaluated step that hits half of the answers; None if there is none.

    Where all is read, as by dense attention, it is the first that answers half. Answers alone would
    not tell: a compressed read-out can give them without any choice.
    """
    chooses = "hit_rate" in evaluations[0]
    return steps_to(evaluations, STARTED_AT, "hit_rate" if chooses else "test_accuracy")


def grid_table(
    results: dict[Arm, list[list[dict]]],
    key: str = "test_accuracy",
    axis: str = "span",
    attention: str = Arm.attention,
) -> str:
    """One attention: a line an l, a column a value of one axis, the lowest to the highest seed.

    axis: a field of Arm; in all others the arms are as usual.
    """
    found = {}  # l and the value -> one list of evaluations a seed
    for arm, seeds in results.items():
        value = getattr(arm, axis)
        usual = replace(Arm(arm.block_size, attention=attention), **{axis: value})
        if arm == usual:
            found[arm.block_size, value] = seeds
    sizes = sorted({size for size, _ in found})
    values = sorted({value for _, value in found}, key=lambda value: value or 0)
    headings = ["anywhere" if value is None else f"{axis} {value}" for value in values]
    rows = []
    for size in sizes:
        cells = [found.get((size, value)) for value in values]
        rows.append([f"l {size}", *(each and spread_of(at_the_end(each, key)) for each in cells)])
    return table([Column("", 6), *(Column(heading, 12) for heading in headings)], rows)


def at_the_end(seeds: list[list[dict]], key: str) -> list[float]:
    """The last recorded value of each seed that has one."""
    return [seed[-1][key] for seed in seeds if key in seed[-1]]


def mean(values: list[float]) -> float:
    """Their arithmetic mean."""
    return sum(values) / len(values)


def spread_of(values: list[float]) -> str:
    """The lowest and the highest."""
    return f"{min(values):.2f} to {max(values):.2f}"
