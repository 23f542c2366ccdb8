"""What an H100 would run for each step: compiled without one, and read from the machine code."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks.compiled import (
    Compiled,
    compiled_by,
    import_kernels_to_compile,
    resources,
    said_by,
)
from benchmarks.records import about
from benchmarks.steps import chain

ARCH = 90
LENGTH = 2048  # of the tensors that nobody reads; only their types and widths decide
UNITS = {
    "copy engine": r"UTMALDG",  # a tile by its descriptor
    "copies by threads": r"LDGSTS",  # 16 bytes of a tile by pointers
    "matrix unit": r"HGMMA",
    "waits": r"WARPGROUP\.ARRIVE",
    "exp2": r"MUFU\.EX2",
    "fused multiply-adds": r"FFMA",
    "multiplications": r"FMUL",
    "comparisons": r"[FI]SETP",
    "addresses": r"IMAD|IADD3|LEA|UIADD3|UIMAD",
    "tiles into registers": r"LDSM",
    "spills": r"STL|LDL",
}


class Line(NamedTuple):
    """One instruction of the machine code (SASS): where it lies, and its text."""

    address: int
    text: str


# --- reading machine code ---


def lines_of(sass: str) -> list[Line]:
    """The instructions of one kernel, as cuobjdump prints them; fillers (NOP) are left out."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;?\s*/\*", sass, re.MULTILINE)
    return [Line(int(at, 16), text) for at, text in found if not text.startswith("NOP")]


def step_of_walk(lines: list[Line]) -> list[Line]:
    """The instructions of one step of a kernel's walk: the shortest loop that multiplies.

    A loop ends in a branch to an instruction before it. A walk cut in two gives its first half.
    """
    loops = []
    for line in lines:
        branch = re.search(r"\bBRA (?:`?\(?)(0x[0-9a-f]+)", line.text)
        if branch and (begin := int(branch[1], 16)) < line.address:
            body = [x for x in lines if begin <= x.address <= line.address]
            if any("HGMMA" in x.text for x in body):
                loops.append(body)
    return min(loops, key=len)


def counts(lines: list[Line]) -> dict[str, int]:
    """How many instructions go to each of UNITS."""
    found = Counter()
    for line in lines:
        opcode = re.sub(r"^@\S+\s+", "", line.text).split(" ")[0]
        for unit, pattern in UNITS.items():
            found[unit] += bool(re.match(rf"(?:{pattern})\b", opcode))
    return dict(found)


def from_registers(lines: list[Line]) -> int:
    """How many products read their first operand from registers, not from shared memory."""
    return sum(bool(re.search(r"HGMMA\S* R\d+, R\d+, gdesc", line.text)) for line in lines)


def excerpt(lines: list[Line]) -> list[str]:
    """The first instruction of a step for each of the units that tell most."""
    telling = ("UTMALDG", "LDGSTS", "SYNCS.PHASECHK", "DEPBAR", "HGMMA", "MUFU.EX2", "LDSM")
    found = []
    for opcode in telling:
        found += [line.text for line in lines if opcode in line.text][:1]
    return found


def ptx_excerpt(ptx: str) -> list[str]:
    """The same of PTX, the language above machine code; long lists of registers are cut."""
    telling = (
        "cp.async.bulk.tensor",
        "cp.async.cg",
        "mbarrier.try_wait",
        "wgmma.mma_async",
        "ex2.approx",
    )
    found = []
    for opcode in telling:
        found += [line.strip() for line in ptx.splitlines() if opcode in line][:1]
    return [re.sub(r"(\{[^,}]+,[^,}]+),[^}]*,([^,}]+\})", r"\1, .. \2", line) for line in found]


def row(compiled: Compiled) -> dict:
    """What one compiled kernel takes, and what one step of its walk does."""
    step = step_of_walk(lines_of(said_by("cuobjdump", compiled, "-sass")))
    return resources(compiled) | {
        "step": len(step),
        "units": counts(step),
        "from_registers": from_registers(step),
    }


# --- compiling ---


def walking(found: list[Compiled]) -> Compiled:
    """The launch that multiplies, among those of a step."""
    return next(x for x in found if "wgmma" in x.code.asm["ptx"])


def zeros_case():
    """A case of config A's sizes in bf16, which holds nothing."""
    from benchmarks.cases import CONFIGS
    from benchmarks.steps.case import case_of

    layer = CONFIGS["A"]

    def new(heads: int) -> torch.Tensor:
        return torch.zeros(1, heads, LENGTH, layer.width, dtype=torch.bfloat16)

    ids = torch.zeros(1, layer.groups, LENGTH, layer.num_selected, dtype=torch.int32)
    q = new(layer.heads)
    k = new(layer.groups)
    return case_of(q, k, k.clone(), ids, q.clone(), layer.select_block_size)


def step_rows(x, families: Sequence[str]) -> Iterator[tuple[dict, Compiled]]:
    """A row and the machine code of every step, and of the package's kernel behind each chain."""
    from benchmarks.steps.case import SHIPPED, runner

    for family in families:
        for name in chain.with_shipped(family):
            found = compiled_by(lambda name=name: runner(x, name)())
            found = [c for c in found if c.kernel in (family, *SHIPPED[family])]
            code = walking(found)
            yield {"family": family, "name": name} | row(code), code


def tile_rows(x, kernel: str = "selected_forward") -> Iterator[dict]:
    """The tiles that benchmarks.tune tries for one kernel."""
    from benchmarks.steps.case import runner
    from benchmarks.tune import TRIED, changes
    from kernels.tile_sizes import HALF

    for tile in TRIED[kernel]:
        with mock.patch.dict(HALF, changes(HALF, kernel, tile)):
            found = compiled_by(lambda: runner(x, "forward_shipped")())
            code = walking([c for c in found if c.kernel == kernel])
            chosen = tile == TRIED[kernel][0]
            yield {"rows": tile.BLOCK_M, "asked": tile.stages, "chosen": chosen} | row(code)


def record(arguments: list[str], families: Sequence[str]) -> dict:
    """Everything above as one record; the tiles that were tried belong to the forward."""
    import_kernels_to_compile(ARCH)
    made = about(arguments, "benchmarks.steps") | {"device": "none: compiled for an H100"}
    made |= {"rows": [], "excerpts": {}}
    x = compiling_case()
    for found, code in step_rows(x, families):
        made["rows"].append(found)
        made["excerpts"][found["name"]] = {
            "ptx": ptx_excerpt(code.code.asm["ptx"]),
            "sass": excerpt(step_of_walk(lines_of(said_by("cuobjdump", code, "-sass")))),
        }
    made["tiles"] = list(tile_rows(x)) if "forward" in families else []
    return made


def compiling_case():
    """zeros_case, whose own launches are compiled too and left."""
    cases = []
    compiled_by(lambda: cases.append(zeros_case()))
    return cases[0]
