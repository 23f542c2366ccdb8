"""The cache: decoding from it is prefill, nothing behind its lengths matters, and what it costs."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsa_lite import DecoderLM, ModelConfig, NSAConfig, NSAttention
from nsa_lite.backend import PLAIN
from nsa_lite.blocks import num_compressed
from nsa_lite.cache import blocks_for
from nsa_lite.cost import cache_bytes
from nsa_lite.rivals.attentions import ATTENTIONS

SIZES = dict(dim=12, heads=4, kv_heads=2, head_dim=4, value_dim=3, block_size=4, stride=2)
SIZES |= dict(select_block_size=4, num_selected=4, window=5)
SMALL = NSAConfig(**SIZES)
KINDS = sorted(set(ATTENTIONS) - {"nsa-random"})
LENGTH = 27  # more than n l' = 16, and a multiple of nothing


def built(kind="nsa", **changes):
    torch.manual_seed(0)
    config = NSAConfig(**{**SIZES, **changes})
    return ATTENTIONS[kind].build(config).double().eval()  # no exploring when decoding


def stream(length=LENGTH, batch=2):
    return torch.randn(batch, length, 12, dtype=torch.float64)


def buffers(cache):
    kept = [x for kv in cache.raw.values() for x in kv]
    kept += [] if cache.blocks is None else cache.blocks
    return kept + ([] if cache.x is None else [cache.x])


def with_nan(cache):
    """Everything that the cache does not hold is NaN."""
    whole = [num_compressed(n, 4, 2) for n in cache.lengths.tolist()]
    for x in buffers(cache):
        blocks = cache.blocks is not None and any(x is y for y in cache.blocks)
        ends = whole if blocks else cache.lengths.tolist()
        for b, end in enumerate(ends):
            rows = x[b] if x is cache.x else x[b].transpose(0, 1)
            rows[end:] = torch.nan
    return cache


def decoded(layer, x, chunks):
    cache = with_nan(layer.new_cache(*x.shape[:2]))
    return torch.cat([layer(part, cache) for part in x.split(chunks, dim=1)], dim=1), cache


def near(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# --- decoding is prefill ---

CHUNKS = [[1] * LENGTH, [8, 8, 8, 3], [20, 7], [3, 15, 9], [LENGTH]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_chunks_are_one_prefill_with_nan_in_the_rest(kind, chunks):
    layer, x = built(kind), stream()
    y, cache = decoded(layer, x, chunks)
    near(y, layer(x))
    assert cache.lengths.tolist() == cache.lengths_on_host.tolist() == [LENGTH] * 2


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(
    "sizes", [{}, dict(block_size=2), dict(select_block_size=8), dict(heads=2)]
)
def test_chunks_are_one_prefill_with_a_shared_window(chunks, sizes):
    layer, x = built(share_window=True, **sizes), stream()
    near(decoded(layer, x, chunks)[0], layer(x))


@pytest.mark.parametrize("first", range(1, LENGTH))
def test_a_step_after_any_length(first):
    layer, x = built(), stream()
    near(decoded(layer, x, [first, LENGTH - first])[0], layer(x))
    near(decoded(layer, x[:, : first + 1], [first, 1])[0], layer(x[:, : first + 1]))


def test_chunks_round_differently_and_no_more():
    """Not bit for bit: sums of other shapes run in another order. In float64 that is 1e-15."""
    layer, x = built(), stream()
    y = layer(x)
    errors = [(decoded(layer, x, chunks)[0] - y).abs().max() for chunks in CHUNKS]
    assert max(errors) < 1e-14


# --- sequences of different lengths ---

ENDS = [1, 5, 20, 13]


def ragged(kind, new, **changes):
    """A batch prefilled with padding and cut to ENDS, then `new` tokens each, as one call."""
    layer = built(kind, **changes)
    x = stream(LENGTH + new, len(ENDS))
    cache = with_nan(layer.new_cache(len(ENDS), 40))
    layer(x[:, : max(ENDS)], cache)
    cache.cut(ENDS)
    with_nan(cache)
    token = torch.stack([x[b, n : n + new] for b, n in enumerate(ENDS)])
    y = layer(token, cache)
    assert cache.lengths.tolist() == [n + new for n in ENDS]
    alone = [layer(x[b : b + 1, : n + new])[:, -new:] for b, n in enumerate(ENDS)]
    return y, torch.cat(alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new", [1, 8, 9])
def test_sequences_of_different_lengths_take_one_step(kind, new):
    near(*ragged(kind, new))


@pytest.mark.parametrize("new", range(1, 9))
def test_they_do_with_a_shared_window(new):
    near(*ragged("nsa", new, share_window=True))


def test_64_sequences_of_64_lengths():
    layer, x = built(), stream(65, 64)
    cache = layer.new_cache(64, 66)
    layer(x[:, :64], cache)
    cache.cut(list(range(64)))
    new = torch.stack([x[b, b : b + 1] for b in range(64)])
    alone = [layer(x[b : b + 1, : b + 1])[:, -1:] for b in range(64)]
    near(layer(new, cache), torch.cat(alone))


def test_last_and_a_loss_go_with_different_lengths():
    layer = built("nsa-kl")
    x = stream(LENGTH, 2)
    cache = layer.new_cache(2, 40)
    layer(x[:, :24], cache)
    cache.cut([24, 18])
    new = torch.stack([x[0, 24:27], x[1, 18:21]])
    y, loss = layer(new, cache, last=2, return_loss=True)
    ends = (x[:1, :27], x[1:, :21])
    near(y, torch.cat([layer(part, last=2) for part in ends]))
    losses = [layer(part, last=2, return_loss=True)[1] for part in ends]
    assert min(losses) > 0
    near(loss, torch.stack(losses).mean())


def test_a_trace_needs_one_length():
    layer = built()
    cache = layer.new_cache(2, 40)
    layer(stream(9), cache)
    y, trace = layer(stream(1), cache, return_trace=True)
    assert trace.start == 9 and trace.ids.shape == (2, 2, 1, 4)
    assert trace.probabilities.shape[-1] == num_compressed(10, 4, 2)
    cache.cut([10, 4])
    with pytest.raises(ValueError, match=r"cache.lengths = \[10, 4\]: return_trace"):
        layer(stream(1), cache, return_trace=True)
    assert cache.lengths.tolist() == [10, 4]  # as it was


def test_rejected_tokens_are_taken_back():
    """Speculative decoding: of each sequence's proposals another number is right."""
    layer, x = built(), stream()
    cache = layer.new_cache(2, 40)
    layer(x[:, :11], cache)
    proposed = torch.cat([x[:, 11:13], stream(4)], dim=1)
    proposed[1, 2:4] = x[1, 13:15]
    layer(proposed, cache)
    cache.cut(torch.tensor([13, 15]))
    new = torch.stack([x[0, 13:16], x[1, 15:18]])
    y = layer(new, with_nan(cache))
    near(y, torch.cat([layer(x[:1, :16])[:, -3:], layer(x[1:, :18])[:, -3:]]))


