"""Time one decoding step beside public peers, in one process on one device.

    python -m benchmarks.decode                     config A: every batch and context
    python -m benchmarks.decode --batch 1 --length 65536 --name NSA

One new token for each of `batch` sequences that hold `length` tokens, in microseconds (median):
`graph_us` of a call inside a CUDA graph, which has many calls, each with a cache of its own, as a
model has layers, so that no call finds in the L2 cache what the one before has read; `eager_us` of
a call as Python makes it, many in a row. `bytes` is what a step must read.
Writes benchmarks/results/decode.json in the form of benchmarks.bench.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import kernels
from benchmarks.bench import NO_DEVICE, keep_each, refusal
from benchmarks.cases import CONFIGS, Sizes
from benchmarks.records import RESULTS, about, what_was_run
from nsa_lite import NSAttention
from nsa_lite.blocks import num_compressed

CASES = (  # batch, context
    *((1, length) for length in (4096, 8192, 16384, 32768, 65536, 131072, 262144)),
    *((batch, 65536) for batch in (4, 16, 32)),
)
COLD = 128 * 2**20  # bytes that the calls of one graph read at least: more than an L2 cache holds
REPEATS = 20
LAYERS = 4  # whose calls a graph has at least
GROWTH = 4096  # tokens that the layer's cache has room for beyond its length: each call adds one
Call = Callable[[], Tensor]
Pair = tuple[Tensor, Tensor]
Make = Callable[[Sizes, int, int, str], Call]


class Held(NamedTuple):
    """One layer's cache, its newest token included."""

    blocks: Pair
    raw: dict[str, Pair]
    lengths: Tensor


class Asked(NamedTuple):
    """The newest token's query, what it reads, and its gates."""

    q: Tensor
    cache: Held
    gates: Tensor


def asked(sizes: Sizes, batch: int, length: int, device: str) -> Asked:
    """Random normal keys, values and queries."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def pair(rows: int) -> Pair:
        shape = batch, sizes.groups, rows
        return (
            torch.randn(*shape, sizes.width, device=device, dtype=dtype),
            torch.randn(*shape, sizes.value, device=device, dtype=dtype),
        )

    q = torch.randn(batch, sizes.heads, 1, sizes.width, device=device, dtype=dtype)
    gates = torch.rand(batch, sizes.heads, 1, 3, device=device, dtype=dtype)
    lengths = torch.full((batch,), length, device=device)
    blocks = pair(num_compressed(length, sizes.block_size, sizes.stride))
    raw = {"selected": pair(length), "window": pair(length)}
    return Asked(q, Held(blocks, raw, lengths), gates)


# --- who is timed: each makes its own numbers, and returns a call ---


def ours(sizes: Sizes, batch: int, length: int, device: str) -> Call:
    """kernels.decode_step."""
    x = asked(sizes, batch, length, device)
    return lambda: kernels.decode_step(*x, **sizes.choice(), window_size=sizes.window)


def dense(backend: SDPBackend) -> Make:
    """torch's attention of one query to all keys, held to one backend."""

    def make(sizes: Sizes, batch: int, length: int, device: str) -> Call:
        x = asked(sizes, batch, length, device)
        k, v = x.cache.raw["selected"]

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(x.q, k, v, enable_gqa=True)

        return call

    return make


def fla(sizes: Sizes, batch: int, length: int, device: str) -> Call:
    """fla-core's NSA, which pools all keys anew in each call; without its window (peers.py)."""
    from fla.ops.nsa.parallel import parallel_nsa

    x = asked(sizes, batch, length, device)
    k, v = (y.transpose(1, 2).contiguous() for y in x.cache.raw["selected"])
    q = x.q.transpose(1, 2).contiguous()
    gates = [x.gates[..., i].transpose(1, 2).contiguous() for i in range(3)]
    return lambda: parallel_nsa(
        q,
        k,
        v,
        *gates,
        block_counts=sizes.num_selected,
        block_size=sizes.select_block_size,
        window_size=0,
    )


def layer(ends_block: bool) -> Make:
    """A whole layer's step: projections, gates, the cache's new row, attention, output.

    One token in 16 ends a compression block, which phi then makes.
    """

    def make(sizes: Sizes, batch: int, length: int, device: str) -> Call:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with torch.device(device):
            made = NSAttention(sizes.layer()).to(dtype)
        cache = made.new_cache(batch, length + GROWTH)
        for pair in (cache.blocks, *cache.raw.values()):
            for x in pair:
                x.normal_()
        cache.put_lengths(torch.full((batch,), length - (1 if ends_block else 2)))
        x = torch.randn(batch, 1, sizes.dim, device=device, dtype=dtype)
        return lambda: made(x, cache)

    return make


WHO: dict[str, Make] = {
    "NSA": ours,
    "FlashAttention-2": dense(SDPBackend.FLASH_ATTENTION),
    "cuDNN": dense(SDPBackend.CUDNN_ATTENTION),
    "fla-core NSA": fla,
    "NSA layer": layer(ends_block=False),
    "NSA layer, phi": layer(ends_block=True),
}


