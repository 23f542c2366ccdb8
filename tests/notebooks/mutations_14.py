"""Faults that notebook 14 must notice: in the choice, its ranking, what it missed, the counts."""

from dataclasses import replace


def worst_blocks(best_blocks):
    """The lowest scores are chosen."""
    return lambda score, *sizes: best_blocks(-score, *sizes)


def worst_first(sort_keys):
    """Blocks that were left out come in from the lowest score on."""
    return lambda score, *masks: sort_keys(-score, *masks)


def nothing_read(missed):  # noqa: ARG001
    """All of dense attention's mass beyond the window, also what is selected."""

    def wrong(sequence, place, t):
        mass = sequence.beyond[place.checkpoint][place.layer][place.group]
        return float(mass[sequence.index[t]].sum())

    return wrong


def one_key_more(mass_beyond):
    """The window holds w + 1 keys."""

    def wrong(trace, *where):
        wider = replace(trace.config, window=trace.config.window + 1)
        return mass_beyond(replace(trace, config=wider), *where)

    return wrong


def first_opened_first(brackets):  # noqa: ARG001
    """A closing bracket is paired with the earliest one that is still open."""

    def wrong(text):
        waiting = []
        pairs = []
        for t, letter in enumerate(text):
            if letter in "([{":
                waiting.append(t)
            elif letter in ")]}" and waiting:
                pairs.append((waiting.pop(0), t))
        return pairs

    return wrong


EXPLORER = "nsa_lite.show.explorer"
MUTATIONS = [
    ("the worst blocks", "nsa_lite.selection.best_blocks", worst_blocks, "# Checkpoint 1"),
    ("the ranking", f"{EXPLORER}.ranking.sort_keys", worst_first, "# Checkpoint 1"),
    ("missed", f"{EXPLORER}.sequence.TracedSequence.missed", nothing_read, "# Checkpoint 2"),
    (
        "the answer's block",
        "cell",
        "answer_at[asked] //",
        "answer_at[asked] + 8 //",
        "# Checkpoint 2",
    ),
    ("w + 1", f"{EXPLORER}.beyond.mass_beyond", one_key_more, "# Checkpoint 3"),
    ("brackets", "nsa_lite.lab.selection_runs.brackets", first_opened_first, "# Checkpoint 3"),
    ("untrained queries", "cell", '"recall": asked}', '"recall": asked - 32}', "# Checkpoint 4"),
    ("a sink's sign", "cell", "-1.0) > score", "-1.0) < score", "# Checkpoint 4"),
    ("forced blocks too", "cell", "sets = chosen & free", "sets = chosen", "# Checkpoint 5"),
    ("a union", "cell", "tiled.any(3)", "tiled.all(3)", "# Checkpoint 5"),
]
