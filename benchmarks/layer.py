"""Time the whole layer, projections and all, beside dense layers, in one process on one device.

    python -m benchmarks.layer                     config A at 8k, 32k and 64k, every variant
    python -m benchmarks.layer --length 65536 --name NSA --name cuDNN
    python -m benchmarks.layer --length 65536 --profile           where NSA's time goes, by kernel

NSAttention, which chooses its own blocks (random weights and inputs: hardly any are shared), and
DenseAttention, held to FlashAttention-2 and to cuDNN; each also under torch.compile, and NSA under
activation checkpointing. Writes benchmarks/results/layer.json in the form of benchmarks.bench:
milliseconds (median) of a forward and of the backward behind it, and the peak memory of both in
GiB, weights and gradients included. A variant that cannot run gives its reason.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.utils.checkpoint import checkpoint

from benchmarks.bench import HEADING, NO_DEVICE, keep_each, refusal
from benchmarks.cases import CONFIGS, Sizes
from benchmarks.records import RESULTS, about, begin, what_was_run
from nsa_lite import DenseAttention, NSAConfig, NSAttention
from nsa_lite.show import tables
from nsa_lite.show.tables import Column

LENGTHS = (8192, 32768, 65536)
WARM_UP = 3  # steps: the first compile
LONG_ENOUGH = 500  # milliseconds of steps, and 10 steps at least
Run = Callable[[Tensor], Tensor]

# --- the variants ---


def eager(layer: nn.Module) -> Run:
    """The layer as it is."""
    return layer


def compiled(layer: nn.Module) -> Run:
    """The layer under torch.compile, and nothing that was compiled before."""
    torch.compiler.reset()
    return torch.compile(layer)


def checkpointed(layer: nn.Module) -> Run:
    """The layer keeps its input only; the backward runs the forward once more."""
    return partial(checkpoint, layer, use_reentrant=False)


class Variant(NamedTuple):
    """One way to have a layer: which, how it is called, and what torch's attention is held to."""

    layer: Callable[[NSAConfig], nn.Module]
    called: Callable[[nn.Module], Run]
    held_to: SDPBackend | None = None


VARIANTS = {
    "NSA": Variant(NSAttention, eager),
    "NSA compiled": Variant(NSAttention, compiled),
    "NSA checkpointed": Variant(NSAttention, checkpointed),
    "FlashAttention-2": Variant(DenseAttention, eager, SDPBackend.FLASH_ATTENTION),
    "FlashAttention-2 compiled": Variant(DenseAttention, compiled, SDPBackend.FLASH_ATTENTION),
    "cuDNN": Variant(DenseAttention, eager, SDPBackend.CUDNN_ATTENTION),
    "cuDNN compiled": Variant(DenseAttention, compiled, SDPBackend.CUDNN_ATTENTION),
}
LEFT_OUT = {65536: ("FlashAttention-2 compiled",)}  # the attention is nearly all of it there


class Case(NamedTuple):
    """A layer ready to be run. Shapes: x and dout (1, T, C)."""

    run: Run
    x: Tensor
    dout: Tensor
    leaves: list[Tensor]


