"""Writing: a model's next tokens, one by one, from caches that are allocated once."""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa_lite.attention import accurate
from nsa_lite.backend import PLAIN
from nsa_lite.cache import Cache, lengths_of
from nsa_lite.checks import (
    autocasts,
    require,
    require_instance,
    require_int,
    require_number,
    require_range,
)
from nsa_lite.layer import NSAttention
from nsa_lite.model import DecoderLM, require_same_tokens

SMALLEST = torch.finfo(torch.float32).tiny  # what is less may become 0 there
WARM_UPS = 3  # runs of a step before it is captured: libraries start and kernels compile in them

BATCH = "must be (B,) = {}, one for each sequence of the caches"
Step = Callable[[Int[Tensor, " B"]], Float[Tensor, "B vocab"]]  # the newest tokens -> their logits


@torch.no_grad()
def generate(
    model: DecoderLM,
    prompt: Int[Tensor, "B T"],
    count: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    stop: int | None = None,
    lengths: Sequence[int] | Int[Tensor, " B"] | None = None,
) -> Int[Tensor, "B longer"]:
    """The prompt and the `count` tokens that follow it, fewer if every sequence has met `stop`.

    At temperature 0 each is the likeliest token; else it is drawn from softmax(logits /
    temperature), cut to the smallest set of tokens whose probabilities reach top_p, with the
    caller's generator or torch's. Behind its stop token a sequence is filled with stop. Prompts of
    different lengths are padded at the right; `lengths` says what is real, and what is written
    stands behind the padding. Errors: ValueError or TypeError that names the argument.
    """
    new = stream(
        model,
        prompt,
        count,
        temperature=temperature,
        top_p=top_p,
        generator=generator,
        stop=stop,
        lengths=lengths,
    )
    return torch.cat([prompt, *(tokens[:, None] for tokens in new)], dim=1)


def stream(
    model: DecoderLM,
    prompt: Int[Tensor, "B T"],
    count: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    stop: int | None = None,
    lengths: Sequence[int] | Int[Tensor, " B"] | None = None,
) -> Iterator[Int[Tensor, " B"]]:
    """The tokens of generate as they come, one (B,) after another."""
    real = require_prompt(model, prompt, lengths)
    require_int("count", count, at_least=0)
    require_number("temperature", temperature)
    inside = 0 <= temperature <= 1e38
    require(inside, "temperature", temperature, "must be at least 0 and at most 1e38")
    require_number("top_p", top_p)
    require(0 < top_p <= 1, "top_p", top_p, "must lie above 0 and not above 1")
    require_stop(model, stop)
    require_generator(model, generator)

    def choose(logits: Tensor) -> Tensor:
        return next_tokens(logits, temperature, top_p, generator)

    return written(model, prompt, real, count, choose, stop)


@torch.no_grad()
def written(
    model: DecoderLM,
    prompt: Tensor,
    lengths: Tensor,
    count: int,
    choose: Callable[[Tensor], Tensor],
    stop: int | None,
) -> Iterator[Tensor]:
    """stream without its checks: prefill all but each prompt's last token, then step by step."""
    if count == 0:
        return
    caches = model.new_caches(len(prompt), int(lengths.max()) + count, dtype=kept_in(model))
    prefill(model, prompt, lengths - 1, caches)
    step = step_of(model, caches)
    tokens = prompt.gather(1, (lengths - 1).to(prompt.device)[:, None])[:, 0]
    ended = torch.zeros_like(tokens, dtype=torch.bool)
    for _ in range(count):
        tokens = choose(step(tokens))
        if stop is not None:
            tokens = tokens.masked_fill(ended, stop)
            ended = tokens == stop
        yield tokens
        if stop is not None and bool(ended.all()):
            return


def kept_in(model: DecoderLM) -> torch.dtype | None:
    """The dtype of keys and values under autocast, which leaves float64 alone; else None."""
    x = model.embedding.weight
    if not autocasts(x.device.type) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(x.device.type)


def prefill(model: DecoderLM, prompt: Tensor, lengths: Tensor, caches: list[Cache]) -> None:
    """Fill the caches with the first tokens of each prompt, as many as `lengths` say."""
    longest = int(lengths.max())
    if longest == 0:
        return
    model(prompt[:, :longest], caches, last=1)  # padding too; then it is forgotten
    for cache in caches:
        cache.cut(lengths)


