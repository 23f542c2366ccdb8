"""Set 12, is it faster: floors, work, a report, occupancy, a clock that lies, a walk that waits."""

from exercises.compare import matches, name_mistake
from exercises.records import Case, Exercise, in_turn
from nsa_lite.show import tables
from nsa_lite.show.tables import Column

from . import mistakes, watching

# --- 12.1 ---

H100 = {"operations": 744e12, "bytes": 3.03e12}  # benchmarks/results/ceilings.json, rounded
FLOORS = {
    "arithmetic": dict(operations=70_370_000_000_000, moved=2_300_000_000, card=H100),
    "memory": dict(operations=4_300_000_000, moved=3_300_000_000, card=H100),
    "as many operations as bytes": dict(operations=10**9, moved=10**9, card=H100),
    "more operations than bytes, and memory": dict(operations=9 * 10**9, moved=10**9, card=H100),
    "both at once": dict(
        operations=3 * 10**10, moved=10**9, card={"operations": 3e13, "bytes": 1e12}
    ),
    "a slower card": dict(
        operations=10**12, moved=7 * 10**9, card={"operations": 2e13, "bytes": 4e11}
    ),
    "a card that computes slowly": dict(
        operations=10**12, moved=3 * 10**10, card={"operations": 1e12, "bytes": 1e12}
    ),
}


def floor_case(generator, name, operations, moved, card) -> Case:
    """Both times by hand."""
    arithmetic = operations / card["operations"]
    memory = moved / card["bytes"]
    bound = "memory" if memory > arithmetic else "arithmetic"
    arguments = dict(operations=operations, moved=moved, card=card)
    expected = (1000 * max(arithmetic, memory), bound)
    axes = {"milliseconds": (), "bound": ()}
    return Case(name, arguments, expected, axes, explain_floor)


def explain_floor(got, expected, **arguments):
    """A known mistake in the time, or else in its name."""
    given = tuple(arguments.values())
    if not matches(got[0], expected[0]):
        return name_mistake(got, mistakes.FLOORS, given, part=lambda result: result[0])
    if got[1] not in ("arithmetic", "memory"):
        return f"the bound is {got[1]!r}, and it is one of 'arithmetic' and 'memory'"
    operations, moved, card = given
    if operations * card["bytes"] == moved * card["operations"]:
        return "both take equally long: then it is called arithmetic"
    return name_mistake(got, mistakes.NAMES, given, part=lambda result: result[1])


# --- 12.2 ---

SIZES = {
    "longer than the window": dict(length=50, window=7, heads=6, groups=2, widths=(5, 3)),
    "as long as the window": dict(length=12, window=12, heads=4, groups=1, widths=(6, 4)),
    "shorter than the window": dict(length=9, window=30, heads=8, groups=2, widths=(7, 7)),
    "one key": dict(length=20, window=1, heads=3, groups=3, widths=(4, 6), size=4),
    "one token": dict(length=1, window=5, heads=10, groups=5, widths=(3, 2), size=8),
    "one byte a number": dict(length=33, window=10, heads=12, groups=4, widths=(9, 5), size=1),
    "the paper's sizes": dict(length=3000, window=512, heads=64, groups=4, widths=(192, 128)),
}


def work_case(generator, name, length, window, heads, groups, widths, size=2) -> Case:
    """Operations pair by pair, bytes tensor by tensor."""
    sizes = dict(length=length, window=window, heads=heads, kv_heads=groups)
    sizes |= dict(head_dim=widths[0], value_dim=widths[1], number_bytes=size)
    pairs = sum(len(range(max(0, t - window + 1), t + 1)) for t in range(length))
    operations = heads * pairs * 2 * sum(widths)
    q, k = (length * count * widths[0] * size for count in (heads, groups))
    out, v = (length * count * widths[1] * size for count in (heads, groups))
    expected = (operations, q + k + v + out + 4 * length * heads)
    axes = {"operations": (), "bytes": ()}
    return Case(name, dict(sizes=sizes), expected, axes, explain_work)


def explain_work(got, expected, sizes):
    """A known mistake in the operations, or else in the bytes."""
    if not matches(got[0], expected[0]):
        return name_mistake(got, mistakes.OPERATIONS, (sizes,), part=lambda result: result[0])
    return name_mistake(got, mistakes.BYTES, (sizes,), part=lambda result: result[1])


# --- 12.3 ---

