"""Set 12's mistakes that the checks know by what they give: the right one, one step changed."""

import statistics
from collections.abc import Callable

from exercises.records import Mistake

# --- 12.1: a floor ---


def floor(pick=max, unit=1000.0, names=("arithmetic", "memory")) -> Callable:
    """Milliseconds, and what they are bound by."""

    def answer(operations, moved, card):
        times = [operations / card["operations"] * unit, moved / card["bytes"] * unit]
        time = pick(times)
        return time, names[times.index(time)] if time in times else names[0]

    return answer


FLOORS = [
    Mistake("seconds", floor(unit=1.0), "these are seconds, and milliseconds were asked for"),
    Mistake("microseconds", floor(unit=1e6), "these are microseconds"),
    Mistake(
        "the shorter", floor(pick=min), "the shorter of the two times was taken, and both must pass"
    ),
    Mistake("added", floor(pick=sum), "the two times are added: a card moves and computes at once"),
    Mistake(
        "upside down",
        lambda operations, moved, card: (
            max(card["operations"] / operations, card["bytes"] / moved) * 1000.0,
            "memory",
        ),
        "the fractions are upside down: a rate stands below",
    ),
    Mistake(
        "rates exchanged",
        lambda operations, moved, card: floor()(
            operations, moved, {"operations": card["bytes"], "bytes": card["operations"]}
        ),
        "operations are divided by the bytes' rate, and bytes by that of operations",
    ),
]
NAMES = [
    Mistake(
        "names exchanged",
        floor(names=("memory", "arithmetic")),
        "the time is right, and it is the other one that takes it: compare times, not numbers",
    ),
]

# --- 12.2: operations and bytes ---


def work(
    pairs=lambda T, w: sum(min(t + 1, w) for t in range(T)),
    products=2,
    heads=lambda s: s["heads"],
    width=lambda s: s["head_dim"] + s["value_dim"],
    queries=lambda s: s["heads"] * (s["head_dim"] + s["value_dim"]),
    keys=lambda s: s["kv_heads"] * (s["head_dim"] + s["value_dim"]),
    size=lambda s: s["number_bytes"],
    lse=lambda s: 4 * s["heads"],
) -> Callable:
    """Operations and bytes of a window's forward."""

    def answer(s):
        T = s["length"]
        operations = products * pairs(T, s["window"]) * heads(s) * width(s)
        return operations, T * (size(s) * (queries(s) + keys(s)) + lse(s))

    return answer


