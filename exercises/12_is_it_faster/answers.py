"""Set 12's answers, for teachers: right ones in several styles, and wrong ones to be named.

The mistakes of mistakes.py are planted as they stand. The others are written by hand, in other
styles or with faults of another kind, so that no mistake is judged by itself alone.
"""

import re
import statistics

import torch

from exercises.records import Wrong, planted

from . import mistakes

# --- 12.1 ---


def floor_by_cases(operations, moved, card):
    """One time, or the other."""
    arithmetic = 1e3 * operations / card["operations"]
    memory = 1e3 * moved / card["bytes"]
    if memory > arithmetic:
        return memory, "memory"
    return arithmetic, "arithmetic"


def floor_by_intensity(operations, moved, card):
    """Operations a byte, against what the card does in the time of one byte."""
    if operations * card["bytes"] >= card["operations"] * moved:
        return operations * 1000 / card["operations"], "arithmetic"
    return moved * 1000 / card["bytes"], "memory"


def floor_by_dictionary(operations, moved, card):
    """The largest of named times."""
    times = {"arithmetic": operations / card["operations"], "memory": moved / card["bytes"]}
    bound = max(times, key=times.get)
    return times[bound] * 1000, bound


FLOORS = [
    *planted(mistakes.FLOORS),
    *planted(mistakes.NAMES),
    Wrong(
        "seconds, by cases",
        lambda *x: (floor_by_cases(*x)[0] / 1000, floor_by_cases(*x)[1]),
        "these are seconds, and milliseconds were asked for",
    ),
    Wrong(
        "the mean of both",
        lambda operations, moved, card: (
            500 * (operations / card["operations"] + moved / card["bytes"]),
            "arithmetic",
        ),
        "milliseconds: got",
    ),
    Wrong(
        "memory alone",
        lambda operations, moved, card: (moved / card["bytes"] * 1000, "memory"),
        "the shorter of the two times was taken",
    ),
    Wrong(
        "arithmetic alone",
        lambda operations, moved, card: (operations / card["operations"] * 1000, "arithmetic"),
        "the shorter of the two times was taken",
    ),
    Wrong(
        "by the larger number",
        lambda *x: (floor_by_cases(*x)[0], "arithmetic" if x[0] > x[1] else "memory"),
        "compare times, not numbers",
    ),
    Wrong(
        "bandwidth",
        lambda *x: (floor_by_cases(*x)[0], "bandwidth"),
        "the bound is 'bandwidth', and it is one of",
    ),
    Wrong(
        "the time alone",
        lambda *x: floor_by_cases(*x)[0],
        "the function returned a float, and 2 results were asked for",
    ),
    Wrong(
        "name first",
        lambda *x: floor_by_cases(*x)[::-1],
        "result 1: the function returned a str, and a float was asked for",
    ),
    Wrong(
        "always the H100",
        lambda operations, moved, card: floor_by_cases(
            operations, moved, {"operations": 744e12, "bytes": 3.03e12}
        ),
        "both at once: milliseconds: got",
    ),
]

# --- 12.2 ---


def work_by_formula(sizes):
    """The first queries make a triangle."""
    T = sizes["length"]
    w = min(sizes["window"], T)
    pairs = w * (w + 1) // 2 + (T - w) * w
    width = sizes["head_dim"] + sizes["value_dim"]
    moved = T * (sizes["heads"] + sizes["kv_heads"]) * width * sizes["number_bytes"]
    return 2 * pairs * sizes["heads"] * width, moved + 4 * T * sizes["heads"]


def work_by_counting(sizes):
    """Every query asks how many keys it reads."""
    s = sizes
    pairs = 0
    for t in range(s["length"]):
        pairs += t + 1 if t < s["window"] else s["window"]
    scores = 2 * pairs * s["heads"] * s["head_dim"]
    values = 2 * pairs * s["heads"] * s["value_dim"]
    rows = s["length"] * s["heads"]
    shared = s["length"] * s["kv_heads"]
    numbers = (rows + shared) * s["head_dim"] + (rows + shared) * s["value_dim"]
    return scores + values, numbers * s["number_bytes"] + rows * 4


