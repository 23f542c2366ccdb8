"""What a caller of a layer, a model or a cache gets wrong, one row each; nothing is changed by it.

Each row is a TypeError or a ValueError that names the argument, its value and the rule; then the
odd calls with a result that the docstrings document. Operations are in test_bad_calls.py.
"""

import copy
import math
import pickle
import re
from functools import partial

import pytest
import torch

from nsa_lite import (
    Choice,
    DecoderLM,
    DenseAttention,
    ModelConfig,
    NSAConfig,
    NSAttention,
    Phi,
    cost,
    generate,
    stream,
)
from nsa_lite.gates import Gate
from nsa_lite.generation import CapturedStep, step_of
from nsa_lite.rivals import attentions, budgets, neighbours, rules, taught

NAN = math.nan
HUGE = 10**30
SMALL = NSAConfig.small()


def tokens(length=4, batch=2):
    return torch.arange(batch * length).view(batch, length) % 7


def inputs(length=4, batch=2):
    torch.manual_seed(length)
    return torch.randn(batch, length, 64)


def model(attention=NSAttention):
    torch.manual_seed(0)
    return DecoderLM(ModelConfig(vocab_size=7), attention)


def refused(error, words):
    return pytest.raises(error, match="^" + re.escape(words))


# --- configs ---

TAKE_A_CONFIG = {
    "NSAttention": NSAttention,
    "DenseAttention": DenseAttention,
    "Gate": Gate,
    "Indexer": taught.Indexer,
    "BCEOverSoftmax": taught.BCEOverSoftmax,
    "paper_tokens": lambda config: cost.paper_tokens(config, 8),
    "tokens_read": lambda config: cost.tokens_read(config, 8),
    "query_cost": lambda config: cost.query_cost(config, 8),
    "sequence_cost": lambda config: cost.sequence_cost(config, 8),
    "compression_flops": lambda config: cost.compression_flops(config, 8),
    "cache_bytes": lambda config: cost.cache_bytes(config, 8),
    **{name: attention.build for name, attention in attentions.ATTENTIONS.items()},
}


@pytest.mark.parametrize("name", TAKE_A_CONFIG)
@pytest.mark.parametrize("config", [None, {"dim": 64}, NSAConfig, ModelConfig(vocab_size=7)])
def test_a_config_of_another_kind(name, config):
    got = "the class NSAConfig" if config is NSAConfig else type(config).__name__
    with refused(TypeError, f"config: must be an NSAConfig, got {got}"):
        TAKE_A_CONFIG[name](config)


@pytest.mark.parametrize("config", [None, {"vocab_size": 7}, SMALL, ModelConfig])
def test_a_models_config_of_another_kind(config):
    with refused(TypeError, "config: must be a ModelConfig, got"):
        DecoderLM(config)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        (dict(dim=1), ValueError, "dim = 1: must be at least 2"),
        (dict(dim=HUGE), ValueError, f"dim = {HUGE}: must be at most 9007199254740992"),
        (dict(window=HUGE), ValueError, f"window = {HUGE}: must be at most"),
        (dict(num_selected=HUGE), ValueError, f"num_selected = {HUGE}: must be at most"),
        (dict(rope_theta=10**400), ValueError, "rope_theta = 1"),
        (dict(rope_theta=NAN), TypeError, "rope_theta = nan: must be an int, got float"),
        (dict(phi=["mlp"]), ValueError, "phi = ['mlp']: must be one of"),
        (dict(share_window=None), TypeError, "share_window = None: must be True or False"),
    ],
)
def test_fields_of_a_config(fields, error, words):
    with refused(error, words):
        NSAConfig.small(**fields)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        (dict(vocab_size=HUGE), ValueError, f"vocab_size = {HUGE}: must be at most"),
        (dict(vocab_size=NAN), TypeError, "vocab_size = nan: must be an int"),
        (dict(vocab_size=7, layers=HUGE), ValueError, f"layers = {HUGE}: must be at most"),
        (dict(vocab_size=7, nsa=None), TypeError, "nsa: must be an NSAConfig, got NoneType"),
        (dict(vocab_size=7, nsa=NSAConfig), TypeError, "nsa: must be an NSAConfig, got the class"),
    ],
)
def test_fields_of_a_models_config(fields, error, words):
    with refused(error, words):
        ModelConfig(**fields)


