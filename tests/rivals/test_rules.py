"""Rules for choosing blocks: each against its formula by hand, loops or finite differences."""

import math

import pytest
import torch
from torch.autograd import gradcheck

import nsa_lite
from nsa_lite import NSAConfig, NSAttention, selected_attention
from nsa_lite.blocks import num_compressed
from nsa_lite.layer import Choice, Known
from nsa_lite.rivals import rules
from nsa_lite.rivals.attentions import ATTENTIONS, Shut
from nsa_lite.rivals.rules import block_mass, page_bound
from nsa_lite.rivals.taught import (
    BCEOverSoftmax,
    GumbelTopK,
    Indexer,
    KLToTrueMass,
    StraightThrough,
    bce_over_softmax,
    kl_to_mass,
    mean_where_it_matters,
    scaled_selected_attention,
    straight_through,
)

# l' = 4, n = 4, 1 initial and 2 local blocks: one free place.
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
LENGTH = 27
PLAIN = {
    "random": rules.at_random,
    "oracle": rules.by_true_mass,
    "quest": rules.by_bound,
    "moba": rules.by_block_mean,
}
LEARNED = {
    "bce": BCEOverSoftmax,
    "kl": KLToTrueMass,
    "straight-through": StraightThrough,
    "gumbel": GumbelTopK,
}
AUXILIARY = ["bce", "kl"]  # the others learn from the task


def stream(length=LENGTH, batch=2):
    return torch.randn(batch, length, CONFIG.dim, dtype=torch.float64)


def layer(rule, seed=0):
    """A layer that chooses by a rule of the table of attentions; None is the paper's."""
    torch.manual_seed(seed)
    return ATTENTIONS["nsa" if rule is None else f"nsa-{rule}"].build(CONFIG).double()


def known(length=LENGTH, start=0, **changes):
    """What a layer would know, from random tensors: B=2, H=4, G=2, D=4."""
    torch.manual_seed(1)
    q = torch.randn(2, 4, length - start, 4, dtype=torch.float64)
    k = torch.randn(2, 2, length, 4, dtype=torch.float64)
    c = CONFIG
    compressed = torch.randn(
        2, 2, num_compressed(length, c.block_size, c.stride), 4, dtype=torch.float64
    )
    facts = dict(config=c, x=stream(length), q=q, k=k, compressed=compressed, start=start)
    return Known(**{**facts, **changes})


# --- every rule: what it may choose ---


@pytest.mark.parametrize("rule", [None, *PLAIN, *LEARNED])
@pytest.mark.parametrize("length", [1, 3, 4, 13, LENGTH])
def test_every_rule_keeps_the_forced_blocks_and_none_from_the_future(rule, length):
    ids = layer(rule)(stream(length), return_trace=True)[1].ids
    for t in range(length):
        own = t // 4
        for row in ids[:, :, t].flatten(0, 1).tolist():
            chosen = [j for j in row if j >= 0]
            assert chosen == sorted(set(chosen)) and max(chosen) == own
            assert {0, own, max(0, own - 1)} <= set(chosen)
            assert len(chosen) == min(4, own + 1)  # as many as there are, or n


def test_candidates_by_hand():
    # Query 26 owns block 6: forced 0, 5, 6; query 19 owns 4: forced 0, 3, 4; query 3 none.
    facts = known()
    candidates = rules.candidates(facts)
    rows = {t: candidates[t].nonzero().flatten().tolist() for t in (3, 11, 12, 19, 26)}
    assert rows == {3: [], 11: [], 12: [1], 19: [1, 2], 26: [1, 2, 3, 4]}
    assert rules.finished(facts)[26].tolist() == [True] * 6 + [False]  # block 6 ends at token 27


def test_a_rule_of_the_readers_takes_part():
    def newest(known):
        blocks = torch.arange(rules.num_blocks(known), dtype=torch.float64)
        return Choice(rules.best(known, blocks.expand(2, 2, known.q.shape[2], -1)))

    ids = NSAttention(CONFIG, choose=newest).double()(stream(), return_trace=True)[1].ids
    assert ids[0, 0, -1].tolist() == [0, 4, 5, 6]


# --- rules without weights ---


