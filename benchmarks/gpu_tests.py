"""Run the kernels' tests compiled, then small shapes under compute-sanitizer; `make test-gpu`.

    python -m benchmarks.gpu_tests                   all of it
    python -m benchmarks.gpu_tests --only small      the parts one by one, where time is short:
                                                     real lengths, small shapes, the sanitizer

Writes benchmarks/results/tests.json: device, versions, command, the code that was tested, and each
part's outcome. A part that ran earlier stays, if device, versions and code are the same.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.records import RESULTS, about, earlier, save

ROOT = Path(__file__).parents[1]
TESTED = ("kernels", "nsa_lite", "tests/kernels", "benchmarks/cases.py", "benchmarks/gpu_tests.py")
PARTS = ("real", "small", "sanitizer")
TOOLS = ("memcheck", "racecheck")
PROCESSES = 12  # of tests at a time: they wait for the compiler, not for the GPU


def small_shapes() -> None:
    """Every kernel, forward and backward, on ragged sizes: what compute-sanitizer watches."""
    import kernels

    for dtype in (torch.bfloat16, torch.float32):
        make = torch.Generator("cuda").manual_seed(0)

        def new(*shape, make=make, dtype=dtype):
            return torch.randn(shape, generator=make, device="cuda", dtype=dtype).requires_grad_()

        q = new(2, 6, 203, 40)
        k = new(2, 2, 203, 40)
        v = new(2, 2, 203, 24)
        k_short = new(2, 2, 24, 40)
        v_short = new(2, 2, 24, 24)
        blocks = dict(block_size=16, stride=8)
        out, lse = kernels.compressed_attention(q, k_short, v_short, **blocks)
        ids = kernels.select_blocks(
            q, k_short, lse.detach(), **blocks, select_block_size=16, num_selected=5
        )
        selected = kernels.selected_attention(q, k, v, ids, select_block_size=16)
        window = kernels.window_attention(q, k, v, window=33)
        kernels.gated_sum(new(2, 6, 203, 3), (out, selected, window)).sum().backward()
        kernels.nsa_attention(
            q,
            (k_short, v_short),
            (k, v),
            (k, v),
            new(2, 6, 203, 3).sigmoid(),
            **blocks,
            select_block_size=16,
            num_selected=5,
            window_size=33,
        ).sum().backward()
        small_steps(new)
    torch.cuda.synchronize()


def small_steps(new: Callable[..., torch.Tensor]) -> None:
    """The kernels of decoding: rotary encoding, new rows of a cache, 1 and 8 new tokens."""
    import kernels

    blocks = tuple(new(2, 2, 24, width).detach() for width in (40, 24))
    cached = tuple(new(2, 2, 203, width).detach() for width in (40, 24))
    lengths = torch.tensor([203, 61], device="cuda")
    cache = SimpleNamespace(
        blocks=blocks, raw={"selected": cached, "window": cached}, lengths=lengths
    )
    for tokens in (1, 8):
        places = lengths[:, None] - tokens + torch.arange(tokens, device="cuda")
        kernels.write_rows(cached, [x[:, :, :tokens].clone() for x in cached], places)
        kernels.decode_step(
            kernels.rotate(new(2, 6, tokens, 40).detach(), places),
            cache,
            new(2, 6, tokens, 3).detach().sigmoid(),
            block_size=16,
            stride=8,
            select_block_size=16,
            num_selected=5,
            window_size=33,
        )


def sanitize(tool: str) -> str:
    """The last line of compute-sanitizer's report, or why there is none."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not shutil.which(program):
        return "compute-sanitizer is not installed"
    code = "from benchmarks.gpu_tests import small_shapes; small_shapes()"
    done = subprocess.run(
        [program, "--tool", tool, sys.executable, "-c", code], capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
    verdict = lines[-1].strip("= ") if lines else f"no summary, exit status {done.returncode}"
    print(f"{tool}: {verdict}", flush=True)
    return verdict


def kernel_tests() -> list[str]:
    """The names of the kernels' tests, as pytest takes them.

    Without those of the machine code: they need no device, and `make test` runs them.
    """
    words = ["--collect-only", "-q", "--ignore=tests/kernels/test_compiled.py", "tests/kernels"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], capture_output=True, text=True, check=True
    )
    return [line for line in done.stdout.splitlines() if "::" in line]


