"""Time one training step of a 1B-parameter stack of layers on one long sequence.

    python -m benchmarks.stack
    python -m benchmarks.stack --config paper                        with the paper's widths
    python -m benchmarks.stack --config tiny --length 64     on a CPU: tries the script

Ten blocks (attention and MLP, about a billion weights) read 65,536 random tokens under
bfloat16 autocast; each block keeps its input only and computes the rest anew in the backward;
AdamW updates. NSA beside dense attention held to cuDNN. Rows hold the step's median milliseconds,
tokens a second and the peak memory in GiB. Writes benchmarks/results/stack.json.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.bench import NO_DEVICE, keep_each, refusal
from benchmarks.cases import CONFIGS
from benchmarks.records import RESULTS, about, begin, what_was_run
from nsa_lite import DenseAttention, NSAttention
from nsa_lite.model import DecoderLM, ModelConfig

LAYERS = 10
VOCABULARY = 256
REPEATS = 3  # behind one step that warms up
ATTENTIONS = {"NSA": NSAttention, "dense, cuDNN": DenseAttention}


def step_of(name: str, config: str, length: int, device: str) -> tuple[Callable[[], None], int]:
    """What does one step of a model with this attention, and how many weights it has."""
    torch.manual_seed(0)
    with torch.device(device):
        model = DecoderLM(
            ModelConfig(VOCABULARY, LAYERS, CONFIGS[config].layer()), ATTENTIONS[name]
        )
        tokens = torch.randint(VOCABULARY, (1, length + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device != "cpu")

    cudnn = "cuDNN" in name and device != "cpu"

    def step() -> None:
        optimizer.zero_grad()
        held = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if cudnn else nullcontext()
        with held, torch.autocast(device, torch.bfloat16):
            logits = model(tokens[:, :-1], recompute=True)
            F.cross_entropy(logits.flatten(0, 1).float(), tokens[0, 1:]).backward()
        optimizer.step()

    return step, sum(p.numel() for p in model.parameters())


def measure(name: str, config: str, length: int, device: str) -> dict[str, float]:
    """One step's milliseconds, tokens a second and peak memory."""
    step, weights = step_of(name, config, length, device)
    times = []
    for repeat in range(1 + REPEATS):
        if repeat == 1 and device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        step()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[1:])
    row = {"weights": weights, "step_ms": 1e3 * seconds, "tokens_a_second": length / seconds}
    return row | (
        {} if device == "cpu" else {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    )


def rows(config: str, length: int, device: str) -> Iterator[dict]:
    """Each attention's row; one that cannot run gives its reason."""
    for name in ATTENTIONS:
        row = {"config": config, "length": length, "layers": LAYERS, "name": name}
        try:
            yield row | measure(name, config, length, device)
        except Exception as error:  # a refusal is a result too
            yield row | refusal(error)
        if device != "cpu":
            torch.cuda.empty_cache()


def show(row: dict) -> str:
    """One line of what is printed."""
    if "refused" in row:
        return f"{row['name']}: {row['refused']}"
    memory = f", {row['peak_gib']:.1f} GiB" if "peak_gib" in row else ""
    speed = f"{row['step_ms']:.0f} ms, {row['tokens_a_second']:.0f} tokens a second"
    return f"{row['name']}, {row['weights'] / 1e9:.2f} billion weights: {speed}{memory}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.stack", description=__doc__.split("\n")[0]
    )
    p.add_argument("--config", choices=CONFIGS, default="A")
    p.add_argument("--length", type=int, default=65_536)
    p.add_argument("--out", type=Path, default=RESULTS / "stack.json")
    a = p.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and a.config != "tiny":
        print(NO_DEVICE, file=sys.stderr)
        return 2
    command = what_was_run(arguments, a.out)
    now = about(command, "benchmarks.stack")
    record = begin(a.out, now, {(a.config, a.length)})
    keep_each(rows(a.config, a.length, device), record, a.out, show)
    return 0


if __name__ == "__main__":
    sys.exit(main())
