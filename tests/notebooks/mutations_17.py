"""Faults that notebook 17 must notice: in task, records and control, in counts, in the balance."""

from dataclasses import replace


def one_place_late(batch):
    """The answer is said to stand one place after it."""

    def wrong(*arguments, **named):
        drawn = batch(*arguments, **named)
        moved = drawn.answer_at.where(drawn.answer_at < 0, drawn.answer_at + 1)
        return replace(drawn, answer_at=moved)

    return wrong


def answers_lost(kind):
    """Half of the answers of some runs are lost, though their blocks are hit."""

    def fault(recorded):
        def wrong(name):
            record = recorded(name)
            for run, result in record["runs"].items():
                for found in result.get("depths", []) if run.startswith(kind) else []:
                    found["accuracy"] /= 2
            return record

        return wrong

    return fault


def control_lost(recorded):
    """The run without a choice is said to find half of what it finds."""

    def wrong(name):
        record = recorded(name)
        for run, result in record["runs"].items():
            for found in result.get("depths", []) if "no-selection-seed" in run else []:
                found["accuracy"] /= 2
        return record

    return wrong


def summaries_forgotten(tokens_read):
    """Compressed tokens are read too, and not counted."""
    return lambda config, t: {**tokens_read(config, t), "compressed": 0}


MUTATIONS = [
    (
        "an answer one place late",
        "nsa_lite.lab.haystack.Haystack.batch",
        one_place_late,
        "# Checkpoint 1",
    ),
    (
        "turns of channels, not of pairs",
        "cell",
        "return length * base ** (-pair / pairs)",
        "return length * base ** (-pair / (2 * pairs))",
        "# Checkpoint 1",
    ),
    (
        "the first evaluation for the last",
        "cell",
        "final = {name: records[-1] for",
        'final = {name: next(r for r in records if "test_accuracy" in r) for',
        "# Checkpoint 2",
    ),
    (
        "answers lost",
        "nsa_lite.lab.runs.recorded",
        answers_lost("nsa-kl"),
        "# Checkpoint 3",
    ),
    (
        "chance of a shorter text",
        "cell",
        "free / (length // c.select_block_size - forced)",
        "free / (1024 // c.select_block_size - forced)",
        "# Checkpoint 3",
    ),
    (
        "a needle of one position",
        "cell",
        "inside = min(first + blocks.block_size, start + needles.span)",
        "inside = min(first + blocks.block_size, start + 1)",
        "# Checkpoint 4",
    ),
    (
        "the control lost",
        "nsa_lite.lab.runs.recorded",
        control_lost,
        "# Checkpoint 4",
    ),
    (
        "the controls of 64k for the laptop's",
        "cell",
        'laptop = runs.recorded("haystack_controls")',
        'laptop = {**far, "runs": {"nsa-no-selection": arms["nsa-no-selection"][0]}}',
        "# Checkpoint 4",
    ),
    (
        "the first evaluation's step for the last one's",
        "cell",
        'ended[kind] = [result["evaluations"][-1]["step"]',
        'ended[kind] = [result["evaluations"][0]["step"]',
        "# Checkpoint 4",
    ),
    (
        "one step's cost for all",
        "cell",
        'far["runs"][f"{kind}-cost"]',
        'far["runs"]["dense-cost"]',
        "# Checkpoint 4",
    ),
    (
        "chance of one layer where two choose",
        "cell",
        "return 1 - missed**layers",
        "return 1 - missed",
        "# Checkpoint 4",
    ),
    (
        "the seeds' coherence added up",
        "cell",
        "kept[tokens, kind] = max(two[0] + two[1])",
        "kept[tokens, kind] = sum(two[0] + two[1])",
        "# Checkpoint 4",
    ),
    ("summaries forgotten", "nsa_lite.cost.tokens_read", summaries_forgotten, "# Checkpoint 5"),
    (
        "taught choices hit, and nothing is answered",
        "nsa_lite.lab.runs.recorded",
        answers_lost("nsa-own-kl-seed"),
        "# Checkpoint 4",
    ),
    (
        "answers in the place of hits",
        "cell",
        'own_hits = [at(result, 65_536, "hit_rate") for result in shorter["nsa"]]',
        'own_hits = [at(result, 65_536) for result in shorter["nsa"]]',
        "# Checkpoint 4",
    ),
    (
        "neighbours for a rank",
        "cell",
        "both = [(rank, 2 * world - 1 - rank) for rank in range(world)]",
        "both = [(2 * rank, 2 * rank + 1) for rank in range(world)]",
        "# Checkpoint 5",
    ),
    (
        "how much shorter for how much longer",
        "cell",
        'longer[config] = rows["dense, cuDNN"]["step_ms"] / rows["NSA"]["step_ms"]',
        'longer[config] = rows["NSA"]["step_ms"] / rows["dense, cuDNN"]["step_ms"]',
        "# Checkpoint 5",
    ),
    (
        "a longer sequence on several GPUs for the one on one",
        "cell",
        "taken[ranks, 65_536], strict=True",
        "taken[ranks, 262_144], strict=True",
        "# Checkpoint 5",
    ),
    (
        "the layer of 8k for the one of 64k",
        "cell",
        'if row["length"] == 65_536]',
        'if row["length"] == 8192]',
        "# Checkpoint 5",
    ),
]
