"""What a model writes: greedy, drawn, stopped, from prompts of different lengths, from a graph."""

import re
from contextlib import contextmanager, nullcontext
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

from nsa_lite import DecoderLM, ModelConfig, generate, stream
from nsa_lite.generation import CapturedStep, can_be_captured, likeliest, next_tokens, step_of
from nsa_lite.rivals.attentions import ATTENTIONS
from tests.test_layer import SMALL

KINDS = sorted(set(ATTENTIONS) - {"nsa-random"})
DRAWN = dict(temperature=1.0, top_p=0.9)


def decoder(kind="nsa"):
    torch.manual_seed(0)
    model = DecoderLM(ModelConfig(vocab_size=11, nsa=SMALL), ATTENTIONS[kind].build)
    return model.double().eval()


def prompts(batch=3, length=9):
    torch.manual_seed(1)
    return torch.randint(11, (batch, length))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- greedy ---


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_the_argmax_without_a_cache(kind):
    model, tokens = decoder(kind), prompts()
    written = generate(model, tokens, 12)
    for _ in range(12):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[9, 4, 1], [1, 1, 1], torch.tensor([2, 9, 8])])
def test_padded_prompts_go_on_as_each_would_alone(kind, lengths):
    model, tokens = decoder(kind), prompts()
    written = generate(model, tokens, 12, lengths=lengths)
    assert torch.equal(written[:, :9], tokens)  # the padding stays where it is
    for b, n in enumerate(lengths):
        alone = generate(model, tokens[b : b + 1, :n], 12)
        assert torch.equal(written[b, 9:], alone[0, n:])


def test_one_token_of_prompt_and_none_to_write():
    model, tokens = decoder(), prompts(length=1)
    assert generate(model, tokens, 3).shape == (3, 4)
    assert torch.equal(generate(model, tokens, 0), tokens)
    assert list(stream(model, tokens, 0)) == []


# --- one by one ---


def test_a_stream_gives_each_token_as_it_comes():
    model, tokens = decoder(), prompts()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    whole = generate(model, tokens, 6)
    calls.clear()
    got = stream(model, tokens, 6)
    assert calls == []  # nothing is computed before it is asked for
    for i in range(6):
        assert torch.equal(next(got), whole[:, 9 + i])
        assert len(calls) == 2 + i  # the prompt, and one step a token
    with pytest.raises(StopIteration):
        next(got)


def test_a_stream_leaves_no_history_and_gradients_as_they_were():
    model = decoder()
    for tokens in stream(model, prompts(), 3, **DRAWN):
        assert not tokens.requires_grad and torch.is_grad_enabled()


# --- drawn ---


def test_the_likeliest_set_by_brute_force():
    """Among all sets that reach p the smallest, and of those the one that weighs most."""
    torch.manual_seed(0)
    p = torch.softmax(2 * torch.randn(20, 6, dtype=torch.float64), -1)
    for top_p in (0.01, 0.3, 0.5, 0.9, 0.999):
        kept = likeliest(p, top_p)
        for row, chosen in zip(p, kept, strict=True):
            sets = (s for n in range(1, 7) for s in combinations(range(6), n))
            reach = [s for s in sets if row[list(s)].sum() >= top_p]
            fewest = min(len(s) for s in reach)
            best = max((s for s in reach if len(s) == fewest), key=lambda s: row[list(s)].sum())
            assert tuple(chosen.nonzero().flatten().tolist()) == best
            assert torch.equal(chosen[list(best)], row[list(best)])


def test_of_equal_tokens_the_lower_ids_come_first():
    p = torch.full((1, 8), 0.125)
    assert likeliest(p, 0.25)[0].nonzero().flatten().tolist() == [0, 1]
    assert likeliest(p, 0.26)[0].nonzero().flatten().tolist() == [0, 1, 2]  # the one that crosses


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.6, 1.0])
def test_tokens_are_drawn_from_the_tempered_softmax(temperature, top_p):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])
    p = torch.exp(logits / temperature)
    p = p / p.sum()
    kept = p if top_p == 1 else likeliest(p[None], top_p)[0]
    expected = kept / kept.sum()
    draws = next_tokens(logits.expand(40_000, 5), temperature, top_p, seeded())
    found = torch.bincount(draws, minlength=5) / 40_000
    near = 4 * (expected * (1 - expected) / 40_000).sqrt()  # four standard deviations
    assert ((found - expected).abs() <= near).all()
    assert top_p == 1 or (kept == 0).any()


