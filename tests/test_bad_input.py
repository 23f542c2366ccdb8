"""Wrong arguments are refused with a sentence that names the argument, its value and the rule."""

import re

import pytest
import torch

from nsa_lite import (
    DecoderLM,
    DenseAttention,
    ModelConfig,
    NSAConfig,
    NSAttention,
    Phi,
    block_importance,
    choose_blocks,
    compressed_attention,
    dense_attention,
    generate,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa_lite.backend import require_backend
from nsa_lite.cost import cache_bytes, compression_flops, paper_tokens, sequence_cost, tokens_read
from nsa_lite.rope import rotate

INTS = (
    "dim",
    "heads",
    "kv_heads",
    "head_dim",
    "value_dim",
    "block_size",
    "stride",
    "select_block_size",
    "num_selected",
    "num_initial",
    "num_local",
    "window",
    "rope_theta",
)
SMALL = NSAConfig.small()
GEOMETRY = dict(block_size=4, stride=2)
CHOICE = dict(**GEOMETRY, select_block_size=4, num_selected=3)


def refused(error, *words):
    """Expect `error` with a message that holds all the words, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(str(w)) for w in words))


def q(*shape, **options):
    return torch.zeros(shape or (1, 4, 8, 6), **options)


def k(*shape, **options):
    return torch.zeros(shape or (1, 2, 8, 6), **options)


def v(*shape, **options):
    return torch.zeros(shape or (1, 2, 8, 3), **options)


def ids(*shape, fill=0, **options):
    return torch.full(shape or (1, 2, 8, 2), fill, **{"dtype": torch.int32, **options})


@pytest.mark.parametrize("name", INTS)
@pytest.mark.parametrize("value", [1.0, "4", None, True])
def test_a_config_field_that_is_no_int(name, value):
    with refused(TypeError, f"{name} = {value!r}", "must be an int", type(value).__name__):
        NSAConfig(**{name: value})


@pytest.mark.parametrize("name", INTS)
def test_a_config_field_that_is_too_small(name):
    lowest = 0 if name in ("num_initial", "num_local") else 1
    for value in (-3, lowest - 1):
        with refused(ValueError, f"{name} = {value}:", f"must be at least {lowest}"):
            NSAConfig(**{name: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 6, "kv_heads": 4}, ("heads = 6", "multiple of kv_heads = 4")),
        ({"head_dim": 15}, ("head_dim = 15", "even")),
        ({"block_size": 32, "stride": 12}, ("stride = 12", "divide block_size = 32")),
        ({"block_size": 16, "stride": 32}, ("stride = 32", "divide block_size = 16")),
        ({"select_block_size": 40}, ("select_block_size = 40", "multiple of stride = 16")),
        ({"block_size": 80}, ("block_size = 80", "not exceed select_block_size = 64")),
        ({"num_selected": 2}, ("num_selected = 2", "at least num_initial + num_local = 3")),
        ({"num_initial": 9, "num_local": 8}, ("num_selected = 16", "num_initial + num_local = 17")),
        ({"phi": "sum"}, ("phi = 'sum'", "one of", "mlp")),
        ({"phi": 3}, ("phi = 3", "one of", "mlp")),
    ],
)
def test_config_fields_that_break_a_rule(changes, words):
    with refused(ValueError, *words):
        NSAConfig(**changes)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"vocab_size": 0}, ValueError, ("vocab_size = 0", "at least 1")),
        ({"vocab_size": 2.0}, TypeError, ("vocab_size = 2.0", "int", "float")),
        ({"vocab_size": 5, "layers": 0}, ValueError, ("layers = 0", "at least 1")),
        ({"vocab_size": 5, "layers": True}, TypeError, ("layers = True", "int", "bool")),
        ({"vocab_size": 5, "nsa": {"dim": 64}}, TypeError, ("nsa", "NSAConfig", "dict")),
    ],
)
def test_model_config(fields, error, words):
    with refused(error, *words):
        ModelConfig(**fields)


OPERATIONS = {
    "dense": dense_attention,
    "window": lambda *qkv: window_attention(*qkv, window=3),
    "compressed": lambda *qkv: compressed_attention(*qkv, **GEOMETRY),
    "selected": lambda *qkv: selected_attention(*qkv, ids(), select_block_size=4),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        ((None, k(), v()), TypeError, ("q:", "torch.Tensor", "NoneType")),
        ((q(), [1.0], v()), TypeError, ("k:", "torch.Tensor", "list")),
        ((q(), k(), 3), TypeError, ("v:", "torch.Tensor", "int")),
        ((q(dtype=torch.int64), k(), v()), TypeError, ("q.dtype = torch.int64", "floating")),
        (
            (q(), k(dtype=torch.float16), v()),
            TypeError,
            ("k.dtype = torch.float16", "q.dtype = torch.float32"),
        ),
        (
            (q(), k(), v(dtype=torch.float64)),
            TypeError,
            ("v.dtype = torch.float64", "q.dtype = torch.float32"),
        ),
        ((q(), k(device="meta"), v()), ValueError, ("k.device = meta", "q.device = cpu")),
        ((q(), k(), v(device="meta")), ValueError, ("v.device = meta", "q.device = cpu")),
        ((q(4, 8, 6), k(), v()), ValueError, ("q.shape = (4, 8, 6)", "(B, H, T, D)")),
        ((q(), k(2, 8, 6), v()), ValueError, ("k.shape = (2, 8, 6)", "(B, G, S, D)")),
        ((q(), k(), v(2, 8, 3)), ValueError, ("v.shape = (2, 8, 3)", "(B, G, S, Dv)")),
        ((q(1, 4, 0, 6), k(), v()), ValueError, ("q.shape = (1, 4, 0, 6)", "at least one query")),
        ((q(1, 0, 8, 6), k(), v()), ValueError, ("q.shape = (1, 0, 8, 6)", "at least one")),
        (
            (q(1, 4, 8, 0), k(1, 2, 8, 0), v()),
            ValueError,
            ("q.shape = (1, 4, 8, 0)", "at least one"),
        ),
        ((q(), k(2, 2, 8, 6), v(2, 2, 8, 3)), ValueError, ("k.shape = (2, 2, 8, 6)", "batch", "1")),
        ((q(), k(1, 2, 8, 4), v()), ValueError, ("k.shape = (1, 2, 8, 4)", "width", "6")),
        (
            (q(), k(1, 3, 8, 6), v(1, 3, 8, 3)),
            ValueError,
            ("q.shape = (1, 4, 8, 6)", "heads (4)", "multiple of k's heads (3)"),
        ),
        ((q(), k(1, 0, 8, 6), v(1, 0, 8, 3)), ValueError, ("heads (4)", "k's heads (0)")),
        ((q(), k(), v(1, 1, 8, 3)), ValueError, ("v.shape = (1, 1, 8, 3)", "k's, (1, 2, 8)")),
        ((q(), k(), v(1, 2, 7, 3)), ValueError, ("v.shape = (1, 2, 7, 3)", "k's, (1, 2, 8)")),
    ],
)
def test_attention_tensors(operation, tensors, error, words):
    with refused(error, *words):
        OPERATIONS[operation](*tensors)


@pytest.mark.parametrize("operation", ["dense", "window", "selected"])
def test_too_few_keys_for_the_queries(operation):
    with refused(ValueError, "k.shape = (1, 2, 7, 6)", "start + T = 8"):
        OPERATIONS[operation](q(), k(1, 2, 7, 6), v(1, 2, 7, 3))


@pytest.mark.parametrize("name", ["block_size", "stride", "start"])
def test_sizes_of_compressed_attention(name):
    for value, error in ((2.0, TypeError), (True, TypeError), (-1, ValueError)):
        with refused(error, f"{name} = {value}", "must be"):
            compressed_attention(q(), k(), v(), **{**GEOMETRY, name: value})
    with refused(ValueError, "stride = 3", "must divide block_size = 4"):
        compressed_attention(q(), k(), v(), block_size=4, stride=3)


def test_sizes_of_window_attention():
    for name, value, error in (
        ("window", 0, ValueError),
        ("window", 2.0, TypeError),
        ("window", True, TypeError),
        ("start", -1, ValueError),
        ("start", None, TypeError),
    ):
        with refused(error, f"{name} = {value}", "must be"):
            window_attention(q(), k(), v(), **{name: value})


LSE = torch.zeros(1, 4, 8)
ALL_SIZES = (
    "block_size",
    "stride",
    "select_block_size",
    "num_selected",
    "num_initial",
    "num_local",
    "start",
)


def score_and_choose(**sizes):
    choose_blocks(torch.zeros(1, 2, 8, 2), **sizes)


def importance_of(**sizes):
    block_importance(q(), k(), LSE, **sizes)


def choose_from_keys(**sizes):
    select_blocks(q(), k(), LSE, **sizes)


@pytest.mark.parametrize("name", ALL_SIZES)
@pytest.mark.parametrize("function", [score_and_choose, importance_of, choose_from_keys])
def test_sizes_of_the_selection(function, name):
    takes = {score_and_choose: ALL_SIZES[2:], importance_of: (*ALL_SIZES[:3], "start")}
    takes = takes.get(function, ALL_SIZES)
    sizes = {key: value for key, value in CHOICE.items() if key in takes}
    function(**sizes)
    if name not in takes:
        return
    for value, error in ((2.0, TypeError), (True, TypeError), (-1, ValueError)):
        with refused(error, f"{name} = {value}", "must be"):
            function(**{**sizes, name: value})


@pytest.mark.parametrize("function", [block_importance, select_blocks])
@pytest.mark.parametrize(
    ("lse", "error", "words"),
    [
        (LSE[..., :7], ValueError, ("lse.shape = (1, 4, 7)", "(B, H, T) = (1, 4, 8)")),
        (LSE[0], ValueError, ("lse.shape = (4, 8)", "(B, H, T)")),
        (None, TypeError, ("lse:", "torch.Tensor", "NoneType")),
        (LSE.int(), TypeError, ("lse.dtype = torch.int32", "floating")),
        (LSE.to("meta"), ValueError, ("lse.device = meta", "q.device = cpu")),
    ],
)
def test_lse_of_the_selection(function, lse, error, words):
    sizes = {n: x for n, x in CHOICE.items() if n != "num_selected" or function is select_blocks}
    with refused(error, *words):
        function(q(), k(), lse, **sizes)


@pytest.mark.parametrize("function", [block_importance, select_blocks])
def test_queries_and_keys_of_the_selection(function):
    sizes = {n: x for n, x in CHOICE.items() if n != "num_selected" or function is select_blocks}
    with refused(ValueError, "k.shape = (1, 2, 8, 4)", "width", "6"):
        function(q(), k(1, 2, 8, 4), LSE, **sizes)


def test_scores_of_the_choice():
    sizes = dict(select_block_size=4, num_selected=3)
    with refused(TypeError, "score.dtype = torch.int64", "floating"):
        choose_blocks(torch.zeros(1, 2, 8, 2, dtype=torch.int64), **sizes)
    with refused(ValueError, "score.shape = (2, 8, 2)", "(B, G, T, blocks)"):
        choose_blocks(torch.zeros(2, 8, 2), **sizes)
    for blocks in (1, 3):  # 8 tokens touch 2 blocks of 4
        with refused(ValueError, f"score.shape = (1, 2, 8, {blocks})", "8 tokens lie in 2 blocks"):
            choose_blocks(torch.zeros(1, 2, 8, blocks), **sizes)
    with refused(ValueError, "score.shape = (1, 2, 0, 0)", "at least one query"):
        choose_blocks(torch.zeros(1, 2, 0, 0), **sizes)
    with refused(ValueError, "num_selected = 2", "num_initial + num_local = 3"):
        choose_blocks(torch.zeros(1, 2, 8, 2), select_block_size=4, num_selected=2)


@pytest.mark.parametrize(
    ("chosen", "error", "words"),
    [
        (ids(fill=2), ValueError, ("ids = 2 .. 2", "-1 .. 1")),
        (ids(fill=-2), ValueError, ("ids = -2 .. -2", "-1 .. 1")),
        (ids(1, 2, 7, 2), ValueError, ("ids.shape = (1, 2, 7, 2)", "(1, 2, 8)")),
        (ids(1, 4, 8, 2), ValueError, ("ids.shape = (1, 4, 8, 2)", "(1, 2, 8)")),
        (ids(2, 8, 2), ValueError, ("ids.shape = (2, 8, 2)", "(B, G, T, n)")),
        (ids(device="meta"), ValueError, ("ids.device = meta", "q.device = cpu")),
        (ids(dtype=torch.float32), TypeError, ("ids:", "int32 or int64", "torch.float32")),
        (ids(dtype=torch.bool), TypeError, ("ids:", "int32 or int64", "torch.bool")),
        ([[0]], TypeError, ("ids:", "int32 or int64", "list")),
    ],
)
def test_ids_of_selected_attention(chosen, error, words):
    with refused(error, *words):
        selected_attention(q(), k(), v(), chosen, select_block_size=4)


def test_sizes_of_selected_attention():
    for name in ("select_block_size", "start"):
        for value, error in ((2.0, TypeError), (True, TypeError), (-1, ValueError)):
            with refused(error, f"{name} = {value}", "must be"):
                selected_attention(q(), k(), v(), ids(), **{"select_block_size": 4, name: value})


@pytest.mark.parametrize("layer", [NSAttention(SMALL), DenseAttention(SMALL)])
@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(1, 0, 64), ValueError, ("x.shape = (1, 0, 64)", "must not be empty")),
        (torch.zeros(1, 5, 63), ValueError, ("x.shape = (1, 5, 63)", "config.dim = 64")),
        (torch.zeros(5, 64), ValueError, ("x.shape = (5, 64)", "(B, T, C)")),
        (torch.zeros(1, 5, 64).long(), TypeError, ("x.dtype = torch.int64", "floating")),
        (
            torch.zeros(1, 5, 64).double(),
            TypeError,
            ("x.dtype = torch.float64", "weight.dtype = torch.float32"),
        ),
        (
            torch.zeros(1, 5, 64, device="meta"),
            ValueError,
            ("x.device = meta", "weight.device = cpu"),
        ),
        ([1.0], TypeError, ("x:", "torch.Tensor", "list")),
    ],
)
def test_input_of_the_layers(layer, x, error, words):
    with refused(error, *words):
        layer(x)


def test_autocast_may_mix_dtypes():
    x = torch.zeros(1, 5, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert NSAttention(SMALL)(x).isfinite().all()


def test_options_of_the_layers():
    with refused(ValueError, "backend = 'cuda'", "one of", "torch"):
        NSAttention(SMALL, backend="cuda")
    with refused(ValueError, "backend = None", "one of", "torch"):
        require_backend(None)
    for window, error in ((0, ValueError), (2.5, TypeError), (True, TypeError)):
        with refused(error, f"window = {window}", "must be"):
            DenseAttention(SMALL, window=window)


def test_phi():
    with refused(ValueError, "width = 0", "at least 1"):
        Phi(0, 4, 2)
    with refused(ValueError, "stride = 3", "must divide block_size = 4"):
        Phi(6, 4, 3)
    with refused(ValueError, "kind = 'max'", "one of", "mlp"):
        Phi(6, 4, 2, kind="max")
    with refused(ValueError, "x.shape = (1, 2, 8, 5)", "width", "6"):
        Phi(6, 4, 2)(k(1, 2, 8, 5))
    with refused(ValueError, "x.shape = (2, 8, 6)", "(B, G, T, D)"):
        Phi(6, 4, 2)(k(2, 8, 6))


@pytest.mark.parametrize(
    ("tokens", "error", "words"),
    [
        (torch.zeros(1, 0).long(), ValueError, ("tokens.shape = (1, 0)", "at least one token")),
        (torch.zeros(5).long(), ValueError, ("tokens.shape = (5,)", "(B, T)")),
        (torch.zeros(1, 5), TypeError, ("tokens:", "int64", "torch.float32")),
        ([[1, 2]], TypeError, ("tokens:", "int64", "list")),
        (torch.tensor([[0, 7]]), ValueError, ("tokens = 0 .. 7", "vocab_size - 1 = 6")),
        (torch.tensor([[-1, 3]]), ValueError, ("tokens = -1 .. 3", "vocab_size - 1 = 6")),
    ],
)
def test_tokens_of_the_decoder(tokens, error, words):
    with refused(error, *words):
        DecoderLM(ModelConfig(vocab_size=7, layers=1))(tokens)


def test_options_of_the_decoder():
    model, prompt = DecoderLM(ModelConfig(vocab_size=7)), torch.zeros(1, 3).long()
    for count, error in ((-1, ValueError), (2.0, TypeError), (True, TypeError)):
        with refused(error, f"count = {count}", "must be"):
            generate(model, prompt, count)
    with refused(ValueError, "len(caches) = 1", "one for each of 2 layers"):
        model(prompt, model.new_caches(1, 3)[:1])


def test_an_odd_width_cannot_be_rotated():
    with refused(ValueError, "x.shape = (1, 5)", "even"):
        rotate(torch.zeros(1, 5), torch.arange(1))


@pytest.mark.parametrize("function", [paper_tokens, sequence_cost, compression_flops, cache_bytes])
def test_lengths_of_the_cost_model(function):
    for length, error in ((0, ValueError), (-1, ValueError), (8.0, TypeError), (True, TypeError)):
        with refused(error, f"length = {length}", "must be"):
            function(SMALL, length)


def test_positions_and_kinds_of_the_cost_model():
    for position, error in ((-1, ValueError), (8.0, TypeError), (False, TypeError)):
        with refused(error, f"position = {position}", "must be"):
            tokens_read(SMALL, position)
    for function in (tokens_read, sequence_cost, cache_bytes):
        with refused(ValueError, "kind = 'flash'", "one of", "nsa"):
            function(SMALL, 8, "flash")
