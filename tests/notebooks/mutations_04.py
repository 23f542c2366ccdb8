"""Faults that notebook 04 must notice: the window's edge, groups, scale, and what it reaches."""

WINDOW = "nsa_lite.attention.attend_in_window"


def one_key_more(attend_in_window):
    """The window reads t - w too."""

    def wrong(q, k, v, window, scale, start):
        window = None if window is None else window + 1
        return attend_in_window(q, k, v, window, scale, start)

    return wrong


def without_itself(attend_in_window):
    """The window ends at t - 1; query 0 has only itself."""

    def wrong(q, k, v, window, scale, start):
        out = attend_in_window(q, k, v, window, scale, start)
        if start or window is None:
            return out
        return out.roll(1, 2)

    return wrong


def always_from_the_first(attend_in_window):
    """Queries sit at 0, 1, ..., wherever the cache says."""

    def wrong(q, k, v, window, scale, start):
        return attend_in_window(q, k, v, window, scale, 0)

    return wrong


def heads_dealt_in_turn(attend):
    """Head h reads group h mod G, not the group it stands in."""

    def wrong(q, k, v, mask, scale):
        groups = k.shape[1]
        dealt = q.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2)
        out, lse = attend(dealt, k, v, mask, scale)
        return out.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2), lse

    return wrong


def no_scale(scale_of):
    """Scores are not divided by the root of D."""
    return lambda scale, width: 1.0 if scale is None else scale


MUTATIONS = [
    ("w + 1 keys", WINDOW, one_key_more, "# Checkpoint 1"),
    ("not the own key", WINDOW, without_itself, "# Checkpoint 1"),
    ("start ignored", WINDOW, always_from_the_first, "# Checkpoint 1"),
    ("keys from t - w on", "cell", "if t - s < window]", "if t - s <= window]", "# Checkpoint 1"),
    ("groups mixed up", "nsa_lite.attention.attend", heads_dealt_in_turn, "# Checkpoint 2"),
    ("scale forgotten", "nsa_lite.attention.scale_of", no_scale, "# Checkpoint 2"),
    ("slices too wide", "cell", "max(0, first - w + 1)", "max(0, first - w)", "# Checkpoint 2"),
    ("a chunk counted twice", "cell", "later = T // w - 1", "later = T // w", "# Checkpoint 2"),
    (
        "layers not stacked",
        "cell",
        "x = x + attention.window",
        "y = x + attention.window",
        "# Checkpoint 3",
    ),
    (
        "a wider window in the stack",
        "cell",
        "y @ turn, y, y, window=w",
        "y @ turn, y, y, window=w + 1",
        "# Checkpoint 3",
    ),
    (
        "no window at all",
        "cell",
        "v, window=window, scale=60.0",
        "v, window=None, scale=60.0",
        "# Checkpoint 4",
    ),
    (
        "asked a token earlier",
        "cell",
        "scale=60.0, start=T - 1",
        "scale=60.0, start=T - 2",
        "# Checkpoint 4",
    ),
    (
        "far reads the window",
        "cell",
        '"far": t <= t[:, None] - w}',
        '"far": t > t[:, None] - w}',
        "# Checkpoint 5",
    ),
]
