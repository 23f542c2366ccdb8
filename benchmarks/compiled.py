"""Compile every kernel for an H100 on a machine that has none, and print what each one takes.

    python -m benchmarks.compiled                a table: registers, spills, shared memory, units ..
    python -m benchmarks.compiled --json         the same as data
    python -m benchmarks.compiled --arch 80      for an A100
    python -m benchmarks.compiled --only flash   of some kernels

Each launch is compiled, none is started. `shared` is in bytes a program, `registers` are a
thread's. `spills` counts the stores of registers that did not fit (STL): many are slow, a few may
not be. HGMMA counts the instructions of the fast matrix unit, HMMA those of the slow one, `waits`
the groups that HGMMAs come in. As many groups as HGMMAs: the assembler, mostly for want of
registers, lets each one end before the next begins. dk and dv took a quarter longer so.
`instructions` are all of the program's, in machine code.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch

from nsa_lite.show import tables
from nsa_lite.show.tables import Column

COLUMNS = (
    Column("kernel", 16),
    Column("variant", 17),
    Column("warps", 6),
    Column("stages", 7),
    Column("shared", 7),
    Column("registers", 10),
    Column("spills", 7),
    Column("HGMMA", 6),
    Column("HMMA", 5),
    Column("waits", 6),
    Column("instructions", 13),
)


SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # a program's at most


class Target:
    """What Triton asks a driver for before it compiles: an architecture, 90 for an H100."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device=None):
        return 0


class Compiled(NamedTuple):
    """One launch: the kernel's name, which of its variants, and the machine code."""

    kernel: str
    variant: str
    code: object  # triton's CompiledKernel


def import_kernels_to_compile(arch: int):
    """The package kernels, made for a device of this architecture instead of the interpreter.

    Call it before anything else has imported kernels or triton.
    """
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        import kernels
    from triton.runtime.driver import driver

    driver.set_active(Target(arch))
    return kernels


def variant(arguments: tuple, options: dict) -> str:
    """What tells a launch of a kernel from others of it."""
    from kernels.block_sparse_attention import Mix
    from kernels.online_softmax import Gates

    words = []
    if "KEYS" in options:
        words.append("compressed" if options["KEYS"].window is None else "window")
    if any(isinstance(argument, Gates | Mix) for argument in arguments):
        words.append("gated")
    if "WIDTH" in options:
        words.append(f"{options['WIDTH']} wide")
    return " ".join(words)


