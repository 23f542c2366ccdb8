"""Rules for choosing blocks that have weights of their own, and four ways to train them.

Each one scores blocks as the compressed branch does (Eq. 8-10), but with a query, a key and a
phi that serve the choice alone. They differ in the teacher: where the gradient comes from.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nsa_lite.attention import (
    KV,
    attention_probabilities,
    in_full_precision,
    masked_softmax,
    window_attention,
)
from nsa_lite.backend import operations_of
from nsa_lite.blocks import num_compressed, query_positions, visible_compressed
from nsa_lite.compression import Phi, compressed_attention
from nsa_lite.config import NSAConfig, require_config
from nsa_lite.gates import gated_sum
from nsa_lite.layer import Choice, Known, split_heads
from nsa_lite.nsa import Branches, Choose
from nsa_lite.rivals.rules import best, candidates, chosen, forced, num_blocks, true_mass
from nsa_lite.rope import rotate
from nsa_lite.selection import attend_to_blocks, shared_out

SMALLEST = 1e-9  # a score's logarithm stays finite
STRETCH = 128  # queries in each of the two stretches that are taught of many


class Indexer(nn.Module):
    """Scores blocks with weights that nothing but the choice uses; a subclass says who teaches.

    Its scores are differentiable in these weights only: the layer's input is detached, as
    DeepSeek's later indexer does (DSA, arXiv 2512.02556).
    """

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        require_config(config)
        self.config = config
        width = config.head_dim
        self.query = nn.Linear(config.dim, config.heads * width, bias=False)
        self.key = nn.Linear(config.dim, config.kv_heads * width, bias=False)
        self.phi = Phi(width, config.block_size, config.stride, config.phi)

    def own(self, known: Known) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B G N D"]]:
        """The indexer's own queries and compressed keys."""
        c = self.config
        x = known.x.detach()
        t = query_positions(known.q, known.start)
        q = rotate(split_heads(self.query(x[:, known.start :]), c.heads), t, c.rope_theta)
        k = self.phi(split_heads(self.key(x), c.kv_heads))
        i = torch.arange(k.shape[2], device=k.device)
        return q, rotate(k, i * c.stride, c.rope_theta)

    def importance(self, known: Known) -> Float[Tensor, "B G T blocks"]:
        """Eq. 8-10 with the indexer's own query, key and phi."""
        return importance_by(known, *self.own(known))

    def logits(self, known: Known) -> Float[Tensor, "B G T blocks"]:
        """z, of which a softmax over the candidates gives each its share of the importance."""
        return logarithm(self.importance(known))


def importance_by(
    known: Known, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G N D"]
) -> Float[Tensor, "B G T blocks"]:
    """Eq. 8-10 for any queries and compressed keys, with their gradient."""
    c = known.config
    t = query_positions(q, known.start)
    visible = visible_compressed(t, k.shape[2], c.block_size, c.stride)
    p, _ = attention_probabilities(q, k, visible, None)
    return shared_out(p, num_blocks(known), c.block_size, c.stride, c.select_block_size)


def logarithm(importance: Tensor) -> Tensor:
    """Its logarithm, finite also where it is 0."""
    return importance.clamp_min(SMALLEST).log()


class Taught(Indexer):
    """An indexer that learns from what dense attention weighs; a subclass compares the two."""

    def forward(self, known: Known) -> Choice:
        return taught_choice(known, *self.own(known), self.loss, self.training)

    def loss(self, known: Known, z: Float[Tensor, "B G T blocks"]) -> Float[Tensor, ""]:
        """How far the scores z are from what dense attention weighs."""
        raise NotImplementedError


class BCEOverSoftmax(Taught):
    """Teacher: the set that the true mass would choose, by binary cross-entropy on a softmax.

    The text this project began from calls the idea ERSA and gives no formula; nothing public
    describes it. This is our reading.
    """

    def loss(self, known: Known, z: Float[Tensor, "B G T blocks"]) -> Float[Tensor, ""]:
        target = chosen(known, best(known, true_mass(known)))
        return mean_where_it_matters(known, bce_over_softmax(z, target, candidates(known)))