# --- how ---


def bytes_read(sizes: Sizes, batch: int, length: int, *, sparse: bool) -> int:
    """What one step must read of the cache, in half precision."""
    tokens = length
    if sparse:
        blocks = min(length, sizes.num_selected * sizes.select_block_size)
        compressed = num_compressed(length, sizes.block_size, sizes.stride)
        tokens = compressed + blocks + min(length, sizes.window)
    return 2 * batch * sizes.groups * tokens * (sizes.width + sizes.value)


def bytes_of_weights(sizes: Sizes, *, with_phi: bool) -> int:
    """What a layer's step must read of its weights, in half precision."""
    with torch.device("meta"):
        made = NSAttention(sizes.layer())
    phi = [] if with_phi else [*made.phi_k.parameters(), *made.phi_v.parameters()]
    return 2 * (sum(w.numel() for w in made.parameters()) - sum(w.numel() for w in phi))


def microseconds(run: Callable[[], object]) -> float:
    """The median time of run() by device events, one after the other; by the clock on a CPU."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - began)
    for _ in range(3):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for first, last in events:
        first.record()
        run()
        last.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(first.elapsed_time(last) for first, last in events)


def one_by_one(calls: list[Call]) -> float:
    """Microseconds of one call where Python makes them all, without waiting in between."""
    if not torch.cuda.is_available():
        return microseconds(calls[0])
    calls = calls * max(1, 100 // len(calls))
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - began) / len(calls))
    return min(times)


def in_a_graph(calls: list[Call]) -> float:
    """Microseconds of one call in a CUDA graph of them all."""
    if not torch.cuda.is_available():
        return microseconds(calls[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return microseconds(graph.replay) / len(calls)


def calls_of(name: str, sizes: Sizes, batch: int, length: int, device: str) -> list[Call]:
    """One call to warm up with, and so many others that no L2 cache holds what they read."""
    if device == "cpu":
        return [WHO[name](sizes, batch, length, device) for _ in range(2)]
    amount = bytes_read(sizes, batch, length, sparse="NSA" in name)
    a_layer = "layer" in name
    copies = max(LAYERS if a_layer else 1, -(-COLD // amount))
    calls = [WHO[name](sizes, batch, length, device) for _ in range(copies + a_layer)]
    # A layer's call changes its cache; the others may be called again.
    return calls if a_layer else [calls[0], *calls * max(1, 2 * LAYERS // copies)]


def measure(name: str, sizes: Sizes, batch: int, length: int, device: str) -> dict[str, float]:
    """Both times of one peer, and the bytes that bound them."""
    amount = bytes_read(sizes, batch, length, sparse="NSA" in name)
    if "layer" in name:
        amount += bytes_of_weights(sizes, with_phi="phi" in name)
    warm_up, *calls = calls_of(name, sizes, batch, length, device)
    warm_up()
    times = {"graph_us": in_a_graph(calls), "eager_us": one_by_one(calls)}
    return times | {"bytes": amount}


def rows(
    config: str, cases: list[tuple[int, int]], names: list[str], device: str
) -> Iterator[dict]:
    """Every measurement; a peer that cannot run gives its reason."""
    for batch, length in cases:
        for name in names:
            if "layer" in name and batch > 1:
                continue
            row = {"config": config, "batch": batch, "length": length, "name": name}
            try:
                yield row | measure(name, CONFIGS[config], batch, length, device)
            except Exception as error:  # a refusal is a result too
                yield row | refusal(error)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


UNITS = ("graph_us", "eager_us", "bytes")
HEADING = f"{'config':>6} {'batch':>6} {'context':>8} {'name':>18}" + "".join(
    f"{u:>13}" for u in UNITS
)


def show(row: dict) -> str:
    """One line of the table that is printed while the measurements come in."""
    place = f"{row['config']:>6} {row['batch']:>6} {row['length']:>8} {row['name']:>18}"
    if "refused" in row:
        return f"{place}   {row['refused']}"
    return place + "".join(f"{row[key]:13.1f}" for key in UNITS)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=__doc__.split("\n")[0]
    )
    p.add_argument("--config", choices=CONFIGS, default="A")
    p.add_argument("--batch", type=int, action="append", help="repeat for several; with --length")
    p.add_argument("--length", type=int, action="append", help="repeat for several")
    p.add_argument("--name", choices=WHO, action="append", help="repeat for several")
    p.add_argument("--out", type=Path, default=RESULTS / "decode.json")
    a = p.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and a.config != "tiny":
        print(NO_DEVICE, file=sys.stderr)
        return 2
    command = what_was_run(arguments, a.out)
    cases = [(batch, length) for batch in a.batch or (1,) for length in a.length or (64,)]
    cases = cases if a.batch or a.length or a.config == "tiny" else list(CASES)
    record = about(command, "benchmarks.decode") | {"rows": []}
    print(HEADING)
    keep_each(rows(a.config, cases, a.name or list(WHO), device), record, a.out, show)
    return 0


if __name__ == "__main__":
    sys.exit(main())
