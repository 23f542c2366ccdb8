"""Each operation against the loops beside the paper, PyTorch's own attention, and itself in limits.

All in float64 to 1e-10 unless the dtype is the point.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_lite import (
    block_importance,
    choose_blocks,
    compressed_attention,
    dense_attention,
    loops,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa_lite.blocks import num_compressed, num_select_blocks

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
SOME = settings(max_examples=25, deadline=None, derandomize=True)
BLOCKS = dict(block_size=4, stride=2)
CHOICE = dict(**BLOCKS, select_block_size=4, num_selected=4)


@st.composite
def cases(draw, longest=24):
    """Sizes of one call: B, G, R, T, D, Dv, (l, d, l'), a seed and a scale."""
    stride = draw(st.integers(1, 3))
    block = draw(st.integers(1, 3))
    select = draw(st.integers(block, 5))
    sizes = dict(
        batch=draw(st.integers(1, 3)),
        groups=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 16)),
        length=draw(st.integers(1, longest)),
        width=draw(st.integers(1, 5)),
        value=draw(st.integers(1, 5)),
    )
    blocks = dict(block_size=block * stride, stride=stride)
    scale = draw(st.sampled_from([None, 0.01, 0.7]))
    return sizes, blocks, select * stride, scale, draw(st.integers(0, 999))


def tensors(  # noqa: PLR0913  one for each size
    seed=0,
    *,
    batch=2,
    groups=2,
    heads=3,
    length=23,
    keys=None,
    width=4,
    value=3,
    dtype=torch.float64,
):
    """q, k, v with strides of three other kinds than contiguous; `heads` is R, per group."""
    make = torch.Generator().manual_seed(seed)
    keys = length if keys is None else keys
    q = torch.randn(batch, length, groups * heads, width, generator=make, dtype=torch.float64)
    k = torch.randn(batch, groups, 2 * keys, width, generator=make, dtype=torch.float64)
    v = torch.randn(value, batch, groups, keys, generator=make, dtype=torch.float64)
    q, k, v = q.to(dtype).transpose(1, 2), k.to(dtype)[:, :, ::2], v.to(dtype)
    return q, k, v.permute(1, 2, 3, 0)


def compressed_tensors(seed, blocks, **sizes):
    """q and as many random compressed keys and values as the sequence has whole blocks."""
    return tensors(seed, keys=num_compressed(sizes["length"], **blocks), **sizes)


@SOME
@given(cases(), st.one_of(st.none(), st.integers(1, 30)))
def test_window_attention_equals_its_loop(case, window):
    sizes, _, _, scale, seed = case
    qkv = tensors(seed, **sizes)
    expected = loops.window_attention(*qkv, window=window, scale=scale)
    close(window_attention(*qkv, window=window, scale=scale), expected)


@SOME
@given(cases())
def test_compressed_attention_equals_its_loop(case):
    sizes, blocks, _, scale, seed = case
    qkv = compressed_tensors(seed, blocks, **sizes)
    expected = loops.compressed_attention(*qkv, **blocks, scale=scale)
    close(compressed_attention(*qkv, **blocks, scale=scale), expected)


@settings(SOME, max_examples=15)
@given(cases(longest=16))
def test_block_importance_equals_its_loop(case):
    sizes, blocks, select, scale, seed = case
    q, k, v = compressed_tensors(seed, blocks, **sizes)
    lse = compressed_attention(q, k, v, **blocks, scale=scale)[1]
    blocks = dict(**blocks, select_block_size=select, scale=scale)
    close(block_importance(q, k, lse, **blocks), loops.block_importance(q, k, lse, **blocks))


@SOME
@given(cases(), st.integers(0, 2), st.integers(0, 3), st.integers(0, 3))
def test_choose_blocks_equals_its_loop(case, initial, local, free):
    sizes, _, select, _, seed = case
    blocks = num_select_blocks(sizes["length"], select)
    score = torch.rand(
        sizes["batch"],
        sizes["groups"],
        sizes["length"],
        blocks,
        generator=torch.Generator().manual_seed(seed),
    )
    score = (score * 4).round()  # many ties
    choice = dict(
        select_block_size=select,
        num_selected=max(1, initial + local + free),
        num_initial=initial,
        num_local=local,
    )
    assert torch.equal(choose_blocks(score, **choice), loops.choose_blocks(score, **choice))


