"""The counted work of each kernel: hand sums, and the tiles that the kernels really walk."""

import random
import re
import sys

import matplotlib.pyplot as plt
import pytest
import torch

import kernels
from benchmarks import roofline
from benchmarks.roofline import Keys, Sizes, Work
from kernels import block_sparse_attention, flash_attention, importance
from kernels.tile_sizes import row_name
from kernels.union_and_readers import union as union_of
from nsa_lite import NSAConfig
from nsa_lite.cost import sequence_cost

T = 65536
PAPER = Sizes(NSAConfig(head_dim=128), T)  # H = 64, G = 4, D = Dv = 128, l' = 64, n = 16, w = 512


@pytest.fixture(scope="module")
def works():
    return roofline.works(PAPER)


# --- by hand, at the paper's sizes: pairs x 64 heads x 2 (D + Dv) operations ---

PAIRS = {
    "dense": T * (T + 1) // 2,
    "window": 512 * 513 // 2 + (T - 512) * 512,
    # Block i of 4095 ends at token 16 i + 31, and every later query sees it.
    "compressed": sum(T - (16 * i + 31) for i in range(4095)),
    # Block 0 .. 14: all before it and, on average, 32.5 of its own 64; later ones 15 others.
    "selected": 64 * (sum(64 * j for j in range(15)) + 1009 * 15 * 64) + 1024 * 64 * 65 // 2,
}


@pytest.mark.parametrize("branch", PAIRS)
def test_operations_of_each_branch_at_64k(works, branch):
    per_pair = {"forward": 2 * 256, "dq": 2 * 384, "dk dv": 2 * 512}
    for what, operations in per_pair.items():
        assert works[branch][what].operations == PAIRS[branch] * 64 * operations


@pytest.mark.parametrize(
    ("branch", "what", "milliseconds"),
    [
        ("dense", "forward", 94.7),  # 2147516416 x 64 x 512 / 743e12
        ("window", "forward", 1.47),
        ("compressed", "forward", 5.92),
        ("selection", "scores", 2.96),  # half the products of the compressed forward
        ("selected", "forward", 2.85),  # 2.96 if the query's own block counted as read whole
        ("gated sum", "forward", 1.43),  # 65536 x 64 x (4 x 128 + 3) x 2 bytes / 3.03e12
        ("gated sum", "backward", 2.50),
    ],
)
def test_floors_of_any_kernel_at_64k(works, branch, what, milliseconds):
    assert roofline.floor_of_any(works[branch][what]) * 1e3 == pytest.approx(milliseconds, rel=3e-3)


def test_the_selected_backward_takes_five_products_fused_and_seven_split(works):
    forward, dq, dkdv = (works["selected"][what].operations for what in ("forward", "dq", "dk dv"))
    assert (dq + dkdv) / forward == 7 / 2
    once, trained = (sequence_cost(PAPER.config, 99, training=x).flops for x in (False, True))
    assert trained / once - 1 == 5 / 2  # so 7.1 ms fused and 10.0 split at 743 TFLOP/s
    assert forward * 5 / 2 / 743e12 == pytest.approx(7.1e-3, rel=5e-3)
    assert (dq + dkdv) / 743e12 == pytest.approx(10.0e-3, rel=5e-3)


def test_one_program_a_token_moves_137_gb_of_keys_through_the_cache():
    work = roofline.selected(PAPER, PAIRS["selected"], union=16, U=1)["forward"]
    keys = T * 4 * 16 * 64 * 256 * 2  # queries, groups, n, l', D + Dv, bytes
    assert keys == 137_438_953_472
    rows = T * 64 * (256 * 2 + 4)  # q and out, and a float32 log-sum-exp
    assert work.cache == keys + rows + T * 4 * 16 * 4
    assert keys / 7.5e12 == pytest.approx(18.3e-3, rel=2e-3)
    assert roofline.bound_by(work) == "cache"


