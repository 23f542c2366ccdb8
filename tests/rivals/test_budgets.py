"""What a read mask costs, counted again by hand, and models that are read by another method."""

import math

import pytest
import torch

from nsa_lite.config import NSAConfig
from nsa_lite.lab import training
from nsa_lite.lab.evaluate import evaluate
from nsa_lite.lab.neighbour_runs import measure, measure_nsa
from nsa_lite.lab.tasks import Recall
from nsa_lite.lab.text import Text
from nsa_lite.rivals import budgets
from nsa_lite.rivals.budgets import NEIGHBOURS

SMALL = NSAConfig.small(head_dim=6, value_dim=4)  # two groups of two heads, 10 numbers a token
EVERYTHING = [
    ("dense", {}),
    ("StreamingLLM", dict(sinks=4, window=100)),
    ("H2O", dict(recent=52, heavy=52)),
    ("Quest", dict(page=4, pages=26)),
    ("SampleAttention", dict(share=0.0, window=104, every=8)),
]


def model(task="recall", attention="dense"):
    return training.build(training.TrainConfig.preset(task, attention, threads=1)).eval()


def mask(rows):
    """bool (1, 4, T, T): the tokens each query reads, for each of four heads."""
    read = torch.zeros(1, 4, len(rows[0]), len(rows[0]), dtype=torch.bool)
    for h, head in enumerate(rows):
        for t, tokens in enumerate(head):
            read[0, h, t, tokens] = True
    return read


READ = mask(
    [
        [[0], [0, 1], [1, 2]],
        [[0], [1], [0, 2]],  # group 0: unions of 1, 2, 3
        [[0], [1], [2]],
        [[0], [1], [2]],
    ]
)  # group 1: unions of 1, 1, 1


def test_a_head_reads_its_own_tokens_and_a_group_the_union():
    at = torch.tensor([1, 2])
    assert budgets.read_by_head(READ, at) == (2 + 2 + 1 + 2 + 1 + 1 + 1 + 1) / 8
    assert budgets.read_by_group(READ, at, SMALL, NEIGHBOURS["dense"], {}) == (2 + 3 + 1 + 1) / 4


def test_page_bounds_and_sampled_scores_are_loaded_on_top():
    at, union = torch.tensor([1, 2]), (2 + 3 + 1 + 1) / 4
    # Pages of 2: query 1 knows no full page, query 2 one. Two bounds are 12 numbers, 1.2 tokens.
    quest = budgets.read_by_group(READ, at, SMALL, NEIGHBOURS["Quest"], dict(page=2, pages=1))
    assert quest == pytest.approx(union + (0 + 1.2) / 2)
    # Of every 3 queries the last, 2, is sampled: it scores 3 keys of 6 numbers, 1.8 tokens.
    sample = dict(share=0.5, window=1, every=3)
    got = budgets.read_by_group(READ, at, SMALL, NEIGHBOURS["SampleAttention"], sample)
    assert got == pytest.approx(union + (0 + 1.8) / 2)


@pytest.mark.parametrize("method, settings, tokens", [
    ("dense", {}, 30),
    ("StreamingLLM", dict(sinks=2, window=5), 7),
    ("H2O", dict(recent=3, heavy=4), 7 + 7 / 10),  # a running sum for each
    ("Quest", dict(page=4, pages=2), 30 + 8 * 12 / 10),  # eight pages, the last one growing
    ("SampleAttention", dict(share=0.5, window=4, every=4), 30),
])  # fmt: skip
def test_what_a_cache_holds_after_30_tokens(method, settings, tokens):
    assert NEIGHBOURS[method].kept(SMALL, 30, settings) == pytest.approx(tokens)


def test_what_nsas_cache_holds_after_30_tokens():
    # Raw keys, the window, (30 - 8) // 4 + 1 compressed ones, phi's last l.
    assert budgets.kept_by_nsa(SMALL, 30) == pytest.approx(30 + 16 + 6 + 8)


@pytest.mark.parametrize("method", ["StreamingLLM", "H2O", "Quest"])
@pytest.mark.parametrize("budget", [8, 20, 33])
def test_no_query_reads_more_than_its_budget(method, budget):
    settings = budgets.at_budget(method, budget, page=4)
    reader = budgets.reading(model(), method, **settings)
    with torch.no_grad():
        _, read = reader(Recall().batch(2, 0).tokens, return_traces=True)
    assert read[0].sum(-1).max() <= budget and read[0].sum(-1).max() > budget - 4


def test_a_model_is_its_old_self_after_reading_even_after_an_error():
    dense_model, tokens = model(), Recall().batch(2, 0).tokens
    before = dense_model(tokens)
    reader = budgets.reading(dense_model, "StreamingLLM", sinks=1, window=0)
    with pytest.raises(ValueError, match="window"):
        reader(tokens)
    assert torch.equal(dense_model(tokens), before)


