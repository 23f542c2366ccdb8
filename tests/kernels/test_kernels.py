"""The kernels against nsa_lite in float64: on a CPU interpreted, on a GPU compiled.

Every input lies inside a larger buffer of NaN, and every buffer that a kernel is to fill starts as
NaN, so that a read or an omission outside the mask shows.
"""

from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import jaxtyped

import kernels
import nsa_lite
from kernels import block_sparse_attention, descriptors, flash_attention, importance
from kernels.tile_sizes import FLOAT32, HALF, WIDE, WIDEST
from nsa_lite.blocks import num_compressed, num_select_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SOME = settings(max_examples=12, deadline=None, derandomize=True)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def hold_signatures_to_their_word(monkeypatch):
    """Every call of a public function is checked against the shapes and types of its signature."""
    if find_spec("beartype") is None:
        return
    for name in kernels.__all__:
        checked = jaxtyped(getattr(kernels, name), typechecker=import_module("beartype").beartype)
        monkeypatch.setattr(kernels, name, checked)


@pytest.fixture(autouse=True)
def poison_new_buffers():
    """torch.empty gives NaN (the largest number, for ints) as long as a test runs."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@st.composite
def sizes(draw, longest=40):
    stride = draw(st.sampled_from([1, 2, 4]))
    block = stride * draw(st.integers(1, 3))
    select = -(-block // stride) * stride * draw(st.integers(1, 3))
    return {
        "B": draw(st.integers(1, 2)),
        "G": draw(st.integers(1, 2)),
        "R": draw(st.sampled_from([1, 2, 3, 5, 16])),
        "T": draw(st.integers(1, longest)),
        "D": draw(st.sampled_from([16, 20, 32])),
        "Dv": draw(st.sampled_from([16, 24, 40])),
        "l": block,
        "d": stride,
        "L": select,
        "start": draw(st.sampled_from([0, 0, 9])),
        "seed": draw(st.integers(0, 99)),
    }


def inside_nan(*shape, dtype, make):
    """A random tensor that is a strided view into a buffer of NaN."""
    buffer = torch.full([shape[0], shape[2] + 5, shape[1], shape[3] + 7], torch.nan)
    view = buffer[:, 2 : 2 + shape[2], :, 3 : 3 + shape[3]].transpose(1, 2)
    view.copy_(torch.randn(shape, generator=make))
    buffer = buffer.to(DEVICE, dtype)
    return buffer[:, 2 : 2 + shape[2], :, 3 : 3 + shape[3]].transpose(1, 2)


def tensors(c, dtype=torch.float32, keys=None):
    """q, k, v of a case; as many keys as positions unless `keys` says otherwise."""
    make = torch.Generator().manual_seed(c["seed"])
    keys = c["start"] + c["T"] if keys is None else keys
    q = inside_nan(c["B"], c["G"] * c["R"], c["T"], c["D"], dtype=dtype, make=make)
    k = inside_nan(c["B"], c["G"], keys, c["D"], dtype=dtype, make=make)
    return q, k, inside_nan(c["B"], c["G"], keys, c["Dv"], dtype=dtype, make=make)


def short(c, dtype=torch.float32):
    """q and the compressed k, v of a case."""
    return tensors(c, dtype, keys=num_compressed(c["start"] + c["T"], c["l"], c["d"]))


def case(**changes):
    plain = {
        "B": 1,
        "G": 1,
        "R": 4,
        "T": 30,
        "D": 16,
        "Dv": 16,
        "l": 8,
        "d": 4,
        "L": 8,
        "start": 0,
        "seed": 0,
    }
    return {**plain, **changes}


def run(operation, inputs, seed=0):
    """Outputs (a tuple) and the inputs' gradients under a random loss on all finite outputs."""
    make = torch.Generator().manual_seed(seed)
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = operation(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    loss = 0
    for x in out:
        weight = torch.randn(x.shape, generator=make).to(x)
        loss = loss + (x.masked_fill(x == -torch.inf, 0) * weight).sum()
    loss.backward()
    return [x.detach() for x in out], [x.grad for x in inputs]


def assert_alike(got, expected, tolerance):
    """Equal infinities and nothing else that is not finite; the rest by relative norm."""
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        x, y = x.double().cpu(), y.double().cpu()
        assert torch.equal(x == -torch.inf, y == -torch.inf)
        x, y = x.masked_fill(x == -torch.inf, 0), y.masked_fill(y == -torch.inf, 0)
        assert x.isfinite().all()
        # A gradient that is 0 by cancellation (one key: p = 1) is compared absolutely.
        assert (x - y).norm() <= tolerance * max(y.norm(), 0.1 * y.numel() ** 0.5)


def compare(name, inputs, tolerance=TOLERANCE[torch.float32], ids=None, **options):
    """Run kernels and nsa_lite (in float64), forward and backward."""
    rest = () if ids is None else (ids,)
    got = run(lambda *x: getattr(kernels, name)(*x, *rest, **options), inputs)
    wide = [x.double() for x in inputs]
    expected = run(lambda *x: getattr(nsa_lite, name)(*x, *rest, **options), wide)
    assert_alike(got[0] + got[1], expected[0] + expected[1], tolerance)


def random_ids(c, n, seed=0):
    """n legal blocks a query, ascending, then -1; not always the own one."""
    blocks = num_select_blocks(c["start"] + c["T"], c["L"])
    make = torch.Generator().manual_seed(seed)
    score = torch.rand(c["B"], c["G"], c["T"], blocks, generator=make)
    return nsa_lite.choose_blocks(
        score,
        select_block_size=c["L"],
        num_selected=n,
        num_initial=0,
        num_local=0,
        start=c["start"],
    ).to(DEVICE)


def choice(c, n=4, **more):
    return dict(
        block_size=c["l"],
        stride=c["d"],
        select_block_size=c["L"],
        num_selected=n,
        start=c["start"],
        **more,
    )


@SOME
@given(sizes(), st.sampled_from([None, 1, 7, 33]))
def test_window(c, window):
    compare("window_attention", tensors(c), window=window, start=c["start"])


@SOME
@given(sizes())
def test_compressed_with_the_gradient_of_its_lse(c):
    compare("compressed_attention", short(c), block_size=c["l"], stride=c["d"], start=c["start"])


def test_compressed_keys_may_end_early():
    """Blocks that nobody passed are not read, though the last queries could see them."""
    q, k, v = short(case(T=40))
    for keys in (1, 3, 5):
        compare("compressed_attention", (q, k[:, :, :keys], v[:, :, :keys]), block_size=8, stride=4)


@SOME
@given(sizes(), st.integers(1, 7))
def test_selected(c, n):
    compare(
        "selected_attention",
        tensors(c),
        ids=random_ids(c, n),
        select_block_size=c["L"],
        start=c["start"],
    )


@SOME
@given(sizes(longest=70), st.integers(3, 7))
def test_select_blocks_in_float32_is_the_reference_exactly(c, n):
    q, k, _ = short(c)
    blocks = {"block_size": c["l"], "stride": c["d"], "start": c["start"]}
    lse = nsa_lite.compressed_attention(q, k, k, **blocks)[1]
    got = kernels.select_blocks(q, k, lse, **choice(c, n))
    assert got.dtype == torch.int32
    assert torch.equal(got, nsa_lite.select_blocks(q, k, lse, **choice(c, n)))


@pytest.mark.parametrize("start", [0, 9])
def test_select_blocks_holds_the_scores_of_some_queries_at_a_time(start, monkeypatch):
    c = case(T=300, start=start)
    q, k, _ = short(c)
    blocks = {"block_size": c["l"], "stride": c["d"], "start": c["start"]}
    lse = nsa_lite.compressed_attention(q, k, k, **blocks)[1]
    whole = kernels.select_blocks(q, k, lse, **choice(c))
    held = []
    best_blocks = importance.best_blocks

    def watched(score, *rest):
        held.append(score.numel())
        return best_blocks(score, *rest)

    monkeypatch.setattr(importance, "best_blocks", watched)
    rows = 2 * k.shape[0] * k.shape[1]
    most = rows * 200 * num_select_blocks(start + 300, c["L"])  # 200 queries: one stretch of 128
    monkeypatch.setattr(importance, "MOST_SCORES", most)
    assert torch.equal(kernels.select_blocks(q, k, lse, **choice(c)), whole)
    assert len(held) == 3 and max(held) <= most
    assert [len(part) for part in importance.stretches(300, rows, start, c["L"])] == [128, 128, 44]
    assert importance.stretches(0, rows, start, c["L"]) == [range(0)]


@pytest.mark.parametrize("initial, local", [(0, 0), (0, 2), (3, 0)])
def test_select_blocks_with_other_forced_blocks(initial, local):
    c = case(T=300, start=9)
    q, k, _ = short(c)
    blocks = {"block_size": c["l"], "stride": c["d"], "start": c["start"]}
    lse = nsa_lite.compressed_attention(q, k, k, **blocks)[1]
    options = choice(c, 5, num_initial=initial, num_local=local)
    got, expected = (x.select_blocks(q, k, lse, **options) for x in (kernels, nsa_lite))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("length", [31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_masks_at_tile_edges(length):
    """One head a group: a row is a token, so that tiles end at these lengths."""
    assert {FLOAT32["flash_forward"].BLOCK_M, FLOAT32["flash_dq"].BLOCK_M} == {64, 32}
    c = case(R=1, T=length)
    compare("window_attention", tensors(c), window=32)
    compare("window_attention", tensors(c), window=33)
    compare("compressed_attention", short(case(R=1, T=length, l=2, d=1)), block_size=2, stride=1)


@pytest.mark.parametrize("heads", [6, 17, 64])
def test_group_sizes_that_do_not_fill_a_tile(heads):
    c = case(R=heads, T=9, G=2)
    compare("window_attention", tensors(c), window=5)
    compare("selected_attention", tensors(c), ids=random_ids(c, 2), select_block_size=8)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 8, 16])
def test_groups_of_every_size_share_unions_and_products(heads):
    """More tokens than share a program, and lists of readers that no step divides."""
    c = case(R=heads, T=37, G=2, D=24)
    compare("selected_attention", tensors(c), ids=random_ids(c, 3), select_block_size=8)


@pytest.mark.parametrize("heads", [1, 4, 16])
def test_more_rows_a_program_give_the_same(heads, monkeypatch):
    c = case(R=heads, T=37)
    ids = random_ids(c, 3)
    for name in ("selected_forward", "selected_dq"):
        monkeypatch.setitem(FLOAT32, name, FLOAT32[name].with_rows(128))
    several = replace(FLOAT32["selected_dkdv_small"], BLOCK_M=32)
    monkeypatch.setitem(FLOAT32, "selected_dkdv_small", several)
    tokens = min(32, 128 // heads)
    assert block_sparse_attention.union_tile(heads, 128) == (max(heads, 2), tokens)
    compare("selected_attention", tensors(c), ids=ids, select_block_size=8)


@pytest.mark.parametrize("heads", [4, 16])
def test_tokens_behind_change_no_bit_of_the_selected_branch(heads, monkeypatch):
    """Padding with finite garbage, which chooses real blocks: outputs and gradients stay."""
    monkeypatch.setattr(block_sparse_attention, "CHUNK", 12)
    real, c = 21, case(R=heads, T=38)
    ids = random_ids(c, 3)
    inputs = [x.contiguous() for x in tensors(c)]
    found = []
    for length in (real, c["T"]):
        leaves = [x[:, :, :length].clone().requires_grad_() for x in inputs]
        out = kernels.selected_attention(*leaves, ids[:, :, :length], select_block_size=8)
        out[:, :, :real].square().sum().backward()
        found.append([x[:, :, :real] for x in (out, *(leaf.grad for leaf in leaves))])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize(
    "width, value", [(192, 128), (96, 96), (160, 192), (70, 180), (100, 256), (256, 16)]
)
def test_widths_in_one_piece_and_in_three(width, value):
    c = case(D=width, Dv=value, T=13, R=2, l=4, d=2)
    compare("window_attention", tensors(c), window=9)
    compare("compressed_attention", short(c), block_size=4, stride=2)
    compare("selected_attention", tensors(c), ids=random_ids(c, 2), select_block_size=8)


@pytest.mark.parametrize("width", [96, 160, 192])
def test_select_blocks_with_keys_in_three_pieces(width):
    c = case(D=width, T=40, R=2)
    q, k, _ = short(c)
    lse = nsa_lite.compressed_attention(q, k, k, block_size=8, stride=4)[1]
    got, expected = (x.select_blocks(q, k, lse, **choice(c, 4)) for x in (kernels, nsa_lite))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("width, value", [(192, 128), (160, 96)])
def test_the_last_piece_ends_where_the_row_does(width, value):
    """Rows that the copy engine takes as they lie: what follows in memory is the next row's NaN."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.full([1, heads, 10, 288], torch.nan, device=DEVICE)[..., :columns].copy_(
            torch.randn(1, heads, 10, columns, generator=make)
        )
        for heads, columns in ((2, width), (1, width), (1, value))
    )
    assert descriptors.aligned(k) is k
    compare("window_attention", (q, k, v))


@pytest.mark.parametrize("select", [16, 24, 64, 128])
def test_block_sizes(select):
    c = case(T=2 * select + 3, L=select, R=2)
    compare("selected_attention", tensors(c), ids=random_ids(c, 2), select_block_size=select)


def test_selecting_every_block_is_dense_attention():
    c = case(T=37)
    q, k, v = tensors(c)
    ids = random_ids(c, 5)
    assert (ids[:, :, -1] >= 0).all()
    selected = run(lambda *x: kernels.selected_attention(*x, ids, select_block_size=8), (q, k, v))
    dense = run(kernels.window_attention, (q, k, v))
    assert_alike(selected[0] + selected[1], dense[0] + dense[1], 1e-6)


def test_long_lists_and_walks_are_cut_and_added_up(monkeypatch):
    """Pieces so small that every list of readers, and the rows of every key tile, need several."""
    monkeypatch.setattr(block_sparse_attention, "CHUNK", 8)
    monkeypatch.setattr(flash_attention, "SHORTEST", 5)
    c = case(B=2, G=2, T=50)
    compare("selected_attention", tensors(c), ids=random_ids(c, 3), select_block_size=8)
    compare("compressed_attention", short(c), block_size=8, stride=4)
    compare("window_attention", tensors(c), window=20)


def test_no_key_seen_gives_exactly_zero_and_no_gradient():
    c = case(T=7, l=8)
    (out, lse), grads = run(
        lambda *x: kernels.compressed_attention(*x, block_size=8, stride=4), short(c)
    )
    assert (out == 0).all() and (lse == -torch.inf).all()
    nothing = torch.full((1, 1, 7, 3), -1, device=DEVICE)
    (selected,), more = run(
        lambda *x: kernels.selected_attention(*x, nothing, select_block_size=8), tensors(c)
    )
    assert (selected == 0).all()
    assert all((x == 0).all() for x in grads + more)


def test_expanded_tensors_are_read_as_if_they_were_not():
    """Strides of 0, which the copy engine does not take: keys of one head, a gradient of a mean."""
    c = case(G=2, D=32, Dv=32)
    q, k, v = tensors(c)
    one = [x[:, :1].expand(-1, 2, -1, -1) for x in (k, v)]
    copies = [x.contiguous() for x in one]
    some = {"ids": random_ids(c, 3), "select_block_size": 8}
    for name, options in {"window_attention": {"window": 9}, "selected_attention": some}.items():
        got, expected = [], []
        for keys, into in ((one, got), (copies, expected)):
            leaves = [x.detach().requires_grad_() for x in (q, *keys)]
            out = getattr(kernels, name)(*leaves, **options)
            dout = torch.ones(1, 1, 1, 32, device=DEVICE).expand(out.shape)
            into += [out.detach(), *torch.autograd.grad(out, leaves, dout)]
        assert_alike(got, expected, 1e-6)


def test_an_id_outside_the_sequence_is_padding():
    c = case(T=20)
    ids = random_ids(c, 2)
    wrong = torch.where(ids < 0, 99, ids)
    q, k, v = tensors(c)
    got = run(lambda *x: kernels.selected_attention(*x, wrong, select_block_size=8), (q, k, v))
    right = run(lambda *x: kernels.selected_attention(*x, ids, select_block_size=8), (q, k, v))
    for x, y in zip(got[0] + got[1], right[0] + right[1], strict=True):
        assert torch.equal(x, y)


def test_later_tokens_change_nothing_before_them():
    c, cut = case(T=40), 21
    (q, k, v), (q_, k_, v_) = tensors(c), tensors(case(T=40, seed=1))
    ids = random_ids(c, 3)
    mixed = [
        torch.cat([x[:, :, :cut], 100 * y[:, :, cut:]], 2) for x, y in ((q, q_), (k, k_), (v, v_))
    ]
    for operation in (
        lambda *x: kernels.window_attention(*x, window=9),
        lambda *x: kernels.window_attention(*x),
        lambda *x: kernels.selected_attention(*x, ids, select_block_size=8),
    ):
        assert torch.equal(operation(q, k, v)[:, :, :cut], operation(*mixed)[:, :, :cut])


def test_ties_go_to_the_lower_id_and_nan_scores_do_not_spread():
    c = case(T=64)
    q, k, _ = short(c)
    lse = nsa_lite.compressed_attention(q * 0, k, k, block_size=8, stride=4)[1]
    ids = kernels.select_blocks(q * 0, k, lse, **choice(c, 4))
    assert torch.equal(ids, nsa_lite.select_blocks(q * 0, k, lse, **choice(c, 4)))
    assert ids[0, 0, -1].tolist() == [0, 1, 6, 7]  # 0, 6, 7 are forced; 1 is the first of equals
    broken = kernels.select_blocks(q * torch.nan, k, lse, **choice(c, 4))
    assert broken[0, 0, -1].tolist() == [0, 1, 6, 7]


def test_two_runs_agree_bit_by_bit():
    c = case(B=2, G=2, T=50)
    for operation in (
        lambda *x: kernels.window_attention(*x, window=9),
        lambda *x: kernels.selected_attention(*x, random_ids(c, 3), select_block_size=8),
    ):
        one, two = run(operation, tensors(c)), run(operation, tensors(c))
        assert all(torch.equal(x, y) for x, y in zip(one[0] + one[1], two[0] + two[1], strict=True))


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_a_scale_reaches_every_branch(scale):
    c = case(T=40)
    compare("window_attention", tensors(c), scale=scale, window=9)
    compare("compressed_attention", short(c), block_size=8, stride=4, scale=scale)
    compare(
        "selected_attention", tensors(c), ids=random_ids(c, 3), select_block_size=8, scale=scale
    )
    q, k, _ = short(c)
    lse = nsa_lite.compressed_attention(q, k, k, block_size=8, stride=4, scale=scale)[1]
    assert torch.equal(
        kernels.select_blocks(q, k, lse, **choice(c), scale=scale),
        nsa_lite.select_blocks(q, k, lse, **choice(c), scale=scale),
    )


@pytest.mark.parametrize("width", [32, 192])
def test_half_precision(width):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # interpreted bf16 is refused
    c = case(T=40, D=width)
    compare("window_attention", tensors(c, dtype), TOLERANCE[dtype])
    compare(
        "selected_attention",
        tensors(c, dtype),
        TOLERANCE[dtype],
        ids=random_ids(c, 3),
        select_block_size=8,
    )


def test_gated_sum():
    make = torch.Generator().manual_seed(0)
    outputs = [inside_nan(2, 4, 9, 24, dtype=torch.float32, make=make) for _ in range(3)]
    gates = torch.rand(2, 4, 9, 3, generator=make).to(DEVICE)
    got = run(lambda g, *x: kernels.gated_sum(g, x), (gates, *outputs))
    wide = [x.double() for x in (gates, *outputs)]
    expected = run(lambda g, *x: nsa_lite.gated_sum(g, x), wide)
    assert_alike(got[0] + got[1], expected[0] + expected[1], 1e-6)


def compare_the_whole(c, window, closed=False):
    """One function, one dq for three branches and gates inside the kernels, against nsa_lite."""
    q, *raw = tensors(c)
    pairs = [short(c)[1:], raw, [x.flip(2) for x in raw]]
    gates = torch.rand(*q.shape[:3], 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    gates[..., 1] *= not closed  # a gate of 0 shuts a branch, and still learns
    inputs = [q, gates, *pairs[0], *pairs[1], *pairs[2]]

    def ours(q, gates, *kv):
        return kernels.nsa_attention(
            q, kv[:2], kv[2:4], kv[4:], gates, window_size=window, **choice(c)
        )

    def reference(q, gates, *kv):
        blocks = {"block_size": c["l"], "stride": c["d"], "start": c["start"]}
        out, lse = nsa_lite.compressed_attention(q, *kv[:2], **blocks)
        ids = nsa_lite.select_blocks(q, kv[0], lse, **choice(c))
        selected = nsa_lite.selected_attention(
            q, *kv[2:4], ids, select_block_size=c["L"], start=c["start"]
        )
        near = nsa_lite.window_attention(q, *kv[4:], window=window, start=c["start"])
        return nsa_lite.gated_sum(gates, (out, selected, near))

    got, expected = run(ours, inputs), run(reference, [x.double() for x in inputs])
    assert_alike(got[0] + got[1], expected[0] + expected[1], TOLERANCE[torch.float32])


@SOME
@given(sizes(), st.sampled_from([3, 17]), st.booleans())
def test_the_whole_is_its_parts(c, window, closed):
    compare_the_whole(c, window, closed)


@pytest.mark.parametrize("width, value", [(192, 128), (96, 160)])
def test_the_whole_of_keys_and_values_in_pieces(width, value):
    compare_the_whole(case(D=width, Dv=value, T=21, R=2), window=7)


def test_the_layer_is_the_same_on_both_backends():
    config = nsa_lite.NSAConfig.small()
    torch.manual_seed(0)
    layer = nsa_lite.NSAttention(config, backend="torch").to(DEVICE)
    other = nsa_lite.NSAttention(config, backend="triton").to(DEVICE)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 50, config.dim, device=DEVICE)
    (y, trace), (y_, trace_) = layer(x, return_trace=True), other(x, return_trace=True)
    assert torch.equal(trace.ids, trace_.ids)
    y.square().sum().backward()
    y_.square().sum().backward()
    assert_alike([y_], [y], 1e-5)
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        assert_alike([b.grad], [a.grad], 1e-4)
        b.grad = None
    y_ = other(x)  # without a trace the kernels run as one function
    y_.square().sum().backward()
    assert_alike([y_], [y], 1e-5)
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        assert_alike([b.grad], [a.grad], 1e-4)


def test_forward_and_dq_take_as_many_rows():
    """They walk over the same union."""
    for table in (HALF, WIDE, FLOAT32):
        assert table["selected_forward"].BLOCK_M == table["selected_dq"].BLOCK_M


def test_tiles_of_the_selected_branch_fill_the_matrix_unit():
    """64 rows with 32 neighbours at most, and never fewer than the 16 that a product takes."""
    tile = {R: block_sparse_attention.union_tile(R, 64) for R in (1, 2, 3, 4, 16, 17, 64)}
    assert tile[1] == (2, 32)
    assert tile[2] == (2, 32)
    assert tile[3] == tile[4] == (4, 16)
    assert tile[16] == (16, 4)
    assert tile[17] == (32, 2)
    assert tile[64] == (64, 1)
    for table in (HALF, WIDE, FLOAT32):
        for R in range(1, 65):
            row = table[block_sparse_attention.reader_row(R)]
            heads, together = block_sparse_attention.reader_tile(R, row.BLOCK_M)
            assert heads >= R and heads * together >= 16
            # A reader of 16 heads is a box, which the copy engine loads.
            assert (together == 1) == (heads >= 16)


@pytest.mark.parametrize("row", ["flash_dkdv", "flash_dkdv_window"])
def test_the_numbers_of_a_tile_fill_128_bytes(row):
    """The copy engine writes from whole 128 bytes on: 32 float32 at least, or it stops."""
    for table in (HALF, WIDE, WIDEST, FLOAT32):
        for R in range(1, 65):
            heads, tokens = flash_attention.row_tile(R, table[row].BLOCK_M)
            assert heads * tokens >= 32 and heads >= R
