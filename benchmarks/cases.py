"""What is timed: the sizes, random inputs, and which blocks the queries selected."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_lite import NSAConfig, choose_blocks
from nsa_lite.blocks import num_compressed, num_select_blocks
from nsa_lite.checks import require


@dataclass(frozen=True)
class Sizes:
    """One layer's heads and widths; the blocks are the paper's."""

    heads: int
    groups: int
    width: int
    value: int
    block_size: int = 32
    stride: int = 16
    select_block_size: int = 64
    num_selected: int = 16
    window: int = 512
    dim: int = 2560  # of the layer's input

    def layer(self) -> NSAConfig:
        """The same sizes as a layer's config."""
        return NSAConfig(
            dim=self.dim,
            heads=self.heads,
            kv_heads=self.groups,
            head_dim=self.width,
            value_dim=self.value,
            window=self.window,
            **self.choice(),
        )

    def blocks(self) -> dict[str, int]:
        """The geometry as the operations' keywords."""
        return {"block_size": self.block_size, "stride": self.stride}

    def choice(self) -> dict[str, int]:
        """The keywords of select_blocks."""
        return self.blocks() | {
            "select_block_size": self.select_block_size,
            "num_selected": self.num_selected,
        }


CONFIGS = {
    "A": Sizes(heads=64, groups=4, width=128, value=128),  # the paper's heads
    "B": Sizes(heads=32, groups=8, width=128, value=128),  # 4 heads a group, as many open models
    "paper": Sizes(heads=64, groups=4, width=192, value=128),  # the paper's widths too
    "tiny": Sizes(
        heads=2,
        groups=1,
        width=16,
        value=16,
        block_size=4,
        stride=2,
        select_block_size=8,
        num_selected=4,
        window=16,
        dim=32,
    ),  # to try the script on a CPU
}


def inputs(sizes: Sizes, length: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random normal q, a K/V pair for each branch, gates, and an output's gradient; all leaves.

    Shapes: q (1, H, T, D), k (1, G, T or N, D), v (1, G, T or N, Dv), gates (1, H, T, 3).
    """
    make = torch.Generator(device).manual_seed(0)

    def new(heads: int, rows: int, width: int) -> Tensor:
        x = torch.randn(1, heads, rows, width, generator=make, device=device, dtype=dtype)
        return x.requires_grad_()

    short = num_compressed(length, sizes.block_size, sizes.stride)
    x = {"q": new(sizes.heads, length, sizes.width)}
    for branch, rows in (("compressed", short), ("selected", length), ("window", length)):
        x[f"{branch}.k"] = new(sizes.groups, rows, sizes.width)
        x[f"{branch}.v"] = new(sizes.groups, rows, sizes.value)
    x["gates"] = new(sizes.heads, length, 3).detach().sigmoid().requires_grad_()
    x["dout"] = new(sizes.heads, length, sizes.value).detach()
    return x


def random_ids(sizes: Sizes, length: int, device: str) -> Tensor:
    """Forced blocks and random legal ones, anew for every token: the worst case for sharing.

    Shapes: ids (1, G, T, n) int32.
    """
    blocks = num_select_blocks(length, sizes.select_block_size)
    parts = []
    make = torch.Generator(device).manual_seed(1)
    for start in range(0, length, 4096):  # a score for every block of every token is large
        rows = min(4096, length - start)
        legal = num_select_blocks(start + rows, sizes.select_block_size)
        score = torch.rand(1, sizes.groups, rows, blocks, generator=make, device=device)
        parts.append(
            choose_blocks(
                score[..., :legal],
                num_selected=sizes.num_selected,
                select_block_size=sizes.select_block_size,
                start=start,
            )
        )
    return torch.cat(parts, dim=2)


def coherent_ids(sizes: Sizes, length: int, device: str, keep: float) -> Tensor:
    """Forced blocks and free slots that each keep their block from token to token with `keep`.

    Slot s draws from the free blocks s + 1, s + 1 + F, s + 1 + 2F .. (F free slots), so no two
    slots ever hold the same block. Shapes: ids (1, G, T, n) int32, ascending, then -1.
    Errors: ValueError unless 0 <= keep < 1.
    """
    require(0 <= keep < 1, "keep", keep, "must be at least 0 and less than 1")
    free = sizes.num_selected - 3
    make = torch.Generator(device).manual_seed(2)
    token = torch.arange(length, device=device)
    own = token // sizes.select_block_size
    shape = (1, sizes.groups, length, free)
    slot = torch.arange(free, device=device)
    drawn_anew = torch.rand(shape, generator=make, device=device) >= keep
    drawn_anew[:, :, 0] = True
    drawn_at = torch.where(drawn_anew, token[:, None], 0).cummax(dim=2).values
    # How many blocks slot s had to draw from, between block 0 and the two local ones, back then.
    choices = ((own - 1)[:, None] - (slot + 1) + free - 1).clamp(min=0) // free
    draw = (torch.rand(shape, generator=make, device=device) * choices).long()
    block = torch.where(choices > 0, slot + 1 + draw * free, -1)
    block = block.gather(2, drawn_at)
    forced = torch.stack([torch.zeros_like(own), own - 1, own], dim=-1).clamp(min=0)
    forced[:, 1:] = torch.where(forced[:, 1:] <= forced[:, :2], -1, forced[:, 1:])
    ids = torch.cat([block, forced.expand(*shape[:3], 3)], dim=-1)
    last = int(own[-1]) + 1
    ids = torch.where(ids < 0, last, ids).sort(dim=-1).values
    return torch.where(ids == last, -1, ids).int()


def shared_with_neighbour(ids: Tensor) -> float:
    """The share of a token's blocks that the token before it read too, in the mean."""
    now, before = ids[:, :, 1:, :, None], ids[:, :, :-1, None, :]
    same = ((now == before) & (now >= 0)).any(-1).sum()
    return float(same / (ids[:, :, 1:] >= 0).sum())
