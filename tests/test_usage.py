"""An attention called as people do: autocast, padded, compiled, checkpointed, spread, cached.

What is asked for everywhere: the values, and the gradients, are those of the plain call.
"""

import copy
import re
import shutil

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nsa_lite import (
    Choice,
    DecoderLM,
    DenseAttention,
    ModelConfig,
    NSAConfig,
    NSAttention,
    block_importance,
    choose_blocks,
    compressed_attention,
    dense_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa_lite.blocks import num_compressed
from nsa_lite.layer import Known
from nsa_lite.rivals import neighbours, rules, taught
from nsa_lite.rivals.attentions import ATTENTIONS

SMALL = NSAConfig.small()  # l = l' = 8, d = 4, n = 5, w = 16
BLOCKS = dict(block_size=8, stride=4)
CHOICE = dict(**BLOCKS, select_block_size=8, num_selected=5)
CHOOSING = [name for name in ATTENTIONS if name.startswith("nsa") and name != "nsa-random"]
TAUGHT = ["nsa-kl", "nsa-bce", "nsa-straight-through", "nsa-gumbel"]


def built(kind, **changes):
    torch.manual_seed(0)
    return ATTENTIONS[kind].build(NSAConfig.small(**changes))


def stream(length, batch=2, **options):
    return torch.randn(batch, length, 64, **options)


def tensors(length, keys=None, dtype=torch.float32, batch=2):
    """q (B, 4, T, 16), raw k and v (B, 2, S, 16 and 12), compressed k and v, gates (B, 4, T, 3)."""
    torch.manual_seed(0)
    keys = length if keys is None else keys
    blocks = num_compressed(keys, **BLOCKS)
    shapes = [(4, length, 16), (2, keys, 16), (2, keys, 12), (2, blocks, 16), (2, blocks, 12)]
    made = [torch.randn(batch, *shape, dtype=dtype) for shape in shapes]
    return [*made, torch.rand(batch, 4, length, 3, dtype=dtype)]


def ids_for(length, start=0):
    draw = torch.Generator().manual_seed(0)
    score = torch.rand(2, 2, length, -(-(start + length) // 8), generator=draw)
    return choose_blocks(score, select_block_size=8, num_selected=5, start=start)


def whole(q, k, v, k_c, v_c, gates, start=0):
    pairs = ((k_c, v_c), (k, v), (k, v))
    return nsa_attention(q, *pairs, gates, **SMALL.sizes, start=start)


# Each takes tensors() and start, and gives one tensor.
OPERATIONS = {
    "dense": lambda q, k, v, k_c, v_c, gates, start=0: dense_attention(q, k, v, start=start),
    "window": lambda q, k, v, k_c, v_c, gates, start=0: window_attention(
        q, k, v, window=16, start=start
    ),
    "compressed": lambda q, k, v, k_c, v_c, gates, start=0: compressed_attention(
        q, k_c, v_c, **BLOCKS, start=start
    )[0],
    "selected": lambda q, k, v, k_c, v_c, gates, start=0: selected_attention(
        q, k, v, ids_for(q.shape[2], start), select_block_size=8, start=start
    ),
    "whole": whole,
}


def run(operation, given, start=0):
    """Its output, and the gradients of a fixed weighing of it in all that is given."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = operation(*leaves, start=start)
    torch.manual_seed(1)
    out.backward(torch.randn_like(out))
    return [out.detach(), *(x.grad for x in leaves)]


def same(left, right):
    """Bit for bit, None where the other is None."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def trained(module, x, call=None):
    """Output, and after a step on output and loss the gradients of x and of every parameter."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(1)  # for the rules that draw
    y, loss = call(x) if call else module(x, return_loss=True)
    (y.float().square().mean() + loss).backward()
    return [y.detach(), loss.detach(), x.grad, *(p.grad for p in module.parameters())]


# --- autocast ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_autocast_changes_nothing_inside_an_operation(operation, dtype):
    given = tensors(61)
    with torch.autocast("cpu", dtype=dtype):
        under = OPERATIONS[operation](*given)
        half = OPERATIONS[operation](*(x.to(dtype) for x in given))
    assert torch.equal(under, OPERATIONS[operation](*given))
    assert under.dtype == torch.float32 and half.dtype == dtype


def test_autocast_changes_no_score_of_any_rule():
    torch.manual_seed(0)
    q, k, v, k_c, v_c, _ = tensors(61)
    known = Known(SMALL, stream(61), q, k, k_c, 0)
    z, mass = torch.randn(2, 5, 8), torch.rand(2, 5, 8)
    lse = compressed_attention(q, k_c, v_c, **BLOCKS)[1]
    sizes = {**BLOCKS, "select_block_size": 8}
    everything = torch.ones(8, dtype=torch.bool)
    scores = {
        "importance": lambda: block_importance(q, k_c, lse, **sizes),
        "choice": lambda: select_blocks(q, k_c, lse, **CHOICE),
        "true mass": lambda: rules.true_mass(known),
        "bound": lambda: rules.page_bound(q, *rules.block_ranges(known)),
        "mean": lambda: rules.by_block_mean(known).ids,
        "bce": lambda: taught.bce_over_softmax(z, mass > 0.7, everything),
        "kl": lambda: taught.kl_to_mass(z, mass, everything),
        "quest": lambda: neighbours.quest(q, k, k, page=8, pages=3)[0],
        "h2o": lambda: neighbours.h2o(q, k, k, recent=8, heavy=8)[0],
    }
    for name, score in scores.items():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = score()
        assert torch.equal(under, score()), name
        assert under.dtype in (torch.float32, torch.int32), name


@torch.no_grad()
def off(kind, dtype, sharp, under_autocast):
    """The share of rows that choose other blocks than float64 does, and the largest error."""
    layer = built(kind, head_dim=32, value_dim=32, num_selected=6).eval()
    for name, p in layer.named_parameters():
        p.mul_(sharp if name.startswith(("query", "key")) else 1)
    x = stream(256)
    exact, right = copy.deepcopy(layer).double()(x.double(), return_trace=True)
    if under_autocast:
        with torch.autocast("cpu", dtype=dtype):
            y, trace = layer(x, return_trace=True)
    else:
        y, trace = layer.to(dtype)(x.to(dtype), return_trace=True)
    assert y.dtype == dtype
    rows = (trace.ids != right.ids).any(-1).float().mean() if trace else torch.zeros(())
    return float(rows), float((y.double() - exact).abs().max())


@pytest.mark.parametrize("dtype, sharp", [(torch.bfloat16, 1), (torch.float16, 6)])
@pytest.mark.parametrize("kind", [*CHOOSING, "dense", "window"])
def test_autocast_chooses_and_errs_as_plain_half_precision_does(kind, dtype, sharp):
    """6 to 40 % of the rows chose other blocks while autocast rounded the scores."""
    rows, error = off(kind, dtype, sharp, under_autocast=True)
    plain_rows, plain_error = off(kind, dtype, sharp, under_autocast=False)
    assert rows <= max(plain_rows + 0.005, 0.01)
    if kind in ("dense", "window"):
        assert error <= 1.1 * plain_error < 0.02


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_every_attention_learns_under_autocast(kind):
    layer = built(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = trained(layer, stream(70))
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_every_layer_runs_on_meta(kind):
    layer = built(kind).to("meta")
    assert layer(stream(70, device="meta")).shape == (2, 70, 64)


# --- what lies behind the last query ---


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e4])
@pytest.mark.parametrize("length, start", [(13, 0), (21, 20), (1, 30), (1, 0), (40, 0)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_lies_behind_the_last_query_has_no_effect(operation, length, start, garbage):
    end = start + length
    given = tensors(length, keys=end + 20)
    filled = [x.clone() for x in given]
    for x in filled[1:3]:
        x[:, :, end:] = garbage
    for x in filled[3:5]:
        x[:, :, num_compressed(end, **BLOCKS) :] = garbage
    clean = run(OPERATIONS[operation], given, start)
    dirty = run(OPERATIONS[operation], filled, start)
    same(clean, dirty)
    for gradient in dirty[2:4]:
        assert gradient is None or (gradient[:, :, end:] == 0).all()
    for gradient in dirty[4:6]:
        assert gradient is None or (gradient[:, :, num_compressed(end, **BLOCKS) :] == 0).all()


@pytest.mark.parametrize("length, start", [(13, 0), (21, 20), (1, 30)])
def test_no_score_reads_what_lies_behind_the_last_query(length, start):
    q, k, _, k_c, v_c, _ = tensors(length, keys=start + length + 20)
    lse = compressed_attention(q, k_c, v_c, **BLOCKS, start=start)[1]
    filled, mass = k_c.clone(), k.clone()
    filled[:, :, num_compressed(start + length, **BLOCKS) :] = float("nan")
    mass[:, :, start + length :] = float("nan")
    assert torch.equal(
        select_blocks(q, filled, lse, **CHOICE, start=start),
        select_blocks(q, k_c, lse, **CHOICE, start=start),
    )
    sizes = dict(**BLOCKS, select_block_size=8, start=start)
    assert torch.equal(
        block_importance(q, filled, lse, **sizes), block_importance(q, k_c, lse, **sizes)
    )
    assert torch.equal(rules.block_mass(q, mass, 8, start), rules.block_mass(q, k, 8, start))


@pytest.mark.parametrize("kind", [*CHOOSING, "dense", "window"])
def test_padding_changes_nothing_before_it(kind):
    """The first sequence ends after 37 tokens, the second after 70."""
    layer, x = built(kind).double().eval(), stream(70).double()
    real = torch.ones(2, 70, dtype=torch.bool)
    real[0, 37:] = False
    results = []
    for garbage in (0.0, 1e4):
        layer.zero_grad()
        padded = x.masked_fill(~real[..., None], garbage).requires_grad_()
        y = layer(padded)[real]
        y.square().sum().backward()
        assert (padded.grad[~real] == 0).all()
        grads = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        results.append([y.detach(), padded.grad[real], *grads])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    alone = layer(x[:1, :37])  # the first sequence without its padding
    torch.testing.assert_close(results[1][0][:37], alone[0], rtol=1e-9, atol=1e-9)


# --- sequences shorter than a block ---


@pytest.mark.parametrize("length", range(1, 8))
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_every_parameter_gets_a_gradient_from_a_short_sequence(kind, length):
    layer = built(kind)
    y, loss, *gradients = trained(layer, stream(length))
    assert all(g is not None and g.isfinite().all() for g in gradients)
    if kind == "nsa":  # what reaches the output through blocks only has none to give
        for name, p in layer.named_parameters():
            silent = "phi" in name or "compressed" in name
            assert not silent or (p.grad == 0).all(), name


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("kind", ["nsa", "nsa-kl"])
def test_distributed_training_steps_at_every_length(kind, one_process):
    layer = built(kind)
    spread = DistributedDataParallel(layer)
    for length in (5, 1, 20):  # a parameter that got nothing at 5 would stop the next call
        trained(spread, stream(length))
    assert all(p.grad is not None for p in layer.parameters())


# --- compiled, exported, fake and mapped ---


@pytest.fixture
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def agree(compiled, layer, lengths):
    """Whether both give the same output and gradients at each length."""
    for length in lengths:
        x = stream(length)
        results = [trained(layer, x, call) for call in (compiled, None)]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["nsa", "dense", "nsa-bce", "nsa-straight-through"])
def test_a_compiled_layer_agrees_at_every_length_from_one_compilation(kind, fresh_dynamo):
    counter = CompileCounterWithBackend("aot_eager")
    layer = built(kind)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    agree(lambda x: compiled(x, return_loss=True), layer, (75, 42))
    assert counter.frame_count == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@torch.no_grad()
def test_the_default_compilation_agrees(fresh_dynamo):
    """Forward, at one length: every kernel more costs seconds of a C++ compiler."""
    layer, x = built("nsa"), stream(75)
    torch.testing.assert_close(torch.compile(layer)(x), layer(x), rtol=1e-4, atol=1e-5)


def test_an_exported_layer_takes_other_lengths():
    layer = built("nsa").eval()
    length = torch.export.Dim.DYNAMIC
    exported = torch.export.export(layer, (stream(75),), dynamic_shapes=({1: length},))
    x = stream(50)
    torch.testing.assert_close(exported.module()(x), layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_every_layer_runs_on_fake_tensors(kind):
    with FakeTensorMode():
        layer = built(kind)
        y, loss = layer(stream(70), return_loss=True)
        (y.sum() + loss).backward()
        assert y.shape == (2, 70, 64)
        tokens = torch.zeros(2, 70, dtype=torch.int64)
        assert DecoderLM(ModelConfig(vocab_size=11))(tokens).shape == (2, 70, 11)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_can_be_mapped_over_another_axis(operation):
    given = [torch.stack([x, x.flip(2)]) for x in tensors(41)]
    ids = ids_for(41)

    def one(q, k, v, k_c, v_c, gates):
        if operation == "selected":
            return selected_attention(q, k, v, ids, select_block_size=8)
        return OPERATIONS[operation](q, k, v, k_c, v_c, gates)

    expected = torch.stack([one(*(x[i] for x in given)) for i in range(2)])
    torch.testing.assert_close(vmap(one)(*given), expected, rtol=1e-5, atol=1e-6)
    if operation == "selected":
        each = torch.stack([ids, ids])
        mapped = vmap(lambda q, k, v, ids: selected_attention(q, k, v, ids, select_block_size=8))
        torch.testing.assert_close(mapped(*given[:3], each), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", [0, 3, 60])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize("window", [1, 2, 7, 16, 100])
def test_the_window_reads_the_last_w_keys_whatever_the_lengths(window, length, start):
    q, k, v, *_ = tensors(length, keys=start + length + 3, dtype=torch.float64)
    t = torch.arange(start, start + length)[:, None]
    s = torch.arange(k.shape[2])
    masked = ~((s <= t) & (s > t - window))
    scores = q.unflatten(1, (2, 2)) @ k[:, :, None].mT / 4
    p = scores.masked_fill(masked, -torch.inf).softmax(-1)
    expected = (p @ v[:, :, None]).flatten(1, 2)
    out = window_attention(q, k, v, window=window, start=start)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


# --- activation checkpointing ---


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_checkpointed_operation_has_the_same_gradients(operation, reentrant):
    def checkpointed(*given, start=0):
        return checkpoint(OPERATIONS[operation], *given, use_reentrant=reentrant)

    same(run(OPERATIONS[operation], tensors(61)), run(checkpointed, tensors(61)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["nsa", "dense", "window", *TAUGHT])
def test_a_checkpointed_layer_has_the_same_gradients(kind, reentrant):
    layer, x = built(kind), stream(70)

    def checkpointed(x):
        return checkpoint(lambda x: layer(x, return_loss=True), x, use_reentrant=reentrant)

    same(copied(trained(layer, x)), copied(trained(layer, x, checkpointed)))


def copied(results):
    return [None if x is None else x.clone() for x in results]


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_layer_can_be_copied_after_a_pass(kind):
    layer, x = built(kind), stream(30)
    first = copied(trained(layer, x))
    same(first, copied(trained(copy.deepcopy(layer), x)))


# --- dense attention by torch's own kernels ---


@pytest.mark.parametrize("widths", [(16, 16), (24, 16), (16, 24)])
@pytest.mark.parametrize("last", [None, 1, 5])
@pytest.mark.parametrize(
    "dtype, near", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_the_dense_layer_is_dense_attention(widths, last, dtype, near, monkeypatch):
    config = NSAConfig.small(head_dim=widths[0], value_dim=widths[1])
    torch.manual_seed(0)
    layer, x = DenseAttention(config).to(dtype), stream(37, dtype=dtype)
    y = layer(x, last=last)
    cache = layer.new_cache(2, 37)
    parts = torch.cat([layer(part, cache) for part in x.split([20, 1, 16], dim=1)], dim=1)

    def plainly(q, k, v):
        return dense_attention(q, k, v, start=k.shape[2] - q.shape[2])

    monkeypatch.setattr("nsa_lite.dense.newest_attention", plainly)
    torch.testing.assert_close(y, layer(x, last=last), rtol=near, atol=near)
    torch.testing.assert_close(parts, layer(x), rtol=near, atol=near)


@pytest.mark.parametrize("widths", [(16, 16), (24, 16), (16, 24)])
def test_the_dense_layer_has_dense_attentions_gradients(widths, monkeypatch):
    config = NSAConfig.small(head_dim=widths[0], value_dim=widths[1])
    torch.manual_seed(0)
    layer, x = DenseAttention(config).double(), stream(37).double()
    given = copied(trained(layer, x))
    monkeypatch.setattr("nsa_lite.dense.newest_attention", dense_attention)
    torch.testing.assert_close(given, trained(layer, x), rtol=1e-12, atol=1e-12)


# --- caches ---


def refused(*words, error=ValueError):
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(w) for w in words))


def held(cache):
    """All that the cache holds: the rows up to each sequence's length, and the lengths twice."""
    lengths = cache.lengths.tolist()
    assert cache.lengths_on_host.tolist() == lengths
    kept = [*cache.raw.values()]
    rows = [x[b, :, :n].clone() for kv in kept for x in kv for b, n in enumerate(lengths)]
    if cache.blocks is not None:
        whole = [num_compressed(n, 8, 4) for n in lengths]
        rows += [x[b, :, :n].clone() for x in cache.blocks for b, n in enumerate(whole)]
    if cache.x is not None:
        rows += [cache.x[b, :n].clone() for b, n in enumerate(lengths)]
    return [torch.tensor(lengths), *rows]


def filled(layer, length=27, batch=2, capacity=40):
    cache = layer.new_cache(batch, capacity)
    layer(stream(length, batch), cache)
    return cache


def cut(kv, length):
    return type(kv)(kv.k[:, :, :length], kv.v[:, :, :length])


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda c: setattr(c, "blocks", None), ("cache.blocks = None", "every block")),
        (
            lambda c: setattr(c, "blocks", cut(c.blocks, 6)),
            ("cache.blocks.k.shape = (2, 2, 6, 16)", "(2, 2, 10, 16)"),
        ),
        (
            lambda c: c.raw.update(window=c.raw["window"]._replace(v=c.raw["window"].v[:, :, :9])),
            ("cache.raw['window'].v.shape = (2, 2, 9, 16)", "(2, 2, 40, 16)"),
        ),
        (lambda c: c.raw.update(window=cut(c.raw["window"], 9)), ("cache.raw['window'].k", "40")),
        (lambda c: c.raw.pop("window"), ("cache.raw = ", "branches", "window")),
        (lambda c: c.raw.update(window=c.raw["selected"]), ("cache.raw['window']", "share")),
    ],
)
def test_a_cache_of_another_build_is_refused(damage, words):
    layer = built("nsa")
    cache = filled(layer)
    damage(cache)
    before = cache.lengths.clone()
    with refused(*words):
        layer(stream(1), cache)
    assert torch.equal(cache.lengths, before) and torch.equal(cache.lengths_on_host, before)


