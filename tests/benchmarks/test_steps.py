"""Every step of benchmarks/steps equals the reference, and its record says what was compiled."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels  # noqa: F401  before triton
import nsa_lite
from benchmarks import ab, records
from benchmarks.steps import case, chain, command, machine_code, measuring
from kernels.launching import launching_by
from nsa_lite import selection

ROOT = Path(__file__).parents[2]
NAMES = [name for family in chain.FAMILIES for name in chain.names(family)]
T = 42  # no multiple of the 4 tokens of a program, nor of the 16 of a block


def inside_nan(x):
    """x again, contiguous, with NaN before and behind it in memory."""
    buffer = torch.full((x.numel() + 4096,), torch.nan)
    view = buffer[2048 : 2048 + x.numel()].view(x.shape)
    return view.copy_(x)


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    q, dout = (inside_nan(torch.randn(1, 32, T, 32)) for _ in range(2))
    k, v = (inside_nan(torch.randn(1, 2, T, 32)) for _ in range(2))
    # Nothing is forced, so that rows meet blocks that are not theirs; two tokens chose none.
    rule = dict(select_block_size=16, num_selected=2, num_initial=0, num_local=0)
    ids = selection.choose_blocks(torch.rand(1, 2, T, 3), **rule)
    ids[:, :, [8, 33]] = -1
    return q, k, v, ids, dout


@pytest.fixture(scope="module")
def expected(tensors):
    """By autograd through the reference, in float64."""
    q, k, v, ids, dout = tensors
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = nsa_lite.selected_attention(*leaves, ids, select_block_size=16)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout.double())
    key = torch.arange(T)
    chosen = (ids[..., None] == key // 16).any(-2) & (key <= key[:, None])  # (1, G, T, T)
    s = (leaves[0] @ leaves[1].repeat_interleave(16, 1).mT) * 32**-0.5
    lse = s.masked_fill(~chosen.repeat_interleave(16, 1), -torch.inf).logsumexp(-1)
    delta = (out * dout).sum(-1)
    base_2 = torch.where(lse == -torch.inf, 0, lse) / torch.tensor(2.0).double().log()
    numbers = (base_2.transpose(1, 2), delta.transpose(1, 2))
    return {"forward": (out, lse), "dq": (dq, *numbers), "dkdv": (dk, dv)}


@pytest.mark.parametrize("name", NAMES)
def test_every_step_equals_the_reference(name, tensors, expected, monkeypatch):
    monkeypatch.setattr(case, "CHUNK", 16)  # so that lists are cut
    if hasattr(chain.step(name), "CHUNK"):
        monkeypatch.setattr(chain.step(name), "CHUNK", 16)
    x = case.case_of(*tensors, 16)
    assert max(x.readers.indptr.diff().tolist()) > 16
    found = chain.step(name).run(x)
    for mine, theirs in zip(found, expected[chain.family_of(name)], strict=True):
        torch.testing.assert_close(mine.double(), theirs.detach(), rtol=1e-4, atol=1e-5)


def test_the_packages_launches_can_be_made_again(tensors):
    q, k, v, ids, dout = (x[:, :, :8] for x in tensors)
    x = case.case_of(*(y.contiguous() for y in (q, k, v, ids.clamp(max=0), dout)), 16)
    again = []
    for family in chain.FAMILIES:
        run = case.runner(x, f"{family}_shipped")
        with launching_by(lambda kernel, *_: again.append(kernel.__name__)):
            run()
    assert again == ["selected_forward", "selected_dq", "selected_dkdv", "add_chunks", "add_chunks"]


@pytest.mark.parametrize(
    "heads, width, block, name", [(6, 32, 16, "heads"), (32, 48, 16, "width"), (32, 32, 8, "block")]
)
def test_sizes_that_the_steps_do_not_take_are_named(heads, width, block, name):
    q, k = torch.zeros(1, heads, 8, width), torch.zeros(1, 2, 8, width)
    with pytest.raises(ValueError, match=f"{name}.*powers of two from 16 on"):
        case.case_of(q, k, k, torch.zeros(1, 2, 8, 1, dtype=torch.int32), q, block)


# --- the chain ---


def test_a_step_changes_few_lines_of_the_one_before():
    for family in chain.FAMILIES:
        names = chain.names(family)
        assert len(names) >= 3
        for before, after in zip(names, names[1:], strict=False):
            taken, added = chain.counted(before, after)
            assert 1 <= taken and 1 <= added <= 18, after
            assert len(chain.code(after)) < 110, after


def test_a_difference_leaves_out_lines_that_only_moved_in():
    assert chain.difference("dq_2_held", "dq_3_two_walks") == [
        "-     for e in range(tl.load(union.counts + tile)):",
        "+     count = tl.load(union.counts + tile)",
        "+     for part in tl.static_range(2):",
        "+         for e in range(part * count // 2, (part + 1) * count // 2):",
    ]
    assert chain.difference("forward_4_powers", "forward_5_stages") == [
        "-         num_stages=2,",
        "+         num_stages=3,",
    ]


def test_the_command_lists_and_shows_differences(capsys):
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert command.main(["--difference"]) == 0
    printed = capsys.readouterr().out
    assert "forward_4_powers -> forward_5_stages" in printed and "+         num_stages=3" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_interpreted_steps_are_not_timed(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path / "s.json")]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_record_of_times_has_every_step_and_what_misleads(tmp_path, monkeypatch):
    """Here no step runs but for its error: what runs is tested above."""
    names = ["dq_1_walk", "dq_2_held"]
    monkeypatch.setattr(chain, "FAMILIES", ("dq",))
    monkeypatch.setattr(chain, "with_shipped", lambda family: [*names, f"{family}_shipped"])
    monkeypatch.setattr(case, "KINDS", ("random",))
    monkeypatch.setattr(measuring, "runner", lambda x, name: ab.nothing)
    monkeypatch.setattr(measuring, "REST", 0.0)
    monkeypatch.setattr(ab, "COLD", 4096)
    path = tmp_path / "steps.json"
    assert command.main(["--tiny", "--out", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["command"] == "python -m benchmarks.steps --tiny"
    assert [row["name"] for row in record["rows"]] == [*names, "dq_shipped"]
    for row in record["rows"]:
        assert len(row["times"]) == 2 and row["error"] in (None, pytest.approx(0, abs=1e-5))
    assert record["drift"]["times"] and record["short"] == 24
    assert "nobody waits" in record["mistakes"] and set(record["control"]) == {"A", "A again"}


# --- machine code ---

SASS = """
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;  /* 0x00 */
                                                                            /* 0x00 */
        /*0010*/                   MUFU.EX2 R3, R3 ;                        /* 0x00 */
        /*0020*/                   WARPGROUP.ARRIVE ;                       /* 0x00 */
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR16], RZ, !UPT ;  /* 0x00 */
        /*0040*/               @P1 FFMA R4, R5, R6, R7 ;                    /* 0x00 */
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR16], R24 ;  /* 0 */
        /*0060*/              @!P0 BRA 0x20 ;                               /* 0x00 */
        /*0070*/               @P2 BRA 0x0 ;                                /* 0x00 */
        /*0080*/                   NOP ;                                    /* 0x00 */
