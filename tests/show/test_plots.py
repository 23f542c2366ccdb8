"""The course's pictures draw without a screen, say what is right, and never by colour alone."""

import inspect

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from nsa_lite import NSAConfig, choose_blocks  # noqa: E402
from nsa_lite.rivals.attentions import ATTENTIONS  # noqa: E402
from nsa_lite.rivals.budgets import NEIGHBOURS, TRAINED  # noqa: E402
from nsa_lite.show import curves, plots  # noqa: E402

CONFIG = NSAConfig.small(block_size=4, stride=2, select_block_size=4, num_selected=4, window=6)
IDS = choose_blocks(torch.zeros(1, 1, 26, 7), select_block_size=4, num_selected=4)
BANDS = {
    "window": torch.ones(9, 9, dtype=torch.bool).tril().triu(-2),
    "selected": torch.eye(9, dtype=torch.bool),
}
LOG = [{"step": s, "test_loss": 2 / s, "test_accuracy": s / 9, "hit_rate": 0.5} for s in (1, 5, 9)]
TEXT_LOG = [{"step": s, "test_loss": 2 / s, "bits_per_byte": 3 / s} for s in (1, 5, 9)]
POINT = {
    "settings": {"num_selected": 6},
    "read_by_head": 9,
    "read_by_group": 12,
    "kept": 40,
    "score": 0.5,
    "low": 0.4,
    "high": 0.7,
}
DRAWINGS = {
    "draw_course_map": [(), ("selected",)],
    "draw_sweep": [
        ({"dense": [POINT], "nsa": [POINT, POINT]}, "accuracy", {"nsa": 6}),
        ({"H2O": [POINT]}, "bits per byte"),
    ],
    "draw_query_reads": [(CONFIG, IDS[0, 0, 25], 25), (CONFIG, IDS[0, 0, 0], 0)],
    "draw_block_map": [(CONFIG, IDS[0, 0]), (CONFIG, IDS[0, 0].repeat(20, 1), "a title")],
    "draw_scores": [(torch.randn(5, 7),), (torch.full((3, 3), torch.nan).fill_diagonal_(1.0),)],
    "draw_read_map": [(BANDS,)],
    "draw_curves": [
        ({"nsa-seed0": LOG, "dense": LOG[:1], "window-seed3": []},),
        ({"nsa": TEXT_LOG},),
    ],
    "draw_seeds": [({"nsa": [LOG, LOG[:2]], "nsa-kl": [LOG[:1], LOG]}, "hit_rate")],
}


# What the drawings are made with, and what no reader calls alone.
PARTS = {"draw_run", "draw_band", "draw_system"}


def drawing(name):
    return getattr(plots, name, None) or getattr(curves, name)


@pytest.fixture(autouse=True)
def fresh_style():
    with matplotlib.rc_context():
        plots.use_style()
        yield
    plt.close("all")


@pytest.mark.parametrize("name", DRAWINGS)
def test_each_picture_draws(name, tmp_path):
    for arguments in DRAWINGS[name]:
        drawing(name)(*arguments).savefig(tmp_path / "picture.png")
        assert plt.imread(tmp_path / "picture.png")[..., :3].std() > 0.01  # not blank


def test_scores_draw_with_numbers_borders_and_differences(tmp_path):
    figure = plots.draw_scores(torch.randn(4, 6), every=2, numbers=True, difference=True)
    figure.savefig(tmp_path / "picture.png")
    low, high = figure.axes[0].images[0].get_clim()
    assert low == -high
    assert len(figure.axes[0].texts) == 24


def test_every_picture_of_the_module_is_drawn_here():
    found = {
        name
        for module in (plots, curves)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if name.startswith("draw_")
    }
    assert found - PARTS == set(DRAWINGS)


def test_seeds_are_a_mean_and_a_band_and_a_solved_run_keeps_its_last_value():
    high = [{**r, "hit_rate": 1.0} for r in LOG[:1]]
    figure = curves.draw_seeds({"nsa": [LOG], "nsa-kl": [LOG, high]}, "hit_rate")
    line = figure.axes[0].get_lines()[1]
    assert line.get_xdata().tolist() == [1, 5, 9]
    assert line.get_ydata().tolist() == [0.75, 0.75, 0.75]
    band = figure.axes[0].collections[1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.5, 1.0)