def work_by_mask(sizes):
    """A mask is added up."""
    T = sizes["length"]
    t = torch.arange(T)[:, None]
    j = torch.arange(T)
    pairs = int(((j <= t) & (j > t - sizes["window"])).sum())
    return pairs * 2 * sizes["heads"] * (sizes["head_dim"] + sizes["value_dim"]), work_by_formula(
        sizes
    )[1]


def work_backward(sizes):
    """Five products, as in a backward."""
    operations, moved = work_by_formula(sizes)
    return operations * 5 // 2, moved


def work_with(pairs=lambda t, w: min(t + 1, w), products=2, heads="heads", rows=None, lse=4):
    """Written anew; rows(H, G, D, Dv) are the numbers of one token, lse the bytes of one."""
    rows = rows or (lambda H, G, D, Dv: H * D + G * D + G * Dv + H * Dv)

    def answer(sizes):
        H, G, D, Dv = (sizes[x] for x in ("heads", "kv_heads", "head_dim", "value_dim"))
        keys = sum(pairs(t, sizes["window"]) for t in range(sizes["length"]))
        operations = products * keys * sizes[heads] * (D + Dv)
        moved = rows(H, G, D, Dv) * sizes["number_bytes"] + (lse or sizes["number_bytes"]) * H
        return operations, sizes["length"] * moved

    return answer


WORK = [
    *planted(mistakes.OPERATIONS),
    *planted(mistakes.BYTES),
    Wrong(
        "keys before the query", work_with(pairs=min), "operations: a window lacks the query's own"
    ),
    Wrong(
        "windows at once", work_with(pairs=lambda t, w: w), "the first queries have whole windows"
    ),
    Wrong("heads of keys", work_with(heads="kv_heads"), "every query head multiplies"),
    Wrong(
        "one a pair", work_with(products=1), "a multiplication and an addition are two operations"
    ),
    Wrong(
        "every head its keys",
        work_with(rows=lambda H, G, D, Dv: 2 * H * (D + Dv)),
        "bytes: keys and values count for every query head",
    ),
    Wrong(
        "nothing written",
        work_with(rows=lambda H, G, D, Dv: H * D + G * (D + Dv)),
        "bytes: the output is written too",
    ),
    Wrong("log-sum-exp as the inputs", work_with(lse=None), "bytes: a log-sum-exp has 4 bytes"),
    Wrong("five products", work_backward, "operations: got"),
    Wrong(
        "every pair, by counting",
        lambda s: (2 * s["length"] ** 2 * s["heads"] * (s["head_dim"] + s["value_dim"]), 0),
        "every query meets every key",
    ),
    Wrong(
        "bits",
        lambda s: (work_by_formula(s)[0], 8 * work_by_formula(s)[1]),
        "bytes: got",
    ),
    Wrong(
        "log-sum-exp for each group",
        lambda s: (
            work_by_formula(s)[0],
            work_by_formula(s)[1] - 4 * s["length"] * (s["heads"] - s["kv_heads"]),
        ),
        "bytes: got",
    ),
    Wrong(
        "floats",
        lambda s: tuple(map(float, work_by_formula(s))),
        "result 1: the function returned a float, and an int was asked for",
    ),
    Wrong("bytes first", lambda s: work_by_formula(s)[::-1], "operations: got"),
    Wrong(
        "keys read for every query",
        lambda s: (
            work_by_formula(s)[0],
            work_by_formula(s)[1] * s["window"],
        ),
        "bytes: got",
    ),
]

# --- 12.3 ---


def report_from_the_right(report):
    """Words from the right, by the headings."""
    first, *lines = report.splitlines()
    found = []
    for line in lines:
        pairs = zip(reversed(first.split()), reversed(line.split()), strict=False)
        row = {heading: word for heading, word in pairs if word.isdigit()}
        kernel = line.split()[0]
        if int(row["spills"]) > 0:
            found.append(kernel + ": spills")
        if int(row["HGMMA"]) > 1 and row["HGMMA"] == row["waits"]:
            found.append(kernel + ": waits")
        if int(row["HMMA"]) > 0:
            found.append(kernel + ": slow unit")
    return found


def report_by_columns(report):
    """Where a heading ends, its numbers end."""
    first, *lines = report.splitlines()
    ends = {m[0]: m.end() for m in re.finditer(r"\S+", first)}

    def number(line, heading):
        return int(line[: ends[heading]].split()[-1])

    faults = {
        "spills": lambda x: number(x, "spills"),
        "waits": lambda x: number(x, "waits") == number(x, "HGMMA") > 1,
        "slow unit": lambda x: number(x, "HMMA"),
    }
    return [f"{x.split()[0]}: {name}" for x in lines for name, is_so in faults.items() if is_so(x)]


