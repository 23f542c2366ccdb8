"""The four neighbours against what their papers say, written once more as loops over one head.

The loops hold a real cache where the method has one: a token that leaves it is gone from the list.
"""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_lite import DenseAttention, NSAConfig, dense_attention
from nsa_lite.rivals.budgets import NEIGHBOURS, NeighbourAttention
from nsa_lite.rivals.neighbours import (
    h2o,
    page_bounds,
    page_scores,
    quest,
    sample_attention,
    smallest_columns,
    streaming_llm,
)
from nsa_lite.rope import rotate

SOME = settings(max_examples=20, deadline=None, derandomize=True)
SIZES = dict(batch=2, groups=2, heads=3, width=4, value=3)
WHOLE = [  # a budget of everything, for 21 tokens
    partial(streaming_llm, sinks=0, window=21),
    partial(streaming_llm, sinks=15, window=6),
    partial(h2o, recent=1, heavy=20),
    partial(h2o, recent=21, heavy=0),
    partial(quest, page=4, pages=6),
    partial(quest, page=30, pages=1),
    partial(sample_attention, share=1.0, window=1, every=1),
    partial(sample_attention, share=0.0, window=21, every=50),
]
SPARSE = [
    partial(streaming_llm, sinks=2, window=5),
    partial(h2o, recent=3, heavy=4),
    partial(quest, page=3, pages=2),
    partial(sample_attention, share=0.7, window=2, every=3),
]


def name(method):
    return f"{method.func.__name__}-{list(method.keywords.values())}"


def tensors(length=21, seed=0, batch=2, groups=2, heads=3, width=4, value=3):
    """q, k, v in float64; `heads` is R, per group."""
    make = torch.Generator().manual_seed(seed)
    shapes = (groups * heads, width), (groups, width), (groups, value)
    return [
        torch.randn(batch, h, length, d, generator=make, dtype=torch.float64) for h, d in shapes
    ]


def weights(q, keys, scale=None):
    """softmax(q . key) over a list of keys, in plain Python numbers."""
    scale = len(q) ** -0.5 if scale is None else scale
    scores = [
        scale * sum(a * b for a, b in zip(q.tolist(), key.tolist(), strict=True)) for key in keys
    ]
    e = [math.exp(s - max(scores)) for s in scores]
    return [x / sum(e) for x in e]


def mix(p, values):
    return sum(w * v for w, v in zip(p, values, strict=True))


def by_loops(rule, q, k, v, **how):
    """Run a rule for one batch entry and group at a time: q (R, T, D), k (T, D), v (T, Dv)."""
    group = q.shape[1] // k.shape[1]
    out, read = q.new_zeros(*q.shape[:3], v.shape[3]), torch.zeros(*q.shape[:3], q.shape[2]).bool()
    for b, g in itertools.product(range(q.shape[0]), range(k.shape[1])):
        heads = slice(g * group, (g + 1) * group)
        for r, t, tokens, row in rule(q[b, heads], k[b, g], v[b, g], **how):
            out[b, g * group + r, t] = row
            read[b, g * group + r, t, tokens] = True
    return out, read


def streaming_rule(q, k, v, *, sinks, window, theta=10_000.0):
    cache = []  # (token, key, value), as a server would hold them: rotated when they are read
    for t in range(len(k)):
        cache.append((t, k[t], v[t]))
        if len(cache) > sinks + window:
            del cache[sinks]
        at = torch.arange(len(cache))  # positions are re-assigned inside the cache
        keys = rotate(torch.stack([key for _, key, _ in cache]), at, theta)
        for r in range(len(q)):
            query = rotate(q[r, t][None], at[-1:], theta)[0]
            yield r, t, [s for s, _, _ in cache], mix(weights(query, keys), [x[2] for x in cache])


def h2o_rule(q, k, v, *, recent, heavy):
    cache, total = [], {}
    for t in range(len(k)):
        cache.append(t)
        if len(cache) > recent + heavy:
            old = [s for s in cache if s <= t - recent]
            cache.remove(min(old, key=lambda s: (total[s], s)))
        assert len(cache) <= recent + heavy
        total[t] = 0.0
        for r in range(len(q)):
            p = weights(q[r, t], [k[s] for s in cache])
            for s, w in zip(cache, p, strict=True):
                total[s] += w
            yield r, t, list(cache), mix(p, [v[s] for s in cache])


def bound(query, keys):
    u = 0.0
    for c in range(len(query)):
        column = [float(key[c]) for key in keys]
        u += max(float(query[c]) * min(column), float(query[c]) * max(column))
    return u