# --- layers ---

LAYER_CALLS = [
    (dict(last=9), ValueError, "last = 9: must not exceed the 4 tokens of x"),
    (dict(last=0), ValueError, "last = 0: must be at least 1"),
    (dict(last=2.0), TypeError, "last = 2.0: must be an int, got float"),
    (dict(last=True), TypeError, "last = True: must be an int, got bool"),
    (dict(x=inputs(18)), ValueError, "cache = Cache: holds 3 of 20 tokens, 18 more do not fit"),
    (dict(x=inputs(1, 3)), ValueError, "cache.lengths = 2 of them: must be one for each of x's 3"),
    (dict(x=inputs(1, 0)), ValueError, "x.shape = (0, 1, 64): must hold at least one sequence"),
    (dict(x=inputs(1).half()), TypeError, "x.dtype = torch.float16: must be weight.dtype"),
    (dict(x=inputs(1).to("meta")), ValueError, "x.device = meta: must be weight.device = cpu"),
    (dict(x=inputs(1).to_sparse()), ValueError, "x.layout = torch.sparse_coo: must be torch.str"),
    (dict(cache={}), TypeError, "cache: must be a Cache, as a layer's new_cache makes it, got dic"),
]  # fmt: skip


def everything(cache):
    """All numbers of a cache, those behind its lengths too."""
    pairs = [*cache.raw.values(), *([] if cache.blocks is None else [cache.blocks])]
    kept = [x.clone() for pair in pairs for x in pair]
    return [*kept, cache.lengths.clone(), cache.lengths_on_host.clone()]


def same(some, others):
    return all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("kind", [NSAttention, DenseAttention])
@pytest.mark.parametrize(("change", "error", "words"), LAYER_CALLS)
def test_a_refused_call_of_a_layer_changes_no_number_of_its_cache(kind, change, error, words):
    layer = kind(SMALL)
    cache = layer.new_cache(2, 20)
    layer(inputs(3), cache)
    before = everything(cache)
    given = dict(x=inputs(), cache=cache) | change
    with refused(error, words):
        layer(given.pop("x"), **given)
    assert same(everything(cache), before) and cache.owner == id(layer)


def test_a_trace_of_sequences_of_different_lengths_is_refused_first():
    layer = NSAttention(SMALL)
    cache = layer.new_cache(2, 20)
    layer(inputs(9), cache)
    cache.cut([9, 4])
    before = everything(cache)
    with refused(ValueError, "cache.lengths = [9, 4]: return_trace"):
        layer(inputs(1), cache, return_trace=True)
    assert same(everything(cache), before)


def answer(known, **changes):
    batch, _, length, _ = known.q.shape
    return Choice(**dict(ids=torch.zeros(batch, 2, length, 1).int()) | changes)


@pytest.mark.parametrize(
    ("choice", "error", "words"),
    [
        (dict(ids=None), TypeError, "ids: must be an int32 or int64 tensor (B, G, T, n), got None"),
        (dict(ids=torch.zeros(2, 2, 4, 1)), TypeError, "ids: must be an int32 or int64 tensor"),
        (
            dict(ids=torch.zeros(2, 2, 4, 0).int()),
            ValueError,
            "ids.shape = (2, 2, 4, 0): must name",
        ),
        (dict(ids=torch.full((2, 2, 4, 1), 9)), ValueError, "ids = 9 .. 9: must lie in -1 .. 0"),
        (dict(loss=0.5), TypeError, "choice.loss: must be a torch.Tensor (a scalar), got float"),
        (dict(loss=torch.zeros(3)), ValueError, "choice.loss.shape = (3,): must be ()"),
        (dict(loss=torch.tensor(3)), TypeError, "choice.loss.dtype = torch.int64: must be a float"),
        (dict(attention=3), TypeError, "choice.attention: must be a function as nsa_attention is"),
    ],
)
def test_what_a_rule_returns(choice, error, words):
    layer = NSAttention(SMALL, choose=partial(answer, **choice))
    with refused(error, words):
        layer(inputs())


