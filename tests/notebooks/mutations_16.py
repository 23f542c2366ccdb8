"""Faults that the checkpoints of notebook 16 must see."""

import numpy as np

from nsa_lite.rivals import rules


def answers_beside(with_answers):
    """Every answer said to stand one place later."""
    return lambda tokens, answers, at: with_answers(tokens, answers, at + 1)


def four_more_local(forced_blocks):
    """Blocks forced that hold answers."""

    def wrong(positions, count, size, initial, local):
        return forced_blocks(positions, count, size, initial, local + 4)

    return wrong


def without_the_optimizer(restore):
    """A run goes on with its weights and step, but with nothing that AdamW had kept."""

    def wrong(path, model, optimizer, config):
        state = restore(path, model, optimizer, config)
        optimizer.state.clear()
        return state

    return wrong


def without_summaries(tokens_read):
    """The compressed keys forgotten: NSA seems to read less than dense attention."""

    def wrong(config, position, kind="nsa"):
        read = tokens_read(config, position, kind)
        return {branch: count for branch, count in read.items() if branch != "compressed"}

    return wrong


def only_forced(block_kinds):
    """What is chosen freely shown as unused."""

    def wrong(*given):
        kinds = block_kinds(*given)
        return np.where(kinds == "selected", "unused", kinds)

    return wrong


def two_controls_swapped(recorded):
    """Random blocks and NSA under each other's name."""

    def wrong(experiment):
        record = recorded(experiment)
        names = {"nsa": "nsa-random", "nsa-random": "nsa"}

        def other(run):
            control, seed = run.rsplit("-seed", 1)
            return f"{names.get(control, control)}-seed{seed}"

        return {**record, "runs": {other(run): result for run, result in record["runs"].items()}}

    return wrong


MUTATIONS = [
    ("answers beside", "nsa_lite.lab.tasks.with_answers", answers_beside, "# Checkpoint 1"),
    ("answers forced", "nsa_lite.blocks.forced_blocks", four_more_local, "# Checkpoint 1"),
    (
        "AdamW begins anew",
        "nsa_lite.lab.checkpoint.restore",
        without_the_optimizer,
        "# Checkpoint 2",
    ),
    ("summaries", "nsa_lite.cost.tokens_read", without_summaries, "# Checkpoint 2"),
    (
        "untrained weights",
        "cell",
        "model.load_state_dict(checkpoint.weights(tensors))",
        "len(checkpoint.weights(tensors))",
        "# Checkpoint 3",
    ),
    (
        "chance with the forced blocks",
        "cell",
        "share = (slots / free)[t]",
        "share = (c.num_selected / free)[t]",
        "# Checkpoint 3",
    ),
    ("random", "nsa_lite.rivals.rules.at_random", lambda _: rules.by_true_mass, "# Checkpoint 3"),
    ("none", "nsa_lite.rivals.rules.nothing", lambda _: rules.at_random, "# Checkpoint 3"),
    ("kinds", "nsa_lite.show.plots.block_kinds", only_forced, "# Checkpoint 4"),
    (
        "gates from the last to the first",
        "cell",
        "gates = trace.gates[:, :, first:]",
        "gates = trace.gates.flip(-1)[:, :, first:]",
        "# Checkpoint 4",
    ),
    (
        "the first evaluation",
        "cell",
        'result["evaluations"][-1]',
        'result["evaluations"][0]',
        "# Checkpoint 5",
    ),
    ("controls", "nsa_lite.lab.runs.recorded", two_controls_swapped, "# Checkpoint 5"),
]