def test_the_page_bound_is_quests_formula_and_no_key_exceeds_it():
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 5, 4), torch.randn(1, 2, 24, 4)
    low, high = (getattr(k.view(1, 2, 6, 4, 4), f)(-2) for f in ("amin", "amax"))
    bound = page_bound(q, low, high)
    for h in range(4):
        for t in range(5):
            for page in range(6):
                keys = k[0, h // 2, 4 * page : 4 * page + 4]
                by_hand = sum(
                    max(q[0, h, t, c] * keys[:, c].min(), q[0, h, t, c] * keys[:, c].max())
                    for c in range(4)
                )
                assert bound[0, h // 2, h % 2, t, page] == pytest.approx(float(by_hand), abs=1e-5)
                assert bound[0, h // 2, h % 2, t, page] >= (keys @ q[0, h, t]).max() - 1e-5


def chosen_by(score_of_head, facts):
    """The free block of each row: softmax over finished blocks a head, summed over the group."""
    batch, heads, length, _ = facts.q.shape
    best = {}
    for b in range(batch):
        for g in range(2):
            for i in range(length):
                t = facts.start + i
                finished = range((t + 1) // 4)
                votes = torch.zeros(len(finished), dtype=torch.float64)
                for h in (2 * g, 2 * g + 1):
                    logits = [
                        score_of_head(facts.q[b, h, i], facts.k[b, g, 4 * j : 4 * j + 4])
                        for j in finished
                    ]
                    if logits:
                        votes += torch.stack(logits).div(2).softmax(0)  # scale 1/sqrt(4)
                free = [j for j in finished if 0 < j < t // 4 - 1]
                best[b, g, i] = max(free, key=lambda j: votes[j], default=None)
    return best


@pytest.mark.parametrize("start", [0, 9])
@pytest.mark.parametrize(
    ("rule", "score"),
    [
        ("moba", lambda q, keys: q @ keys.mean(0)),
        ("quest", lambda q, keys: torch.maximum(q * keys.amin(0), q * keys.amax(0)).sum()),
    ],
)
def test_rules_without_weights_by_loop(rule, score, start):
    facts = known(start=start)
    ids = PLAIN[rule](facts).ids
    for (b, g, i), block in chosen_by(score, facts).items():
        own = (start + i) // 4
        expected = {0, max(0, own - 1), own} | ({block} if block is not None else set())
        assert {j for j in ids[b, g, i].tolist() if j >= 0} == expected


# --- BCE over softmax ---


def problem(blocks=6, targets=(1, 4)):
    torch.manual_seed(0)
    z = torch.randn(blocks, dtype=torch.float64, requires_grad=True)
    m = torch.zeros(blocks, dtype=torch.bool)
    m[list(targets)] = True
    return z, m, torch.ones(blocks, dtype=torch.bool)


def test_bce_is_its_formula_and_masks_what_is_no_candidate():
    z, m, candidates = problem()
    candidates[2] = False
    s = [math.exp(x) * (j != 2) for j, x in enumerate(z.tolist())]
    s = [x / sum(s) for x in s]
    by_hand = -sum(math.log(s[j]) if m[j] else math.log(1 - s[j]) for j in range(6) if j != 2)
    assert bce_over_softmax(z, m, candidates).item() == pytest.approx(by_hand, rel=1e-12)


def test_bces_gradient_is_the_formula_autograd_and_finite_differences():
    z, m, candidates = problem()
    (by_autograd,) = torch.autograd.grad(bce_over_softmax(z, m, candidates), z)
    s = z.detach().softmax(0)
    g = torch.where(m, -1 / s, 1 / (1 - s))
    torch.testing.assert_close(by_autograd, s * (g - (s * g).sum()), rtol=1e-10, atol=1e-12)
    for i in range(6):
        up, down = (z.detach() + sign * 1e-6 * torch.eye(6)[i] for sign in (1, -1))
        rise = bce_over_softmax(up, m, candidates) - bce_over_softmax(down, m, candidates)
        assert by_autograd[i].item() == pytest.approx(rise.item() / 2e-6, abs=1e-7)


@pytest.mark.parametrize("targets", [(1,), (1, 4), (0, 2, 5)])
def test_bces_optimum_is_one_kth_on_the_targets(targets):
    z, m, candidates = problem(targets=targets)
    optimizer = torch.optim.Adam([z], lr=0.3)
    for _ in range(300):
        optimizer.zero_grad()
        bce_over_softmax(z, m, candidates).backward()
        optimizer.step()
    torch.testing.assert_close(z.softmax(0), m / m.sum(), rtol=0, atol=2e-3, check_dtype=False)


def test_bce_and_kl_stay_finite_where_a_share_is_0_or_1():
    z = torch.tensor([500.0, 0.0, -500.0], requires_grad=True)
    ones = torch.ones(3, dtype=torch.bool)
    for loss in (
        bce_over_softmax(z, torch.tensor([False, True, False]), ones),
        kl_to_mass(z, torch.tensor([0.0, 1.0, 0.0]), ones),
        kl_to_mass(z, torch.zeros(3), ones & False),
    ):
        (grad,) = torch.autograd.grad(loss, z)
        assert loss.isfinite() and grad.isfinite().all()


# --- KL to the true mass ---


def test_kl_is_its_formula_is_0_at_the_mass_and_pulls_by_s_minus_m():
    z, _, candidates = problem()
    candidates[3] = False
    mass = torch.tensor([0.1, 0.2, 0.05, 9.0, 0.3, 0.15], dtype=torch.float64)
    m = mass * candidates / 0.8  # what is no candidate takes no part
    s = z.masked_fill(~candidates, -math.inf).softmax(0)
    loss = kl_to_mass(z, mass, candidates)
    by_hand = sum(m[j] * torch.log(m[j] / s[j]) for j in range(6) if j != 3)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    (grad,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(grad, (s - m).detach(), rtol=1e-6, atol=1e-8)
    assert kl_to_mass(mass.log(), mass, candidates).item() == pytest.approx(0, abs=1e-6)


# --- teachers ---


def test_bces_target_is_the_blocks_of_most_true_mass_among_the_free():
    facts = known()
    mass = block_mass(facts.q, facts.k, 4)
    target = rules.chosen(facts, rules.best(facts, mass))
    for t in range(LENGTH):
        free = range(1, t // 4 - 1)
        best = mass[0, 1, t, 1 : t // 4 - 1].argmax().item() + 1 if len(free) else None
        assert target[0, 1, t].nonzero().flatten().tolist() == ([best] if len(free) else [])


def test_only_queries_with_a_real_choice_count():
    facts = known()
    loss = torch.arange(float(LENGTH)).expand(2, 2, -1)
    # One place is free and two candidates exist from query 16 on (own block 4: 1 and 2).
    assert mean_where_it_matters(facts, loss) == pytest.approx(sum(range(16, 27)) / 11)
    assert mean_where_it_matters(known(length=15), loss[..., :15]) == 0


@pytest.mark.parametrize("rule", AUXILIARY)
def test_an_auxiliary_loss_teaches_the_indexer_and_nothing_else(rule):
    module = layer(rule)
    y, loss = module(stream().requires_grad_(), return_loss=True)
    names = [name for name, _ in module.named_parameters()]
    taught = torch.autograd.grad(
        loss, list(module.parameters()), allow_unused=True, retain_graph=True
    )
    by_task = torch.autograd.grad(y.square().sum(), list(module.parameters()), allow_unused=True)
    for name, a, b in zip(names, taught, by_task, strict=True):
        inside = name.startswith("choose.")
        assert (a is not None and a.abs().max() > 0) == inside, name
        assert (b is not None and b.abs().max() > 0) == (not inside), name


@pytest.mark.parametrize("rule", ["straight-through", "gumbel"])
def test_straight_through_lets_the_task_teach_the_indexer(rule):
    module, x = layer(rule), stream().requires_grad_()
    y, loss = module(x, return_loss=True)
    y.square().sum().backward()
    assert loss == 0 and not loss.requires_grad
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("rule", AUXILIARY)
def test_an_auxiliary_loss_moves_the_choice_to_its_teachers(rule):
    """The rest of the layer frozen, the indexer comes to choose the blocks of most true mass."""
    module, x = layer(rule), stream()
    oracle = layer("oracle")
    oracle.load_state_dict(module.state_dict(), strict=False)
    best = oracle(x, return_trace=True)[1].ids
    optimizer, agreement = torch.optim.Adam(module.choose.parameters(), lr=0.03), []
    for _ in range(60):
        _, loss, trace = module(x, return_loss=True, return_trace=True)
        agreement.append((trace.ids == best).all(-1)[:, :, 16:].double().mean().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert agreement[-1] > agreement[0] + 0.2, agreement


# --- straight-through and Gumbel ---


def reading(length=9):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, h, length, d, dtype=torch.float64, requires_grad=True)
        for h, d in ((4, 3), (2, 3), (2, 2))
    )
    ids = nsa_lite.choose_blocks(torch.rand(1, 2, length, 5), select_block_size=2, num_selected=4)
    return q, k, v, ids


def test_weights_of_1_change_nothing_and_other_weights_scale_the_keys():
    q, k, v, ids = reading()
    same = scaled_selected_attention(q, k, v, ids, torch.ones(ids.shape), select_block_size=2)
    torch.testing.assert_close(same, selected_attention(q, k, v, ids, select_block_size=2))
    halved = scaled_selected_attention(
        q, k, v, ids, torch.full(ids.shape, 0.5), select_block_size=2
    )
    torch.testing.assert_close(halved, selected_attention(q, k / 2, v, ids, select_block_size=2))
    weight = torch.rand(ids.shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda *a: scaled_selected_attention(*a[:3], ids, a[3], select_block_size=2),
        (q, k, v, weight),
    )


def test_straight_through_is_1_and_passes_each_blocks_own_gradient():
    ids = torch.tensor([[[[0, 2, 3, -1]]]])
    share = torch.tensor([[[[0.0, 0.1, 0.2, 0.7]]]], requires_grad=True)
    weight = straight_through(ids, share)
    assert weight.tolist() == [[[[1.0, 1.0, 1.0, 1.0]]]]
    (grad,) = torch.autograd.grad((weight * torch.tensor([1.0, 2.0, 3.0, 0.0])).sum(), share)
    assert grad.tolist() == [[[[1.0, 0.0, 2.0, 3.0]]]]


def test_gumbel_draws_a_block_as_often_as_its_share_and_takes_the_best_when_not_training():
    rule, facts = layer("gumbel").choose, known(start=26)  # one query, one free place
    many = {
        name: getattr(facts, name)[:1].expand(4000, *getattr(facts, name).shape[1:])
        for name in ("x", "q", "k")
    }
    share = rule.importance(facts)[0, 0, 0, 1:5]  # of the candidates, blocks 1 to 4
    free = rule(known(start=26, **many)).ids[:, 0, 0, 1]  # between block 0 and blocks 5, 6
    drawn = free.long().bincount(minlength=5)[1:] / 4000
    torch.testing.assert_close(drawn, (share / share.sum()).detach().float(), rtol=0, atol=0.03)
    calm = rule.eval()(known(start=26, **many)).ids[:, 0, 0, 1]
    assert (calm == 1 + share.argmax()).all()


# --- the indexer and the layer ---


def test_the_indexer_scores_as_the_compressed_branch_would_with_its_weights():
    module, x = layer("kl"), stream()
    mine, its = module.choose, NSAttention(CONFIG).double()
    with torch.no_grad():
        its.query.weight.copy_(mine.query.weight)
        its.keys["compressed"].weight.copy_(mine.key.weight)
        its.phi_k.load_state_dict(mine.phi.state_dict())
    trace = its(x, return_trace=True)[1]
    facts = known(x=x)
    torch.testing.assert_close(mine.importance(facts), trace.importance)


@pytest.mark.parametrize("rule", LEARNED)
def test_only_a_rule_with_weights_adds_weights(rule):
    names = {n for n, _ in layer(rule).named_parameters()}
    plain = {n for n, _ in layer(None).named_parameters()}
    added = {n for n in names - plain if n.startswith("choose.")}
    assert added == names - plain and len(added) == 7
    assert isinstance(layer(rule).choose, Indexer)


def test_a_rule_draws_none_of_the_layers_weights():
    plain = layer(None).state_dict()
    for rule in (*PLAIN, *LEARNED):
        state = layer(rule).state_dict()
        assert all(torch.equal(state[name], plain[name]) for name in plain), rule


def test_a_shut_branch_gives_nothing_and_learns_nothing():
    module = layer("shut")
    assert isinstance(module.gate, Shut)
    y, trace = module(stream(), return_trace=True)
    assert (trace.gates[..., 0] == 0).all() and (trace.gates[..., 1:] > 0).all()
    y.square().sum().backward()
    for name, parameter in module.named_parameters():
        dead = name.startswith(("phi_", "keys.compressed", "values.compressed"))
        assert (parameter.grad.abs().max() == 0) == dead, name