def test_a_slot_is_cleared_and_filled_while_the_others_wait():
    layer, x = built("nsa-oracle"), stream(LENGTH, 3)
    cache = layer.new_cache(3, 40)
    layer(x[:, :20], cache)
    slot = cache.slots(1, 2)
    for part, whole in zip(buffers(slot), buffers(cache), strict=True):
        assert part.data_ptr() == whole[1].data_ptr()
    slot.cut(0)
    assert cache.lengths.tolist() == [20, 0, 20]
    other = stream(12, 1)
    near(layer(other[:, :7], slot), layer(other[:, :7]))
    assert cache.lengths.tolist() == cache.lengths_on_host.tolist() == [20, 7, 20]
    y = layer(torch.stack([x[0, 20:22], other[0, 7:9], x[2, 20:22]]), cache)
    near(y[::2], layer(x[::2, :22])[:, -2:])
    near(y[1:2], layer(other[:, :9])[:, -2:])


# --- what phi does ---


@pytest.mark.parametrize("block_size, stride", [(4, 2), (4, 4), (6, 2), (2, 1), (1, 1)])
def test_the_blocks_that_new_tokens_end_have_their_rows(block_size, stride):
    """All that end are among them, and no row lies outside, for every length and count."""
    capacity = 23
    config = dict(block_size=block_size, stride=stride, select_block_size=12)
    cache = built(**config).new_cache(1, capacity)
    rows = cache.blocks.k.shape[2]
    assert rows == blocks_for(capacity, stride)
    for after in range(1, capacity + 1):
        for count in range(1, after + 1):
            cache.put_lengths(torch.tensor([after]))
            blocks = cache.next_blocks(count, block_size, stride)[0].tolist()
            before = num_compressed(after - count, block_size, stride)
            ended = range(before, num_compressed(after, block_size, stride))
            assert blocks[0] == before and set(ended) <= set(blocks) and blocks[-1] < rows
            cache.put_lengths(torch.tensor([after - count]))
            assert cache.ends_blocks(count, block_size, stride) == (len(ended) > 0)


