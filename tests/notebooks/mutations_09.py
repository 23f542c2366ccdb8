"""Faults that the checkpoints of notebook 09 must see."""


def last_place_empty(old):
    """One block fewer than n is chosen."""

    def select_blocks(*tensors, **sizes):
        ids = old(*tensors, **sizes).clone()
        ids[..., -1] = -1
        return ids

    return select_blocks


MUTATIONS = [
    (
        "a key seen one token early",
        "cell",
        "return min(max(t + 1 - l + d, 0) // d, N)",
        "return min(max(t + 2 - l + d, 0) // d, N)",
        "# Checkpoint 1",
    ),
    (
        "a block seen once it has begun",
        "cell",
        "s = s.masked_fill(key * d + l - 1 > token[:, None], -torch.inf)",
        "s = s.masked_fill(key * d > token[:, None], -torch.inf)",
        "# Checkpoint 1",
    ),
    (
        "an empty row not guarded",
        "cell",
        "m_safe = m_new.masked_fill(m_new == -torch.inf, 0.0)",
        "m_safe = m_new",
        "# Checkpoint 1",
    ),
    (
        "old output not shrunk",
        "cell",
        "acc = acc * alpha[:, None] + p @ v",
        "acc = acc + p @ v",
        "# Checkpoint 1",
    ),
    (
        "the last key not in the sum",
        "cell",
        "final = summed_over_heads(so_far[..., -1:])",
        "final = summed_over_heads(so_far[..., -2:-1])",
        "# Checkpoint 2",
    ),
    (
        "early is final",
        "cell",
        "early = summed_over_heads(so_far[..., end_of_tile])",
        "early = summed_over_heads(so_far[..., -1:])",
        "# Checkpoint 2",
    ),
    (
        "values counted in the second pass",
        "cell",
        "two = 64 * 256 * seen / 1e12",
        "two = 64 * 512 * seen / 1e12",
        "# Checkpoint 2",
    ),
    (
        "one head only",
        "cell",
        "total += torch.exp(s - lse[0, h, token, None])",
        "total = torch.exp(s - lse[0, h, token, None])",
        "# Checkpoint 3",
    ),
    (
        "earlier keys left out",
        "cell",
        "first_key = int(j[0]) * l_sel // d - (l // d - 1)",
        "first_key = int(j[0]) * l_sel // d",
        "# Checkpoint 3",
    ),
    (
        "earlier keys left out in Triton",
        "cell",
        "    first_key -= KEYS.block_size // KEYS.stride - 1",
        "    first_key -= 0",
        "# Checkpoint 3",
    ),
    (
        "later keys counted in Triton",
        "cell",
        "(end[None, :] <= token[:, None])",
        "(end[None, :] - 1 <= token[:, None])",
        "# Checkpoint 3",
    ),
    (
        "nothing passed on",
        "cell",
        "own[:, 1:] += passed_on[:, :-1]",
        "own[:, 1:] += 0 * passed_on[:, :-1]",
        "# Checkpoint 3",
    ),
    (
        "scores negated",
        "cell",
        "rank = score.masked_fill(chosen | ~begun, -1.0)",
        "rank = (9 - score).masked_fill(chosen | ~begun, -1.0)",
        "# Checkpoint 4",
    ),
    (
        "ties to the right",
        "cell",
        "best = rank.argmax(-1, keepdim=True)",
        "best = rank.shape[-1] - 1 - rank.flip(-1).argmax(-1, keepdim=True)",
        "# Checkpoint 4",
    ),
    (
        "own block not forced in Triton",
        "cell",
        "chosen = (j <= own) & ((j < INITIAL) | (j > own - LOCAL))",
        "chosen = (j <= own) & (j < INITIAL)",
        "# Checkpoint 4",
    ),
    ("a place stays empty", "kernels.select_blocks", last_place_empty, "# Checkpoint 4"),
]
