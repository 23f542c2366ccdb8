"""What the border experiment recorded, told by hand-made evaluations."""

import matplotlib.pyplot as plt

from nsa_lite.lab.border_runs import Arm, border_table, results
from nsa_lite.show.border import draw_border


def evaluations(*accuracies):
    return [
        {"step": 50 * (i + 1), "test_accuracy": a, "hit_rate": a / 2}
        for i, a in enumerate(accuracies)
    ]


ARM = Arm(4, 1)
RECORD = {
    "runs": {
        f"{ARM.name}-seed0": {"evaluations": evaluations(0.1, 0.6, 1.0)},
        f"{ARM.name}-seed1": {"evaluations": evaluations(0.1, 0.2, 0.4)},
        f"{ARM.name}-seed2": {"evaluations": evaluations(0.9)},
    }
}


def test_seeds_are_gathered_by_arm_and_missing_ones_left_out():
    found = results(RECORD)
    assert list(found) == [ARM]
    assert [len(seed) for seed in found[ARM]] == [3, 3, 1]


def test_the_table_counts_the_seeds_that_started():
    heading, line = border_table(results(RECORD)).splitlines()
    assert heading.split() == ["arm", "started", "at", "step", "accuracy", "hit", "rate"]
    assert line.split() == [ARM.name, "2", "of", "3", "50", "to", "100", "0.77", "0.38"]
    never = {"runs": {f"{ARM.name}-seed0": {"evaluations": evaluations(0.1)}}}
    assert border_table(results(never)).splitlines()[1].split()[1:5] == ["0", "of", "1", "-"]


def test_the_picture_shows_every_seed_and_those_that_never_started():
    hits = {1: {4: [0.9, 0.2], 16: [0.2, 0.2]}, 2: {4: [1.0, 1.0], 16: [0.3, 0.9]}}
    figure = draw_border(hits, 0.21, {"nsa": [100, None, None], "nsa-kl": [50, 60, 70]}, 1500)
    left, right = figure.axes
    dots = [line for line in left.get_lines() if line.get_alpha() == 0.4]
    assert sorted(y for line in dots for y in line.get_ydata()) == sorted(
        value for by_size in hits.values() for values in by_size.values() for value in values
    )
    assert [t.get_text() for t in right.texts] == ["2 of 3"]
    assert [t.get_text() for t in right.get_yticklabels()] == ["nsa", "nsa-kl"]
    plt.close(figure)
