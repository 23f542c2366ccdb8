"""What only a GPU can show: real lengths in half precision, 64-bit offsets, graphs, no waiting.

`make test-gpu` runs these with all other tests of the kernels and records the result.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import kernels
import nsa_lite
from benchmarks.cases import CONFIGS, coherent_ids, inputs, random_ids

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SIZES = CONFIGS["A"]
OUTPUT, GRADIENT = 4e-3, 5e-3  # relative norms, half precision against float32


@pytest.fixture(autouse=True)
def give_memory_back():
    """So that tests beside this one, or a smaller GPU, have what the last one held."""
    yield
    torch.cuda.empty_cache()


def relative(x, y):
    x, y = x.detach().float(), y.detach().float()
    return float((x - y).norm() / y.norm())


def branches(x, ids):
    """Each branch as (its inputs, a function of them)."""
    sizes = SIZES
    return {
        "window": (
            [x["q"], x["window.k"], x["window.v"]],
            lambda q, k, v: kernels.window_attention(q, k, v, window=sizes.window),
        ),
        "dense": ([x["q"], x["window.k"], x["window.v"]], kernels.window_attention),
        "compressed": (
            [x["q"], x["compressed.k"], x["compressed.v"]],
            lambda q, k, v: kernels.compressed_attention(q, k, v, **sizes.blocks())[0],
        ),
        "selected": (
            [x["q"], x["selected.k"], x["selected.v"]],
            lambda q, k, v: kernels.selected_attention(
                q, k, v, ids, select_block_size=sizes.select_block_size
            ),
        ),
    }


def forward_and_gradients(operation, tensors, dout):
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = operation(*tensors)
    out.backward(dout.to(out.dtype))
    return [out.detach(), *(t.grad for t in tensors)]


@pytest.mark.parametrize("length", [1024, 16384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("larger", [1, 30])
def test_half_precision_at_real_lengths(length, dtype, larger):
    """Against float32 kernels, which the other tests hold to float64; also with sharp softmaxes."""
    x = inputs(SIZES, length, "cuda", dtype)
    x["q"] = x["q"].detach() * larger
    ids = random_ids(SIZES, length, "cuda")
    for name, (tensors, operation) in branches(x, ids).items():
        got = forward_and_gradients(operation, tensors, x["dout"])
        expected = forward_and_gradients(operation, [t.float() for t in tensors], x["dout"])
        errors = [relative(a, b) for a, b in zip(got, expected, strict=True)]
        allowed = GRADIENT if dtype == torch.float16 or larger == 1 else rounded_output(x)
        assert errors[0] <= OUTPUT and max(errors[1:]) <= allowed, (name, errors)


def rounded_output(x):
    """The larger of dq's and dk's errors in FlashAttention-2, dense, on the same tensors.

    A sharp softmax makes ds = p (dp - delta) a small difference, and delta = sum(out dout) comes
    from an output that was rounded to bfloat16: no kernel that keeps only that can do better.
    """
    length = min(x["q"].shape[2], 4096)
    tensors = [x[n].detach()[:, :, :length] for n in ("q", "window.k", "window.v")]
    dout = x["dout"][:, :, :length]

    def flash_attention_2(q, k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )

    got = forward_and_gradients(flash_attention_2, tensors, dout)
    expected = forward_and_gradients(kernels.window_attention, [t.float() for t in tensors], dout)
    return 1.05 * max(relative(a, b) for a, b in zip(got[1:3], expected[1:3], strict=True))


def test_float32_at_length_1024_is_the_reference():
    x = {name: t.float() for name, t in inputs(SIZES, 1024, "cuda", torch.float32).items()}
    ids = random_ids(SIZES, 1024, "cuda")
    names = {
        "window": lambda q, k, v: nsa_lite.window_attention(q, k, v, window=SIZES.window),
        "compressed": lambda q, k, v: nsa_lite.compressed_attention(q, k, v, **SIZES.blocks())[0],
        "selected": lambda q, k, v: nsa_lite.selected_attention(
            q, k, v, ids, select_block_size=SIZES.select_block_size
        ),
    }
    for name, (tensors, operation) in branches(x, ids).items():
        if name in names:
            got = forward_and_gradients(operation, tensors, x["dout"])
            expected = forward_and_gradients(names[name], tensors, x["dout"])
            for a, b in zip(got, expected, strict=True):
                assert relative(a, b) <= 1e-4, name


def test_selected_sets_differ_from_the_reference_by_near_ties_only():
    """In bfloat16: what one side chose and the other did not scores nearly the same."""
    x = inputs(SIZES, 4096, "cuda", torch.bfloat16)
    q, k = x["q"].detach(), x["compressed.k"].detach()
    lse = kernels.compressed_attention(q, k, x["compressed.v"].detach(), **SIZES.blocks())[1]
    got = kernels.select_blocks(q, k, lse, **SIZES.choice())
    score = nsa_lite.block_importance(
        q, k, lse, **SIZES.blocks(), select_block_size=SIZES.select_block_size
    )
    expected = nsa_lite.choose_blocks(
        score, num_selected=SIZES.num_selected, select_block_size=SIZES.select_block_size
    )

    def chosen_scores(ids):
        ids = ids.long()
        return score.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 0).sort(-1).values

    assert torch.allclose(chosen_scores(got), chosen_scores(expected), rtol=2e-3, atol=1e-5)
    assert (got == expected).float().mean() > 0.99


@pytest.mark.parametrize("keep", [0.0, 0.75])
def test_two_runs_at_length_16384_are_the_same_bits(keep):
    x = inputs(SIZES, 16384, "cuda", torch.bfloat16)
    ids = coherent_ids(SIZES, 16384, "cuda", keep)
    for name, (tensors, operation) in branches(x, ids).items():
        one = forward_and_gradients(operation, tensors, x["dout"])
        two = forward_and_gradients(operation, tensors, x["dout"])
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)), name


def test_offsets_beyond_2_to_the_31():
    """The last rows of a q with 2^31 elements, against the same rows on their own."""
    heads, length, width, last = 64, 2**18, 128, 64
    make = torch.Generator("cuda").manual_seed(0)

    def new(*shape):
        return torch.randn(shape, generator=make, device="cuda", dtype=torch.bfloat16)

    q, k, v = new(1, heads, length, width), new(1, 1, length, width), new(1, 1, length, width)
    assert q.numel() >= 2**31
    token = torch.arange(length, device="cuda")
    ids = torch.stack([token * 0, token // 64], -1).int().view(1, 1, length, 2)
    ids[..., 1] = torch.where(ids[..., 1] == 0, -1, ids[..., 1])
    blocks, short = {"block_size": 32, "stride": 16}, (length - 32) // 16 + 1
    k_short, v_short = k[:, :, :short], v[:, :, :short]
    tail, start = q[:, :, -last:].float().requires_grad_(), length - last
    q.requires_grad_()
    wide = [t.float() for t in (k, v, k_short, v_short)]
    pairs = {
        "window": (
            kernels.window_attention(q, k, v, window=64),
            nsa_lite.window_attention(tail, *wide[:2], window=64, start=start),
        ),
        "selected": (
            kernels.selected_attention(q, k, v, ids, select_block_size=64),
            nsa_lite.selected_attention(
                tail, *wide[:2], ids[:, :, -last:], select_block_size=64, start=start
            ),
        ),
        "compressed": (
            kernels.compressed_attention(q, k_short, v_short, **blocks)[0],
            nsa_lite.compressed_attention(tail, *wide[2:], **blocks, start=start)[0],
        ),
    }
    dout = torch.zeros(1, heads, length, width, device="cuda", dtype=torch.bfloat16)
    dout[:, :, -last:] = new(1, heads, last, width)
    for name, (out, expected) in pairs.items():
        assert relative(out[:, :, -last:], expected) <= OUTPUT, name
        (dq,) = torch.autograd.grad(out, q, dout)
        (dtail,) = torch.autograd.grad(expected, tail, dout[:, :, -last:].float())
        assert relative(dq[:, :, -last:], dtail) <= GRADIENT, name
        assert not dq[:, :, :-last].any(), name


def training_step(layer, optimizer, x):
    optimizer.zero_grad(set_to_none=True)
    loss = layer(x).float().square().mean()
    loss.backward()
    optimizer.step()
    return loss


def test_a_training_step_waits_for_nothing_and_fits_in_a_cuda_graph():
    torch.manual_seed(0)
    config = nsa_lite.NSAConfig(dim=512, heads=16, kv_heads=1, head_dim=64, value_dim=64)
    layer = nsa_lite.NSAttention(config, backend="triton").cuda().bfloat16()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, capturable=True)
    x = torch.randn(1, 4096, 512, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            training_step(layer, optimizer, x)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")  # from here on, waiting for the device is an error
    try:
        training_step(layer, optimizer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = training_step(layer, optimizer, x)
    losses = []
    for _ in range(20):
        graph.replay()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]  # the replayed steps train


def test_memory_of_a_whole_layer_at_length_65536():
    """Three branches, top-n and gates, forward and backward, at most 12 GiB (config A)."""
    x = inputs(SIZES, 65536, "cuda", torch.bfloat16)
    ids = random_ids(SIZES, 65536, "cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    pairs = ((x[f"{branch}.k"], x[f"{branch}.v"]) for branch in nsa_lite.BRANCHES)

    def choose(lse):
        kernels.select_blocks(x["q"], x["compressed.k"], lse, **SIZES.choice())
        return ids

    kernels.nsa_attention(
        x["q"], *pairs, x["gates"], **SIZES.choice(), window_size=512, choose=choose
    ).backward(x["dout"])
    assert torch.cuda.max_memory_allocated() <= 12 * 2**30


def test_a_batch_of_70000_sequences():
    """More programs than a grid's second axis takes; each sequence gets what it gets alone."""
    make = torch.Generator("cuda").manual_seed(0)

    def new(*shape):
        x = torch.randn(shape, generator=make, device="cuda", dtype=torch.bfloat16)
        return x.requires_grad_()

    q, k, v = new(70_000, 1, 4, 16), new(70_000, 1, 4, 16), new(70_000, 1, 4, 16)
    out = kernels.window_attention(q, k, v)
    out.float().square().sum().backward()
    few = [x.detach()[-9:].clone().requires_grad_() for x in (q, k, v)]
    alone = kernels.window_attention(*few)
    alone.float().square().sum().backward()
    assert torch.equal(out[-9:], alone)
    assert all(torch.equal(a.grad[-9:], b.grad) for a, b in zip((q, k, v), few, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_device_than_the_current_one():
    """Forward and backward of everything on cuda:1 while cuda:0 is current, bit for bit."""
    assert torch.cuda.current_device() == 0
    config = nsa_lite.NSAConfig(dim=512, heads=16, kv_heads=1, head_dim=64, value_dim=64)
    found = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        layer = nsa_lite.NSAttention(config, backend="triton").to(torch.bfloat16)
        x = torch.randn(1, 1500, 512, dtype=torch.bfloat16)
        layer, x = layer.to(device), x.to(device).requires_grad_()
        y = layer(x)
        y.float().square().sum().backward()
        found.append([t.cpu() for t in (y, x.grad, *(w.grad for w in layer.parameters()))])
    assert torch.cuda.current_device() == 0
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_checkpointed_layer_in_bfloat16_changes_no_bit():
    config = nsa_lite.NSAConfig(dim=512, heads=16, kv_heads=1, head_dim=64, value_dim=64)
    torch.manual_seed(0)
    layer = nsa_lite.NSAttention(config).cuda().bfloat16()
    x = torch.randn(1, 4096, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    found = []
    for options in (None, dict(use_reentrant=False), dict(use_reentrant=True)):
        layer.zero_grad()
        x.grad = None
        y = layer(x) if options is None else checkpoint(layer, x, **options)
        y.float().square().sum().backward()
        found.append([x.grad, *(w.grad for w in layer.parameters())])
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_the_compiled_layer_is_the_layer():
    """torch.compile, the whole graph, by the backend that "auto" takes; two lengths, one graph."""
    config = nsa_lite.NSAConfig(dim=512, heads=16, kv_heads=1, head_dim=64, value_dim=64)
    torch.manual_seed(0)
    layer = nsa_lite.NSAttention(config).cuda().bfloat16()
    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for length in (1500, 4096):
        x = torch.randn(1, length, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        leaves = [x, *layer.parameters()]
        found = []
        for run in (layer, compiled):
            y = run(x)
            found.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
        # Fused, what lies around the operations rounds less often, so a few blocks differ.
        assert all(relative(a, b) <= 5e-2 for a, b in zip(*found, strict=True))
    assert counter.frame_count == 1


def test_autocast_chooses_as_bfloat16_does():
    """In autocast the layer's choice of blocks is as near to float32's as in plain bfloat16."""
    config = nsa_lite.NSAConfig(dim=512, heads=16, kv_heads=1, head_dim=64, value_dim=64)
    torch.manual_seed(0)
    layer = nsa_lite.NSAttention(config).cuda()
    x = torch.randn(1, 4096, 512, device="cuda")
    exact, trace = layer(x, return_trace=True)
    plain, of_plain = layer.bfloat16()(x.bfloat16(), return_trace=True)
    layer.float()
    with torch.autocast("cuda", torch.bfloat16):
        mixed, of_mixed = layer(x, return_trace=True)
    others = [(t.ids != trace.ids).any(-1).float().mean() for t in (of_plain, of_mixed)]
    assert others[1] <= 1.5 * others[0] + 1e-3
    assert relative(mixed, exact) <= 1.5 * relative(plain, exact)


def test_dense_layers_at_length_65536():
    """Dense by torch's kernels, the window by ours: no T x T scores, forward and backward."""
    config = nsa_lite.NSAConfig(dim=256, heads=4, kv_heads=1, head_dim=64, value_dim=64)
    for window in (None, 512):
        layer = nsa_lite.DenseAttention(config, window=window).cuda().bfloat16()
        x = torch.randn(1, 65536, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        layer(x).float().square().mean().backward()
        assert torch.cuda.max_memory_allocated() <= 4 * 2**30
