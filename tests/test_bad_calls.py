"""What a caller of an operation gets wrong, one row each; nsa_lite and kernels say the same.

Each row is a TypeError or a ValueError that names the argument, its value and the rule; at last
the odd calls with a result that the docstrings document. Layers and models are in
test_bad_models.py.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import nsa_lite
from nsa_lite import NSAttention
from nsa_lite.rope import rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = math.nan
HUGE = 10**30
BEYOND = 10**400  # no float holds it


def zeros(*shape, **options):
    return torch.zeros(*shape, **{"device": DEVICE, **options})


def ids(value=0, n=1, **options):
    return torch.full((1, 2, 8, n), value, **{"dtype": torch.int32, "device": DEVICE, **options})


Q = zeros(1, 4, 8, 16)
K = zeros(1, 2, 8, 16)
SHORT = zeros(1, 2, 3, 16)  # phi's blocks of 8 tokens, l = 4 and d = 2
LSE = zeros(1, 4, 8)
GATES = zeros(1, 4, 8, 3)
BLOCKS = dict(block_size=4, stride=2)
CHOICE = dict(**BLOCKS, select_block_size=4, num_selected=4)


def held(**changes):
    """A cache of one sequence with 8 tokens, but for the changes."""
    parts = dict(
        blocks=(zeros(1, 2, 4, 16),) * 2,
        raw={"selected": (K, K), "window": (K, K)},
        lengths=torch.tensor([8], device=DEVICE),
    )
    return SimpleNamespace(**parts | changes)


def with_raw(**pairs):
    return held(raw={"selected": (K, K), "window": (K, K)} | pairs)


class Operation(NamedTuple):
    """Both backends' function of a name, and arguments that it takes: some by place, some named."""

    places: dict
    names: dict
    reference: Callable | None = None  # where nsa_lite has it elsewhere

    def call(self, package, name, change):
        function = getattr(package, name, self.reference)
        given = {**self.places, **self.names, **change}
        by_place = [given.pop(key) for key in self.places]
        return function(*by_place, **given)


OPERATIONS = {
    "window_attention": Operation(dict(q=Q, k=K, v=K), dict(window=3)),
    "compressed_attention": Operation(dict(q=Q, k=SHORT, v=SHORT), BLOCKS),
    "select_blocks": Operation(dict(q=Q, k=SHORT, lse=LSE), CHOICE),
    "selected_attention": Operation(dict(q=Q, k=K, v=K, ids=ids()), dict(select_block_size=4)),
    "nsa_attention": Operation(
        dict(q=Q, compressed=(SHORT, SHORT), selected=(K, K), window=(K, K), gates=GATES),
        dict(**CHOICE, window_size=3),
    ),
    "decode_step": Operation(
        dict(q=Q[:, :, :1], cache=held(), gates=GATES[:, :, :1]), dict(**CHOICE, window_size=3)
    ),
    "gated_sum": Operation(dict(gates=GATES, outputs=(Q, Q, Q)), {}),
    "rotate": Operation(dict(x=Q, positions=torch.arange(8, device=DEVICE)), {}, rotate),
}

SCALES = [
    (0, ValueError, "scale = 0: must be positive"),
    (-1.0, ValueError, "scale = -1.0: must be positive"),
    (NAN, ValueError, "scale = nan: must be positive"),
    (math.inf, ValueError, "scale = inf: must be positive and at most 1e38"),
    (BEYOND, ValueError, f"scale = {BEYOND}: must be positive and at most 1e38"),
    (True, TypeError, "scale = True: must be a number, got bool"),
    ("1", TypeError, "scale = '1': must be a number, got str"),
    (zeros(()), TypeError, "scale = tensor(0."),
]
SCALED = ("window_attention", "select_blocks", "selected_attention", "nsa_attention", "decode_step")

INTS = {
    "window_attention": ("start", "window"),
    "compressed_attention": ("start", "block_size", "stride"),
    "select_blocks": ("num_selected", "num_initial", "num_local", "select_block_size"),
    "selected_attention": ("start", "select_block_size"),
    "nsa_attention": ("window_size", "num_selected", "select_block_size", "start"),
    "decode_step": ("window_size", "num_selected", "num_local", "select_block_size", "stride"),
}
NO_INTS = [
    (2.0, TypeError, "= 2.0: must be an int, got float"),
    (True, TypeError, "= True: must be an int, got bool"),
    (-1, ValueError, "= -1: must be at least"),
    (HUGE, ValueError, f"= {HUGE}: must be at most 9007199254740992"),
]

