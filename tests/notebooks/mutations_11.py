"""Faults that the checkpoints of notebook 11 must see."""


def lists_reversed(old):
    """The readers in the wrong order."""

    def readers(ids, blocks):
        listed = old(ids, blocks)
        return listed._replace(indices=listed.indices.flip(-1))

    return readers


MUTATIONS = [
    (
        "weights not tied together",
        "cell",
        "(float(i == j) - p[t, j])",
        "float(i == j)",
        "# Checkpoint 1",
    ),
    (
        "scale forgotten in dk",
        "cell",
        "dk[j] += ds[t, j] * q[t] * scale",
        "dk[j] += ds[t, j] * q[t]",
        "# Checkpoint 1",
    ),
    (
        "only the last tile's dv",
        "cell",
        "dv = dv + p.T @ dout[rows]",
        "dv = p.T @ dout[rows]",
        "# Checkpoint 2",
    ),
    (
        "lse raised by the gate",
        "cell",
        "gated_lse = lse - gate.log()",
        "gated_lse = lse + gate.log()",
        "# Checkpoint 2",
    ),
    (
        "block 0 left out",
        "cell",
        "by_sort = order[entries >= 0] // 3",
        "by_sort = order[entries > 0] // 3",
        "# Checkpoint 3",
    ),
    (
        "readers from the last on",
        "kernels.union_and_readers.readers",
        lists_reversed,
        "# Checkpoint 3",
    ),
    (
        "the own block's future read",
        "cell",
        "later = ~past[tokens, keys].repeat(R, 1)",
        "later = (past[tokens, keys] & False).repeat(R, 1)",
        "# Checkpoint 3",
    ),
    (
        "slots added as they arrive",
        "cell",
        "room[arrival] = as_they_arrive",
        "room[:] = as_they_arrive",
        "# Checkpoint 4",
    ),
    (
        "scale forgotten in what is sent",
        "cell",
        "sent = ds[..., None] * group_q * D**-0.5",
        "sent = ds[..., None] * group_q",
        "# Checkpoint 4",
    ),
    (
        "the own key hidden",
        "cell",
        "mask = key <= token  # [l', 1]",
        "mask = key < token  # [l', 1]",
        "# Checkpoint 5",
    ),
    (
        "window w + 1",
        "kernels.window_attention",
        lambda old: lambda q, k, v, window: old(q, k, v, window=window + 1),
        "# Checkpoint 5",
    ),
]
