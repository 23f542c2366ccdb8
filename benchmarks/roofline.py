"""How fast could each kernel be? The time that a device needs for its operations and its bytes.

    python -m benchmarks.roofline                 config A: the paper's heads, 64k, random selection
    python -m benchmarks.roofline --config B --length 8192 --keep 0.9
    python -m benchmarks.roofline --config B --tokens 4 8 16     what sharing a program would give

Counted (counts.py), not timed. Every kernel has two bounds:

    any kernel     the products of the query-key pairs that the mask lets through, and every tensor
                   through device memory once
    these tiles    what the tiles of kernels/ multiply, masked corners included, what they load
                   again and again through the L2 cache, and what passes through the shared memory
                   of a multiprocessor, from which its matrix unit reads
"""

import argparse

from benchmarks.cases import CONFIGS
from benchmarks.counts import Sizes, Work, expected_union, neighbours, selected_walks, works
from benchmarks.records import load, recorded_on
from nsa_lite.config import NSAConfig
from nsa_lite.cost import sequence_cost
from nsa_lite.show import tables
from nsa_lite.show.tables import Column

RECORDED = {"arithmetic": "matmul", "memory": "copy", "cache": "L2 reads"}  # in ceilings.json
OPERATIONS_A_CLOCK = 4096  # of a multiprocessor's matrix unit, in bf16
BYTES_A_CLOCK = 128  # of its shared memory


def ceilings(record: dict) -> dict:
    """What a device gives at most: operations a second in bf16 matrix products, bytes a second.

    The best that benchmarks.ceilings recorded of each, in whatever order it was read: a floor is a
    time that no kernel can beat, so it divides by what no kernel exceeds. For the cache that is
    reading "in turn", although not every walk reads so: see reads_apart.

    Shared memory is not measured: as many bytes as its multiprocessors move in the clocks that the
    recorded products take. A card that multiplies less may keep a higher clock, so of the four this
    one is no proven bound; a test holds every recorded time to it.
    """
    rates = {
        resource: max(row["rate"] for row in record["rows"] if row["what"] == what)
        for resource, what in RECORDED.items()
    }
    shared = rates["arithmetic"] / OPERATIONS_A_CLOCK * BYTES_A_CLOCK
    return rates | {"shared": shared, "source": f"measured on one {recorded_on(record)}"}


def reads_apart(record: dict) -> float:
    """Bytes a second from the cache where no program reads what another has just read.

    What walks over random blocks can hope for, since each program has blocks of its own. No
    ceiling: forced blocks are read by all, and a selected forward was once recorded 4% faster than
    its loads take at this rate (NOTES.md, entry 26).
    """
    return max(row["rate"] for row in record["rows"] if ", apart, " in row["how"])


H100 = ceilings(load("ceilings"))
RESOURCES = ("arithmetic", "memory", "cache", "shared")
PRECISION = 0.02  # of the counts: two bounds that are closer are not told apart

COLUMNS = (
    Column("", 18),
    Column("needed", 7, ".2f"),
    Column("executed", 8, ".2f"),
    Column("memory", 7, ".2f"),
    Column("cache", 8, ".2f"),
    Column("shared", 8, ".2f"),
    Column("any kernel", 10, ".2f"),
    Column("these tiles", 11, ".2f"),
    Column("bound by", 18),
)
UNITS = ("", "TFLOP", "TFLOP", "GB", "GB", "GB", "ms", "ms", "")


def bounds(work: Work, device: dict = H100) -> dict[str, float]:
    """Seconds that each resource needs for these tiles."""
    amounts = (work.executed, work.memory, work.cache, work.shared)
    return {name: x / device[name] for name, x in zip(RESOURCES, amounts, strict=True)}


def floor(work: Work, device: dict = H100) -> float:
    """Seconds that these tiles need at least."""
    return max(bounds(work, device).values())


def floor_of_any(work: Work, device: dict = H100) -> float:
    """Seconds that any kernel with these products needs at least, whatever its tiles."""
    return max(work.operations / device["arithmetic"], work.memory / device["memory"])


def bound_by(work: Work, device: dict = H100) -> str:
    """The resource that these tiles keep busy longest; "a, b" where the count cannot tell."""
    least = (1 - PRECISION) * floor(work, device)
    return ", ".join(name for name, time in bounds(work, device).items() if time >= least)


def table(by_branch: dict[str, dict[str, Work]], device: dict = H100) -> str:
    """A line for each kernel: TFLOP that it needs and executes, GB it moves, its two floors."""
    rows = [UNITS]
    for branch, kernels in by_branch.items():
        for what, work in kernels.items():
            amounts = (
                work.operations / 1e12,
                work.executed / 1e12,
                work.memory / 1e9,
                work.cache / 1e9,
                work.shared / 1e9,
            )
            floors = (floor_of_any(work, device) * 1e3, floor(work, device) * 1e3)
            rows.append((f"{branch} {what}", *amounts, *floors, bound_by(work, device)))
    return tables.table(COLUMNS, rows)


def sharing(
    config: NSAConfig, length: int, keep: float, tokens: list[int]
) -> dict[str, dict[str, Work]]:
    """The selected branch's walks over a union, for so many tokens a program.

    dk and dv are left out: their programs own a block, and walk over its readers one by one.
    """
    sizes = Sizes(config, length)
    pairs = sequence_cost(config, length).tokens["selected"]
    unions = {U: expected_union(config, length, U, keep) for U in tokens}
    return {f"{U} tokens": selected_walks(sizes, pairs, union, U) for U, union in unions.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--config", choices=CONFIGS, default="A", help="heads and widths (A)")
    parser.add_argument("--length", type=int, default=65536, help="tokens (65536)")
    parser.add_argument(
        "--keep",
        type=float,
        default=0.0,
        help="how likely a query keeps a free block of the one before (0: random)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        help="only the selected branch's forward and dq, for so many tokens a program",
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    config = CONFIGS[args.config].layer()
    widths = f"{config.head_dim} and {config.value_dim} wide"
    print(f"{config.heads} heads, {config.kv_heads} groups, {widths}, {args.length} tokens, bf16")
    for U in args.tokens or [neighbours(Sizes(config, args.length))]:
        union = expected_union(config, args.length, U, args.keep)
        print(f"{U} neighbours read {union:.1f} blocks together")
    print(f"computed bounds, no timings; the device's rates: {H100['source']}\n")
    print(table(chosen(config, args)))


def chosen(config: NSAConfig, args: argparse.Namespace) -> dict[str, dict[str, Work]]:
    """The kernels that the command asks for."""
    if args.tokens:
        return sharing(config, args.length, args.keep, args.tokens)
    sizes = Sizes(config, args.length)
    union = expected_union(config, args.length, neighbours(sizes), args.keep)
    return works(sizes, union)


if __name__ == "__main__":
    main()
