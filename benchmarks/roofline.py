"""How fast could each kernel be? The time that a device needs for its operations and its bytes.

    python -m benchmarks.roofline                   the paper's heads, 64k tokens, random selection
    python -m benchmarks.roofline --length 8192 --keep 0.9

Counted (counts.py), not timed. Every kernel has two bounds:

    any kernel     the products of the query-key pairs that the mask lets through, and every tensor
                   through device memory once
    these tiles    what the tiles of kernels/ multiply, masked corners included, what they load
                   again and again through the L2 cache, and what passes through the shared memory
                   of a multiprocessor, from which its matrix unit reads
"""

import argparse

from benchmarks.counts import Sizes, Work, expected_union, neighbours, works
from nsa_lite.config import NSAConfig
from nsa_lite.show import tables
from nsa_lite.show.tables import Column

# What a device gives at most: operations a second in bf16 matrix products, bytes a second.
H100 = {
    "arithmetic": 743e12,  # the best of several shapes; the least good gave 672e12
    "memory": 3.03e12,  # a copy, bytes read and written together
    "cache": 7.5e12,  # reads from L2 while under 32 MB are live; 4.3e12 at 128 MB
    # Not measured. In a clock the matrix unit of a multiprocessor does 4096 operations, and its
    # shared memory moves 128 bytes: 32 operations take as long as a byte, at any clock. Taken is
    # the clock at which 132 units give the 743e12, 1.37 GHz; NVIDIA's 989e12 need 1.83 GHz.
    "shared": 743e12 / 32,  # 23.2e12
    "source": "measured on one H100 80 GB (HBM3, 700 W), torch 2.11, triton 3.6, November 2026",
}
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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--length", type=int, default=65536, help="tokens (65536)")
    parser.add_argument("--width", type=int, default=128, help="of queries and keys (128)")
    parser.add_argument(
        "--keep",
        type=float,
        default=0.0,
        help="how likely a query keeps a free block of the one before (0: random)",
    )
    args = parser.parse_args()
    config = NSAConfig(head_dim=args.width)
    sizes = Sizes(config, args.length)
    union = expected_union(config, args.length, neighbours(sizes), args.keep)
    print(
        f"{config.heads} heads, {config.kv_heads} groups, {args.length} tokens, bf16; "
        f"{neighbours(sizes)} neighbours read {union:.1f} blocks together"
    )
    print(f"computed bounds, no timings; the device's rates: {H100['source']}\n")
    print(table(works(sizes, union)))


if __name__ == "__main__":
    main()
