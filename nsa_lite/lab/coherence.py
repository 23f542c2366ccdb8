"""How much of a token's choice the token before it made too: what a kernel's union can save."""

import math

import torch
from jaxtyping import Int
from torch import Tensor

from nsa_lite.lab.evaluate import asked, dtype_of_rows
from nsa_lite.lab.tasks import Batch
from nsa_lite.model import DecoderLM


def kept(ids: Int[Tensor, "B G T n"], select_block_size: int, start: int = 0) -> float:
    """How coherent the choices of queries start .. start + T - 1 are, above chance.

    Of a token's free blocks, the share that the token before chose too; what chance alone would
    give is taken off, so random blocks have 0, and 1 is the same choice always. NaN where no query
    had a choice.
    """
    positions = torch.arange(start, start + ids.shape[2], device=ids.device)
    own = positions[:, None] // select_block_size
    free = (ids > 0) & (ids < own - 1)
    before = torch.where(free, ids, -1)[:, :, :-1, None, :]
    same = ((ids[:, :, 1:, :, None] == before).any(-1) & free[:, :, 1:]).sum(-1)
    count = free[:, :, 1:].sum(-1)
    legal = (own[1:, 0] - 2).clamp(min=1)
    counted = (count < legal) & (count > 0)  # where there was a choice
    share = (same[counted].sum() / count[counted].sum()).item()
    chance = ((count**2 / legal)[counted].sum() / count[counted].sum()).item()
    return (share - chance) / (1 - chance)


@torch.no_grad()
def kept_by_layer(model: DecoderLM, batch: Batch, queries: int = 1024) -> list[float | None]:
    """kept of a model's newest queries in a batch, one number for each layer that chooses blocks.

    None where no query had a choice, as JSON has no NaN. What stands before them is read first, so
    that memory holds the traces of these queries only.
    """
    size, length = batch.tokens.shape[:2]
    start = length - queries
    with asked(model, 0):
        caches = model.new_caches(size, length, dtype=dtype_of_rows(batch.tokens.device))
        model(batch.tokens[:, :start], caches, last=1)
        _, traces = model(batch.tokens[:, start:], caches, return_traces=True)
    shares = [kept(t.ids, t.config.select_block_size, start) for t in traces]
    return [None if math.isnan(share) else round(share, 4) for share in shares]