def test_phi_is_asked_only_when_a_block_ends():
    layer = built(block_size=4, stride=4)
    calls = []
    layer.phi_k.register_forward_hook(lambda *_: calls.append(int(cache.lengths[0])))
    cache = layer.new_cache(2, 40)
    for token in stream(20).split(1, dim=1):
        layer(token, cache)
    assert calls == [4, 8, 12, 16, 20]
    cache.cut([18, 19])
    layer(stream(1), cache)
    assert calls[5:] == [19]  # the second sequence ends its block at 20, so phi is asked for both


# --- allocated once ---


@pytest.mark.parametrize("kind", ["nsa", "nsa-oracle", "dense"])
def test_it_grows_in_place(kind):
    layer = built(kind)
    cache = layer.new_cache(2, 40)
    before = [x.data_ptr() for x in (*buffers(cache), cache.lengths, cache.lengths_on_host)]
    for part in stream().split([9, 1, 1, 16], dim=1):
        layer(part, cache)
    after = [x.data_ptr() for x in (*buffers(cache), cache.lengths, cache.lengths_on_host)]
    assert before == after and cache.capacity == 40


def test_it_keeps_no_history():
    layer = built()
    cache = layer.new_cache(2, 40)
    x = stream().requires_grad_()
    assert not layer(x, cache).requires_grad
    assert not any(b.requires_grad for b in buffers(cache))
    model = DecoderLM(ModelConfig(vocab_size=11, nsa=SMALL))
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    assert not model(tokens, model.new_caches(1, 5)).requires_grad
    assert model(tokens).requires_grad


def test_a_rule_that_comes_back_finds_all_inputs():
    layer, x = built("nsa-oracle"), stream()
    cache = layer.new_cache(2, 40)
    rule = layer.choose
    layer(x[:, :9], cache)
    layer.choose = None
    layer(x[:, 9:20], cache)
    layer.choose = rule
    layer(x[:, 20:], cache)
    assert torch.equal(cache.x[:, :LENGTH], x)


def test_it_says_how_far_it_is():
    cache = built().new_cache(2, 40)
    cache.put_lengths(torch.tensor([3, 5]))
    assert repr(cache) == "Cache(lengths = [3, 5], capacity = 40)"