class KLToTrueMass(Taught):
    """Teacher: dense attention pooled over blocks, by KL divergence (section 6.1; DSA)."""

    def loss(self, known: Known, z: Float[Tensor, "B G T blocks"]) -> Float[Tensor, ""]:
        return kl_to_true_mass(known, z)


def kl_to_true_mass(known: Known, z: Float[Tensor, "B G T blocks"]) -> Float[Tensor, ""]:
    """kl_to_mass of dense attention's mass, over the queries that have a choice."""
    return mean_where_it_matters(known, kl_to_mass(z, true_mass(known), candidates(known)))


def taught_choice(
    known: Known,
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G N D"],
    loss: Callable[[Known, Tensor], Tensor],
    training: bool,
) -> Choice:
    """The best blocks by these queries and compressed keys, and the loss(known, z) of their scores.

    A teacher's mass is T x S: of many queries only two stretches are taught in a step of training.
    """
    if known.q.shape[2] <= 2 * STRETCH:
        z = logarithm(importance_by(known, q, k))
        return Choice(best(known, z), loss=loss(known, z))
    ids = chosen_by(known, q, k)
    if not training:
        return Choice(ids)
    losses = [loss_of_some(known, q, k, loss, first) for first in stretches(known)]
    return Choice(ids, loss=torch.stack(losses).mean())


def loss_of_some(
    known: Known, q: Tensor, k: Tensor, loss: Callable[[Known, Tensor], Tensor], first: int
) -> Float[Tensor, ""]:
    """The loss of STRETCH queries, from number `first` on."""
    some = first_to_last(known, first, first + STRETCH)
    z = logarithm(importance_by(some, q[:, :, first : first + STRETCH], cut(some, k)))
    return loss(some, z)


def stretches(known: Known) -> tuple[int, int]:
    """Where two stretches of queries begin: the newest, who choose among most, and a random one."""
    newest = known.q.shape[2] - STRETCH
    return int(torch.randint(newest + 1, ())), newest


def first_to_last(known: Known, first: int, last: int) -> Known:
    """What a layer knows of its queries first .. last - 1 and of the tokens up to them."""
    seen = known.start + last
    part = known._replace(x=known.x[:, :seen], q=known.q[:, :, first:last], k=known.k[:, :, :seen])
    return part._replace(compressed=cut(part, known.compressed), start=known.start + first)


def cut(known: Known, k: Float[Tensor, "B G N D"]) -> Float[Tensor, "B G n D"]:
    """The compressed keys of the blocks that end among the tokens known."""
    c = known.config
    return k[:, :, : num_compressed(known.x.shape[1], c.block_size, c.stride)]


@torch.no_grad()
def chosen_by(
    known: Known, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G N D"]
) -> Int[Tensor, "B G T n"]:
    """The paper's choice (Eq. 8-11) by these queries and compressed keys, of the fast backend."""
    c = known.config
    operations = operations_of("auto", q, c)
    blocks = dict(block_size=c.block_size, stride=c.stride, start=known.start)
    _, lse = operations.compressed_attention(q, k, k, **blocks)
    return operations.select_blocks(q, k, lse, **blocks, **c.choice_sizes)


class StraightThrough(Indexer):
    """Teacher: the task, through keys scaled by 1 + s - sg(s) (Bengio et al., 1308.3432)."""

    def forward(self, known: Known) -> Choice:
        share, _ = masked_softmax(self.logits(known), candidates(known))
        ids = best(known, share)
        weight = straight_through(ids, share)
        read = partial(scaled_selected_attention, weight=weight)
        return Choice(ids, attention=partial(nsa_attention_reading, read=read))


class GumbelTopK(StraightThrough):
    """Teacher: the task, as in StraightThrough; in training the choice is a draw, not the best.

    Gumbel noise on z makes the best n a sample without replacement (Kool et al., 1903.06059).
    """

    def logits(self, known: Known) -> Float[Tensor, "B G T blocks"]:
        z = super().logits(known)
        return z - torch.empty_like(z).exponential_().log() if self.training else z