@pytest.mark.parametrize("kind", [NSAttention, DenseAttention])
@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        (dict(batch=HUGE), ValueError, f"batch = {HUGE}: must be at most"),
        (dict(capacity=HUGE), ValueError, f"capacity = {HUGE}: must be at most"),
        (dict(capacity=None), TypeError, "capacity = None: must be an int, got NoneType"),
        (dict(dtype=torch.int32), TypeError, "dtype = torch.int32: must be None or a floating-poi"),
        (
            dict(dtype=torch.complex64),
            TypeError,
            "dtype = torch.complex64: must be None or a float",
        ),
        (dict(dtype="float32"), TypeError, "dtype = 'float32': must be None or a floating-point"),
    ],
)
def test_sizes_and_types_of_a_cache(kind, sizes, error, words):
    with refused(error, words):
        kind(SMALL).new_cache(**dict(batch=2, capacity=9) | sizes)


def test_phi():
    phi = Phi(6, 4, 2)
    for x, error, words in (
        (None, TypeError, "x: must be a torch.Tensor (B, G, T, D), got NoneType"),
        (torch.zeros(1, 2, 8, 6).double(), TypeError, "x.dtype = torch.float64: must be position"),
        (torch.zeros(1, 2, 8, 6, device="meta"), ValueError, "x.device = meta: must be position"),
    ):
        with refused(error, words):
            phi(x)
    with refused(ValueError, f"width = {HUGE}: must be at most"):
        Phi(HUGE, 4, 2)


# --- caches ---


def three_tokens():
    cache = NSAttention(SMALL).new_cache(2, 20)
    cache.lengths += 3
    cache.lengths_on_host += 3
    return cache


@pytest.mark.parametrize(
    ("lengths", "error", "words"),
    [
        (HUGE, ValueError, f"lengths = {HUGE}: must be at most"),
        ([-HUGE, 1], ValueError, f"lengths = [{-HUGE}, 1]: must be at most"),
        ([], ValueError, "lengths.shape = (0,): must be one for each of 2 sequences"),
        ("3", TypeError, "lengths = '3': must be an int or one int a sequence"),
        (NAN, TypeError, "lengths = nan: must be an int or one int a sequence"),
        (torch.tensor(1), ValueError, "lengths.shape = (): must be one for each of 2"),
        (torch.tensor([True, False]), TypeError, "lengths = tensor([ True, False]): must be an in"),
        (torch.tensor([1, 2], device="meta"), ValueError, "lengths.device = meta: must hold numbe"),
    ],
)  # fmt: skip
def test_cuts(lengths, error, words):
    cache = three_tokens()
    with refused(error, words):
        cache.cut(lengths)
    assert cache.lengths.tolist() == cache.lengths_on_host.tolist() == [3, 3]


def set_in_place(cache):
    cache.lengths[0] = 1


def set_anew(cache):
    cache.lengths = torch.tensor([1, 3])


def set_on_the_host(cache):
    cache.lengths_on_host[0] = 1


def set_to_one(cache):
    cache.lengths = torch.tensor([3])


@pytest.mark.parametrize("change", [set_in_place, set_anew, set_on_the_host, set_to_one])
def test_lengths_that_were_set_by_hand_are_refused(change):
    language = model()
    caches = language.new_caches(2, 20)
    language(tokens(3), caches)
    change(caches[0])
    caches[1].cut(caches[0].lengths_on_host)
    with refused(ValueError, "cache.lengths = tensor("):
        language(tokens(1), caches)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_of_a_slot_has_its_own_rows_only(copied):
    layer = NSAttention(NSAConfig.small(share_window=True))
    cache = layer.new_cache(16, 40)
    layer(inputs(27, 16), cache)
    slot = copied(cache.slots(3, 5))
    assert slot.raw["window"] is slot.raw["selected"]
    kept = [x for pair in (*slot.raw.values(), slot.blocks) for x in pair]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in kept)
    assert len(pickle.dumps(cache.slots(3, 5))) < len(pickle.dumps(cache)) / 4
    y = layer(inputs(1, 16), cache)
    torch.testing.assert_close(layer(inputs(1, 16)[3:5], slot), y[3:5], rtol=1e-5, atol=1e-6)


