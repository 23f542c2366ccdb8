"""What holds for the package as a whole, so that a reader finds her way in it."""

import dataclasses
import inspect
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import kernels
from kernels import tile_sizes

FOLDER = Path(kernels.__file__).parent
MODULES = [import_module(f"kernels.{path.stem}") for path in sorted(FOLDER.glob("[!_]*.py"))]
LAUNCHED = {
    "add_chunks",
    "block_scores",
    "branch_share",
    "combine",
    "compressed_share",
    "copy_rows",
    "flash_dkdv",
    "flash_dq",
    "flash_forward",
    "list_union",
    "rotate_rows",
    "scores_of_blocks",
    "mix",
    "mix_backward",
    "selected_dkdv",
    "selected_dq",
    "selected_forward",
    "top_blocks",
}
MOST = 14  # parameters of a kernel, compile-time ones included


def name_of(module):
    return module.__name__.removeprefix("kernels.")


def jitted():
    """Every function under @triton.jit by its name, interpreted or to be compiled."""
    return {
        name: function.fn
        for module in MODULES
        for name, function in vars(module).items()
        if hasattr(function, "fn") and function.fn.__module__ == module.__name__
    }


def launches():
    """The names that are handed to `launch`, read from the source."""
    for module in MODULES:
        for call in inspect.getsource(module).split(" launch(\n")[1:]:
            yield call.split(",")[0].strip()


def test_the_list_of_launched_kernels_is_complete():
    assert set(launches()) == LAUNCHED <= set(jitted())


@pytest.mark.parametrize("name", sorted(LAUNCHED))
def test_a_kernel_takes_few_parameters_and_says_what_it_does(name):
    kernel = jitted()[name]
    assert len(inspect.signature(kernel).parameters) <= MOST
    assert "ile" in (kernel.__doc__ or ""), "the docstring gives the shapes of its tiles"


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_a_module_is_no_namesake_of_a_function_or_of_a_standard_module(module):
    assert name_of(module) not in {*kernels.__all__, *sys.stdlib_module_names}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_the_kernels_import_nothing_of_the_reference(path):
    assert "import nsa_lite" not in path.read_text("utf-8")
    assert "from nsa_lite" not in path.read_text("utf-8")


def test_tile_sizes_are_frozen_and_complete():
    for table in (tile_sizes.HALF, tile_sizes.WIDE, tile_sizes.WIDEST, tile_sizes.FLOAT32):
        assert set(table) == set(tile_sizes.HALF)
        for tile in table.values():
            with pytest.raises(dataclasses.FrozenInstanceError):
                tile.stages = 1


def test_fewer_rows_take_fewer_warps():
    tile = tile_sizes.TileSizes(128, 64, warps=8, stages=3, hold=True)
    assert tile.with_rows(64) == tile_sizes.TileSizes(64, 64, warps=4, stages=3, hold=True)
    assert tile.with_rows(32).warps == 4
    assert tile.with_rows(64).with_rows(128) == tile


def test_stages_are_lowered_to_what_fits():
    tile = tile_sizes.TileSizes(64, 64, warps=8, stages=3)
    assert tile_sizes.fit_stages(tile, kept=100, step=50, shared=200).stages == 2
    assert tile_sizes.fit_stages(tile, kept=100, step=50, shared=1000) == tile
    with pytest.raises(ValueError, match="tiles of 150 B do not fit into 149 B"):
        tile_sizes.fit_stages(tile, kept=100, step=50, shared=149)
    held = tile_sizes.TileSizes(64, 64, warps=8, stages=3, hold=True)
    assert tile_sizes.fit_stages(held, kept=100, step=50, shared=149).stages == 2
    two_a_multiprocessor = tile_sizes.TileSizes(64, 64, warps=4, stages=3)
    assert tile_sizes.fit_stages(two_a_multiprocessor, kept=0, step=50, shared=200).stages == 2


def test_columns_of_a_tile():
    """A power of two, or three quarters of one in three pieces, of 32 columns at least."""
    pieces = {5: 16, 40: 64, 48: 64, 64: 64, 65: 32, 96: 32, 97: 128, 128: 128, 160: 64, 192: 64}
    assert {width: tile_sizes.piece_width(width) for width in pieces} == pieces
    for width in range(33, 513):
        columns = tile_sizes.columns(width)
        assert width <= columns <= 2 * width
        assert columns // tile_sizes.piece_width(width) in (1, 3)


def test_tiles_follow_from_the_columns():
    def table(width):
        return tile_sizes.tile_sizes("flash_dkdv", width, torch.bfloat16)

    assert table(128) is tile_sizes.HALF["flash_dkdv"]
    assert table(129) is table(192) is tile_sizes.WIDE["flash_dkdv"]
    assert table(193) is table(256) is tile_sizes.WIDEST["flash_dkdv"]
    widths = {(128, 128): 128, (192, 128): 192, (192, 192): 256, (96, 160): 160, (16, 256): 256}
    assert {pair: tile_sizes.widest(*pair) for pair in widths} == widths


def test_a_row_of_192_columns_takes_192_in_shared_memory():
    widths = tile_sizes.Widths(R=16, D=192, DV=128, BLOCK_D=64, BLOCK_DV=128)
    tile = tile_sizes.TileSizes(128, 128, warps=8, stages=9)
    # 225 KiB hold q, 128 rows of 192 in 2 bytes, and two steps of 128 keys and values.
    kept = 128 * 192 * 2
    step = 128 * (192 + 128) * 2
    assert kept + 2 * step <= tile_sizes.SHARED < kept + 3 * step
    assert tile_sizes.fit(tile, "flash_forward", widths, 2, tile_sizes.SHARED).stages == 2


def test_a_small_device_gets_fewer_rows_and_keys():
    """As consumer GPUs are, which have 99 KiB a program; keys are halved first."""
    widths = tile_sizes.Widths(R=16, D=128, DV=128, BLOCK_D=128, BLOCK_DV=128)
    tile = tile_sizes.TileSizes(128, 128, warps=8, stages=3)
    fitted = tile_sizes.fit(tile, "flash_forward", widths, 2, 97 * 1024)
    # q of 128 rows takes 32 KiB, a step of 128 keys and values 64.
    assert (fitted.BLOCK_M, fitted.BLOCK_N, fitted.stages) == (128, 128, 1)
    fitted = tile_sizes.fit(tile, "flash_forward", widths, 2, 90 * 1024)
    assert (fitted.BLOCK_M, fitted.BLOCK_N, fitted.stages) == (128, 64, 1)
    with pytest.raises(ValueError, match="take smaller blocks or half precision"):
        tile_sizes.fit(tile, "selected_forward", widths, 2, 90 * 1024)  # its blocks are as they are
