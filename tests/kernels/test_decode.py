"""decode_step and write_rows against nsa_lite: on a CPU interpreted, on a GPU compiled.

NaN stands behind each sequence's length and in blocks that are not whole, and every buffer that a
kernel is to fill starts as NaN.
"""

import contextlib
import gc
import weakref
from threading import Thread
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
import nsa_lite
from kernels import decode, shares
from kernels.decode import Pair
from kernels.launching import Again, launch, recorded
from kernels.rows import rows
from nsa_lite.blocks import num_compressed
from tests.kernels.test_kernels import DEVICE, SOME, TOLERANCE, poison_new_buffers  # noqa: F401

SIZES = dict(block_size=4, stride=2, select_block_size=4, num_selected=4, window_size=5)


class Held(NamedTuple):
    """All that decode_step asks of a cache."""

    blocks: tuple[Tensor, Tensor]
    raw: dict[str, tuple[Tensor, Tensor]]
    lengths: Tensor

    def to(self, dtype):
        raw = {name: tuple(x.to(dtype) for x in pair) for name, pair in self.raw.items()}
        return Held(tuple(x.to(dtype) for x in self.blocks), raw, self.lengths)


class Step(NamedTuple):
    """What decode_step is called with."""

    q: Tensor
    cache: Held
    gates: Tensor

    def run(self, package, dtype=torch.float32, **sizes):
        q, gates = (x.to(dtype) for x in (self.q, self.gates))
        return package.decode_step(q, self.cache.to(dtype), gates, return_ids=True, **sizes)