def said_by(program: str, compiled: Compiled, *options: str) -> str:
    """What one of NVIDIA's programs that come with Triton says of the machine code."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.code.asm["cubin"])
        file.flush()
        command = [getattr(knobs.nvidia, program).path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(compiled: Compiled) -> dict[str, int | str]:
    """What one compiled kernel takes, read from its machine code."""
    usage = said_by("cuobjdump", compiled, "-res-usage")
    # cuobjdump lists the code too, in twice the time: with its bytes, and where jumps go to.
    code = said_by("nvdisasm", compiled, "--print-code", "--no-dataflow")

    def count(unit: str) -> int:
        return len(re.findall(rf"\b{unit}\b", code))

    metadata = compiled.code.metadata
    return {
        "kernel": compiled.kernel,
        "variant": compiled.variant,
        "warps": metadata.num_warps,
        "stages": metadata.num_stages,
        "shared": metadata.shared,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": count("STL"),
        "HGMMA": count("HGMMA"),
        "HMMA": count("HMMA"),
        "waits": count("WARPGROUP.ARRIVE"),
        # A line /*address*/ INSTRUCTION; the code is filled up with NOPs to a round length.
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!\s|NOP)", code, re.MULTILINE)),
    }


def run_all(heads: int, groups: int, width: int, value: int, dtype: torch.dtype) -> None:
    """One forward and backward of every operation, at the paper's block sizes.

    Through torch's operations behind the public ones, which would not let CPU tensors in.
    """
    from kernels.block_sparse_attention import attend_to_blocks
    from kernels.cache_rows import launch_copy
    from kernels.decode import attend_to_cache
    from kernels.flash_attention import attend_to_keys
    from kernels.gates import add_gated
    from kernels.importance import choose_blocks
    from kernels.nsa import Plan, attend_to_branches
    from kernels.rope import turn

    def new(*shape):
        return torch.zeros(*shape, dtype=dtype, requires_grad=True)

    length = 2048
    short = 127
    scale = width**-0.5
    q = turn(new(1, heads, length, width), torch.arange(length), 10_000.0, 1)
    k = new(1, groups, length, width)
    v = new(1, groups, length, value)
    k_short = new(1, groups, short, width)
    v_short = new(1, groups, short, value)
    gates = new(1, heads, length, 3)
    blocks = 32, 16
    choice = 64, 16, 1, 2  # l', n, initial and local blocks

    window, _ = attend_to_keys(q, k, v, 1, 1, 512, scale, 0)
    compressed, lse = attend_to_keys(q, k_short, v_short, *blocks, None, scale, 0)
    lse = lse.detach()
    ids = choose_blocks(q.detach(), k_short.detach(), lse, *blocks, *choice, scale, 0)
    selected, *_ = attend_to_blocks(q, k, v, ids, 64, scale, 0)
    add_gated(gates, compressed, selected, window).sum().backward()
    pairs = [k_short, v_short, k, v, k, v]
    plan = Plan(*blocks, select_block_size=64, window_size=512, start=0)
    outputs = [compressed.detach(), lse]
    attend_to_branches(q.detach(), gates, pairs, outputs, ids, plan, scale)[0].sum().backward()

    with torch.no_grad():
        lengths = torch.full((1, groups), length)
        for tokens in (1, 8):
            newest = q[:, :, :tokens], gates[:, :, :tokens]
            attend_to_cache(*newest, pairs, lengths, [*blocks, 512, *choice], scale)
            launch_copy(k, v, k[:, :, :tokens], v[:, :, :tokens], torch.zeros(1, tokens).long())


def compiled_by(run: Callable[[], object], only: str = "") -> list[Compiled]:
    """Every launch of run(), of kernels whose names begin with `only`, compiled and not started."""
    from kernels.launching import launching_by

    launches = []

    def compile_only(kernel, grid, arguments, options):
        if not kernel.__name__.startswith(only):
            return
        code = kernel.warmup(*arguments, grid=grid, **options)
        launches.append(Compiled(kernel.__name__, variant(arguments, options), code))

    with launching_by(compile_only):
        run()
    return launches


def compile_all(  # noqa: PLR0913  what the command line may say
    arch=90, heads=64, groups=4, width=128, value=128, dtype=torch.bfloat16, only=""
):
    """Launches of run_all, compiled. Call once a process, before kernels is imported."""
    import_kernels_to_compile(arch)
    from kernels import tile_sizes

    shared = SHARED_KIB[arch] * 1024 - tile_sizes.BESIDE
    with mock.patch.object(tile_sizes, "SHARED", shared):
        return compiled_by(lambda: run_all(heads, groups, width, value, dtype), only)


def table(**sizes) -> list[dict]:
    """Every kernel's resources at these sizes: those of compile_all, each machine code once."""
    different = {}
    for compiled in compile_all(**sizes):
        different.setdefault(compiled.code.hash, compiled)
    return [resources(compiled) for compiled in different.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--heads", type=int, default=64, help="of queries (64)")
    parser.add_argument("--groups", type=int, default=4, help="of heads that share keys (4)")
    parser.add_argument("--width", type=int, default=128, help="of queries and keys (128)")
    parser.add_argument("--value", type=int, default=128, help="of values (128)")
    parser.add_argument(
        "--only", default="", help="kernels whose names begin with it, as in --only selected (all)"
    )
    parser.add_argument(
        "--arch", type=int, default=90, choices=SHARED_KIB, help="compute capability x 10 (90)"
    )
    args = parser.parse_args()
    rows = table(
        arch=args.arch,
        heads=args.heads,
        groups=args.groups,
        width=args.width,
        value=args.value,
        only=args.only,
    )
    if not rows:
        parser.error(f"argument --only: no kernel's name begins with {args.only!r}")
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(tables.table(COLUMNS, ([row[c.heading] for c in COLUMNS] for row in rows)))


if __name__ == "__main__":
    main()