def report_by_pattern(report):
    """The numbers at the end of each line."""
    first, *lines = report.splitlines()
    names = first.split()[2:]
    found = []
    for line in lines:
        numbers = re.search(r"((?:\s+\d+){%d})$" % len(names), line)[1].split()  # noqa: UP031
        row = dict(zip(names, map(int, numbers), strict=True))
        faults = [
            "spills" * (row["spills"] > 0),
            "waits" * (row["HGMMA"] == row["waits"] and row["waits"] > 1),
            "slow unit" * (row["HMMA"] > 0),
        ]
        found += [f"{line.split()[0]}: {fault}" for fault in faults if fault]
    return found


def read_with(place=None, spills=0, waits=lambda h, w: h > 1 and h == w, slow=lambda s, h: s > 0):
    """A reading of the table with one step changed; place finds a column's word."""

    def answer(report):
        first, *lines = report.splitlines()
        found = []
        for line in lines:
            words = line.split()
            names = first.split()

            def get(name, words=words, names=names):
                at = names.index(name) - len(names) if place is None else place(names.index(name))
                return int(words[at]) if words[at].isdigit() else 0

            if get("spills") > spills:
                found.append(f"{words[0]}: spills")
            if waits(get("HGMMA"), get("waits")):
                found.append(f"{words[0]}: waits")
            if slow(get("HMMA"), get("HGMMA")):
                found.append(f"{words[0]}: slow unit")
        return found

    return answer


OFFSETS = {"spills": -5, "HGMMA": -4, "HMMA": -3, "waits": -2}


def fixed_places(report):
    """The columns as they stood once."""
    found = []
    for line in report.splitlines()[1:]:
        words = line.split()
        row = {name: int(words[at]) for name, at in OFFSETS.items()}
        found += [f"{words[0]}: spills"] * (row["spills"] > 0)
        found += [f"{words[0]}: waits"] * (row["HGMMA"] > 1 and row["HGMMA"] == row["waits"])
        found += [f"{words[0]}: slow unit"] * (row["HMMA"] > 0)
    return found


REPORTS = [
    Wrong(
        "counted from the left", read_with(place=lambda at: at), "'flash_dkdv: slow unit' is listed"
    ),
    Wrong("columns as they stood once", fixed_places, "columns in another order: '"),
    Wrong(
        "255 registers",
        lambda report: (
            [x for x in report_by_pattern(report) if "spills" not in x]
            + [f"{line.split()[0]}: spills" for line in report.splitlines() if " 255 " in line]
        ),
        "stand in another order",
    ),
    Wrong("a few spills are fine", read_with(spills=20), "'flash_dkdv: spills' is missing"),
    Wrong(
        "one product waits too",
        read_with(waits=lambda h, w: h > 0 and h == w),
        "'block_scores: waits' is listed, and not each of its products waits",
    ),
    Wrong(
        "any waits",
        read_with(waits=lambda h, w: w > 0),
        "'flash_forward: waits' is listed, and not each of its products waits",
    ),
    Wrong(
        "no product, no wait: equal",
        read_with(waits=lambda h, w: h == w),
        "'top_blocks: waits' is listed",
    ),
    Wrong(
        "nearly as many",
        read_with(waits=lambda h, w: h > 1 and w > 0.8 * h),
        "'selected_forward: waits' is listed",
    ),
    Wrong(
        "slow unit where there is no fast one",
        read_with(slow=lambda s, h: s == 0 and h == 0),
        "'top_blocks: slow unit' is listed, and it has no HMMA",
    ),
    Wrong(
        "slow unit alone",
        read_with(slow=lambda s, h: s > 0 and h == 0),
        "'flash_dq: slow unit' is missing",
    ),
    Wrong(
        "HGMMA is the slow one",
        read_with(slow=lambda s, h: h > 0),
        "'flash_forward: slow unit' is listed, and it has no HMMA",
    ),
    Wrong(
        "sorted",
        lambda report: sorted(report_by_pattern(report)),
        "the faults are right, and stand in another order",
    ),
    Wrong(
        "fault by fault",
        lambda report: sorted(report_by_pattern(report), key=lambda x: x.split(": ")[1]),
        "the faults are right, and stand in another order",
    ),
    Wrong(
        "first fault alone",
        lambda report: list(
            {x.split(":")[0]: x for x in reversed(report_by_pattern(report))}.values()
        )[::-1],
        "is missing",
    ),
    Wrong(
        "kernels alone",
        lambda report: [x.split(":")[0] for x in report_by_pattern(report)],
        "is no kernel with one of the faults",
    ),
    Wrong(
        "the heading too",
        lambda report: ["kernel: spills", *report_by_pattern(report)],
        "is no kernel of the report",
    ),
    Wrong(
        "a text",
        lambda report: "\n".join(report_by_pattern(report)),
        "the function returned a str, and a list was asked for",
    ),
]

