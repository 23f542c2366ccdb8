"""The layer and the decoder: the formula, causality, decoding, the trace, saving, the backends."""

import copy
import importlib.machinery
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import prune

from nsa_lite import (
    BRANCHES,
    DecoderLM,
    ModelConfig,
    NSAConfig,
    NSAttention,
    generate,
    loops,
)
from nsa_lite.backend import PLAIN, Operations, operations_of
from nsa_lite.compression import Phi
from nsa_lite.layer import projected_together
from nsa_lite.nsa import nsa_attention
from nsa_lite.rivals.attentions import ATTENTIONS
from nsa_lite.rivals.rules import block_mass
from nsa_lite.rope import rotate

SMALL = NSAConfig(
    dim=12,
    heads=4,
    kv_heads=2,
    head_dim=4,
    value_dim=3,
    block_size=4,
    stride=2,
    select_block_size=4,
    num_selected=4,
    window=5,
)
LENGTH = 27  # more than n l' = 16, and a multiple of nothing


def attention(kind="nsa"):
    torch.manual_seed(0)
    return ATTENTIONS[kind].build(SMALL).double()


def stream(length=LENGTH):
    return torch.randn(2, length, 12, dtype=torch.float64)


def decoder(kind="nsa"):
    torch.manual_seed(0)
    return DecoderLM(ModelConfig(vocab_size=11, nsa=SMALL), ATTENTIONS[kind].build).double()


def turned(x, positions):
    """RoPE as a product of complex numbers: (x_c + i x_{c + D/2}) e^{i pos theta^{-2c/D}}."""
    half = x.shape[-1] // 2
    speed = 10_000.0 ** (-2 * torch.arange(half, dtype=torch.float64) / (2 * half))
    z = torch.complex(x[..., :half], x[..., half:])
    z = z * torch.exp(1j * torch.tensor(positions, dtype=torch.float64)[:, None] * speed)
    return torch.cat([z.real, z.imag], dim=-1)


def phi_by_hand(phi, x):
    first, _, last = phi.mlp
    blocks = []
    for start in range(0, x.shape[2] - 3, 2):  # l = 4, d = 2
        block = (x[:, :, start : start + 4] + phi.position).flatten(-2)
        hidden = F.gelu(block @ first.weight.T + first.bias)
        blocks.append(hidden @ last.weight.T + last.bias)
    return torch.stack(blocks, dim=2)


def heads_of(x, weight, width):
    return torch.stack((x @ weight.T).split(width, dim=-1), dim=1)


def test_rope_turns_pairs_as_complex_numbers_do():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 20, 6, dtype=torch.float64)
    torch.testing.assert_close(
        rotate(x, torch.arange(20)), turned(x, range(20)), rtol=1e-5, atol=1e-5
    )


def test_rope_scores_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 6, dtype=torch.float64)
    at = [rotate(q, torch.tensor([p + 7])) @ rotate(k, torch.tensor([p])).T for p in (0, 5, 100)]
    torch.testing.assert_close(at[1:], [at[0]] * 2, rtol=1e-4, atol=1e-4)
    assert abs(at[0] - q @ k.T) > 1e-2


@torch.no_grad()
def test_the_layer_is_equation_5_over_the_three_branches():
    layer, x = attention(), stream()
    y, trace = layer(x, return_trace=True)
    where = list(range(LENGTH))
    q = turned(heads_of(x, layer.query.weight, 4), where)
    keys = {b: heads_of(x, layer.keys[b].weight, 4) for b in BRANCHES}
    values = {b: heads_of(x, layer.values[b].weight, 3) for b in BRANCHES}
    short = phi_by_hand(layer.phi_k, keys["compressed"])
    short = turned(short, range(0, LENGTH - 3, 2))  # at each block's first token
    summary = phi_by_hand(layer.phi_v, values["compressed"])
    selected, window = (turned(keys[b], where) for b in ("selected", "window"))

    blocks = dict(block_size=4, stride=2)
    out_c, lse = loops.compressed_attention(q, short, summary, **blocks)
    importance = loops.block_importance(q, short, lse, **blocks, select_block_size=4)
    ids = loops.choose_blocks(importance, select_block_size=4, num_selected=4)
    out_s = loops.selected_attention(q, selected, values["selected"], ids, select_block_size=4)
    out_w = loops.window_attention(q, window, values["window"], window=5)

    near = dict(rtol=1e-5, atol=1e-6)  # the layer's angles are float32
    torch.testing.assert_close(trace.importance, importance, **near)
    assert torch.equal(trace.ids, ids)
    for name, expected in zip(BRANCHES, (out_c, out_s, out_w), strict=True):
        torch.testing.assert_close(trace.outputs[name], expected, **near)
    gate = torch.sigmoid(layer.gate.mlp(x)).reshape(2, LENGTH, 4, 3)  # (B, T, H, branch)
    torch.testing.assert_close(trace.gates, gate.transpose(1, 2))
    mixed = torch.zeros(2, LENGTH, 4, 3, dtype=torch.float64)
    for branch, out in enumerate((out_c, out_s, out_w)):
        mixed += gate[..., branch, None] * out.transpose(1, 2)
    expected = mixed.reshape(2, LENGTH, 12) @ layer.output.weight.T
    torch.testing.assert_close(y, expected, **near)