def case_of(name: str, sizes: Sizes, length: int, device: str) -> Case:
    """The variant's layer with random weights, its input and the gradient of its output."""
    variant = VARIANTS[name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        layer = variant.layer(sizes.layer()).to(dtype)
        x = torch.randn(1, length, sizes.dim, dtype=dtype).requires_grad_()
        dout = torch.randn(1, length, sizes.dim, dtype=dtype)
    called = variant.called(layer)

    def run(x: Tensor) -> Tensor:
        with nullcontext() if variant.held_to is None else sdpa_kernel(variant.held_to):
            return called(x)

    return Case(run, x, dout, [x, *layer.parameters()])


# --- times ---


def mark() -> torch.cuda.Event | float:
    """Now: an event among the device's work, or the clock on a CPU."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: torch.cuda.Event | float, second: torch.cuda.Event | float) -> float:
    """Milliseconds from one mark to another, once the device has come to both."""
    if isinstance(first, float):
        return 1e3 * (second - first)
    second.synchronize()
    return first.elapsed_time(second)


def step(case: Case) -> tuple:
    """One forward and one backward, as in training, with marks before, between and after."""
    for leaf in case.leaves:
        leaf.grad = None
    began = mark()
    out = case.run(case.x)
    turned = mark()
    out.backward(case.dout)
    return began, turned, mark()


def measure(case: Case) -> dict[str, float]:
    """The medians over many steps, none of which waits for the one before; and their peak."""
    cuda = torch.cuda.is_available()
    for _ in range(WARM_UP if cuda else 1):
        began, _, ended = step(case)
        once = between(began, ended)
    repeats = min(max(10, int(LONG_ENOUGH / once)), 100) if cuda else 1
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    steps = [step(case) for _ in range(repeats)]
    row = {
        "forward_ms": statistics.median(between(began, turned) for began, turned, _ in steps),
        "backward_ms": statistics.median(between(turned, ended) for _, turned, ended in steps),
    }
    peak = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if cuda else {}
    return row | peak


def rows(config: str, length: int, names: list[str], device: str) -> Iterator[dict]:
    """Every measurement of one config and length."""
    for name in names:
        if name in LEFT_OUT.get(length, ()):
            continue
        row = {"config": config, "length": length, "ids": "own", "name": name}
        try:
            yield row | measure(case_of(name, CONFIGS[config], length, device))
        except Exception as error:  # a refusal is a result too
            yield row | refusal(error)
        gc.collect()  # a compiled layer holds itself
        if device == "cuda":
            torch.cuda.empty_cache()  # the next one finds the memory as this one did


# --- where the time goes ---

NAME_WIDTH = 80
COLUMNS = (
    Column("", NAME_WIDTH),
    Column("calls", 6, "d"),
    Column("ms", 9, ".3f"),
    Column("%", 6, ".1f"),
)


class Spent(NamedTuple):
    """One kernel of a device, or one operation of a CPU, all its calls together."""

    name: str
    calls: int
    milliseconds: float


def profiled(run: Callable[[], object]) -> list[Spent]:
    """Where the time of run() goes, the longest first."""
    cuda = torch.cuda.is_available()
    with torch.profiler.profile(
        activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
    ) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize()
    found = []
    for event in profiler.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if spent > 0 and not event.is_user_annotation:
            found.append(Spent(event.key, event.count, spent / 1e3))
    return sorted(found, key=lambda kernel: -kernel.milliseconds)


def profile_table(case: Case) -> str:
    """The kernels of a forward, then those of its backward; the first line of each is the sum."""
    for _ in range(WARM_UP):
        step(case)
    out = []
    kernels = {
        "forward": profiled(lambda: out.append(case.run(case.x))),
        "backward": profiled(lambda: out[0].backward(case.dout)),
    }
    return "\n\n".join(spent_table(what, spent) for what, spent in kernels.items())


def spent_table(what: str, kernels: list[Spent]) -> str:
    """The sum, then a line for each kernel with its share."""
    calls = sum(kernel.calls for kernel in kernels)
    whole = sum(kernel.milliseconds for kernel in kernels)
    lines = [
        (k.name[:NAME_WIDTH], k.calls, k.milliseconds, 100 * k.milliseconds / whole)
        for k in kernels
    ]
    return tables.table(COLUMNS, [(f"{what}, in all", calls, whole, 100.0), *lines])


# --- the command ---


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--config", choices=CONFIGS, default="A")
    parser.add_argument("--length", type=int, action="append", help="repeat for several")
    parser.add_argument("--name", choices=VARIANTS, action="append", help="repeat for several")
    parser.add_argument("--out", type=Path, default=RESULTS / "layer.json")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="the CUDA kernels of the named variants (NSA), sorted by time; nothing is recorded",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    a = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and a.config != "tiny":
        print(NO_DEVICE, file=sys.stderr)
        return 2
    lengths = a.length or ((64,) if a.config == "tiny" else LENGTHS)
    if a.profile:
        for name in a.name or ["NSA"]:
            for length in lengths:
                print(f"{name}, config {a.config}, {length} tokens, {device}")
                print(profile_table(case_of(name, CONFIGS[a.config], length, device)))
        return 0
    command = what_was_run(arguments, a.out)
    replaced = {(a.config, length) for length in lengths}
    record = begin(a.out, about(command, "benchmarks.layer"), replaced)
    print(HEADING)
    for length in lengths:
        keep_each(rows(a.config, length, a.name or list(VARIANTS), device), record, a.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
