"""Faults that the checkpoints of notebook 12 must see."""

from nsa_lite.attention import KV


def without_the_window(paper_tokens):
    """Table 4 with two of three parts."""
    return lambda config, length: paper_tokens(config, length) - config.window


def tokens_backwards(tokens_of):
    """phi gets a block's tokens from the last to the first."""
    return lambda *block: KV(*(x.flip(2) for x in tokens_of(*block)))


def first_head_only(importance_of):
    """One head chooses for its group."""

    def wrong(q, k, lse, *sizes):
        groups = k.shape[1]
        first = q.unflatten(1, (groups, -1))[:, :, 0]
        return importance_of(first, k, lse.unflatten(1, (groups, -1))[:, :, 0], *sizes)

    return wrong


def gates_of_one_head(decode_step):
    """Every head gets head 0's gates."""

    def wrong(q, cache, gates, **sizes):
        return decode_step(q, cache, gates[:, :1].expand_as(gates), **sizes)

    return wrong


def a_hundred_times_as_fast(load):
    """Times that no memory could keep up with."""

    def wrong(name):
        record = load(name)
        for row in record["rows"]:
            row |= {key: row[key] / 100 for key in ("graph_us", "eager_us") if key in row}
        return record

    return wrong


def least_likely(next_tokens):
    """Greedy the wrong way round."""
    return lambda logits, *how: next_tokens(-logits, *how)


MUTATIONS = [
    (
        "513 keys in the window",
        "cell",
        "dense_step(q, k[-512:], v[-512:])",
        "dense_step(q, k[-513:], v[-513:])",
        "# Checkpoint 1",
    ),
    ("Table 4", "nsa_lite.cost.paper_tokens", without_the_window, "# Checkpoint 1"),
    (
        "all behind the longest",
        "cell",
        "buffer[b, :, lengths[b] + i] = new",
        "buffer[b, :, lengths.max() + i] = new",
        "# Checkpoint 2",
    ),
    (
        "a block one token late",
        "cell",
        "i * stride + block_size <= length",
        "i * stride + block_size < length",
        "# Checkpoint 2",
    ),
    ("phi's tokens", "nsa_lite.cache.Cache.tokens_of", tokens_backwards, "# Checkpoint 2"),
    (
        "sums at their own maxima",
        "cell",
        "total += factor * sums[p, r]",
        "total += sums[p, r]",
        "# Checkpoint 3",
    ),
    (
        "a key behind the last",
        "cell",
        "(key < S)[None, :], scale * LOG2E",
        "(key < S + 1)[None, :], scale * LOG2E",
        "# Checkpoint 3",
    ),
    ("exp2 without log2(e)", "cell", "scale * LOG2E", "scale", "# Checkpoint 3"),
    (
        "no launch waits",
        "cell",
        "free_at = [now] * multiprocessors",
        "free_at = [0] * multiprocessors",
        "# Checkpoint 3",
    ),
    (
        "shares at their own maxima",
        "cell",
        "torch.exp2(maxima - lse)[:, :, None]",
        "torch.exp2(-lse).expand_as(maxima)[:, :, None]",
        "# Checkpoint 4",
    ),
    ("head 0 only", "nsa_lite.selection.importance_of", first_head_only, "# Checkpoint 4"),
    ("gates", "kernels.decode_step", gates_of_one_head, "# Checkpoint 4"),
    ("a record too fast", "benchmarks.records.load", a_hundred_times_as_fast, "# Checkpoint 5"),
    (
        "beside the slower dense one",
        "cell",
        "dense = min(graph_us(name, batch, length)",
        "dense = max(graph_us(name, batch, length)",
        "# Checkpoint 5",
    ),
    ("greedy", "nsa_lite.generation.next_tokens", least_likely, "# Checkpoint 5"),
    (
        "top-p without the token that crosses",
        "nsa_lite.generation.likeliest",
        lambda old: lambda p, top_p: old(p, top_p - 0.26),
        "# Checkpoint 5",
    ),
]
