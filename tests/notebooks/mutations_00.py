"""Faults that the checkpoints of notebook 00 must see."""


def window_of_one_more(old):
    """w + 1 keys in the window."""

    def tokens_read(config, position, kind="nsa"):
        read = old(config, position, kind)
        return {**read, "window": min(config.window + 1, position + 1)}

    return tokens_read


def one_place_stays_empty(old):
    """One block fewer than n is chosen."""

    def best_blocks(score, size, num_selected, *rule):
        ids = old(score, size, num_selected, *rule)
        ids[..., num_selected - 1] = -1
        return ids

    return best_blocks


def next_block_begun(old):
    """A block counts as begun one query too early."""
    return lambda positions, count, size: old(positions + 1, count, size)


def early_queries_read_all_their_block(old):
    """The first block's queries count all of its tokens."""

    def tokens_read(config, position, kind="nsa"):
        read = old(config, position, kind)
        if kind == "nsa" and position < config.select_block_size:
            read["selected"] = config.select_block_size
        return read

    return tokens_read


def blocks_of_whole_length(old):
    """(T - l) / d in place of T / d, as the text of section 5.2 has it."""
    return lambda config, length: old(config, max(1, length - config.block_size))


def seen_one_query_early(old):
    return lambda positions, *sizes: old(positions + 1, *sizes)


def own_block_to_its_end(old):
    return lambda ids, positions, size: old(ids, positions // size * size + size - 1, size)


CHOICE = "nsa_lite.selection.best_blocks"
MUTATIONS = [
    (
        "a package is missing",
        "nsa_lite.lab.environment.check",
        lambda old: lambda: False,
        "# Checkpoint 1",
    ),
    ("w + 1 counted", "nsa_lite.cost.tokens_read", window_of_one_more, "# Checkpoint 2"),
    ("a place stays empty", CHOICE, one_place_stays_empty, "# Checkpoint 2"),
    (
        "a block begins early",
        "nsa_lite.blocks.visible_select_blocks",
        next_block_begun,
        "# Checkpoint 2",
    ),
    (
        "own block counted whole",
        "nsa_lite.cost.tokens_read",
        early_queries_read_all_their_block,
        "# Checkpoint 3",
    ),
    ("loop's window w + 1", "cell", "if s > t - w]", "if s >= t - w]", "# Checkpoint 3"),
    (
        "loop's blocks once begun",
        "cell",
        "for i in range(t + 1) if i * d + l - 1 <= t]",
        "for i in range(t + 1) if i * d <= t]",
        "# Checkpoint 3",
    ),
    ("T less a block", "nsa_lite.cost.paper_tokens", blocks_of_whole_length, "# Checkpoint 4"),
    (
        "compressed block seen early",
        "nsa_lite.blocks.visible_compressed",
        seen_one_query_early,
        "# Checkpoint 5",
    ),
    (
        "own block to its end",
        "nsa_lite.selection.selected_mask",
        own_block_to_its_end,
        "# Checkpoint 5",
    ),
]
