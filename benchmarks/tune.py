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


def flat(hold: bool | None, *tiles: tuple[int, int, int, int]) -> list[dict[str, int]]:
    """Tiles from (M, N, warps, stages); `hold` is None for kernels that hold nothing."""
    return [dict(M=M, N=N) | walk for M, N, *sizes in tiles for walk in walks(hold, sizes)]


def walks(hold: bool | None, *tiles: tuple[int, int]) -> list[dict[str, int]]:
    """Tiles of the selected branch, whose sizes follow from the blocks: (warps, stages)."""
    held = {} if hold is None else dict(HOLD=hold)
    return [dict(num_warps=warps, num_stages=stages) | held for warps, stages in tiles]


KERNELS = {  # row of the table -> the branch to run, the kernel to time
    "forward": ("compressed", "flash_forward"),
    "window_forward": ("window", "flash_forward"),
    "dq": ("compressed", "flash_dq"),
    "window_dq": ("window", "flash_dq"),
    "dkdv": ("compressed", "flash_dkdv"),
    "window_dkdv": ("window", "flash_dkdv"),
    "scores": ("scores + top-n", "block_scores"),
    "selected": ("selected", "selected_forward"),
    "selected_dq": ("selected", "selected_dq"),
    "selected_dkdv": ("selected", "selected_dkdv"),
}
TRIED = {
    "forward": flat(False, (128, 128, 8, 3), (128, 64, 4, 2), (128, 64, 8, 3))
    + flat(True, (128, 128, 8, 3), (64, 64, 4, 3)),
    "window_forward": flat(True, (64, 32, 4, 3), (64, 64, 4, 3), (64, 32, 4, 2))
    + flat(False, (128, 32, 4, 3)),
    "dq": flat(True, (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 6)) + flat(False, (64, 64, 4, 2)),
    "window_dq": flat(True, (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 4))
    + flat(False, (64, 64, 4, 2)),
    "dkdv": flat(False, (64, 64, 4, 2), (64, 128, 8, 3), (64, 128, 8, 2), (32, 64, 4, 4))
    + flat(True, (32, 64, 4, 3)),
    "window_dkdv": flat(False, (64, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 4), (64, 64, 4, 2))
    + flat(True, (32, 64, 4, 4)),
    "scores": flat(None, (64, 128, 4, 2), (64, 128, 4, 1), (64, 64, 4, 2), (128, 128, 8, 2)),
    "selected": walks(None, (4, 3), (4, 2), (4, 1), (8, 2)),
    "selected_dq": walks(True, (4, 3), (4, 2)) + walks(False, (4, 2)),
    "selected_dkdv": walks(True, (4, 4), (4, 3), (4, 2)) + walks(False, (4, 8)),
}
TRIED_WIDE = {
    "forward": flat(False, (128, 64, 8, 3), (64, 64, 4, 1)),
    "window_forward": flat(False, (64, 32, 4, 3), (128, 32, 8, 3)),
    "dq": flat(False, (64, 32, 4, 2), (64, 64, 8, 2)),
    "window_dq": flat(False, (64, 32, 4, 2), (64, 64, 8, 2)),
    "dkdv": flat(False, (64, 128, 8, 2), (64, 64, 8, 3), (64, 64, 8, 2), (32, 64, 8, 3)),
    "window_dkdv": flat(False, (64, 128, 8, 2), (64, 64, 8, 3), (64, 64, 8, 2), (32, 64, 8, 3)),
    "scores": flat(None, (64, 128, 8, 1), (64, 128, 4, 1), (64, 64, 4, 1)),
    "selected": walks(None, (4, 3), (8, 3)),
    "selected_dq": walks(False, (4, 3), (8, 2), (8, 3)),
    "selected_dkdv": walks(False, (4, 8), (8, 4), (8, 8)),
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

    used = {branch for branch, _ in KERNELS.values()}
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
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(KERNELS)}")
    parser.add_argument("--config", choices=TABLES, default="A")
    args = parser.parse_args(arguments)
    if unknown := set(args.rows) - set(KERNELS):
        parser.error(f"row = {unknown.pop()}: must be one of {', '.join(KERNELS)}")
    if not torch.cuda.is_available():
        print("error: no CUDA device: times of interpreted kernels mean nothing", file=sys.stderr)
        return 2
    sizes, (table, tried) = CONFIGS[args.config], TABLES[args.config]
    x = inputs(sizes, LENGTH, "cuda", torch.bfloat16)
    runs = branches(x, sizes, random_ids(sizes, LENGTH, "cuda"))
    for row in args.rows or KERNELS:
        (branch, kernel), chosen = KERNELS[row], table[row]
        for tile in tried[row]:
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