def test_reading_disturbs_no_random_numbers():
    dense_model = model()
    before = torch.get_rng_state()
    budgets.reading(dense_model, "H2O", recent=4, heavy=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_neighbours_and_those_without_a_budget_are_named():
    with pytest.raises(ValueError, match="name = 'FlashAttention': must be one of"):
        budgets.reading(model(), "FlashAttention")
    with pytest.raises(ValueError, match="name = 'SampleAttention': has no budget"):
        budgets.at_budget("SampleAttention", 8, page=4)


@pytest.mark.parametrize("method, settings", EVERYTHING)
def test_with_a_budget_of_everything_a_model_scores_what_it_scores(method, settings):
    dense_model, batch = model(), Recall().batch(64, 0)
    got = measure(dense_model, Recall(), batch, method, settings)
    assert got["asked"] == 64 * 16 and got["read_by_head"] == sum(range(89, 105)) / 16
    assert got["right"] / got["asked"] == pytest.approx(
        evaluate(dense_model, Recall())["test_accuracy"], abs=1e-3
    )
    assert sum(got["right_by_block"]) == got["right"] == got["right_of_read"]
    assert got["answer_read"] == got["asked"] == sum(got["asked_by_block"])


def test_an_answer_counts_as_read_when_one_head_reads_it():
    batch = Recall().batch(4, 0)
    got = measure(model(), Recall(), batch, "StreamingLLM", dict(sinks=0, window=40))
    at = batch.answer_at[:, -16:]
    within = at > torch.arange(88, 104) - 40
    assert got["answer_read"] == int(within.sum())


def test_bits_per_byte_are_those_of_the_second_half():
    text_model, batch = model("text"), Text().held_out(1)
    got = measure(text_model, Text(), batch, "dense", {})
    with torch.no_grad():
        p = text_model(batch.tokens).double().softmax(-1)[0]
    bits = [-math.log2(p[t, batch.targets[0, t]]) for t in range(512, 1024)]
    assert got["bits_per_byte"] == pytest.approx(sum(bits) / 512, abs=1e-4)
    assert got["read_by_head"] == sum(range(513, 1025)) / 512 and got["bytes"] == 512


def test_a_trained_nsa_model_can_select_another_number_of_blocks():
    nsa, batch = model(attention="nsa"), Recall().batch(4, 0)
    tokens = []
    for n in (3, 6, 10):
        with torch.no_grad():
            _, (trace,) = budgets.with_blocks(nsa, n)(batch.tokens, return_traces=True)
        assert trace.ids.shape[-1] == n
        tokens.append(measure_nsa(nsa, Recall(), batch, n)["read_by_head"])
    # Query 103: 51 compressed, n blocks of 8, 16 in the window; the mean over 88 .. 103 is less.
    compressed = sum((t + 1 - 4) // 2 + 1 for t in range(88, 104)) / 16
    own = sum(t % 8 + 1 for t in range(88, 104)) / 16
    assert tokens == [pytest.approx(compressed + 8 * (n - 1) + own + 16) for n in (3, 6, 10)]


RECORDED = {"runs": {
    "recall-sweep-seed0": {"results": [
        {"method": "Quest", "settings": {"pages": 2}, "read_by_head": 8, "read_by_group": 20,
         "kept": 30, "asked": 4, "right": 1},
        {"method": "dense", "settings": {}, "read_by_head": 60, "read_by_group": 60, "kept": 60,
         "asked": 4, "right": 4}]},
    "recall-sweep-seed1": {"results": [
        {"method": "Quest", "settings": {"pages": 2}, "read_by_head": 8, "read_by_group": 30,
         "kept": 30, "asked": 4, "right": 3}]},
    "recall-dense-seed0": {"evaluations": []},
    "text-sweep-seed0": {"results": [
        {"method": "Quest", "settings": {"pages": 9}, "read_by_head": 1, "read_by_group": 1,
         "kept": 1, "bits_per_byte": 2.5}]},
}}  # fmt: skip


def test_a_sweep_is_averaged_over_its_seeds_and_no_other_run():
    table = budgets.sweep_table(RECORDED, "recall")
    assert table["Quest"] == [
        {
            "settings": {"pages": 2},
            "read_by_head": 8,
            "read_by_group": 25,
            "kept": 30,
            "score": 0.5,
            "low": 0.25,
            "high": 0.75,
        }
    ]
    assert table["dense"][0]["score"] == 1 and len(table) == 2
    assert budgets.sweep_table(RECORDED, "text")["Quest"][0]["score"] == 2.5
    assert budgets.nearest(table, "read_by_group", 9) == {"Quest": (25, 0.5), "dense": (60, 1)}
