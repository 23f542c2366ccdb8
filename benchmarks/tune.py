"""Time the tiles that were tried for a kernel, at 64k tokens, on this GPU.

    python -m benchmarks.tune                            every line of HALF, config A
    python -m benchmarks.tune flash_dkdv selected_dq     some of them
    python -m benchmarks.tune --config B                 of the selected branch, 4 heads a group
    python -m benchmarks.tune --config paper             those of WIDE, at the paper's widths
    python -m benchmarks.tune --out benchmarks/results/tune.json        kept, for notebook 13

kernels/tile_sizes.py holds the fastest of these; after a change of a kernel or of Triton, look
again. `stages` is what was asked for: where memory is short, `fit_stages` lowers it without a word.
A tile that cannot fit or compile prints why.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import kernels
from benchmarks.bench import ours
from benchmarks.cases import CONFIGS, Sizes, inputs, random_ids
from benchmarks.decode import Held
from benchmarks.records import about, save, what_was_run
from kernels.launching import Starter, launching_by, on_the_device
from kernels.tile_sizes import HALF, WIDE, TileSizes
from nsa_lite import BRANCHES

LENGTH = 65536


KERNELS = {  # line of the table -> the branch to run, the kernel to time
    "flash_forward": ("compressed", "flash_forward"),
    "flash_forward_window": ("window", "flash_forward"),
    "flash_dq": ("compressed", "flash_dq"),
    "flash_dq_window": ("window", "flash_dq"),
    "flash_dkdv": ("compressed", "flash_dkdv"),
    "flash_dkdv_window": ("window", "flash_dkdv"),
    "block_scores": ("scores + top-n", "block_scores"),
    "selected_forward": ("selected", "selected_forward"),
    "selected_dq": ("selected", "selected_dq"),
    "selected_dkdv": ("selected", "selected_dkdv"),
    "selected_dkdv_small": ("selected", "selected_dkdv"),
    "decode": ("decoding", "compressed_share"),
}
SHARED_UNION = ("selected_forward", "selected_dq")  # they take as many rows


def flat(*tiles: tuple[int, int, int, int], hold: bool = False) -> list[TileSizes]:
    """Tiles from (BLOCK_M, BLOCK_N, warps, stages)."""
    return [TileSizes(*tile, hold=hold) for tile in tiles]


def walks(*tiles: tuple[int, int, int], hold: bool = False) -> list[TileSizes]:
    """Tiles of the selected branch, whose keys follow from the blocks: (BLOCK_M, warps, stages)."""
    return [TileSizes(rows, None, warps, stages, hold=hold) for rows, warps, stages in tiles]


TRIED_SELECTED = {
    "selected_forward": walks((64, 4, 3), (64, 4, 2), (128, 8, 3), (128, 8, 2)),
    "selected_dq": walks((64, 4, 3), (64, 4, 2), (128, 8, 3), (128, 8, 2), hold=True)
    + walks((64, 4, 2), (128, 8, 2)),
}
TRIED = {
    "flash_forward": flat((128, 128, 8, 3), (128, 64, 4, 2), (128, 64, 8, 3))
    + flat((128, 128, 8, 3), (64, 64, 4, 3), hold=True),
    "flash_forward_window": flat((64, 32, 4, 3), (64, 64, 4, 3), (64, 32, 4, 2), hold=True)
    + flat((128, 32, 4, 3)),
    "flash_dq": flat((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 6), hold=True)
    + flat((64, 64, 4, 2)),
    "flash_dq_window": flat((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 4), hold=True)
    + flat((64, 64, 4, 2)),
    "flash_dkdv": flat((64, 64, 4, 2), (64, 128, 8, 3), (64, 128, 8, 2), (32, 64, 4, 4))
    + flat((32, 64, 4, 3), hold=True),
    "flash_dkdv_window": flat((64, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 4), (64, 64, 4, 2))
    + flat((32, 64, 4, 4), hold=True),
    "block_scores": flat((64, 128, 4, 2), (64, 128, 4, 1), (64, 64, 4, 2), (128, 128, 8, 2)),
    **TRIED_SELECTED,
    "selected_dkdv": walks((16, 4, 4), (16, 4, 3), (16, 4, 2), hold=True) + walks((16, 4, 8)),
    "decode": flat((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 4), (64, 32, 4, 4))
    + flat((64, 128, 4, 2), (64, 128, 8, 3)),
}
TRIED_SMALL = TRIED_SELECTED | {
    "selected_dkdv_small": walks((16, 4, 4), (16, 4, 6), (16, 4, 8), hold=True)
    + walks((16, 4, 8), (32, 4, 4), (32, 4, 6), (64, 8, 4)),
}
TRIED_WIDE = {
    "flash_forward": flat((128, 128, 8, 2), (128, 64, 8, 3))
    + flat((128, 128, 8, 2), (64, 64, 4, 2), hold=True),
    "flash_forward_window": flat((64, 32, 4, 4), (64, 64, 4, 2), hold=True)
    + flat((64, 32, 4, 3), (128, 32, 8, 4)),
    "flash_dq": flat((64, 32, 4, 4), (128, 32, 8, 6), hold=True)
    + flat((128, 64, 8, 3), (64, 32, 4, 3)),
    "flash_dq_window": flat((64, 32, 4, 4), (128, 32, 8, 6), hold=True)
    + flat((128, 64, 8, 3), (64, 32, 4, 3)),
    "flash_dkdv": flat((32, 64, 4, 3), (64, 64, 8, 3), (64, 64, 8, 2), (32, 128, 8, 4)),
    "flash_dkdv_window": flat((32, 64, 4, 3), (64, 64, 8, 3), (64, 64, 8, 2), (32, 128, 8, 4)),
    "block_scores": flat((64, 128, 4, 2), (64, 64, 4, 2), (64, 128, 8, 2), (128, 128, 8, 2)),
    "selected_forward": walks((64, 4, 2), (64, 8, 3)),
    "selected_dq": walks((64, 4, 2), (64, 8, 4), hold=True) + walks((64, 4, 1), (64, 8, 3)),
    "selected_dkdv": walks((16, 4, 3), (16, 4, 2), hold=True) + walks((16, 4, 7), (16, 4, 4)),
    "decode": flat((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 4)),
}
TABLES = {"A": (HALF, TRIED), "B": (HALF, TRIED_SMALL), "paper": (WIDE, TRIED_WIDE)}


def changes(table: dict[str, TileSizes], row: str, tile: TileSizes) -> dict[str, TileSizes]:
    """The lines of a table that trying a tile changes: who shares its union takes its rows too."""
    others = SHARED_UNION if row in SHARED_UNION else ()
    return {other: table[other].with_rows(tile.BLOCK_M) for other in others} | {row: tile}


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
    found = {
        name: trained(forward) for name, forward in ours(x, sizes, ids).items() if name in used
    }
    return found | {"decoding": a_step(x, sizes)}


def a_step(x: dict[str, Tensor], sizes: Sizes) -> Callable[[], object]:
    """The decoding step of the last token, which forgets the tile that it took before."""
    x = {name: y.detach() for name, y in x.items()}
    pairs = {name: (x[f"{name}.k"], x[f"{name}.v"]) for name in BRANCHES}
    cache = Held(pairs["compressed"], pairs, torch.tensor([x["q"].shape[2]]).to(x["q"].device))

    def run() -> Tensor:
        kernels.decode.prepared_steps.clear()
        q, gates = x["q"][:, :, -1:], x["gates"][:, :, -1:]
        return kernels.decode_step(q, cache, gates, **sizes.choice(), window_size=sizes.window)

    return run


def timed_into(launches: list[tuple]) -> Starter:
    """Starts kernels, and appends (kernel, start, end) of each launch."""

    def timed(kernel, grid, arguments, options):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        on_the_device(kernel, grid, arguments, options)
        end.record()
        launches.append((kernel.__name__, start, end))

    return timed


def milliseconds(run: Callable[[], object], kernel: str, repeats: int = 5) -> float:
    """The median time of one kernel in run(), after a first run that compiles."""
    run()
    times = []
    for _ in range(repeats):
        launches = []
        with launching_by(timed_into(launches)):
            run()
        torch.cuda.synchronize()
        times.append(sum(a.elapsed_time(b) for name, a, b in launches if name == kernel))
    return statistics.median(times)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(KERNELS)}")
    parser.add_argument("--config", choices=TABLES, default="A")
    parser.add_argument("--out", type=Path, help="keep the times there")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    table, tried = TABLES[args.config]
    if unknown := set(args.rows) - set(tried):
        parser.error(f"row = {unknown.pop()}: must be one of {', '.join(tried)}")
    if not torch.cuda.is_available():
        print("error: no CUDA device: times of interpreted kernels mean nothing", file=sys.stderr)
        return 2
    sizes = CONFIGS[args.config]
    x = inputs(sizes, LENGTH, "cuda", torch.bfloat16)
    runs = branches(x, sizes, random_ids(sizes, LENGTH, "cuda"))
    words = what_was_run(arguments, args.out)
    record = about(words, "benchmarks.tune") | {"config": args.config, "rows": []}
    for row in args.rows or tried:
        branch, kernel = KERNELS[row]
        chosen = dict(table)
        for tile in tried[row]:
            table.update(changes(chosen, row, tile))
            kept = {"row": row, **asdict(tile), "chosen": tile == chosen[row]}
            try:
                kept["ms"] = milliseconds(runs[branch], kernel)
                found = f"{kept['ms']:8.2f} ms"
            except Exception as error:  # too large, or refused by the compiler
                found = f"{type(error).__name__}: {error}".split("\n")[0][:80]
                kept["refused"] = found
            mark = "  <- chosen" if tile == chosen[row] else ""
            print(f"{row:20} {tile} {found}{mark}", flush=True)
            record["rows"].append(kept)
        table.update(chosen)
    if args.out:
        save(record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
