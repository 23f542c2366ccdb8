"""What only a GPU can show: real lengths in half precision, 64-bit offsets, graphs, no waiting.

`make test-gpu` runs these with all other tests of the kernels and records the result.
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import kernels
import nsa_lite
from benchmarks.cases import CONFIGS, coherent_ids, inputs, random_ids
from benchmarks.decode import Held
from nsa_lite.lab import distributed
from nsa_lite.lab.context_parallel import ContextParallel, add_up_gradients, in_order, own_part

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SIZES = CONFIGS["A"]
OUTPUT, GRADIENT = 4e-3, 5e-3  # relative norms, half precision against float32
SUMS = 1e-4  # the same, of float32 sums in another order


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


def layer_and_gradient(kind):
    """A layer of two groups in float32, its input and its output's gradient, alike everywhere."""
    config = nsa_lite.NSAConfig(dim=512, heads=32, kv_heads=2, head_dim=64, value_dim=64)
    torch.manual_seed(0)
    layer = kind(config, backend="triton").to("cuda")
    x, dy = torch.randn(2, 1, 8192, 512).to("cuda")
    return layer, x, dy


def one_of_two_ranks(rank, place, folder):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{place}", rank=rank, world_size=2)
    layer, x, dy = layer_and_gradient(ContextParallel)
    mine = own_part(x).requires_grad_()
    y = layer(mine)
    y.backward(own_part(dy))
    add_up_gradients(layer)
    found = [y.detach(), mine.grad, *(w.grad for w in layer.parameters())]
    torch.save([t.cpu() for t in found], folder / f"{rank}.pt")
    distributed.leave()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_sequence_on_two_gpus_has_the_outputs_and_gradients_of_one(tmp_path):
    mp.start_processes(
        one_of_two_ranks, (tmp_path / "meeting", tmp_path), nprocs=2, start_method="spawn"
    )
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    layer, x, dy = layer_and_gradient(nsa_lite.NSAttention)
    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    for ours, whole in ((0, y), (1, x.grad)):
        assert relative(in_order([part[ours] for part in parts], 1), whole.cpu()) < SUMS
    for _, _, *gradients in parts:
        for ours, weight in zip(gradients, layer.parameters(), strict=True):
            assert relative(ours, weight.grad.cpu()) < SUMS


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


# --- decoding ---


