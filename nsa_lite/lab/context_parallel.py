"""One long sequence over several processes: each has some of the queries, and all keys and values.

    world = 2, four stretches      rank 0: 0 and 3        rank 1: 1 and 2

A late query sees more keys than an early one; with an early and a late stretch each, all ranks
have as much to do. Every rank projects its own tokens. The keys and values of all ranks are
gathered, phi makes the compressed ones of them, and each stretch attends with `start`: queries at
start .. read the keys before them, wherever those were made. Backward, each rank's gradient of a
key is added up and goes back to who made it.

    torchrun --nproc-per-node 2 ..       dist.init_process_group("gloo" or "nccl")
    model = DecoderLM(config, ContextParallel)
    logits = model(own_part(tokens))     # of this rank's tokens, in the order of its stretches
    loss.backward()
    add_up_gradients(model)
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsa_lite.attention import KV
from nsa_lite.cache import Cache
from nsa_lite.checks import require
from nsa_lite.config import NSAConfig
from nsa_lite.layer import NSAttention, join_heads, with_extras

Group = dist.ProcessGroup | None  # None: all processes


def stretches(length: int, rank: int, world: int) -> tuple[range, range]:
    """The positions of a rank's early stretch and of its late one.

    Errors: ValueError unless the 2 * world stretches are equally long.
    """
    count = 2 * world
    require(length % count == 0, "length", length, f"must be a multiple of 2 * world = {count}")
    size = length // count
    early, late = rank * size, (count - 1 - rank) * size
    return range(early, early + size), range(late, late + size)


def own_part(x: Tensor, axis: int = 1, group: Group = None) -> Tensor:
    """A rank's tokens of whole sequences along an axis: its early stretch, then its late one."""
    both = stretches(x.shape[axis], dist.get_rank(group), dist.get_world_size(group))
    return torch.cat([x.narrow(axis, part.start, len(part)) for part in both], dim=axis)


def in_order(parts: list[Tensor], axis: int) -> Tensor:
    """Whole sequences of what all ranks have of them."""
    early, late = zip(*(part.chunk(2, dim=axis) for part in parts), strict=True)
    return torch.cat([*early, *reversed(late)], dim=axis)


class Gathered(torch.autograd.Function):
    """All ranks' tokens in order; backward, the sum of all ranks' gradients of one's own."""

    @staticmethod
    def forward(ctx, x: Tensor, axis: int, group: Group) -> Tensor:
        ctx.axis, ctx.group = axis, group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group)
        return in_order(parts, axis)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.contiguous()
        dist.all_reduce(total, group=ctx.group)
        return own_part(total, ctx.axis, ctx.group), None, None


class ContextParallel(NSAttention):
    """NSAttention for a rank's part of a sequence, x (B, T / world, C) as own_part cuts it.

    Errors: ValueError for a cache, `last` or a trace: whole sequences only.
    """

    def __init__(self, config: NSAConfig, group: Group = None, *, backend: str = "auto") -> None:
        super().__init__(config, backend=backend)
        self.group = group

    def forward(
        self,
        x: Tensor,
        cache: Cache | None = None,
        *,
        last: int | None = None,
        return_loss: bool = False,
        return_trace: bool = False,
    ) -> Tensor | tuple:
        for name, given in {"cache": cache, "last": last}.items():
            require(given is None, name, given, "must be None: ranks share whole sequences")
        require(not return_trace, "return_trace", True, "ranks share whole sequences: no trace")
        world = dist.get_world_size(self.group)
        parts = stretches(world * x.shape[1], dist.get_rank(self.group), world)
        positions = torch.cat([torch.arange(p.start, p.stop, device=x.device) for p in parts])
        raw = self.gathered(self.keys_and_values(x, positions))
        blocks = self.compress(raw["compressed"])
        both = zip(x.chunk(2, dim=1), positions.chunk(2), parts, strict=True)
        ys = [self.of_stretch(some, at, p.start, raw, blocks) for some, at, p in both]
        y = torch.cat(ys, dim=1)
        return with_extras(y, None, None, return_loss, return_trace)

    def of_stretch(
        self, x: Tensor, positions: Tensor, start: int, raw: dict[str, KV], blocks: KV
    ) -> Tensor:
        """One stretch's output; backward goes through one stretch after the other."""
        q = self.queries(x, positions)
        out = self.operations(q).nsa_attention(
            q,
            blocks,
            raw["selected"],
            raw["window"],
            self.gate(x),
            **self.config.sizes,
            start=start,
        )
        return self.output(join_heads(out))

    def gathered(self, raw: dict[str, KV]) -> dict[str, KV]:
        """Every branch's keys and values of all ranks' tokens, in order."""
        found = {}
        for name, kv in raw.items():
            if name == "window" and kv is raw["selected"]:
                found[name] = found["selected"]  # shared: gathered once
            else:
                found[name] = KV(*(Gathered.apply(rows, 2, self.group) for rows in kv))
        return found


def add_up_gradients(model: nn.Module, group: Group = None) -> None:
    """Give every rank the sum of all ranks' gradients of each weight.

    With a loss that each rank divides by all tokens, not its own, that is one process's gradient.
    """
    for weight in model.parameters():
        if weight.grad is not None:
            dist.all_reduce(weight.grad, group=group)
