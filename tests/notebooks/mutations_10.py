"""Faults that the checkpoints of notebook 10 must see."""


def last_entry_lost(old):
    """Each union lacks its last block."""

    def union(ids, *, neighbours, blocks):
        listed = old(ids, neighbours=neighbours, blocks=blocks)
        return listed._replace(counts=listed.counts - 1)

    return union


MUTATIONS = [
    (
        "padding counted as block 0",
        "cell",
        "mask = ((j >= 0) & (key <= t))[None, :]",
        "mask = (key <= t)[None, :]",
        "# Checkpoint 1",
    ),
    (
        "no topics",
        "cell",
        "topics[topic_of_token] + 0.5 * noise",
        "0 * topics[topic_of_token] + 0.5 * noise",
        "# Checkpoint 2",
    ),
    (
        "new where it appears last",
        "cell",
        "new = real & ~same.tril(-1).any(1)",
        "new = real & ~same.triu(1).any(1)",
        "# Checkpoint 3",
    ),
    (
        "the kernel loses an entry",
        "kernels.union_and_readers.union",
        last_entry_lost,
        "# Checkpoint 3",
    ),
    (
        "another token's bit",
        "cell",
        "chosen = (entry >> (row // R)) & 1 > 0",
        "chosen = (entry >> (row % 4)) & 1 > 0",
        "# Checkpoint 4",
    ),
    (
        "old output not shrunk",
        "cell",
        "acc = tl.dot(p, v_tile, acc * alpha[:, None]",
        "acc = tl.dot(p, v_tile, acc",
        "# Checkpoint 4",
    ),
    (
        "rows that are not filled cost nothing",
        "cell",
        "products.append(blocks * max(1, U * R // 64))",
        "products.append(blocks * U * R / 64)",
        "# Checkpoint 5",
    ),
]
