"""Gradients: right where they flow (gradcheck in float64), exactly 0 where they stop, never NaN."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.func import functional_call

from nsa_lite import (
    Choice,
    NSAConfig,
    NSAttention,
    block_importance,
    choose_blocks,
    compressed_attention,
    select_blocks,
    selected_attention,
    window_attention,
)

TINY = NSAConfig(
    dim=4,
    heads=2,
    kv_heads=1,
    head_dim=2,
    value_dim=3,
    block_size=2,
    stride=1,
    select_block_size=2,
    num_selected=3,
    window=3,
)


def leaves(keys, length=9):
    """q, k, v in float64 that want a gradient: B=1, H=4, G=2, D=3, Dv=2."""
    torch.manual_seed(0)
    shapes = (1, 4, length, 3), (1, 2, keys, 3), (1, 2, keys, 2)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("window", [None, 1, 4])
def test_gradcheck_window_attention(window):
    assert gradcheck(lambda q, k, v: window_attention(q, k, v, window=window), leaves(9))


def test_gradcheck_compressed_attention_with_rows_that_see_nothing():
    def op(q, k, v):
        out, lse = compressed_attention(q, k, v, block_size=4, stride=2)
        return out, lse[:, :, 3:]  # the rows above are -inf

    assert gradcheck(op, leaves(3))


def test_gradcheck_selected_attention_with_the_set_frozen():
    ids = choose_blocks(torch.rand(1, 2, 9, 5), select_block_size=2, num_selected=4)
    ids[:, :, 2] = -1  # a query that reads nothing
    assert gradcheck(lambda *qkv: selected_attention(*qkv, ids, select_block_size=2), leaves(9))


@pytest.mark.parametrize("phi", ["mlp", "mean+mlp", "mean"])
def test_gradcheck_the_layer_in_its_input_and_every_parameter(phi):
    torch.manual_seed(0)
    layer = NSAttention(NSAConfig(**{**TINY.as_dict(), "phi": phi})).double()
    x = torch.randn(1, 9, 4, dtype=torch.float64, requires_grad=True)
    ids = layer(x, return_trace=True)[1].ids
    assert (ids[0, 0, 8] >= 0).sum() == 3  # of the 5 blocks begun
    layer.choose = lambda known: Choice(ids)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert gradcheck(run, (x, *layer.parameters()))


def backward(layer, length=21):
    x = torch.randn(2, length, layer.config.dim, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    return x, y


def shut(layer, branch):
    """Close one branch's gate in every head: sigmoid(-1000) is exactly 0."""
    with torch.no_grad():
        layer.gate.mlp[-1].weight[branch::3] = 0
        layer.gate.mlp[-1].bias[branch::3] = -1000


def test_phi_learns_through_the_compressed_gate_only():
    torch.manual_seed(0)
    layer = NSAttention(TINY)
    backward(layer)
    phi = [p for name, p in layer.named_parameters() if "phi" in name or "compressed" in name]
    assert len(phi) == 12  # twice position, two weights, two biases; and the branch's W_K, W_V
    # A bias behind the last Linear of phi_k moves all keys of a query alike but for RoPE's turn.
    assert all(p.grad.abs().max() > 1e-6 for p in phi)
    layer.zero_grad()
    shut(layer, 0)
    backward(layer)
    assert all((p.grad == 0).all() for p in phi)  # the selection hands no gradient on
    assert layer.keys["selected"].weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("length", [1, 2, 3, 21])
@pytest.mark.parametrize("closed", [None, 0, 1, 2])
def test_no_gradient_is_nan_when_rows_see_nothing(length, closed):
    config = NSAConfig.small(block_size=4, stride=2, select_block_size=4, window=3)
    layer = NSAttention(config)
    if closed is not None:
        shut(layer, closed)
    with torch.autograd.set_detect_anomaly(True):  # nor is any on the way
        x, y = backward(layer, length)
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in (x.grad, y, *gradients))
    assert layer.gate.mlp[0].weight.grad.abs().max() > 0


def test_no_gradient_passes_the_choice():
    q, k, v = leaves(3)
    lse = compressed_attention(q, k, v, block_size=4, stride=2)[1]
    sizes = dict(block_size=4, stride=2, select_block_size=4)
    assert lse.requires_grad
    assert not block_importance(q, k, lse, **sizes).requires_grad
    assert not select_blocks(q, k, lse, **sizes, num_selected=3).requires_grad
