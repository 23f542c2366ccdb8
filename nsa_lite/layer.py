"""The whole NSA layer: one query, three branches with their own keys and values, gates."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from nsa_lite.attention import KV
from nsa_lite.backend import Operations, operations_of, require_backend
from nsa_lite.blocks import num_compressed
from nsa_lite.cache import (
    Cache,
    blocks_for,
    empty_rows,
    growing,
    home_of,
    new_cache,
    require_inputs_like,
)
from nsa_lite.checks import (
    autocasts,
    named,
    require,
    require_alike,
    require_float_tensor,
    require_floats,
    require_int,
    require_rule,
)
from nsa_lite.compression import Phi
from nsa_lite.config import NSAConfig, require_config
from nsa_lite.decode import MOST_NEW
from nsa_lite.gates import BRANCHES, Gate
from nsa_lite.rope import rotate
from nsa_lite.traces import Trace, trace_of


class Known(NamedTuple):
    """What a rule for choosing blocks may use.

    Shapes: x (B, S, C) the layer's inputs so far, q (B, H, T, D) the queries at start .. start +
    T - 1, k (B, G, S, D) the selected branch's keys, one a token, compressed (B, G, N, D) the
    compressed branch's keys, one a block; q and all keys are rotated.
    """

    config: NSAConfig
    x: Tensor
    q: Tensor
    k: Tensor
    compressed: Tensor
    start: int


class Choice(NamedTuple):
    """What a rule decides, and what it asks of the training.

    ids (B, G, T, n), int32 or int64, are the blocks to read: none twice, -1 where fewer than n are;
    keys after the query are masked. loss is a scalar to be added to the task's. attention computes
    Eq. 5 in place of nsa_attention, with its signature, where a rule reads in another way.
    """

    ids: Tensor
    loss: Tensor | None = None
    attention: Callable | None = None


Rule = Callable[[Known], Choice]  # a function, or a module with weights of its own


class Projected(NamedTuple):
    """T queries and their gates, and each branch's keys and values of all S tokens.

    All are rotated but the compressed branch's keys, which phi reads first. Of tokens that go into
    a cache S are the new ones, and start counts from the first of them.
    """

    q: Float[Tensor, "B H T D"]
    gates: Float[Tensor, "B H T 3"]
    raw: dict[str, KV]
    x: Float[Tensor, "B S C"]
    start: int


class NSAttention(nn.Module):
    """Native Sparse Attention (Eq. 5): out = sum over branches of gate * branch.

    x (B, T, C) -> y (B, T, C). With a Cache, of new_cache, x holds the next tokens of each sequence
    only, and the cache grows by them. It keeps numbers and no history, so such a call leaves none
    (torch.no_grad). The tokens may come one by one or in chunks: what comes out equals one pass
    over all of them but for the rounding of its sums, whose order follows the shapes.
    With last=m only the m newest tokens are queries: y is (B, m, C), and the others cost their
    keys, values and phi only. return_loss and return_trace add the rule's loss (a scalar) and a
    Trace, in this order. `choose` is a rule for choosing blocks in place of the paper's Eq. 8-11:
    it gets Known and returns a Choice. Sequences of a batch may end early: padding behind their
    last token changes nothing before it, as long as its scores are finite (NaN or infinity there
    may turn into NaN in gradients before it, for 0 * NaN is NaN); leave it out of the loss.
    Errors: ValueError or TypeError that names the argument.
    """

    def __init__(
        self, config: NSAConfig, *, choose: Rule | None = None, backend: str = "auto"
    ) -> None:
        super().__init__()
        require_config(config)
        require_rule(choose)
        require_backend(backend)
        self.config = config
        self.backend = backend
        dim = config.dim
        key_width = config.kv_heads * config.head_dim
        value_width = config.kv_heads * config.value_dim
        own = BRANCHES[:2] if config.share_window else BRANCHES  # with keys and values of their own
        self.query = nn.Linear(dim, config.heads * config.head_dim, bias=False)
        self.keys = nn.ModuleDict({b: nn.Linear(dim, key_width, bias=False) for b in own})
        self.values = nn.ModuleDict({b: nn.Linear(dim, value_width, bias=False) for b in own})
        self.phi_k = Phi(config.head_dim, config.block_size, config.stride, config.phi)
        self.phi_v = Phi(config.value_dim, config.block_size, config.stride, config.phi)
        self.gate: nn.Module = Gate(config)  # a control may put another in its place
        self.output = nn.Linear(config.heads * config.value_dim, dim, bias=False)
        self.choose = choose

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        cache: Cache | None = None,
        *,
        last: int | None = None,
        return_loss: bool = False,
        return_trace: bool = False,
    ) -> Tensor | tuple:
        require_input(x, self.config.dim, self.query)
        require_last(x, last)
        with growing([cache]):
            if cache is not None and return_trace:
                require_one_length(cache)
            projected = self.project(x, cache, last)
            if cache is None:
                blocks = self.compress(projected.raw["compressed"])
                out, loss, trace = self.attend(projected, blocks, return_trace)
            else:
                self.keep(projected, cache)
                out, loss, trace = self.attend_to_cache(projected, cache, return_trace)
            y = self.output(join_heads(out))
        return with_extras(y, loss, trace, return_loss, return_trace)

    @torch.inference_mode(False)  # a cache that is made in that mode could not grow outside it
    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype | None = None) -> Cache:
        """An empty cache for so many sequences of up to `capacity` tokens.

        On the device of the layer's weights and in their dtype, unless another is given: autocast's
        keys and values have autocast's. Errors: ValueError or TypeError that names the argument.
        """
        c = self.config
        shape = (c.kv_heads, c.head_dim, c.value_dim)
        cache = new_cache(self, batch, capacity, shape, list(self.keys), dtype)
        if c.share_window:
            cache.raw["window"] = cache.raw["selected"]
        rows = blocks_for(capacity, c.stride)
        cache.blocks = empty_rows(batch, rows, shape, home_of(self), dtype)
        if self.choose is not None:
            cache.x = home_of(self).new_empty(batch, capacity, c.dim)
        return cache

    def project(self, x: Tensor, cache: Cache | None, last: int | None) -> Projected:
        """One linear map for each of query, keys and values; all but phi's keys are rotated."""
        length = x.shape[1]
        if cache is None:
            positions = torch.arange(length, device=x.device)
        else:
            cache.require_room(self, x)
            positions = cache.next_positions(length)  # (B, T): each sequence has its own
        raw = self.keys_and_values(x, positions)
        asking = newest(x, last)
        count = asking.shape[1]
        q = self.queries(asking, positions[..., -count:])
        return Projected(q, self.gate(asking), raw, x, length - count)

    def queries(self, x: Tensor, positions: Tensor) -> Tensor:
        """The rotated queries (B, H, T, D) of the tokens x at these positions."""
        q = split_heads(self.query(x), self.config.heads)
        return self.operations(q).rotate(q, positions, self.config.rope_theta)

    def keys_and_values(self, x: Tensor, positions: Tensor) -> dict[str, KV]:
        """Each branch's keys and values of the tokens x, the window's its own unless it shares."""
        c = self.config
        own = list(self.keys)
        maps = [*self.keys.values(), *self.values.values()]
        heads = [split_heads(y, c.kv_heads) for y in projected_together(x, maps)]
        k = dict(zip(own, heads[: len(own)], strict=True))
        v = dict(zip(own, heads[len(own) :], strict=True))
        rotate = self.operations(x).rotate
        for branch in own[1:]:  # phi sees the compressed branch's keys first
            k[branch] = rotate(k[branch], positions, c.rope_theta)
        raw = {branch: KV(k[branch], v[branch]) for branch in own}
        raw.setdefault("window", raw["selected"])
        return raw

    def operations(self, x: Tensor) -> Operations:
        """nsa_attention, decode_step and rotate for tensors like x, of this layer's backend."""
        return operations_of(self.backend, x, self.config)

    def compress(self, raw: KV) -> KV:
        """phi of every whole block (Eq. 7)."""
        c = self.config
        count = num_compressed(raw.k.shape[2], c.block_size, c.stride)
        return self.summaries(raw, torch.arange(count, device=raw.k.device))

    def summaries(self, raw: KV, blocks: Tensor) -> KV:
        """phi of the blocks that these tokens make; blocks, (N,) or (B, N), are their numbers.

        phi sees unrotated keys, so that a block's content gives one summary wherever it stands;
        the summary is rotated at the block's first token (both are our choice).
        """
        c = self.config
        k = self.phi_k(raw.k)
        return KV(rotate(k, blocks * c.stride, c.rope_theta), self.phi_v(raw.v))

    def keep(self, new: Projected, cache: Cache) -> None:
        """Put the newest tokens into the cache, and phi of the blocks that they end, once.

        A step that ends no block of any sequence, 15 of 16 with the paper's stride, leaves phi out.
        """
        c = self.config
        count = new.x.shape[1]
        cache.require_blocks(new.raw["compressed"], c.stride)
        if self.choose is not None:
            require_inputs_like(cache.x, new.x)
        ends_blocks = cache.ends_blocks(count, c.block_size, c.stride)
        cache.grow(new.raw, new.x, self.operations(new.x).write_rows)
        if ends_blocks:
            blocks = cache.next_blocks(count, c.block_size, c.stride)
            tokens = cache.tokens_of(blocks, c.block_size, c.stride)
            cache.write_blocks(self.summaries(tokens, blocks), blocks)

    def attend(
        self, projected: Projected, blocks: KV, return_trace: bool
    ) -> tuple[Tensor, Tensor | None, Trace | None]:
        """Eq. 5: out (B, H, T, Dv), and the loss of the rule and a trace where there are any."""
        q, gates, raw, x, start = projected
        attention = self.operations(q).nsa_attention
        choose = None
        loss = None
        if self.choose is not None:
            known = Known(self.config, x, q, raw["selected"].k, blocks.k, start)
            choice = decided(self.choose, known)
            attention = choice.attention or attention
            choose = partial(chosen_before, choice.ids)
            loss = choice.loss
        out, branches = attention(
            q,
            blocks,
            raw["selected"],
            raw["window"],
            gates,
            **self.config.sizes,
            start=start,
            choose=choose,
            return_branches=True,
        )
        if not return_trace:
            return out, loss, None
        keys = raw["selected"].k
        return out, loss, trace_of(self.config, q, blocks, keys, gates, branches, start)

    def attend_to_cache(
        self, new: Projected, cache: Cache, return_trace: bool
    ) -> tuple[Tensor, Tensor | None, Trace | None]:
        """attend, where keys and values are all those that the cache holds.

        A few queries take one decode_step. Many, a rule and a trace take attend, one sequence after
        another if their lengths differ: a loss is then the mean of theirs.
        """
        if self.choose is None and not return_trace and new.q.shape[2] <= MOST_NEW:
            step = self.operations(new.q).decode_step
            return step(new.q, cache, new.gates, **self.config.sizes), None, None
        parts = []
        for some, part in cache.of_one_length():
            parts.append(self.attend(*self.all_tokens(new, some, part), return_trace))
        outs, losses, traces = zip(*parts, strict=True)
        loss = None if losses[0] is None else torch.stack(losses).mean()
        return torch.cat(outs), loss, traces[0]

    def all_tokens(self, new: Projected, some: slice, cache: Cache) -> tuple[Projected, KV]:
        """Some sequences' queries with all the tokens and blocks that their cache holds."""
        c = self.config
        length = cache.length
        x = new.x[some] if cache.x is None else cache.x[:, :length]
        start = length - new.q.shape[2]
        whole = num_compressed(length, c.block_size, c.stride)
        assert cache.blocks is not None  # require_blocks has seen to it
        blocks = KV(*(b[:, :, :whole] for b in cache.blocks))
        return Projected(new.q[some], new.gates[some], cache.held(), x, start), blocks