@SOME
@given(cases(), st.integers(1, 5))
def test_selected_attention_equals_its_loop(case, count):
    sizes, _, select, scale, seed = case
    qkv = tensors(seed, **sizes)
    blocks = num_select_blocks(sizes["length"], select)
    order = torch.rand(
        sizes["batch"],
        sizes["groups"],
        sizes["length"],
        blocks + count,
        generator=torch.Generator().manual_seed(seed),
    ).argsort(-1)[..., :count]
    ids = order.masked_fill(order >= blocks, -1).int()  # any order, -1 anywhere, later blocks too
    expected = loops.selected_attention(*qkv, ids, select_block_size=select, scale=scale)
    close(selected_attention(*qkv, ids, select_block_size=select, scale=scale), expected)


@pytest.mark.parametrize("length", [1, 7, 16, 23])
def test_dense_attention_equals_pytorchs(length):
    q, k, v = tensors(length=length)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    close(dense_attention(q, k, v), expected)


@pytest.mark.parametrize("window", [1, 4, 5, 22])
def test_window_attention_equals_pytorchs_with_a_band_mask(window):
    q, k, v = tensors(length=23)
    band = torch.ones(23, 23, dtype=torch.bool).tril().triu(1 - window)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=band, enable_gqa=True)
    close(window_attention(q, k, v, window=window), expected)


def test_compressed_attention_equals_pytorchs_where_a_block_is_visible():
    q, k, v = compressed_tensors(0, BLOCKS, length=23)
    seen = torch.tensor([[2 * i + 3 <= t for i in range(k.shape[2])] for t in range(3, 23)])
    expected = F.scaled_dot_product_attention(q[:, :, 3:], k, v, attn_mask=seen, enable_gqa=True)
    close(compressed_attention(q, k, v, **BLOCKS)[0][:, :, 3:], expected)


@pytest.mark.parametrize("length", [1, 3, 15, 16])
def test_selection_is_dense_while_all_blocks_fit_in_n(length):
    q, k, v = tensors(length=length)
    short, values = compressed_tensors(1, BLOCKS, length=length)[1:]
    lse = compressed_attention(q, short, values, **BLOCKS)[1]
    ids = select_blocks(q, short, lse, **CHOICE)  # n l' = 16
    close(selected_attention(q, k, v, ids, select_block_size=4), dense_attention(q, k, v))


def test_selection_is_a_proper_subset_once_blocks_do_not_fit():
    q, k, v = tensors(length=24)
    short, values = compressed_tensors(1, BLOCKS, length=24)[1:]
    lse = compressed_attention(q, short, values, **BLOCKS)[1]
    ids = select_blocks(q, short, lse, **CHOICE)
    assert (ids[:, :, 16:] >= 0).sum(-1).unique().tolist() == [4]  # of the 5 and 6 begun
    difference = selected_attention(q, k, v, ids, select_block_size=4) - dense_attention(q, k, v)
    assert difference[:, :, :16].abs().max() < 1e-10
    assert difference[:, :, 16:].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("window", [23, 24, 1000])
def test_a_window_as_long_as_the_sequence_is_dense(window):
    qkv = tensors(length=23)
    close(window_attention(*qkv, window=window), dense_attention(*qkv))
    assert not torch.allclose(window_attention(*qkv, window=22), dense_attention(*qkv))