ROWS = [
    # tensors
    ("window_attention", dict(q=None), TypeError, "q: must be a torch.Tensor (B, H, T, D), got No"),
    ("window_attention", dict(q=Q.bool()), TypeError, "q.dtype = torch.bool: must be a floating-"),
    ("window_attention", dict(k=K.to(torch.complex64)), TypeError, "k.dtype = torch.complex64"),
    ("window_attention", dict(q=Q[:0]), ValueError, "q.shape = (0, 4, 8, 16): must hold at least"),
    ("window_attention", dict(v=K[..., :0]), ValueError, "v.shape = (1, 2, 8, 0): width must be"),
    ("window_attention", dict(q=Q.to_sparse()), ValueError, "q.layout = torch.sparse_coo: must be"),
    ("window_attention", dict(v=K.to_sparse()), ValueError, "v.layout = torch.sparse_coo: must be"),
    ("window_attention", dict(k=K.to("meta")), ValueError, "k.device = meta: must be q.device"),
    ("compressed_attention", dict(k=SHORT.to_sparse()), ValueError, "k.layout = torch.sparse_coo"),
    ("select_blocks", dict(k=SHORT[:, :, :2]), ValueError, "k.shape = (1, 2, 2, 16): must hold th"),
    ("select_blocks", dict(lse=LSE.to("meta")), ValueError, "lse.device = meta: must be q.device"),
    ("select_blocks", dict(select_block_size=None), TypeError, "select_block_size = None: must be"),
    ("selected_attention", dict(ids=None), TypeError, "ids: must be an int32 or int64 tensor"),
    ("selected_attention", dict(ids=ids().short()), TypeError, "ids: must be an int32 or int64"),
    ("selected_attention", dict(ids=ids(n=0)), ValueError, "ids.shape = (1, 2, 8, 0): must name"),
    ("selected_attention", dict(ids=ids()[0]), ValueError, "ids.shape = (2, 8, 1): must be (B, G,"),
    # pairs, choice and gates
    ("nsa_attention", dict(compressed=None), TypeError, "compressed: must be a pair (k, v) of ten"),
    ("nsa_attention", dict(window=K), TypeError, "window: must be a pair (k, v) of tensors, got T"),
    ("nsa_attention", dict(selected=(K,)), ValueError, "len(selected) = 1: must be 2: a pair"),
    ("nsa_attention", dict(selected=(K, K, K)), ValueError, "len(selected) = 3: must be 2: a pair"),
    ("nsa_attention", dict(selected=(K, zeros(1, 2, 8, 24))), ValueError,
     "selected[1].shape = (1, 2, 8, 24): heads and value width must be those of compressed, (2, 1"),
    ("nsa_attention", dict(window=(K[:, :1], K[:, :1])), ValueError,
     "window[1].shape = (1, 1, 8, 16): heads and value width must be those of compressed, (2, 16)"),
    ("nsa_attention", dict(compressed=(SHORT[:, :1], SHORT[:, :1])), ValueError,
     "selected[1].shape = (1, 2, 8, 16): heads and value width must be those of compressed, (1, 1"),
    ("nsa_attention", dict(compressed=(SHORT[:, :, :1], SHORT[:, :, :1])), ValueError,
     "compressed[0].shape = (1, 2, 1, 16): must hold the 3 blocks that the last query sees"),
    ("nsa_attention", dict(choose=3), TypeError, "choose: must be a function or a module that is"),
    ("nsa_attention", dict(choose=NSAttention), TypeError, "choose: must be a function or a modul"),
    ("nsa_attention", dict(choose=lambda lse: None), TypeError, "ids: must be an int32 or int64 t"),
    ("nsa_attention", dict(choose=lambda lse: LSE), TypeError, "ids: must be an int32 or int64 te"),
    ("nsa_attention", dict(gates=GATES.int()), TypeError, "gates.dtype = torch.int32: must be a f"),
    ("nsa_attention", dict(gates=GATES.to("meta")), ValueError, "gates.device = meta: must be q.d"),
    ("nsa_attention", dict(gates=GATES[:, :2]), ValueError, "gates.shape = (1, 2, 8, 3): must be"),
    # a cache
    ("decode_step", dict(cache=None), TypeError, "cache: must be a Cache, or have blocks, raw and"),
    ("decode_step", dict(cache={}), TypeError, "cache: must be a Cache, or have blocks, raw and l"),
    ("decode_step", dict(cache=held(blocks=None)), ValueError, "cache.blocks = None: must be phi'"),
    ("decode_step", dict(cache=held(blocks=3)), TypeError, "cache.blocks: must be a pair (k, v) o"),
    ("decode_step", dict(cache=held(blocks=(K,))), ValueError, "len(cache.blocks) = 1: must be 2"),
    ("decode_step", dict(cache=held(raw=None)), TypeError, "cache.raw: must be a dict of pairs"),
    ("decode_step", dict(cache=held(raw={})), ValueError, "cache.raw = []: must have the branches"),
    ("decode_step", dict(cache=held(raw={"selected": (K, K)})), ValueError,
     "cache.raw = ['selected']: must have the branches ['window'] too"),
    ("decode_step", dict(cache=with_raw(window=None)), TypeError, "cache.raw['window']: must be a"),
    ("decode_step", dict(cache=with_raw(window=(K,))), ValueError, "len(cache.raw['window']) = 1"),
    ("decode_step", dict(cache=with_raw(window=(K.half(), K))), TypeError,
     "cache.raw['window'][0].dtype = torch.float16: must be q.dtype = torch.float32"),
    ("decode_step", dict(cache=held(lengths=[8])), TypeError, "cache.lengths: must be an int32 or"),
    ("decode_step", dict(cache=held(lengths=LSE)), TypeError, "cache.lengths: must be an int32 or"),
    ("decode_step", dict(cache=held(lengths=torch.tensor(8, device=DEVICE))), ValueError,
     "cache.lengths.shape = (): must be (B,) = (1,)"),
    ("decode_step", dict(gates=GATES), ValueError, "gates.shape = (1, 4, 8, 3): must be (1, 4, 1,"),
    ("decode_step", dict(q=zeros(1, 4, 9, 16)), ValueError, "q.shape = (1, 4, 9, 16): must hold 1"),
    ("decode_step", dict(gates=GATES[:, :, :1].to("meta")), ValueError, "gates.device = meta: mus"),
    # sums and rotations
    ("gated_sum", dict(outputs=None), TypeError, "outputs: must be three tensors, one a branch, g"),
    ("gated_sum", dict(outputs=Q), TypeError, "outputs: must be three tensors, one a branch, got"),
    ("gated_sum", dict(outputs=()), ValueError, "len(outputs) = 0: must be 3, one output a branch"),
    ("gated_sum", dict(outputs=(Q, Q)), ValueError, "len(outputs) = 2: must be 3, one output a br"),
    ("gated_sum", dict(outputs=(Q, Q, Q, Q)), ValueError, "len(outputs) = 4: must be 3, one outpu"),
    ("gated_sum", dict(outputs=(Q, None, Q)), TypeError, "outputs[1]: must be a torch.Tensor (B,"),
    ("gated_sum", dict(outputs=(Q, Q, Q.int())), TypeError, "outputs[2].dtype = torch.int32: must"),
    ("gated_sum", dict(outputs=(Q, Q.half(), Q)), TypeError, "outputs[1].dtype = torch.float16: m"),
    ("gated_sum", dict(outputs=(Q, Q, Q[..., :1])), ValueError, "outputs[2].shape = (1, 4, 8, 1):"),
    ("gated_sum", dict(outputs=(Q[:, :, :0],) * 3), ValueError, "outputs[0].shape = (1, 4, 0, 16)"),
    ("gated_sum", dict(gates=None), TypeError, "gates: must be a torch.Tensor (B, H, T, 3), got N"),
    ("gated_sum", dict(gates=GATES.int()), TypeError, "gates.dtype = torch.int32: must be a float"),
    ("gated_sum", dict(gates=GATES[0]), ValueError, "gates.shape = (4, 8, 3): must be (B, H, T, 3"),
    ("gated_sum", dict(gates=GATES[:, :1]), ValueError, "gates.shape = (1, 1, 8, 3): must be (1,"),
    ("gated_sum", dict(gates=GATES.to("meta")), ValueError, "gates.device = meta: must be outputs"),
    ("rotate", dict(x=Q.int()), TypeError, "x.dtype = torch.int32: must be a floating-point type"),
    ("rotate", dict(x=Q[..., :15]), ValueError, "x.shape = (1, 4, 8, 15): the last axis must be e"),
    ("rotate", dict(positions=None), TypeError, "positions: must be an int32 or int64 tensor (T,)"),
    ("rotate", dict(positions=LSE[0, 0]), TypeError, "positions: must be an int32 or int64 tensor"),
    ("rotate", dict(positions=ids()[0, 0, :7, 0]), ValueError, "positions.shape = (7,): must be ("),
    ("rotate", dict(positions=ids()[0, :, :, 0]), ValueError, "positions.shape = (2, 8): must be"),
    ("rotate", dict(positions=ids().to("meta")[0, 0, :, 0]), ValueError, "positions.device = meta"),
    ("rotate", dict(theta=0), ValueError, "theta = 0: must be positive and at most 1e38"),
    ("rotate", dict(theta=NAN), ValueError, "theta = nan: must be positive and at most 1e38"),
    ("rotate", dict(theta=BEYOND), ValueError, f"theta = {BEYOND}: must be positive and at most"),
    ("rotate", dict(theta=True), TypeError, "theta = True: must be a number, got bool"),
    ("rotate", dict(theta=None), TypeError, "theta = None: must be a number, got NoneType"),
]  # fmt: skip
ROWS += [(name, dict(scale=value), *said) for name in SCALED for value, *said in SCALES]
ROWS += [
    (name, {size: value}, error, f"{size} {words}")
    for name, sizes in INTS.items()
    for size in sizes
    for value, error, words in NO_INTS
]
# What only a CPU looks at, for on a GPU it would wait.
LOOKED_AT = [
    ("selected_attention", dict(ids=ids(0, n=2)), ValueError, "ids = [[0, 0]]: a query's ids must"),
    ("nsa_attention", dict(choose=lambda _: ids(1, n=3)), ValueError, "ids = [[1, 1, 1]]: a query"),
    ("decode_step", dict(cache=held(lengths=torch.tensor([9]))), ValueError,
     "cache.lengths = 9 .. 9: must lie between the 1 new tokens and the 8 rows of the cache"),
    ("decode_step", dict(cache=held(lengths=torch.tensor([0]))), ValueError, "cache.lengths = 0 ."),
    ("decode_step", dict(cache=held(blocks=(SHORT[:, :, :2],) * 2)), ValueError,
     "cache.blocks[0].shape = (1, 2, 2, 16): must hold the 3 blocks of the longest sequence"),
]  # fmt: skip
ROWS += LOOKED_AT if DEVICE == "cpu" else []


