"""What helps NSA's own choice to start: each against the paper's choice or a loop."""

import pytest
import torch

from nsa_lite import NSAConfig, NSAttention, compressed_attention, select_blocks, selected_attention
from nsa_lite.blocks import num_compressed, num_select_blocks
from nsa_lite.layer import Known
from nsa_lite.rivals import taught
from nsa_lite.rivals.attentions import ATTENTIONS, Shut
from nsa_lite.rivals.starters import (
    AllBlocks,
    OwnKL,
    ScoreInLogits,
    as_the_paper,
    biased_selected_attention,
)
from nsa_lite.rivals.taught import KLToTrueMass, first_to_last, stretches

CONFIG = NSAConfig(
    dim=12,
    heads=4,
    kv_heads=2,
    head_dim=4,
    value_dim=3,
    block_size=4,
    stride=2,
    select_block_size=4,
    num_selected=4,
    window=5,
)
LENGTH = 41


def known(length=LENGTH, start=0):
    torch.manual_seed(1)
    count = num_compressed(length, CONFIG.block_size, CONFIG.stride)
    made = dict(dtype=torch.float64)
    return Known(
        CONFIG,
        torch.randn(2, length, 12, **made),
        torch.randn(2, 4, length - start, 4, **made, requires_grad=True),
        torch.randn(2, 2, length, 4, **made),
        torch.randn(2, 2, count, 4, **made, requires_grad=True),
        start,
    )


@pytest.mark.parametrize("start", [0, 20])
def test_scores_without_help_are_the_papers(start):
    facts = known(start=start)
    blocks = dict(block_size=CONFIG.block_size, stride=CONFIG.stride, start=start)
    q, k = facts.q.detach(), facts.compressed.detach()
    lse = compressed_attention(q, k, k, **blocks)[1]
    expected = select_blocks(q, k, lse, **blocks, **CONFIG.choice_sizes)
    assert torch.equal(as_the_paper(facts).ids, expected)


def test_the_teacher_reaches_the_compressed_keys_and_the_query():
    facts = known()
    choice = OwnKL(CONFIG)(facts)
    choice.loss.backward()
    assert facts.q.grad.abs().sum() > 0 and facts.compressed.grad.abs().sum() > 0
    assert torch.equal(choice.ids, as_the_paper(facts).ids)
    assert choice.loss > 0


def test_help_for_the_first_passes_ends_after_them_and_counts_only_training():
    rule = AllBlocks(CONFIG, first=2)
    facts = known()
    paper = as_the_paper(facts).ids
    rule.eval()
    assert torch.equal(rule(facts).ids, paper)
    rule.train()
    seen = [rule(facts).ids for _ in range(3)]
    assert [ids.shape[-1] for ids in seen] == [num_select_blocks(LENGTH, 4)] * 2 + [4]
    assert torch.equal(seen[2], paper)
    again = AllBlocks(CONFIG, first=2)
    again.load_state_dict(rule.state_dict())
    assert torch.equal(again.train()(facts).ids, paper)


def test_all_blocks_are_dense_attention():
    facts = known()
    v = torch.randn(2, 2, LENGTH, 3, dtype=torch.float64)
    ids = AllBlocks(CONFIG)(facts).ids
    given = selected_attention(facts.q, facts.k, v, ids, select_block_size=4)
    k, v = (x.repeat_interleave(2, 1) for x in (facts.k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(facts.q, k, v, is_causal=True)
    torch.testing.assert_close(given, dense)


def test_a_bias_multiplies_what_a_block_weighs():
    facts = known()
    v = torch.randn(2, 2, LENGTH, 3, dtype=torch.float64)
    ids = as_the_paper(facts).ids
    bias = torch.randn(ids.shape, dtype=torch.float64)
    given = biased_selected_attention(facts.q, facts.k, v, ids, bias, select_block_size=4)
    b, h, t = 1, 3, 38
    g = h // 2
    weights = torch.zeros(LENGTH, dtype=torch.float64)
    for block, added in zip(ids[b, g, t].tolist(), bias[b, g, t], strict=True):
        for s in range(4 * block, min(4 * block + 4, t + 1)):
            logit = facts.q[b, h, t] @ facts.k[b, g, s] / 2
            weights[s] = logit.exp() * added.exp()
    expected = weights / weights.sum() @ v[b, g]
    torch.testing.assert_close(given[b, h, t], expected)
    nothing = torch.zeros_like(bias)
    without = biased_selected_attention(facts.q, facts.k, v, ids, nothing, select_block_size=4)
    plain = selected_attention(facts.q, facts.k, v, ids, select_block_size=4)
    torch.testing.assert_close(without, plain)


def test_the_task_trains_the_score_that_is_added_to_the_logits():
    x = torch.randn(2, LENGTH, 12, dtype=torch.float64)

    def gradient(choose):
        layer = NSAttention(CONFIG, choose=choose).double()
        layer.gate = Shut(layer.gate, "compressed")  # what is left comes through the score
        layer(x).square().sum().backward()
        return layer.keys["compressed"].weight.grad.abs().sum()

    assert gradient(ScoreInLogits(CONFIG)) > 0
    assert gradient(None) == 0


@pytest.mark.parametrize("name", ["nsa-own-kl", "nsa-own-kl-first", "nsa-all-first", "nsa-score"])
def test_every_starter_is_a_layer_that_trains_and_decodes(name):
    torch.manual_seed(0)
    layer = ATTENTIONS[name].build(CONFIG)
    x = torch.randn(1, LENGTH, 12)
    y, loss = layer(x, return_loss=True)
    (y.sum() + loss).backward()
    layer.eval()
    cache = layer.new_cache(1, LENGTH)
    with torch.no_grad():
        given = torch.cat([layer(x[:, :30], cache), layer(x[:, 30:], cache)], 1)
        torch.testing.assert_close(given, layer(x), rtol=1e-4, atol=1e-5)


# --- a teacher for many queries sees some of them ---


def test_a_few_queries_are_taught_as_one_stretch_of_many(monkeypatch):
    torch.manual_seed(0)
    rule = KLToTrueMass(CONFIG).double()
    facts = known()
    monkeypatch.setattr(taught, "STRETCH", 100)
    whole = rule(facts)
    monkeypatch.setattr(taught, "STRETCH", 8)
    some = rule(facts)
    assert torch.equal(whole.ids, some.ids)
    own = rule.own(facts)
    part = first_to_last(facts, 20, 28)
    assert part.start == 20 and part.q.shape[2] == 8 and part.k.shape[2] == 28
    expected = rule.importance(part)
    z = taught.importance_by(part, own[0][:, :, 20:28], taught.cut(part, own[1]))
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(taught.loss_of_some(facts, *own, rule.loss, 20), rule(part).loss)
    newest = taught.loss_of_some(facts, *own, rule.loss, LENGTH - 8)
    some.loss.backward()
    assert rule.key.weight.grad.abs().sum() > 0 and torch.isfinite(newest)


def test_the_stretches_are_a_random_one_and_the_newest(monkeypatch):
    monkeypatch.setattr(taught, "STRETCH", 8)
    facts = known()
    begun = {stretches(facts) for _ in range(300)}
    assert {newest for _, newest in begun} == {LENGTH - 8}
    assert {first for first, _ in begun} == set(range(LENGTH - 8 + 1))


def test_in_evaluation_many_queries_have_no_loss(monkeypatch):
    monkeypatch.setattr(taught, "STRETCH", 8)
    rule = KLToTrueMass(CONFIG).double().eval()
    assert rule(known()).loss is None
    assert rule(known(start=LENGTH - 10)).loss is not None