def test_memory_by_hand():
    a_row = 2 * (4 + 3) * 8  # G (D + Dv) float64
    assert built().new_cache(3, 41).memory() == {
        "compressed": 3 * 21 * a_row,  # 41 / 2, rounded up
        "phi's tokens": 3 * 41 * a_row,
        "selected": 3 * 41 * a_row,
        "window": 3 * 41 * a_row,
    }
    shared = built(share_window=True).new_cache(3, 41).memory()
    assert shared["window"] == 0 and shared["selected"] == 3 * 41 * a_row
    assert built("nsa-oracle").new_cache(3, 41).memory()["inputs"] == 3 * 41 * 12 * 8
    assert built("dense").new_cache(3, 41).memory() == {"window": 3 * 41 * a_row}
    half = built("dense").new_cache(3, 41, dtype=torch.bfloat16).memory()
    assert half == {"window": 3 * 41 * a_row // 4}


def test_it_is_larger_than_dense_attentions_and_than_it_must_be():
    nsa = sum(built().new_cache(1, 1000).memory().values())
    dense = sum(built("dense").new_cache(1, 1000).memory().values())
    assert nsa == 3.5 * dense  # three pairs, and d = 2 halves the fourth
    assert dense == cache_bytes(SMALL, 1000, "dense", bytes_per_number=8)
    assert dense < cache_bytes(SMALL, 1000, bytes_per_number=8) < nsa


def test_the_least_that_must_be_kept_with_a_shared_window():
    width = 2 * (4 + 3)
    shared = NSAConfig(**SIZES, share_window=True)
    assert cache_bytes(SMALL, 20, bytes_per_number=1) == (20 + 5 + 9 + 4) * width
    assert cache_bytes(shared, 20, bytes_per_number=1) == (20 + 9 + 4) * width


def read_back(cache):
    return pickle.loads(pickle.dumps(cache))


def saved(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, read_back, saved])
def test_a_copy_goes_on_by_itself(copied):
    layer, x = built(share_window=True), stream()
    cache = layer.new_cache(2, 40)
    layer(x[:, :20], cache)
    other = copied(cache)
    assert cache.owner == id(layer) and other.owner is None
    assert other.raw["window"] is other.raw["selected"]
    y = layer(x[:, 20:], other)
    with refused(ValueError, "another layer fills it"):  # whoever comes first keeps a copy
        built(share_window=True)(x[:, :1], other)
    assert cache.lengths.tolist() == [20, 20] and other.lengths.tolist() == [27, 27]
    assert torch.equal(layer(x[:, 20:], cache), y)


def test_who_was_refused_does_not_keep_the_cache():
    layer = built()
    cache = copy.deepcopy(layer.new_cache(2, 20))  # of no layer's
    with refused(ValueError, "cache.blocks.v.shape"):
        built(value_dim=5)(stream(3), cache)
    assert cache.owner is None
    assert layer(stream(3), cache).shape == (2, 3, 12)


@pytest.mark.parametrize("kind", ["nsa-oracle", "dense"])
def test_a_cache_made_in_inference_mode_grows_outside_too(kind):
    layer, x = built(kind), stream()
    with torch.inference_mode():
        cache = layer.new_cache(2, 40)
        y = layer(x[:, :20], cache)
    near(torch.cat([y, layer(x[:, 20:], cache)], dim=1), layer(x))


# --- the device is not waited for ---


@pytest.mark.parametrize("new", [1, 2, 8])
@pytest.mark.parametrize("length", [3, 9])
def test_a_step_looks_at_no_number_on_the_device(new, length, monkeypatch):
    """On "meta" there are none: whoever asked for one would fail."""
    layer = NSAttention(SMALL).to("meta")
    operations = PLAIN._replace(decode_step=lambda q, cache, gates, **_: q[..., :3])
    monkeypatch.setattr("nsa_lite.backend.PLAIN", operations)
    cache = layer.new_cache(2, 20)
    cache.lengths_on_host.copy_(torch.tensor([length, length + 1]))
    y = layer(torch.empty(2, new, 12, device="meta"), cache)
    assert y.shape == (2, new, 12) and y.is_meta
    assert cache.lengths_on_host.tolist() == [length + new, length + 1 + new]
    with pytest.raises(ValueError, match="do not fit"):
        layer(torch.empty(2, 18, 12, device="meta"), cache)


class Touched(TorchDispatchMode):
    """Counts the numbers that operations take and give, and those they take out of a cache.

    Views touch nothing; an index takes as many as it gives, a write puts as many as it is given.
    """

    def __init__(self, cache):
        super().__init__()
        self.cache = {x.untyped_storage().data_ptr() for x in buffers(cache)}
        self.all = 0
        self.of_the_cache = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        sparse = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_)
        for x in given + made:
            kept = x.untyped_storage().data_ptr() in self.cache
            self.all += 0 if kept and sparse else x.numel()
            if kept and any(x is y for y in given):
                self.of_the_cache += read_by(func, x, made, sparse)
        return result