def require_one_length(cache: Cache) -> None:
    """Raise unless all sequences of a cache are equally long, as a trace's one start asks."""
    lengths = cache.lengths_on_host.tolist()
    rule = "a trace has one start: the sequences of its cache must be equally long"
    require(len(set(lengths)) == 1, "cache.lengths", lengths, f"return_trace: {rule}")


def decided(choose: Rule, known: Known) -> Choice:
    """What a rule decides. Errors: TypeError if it is no rule, or returns no Choice."""
    require_rule(choose)
    choice = choose(known)
    if not isinstance(choice, Choice):
        name = getattr(choose, "__name__", type(choose).__name__)
        raise TypeError(f"choose: {name} must return a Choice, got {type(choice).__name__}")
    if choice.loss is not None:
        require_floats("choice.loss", choice.loss, "a scalar")
        require(choice.loss.dim() == 0, "choice.loss.shape", tuple(choice.loss.shape), "must be ()")
    if not (choice.attention is None or callable(choice.attention)):
        got = named(choice.attention)
        raise TypeError(f"choice.attention: must be a function as nsa_attention is, got {got}")
    return choice


def chosen_before(ids: Tensor, lse: Tensor) -> Tensor:  # noqa: ARG001  what `choose` is given
    """The `choose` of nsa_attention for blocks that are known already."""
    return ids