# --- 12.4 ---


def programs_by_dictionary(warps, registers, shared):
    """Four counts by name."""
    rounded = (registers + 7) // 8 * 8
    counts = {
        "registers": 65536 // (rounded * 32 * warps),
        "shared memory": 233472 // (shared + 1024),
        "warps": 64 // warps,
        "programs": 32,
    }
    limit = min(counts, key=counts.get)
    return counts[limit], limit


def programs_by_filling(warps, registers, shared):
    """One more as long as all fit."""
    a_program = [(registers + 7) // 8 * 256 * warps, shared + 1024, warps, 1]
    room = [65536, 233472, 64, 32]
    count = 0
    while True:
        for need, left, name in zip(a_program, room, mistakes.LIMITS, strict=True):
            if need * (count + 1) > left:
                return count, name
        count += 1


def programs_by_sorting(warps, registers, shared):
    """Sorted by the count; a stable sort leaves the first of equal ones in front."""
    registers += -registers % 8
    rows = [
        (2048 // (registers * warps), "registers"),
        (228 * 1024 // (shared + 1024), "shared memory"),
        (64 // warps, "warps"),
        (32, "programs"),
    ]
    return sorted(rows, key=lambda row: row[0])[0]


def per_block_rounding(warps, registers, shared):
    """The registers of a program are rounded up to 4,096."""
    _, limit = programs_by_dictionary(warps, registers, shared)
    a_program = -(-(registers * 32 * warps) // 4096) * 4096
    return min(65536 // a_program, 233472 // (shared + 1024), 64 // warps, 32), limit


def programs_with(threads=32, reserved=1024, warps_in_all=64, last=False):
    """Written anew, with one number changed; last takes the last of equal limits."""

    def answer(warps, registers, shared):
        a_thread = (registers + 7) // 8 * 8
        counts = {
            "registers": 65536 // (a_thread * threads * warps),
            "shared memory": 233472 // max(shared + reserved, 1),
            "warps": warps_in_all // warps,
            "programs": 32,
        }
        names = reversed(counts) if last else counts
        limit = min(names, key=counts.get)
        return counts[limit], limit

    return answer


PROGRAMS = [
    *planted(mistakes.PROGRAMS),
    *planted(mistakes.WHICH),
    Wrong("a thread for a warp", programs_with(threads=1), "a warp has 32 threads"),
    Wrong("nothing beside its own", programs_with(reserved=0), "beside its own"),
    Wrong("2,048 warps", programs_with(warps_in_all=2048), "holds at most 64 warps"),
    Wrong("the last of equal limits", programs_with(last=True), "the first of them was asked for"),
    Wrong("rounded by program", per_block_rounding, "programs: got"),
    Wrong(
        "as a fraction",
        lambda w, r, s: (min(65536 / (r * 32 * w), 233472 / (s + 1024), 64 / w, 32), "registers"),
        "result 1: the function returned a float, and an int was asked for",
    ),
    Wrong(
        "the name of a resource",
        lambda *x: (programs_by_dictionary(*x)[0], "smem"),
        "the limit is 'smem', and it is one of registers, shared memory, warps, programs",
    ),
    Wrong(
        "threads, not warps",
        lambda w, r, s: programs_by_dictionary(w * 32, r, s),
        "the count is right, and it is not the registers that limit it",
    ),
    Wrong(
        "warps always",
        lambda *x: (programs_by_dictionary(*x)[0], "warps"),
        "the count is right, and warps would allow more programs",
    ),
    Wrong(
        "no shared memory",
        lambda w, r, s: programs_by_dictionary(w, r, 0),
        "the count can be 0",
    ),
    Wrong(
        "the limit alone",
        lambda *x: programs_by_dictionary(*x)[1],
        "the function returned a str, and 2 results were asked for",
    ),
    Wrong(
        "not rounded, by hand",
        lambda w, r, s: (
            min(65536 // (r * 32 * w), 233472 // (s + 1024), 64 // w, 32),
            programs_by_dictionary(w, r, s)[1],
        ),
        "registers are given out in eights",
    ),
]

# --- 12.5 ---


def time_alternating(card, a, b, rounds):
    """A B, B A, A B, ..."""
    for kernel in (a, b, b, a, a, b):
        card.launch(kernel)
    times = {a: [], b: []}
    for n in range(rounds):
        for kernel in (a, b) if n % 2 == 0 else (b, a):
            card.empty_cache()
            card.synchronize()
            start = card.now()
            card.launch(kernel)
            card.synchronize()
            times[kernel].append(card.now() - start)
    return statistics.median(times[a]), statistics.median(times[b])


def time_by_minimum(card, a, b, rounds):
    """The best of each."""

    def once(kernel):
        card.empty_cache()
        card.synchronize()
        start = card.now()
        card.launch(kernel)
        card.synchronize()
        return card.now() - start

    for _ in range(3):
        once(a)
        once(b)
    pairs = [(once(a), once(b)) for _ in range(rounds)]
    return min(x for x, _ in pairs), min(x for _, x in pairs)


def time_by_sorting(card, a, b, rounds):
    """A warm-up of five each, a clock read once between two runs."""
    for kernel in (a, b) * 5:
        card.launch(kernel)
    times = [[], []]
    for _ in range(rounds):
        for place, kernel in enumerate((a, b)):
            card.empty_cache()
            card.synchronize()
            start = card.now()
            card.launch(kernel)
            card.synchronize()
            times[place].append(card.now() - start)
    middle = rounds // 2
    return tuple(sorted(row)[middle] for row in times)


def time_ratio(card, a, b, rounds):
    """A's median, and B's by the median of the ratios."""
    times = time_rounds(card, a, b, rounds)
    ratio = statistics.median(y / x for x, y in times)
    first = statistics.median(x for x, _ in times)
    return first, first * ratio


def time_rounds(card, a, b, rounds, empty=True):
    """The times of both in each round."""
    for kernel in (a, b, a, b):
        card.launch(kernel)
    found = []
    for _ in range(rounds):
        pair = []
        for kernel in (a, b):
            if empty:
                card.empty_cache()
            card.synchronize()
            start = card.now()
            card.launch(kernel)
            card.synchronize()
            pair.append(card.now() - start)
        found.append(tuple(pair))
    return found


def time_in_blocks(card, a, b, rounds):
    """All of A, then all of B."""
    for kernel in (a, b, a, b):
        card.launch(kernel)
    medians = []
    for kernel in (a, b):
        runs = []
        for _ in range(rounds):
            card.empty_cache()
            card.synchronize()
            start = card.now()
            card.launch(kernel)
            card.synchronize()
            runs.append(card.now() - start)
        medians.append(statistics.median(runs))
    return tuple(medians)


def time_naively(card, a, b, rounds):
    """As one would write it first."""
    medians = []
    for kernel in (a, b):
        runs = []
        for _ in range(rounds):
            start = card.now()
            card.launch(kernel)
            runs.append(card.now() - start)
        medians.append(statistics.mean(runs))
    return tuple(medians)


def time_with_the_emptying(card, a, b, rounds):
    """The emptying is between the two looks at the clock."""
    for kernel in (a, b, a, b):
        card.launch(kernel)
    times = {a: [], b: []}
    for _ in range(rounds):
        for kernel in (a, b):
            card.synchronize()
            start = card.now()
            card.empty_cache()
            card.launch(kernel)
            card.synchronize()
            times[kernel].append(card.now() - start)
    return statistics.median(times[a]), statistics.median(times[b])


CLOCKS = [
    *planted(mistakes.CLOCKS),
    Wrong("all of A, then all of B", time_in_blocks, "and the card has become slower meanwhile"),
    Wrong("as one writes it first", time_naively, "A: got"),
    Wrong(
        "never a wait",
        mistakes.harness(before=False, after=False),
        "the clock stops when the kernel is queued",
    ),
    Wrong("the emptying timed too", time_with_the_emptying, "A: got"),
    Wrong(
        "warm, by rounds",
        lambda *x: tuple(map(statistics.median, zip(*time_rounds(*x, empty=False), strict=True))),
        "the cache holds the inputs from the run before",
    ),
    Wrong(
        "mean, by rounds",
        lambda *x: tuple(map(statistics.mean, zip(*time_rounds(*x), strict=True))),
        "the mean holds what disturbed single runs",
    ),
    Wrong(
        "all times",
        lambda *x: time_rounds(*x),
        "results, and 2 were asked for",
    ),
    Wrong(
        "the ratio",
        lambda *x: time_ratio(*x)[1] / time_ratio(*x)[0],
        "the function returned a float, and 2 results were asked for",
    ),
    Wrong(
        "microseconds",
        lambda *x: tuple(1000 * y for y in time_ratio(*x)),
        "A: got",
    ),
]

# --- 12.6 ---


def walk_after(machine, tiles, stages):
    """Each product frees a slot for the tile `stages` later."""
    for tile in range(min(stages, tiles)):
        machine.load(tile, tile)
    for tile in range(tiles):
        machine.wait(tile % stages)
        machine.multiply(tile % stages)
        if tile + stages < tiles:
            machine.load(tile + stages, tile % stages)


def walk_with_a_queue(machine, tiles, stages):
    """Free slots in a list."""
    free = list(range(stages))
    waiting = []
    rest = list(range(tiles))
    while rest or waiting:
        while rest and free:
            slot = free.pop(0)
            machine.load(rest.pop(0), slot)
            waiting.append(slot)
        slot = waiting.pop(0)
        machine.wait(slot)
        machine.multiply(slot)
        free.append(slot)


def walk_before(machine, tiles, stages):
    """As a pipelined loop: the next copy begins before the wait."""
    for tile in range(min(stages - 1, tiles)):
        machine.load(tile, tile)
    for tile in range(tiles):
        ahead = tile + stages - 1
        if ahead < tiles:
            machine.load(ahead, ahead % stages)
        machine.wait(tile % stages)
        machine.multiply(tile % stages)


def walk(distance, wait=True, slot=lambda i, stages: i % stages, order=lambda tiles: range(tiles)):
    """Copies run `distance(stages)` tiles ahead."""

    def answer(machine, tiles, stages):
        ahead = distance(stages)
        for tile in range(min(ahead, tiles)):
            machine.load(tile, slot(tile, stages))
        for tile in order(tiles):
            if ahead == 0:
                machine.load(tile, slot(tile, stages))
            if wait:
                machine.wait(slot(tile, stages))
            machine.multiply(slot(tile, stages))
            if ahead and tile + ahead < tiles:
                machine.load(tile + ahead, slot(tile + ahead, stages))

    return answer


def load_too_early(machine, tiles, stages):
    """The next copy goes into the slot that is about to be used."""
    for tile in range(min(stages, tiles)):
        machine.load(tile, tile)
    for tile in range(tiles):
        machine.wait(tile % stages)
        if tile + stages < tiles:
            machine.load(tile + stages, tile % stages)
        machine.multiply(tile % stages)


def load_beyond(machine, tiles, stages):
    """Copies begin as if there were more tiles."""
    for tile in range(stages):
        machine.load(tile, tile)
    for tile in range(tiles):
        machine.wait(tile % stages)
        machine.multiply(tile % stages)
        machine.load(tile + stages, tile % stages)


def wait_for_all(machine, tiles, stages):
    """A full round of copies, then a full round of products."""
    for first in range(0, tiles, stages):
        part = range(first, min(first + stages, tiles))
        for tile in part:
            machine.load(tile, tile - first)
        for tile in part:
            machine.wait(tile - first)
        for tile in part:
            machine.multiply(tile - first)


def wait_for_the_next(machine, tiles, stages):
    """Waits for the slot that was loaded last."""
    for tile in range(min(stages, tiles)):
        machine.load(tile, tile)
    for tile in range(tiles):
        machine.wait(min(tile + stages - 1, tiles - 1) % stages)
        machine.multiply(tile % stages)
        if tile + stages < tiles:
            machine.load(tile + stages, tile % stages)


def first_round_only(machine, tiles, stages):
    """No copy after the first ones."""
    for tile in range(min(stages, tiles)):
        machine.load(tile, tile)
    for tile in range(min(stages, tiles)):
        machine.wait(tile)
        machine.multiply(tile)


def nothing_waits(machine, tiles, stages):
    """Waits for a slot that nobody loaded."""
    for tile in range(tiles):
        machine.wait(tile % stages)
        machine.load(tile, tile % stages)
        machine.multiply(tile % stages)


def every_tile_twice(machine, tiles, stages):
    """Two products a tile."""
    for tile in range(tiles):
        machine.load(tile, tile % stages)
        machine.wait(tile % stages)
        machine.multiply(tile % stages)
        machine.multiply(tile % stages)


def load_what_is_not_there(machine, tiles, stages):
    """A copy for every slot, whatever the number of tiles."""
    for slot in range(stages):
        machine.load(slot, slot)
    for tile in range(tiles):
        machine.wait(tile % stages)
        machine.multiply(tile % stages)
        if tile + stages < tiles:
            machine.load(tile + stages, tile % stages)


def wait_at_once(machine, tiles, stages):
    """All slots are used, and each copy is waited for as soon as it has begun."""
    for tile in range(tiles):
        machine.load(tile, tile % stages)
        machine.wait(tile % stages)
        machine.multiply(tile % stages)


WALKS = [
    Wrong("the walk that was given", walk(lambda stages: 0), "clocks, and"),
    Wrong(
        "one tile ahead",
        walk(lambda stages: min(2, stages)),
        "are enough: which copies are on their way while you multiply?",
    ),
    Wrong("slots of one round", wait_for_all, "are enough: which copies are on their way"),
    Wrong("no wait", walk(lambda stages: stages, wait=False), "was used without a wait"),
    Wrong("a wait for another slot", wait_for_the_next, "was used without a wait for its slot"),
    Wrong("one slot too many", walk(lambda s: s + 1), "was loaded anew before its tile 0 was used"),
    Wrong("the slot about to be used", load_too_early, "slot 0 was loaded anew before its tile 0"),
    Wrong(
        "a slot for each tile",
        walk(lambda stages: stages, slot=lambda i, stages: i),
        "there is no slot 2: there are 0 to 1",
    ),
    Wrong(
        "all tiles at once",
        walk(lambda stages: 10**6),
        "slot 0 was loaded anew before its tile 0 was used",
    ),
    Wrong("more slots than tiles", load_what_is_not_there, "there is no tile 2: there are 2"),
    Wrong("waits at once", wait_at_once, "it took 477 clocks, and"),
    Wrong("beyond the end", load_beyond, "there is no tile 9: there are 9"),
    Wrong(
        "counted from 1",
        walk(lambda stages: stages, slot=lambda i, stages: i % stages + 1),
        "there is no slot 2: there are 0 to 1",
    ),
    Wrong("the first round only", first_round_only, "tile 2 was used 0 times"),
    Wrong("each tile twice", every_tile_twice, "tile 0 was used 2 times"),
    Wrong("a wait before the copy", nothing_waits, "nothing was loaded into it: for ever"),
    Wrong("nothing done", lambda machine, tiles, stages: None, "tile 0 was used 0 times"),
    Wrong(
        "backwards",
        lambda machine, tiles, stages: [
            (machine.load(t, 0), machine.wait(0), machine.multiply(0))
            for t in reversed(range(tiles))
        ],
        "the tiles were used in the order [8, 7",
    ),
]

RIGHT = {
    "12.1": [floor_by_cases, floor_by_intensity, floor_by_dictionary],
    "12.2": [work_by_formula, work_by_counting, work_by_mask],
    "12.3": [report_from_the_right, report_by_columns, report_by_pattern],
    "12.4": [programs_by_dictionary, programs_by_filling, programs_by_sorting],
    "12.5": [time_alternating, time_by_minimum, time_by_sorting, time_ratio],
    "12.6": [walk_after, walk_with_a_queue, walk_before],
}
WRONG = {
    "12.1": FLOORS,
    "12.2": WORK,
    "12.3": REPORTS,
    "12.4": PROGRAMS,
    "12.5": CLOCKS,
    "12.6": WALKS,
}