def read_by(func, x, made, sparse):
    """How many of a cache's numbers an operation takes out of the buffer x."""
    if func.overloadpacket is torch.ops.aten.index_put_:
        return 0
    return made[0].numel() if sparse else x.numel()


def touched(length, capacity, batch=2, dtype=torch.float64, **changes):
    layer = built(**changes).to(dtype)
    cache = layer.new_cache(batch, capacity)
    layer(stream(length, batch).to(dtype), cache)
    token = stream(1, batch).to(dtype)
    with Touched(cache) as seen:
        layer(token, cache)
    return seen


@pytest.mark.parametrize("length", [100, 101])  # with phi, and without
def test_a_step_costs_the_same_whatever_the_room(length):
    small, large = touched(length, 110), touched(length, 4000)
    assert small.all == large.all and small.of_the_cache == large.of_the_cache


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("share", [False, True])
def test_a_step_reads_what_the_paper_counts(share, dtype):
    """T/d compressed, n l' selected, w of the window; the compressed keys twice, by this form."""
    groups, batch, d, dv = 2, 2, 4, 3
    for length in (41, 100, 200):  # tokens when the step has come; each ends a block or none
        found = touched(length - 1, length, share_window=share, dtype=dtype).of_the_cache
        compressed = num_compressed(length, 4, 2) * (2 * d + dv)
        selected = 4 * 4 * (d + dv)
        window = 5 * (d + dv)
        phi = 4 * (d + dv) if length % 2 == 0 else 0
        assert found == batch * groups * (compressed + selected + window + phi)


# --- one pair of keys and values for selection and window ---


def test_a_shared_window_is_two_branches_with_the_same_weights():
    shared, apart = built(share_window=True), built()
    assert set(shared.keys) == set(shared.values) == {"compressed", "selected"}
    weights = shared.state_dict()
    for maps in ("keys", "values"):
        weights[f"{maps}.window.weight"] = weights[f"{maps}.selected.weight"]
    apart.load_state_dict(weights)
    x = stream()
    near(shared(x), apart(x))
    assert not torch.allclose(built()(x), shared(x))


def test_a_config_from_before_has_windows_of_its_own():
    fields = SMALL.as_dict()
    assert fields.pop("share_window") is False
    assert NSAConfig(**fields) == SMALL


def test_sharing_by_a_number_is_refused():
    with pytest.raises(TypeError, match="share_window = 1: must be True or False"):
        NSAConfig(share_window=1)


class Only(torch.nn.Module):
    """Gates that let one branch through."""

    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        gates = torch.zeros(x.shape[0], 4, x.shape[1], 3, dtype=x.dtype)
        gates[..., self.branch] = 1.0
        return gates


def test_its_gradients_reach_the_shared_maps_from_both_branches():
    layer, x = built(share_window=True), stream()
    out = {}
    for branch in (1, 2):  # selected, window: each alone
        layer.zero_grad()
        layer.gate = Only(branch)
        layer(x).square().sum().backward()
        out[branch] = layer.keys["selected"].weight.grad.clone()
    assert all(grad.abs().max() > 0 for grad in out.values())
    assert not torch.allclose(out[1], out[2])


# --- bad input ---


def refused(error, *words):
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(w) for w in words))


@pytest.mark.parametrize("kind", ["nsa", "dense"])
def test_sizes_of_a_new_cache_that_are_refused(kind):
    layer = built(kind)
    for batch, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with refused(error, f"batch = {batch}", "must be"):
            layer.new_cache(batch, 5)
        with refused(error, f"capacity = {batch}", "must be"):
            layer.new_cache(1, batch)


CUTS = [
    (
        11,
        ValueError,
        "lengths = [11, 11]: must lie between 0 and what each sequence holds, [10, 8]",
    ),
    ([9, 9], ValueError, "lengths = [9, 9]: must lie"),
    ([-1, 8], ValueError, "lengths = [-1, 8]: must lie"),
    ([5], ValueError, "lengths.shape = (1,): must be one for each of 2 sequences"),
    (torch.tensor([5.0, 5.0]), TypeError, "must be an int or one int a sequence"),
    (True, TypeError, "lengths = True: must be an int"),
    ([1.5, 2], TypeError, "must be an int"),
    ([True, False], TypeError, "must be an int"),
    ("12", TypeError, "must be an int"),
]


