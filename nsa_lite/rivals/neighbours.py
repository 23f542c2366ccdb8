"""Four inference-only neighbours of NSA: which keys each lets a query read, and what comes out.

All treat a sequence as decoding would: query t knows tokens up to t only, and the model was
trained without them. Each returns (out, read): out (B, H, T, Dv), and read bool (B, H, T, T),
where read[b, h, t, s] says that query t of head h read key s. With a budget of everything each
equals dense attention.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_lite.attention import (
    accurate,
    attend,
    attention_probabilities,
    in_full_precision,
    masked_softmax,
    scale_of,
)
from nsa_lite.blocks import num_select_blocks, query_positions
from nsa_lite.checks import (
    require,
    require_attention_inputs,
    require_int,
    require_number,
    require_positive,
    require_scale,
)
from nsa_lite.rivals.rules import page_bound
from nsa_lite.rope import rotate
from nsa_lite.selection import choose_blocks


def streaming_llm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sinks: int,
    window: int,
    theta: float = 10_000.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """StreamingLLM: read the first `sinks` tokens and the last `window`; forget the others.

    Shapes: q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv), q and k NOT yet rotated -> out, read.
    out_t = softmax(q_t K_S' / sqrt(D)) V_S over S = {0 .. s-1} and {t-w+1 .. t}, with RoPE at the
    places 0 .. s+w-1 that the tokens have in the cache, not in the text.
    Errors: ValueError or TypeError that names the argument. Source: arXiv 2309.17453, section 3.2.
    """
    _require_sequence(q, k, v, scale)
    require_int("sinks", sinks, at_least=0)
    require_int("window", window, at_least=1)
    require_positive("theta", theta)
    t = query_positions(q)
    recent = t > t[:, None] - window
    read = _causal(q) & (recent | (t < sinks))
    in_cache = t.clamp(max=sinks + window - 1)  # where query t stands once the cache is full
    # A recent key is as far from the query in the cache as in the text; the sinks are nearer.
    scores = torch.where(
        recent,
        _scores(rotate(q, t, theta), rotate(k, t, theta), scale),
        _scores(rotate(q, in_cache, theta), rotate(k, t, theta), scale),
    )
    p, _ = masked_softmax(scores, read)
    return _read_out(p, v), read.expand(*q.shape[:3], -1)


def h2o(
    q: Tensor, k: Tensor, v: Tensor, *, recent: int, heavy: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """H2O: a cache of recent + heavy tokens; the old token that got least attention is evicted.

    Shapes: q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv) -> out, read.
    A_j += softmax(q_t K_kept' / sqrt(D))_j at every query t; before query t + 1 is read, the
    kept j <= t + 1 - recent of the smallest A_j leaves, for good. One cache a group (choice: the
    paper has a key head for each query head), so A_j sums over the group's heads.
    Errors: ValueError or TypeError that names the argument. Source: arXiv 2306.14048, Alg. 1.
    """
    _require_sequence(q, k, v, scale)
    require_int("recent", recent, at_least=1)
    require_int("heavy", heavy, at_least=0)
    scores = _scores(q, k, scale)  # (B, G, R, T, T)
    kept = torch.zeros(k.shape[:3], dtype=torch.bool, device=k.device)
    mass = torch.zeros(k.shape[:3], dtype=scores.dtype, device=k.device)  # A_j
    rows, read = [], []
    for t in range(q.shape[2]):
        kept[..., t] = True
        if t >= recent + heavy:  # one too many
            old = slice(0, t - recent + 1)
            rank = mass[..., old].masked_fill(~kept[..., old], math.inf)
            kept.scatter_(-1, rank.argmin(-1, keepdim=True), False)
        p, _ = masked_softmax(scores[..., t, :], kept[:, :, None])
        mass = mass + p.sum(dim=2)
        rows.append(p)
        read.append(kept.clone())
    out = _read_out(torch.stack(rows, dim=3), v)
    return out, torch.stack(read, dim=2).repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def page_bounds(k: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number of each channel among a page's keys.

    Shapes: k (B, G, T, D) -> low, high (B, G, pages, D); the last page may be cut short.
    """
    require_int("page", page, at_least=1)
    last = k[:, :, -1:].expand(-1, -1, -k.shape[2] % page, -1)  # a repeat changes no bound
    pages = torch.cat([k, last], dim=2).unflatten(2, (-1, page))
    return pages.amin(dim=3), pages.amax(dim=3)


def page_scores(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Quest's bound u of each head and page (see rules.page_bound), never below a key's q . k.

    Shapes: q (B, H, T, D), low and high (B, G, pages, D) -> (B, H, T, pages).
    """
    return page_bound(q, low, high).flatten(1, 2)


def quest(
    q: Tensor, k: Tensor, v: Tensor, *, page: int, pages: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Quest: keep every token, read the `pages` pages whose keys could score highest.

    Shapes: q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv) -> out, read.
    The top pages by u (see page_scores), each head for itself. The query's own page, still
    growing, is always read and is one of the `pages` (choice); the others are full, so their
    bounds know no token after t. In all layers (choice: the paper leaves out the first two).
    Errors: ValueError or TypeError that names the argument. Source: arXiv 2406.10774, section 3.
    """
    _require_sequence(q, k, v, scale)
    require_int("page", page, at_least=1)
    require_int("pages", pages, at_least=1)
    u = page_scores(q, *page_bounds(accurate(k), page))
    ids = choose_blocks(u, select_block_size=page, num_selected=pages, num_initial=0, num_local=1)
    count = num_select_blocks(q.shape[2], page)
    chosen = torch.zeros(*ids.shape[:3], count + 1, dtype=torch.bool, device=q.device)
    chosen.scatter_(-1, ids.long() % (count + 1), True)  # -1, no page, lands in the last column
    read = chosen[..., :count].repeat_interleave(page, dim=-1)[..., : q.shape[2]] & _causal(q)
    return attend(q, k, v, read.unflatten(1, (k.shape[1], -1)), scale)[0], read


def smallest_columns(mass: Tensor, share: float) -> Tensor:
    """The fewest columns whose mass adds up to `share` of their row's, as bool of the same shape.

    The lightest columns go while all that went weigh at most 1 - share: with share = 1 only
    columns of mass 0 go, whatever the rounding.
    """
    _require_share(share)
    light = mass.sort(dim=-1)
    gone = light.values.cumsum(-1) <= (1 - share) * mass.sum(-1, keepdim=True)
    return torch.zeros_like(gone).scatter_(-1, light.indices, ~gone)


def sample_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    share: float,
    window: int,
    every: int,
    whole_prompt: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """SampleAttention: a sample of exact rows shows which columns carry the attention; read those.

    Shapes: q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv) -> out, read.
    mass_s = sum over sampled rows i of softmax(q_i K' / sqrt(D))_s, for each head; read the
    smallest_columns that reach `share` of it (the paper's alpha), and the last `window` keys.
    Rows every-1, 2 every-1, .. are sampled. Query t uses the samples at or before t. With
    whole_prompt=True it uses all of them, as the paper does in prefill: which keys an early query
    reads then depends on later tokens, though no value after t enters its output.
    Errors: ValueError or TypeError that names the argument. Source: arXiv 2406.15486, section 4.
    """
    _require_sequence(q, k, v, scale)
    _require_share(share)
    require_int("window", window, at_least=1)
    require_int("every", every, at_least=1)
    t = query_positions(q)
    causal = _causal(q)
    rows = t[every - 1 :: every]
    p, _ = attention_probabilities(q[:, :, rows], k, causal[rows], scale)
    mass = p.flatten(1, 2).cumsum(dim=2)  # (B, H, samples, T): all samples up to each
    columns = F.pad(smallest_columns(mass, share), (0, 0, 1, 0))  # before the first: none
    known = torch.full_like(t, len(rows)) if whole_prompt else (t + 1) // every
    read = causal & (columns[:, :, known] | (t > t[:, None] - window))
    return attend(q, k, v, read.unflatten(1, (k.shape[1], -1)), scale)[0], read


def _require_share(share: float) -> None:
    require_number("share", share)
    require(0 <= share <= 1, "share", share, "must lie in 0 .. 1")


def _causal(q: Tensor) -> Tensor:
    """bool (T, T): key s is not after query t."""
    t = query_positions(q)
    return t <= t[:, None]


@in_full_precision
def _scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """Scaled products of each head's queries with its group's keys: (B, G, R, T, S)."""
    q = accurate(q).unflatten(1, (k.shape[1], -1))
    return torch.einsum("bgrtd,bgsd->bgrts", q, accurate(k)) * scale_of(scale, k.shape[3])


@in_full_precision
def _read_out(p: Tensor, v: Tensor) -> Tensor:
    """Each row's mean of the values, weighed by p (B, G, R, T, S): (B, H, T, Dv)."""
    return torch.einsum("bgrts,bgsv->bgrtv", p, accurate(v)).flatten(1, 2).to(v.dtype)


def _require_sequence(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    require_attention_inputs(q, k, v)
    require_scale(scale)
    require(
        k.shape[2] == q.shape[2],
        "k.shape",
        tuple(k.shape),
        "must hold one key for each of {} queries",
        q.shape[2],
    )
