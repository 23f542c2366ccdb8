"""Faults that the checkpoints of notebook 18 must see."""

import torch
from torch.nn.functional import pad

from nsa_lite.blocks import forced_blocks


def sum_for_the_largest(old):
    """NSA's Eq. 9 in place of InfLLM-V2's largest."""

    def largest_touching(known, p):
        c = known.config
        before = c.block_size // c.stride - 1
        inside = c.select_block_size // c.stride
        behind = old(known, p).shape[-1] * inside - p.shape[-1]
        return pad(p, (before, behind)).unfold(-1, before + inside, inside).sum(-1)

    return largest_touching


def only_those_inside(old):
    """Windows that reach in from the block before are left out."""

    def largest_touching(known, p):
        c = known.config
        inside = c.select_block_size // c.stride
        behind = old(known, p).shape[-1] * inside - p.shape[-1]
        return pad(p, (0, behind)).unflatten(-1, (-1, inside)).amax(-1)

    return largest_touching


def one_block_early(old):
    return lambda known, p: old(known, p).roll(-1, -1)


def first_head_alone(old):
    """The heads of a group do not vote together."""

    def attention_probabilities(q, k, mask, scale):
        p, lse = old(q, k, mask, scale)
        return p[:, :, :1].expand_as(p), lse

    return attention_probabilities


def without_relu(old):
    return lambda q, k, w: torch.einsum("btj,btjd,bsd->bts", w, q, k)


def one_block_fewer(old):
    """One local block less is forced."""

    def forced(positions, count, size, num_initial, num_local):
        return forced_blocks(positions, count, size, num_initial, num_local - 1)

    return forced


def mask_forgotten(old):
    """attend reads every key."""
    return lambda q, k, v, mask, scale: old(q, k, v, torch.ones_like(mask), scale)


def one_block_to_the_left(old):
    """Another choice than the one that the notebook counts."""
    return lambda ids, size, start=0: old(torch.where(ids > 0, ids - 1, ids), size, start)


FIRST = "# Checkpoint 1"
RIVAL = "nsa_lite.rivals.successors"
MUTATIONS = [
    ("summed, not the largest", f"{RIVAL}.largest_touching", sum_for_the_largest, FIRST),
    ("windows reaching in left out", f"{RIVAL}.largest_touching", only_those_inside, FIRST),
    ("a block early", f"{RIVAL}.largest_touching", one_block_early, FIRST),
    ("one head votes", "nsa_lite.attention.attention_probabilities", first_head_alone, FIRST),
    ("no ReLU", f"{RIVAL}.lightning_scores", without_relu, FIRST),
    (
        "tail's mass for the head's",
        "cell",
        "tau = p.masked_fill(head, 0).sum(-1)",
        "tau = p.masked_fill(~head, 0).sum(-1)",
        "# Checkpoint 2",
    ),
    (
        "head's mean not divided",
        "cell",
        "mu_head = (p * head) @ v / (1 - tau)[:, None]",
        "mu_head = (p * head) @ v",
        "# Checkpoint 2",
    ),
    (
        "KL the other way round",
        "cell",
        "kl = torch.xlogy(only_head, only_head / p).sum(-1)",
        "kl = -torch.xlogy(only_head, only_head / p).sum(-1)",
        "# Checkpoint 2",
    ),
    (
        "blocks by their worst key",
        "cell",
        "by_mass = p.unflatten(-1, (32, 8)).sum(-1)",
        "by_mass = p.unflatten(-1, (32, 8)).amin(-1)",
        "# Checkpoint 2",
    ),
    (
        "outputs not compared",
        "cell",
        "loss = F.smooth_l1_loss(full, sparse.detach()) + F.smooth_l1_loss(full.detach(), sparse)",
        "loss = F.smooth_l1_loss(full, full.detach()) + F.smooth_l1_loss(sparse.detach(), sparse)",
        "# Checkpoint 2",
    ),
    ("largest for the mean", "cell", "return k.mean(-2)", "return k.amax(-2)", "# Checkpoint 3"),
    (
        "D / B for D / 2B",
        "cell",
        "return DELTA * (D / (2 * size)) ** 0.5",
        "return DELTA * (D / size) ** 0.5",
        "# Checkpoint 3",
    ),
    (
        "the gate shut",
        "cell",
        "(self.gate(k) + self.place).softmax(-2)",
        "(0 * self.gate(k) + self.place).softmax(-2)",
        "# Checkpoint 3",
    ),
    (
        "one local block fewer",
        "nsa_lite.blocks.forced_blocks",
        one_block_fewer,
        "# Checkpoint 4",
    ),
    (
        "one local block more",
        "cell",
        "blocks.forced_blocks(t, T // SIZE, SIZE, 0, local)",
        "blocks.forced_blocks(t, T // SIZE, SIZE, 0, local + 1)",
        "# Checkpoint 4",
    ),
    ("mask forgotten", "nsa_lite.attention.attend", mask_forgotten, "# Checkpoint 4"),
    (
        "window of 4",
        "cell",
        '"window of 3": causal & (steps_back < 3)',
        '"window of 3": causal & (steps_back < 4)',
        "# Checkpoint 4",
    ),
    (
        "own layers only",
        "cell",
        "told = told | (mask.float() @ told.float() > 0)",
        "told = told | mask",
        "# Checkpoint 4",
    ),
    ("another coherence", "nsa_lite.lab.coherence.kept", one_block_to_the_left, "# Checkpoint 5"),
    (
        "forced blocks counted",
        "cell",
        "return chosen & (j > 0) & (j < own[:, None] - 1)",
        "return chosen & (j < own[:, None] - 1)",
        "# Checkpoint 5",
    ),
    (
        "the same token, not the one before",
        "cell",
        "its = free_choice(before)[:, : LENGTH - lag]",
        "its = free_choice(before)[:, lag:]",
        "# Checkpoint 5",
    ),
]
