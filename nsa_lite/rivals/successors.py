"""Rules of methods that came after NSA: InfLLM-V2, MiniMax MSA, and DSA's indexer as QSA pools it.

Each is the choice alone, within NSA's layer, so that it can be compared with the other rules. The
two indexers have weights of their own and are taught as DSA's is: by what dense attention weighs.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from nsa_lite.attention import accurate, attention_probabilities, in_full_precision
from nsa_lite.blocks import query_positions, visible_compressed
from nsa_lite.compression import split_blocks
from nsa_lite.config import NSAConfig, require_config
from nsa_lite.layer import Choice, Known, split_heads
from nsa_lite.rivals.rules import best, finished, num_blocks, products
from nsa_lite.rivals.taught import (
    STRETCH,
    first_to_last,
    kl_to_true_mass,
    mean_where_it_matters,
    stretches,
)
from nsa_lite.rope import rotate


def by_pooled_windows(known: Known) -> Choice:
    """InfLLM-V2's score (arXiv 2509.24663): means of the selected branch's own keys, no weights.

    A softmax over means of l keys, one every d tokens, is added up over the group's heads; a block
    gets the largest entry of the means that touch it, where Eq. 9 of NSA would add them up.
    """
    c = known.config
    k = accurate(known.k.detach())
    means = split_blocks(k, c.block_size, c.stride).mean(-2)  # (B, G, N, D)
    t = query_positions(known.q, known.start)
    visible = visible_compressed(t, means.shape[2], c.block_size, c.stride)
    p = attention_probabilities(known.q, means, visible, None)[0].sum(2)  # (B, G, T, N)
    return Choice(best(known, largest_touching(known, p)))


def largest_touching(known: Known, p: Float[Tensor, "B G T N"]) -> Float[Tensor, "B G T blocks"]:
    """The largest p of the compression blocks that share a token with each selection block."""
    c = known.config
    before = c.block_size // c.stride - 1  # those that begin before the block and reach into it
    inside = c.select_block_size // c.stride
    behind = num_blocks(known) * inside - p.shape[-1]
    return pad(p, (before, behind)).unfold(-1, before + inside, inside).amax(-1)


@in_full_precision
def lightning_scores(
    q: Float[Tensor, "B T J D"], k: Float[Tensor, "B S D"], w: Float[Tensor, "B T J"]
) -> Float[Tensor, "B T S"]:
    """DSA's lightning indexer (arXiv 2512.02556, Eq. 1): I_ts = sum_j w_tj ReLU(q_tj . k_s)."""
    each = relu(torch.einsum("btjd,bsd->btjs", accurate(q), accurate(k)))
    return torch.einsum("btj,btjs->bts", accurate(w), each)


class Successor(nn.Module):
    """An indexer that dense attention teaches; a subclass says how it scores, and the loss.

    The layer's input is detached: nothing but the loss trains the indexer, and nothing else in the
    layer feels it (DSA's sparse stage).
    """

    def __init__(self, config: NSAConfig, queries: int) -> None:
        super().__init__()
        require_config(config)
        self.config = config
        self.query = nn.Linear(config.dim, queries * config.head_dim, bias=False)
        self.key = nn.Linear(config.dim, config.head_dim, bias=False)

    def forward(self, known: Known) -> Choice:
        ids = best(known, self.scores(known))
        many = known.q.shape[2] > 2 * STRETCH
        if many and not self.training:
            return Choice(ids)
        parts = [known]
        if many:  # the teacher's mass is T x S: only two stretches of the queries are taught
            parts = [first_to_last(known, first, first + STRETCH) for first in stretches(known)]
        return Choice(ids, loss=torch.stack([self.loss(part) for part in parts]).mean())

    def own(self, known: Known) -> tuple[Float[Tensor, "B J T D"], Float[Tensor, "B 1 S D"]]:
        """The indexer's own queries, rotated, and its one key a token, not rotated yet."""
        x = known.x[:, : known.start + known.q.shape[2]].detach()
        queries = self.query.out_features // self.config.head_dim
        q = split_heads(self.query(x[:, known.start :]), queries)
        t = query_positions(q, known.start)
        return rotate(q, t, self.config.rope_theta), split_heads(self.key(x), 1)

    def scores(self, known: Known) -> Float[Tensor, "B G T blocks"]:
        """One score a block, differentiable in the indexer's weights only."""
        raise NotImplementedError

    def loss(self, known: Known) -> Float[Tensor, ""]:
        """How far the scores are from what dense attention weighs."""
        raise NotImplementedError


