"""Rules of NSA's successors: each against loops over heads, queries and tokens."""

import math

import pytest
import torch

from nsa_lite import NSAConfig
from nsa_lite.blocks import num_compressed
from nsa_lite.layer import Known
from nsa_lite.rivals.attentions import ATTENTIONS
from nsa_lite.rivals.successors import (
    BestToken,
    PooledLightning,
    by_pooled_windows,
    causal,
    divergence,
    kl_to_tokens,
    largest_touching,
    lightning_scores,
)
from nsa_lite.rivals.taught import STRETCH
from nsa_lite.rope import rotate

# l = 4, d = 2, l' = 8, n = 4, 1 initial and 2 local blocks: one free place.
CONFIG = NSAConfig(
    dim=12,
    heads=4,
    kv_heads=2,
    head_dim=4,
    value_dim=3,
    block_size=4,
    stride=2,
    select_block_size=8,
    num_selected=4,
    window=5,
)
LENGTH = 43
INDEXERS = {"msa": BestToken, "qsa": PooledLightning}


def known(length=LENGTH, start=0):
    """What a layer would know, from random tensors: B=2, H=4, G=2, D=4."""
    torch.manual_seed(1)
    made = dict(dtype=torch.float64)
    return Known(
        CONFIG,
        torch.randn(2, length, 12, **made),
        torch.randn(2, 4, length - start, 4, **made),
        torch.randn(2, 2, length, 4, **made),
        torch.randn(2, 2, num_compressed(length, 4, 2), 4, **made),
        start,
    )


def indexer(kind):
    torch.manual_seed(2)
    return INDEXERS[kind](CONFIG).double()


def blocks_of(scores, t):
    """Forced blocks of query t, and the best of the others that have ended."""
    own = t // 8
    free = range(1, own - 1)
    best = {max(free, key=lambda j: scores[j])} if len(free) else set()
    return {0, max(0, own - 1), own} | best


# --- InfLLM-V2 ---