def require_input(x: Tensor, width: int, first: nn.Module) -> None:
    """Raise unless x is (B, T, C), not empty, C is `width`, and its type the first map's weight's.

    The first map may have no such weight, as when it is wrapped in another or quantised.
    """
    require_float_tensor("x", x, "B, T, C")
    require(x.shape[0] >= 1, "x.shape", tuple(x.shape), "must hold at least one sequence")
    require(x.shape[1] >= 1, "x.shape", tuple(x.shape), "the sequence must not be empty")
    require(x.shape[2] == width, "x.shape", tuple(x.shape), f"C must be config.dim = {width}")
    weight = getattr(first, "weight", None)
    if autocasts(x.device.type):  # autocast mixes dtypes on purpose
        return
    if isinstance(weight, Tensor) and weight.is_floating_point():
        require_alike("x", x, "weight", weight)


def projected_together(x: Tensor, maps: list[nn.Module]) -> list[Tensor]:
    """What each of several linear maps makes of x, by one matrix product where they are plain.

    One product of all weights reads x once; backward, its gradient needs no sum over the maps.
    """
    weights = [one.weight for one in maps if is_only_a_weight(one)]
    if len(weights) < len(maps):
        return [one(x) for one in maps]
    return list(linear(x, torch.cat(weights)).split([len(w) for w in weights], dim=-1))