def run_seeded(module, x):
    torch.manual_seed(1)  # the random rule draws the same blocks in every pass
    return module(x)


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("t", [0, 3, 4, 15, 19])
def test_nothing_after_t_changes_anything_up_to_t(kind, t):
    layer, x = attention(kind), stream()
    other = x.clone()
    other[:, t + 1 :] += torch.randn_like(other[:, t + 1 :])
    y, changed = run_seeded(layer, x), run_seeded(layer, other)
    assert (y[:, : t + 1] - changed[:, : t + 1]).abs().max() == 0
    assert (y[:, t + 1 :] - changed[:, t + 1 :]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_no_gradient_comes_from_a_later_token(kind):
    layer, x = attention(kind), stream().requires_grad_()
    run_seeded(layer, x)[:, 13].sum().backward()
    assert (x.grad[:, 14:] == 0).all()
    assert x.grad[:, 13].abs().min() > 0


@pytest.mark.parametrize("kind", sorted(set(ATTENTIONS) - {"nsa-random"}))
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [1, 2, 5, 19], [3, 4, 4, 9, 7], [26, 1]])
def test_decoding_in_chunks_equals_the_prefill(kind, chunks):
    layer, x = attention(kind).eval(), stream()  # no exploring when decoding
    cache = layer.new_cache(2, LENGTH)
    y = torch.cat([layer(part, cache) for part in x.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(y, layer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", sorted(set(ATTENTIONS) - {"nsa-random"}))
@pytest.mark.parametrize("last", [1, 5, LENGTH])
def test_the_newest_queries_alone_get_the_same_outputs(kind, last):
    layer, x = attention(kind).eval(), stream()
    torch.testing.assert_close(layer(x, last=last), layer(x)[:, -last:], rtol=1e-10, atol=1e-10)
    cache = layer.new_cache(2, LENGTH)
    layer(x[:, :20], cache, last=1)  # the cache is whole whichever outputs are asked for
    torch.testing.assert_close(layer(x[:, 20:], cache), layer(x)[:, 20:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 3, 4, 27])
def test_the_trace_has_the_shapes_it_promises_and_no_gradient(length):
    layer = attention()
    trace = layer(stream(length).requires_grad_(), return_trace=True)[1]
    short, blocks = max(0, (length - 4) // 2 + 1), -(-length // 4)
    assert trace.ids.shape == (2, 2, length, 4)
    assert trace.probabilities.shape == (2, 2, 2, length, short)
    assert trace.importance.shape == (2, 2, length, blocks)
    assert trace.gates.shape == (2, 4, length, 3)
    assert [out.shape for out in trace.outputs.values()] == [(2, 4, length, 3)] * 3
    assert tuple(trace.outputs) == BRANCHES
    for tensor in (
        trace.ids,
        trace.probabilities,
        trace.importance,
        trace.gates,
        *trace.outputs.values(),
    ):
        assert not tensor.requires_grad


def test_gates_lie_between_0_and_1_and_do_not_sum_to_1():
    gates = attention()(3 * stream(), return_trace=True)[1].gates
    assert gates.min() > 0 and gates.max() < 1
    assert (gates.sum(-1) - 1).abs().max() > 0.1
    assert gates.std(dim=1).max() > 0.01  # each head has its own


def test_without_selection_the_selected_branch_is_exactly_0():
    trace = attention("nsa-no-selection")(stream(), return_trace=True)[1]
    assert (trace.outputs["selected"] == 0).all()
    assert (trace.ids == -1).all()


def test_random_blocks_follow_the_seed_and_keep_the_forced_blocks():
    layer, x = attention("nsa-random"), stream()
    assert torch.equal(run_seeded(layer, x), run_seeded(layer, x))
    sets = {tuple(layer(x, return_trace=True)[1].ids[0, 0, -1].tolist()) for _ in range(30)}
    assert sets == {(0, j, 5, 6) for j in (1, 2, 3, 4)}  # query 26: one initial, two local


def test_the_oracle_chooses_the_blocks_that_dense_attention_weighs_most():
    layer, x = attention("nsa-oracle"), stream()
    ids = layer(x, return_trace=True)[1].ids
    q = turned(heads_of(x, layer.query.weight, 4), range(LENGTH))
    k = turned(heads_of(x, layer.keys["selected"].weight, 4), range(LENGTH))
    for g in range(2):
        p = sum(torch.softmax(q[:, h, -1:] @ k[:, g].mT / 2, -1) for h in (2 * g, 2 * g + 1))
        mass = torch.stack([p[:, 0, 4 * j : 4 * j + 4].sum(-1) for j in range(7)], dim=-1)
        best = mass[:, 1:5].argmax(-1) + 1
        assert ids[:, g, -1].tolist() == [[0, j, 5, 6] for j in best.tolist()]


@pytest.mark.parametrize("start", [0, 5])
def test_the_oracle_weighs_a_block_by_dense_attentions_probabilities(start):
    torch.manual_seed(0)
    q, k = (torch.randn(2, heads, 15, 6, dtype=torch.float64) for heads in (4, 2))
    eye = torch.eye(15, dtype=torch.float64).expand(2, 2, 15, 15)
    p = loops.window_attention(q, k, eye)  # with v = identity a row holds its weights
    p = p[:, [0, 2]] + p[:, [1, 3]]  # the two heads of each group
    expected = torch.stack([p[..., 4 * j : 4 * j + 4].sum(-1) for j in range(4)], dim=-1)
    mass = block_mass(q[:, :, start:], k, 4, start)
    torch.testing.assert_close(mass, expected[:, :, start:], rtol=1e-10, atol=1e-10)
    assert (mass[:, :, 0, start // 4 + 1 :] == 0).all()


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_the_decoder_gives_logits_and_one_trace_for_each_nsa_layer(kind):
    logits, traces = decoder(kind)(torch.randint(11, (2, LENGTH)), return_traces=True)
    assert logits.shape == (2, LENGTH, 11)
    assert len(traces) == (2 if kind.startswith("nsa") else 0)


@pytest.mark.parametrize("kind", sorted(set(ATTENTIONS) - {"nsa-random"}))
@pytest.mark.parametrize("last", [1, 5, LENGTH])
def test_the_newest_positions_alone_get_the_same_logits_and_gradients(kind, last):
    """Two layers, the first of which must still work for every position."""
    model, tokens = decoder(kind).eval(), torch.randint(11, (2, LENGTH))  # no exploring
    weight = torch.randn(2, last, 11, dtype=torch.float64)
    results = []
    for logits in (model(tokens)[:, -last:], model(tokens, last=last)):
        model.zero_grad()
        (logits * weight).sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([logits, *grads])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "last, message",
    [
        (0, "last = 0: must be at least 1"),
        (28, "last = 28: must not exceed the 27 tokens of x"),
    ],
)
def test_more_newest_positions_than_there_are_is_an_error(last, message):
    for kind in ("nsa", "dense"):
        with pytest.raises(ValueError, match=message):
            decoder(kind)(torch.randint(11, (1, LENGTH)), last=last)


@torch.no_grad()
def test_symbols_that_share_a_position_add_their_embeddings():
    model, tokens = decoder(), torch.randint(11, (2, 9))
    pairs = torch.stack([tokens, tokens.flip(1)], dim=-1)
    alone = model(tokens)
    model.embedding.weight[0] = 0  # symbol 0 beside a token adds nothing
    padded = model(torch.stack([tokens, torch.zeros_like(tokens)], dim=-1))
    assert torch.equal(padded, model(tokens))
    torch.testing.assert_close(model(pairs), model(pairs.flip(-1)), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model(pairs), alone)


@pytest.mark.parametrize("kind", sorted(set(ATTENTIONS) - {"nsa-random"}))
def test_generate_equals_the_argmax_without_a_cache(kind):
    model, tokens = decoder(kind), torch.randint(11, (2, 5))
    written = generate(model, tokens, 20)
    for _ in range(20):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, tokens)


def test_a_state_dict_carries_the_whole_model():
    model, tokens = decoder(), torch.randint(11, (2, LENGTH))
    other = DecoderLM(model.config).double()
    assert not torch.equal(other(tokens), model(tokens))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens), model(tokens))


def on(name, dtype=torch.bfloat16):
    """A tensor that says it is on a device, which need not be here."""

    class Elsewhere(torch.Tensor):
        device = torch.device(name)

    return torch.zeros(1, dtype=dtype).as_subclass(Elsewhere)


def test_auto_and_torch_are_the_reference_on_a_cpu():
    assert operations_of("auto", on("cpu"), SMALL) is PLAIN
    assert operations_of("torch", on("cuda"), SMALL) is PLAIN
    assert PLAIN.nsa_attention is nsa_attention


def pretend_kernels(monkeypatch, **contents):
    module = types.ModuleType("kernels")
    module.__spec__ = importlib.machinery.ModuleSpec("kernels", None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, "kernels", module)
    return module


def pretend_ours(monkeypatch, why_not):
    names = Operations._fields
    pretend_kernels(monkeypatch, why_not=why_not, **dict.fromkeys(names, print))


def test_auto_takes_the_kernels_on_a_gpu(monkeypatch):
    pretend_ours(monkeypatch, lambda *_: None)
    assert operations_of("auto", on("cuda"), SMALL) == (print,) * len(Operations._fields)
    assert operations_of("auto", on("cpu"), SMALL) is PLAIN
    assert operations_of("triton", on("cpu"), SMALL) == (print,) * len(Operations._fields)


def test_auto_is_the_reference_where_the_kernels_cannot_run(monkeypatch):
    def why_not(device, dtype, *sizes):
        blocks = (4, SMALL.stride, SMALL.num_selected)
        assert sizes == (2, 4, 3, *blocks)  # heads a group, D, Dv, l', d, n
        return None if dtype == torch.bfloat16 else "too exact"

    pretend_ours(monkeypatch, why_not)
    assert operations_of("auto", on("cuda"), SMALL) == (print,) * len(Operations._fields)
    assert operations_of("auto", on("cuda", torch.float64), SMALL) is PLAIN
    assert operations_of("triton", on("cuda", torch.float64), SMALL) == (print,) * len(
        Operations._fields
    )


def test_auto_is_the_reference_on_a_gpu_without_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)
    assert operations_of("auto", on("cuda"), SMALL) is PLAIN


def test_auto_is_the_reference_where_another_package_has_the_name(monkeypatch):
    pretend_kernels(monkeypatch, __file__="/elsewhere.py")
    assert operations_of("auto", on("cuda"), SMALL) is PLAIN


def test_triton_without_kernels_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ImportError, match="backend = 'triton'.*backend='torch'"):
        NSAttention(SMALL, backend="triton")