def test_compression_with_blocks_of_one_token_and_identity_phi_is_dense():
    qkv = tensors(length=23)
    close(compressed_attention(*qkv, block_size=1, stride=1)[0], dense_attention(*qkv))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_differs_by_the_rounding_of_the_result_only(dtype, rounding):
    near = partial(torch.testing.assert_close, rtol=rounding, atol=1e-6)
    half = tensors(length=23, dtype=dtype)
    full = tuple(x.float() for x in half)
    near(window_attention(*half, window=5).float(), window_attention(*full, window=5))
    ids = choose_blocks(torch.rand(2, 2, 23, 6), select_block_size=4, num_selected=4)
    chosen = [selected_attention(*x, ids, select_block_size=4) for x in (half, full)]
    near(chosen[0].float(), chosen[1])
    half = compressed_tensors(0, BLOCKS, length=23, dtype=dtype)
    full = tuple(x.float() for x in half)
    (out, lse), (expected, expected_lse) = (
        compressed_attention(*x, **BLOCKS) for x in (half, full)
    )
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    near(out.float(), expected)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)
    ids = [select_blocks(*x[:2], lse, **CHOICE) for x in (half, full)]
    assert torch.equal(*ids)


@pytest.mark.parametrize("start", [1, 3, 4, 13, 22])
def test_the_newest_queries_over_a_cache_equal_the_rows_of_the_prefill(start):
    q, k, v = tensors(length=23)
    short, values = compressed_tensors(1, BLOCKS, length=23)[1:]
    late = q[:, :, start:]
    for window in (None, 5):
        expected = window_attention(q, k, v, window=window)[:, :, start:]
        close(window_attention(late, k, v, window=window, start=start), expected)
    out, lse = compressed_attention(q, short, values, **BLOCKS)
    late_out, late_lse = compressed_attention(late, short, values, **BLOCKS, start=start)
    close((late_out, late_lse), (out[:, :, start:], lse[:, :, start:]))
    ids = select_blocks(q, short, lse, **CHOICE)
    late_ids = select_blocks(late, short, late_lse, **CHOICE, start=start)
    assert torch.equal(late_ids, ids[:, :, start:])
    expected = selected_attention(q, k, v, ids, select_block_size=4)[:, :, start:]
    close(selected_attention(late, k, v, late_ids, select_block_size=4, start=start), expected)


@pytest.mark.parametrize("length", [3, 9])  # 3: not one whole block
def test_a_query_that_sees_no_block_gives_0_with_gradient_0_and_lse_minus_infinity(length):
    q, k, v = (x.clone().requires_grad_() for x in compressed_tensors(0, BLOCKS, length=length))
    out, lse = compressed_attention(q, k, v, **BLOCKS)
    assert torch.equal(out[:, :, :3], torch.zeros_like(out[:, :, :3]))
    assert (lse[:, :, :3] == -torch.inf).all()
    assert lse[:, :, 3:].isfinite().all()
    (out.sum() + lse[:, :, 3:].sum()).backward()
    assert torch.equal(q.grad[:, :, :3], torch.zeros_like(q.grad[:, :, :3]))
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert length == 3 or q.grad[:, :, 4:].abs().amax(-1).min() > 0  # row 3 sees one key: p = 1


def test_a_query_with_no_selected_block_gives_0_with_gradient_0():
    q, k, v = (x.clone().requires_grad_() for x in tensors(length=9))
    ids = torch.full((2, 2, 9, 2), -1)
    ids[:, :, 8, 0] = 1
    out = selected_attention(q, k, v, ids, select_block_size=4)
    out.sum().backward()
    for x in (out, q.grad):
        assert torch.equal(x[:, :, :8], torch.zeros_like(x[:, :, :8]))
        assert x[:, :, 8].abs().min() > 0
    assert torch.equal(k.grad[:, :, 8:], torch.zeros_like(k.grad[:, :, 8:]))
    assert k.grad[:, :, 4:8].abs().min() > 0


@SOME
@given(cases())
def test_importances_sum_to_l_over_d_for_each_head(case):
    sizes, blocks, select, scale, seed = case
    q, k, v = compressed_tensors(seed, blocks, **sizes)
    lse = compressed_attention(q, k, v, **blocks, scale=scale)[1]
    total = block_importance(q, k, lse, **blocks, select_block_size=select, scale=scale).sum(-1)
    share = sizes["heads"] * blocks["block_size"] / blocks["stride"]
    blind = min(sizes["length"], blocks["block_size"] - 1)
    close(total[:, :, :blind], torch.zeros_like(total[:, :, :blind]))
    close(total[:, :, blind:], torch.full_like(total[:, :, blind:], share))