def quest_rule(q, k, v, *, page, pages):
    for r, t in itertools.product(range(len(q)), range(len(k))):
        own = t // page
        u = {j: bound(q[r, t], k[j * page : (j + 1) * page]) for j in range(own)}
        best = sorted(u, key=lambda j: (-u[j], j))[: pages - 1]
        tokens = [s for s in range(t + 1) if s // page in {own, *best}]
        yield r, t, tokens, mix(weights(q[r, t], k[tokens]), v[tokens])


def sample_rule(q, k, v, *, share, window, every, whole_prompt=False):
    for r, t in itertools.product(range(len(q)), range(len(k))):
        mass = [0.0] * len(k)
        for i in range(every - 1, len(k), every):
            if whole_prompt or i <= t:
                for s, w in enumerate(weights(q[r, i], k[: i + 1])):
                    mass[s] += w
        columns, sum_so_far = set(), 0.0
        for s in sorted(range(len(k)), key=lambda s: -mass[s]):  # heaviest first
            if sum_so_far >= share * sum(mass):
                break
            columns.add(s)
            sum_so_far += mass[s]
        tokens = [s for s in range(t + 1) if s > t - window or s in columns]
        yield r, t, tokens, mix(weights(q[r, t], k[tokens]), v[tokens])


def same(got, expected, tolerance=1e-12):
    assert torch.equal(got[1], expected[1])  # what was read, to the token
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=tolerance)


@SOME
@given(st.integers(0, 4), st.integers(1, 6), st.integers(1, 16), st.integers(0, 99))
def test_streaming_llm_equals_a_cache_with_places_of_its_own(sinks, window, length, seed):
    qkv, how = tensors(length, seed), dict(sinks=sinks, window=window, theta=50.0)
    # RoPE's angles are float32: equal distances from other places differ in the 7th digit.
    same(streaming_llm(*qkv, **how), by_loops(streaming_rule, *qkv, **how), 2e-5)


@SOME
@given(st.integers(1, 5), st.integers(0, 5), st.integers(1, 16), st.integers(0, 99))
def test_h2o_equals_a_cache_that_evicts(recent, heavy, length, seed):
    qkv, how = tensors(length, seed), dict(recent=recent, heavy=heavy)
    same(h2o(*qkv, **how), by_loops(h2o_rule, *qkv, **how))


@SOME
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 16), st.integers(0, 99))
def test_quest_equals_its_loop(page, pages, length, seed):
    qkv, how = tensors(length, seed), dict(page=page, pages=pages)
    same(quest(*qkv, **how), by_loops(quest_rule, *qkv, **how))


@SOME
@given(
    st.sampled_from([0.1, 0.5, 0.8, 0.95]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 14),
    st.booleans(),
    st.integers(0, 99),
)
def test_sample_attention_equals_its_loop(share, window, every, length, whole_prompt, seed):
    how = dict(share=share, window=window, every=every, whole_prompt=whole_prompt)
    qkv = tensors(length, seed)
    same(sample_attention(*qkv, **how), by_loops(sample_rule, *qkv, **how))


@pytest.mark.parametrize("method", WHOLE, ids=name)
def test_a_budget_of_everything_is_dense_attention(method):
    q, k, v = tensors()
    out, read = method(q, k, v)
    assert torch.equal(read, torch.ones(21, 21).tril().bool().expand_as(read))
    if method.func is streaming_llm:  # it rotates q and k itself
        q, k = (rotate(x, torch.arange(21)) for x in (q, k))
    torch.testing.assert_close(out, dense_attention(q, k, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", SPARSE, ids=name)
def test_what_comes_after_a_query_changes_nothing_at_all(method):
    q, k, v = tensors()
    out, read = method(q, k, v)
    assert read.sum() < 0.8 * torch.ones_like(read).tril().sum()  # a sparse case
    for t in range(20):
        later = [x.clone() for x in (q, k, v)]
        for x in later:
            x[:, :, t + 1 :] = 10 * torch.randn_like(x[:, :, t + 1 :])
        other_out, other_read = method(*later)
        assert torch.equal(other_out[:, :, : t + 1], out[:, :, : t + 1])
        assert torch.equal(other_read[:, :, : t + 1], read[:, :, : t + 1])


def test_whole_prompt_sampling_lets_later_tokens_choose_an_earlier_querys_keys():
    q, k, v = tensors()
    how = dict(share=0.5, window=2, every=3, whole_prompt=True)
    out, read = sample_attention(q, k, v, **how)
    q2 = q.clone()
    q2[:, :, 11:] = -5 * q[:, :, 11:]
    out2, read2 = sample_attention(q2, k, v, **how)
    assert not torch.equal(read[:, :, :11], read2[:, :, :11])
    assert not torch.equal(out[:, :, :11], out2[:, :, :11])
    assert not (read2 & ~torch.ones(21, 21).tril().bool()).any()  # but no later key is read


def test_the_sinks_come_nearer_and_the_window_does_not_move():
    """One direction turned by RoPE: the score of a key tells how far away it seems."""
    q = k = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 1, 40, 2)
    for t in (8, 20, 39):  # sinks 0, 1 and the last 6; place 7 is the query's
        v = torch.zeros(1, 1, 40, 40, dtype=torch.float64) + torch.eye(40)
        out, read = streaming_llm(q, k, v, sinks=2, window=6, scale=1.0)
        e = torch.cos(torch.tensor([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0])).exp().double()
        kept = [0, 1, *range(t - 5, t + 1)]
        assert read[0, 0, t].nonzero().flatten().tolist() == kept
        torch.testing.assert_close(out[0, 0, t, kept], e / e.sum(), rtol=0, atol=2e-6)


def test_h2o_never_reads_what_it_evicted_and_keeps_the_recent():
    _, read = h2o(*tensors(40), recent=3, heavy=4)
    for t in range(39):
        comes_back = read[:, :, t + 1] & ~read[:, :, t]
        assert comes_back.nonzero()[:, 2].unique().tolist() == [t + 1]
        assert read[:, :, t + 1, max(0, t - 1) : t + 2].all()
    assert read.sum(-1).eq(torch.arange(1, 41).clamp(max=7)).all()


def test_h2o_evicts_by_the_mass_it_saw_worked_by_hand():
    """Scores 0 or ln 3, two recent and one heavy. Rows of softmax over the kept tokens:
    t=0: 1 | t=1: 1/2 1/2 | t=2: 1/5 1/5 3/5, so A = 1.7 .7 .6
    t=3: token 1 (the old are 0 and 1) leaves; 0 gets 1/5, 2 gets 3/5, 3 gets 1/5: A = 1.9 - 1.2 .2
    t=4: of the old 0 and 2, 2 leaves, though it has got most of every query since it came.
    """
    k = torch.tensor([0.0, 0.0, math.log(3), 0.0, 0.0], dtype=torch.float64)[None, None, :, None]
    q = torch.ones_like(k)
    _, read = h2o(q, k, k, recent=2, heavy=1, scale=1.0)
    rows = [row.nonzero().flatten().tolist() for row in read[0, 0]]
    assert rows == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]


