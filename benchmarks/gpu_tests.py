"""Run the kernels' tests compiled, then small shapes under compute-sanitizer; `make test-gpu`.

Writes benchmarks/results/tests.json: device, versions, command, counts, and each tool's verdict.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.bench import RESULTS, about

TOOLS = ("memcheck", "racecheck")
PROCESSES = 12  # of tests at a time: they wait for the compiler, not for the GPU


def small_shapes() -> None:
    """Every kernel once, forward and backward, on ragged sizes: what compute-sanitizer watches."""
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
    torch.cuda.synchronize()


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


def run_tests() -> tuple[bool, list[str]]:
    """Whether all tests passed, and what pytest prints about them.

    In several processes, since most time goes to compiling. The tests of real lengths stay
    together: side by side they would not fit into one GPU.
    """
    names = kernel_tests()
    large = [name for name in names if "test_gpu.py" in name]
    small = [name for name in names if name not in large]
    with ThreadPoolExecutor(PROCESSES + 1) as processes:
        parts = [large, *(small[i::PROCESSES] for i in range(PROCESSES))]
        done = list(processes.map(run_some, parts))
    # A process that crashed has no last line to count: its status tells.
    passed = all(status == 0 for status, _ in done)
    return passed, [line for _, lines in done for line in lines]


def counted(lines: list[str]) -> dict[str, int]:
    """How many tests passed, failed and so on, in all of pytest's last lines together."""
    counts: dict[str, int] = {}
    for line in lines:
        if re.search(r" in \d+\.\d+s", line):
            for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", line):
                counts[word] = counts.get(word, 0) + int(count)
    return counts


def main() -> int:
    """Both kinds of test; returns the exit status."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_tests",
        description="Run the kernels' tests compiled, then small shapes under compute-sanitizer.",
    ).parse_args()
    if not torch.cuda.is_available():
        print(
            "error: no CUDA device here. On a CPU `make test` runs these kernels interpreted.",
            file=sys.stderr,
        )
        return 2
    with ThreadPoolExecutor() as beside:  # the sanitizer is slow and needs few of the GPU's units
        verdicts = beside.map(sanitize, TOOLS)
        passed, lines = run_tests()
        verdicts = dict(zip(TOOLS, verdicts, strict=True))
    record = about([], "benchmarks.gpu_tests") | {
        "pytest": counted(lines),
        "failed": [line.split()[1] for line in lines if line.startswith("FAILED ")],
        "compute-sanitizer": verdicts,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "tests.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    quiet = all(re.search(r"\b0 (errors|hazards)", line) for line in verdicts.values())
    return 0 if passed and quiet else 1


if __name__ == "__main__":
    sys.exit(main())
