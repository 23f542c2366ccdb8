"""Time one layer whose sequence is spread over several GPUs, and a trainer's step on several.

    torchrun --nproc-per-node 2 -m benchmarks.parallel
    torchrun --nproc-per-node 4 -m benchmarks.parallel --length 1048576 --add
    torchrun --nproc-per-node 2 -m benchmarks.parallel --config tiny --length 512     on a CPU

Context parallel: each rank has an early and a late stretch of the queries (lab/context_parallel.py)
of a layer of config A in bfloat16, forward and backward. A row holds the slowest rank's median
milliseconds and the largest rank's peak memory in GiB. First, at a short length, the ranks' outputs
are held to one process's. Data parallel: a step of the run on haystacks of 64k tokens, one batch
divided among the ranks. Rank 0 writes benchmarks/results/parallel.json.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.bench import keep_each, refusal
from benchmarks.cases import CONFIGS
from benchmarks.records import RESULTS, about, begin, what_was_run
from nsa_lite import NSAConfig, NSAttention
from nsa_lite.lab import distributed, long_runs
from nsa_lite.lab.context_parallel import ContextParallel, in_order, own_part

LENGTHS = (65_536, 262_144, 524_288, 1_048_576)
CHECKED = 8192  # tokens at which the ranks' outputs are held to one process's
REPEATS = 5
MOST_DIFFERENT = 2e-2  # of bfloat16 outputs of about 0.1, whose sums are cut differently


def rows(config: str, lengths: list[int], device: str, off: float) -> Iterator[dict]:
    """Every measurement, of all ranks together; off: how far their outputs are from one's."""
    world = distributed.world()
    where = {"config": config, "ids": "own", "ranks": world}
    for length in lengths:
        row = {**where, "length": length, "name": "context parallel", "difference": off}
        yield row | together(lambda length=length: of_layer(config, length, device))
    if config == "A" and long_runs.LENGTH in lengths:
        row = {**where, "length": long_runs.LENGTH, "name": "data parallel"}
        yield row | together(data_parallel_step)


def together(measure: Callable[[], dict[str, float]]) -> dict:
    """The worst of all ranks, or what one of them could not do."""
    try:
        mine = measure()
    except torch.OutOfMemoryError as error:  # all ranks have as much to hold, so all stop here
        mine = refusal(error)
        torch.cuda.empty_cache()
    found = distributed.everyone(mine)
    refused = [each for each in found if "refused" in each]
    return refused[0] if refused else {key: max(each[key] for each in found) for key in mine}


def of_layer(config: str, length: int, device: str) -> dict[str, float]:
    """Milliseconds of a forward and a backward of a rank's part, and what they hold at most."""
    sizes = CONFIGS[config].layer()
    layer = made(sizes, ContextParallel, device)
    tokens = length // distributed.world()
    x = torch.randn(1, tokens, sizes.dim, device=device, dtype=dtype_of(device), requires_grad=True)
    dout = torch.randn_like(x)
    times = []
    for repeat in range(1 + REPEATS):
        layer.zero_grad()
        x.grad = None
        if repeat == 1 and device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        began = now(device)
        out = layer(x)
        turned = now(device)
        out.backward(dout)
        times.append((turned - began, now(device) - turned))
    forward, backward = (statistics.median(column) for column in zip(*times[1:], strict=True))
    row = {"forward_ms": 1e3 * forward, "backward_ms": 1e3 * backward}
    return row | (
        {} if device == "cpu" else {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    )


def now(device: str) -> float:
    """The clock, once this rank's device has come so far."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def dtype_of(device: str) -> torch.dtype:
    """What is timed on a GPU, and what a CPU can check."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def made(sizes: NSAConfig, kind: type[NSAttention], device: str) -> NSAttention:
    """A layer with the weights of seed 0, the same on all ranks."""
    torch.manual_seed(0)
    with torch.device(device):
        return kind(sizes).to(dtype_of(device))


def difference(config: str, length: int, device: str) -> float:
    """The largest difference of the ranks' outputs from one process's, of the same sequence."""
    sizes = CONFIGS[config].layer()
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(1, length, sizes.dim, device=device, generator=generator).to(dtype_of(device))
    with torch.no_grad():
        mine = made(sizes, ContextParallel, device)(own_part(x))
        parts = [torch.empty_like(mine) for _ in range(distributed.world())]
        dist.all_gather(parts, mine)
        whole = made(sizes, NSAttention, device)(x)
    return float((in_order(parts, 1) - whole).abs().max())


def data_parallel_step() -> dict[str, float]:
    """A step of the 64k run, its batch of four sequences divided among the ranks."""
    config = long_runs.gpu_config("nsa-kl", 0, batch_size=4)
    cost = long_runs.cost_of_step(config)
    return {"step_ms": cost["milliseconds"], "peak_gib": cost["gib"]}


def show(row: dict) -> str:
    """One line of what is printed."""
    name = f"{row['length']:>9} {row['name']}, {row['ranks']} ranks"
    if "refused" in row:
        return f"{name}: {row['refused']}"
    numbers = {k: x for k, x in row.items() if isinstance(x, float) and k != "difference"}
    said = ", ".join(f"{key} {x:.2f}" for key, x in numbers.items())
    return f"{name}: {said}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    words = parse(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    if not torch.cuda.is_available() and words.config != "tiny":
        print("error: no CUDA device; `--config tiny` tries the script.", file=sys.stderr)
        return 2
    with distributed.processes():
        if not distributed.in_group():
            print("error: start it with torchrun, one process a GPU", file=sys.stderr)
            return 2
        device = "cuda" if torch.cuda.is_available() else "cpu"
        distributed.take_own_device(device)
        checked = min(CHECKED, *words.length) if words.length else CHECKED
        off = max(distributed.everyone(difference(words.config, checked, device)))
        measured = rows(words.config, words.length or list(LENGTHS), device, off)
        if distributed.rank() == 0:
            print(f"at {checked} tokens the ranks' outputs differ from one process's by {off:.1e}")
            command = what_was_run(given, words.out)
            header = about(command, "benchmarks.parallel")
            torchrun = f"torchrun --nproc-per-node {distributed.world()} -m"
            header["command"] = header["command"].replace("python -m", torchrun)
            replaced = {(words.config, length) for length in words.length or LENGTHS}
            record = begin(words.out, header, set() if words.add else replaced)
            keep_each(measured, record, words.out, show)
        else:
            for _ in measured:
                pass
        return 0 if off < MOST_DIFFERENT else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The words of the command line."""
    p = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node 2 -m benchmarks.parallel",
        description="Time a layer and a step of training on several GPUs.",
    )
    p.add_argument("--config", choices=CONFIGS, default="A")
    p.add_argument("--length", type=int, action="append", help="repeat for several")
    p.add_argument("--add", action="store_true", help="keep rows of other numbers of ranks")
    p.add_argument("--out", type=Path, default=RESULTS / "parallel.json")
    return p.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
