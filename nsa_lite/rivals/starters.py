"""What may get NSA's own choice started: the paper's scores, trained or eased in another way.

Unlike the rules of taught.py these have no weights: the scores are those of the compressed branch
(Eq. 8-10), and the question is what trains its keys before anybody reads well with them.
"""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa_lite.attention import (
    accurate,
    in_full_precision,
    masked_softmax,
    scale_of,
    seen,
)
from nsa_lite.blocks import query_positions
from nsa_lite.config import NSAConfig
from nsa_lite.layer import Choice, Known
from nsa_lite.rivals.rules import best, num_blocks
from nsa_lite.rivals.taught import (
    chosen_by,
    importance_by,
    kl_to_true_mass,
    logarithm,
    nsa_attention_reading,
    taught_choice,
)
from nsa_lite.selection import gather_blocks, selected_mask

FIRST = 300  # passes in training that a start lasts
LEAST = 1e-3  # added to a score before its logarithm: a block without mass stays readable


class Starting(nn.Module):
    """The paper's choice, helped in training: for the first passes only, or throughout.

    It counts its passes in training; the count stands in its state, so that a run that resumes goes
    on where it was.
    """

    def __init__(self, config: NSAConfig, first: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.first = first
        self.passes = 0

    def get_extra_state(self) -> Tensor:
        """The count, for a state dict."""
        return torch.tensor(self.passes, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """The count that a state dict holds."""
        self.passes = int(state)

    def forward(self, known: Known) -> Choice:
        helps = self.training and (self.first is None or self.passes < self.first)
        if self.training:
            self.passes += 1
        return self.helped(known) if helps else as_the_paper(known)

    def helped(self, known: Known) -> Choice:
        """The choice, and what else is asked of the training, while the help lasts."""
        raise NotImplementedError


class OwnKL(Starting):
    """Teacher: dense attention, by KL divergence to the compressed branch's own scores."""

    def helped(self, known: Known) -> Choice:
        return taught_choice(known, known.q, known.compressed, kl_to_true_mass, training=True)


class AllBlocks(Starting):
    """Every block up to the query's own is read, so that values are learned before the choice."""

    def helped(self, known: Known) -> Choice:
        count = num_blocks(known)
        batch, _, length, _ = known.q.shape
        ids = torch.arange(count, device=known.q.device)
        return Choice(ids.expand(batch, known.config.kv_heads, length, count))


class ScoreInLogits(Starting):
    """Teacher: the task, through the score of a block added to the logits of its tokens.

    So also in use: what is read differs from NSA. The idea is SAS's (arXiv 2609.13141); the
    logarithm, which makes the added score a factor on a block's weights, is our choice.
    """

    def forward(self, known: Known) -> Choice:
        return self.helped(known)

    def helped(self, known: Known) -> Choice:
        z = logarithm(importance_by(known, known.q, known.compressed) + LEAST)
        ids = best(known, z)
        bias = z.gather(-1, ids.long().clamp(min=0))
        read = partial(biased_selected_attention, bias=bias)
        return Choice(ids, attention=partial(nsa_attention_reading, read=read))


def as_the_paper(known: Known) -> Choice:
    """Eq. 8-11 of the compressed branch's own keys."""
    return Choice(chosen_by(known, known.q, known.compressed))


@in_full_precision
def biased_selected_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S Dv"],
    ids: Int[Tensor, "B G T n"],
    bias: Float[Tensor, "B G T n"],
    *,
    select_block_size: int,
    start: int = 0,
) -> Float[Tensor, "B H T Dv"]:
    """Attention to the tokens of the chosen blocks, each logit with its block's bias added."""
    keys = gather_blocks(seen(k, q, start), ids, select_block_size)
    values = gather_blocks(seen(v, q, start), ids, select_block_size)
    mask = selected_mask(ids, query_positions(q, start), select_block_size)
    queries = accurate(q).unflatten(1, (k.shape[1], -1)).transpose(2, 3)  # (B, G, T, R, D)
    scores = queries @ keys.transpose(-1, -2) * scale_of(None, q.shape[3])  # (B, G, T, R, n l')
    scores = scores + bias.repeat_interleave(select_block_size, -1)[..., None, :]
    p, _ = masked_softmax(scores, mask[..., None, :])
    return (p @ values).transpose(2, 3).flatten(1, 2).to(v.dtype)
