"""The counted work of each kernel: hand sums, and the tiles that the kernels really walk."""

import random
from dataclasses import replace

import pytest
import torch

import kernels
from benchmarks import counts
from benchmarks.counts import KERNELS, Sizes, Tiles
from benchmarks.roofline import bound_by
from kernels import block_sparse_attention, flash_attention, importance
from kernels.flash_attention import row_tile
from kernels.tile_sizes import HALF, TileSizes, blocks_in_a_tile, row_name
from kernels.union_and_readers import union as union_of
from kernels.visible_keys import Keys
from nsa_lite import NSAConfig
from nsa_lite.blocks import num_compressed, num_select_blocks
from nsa_lite.cost import sequence_cost
from tests.benchmarks.device import DEVICE

T = 65536
PAPER = Sizes(NSAConfig(head_dim=128), T)  # H = 64, G = 4, D = Dv = 128, l' = 64, n = 16, w = 512


@pytest.fixture(scope="module")
def works():
    return counts.works(PAPER)


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


def test_the_selected_backward_takes_five_products_fused_and_seven_split(works):
    forward, dq, dkdv = (works["selected"][what].operations for what in ("forward", "dq", "dk dv"))
    assert (dq + dkdv) / forward == 7 / 2
    once, trained = (sequence_cost(PAPER.config, 99, training=x).flops for x in (False, True))
    assert trained / once - 1 == 5 / 2  # so 7.1 ms fused and 10.0 split at 743 TFLOP/s
    assert forward * 5 / 2 / 743e12 == pytest.approx(7.1e-3, rel=5e-3)
    assert (dq + dkdv) / 743e12 == pytest.approx(10.0e-3, rel=5e-3)


def test_one_program_a_token_moves_137_gb_of_keys_through_the_cache():
    work = counts.selected(PAPER, PAIRS["selected"], union=16, U=1)["forward"]
    keys = T * 4 * 16 * 64 * 256 * 2  # queries, groups, n, l', D + Dv, bytes
    assert keys == 137_438_953_472
    rows = T * 64 * (256 * 2 + 4)  # q and out, and a float32 log-sum-exp
    assert work.cache == keys + rows
    assert keys / 7.5e12 == pytest.approx(18.3e-3, rel=2e-3)
    assert bound_by(work, DEVICE) == "cache"


