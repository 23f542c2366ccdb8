"""Faults that the checkpoints of notebook 15 must see."""

import torch


def one_more_recent(streaming_llm):
    """A window of w + 1."""
    return lambda *qkv, window, **how: streaming_llm(*qkv, window=window + 1, **how)


def places_of_the_text(rotate_and_read):
    """The sinks as far off as in the text: a cache that never moves them nearer."""
    from nsa_lite import attention
    from nsa_lite.rope import rotate

    def wrong(q, k, v, *, sinks, window, theta=10_000.0):
        _, read = rotate_and_read(q, k, v, sinks=sinks, window=window, theta=theta)
        t = torch.arange(q.shape[2])
        q, k = rotate(q, t, theta), rotate(k, t, theta)
        mask = read.unflatten(1, (k.shape[1], -1))
        return attention.attend(q, k, v, mask, None)[0], read

    return wrong


def newest_only(h2o):
    """No heavy hitters: the cache is the newest tokens, as in a window."""

    def wrong(q, k, v, *, recent, heavy):
        _, read = h2o(q, k, v, recent=recent + heavy, heavy=0)
        return h2o(q, k, v, recent=recent, heavy=heavy)[0], read

    return wrong


def means_for_bounds(page_bounds):
    """The middle of a page's box for both of its ends."""

    def wrong(k, page):
        low, high = page_bounds(k, page)
        return (low + high) / 2, (low + high) / 2

    return wrong


def products_with_the_largest(page_scores):
    """q M in every channel, whatever the sign of q."""
    return lambda q, low, high: page_scores(q, high, high)


def all_samples(sample_attention):
    """Samples behind the query, too."""
    return lambda *qkv, **how: sample_attention(*qkv, **{**how, "whole_prompt": True})


def the_heaviest_column_left_out(smallest_columns):
    """One column fewer than the share asks for."""

    def wrong(mass, share):
        columns = smallest_columns(mass, share)
        return columns.scatter(-1, mass.argmax(-1, keepdim=True), False)

    return wrong


def n_one_too_large(sweep_table):
    """NSA's scores under the n before theirs."""

    def wrong(recorded, task):
        table = sweep_table(recorded, task)
        for name in {"nsa", "nsa-thin"} & set(table):
            points = table[name]
            table[name] = [
                {**q, "settings": p["settings"]}
                for p, q in zip(points, [*points[1:], points[-1]], strict=True)
            ]
        return table

    return wrong


STREAMING = "nsa_lite.rivals.neighbours.streaming_llm"
H2O = "nsa_lite.rivals.neighbours.h2o"
SAMPLE = "nsa_lite.rivals.neighbours.sample_attention"
MUTATIONS = [
    ("window w + 1", STREAMING, one_more_recent, "# Checkpoint 1"),
    ("places of the text", STREAMING, places_of_the_text, "# Checkpoint 1"),
    ("a sink leaves", "cell", "del cache[s]", "del cache[s - 1]", "# Checkpoint 1"),
    ("recent ones only", H2O, newest_only, "# Checkpoint 2"),
    ("the heaviest leaves", "cell", "kept.remove(min(", "kept.remove(max(", "# Checkpoint 2"),
    ("boxes", "nsa_lite.rivals.neighbours.page_bounds", means_for_bounds, "# Checkpoint 3"),
    (
        "the sign of q",
        "nsa_lite.rivals.neighbours.page_scores",
        products_with_the_largest,
        "# Checkpoint 3",
    ),
    ("u by hand", "cell", "u += larger", "u = larger", "# Checkpoint 3"),
    ("samples of the future", SAMPLE, all_samples, "# Checkpoint 4"),
    (
        "too few columns",
        "nsa_lite.rivals.neighbours.smallest_columns",
        the_heaviest_column_left_out,
        "# Checkpoint 4",
    ),
    ("another n", "nsa_lite.rivals.budgets.sweep_table", n_one_too_large, "# Checkpoint 5"),
]
