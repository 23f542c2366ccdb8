"""Measure what a device gives at most: the ceilings that benchmarks.roofline divides by.

    python -m benchmarks.ceilings      on a GPU -> benchmarks/results/ceilings.json

    copy         device memory, bytes read and written together
    matmul       bf16 matrix products: cubes, the layer's projections, an attention's q k' and p v
    L2 reads     programs walk over the same live tiles again and again, each from another place;
                 by pointers, and by tensor descriptors (the copy engine), 16 KB a load, as large
                 as the 64 x 128 bf16 keys of the attention kernels; tile after tile ("in turn"), or
                 in leaps, so that nobody reads what another has just read ("apart")
    exp2         one function of the softmax, in float32

A ceiling is the best of its rows: a floor that some kernel beats is no floor. So L2's is "in turn";
"apart" says what random reads can hope for, and kernels that share some of their reads exceed it.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.bench import NO_DEVICE, milliseconds
from benchmarks.records import RESULTS, about, save
from benchmarks.walks import TILE, Walk, exp2_again, walk_boxes, walk_pointers
from nsa_lite.show import tables
from nsa_lite.show.tables import Column

MIB = 2**20
GIB = 2**30


class Amounts(NamedTuple):
    """How much is copied, multiplied and read: enough to fill the device, or to try the script."""

    copies: tuple[int, ...]  # bytes
    products: tuple[tuple[int, int, int], ...]  # M, N, K
    live: tuple[int, ...]  # bytes of tiles that are read again and again
    read: int  # bytes read in all
    powers: int  # exp2s
    processors: int  # programs are a multiple of these


TINY = Amounts(
    copies=(MIB,),
    products=((32, 32, 32),),
    live=(4 * TILE,),
    read=24 * TILE,
    powers=2**15,
    processors=2,
)


def filling() -> Amounts:
    """What fills the current device."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Amounts(
        copies=(GIB, 4 * GIB),
        products=(
            (8192, 8192, 8192),
            (16384, 16384, 16384),
            (65536, 8192, 2560),  # a projection of 64k tokens to 64 heads of 128
            (65536, 2560, 8192),  # and back
            (16384, 65536, 128),  # q k' of one head's rows
            (16384, 128, 65536),  # p v
        ),
        live=tuple(size * MIB for size in (8, 16, 24, 32, 48, 64, 96, 128)),
        read=32 * GIB,
        powers=2**36,
        processors=device.multi_processor_count,
    )


# --- what is measured: each yields rows {"what", "how", "rate", "unit"} ---


def row(what: str, how: str, amount: float, ms: float, unit: str) -> dict:
    """One measurement: `amount` in so many milliseconds."""
    return {"what": what, "how": how, "rate": amount / ms * 1e3, "unit": unit}


def copies(amounts: Amounts, device: str) -> Iterator[dict]:
    """A large tensor copied to another."""
    for size in amounts.copies:
        x = torch.randn(size // 4, device=device)
        y = torch.empty_like(x)
        ms = milliseconds(lambda x=x, y=y: y.copy_(x), [])
        yield row("copy", f"{size // MIB} MiB", 2 * size, ms, "byte/s")


def products(amounts: Amounts, device: str) -> Iterator[dict]:
    """torch's bf16 matrix product, of normal numbers: with zeros the clock would be higher."""
    for M, N, K in amounts.products:
        a = torch.randn(M, K, device=device, dtype=torch.bfloat16)
        b = torch.randn(K, N, device=device, dtype=torch.bfloat16)
        ms = milliseconds(lambda a=a, b=b: a @ b, [])
        yield row("matmul", f"{M} x {N} x {K}", 2 * M * N * K, ms, "operation/s")


class Way(NamedTuple):
    """How tiles are asked for: programs a multiprocessor, warps, and loads on their way at once."""

    programs: int
    warps: int
    stages: int


WAYS = (Way(3, 4, 4), Way(4, 4, 4), Way(2, 8, 6), Way(6, 4, 1))  # about 100 to 190 KB on their way


def reads(amounts: Amounts, device: str) -> Iterator[dict]:
    """The best way for each size of the live tiles, by pointers and by descriptors."""
    walks = {"pointers": walk_pointers, "descriptors": walk_boxes}
    for live, apart, name in product(amounts.live, (False, True), walks):
        shape = (live // TILE, TILE // 4)
        tiles = torch.randint(2**31, shape, dtype=torch.int32, device=device)
        tried = [read_once(walks[name], tiles, amounts, way, apart) for way in WAYS]
        best = max(tried, key=lambda tried: tried["rate"])
        order = "apart" if apart else "in turn"
        yield best | {"how": f"{name}, {live / MIB:g} MiB live, {order}, {best['how']}"}


def read_once(walk: Callable, tiles: Tensor, amounts: Amounts, way: Way, apart: bool) -> dict:
    """One way to walk over the tiles until `amounts.read` bytes are read."""
    programs = min(way.programs * amounts.processors, len(tiles))  # no two at one tile at a time
    steps = max(amounts.read // (programs * TILE), 1)
    path = Walk(programs, steps, way.warps, way.stages, apart)
    ms = milliseconds(lambda: walk(tiles, path), [])
    how = f"{way.programs} programs of {way.warps} warps, {way.stages} stages"
    return row("L2 reads", how, programs * steps * TILE, ms, "byte/s")


def powers(amounts: Amounts, device: str) -> Iterator[dict]:
    """exp2 of numbers in registers."""
    programs = 8 * amounts.processors
    width = 1024
    again = max(amounts.powers // (programs * width), 1)
    ms = milliseconds(lambda: exp2_again(programs, width, again, device), [])
    yield row("exp2", "float32", programs * width * again, ms, "number/s")


def all_rows(amounts: Amounts, device: str) -> Iterator[dict]:
    """Every measurement."""
    for measured in (copies, products, reads, powers):
        yield from measured(amounts, device)


# --- the command ---

COLUMNS = (Column("", 10), Column("", 66), Column("", 10, ".3g"), Column("", 12))


def line(row: dict) -> str:
    """A measurement on one line."""
    cells = (row["what"], row["how"], row["rate"], row["unit"])
    return tables.table(COLUMNS, [cells]).splitlines()[1]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ceilings", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--config", choices=("all", "tiny"), default="all")
    parser.add_argument("--out", type=Path, default=RESULTS / "ceilings.json")
    args = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    if not cuda and args.config == "all":
        print(NO_DEVICE, file=sys.stderr)
        return 2
    amounts = TINY if args.config == "tiny" else filling()
    words = [] if args.config == "all" else ["--config", args.config]
    record = about(words, "benchmarks.ceilings") | {"rows": []}
    for found in all_rows(amounts, "cuda" if cuda else "cpu"):
        record["rows"].append(found)
        print(line(found), flush=True)
        if cuda:
            torch.cuda.empty_cache()
    save(record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