@pytest.mark.parametrize(("lengths", "error", "words"), CUTS)
def test_cuts_that_are_refused(lengths, error, words):
    layer = built()
    cache = layer.new_cache(2, 20)
    layer(stream(10), cache)
    cache.cut([10, 8])
    with refused(error, words):
        cache.cut(lengths)
    assert cache.lengths.tolist() == cache.lengths_on_host.tolist() == [10, 8]


def test_slots_that_are_not_there():
    cache = built().new_cache(2, 20)
    with refused(ValueError, "end = 3", "2 sequences"):
        cache.slots(0, 3)
    with refused(ValueError, "end = 1", "at least 2"):
        cache.slots(1, 1)
    with refused(ValueError, "first = -1"):
        cache.slots(-1, 1)


def test_a_cache_of_another_dtype_config_or_device():
    layer = built()
    with refused(TypeError, "cache.blocks.k.dtype = torch.float32", "torch.float64"):
        layer(stream(3), layer.new_cache(2, 20, dtype=torch.float32))
    for change, words in (
        (dict(value_dim=5), "cache.blocks.v.shape = (2, 2, 10, 5)"),
        (dict(kv_heads=4), "cache.blocks.k.shape = (2, 4, 10, 4)"),
        (dict(stride=4), "cache.blocks.k.shape = (2, 2, 5, 4)"),
        (dict(share_window=True), "cache.raw['window']"),
    ):
        with refused(ValueError, words):
            layer(stream(3), copy.deepcopy(built(**change).new_cache(2, 20)))  # of no layer's
    with refused(ValueError, "cache.blocks = None"):
        layer(stream(3), copy.deepcopy(built("dense").new_cache(2, 20)))
    with refused(ValueError, "cache.raw = ['compressed', 'selected', 'window']", "['window']"):
        built("dense")(stream(3), copy.deepcopy(layer.new_cache(2, 20)))
    elsewhere = copy.deepcopy(built().to("meta").new_cache(2, 20))
    with refused(ValueError, "cache.lengths.device = meta", "cpu"):
        layer(stream(3), elsewhere)


def test_inputs_of_another_width():
    layer = built("nsa-oracle")
    cache = copy.deepcopy(built("nsa-oracle", dim=14).new_cache(2, 20))
    with refused(ValueError, "cache.x.shape = (2, 20, 14)"):
        layer(stream(3), cache)


def test_autocast_has_a_cache_in_its_own_dtype():
    torch.manual_seed(0)
    layer = NSAttention(SMALL)
    x = torch.randn(2, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        with refused(TypeError, "cache.blocks.k.dtype = torch.float32", "torch.bfloat16"):
            layer(x, layer.new_cache(2, 12))
        cache = layer.new_cache(2, 12, dtype=torch.bfloat16)
        y = torch.cat([layer(part, cache) for part in x.split([9, 1, 2], dim=1)], dim=1)
        torch.testing.assert_close(y, layer(x), rtol=5e-2, atol=5e-2)


def test_a_model_whose_attention_keeps_nothing_says_so():
    class Bare(torch.nn.Module):
        def __init__(self, config):
            super().__init__()

    model = DecoderLM(ModelConfig(vocab_size=11, nsa=SMALL), Bare)
    with refused(TypeError, "attention: Bare has no new_cache"):
        model.new_caches(1, 5)


def test_a_list_without_a_cache_for_each_layer_is_refused():
    """A layer without its cache would forget what came before, and say nothing."""
    model = DecoderLM(ModelConfig(vocab_size=11, nsa=SMALL))
    caches = model.new_caches(1, 5)
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    for given, words in (
        ([caches[0], None], "caches[1]: must be a Cache, got NoneType"),
        (caches[0], "caches: must be a list, as new_caches makes it, got Cache"),
    ):
        with refused(TypeError, words):
            model(tokens, given)
    assert [cache.lengths.tolist() for cache in caches] == [[0], [0]]