@in_full_precision
def bce_over_softmax(
    z: Float[Tensor, "*rows blocks"],
    target: Bool[Tensor, "*rows blocks"],
    among: Bool[Tensor, "*#rows blocks"],
) -> Float[Tensor, "*rows"]:
    """-sum_j [m_j log s_j + (1 - m_j) log(1 - s_j)], s the softmax of z over the blocks `among`.

    Its gradient in z_i is s_i (g_i - sum_j s_j g_j) with g_j = -m_j / s_j + (1 - m_j) / (1 - s_j),
    and with k targets its optimum is s = 1/k on each of them.
    """
    s, _ = masked_softmax(z, among)
    return F.binary_cross_entropy(s, target.to(s), reduction="none").sum(-1)


def kl_to_mass(
    z: Float[Tensor, "*rows blocks"],
    mass: Float[Tensor, "*rows blocks"],
    among: Bool[Tensor, "*#rows blocks"],
) -> Float[Tensor, "*rows"]:
    """sum_j m_j (log m_j - log s_j), both shares taken among the blocks `among`."""
    mass = mass.clamp_min(SMALLEST) * among
    mass = mass / mass.sum(-1, keepdim=True).clamp_min(SMALLEST)
    _, lse = masked_softmax(z, among)
    log_s = (z - lse[..., None]).masked_fill(~among, 0.0)
    return (torch.xlogy(mass, mass) - mass * log_s).sum(-1)


def mean_where_it_matters(known: Known, loss: Float[Tensor, "B G T"]) -> Float[Tensor, ""]:
    """Mean over the queries with more candidates than free places, 0 if there are none."""
    free = known.config.num_selected - forced(known).sum(-1)
    matters = (candidates(known).sum(-1) > free).expand_as(loss)
    return loss.masked_fill(~matters, 0.0).sum() / matters.sum().clamp(min=1)


def straight_through(
    ids: Int[Tensor, "B G T n"], share: Float[Tensor, "B G T blocks"]
) -> Float[Tensor, "B G T n"]:
    """1 + s - sg(s) for each chosen block: 1 in value, the gradient of its share."""
    s = share.gather(-1, ids.long().clamp(min=0))
    return 1 + s - s.detach()


def scaled_selected_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S Dv"],
    ids: Int[Tensor, "B G T n"],
    weight: Float[Tensor, "B G T n"],
    *,
    select_block_size: int,
    start: int = 0,
) -> Float[Tensor, "B H T Dv"]:
    """selected_attention with each chosen block's keys times its weight."""
    scale = weight.repeat_interleave(select_block_size, -1)[..., None, :] * q.shape[-1] ** -0.5
    return attend_to_blocks(q, k, v, ids, scale, select_block_size, start)


def nsa_attention_reading(  # noqa: PLR0913  nsa_attention's signature, and how blocks are read
    q: Tensor,
    compressed: KV,
    selected: KV,
    window: KV,
    gates: Tensor,
    *,
    read: Callable[..., Tensor],
    block_size: int,
    stride: int,
    select_block_size: int,
    window_size: int,
    choose: Choose,
    start: int = 0,
    **_: object,  # the sizes of a choice that has been made already
) -> tuple[Tensor, Branches]:
    """nsa_attention, with return_branches, whose selected branch is `read`.

    It is called as selected_attention is.
    """
    out_c, lse = compressed_attention(
        q, *compressed, block_size=block_size, stride=stride, start=start
    )
    ids = choose(lse)
    out_s = read(q, *selected, ids, select_block_size=select_block_size, start=start)
    out_w = window_attention(q, *window, window=window_size, start=start)
    branches = Branches(*(x.detach() for x in (out_c, out_s, out_w, lse, ids)))
    return gated_sum(gates, (out_c, out_s, out_w)), branches