def step(lengths, new=1, groups=2, heads=4, widths=(16, 24), room=64, sizes=SIZES):
    """Random numbers; NaN in all that may not be read."""
    make = torch.Generator(DEVICE).manual_seed(0)
    batch = len(lengths)
    block_size, stride = sizes["block_size"], sizes["stride"]

    def numbers(*shape):
        # Numbers that half precision holds: what it rounds is the kernels' own work.
        return torch.randn(shape, generator=make, device=DEVICE).half().double()

    def pair(rows, ends):
        both = tuple(numbers(batch, groups, rows, width) for width in widths)
        for b, end in enumerate(ends):
            for x in both:
                x[b, :, end:] = torch.nan
        return both

    raw = {name: pair(room, lengths) for name in ("selected", "window")}
    blocks = pair(-(-room // stride), [num_compressed(n, block_size, stride) for n in lengths])
    cache = Held(blocks, raw, torch.tensor(lengths, device=DEVICE))
    q = numbers(batch, heads, new, widths[0])
    return Step(q, cache, numbers(batch, heads, new, 3).sigmoid().half().double())


def agree(lengths, new=1, dtype=torch.float32, sizes=SIZES, **shapes):
    """Equal to nsa_lite in float64; the blocks too, in float32."""
    return agree_on(step(lengths, new, sizes=sizes, **shapes), sizes, dtype)


def agree_on(case, sizes, dtype=torch.float32):
    """The same for a step that is made already."""
    expected, chosen = case.run(nsa_lite, torch.float64, **sizes)
    out, ids = case.run(kernels, dtype, **sizes)
    if dtype == torch.float32:
        assert torch.equal(ids, chosen.to(ids.dtype))
    error = (out.double() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[dtype], error
    return out, ids


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 33, 50, 63, 64])
def test_one_token_at_any_place(length):
    agree([length])


@pytest.mark.parametrize("new", [1, 2, 3, 5, 8])
def test_several_new_tokens_each_have_their_own_selection(new):
    _, ids = agree([new, 17, 41, 64], new)
    assert new < 3 or not torch.equal(ids[-1, :, 0], ids[-1, :, -1])


@pytest.mark.parametrize("heads, groups", [(1, 1), (3, 1), (10, 2), (64, 1)])
@pytest.mark.parametrize("new", [1, 6])
def test_any_heads(heads, groups, new):
    """R = 64 with six tokens is more than one tile of rows."""
    agree([7, 60], new, heads=heads, groups=groups)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_any_batch(batch):
    """With 64 sequences a branch has one share; with one it has many."""
    agree([1 + 23 * b % 30 for b in range(batch)], room=30, groups=1, heads=2)


@pytest.mark.parametrize("widths", [(16, 16), (40, 24), (24, 40), (192, 128)])
def test_any_widths(widths):
    agree([5, 50], widths=widths)


@pytest.mark.parametrize(
    "change",
    [
        dict(scale=0.3),
        dict(num_initial=0, num_local=1),
        dict(num_selected=33),  # more than there are
        dict(window_size=1),
        dict(window_size=100),
        dict(select_block_size=12),
        dict(block_size=2),
        dict(select_block_size=48),
    ],
)
def test_every_size_has_its_say(change):
    sizes = {**SIZES, **change}
    out, _ = agree([3, 29, 62], new=3, sizes=sizes)
    plain, _ = agree([3, 29, 62], new=3)
    assert change == dict(num_selected=33) or not torch.allclose(out[1:], plain[1:])


@st.composite
def shapes(draw):
    stride = draw(st.sampled_from([1, 2, 3, 4]))
    block = stride * draw(st.integers(1, 3))
    select = -(-block // stride) * stride * draw(st.integers(1, 3))
    initial = draw(st.integers(0, 2))
    local = draw(st.integers(0, 2))
    new = draw(st.integers(1, 8))
    room = draw(st.integers(new, 90))
    batch = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    return dict(
        lengths=draw(st.lists(st.integers(new, room), min_size=batch, max_size=batch)),
        new=new,
        room=room,
        groups=groups,
        heads=groups * draw(st.sampled_from([1, 2, 3, 5, 16])),
        widths=(draw(st.sampled_from([16, 20])), draw(st.sampled_from([16, 24]))),
        dtype=draw(st.sampled_from([torch.float32, torch.float16])),
        sizes=dict(
            block_size=block,
            stride=stride,
            select_block_size=select,
            num_selected=max(1, initial + local) + draw(st.integers(0, 4)),
            num_initial=initial,
            num_local=local,
            window_size=draw(st.integers(1, 40)),
        ),
    )


@given(shapes())
@SOME
def test_whatever_the_shapes(shapes):
    if shapes["dtype"] == torch.float16:  # where rounding may not change what is chosen
        shapes["sizes"]["num_selected"] = 64
    agree(**shapes)


@pytest.mark.parametrize("programs", [1, 7, 2000])
def test_however_the_keys_are_shared(monkeypatch, programs):
    """From one share a branch to one key tile a share."""
    monkeypatch.setattr(shares, "PROGRAMS", programs)
    monkeypatch.setattr(decode, "prepared_steps", {})
    sizes = dict(block_size=2, stride=1, select_block_size=2, num_selected=6, window_size=90)
    agree([3, 200, 131], new=2, room=200, sizes=sizes)


def test_equal_scores_go_to_the_lower_block():
    """Keys of 0 score alike: of the free blocks the first ones are read."""
    case = step([64], groups=1, heads=2)
    case.cache.blocks[0].zero_()
    _, ids = case.run(kernels, **SIZES)
    assert ids.tolist() == [[[[0, 1, 14, 15]]]]


def test_a_step_agrees_with_itself_bit_by_bit():
    case = step([9, 64], new=3)
    first, second = (case.run(kernels, **SIZES) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Seeing(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen.append(str(operation))
        return operation(*args, **(kwargs or {}))


def test_who_looks_on_sees_one_operation_with_the_same_outcome():
    case = step([9, 64], new=3)
    alone = case.run(kernels, **SIZES)
    with Seeing() as mode:
        watched = case.run(kernels, **SIZES)
    assert "nsa.attend_to_cache.default" in mode.seen
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))


def test_torch_accepts_the_operation():
    case = step([9, 64], new=3)
    cache = case.cache.to(torch.float32)
    pairs = [*cache.blocks, *cache.raw["selected"], *cache.raw["window"]]
    lengths = cache.lengths[:, None].expand(-1, 2)
    given = (case.q.float(), case.gates.float(), pairs, lengths, [4, 2, 5, 4, 4, 1, 2], None)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(decode.attend_to_cache, given, test_utils=tests)


def test_a_batch_beyond_the_limit_of_a_grid_is_cut_and_joined(monkeypatch):
    case = step([9, 20, 31, 42, 64])
    whole = case.run(kernels, **SIZES)
    for module in ("operations", "decode"):
        monkeypatch.setattr(f"kernels.{module}.MOST_PROGRAMS", 4)  # two sequences of two groups
    parts = case.run(kernels, **SIZES)
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(parts[1], whole[1])


def test_strided_queries_keys_and_gates():
    case = step([9, 64], new=3)
    cache = case.cache.to(torch.float32)

    def strided(x):
        return x.float().mT.contiguous().mT

    raw = {name: tuple(strided(x) for x in pair) for name, pair in cache.raw.items()}
    other = Held(tuple(strided(x) for x in cache.blocks), raw, cache.lengths.int())
    out = kernels.decode_step(strided(case.q), other, strided(case.gates), **SIZES)
    assert torch.equal(out, case.run(kernels, **SIZES)[0])


def test_very_low_scores_still_choose():
    """What a tile passes on lies far below what float32 holds, if nothing was seen would count 0.

    Four new tokens, scores around -100, and no forced block: the best one gets its score from a
    key that begins in the tile before.
    """
    sizes = dict(block_size=8, stride=4, select_block_size=8, num_selected=2, window_size=8)
    sizes |= dict(num_initial=0, num_local=0)
    length = 33 * 8  # the last block is the first of the second tile
    case = step([length], 4, groups=1, heads=1, widths=(16, 16), room=length, sizes=sizes)
    keys = case.cache.blocks[0]
    keys[:, :, : length // 4 - 1] = 0.0
    keys[:, :, : length // 4 - 1, 0] = 1.0
    keys[:, :, 2 * 32 - 1, 0] = 0.98  # the largest score
    case.q.zero_()
    case.q[..., 0] = -400.0
    _, ids = case.run(kernels, **sizes)
    assert ids.flatten(0, 2).tolist() == [[31, 32]] * 4  # the blocks that this key reaches into
    agree_on(case, sizes)


@pytest.mark.parametrize("window_size", [64, 65, 2**31, 2**40])
def test_a_window_beyond_the_cache_is_all_of_it(window_size):
    agree([7, 60], sizes=SIZES | dict(window_size=window_size))


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_is_a_list_is_named(name):
    with pytest.raises(TypeError, match=rf"{name} = \[4\]: must be an int, got list"):
        kernels.decode_step(*changed(), **SIZES | {name: [4]})


def changed(branch=None, keep=slice(None), lengths=(5, 9)):
    """A step's arguments: of one branch's keys and values some heads, or only some channels."""
    case = step([5, 9])
    cache = case.cache.to(torch.float32)._replace(lengths=torch.tensor(lengths, device=DEVICE))
    if branch is not None:
        cache.raw[branch] = tuple(x[keep] for x in cache.raw[branch])
    return case.q.float(), cache, case.gates.float()


def refusals(call):
    """What both packages say."""
    for package in (kernels, nsa_lite):
        with pytest.raises(ValueError, match="cache") as refusal:
            package.decode_step(*call, **SIZES)
        yield str(refusal.value)


@pytest.mark.parametrize("branch", ["selected", "window"])
def test_a_branch_with_fewer_heads_or_channels_is_refused_and_not_read_beyond_its_end(branch):
    q, cache, gates = changed(branch, (slice(None), slice(0, 1)))
    said = f"cache.raw['{branch}'][1].shape = (2, 1, 64, 24): heads and value width must be"
    assert all(one.startswith(said) for one in refusals((q, cache, gates)))
    cache = changed()[1]
    k, v = cache.raw[branch]
    cache.raw[branch] = k, v[..., :8]
    said = f"cache.raw['{branch}'][1].shape = (2, 2, 64, 8): heads and value width must be"
    assert all(one.startswith(said) for one in refusals((q, cache, gates)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is not waited for")
@pytest.mark.parametrize("lengths", [(0, 9), (5, 65), (5, -1)])
def test_interpreted_lengths_beyond_the_rows_are_refused(lengths):
    rule = "must lie between the 1 new tokens and the 64 rows of the cache"
    said = f"cache.lengths = {min(lengths)} .. {max(lengths)}: {rule}"
    kernels.decode_step(*changed(), **SIZES)  # the shapes are known: numbers are looked at anew
    assert set(refusals(changed(lengths=lengths))) == {said}
    with FlopCounterMode(display=False):  # as an operation of torch
        assert set(refusals(changed(lengths=lengths))) == {said}


# --- launches made again ---


class Fake:
    """A kernel with two arguments and one constant; keeps what it is launched with."""

    arg_names = ("first", "second", "SIZE")

    def __init__(self):
        self.got = []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.got.append((grid, arguments, options))
            return self

        return run


def test_a_launch_made_again_gets_the_new_tensors_addresses():
    kernel = Fake()

    def run(x, memory):
        tail = memory[8:]
        launch(kernel, (2,), Pair(rows(x), rows(tail.view(1, 1, 2, 4))), tail, SIZE=7)

    old = torch.zeros(1, 1, 3, 4), torch.zeros(16)
    again = recorded(run, old)
    new = torch.ones(1, 1, 3, 4), torch.ones(16)
    addresses = [x.data_ptr() for x in new]
    ((compiled, grid, choose),) = again.launches
    values = [*again.constants, *(fill(addresses) for fill in again.fills)]
    assert compiled is kernel
    assert grid == (2, 1, 1)
    x, tail = addresses[0], addresses[1] + 8 * 4
    strides = (12, 12, 4), (8, 8, 4)
    assert choose(values) == (((x, strides[0]), (tail, strides[1])), tail, 7)


def test_a_tensor_that_served_twice_may_be_two_the_next_time():
    """A cache whose window shares the selected branch's keys, and then one with its own."""
    kernel = Fake()

    def run(*pairs):
        launch(kernel, (1,), *pairs, SIZE=7)

    shared = torch.zeros(4)
    again = recorded(run, (shared, shared))
    two = torch.ones(4), torch.ones(4)
    addresses = [x.data_ptr() for x in two]
    values = [*again.constants, *(fill(addresses) for fill in again.fills)]
    ((_, _, choose),) = again.launches
    assert choose(values) == (*addresses, 7)


@pytest.mark.parametrize("offset", [0, 1])
def test_every_launch_is_on_the_device_of_its_tensors(offset, monkeypatch):
    """Of tensors that begin at no multiple of 16 bytes, too: a slot's lengths, say."""
    asked = []

    def device_of(x):
        asked.append(x)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x = torch.zeros(8, device=DEVICE)[offset:]
    Again()(lambda y: asked.append("run") or None, [x])
    assert asked[0] is x and asked[1] == "run"


def test_launches_made_again_keep_no_tensor_alive():
    x, memory = torch.zeros(1, 1, 3, 4), torch.zeros(16)

    def run(x, memory):
        launch(Fake(), (1,), Pair(rows(x), rows(memory.view(1, 1, 4, 4))), memory, SIZE=7)

    again = recorded(run, (x, memory))
    fills = again.fills
    alive = [weakref.ref(y) for y in (x, memory)]
    del again, x, memory
    gc.collect()
    assert len(fills) == 2 and all(ref() is None for ref in alive)


def test_a_launch_with_a_tensor_from_elsewhere_is_no_launch_to_make_again():
    def run(x):
        launch(Fake(), (1,), x, torch.zeros(3), SIZE=7)

    with pytest.raises(AssertionError, match="was not called with"):
        recorded(run, (torch.zeros(3),))


def test_a_launch_of_another_thread_is_not_recorded():
    kernel, others = Fake(), Fake()

    def other():
        launch(others, (1,), torch.zeros(3), 5, SIZE=7)

    def run(x):
        thread = Thread(target=other)
        thread.start()
        thread.join()
        launch(kernel, (1,), x, 5, SIZE=7)

    again = recorded(run, (torch.zeros(3),))
    assert [compiled for compiled, *_ in again.launches] == [kernel]
    assert len(others.got) == 1  # launched all the same


# --- write_rows ---


@pytest.mark.parametrize("count", [1, 3, 40])
def test_rows_are_written_where_they_belong(count):
    make = torch.Generator(DEVICE).manual_seed(0)
    widths = (16, 24, 5)
    buffers = [torch.full((3, 2, 64, w), torch.nan, device=DEVICE) for w in widths]
    new = [
        torch.randn(3, count, 2, w, generator=make, device=DEVICE).transpose(1, 2) for w in widths
    ]
    first = torch.tensor([0, 7, 64 - count], device=DEVICE)
    places = first[:, None] + torch.arange(count, device=DEVICE)
    kernels.write_rows(buffers, new, places)
    for buffer, x in zip(buffers, new, strict=True):
        for b, begin in enumerate(first.tolist()):
            assert torch.equal(buffer[b, :, begin : begin + count], x[b])
            assert buffer[b, :, :begin].isnan().all()
            assert buffer[b, :, begin + count :].isnan().all()


def test_rows_of_a_part_of_a_batch():
    """A slot of a larger cache: the others' rows stay."""
    buffer = torch.zeros(4, 2, 8, 16, device=DEVICE)
    new = torch.ones(1, 2, 1, 16, device=DEVICE)
    kernels.write_rows([buffer[2:3]], [new], torch.tensor([[5]], device=DEVICE))
    assert buffer.sum() == 32
    assert buffer[2, :, 5].sum() == 32


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is not waited for")
@pytest.mark.parametrize("place", [8, -1, 2**40])
def test_interpreted_places_beyond_the_rows_are_refused(place):
    buffer, new = torch.zeros(1, 2, 8, 16), torch.ones(1, 2, 1, 16)
    kernels.write_rows([buffer], [new], torch.tensor([[7]]))
    with pytest.raises(ValueError, match=rf"places = {place} .. {place}: must be rows of a buffer"):
        kernels.write_rows([buffer], [new], torch.tensor([[place]]))


def written_into(buffer):
    new = torch.ones(1, 2, 1, 16, device=DEVICE)
    kernels.write_rows([buffer], [new], torch.tensor([[3]], device=DEVICE))
    return buffer


def test_autograd_knows_that_a_buffer_has_changed():
    buffer = torch.ones(1, 2, 8, 16, device=DEVICE)
    x = torch.ones_like(buffer).requires_grad_()
    product = (x * buffer).sum()  # its gradient is the buffer
    written_into(buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_buffer_that_wants_a_gradient_is_refused():
    buffer = torch.zeros(1, 2, 8, 16, device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match=r"buffers\[0\].requires_grad = True: must be False"):
        written_into(buffer)
    with torch.no_grad():
        assert written_into(buffer)[:, :, 3].sum() == 32
    with torch.inference_mode():
        assert written_into(torch.zeros(1, 2, 8, 16, device=DEVICE)).sum() == 32


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_rows_are_written_in_a_compiled_graph(backend):
    torch.compiler.reset()
    run = torch.compile(lambda x: written_into(x) + 1, backend=backend, fullgraph=True)
    buffer = torch.zeros(1, 2, 8, 16, device=DEVICE)
    assert run(buffer).sum() == 32 + buffer.numel()
    assert buffer[:, :, 3].sum() == buffer.sum() == 32


# --- the layer and the model ---


def of_both_backends(make):
    """The same module twice, by plain PyTorch and by the kernels."""
    found = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        found.append(make(backend).to(DEVICE))
    return found


@pytest.mark.parametrize("share_window", [False, True])
def test_the_layer_decodes_as_plain_pytorch_does(share_window):
    """Prefill of prompts of different lengths, then steps of one and of several tokens."""
    config = nsa_lite.NSAConfig.small(share_window=share_window)
    plain, ours = of_both_backends(lambda b: nsa_lite.NSAttention(config, backend=b))
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = []
    for layer in (plain, ours):
        cache = layer.new_cache(2, 40)
        layer(x[:, :20], cache)
        cache.cut([20, 13])
        found.append(
            [layer(x[:, i : i + n], cache) for i, n in ((20, 1), (21, 8), (29, 9), (38, 1))]
        )
        assert cache.lengths.tolist() == [39, 32]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_model_writes_the_same_tokens():
    config = nsa_lite.ModelConfig(vocab_size=19, layers=2)

    def model(backend):
        def make(c):
            return nsa_lite.NSAttention(c, backend=backend)

        return nsa_lite.DecoderLM(config, make)

    plain, ours = of_both_backends(model)
    prompt = torch.arange(34).view(2, 17).to(DEVICE) % 19
    written = [nsa_lite.generate(m, prompt, 7, lengths=[17, 9]) for m in (plain, ours)]
    assert torch.equal(*written)