def is_only_a_weight(one: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a map is its weight and nothing else; adapters, hooks and pruned weights are more."""
    if type(one) is not nn.Linear or type(one.weight) is not nn.Parameter or one.bias is not None:
        return False
    hooks = (one._forward_hooks, one._forward_pre_hooks, one._backward_hooks)
    replaced = one._backward_pre_hooks or "forward" in vars(one)
    return not (any(hooks) or replaced)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * width) -> (B, heads, T, width)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, T, width) -> (B, T, heads * width)."""
    return x.transpose(1, 2).flatten(2)


def newest(x: Tensor, last: int | None) -> Tensor:
    """The m = last newest of the tokens x (B, T, C); all of them if last is None."""
    return x if last is None else x[:, -last:]


def require_last(x: Tensor, last: int | None) -> None:
    """Raise unless `last` is None or counts some of the tokens x (B, T, ..)."""
    if last is not None:
        require_int("last", last, at_least=1)
        rule = "must not exceed the {} tokens of x"
        require(last <= x.shape[1], "last", last, rule, x.shape[1])


def with_extras(
    y: Tensor, loss: Tensor | None, trace: object, return_loss: bool, return_trace: bool
) -> Tensor | tuple:
    """y, and behind it what was asked for; a rule without a loss of its own has the loss 0."""
    extras = ()
    if return_loss:
        extras += (y.new_zeros(()) if loss is None else loss,)
    if return_trace:
        extras += (trace,)
    return (y, *extras) if extras else y