def next_tokens(
    logits: Float[Tensor, "B vocab"],
    temperature: float,
    top_p: float,
    generator: torch.Generator | None,
) -> Int[Tensor, " B"]:
    """The likeliest tokens at temperature 0, else drawn among the likeliest that reach top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = accurate(logits)
    below = logits - logits.amax(-1, keepdim=True)  # first: near temperature 0 a quotient is inf
    p = torch.softmax(below / max(temperature, SMALLEST), dim=-1)
    kept = p if top_p == 1 else likeliest(p, top_p)
    return torch.multinomial(kept, 1, generator=generator)[:, 0]


def likeliest(p: Float[Tensor, "B vocab"], top_p: float) -> Float[Tensor, "B vocab"]:
    """The probabilities of the fewest tokens that reach top_p together, the others 0.

    The token that crosses top_p is one of them; of equal ones the lower ids come first.
    """
    ordered, ids = p.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # what the likelier ones have together
    enough = before >= max(top_p, SMALLEST)
    return torch.zeros_like(p).scatter(-1, ids, ordered.masked_fill(enough, 0.0))


# --- one step: called, or replayed from a CUDA graph ---


def step_of(model: DecoderLM, caches: list[Cache]) -> Step:
    """The model's step of one token a sequence, from a CUDA graph where it can be captured."""
    if can_be_captured(model):
        return CapturedStep(model, caches)
    return lambda tokens: model(tokens[:, None], caches)[:, -1]


def can_be_captured(model: DecoderLM) -> bool:
    """Whether a step never waits for the device: each layer is NSA by the kernels, with no rule.

    Under autocast a graph would go on reading copies of the weights that autocast has let go of.
    """
    x = model.embedding.weight
    if not x.is_cuda or autocasts("cuda"):
        return False
    return all(runs_kernels(layer, x) for layer in model.attentions)


def runs_kernels(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer decodes by the kernels; plain PyTorch and rules look at numbers."""
    if type(layer) is not NSAttention:
        return False
    return layer.choose is None and layer.operations(x) is not PLAIN


class CapturedStep:
    """The model's step of one token as CUDA graphs, replayed while the caches grow in place.

    A graph does again what was captured, with the same memory: the newest tokens, the lengths and
    all keys and values are read where they lie then. There are two, one for steps in which phi
    makes a block and one for the others; the lengths on the host say which. What a call returns
    holds until the next one.
    """

    def __init__(self, model: DecoderLM, caches: list[Cache]) -> None:
        self.model = model
        self.caches = caches
        batch = len(caches[0].lengths)
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=caches[0].lengths.device)
        self.shortest = min(caches, key=lambda cache: cache.capacity)
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, tokens: Int[Tensor, " B"]) -> Float[Tensor, "B vocab"]:
        config = self.model.config.nsa
        expected = tuple(self.tokens.shape[:1])  # fewer would be given to several sequences
        require(tokens.shape == expected, "tokens.shape", tuple(tokens.shape), BATCH, expected)
        require_same_tokens(self.caches)
        self.shortest.require_free(1)  # a replay would write behind its end
        self.tokens.copy_(tokens[:, None])
        phi = self.caches[0].ends_blocks(1, config.block_size, config.stride)
        with torch.cuda.device_of(self.tokens):  # a graph is captured on the current device
            if phi not in self.graphs:
                self.graphs[phi] = self.capture()
            graph, logits = self.graphs[phi]
            graph.replay()
        for cache in self.caches:
            cache.lengths_on_host += 1  # the graph has only those of the device
        return logits

    def capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The next step as a graph, and its logits; the caches are afterwards as before."""
        self.warm_up()
        before = self.caches[0].lengths_on_host.clone()
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.Stream()  # torch's own is kept, of the device that first captured
        with torch.cuda.graph(graph, stream=here):
            logits = self.model(self.tokens, self.caches)[:, -1]
        for cache in self.caches:
            cache.lengths_on_host.copy_(before)  # those of the device have not moved yet
        return graph, logits

    def warm_up(self) -> None:
        """The next step a few times, each taken back, on a stream of its own as capturing asks."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        before = self.caches[0].lengths_on_host.clone()
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.model(self.tokens, self.caches)
                for cache in self.caches:
                    cache.cut(before)
        torch.cuda.current_stream().wait_stream(side)


# --- checks ---


def require_prompt(model: DecoderLM, prompt: Tensor, lengths: object) -> Tensor:
    """Each prompt's real length, on the CPU; raise unless prompt is (B, T) of the vocabulary."""
    require_instance("model", model, DecoderLM, "a DecoderLM")
    model.require_tokens(prompt, "prompt")
    fits = prompt.dim() == 2 and len(prompt) >= 1
    require(fits, "prompt.shape", tuple(prompt.shape), "must be (B, T) with at least one sequence")
    batch, length = prompt.shape
    if lengths is None:
        return torch.full((batch,), length)
    real = lengths_of(lengths, batch)
    require_range("lengths", real, 1, length, "must lie in 1 .. T = {}")
    return real


def require_stop(model: DecoderLM, stop: int | None) -> None:
    """Raise unless `stop` is None or a token of the vocabulary."""
    if stop is not None:
        require_int("stop", stop, at_least=0)
        top = model.config.vocab_size - 1
        require(stop <= top, "stop", stop, f"must lie in 0 .. vocab_size - 1 = {top}")


def require_generator(model: DecoderLM, generator: torch.Generator | None) -> None:
    """Raise unless `generator` is None or draws on the device of the model."""
    if generator is not None:
        require_instance("generator", generator, torch.Generator, "a torch.Generator")
        home = model.embedding.weight.device.type
        where = generator.device.type
        require(where == home, "generator.device", where, f"must be the model's, {home}")