HEADINGS = {
    "kernel": 16,
    "variant": 17,
    "warps": 6,
    "stages": 7,
    "shared": 7,
    "registers": 10,
    "spills": 7,
    "HGMMA": 6,
    "HMMA": 5,
    "waits": 6,
    "instructions": 13,
}
ROWS = {  # kernel, variant, registers, spills, HGMMA, HMMA, waits
    "forward": ("flash_forward", "window", 150, 0, 48, 0, 6),
    "scores": ("block_scores", "compressed", 153, 0, 1, 0, 1),
    "top": ("top_blocks", "", 12, 0, 0, 0, 0),
    "mix": ("mix", "128 wide", 54, 0, 0, 0, 0),
    "dkdv": ("flash_dkdv", "compressed gated", 255, 11, 48, 0, 12),
    "serial": ("selected_dq", "", 248, 0, 24, 0, 24),
    "all": ("flash_dq", "window gated", 255, 320, 16, 8, 16),
    "slow": ("union_forward", "", 255, 6, 0, 64, 0),
    "slow only": ("decode", "64 wide", 96, 0, 0, 32, 0),
    "few": ("selected_forward", "gated", 168, 0, 8, 0, 7),
}
REPORTS = {
    "nothing wrong": dict(rows=["forward", "top", "few"]),
    "spills": dict(rows=["forward", "dkdv"]),
    "each product waits": dict(rows=["serial", "mix", "forward"]),
    "the slow unit": dict(rows=["slow only", "top", "forward"]),
    "one product": dict(rows=["scores", "few"]),
    "several at once": dict(rows=["mix", "all", "slow", "dkdv"]),
    "one kernel": dict(rows=["all"]),
    "columns in another order": dict(
        rows=["slow", "serial", "forward", "dkdv"],
        order=["spills", "waits", "HMMA", "shared", "HGMMA", "warps", "registers"],
    ),
    "no kernel": dict(rows=[]),
}


def report_case(generator, name, rows, order=None) -> Case:
    """A table as benchmarks.compiled prints it, and the faults of each row."""
    headings = ["kernel", "variant", *(order or list(HEADINGS)[2:])]
    columns = [Column(heading, HEADINGS[heading]) for heading in headings]
    lines = []
    expected = []
    for key in rows:
        kernel, variant, registers, spills, hgmma, hmma, waits = ROWS[key]
        row = dict(kernel=kernel, variant=variant, warps=8, stages=3, shared=98304)
        row |= dict(registers=registers, spills=spills, HGMMA=hgmma, HMMA=hmma, waits=waits)
        row |= dict(instructions=2208)
        lines.append([row[heading] for heading in headings])
        faults = {"spills": spills > 0, "waits": hgmma > 1 and waits == hgmma}
        faults |= {"slow unit": hmma > 0}
        expected += [f"{kernel}: {fault}" for fault, found in faults.items() if found]
    text = tables.table(columns, lines)
    return Case(name, dict(report=text), expected, explain=explain_report)


def explain_report(got, expected, report):
    """A fault that is not there, one that is missing, or another order."""
    if not all(isinstance(x, str) for x in got):
        return None
    kernels = [line.split()[0] for line in report.splitlines()[1:]]
    for said in got:
        kernel, _, fault = said.partition(": ")
        if fault not in ("spills", "waits", "slow unit"):
            return f"{said!r} is no kernel with one of the faults spills, waits, slow unit"
        if kernel not in kernels:
            return f"{kernel!r} is no kernel of the report: a variant, or the heading?"
        if said not in expected:
            return f"{said!r} is listed, and {why_not(fault)}"
        if got.count(said) > 1:
            return f"{said!r} is listed twice"
    missing = [said for said in expected if said not in got]
    if missing:
        return f"{missing[0]!r} is missing"
    return "the faults are right, and stand in another order"


def why_not(fault: str) -> str:
    """Why a kernel does not have this fault."""
    return {
        "spills": "this kernel stores no register away",
        "waits": "not each of its products waits: it has fewer groups than HGMMAs, or one product",
        "slow unit": "it has no HMMA",
    }[fault]


# --- 12.4 ---

PROGRAMS = {
    "registers": dict(warps=4, registers=136, shared=0),
    "registers that are rounded up": dict(warps=4, registers=97, shared=0),
    "shared memory": dict(warps=4, registers=96, shared=100_000),
    "shared memory, and what is reserved": dict(warps=4, registers=64, shared=116_736),
    "shared memory to the last byte": dict(warps=4, registers=72, shared=115_712),
    "warps": dict(warps=16, registers=24, shared=10_000),
    "programs": dict(warps=1, registers=30, shared=2_000),
    "twelve warps": dict(warps=12, registers=150, shared=70_000),
    "two limits at once": dict(warps=8, registers=32, shared=5_000),
    "registers and shared memory at once": dict(warps=8, registers=128, shared=115_712),
    "warps and programs at once": dict(warps=2, registers=40, shared=3_500),
    "it does not fit": dict(warps=8, registers=250, shared=240_000),
    "255 registers": dict(warps=8, registers=255, shared=97_000),
}


