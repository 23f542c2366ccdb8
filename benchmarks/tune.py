"""Time the tiles that were tried for a kernel, at 64k tokens, on this GPU.

    python -m benchmarks.tune                   every row of HALF in kernels/tiles.py, config A
    python -m benchmarks.tune dkdv selected     some of them
    python -m benchmarks.tune --config paper    the rows of WIDE, at the paper's widths

kernels/tiles.py holds the fastest of these; after a change of a kernel or of Triton, look again.
num_stages is what was asked for: where memory is short, `fitting` lowers it without a word. A tile
that cannot fit or compile prints why.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.bench import ours
from benchmarks.cases import CONFIGS, Sizes, inputs, random_ids
from kernels.tiles import HALF, WIDE

LENGTH = 65536


def flat(hold: bool, *tiles: tuple[int, int, int, int]) -> list[dict[str, int]]:
    """Tiles from (M, N, warps, stages)."""
    return [dict(zip(("M", "N", "num_warps", "num_stages"), tile, strict=True), HOLD=hold)
            for tile in tiles]


def walks(hold: bool, *tiles: tuple[int, int]) -> list[dict[str, int]]:
    """Tiles of the selected branch, whose sizes follow from the blocks: (warps, stages)."""
    return [dict(num_warps=warps, num_stages=stages, HOLD=hold) for warps, stages in tiles]


def without_hold(tiles: list[dict[str, int]]) -> list[dict[str, int]]:
    """For the kernels that hold nothing in registers."""
    return [{name: tile[name] for name in tile if name != "HOLD"} for tile in tiles]


# Row of the table -> the branch to run, the kernel to time, and what was tried.
TRIED = {
    "forward": ("compressed", "flash_forward",
                flat(False, (128, 128, 8, 3), (128, 64, 4, 2), (128, 64, 8, 3))
                + flat(True, (128, 128, 8, 3), (64, 64, 4, 3))),
    "window": ("window", "flash_forward",
               flat(True, (64, 32, 4, 3), (64, 64, 4, 3), (64, 32, 4, 2))
               + flat(False, (128, 32, 4, 3))),
    "dq": ("compressed", "flash_dq",
           flat(True, (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 6))
           + flat(False, (64, 64, 4, 2))),
    "window_dq": ("window", "flash_dq",
                  flat(True, (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 4))
                  + flat(False, (64, 64, 4, 2))),
    "dkdv": ("compressed", "flash_dkdv",
             flat(False, (64, 64, 4, 2), (64, 128, 8, 3), (64, 128, 8, 2), (32, 64, 4, 4))
             + flat(True, (32, 64, 4, 3))),
    "window_dkdv": ("window", "flash_dkdv",
                    flat(False, (64, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 4), (64, 64, 4, 2))
                    + flat(True, (32, 64, 4, 4))),
    "scores": ("scores + top-n", "block_scores", without_hold(
        flat(False, (64, 128, 4, 2), (64, 128, 4, 1), (64, 64, 4, 2), (128, 128, 8, 2)))),
    "selected": ("selected", "selected_forward", without_hold(
        walks(False, (4, 3), (4, 2), (4, 1), (8, 2)))),
    "selected_dq": ("selected", "selected_dq", walks(True, (4, 3), (4, 2)) + walks(False, (4, 2))),
    "selected_dkdv": ("selected", "selected_dkdv",
                      walks(True, (4, 4), (4, 3), (4, 2)) + walks(False, (4, 8))),
}
TRIED_WIDE = {
    "forward": (*TRIED["forward"][:2], flat(False, (128, 64, 8, 3), (64, 64, 4, 1))),
    "window": (*TRIED["window"][:2], flat(False, (64, 32, 4, 3), (128, 32, 8, 3))),
    "dq": (*TRIED["dq"][:2], flat(False, (64, 32, 4, 2), (64, 64, 8, 2))),
    "window_dq": (*TRIED["window_dq"][:2], flat(False, (64, 32, 4, 2), (64, 64, 8, 2))),
    "dkdv": (*TRIED["dkdv"][:2],
             flat(False, (64, 128, 8, 2), (64, 64, 8, 3), (64, 64, 8, 2), (32, 64, 8, 3))),
    "window_dkdv": (*TRIED["window_dkdv"][:2],
                    flat(False, (64, 128, 8, 2), (64, 64, 8, 3), (64, 64, 8, 2), (32, 64, 8, 3))),
    "scores": (*TRIED["scores"][:2], without_hold(
        flat(False, (64, 128, 8, 1), (64, 128, 4, 1), (64, 64, 4, 1)))),
    "selected": (*TRIED["selected"][:2], without_hold(walks(False, (4, 3), (8, 3)))),
    "selected_dq": (*TRIED["selected_dq"][:2], walks(False, (4, 3), (8, 2), (8, 3))),
    "selected_dkdv": (*TRIED["selected_dkdv"][:2], walks(False, (4, 8), (8, 4), (8, 8))),
}
TABLES = {"A": (HALF, TRIED), "paper": (WIDE, TRIED_WIDE)}


def branches(x: dict[str, Tensor], sizes: Sizes, ids: Tensor) -> dict[str, Callable[[], object]]:
    """The benchmark's branches, each forward and, where it has one, backward."""
    leaves = [t for t in x.values() if t.requires_grad]

    def trained(forward: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> None:
            out = forward()
            if out.requires_grad:
                torch.autograd.grad(out, leaves, x["dout"], allow_unused=True)

        return run

    used = {branch for branch, _, _ in TRIED.values()}
    return {name: trained(forward) for name, forward in ours(x, sizes, ids).items()
            if name in used}


@contextmanager
def timed_launches():
    """A list that every launch of a Triton kernel adds (name, start, end) to."""
    from triton.runtime.jit import JITFunction

    launches, launch = [], JITFunction.run

    def timed(self, *args, **options):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        compiled = launch(self, *args, **options)
        end.record()
        launches.append((self.__name__, start, end))
        return compiled

    JITFunction.run = timed
    try:
        yield launches
    finally:
        JITFunction.run = launch


def milliseconds(run: Callable[[], object], kernel: str, repeats: int = 5) -> float:
    """The median time of one kernel in run(), after a first run that compiles."""
    run()
    times = []
    for _ in range(repeats):
        with timed_launches() as launches:
            run()
        torch.cuda.synchronize()
        times.append(sum(a.elapsed_time(b) for name, a, b in launches if name == kernel))
    return statistics.median(times)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(TRIED)}")
    parser.add_argument("--config", choices=TABLES, default="A")
    args = parser.parse_args(arguments)
    if unknown := set(args.rows) - set(TRIED):
        parser.error(f"row = {unknown.pop()}: must be one of {', '.join(TRIED)}")
    if not torch.cuda.is_available():
        print("error: no CUDA device: times of interpreted kernels mean nothing", file=sys.stderr)
        return 2
    sizes, (table, tried) = CONFIGS[args.config], TABLES[args.config]
    x = inputs(sizes, LENGTH, "cuda", torch.bfloat16)
    runs = branches(x, sizes, random_ids(sizes, LENGTH, "cuda"))
    for row in args.rows or tried:
        branch, kernel, tiles = tried[row]
        chosen = table[row]
        for tile in tiles:
            table[row] = tile
            try:
                found = f"{milliseconds(runs[branch], kernel):8.2f} ms"
            except Exception as error:  # too large, or refused by the compiler
                found = f"{type(error).__name__}: {error}".split("\n")[0][:80]
            print(f"{row:14} {tile} {found}{'  <- chosen' if tile == chosen else ''}", flush=True)
        table[row] = chosen
    return 0


if __name__ == "__main__":
    sys.exit(main())