def refusal(call, error):
    """What is said to a call that is refused so."""
    with pytest.raises((TypeError, ValueError)) as refused:
        call()
    assert refused.type is error
    return str(refused.value)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_calls_are_good_before_they_are_changed(name):
    for package in (nsa_lite, kernels):
        OPERATIONS[name].call(package, name, {})


@pytest.mark.parametrize(("name", "change", "error", "words"), ROWS)
def test_both_backends_refuse_a_bad_call_in_the_same_words(name, change, error, words):
    operation = OPERATIONS[name]
    said = {
        refusal(lambda p=p: operation.call(p, name, change), error) for p in (nsa_lite, kernels)
    }
    assert len(said) == 1 and said.pop().startswith(words)


def test_the_table_is_long():
    assert len(ROWS) >= 160
    assert {name for name, *_ in ROWS} == set(OPERATIONS)


# --- a decode step of tensors that look as before ---


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(window_size=3.0), TypeError, "window_size = 3.0: must be an int"),
        (dict(stride=2.0), TypeError, "stride = 2.0: must be an int"),
        (dict(num_initial=True), TypeError, "num_initial = True: must be an int"),
        (dict(scale=True), TypeError, "scale = True: must be a number"),
        (dict(scale=NAN), ValueError, "scale = nan: must be positive"),
    ],
)
def test_a_good_step_lets_no_bad_one_through(change, error, words):
    step = OPERATIONS["decode_step"]
    step.call(kernels, "decode_step", {})
    step.call(kernels, "decode_step", dict(scale=1))
    for _ in range(2):  # refused is not remembered
        said = refusal(lambda: step.call(kernels, "decode_step", change), error)
        assert said.startswith(words)


