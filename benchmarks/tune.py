"""Time the tiles that were tried for a kernel, at 64k tokens of config A, on this GPU.

    python -m benchmarks.tune                 every row of kernels/tiles.py (half precision)
    python -m benchmarks.tune dkdv selected   some of them

kernels/tiles.py holds the fastest of these; after a change of a kernel or of Triton, look again.
A tile that does not fit or compile prints why.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.bench import ours
from benchmarks.cases import CONFIGS, inputs, random_ids
from kernels.tiles import HALF

SIZES = CONFIGS["A"]


def flat(*tiles: tuple[int, int, int, int]) -> list[dict[str, int]]:
    """Tiles from (M, N, warps, stages)."""
    return [dict(zip(("M", "N", "num_warps", "num_stages"), tile, strict=True)) for tile in tiles]


def walks(*tiles: tuple[int, int]) -> list[dict[str, int]]:
    """Tiles of the selected branch, whose sizes follow from the blocks: (warps, stages)."""
    return [dict(num_warps=warps, num_stages=stages) for warps, stages in tiles]


# Row of the table -> the branch to run, the kernel to time, and what was tried.
TRIED = {
    "forward": ("compressed", "flash_forward", flat(
        (128, 128, 8, 3), (128, 64, 4, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3))),
    "window": ("window", "flash_forward", flat(
        (128, 32, 4, 3), (64, 32, 4, 3), (64, 64, 4, 3), (128, 64, 4, 2), (128, 32, 8, 3))),
    "dq": ("compressed", "flash_dq", flat(
        (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3), (64, 32, 4, 3), (128, 32, 4, 2))),
    "dkdv": ("compressed", "flash_dkdv", flat(
        (32, 64, 4, 4), (32, 64, 4, 3), (32, 64, 4, 2), (16, 64, 4, 8), (64, 64, 4, 2),
        (64, 128, 8, 3), (32, 128, 8, 4))),
    "window_dkdv": ("window", "flash_dkdv", flat(
        (64, 128, 8, 3), (64, 128, 8, 4), (32, 128, 8, 4), (32, 64, 4, 3), (64, 64, 4, 3))),
    "scores": ("scores + top-n", "block_scores", flat(
        (64, 128, 4, 2), (64, 128, 4, 3), (64, 64, 4, 3), (128, 64, 4, 3), (128, 128, 8, 3))),
    "selected": ("selected", "selected_forward", walks((4, 3), (4, 2), (4, 1), (8, 2))),
    "selected_dq": ("selected", "selected_dq", walks((4, 3), (4, 1), (8, 2))),
    "selected_dkdv": ("selected", "selected_dkdv", walks((4, 8), (4, 5), (4, 3), (8, 4))),
}


def branches(x: dict[str, Tensor], ids: Tensor) -> dict[str, Callable[[], object]]:
    """The benchmark's branches, each forward and, where it has one, backward."""
    leaves = [t for t in x.values() if t.requires_grad]

    def trained(forward: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> None:
            out = forward()
            if out.requires_grad:
                torch.autograd.grad(out, leaves, x["dout"], allow_unused=True)

        return run

    used = {branch for branch, _, _ in TRIED.values()}
    return {name: trained(forward) for name, forward in ours(x, SIZES, ids).items()
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
    rows = parser.parse_args(arguments).rows or list(TRIED)
    if unknown := set(rows) - set(TRIED):
        parser.error(f"row = {unknown.pop()}: must be one of {', '.join(TRIED)}")
    if not torch.cuda.is_available():
        print("error: no CUDA device: times of interpreted kernels mean nothing", file=sys.stderr)
        return 2
    x = inputs(SIZES, 65536, "cuda", torch.bfloat16)
    runs = branches(x, random_ids(SIZES, 65536, "cuda"))
    for row in rows:
        branch, kernel, tried = TRIED[row]
        chosen = HALF[row]
        for tile in tried:
            HALF[row] = tile
            try:
                found = f"{milliseconds(runs[branch], kernel):8.2f} ms"
            except Exception as error:  # too large, or refused by the compiler
                found = f"{type(error).__name__}: {error}".split("\n")[0][:80]
            print(f"{row:14} {tile} {found}{'  <- chosen' if tile == chosen else ''}", flush=True)
        HALF[row] = chosen
    return 0


if __name__ == "__main__":
    sys.exit(main())