# --- models ---


def twice(caches):
    return caches[:1] * 2


def shallow(caches):
    return [caches[0], copy.copy(caches[0])]


def cut_one(caches):
    caches[1].cut([3, 1])
    return caches


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (lambda caches: {}, TypeError, "caches: must be a list, as new_caches makes it, got dict"),
        (iter, TypeError, "caches: must be a list, as new_caches makes it, got list_iterator"),
        (lambda caches: [], ValueError, "len(caches) = 0: must hold one for each of 2 layers"),
        (lambda caches: [{}] * 2, TypeError, "caches[0]: must be a Cache, got dict"),
        (lambda caches: [caches[0], None], TypeError, "caches[1]: must be a Cache, got NoneType"),
        (twice, ValueError, "caches[1] = Cache(lengths = [3, 3], capacity = 20): must have memory"),
        (shallow, ValueError, "caches[1] = Cache(lengths = [3, 3], capacity = 20): must have memo"),
        (
            cut_one,
            ValueError,
            "caches[1].lengths = tensor([3, 1]): must be those of caches[0], ten",
        ),
        (lambda caches: caches[::-1], ValueError, "cache = Cache: another layer fills it"),
    ],
)
@pytest.mark.parametrize("kind", [NSAttention, DenseAttention])
def test_caches_of_a_model(kind, given, error, words):
    language = model(kind)
    caches = language.new_caches(2, 20)
    language(tokens(3), caches)
    wrong = given(caches)
    before = [everything(cache) for cache in caches]
    with refused(error, words):
        language(tokens(1), wrong)
    assert all(same(everything(cache), kept) for cache, kept in zip(caches, before, strict=True))


@pytest.mark.parametrize("last", [9, 0, 2.0, True])
def test_a_refused_last_leaves_every_cache_of_a_model_as_it_was(last):
    language = model()
    caches = language.new_caches(2, 20)
    language(tokens(3), caches)
    before = [everything(cache) for cache in caches]
    with pytest.raises((TypeError, ValueError), match=f"^last = {last}: must"):
        language(tokens(4), caches, last=last)
    assert all(same(everything(cache), kept) for cache, kept in zip(caches, before, strict=True))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (None, TypeError, "{}: must be an int64 tensor (B, T), got NoneType"),
        (torch.zeros(1, 2).bool(), TypeError, "{}: must be an int64 tensor (B, T), got torch.bool"),
        (tokens().int(), TypeError, "{}: must be an int64 tensor (B, T), got torch.int32"),
        (tokens(3, 0), ValueError, "{}.shape = (0, 3): must be (B, T) or (B, T, S)"),
        (torch.zeros(1, 2, 0).long(), ValueError, "{}.shape = (1, 2, 0): must be (B, T) or"),
        (torch.zeros(1, 2, 3, 4).long(), ValueError, "{}.shape = (1, 2, 3, 4): must be (B, T) or"),
        (tokens().to("meta"), ValueError, "{}.device = meta: must be the model's, cpu"),
        (torch.tensor([[7]]), ValueError, "{} = 7 .. 7: must lie in 0 .. vocab_size - 1 = 6"),
        (torch.tensor([[-1]]), ValueError, "{} = -1 .. -1: must lie in 0 .. vocab_size - 1 = 6"),
    ],
)
def test_tokens(given, error, words):
    with refused(error, words.format("tokens")):
        model()(given)
    for write in (generate, stream):
        with pytest.raises(error, match="^prompt"):
            write(model(), given, 2)


