"""Faults that the checkpoints of notebook 13 must see."""


def spilled(old):
    """A record in which some kernel spills."""

    def load(name):
        record = old(name)
        if name == "steps_compiled":
            record["rows"][0]["spills"] = 4
        return record

    return load


def slow_step_shipped(old):
    """A record whose package kernel has lost what the last step gained."""

    def load(name):
        record = old(name)
        if name == "steps_compiled":
            row = next(row for row in record["rows"] if row["name"] == "dq_shipped")
            row["from_registers"] = 4
        return record

    return load


def three_programs_fit(old):
    """A report of ncu that has room for a third program."""

    def load(name):
        record = old(name)
        if name == "counters":
            lines = record["reports"]["forward_shipped"]
            place = next(i for i, line in enumerate(lines) if "Block Limit Shared Mem" in line)
            lines[place] = lines[place].replace("2", "3")
        return record

    return load


def slower_tile_chosen(old):
    """A record in which a tile that was not chosen is faster."""

    def load(name):
        record = old(name)
        if name == "tune":
            record["rows"][1]["ms"] = 0.9 * record["rows"][0]["ms"]
        return record

    return load


def held_is_faster(old):
    """A record in which q in registers gains what its floor does."""

    def load(name):
        record = old(name)
        if name == "steps":
            for row in record["rows"]:
                if row["name"] == "forward_6_held":
                    row["times"] = [0.8 * ms for ms in row["times"]]
        return record

    return load


MUTATIONS = [
    (
        "a launch that waits",
        "cell",
        "self.host += 0.01",
        "self.host += 0.01 + ms",
        "# Checkpoint 1",
    ),
    (
        "one rank too few",
        "benchmarks.ab.rank",
        lambda old: lambda count: old(count) - 1,
        "# Checkpoint 1",
    ),
    (
        "A is called slower where B is",
        "benchmarks.ab.compare",
        lambda old: lambda a, b: old(a, b)._replace(differs=False),
        "# Checkpoint 1",
    ),
    (
        "all of A first",
        "cell",
        '    for name in ("AB", "BA")[i % 2]:  # there and back\n',
        '    for name in "AB"[i // 10] * 2:\n',
        "# Checkpoint 1",
    ),
    (
        "registers given out one by one",
        "cell",
        "given = -(-registers // 8) * 8",
        "given = registers",
        "# Checkpoint 2",
    ),
    (
        "the system's KiB forgotten",
        "cell",
        "228 * 1024 // (shared + 1024)",
        "228 * 1024 // shared",
        "# Checkpoint 2",
    ),
    ("a kernel that spills", "benchmarks.records.load", spilled, "# Checkpoint 2"),
    (
        "the counters have room for a third program",
        "benchmarks.records.load",
        three_programs_fit,
        "# Checkpoint 2",
    ),
    (
        "a second program does not help",
        "cell",
        "min(1.0, programs * work / (work + wait))",
        "min(1.0, work / (work + wait))",
        "# Checkpoint 3",
    ),
    (
        "a faster tile was not chosen",
        "benchmarks.records.load",
        slower_tile_chosen,
        "# Checkpoint 3",
    ),
    (
        "delta from what was never stored",
        "cell",
        "delta = (stored * dout).sum(-1)",
        "delta = (out * dout).sum(-1)",
        "# Checkpoint 4",
    ),
    (
        "ds not rounded",
        "cell",
        "ds = rounded(ds) if round_ds else ds",
        "ds = ds + 0",
        "# Checkpoint 4",
    ),
    (
        "a step that is wrong",
        "benchmarks.steps.forward_3_limits.run",
        lambda old: lambda x: tuple(1.01 * y for y in old(x)),
        "# Checkpoint 5",
    ),
    (
        "the package's dq reads shared memory again",
        "benchmarks.records.load",
        slow_step_shipped,
        "# Checkpoint 5",
    ),
    (
        "q in registers gains time",
        "benchmarks.records.load",
        held_is_faster,
        "# Checkpoint 5",
    ),
    (
        "runs one after the other called turns",
        "cell",
        "runs[0::4] + runs[3::4], runs[1::4] + runs[2::4]",
        "runs[:20], runs[20:]",
        "# Checkpoint 1",
    ),
]
