"""The kernels called as people call an attention: compiled, checkpointed, counted, in autocast.

What the reference does in these cases stands in tests/test_usage.py.
"""

import copy
import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kernels
import nsa_lite
from kernels import launching, operations
from kernels.block_sparse_attention import attend_to_blocks
from kernels.flash_attention import attend_to_keys
from kernels.gates import add_gated
from kernels.importance import choose_blocks
from kernels.nsa import attend_to_branches
from kernels.rope import turn
from nsa_lite import NSAConfig, NSAttention
from nsa_lite.blocks import num_compressed
from nsa_lite.rivals import taught

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = dict(block_size=8, stride=4, select_block_size=8, num_selected=3, window_size=10)
LENGTH = 19
SCALE = 0.25


def new(*shape, seed=0):
    make = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=make).to(DEVICE).requires_grad_()


def arguments(length=LENGTH, keys=LENGTH):
    """q, the pairs of compressed, selected and window, and gates; D = 16, Dv = 24, R = 2."""
    short = num_compressed(keys, SIZES["block_size"], SIZES["stride"])
    lengths = (short, keys, keys)
    pairs = [
        (new(1, 2, n, 16, seed=i), new(1, 2, n, 24, seed=9 + i)) for i, n in enumerate(lengths)
    ]
    return new(1, 4, length, 16), *pairs, new(1, 4, length, 3).detach().sigmoid().requires_grad_()


def small_layer(**changes):
    torch.manual_seed(0)
    sizes = dict(dim=32, heads=2, kv_heads=1, num_selected=3, window=8) | changes
    return NSAttention(NSAConfig.small(**sizes), backend="triton").to(DEVICE)


# --- torch.library ---


def every_operation():
    """Each operation of torch with arguments that fit it."""
    q, compressed, selected, window, gates = arguments()
    run = (8, 4, None, SCALE, 0)
    outputs = [x.detach() for x in attend_to_keys(q, *compressed, *run)]
    choice = (q.detach(), compressed[0].detach(), outputs[1], 8, 4, 8, 3, 1, 2, SCALE, 0)
    ids = choose_blocks(*choice)
    pairs = [*compressed, *selected, *window]
    plan = [8, 4, 8, 10, 0]
    like = outputs[0]
    return {
        "compressed": (attend_to_keys, (q, *compressed, *run)),
        "window": (attend_to_keys, (q, *window, 1, 1, 10, SCALE, 0)),
        "selected": (attend_to_blocks, (q, *selected, ids, 8, SCALE, 0)),
        "choice": (choose_blocks, choice),
        "gated sum": (add_gated, (gates, like, like.clone().requires_grad_(), like.clone())),
        "whole": (attend_to_branches, (q, gates, pairs, outputs, ids, plan, SCALE)),
        "rotation": (turn, (q, torch.arange(LENGTH, device=DEVICE), 1e4, 1)),
    }


@pytest.mark.parametrize("name", every_operation())
def test_torch_accepts_each_operation(name):
    """Schema, autograd, the shapes that a FakeTensor gets, and tracing with sizes left open."""
    operation, args = every_operation()[name]
    assert set(opcheck(operation, args).values()) == {"SUCCESS"}


def test_a_second_derivative_is_refused():
    q, _, _, (k, v), _ = arguments()
    out = kernels.window_attention(q, k, v)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attend_to_keys_backward"):
        dq.sum().backward()


def test_one_compilation_serves_all_lengths():
    layer = small_layer()
    counter = CompileCounterWithBackend("inductor")
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for length in (42, 61):
        x = new(1, length, 32)
        got = compiled(x)
        expected = layer(x)
        weights = [x, *layer.parameters()]
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), weights),
            torch.autograd.grad(expected.square().sum(), weights),
        )
    assert counter.frame_count == 1


def test_torch_export_takes_the_layer_with_an_open_length():
    layer = small_layer()
    length = torch.export.Dim("length", min=33, max=4096)
    exported = torch.export.export(layer, (new(1, 42, 32),), dynamic_shapes={"x": {1: length}})
    x = new(1, 61, 32)
    torch.testing.assert_close(exported.module()(x), layer(x))


# --- checkpointing ---


