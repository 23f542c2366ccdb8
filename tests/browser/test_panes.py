"""Two panes and their difference, what plays, the curve, the address, pictures, and the page."""

import io

import pytest
import torch
from PIL import Image

from nsa_lite.show.explorer import SelectionExplorer
from nsa_lite.show.explorer.sequence import Place
from tests.browser.drawn import strip_kinds, true_kinds
from tests.browser.driving import EXPLORER, choose, sentence, settled, slide, view, wait

SECOND = ".nsa-pane:nth-child(2)"


# --- two panes ---


def test_two_panes_show_two_places_and_their_difference(opened, two_layers):
    page = opened(two_layers)
    choose(page, layer=0, group=0)
    assert page.locator(".nsa-pane").count() == 1
    page.get_by_role("button", name="Two panes").click()
    for name in ("layer", "group"):
        page.get_by_label(f"beside: {name}").press("End")
    two_layers.layer, two_layers.group = 0, 0
    two_layers.beside = {"checkpoint": 0, "layer": 1, "group": 1}
    s = two_layers.sequence
    for t in (30, 77, 111):
        choose(page, query=t)
        assert sentence(page) == two_layers.describe(t)
        beside = s.describe(Place(0, 1, 1, 5), t)
        assert page.locator(f"{SECOND} .nsa-sentence").text_content() == beside
        assert page.locator(".nsa-difference").text_content() == two_layers.difference(t)
        only = page.locator(f"{SECOND} .nsa-only").evaluate_all(
            "spans => [...new Set(spans.map((span) => Math.floor(span.dataset.s / 8)))]"
        )
        there = set(s.selected(Place(0, 1, 1, 5), t))
        assert only == sorted(there - set(two_layers.selected(t)))
    two_layers.beside = None
    page.get_by_role("button", name="One pane").click()
    settled(page)
    assert page.locator(".nsa-pane").count() == 1
    assert not page.locator(".nsa-difference").is_visible()


def test_a_saved_page_opens_with_both_panes(opened, recall):
    recall.beside = {"checkpoint": 0, "layer": 0, "group": 0}
    page = opened(recall)
    recall.beside = None
    settled(page)
    trace = recall.sequence.checkpoints["step 1500, random"][0]
    here = recall.sequence.describe(Place(0, 0, 0, 6), 103)
    assert page.locator(f"{SECOND} .nsa-sentence").text_content() == here

    class Second:  # what strip_kinds needs of a page
        def locator(self, where: str):
            return page.locator(f"{SECOND} {where}")

    ids = trace.ids[0, 0, 103]
    assert strip_kinds(Second(), recall.sequence) == true_kinds(recall.sequence, ids, 103)
    title = page.locator(f"{SECOND} .nsa-title").text_content()
    assert "answers' blocks selected" in title


# --- the block in focus ---


