"""Compile every kernel for an H100 on a machine that has none, and print what each one takes.

    python -m benchmarks.compiled            a table: warps, registers, spills, shared memory, units
    python -m benchmarks.compiled --json     the same as data

The wrappers run with a driver that only names its target: each launch is compiled, none is
started. `shared` is in bytes a program, `registers` are a thread's. `spills` counts the stores of
registers that did not fit (STL): many are slow, a few may not be. HGMMA counts the instructions of
the fast matrix unit, HMMA those of the slow one, `waits` the groups that HGMMAs come in. As many
groups as HGMMAs: the assembler, mostly for want of registers, lets each one end before the next
begins. dk and dv took a quarter longer so.
"""

import argparse
import json
import re
import subprocess
import tempfile

import torch

COLUMNS = ("kernel", "warps", "stages", "shared", "registers", "spills", "HGMMA", "HMMA", "waits")


class TargetOnly:
    """What Triton asks a driver for before it compiles."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def record_launches() -> list:
    """From now on launches compile and are listed as (name, compiled kernel)."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launches, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup=False, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        launches.append((self.__name__, compiled))
        return compiled

    driver.set_active(TargetOnly())
    JITFunction.run = compile_only
    return launches


def resources(name: str, compiled) -> dict[str, int | str]:
    """What one compiled kernel takes, read from its machine code."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([knobs.nvidia.cuobjdump.path, option, file.name],
                           capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    count = {unit: len(re.findall(rf"\b{unit}\b", code))
             for unit in ("STL", "HGMMA", "HMMA", "WARPGROUP.ARRIVE")}
    return dict(
        kernel=name, warps=compiled.metadata.num_warps, stages=compiled.metadata.num_stages,
        shared=compiled.metadata.shared, registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=count["STL"], HGMMA=count["HGMMA"], HMMA=count["HMMA"],
        waits=count["WARPGROUP.ARRIVE"],
    )


def run_all(heads: int, groups: int, width: int, value: int, dtype: torch.dtype) -> None:
    """One forward and backward of every operation, at the paper's block sizes."""
    import kernels

    def new(*shape):
        return torch.zeros(*shape, dtype=dtype, requires_grad=True)

    length, short = 2048, 127
    q = new(1, heads, length, width)
    k, v = new(1, groups, length, width), new(1, groups, length, value)
    k_short, v_short = new(1, groups, short, width), new(1, groups, short, value)
    blocks = dict(block_size=32, stride=16)
    window = kernels.window_attention(q, k, v, window=512)
    compressed, lse = kernels.compressed_attention(q, k_short, v_short, **blocks)
    ids = kernels.select_blocks(q, k_short, lse.detach(), **blocks, select_block_size=64,
                                num_selected=16)
    selected = kernels.selected_attention(q, k, v, ids, select_block_size=64)
    gates = new(1, heads, length, 3)
    kernels.gated_sum(gates, (compressed, selected, window)).sum().backward()
    whole = kernels.nsa_attention(
        q, (k_short, v_short), (k, v), (k, v), gates, **blocks, select_block_size=64,
        num_selected=16, window_size=512)
    whole.sum().backward()


def table(heads=64, groups=4, width=128, value=128, dtype=torch.bfloat16) -> list[dict]:
    """Every kernel's resources at these sizes. Call once a process, before kernels is imported."""
    torch.cuda.is_available = lambda: True  # so that the kernels are not interpreted
    launches = record_launches()
    import kernels.attention
    import kernels.select
    import kernels.whole

    for module in (kernels.attention, kernels.select, kernels.whole):
        module.check_inputs = lambda *tensors: None  # they lie on the CPU here
    run_all(heads, groups, width, value, dtype)
    different = {compiled.hash: (name, compiled) for name, compiled in launches}
    return [resources(*pair) for pair in different.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--value", type=int, default=128)
    args = parser.parse_args()
    rows = table(width=args.width, value=args.value)
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(" ".join(f"{c:>16}" if c == "kernel" else f"{c:>9}" for c in COLUMNS))
    for row in rows:
        print(" ".join(f"{row[c]:>16}" if c == "kernel" else f"{row[c]:>9}" for c in COLUMNS))


if __name__ == "__main__":
    main()