# --- generation ---


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(model=None), TypeError, "model: must be a DecoderLM, got NoneType"),
        (dict(model=NSAttention(SMALL)), TypeError, "model: must be a DecoderLM, got NSAttention"),
        (dict(model=DecoderLM), TypeError, "model: must be a DecoderLM, got the class DecoderLM"),
        (dict(count=HUGE), ValueError, f"count = {HUGE}: must be at most"),
        (dict(count=None), TypeError, "count = None: must be an int"),
        (dict(temperature=math.inf), ValueError, "temperature = inf: must be at least 0 and at mo"),
        (dict(temperature=10**400), ValueError, "temperature = 1"),
        (dict(temperature=1j), TypeError, "temperature = 1j: must be a number, got complex"),
        (dict(temperature=torch.tensor(1.0)), TypeError, "temperature = tensor(1.): must be a num"),
        (dict(top_p=NAN), ValueError, "top_p = nan: must lie above 0 and not above 1"),
        (dict(top_p=-0.5), ValueError, "top_p = -0.5: must lie above 0 and not above 1"),
        (dict(top_p=None), TypeError, "top_p = None: must be a number, got NoneType"),
        (dict(generator=3), TypeError, "generator: must be a torch.Generator, got int"),
        (dict(generator="seed", temperature=1), TypeError, "generator: must be a torch.Generator"),
        (dict(generator=torch.Generator), TypeError, "generator: must be a torch.Generator, got t"),
        (dict(stop=HUGE), ValueError, f"stop = {HUGE}: must be at most"),
        (dict(stop=True), TypeError, "stop = True: must be an int, got bool"),
        (dict(lengths=HUGE), ValueError, f"lengths = {HUGE}: must be at most"),
        (dict(lengths=True), TypeError, "lengths = True: must be an int or one int a sequence"),
        (dict(lengths=-1), ValueError, "lengths = -1 .. -1: must lie in 1 .. T = 4"),
        (dict(lengths=torch.tensor([3, 3], device="meta")), ValueError, "lengths.device = meta"),
    ],
)  # fmt: skip
def test_generation(change, error, words):
    given = dict(model=model(), prompt=tokens(), count=2) | change
    for write in (generate, stream):
        with refused(error, words):
            write(**given)


class Elsewhere(torch.Generator):
    """Stands for a generator of a GPU."""

    device = torch.device("cuda")


def test_a_generator_of_another_device():
    with refused(ValueError, "generator.device = cuda: must be the model's, cpu"):
        generate(model(), tokens(), 2, temperature=1.0, generator=Elsewhere())


def test_a_step_takes_one_token_a_sequence():
    language = model()
    caches = language.new_caches(2, 9)
    language(tokens(3), caches)
    with refused(ValueError, "cache.lengths = 2 of them: must be one for each of x's 1 sequences"):
        step_of(language, caches)(torch.tensor([1]))
    captured = CapturedStep(language, caches)
    with refused(ValueError, "tokens.shape = (1,): must be (B,) = (2,), one for each sequence"):
        captured(torch.tensor([1]))
    caches[1].cut([3, 1])
    with refused(ValueError, "caches[1].lengths = tensor([3, 1]): must be those of caches[0]"):
        captured(torch.tensor([1, 2]))
    assert caches[0].lengths.tolist() == [3, 3]


# --- what it costs ---


@pytest.mark.parametrize("function", [cost.query_cost, cost.sequence_cost, cost.cache_bytes])
@pytest.mark.parametrize(
    ("bytes_per_number", "error"),
    [(0, ValueError), (-2, ValueError), (NAN, ValueError), (True, TypeError), ("2", TypeError)],
)
def test_bytes_per_number(function, bytes_per_number, error):
    with refused(error, f"bytes_per_number = {bytes_per_number!r}: must be"):
        function(SMALL, 8, bytes_per_number=bytes_per_number)


# --- rivals ---

Q = torch.ones(1, 4, 8, 6)
K = torch.ones(1, 2, 8, 6)
METHODS = {
    neighbours.streaming_llm: dict(sinks=1, window=2),
    neighbours.h2o: dict(recent=1, heavy=1),
    neighbours.quest: dict(page=2, pages=2),
    neighbours.sample_attention: dict(share=0.9, window=2, every=2),
}
SIZES = [(method, size) for method, sizes in METHODS.items() for size in sizes if size != "share"]