@SOME
@given(st.integers(1, 7), st.integers(1, 20), st.integers(0, 99))
def test_quests_bound_is_never_below_the_largest_product_and_tight_for_pages_of_one(
    page, length, seed
):
    q, k, _ = (4 * x for x in tensors(length, seed))
    q, k = q.round(), k.round()  # whole numbers: every product and sum is exact
    u = page_scores(q, *page_bounds(k, page))
    products = torch.einsum("bgrtd,bgsd->bgrts", q.unflatten(1, (2, 3)), k).flatten(1, 2)
    for j, in_page in enumerate(products.split(page, dim=-1)):
        assert (u[..., j] >= in_page.amax(-1)).all()
        assert page > 1 or torch.equal(u[..., j], in_page[..., 0])


@SOME
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.sampled_from([0, 0.25, 0.5, 1]))
def test_smallest_columns_is_the_smallest_of_all_subsets(row, share):
    mass = torch.tensor(row, dtype=torch.float64)
    enough = [
        len(c)
        for n in range(len(row) + 1)
        for c in itertools.combinations(row, n)
        if sum(c) >= share * sum(row)
    ]
    chosen = smallest_columns(mass, share)
    assert mass[chosen].sum() >= share * mass.sum() and int(chosen.sum()) == min(enough)


@pytest.mark.parametrize("method", SPARSE, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept_and_one_token_is_enough(method, dtype):
    q, k, v = (x.to(dtype) for x in tensors(1))
    out, read = method(q, k, v)
    assert out.dtype == dtype and read.all()
    torch.testing.assert_close(out, v.repeat_interleave(3, dim=1))


@pytest.mark.parametrize("method, argument, value", [
    (streaming_llm, "sinks", -1), (streaming_llm, "window", 0), (h2o, "recent", 0),
    (h2o, "heavy", -1), (quest, "page", 0), (quest, "pages", 0), (sample_attention, "share", 1.5),
    (sample_attention, "window", 0), (sample_attention, "every", 0),
])  # fmt: skip
def test_bad_numbers_are_named(method, argument, value):
    how = next(m.keywords for m in SPARSE if m.func is method)
    with pytest.raises(ValueError, match=f"^{argument} = {value}: must"):
        method(*tensors(), **{**how, argument: value})


@pytest.mark.parametrize("method", SPARSE, ids=name)
def test_a_cache_longer_than_the_queries_is_refused(method):
    q, k, v = tensors()
    with pytest.raises(ValueError, match="k.shape = .* one key for each of 20 queries"):
        method(q[:, :, :20], k, v)


def test_a_dense_layer_can_be_read_by_another_method():
    torch.manual_seed(0)
    layer = DenseAttention(NSAConfig.small()).double()
    x = torch.randn(2, 21, 64, dtype=torch.float64)
    own = layer(x)

    def read_by(**settings):
        reader = NeighbourAttention(layer.config, NEIGHBOURS["StreamingLLM"], settings).double()
        reader.load_state_dict(layer.state_dict())
        return reader

    everything = read_by(sinks=0, window=21)
    torch.testing.assert_close(everything(x), own, rtol=0, atol=1e-12)
    torch.testing.assert_close(everything(x, last=3), own[:, -3:], rtol=0, atol=1e-12)
    assert not torch.allclose(read_by(sinks=1, window=4)(x), own, atol=1e-3)
    with pytest.raises(ValueError, match="cache"):
        everything(x, everything.new_cache(2, 21))
    assert torch.equal(layer(x), own)
