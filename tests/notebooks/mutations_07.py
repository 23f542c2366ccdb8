"""Faults that the checkpoints of notebook 07 must see."""

import torch


def diagonal_hidden(old):
    """Each query misses its own key."""

    def dense_attention(q, k, v):
        length = q.shape[2]
        earlier = torch.ones(length, length, dtype=torch.bool).tril(-1)
        p = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~earlier, -1e4).softmax(-1)
        return p @ v

    return dense_attention


MUTATIONS = [
    (
        "scale forgotten",
        "cell",
        "scaled = q * q.shape[1] ** -0.5 ",
        "scaled = q * 1 ",
        "# Checkpoint 1",
    ),
    (
        "another attention",
        "nsa_lite.attention.dense_attention",
        diagonal_hidden,
        "# Checkpoint 1",
    ),
    (
        "what is written not counted",
        "cell",
        "made = out if isinstance(out, tuple) else (out,)",
        "made = ()",
        "# Checkpoint 1",
    ),
    (
        "only the keys counted",
        "cell",
        "read = sum(x.nbytes for x in args if isinstance(x, torch.Tensor))",
        "read = args[0].nbytes",
        "# Checkpoint 1",
    ),
    (
        "values left out",
        "cell",
        "needed = q.nbytes + k.nbytes + v.nbytes + out.nbytes",
        "needed = q.nbytes + k.nbytes + out.nbytes",
        "# Checkpoint 1",
    ),
    (
        "old sums not shrunk",
        "cell",
        "return score, total * shrink + 1, out * shrink + value",
        "return score, total + 1, out + value",
        "# Checkpoint 2",
    ),
    (
        "old output not shrunk in a tile",
        "cell",
        "out[row] = out[row] * shrink + p @ v",
        "out[row] = out[row] + p @ v",
        "# Checkpoint 2",
    ),
    (
        "the last piece left out",
        "cell",
        "for i in range(0, T, 4):  # pieces of N = 4 keys",
        "for i in range(0, T - 4, 4):  # pieces of N = 4 keys",
        "# Checkpoint 2",
    ),
    (
        "lse left in powers of two",
        "cell",
        "lse_twos = (m_twos + total_twos.log2()) * LN2",
        "lse_twos = m_twos + total_twos.log2()",
        "# Checkpoint 2",
    ),
    (
        "merged without shrinking b",
        "cell",
        "out = out_a * shrink_a[:, None] + out_b * shrink_b[:, None]",
        "out = out_a * shrink_a[:, None] + out_b",
        "# Checkpoint 3",
    ),
    (
        "an empty row not skipped",
        "cell",
        "sees = scores.amax(1) > -inf",
        "sees = scores.amax(1) >= -inf",
        "# Checkpoint 3",
    ),
    (
        "finish forgets m",
        "cell",
        "torch.where(seen, m + divisor.log(), -inf)",
        "torch.where(seen, divisor.log(), -inf)",
        "# Checkpoint 3",
    ),
    (
        "an empty row has lse 0",
        "cell",
        "torch.where(seen, m + divisor.log(), -inf)",
        "torch.where(seen, m + divisor.log(), 0.0)",
        "# Checkpoint 3",
    ),
    (
        "window w + 1",
        "cell",
        "low = max(first - window + 1, 0) // N * N  # down to the edge of a tile",
        "low = max(first - window, 0) // N * N  # down to the edge of a tile",
        "# Checkpoint 4",
    ),
    (
        "edges taken for full",
        "cell",
        "full_high = max((first + 1) // N * N, full_low)",
        "full_high = max((last + 1) // N * N, full_low)",
        "# Checkpoint 4",
    ),
    (
        "one key beyond",
        "cell",
        "high = min(last + 1, S)",
        "high = min(last + 2, S)",
        "# Checkpoint 4",
    ),
    (
        "rows dealt out head after head",
        "cell",
        "    head = g * R + row % R\n\n    q_tile",
        "    head = g + row % R * G\n\n    q_tile",
        "# Checkpoint 4",
    ),
    (
        "a block seen one query early",
        "cell",
        "end = torch.arange(count) * stride + block_size - 1",
        "end = torch.arange(count) * stride + block_size - 2",
        "# Checkpoint 4",
    ),
    (
        "values not counted",
        "cell",
        "moved += number * (D + Dv) * keys  # keys and values",
        "moved += number * D * keys  # keys and values",
        "# Checkpoint 5",
    ),
    (
        "window ignored in the count",
        "cell",
        "walk = tiles_of(tile, T, R, window, M, N)\n        keys",
        "walk = tiles_of(tile, T, R, None, M, N)\n        keys",
        "# Checkpoint 5",
    ),
]
