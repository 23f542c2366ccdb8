"""The benchmark's blocks are legal, its records hold what was run, its pictures show the records.

No test here looks at a time: only `make bench`, on a GPU, does.
"""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from benchmarks import bench, draw, records, roofline, tune
from benchmarks.cases import (
    CONFIGS,
    coherent_ids,
    inputs,
    random_ids,
    shared_with_neighbour,
)
from kernels import block_sparse_attention, decode, flash_attention, importance
from nsa_lite import NSAConfig
from nsa_lite.lab.coherence import kept
from nsa_lite.lab.selection_runs import text_model
from nsa_lite.show.explorer import load_traces

TINY = CONFIGS["tiny"]
SIX = CONFIGS["A"]


def assert_legal(ids, sizes):
    """Distinct, ascending, then -1; forced blocks in; none that starts after the token."""
    for t, row in enumerate(ids[0, 0].tolist()):
        own = t // sizes.select_block_size
        real = [j for j in row if j >= 0]
        assert row == sorted(set(real)) + [-1] * (len(row) - len(real)), t
        assert {0, max(own - 1, 0), own} <= set(real) and max(real) == own, t


@pytest.mark.parametrize("sizes, length", [(TINY, 200), (SIX, 1500)])
def test_ids_are_legal(sizes, length):
    assert_legal(random_ids(sizes, length, "cpu"), sizes)
    for keep in (0.0, 0.75):
        ids = coherent_ids(sizes, length, "cpu", keep)
        assert ids.shape == (1, sizes.groups, length, sizes.num_selected)
        assert_legal(ids, sizes)


def test_free_slots_keep_their_block_as_often_as_asked():
    """Far from the start 13 of 16 slots are free; a redrawn slot seldom hits its old block."""
    ids = coherent_ids(SIX, 32768, "cpu", 0.75)[:, :, 16384:]
    expected = (3 - 1 / 64 + 13 * 0.75) / 16  # one local block in 64 tokens is new
    assert abs(shared_with_neighbour(ids) - expected) < 0.02


def test_random_ids_share_little():
    ids = random_ids(SIX, 8192, "cpu")[:, :, 6000:]
    assert shared_with_neighbour(ids) < 0.35  # 3 forced of 16, and 13 of about 100 by chance


@pytest.mark.parametrize("keep", [0.0, 0.4, 0.75])
def test_kept_is_what_the_ids_were_made_with(keep):
    ids = coherent_ids(SIX, 8192, "cpu", keep)
    assert kept(ids, SIX.select_block_size) == pytest.approx(keep, abs=0.02)


def test_kept_by_hand():
    """Blocks of one token; tokens 9, 10, 11 chose 3, 3, 5 from 7, 8, 9 blocks, the others none."""
    chosen = [[-1] * 4] * 9 + [[0, 3, 8, 9], [0, 3, 9, 10], [0, 5, 10, 11]]
    share, chance = 1 / 3, (1 / 7 + 1 / 8 + 1 / 9) / 3
    assert kept(torch.tensor([[chosen]]), 1) == pytest.approx((share - chance) / (1 - chance))