@pytest.mark.parametrize("contents", [{"__path__": ["/elsewhere"]}, {"__file__": "/elsewhere.py"}])
def test_another_package_named_kernels_is_recognised(monkeypatch, contents):
    pretend_kernels(monkeypatch, **contents)
    with pytest.raises(ImportError, match="another package named kernels at .*/elsewhere"):
        NSAttention(SMALL, backend="triton")


def test_an_attention_that_does_not_return_its_loss_is_named():
    class Bare(torch.nn.Module):
        def __init__(self, config):
            super().__init__()

        def forward(self, x, cache=None, **asked):
            return x

    model = DecoderLM(ModelConfig(vocab_size=11, nsa=SMALL), Bare)
    with pytest.raises(TypeError, match=r"Bare must return \(y, loss\).*got Tensor"):
        model(torch.zeros(2, 5, dtype=torch.int64))


def test_nsa_attention_is_its_branches_times_the_gates_on_its_own():
    """Eq. 5 called by itself, and the branches that it hands out."""
    torch.manual_seed(0)
    c = SMALL
    q = torch.randn(2, 4, LENGTH, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 2, LENGTH, 4, dtype=torch.float64)
    v = torch.randn(2, 2, LENGTH, 3, dtype=torch.float64)
    short = torch.randn(2, 2, 12, 4, dtype=torch.float64)
    summary = torch.randn(2, 2, 12, 3, dtype=torch.float64)
    gates = torch.rand(2, 4, LENGTH, 3, dtype=torch.float64)
    pairs = ((short, summary), (k, v), (k, v))
    out, branches = nsa_attention(q, *pairs, gates, **c.sizes, return_branches=True)
    by_hand = sum(gates[..., i, None] * branches[i] for i in range(3))
    torch.testing.assert_close(out, by_hand)
    assert out.requires_grad and not any(x.requires_grad for x in branches)
    torch.testing.assert_close(nsa_attention(q, *pairs, gates, **c.sizes), out)
    ids = torch.zeros(2, 2, LENGTH, 1, dtype=torch.int32)
    read = nsa_attention(q, *pairs, gates, **c.sizes, choose=lambda lse: ids, return_branches=True)[
        1
    ]
    only_first = loops.selected_attention(q.detach(), k, v, ids, select_block_size=4)
    torch.testing.assert_close(read.selected, only_first)