def programs_case(generator, name, warps, registers, shared) -> Case:
    """By putting one program after another onto a multiprocessor."""
    arguments = dict(warps=warps, registers=registers, shared=shared)
    taken = {
        "registers": -(-registers // 8) * 8 * 32 * warps,
        "shared memory": shared + 1024,
        "warps": warps,
        "programs": 1,
    }
    room = {"registers": 65_536, "shared memory": 233_472, "warps": 64, "programs": 32}
    count = 0
    while all(taken[x] <= room[x] for x in room):
        room = {x: room[x] - taken[x] for x in room}
        count += 1
    limit = next(x for x in room if taken[x] > room[x])
    axes = {"programs": (), "limit": ()}
    return Case(name, arguments, (count, limit), axes, explain_programs)


def explain_programs(got, expected, **arguments):
    """A known mistake in the count, or else in what limits it."""
    given = tuple(arguments.values())
    if not matches(got[0], expected[0]):
        return name_mistake(got, mistakes.PROGRAMS, given, part=lambda result: result[0])
    if got[1] not in mistakes.LIMITS:
        return f"the limit is {got[1]!r}, and it is one of {', '.join(mistakes.LIMITS)}"
    said = name_mistake(got, mistakes.WHICH, given, part=lambda result: result[1])
    return said or f"the count is right, and {got[1]} would allow more programs"


# --- 12.5 ---

NEAR = 0.1  # the card grows slower by a tenth: a right time lies this close to the middle
APART = 0.018  # and the ratio of two this close to the true one
CLOCKS = {
    "equal kernels": dict(a=1.0, b=1.0, rounds=21),
    "B is a little faster": dict(a=2.0, b=1.9, rounds=15),
    "B is faster": dict(a=3.0, b=1.5, rounds=9),
    "B is slower": dict(a=0.8, b=1.1, rounds=11),
    "three rounds": dict(a=1.2, b=1.5, rounds=3),
    "many rounds": dict(a=0.9, b=0.94, rounds=40),
}


def clock_case(generator, name, a, b, rounds) -> Case:
    """The times of both kernels on a card of middling warmth, with a cold cache."""
    middle = 1 + watching.SLOW / 2
    expected = (a * middle, b * middle)
    arguments = dict(a=a, b=b, rounds=rounds)
    axes = {"A": (), "B": ()}
    return Case(name, arguments, expected, axes, explain_clock, on_a_card)


def on_a_card(answer, a, b, rounds):
    """The answer's times; those that are near enough count as the true ones."""
    card = watching.Card({"A": a, "B": b})
    times = answer(card, "A", "B", rounds)
    if not are_times(times):
        return times  # the message will say what is wrong with their form
    middle = 1 + watching.SLOW / 2
    is_near = all(abs(x / (y * middle) - 1) < NEAR for x, y in zip(times, (a, b), strict=True))
    if is_near and abs(times[1] / times[0] / (b / a) - 1) < APART:
        return a * middle, b * middle
    return tuple(map(float, times))


def are_times(times) -> bool:
    """Two numbers above 0."""
    if not isinstance(times, tuple | list) or len(times) != 2:
        return False
    return all(isinstance(x, int | float) and x > 0 for x in times)


def explain_clock(got, expected, a, b, rounds):
    """A known mistake; else what is off."""
    said = name_mistake(got, mistakes.CLOCKS, (a, b, rounds), call=on_a_card)
    if said:
        return said
    off = [x / y for x, y in zip(got, expected, strict=True)]
    if all(abs(x - 1) < NEAR for x in off):
        return (
            f"B / A is {got[1] / got[0]:.4g}, and {b / a:.4g} is true: does one of them come later?"
        )
    return None


# --- 12.6 ---

WALKS = {
    "two slots": dict(tiles=9, stages=2, copy=3, latency=20, product=30),
    "three slots": dict(tiles=13, stages=3, copy=5, latency=40, product=25),
    "one slot": dict(tiles=5, stages=1, copy=4, latency=10, product=12),
    "fewer tiles than slots": dict(tiles=2, stages=4, copy=3, latency=30, product=18),
    "as many tiles as slots": dict(tiles=3, stages=3, copy=2, latency=25, product=10),
    "one tile": dict(tiles=1, stages=3, copy=6, latency=15, product=9),
    "no tile": dict(tiles=0, stages=2, copy=5, latency=12, product=7),
    "a slow memory": dict(tiles=11, stages=4, copy=20, latency=30, product=13),
    "a long way": dict(tiles=17, stages=5, copy=3, latency=90, product=22),
}


def walk_case(generator, name, **sizes) -> Case:
    """The tiles in order, and the clocks of a walk that begins each copy as early as it can."""
    expected = (list(range(sizes["tiles"])), "")
    axes = {"tiles": (), "the way": ()}
    return Case(name, sizes, expected, axes, explain_walk, on_a_machine)


def on_a_machine(answer, tiles, stages, copy, latency, product):
    """The tiles that were multiplied, and what is wrong with the way."""
    enough = clocks_at_best(tiles, stages, copy, latency, product)
    machine = watching.Copies(tiles, stages, copy, latency, product)
    answer(machine, tiles, stages)
    return machine.done, machine.end(enough)


def clocks_at_best(tiles, stages, copy, latency, product) -> int:
    """A tile is loaded as soon as memory and its slot are free, multiplied as soon as it is there.

    The slot of tile i is that of tile i - stages, which must have been multiplied.
    """
    ends = []
    memory = 0
    clock = 0
    for tile in range(tiles):
        free = ends[tile - stages] if tile >= stages else 0
        memory = max(memory, free) + copy
        clock = max(clock, memory + latency) + product
        ends.append(clock)
    return clock


def explain_walk(got, expected, **sizes):
    """What was wrong with the way."""
    return got[1] or None


EXERCISES = [
    Exercise(
        "12.1",
        "A floor",
        "warm-up",
        5,
        in_turn(floor_case, FLOORS),
        hints=(
            "A card computes while it moves. Which of the two times can it not go below?",
            "milliseconds = 1000 max(operations / rate of operations, bytes / rate of bytes)",
            "two times; compare them; the longer one, times 1000, and its name",
        ),
    ),
    Exercise(
        "12.2",
        "What a kernel must do",
        "core",
        15,
        in_turn(work_case, SIZES),
        hints=(
            "How many keys does the query at token 0 read? At token w - 1? Later?",
            "pairs = sum over t of min(t + 1, w); operations = 2 pairs H (D + Dv); bytes = number "
            "of bytes T (H D + G D + G Dv + H Dv) + 4 T H.",
            "sum the keys of all queries; two operations for each number of both products; four "
            "tensors, each once, and the log-sum-exp with 4 bytes",
        ),
    ),
    Exercise(
        "12.3",
        "Read the compiler's report",
        "core",
        15,
        in_turn(report_case, REPORTS),
        hints=(
            "Which cells of a row may be empty or hold a space? From which end can the numbers be "
            "counted?",
            "spills: spills > 0. waits: HGMMA > 1 and waits = HGMMA. slow unit: HMMA > 0.",
            "split the heading; for each line split it and pair its words with the headings from "
            "the right; the kernel is its first word; three questions",
        ),
    ),
    Exercise(
        "12.4",
        "Occupancy",
        "core",
        15,
        in_turn(programs_case, PROGRAMS),
        hints=(
            "Four things run out: how many programs does each allow by itself?",
            "registers: 65,536 // (32 warps x registers, rounded up to eights). shared memory: "
            "233,472 // (shared + 1,024). warps: 64 // warps. programs: 32.",
            "a dict of the four counts in this order; min over it by value; the first of equal "
            "ones wins",
        ),
    ),
    Exercise(
        "12.5",
        "A clock that lies",
        "core",
        20,
        in_turn(clock_case, CLOCKS),
        hints=(
            "What is still running when you look at the clock the first time? The second time? "
            "What does the second kernel find that the first did not?",
            "per run: empty the cache, synchronize, look, launch, synchronize, look. In turns, "
            "after some launches that are not counted; then medians.",
            "launch both a few times; for each round, for each kernel: one run into its own list; "
            "statistics.median of both lists",
        ),
    ),
    Exercise(
        "12.6",
        "A walk that waits",
        "stretch",
        35,
        in_turn(walk_case, WALKS),
        hints=(
            "While tile 0 is multiplied, which tiles could be on their way? Into which slot goes "
            "the tile after those?",
            "tile i lives in slot i mod stages. Before the walk tiles 0 to stages - 1 are begun; "
            "after the product of tile i its slot is free for tile i + stages.",
            "a loop that begins the first copies, no more than there are tiles; then for each "
            "tile: wait for its slot, multiply, begin the copy of the tile `stages` later if "
            "there is one",
        ),
    ),
]