def run_some(names: list[str]) -> tuple[int, list[str]]:
    """The exit status of pytest on some tests, and what it prints; shown when they are done."""
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--durations=3", *names]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    return done.returncode, done.stdout.splitlines()


def run_tests(names: list[str], processes: int) -> dict:
    """What pytest says of these tests, in so many processes: most of the time goes to compiling."""
    shares = [names[i::processes] for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        done = list(pool.map(run_some, filter(None, shares)))  # of no names pytest would run all
    lines = [line for _, printed in done for line in printed]
    return {
        "pytest": counted(lines),
        "failed": [line.split()[1] for line in lines if line.startswith("FAILED ")],
        # A process that crashed has no last line to count: its status tells.
        "passed": all(status == 0 for status, _ in done),
    }


def counted(lines: list[str]) -> dict[str, int]:
    """How many tests passed, failed and so on, in all of pytest's last lines together."""
    counts: dict[str, int] = {}
    for line in lines:
        if re.search(r" in \d+\.\d+s", line):
            for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", line):
                counts[word] = counts.get(word, 0) + int(count)
    return counts


def sanitizer() -> dict:
    """Both tools' verdicts."""
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        verdicts = dict(zip(TOOLS, pool.map(sanitize, TOOLS), strict=True))
    clean = all(re.search(r"\b0 (errors|hazards)", verdict) for verdict in verdicts.values())
    return verdicts | {"passed": clean}


def run_parts(parts: list[str]) -> dict[str, dict]:
    """Each part's outcome. They run beside each other, since they leave most of the GPU free.

    The tests of real lengths have one process: side by side they would not fit into one GPU.
    """
    names = kernel_tests()
    real = [name for name in names if "test_gpu.py" in name]
    small = [name for name in names if name not in real]
    with ThreadPoolExecutor(len(PARTS)) as pool:
        started: dict[str, Future] = {}
        if "real" in parts:
            started["real"] = pool.submit(run_tests, real, 1)
        if "small" in parts:
            started["small"] = pool.submit(run_tests, small, PROCESSES)
        if "sanitizer" in parts:
            started["sanitizer"] = pool.submit(sanitizer)
    return {part: future.result() for part, future in started.items()}


def code_tested() -> str:
    """A short number that changes with any file that a test may run: what a record is about."""
    found = hashlib.sha256()
    for place in TESTED:
        path = ROOT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(str(file.relative_to(ROOT)).encode())
            found.update(file.read_bytes())
    return found.hexdigest()[:12]


def record_of(now: dict, before: dict | None, outcomes: dict[str, dict]) -> dict:
    """What these parts gave, beside the parts that ran earlier on the same device and code."""
    if before is None:
        return now | {"parts": outcomes}
    others = {part: known for part, known in before["parts"].items() if part not in outcomes}
    command = f"{before['command']}; {now['command']}" if others else now["command"]
    return now | {"command": command, "parts": others | outcomes}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_tests", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="repeat for two of three")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "error: no CUDA device here. On a CPU `make test` runs these kernels interpreted.",
            file=sys.stderr,
        )
        return 2
    now = about(arguments, "benchmarks.gpu_tests") | {"code": code_tested()}
    before = earlier(RESULTS / "tests.json", now, same=("device", "versions", "code"))
    outcomes = run_parts(args.only or list(PARTS))
    record = record_of(now, before, outcomes)
    save(record, RESULTS / "tests.json")
    print(json.dumps(record, indent=1))
    return 0 if all(outcome["passed"] for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
