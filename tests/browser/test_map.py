"""The block map: a pixel shows all its queries, and one can zoom, scrub and reach each of them."""

import re

import pytest
import torch

from nsa_lite import NSAConfig, Trace
from nsa_lite.show.explorer import SelectionExplorer
from tests.browser.drawn import MARGINS
from tests.browser.driving import EXPLORER, choose, settled, view

# For each row of the map's pixels at some x (CSS pixels): its colour.
COLUMN = """(canvas, [x, top, bottom]) => {
  const scale = window.devicePixelRatio, height = canvas.clientHeight - top - bottom;
  const at = canvas.getContext("2d").getImageData(x * scale, top * scale, 1, height * scale).data;
  return Array.from({ length: at.length / 4 }, (_, k) => [...at.slice(4 * k, 4 * k + 3)]);
}"""


def one_in_ten() -> SelectionExplorer:
    """4,096 queries, of which every 10th selects block 5 beside the forced ones."""
    c = NSAConfig(dim=64, heads=2, kv_heads=1, head_dim=16, value_dim=16, num_selected=4)
    t = torch.arange(4096)
    ids = torch.full((4096, 4), -1)
    own = t // 64
    for query in range(4096):
        chosen = {0, max(0, int(own[query]) - 1), int(own[query])}
        if query % 10 == 0 and own[query] >= 5:
            chosen.add(5)
        ids[query, : len(chosen)] = torch.tensor(sorted(chosen))
    importance = torch.zeros(1, 1, 4096, 64)
    p = torch.zeros(1, 1, 2, 4096, 255)
    gates = torch.full((1, 2, 4096, 3), 0.5)
    return SelectionExplorer(Trace(c, 0, ids[None, None].int(), p, importance, gates, {}))


def place_of(page, block: int, blocks: int) -> float:
    """The middle of a block's column, in CSS pixels of the canvas."""
    left, _, right, _ = MARGINS
    width = page.locator(".nsa-map").evaluate("canvas => canvas.clientWidth")
    return left + (block + 0.5) * (width - left - right) / blocks