def gradients(run, inputs):
    """Of a sum of squares of all that `run` returns."""
    out = run(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    for x in inputs:
        x.grad = None
    sum(x.masked_fill(x == -torch.inf, 0).square().sum() for x in out).backward()
    return [x.grad for x in inputs]


def of_branches(run):
    """`run` of flat tensors, as checkpoint hands them on."""
    return lambda q, a, b, c, d, e, f, gates: run(q, (a, b), (c, d), (e, f), gates)


def calls():
    q, compressed, selected, window, gates = arguments()
    blocks = dict(block_size=8, stride=4)
    ids = torch.tensor([[0, -1, -1]], device=DEVICE).int().expand(1, 2, LENGTH, 3)
    return {
        "window": (lambda *x: kernels.window_attention(*x, window=10), (q, *window)),
        "compressed": (lambda *x: kernels.compressed_attention(*x, **blocks), (q, *compressed)),
        "selected": (
            lambda *x: kernels.selected_attention(*x, ids, select_block_size=8),
            (q, *selected),
        ),
        "gated sum": (
            lambda g, *x: kernels.gated_sum(g, x),
            (gates, *(new(1, 4, LENGTH, 24, seed=i) for i in range(3))),
        ),
        "whole": (
            of_branches(lambda *x: kernels.nsa_attention(*x, **SIZES)),
            (q, *compressed, *selected, *window, gates),
        ),
    }


@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_changes_no_bit(name, reentrant):
    run, inputs = calls()[name]
    expected = gradients(run, inputs)
    got = gradients(lambda *x: checkpoint(run, *x, use_reentrant=reentrant), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("rule", [None, taught.KLToTrueMass, taught.BCEOverSoftmax])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_changes_no_bit(rule, reentrant):
    layer = small_layer()
    layer.choose = None if rule is None else rule(layer.config).to(DEVICE)
    x = new(1, 30, 32)

    def run(x):
        return layer(x, return_loss=True)

    found = []
    for call in (run, lambda x: checkpoint(run, x, use_reentrant=reentrant)):
        layer.zero_grad()
        x.grad = None
        y, loss = call(x)
        (y.square().sum() + loss).backward()
        found.append([x.grad, *(w.grad for w in layer.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    copy.deepcopy(layer)


# --- what lies behind the last query, and padding ---


@pytest.mark.parametrize("start, length", [(0, 19), (11, 5), (24, 1)])
def test_what_lies_behind_the_last_query_has_no_effect(start, length):
    """NaN in place of the rest of a cache: outputs and gradients keep every bit."""
    reach = start + length
    tail = 13
    q, *pairs, gates = arguments(length, reach + tail)
    seen = (num_compressed(reach, 8, 4), reach, reach)
    found = []
    for garbage in (0.0, torch.nan):
        filled = []
        for (k, v), count in zip(pairs, seen, strict=True):
            keep = (torch.arange(k.shape[2], device=DEVICE) < count)[:, None]
            filled.append([torch.where(keep, x.detach(), garbage).requires_grad_() for x in (k, v)])
        out = kernels.nsa_attention(q, *filled, gates, **SIZES, start=start)
        leaves = [q, gates, *itertools.chain(*filled)]
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for dk, count in zip(found[1][3:], [n for n in seen for _ in "kv"], strict=True):
        assert not dk[:, :, count:].any() and dk[:, :, :count].any()


def test_padding_behind_a_shorter_sequence_has_no_effect():
    layer = small_layer()
    real = 21
    found = []
    for garbage in (0.0, 1e4):
        x = new(2, 30, 32).detach().clone()
        x[1, real:] = garbage
        x.requires_grad_()
        y = layer(x)[1, :real]
        found.append([y, torch.autograd.grad(y.square().sum(), x)[0][1, :real]])
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 7])
def test_every_weight_gets_a_gradient_from_a_short_sequence(length):
    """No block is whole: phi and its keys and values have nothing to do, which is 0, not None."""
    layer = small_layer()
    layer(new(2, length, 32)).sum().backward()
    idle = ("phi_k.", "phi_v.", "keys.compressed", "values.compressed")
    for name, weight in layer.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.any() != name.startswith(idle), name


# --- autocast ---


def test_in_autocast_the_layer_computes_as_in_half_precision():
    layer = small_layer()
    x = new(1, 30, 32).detach()
    expected = layer(x)
    with torch.autocast(DEVICE, torch.float16):
        got = layer(x)
    assert got.dtype == torch.float16
    error = (got.float() - expected).norm() / expected.norm()
    assert error < 2e-2


# --- tensors and settings as people have them ---


def test_the_choice_takes_keys_in_any_layout():
    q, (k, v), *_ = arguments()
    q, k, v = (x.detach() for x in (q, k, v))
    sizes = dict(block_size=8, stride=4)
    lse = kernels.compressed_attention(q, k, v, **sizes)[1]
    sizes |= dict(select_block_size=8, num_selected=1, num_local=0, num_initial=0)
    strided = k.mT.contiguous().mT
    assert not strided.is_contiguous()
    expected = kernels.select_blocks(q, k, lse, **sizes)
    assert torch.equal(kernels.select_blocks(q, strided, lse, **sizes), expected)


def test_a_default_type_of_16_bits_rounds_no_sum():
    """56 readers whose gradients add up beyond what float16 holds."""
    q = k = torch.ones(1, 1, 56, 16, device=DEVICE)
    v = q.clone().requires_grad_()
    ids = torch.zeros(1, 1, 56, 1, dtype=torch.int32, device=DEVICE)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        out = kernels.selected_attention(q, k, v, ids, select_block_size=64)
        out.backward(torch.full_like(out, 1e5))
    finally:
        torch.set_default_dtype(before)
    expected = 1e5 * sum(1 / (t + 1) for t in range(56))  # of key 0: every token's share
    assert v.grad[0, 0, 0, 0].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", "qkv")
def test_a_derivative_in_forward_mode_is_refused(name):
    q, _, _, (k, v), _ = arguments()
    given = {"q": q.detach(), "k": k.detach(), "v": v.detach()}

    def of_one(x):
        return kernels.window_attention(**{**given, name: x})

    x = given[name]
    said = f"{name}: the kernels have no derivative in forward"
    with pytest.raises(NotImplementedError, match=said):
        torch.func.jvp(of_one, (x,), (torch.ones_like(x),))


# --- operations counted ---


def allowed(length, start, keys, sees):
    """Pairs of a query and a key that may be read, one by one."""
    return sum(sees(t, s) for t in range(start, start + length) for s in range(keys))


def test_the_counter_finds_the_products_that_the_masks_let_through():
    start, length = 6, 31
    keys = start + length
    q, compressed, selected, window, gates = arguments(length, keys)
    short = compressed[0].shape[2]
    pairs = {
        "compressed": allowed(length, start, short, lambda t, i: 4 * i + 7 <= t),
        "window": allowed(length, start, keys, lambda t, s: t - 10 < s <= t),
        # three blocks of 8: all while no more have begun, then two whole ones and the own one
        "selected": sum(min(t + 1, 16 + t % 8 + 1) for t in range(start, keys)),
    }
    rows = 2 * 4  # multiply and add, heads
    with FlopCounterMode(display=False) as forward:
        out = kernels.nsa_attention(q, compressed, selected, window, gates, **SIZES, start=start)
    per_pair = 16 + 24
    assert forward.get_total_flops() == rows * (
        per_pair * sum(pairs.values()) + 16 * pairs["compressed"]
    )
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == rows * (3 * 16 + 2 * 24) * sum(pairs.values())


def test_the_counter_counts_each_operation_apart():
    q, compressed, selected, window, _ = arguments()
    ids = torch.zeros(1, 2, LENGTH, 1, device=DEVICE, dtype=torch.int32)
    counted = {}
    for name, run in {
        "window": lambda: kernels.window_attention(q, *window),
        "selected": lambda: kernels.selected_attention(q, *selected, ids, select_block_size=64),
    }.items():
        with FlopCounterMode(display=False) as counter:
            run().sum().backward()
        counted[name] = counter.get_total_flops()
    dense = 2 * 4 * (4 * 16 + 3 * 24) * LENGTH * (LENGTH + 1) // 2
    assert counted == {"window": dense, "selected": dense}  # one block holds all


# --- rotation ---


def test_rotation_is_the_references_and_its_gradient_turns_back():
    x = new(2, 30, 3 * 20)
    heads = x.unflatten(-1, (3, 20)).transpose(1, 2)
    positions = torch.arange(7, 37, device=DEVICE)
    got = kernels.rotate(heads, positions, 500.0)
    expected = nsa_lite.rope.rotate(heads, positions, 500.0)
    torch.testing.assert_close(got, expected)
    weight = new(2, 3, 30, 20).detach()
    found, wanted = (torch.autograd.grad((y * weight).sum(), x) for y in (got, expected))
    torch.testing.assert_close(found, wanted)
    assert got.transpose(1, 2).is_contiguous()  # a token's heads side by side


# --- limits of a launch ---


def test_a_batch_beyond_the_limit_of_a_grid_is_cut_and_joined(monkeypatch):
    """As on a device whose second axis ends at 4 programs: 3 sequences of 2 groups are too many."""
    one = [x.detach() for x in itertools.chain(*map(as_list, arguments()))]
    inputs = [torch.cat([x, 0.5 * x, 0.25 * x]).requires_grad_() for x in one]
    run = of_branches(lambda *x: kernels.nsa_attention(*x, **SIZES))
    expected = [run(*inputs), *gradients(run, inputs)]
    monkeypatch.setattr(operations, "MOST_PROGRAMS", 4)
    seen = []
    with launching.launching_by(grids_seen(seen)):
        got = [run(*inputs), *gradients(run, inputs)]
    assert max(grid[1] for grid in seen if len(grid) == 3) <= 4
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def test_a_batch_that_is_cut_may_lie_behind_the_sequence_in_memory(monkeypatch):
    """(T, B, H, D) in memory: the parts' batches lie side by side, and the whole's must, too."""
    kinds = {"q": 4, "k": 2, "v": 2}
    inputs = [
        new(LENGTH, 3, heads, 16, seed=i).detach().permute(1, 2, 0, 3).requires_grad_()
        for i, heads in enumerate(kinds.values())
    ]
    expected = torch.autograd.grad(kernels.window_attention(*inputs).sum(), inputs)
    monkeypatch.setattr(operations, "MOST_PROGRAMS", 4)
    got = torch.autograd.grad(kernels.window_attention(*inputs).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def as_list(x):
    return [x] if isinstance(x, torch.Tensor) else list(x)


def grids_seen(seen):
    """A starter that keeps each grid."""
    before = launching.starter

    def start(kernel, grid, arguments, options):
        seen.append(grid)
        before(kernel, grid, arguments, options)

    return start