"""


def test_a_step_of_the_walk_is_the_shortest_loop_that_multiplies():
    lines = machine_code.lines_of(SASS)
    assert [line.address for line in lines] == list(range(0, 0x80, 16))
    step = machine_code.step_of_walk(lines)
    assert [line.address for line in step] == [0x20, 0x30, 0x40, 0x50, 0x60]
    units = machine_code.counts(step)
    assert units["matrix unit"] == 2 and units["waits"] == 1
    assert units["fused multiply-adds"] == 1 and units["exp2"] == 0
    assert machine_code.counts(lines)["addresses"] == 1
    assert machine_code.from_registers(step) == 1
    assert machine_code.excerpt(step) == [lines[3].text]


def test_long_lists_of_registers_are_cut():
    ptx = "\twgmma.mma_async.sync {%r1,%r2,%r3,%r4}, %rd74, 1;\n\tadd.f32 %f1, %f2, %f3;\n"
    assert machine_code.ptx_excerpt(ptx) == ["wgmma.mma_async.sync {%r1,%r2, .. %r4}, %rd74, 1;"]


# --- what was compiled, recorded and here ---


LAST = {"forward": "forward_5_stages", "dq": "dq_3_two_walks", "dkdv": "dkdv_4_held"}


def check_compiled(record, families=chain.FAMILIES):
    """Products on the fast unit, nothing spilled; a last step is the package's kernel."""
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == [name for family in families for name in chain.with_shipped(family)]
    for row in rows.values():
        assert row["HGMMA"] > 0 == row["HMMA"] == row["spills"], row
        assert row["shared"] <= 227 * 1024 and row["registers"] <= 255, row
    for family in families:
        mine, theirs = rows[LAST[family]], rows[f"{family}_shipped"]
        assert theirs["waits"] < theirs["HGMMA"]
        for key in ("shared", "HGMMA", "waits", "from_registers", "warps", "stages"):
            assert mine[key] == theirs[key], (family, key)
        assert abs(mine["registers"] - theirs["registers"]) <= 8, family
        assert abs(mine["step"] - theirs["step"]) <= 0.05 * theirs["step"], family
    assert rows["dq_2_held"]["units"]["tiles into registers"] > 0
    assert rows["dq_3_two_walks"]["units"]["tiles into registers"] == 0


def test_the_recorded_machine_code():
    record = records.load("steps_compiled")
    assert record["versions"]["triton"] == "3.6.0"  # of the GPU machine whose times are recorded
    check_compiled(record)
    rows = {row["name"]: row for row in record["rows"]}
    assert rows["forward_1_pointers"]["units"]["copy engine"] == 0
    assert rows["forward_2_descriptors"]["units"]["copies by threads"] == 0
    assert rows["forward_4_powers"]["step"] < 0.8 * rows["forward_3_limits"]["step"]
    assert [tile["rows"] for tile in record["tiles"] if tile["chosen"]] == [64]


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="triton's disassembler is a program for Linux on x86-64",
)
def test_the_steps_compile_with_the_installed_triton(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = tmp_path / "compiled.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.steps", "--compile", "dq", "--out", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    check_compiled(json.loads(path.read_text()), ["dq"])


def test_the_recorded_times_are_of_every_step_and_of_right_results():
    record = records.load("steps")
    for kind in case.KINDS:
        rows = [row for row in record["rows"] if row["ids"] == kind]
        names = [name for family in chain.FAMILIES for name in chain.with_shipped(family)]
        assert [row["name"] for row in rows] == names
        for row in rows:
            assert len(row["times"]) >= 6 and min(row["times"]) > 0, row["name"]
            assert row["error"] is None or row["error"] < 2e-2, row["name"]  # bf16 beside bf16


def test_the_notes_give_the_recorded_medians():
    notes = (ROOT / "benchmarks/NOTES.md").read_text("utf-8")
    medians = {(row["name"], row["ids"]): row["median_ms"] for row in records.load("steps")["rows"]}
    for family in chain.FAMILIES:
        for name in chain.with_shipped(family):
            random, coherent = (f"{medians[name, kind]:.1f}" for kind in case.KINDS)
            assert f"| {name} | {random} | {coherent} |" in notes