def test_block_kinds_by_hand():
    # l' = 4, one initial and two local: query 13 owns block 3; forced 0, 2, 3; 1 is chosen.
    # Query 14 leaves a place free (block 1 unused); block 4 has begun for neither.
    config = NSAConfig.small(block_size=4, stride=2, select_block_size=4, num_selected=4)
    ids = torch.tensor([[0, 1, 2, 3], [0, 2, 3, -1]] + [[0, 1, 3, 4]] * 2)[None, None]
    kinds = plots.block_kinds(config, ids, start=13)
    assert kinds[0, 0, 0].tolist() == ["forced", "selected", "forced", "forced", "masked"]
    assert kinds[0, 0, 1].tolist() == ["forced", "unused", "forced", "forced", "masked"]
    assert kinds[0, 0, 3].tolist() == ["forced", "selected", "unused", "forced", "forced"]


def test_a_query_reads_what_its_strips_show():
    figure = plots.draw_query_reads(CONFIG, IDS[0, 0, 25], 25)
    compressed, selected, window = (
        [(p.get_x(), p.get_width()) for p in ax.patches if p.get_width()] for ax in figure.axes
    )
    assert compressed == [(2 * i, 4) for i in range(12)]  # the last of them ends at token 25
    assert selected == [(4 * j, 4) for j in range(6)] + [(24, 2)]  # block 6 holds 24 and 25
    assert window == [(0, 20), (20, 6)]  # unused, then the last 6 keys


def test_no_kind_of_block_is_told_by_colour_alone():
    marked = set(plots.COLOURS) - {"masked", "unused", "compressed"}
    assert marked == set(plots.HATCHES)
    assert len(set(plots.HATCHES.values())) == len(marked)
    ax = plt.figure().subplots()
    for kind in plots.COLOURS:
        plots.cell(ax, 0, 0, 1, kind)
        box = ax.patches[-1]
        assert isinstance(box, Rectangle)
        assert (box.get_hatch() is not None) == (kind in marked)


def test_no_curve_is_told_by_colour_alone():
    lines = [attention.line for attention in ATTENTIONS.values()]
    systems = [neighbour.line for neighbour in NEIGHBOURS.values()]
    assert len({*systems, *TRAINED.values()}) == len(NEIGHBOURS) + len(TRAINED)
    for part in zip(*lines, strict=True):  # colours, dashes, markers
        assert len(set(part)) == len(ATTENTIONS)


def test_block_kinds_are_only_kinds_that_have_a_colour():
    kinds = plots.block_kinds(CONFIG, IDS)
    assert set(np.unique(kinds)) == {"forced", "selected", "unused", "masked"} <= set(plots.COLOURS)


def test_a_sweep_is_drawn_against_three_costs_with_a_ring_at_the_trained_n():
    points = [
        {
            "settings": {"num_selected": n},
            "read_by_head": 10 * n,
            "read_by_group": 11 * n,
            "kept": 70,
            "score": n / 10,
            "low": n / 10,
            "high": n / 10,
        }
        for n in (4, 6)
    ]
    figure = curves.draw_sweep({"nsa": points}, "accuracy", {"nsa": 6})
    assert [ax.get_xlabel() for ax in figure.axes] == [
        "tokens read by a head",
        "tokens loaded for a group",
        "tokens kept",
    ]
    line, ring = figure.axes[1].get_lines()
    assert list(line.get_xdata()) == [44, 66] and list(line.get_ydata()) == [0.4, 0.6]
    assert list(ring.get_xdata()) == [66]
    plt.close(figure)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: plots.draw_query_reads(None, IDS[0, 0, 3], 3),
            TypeError,
            "config: must be an NSA",
        ),
        (
            lambda: plots.draw_query_reads(CONFIG, IDS[0, 0, 3], -1),
            ValueError,
            "t = -1: must be at",
        ),
        (
            lambda: plots.draw_query_reads(CONFIG, IDS[0, 0, 3], 3.0),
            TypeError,
            "t = 3.0: must be an",
        ),
        (
            lambda: plots.draw_query_reads(CONFIG, [0], 3),
            TypeError,
            "ids: must be an int32 or int64",
        ),
        (
            lambda: plots.draw_query_reads(CONFIG, IDS[0, 0], 3),
            ValueError,
            "ids.shape = .*: must be",
        ),
        (
            lambda: plots.draw_block_map(NSAConfig, IDS[0, 0]),
            TypeError,
            "config: .*the class NSACon",
        ),
        (
            lambda: plots.draw_block_map(CONFIG, IDS[0, 0] / 2),
            TypeError,
            "ids: must be an int32 or",
        ),
        (lambda: plots.draw_block_map(CONFIG, IDS[0]), ValueError, "ids.shape = .*: must be"),
        (
            lambda: plots.draw_scores(IDS[0]),
            ValueError,
            "scores.shape = .*: must be .rows, columns",
        ),
    ],
)
def test_what_cannot_be_drawn_is_named(call, error, message):
    figures = plt.get_fignums()
    with pytest.raises(error, match=message):
        call()
    assert plt.get_fignums() == figures  # nothing half drawn is left
