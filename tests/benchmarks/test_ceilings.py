"""The ceilings' kernels read what they say, and a rate is an amount divided by a time."""

import json
from functools import reduce
from operator import xor

import pytest
import torch

from benchmarks import ceilings, roofline, walks
from benchmarks.ceilings import MIB, TILE, TINY

ON_A_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("walk", [walks.walk_pointers, walks.walk_boxes])
@pytest.mark.parametrize(("count", "programs", "steps"), [(4, 2, 3), (3, 4, 5), (1, 2, 2)])
@pytest.mark.parametrize("apart", [False, True])
def test_a_program_reads_the_tiles_that_follow_its_first(walk, count, programs, steps, apart):
    """The exclusive or tells: with an odd number of reads each, no other set of tiles has it."""
    make = torch.Generator().manual_seed(0)
    numbers = walks.ROWS * walks.WIDTH
    x = torch.randint(2**31, (count, numbers), generator=make, dtype=torch.int32).to(DEVICE)
    found = walk(x, walks.Walk(programs, steps, warps=4, stages=2, apart=apart))
    for program in range(programs):
        first = program * count // programs
        leap = 2 * program + 1 if apart else 1
        read = [x[(first + step * leap) % count] for step in range(steps)]
        assert torch.equal(found[program], reduce(xor, read))


def test_a_tile_is_as_large_as_the_attention_kernels_keys():
    assert walks.TILE == 64 * 128 * torch.bfloat16.itemsize


def test_exp2_again_and_again():
    expected = 0.0
    for _ in range(5):
        expected = 2.0**-expected
    found = walks.exp2_again(2, 128, 5, DEVICE)
    assert found.shape == (2, 128)
    assert found.cpu().numpy() == pytest.approx(expected, rel=1e-5)


def test_a_rate_is_an_amount_a_second(monkeypatch):
    """As if every run took a second."""
    runs = []

    def a_second(run, clear):
        runs.append(run())
        return 1000.0

    monkeypatch.setattr(ceilings, "milliseconds", a_second)
    found = {
        (row["what"], row["how"].split(",")[0]): row for row in ceilings.all_rows(TINY, DEVICE)
    }
    assert {key: row["rate"] for key, row in found.items()} == {
        ("copy", "1 MiB"): 2 * MIB,  # read and written
        ("matmul", "32 x 32 x 32"): 2 * 32**3,
        ("L2 reads", "pointers"): 24 * TILE,
        ("L2 reads", "descriptors"): 24 * TILE,
        ("exp2", "float32"): 2**15,
    }
    assert len(runs) == 3 + 4 * len(ceilings.WAYS)  # two walks, each in turn and apart


def test_the_fastest_way_counts(monkeypatch):
    times = iter([4.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(ceilings, "milliseconds", lambda run, clear: next(times))
    monkeypatch.setattr(ceilings, "WAYS", [ceilings.Way(n, 4, 1) for n in (1, 2, 3, 4)])
    row = next(ceilings.reads(TINY, DEVICE))
    assert row["rate"] == pytest.approx(24 * TILE * 1e3)
    assert row["how"] == "pointers, 0.0625 MiB live, in turn, 2 programs of 4 warps, 1 stages"


@ON_A_CPU
def test_the_record_gives_the_roofline_its_rates(tmp_path, capsys):
    path = tmp_path / "ceilings.json"
    assert ceilings.main(["--config", "tiny", "--out", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["command"] == "python -m benchmarks.ceilings --config tiny"
    rates = roofline.ceilings(record)
    assert all(rates[resource] > 0 for resource in roofline.RESOURCES)
    assert len(capsys.readouterr().out.splitlines()) == len(record["rows"]) == 7


@ON_A_CPU
def test_without_a_device_nothing_is_measured(tmp_path, capsys):
    path = tmp_path / "ceilings.json"
    assert ceilings.main(["--out", str(path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not path.exists()