def cache_of(lengths, room=65536, dtype=torch.bfloat16):
    """Random keys and values; NaN behind each sequence's length."""
    make = torch.Generator("cuda").manual_seed(0)

    def pair(rows, ends):
        shape = len(lengths), SIZES.groups, rows
        both = tuple(
            torch.randn(*shape, width, generator=make, device="cuda", dtype=dtype)
            for width in (SIZES.width, SIZES.value)
        )
        for b, end in enumerate(ends):
            for x in both:
                x[b, :, end:] = torch.nan
        return both

    whole = [max(0, (n - SIZES.block_size) // SIZES.stride + 1) for n in lengths]
    raw = {name: pair(room, lengths) for name in ("selected", "window")}
    return Held(pair(room // SIZES.stride, whole), raw, torch.tensor(lengths, device="cuda"))


def queries_of(batch, new, dtype=torch.bfloat16, seed=1):
    make = torch.Generator("cuda").manual_seed(seed)
    shape = batch, SIZES.heads, new
    q = torch.randn(*shape, SIZES.width, generator=make, device="cuda", dtype=dtype)
    return q, torch.rand(*shape, 3, generator=make, device="cuda", dtype=dtype)


def stepped(package, cache, q, gates):
    sizes = dict(**SIZES.choice(), window_size=SIZES.window)
    return package.decode_step(q, cache, gates, return_ids=True, **sizes)


@pytest.mark.parametrize("new", [1, 8])
def test_a_step_at_real_lengths(new):
    """Half precision against float32 on the same numbers; most rows choose the same blocks."""
    cache = cache_of([65536, 40001, 8192, 17])
    q, gates = queries_of(4, new)
    out, ids = stepped(kernels, cache, q, gates)
    raw = {name: tuple(x.float() for x in pair) for name, pair in cache.raw.items()}
    exact = Held(tuple(x.float() for x in cache.blocks), raw, cache.lengths)
    expected, chosen = stepped(nsa_lite, exact, q.float(), gates.float())
    same = (ids == chosen).all(-1)
    assert same.float().mean() >= 0.98
    rows = same.repeat_interleave(SIZES.heads // SIZES.groups, dim=1)
    assert relative(out[rows], expected[rows]) <= OUTPUT
    assert same.all() or relative(out, expected) <= 10 * OUTPUT


def test_a_step_made_again_with_other_tensors():
    """Launches that are made without Triton's look-up give what the first ones would have given."""
    for seed, lengths in enumerate([[4096, 100], [900, 4001], [64, 65]]):
        cache = cache_of(lengths, room=4096)
        q, gates = queries_of(2, 1, seed=seed)
        out, ids = stepped(kernels, cache, q, gates)
        kernels.decode.prepared_steps.clear()
        fresh, fresh_ids = stepped(kernels, cache, q, gates)
        assert torch.equal(out, fresh)
        assert torch.equal(ids, fresh_ids)
        odd = torch.empty(q.numel() + 1, device="cuda", dtype=q.dtype)[1:].view_as(q).copy_(q)
        assert torch.equal(stepped(kernels, cache, odd, gates)[0], out)  # not at 16 bytes


def test_a_window_of_its_own_after_one_that_was_shared():
    """Caches alike in all but this: whose keys and values the window reads."""
    cache = cache_of([900, 4001], room=4096)
    q, gates = queries_of(2, 1)
    expected, _ = stepped(kernels, cache, q, gates)
    kernels.decode.prepared_steps.clear()
    shared = cache._replace(raw={**cache.raw, "window": cache.raw["selected"]})
    stepped(kernels, shared, q, gates)
    assert torch.equal(stepped(kernels, cache, q, gates)[0], expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_another_device_writes_what_it_writes_on_the_current_one():
    """In a CUDA graph, which is captured on the current device, and with a slot's odd lengths."""
    assert torch.cuda.current_device() == 0
    prompt = torch.arange(2 * 40).view(2, 40) % 97
    found = [
        nsa_lite.generate(small_model().to(device), prompt.to(device), 20).cpu()
        for device in ("cuda:0", "cuda:1")
    ]
    assert torch.cuda.current_device() == 0
    assert torch.equal(*found)


def small_model(**changes):
    sizes = dict(dim=256, heads=16, kv_heads=2, head_dim=64, value_dim=64, num_selected=4)
    config = nsa_lite.NSAConfig(**{**sizes, **changes})
    torch.manual_seed(0)
    return nsa_lite.DecoderLM(nsa_lite.ModelConfig(vocab_size=97, nsa=config)).cuda().bfloat16()


def test_a_step_of_the_layer_waits_for_nothing():
    """No number goes from the device to the host, whether a block ends or not."""
    model = small_model()
    tokens = torch.arange(2 * 50, device="cuda").view(2, 50) % 97
    caches = model.new_caches(2, 128)
    for part in tokens.split([40, 1, 1, 8], dim=1):
        model(part, caches)
    caches[0].cut(48), caches[1].cut(48)
    tokens = tokens[:, 48:]
    torch.cuda.synchronize()
    layer_input = model.embedding(tokens[:, :1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for block, cache in zip(model.blocks, caches, strict=True):
            for _ in range(20):
                block.attention(layer_input, cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_writes_what_steps_one_by_one_write():
    """generate, whose step is a CUDA graph replayed while the cache grows, and eager steps."""
    model = small_model()
    prompt = torch.arange(3 * 70, device="cuda").view(3, 70) * 31 % 97
    lengths = [70, 9, 31]
    written = nsa_lite.generate(model, prompt, 50, lengths=lengths)
    caches = model.new_caches(3, 120)
    model(prompt, caches)
    for cache in caches:
        cache.cut([n - 1 for n in lengths])
    newest = torch.stack([prompt[b, n - 1] for b, n in enumerate(lengths)])
    with torch.no_grad():
        for i in range(50):
            newest = model(newest[:, None], caches)[:, -1].argmax(-1)
            assert torch.equal(newest, written[:, 70 + i]), i
    again = nsa_lite.generate(model, prompt, 50, lengths=lengths)
    assert torch.equal(written, again)


def test_a_cache_of_the_layer_decodes_as_one_pass():
    """In bfloat16: prefill in chunks, then token by token, beside all tokens at once."""
    config = nsa_lite.NSAConfig(dim=256, heads=16, kv_heads=1, head_dim=192, value_dim=128)
    torch.manual_seed(0)
    layer = nsa_lite.NSAttention(config).cuda().bfloat16()
    x = torch.randn(1, 1100, 256, device="cuda", dtype=torch.bfloat16)
    cache = layer.new_cache(1, 1100)
    parts = [layer(part, cache) for part in x.split([700, 300, *[1] * 60, 8, 8, 8, 8, 8], dim=1)]
    with torch.no_grad():
        assert relative(torch.cat(parts, dim=1), layer(x)) <= 10 * OUTPUT  # few blocks differ
