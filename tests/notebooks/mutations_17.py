"""Faults that notebook 17 must notice: in the task, the record, the count, the balance."""

from dataclasses import replace


def one_place_late(batch):
    """The answer is said to stand one place after it."""

    def wrong(*arguments, **named):
        drawn = batch(*arguments, **named)
        moved = drawn.answer_at.where(drawn.answer_at < 0, drawn.answer_at + 1)
        return replace(drawn, answer_at=moved)

    return wrong


def answers_lost(recorded):
    """Half of NSA's answers are lost, though their blocks are hit."""

    def wrong(name):
        record = recorded(name)
        for run, result in record["runs"].items():
            for found in result["depths"] if run.startswith("nsa-kl") else []:
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
        answers_lost,
        "# Checkpoint 3",
    ),
    (
        "chance of a shorter text",
        "cell",
        "free / (length // c.select_block_size - forced)",
        "free / (1024 // c.select_block_size - forced)",
        "# Checkpoint 3",
    ),
    ("summaries forgotten", "nsa_lite.cost.tokens_read", summaries_forgotten, "# Checkpoint 4"),
    (
        "neighbours for a rank",
        "cell",
        "both = [(rank, 2 * world - 1 - rank) for rank in range(world)]",
        "both = [(2 * rank, 2 * rank + 1) for rank in range(world)]",
        "# Checkpoint 4",
    ),
]
