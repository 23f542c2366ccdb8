"""Every kernel compiles for an H100, on a machine without one, and uses it as it is meant to."""

import json
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="triton's disassembler is a program for Linux on x86-64",
)
WITH_PRODUCTS = {
    "flash_forward",
    "flash_dq",
    "flash_dkdv",
    "block_scores",
    "selected_forward",
    "selected_dq",
    "selected_dkdv",
}
# A step has a group's heads for one token, 16 rows: the fast unit wants 64. Its time is loads.
A_STEP = {"compressed_share", "scores_of_blocks", "branch_share", "combine", "copy_rows"}


def run(*words):
    """A Python that compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def said_of(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


def said(*words):
    return json.loads(said_of(run(*words)))


def rows(*options):
    return said("-m", "benchmarks.compiled", "--json", *options)


def shared_memory(**sizes):
    """(kernel, bytes of a program) of each launch, compiled; listing the code takes long."""
    found = "[(row.kernel, row.code.metadata.shared) for row in compile_all(**sizes)]"
    code = f"import json; from benchmarks.compiled import compile_all; sizes = {sizes}; "
    return said("-c", code + f"print(json.dumps({found}))")


@cache
def plain_rows():
    """rows() without options, made once."""
    return rows()


GATED = {
    ("flash_dq", "compressed gated"),
    ("flash_dq", "window gated"),
    ("selected_dq", "gated"),
    ("selected_forward", "gated"),
}


def test_products_run_on_the_fast_unit_and_registers_last():
    table = plain_rows()
    assert {row["kernel"] for row in table} == WITH_PRODUCTS | {
        "top_blocks",
        "list_union",
        "add_chunks",
        "mix",
        "rotate_rows",
        "mix_backward",
        *A_STEP,
    }
    variants = {(row["kernel"], row["variant"]) for row in table}
    assert variants >= GATED
    for row in table:
        assert row["instructions"] > row["HGMMA"] + row["spills"], row
        if row["kernel"] in A_STEP:
            continue
        assert (row["HGMMA"] > 0) == (row["kernel"] in WITH_PRODUCTS), row
        assert row["HMMA"] == 0 and row["shared"] <= 227 * 1024, row
        # dk and dv of a run of keys spill a few and are still the fastest of the tiles timed.
        # rotate_rows stores numbers only where it turns an angle beyond 105,615 into the circle.
        stores = {"flash_dkdv": 16, "rotate_rows": 40}.get(row["kernel"], 0)
        assert row["spills"] <= stores, row
        # As many waits as products: the assembler has put them one behind the other.
        assert row["waits"] < row["HGMMA"] or row["HGMMA"] == 0, row


def test_only_kernels_that_are_named_are_compiled():
    command = "-m", "benchmarks.compiled", "--only"
    table = said_of(run(*command, "add"))
    assert [line.split()[0] for line in table.splitlines()] == ["kernel", "add_chunks"]
    refused = run(*command, "nobody")
    assert refused.returncode == 2 and "no kernel's name begins with 'nobody'" in refused.stderr


def test_a_decoding_step_keeps_its_loads_in_registers_and_on_their_way():
    """Nothing spills; products exist; so little fast memory that two programs share a processor."""
    step = [row for row in plain_rows() if row["kernel"] in A_STEP]
    assert {row["kernel"] for row in step} == A_STEP
    for row in step:
        assert row["spills"] == 0, row
        products = row["HMMA"] + row["HGMMA"]
        assert (products > 0) == (row["kernel"] in ("compressed_share", "branch_share")), row
        assert row["shared"] <= (113 if row["HGMMA"] == 0 else 227) * 1024, row


def test_small_groups_fill_the_fast_unit_too():
    """4 heads a group: 16 tokens share a program, 4 readers a product."""
    selected = rows("--heads", "32", "--groups", "8", "--only", "selected")
    assert {row["kernel"] for row in selected} == {
        "selected_forward",
        "selected_dq",
        "selected_dkdv",
    }
    for row in selected:
        assert row["HMMA"] == 0 < row["waits"] < row["HGMMA"], row
        assert row["spills"] == 0 and row["shared"] <= 113 * 1024, row  # two share a processor


@pytest.mark.parametrize("width, value", [(192, 128), (96, 96)])
def test_widths_in_pieces_are_multiplied_as_well(width, value):
    """No column is padded to a power of two, and no product waits for the one before it.

    The pieces of one sum over columns do: triton ends each before the next begins.
    """
    for row in rows("--width", str(width), "--value", str(value)):
        if row["kernel"] in A_STEP:
            assert row["spills"] == 0, row
            continue
        assert row["HMMA"] == 0 and row["shared"] <= 227 * 1024, row
        # 255 registers are all there are. In the walk itself dk and dv store three a step.
        stores = {"flash_dkdv": 20, "selected_dq": 4, "rotate_rows": 70}.get(row["kernel"], 0)
        assert row["spills"] <= stores, row
        assert row["waits"] < row["HGMMA"] or row["HGMMA"] == 0, row


def test_the_widest_tensors_compile_and_fit():
    found = shared_memory(width=100, value=256)
    assert {kernel for kernel, _ in found} >= WITH_PRODUCTS
    assert all(shared <= 227 * 1024 for _, shared in found), found


@pytest.mark.parametrize("arch, largest", [(80, 163), (89, 99), (120, 99)])
def test_every_kernel_compiles_for_other_devices_and_fits(arch, largest):
    """An A100, an RTX 4090, an RTX 5090: less fast memory for a program than an H100's 227 KiB."""
    combine = rows("--arch", str(arch), "--only", "combine")  # its code is listed there too
    assert combine and all(row["instructions"] > row["spills"] == 0 for row in combine), combine
    found = shared_memory(arch=arch)
    assert {kernel for kernel, _ in found} >= WITH_PRODUCTS
    assert all(shared <= largest * 1024 for _, shared in found), found
