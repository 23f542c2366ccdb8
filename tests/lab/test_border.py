"""What the border experiment recorded, told by hand-made evaluations."""

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from nsa_lite.lab.border_runs import (
    SIZES,
    SPANS,
    Arm,
    arms,
    at_the_end,
    border_table,
    chance,
    few_runs,
    grid_table,
    label,
    mean,
    results,
    started,
)
from nsa_lite.lab.runs import recorded
from nsa_lite.show import border
from nsa_lite.show.border import draw_border, draw_over_steps


def evaluations(*accuracies):
    return [
        {"step": 50 * (i + 1), "test_accuracy": a, "hit_rate": a / 2}
        for i, a in enumerate(accuracies)
    ]


ARM = Arm(4, 1)
SEEDS = [evaluations(0.1, 0.6, 1.0), evaluations(0.1, 0.7, 0.4), evaluations(0.4, 0.2)]
RECORD = {"runs": {f"{ARM.name}-seed{i}": {"evaluations": e} for i, e in enumerate(SEEDS)}}


def test_seeds_are_gathered_by_arm_and_missing_ones_left_out():
    found = results(RECORD)
    assert list(found) == [ARM]
    assert [len(seed) for seed in found[ARM]] == [3, 3, 2]


def test_what_the_small_runs_record_is_found_too():
    runs = {run.name: {"evaluations": evaluations(0.5)} for run in few_runs()}
    found = results({"runs": runs})
    assert sum(len(seeds) for seeds in found.values()) == len(runs) == 5 * (3 * 3 + 7)
    assert {len(seeds) for seeds in found.values()} == {5}


def test_the_table_says_the_spread_the_peak_and_how_many_started():
    heading, line = border_table(results(RECORD)).splitlines()
    assert heading.split() == ["arm", "accuracy", "peak", "hits", "started", "at", "step"]
    # At the end 1, .4, .2; the best on the way 1, .7, .4; one hits half, at step 150.
    assert line.removeprefix(label(ARM)).split() == [
        "0.53", "(0.20", "to", "1.00)", "0.70", "0.27", "1", "of", "3", "150", "to", "150",
    ]  # fmt: skip


def test_a_choice_starts_where_it_hits_and_not_where_it_answers():
    assert started(evaluations(0.6, 0.9)) is None  # hits .3 and .45
    assert started(evaluations(0.6, 1.0, 0.2)) == 100
    read_out = [{"step": 50, "test_accuracy": 0.9, "hit_rate": 0.0}]
    assert started(read_out) is None
    dense = [{"step": 50, "test_accuracy": 0.4}, {"step": 100, "test_accuracy": 0.5}]
    assert started(dense) == 100


def test_where_nothing_starts_or_is_selected_the_table_has_a_dash():
    dense = [{"step": 50, "test_accuracy": 0.1}]
    line = border_table({Arm(attention="dense"): [dense]}).splitlines()[1]
    assert line.split()[-5:] == ["-", "0", "of", "1", "-"]


def test_the_grid_has_a_line_an_l_and_leaves_other_arms_out():
    found = {
        Arm(16, 4): [evaluations(0.3), evaluations(0.9)],
        Arm(4, 2): [evaluations(0.25)],
        Arm(4, 4, phi="mlp"): [evaluations(1.0)],
        Arm(4, 8, attention="nsa-kl"): [evaluations(1.0)],
    }
    heading, *lines = grid_table(found).splitlines()
    assert heading.split() == ["span", "2", "span", "4"]
    assert lines[0].split() == ["l", "4", "0.25", "to", "0.25", "-"]
    assert lines[1].split() == ["l", "16", "-", "0.30", "to", "0.90"]
    assert grid_table(found, "hit_rate").splitlines()[2].split()[-1] == "0.45"


def test_the_grid_is_of_one_attention_and_any_axis():
    found = {
        Arm(4, 2): [evaluations(0.25)],
        Arm(4, 4, facts=2): [evaluations(0.4)],  # another span than is usual
        Arm(4, facts=2): [evaluations(0.5)],
        Arm(8, facts=4): [evaluations(0.6)],
        Arm(8, 1, attention="nsa-kl"): [evaluations(1.0)],
    }
    heading, *lines = grid_table(found, axis="facts").splitlines()
    assert heading.split() == ["anywhere", "facts", "2", "facts", "4"]
    assert lines[0].split() == ["l", "4", "0.25", "to", "0.25", "0.50", "to", "0.50", "-"]
    assert lines[1].split() == ["l", "8", "-", "-", "0.60", "to", "0.60"]
    heading, line = grid_table(found, attention="nsa-kl").splitlines()
    assert (heading.split(), line.split()) == (["span", "1"], ["l", "8", "1.00", "to", "1.00"])


