"""One test for each pitfall of SPEC.md that plain PyTorch can fall into, by its number there.

Beside most tests stands a planted wrong version, which the same assertion must reject.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from nsa_lite import (
    NSAConfig,
    NSAttention,
    block_importance,
    choose_blocks,
    compressed_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa_lite.attention import masked_softmax

BLOCKS = dict(block_size=4, stride=2)
CHOICE = dict(**BLOCKS, select_block_size=4, num_selected=4)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tensors(length=24, keys=None, dtype=torch.float64, heads=4, groups=2):
    """q (1, 4, T, 6), k (1, 2, S, 6), v (1, 2, S, 3): D and Dv differ."""
    keys = length if keys is None else keys
    return (
        torch.randn(1, heads, length, 6).to(dtype),
        torch.randn(1, groups, keys, 6).to(dtype),
        torch.randn(1, groups, keys, 3).to(dtype),
    )


def selection(length=24):
    """The ids that random q and compressed k choose: 4 of up to 6 blocks."""
    q, k, v = tensors(length, keys=(length - 4) // 2 + 1)
    return select_blocks(q, k, compressed_attention(q, k, v, **BLOCKS)[1], **CHOICE)


def rejected(check, wrong):
    """The assertion in `check` can fail: it does so for a planted wrong version."""
    with pytest.raises(AssertionError):
        check(wrong)


def test_01_minus_infinity_minus_minus_infinity():
    def check(softmax):
        scores = torch.randn(3, 5, requires_grad=True)
        p = softmax(scores, torch.tensor([[True] * 5, [False] * 5, [True] + [False] * 4]))
        p.square().sum().backward()
        assert p[1].tolist() == [0] * 5
        assert scores.grad[1].tolist() == [0] * 5
        assert scores.grad.isfinite().all()

    check(lambda s, mask: masked_softmax(s, mask)[0])
    rejected(check, lambda s, mask: s.masked_fill(~mask, -math.inf).softmax(-1))


def test_02_a_finite_sentinel_leaks_mass():
    def check(attend):
        q, k = torch.full((1, 1, 4, 1), 300.0), torch.full((1, 1, 4, 1), -300.0)
        v = torch.tensor([1.0, 5, 5, 5])[None, None, :, None]
        assert attend(q, k, v)[0, 0, 0].item() == 1  # query 0 reads key 0 alone

    def sentinel(q, k, v):
        scores = (q @ k.mT).masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), -1e4)
        return scores.softmax(-1) @ v

    check(window_attention)
    check(lambda *qkv: window_attention(*qkv, window=2))
    check(lambda *qkv: compressed_attention(*qkv, block_size=1, stride=1)[0])
    ids = torch.zeros(1, 1, 4, 1, dtype=torch.int32)
    check(lambda *qkv: selected_attention(*qkv, ids, select_block_size=4))
    rejected(check, sentinel)


def test_03_a_nan_row_poisons_the_gate_even_when_the_gate_is_0():
    def check(spoil):
        gate = torch.zeros(1, 4, 24, 1, dtype=torch.float64, requires_grad=True)
        q, k, v = tensors(keys=11)
        (gate * spoil(compressed_attention(q, k, v, **BLOCKS)[0])).sum().backward()
        assert gate.grad.isfinite().all()

    def as_naive_softmax(out):
        return torch.cat([torch.full_like(out[:, :, :3], torch.nan), out[:, :, 3:]], dim=2)

    check(lambda out: out)
    rejected(check, as_naive_softmax)


def test_04_a_forced_score_of_1_loses_against_sums_over_heads():
    score = torch.full((1, 1, 8, 8), 0.5)
    score[..., 2:5] = 16 * 32 / 16  # R l / d, the most that three blocks could get

    def check(choose):
        assert set(choose(score)[0, 0, 7].tolist()) > {0, 6, 7}

    def forced_to_1(score):
        score = score.clone()
        score[..., 7, [0, 6, 7]] += 1.0
        return score.topk(4).indices

    check(lambda s: choose_blocks(s, select_block_size=1, num_selected=4))
    rejected(check, forced_to_1)


def test_05_block_0_twice_when_it_is_also_local():
    def check(choose):
        for t, row in enumerate(choose(torch.rand(1, 1, 8, 4))[0, 0].tolist()):
            chosen = [j for j in row if j >= 0]
            assert len(chosen) == len(set(chosen)) == min(4, t // 2 + 1)

    def concatenated(score):
        own = torch.arange(8) // 2
        forced = torch.stack([0 * own, (own - 1).clamp(min=0), own], dim=-1)
        return torch.cat([forced, forced[:, :1] - 1], dim=-1)[None, None]

    check(lambda s: choose_blocks(s, select_block_size=2, num_selected=4))
    rejected(check, concatenated)


def test_06_top_k_fills_up_with_future_blocks():
    def check(choose):
        ids = choose(torch.rand(1, 1, 12, 6))
        assert (ids * 2 <= torch.arange(12)[:, None]).all()

    def masked_once(score):
        future = torch.arange(6) * 2 > torch.arange(12)[:, None]
        return score.masked_fill(future, -math.inf).topk(4).indices

    check(lambda s: choose_blocks(s, select_block_size=2, num_selected=4))
    rejected(check, masked_once)


def test_07_index_minus_1_reads_the_last_block():
    q, k, v = tensors()
    ids = torch.tensor([0, -1, -1]).expand(1, 2, 24, 3)

    def check(attend):
        other = v.clone()
        other[:, :, 20:] += 1e6
        assert torch.equal(attend(other), attend(v))

    def unmasked(v):
        rows = torch.cat(
            [x.unflatten(2, (-1, 4))[:, :, ids[0, 0, 23]].flatten(2, 3) for x in (k, v)], dim=-1
        )
        return F.scaled_dot_product_attention(q, rows[..., :6], rows[..., 6:], enable_gqa=True)

    check(lambda v: selected_attention(q, k, v, ids, select_block_size=4))
    rejected(check, unmasked)


def test_08_every_head_of_the_group_scores():
    q, k, v = tensors(keys=11, heads=6)

    def check(importance):
        whole = importance(q)
        for head in range(3):  # the first group's
            other = q.clone()
            other[:, head] = torch.randn(24, 6)
            changed = importance(other)
            assert not torch.equal(changed[:, 0], whole[:, 0])
            assert torch.equal(changed[:, 1], whole[:, 1])

    def importance(q, k=k):
        lse = compressed_attention(q, k, k, **BLOCKS)[1]
        return block_importance(q, k, lse, **BLOCKS, select_block_size=4)

    check(importance)
    rejected(check, lambda q: importance(q[:, ::3]))


def gradients(attend, tensors):
    """dk, dv of sum(out * fixed noise)."""
    q, k, v = (x.clone().requires_grad_() for x in tensors)
    out = attend(q, k, v)
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return torch.autograd.grad((out * noise.to(out)).sum(), (k, v))


def operations():
    """The three attentions over one (q, k, v), by name."""
    ids = selection().clone()
    return {
        "window": lambda *qkv, **more: window_attention(*qkv, window=5, **more),
        "selected": lambda *qkv, **more: selected_attention(*qkv, ids, select_block_size=4, **more),
        "compressed": lambda *qkv, **more: compressed_attention(*qkv, **BLOCKS, **more)[0],
    }


@pytest.mark.parametrize("name", ["window", "selected", "compressed"])
def test_09_dk_and_dv_are_summed_over_heads_before_they_are_rounded(name):
    half = tensors(dtype=torch.bfloat16, heads=32)  # R = 16
    attend = operations()[name]
    expected = gradients(attend, [x.float() for x in half])

    def check(found):
        for grad, full in zip(found, expected, strict=True):
            torch.testing.assert_close(grad.float(), full, rtol=2**-8, atol=1e-6)

    def head_by_head(q, k, v):  # each head's gradient is rounded, then added, in bf16
        return attend(q, *(x.repeat_interleave(16, dim=1) for x in (k, v)))

    check(gradients(attend, half))
    if name != "selected":  # its ids belong to two groups
        rejected(check, gradients(head_by_head, half))


@pytest.mark.parametrize("name", ["window", "selected", "compressed"])
def test_10_the_backward_is_the_same_in_every_run(name):
    inputs, attend = tensors(dtype=torch.float32), operations()[name]

    def check(run):
        first = run()
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))

    def as_atomics():  # each query adds its part, in whatever order they arrive
        parts = [
            gradients(lambda *qkv, t=t: attend(*qkv)[:, :, t], inputs) for t in torch.randperm(24)
        ]
        return [sum(x) for x in zip(*parts, strict=True)]

    check(lambda: gradients(attend, inputs))
    rejected(check, as_atomics)


def test_12_log_sum_exp_is_natural():
    def check(lse):
        assert abs(lse - math.log(2)) < 1e-12

    q, k, _ = tensors(length=2)
    equal = k[:, :, :1].expand(-1, -1, 2, -1)
    lse = compressed_attention(0 * q, equal, equal, block_size=1, stride=1)[1][0, 0, 1].item()
    check(lse)
    rejected(check, lse / math.log(2))


def test_13_a_custom_scale_reaches_every_branch_and_the_choice():
    q, k, v = tensors()
    sharp = q * 3 * 6**0.5  # scale 3 instead of 1 / sqrt(6), folded into q

    def check(attend):
        torch.testing.assert_close(attend(q, scale=3.0), attend(sharp), rtol=1e-10, atol=1e-10)

    for name in ("window", "selected", "compressed"):
        attend = operations()[name]
        check(lambda q, attend=attend, **more: attend(q, k, v, **more))
        rejected(check, lambda q, attend=attend, **more: attend(q, k, v))

    def importance(q, scale=None, forget=False):
        lse = compressed_attention(q, k, k, **BLOCKS, scale=scale)[1]
        scale = None if forget else scale
        return block_importance(q, k, lse, **BLOCKS, select_block_size=4, scale=scale)

    check(importance)
    rejected(check, lambda q, **more: importance(q, **more, forget=True))

    def ids(q, scale=None):
        lse = compressed_attention(q, k, k, **BLOCKS, scale=scale)[1]
        return select_blocks(q, k, lse, **CHOICE, scale=scale)

    assert torch.equal(ids(q, scale=3.0), ids(sharp))


def keys_read(q, k, **options):
    """How many keys each query gives weight to: v = identity makes rows of weights."""
    eye = torch.eye(k.shape[2], dtype=k.dtype).expand(1, 2, -1, -1)
    return (window_attention(q, k, eye, **options)[0, 0] > 0).sum(-1).tolist()


def test_14_w_keys_in_prefill_and_in_decode():
    q, k, _ = tensors()

    def check(prefill, decode):
        assert prefill == [min(t + 1, 5) for t in range(24)]
        assert decode == prefill

    def decode(window):
        return [
            keys_read(q[:, :, t : t + 1], k[:, :, : t + 1], window=window, start=t)[0]
            for t in range(24)
        ]

    check(keys_read(q, k, window=5), decode(5))
    rejected(lambda wrong: check(wrong, decode(5)), keys_read(q, k, window=6))


@pytest.mark.parametrize("count", [3, 5, 6, 7])
def test_15_n_is_not_rounded_to_a_power_of_two(count):
    def check(n):
        ids = choose_blocks(torch.rand(1, 2, 40, 10), select_block_size=4, num_selected=n)
        q, k, _ = tensors(40)
        eye = torch.eye(40, dtype=torch.float64).expand(1, 2, -1, -1)
        weights = selected_attention(q, k, eye, ids, select_block_size=4)
        assert (weights[:, :, 39] > 0).sum(-1).unique().tolist() == [count * 4]

    check(count)
    rejected(check, 2 ** math.ceil(math.log2(count)))


@pytest.mark.parametrize("widths", [(6, 3), (2, 5)])
def test_16_keys_and_values_may_differ_in_width(widths):
    width, value = widths
    q, k, v = (
        torch.randn(shape, dtype=torch.float64)
        for shape in ((1, 4, 24, width), (1, 2, 24, width), (1, 2, 24, value))
    )
    for attend in operations().values():
        dk, dv = gradients(attend, (q, k, v))
        assert attend(q, k, v).shape == (1, 4, 24, value)
        assert (dk.shape, dv.shape) == (k.shape, v.shape)
    layer = NSAttention(NSAConfig.small(head_dim=2 * width, value_dim=value))
    assert layer(torch.randn(1, 24, 64)).shape == (1, 24, 64)


@pytest.mark.parametrize("name", ["window", "selected", "compressed"])
def test_18_a_zero_gradient_does_not_pass(name):
    attend = operations()[name]
    inputs = [x.requires_grad_() for x in tensors()]

    def no_gradient_to_keys(q, k, v):
        return attend(q, k.detach(), v) + 0 * k.sum()

    def check(attend):  # gradcheck as test_gradients.py uses it
        assert torch.autograd.gradcheck(attend, inputs, raise_exception=False)

    def check_equal(found):  # the tolerance of every comparison in float64 here
        torch.testing.assert_close(found, gradients(attend, inputs), rtol=1e-10, atol=1e-10)

    check(attend)
    rejected(check, no_gradient_to_keys)
    rejected(check_equal, gradients(no_gradient_to_keys, inputs))
