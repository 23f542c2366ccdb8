"""The explorer's Python side: what it says, what it sends, what it writes, what it refuses."""

import base64
import json
import math
import re
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_lite import DecoderLM, ModelConfig, NSAConfig, Trace, choose_blocks
from nsa_lite.rivals.attentions import ATTENTIONS
from nsa_lite.show.explorer import SelectionExplorer, load_traces, save_traces
from nsa_lite.show.explorer import beyond as beyond_module
from nsa_lite.show.explorer import page as page_module
from nsa_lite.show.explorer.arrays import (
    DETAILS,
    NAN,
    SCORE_LEVELS,
    Detail,
    arrays_of,
    bytes_that_add_up,
    facts_of,
    score_levels,
)
from nsa_lite.show.explorer.gates import GATE_LEVELS, NO_GATE, words
from nsa_lite.show.explorer.packing import packed, packed_within, page_limit
from nsa_lite.show.explorer.picture import draw_queries
from nsa_lite.show.explorer.ranking import Ranking, rank_blocks
from nsa_lite.show.explorer.script import PARTS
from nsa_lite.show.explorer.sequence import Place, TracedSequence
from nsa_lite.show.explorer.tokens import draw_tokens, lines_of, visible

ROOT = Path(__file__).parents[2]
SMALL_MODEL = ModelConfig(256, 1, NSAConfig.small())