def test_the_block_in_focus_says_its_numbers(opened, two_layers):
    page = opened(two_layers)
    s = two_layers.sequence
    trace = s.checkpoints[""][0]
    t = 95
    choose(page, query=t)
    score = trace.importance[0, 0, t]
    chosen = two_layers.selected(t)
    forced = s.forced(t)
    rivals = sorted((j for j in range(t // 8 + 1) if j not in forced), key=lambda j: -score[j])
    free = [j for j in rivals if j in chosen]
    for j in (rivals[0], rivals[len(free)], forced[0], forced[-1], 13):
        page.evaluate(f"([j]) => {EXPLORER}.lookAt(j)", [j])
        settled(page)
        said = page.locator(".nsa-facts").text_content()
        if j > t // 8:
            assert said == "block 13, tokens 104-111: not begun at this query"
            continue
        status = "forced" if j in forced else "selected" if j in chosen else "not selected"
        assert said.startswith(f"block {j}, tokens {8 * j}-{8 * j + 7}: {status}")
        importance = float(said.split("importance ")[1].split(",")[0])
        assert importance == pytest.approx(float(score[j]), rel=6e-3)
        assert ("the query's own block" in said) == (j == t // 8)
        if status != "forced":
            assert f"rank {rivals.index(j) + 1} of the {len(rivals)} that compete" in said
            other = rivals[len(free)] if j in chosen else free[-1]
            gap = abs(float(score[j] - score[other]))
            side = "above the best left out" if j in chosen else "below the last chosen"
            number, tail = said.split("compete, ")[1].split(" ", 1)
            assert float(number) == pytest.approx(gap, rel=0.06, abs=2e-5)
            assert tail.startswith(f"{side} (block {other})")
        spoken = page.locator(".nsa-strip").get_attribute("aria-valuetext")
        assert spoken.startswith(f"{said}: ")


def test_heads_share_an_importance_as_the_tokens_overlap(opened, two_layers):
    page = opened(two_layers)
    s = two_layers.sequence
    c = s.config
    p = s.checkpoints[""][0].probabilities[0, 0, :, 95]  # (R, N)
    choose(page, query=95)
    for j in (3, 7):
        page.evaluate(f"([j]) => {EXPLORER}.lookAt(j)", [j])
        settled(page)
        mass = []
        for head in p:
            total = 0.0
            for i, weight in enumerate(head.tolist()):
                tokens = set(range(i * c.stride, i * c.stride + c.block_size))
                total += weight * len(tokens & set(range(8 * j, 8 * j + 8)))
            mass.append(total)
        said = page.locator(".nsa-facts").text_content().split("heads' shares ")[1].split(",")[0]
        shares = [float(x) for x in said.split()]
        assert shares == pytest.approx([m / sum(mass) for m in mass], abs=0.011)


# --- what plays, and the curve ---


def test_play_walks_the_checkpoints_too_and_the_curve_counts(opened, recall):
    page = opened(recall)
    s = recall.sequence
    slide(page, "checkpoint", "Home")
    page.get_by_label("what plays").select_option("checkpoints")
    page.get_by_role("button", name="Play").click()
    wait(page, f"{EXPLORER}.view.checkpoint === 2")
    page.get_by_role("button", name="Pause").click()
    assert view(page)["query"] == 103
    counts = []
    block = s.answer_at // s.config.select_block_size
    for name, layers in s.checkpoints.items():
        found = (layers[0].ids[0, 0] == block[:, None]).any(1)[s.answer_at >= 0].sum()
        counts.append(f"{name} {found}")
    label = page.locator(".nsa-curve").get_attribute("aria-label")
    assert label == "answers' blocks selected, of 16: " + ", ".join(counts)


# --- the address ---


def test_the_address_leads_to_what_is_shown(opened, recall):
    page = opened(recall, "#query=95&checkpoint=3&n=5&focus=2&beside=0.0.0")
    settled(page)
    recall.checkpoint, recall.n = 3, 5
    assert sentence(page) == recall.describe(95)
    recall.checkpoint, recall.n = 8, 6
    assert view(page)["focus"] == 2
    assert view(page)["beside"] == {"checkpoint": 0, "layer": 0, "group": 0}
    page.locator(".nsa-map").first.press("ArrowUp")
    wait(page, "location.hash.includes('query=94&')")
    hash_ = page.evaluate("location.hash")
    assert hash_ == "#query=94&checkpoint=3&layer=0&group=0&n=5&focus=2&beside=0.0.0"
    page.evaluate("location.hash = '#query=90'")
    wait(page, f"{EXPLORER}.view.query === 90")


@pytest.mark.parametrize(
    "address",
    [
        "#query=104",
        "#query=-1&n=99",
        "#query=1e1&layer=2",
        "#checkpoint=11&group=x&beside=0.0",
        "#beside=0.0.7&focus=99",
        "#<img src=x onerror=alert(1)>",
        "#query=%00&n=",
        "#" + "9" * 400,
    ],
)
def test_a_wrong_address_is_passed_over(opened, recall, address):
    page = opened(recall, address)
    settled(page)
    assert sentence(page) == recall.describe()
    assert view(page)["beside"] is None and view(page)["focus"] == 12


# --- pictures ---


@pytest.mark.parametrize("address", ["", "#beside=0.0.0"])
def test_png_and_svg_of_what_is_shown(opened, recall, address):
    page = opened(recall, address)
    settled(page)
    with page.expect_download() as kept:
        page.get_by_role("button", name="PNG").click()
    picture = Image.open(io.BytesIO(kept.value.path().read_bytes()))
    assert kept.value.suggested_filename == "selection.png"
    assert picture.width == 2080 and picture.height > 1200 * (2 if address else 1)
    assert len(picture.convert("RGB").getcolors(2**24)) > 50
    with page.expect_download() as kept:
        page.get_by_role("button", name="SVG").click()
    svg = kept.value.path().read_text("utf-8")
    assert svg.startswith("<svg ") and 'xmlns="http://www.w3.org/2000/svg"' in svg
    words = page.evaluate(
        """(text) => {
        const svg = new DOMParser().parseFromString(text, "image/svg+xml");
        return [...svg.querySelectorAll("text")].map((node) => node.textContent);
    }""",
        svg,
    )
    assert recall.describe() in " ".join(words)
    tokens = [token.replace(" ", "\u00b7") for token in recall.sequence.tokens]
    assert {tokens[103], tokens[98], "forced", "compressed only"} <= set(words)
    assert "<script" not in svg and "http" not in svg.replace("http://www.w3.org/2000/svg", "")


# --- the page around it ---


def test_controls_map_text_and_legend_fit_600_pixels(opened, two_layers, recall):
    for e in (two_layers, recall):
        page = opened(e)
        page.set_viewport_size({"width": 1024, "height": 700})
        settled(page)
        low = page.evaluate(
            """() => {
            const root = document.querySelector(".nsa-explorer");
            const parts = ["controls", "tools", "legend", "text", "map"];
            const ends = parts.map((name) =>
              root.querySelector(`.nsa-${name}`).getBoundingClientRect().bottom);
            return Math.max(...ends) - root.getBoundingClientRect().top;
        }"""
        )
        assert low <= 600


@pytest.mark.parametrize("width", [390, 641, 1024, 1400])
def test_nothing_is_wider_than_the_page(opened, recall, width):
    for address in ("", "#beside=0.0.0"):
        page = opened(recall, address)
        page.set_viewport_size({"width": width, "height": 800})
        settled(page)
        page.get_by_role("button", name="?", exact=True).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        cut = page.evaluate(
            """() => [...document.querySelectorAll("button, label, p, li, dd, .nsa-legend span")]
            .filter((part) => part.scrollWidth > part.clientWidth + 1 && part.clientWidth)
            .filter((part) => !part.matches(".nsa-spoken")
              && getComputedStyle(part).display !== "inline").map((part) => part.outerHTML)"""
        )
        assert not cut


def luminance(colour: str) -> float:
    parts = [int(x) / 255 for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(opened, recall, scheme):
    page = opened(recall, "#beside=0.0.0&query=90")
    page.emulate_media(color_scheme=scheme)
    settled(page)
    grounds = page.evaluate(
        """() => {
        const shown = (node) => {
          while (node && getComputedStyle(node).backgroundColor === "rgba(0, 0, 0, 0)") {
            node = node.parentElement;
          }
          return getComputedStyle(node).backgroundColor;
        };
        return [...document.querySelectorAll(".nsa-explorer :is(p, span, label, li, button, bdi)")]
          .filter((node) => node.textContent.trim() && node.getClientRects().length)
          .map((node) => [node.className, getComputedStyle(node).color, shown(node)]);
    }"""
    )
    assert len(grounds) > 200
    for name, ink, ground in grounds:
        bright, dim = sorted((luminance(ink), luminance(ground)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (name, ink, ground)
    root = page.locator(".nsa-explorer")
    dark = luminance(root.evaluate("node => getComputedStyle(node).backgroundColor")) < 0.05
    assert dark == (scheme == "dark")
    canvas = page.locator(".nsa-strip").first.evaluate(
        "canvas => [...canvas.getContext('2d').getImageData(2, 2, 1, 1).data]"
    )
    assert (canvas[0] < 60) == dark


def test_jupyterlabs_theme_goes_before_the_systems(opened, two_layers):
    page = opened(two_layers)
    page.emulate_media(color_scheme="light")
    page.evaluate("document.body.dataset.jpThemeLight = 'false'")
    settled(page)
    root = page.locator(".nsa-explorer")
    assert root.get_attribute("data-theme") == "dark"
    page.emulate_media(color_scheme="dark")
    page.evaluate("document.body.dataset.jpThemeLight = 'true'")
    settled(page)
    assert root.get_attribute("data-theme") == "light"


def test_one_region_speaks_and_help_opens(opened, recall):
    page = opened(recall)
    assert page.locator("[aria-live], [role=status], [role=alert], output").count() == 1
    helper = page.get_by_role("button", name="?", exact=True)
    panel = page.locator(".nsa-help")
    assert helper.get_attribute("aria-expanded") == "false" and not panel.is_visible()
    page.locator(".nsa-strip").press("?")
    assert helper.get_attribute("aria-expanded") == "true" and panel.is_visible()
    assert "the next question" in panel.text_content()
    page.locator(".nsa-strip").press("?")
    assert not panel.is_visible()


def test_calm_motion_plays_slowly(opened, two_layers):
    page = opened(two_layers)
    page.emulate_media(reduced_motion="reduce")
    choose(page, query=50)
    page.get_by_role("button", name="Play").click()
    page.wait_for_timeout(700)
    assert view(page)["query"] == 50
    wait(page, f"{EXPLORER}.view.query === 51")


def test_only_some_queries_were_traced(opened, two_layers):
    positions = [3, 17, 18, 60, 90, 111]
    e = SelectionExplorer(two_layers.sequence.only(positions))
    page = opened(e)
    at_map = page.locator(".nsa-map")
    at_map.press("Home")
    for query in positions:
        settled(page)
        assert sentence(page) == e.describe(query)
        ids = e.sequence.checkpoints[""][0].ids[0, 0, e.sequence.index[query]]
        assert strip_kinds(page, e.sequence) == true_kinds(e.sequence, ids, query)
        at_map.press("ArrowDown")
    choose(page, query=75)  # between 60 and 90: as near to either, the later one
    assert view(page)["query"] in (60, 90)
    choose(page, query=20)
    assert view(page)["query"] == 18
    page.locator(".nsa-text [data-s='61']").click()  # no query: its block is looked at
    page.mouse.move(3, 3)
    settled(page)
    assert (view(page)["query"], view(page)["focus"]) == (18, 7)
    page.evaluate("location.hash = '#query=19'")  # not traced: passed over
    page.wait_for_timeout(100)
    assert view(page)["query"] == 18
    assert torch.tensor(positions).equal(e.sequence.positions)