def test_a_label_says_what_is_not_as_usual_and_no_two_arms_share_one():
    assert label(Arm(8, 4)) == "nsa l 8 span 4"
    assert label(Arm(phi="mean", lr=1e-3)) == "nsa l 8 span 2, phi mean, lr 0.001"
    assert label(Arm(16, first_size=4)) == "nsa l 16 span 2, l 4 first"
    every = list(arms())
    assert len({label(arm) for arm in every}) == len(every) == 91


@pytest.mark.parametrize(("arm", "expected"), [(Arm(), 13 / 61), (Arm(32, 4), 5 / 29)])
def test_chance_is_the_share_of_free_blocks_that_are_chosen(arm, expected):
    assert chance(arm) == pytest.approx(expected)


def drawn():
    hits = {1: {4: [0.9, 0.2], 16: [0.2, 0.2]}, 8: {4: [1.0, 1.0], 16: [0.3, 0.9]}}
    starts = {"nsa": [100, None, None], "nsa-kl": [50, 60, 70]}
    answers = {1: {4: [0.1, 0.0], 16: [0.0, 0.1]}, 8: {4: [0.8, 1.0], 16: [0.5, 0.7]}}
    return hits, answers, draw_border(hits, answers, {4: 0.21, 16: 0.17}, starts, 600)


def test_the_picture_shows_every_seed_and_each_spans_mean():
    hits, answers, figure = drawn()
    above, _, below = figure.axes
    for points, ax, ends in ((hits, above, [1.0, 0.6]), (answers, below, [0.9, 0.6])):
        dots = [line for line in ax.get_lines() if line.get_alpha() == 0.4]
        assert sorted(y for line in dots for y in line.get_ydata()) == sorted(
            value for by_size in points.values() for values in by_size.values() for value in values
        )
        means = {line.get_label(): line for line in ax.get_lines() if line.get_alpha() is None}
        assert means["span 8"].get_ydata() == pytest.approx(ends)
    named = [text.get_text() for text in below.get_legend().get_texts()]
    assert named == ["span 1", "span 8"]
    assert any(list(line.get_ydata()) == [0.21, 0.17] for line in above.get_lines())
    plt.close(figure)


def test_the_picture_says_how_many_seeds_never_started():
    *_, figure = drawn()
    right = figure.axes[1]
    assert [text.get_text() for text in right.texts] == ["2 never"]
    assert [text.get_text() for text in right.get_yticklabels()] == ["nsa", "nsa-kl"]
    found = [list(line.get_xdata()) for line in right.get_lines() if line.get_marker() == "o"]
    assert found == [[100], [50, 60, 70]]
    plt.close(figure)


def test_no_two_spans_look_alike_even_without_colour():
    looks = [(line.dashes, line.marker) for line in border.SPANS.values()]
    assert len({dashes for dashes, _ in looks}) == len({marker for _, marker in looks}) == 4
    assert len({line.colour for line in border.SPANS.values()}) == 4


def test_over_the_steps_a_band_reaches_from_the_lowest_to_the_highest_seed():
    runs = {"quick": SEEDS, "slow": [evaluations(0.1, 0.1, 0.3)]}
    figure = draw_over_steps({"one": runs, "two": {"quick": SEEDS}}, {"two": 75})
    first, second = figure.axes
    quick, slow = first.get_lines()
    assert list(quick.get_ydata()) == pytest.approx([0.2, 0.5, 1.6 / 3])  # the last seed keeps .2
    assert (quick.get_label(), slow.get_label()) == ("quick", "slow")
    band = first.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.1, 1.0)
    assert not first.texts
    assert [text.get_text() for text in second.texts] == ["the teacher stops"]
    plt.close(figure)


def test_the_readme_says_where_the_choice_starts():
    found = results(recorded("border"))
    grid = [(size, span) for size in SIZES for span in SPANS]

    def ends(attention, key, where):
        return mean(at_the_end(found[Arm(*where, attention=attention)], key))

    leaves = {x for x in grid if ends("nsa", "hit_rate", x) > 2 * chance(Arm(*x))}
    answers = {x for x in grid if ends("nsa-no-selection", "test_accuracy", x) > 0.5}
    assert leaves == answers and len(leaves) == 10
    for where in set(grid) - leaves:  # nothing lies between
        assert ends("nsa", "hit_rate", where) < 1.2 * chance(Arm(*where))
        assert ends("nsa-no-selection", "test_accuracy", where) < 0.1
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text("utf-8").split())
    told = "NSA's hits leave chance in the same ten in which a layer without selection answers"
    assert told in readme
