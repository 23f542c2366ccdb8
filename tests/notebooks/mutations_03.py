"""Faults that the checkpoints of notebook 03 must see."""

import math

import torch

from nsa_lite.attention import attend
from nsa_lite.blocks import forced_blocks, visible_select_blocks


def normalised_again(old):
    """Each row of probabilities divided by its largest."""

    def compressed_probabilities(*tensors, **sizes):
        p = old(*tensors, **sizes)
        return p / p.amax(-1, keepdim=True).clamp(min=1e-9)

    return compressed_probabilities


def no_exp(old):
    return lambda *tensors, **sizes: old(*tensors, **sizes).log().clamp(min=-9)


def one_block_early(old):
    """Each selection block gets what belongs to the one behind it."""
    return lambda *arguments: old(*arguments).roll(-1, -1)


def one_stride_late(old):
    """Each compression block hands on to where its second stride begins."""
    return lambda p, *sizes: old(p.roll(1, -1), *sizes)


def touched_counts_alike(old):
    return lambda *sizes, **device: (old(*sizes, **device) > 0).float()


def negated(old):
    return lambda *arguments: -old(*arguments)


def first_head_alone(old):
    """Only the first head of each group votes."""

    def importance_of(q, k, lse, *sizes):
        group = q.shape[1] // k.shape[1]
        return old(q[:, ::group], k, lse[:, ::group], *sizes)

    return importance_of


def mean_of_the_heads(old):
    def importance_of(q, k, *more):
        return old(q, k, *more) * k.shape[1] / q.shape[1]

    return importance_of


def logits_summed(old):
    """The heads of a group are added up before the softmax."""

    def importance_of(q, k, lse, block_size, stride, select_block_size, scale, start):
        one = q.unflatten(1, (k.shape[1], -1)).sum(2)
        ended = torch.arange(k.shape[2]) * stride + block_size - 1
        mask = ended <= torch.arange(q.shape[2])[:, None]
        _, one_lse = attend(one, k, k, mask, scale)
        return old(one, k, one_lse, block_size, stride, select_block_size, scale, start)

    return importance_of


def ranked(again=True, forced_score=math.inf, stable=True, ascending=True, local=0):
    """best_blocks with one step changed."""

    def fault(old):
        def best_blocks(score, size, num_selected, num_initial, num_local, start):
            t = torch.arange(start, start + score.shape[2])
            count = score.shape[3]
            legal = visible_select_blocks(t, count, size)
            forced = forced_blocks(t, count, size, num_initial, num_local + local)
            rank = torch.where(forced, score + forced_score, score).masked_fill(~legal, -math.inf)
            if stable:
                order = rank.sort(dim=-1, descending=True, stable=True).indices
            else:  # equal ones to the higher id
                order = count - 1 - rank.flip(-1).sort(descending=True, stable=True).indices
            order = order[..., :num_selected]
            if again:
                order = order.masked_fill(~legal.expand_as(rank).gather(-1, order), count)
            ids = order.sort(-1).values if ascending else order
            return ids.masked_fill(ids == count, -1).int()

        return best_blocks

    return fault


def minus_one_is_block_0(old):
    return lambda ids, *more: old(ids.clamp(min=0), *more)


def whole_own_block(old):
    """A query reads its own block to the end."""
    return lambda ids, positions, size: old(ids, positions // size * size + size - 1, size)


def own_token_left_out(old):
    return lambda ids, positions, size: old(ids, (positions - 1).clamp(min=0), size)


def every_block_read(old):
    """Dense attention, whatever was chosen."""

    def attend_to_blocks(q, k, v, ids, scale, size, start):
        mask = torch.ones(q.shape[2], k.shape[2]).tril(start).bool()
        return attend(q, k, v, mask, scale)[0]

    return attend_to_blocks


PACKAGE = "nsa_lite.selection"
MUTATIONS = [
    (
        "normalised again",
        f"{PACKAGE}.compressed_probabilities",
        normalised_again,
        "# Checkpoint 1",
    ),
    ("no exp", f"{PACKAGE}.compressed_probabilities", no_exp, "# Checkpoint 1"),
    ("loop one query early", "cell", "if 2 * i + 4 - 1 <= t:", "if 2 * i <= t:", "# Checkpoint 1"),
    ("a block early", f"{PACKAGE}.shared_out", one_block_early, "# Checkpoint 2"),
    ("a stride late", f"{PACKAGE}.shared_out", one_stride_late, "# Checkpoint 2"),
    (
        "touched counts alike",
        "nsa_lite.blocks.overlap_in_strides",
        touched_counts_alike,
        "# Checkpoint 2",
    ),
    (
        "Eq. 9 read 0-based",
        "cell",
        "(**sizes, sign=-1, base=1)",
        "(**sizes, sign=-1)",
        "# Checkpoint 2",
    ),
    ("negated", f"{PACKAGE}.importance_of", negated, "# Checkpoint 3"),
    ("first head alone", f"{PACKAGE}.importance_of", first_head_alone, "# Checkpoint 3"),
    ("mean of the heads", f"{PACKAGE}.importance_of", mean_of_the_heads, "# Checkpoint 3"),
    ("logits summed", f"{PACKAGE}.importance_of", logits_summed, "# Checkpoint 3"),
    ("a block early, all heads", f"{PACKAGE}.importance_of", one_block_early, "# Checkpoint 3"),
    ("not masked again", f"{PACKAGE}.best_blocks", ranked(again=False), "# Checkpoint 4"),
    ("forced by adding 1", f"{PACKAGE}.best_blocks", ranked(forced_score=1.0), "# Checkpoint 4"),
    ("ties to the higher id", f"{PACKAGE}.best_blocks", ranked(stable=False), "# Checkpoint 4"),
    ("best first", f"{PACKAGE}.best_blocks", ranked(ascending=False), "# Checkpoint 4"),
    ("a local block too many", f"{PACKAGE}.best_blocks", ranked(local=1), "# Checkpoint 4"),
    (
        "worst blocks",
        f"{PACKAGE}.best_blocks",
        lambda old: lambda score, *rule: old(-score, *rule),
        "# Checkpoint 4",
    ),
    ("-1 is block 0", f"{PACKAGE}.selected_mask", minus_one_is_block_0, "# Checkpoint 5"),
    ("own block to its end", f"{PACKAGE}.selected_mask", whole_own_block, "# Checkpoint 5"),
    ("own token left out", f"{PACKAGE}.selected_mask", own_token_left_out, "# Checkpoint 5"),
    ("every block read", f"{PACKAGE}.attend_to_blocks", every_block_read, "# Checkpoint 5"),
]