def test_sharing_the_union_moves_less_and_multiplies_more(works):
    alone = roofline.selected(PAPER, PAIRS["selected"], union=15.9, U=1)["forward"]
    shared = works["selected"]["forward"]
    assert shared.cache < alone.cache and shared.executed > alone.executed
    assert shared.memory == pytest.approx(alone.memory, rel=0.01)


# --- by hand, at sizes that fit on paper ---

SMALL = Sizes(
    NSAConfig.small(
        heads=2, kv_heads=1, select_block_size=16, num_selected=2, num_initial=0, num_local=1
    ),
    64,
    dtype=torch.float32,
)


def test_flash_by_hand():
    # 128 rows are 2 tiles of 64 (tokens 0-31, 32-63); they walk 1 and 2 tiles of 32 keys.
    work = roofline.flash(SMALL, Keys(64), pairs=64 * 65 // 2)["forward"]
    assert work.operations == 2 * 64 * 65 // 2 * 2 * 32
    assert work.executed == 3 * 64 * 32 * 2 * 32
    rows, keys = 128 * (32 * 4 + 4), 64 * 32 * 4
    assert work.memory == rows + keys
    assert work.cache == rows + 3 * 32 * 32 * 4
    # dq: 4 tiles of 32 rows (16 tokens each) walk 1, 1, 2 and 2 tiles of keys.
    work = roofline.flash(SMALL, Keys(64), pairs=64 * 65 // 2)["dq"]
    assert work.executed == 6 * 32 * 32 * 2 * 48
    assert work.memory == 128 * (64 * 4 + 12) + keys
    # dk, dv: 2 key tiles; the first is read by 128 rows, the second by 64, in tiles of 32.
    work = roofline.flash(SMALL, Keys(64), pairs=64 * 65 // 2)["dk dv"]
    assert work.executed == 6 * 32 * 32 * 2 * 64
    assert work.memory == 128 * (32 * 4 + 8) + 2 * keys
    assert work.cache == 6 * 32 * (32 * 4 + 8) + 2 * keys


def test_selected_by_hand():
    # 16 programs of 4 tokens x 2 heads, in tiles of 16 rows; suppose that each reads 3 blocks.
    works = roofline.selected(SMALL, pairs=1000, union=3)
    rows, keys = 128 * (32 * 4 + 4), 64 * 32 * 4
    assert works["forward"].executed == 16 * 3 * 16 * 16 * 2 * 32
    assert works["forward"].cache == rows + 16 * 3 * (16 * 32 * 4 + 4)
    # dq reads q, out, dout and lse, and writes dq, and lse and delta row by row.
    assert works["dq"].executed == 16 * 3 * 16 * 16 * 2 * 48
    assert works["dq"].memory == 128 * (64 * 4 + 12) + keys + 16 * 3 * 4
    # 16 tokens read 1 block and 48 read 2: 112 readers of 4 blocks, 4 chunks of a list at most.
    work = works["dk dv"]
    assert work.executed == 112 * 16 * 16 * 2 * 64  # a reader's 2 rows take a tile of 16
    parts = 2 * 4 * 4 * 16 * 32
    assert work.memory == 128 * (32 * 4 + 8) + 2 * keys + parts + 4 * 112
    assert work.cache == 112 * (16 * 32 * 4 + 2 * 8 + 4) + 4 * 16 * 32 * 4 + parts + keys


def test_cut_rows_leave_float32_parts(works):
    # 64 tiles of 64 compressed keys x 4 groups are 256 programs: 4096 / 256 = 16 chunks, and each
    # leaves dk and dv of 4 groups.
    parts = 2 * 4 * 16 * 4 * 4095 * 256
    tensors = T * 64 * 256 * 2 + 2 * 4 * 4095 * 256 * 2 + 8 * T * 64
    assert works["compressed"]["dk dv"].memory == tensors + parts
    tensors = T * 64 * 256 * 2 + 2 * T * 4 * 256 * 2 + 8 * T * 64  # the window needs no cut
    assert works["window"]["dk dv"].memory == tensors


def test_gated_sum_by_hand():
    forward, backward = roofline.gated_sum(SMALL).values()
    assert forward.memory == 128 * (4 * 16 + 3) * 4 and forward.operations == 128 * 16 * 6
    assert backward.memory == 128 * (7 * 16 + 6) * 4 and backward.operations == 128 * 16 * 9


def test_union_of_random_sets():
    config = NSAConfig.small(block_size=4, select_block_size=4, num_selected=6)  # 3 of 6 are free
    make, drawn = random.Random(0), []
    for legal in range(1, 33):
        for _ in range(300):
            sets = [set(make.sample(range(3, legal), 3)) for _ in range(4)] if legal > 6 else []
            drawn.append(3 + len(set().union(*sets)) if legal > 6 else legal)
    expected = roofline.expected_union(config, 128, U=4)
    assert expected == pytest.approx(sum(drawn) / len(drawn), rel=0.01)
    read = sum(min(legal, 6) for legal in range(1, 33)) / 32
    assert roofline.expected_union(config, 128, U=1) == pytest.approx(read)
    assert roofline.expected_union(config, 128, U=4, keep=1.0) == pytest.approx(read)
    with pytest.raises(ValueError, match=r"keep = 1\.5: must be a probability"):
        roofline.expected_union(config, 128, U=4, keep=1.5)


# --- the tiles that the kernels walk, counted as the interpreter runs them ---

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="counts interpreted calls")


@pytest.fixture
def calls(monkeypatch):
    """How often each function of a tile is called, by name."""
    counts = {}

    def count(module, name):
        call = getattr(module, name)

        def counting(*args, **keywords):
            counts[name] = counts.get(name, 0) + 1
            return call(*args, **keywords)

        monkeypatch.setattr(module, name, counting)

    scored = ["fold_in", "score_gradient", "score_gradient_by_key"]
    for module, names in {
        flash_attention: scored,
        block_sparse_attention: scored,
        importance: ["load_tile"],
    }.items():
        for name in names:
            count(module, name)
    return counts


def inputs(sizes, keys):
    config = sizes.config
    make = torch.Generator().manual_seed(0)
    shapes = [
        (config.heads, sizes.length, config.head_dim),
        (config.kv_heads, keys, config.head_dim),
        (config.kv_heads, keys, config.value_dim),
    ]
    return [torch.randn(1, *shape, generator=make).requires_grad_() for shape in shapes]


def tiles_executed(works, sizes, window=None):
    """(forward, dq, dk dv): tiles, from the operations executed."""
    kernels_of = {"forward": "flash_forward", "dq": "flash_dq", "dk dv": "flash_dkdv"}
    tile = {what: sizes.tile(row_name(kernel, window)) for what, kernel in kernels_of.items()}
    pairs = {what: tile[what].BLOCK_M * tile[what].BLOCK_N for what in works}
    return [
        work.executed / sizes.operations(what, pairs[what], True) for what, work in works.items()
    ]


@INTERPRETED
@pytest.mark.parametrize("length", [70, 96])
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("group", [1, 3])
def test_the_flash_kernels_walk_the_counted_tiles(calls, length, window, group):
    sizes = Sizes(NSAConfig.small(heads=group, kv_heads=1), length, dtype=torch.float32)
    q, k, v = inputs(sizes, length)
    kernels.window_attention(q, k, v, window=window).sum().backward()
    counted = roofline.flash(sizes, Keys(length, window=window), pairs=0)
    walked = [calls[name] for name in ("fold_in", "score_gradient", "score_gradient_by_key")]
    assert walked == tiles_executed(counted, sizes, window)


@INTERPRETED
def test_the_compressed_branch_walks_the_counted_tiles(calls):
    sizes = Sizes(NSAConfig.small(heads=3, kv_heads=1), 150, dtype=torch.float32)
    q, k, v = inputs(sizes, 36)  # (150 - 8) // 4 + 1
    kernels.compressed_attention(q, k, v, block_size=8, stride=4)[0].sum().backward()
    counted = roofline.flash(sizes, Keys(36, 8, 4), pairs=0)
    walked = [calls[name] for name in ("fold_in", "score_gradient", "score_gradient_by_key")]
    assert walked == tiles_executed(counted, sizes)


@INTERPRETED
def test_the_selected_branch_walks_the_counted_blocks(calls):
    config = NSAConfig.small(heads=4, kv_heads=1, select_block_size=16, num_selected=3)
    sizes = Sizes(config, 96, dtype=torch.float32)
    q, k, v = inputs(sizes, 96)
    j, t = torch.arange(6), torch.arange(96)[:, None]
    legal = (j * 16 <= t).expand(1, 1, 96, 6)
    ids = (torch.rand(legal.shape) * legal).topk(3).indices
    ids = ids.masked_fill(~legal.gather(-1, ids), -1)
    union = union_of(ids, 4, 6).counts.float().mean().item()
    kernels.selected_attention(q, k, v, ids, select_block_size=16).sum().backward()
    works = roofline.selected(sizes, pairs=0, union=union)
    a_tile = {what: sizes.operations(what, 16 * 16, True) for what in ("forward", "dq")}
    for name, what in {"fold_in": "forward", "score_gradient": "dq"}.items():
        assert calls[name] == pytest.approx(works[what].executed / a_tile[what])
    steps = works["dk dv"].executed / sizes.operations("dk dv", 16 * 16, True)
    assert calls["score_gradient_by_key"] == steps == (ids >= 0).sum()


@INTERPRETED
@pytest.mark.parametrize("length", [50, 550])
def test_the_scores_are_made_by_the_counted_programs(calls, length):
    config = NSAConfig.small(heads=1, kv_heads=1)
    sizes = Sizes(config, length, dtype=torch.float32)
    short = (length - 8) // 4 + 1
    q, k, _ = inputs(sizes, length)
    kernels.select_blocks(
        q,
        k[:, :, :short],
        torch.zeros(1, 1, length),
        block_size=8,
        stride=4,
        select_block_size=8,
        num_selected=5,
    )
    work = roofline.selection(sizes, pairs=0)["scores"]
    assert calls["load_tile"] == work.executed / (2 * 16 * 32 * 128)  # one tile of q a program


# --- what is made of the counts ---


def test_the_slowest_resource_is_the_floor():
    device = {"arithmetic": 10.0, "memory": 1.0, "cache": 2.0}
    work = Work(operations=10.0, executed=50.0, memory=2.0, cache=8.0)
    assert roofline.bounds(work, device) == {"arithmetic": 5.0, "memory": 2.0, "cache": 4.0}
    assert roofline.floor(work, device) == 5.0 and roofline.bound_by(work, device) == "arithmetic"
    assert roofline.floor_of_any(work, device) == 2.0


def test_the_table_has_a_line_for_each_kernel(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["roofline", "--length", "2048", "--keep", "0.5"])
    roofline.main()
    text = capsys.readouterr().out
    assert "computed bounds, no timings" in text
    for name in ("dense dk dv", "selected forward", "selection top-n", "gated sum backward"):
        assert re.search(rf"^{name} .* (arithmetic|memory|cache)$", text, re.M), name


def test_the_picture_marks_both_floors_and_a_measured_time(works):
    figure = roofline.draw(works, measured={"dense": {"forward": 0.2}})
    points = {
        (round(float(x), 1), round(float(y), 1))
        for line in figure.axes[0].lines
        for x, y in line.get_xydata()
    }
    work = works["dense"]["forward"]
    x = work.operations / work.memory
    for seconds in (roofline.floor_of_any(work), roofline.floor(work), 0.2):
        assert (round(x, 1), round(work.operations / seconds / 1e12, 1)) in points
    names = [text.get_text() for text in figure.axes[0].texts]
    assert "dense forward" in names and "gated sum forward: 0.7 a byte" in names[-1]
    plt.close(figure)