OPERATIONS = [
    Mistake(
        "no mask",
        work(pairs=lambda T, w: T * T),
        "operations: every query meets every key: the window and the causal mask are forgotten",
    ),
    Mistake(
        "causal only",
        work(pairs=lambda T, w: T * (T + 1) // 2),
        "operations: every query meets all keys before it: the window is forgotten",
    ),
    Mistake(
        "whole windows",
        work(pairs=lambda T, w: T * w),
        "operations: the first queries have whole windows, and fewer keys stand before them",
    ),
    Mistake(
        "window without the own key",
        work(pairs=lambda T, w: sum(min(t, w) for t in range(T))),
        "operations: a window lacks the query's own key",
    ),
    Mistake(
        "one operation a pair",
        work(products=1),
        "operations: a multiplication and an addition are two operations",
    ),
    Mistake(
        "heads of the keys",
        work(heads=lambda s: s["kv_heads"]),
        "operations: every query head multiplies, though the keys are shared",
    ),
    Mistake(
        "scores only",
        work(width=lambda s: s["head_dim"]),
        "operations: the product with the values is left out",
    ),
    Mistake(
        "widths equal",
        work(width=lambda s: 2 * s["head_dim"]),
        "operations: the values' width is not that of the keys",
    ),
]
BYTES = [
    Mistake(
        "keys for every head",
        work(keys=lambda s: s["heads"] * (s["head_dim"] + s["value_dim"])),
        "bytes: keys and values count for every query head, and a group shares them",
    ),
    Mistake(
        "no output",
        work(queries=lambda s: s["heads"] * s["head_dim"]),
        "bytes: the output is written too",
    ),
    Mistake(
        "no queries",
        work(queries=lambda s: s["heads"] * s["value_dim"]),
        "bytes: the queries are read too",
    ),
    Mistake(
        "no keys",
        work(keys=lambda s: 0),
        "bytes: keys and values are left out",
    ),
    Mistake(
        "no values",
        work(keys=lambda s: s["kv_heads"] * s["head_dim"]),
        "bytes: the values are left out",
    ),
    Mistake("no log-sum-exp", work(lse=lambda s: 0), "bytes: the log-sum-exp is left out"),
    Mistake(
        "log-sum-exp in the inputs' precision",
        work(lse=lambda s: s["number_bytes"] * s["heads"]),
        "bytes: a log-sum-exp has 4 bytes, whatever the inputs have",
    ),
    Mistake("numbers", work(size=lambda s: 1), "bytes: numbers are counted, not their bytes"),
    Mistake("two bytes", work(size=lambda s: 2), "bytes: a number is taken for 2 bytes"),
]

# --- 12.4: occupancy ---

LIMITS = ("registers", "shared memory", "warps", "programs")


def occupancy(
    registers=lambda r: -(-r // 8) * 8 * 32,
    reserve=1024,
    memory=233472,
    most_warps=64,
    most_programs=32,
    pick=min,
    per_warp=True,
) -> Callable:
    """Programs on a multiprocessor, and what limits them."""

    def answer(warps, a_thread, shared):
        threads = warps if per_warp else 1
        counts = [
            65536 // registers(a_thread) // threads,
            memory // (shared + reserve) if shared + reserve else 10**6,
            most_warps // warps,
            most_programs,
        ]
        count = pick(counts)
        return count, LIMITS[counts.index(count)]

    return answer


PROGRAMS = [
    Mistake(
        "registers of a thread as of a warp",
        occupancy(registers=lambda r: -(-r // 8) * 8),
        "a warp has 32 threads, each with its registers",
    ),
    Mistake(
        "not rounded up",
        occupancy(registers=lambda r: max(r, 1) * 32),
        "registers are given out in eights: 97 a thread take as many as 104",
    ),
    Mistake(
        "one warp a program",
        occupancy(per_warp=False),
        "the registers of one warp are counted, and a program has more",
    ),
    Mistake(
        "nothing reserved",
        occupancy(reserve=0),
        "each program takes 1,024 bytes of shared memory beside its own",
    ),
    Mistake(
        "no limit of programs",
        occupancy(most_programs=10**6),
        "a multiprocessor holds at most 32 programs",
    ),
    Mistake(
        "no limit of warps",
        occupancy(most_warps=10**6),
        "a multiprocessor holds at most 64 warps",
    ),
    Mistake(
        "the loosest limit",
        occupancy(pick=max),
        "the loosest limit was taken, and all of them hold",
    ),
    Mistake(
        "warps counted",
        lambda *x: (occupancy()(*x)[0] * x[0], occupancy()(*x)[1]),
        "the warps are counted, not the programs",
    ),
    Mistake(
        "shared memory of 164 KB",
        occupancy(memory=167936),
        "164 KB is an A100's shared memory: the multiprocessor has 233,472 bytes",
    ),
    Mistake(
        "one program at least",
        lambda *x: (max(1, occupancy()(*x)[0]), occupancy()(*x)[1]),
        "a program that does not fit runs nowhere: the count can be 0",
    ),
]
WHICH = [
    Mistake(
        "registers always",
        lambda *x: (occupancy()(*x)[0], "registers"),
        "the count is right, and it is not the registers that limit it",
    ),
    Mistake(
        "last of the equal ones",
        lambda warps, r, shared: (
            occupancy()(warps, r, shared)[0],
            _last_limit(warps, r, shared),
        ),
        "several limits are reached at once: the first of them was asked for",
    ),
]


def _last_limit(warps: int, r: int, shared: int) -> str:
    """The last of the limits that are reached."""
    counts = [
        65536 // (-(-r // 8) * 8 * 32) // warps,
        233472 // (shared + 1024),
        64 // warps,
        32,
    ]
    return LIMITS[3 - counts[::-1].index(min(counts))]


# --- 12.5: a clock that lies ---


def harness(
    warm=2,
    empty=True,
    before=True,
    after=True,
    turns=True,
    middle=statistics.median,
    unit=1.0,
    empty_each=True,
) -> Callable:
    """Time two kernels: each step can be left out."""

    def once(card, kernel, is_first):
        if empty and (empty_each or is_first):
            card.empty_cache()
        if before:
            card.synchronize()
        start = card.now()
        card.launch(kernel)
        if after:
            card.synchronize()
        return (card.now() - start) * unit

    def answer(card, a, b, rounds):
        for kernel in (a, b):
            for _ in range(warm):
                card.launch(kernel)
        card.synchronize()
        times = {a: [], b: []}
        if turns:
            for _ in range(rounds):
                times[a].append(once(card, a, True))
                times[b].append(once(card, b, False))
        else:
            for kernel in (a, b):
                times[kernel] += [once(card, kernel, True) for _ in range(rounds)]
        return middle(times[a]), middle(times[b])

    return answer


def one_clock_for_all(card, a, b, rounds):
    """A clock around all rounds of a kernel."""
    result = []
    for kernel in (a, b):
        card.launch(kernel)
        card.launch(kernel)
        card.synchronize()
        start = card.now()
        for _ in range(rounds):
            card.launch(kernel)
        card.synchronize()
        result.append((card.now() - start) / rounds)
    return tuple(result)


CLOCKS = [
    Mistake(
        "no wait at the end",
        harness(after=False),
        "the clock stops when the kernel is queued, not when it has ended: synchronize before it",
    ),
    Mistake(
        "no wait at the start",
        harness(before=False),
        "the clock starts while the cache is still being emptied: synchronize before it",
    ),
    Mistake(
        "warm cache",
        harness(empty=False),
        "the cache holds the inputs from the run before: empty it before each run",
    ),
    Mistake(
        "emptied before A only",
        harness(empty_each=False),
        "the second kernel finds in the cache what the first has read: empty it before each",
    ),
    Mistake(
        "no warm-up",
        harness(warm=0),
        "there is no warm-up: the first launches of a kernel compile it and take memory",
    ),
    Mistake(
        "one launch to warm up",
        harness(warm=1),
        "one launch is no warm-up: the second one is slow too",
    ),
    Mistake(
        "A, then B",
        harness(turns=False),
        "all runs of A come before those of B, and the card has become slower meanwhile: in turns",
    ),
    Mistake(
        "mean",
        harness(middle=statistics.mean),
        "the mean holds what disturbed single runs: take the median",
    ),
    Mistake(
        "sum",
        harness(middle=sum),
        "the runs are added, and the time of one was asked for",
    ),
    Mistake(
        "largest",
        harness(middle=max),
        "the slowest run was taken, and something else disturbed it",
    ),
    Mistake("seconds", harness(unit=1e-3), "these are seconds: the clock counts milliseconds"),
    Mistake(
        "one clock for all rounds",
        one_clock_for_all,
        "one clock runs around all rounds: the cache stays warm, and disturbed runs count",
    ),
    Mistake(
        "A and B exchanged",
        lambda card, a, b, rounds: harness()(card, a, b, rounds)[::-1],
        "the times of A and B are exchanged",
    ),
]