class BestToken(Successor):
    """MiniMax MSA's index branch (arXiv 2606.13392): a block is worth its best token.

    One query a group, one key for all groups: S_gts = q_gt . k_s, and block j gets max over its
    tokens. Its loss compares tokens: the KL divergence of softmax(S_gt) from what the group's
    heads weigh on average. MSA takes it among the selected tokens, we among all, as a warm-up does.
    """

    def __init__(self, config: NSAConfig) -> None:
        super().__init__(config, config.kv_heads)

    def tokens(self, known: Known) -> Float[Tensor, "B G T S"]:
        """S, -inf at keys behind the query."""
        q, k = self.own(known)
        s = torch.arange(k.shape[2], device=k.device)
        k = rotate(k, s, self.config.rope_theta)
        scores = products(q, accurate(k))[:, 0] * self.config.head_dim**-0.5
        return scores.masked_fill(~causal(known), -math.inf)

    def scores(self, known: Known) -> Float[Tensor, "B G T blocks"]:
        size = self.config.select_block_size
        tokens = self.tokens(known)
        tokens = pad(tokens, (0, -tokens.shape[-1] % size), value=-math.inf)
        return tokens.unflatten(-1, (-1, size)).amax(-1)

    def loss(self, known: Known) -> Float[Tensor, ""]:
        return mean_where_it_matters(known, kl_to_tokens(known, self.tokens(known)))


class PooledLightning(Successor):
    """QSA's indexer: DSA's, over means of index keys, all its heads weighing the same.

    kbar_b is the mean of a block's index keys, rotated at its first token, and one score serves all
    groups: I_tb = sum_j ReLU(q_tj . kbar_b) / sqrt(D). From the code of Qwen4-Exp in transformers,
    without its norms; there a block has four tokens. How it is trained we did not find: here by
    KL divergence to dense attention's mass, as DSA's.
    """

    def __init__(self, config: NSAConfig) -> None:
        super().__init__(config, config.heads)

    def scores(self, known: Known) -> Float[Tensor, "B G T blocks"]:
        c = self.config
        q, k = self.own(known)
        size = c.select_block_size
        whole = k.shape[2] // size  # a ragged tail is the query's own block
        means = k[:, 0, : whole * size].unflatten(1, (whole, size)).mean(2)
        first_tokens = torch.arange(whole, device=k.device) * size
        means = rotate(means[:, None], first_tokens, c.rope_theta)[:, 0]
        w = q.new_full((q.shape[0], q.shape[2], q.shape[1]), c.head_dim**-0.5)
        z = lightning_scores(q.transpose(1, 2), means, w)
        z = pad(z, (0, num_blocks(known) - whole)).masked_fill(~finished(known), 0.0)
        return z[:, None].expand(-1, c.kv_heads, -1, -1)

    def loss(self, known: Known) -> Float[Tensor, ""]:
        return kl_to_true_mass(known, self.scores(known))


@in_full_precision
def divergence(p: Float[Tensor, "*rows S"], z: Float[Tensor, "*rows S"]) -> Float[Tensor, "*rows"]:
    """KL(p || softmax(z)) = sum_s p_s (log p_s - log softmax(z)_s); z is -inf where p is 0."""
    log_s = z.log_softmax(-1).masked_fill(z == -math.inf, 0.0)
    return (torch.xlogy(p, p) - p * log_s).sum(-1)


def kl_to_tokens(known: Known, z: Float[Tensor, "B G T S"]) -> Float[Tensor, "B G T"]:
    """How far softmax(z) is from the mean of the group's heads' dense attention, token by token."""
    with torch.no_grad():
        k = known.k[:, :, : z.shape[-1]]
        p = attention_probabilities(known.q, k, causal(known), None)[0].mean(2)
    return divergence(p, z)


def causal(known: Known) -> Bool[Tensor, "T S"]:
    """Which keys up to the last query each query may see."""
    t = query_positions(known.q, known.start)
    return torch.arange(known.start + len(t), device=t.device) <= t[:, None]