def test_a_choice_of_every_tenth_query_is_one_even_shade(opened):
    page = opened(one_in_ten())
    settled(page)
    _, top, _, bottom = MARGINS
    canvas = page.locator(".nsa-map")

    def shades(block: int) -> list[list[int]]:
        pixels = canvas.evaluate(COLUMN, [place_of(page, block, 64), top, bottom])
        rows = len(pixels)
        return pixels[int(rows * 0.15) : int(rows * 0.95)]  # the crosshair is on the last row

    plain = shades(20)[len(shades(20)) // 2 :]
    assert {tuple(p) for p in plain} == {(0xF2, 0xF2, 0xF2)}
    mixed = shades(5)
    # A row of pixels holds 13 or 14 queries: one or two of them are multiples of 10. The ground
    # F2F2F2 goes towards 0072B2, or its hatch 8CC4E8, by the square root of their share.
    for red, _, _ in mixed:
        low, high = (1 / 14) ** 0.5, (2 / 13) ** 0.5
        marks = [0xF2 + (mark - 0xF2) * share for mark in (0x00, 0x8C) for share in (low, high)]
        assert min(marks) - 2 <= red <= max(marks) + 2
    assert all(pixel != [0xF2, 0xF2, 0xF2] for pixel in mixed)  # no row without it


def test_the_census_counts_every_pair_once(opened, two_layers):
    page = opened(two_layers)
    s = two_layers.sequence
    ids = s.checkpoints[""][1].ids[0, 1]
    choose(page, layer=1, group=1)
    rows, columns = 9, 5
    counted = page.evaluate(
        f"""([rows, columns]) => {{
        const {{ trace }} = {EXPLORER}, shown = {{ q0: 3, q1: 101, j0: 2, j1: 13 }};
        const place = {{ checkpoint: 0, layer: 1, group: 1, n: 5 }};
        const {{ forced, selected, unseen }} = trace.census(place, shown, rows, columns);
        return [[...forced], [...selected], [...unseen]];
    }}""",
        [rows, columns],
    )
    # Of each cell: choices, forced and by score; pairs that are not begun; its pairs, its queries.
    cells = {(r, c): [0, 0, 0, 0, 0] for r in range(rows) for c in range(columns)}
    ends = [-(-((r + 1) * 98) // rows) for r in range(rows)]
    for q in range(98):
        row = next(r for r, end in enumerate(ends) if q < end)
        t = q + 3
        for c in range(columns):
            cells[row, c][4] += 1
        for j in range(2, 13):
            cell = cells[row, (j - 2) * columns // 11]
            cell[3] += 1
            if j * 8 > t:
                cell[2] += 1
            elif j in ids[t]:
                cell[0 if j in s.forced(t) else 1] += 1
    forced = [min(1, cell[0] / cell[4]) for cell in cells.values()]
    free = [min(1 - f, cell[1] / cell[4]) for f, cell in zip(forced, cells.values(), strict=True)]
    unseen = [cell[2] / cell[3] for cell in cells.values()]
    for k, true in enumerate((forced, free, unseen)):
        assert counted[k] == pytest.approx(true, abs=1e-6)
    assert max(free) == 1 and 0 < sum(0 < x < 1 for x in free)


def test_a_rectangle_is_zoomed_to_and_left_again(opened, two_layers):
    page = opened(two_layers)
    box = page.locator(".nsa-map").bounding_box()
    left, top, right, bottom = MARGINS
    wide, tall = box["width"] - left - right, box["height"] - top - bottom

    def at(j: float, q: float) -> tuple[float, float]:
        return box["x"] + left + wide * j / 14, box["y"] + top + tall * q / 112

    def drag(begin: tuple[float, float], end: tuple[float, float]) -> None:
        page.mouse.move(*begin)
        page.mouse.down()
        page.mouse.move((begin[0] + end[0]) / 2, (begin[1] + end[1]) / 2)
        page.mouse.move(*end)
        page.mouse.up()
        settled(page)

    drag(at(2.5, 30.5), at(6.5, 60.5))
    assert view(page)["area"] == {"queries": [30, 61], "blocks": [2, 7]}
    assert view(page)["query"] == 111  # a rectangle chooses nothing
    page.mouse.click(box["x"] + left + wide * 0.5, box["y"] + top + tall * 10.5 / 31)
    settled(page)
    assert (view(page)["query"], view(page)["focus"]) == (40, 4)
    page.mouse.dblclick(box["x"] + left + wide / 2, box["y"] + top + 3)
    settled(page)
    assert view(page)["area"] is None
    at_map = page.locator(".nsa-map")
    at_map.press("+")
    settled(page)
    first, end = view(page)["area"]["queries"]
    assert end - first == 56 and first <= view(page)["query"] < end
    at_map.press("Escape")
    settled(page)
    assert view(page)["area"] is None


def test_the_left_edge_and_the_black_line_scrub(opened, two_layers):
    page = opened(two_layers)
    box = page.locator(".nsa-map").bounding_box()
    left, top, _, bottom = MARGINS
    tall = box["height"] - top - bottom

    def y(q: float) -> float:
        return box["y"] + top + tall * (q + 0.5) / 112

    page.mouse.move(box["x"] + 10, y(20))
    page.mouse.down()
    page.mouse.move(box["x"] + 10, y(30))
    page.mouse.move(box["x"] + 10, y(50))
    settled(page)
    assert view(page)["query"] == 50
    page.mouse.up()
    page.mouse.move(box["x"] + left + 80, y(50))
    page.mouse.down()
    page.mouse.move(box["x"] + left + 80, y(60))
    page.mouse.move(box["x"] + left + 80, y(71))
    page.mouse.up()
    settled(page)
    assert view(page)["query"] == 71 and view(page)["area"] is None


def test_every_query_of_a_long_text_can_be_reached(opened):
    page = opened(one_in_ten())
    at_map = page.locator(".nsa-map")
    assert "a row of pixels shows 14 queries" in " ".join(labels(page)["nsa-map"])
    for query in (1000, 1001, 1002):
        choose(page, query=query - 1)
        at_map.press("ArrowDown")
        assert view(page)["query"] == query
    for _ in range(5):
        at_map.press("+")
    settled(page)
    first, end = view(page)["area"]["queries"]
    assert end - first <= 128  # more than two pixels each: the mouse tells them apart
    box = at_map.bounding_box()
    _, top, _, bottom = MARGINS
    tall = box["height"] - top - bottom
    for query in (first + 5, first + 6, first + 7):
        y = box["y"] + top + tall * (query - first + 0.5) / (end - first)
        page.mouse.click(box["x"] + 60, y)
        assert view(page)["query"] == query


LABELS = f"""() => {{
  const found = {{}}, real = CanvasRenderingContext2D.prototype.fillText;
  CanvasRenderingContext2D.prototype.fillText = function (words, x, y) {{
    const wide = this.measureText(words).width, at = this.getTransform();
    const begin = x - {{ left: 0, center: wide / 2, right: wide }}[this.textAlign];
    (found[this.canvas.className] ??= []).push([String(words), begin, begin + wide, y,
      this.canvas.clientWidth]);
    return real.call(this, words, x, y);
  }};
  {EXPLORER}.draw();
  CanvasRenderingContext2D.prototype.fillText = real;
  return found;
}}"""


def labels(page) -> dict[str, list[str]]:
    """The words on each canvas."""
    return {name: [x[0] for x in found] for name, found in page.evaluate(LABELS).items()}


@pytest.mark.parametrize("width", [390, 641, 1024])
@pytest.mark.parametrize("which", ["recall", "two_layers", "haystack", "one_in_ten"])
def test_labels_never_collide(opened, request, which, width):
    e = one_in_ten() if which == "one_in_ten" else request.getfixturevalue(which)
    page = opened(e)
    page.set_viewport_size({"width": width, "height": 800})
    queries = e.sequence.positions.tolist()
    for t in (queries[0], queries[len(queries) // 2], queries[-1]):
        choose(page, query=t)
        for canvas, words in page.evaluate(LABELS).items():
            for k, (name, begin, end, y, whole) in enumerate(words):
                assert begin >= -1 and end <= whole + 1, (canvas, name)
                for other, start, stop, beside, _ in words[k + 1 :]:
                    apart = abs(y - beside) >= 11 or end + 2 <= start or stop + 2 <= begin
                    assert apart, (canvas, name, other)
    ticks = [x for x in labels(page)["nsa-map"] if re.fullmatch(r"\d+", x)]
    assert len(ticks) >= 4, labels(page)