class Watched(TorchDispatchMode):
    """Somebody looks on: a step is then one operation of torch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scale", [0, True, NAN])
def test_a_step_that_is_watched_refuses_a_scale_too(scale):
    step = OPERATIONS["decode_step"]
    with Watched(), pytest.raises((TypeError, ValueError), match=f"^scale = {scale}: must be"):
        step.call(kernels, "decode_step", dict(scale=scale))


ROOM = zeros(1, 2, 8, 16)
NEW = zeros(1, 2, 1, 16)
PLACE = torch.tensor([[3]], device=DEVICE)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(buffers=None), TypeError, "buffers: must be a list of tensors, got NoneType"),
        (dict(buffers=[]), ValueError, "buffers = 0 of them: must be 1"),
        (dict(buffers=[3]), TypeError, "buffers[0]: must be a torch.Tensor"),
        (dict(buffers=[ROOM.half()]), TypeError, "buffers[0].dtype = torch.float16"),
        (dict(buffers=[ROOM[:, :1]]), ValueError, "buffers[0].shape = (1, 1, 8, 16)"),
        (dict(new=None), TypeError, "new: must be a list of tensors, got NoneType"),
        (dict(new=[], buffers=[]), ValueError, "new = 0 of them: must hold at least one tensor"),
        (dict(new=[None]), TypeError, "new[0]: must be a torch.Tensor"),
        (dict(new=[NEW.int()]), TypeError, "new[0].dtype = torch.int32"),
        (dict(places=None), TypeError, "places: must be an int32 or int64 tensor (B, n)"),
        (dict(places=[[3]]), TypeError, "places: must be an int32 or int64 tensor (B, n)"),
        (dict(places=PLACE.float()), TypeError, "places: must be an int32 or int64 tensor (B, n)"),
        (dict(places=PLACE[0]), ValueError, "places.shape = (1,): must be (B, n) = (1, 1)"),
    ],
)
def test_bad_rows_for_a_cache_are_refused_and_nothing_is_written(change, error, words):
    given = dict(buffers=[ROOM], new=[NEW + 1], places=PLACE) | change
    assert refusal(lambda: kernels.write_rows(**given), error).startswith(words)
    assert not ROOM.any()


# --- odd calls with a documented result ---


@pytest.mark.parametrize("package", [nsa_lite, kernels])
def test_rows_behind_the_blocks_are_not_read_so_raw_keys_are_taken_for_blocks(package):
    torch.manual_seed(0)
    q = torch.randn(1, 4, 8, 16, device=DEVICE)
    k = torch.randn(1, 2, 8, 16, device=DEVICE)
    raw = package.compressed_attention(q, k, k, **BLOCKS)
    first = package.compressed_attention(q, k[:, :, :3], k[:, :, :3], **BLOCKS)
    assert all(torch.equal(a, b) for a, b in zip(raw, first, strict=True))


def test_a_score_of_nan_counts_as_0_and_ties_go_to_the_lower_block():
    score = torch.full((1, 1, 24, 6), NAN)
    sizes = dict(select_block_size=4, num_selected=3, num_initial=0, num_local=1)
    assert nsa_lite.choose_blocks(score, **sizes)[0, 0, 23].tolist() == [0, 1, 5]
    score[0, 0, 23, 3] = 0.5
    assert nsa_lite.choose_blocks(score, **sizes)[0, 0, 23].tolist() == [0, 3, 5]
    score[0, 0, 23, 0] = -0.5
    assert nsa_lite.choose_blocks(score, **sizes)[0, 0, 23].tolist() == [1, 3, 5]


def test_an_lse_of_nan_chooses_the_lowest_blocks_in_both_backends():
    q = zeros(1, 2, 24, 16)
    k = zeros(1, 1, 11, 16)
    lse = torch.full((1, 2, 24), NAN, device=DEVICE)
    sizes = dict(BLOCKS, select_block_size=4, num_selected=3, num_initial=0, num_local=1)
    for package in (nsa_lite, kernels):
        assert package.select_blocks(q, k, lse, **sizes)[0, 0, 23].tolist() == [0, 1, 5]


def test_no_block_at_all_reads_nothing():
    for package in (nsa_lite, kernels):
        out = package.selected_attention(Q + 1, K + 1, K + 1, ids(-1, n=2), select_block_size=4)
        assert torch.equal(out, Q)


def test_fewer_tokens_than_a_block_see_none():
    none = zeros(1, 2, 0, 16)
    for package in (nsa_lite, kernels):
        out, lse = package.compressed_attention(Q[:, :, :3] + 1, none, none, **BLOCKS)
        assert torch.equal(out, Q[:, :, :3]) and (lse == -math.inf).all()


def test_a_window_beyond_the_sequence_is_dense():
    torch.manual_seed(0)
    q = torch.randn(1, 4, 8, 16, device=DEVICE)
    k = torch.randn(1, 2, 8, 16, device=DEVICE)
    for package in (nsa_lite, kernels):
        dense = package.window_attention(q, k, k)
        for window in (8, 2**40):
            wide = package.window_attention(q, k, k, window=window)
            torch.testing.assert_close(wide, dense, rtol=1e-5, atol=1e-6)