def window_scores(facts, b, g, i):
    """Of one query and group: block by block the largest of the heads' summed softmax."""
    t = facts.start + i
    windows = [(s, s + 4) for s in range(0, facts.k.shape[2] - 3, 2) if s + 4 <= t + 1]
    summed = [0.0] * len(windows)
    for h in (2 * g, 2 * g + 1):
        logits = [float(facts.q[b, h, i] @ facts.k[b, g, s:end].mean(0)) / 2 for s, end in windows]
        total = sum(math.exp(x) for x in logits)
        for n, x in enumerate(logits):
            summed[n] += math.exp(x) / total
    scores = []
    for j in range(-(-(facts.start + facts.q.shape[2]) // 8)):
        touching = [
            p
            for p, (s, end) in zip(summed, windows, strict=True)
            if s < 8 * (j + 1) and end > 8 * j
        ]
        scores.append(max(touching, default=0.0))
    return scores


@pytest.mark.parametrize("start", [0, 29])
def test_pooled_windows_by_loop(start):
    facts = known(start=start)
    ids = by_pooled_windows(facts).ids
    for b in range(2):
        for g in range(2):
            for i in range(facts.q.shape[2]):
                expected = blocks_of(window_scores(facts, b, g, i), start + i)
                assert {j for j in ids[b, g, i].tolist() if j >= 0} == expected


def test_the_largest_of_the_windows_that_touch_a_block():
    # Windows of 4, one every 2; blocks of 8: windows 0 .. 3 touch block 0, from 3 on block 1.
    p = torch.tensor([1.0, 5.0, 2.0, 7.0, 3.0, 4.0, 0.0]).expand(2, 2, 16, -1)
    assert largest_touching(known(length=16), p)[0, 0, 0].tolist() == [7.0, 7.0]
    p = torch.tensor([1.0, 5.0, 2.0, 0.0, 3.0, 4.0, 6.0]).expand(2, 2, 16, -1)
    assert largest_touching(known(length=16), p)[0, 0, 0].tolist() == [5.0, 6.0]


# --- the lightning indexer ---


def test_lightning_scores_are_dsas_first_equation():
    torch.manual_seed(0)
    q, k, w = torch.randn(2, 3, 5, 4), torch.randn(2, 6, 4), torch.randn(2, 3, 5)
    scores = lightning_scores(q, k, w)
    for b in range(2):
        for t in range(3):
            for s in range(6):
                by_hand = sum(w[b, t, j] * max(0.0, q[b, t, j] @ k[b, s]) for j in range(5))
                assert scores[b, t, s] == pytest.approx(float(by_hand), abs=1e-5)


@pytest.mark.parametrize("start", [0, 29])
@torch.no_grad()
def test_qsa_pools_keys_then_rotates_them_and_serves_all_groups(start):
    rule, facts = indexer("qsa"), known(start=start)
    keys = rule.key(facts.x)
    for i in range(0, facts.q.shape[2], 5):
        t = facts.start + i
        q = rule.query(facts.x[:, t]).view(2, 4, 1, 4)
        q = rotate(q, torch.tensor([t]), CONFIG.rope_theta)[:, :, 0]
        for b in range(2):
            scores = []
            for j in range((t + 1) // 8):
                mean = keys[b, 8 * j : 8 * j + 8].mean(0)
                mean = rotate(mean.view(1, 1, 1, 4), torch.tensor([8 * j]), CONFIG.rope_theta)
                scores.append(sum(max(0.0, float(q[b, h] @ mean[0, 0, 0])) for h in range(4)) / 2)
            got = rule.scores(facts)[b, :, i]
            for g in range(2):
                assert got[g, : len(scores)].tolist() == pytest.approx(scores, abs=1e-9)
            assert (got[:, len(scores) :] == 0).all()  # not ended yet


# --- MSA ---


@pytest.mark.parametrize("start", [0, 29])
@torch.no_grad()
def test_msa_gives_a_block_the_score_of_its_best_token(start):
    rule, facts = indexer("msa"), known(start=start)
    key = rotate(rule.key(facts.x)[:, None], torch.arange(LENGTH), CONFIG.rope_theta)[:, 0]
    ids = rule(facts).ids
    for i in range(facts.q.shape[2]):
        t = facts.start + i
        q = rule.query(facts.x[:, t]).view(2, 2, 1, 4)
        q = rotate(q, torch.tensor([t]), CONFIG.rope_theta)[:, :, 0]
        for b in range(2):
            for g in range(2):
                tokens = [float(q[b, g] @ key[b, s]) for s in range(t + 1)]
                scores = [max(tokens[8 * j : 8 * j + 8]) for j in range(t // 8 + 1)]
                assert {j for j in ids[b, g, i].tolist() if j >= 0} == blocks_of(scores, t)


def test_kl_of_tokens_is_its_formula_and_pulls_by_share_minus_weight():
    facts = known(length=9)
    torch.manual_seed(3)
    z = torch.randn(2, 2, 9, 9, dtype=torch.float64, requires_grad=True)
    seen = z.masked_fill(~causal(facts), -math.inf)
    loss = kl_to_tokens(facts, seen)
    for b, g, t in [(0, 0, 0), (1, 0, 4), (0, 1, 8)]:
        heads = []
        for h in (2 * g, 2 * g + 1):
            heads.append((facts.k[b, g, : t + 1] @ facts.q[b, h, t] / 2).softmax(0))
        p = torch.stack(heads).mean(0)
        s = z[b, g, t, : t + 1].softmax(0)
        by_hand = (p * (p / s).log()).sum()
        assert loss[b, g, t].item() == pytest.approx(by_hand.item(), abs=1e-10)
        (grad,) = torch.autograd.grad(loss[b, g, t], z, retain_graph=True)
        torch.testing.assert_close(grad[b, g, t, : t + 1], (s - p).detach())
        assert (grad[b, g, t, t + 1 :] == 0).all()


def test_the_divergence_is_0_from_itself_and_infinite_nowhere():
    p = torch.tensor([0.5, 0.25, 0.25, 0.0])
    assert divergence(p, p.log()).item() == pytest.approx(0, abs=1e-7)
    assert divergence(p, torch.zeros(4)).item() == pytest.approx(0.5 * math.log(2), abs=1e-6)


# --- both indexers ---


@pytest.mark.parametrize("kind", INDEXERS)
def test_the_loss_teaches_the_indexer_and_nothing_else(kind):
    torch.manual_seed(0)
    layer = ATTENTIONS[f"nsa-{kind}"].build(CONFIG).double()
    x = torch.randn(2, LENGTH, 12, dtype=torch.float64, requires_grad=True)
    y, loss = layer(x, return_loss=True)
    named = list(layer.named_parameters())
    taught = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True, retain_graph=True)
    asked = torch.autograd.grad(y.square().sum(), [p for _, p in named], allow_unused=True)
    for (name, _), a, b in zip(named, taught, asked, strict=True):
        inside = name.startswith("choose.")
        assert (a is not None and a.abs().max() > 0) == inside, name
        assert (b is not None and b.abs().max() > 0) == (not inside), name


@pytest.mark.parametrize("kind", INDEXERS)
def test_the_loss_moves_the_choice_to_the_blocks_of_most_mass(kind):
    """The rest of the layer frozen; from query 40 on there are three candidates and more."""
    torch.manual_seed(0)
    layer = ATTENTIONS[f"nsa-{kind}"].build(CONFIG).double()
    oracle = ATTENTIONS["nsa-oracle"].build(CONFIG).double()
    oracle.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 91, 12, dtype=torch.float64)
    aim = oracle(x, return_trace=True)[1].ids
    optimizer = torch.optim.Adam(layer.choose.parameters(), lr=0.03)
    agreement = []
    for _ in range(80):
        _, loss, trace = layer(x, return_loss=True, return_trace=True)
        agreement.append((trace.ids == aim).all(-1)[:, :, 40:].double().mean().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert agreement[-1] > agreement[0] + 0.1, agreement[::10]


@pytest.mark.parametrize("kind", INDEXERS)
def test_of_many_queries_two_stretches_are_taught(kind, monkeypatch):
    rule, facts = indexer(kind), known(length=2 * STRETCH + 8)
    seen = []
    original = rule.loss
    monkeypatch.setattr(rule, "loss", lambda part: seen.append(part) or original(part))
    loss = rule(facts).loss
    assert [part.q.shape[2] for part in seen] == [STRETCH, STRETCH]
    assert seen[1].start == STRETCH + 8
    assert loss.item() == pytest.approx(sum(original(part).item() for part in seen) / 2)
    rule.eval()
    assert rule(facts).loss is None