@pytest.mark.parametrize(("method", "size"), SIZES, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize(
    ("value", "error"),
    [(2.0, TypeError), (True, TypeError), ("2", TypeError), (-1, ValueError), (HUGE, ValueError)],
)
def test_sizes_of_a_neighbour(method, size, value, error):
    with refused(error, f"{size} = {value!r}: must be"):
        method(Q, K, K, **METHODS[method] | {size: value})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("scale", "error"),
    [(0, ValueError), (-1, ValueError), (NAN, ValueError), (True, TypeError), ("1", TypeError)],
)
def test_scales_of_a_neighbour(method, scale, error):
    with refused(error, f"scale = {scale!r}: must be"):
        method(Q, K, K, **METHODS[method], scale=scale)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: neighbours.streaming_llm(Q, K, K, sinks=1, window=2, theta=0), ValueError,
         "theta = 0: must be positive"),
        (lambda: neighbours.smallest_columns(Q, NAN), ValueError, "share = nan: must lie in 0 .."),
        (lambda: neighbours.smallest_columns(Q, True), TypeError, "share = True: must be a number"),
        (lambda: neighbours.smallest_columns(Q, "1"), TypeError, "share = '1': must be a number"),
        (lambda: neighbours.page_bounds(K, 0), ValueError, "page = 0: must be at least 1"),
        (lambda: neighbours.page_bounds(K, 2.0), TypeError, "page = 2.0: must be an int"),
        (lambda: rules.block_mass(Q, K, 0), ValueError, "select_block_size = 0: must be at least"),
        (lambda: rules.block_mass(Q, K, 4, start=1), ValueError, "k.shape = (1, 2, 8, 6): must ho"),
        (lambda: rules.block_mass(Q, K, 4, start=-1), ValueError, "start = -1: must be at least 0"),
        (lambda: budgets.at_budget("Quest", 8, 0), ValueError, "page = 0: must be at least 1"),
        (lambda: budgets.at_budget("Quest", 8.0, 2), TypeError, "budget = 8.0: must be an int"),
        (lambda: budgets.at_budget("Quest", 1, 2), ValueError, "budget = 1: is too small for Ques"),
        (lambda: budgets.at_budget("H2O", 1, 2), ValueError, "budget = 1: is too small for H2O"),
        (lambda: budgets.at_budget("StreamingLLM", 4, 2), ValueError, "budget = 4: is too small f"),
        (lambda: budgets.reading(None, "Quest", page=2, pages=2), TypeError, "model: must be a De"),
        (lambda: budgets.reading(model(), "Quest", page=2, pages=2), TypeError,
         "model.attentions: must be of the kind DenseAttention, got NSAttention"),
        (lambda: budgets.with_blocks(model(DenseAttention), 4), TypeError,
         "model.attentions: must be of the kind NSAttention, got DenseAttention"),
        (lambda: budgets.with_blocks(model(), 2), ValueError, "num_selected = 2: must be at least"),
    ],
)  # fmt: skip
def test_other_calls_of_the_rivals(call, error, words):
    with refused(error, words):
        call()


# --- odd calls with a documented result ---


def test_nothing_to_write_is_the_prompt():
    assert torch.equal(generate(model(), tokens(), 0), tokens())


def test_no_length_costs_more_than_none():
    assert cost.tokens_read(SMALL, 0) == {"compressed": 0, "selected": 1, "window": 1}
    assert cost.cache_bytes(SMALL, 8, bytes_per_number=0.5) == cost.cache_bytes(SMALL, 8) / 4


def test_a_dense_layer_leaves_no_trace_whatever_the_lengths():
    layer = DenseAttention(SMALL)
    cache = layer.new_cache(2, 20)
    layer(inputs(9), cache)
    cache.cut([9, 4])
    y, trace = layer(inputs(1), cache, return_trace=True)
    assert y.shape == (2, 1, 64) and trace is None
