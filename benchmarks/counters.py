"""What the hardware counted while one kernel ran: NVIDIA's Nsight Compute (ncu), kept as text.

    python -m benchmarks.counters                         on a GPU with ncu -> results/counters.json
    python -m benchmarks.counters forward_1_pointers forward_shipped

The third launch of each step at 64k tokens (benchmarks.steps), random blocks. Where ncu is not
installed, or may not read the counters, it says so and records nothing.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.records import RESULTS, about, save, what_was_run
from benchmarks.steps import chain

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy")
SHOWN = ("forward_1_pointers", "forward_5_stages", "forward_shipped")
KERNELS = {"forward": "selected_forward", "dq": "selected_dq", "dkdv": "selected_dkdv"}


def command(name: str) -> list[str]:
    """What looks at the third launch of a step."""
    family = chain.family_of(name)
    kernel = KERNELS[family] if name.endswith("_shipped") else family
    sections = [word for section in SECTIONS for word in ("--section", section)]
    # The case itself launches the package's kernels: the forward twice where they are looked at.
    skipped = ["--launch-skip", "2", "--launch-count", "1"]
    step = [sys.executable, "-m", "benchmarks.steps", "--once", name]
    return ["ncu", "--kernel-name", f"regex:^{kernel}$", *skipped, *sections, *step]


def told(text: str) -> list[str]:
    """The lines of ncu's report, without what the program and ncu say on the way."""
    lines = [line.rstrip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("==")]


def refused(text: str) -> str | None:
    """Why ncu read no counter, in its own words; None if it did."""
    found = re.search(r"^==(?:ERROR|WARNING)== (.*(?:ERR_NVGPUCTRPERM|No kernels).*)$", text, re.M)
    return found[1] if found else None


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"({' '.join(SHOWN)})")
    parser.add_argument("--out", type=Path, default=RESULTS / "counters.json")
    args = parser.parse_args(arguments)
    if shutil.which("ncu") is None:
        print("Nsight Compute (ncu) is not installed here: nothing is recorded", file=sys.stderr)
        return 3
    words = what_was_run(arguments, args.out)
    record = about(words, "benchmarks.counters") | {"reports": {}}
    for name in args.steps or SHOWN:
        done = subprocess.run(command(name), capture_output=True, text=True)
        why = refused(done.stdout + done.stderr)
        if why or done.returncode:
            print(f"ncu: {why or done.stderr[-300:]}: nothing is recorded", file=sys.stderr)
            return 3
        record["reports"][name] = told(done.stdout)
        print("\n".join(record["reports"][name]), flush=True)
        save(record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