def test_keep_is_checked():
    with pytest.raises(ValueError, match="keep = 1.5: must be at least 0"):
        coherent_ids(TINY, 64, "cpu", 1.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_times_of_interpreted_kernels_are_refused(tmp_path, capsys):
    assert bench.main(["--out", str(tmp_path / "b.json")]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_record_holds_every_measurement_and_every_refusal(tmp_path):
    path = tmp_path / "b.json"
    assert (
        bench.main(["--config", "tiny", "--length", "16", "--ids", "random", "--out", str(path)])
        == 0
    )
    record = json.loads(path.read_text())
    assert record["command"].startswith("python -m benchmarks.bench --config tiny --length 16")
    assert {"torch", "triton", "fla-core"} <= set(record["versions"])
    rows = {r["name"]: r for r in record["rows"]}
    assert {*draw.PIECES, "NSA", *bench.peers.DENSE, *bench.peers.SLOW_TO_START} <= set(rows)
    for name in (*draw.PIECES, "NSA"):
        assert rows[name]["forward_ms"] > 0
        assert ("backward_ms" in rows[name]) == (name != "scores + top-n")
    assert all("refused" in r or "forward_ms" in r for r in record["rows"])


def record_of(times):
    """A record by hand: (name, ids, length) -> forward and backward ms."""
    rows = [
        {
            "config": "A",
            "name": name,
            "ids": ids,
            "length": length,
            "forward_ms": f,
            "backward_ms": b,
        }
        for (name, ids, length), (f, b) in times.items()
    ]
    return {"device": "made by hand", "versions": {"triton": "3.6.0"}, "rows": rows}


def test_pictures_show_the_records_numbers():
    record = record_of(
        {
            ("FlashAttention-2", "random", 8192): (3.0, 9.0),
            ("FlashAttention-2", "random", 65536): (200.0, 500.0),
            ("NSA", "random", 8192): (2.0, 6.0),
            ("NSA", "random", 65536): (40.0, 80.0),
            ("NSA", "coherent .36", 65536): (25.0, 62.5),
            ("window", "random", 65536): (4.0, 9.0),
            ("compressed", "random", 65536): (8.0, 30.0),
            ("selected", "random", 65536): (16.0, 31.0),
        }
    )
    assert draw.speedup(record, "A", 65536, "forward_ms") == 5.0
    assert draw.speedup(record, "A", 65536, "backward_ms", "coherent .36") == 8.0
    forward, backward = draw.draw_scaling(record).axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in forward.lines}
    assert lines == {
        "FlashAttention-2": [3.0, 200.0],
        "NSA, random blocks": [2.0, 40.0],
        "NSA, coherent blocks": [25.0],
    }
    (ax,) = draw.draw_pieces(record, "A", 65536).axes
    assert [bar.get_width() for bar in ax.patches] == [4, 8, 0, 16, 9, 30, 0, 31]


def test_without_a_record_one_line_says_what_makes_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    assert draw.main() == 2
    assert "`make bench` on a GPU makes one" in capsys.readouterr().err


# --- tables ---

BY_HAND = {
    ("FlashAttention-2", "random", 8192): (3.0, 9.0),
    ("cuDNN", "random", 8192): (2.0, 6.0),
    ("NSA", "random", 8192): (4.0, 120.0),
    ("NSA", "coherent .75", 8192): (1.0, 3.0),
    ("NSA", "random", 65536): (40.0, 80.0),
}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_nsa_stands_beside_both_dense_peers():
    record = record_of(BY_HAND)
    text = draw.peers_table(record, [("A", 8192), ("A", 65536)], ("random", "coherent .75"))
    head, _, one, two, three = [cells(line) for line in text.splitlines()]
    assert head[3:] == ["NSA, ms", "over FlashAttention-2", "over cuDNN"]
    place = "A: 64 in 4, 128 and 128"
    assert one == [place, "8k", "random", "4.0 / 120", "0.75x / 0.07x", "0.50x / 0.05x"]
    assert two == [place, "8k", "coherent .75", "1.0 / 3.0", "3.00x / 3.00x", "2.00x / 2.00x"]
    assert three == [place, "64k", "random", "40.0 / 80.0", "-", "-"]  # no peer ran there


def test_a_page_shows_the_shortest_and_the_longest():
    found = [("A", 8192), ("A", 16384), ("A", 65536), ("B", 8192)]
    assert draw.ends(found) == [("A", 8192), ("A", 65536), ("B", 8192)]


def test_a_table_takes_the_place_between_its_marks():
    page = "a\n<!-- times -->\nold\nlines\n<!-- end of times -->\nb\n"
    new = draw.put(page, "times", r"new \1")
    assert new == "a\n<!-- times -->\nnew \\1\n<!-- end of times -->\nb\n"
    assert draw.put(new, "times", r"new \1") == new
    with pytest.raises(ValueError, match="name = other: the page has no marks for this table"):
        draw.put(page, "other", "new")


# --- the record of an H100 ---


def test_the_pages_hold_the_records_tables():
    for page, found in draw.pages(draw.load()).items():
        text = page.read_text("utf-8")
        for name, table in found.items():
            assert draw.put(text, name, table) == text, f"{page.name}: run benchmarks.draw"


def test_every_config_stands_beside_cudnn_in_the_readme():
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    record = draw.load()
    for config, length in (("A", 65536), ("B", 32768), ("paper", 65536)):
        ratios = [
            f"{draw.speedup(record, config, length, key, over='cuDNN'):.2f}x"
            for key in ("forward_ms", "backward_ms")
        ]
        lines = [cells(line) for line in text.splitlines() if line.startswith(f"| {config}: ")]
        assert " / ".join(ratios) in {line[-1] for line in lines}


def readable(milliseconds):
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.1f}"