def test_sharing_the_union_moves_less_and_multiplies_more(works):
    alone = counts.selected(PAPER, PAIRS["selected"], union=15.9, U=1)["forward"]
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
    work = counts.flash(SMALL, Keys(1, 1, None), pairs=64 * 65 // 2)["forward"]
    assert work.operations == 2 * 64 * 65 // 2 * 2 * 32
    assert work.executed == 3 * 64 * 32 * 2 * 32
    rows, keys = 128 * (32 * 4 + 4), 64 * 32 * 4
    assert work.memory == rows + keys
    assert work.cache == rows + 3 * 32 * 32 * 4
    # dq: 4 tiles of 32 rows (16 tokens each) walk 1, 1, 2 and 2 tiles of keys.
    work = counts.flash(SMALL, Keys(1, 1, None), pairs=64 * 65 // 2)["dq"]
    assert work.executed == 6 * 32 * 32 * 2 * 48
    assert work.memory == 128 * (64 * 4 + 12) + keys
    # dk, dv: 2 key tiles; the first is read by 128 rows, the second by 64, in tiles of 32.
    work = counts.flash(SMALL, Keys(1, 1, None), pairs=64 * 65 // 2)["dk dv"]
    assert work.executed == 6 * 32 * 32 * 2 * 64
    assert work.memory == 128 * (32 * 4 + 8) + 2 * keys
    assert work.cache == 6 * 32 * (32 * 4 + 8) + 2 * keys


def test_selected_by_hand():
    # 2 programs of 32 tokens x 2 heads, 64 rows; suppose that each reads 3 blocks.
    works = counts.selected(SMALL, pairs=1000, union=3)
    rows, keys = 128 * (32 * 4 + 4), 64 * 32 * 4
    assert works["forward"].executed == 2 * 3 * 64 * 16 * 2 * 32
    assert works["forward"].cache == rows + 2 * 3 * 16 * 32 * 4
    # dq reads q, out, dout and lse, and writes dq, and lse and delta row by row.
    assert works["dq"].executed == 2 * 3 * 64 * 16 * 2 * 48
    assert works["dq"].memory == 128 * (64 * 4 + 12) + keys
    # 16 tokens read 1 block and 48 read 2: 112 readers of 4 blocks, 4 chunks of a list at most.
    work = works["dk dv"]
    assert work.executed == 14 * 16 * 16 * 2 * 64  # 8 readers' 2 rows fill a tile of 16
    parts = 2 * 4 * 4 * 16 * 32
    assert work.memory == 128 * (32 * 4 + 8) + 2 * keys + parts
    assert work.cache == 112 * 2 * (32 * 4 + 8) + 4 * 16 * 32 * 4 + parts + keys


@pytest.mark.parametrize(("heads", "groups"), [(64, 4), (32, 8)])
def test_ids_and_lists_are_few_bytes(heads, groups):
    config = NSAConfig(heads=heads, kv_heads=groups, head_dim=128)
    sizes = Sizes(config, T)
    works = counts.works(sizes)["selected"]
    U = counts.neighbours(sizes)
    assert U * heads // groups == 64
    entries = 8 * groups * T / U * counts.expected_union(config, T, U)  # one for each block
    for what in ("forward", "dq"):
        assert entries < 0.04 * works[what].memory, what
    assert 4 * groups * T * 16 < 0.02 * works["dk dv"].memory  # a reader's id


def test_cut_rows_leave_float32_parts(works):
    # 64 tiles of 64 compressed keys x 4 groups are 256 programs: 4096 / 256 = 16 chunks, and each
    # leaves dk and dv of 4 groups.
    parts = 2 * 4 * 16 * 4 * 4095 * 256
    tensors = T * 64 * 256 * 2 + 2 * 4 * 4095 * 256 * 2 + 8 * T * 64
    assert works["compressed"]["dk dv"].memory == tensors + parts
    tensors = T * 64 * 256 * 2 + 2 * T * 4 * 256 * 2 + 8 * T * 64  # the window needs no cut
    assert works["window"]["dk dv"].memory == tensors


def test_gated_sum_by_hand():
    forward, backward = counts.gated_sum(SMALL).values()
    assert forward.memory == 128 * (4 * 16 + 3) * 4 and forward.operations == 128 * 16 * 6
    assert backward.memory == 128 * (7 * 16 + 6) * 4 and backward.operations == 128 * 16 * 9


def test_union_of_random_sets():
    config = NSAConfig.small(block_size=4, select_block_size=4, num_selected=6)  # 3 of 6 are free
    make, drawn = random.Random(0), []
    for legal in range(1, 33):
        for _ in range(300):
            sets = [set(make.sample(range(3, legal), 3)) for _ in range(4)] if legal > 6 else []
            drawn.append(3 + len(set().union(*sets)) if legal > 6 else legal)
    expected = counts.expected_union(config, 128, U=4)
    assert expected == pytest.approx(sum(drawn) / len(drawn), rel=0.01)
    read = sum(min(legal, 6) for legal in range(1, 33)) / 32
    assert counts.expected_union(config, 128, U=1) == pytest.approx(read)
    assert counts.expected_union(config, 128, U=4, keep=1.0) == pytest.approx(read)
    with pytest.raises(ValueError, match=r"keep = 1\.5: must be a probability"):
        counts.expected_union(config, 128, U=4, keep=1.5)


# --- shared memory, by hand: 128 bytes a clock, and 4096 operations ---


def clocks(work, steps=1):
    """(shared memory, matrix unit): clocks of one multiprocessor for each step."""
    return work.shared / 128 / steps, work.executed / 4096 / steps


def one_step(what, rows, keys, hold=False):
    return clocks(counts.attention(PAPER, what, Tiles(rows, keys, hold, rows * keys), 0, 0))


def test_a_step_of_the_selected_dkdv():
    # 64 keys, and the 16 rows of a reader. q and dout are 4 KB each, k and v 16 KB.
    written = 2 * 4096
    second = 4 * 4096  # s = k q', dp = v dout', dk += ds q, dv += p dout
    first = 2 * 16384  # k and v; ds and p are in registers
    assert one_step("dk dv", 16, 64) == ((written + second + first) / 128, 64 * 16 * 1024 / 4096)
    assert one_step("dk dv", 16, 64) == (448, 256)
    assert one_step("dk dv", 16, 64, hold=True) == (192, 256)


def test_wide_keys_and_values_stay_in_shared_memory():
    sizes = Sizes(NSAConfig(head_dim=192), T)  # three pieces of 64, not one of 256
    work = counts.selected_dkdv(sizes, pairs=0)
    # A reader's 16 rows of q and dout come in, and are two second operands each. k and v are first
    # ones.
    rows = 16 * (192 + 128) * 2
    keys = 64 * (192 + 128) * 2
    steps = work.executed / (2 * 64 * 16 * 2 * (192 + 128))
    assert work.shared / steps == pytest.approx(rows + 2 * rows + keys)


def test_the_window_tiles_of_the_notes():
    # Entry 16: 128 rows and 32 keys, and twice 64 rows whose q waits in registers.
    assert one_step("forward", 128, 32) == (640, 512)
    assert one_step("forward", 64, 32, hold=True) == (512 / 2, 512 / 2)


def test_a_first_operand_of_16_columns():
    # Entry 14: 2 KB an instruction take 16 clocks, the products of 16 columns 8.
    with_k, without = (one_step("dk dv", 16, 64, hold)[0] for hold in (False, True))
    instructions = 2 * 128 / 16  # s and dp, D in sixteens, all 64 keys at once
    assert (with_k - without) / instructions == 16
    assert 2 * 64 * 16 * 16 / 4096 == 8


def test_scores_keep_shared_memory_and_the_matrix_unit_equally_busy(works):
    # A head's q, 64 x 128, is written and read, the 128 keys are read: 16 + 16 + 32 KB.
    work = works["selection"]["scores"]
    steps = work.executed / (2 * 64 * 128 * 128)
    assert clocks(work, steps) == pytest.approx((512, 512))
    assert bound_by(work, DEVICE) == "arithmetic, shared"


UNHELD = {name: replace(tile, hold=False) for name, tile in HALF.items()}
UNHELD["flash_forward_window"] = TileSizes(128, 32, 4, 3)  # as it was, before entry 16


@pytest.mark.parametrize(
    ("branch", "what", "now"),
    [
        ("selected", "dk dv", "arithmetic"),
        ("selected", "dq", "cache"),
        ("compressed", "dq", "cache"),
        ("window", "forward", "cache"),
    ],
)
def test_shared_memory_bound_four_kernels_until_operands_were_held(
    works, monkeypatch, branch, what, now
):
    assert bound_by(works[branch][what], DEVICE) == now
    monkeypatch.setattr(counts, "tile_sizes", lambda kernel, width, dtype: UNHELD[kernel])
    assert bound_by(counts.works(PAPER)[branch][what], DEVICE) == "shared"


# --- the tiles that the kernels walk: one by one here, and as the interpreter runs them ---


def keys_seen(keys, count, t):
    """How many of `count` keys end at or before token t."""
    return min(max(t + 1 - keys.block_size + keys.stride, 0) // keys.stride, count)


def key_tiles(keys, length, step, N):
    """Tiles of N keys that the boxes of `step` tokens load, all together."""
    count = num_compressed(length, keys.block_size, keys.stride)
    loaded = 0
    for first in range(0, length, step):
        last = min(first + step, length) - 1
        low = 0 if keys.window is None else max(first - keys.window + 1, 0) // N
        loaded += max(-(-keys_seen(keys, count, last) // N) - low, 0)
    return loaded


def token_steps(keys, length, step, N):
    """Steps of so many tokens that the tiles of N keys take, from the first that sees one."""
    taken = 0
    for key in range(0, num_compressed(length, keys.block_size, keys.stride), N):
        end = key * keys.stride + keys.block_size - 1
        stop = length if keys.window is None else end + (N - 1) * keys.stride + keys.window
        taken += max(-(-min(stop, length) // step) - end // step, 0)
    return taken


def flash_tiles(sizes, keys):
    """(tiles, pairs of a tile) by kernel, in one group."""
    found = {}
    for what in ("forward", "dq", "dk dv"):
        tile = sizes.tile(row_name(f"flash_{what.replace(' ', '')}", keys.window))
        heads, step = row_tile(sizes.config.group_size, tile.BLOCK_M)
        walk = token_steps if what == "dk dv" else key_tiles
        tiles = walk(keys, sizes.length, step, tile.BLOCK_N)
        found[what] = tiles, heads * step * tile.BLOCK_N
    return found


def score_programs(sizes):
    """Programs of block_scores that do not end at once, in one group."""
    tile, config = sizes.tile("block_scores"), sizes.config
    blocks = num_select_blocks(sizes.length, config.select_block_size)
    J = blocks_in_a_tile(tile.BLOCK_N, config.select_block_size, config.stride)
    return sum(
        first * config.select_block_size <= token + tile.BLOCK_M - 1
        for first in range(0, blocks, J)
        for token in range(0, sizes.length, tile.BLOCK_M)
    )


RAW = Keys(1, 1, None)
WINDOW = Keys(1, 1, 512)
COMPRESSED = Keys(32, 16, None)


@pytest.mark.parametrize("length", [8192, 65536])
@pytest.mark.parametrize("width", [128, 160, 192, 256])
@pytest.mark.parametrize(("heads", "groups"), [(64, 4), (32, 8)])
def test_the_average_tiles_are_those_of_the_walks(length, width, heads, groups):
    """Within 1%: a sequence has ends, where a walk is shorter than the average."""
    sizes = Sizes(NSAConfig(heads=heads, kv_heads=groups, head_dim=width), length)
    works = counts.works(sizes)
    wide = {128: 128, 160: 192, 192: 192, 256: 256}[width]  # 192 columns in pieces, none padded
    numbers = {"forward": wide + 128, "dq": 2 * wide + 128, "dk dv": 2 * wide + 2 * 128}
    for branch, keys in {"dense": RAW, "window": WINDOW, "compressed": COMPRESSED}.items():
        for what, (tiles, pairs) in flash_tiles(sizes, keys).items():
            walked = 2 * groups * tiles * pairs * numbers[what]
            assert works[branch][what].executed == pytest.approx(walked, rel=0.01), (branch, what)
    tile = sizes.tile("block_scores")
    walked = score_programs(sizes) * heads * tile.BLOCK_M * tile.BLOCK_N * 2 * wide
    assert works["selection"]["scores"].executed == pytest.approx(walked, rel=0.01)


INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="counts interpreted calls")


@pytest.fixture
def calls(monkeypatch):
    """How often each function of a tile is called, by name."""
    made = {}

    def count(module, name):
        call = getattr(module, name)

        def counting(*args, **keywords):
            made[name] = made.get(name, 0) + 1
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
    return made


def inputs(sizes, keys):
    config = sizes.config
    make = torch.Generator().manual_seed(0)
    shapes = [
        (config.heads, sizes.length, config.head_dim),
        (config.kv_heads, keys, config.head_dim),
        (config.kv_heads, keys, config.value_dim),
    ]
    return [torch.randn(1, *shape, generator=make).requires_grad_() for shape in shapes]


SCORED = ("fold_in", "score_gradient", "score_gradient_by_key")


@INTERPRETED
@pytest.mark.parametrize("length", [70, 96])
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("group", [1, 3])
def test_the_flash_kernels_walk_these_tiles(calls, length, window, group):
    sizes = Sizes(NSAConfig.small(heads=group, kv_heads=1), length, dtype=torch.float32)
    q, k, v = inputs(sizes, length)
    kernels.window_attention(q, k, v, window=window).sum().backward()
    tiles = [tiles for tiles, _ in flash_tiles(sizes, Keys(1, 1, window)).values()]
    assert [calls[name] for name in SCORED] == tiles


@INTERPRETED
@pytest.mark.parametrize(("length", "window", "error"), [(256, None, 0), (1024, 32, 0.02)])
def test_the_flash_kernels_walk_the_counted_tiles(calls, length, window, error):
    """Exact under a causal mask, and with a window but for the beginning and the end."""
    sizes = Sizes(NSAConfig.small(heads=2, kv_heads=1), length, dtype=torch.float32)
    q, k, v = inputs(sizes, length)
    kernels.window_attention(q, k, v, window=window).sum().backward()
    seen = sum(min(t + 1, window or length) for t in range(length))
    counted = counts.flash(sizes, Keys(1, 1, window), seen)
    walked = flash_tiles(sizes, Keys(1, 1, window))
    for name, (what, (_, pairs)) in zip(SCORED, walked.items(), strict=True):
        operations = 2 * calls[name] * pairs * sizes.numbers(KERNELS[what].products)
        assert counted[what].executed == pytest.approx(operations, rel=error), what


@INTERPRETED
def test_the_compressed_branch_walks_these_tiles(calls):
    sizes = Sizes(NSAConfig.small(heads=3, kv_heads=1), 150, dtype=torch.float32)
    q, k, v = inputs(sizes, 36)  # (150 - 8) // 4 + 1
    kernels.compressed_attention(q, k, v, block_size=8, stride=4)[0].sum().backward()
    tiles = [tiles for tiles, _ in flash_tiles(sizes, Keys(8, 4, None)).values()]
    assert [calls[name] for name in SCORED] == tiles


@INTERPRETED
def test_the_selected_branch_walks_the_counted_blocks(calls):
    config = NSAConfig.small(heads=4, kv_heads=1, select_block_size=16, num_selected=3)
    sizes = Sizes(config, 96, dtype=torch.float32)
    q, k, v = inputs(sizes, 96)
    j, t = torch.arange(6), torch.arange(96)[:, None]
    legal = (j * 16 <= t).expand(1, 1, 96, 6)
    ids = (torch.rand(legal.shape) * legal).topk(3).indices
    ids = ids.masked_fill(~legal.gather(-1, ids), -1)
    union = union_of(ids, 16, 6).counts.float().mean().item()
    kernels.selected_attention(q, k, v, ids, select_block_size=16).sum().backward()
    works = counts.selected(sizes, pairs=0, union=union)
    rows = {"forward": 64, "dq": 64, "dk dv": 16}  # 16 tokens x 4 heads, 4 readers x 4 heads
    a_tile = {what: 2 * rows[what] * 16 * sizes.numbers(KERNELS[what].products) for what in KERNELS}
    for name, what in {"fold_in": "forward", "score_gradient": "dq"}.items():
        assert calls[name] == pytest.approx(works[what].executed / a_tile[what])
    steps = works["dk dv"].executed / a_tile["dk dv"]
    assert 4 * steps == (ids >= 0).sum()
    lists = [(ids == block).sum().item() for block in range(6)]
    assert calls["score_gradient_by_key"] == sum(-(-readers // 4) for readers in lists)


@INTERPRETED
@pytest.mark.parametrize("length", [50, 550])
def test_the_scores_are_made_by_these_programs(calls, length):
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
    assert calls["load_tile"] == score_programs(sizes)  # one tile of q a program
