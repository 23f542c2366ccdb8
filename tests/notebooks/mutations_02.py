"""Faults that the checkpoints of notebook 02 must see."""

import torch

from nsa_lite.attention import attend
from nsa_lite.blocks import query_positions, visible_compressed


def tail_counted(old):
    """A last block that is cut short counts as well."""
    return lambda length, block_size, stride: -(-max(0, length - block_size) // stride) + 1


def below_zero(old):
    return lambda length, block_size, stride: (length - block_size) // stride + 1


def last_token_first(old):
    """The tokens of each block in the wrong order."""
    return lambda x, block_size, stride: old(x, block_size, stride).flip(-2)


def one_token_late(old):
    """Each block holds the tokens behind its own."""
    return lambda x, block_size, stride: old(x.roll(-1, 2), block_size, stride)


def no_position(old):
    return lambda self, x: self.mlp(x.unfold(2, 4, 2).transpose(-1, -2).flatten(-2))


def once_it_has_begun(old):
    def visible(positions, count, block_size, stride):
        return torch.arange(count) * stride <= positions[:, None]

    return visible


def one_query_early(old):
    return lambda positions, *sizes: old(positions + 1, *sizes)


def one_query_late(old):
    return lambda positions, *sizes: old(positions - 1, *sizes)


def no_scale(old):
    return lambda q, k, v, block_size, stride, scale, start: old(
        q, k, v, block_size, stride, 1.0, start
    )


def empty_rows_even(old):
    """A query that sees nothing gets the mean of all values."""

    def attend_compressed(q, k, v, block_size, stride, scale, start):
        mask = visible_compressed(query_positions(q, start), k.shape[2], block_size, stride)
        return attend(q, k, v, mask | ~mask.any(-1, keepdim=True), scale)

    return attend_compressed


def one_block_too_few(old):
    """The newest block that a query may see is left out."""
    return lambda x, *more: old(x, *more)[:, :, :-1]


def lse_with_the_scale_left_out(old):
    def attend_compressed(*arguments):
        out, lse = old(*arguments)
        return out, lse / arguments[0].shape[3] ** -0.5

    return attend_compressed


def not_turned(old):
    return lambda x, positions, theta=10_000.0: x


def turned_by_the_square(old):
    """Angles that grow with the square of the position: no function of the distance alone."""
    return lambda x, positions, theta=10_000.0: old(x, positions**2, theta)


def tokens_for_blocks(old):
    """T / d, whether the last block has ended or not."""

    def tokens_read(config, position, kind="nsa"):
        return {**old(config, position, kind), "compressed": (position + 1) // config.stride}

    return tokens_read


MUTATIONS = [
    ("tail counted", "nsa_lite.blocks.num_compressed", tail_counted, "# Checkpoint 1"),
    ("below zero", "nsa_lite.blocks.num_compressed", below_zero, "# Checkpoint 1"),
    (
        "cuts counted from every token",
        "cell",
        "for s in tokens[:-1]:",
        "for s in tokens:",
        "# Checkpoint 1",
    ),
    ("tokens in reverse", "nsa_lite.compression.split_blocks", last_token_first, "# Checkpoint 2"),
    ("blocks a token late", "nsa_lite.compression.split_blocks", one_token_late, "# Checkpoint 2"),
    ("no position", "nsa_lite.compression.Phi.forward", no_position, "# Checkpoint 2"),
    ("a mean that is weighed", "cell", "(k + p).mean(0)", "(k * p).mean(0)", "# Checkpoint 2"),
    ("seen once begun", "nsa_lite.blocks.visible_compressed", once_it_has_begun, "# Checkpoint 3"),
    ("seen too early", "nsa_lite.blocks.visible_compressed", one_query_early, "# Checkpoint 3"),
    ("seen too late", "nsa_lite.blocks.visible_compressed", one_query_late, "# Checkpoint 3"),
    ("no scale", "nsa_lite.compression.attend_compressed", no_scale, "# Checkpoint 4"),
    (
        "empty rows even",
        "nsa_lite.compression.attend_compressed",
        empty_rows_even,
        "# Checkpoint 4",
    ),
    (
        "a block too few",
        "nsa_lite.compression.finished_blocks",
        one_block_too_few,
        "# Checkpoint 4",
    ),
    (
        "lse of other scores",
        "nsa_lite.compression.attend_compressed",
        lse_with_the_scale_left_out,
        "# Checkpoint 4",
    ),
    ("no rotation", "nsa_lite.rope.rotate", not_turned, "# Checkpoint 5"),
    ("angles by the square", "nsa_lite.rope.rotate", turned_by_the_square, "# Checkpoint 5"),
    ("T / d read", "nsa_lite.cost.tokens_read", tokens_for_blocks, "# Checkpoint 5"),
    (
        "only one half of GELU",
        "cell",
        "leaves[:, D:] = -eye",
        "leaves[:, D:] = eye",
        "# Checkpoint 5",
    ),
]