def test_the_readme_gives_the_recorded_times():
    record, text = draw.load(), (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    rows = {
        "FlashAttention-2": ("FlashAttention-2", "random"),
        "cuDNN": ("cuDNN", "random"),
        "fla-core NSA, less compression and no window": ("fla-core NSA", "random"),
        "NSA, blocks chosen at random": ("NSA", "random"),
        "NSA, neighbours keep .36 of their blocks": ("NSA", "coherent .36"),
    }
    for label, (name, ids) in rows.items():
        forward, backward = (
            draw.find(record, "A", name, ids, key) for key in ("forward_ms", "backward_ms")
        )
        times = " | ".join(
            f"{readable(forward[t])} / {readable(backward[t])}" for t in (8192, 65536)
        )
        assert f"| {label} | {times} |" in text
    forward, backward = (
        [f"{draw.speedup(record, 'A', 65536, key, ids):.1f}" for ids in ("random", "coherent .36")]
        for key in ("forward_ms", "backward_ms")
    )
    text = " ".join(text.split())
    assert (
        f"{forward[0]} times less than FlashAttention-2 forward and {backward[0]} backward"
        f" at random, {forward[1]} and {backward[1]} where"
    ) in text
    peak = draw.find(record, "A", "NSA", "random", "peak_gib")[65536]
    assert f"in {peak:.1f} GiB" in text and peak <= 12


def test_measured_times_stand_beside_their_floors():
    record = record_of(
        {("window", "random", 8192): (0.4, 1.2), ("scores + top-n", "random", 8192): (0.2, 0.0)}
    )
    del record["rows"][1]["backward_ms"]
    assert draw.seconds(record, "A", 8192) == {
        "window": {"forward": 0.4e-3, "backward": 1.2e-3},
        "selection": {"forward": 0.2e-3},
    }
    works = roofline.works(roofline.Sizes(NSAConfig(head_dim=128), 8192))
    forward, dq, dkdv = (
        1e3 * roofline.floor(works["window"][k]) for k in ("forward", "dq", "dk dv")
    )
    head, one, two, three = draw.beside_floors(record, "A", 8192).splitlines()
    assert one.split()[:4] == ["window", "forward", "0.40", f"{forward:.2f}"]
    assert two.split()[:4] == ["window", "backward", "1.20", f"{dq + dkdv:.2f}"]
    assert three.startswith("scores + top-n") and "0.20" in three


def test_no_recorded_time_is_below_its_floor():
    """A floor that a kernel beats is no floor."""
    record = draw.load()
    for config, length in draw.places(record):
        for ids in bench.IDS:
            found = draw.beside(record, config, length, ids)
            assert found, (config, length, ids)
            for x in found:
                assert x.measured > x.tiles >= x.least > 0, (config, length, ids, x)


def test_the_notes_table_gives_times_and_floors():
    """The selected branch by ids, the whole without floors, dashes for what did not run."""
    record = record_of(
        {
            ("window", "random", 65536): (4.0, 12.0),
            ("compressed", "random", 65536): (8.0, 24.0),
            ("selected", "random", 65536): (16.0, 32.0),
            ("selected", "coherent .75", 65536): (9.0, 20.0),
            ("NSA", "random", 65536): (40.0, 80.0),
        }
    )
    table = [cells(line) for line in draw.floors_table(record).splitlines()[2:]]
    lines = {label: columns for label, *columns in table}
    assert lines["window"][0] == "4.0 / 12.0"
    assert lines["selected, random"][0] == "16.0 / 32.0"
    assert lines["selected, coherent .75"][0] == "9.0 / 20.0"
    works = draw.counted("A", 65536, "coherent .75")["selected"]
    forward, dq, dkdv = (1e3 * roofline.floor(works[k]) for k in ("forward", "dq", "dk dv"))
    assert lines["selected, coherent .75"][1] == f"{forward:.1f} / {dq + dkdv:.1f}"
    assert lines["selected, coherent .36"] == ["-", "-", "-"]
    assert lines["whole, random"] == ["40.0 / 80.0", "", ""]
    assert lines["whole, coherent .75"] == lines["cuDNN"] == ["-", "", ""]


def test_the_notes_give_the_coherence_of_the_course_s_models():
    root = Path(__file__).parents[2]
    notes = " ".join((root / "benchmarks/NOTES.md").read_text("utf-8").split())
    sequence, _ = load_traces(root / "notebooks/recorded/selection_recall.npz")
    recall = list(sequence.checkpoints.values())[-1]
    first_question = int((sequence.answer_at >= 0).nonzero()[0])  # all behind it ask, too
    model, about = text_model()
    texts = [[about["passage"]], about["held_out_texts"]]
    with torch.no_grad():
        passage, stretches = (
            model(torch.tensor([[*text.encode()] for text in some]), return_traces=True)[1]
            for some in texts
        )
    for traces, start, first, second, said in (
        (passage, 0, 0.40, 0.35, "0.40 and 0.35 on one text passage"),
        (stretches, 0, 0.49, 0.48, "0.49 and 0.48 over its 16 stretches"),
        (recall, first_question, 0.04, 0.37, "0.04 and 0.37 on recall's questions"),
    ):
        size = traces[0].config.select_block_size
        found = [kept(trace.ids[:, :, start:], size, start) for trace in traces]
        assert found == pytest.approx([first, second], abs=0.01)
        assert said in notes


def test_the_chosen_tiles_are_among_those_tried():
    for table, rows in tune.TABLES.values():
        for row, tried in rows.items():
            assert table[row] in tried, row
    (half, tried), (_, of_small_groups), (wide, of_wide) = tune.TABLES.values()
    assert set(half) == set(tried) | set(of_small_groups)
    assert set(wide) == set(of_wide) | {"selected_dkdv_small"}  # no config is wide and small


def test_of_the_tiles_timed_again_the_fastest_is_the_chosen_one():
    record = records.load("tune")
    table, tried = tune.TABLES[record["config"]]
    for kernel in {row["row"] for row in record["rows"]}:
        rows = [row for row in record["rows"] if row["row"] == kernel]
        tiles = [
            tune.TileSizes(**{x.name: row[x.name] for x in fields(tune.TileSizes)}) for row in rows
        ]
        assert tiles == tried[kernel]
        fastest = min(range(len(rows)), key=lambda i: rows[i]["ms"])
        assert rows[fastest]["chosen"] and tiles[fastest] == table[kernel]


def test_trying_more_rows_gives_them_to_both_kernels_of_a_union():
    table = tune.TABLES["A"][0]
    tile = tune.TileSizes(128, None, warps=8, stages=2)
    changed = tune.changes(table, "selected_forward", tile)
    assert changed["selected_forward"] == tile
    assert changed["selected_dq"] == table["selected_dq"].with_rows(128)
    assert tune.changes(table, "flash_dq", tile) == {"flash_dq": tile}


def test_tuning_runs_every_branch_and_names_its_kernels(capsys):
    """On a CPU with the tiny sizes: the runs run, and each row's kernel is one that they launch."""
    x = inputs(TINY, 32, "cpu", torch.float32)
    runs = tune.branches(x, TINY, random_ids(TINY, 32, "cpu"))
    assert {branch for branch, _ in tune.KERNELS.values()} == set(runs)
    for run in runs.values():
        run()
    modules = (flash_attention, importance, block_sparse_attention, decode)
    for _, kernel in tune.KERNELS.values():
        assert any(hasattr(module, kernel) for module in modules), kernel
    with pytest.raises(SystemExit):
        tune.main(["nothing"])
    assert "row = nothing: must be one of" in capsys.readouterr().err