def test_cold_and_narrow_draws_are_greedy():
    model, tokens = decoder(), prompts()
    greedy = generate(model, tokens, 12)
    for options in (dict(temperature=1e-4), dict(temperature=1.0, top_p=1e-6)):
        assert torch.equal(generate(model, tokens, 12, **options), greedy)
    assert not torch.equal(generate(model, tokens, 12, **DRAWN, generator=seeded()), greedy)


@pytest.mark.parametrize("options", [(1e-40, 1.0), (1e-300, 1.0), (5e-324, 0.5), (1.0, 1e-300)])
def test_numbers_that_float32_takes_for_0_draw_the_likeliest(options):
    logits = torch.tensor([[3.0, 80.0, -2.0], [0.5, 0.0, 0.25]])
    assert next_tokens(logits, *options, seeded()).tolist() == [1, 0]


@pytest.mark.parametrize("kind", ["nsa", "nsa-kl", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_writes_too(kind, dtype):
    """Its keys and values are in bfloat16, but where the weights are in float64."""
    model, tokens = decoder(kind).to(dtype), prompts()
    with torch.autocast("cpu", torch.bfloat16):
        written = generate(model, tokens, 3)
        assert torch.equal(written[:, 9], model(tokens)[:, -1].argmax(-1))


def test_a_generator_decides_and_torchs_own_is_left_alone():
    model, tokens = decoder(), prompts()
    before = torch.get_rng_state()
    first = generate(model, tokens, 12, **DRAWN, generator=seeded())
    assert torch.equal(generate(model, tokens, 12, **DRAWN, generator=seeded()), first)
    assert not torch.equal(generate(model, tokens, 12, **DRAWN, generator=seeded(1)), first)
    assert torch.equal(torch.get_rng_state(), before)
    generate(model, tokens, 12, **DRAWN)
    assert not torch.equal(torch.get_rng_state(), before)


def test_half_precision_logits_are_drawn_in_float32():
    """In bfloat16 a sum of 1,000 small numbers is far from 1, and top_p would never be reached."""
    logits = torch.zeros(1, 1000, dtype=torch.bfloat16)
    draws = next_tokens(logits.expand(2000, -1), 1.0, 0.5, seeded())
    assert draws.max() < 500 and draws.max() > 450


# --- stopped ---


def test_behind_its_stop_a_sequence_is_filled_and_the_last_one_ends_all():
    model, tokens = decoder(), prompts()
    free = generate(model, tokens, 40, **DRAWN, generator=seeded())[:, 9:]
    stop = 4
    first = [row.tolist().index(stop) for row in free]  # each has one
    assert len(set(first)) == 3
    written = generate(model, tokens, 40, **DRAWN, generator=seeded(), stop=stop)[:, 9:]
    assert written.shape == (3, max(first) + 1)
    for row, unstopped, n in zip(written, free, first, strict=True):
        assert torch.equal(row[: n + 1], unstopped[: n + 1])
        assert (row[n:] == stop).all()
    once = generate(model, tokens, 2, stop=stop, **DRAWN, generator=seeded())
    assert once.shape == (3, 11)  # `count` ends it too


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(temperature=-1), ValueError, "temperature = -1: must be at least 0"),
        (dict(temperature="hot"), TypeError, "temperature = 'hot': must be a number"),
        (dict(temperature=float("nan")), ValueError, "temperature = nan"),
        (dict(top_p=0), ValueError, "top_p = 0: must lie above 0 and not above 1"),
        (dict(top_p=1.5), ValueError, "top_p = 1.5"),
        (dict(top_p=True), TypeError, "top_p = True: must be a number"),
        (dict(stop=11), ValueError, "stop = 11: must lie in 0 .. vocab_size - 1 = 10"),
        (dict(stop=-1), ValueError, "stop = -1"),
        (dict(stop=[1]), TypeError, "stop = [1]: must be an int"),
        (dict(count=-1), ValueError, "count = -1"),
        (dict(lengths=[9, 9]), ValueError, "lengths.shape = (2,)"),
        (dict(lengths=[9, 0, 9]), ValueError, "lengths = 0 .. 9: must lie in 1 .. T = 9"),
        (dict(lengths=[9, 10, 9]), ValueError, "lengths = 9 .. 10: must lie in 1 .. T = 9"),
        (dict(prompt=torch.zeros(1, 3, 2).long()), ValueError, "prompt.shape = (1, 3, 2)"),
        (dict(prompt=torch.full((1, 3), 11)), ValueError, "prompt = 11 .. 11"),
        (dict(prompt=torch.zeros(1, 0).long()), ValueError, "prompt.shape = (1, 0)"),
        (dict(prompt=torch.zeros(0, 3).long()), ValueError, "prompt.shape = (0, 3)"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(change, error, words):
    given = dict(prompt=prompts(), count=3) | change
    for write in (generate, stream):  # a stream says so at once, not at its first token
        with pytest.raises(error, match=re.escape(words)):
            write(decoder(), **given)


# --- a step from a CUDA graph ---


def test_a_cpu_captures_nothing():
    model = decoder()
    assert not can_be_captured(model)
    assert not isinstance(step_of(model, model.new_caches(1, 5)), CapturedStep)


class Graphs:
    """Stands for torch.cuda: a graph runs the step again, with the lengths on the device only."""

    def __init__(self, model, caches):
        self.model = model
        self.caches = caches
        self.step = None
        self.captured = 0

    def on_the_host(self):
        return [cache.lengths_on_host.clone() for cache in self.caches]

    def put_back(self, lengths):
        for cache, host in zip(self.caches, lengths, strict=True):
            cache.lengths_on_host.copy_(host)

    def CUDAGraph(self):  # noqa: N802  torch's name
        return SimpleNamespace(replay=self.replay, logits=None)

    @contextmanager
    def graph(self, graph, *, stream):  # the default one may be of another device
        """Capturing runs nothing: what it seemed to write on the device is as before."""
        before = [cache.lengths.clone() for cache in self.caches]
        self.captured += 1
        yield
        for cache, lengths in zip(self.caches, before, strict=True):
            cache.lengths.copy_(lengths)

    def replay(self):
        before = self.on_the_host()
        logits = self.model(self.step.tokens, self.caches)[:, -1]
        self.put_back(before)
        phi = self.caches[0].ends_blocks(1, SMALL.block_size, SMALL.stride)
        self.step.graphs[phi][1].copy_(logits)  # where the capture's were

    def Stream(self):  # noqa: N802
        return SimpleNamespace(wait_stream=lambda _: None)

    current_stream = Stream

    def stream(self, _):
        return nullcontext()


def test_a_captured_step_is_the_step_and_there_are_two_graphs(monkeypatch):
    model, tokens = decoder(), prompts(2, 12)
    plain, caches = model.new_caches(2, 13), model.new_caches(2, 13)
    for some in (plain, caches):
        model(tokens[:, :3], some)
        for cache in some:
            cache.cut([3, 1])
    cuda = Graphs(model, caches)
    for name in ("CUDAGraph", "graph", "Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    cuda.step = CapturedStep(model, caches)
    expected = step_of(model, plain)
    for t in range(3, 12):
        assert torch.equal(cuda.step(tokens[:, t]), expected(tokens[:, t]))
        for a, b in zip(caches, plain, strict=True):
            assert torch.equal(a.lengths, b.lengths)
            assert torch.equal(a.lengths_on_host, b.lengths_on_host)
    assert cuda.captured == 2 and set(cuda.step.graphs) == {True, False}


def test_warming_up_needs_room_for_one_token_only(monkeypatch):
    model, tokens = decoder(), prompts(2, 5)
    caches = model.new_caches(2, 5)
    model(tokens[:, :4], caches)
    cuda = Graphs(model, caches)
    for name in ("CUDAGraph", "graph", "Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    CapturedStep(model, caches).warm_up()
    assert [cache.lengths.tolist() for cache in caches] == [[4, 4]] * 2


def test_a_graph_is_not_replayed_behind_the_end_of_a_cache(monkeypatch):
    model, tokens = decoder(), prompts(2, 6)
    caches = model.new_caches(2, 5)
    model(tokens[:, :4], caches)
    cuda = Graphs(model, caches)
    for name in ("CUDAGraph", "graph", "Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    cuda.step = CapturedStep(model, caches)
    cuda.step(tokens[:, 4])
    with pytest.raises(ValueError, match="holds 5 of 5 tokens, 1 more do not fit"):
        cuda.step(tokens[:, 5])
    assert caches[0].lengths.tolist() == [5, 5]