def made_trace(config: NSAConfig, length: int, seed: int = 0) -> Trace:
    """A trace of random numbers, its blocks chosen by its importance."""
    rng = torch.Generator().manual_seed(seed)
    c = config
    blocks = -(-length // c.select_block_size)
    count = max(0, (length - c.block_size) // c.stride + 1)
    now = torch.arange(length)
    begins = torch.arange(blocks) * c.select_block_size
    importance = torch.rand(1, c.kv_heads, length, blocks, generator=rng) * (begins <= now[:, None])
    ends = torch.arange(count) * c.stride + c.block_size - 1
    p = torch.rand(1, c.kv_heads, c.group_size, length, count, generator=rng)
    ids = choose_blocks(
        importance,
        select_block_size=c.select_block_size,
        num_selected=c.num_selected,
        num_initial=c.num_initial,
        num_local=c.num_local,
    )
    gates = torch.rand(1, c.heads, length, 3, generator=rng)
    return Trace(c, 0, ids, p * (ends <= now[:, None]), importance, gates, {})


# --- what it says ---


def test_the_sentence_by_hand():
    # l = l' = 4, d = 2, n = 3 with block 0 and the own block forced, w = 8, one group of two heads.
    c = NSAConfig.small(
        heads=2,
        kv_heads=1,
        block_size=4,
        stride=2,
        select_block_size=4,
        num_selected=3,
        num_local=1,
        window=8,
    )
    trace = made_trace(c, 38)
    score = torch.zeros(1, 1, 38, 10)
    score[0, 0, 37, 2] = 0.7
    score[0, 0, 37, 5] = 0.6
    gates = torch.tensor([[0.40, 0.88, 1.0], [0.42, 0.88, 0.999]])[None, :, None]
    gates = gates.expand(1, 2, 38, 3)
    ids = choose_blocks(score, select_block_size=4, num_selected=3, num_local=1)
    e = SelectionExplorer(replace(trace, importance=score, gates=gates, ids=ids))
    # The last visible compressed block i ends at 2 i + 3 <= 37: i = 17.
    assert e.describe(37) == (
        "query 37: compressed blocks 0-17, selected 0 2 9 (2 by score), window 30-37, "
        "gates .41 .88 1.00"
    )
    assert e.describe(0) == (
        "query 0: compressed blocks none, selected 0 (none by score), window 0, gates .41 .88 1.00"
    )
    e.n = 4
    assert "selected 0 2 5 9 (2 5 by score)" in e.describe()


@pytest.mark.parametrize("n", [3, 4, 5, 7, 14])
def test_another_n_selects_the_best_of_the_importance(explorer, n):
    importance = explorer.sequence.trace(explorer.place).importance[0, 1]
    explorer.group, explorer.n = 1, n
    for t in range(explorer.sequence.length):
        own = t // 8
        forced = {0, own, max(0, own - 1)}
        free = [j for j in range(own + 1) if j not in forced]
        free.sort(key=lambda j, t=t: (-float(importance[t, j]), j))
        assert explorer.selected(t) == sorted(forced | set(free[: max(0, n - len(forced))]))


def test_overlap_and_answers_by_hand(explorer):
    place = explorer.place
    s = explorer.sequence
    now = set(explorer.selected(50))
    before = set(explorer.selected(49))
    assert s.overlap(place, 50) == len(now & before) / len(now)
    assert s.overlap(place, 0) is None
    answers = torch.full((s.queries,), -1)
    answers[50] = 17
    told = TracedSequence(s.checkpoints, answer_at=answers)
    assert (told.answer_block(50), told.answer_block(49)) == (2, None)


def test_blocks_that_scores_did_not_choose_are_not_said_to_be_by_score():
    for attention, said in (("nsa-random", "not by score"), ("nsa-no-selection", "selected none,")):
        torch.manual_seed(0)
        m = DecoderLM(SMALL_MODEL, ATTENTIONS[attention].build)
        e = SelectionExplorer.of_model(m, "x" * 90)
        assert said in e.describe()
        assert e.sequence.by_score == [[False]]
        before = e.selected()
        e.n = 4  # nothing that another n could mean
        assert e.selected() == before


# --- in which order a query takes its blocks ---


SMALL = NSAConfig.small()  # l' = 8, n = 5: block 0 and the last two are forced
SIZES = dict(select_block_size=8, num_initial=1, num_local=2)
SCORES = [0.0, 1e-9, 2e-9, 0.1, 0.1 + 1e-7, 0.5, 1.0, 4.0, float("nan")]


def trace_of_scores(
    importance: torch.Tensor, ids: torch.Tensor, config: NSAConfig = SMALL
) -> Trace:
    """A trace of given importances (B, G, T, J) and ids (B, G, T, n); the rest is random."""
    random = made_trace(config, importance.shape[2])
    return replace(random, importance=importance, ids=ids)


def ranked(trace: Trace) -> Ranking:
    """The ranking of all blocks of a trace's first sequence."""
    queries, blocks = trace.importance.shape[2:]
    return rank_blocks(trace, 0, torch.arange(queries), blocks)


def decoded_scores(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What the browser makes of order and steps: the levels by id, and NaN's places."""
    flat = np.cumsum(-arrays["steps"].reshape(-1).astype(np.int64)) % 2**16
    levels = np.zeros(arrays["order"].shape, np.int64)
    order = arrays["order"].astype(np.int64)
    np.put_along_axis(levels, order, flat.reshape(order.shape), -1)
    return levels, levels == NAN


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([1, 7, 8, 9, 60, 90]).flatmap(
        lambda length: st.tuples(
            st.just(length),
            st.lists(st.sampled_from(SCORES), min_size=-(-length // 8), max_size=-(-length // 8)),
            st.integers(0, 3),
        )
    )
)
def test_for_every_n_a_query_takes_the_first_n_of_its_ranking(drawn):
    length, row, shift = drawn
    # Every query has the same few scores, turned from query to query: many ties, and NaN.
    importance = torch.stack([torch.tensor(row).roll(shift * t) for t in range(length)])
    importance = torch.stack([importance, importance.flip(-1)])[None]
    check_every_prefix(importance)


@pytest.mark.parametrize(
    "importance",
    [
        torch.rand(1, 2, 200, 25, generator=torch.Generator().manual_seed(0)),
        torch.rand(1, 2, 200, 25, generator=torch.Generator().manual_seed(1)).round(decimals=1),
        torch.full((1, 2, 200, 25), 0.25),
        torch.zeros(1, 2, 200, 25),
        torch.full((1, 2, 200, 25), torch.nan),
        torch.arange(25.0).expand(1, 2, 200, 25),
        -torch.arange(25.0).expand(1, 2, 200, 25),
        torch.tensor([0.5, torch.nan, torch.inf, 1e-30, 0.5]).repeat(5).expand(1, 2, 200, 25),
    ],
    ids=["random", "ties", "equal", "zero", "nan", "rising", "falling", "odd"],
)
def test_the_ranking_of_scores_that_are_hard_to_rank(importance):
    check_every_prefix(importance)


def check_every_prefix(importance: torch.Tensor) -> None:
    """Compare the ranking, its page and its sentence with choose_blocks, for every n."""
    ids = choose_blocks(importance, num_selected=SMALL.num_selected, **SIZES)
    sequence = TracedSequence(trace_of_scores(importance, ids))
    ranking = sequence.rankings[0][0]
    queries, blocks = importance.shape[2:]
    arrays = arrays_of(sequence)
    sent = torch.from_numpy(arrays["order"][0, 0].astype(np.int64))
    assert ranking.by_score and sequence.by_score == [[True]]
    assert sent.equal(ranking.order)
    assert ranking.order.sort(-1).values.equal(torch.arange(blocks).expand(2, queries, blocks))
    begun = torch.arange(queries) // 8 + 1
    assert arrays["begun"].tolist() == begun.tolist()
    for n in range(3, blocks + 2):
        chosen = choose_blocks(importance, num_selected=n, **SIZES)[0]
        first = sent[..., :n]
        first = first.where(torch.arange(first.shape[-1]) < begun[:, None], blocks)
        first = torch.nn.functional.pad(first, (0, n - first.shape[-1]), value=blocks)
        expected = chosen.long().where(chosen >= 0, blocks)
        assert first.sort(-1).values.equal(expected)
    for t in (0, queries // 2, queries - 1):
        forced = sequence.forced(t)
        assert ranking.forced[:, t].tolist() == [len(forced)] * 2
        assert ranking.order[0, t, : len(forced)].tolist() == forced


def test_blocks_chosen_by_another_rule_stand_in_front():
    importance = torch.rand(1, 2, 120, 15, generator=torch.Generator().manual_seed(0))
    other = choose_blocks(1 - importance, num_selected=5, **SIZES)  # the worst ones
    ranking = ranked(trace_of_scores(importance, other))
    assert not ranking.by_score
    for group in range(2):
        for t in range(120):
            ids = [j for j in other[0, group, t].tolist() if j >= 0]
            assert int(ranking.taken[group, t]) == len(ids)
            assert sorted(ranking.order[group, t, : len(ids)].tolist()) == ids


@pytest.mark.parametrize(
    "ids", [[-1] * 5, [0, 13, 14, -1, -1], [0, 1, 2, 3, 4]], ids=["none", "forced", "no local"]
)
def test_a_choice_that_is_not_full_is_not_said_to_be_by_score(ids):
    rows = torch.tensor(ids).expand(1, 2, 120, 5).int()
    legal = rows * 8 <= torch.arange(120)[:, None]
    trace = trace_of_scores(torch.ones(1, 2, 120, 15), rows.where(legal, -1).sort(-1).values)
    assert not ranked(trace).by_score


def test_a_tie_in_the_last_digits_goes_as_the_trace_chose():
    importance = torch.zeros(1, 2, 120, 15)
    importance[..., 4:8] = torch.tensor([0.5, 0.5 + 1e-6, 0.4, 0.3])
    rounded = importance.clone()
    rounded[..., 5] = 0.5  # as another computation of the same score may have it
    ids = choose_blocks(rounded, num_selected=4, **SIZES)
    config = NSAConfig.small(num_selected=4)
    ranking = ranked(trace_of_scores(importance, ids, config))
    assert ranking.by_score
    assert ranking.order[0, 119, :6].tolist() == [0, 13, 14, 4, 5, 6]


# --- what it sends ---


def test_a_score_that_is_no_number_is_marked():
    levels, scale = score_levels(torch.tensor([0.2, torch.nan, 0.4]), torch.tensor(0.4))
    assert levels.tolist() == [SCORE_LEVELS // 2, NAN, SCORE_LEVELS]
    assert float(scale) == pytest.approx(0.4)


@pytest.mark.parametrize("detail", [d for d in DETAILS if d.ranks is None])
def test_the_arrays_hold_the_trace(explorer, detail):
    s = explorer.sequence
    arrays = arrays_of(s, detail)
    levels, is_nan = decoded_scores(arrays)
    assert not is_nan.any()
    for layer, trace in enumerate(s.checkpoints[""]):
        for group in range(2):
            for t in range(s.queries):
                ids = [j for j in trace.ids[0, group, t].tolist() if j >= 0]
                at = 0, layer, group, t
                assert sorted(arrays["order"][at][: arrays["taken"][at]].tolist()) == ids
                forced = arrays["order"][at][: arrays["forced"][at]].tolist()
                assert forced == [j for j in ids if j in s.forced(t)]
        scale = arrays["score_scale"][0, layer, ..., None]
        scores = levels[0, layer] / detail.levels * scale
        error = 1 / detail.levels * float(scale.max())
        np.testing.assert_allclose(scores, trace.importance[0], atol=error)
        gates = trace.gates[0].unflatten(0, (2, 2))
        sent = arrays["gates"][0, layer] / GATE_LEVELS
        np.testing.assert_allclose(sent, gates, atol=0.51 / GATE_LEVELS)
        percent = arrays["gate_hundredths"][0, layer]
        np.testing.assert_allclose(percent / 100, gates.mean(1), atol=0.00501)
        if detail.p:
            p = arrays["p"][0, layer] / 255 * arrays["p_scale"][0, layer, ..., None]
            true = trace.probabilities[0]
            true = true.sum(1, keepdim=True) if detail.p == "group" else true
            np.testing.assert_allclose(p, true, atol=float(true.max()) / 255)
    assert ("p" in arrays) == bool(detail.p)
    assert ("beyond" in arrays) == detail.beyond


@pytest.mark.parametrize("length", [1, 5, 8, 9, 40, 90])
def test_what_a_query_sees_is_counted_block_by_block(length):
    c = SMALL
    answers = torch.tensor([t // 3 if t % 4 == 1 else -1 for t in range(length)])
    arrays = arrays_of(TracedSequence(made_trace(c, length), answer_at=answers))
    for t in range(length):
        ends = [i * c.stride + c.block_size - 1 for i in range(length)]
        assert arrays["seen"][t] == sum(end <= t for end in ends)
        assert arrays["begun"][t] == sum(j * c.select_block_size <= t for j in range(length))
        assert arrays["window_first"][t] == min(s for s in range(t + 1) if t - s < c.window)
        at = int(answers[t])
        assert arrays["answer_block"][t] == (at // c.select_block_size if at >= 0 else -1)


def test_gates_are_said_in_hundredths():
    assert words([41, 0, 100]) == ".41 .00 1.00"
    assert words([7, NO_GATE, 50]) == ".07 NaN .50"


def test_javascript_is_sent_no_size_that_it_could_apply_a_rule_with():
    """Another window, another split of the forced blocks: other arrays, and the same facts."""
    config = NSAConfig.small(block_size=4, stride=4)
    changed = replace(config, window=7, num_initial=2, num_local=1)
    facts = [facts_of(TracedSequence(made_trace(c, 90)), DETAILS[0]) for c in (config, changed)]
    assert facts[0] == facts[1]
    assert {name for name, fact in facts[0].items() if isinstance(fact, int)} == {
        "start",
        "queries",
        "length",
        "blocks",
        "ranks",
        "select_block_size",  # the width of a box
        "traced_n",
    }
    assert facts[0]["bars"] == {"first": 0.0, "step": 4}


def test_the_widget_sends_each_array_where_its_facts_say(explorer):
    raw = zlib.decompress(explorer.data)
    arrays = arrays_of(explorer.sequence)
    for name, fact in explorer.facts["arrays"].items():
        assert fact["begins"] % 8 == 0
        sent = np.frombuffer(raw, fact["type"], arrays[name].size, fact["begins"])
        if fact["type"] == "uint16":  # low bytes first, then high bytes
            low, high = sent.view(np.uint8).reshape(2, -1).astype(np.uint16)
            sent = low + 256 * high
        np.testing.assert_array_equal(sent.reshape(fact["shape"]), arrays[name])
    json.dumps(explorer.facts)


def test_the_cell_keeps_a_picture_and_the_sentence(explorer):
    data, _ = explorer._repr_mimebundle_()
    assert data["image/png"].startswith(b"\x89PNG")
    assert data["text/plain"] == explorer.describe()
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"]


def test_tokens_are_drawn_as_text_with_a_box_at_the_query(explorer):
    figure = draw_tokens(explorer.sequence, explorer.place, 30, columns=12)
    words = [text.get_text() for text in figure.axes[0].texts]
    assert "".join(words).startswith("deff(x):return")
    box = figure.axes[0].patches[-1]
    # Line 1 holds 10 signs, line 2 wraps after 12: token 30 is in "def f(x)" again, sign 2.
    assert box.get_xy() == (explorer.sequence.tokens[28:].index("e") + 0 + 1, 3)


def test_lines_end_where_the_text_does_and_words_keep_apart():
    assert lines_of(list("ab\ncdefg\n"), columns=4) == [range(3), range(3, 7), range(7, 9)]
    # Words of 2, 3 and 2 signs with a space behind each: two fit into 6 columns, or a clipped one.
    assert lines_of(["k1", "v10", "k2"], columns=6) == [range(2), range(2, 3)]
    assert lines_of(["a" * 50, "b", "c"], columns=6) == [range(1), range(1, 3)]
    assert visible("a\u202eb\u200bc d") == "a\u25a1b\u25a1c d"


def test_the_still_picture_shows_the_text_that_ends_with_the_query_s_line(explorer):
    sequence = explorer.sequence
    figure = draw_queries(sequence, explorer.place, [10, 30], shown=30)
    text = figure.axes[0]
    assert len(figure.axes) == 3
    assert [p.get_xy()[1] for p in text.patches][-1] <= 10
    lines = lines_of(sequence.tokens)
    own = next(i for i, line in enumerate(lines) if 30 in line)
    letters = [t.get_text() for t in text.texts]
    shown = [sequence.tokens[s].strip() for line in lines[: own + 1][-10:] for s in line]
    assert "".join(letters).startswith("".join(shown)[:20])
    assert "query 30" in text.get_title()


# --- what it missed, which queries and how many blocks are sent ---


def test_the_mass_beyond_the_window_is_that_of_a_loop_over_tokens(explorer):
    s = explorer.sequence
    c = s.config
    for layer, trace in enumerate(s.checkpoints[""]):
        q = trace.q[0].double()
        k = trace.k[0].double()
        for t in (0, 15, 16, 60, 111):
            for group in range(c.kv_heads):
                mass = torch.zeros(s.blocks, dtype=torch.float64)
                heads = range(group * c.group_size, (group + 1) * c.group_size)
                for head in heads:
                    logits = (k[group, : t + 1] @ q[head, t] / math.sqrt(16)).tolist()
                    e = [math.exp(logit) for logit in logits]
                    for x in range(t + 1 - c.window):
                        mass[x // c.select_block_size] += e[x] / sum(e) / len(heads)
                known = s.beyond[0][layer][group, t]
                torch.testing.assert_close(known.double(), mass, atol=1e-6, rtol=1e-4)
                place = explorer.place._replace(layer=layer, group=group)
                left = [j for j in range(s.blocks) if j not in s.selected(place, t)]
                assert s.missed(place, t) == pytest.approx(float(mass[left].sum()), abs=1e-6)


def test_the_mass_in_chunks_is_that_in_one_piece(explorer, monkeypatch):
    s = explorer.sequence
    trace = s.checkpoints[""][0]
    whole = beyond_module.mass_beyond(trace, 0, s.positions)
    monkeypatch.setattr(beyond_module, "AT_ONCE", 3 * 4 * 112)  # three queries at once
    torch.testing.assert_close(beyond_module.mass_beyond(trace, 0, s.positions), whole)


def test_a_trace_without_keys_says_nothing_of_what_was_missed():
    s = TracedSequence(made_trace(SMALL, 90))
    assert s.beyond is None and s.missed(Place(0, 0, 0, 5), 80) is None
    assert not any("beyond" in name for name in arrays_of(s))


def test_steps_of_a_mass_keep_its_sum():
    mass = torch.tensor([[0.5] + [0.5 / 4000] * 4000, [0.0] * 4001])  # half of it in dust
    levels, scale = bytes_that_add_up(mass)
    assert scale.tolist() == [0.5, 0.0]
    sums = (levels / 255 * scale[:, None]).sum(-1)
    np.testing.assert_allclose(sums, [1.0, 0.0], atol=1 / 255)
    again, _ = bytes_that_add_up(torch.from_numpy(levels / 255 * scale[:, None]))
    np.testing.assert_array_equal(again, levels)


def test_some_queries_are_the_rows_of_all(explorer):
    s = explorer.sequence
    positions = [3, 50, 51, 111]
    some = s.only(positions)
    place = explorer.place._replace(layer=1, group=1)
    assert some.queries == 4 and some.length == 112 and some.tokens == s.tokens
    for t in positions:
        assert some.selected(place, t) == s.selected(place, t)
        assert some.describe(place, t) == s.describe(place, t)
        assert some.missed(place, t) == pytest.approx(s.missed(place, t), abs=1e-6)
    assert some.overlap(place, 51) == s.overlap(place, 51)
    assert some.before(111) == 51 and some.before(3) is None
    sent = arrays_of(some)
    everything = arrays_of(s)
    levels, _ = decoded_scores(sent)
    all_levels, _ = decoded_scores(everything)
    np.testing.assert_array_equal(levels, all_levels[..., positions, :])
    for name in ("positions", "begun", "seen", "window_first", "answer_block", "answer_at"):
        np.testing.assert_array_equal(sent[name], everything[name][positions])
    for name in ("order", "taken", "forced", "gate_hundredths"):
        rows = everything[name].take(positions, axis=3)
        np.testing.assert_array_equal(sent[name], rows, err_msg=name)
    np.testing.assert_allclose(sent["beyond_scale"], everything["beyond_scale"][..., positions])


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([], r"positions = \[\]: must name at least one query"),
        ([5, 5], r"positions\[1\] = 5: must be larger than the one before"),
        ([5, 200], "positions = 200: is no query that the traces hold"),
    ],
)
def test_queries_that_are_not_there_are_refused(explorer, positions, message):
    with pytest.raises(ValueError, match=message):
        explorer.sequence.only(positions)


def test_only_traced_queries_can_be_looked_at(explorer):
    e = SelectionExplorer(explorer.sequence.only([50, 60, 70]))
    assert e.query == 70 and e.facts["ranges"]["query"] == (50, 70)
    e.query = 60
    with pytest.raises(ValueError, match=r"t = 61: the traces hold 3 of the queries 50 \.\. 70"):
        e.query = 61


@pytest.mark.parametrize("ranks", [6, 9, 14])
def test_fewer_ranks_are_the_front_of_all(explorer, ranks):
    s = explorer.sequence
    detail = Detail("", ranks=ranks, beyond=False)
    cut = arrays_of(s, detail)
    whole = arrays_of(s, Detail("", beyond=False))
    assert cut["order"].shape[-1] == ranks and whole["order"].shape[-1] == 14
    np.testing.assert_array_equal(cut["order"], whole["order"][..., :ranks])
    levels = np.cumsum(-cut["steps"].reshape(-1).astype(np.int64)) % 2**16
    by_rank = np.cumsum(-whole["steps"].reshape(-1).astype(np.int64)) % 2**16
    np.testing.assert_array_equal(
        levels.reshape(cut["order"].shape), by_rank.reshape(whole["order"].shape)[..., :ranks]
    )
    facts = facts_of(s, detail)
    assert facts["ranks"] == ranks and facts["ranges"]["n"] == (3, ranks)
    said = f"Of each query's 14 blocks the {ranks} best are here." in facts["about"]
    assert said == (ranks < 14)


def test_what_is_taken_is_sent_however_few_ranks_are_asked_for(explorer):
    arrays = arrays_of(explorer.sequence, Detail("", ranks=0))
    assert arrays["order"].shape[-1] == 6  # n = 5, and one more for the margin


def test_it_is_said_what_was_left_out(explorer):
    s = TracedSequence(explorer.sequence.checkpoints)
    s.about = "A run."
    assert facts_of(s, DETAILS[0])["about"] == "A run."
    told = facts_of(s, Detail("", levels=100, beyond=False))["about"]
    assert told == (
        "A run. The compressed scores (Eq. 8) are left out, to keep this small. Importances are "
        "rounded to 12 bits. What dense attention weighs is left out."
    )
    assert "sum over its heads" in facts_of(s, Detail("group"))["about"]


# --- one file for a page, one for a recording ---


PAPER = NSAConfig(dim=64, heads=8, kv_heads=2, head_dim=16, value_dim=16)  # l' = 64, n = 16


@pytest.fixture(scope="module")
def long_page(tmp_path_factory):
    layers = [made_trace(PAPER, 4096, seed) for seed in (0, 1)]
    path = tmp_path_factory.mktemp("page") / "long.html"
    return SelectionExplorer(layers, "x = (1)\n" * 512).save_html(path)


def test_a_page_of_4096_tokens_two_layers_and_two_groups_stays_below_2_mb(long_page):
    assert long_page.stat().st_size < 2_000_000


def test_65536_tokens_fit_a_page():
    """One layer, one group: random importances of 1,024 blocks for 65,536 queries, n = 16."""
    length = 65_536
    config = replace(PAPER, kv_heads=1)
    rng = torch.Generator().manual_seed(0)
    own = torch.arange(length)[:, None] // 64
    score = torch.rand(1, 1, length, 1024, generator=rng)
    back = torch.arange(15, -1, -1)  # the newest 16 blocks, so nothing has to be sorted here
    ids = (own - back).where(own >= back, -1).int()[None, None]
    nothing = torch.zeros(()).expand(1, 1, 8, length, 4095)
    gates = torch.rand(1, 8, length, 3, generator=rng)
    sequence = TracedSequence(Trace(config, 0, ids, nothing, score, gates, {}))
    assert sequence.ranks == 64
    tracemalloc.start()  # NumPy's and Python's memory
    facts, data = packed_within(sequence, 5_500_000)  # of 8 MB: a quarter is base64's, and tokens
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data) <= 5_500_000 and peak < 300_000_000
    assert facts["ranks"] >= 17 and facts["ranges"]["n"][1] == facts["ranks"]
    assert f"Of each query's 1,024 blocks the {facts['ranks']} best are here." in facts["about"]
    assert "The compressed scores (Eq. 8) are left out" in facts["about"]
    levels, _ = decoded_scores_of(data, facts)
    at = 65_535
    order = sequence.rankings[0][0].order[0, at, : facts["ranks"]]
    known = score[0, 0, at, order] / score[0, 0, at].max() * facts["levels"]["scores"]
    np.testing.assert_allclose(levels[at], known, atol=0.51)


def decoded_scores_of(data: bytes, facts: dict) -> tuple[np.ndarray, np.ndarray]:
    """The levels (Q, ranks), best first, of packed arrays of one layer and group."""
    raw = zlib.decompress(data)
    place = facts["arrays"]["steps"]
    count = math.prod(place["shape"])
    low, high = np.frombuffer(raw, np.uint8, 2 * count, place["begins"]).reshape(2, -1)
    steps = low.astype(np.int64) + 256 * high.astype(np.int64)
    levels = np.cumsum(-steps) % 2**16
    return levels.reshape(place["shape"][3:]), levels == NAN


def test_what_a_page_may_take_grows_with_its_tokens():
    limits = [page_limit(length) for length in (1, 4096, 8192, 16_384, 65_536)]
    assert limits == [2_000_000, 2_000_000, 4_000_000, 8_000_000, 8_000_000]


def test_a_page_says_when_it_would_be_too_large(tmp_path, explorer, monkeypatch):
    monkeypatch.setattr(page_module, "page_limit", lambda length: 60_000)
    with pytest.raises(ValueError, match="the page = .* bytes.*pass fewer checkpoints or"):
        explorer.save_html(tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_page_asks_for_nothing_and_runs_no_token(tmp_path, model):
    evil = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&", "\u2028"]
    tokens = torch.randint(256, (1, 40))
    traces = model(tokens, return_traces=True)[1]
    e = SelectionExplorer(traces, evil * 10)
    page = e.save_html(tmp_path / "page.html", title="</title><b>x").read_text("utf-8")
    assert not re.search(r"https?://|//cdn|\bimport\b\s*[({'\"]|\bfetch\(", page)
    assert "<img src=x" not in page and "alert(1)</script>" not in page and "<b>x" not in page
    facts = re.search(r'id="facts">(.*?)</script>', page, re.S)[1]
    assert json.loads(facts)["tokens"] == evil * 10
    data = base64.b64decode(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data == packed(arrays_of(e.sequence))


def test_a_recording_keeps_every_choice(tmp_path, explorer):
    s = explorer.sequence
    answers = torch.full((s.queries,), -1)
    answers[60] = 3
    layers = s.checkpoints[""]
    s = TracedSequence({"step 0": layers, "step 9": layers}, s.tokens, answers)
    save_traces(tmp_path / "run.npz", s, {"command": "by hand"})
    again, about = load_traces(tmp_path / "run.npz")
    assert about == {"command": "by hand"} and again.tokens == s.tokens
    assert again.answer_at.equal(answers) and list(again.checkpoints) == ["step 0", "step 9"]
    for label, layers in s.checkpoints.items():
        for old, new in zip(layers, again.checkpoints[label], strict=True):
            assert new.config == old.config
            assert new.ids.equal(old.ids) and new.importance.equal(old.importance)
            torch.testing.assert_close(new.gates, old.gates, atol=1e-3, rtol=0)
            step = old.probabilities.amax(-1, keepdim=True) / 63
            assert ((new.probabilities - old.probabilities).abs() <= 0.51 * step).all()
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="other.npz: holds no 'nsa_lite traces 3'"):
        load_traces(tmp_path / "other.npz")


def test_a_recording_of_some_queries_and_of_the_best_blocks_is_the_same_again(tmp_path, explorer):
    some = explorer.sequence.only([20, 60, 111])
    kept = some.kept._replace(ranks=7, about="Three queries.")
    layers = some.checkpoints[""]
    wider = [replace(x, ids=torch.nn.functional.pad(x.ids, (0, 2), value=-1)) for x in layers]
    s = TracedSequence({"a": layers, "b": wider}, some.tokens, kept=kept)
    save_traces(tmp_path / "some.npz", s)
    again, _ = load_traces(tmp_path / "some.npz")
    assert again.ranks == s.ranks == 7 and again.about == "Three queries."
    assert again.positions.equal(s.positions) and again.length == 112
    before, after = (arrays_of(x, Detail("")) for x in (s, again))
    for name in before:
        if name not in ("gates", "gate_hundredths"):  # they are float16 in a file
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    place = explorer.place._replace(layer=1)
    for t in (20, 60, 111):
        assert again.selected(place, t) == explorer.sequence.selected(place, t)
        exact = explorer.sequence.missed(place, t)
        assert again.missed(place, t) == pytest.approx(exact, abs=0.02)


def test_a_recording_without_compressed_scores_says_so(tmp_path, explorer):
    layers = explorer.sequence.checkpoints[""]
    bare = [replace(x, probabilities=x.probabilities[..., :0]) for x in layers]
    save_traces(tmp_path / "bare.npz", TracedSequence(bare))
    again, _ = load_traces(tmp_path / "bare.npz")
    facts = facts_of(again, DETAILS[0])
    assert facts["about"] == "The compressed scores (Eq. 8) are left out, to keep this small."
    assert "p" not in arrays_of(again)
    short = TracedSequence(made_trace(SMALL, 5))  # no compressed block ends in it
    assert facts_of(short, DETAILS[0])["about"] == ""


def test_the_recorded_runs_say_how_they_were_made_and_are_small():
    for task, checkpoints in (("recall", 9), ("haystack", 3)):
        path = ROOT / f"notebooks/recorded/selection_{task}.npz"
        sequence, about = load_traces(path)
        assert about["command"] == f"python -m nsa_lite.lab.experiments selection_{task}"
        assert about["made"]["under"]  # commit, versions, machine
        assert len(sequence.checkpoints) == checkpoints and sequence.about
        assert sequence.beyond is not None
        assert path.stat().st_size < 300_000


# --- odd sequences and bad input ---


@pytest.mark.parametrize("text", ["x", "x = 1", "x" * 8, "x" * 9])
def test_short_sequences(model, text, tmp_path):
    e = SelectionExplorer.of_model(model, text)
    assert e.selected() == list(range(-(-len(text) // 8)))
    assert e.picture().startswith(b"\x89PNG")
    assert e.save_html(tmp_path / "page.html").exists()


def test_nan_scores_and_gates_are_pictured(model, tmp_path):
    trace = model(torch.randint(256, (1, 64)), return_traces=True)[1][0]
    importance = trace.importance.clone()
    importance[..., 3] = torch.nan
    gates = trace.gates.clone()
    gates[..., 1] = torch.nan
    ids = choose_blocks(importance, select_block_size=8, num_selected=5)
    e = SelectionExplorer(replace(trace, importance=importance, gates=gates, ids=ids))
    assert e.sequence.by_score == [[True]] and 3 not in e.selected(63)
    assert re.search(r"gates \.\d\d NaN \.\d\d$", e.describe())
    assert e.picture().startswith(b"\x89PNG")
    assert e.save_html(tmp_path / "page.html").exists()


def test_a_trace_of_a_decoding_step(model):
    caches = model.new_caches(1, 51)
    model(torch.randint(256, (1, 50)), caches)
    trace = model(torch.randint(256, (1, 1)), caches, return_traces=True)[1]
    e = SelectionExplorer(trace, "a" * 51)
    assert e.query == 50 and e.describe().startswith("query 50: ")
    with pytest.raises(ValueError, match=r"t = 49: the traces hold queries 50 \.\. 50"):
        e.describe(49)


CALLS = [
    (dict(traces=[]), ValueError, r"traces = \[\]: must hold at least one Trace; a model leaves"),
    (dict(traces={}), ValueError, r"traces = {}: must hold at least one checkpoint"),
    (dict(traces="trace"), TypeError, "traces: must be a Trace or a list of them.*got str"),
    (dict(traces={"a": 3}), TypeError, r"traces\['a'\]: must be a Trace.*got int"),
    (dict(tokens="ab"), ValueError, "tokens = 2 of them: must be one for each of the 112"),
    (dict(tokens=[1] * 112), TypeError, "tokens: must be a string, bytes or one string a"),
    (dict(row=1), ValueError, r"row = 1: the traces hold rows 0 \.\. 0"),
    (dict(row=True), TypeError, "row = True: must be an int"),
    (dict(answer_at=torch.zeros(3)), ValueError, r"answer_at.shape = \(3,\): must be \(Q,\)"),
    (dict(answer_at=torch.full((112,), 9)), ValueError, "answer_at of query 0 = 9: must be -1"),
]


@pytest.mark.parametrize(("change", "error", "message"), CALLS)
def test_bad_arguments_are_named(explorer, change, error, message):
    good = dict(traces=explorer.sequence.checkpoints)
    with pytest.raises(error, match=message):
        SelectionExplorer(**{**good, **change})


def test_traces_that_do_not_belong_together_are_refused(explorer):
    layers = explorer.sequence.checkpoints[""]
    other = made_trace(NSAConfig.small(), 40)
    with pytest.raises(ValueError, match=r"layer 1 of traces\[''\] = .*must be those of the first"):
        SelectionExplorer([layers[0], other])
    with pytest.raises(ValueError, match=r"traces\['b'\] = 1 layers: must have 2, as the first"):
        SelectionExplorer({"a": layers, "b": layers[:1]})


def test_a_dense_model_and_an_empty_text_are_refused(model):
    dense = DecoderLM(SMALL_MODEL, ATTENTIONS["dense"].build)
    with pytest.raises(ValueError, match="a model leaves none when its attention is dense"):
        SelectionExplorer.of_model(dense, "abc")
    with pytest.raises(ValueError, match="text = b?'': must hold at least one byte"):
        SelectionExplorer.of_model(model, "")
    with pytest.raises(TypeError, match="model: must be a DecoderLM, got NoneType"):
        SelectionExplorer.of_model(None, "abc")
    with pytest.raises(TypeError, match="text: must be a string, bytes or a tensor of tokens, got"):
        SelectionExplorer.of_model(model, [1, 2])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query", 112),
        ("query", -1),
        ("layer", 2),
        ("group", 2),
        ("checkpoint", 1),
        ("n", 2),
        ("n", 15),
    ],
)
def test_a_choice_out_of_range_is_refused_and_changes_nothing(explorer, name, value):
    before = getattr(explorer, name)
    with pytest.raises(ValueError, match=rf"{name} = {value}: must lie in \d+ \.\. \d+"):
        setattr(explorer, name, value)
    assert getattr(explorer, name) == before


# --- the package ---


def test_an_installed_wheel_holds_the_javascript(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("nsa_lite", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "."]
    subprocess.run(build, cwd=tmp_path, check=True, timeout=120)
    names = zipfile.ZipFile(next(tmp_path.glob("nsa_lite-*.whl"))).namelist()
    files = [f"js/{part}.js" for part in PARTS] + ["explorer.css"]
    assert {f"nsa_lite/show/explorer/{file}" for file in files} <= set(names)


def test_only_the_explorer_needs_anywidget():
    code = (
        "import sys; sys.modules['anywidget'] = None; import nsa_lite\n"
        "try: import nsa_lite.show.explorer\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("nsa_lite.show.explorer needs the package anywidget")
