"""Rules for choosing blocks that have weights of their own, and four ways to train them.

Each one scores blocks as the compressed branch does (Eq. 8-10), but with a query, a key and a
phi that serve the choice alone. They differ in the teacher: where the gradient comes from.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsa_lite.attention import attention_probabilities, masked_softmax
from nsa_lite.blocks import overlap_in_strides, query_positions, visible_compressed
from nsa_lite.compression import Phi
from nsa_lite.config import NSAConfig
from nsa_lite.rivals.rules import PLAIN, Choice, Known, block_mass
from nsa_lite.rope import rotate
from nsa_lite.selection import attend_to_blocks

SMALLEST = 1e-9  # a score's logarithm stays finite


class Indexer(nn.Module):
    """Scores blocks with weights that nothing but the choice uses; a subclass says who teaches.

    Shapes: importance(known) gives (B, G, T, blocks), differentiable in these weights only: the
    layer's input is detached, as DeepSeek's later indexer does (DSA, arXiv 2512.02556).
    """

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        self.config = c = config
        self.query = nn.Linear(c.dim, c.heads * c.head_dim, bias=False)
        self.key = nn.Linear(c.dim, c.kv_heads * c.head_dim, bias=False)
        self.phi = Phi(c.head_dim, c.block_size, c.stride, c.phi)

    def importance(self, known: Known) -> Tensor:
        """Eq. 8-10 with the indexer's own query, key and phi."""
        c, x = self.config, known.x.detach()
        t = query_positions(known.q, known.start)
        q = self.query(x[:, known.start :]).unflatten(-1, (c.heads, -1)).transpose(1, 2)
        k = self.phi(self.key(x).unflatten(-1, (c.kv_heads, -1)).transpose(1, 2))
        i = torch.arange(k.shape[2], device=k.device)
        q, k = rotate(q, t, c.rope_theta), rotate(k, i * c.stride, c.rope_theta)
        visible = visible_compressed(t, len(i), c.block_size, c.stride)
        p = attention_probabilities(q, k, visible, None)[0].sum(2)
        sizes = (c.block_size, c.stride, c.select_block_size)
        return p @ overlap_in_strides(len(i), known.blocks, *sizes).to(p)

    def logits(self, known: Known) -> Tensor:
        """z, of which a softmax over the candidates gives each its share of the importance."""
        return self.importance(known).clamp_min(SMALLEST).log()


class BCEOverSoftmax(Indexer):
    """Teacher: the set that the true mass would choose, by binary cross-entropy on a softmax.

    The text this project began from calls the idea ERSA and gives no formula; nothing public
    describes it. This is our reading.
    """

    def forward(self, known: Known) -> Choice:
        z, size = self.logits(known), self.config.select_block_size
        target = known.chosen(known.best(block_mass(known.q, known.k_raw, size, known.start)))
        loss = bce_over_softmax(z, target, known.candidates())
        return Choice(known.best(z), loss=mean_where_it_matters(known, loss))


class KLToTrueMass(Indexer):
    """Teacher: dense attention pooled over blocks, by KL divergence (section 6.1; DSA)."""

    def forward(self, known: Known) -> Choice:
        z, size = self.logits(known), self.config.select_block_size
        mass = block_mass(known.q, known.k_raw, size, known.start)
        loss = kl_to_mass(z, mass, known.candidates())
        return Choice(known.best(z), loss=mean_where_it_matters(known, loss))


class StraightThrough(Indexer):
    """Teacher: the task, through keys scaled by 1 + s - sg(s) (Bengio et al., 1308.3432)."""

    def forward(self, known: Known) -> Choice:
        share, _ = masked_softmax(self.logits(known), known.candidates())
        ids = known.best(share)
        return Choice(ids, weight=straight_through(ids, share))


class GumbelTopK(StraightThrough):
    """Teacher: the task, as in StraightThrough; in training the choice is a draw, not the best.

    Gumbel noise on z makes the best n a sample without replacement (Kool et al., 1903.06059).
    """

    def logits(self, known: Known) -> Tensor:
        z = super().logits(known)
        return z - torch.empty_like(z).exponential_().log() if known.training else z


def bce_over_softmax(z: Tensor, target: Tensor, candidates: Tensor) -> Tensor:
    """-sum_j [m_j log s_j + (1 - m_j) log(1 - s_j)], s the softmax of z over the candidates.

    Shapes: z (..., blocks), target and candidates bool (..., blocks) -> (...). Its gradient in
    z_i is s_i (g_i - sum_j s_j g_j) with g_j = -m_j / s_j + (1 - m_j) / (1 - s_j), and with k
    targets its optimum is s = 1/k on each of them.
    """
    s, _ = masked_softmax(z, candidates)
    return F.binary_cross_entropy(s, target.to(s), reduction="none").sum(-1)


def kl_to_mass(z: Tensor, mass: Tensor, candidates: Tensor) -> Tensor:
    """sum_j m_j (log m_j - log s_j), both shares taken among the candidates.

    Shapes: z and mass (..., blocks), candidates bool (..., blocks) -> (...).
    """
    mass = mass.clamp_min(SMALLEST) * candidates
    mass = mass / mass.sum(-1, keepdim=True).clamp_min(SMALLEST)
    _, lse = masked_softmax(z, candidates)
    log_s = (z - lse[..., None]).masked_fill(~candidates, 0.0)
    return (torch.xlogy(mass, mass) - mass * log_s).sum(-1)


def mean_where_it_matters(known: Known, loss: Tensor) -> Tensor:
    """Mean over the queries with more candidates than free places, 0 if there are none.

    Shapes: loss (B, G, T) -> scalar.
    """
    free = known.config.num_selected - known.forced().sum(-1)
    matters = known.candidates().sum(-1) > free
    return loss[..., matters].mean() if matters.any() else loss.new_zeros(())


def straight_through(ids: Tensor, share: Tensor) -> Tensor:
    """1 + s - sg(s) for each chosen block: 1 in value, the gradient of its share.

    Shapes: ids (B, G, T, n), share (B, G, T, blocks) -> (B, G, T, n).
    """
    s = share.gather(-1, ids.long().clamp(min=0))
    return 1 + s - s.detach()


def scaled_selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    weight: Tensor,
    *,
    select_block_size: int,
    start: int = 0,
) -> Tensor:
    """selected_attention with each chosen block's keys times its weight.

    Shapes: q (B, H, T, D), k (B, G, S, D), v (B, G, S, Dv), ids and weight (B, G, T, n)
    -> out (B, H, T, Dv).
    """
    scale = weight.repeat_interleave(select_block_size, -1)[..., None, :] * q.shape[-1] ** -0.5
    return attend_to_blocks(q, k, v, ids, scale, select_block_size, start)


# Every rule by name: a function of Known, or a module that is built with the layer's config.
ROUTINGS = {
    **PLAIN,
    "bce": BCEOverSoftmax,
    "kl": KLToTrueMass,
    "straight-through": StraightThrough,
    "gumbel": GumbelTopK,
}