def test_maps_projected_together_are_those_maps_apart():
    """A map that is more than a weight, an adapter say, is called itself."""

    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    x = torch.randn(2, 5, 6, dtype=torch.float64)
    plain = [torch.nn.Linear(6, n, bias=False, dtype=torch.float64) for n in (3, 4, 5)]
    for maps in (plain, [*plain, Adapter(6, 2, bias=False, dtype=torch.float64)]):
        got = projected_together(x, maps)
        for y, one in zip(got, maps, strict=True):
            torch.testing.assert_close(y, one(x))


def test_a_map_that_is_more_than_its_weight_is_called():
    """A bias, a hook, a replaced forward and a pruned weight all have their say."""
    x = torch.randn(1, 5, 6)

    def plain():
        return torch.nn.Linear(6, 4, bias=False)

    seen = []
    hooked = plain()
    hooked.register_forward_hook(lambda *_: seen.append("hook"))
    replaced = plain()
    replaced.forward = lambda x: torch.zeros(1, 5, 4)
    pruned = prune.random_unstructured(plain(), "weight", amount=0.5)
    for one in (torch.nn.Linear(6, 4), hooked, replaced, pruned):
        got = projected_together(x, [plain(), one])[1]
        torch.testing.assert_close(got, one(x))
    assert seen == ["hook", "hook"]


