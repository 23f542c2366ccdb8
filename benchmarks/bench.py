"""Time the kernels beside public peers, in one process on one device; `make bench`.

    python -m benchmarks.bench                       everything: configs A, B and the paper's widths
    python -m benchmarks.bench --config A --length 65536 --ids random

Writes benchmarks/results/bench.json: device, versions, command, and one row a measurement, with
milliseconds (median) forward and backward, and the peak memory of both together in GiB. Whatever is
compared is timed in one process: a run replaces all rows of its configs and lengths, and keeps the
others if device and versions are the same.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import kernels
from benchmarks import peers
from benchmarks.cases import CONFIGS, Sizes, coherent_ids, inputs, random_ids
from benchmarks.records import RESULTS, about, begin, save, what_was_run
from nsa_lite import BRANCHES

LENGTHS = {
    "A": (65536, 8192, 32768, 16384),
    "B": (32768, 8192),
    "paper": (65536, 8192),
    "tiny": (64,),
}
# Which share of their free blocks neighbours keep; the rest of "ids" is random. The first is what
# our small trained models keep (lab/coherence.py).
KEEP = {"coherent .36": 0.36, "coherent .75": 0.75, "coherent .9": 0.9}
IDS = ("random", *KEEP)
OUR_DENSE = "dense, these kernels"
Forward = Callable[[], Tensor]


def ours(x: dict[str, Tensor], sizes: Sizes, ids: Tensor) -> dict[str, Forward]:
    """Our operations one by one, and the whole layer between its projections.

    The whole chooses its blocks from its own scores, as in training, but then reads `ids`: the
    work of the top-n is in, and what the selected branch shares is what we said.
    """
    lse = kernels.compressed_attention(
        x["q"], x["compressed.k"], x["compressed.v"], **sizes.blocks()
    )[1].detach()

    def compressed() -> tuple[Tensor, Tensor]:
        return kernels.compressed_attention(
            x["q"], x["compressed.k"], x["compressed.v"], **sizes.blocks()
        )

    def select(row_lse: Tensor = lse) -> Tensor:
        return kernels.select_blocks(x["q"], x["compressed.k"], row_lse, **sizes.choice())

    def selected() -> Tensor:
        return kernels.selected_attention(
            x["q"], x["selected.k"], x["selected.v"], ids, select_block_size=sizes.select_block_size
        )

    def window() -> Tensor:
        return kernels.window_attention(x["q"], x["window.k"], x["window.v"], window=sizes.window)

    def choose(row_lse: Tensor) -> Tensor:
        select(row_lse)
        return ids

    def whole() -> Tensor:
        pairs = ((x[f"{branch}.k"], x[f"{branch}.v"]) for branch in BRANCHES)
        return kernels.nsa_attention(
            x["q"], *pairs, x["gates"], **sizes.choice(), window_size=sizes.window, choose=choose
        )

    def dense() -> Tensor:
        return kernels.window_attention(x["q"], x["window.k"], x["window.v"])

    return {
        "window": window,
        "compressed": lambda: compressed()[0],
        "scores + top-n": select,
        "selected": selected,
        "NSA": whole,
        OUR_DENSE: dense,
    }


def milliseconds(run: Callable[[], object], clear: list[Tensor]) -> float:
    """The median time of run(), by device events with a cold cache; one run by clock on a CPU."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        once = do_bench(run, warmup=25, rep=25, grad_to_none=clear, return_mode="median")
        return do_bench(
            run, warmup=2 * once, rep=max(200.0, 9 * once), grad_to_none=clear, return_mode="median"
        )
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def measure(forward: Forward, dout: Tensor, leaves: list[Tensor]) -> dict[str, float]:
    """Times and peak memory of one function; no backward where its output takes none."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    out = forward()
    row = {}
    if out.requires_grad:
        # Some peers keep the heads behind the tokens.
        dout = dout if out.shape == dout.shape else dout.transpose(1, 2).contiguous()
        row["backward_ms"] = milliseconds(lambda: out.backward(dout, retain_graph=True), leaves)
    if cuda:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return {"forward_ms": milliseconds(forward, leaves)} | row


def rows(config: str, length: int, kinds: list[str], device: str, slow: bool) -> Iterator[dict]:
    """Every measurement of one config and length; a peer that cannot run gives its reason.

    With `slow`, those of the peers that are slow to start, and no others.
    """
    sizes = CONFIGS[config]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = inputs(sizes, length, device, dtype)
    leaves = [t for t in x.values() if t.requires_grad]
    for i, kind in enumerate(kinds):
        ids = (
            coherent_ids(sizes, length, device, KEEP[kind])
            if kind in KEEP
            else random_ids(sizes, length, device)
        )
        for name, forward in () if slow else ours(x, sizes, ids).items():
            depends = name in ("selected", "NSA")  # on the ids
            if depends or (i == 0 and (name != OUR_DENSE or config in peers.IN_FULL)):
                yield (
                    {"config": config, "length": length, "ids": kind, "name": name}
                    | measure(forward, x["dout"], leaves)
                )
        for name, make in peers.beside(slow, again=i > 0).items():
            row = {"config": config, "length": length, "ids": kind, "name": name}
            try:
                yield row | measure(make(x, sizes, ids), x["dout"], leaves)
            except Exception as error:  # a peer's refusal is a result too
                yield row | refusal(error)


def refusal(error: Exception) -> dict[str, str]:
    """What stands in a row in place of numbers: the first line of an error."""
    return {"refused": f"{type(error).__name__}: {error}".split("\n")[0][:200]}


UNITS = ("forward", "backward", "peak GiB")
HEADING = f"{'config':>6} {'T':>6} {'ids':>12} {'name':>25}" + "".join(f"{u:>10}" for u in UNITS)
NO_DEVICE = (
    "error: no CUDA device: times of interpreted kernels mean nothing. "
    "`--config tiny` tries the script."
)


def show(row: dict) -> str:
    """One line of the table that is printed while the measurements come in."""
    place = f"{row['config']:>6} {row['length']:>6} {row['ids']:>12} {row['name']:>25}"
    if "refused" in row:
        return f"{place}   {row['refused']}"
    numbers = [row.get(k) for k in ("forward_ms", "backward_ms", "peak_gib")]
    return place + "".join(f"{'-':>10}" if n is None else f"{n:10.3f}" for n in numbers)


def keep_each(
    measured: Iterable[dict], record: dict, out: Path, line: Callable[[dict], str] = show
) -> None:
    """Print and save each measurement as it comes in, so that it is kept if a later one fails."""
    for row in measured:
        record["rows"].append(row)
        print(line(row), flush=True)
        save(record, out)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description=__doc__.split("\n")[0]
    )
    p.add_argument("--config", choices=CONFIGS, action="append", help="repeat for several")
    p.add_argument("--length", type=int, action="append", help="repeat for several")
    p.add_argument("--ids", choices=IDS, action="append", help="repeat for several")
    p.add_argument("--out", type=Path, default=RESULTS / "bench.json")
    a = p.parse_args(arguments)
    arguments = what_was_run(arguments, a.out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    configs = a.config or ["A", "B", "paper"]
    if device == "cpu" and configs != ["tiny"]:
        print(NO_DEVICE, file=sys.stderr)
        return 2
    cases = [(config, length) for config in configs for length in a.length or LENGTHS[config]]
    record = begin(a.out, about(arguments, "benchmarks.bench"), set(cases))
    print(HEADING)
    slow_cases = [(config, length) for config, length in cases if config in peers.IN_FULL]
    passes = [(False, case) for case in cases] + [(True, case) for case in slow_cases]
    for slow, (config, length) in passes:
        keep_each(rows(config, length, a.ids or list(IDS), device, slow), record, a.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