@pytest.mark.parametrize("kind", ["nsa", "dense", "window", "nsa-kl"])
def test_a_cache_cut_back_goes_on(kind):
    layer, x = built(kind).double(), stream(27).double()
    cache = layer.new_cache(2, 27)
    layer(x.flip(1), cache)
    cache.cut(0)
    layer(x, cache)
    cache.cut(20)
    torch.testing.assert_close(layer(x[:, 20:], cache), layer(x)[:, 20:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["nsa", "dense", "window", "nsa-kl"])
def test_a_cache_keeps_its_batch_and_its_layer(kind):
    layer = built(kind)
    cache = filled(layer)
    before = held(cache)
    with refused("cache.lengths = 2 of them", "x's 3 sequences"):
        layer(stream(1, batch=3), cache)
    with refused("cache", "another layer fills it"):
        built(kind)(stream(1), cache)
    with refused("cache", "holds 27 of 40 tokens, 14 more do not fit"):
        layer(stream(14), cache)
    with refused("cache: must be a Cache", "got dict", error=TypeError):
        layer(stream(14), {})
    same(held(cache), before)


def test_a_cache_filled_without_a_rule_is_no_use_to_one():
    layer = built("nsa")
    cache = filled(layer)
    layer.choose = rules.by_true_mass
    with refused("cache.x = None", "a rule"):
        layer(stream(1), cache)


def broken(known):
    raise RuntimeError("no choice today")


@pytest.mark.parametrize("length", [0, 27])
def test_a_call_that_fails_leaves_the_cache_as_it_was(length):
    layer = built("nsa-oracle")
    cache = filled(layer, length) if length else layer.new_cache(2, 40)
    before = held(cache)
    untouched = copy.deepcopy(cache)
    rule = layer.choose
    layer.choose = broken
    with pytest.raises(RuntimeError, match="no choice today"):
        layer(stream(1), cache)
    same(held(cache), before)
    layer.choose = rule
    token = stream(1)
    torch.testing.assert_close(layer(token, cache), layer(token, untouched), rtol=0, atol=0)


def test_a_decoder_that_fails_leaves_every_cache_as_it_was():
    model = DecoderLM(ModelConfig(vocab_size=11))
    caches, tokens = model.new_caches(1, 18), torch.zeros(1, 9, dtype=torch.int64)
    model(tokens, caches)
    before = [held(cache) for cache in caches]
    model.blocks[1].attention.gate = torch.nn.Identity()  # the first layer has no fault
    with pytest.raises(ValueError):
        model(tokens, caches)
    for cache, kept in zip(caches, before, strict=True):
        same(held(cache), kept)
    other = DecoderLM(ModelConfig(vocab_size=11))
    with refused("caches[1]", "must have memory of its own, not that of caches[0]"):
        other(tokens, other.new_caches(1, 9)[:1] * 2)
    with refused("cache", "another layer fills it"):
        other(tokens, other.new_caches(1, 9)[::-1])


# --- what is said to a caller who is wrong ---


def no_choice(known):
    return torch.zeros(2, 2, 9, 1, dtype=torch.int32)


def test_a_rule_that_is_none_is_named():
    with refused("choose", "got the class BCEOverSoftmax", error=TypeError):
        NSAttention(SMALL, choose=taught.BCEOverSoftmax)
    with refused("choose", "got str", error=TypeError):
        NSAttention(SMALL, choose="kl")
    layer = NSAttention(SMALL, choose=no_choice)
    with refused("choose: no_choice must return a Choice, got Tensor", error=TypeError):
        layer(stream(9))
    layer.choose = taught.KLToTrueMass
    with refused("choose", "got the class KLToTrueMass", error=TypeError):
        layer(stream(9))


def test_an_attention_that_makes_no_layer_is_named():
    config = ModelConfig(vocab_size=11)
    with refused("attention", "got a NSAttention", error=TypeError):
        DecoderLM(config, NSAttention(SMALL))
    with refused("attention", "got a str", error=TypeError):
        DecoderLM(config, "nsa")
    with refused("attention: <lambda> must make an nn.Module, got NoneType", error=TypeError):
        DecoderLM(config, lambda config: None)


def test_a_block_named_twice_is_refused():
    q, k, v, k_c, v_c, gates = tensors(20)
    ids = ids_for(20)
    selected_attention(q, k, v, ids, select_block_size=8)  # -1 may stand more than once
    ids[1, 0, 17] = torch.tensor([0, 2, 1, 2, -1])
    with refused("ids = [[0, 2, 1, 2, -1]]", "differ"):
        selected_attention(q, k, v, ids, select_block_size=8)
    layer = NSAttention(SMALL, choose=lambda known: Choice(ids), backend="torch")
    with refused("ids = [[0, 2, 1, 2, -1]]", "differ"):
        layer(stream(20))