@pytest.mark.parametrize("kind", ["nsa", "dense"])
def test_a_wrapped_query_needs_no_weight(kind):
    class Wrapped(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x)

    layer, x = attention(kind), stream()
    expected = layer(x)
    layer.query = Wrapped(layer.query)
    torch.testing.assert_close(layer(x), expected)


def test_a_copied_cache_goes_on_with_a_copied_layer():
    layer, x = attention(), stream()
    cache = layer.new_cache(2, LENGTH)
    with torch.no_grad():
        layer(x[:, :20], cache)
        other, copied = copy.deepcopy((layer, cache))
        torch.testing.assert_close(other(x[:, 20:], copied), layer(x[:, 20:], cache))


def test_gates_of_another_type_do_not_change_the_outputs_type():
    q, k, v = (torch.randn(1, 2, 20, 4) for _ in range(3))
    gates = torch.rand(1, 2, 20, 3, dtype=torch.float64)
    pairs = [(k[:, :, :9], v[:, :, :9]), (k, v), (k, v)]
    sizes = dict(block_size=4, stride=2, select_block_size=4, num_selected=3, window_size=5)
    assert nsa_attention(q, *pairs, gates, **sizes).dtype == torch.float32


def test_phi_can_be_the_mean_alone_which_has_no_weights():
    phi = Phi(6, 4, 2, kind="mean")
    x = torch.randn(1, 2, 9, 6)
    blocks = [x[:, :, i : i + 4].sum(2) / 4 for i in (0, 2, 4)]
    torch.testing.assert_close(phi(x), torch.stack(blocks, 2))
    assert not list(phi.parameters())
    assert phi(x[:, :, :3]).shape == (1, 2, 0, 6)
