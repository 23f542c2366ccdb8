"""The standalone page, opened from disk with the network off: what is drawn is what was traced."""

import dataclasses
import json
import re
import statistics

import pytest
import torch

from nsa_lite import DecoderLM, ModelConfig, NSAConfig, Trace, choose_blocks
from nsa_lite.rivals.attentions import ATTENTIONS
from nsa_lite.show.explorer import SelectionExplorer
from tests.browser.conftest import ROOT, SCREENSHOTS
from tests.browser.drawn import MARGINS, map_kinds, strip_kinds, true_kinds
from tests.browser.driving import sentence, settled, slide, wait

SMALL_MODEL = ModelConfig(256, 1, NSAConfig.small())
AXE = ROOT / ".venv/axe/node_modules/axe-core/axe.min.js"


# --- what is drawn ---


def test_the_map_and_the_strip_show_the_trace(opened, two_layers):
    page = opened(two_layers)
    s = two_layers.sequence
    for layer, group in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for name, value in (("layer", layer), ("group", group)):
            slide(page, name, "End" if value else "Home")
        ids = s.checkpoints[""][layer].ids[0, group]
        page.locator(".nsa-map").press("Home")  # the crosshair covers its own row and a column
        settled(page)
        focus = page.evaluate("document.querySelector('.nsa-explorer').explorer.view.focus")
        for t in range(3, s.length, 4):
            drawn = map_kinds(page, s, t)
            true = true_kinds(s, ids[t], t)
            assert [x for j, x in enumerate(drawn) if j != focus] == [
                x for j, x in enumerate(true) if j != focus
            ], (layer, group, t)
        for t in (0, 1, 40, 77, 111):
            page.evaluate(
                "([t]) => document.querySelector('.nsa-explorer').explorer.choose('query', t)", [t]
            )
            settled(page)
            assert strip_kinds(page, s) == true_kinds(s, ids[t], t), (layer, group, t)


@pytest.mark.parametrize("n", [3, 4, 7, 14])
def test_another_n_is_drawn_as_choose_blocks_chooses(opened, two_layers, n):
    page = opened(two_layers)
    s = two_layers.sequence
    importance = s.checkpoints[""][0].importance[:, :1]
    ids = choose_blocks(importance, select_block_size=8, num_selected=n)[0, 0]
    page.evaluate("([n]) => document.querySelector('.nsa-explorer').explorer.choose('n', n)", [n])
    for t in (20, 50, 83, 111):
        page.evaluate(
            "([t]) => document.querySelector('.nsa-explorer').explorer.choose('query', t)", [t]
        )
        settled(page)
        assert strip_kinds(page, s) == true_kinds(s, ids[t], t)
    own = set(two_layers.selected(111))
    out = sorted(own - set(ids[111].tolist()))
    if n < 5:
        remark = page.locator(".nsa-remarks").text_content()
        assert f"n = {n} for 5: blocks {' '.join(map(str, out))} drop out, none come in" in remark


def test_the_page_says_what_python_says(opened, two_layers, recall):
    for e, views in (
        (two_layers, [(0, 0, 0, 5), (0, 1, 1, 5), (0, 1, 0, 8)]),
        (recall, [(0, 0, 0, 6), (8, 1, 1, 6), (4, 0, 1, 4)]),
    ):
        page = opened(e)
        for checkpoint, layer, group, n in views:
            view = dict(checkpoint=checkpoint, layer=layer, group=group, n=n)
            said = page.evaluate(
                """(view) => {
                const { trace } = document.querySelector('.nsa-explorer').explorer;
                return Array.from({ length: trace.length }, (_, t) => trace.describe(view, t));
            }""",
                view,
            )
            e.checkpoint, e.layer, e.group, e.n = checkpoint, layer, group, n
            assert said == [e.describe(t) for t in range(e.sequence.length)]
        e.checkpoint, e.layer, e.group = len(e.sequence.checkpoints) - 1, 0, 0
        e.n = e.sequence.config.num_selected


def test_blocks_that_another_rule_chose_are_drawn_and_said_as_traced(opened):
    torch.manual_seed(0)
    model = DecoderLM(SMALL_MODEL, ATTENTIONS["nsa-random"].build)
    e = SelectionExplorer.of_model(model, "x = (y)\n" * 16)
    page = opened(e)
    s = e.sequence
    view = dict(checkpoint=0, layer=0, group=1, n=5)
    said = page.evaluate(
        """(view) => {
        const { trace } = document.querySelector('.nsa-explorer').explorer;
        return Array.from({ length: trace.length }, (_, t) => trace.describe(view, t));
    }""",
        view,
    )
    e.group = 1
    assert said == [e.describe(t) for t in range(s.length)]
    slide(page, "group", "End")
    settled(page)
    ids = s.checkpoints[""][0].ids[0, 1]
    assert strip_kinds(page, s) == true_kinds(s, ids[127], 127)
    assert page.get_by_label("n", exact=True).is_disabled()
    remark = page.locator(".nsa-remarks").text_content()
    assert remark.startswith("these blocks were not chosen by their score")


def test_scrubbing_through_training_shows_the_answers_found(opened, recall):
    page = opened(recall)
    s = recall.sequence
    block = s.answer_at // s.config.select_block_size
    for key, name in (("Home", "step 1500, random"), ("End", "step 1500")):
        trace = s.checkpoints[name][0]
        slide(page, "checkpoint", key)
        settled(page)
        found = (trace.ids[0, 0] == block[:, None]).any(1)[s.answer_at >= 0].sum()
        label = page.locator("label", has=page.get_by_label("checkpoint")).text_content()
        assert f": {found} of 16 answers' blocks selected" in label
        assert strip_kinds(page, s) == true_kinds(s, trace.ids[0, 0, 103], 103)
    said = page.locator(".nsa-sentence").text_content()
    assert said.endswith("; answer in block 6: selected; checkpoint step 1500")
    # The README's picture is a copy of this one: notebooks/explorer.png.
    page.evaluate(
        "document.querySelector('.nsa-explorer').explorer.look({ focus: 6 });"
        "document.activeElement.blur()"
    )
    settled(page)
    assert "k9\u00b7v" in page.locator(".nsa-reader").text_content()  # the fact that is asked for
    page.locator(".nsa-explorer").screenshot(path=SCREENSHOTS / "explorer.png")


def test_remarks_by_hand(opened, two_layers):
    page = opened(two_layers)
    s = two_layers.sequence
    importance = s.checkpoints[""][0].importance[0, 0, 111]
    free = importance[1:12].sort(descending=True)  # block 0, 12 and 13 are forced
    last, after = (int(free.indices[i]) + 1 for i in (1, 2))
    settled(page)
    remark = page.locator(".nsa-remarks").text_content()
    numbers = re.search(
        r"lowest score selected: ([\d.e-]+) \(block (\d+)\); next: ([\d.e-]+) "
        r"\(block (\d+)\); margin ([\d.e-]+)",
        remark,
    ).groups()
    assert (int(numbers[1]), int(numbers[3])) == (last, after)
    assert float(numbers[0]) == pytest.approx(float(free.values[1]), rel=5e-3)
    margin = float(free.values[1] - free.values[2])
    assert float(numbers[4]) == pytest.approx(margin, rel=0.1, abs=2e-5)
    shared = 100 * s.overlap(two_layers.place, 111)
    assert f"overlap with query 110: {round(shared)} % of the blocks" in remark


def test_tokens_are_readable_when_zoomed(opened, two_layers):
    page = opened(two_layers)
    s = two_layers.sequence
    blank = page.locator(".nsa-strip").screenshot()
    slide(page, "zoom", "End")
    settled(page)
    assert page.locator(".nsa-strip").screenshot(path=SCREENSHOTS / "zoomed.png") != blank
    box = page.locator(".nsa-reader").text_content()
    assert box == "block 13, tokens 104-111: " + "".join(s.tokens[104:]).replace(
        " ", "\u00b7"
    ).replace("\n", "\u23ce")


# --- what one can do ---


def test_keys_on_the_map(opened, two_layers):
    page = opened(two_layers)
    at_map = page.locator(".nsa-map")
    for key, query in (
        ("Home", 0),
        ("ArrowUp", 0),
        ("ArrowDown", 1),
        ("ArrowRight", 2),
        ("PageDown", 14),
        ("ArrowLeft", 13),
        ("PageUp", 1),
        ("End", 111),
        ("PageDown", 111),
        ("ArrowDown", 111),
        ("ArrowUp", 110),
    ):
        at_map.press(key)
        assert sentence(page) == two_layers.describe(query), key
        assert at_map.get_attribute("aria-valuenow") == str(query)
        assert at_map.get_attribute("aria-valuetext") == two_layers.describe(query)
    said = json.dumps(two_layers.describe(110))  # spoken once the keys rest
    wait(page, f"document.querySelector('[role=status]').textContent === {said}")
    outline = at_map.evaluate("canvas => getComputedStyle(canvas).outlineStyle")
    assert outline == "solid"  # the focus can be seen
    page.get_by_role("button", name="Play").focus()
    page.keyboard.press("Home")
    assert sentence(page) == two_layers.describe(110)  # only when the map has the focus


def test_keys_on_the_strip(opened, two_layers):
    page = opened(two_layers)
    strip = page.locator(".nsa-strip")
    chosen = two_layers.selected(111)
    for key, block in (
        ("Home", 0),
        (".", chosen[1]),
        (".", chosen[2]),
        (",", chosen[1]),
        ("ArrowRight", chosen[1] + 1),
        ("ArrowLeft", chosen[1]),
        ("End", 13),
    ):
        strip.press(key)
        settled(page)
        assert strip.get_attribute("aria-valuenow") == str(block), key
    strip.press("+")
    settled(page)
    assert page.get_by_label("zoom").input_value() == "10"
    strip.press("-")
    settled(page)
    assert page.get_by_label("zoom").input_value() == "0"


def test_every_control_reaches_both_ends(opened, recall, two_layers):
    for e in (recall, two_layers):
        page = opened(e)
        for name, ends in e.sequence.ranges().items():
            if name == "checkpoint" and ends == (0, 0):
                assert page.get_by_label(name, exact=True).count() == 0
                continue
            for key, value in zip(("Home", "End"), ends, strict=True):
                if ends[0] == ends[1]:
                    assert page.get_by_label(name, exact=True).is_disabled()
                else:
                    slide(page, name, key)
                settled(page)
                view = page.evaluate("document.querySelector('.nsa-explorer').explorer.view")
                assert view[name] == value


def test_the_mouse_shows_and_chooses(opened, two_layers):
    page = opened(two_layers)
    area = page.locator(".nsa-map").bounding_box()
    left, top, _, bottom = MARGINS
    tall = area["height"] - top - bottom
    page.mouse.move(area["x"] + 100, area["y"] + top + tall * 40.5 / 112)
    assert sentence(page) == two_layers.describe(40)
    page.mouse.move(area["x"] + 100, area["y"] - 30)
    assert sentence(page) == two_layers.describe(111)  # it was only shown
    page.mouse.click(area["x"] + 100, area["y"] + top + tall * 60.5 / 112)
    page.mouse.move(area["x"] + 100, area["y"] - 30)
    assert sentence(page) == two_layers.describe(60)
    strip = page.locator(".nsa-strip").bounding_box()
    page.mouse.click(strip["x"] + strip["width"] * 3.5 / 14, strip["y"] + 180)
    settled(page)
    assert page.locator(".nsa-reader").text_content().startswith("block 3, tokens 24-31: ")


def test_play_goes_on_to_the_end_and_stops(opened, two_layers):
    page = opened(two_layers)
    page.evaluate("document.querySelector('.nsa-explorer').explorer.choose('query', 107)")
    page.get_by_role("button", name="Play").click()
    wait(page, "document.querySelector('.nsa-explorer').explorer.view.query === 111")
    page.get_by_role("button", name="Play").wait_for(timeout=3000)
    assert sentence(page) == two_layers.describe(111)


# --- speed, access, odd traces ---


def long_trace(seed: int) -> Trace:
    """4,096 tokens in 64 blocks, as large as the paper's layer, but for the number of heads."""
    rng = torch.Generator().manual_seed(seed)
    c = NSAConfig(dim=64, heads=8, kv_heads=2, head_dim=16, value_dim=16)
    now = torch.arange(4096)[:, None]
    importance = torch.rand(1, 2, 4096, 64, generator=rng) * (64 * torch.arange(64) <= now)
    p = torch.rand(1, 2, 4, 4096, 255, generator=rng) * (16 * torch.arange(255) + 31 <= now)
    ids = choose_blocks(importance, select_block_size=64, num_selected=16)
    return Trace(c, 0, ids, p, importance, torch.rand(1, 8, 4096, 3, generator=rng), {})


def test_a_redraw_of_4096_tokens_and_64_blocks_takes_less_than_16_ms(opened):
    page = opened(SelectionExplorer(long_trace(0), "x = (1)\n" * 512))
    times = page.evaluate("""() => {
        const { explorer } = document.querySelector('.nsa-explorer'), times = [];
        for (let k = 0; k < 80; k++) {
          explorer.view.query = Math.floor((4095 * (k + 1)) / 80);
          const begin = performance.now();
          explorer.draw();
          for (const canvas of [explorer.map, explorer.strip, explorer.gates]) {
            canvas.getContext("2d").getImageData(0, 0, 1, 1); // until it is really drawn
          }
          times.push(performance.now() - begin);
        }
        return times;
    }""")
    page.screenshot(path=SCREENSHOTS / "long.png", full_page=True)
    print(f"redraw: median {statistics.median(times):.1f} ms, slowest {max(times):.1f} ms")
    assert statistics.median(times) < 16


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("address", ["", "#beside=0.0.0"])
def test_axe_finds_no_serious_violation(opened, recall, scheme, address):
    assert AXE.exists(), "axe-core is not here: make test-browser installs it"
    page = opened(recall, address)
    page.emulate_media(color_scheme=scheme)
    page.get_by_role("button", name="?", exact=True).click()
    settled(page)
    page.evaluate(AXE.read_text("utf-8"))
    found = page.evaluate("axe.run()")["violations"]
    serious = [
        (x["id"], x["nodes"][0]["html"]) for x in found if x["impact"] in ("serious", "critical")
    ]
    assert not serious


def test_without_javascript_there_is_a_picture_and_the_sentence(chromium, recall, tmp_path):
    path = recall.save_html(tmp_path / "page.html")
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator("noscript p, p").first.text_content() == recall.describe()
    assert page.locator("img").evaluate("image => image.naturalWidth") > 300
    assert page.locator("img").get_attribute("alt") == recall.describe()
    context.close()


def test_tokens_that_are_html_are_shown_and_never_run(opened):
    torch.manual_seed(0)
    model = DecoderLM(ModelConfig(256, 1, nsa=NSAConfig.small()))
    traces = model(torch.randint(256, (1, 40)), return_traces=True)[1]
    evil = [
        "<script>document.title = 'run'</script>",
        "</script>",
        "<img src=x onerror=alert(1)>",
        "&lt;b&gt;",
    ]
    page = opened(SelectionExplorer(traces, evil * 10), title="<i>safe</i>")
    assert page.title() == "<i>safe</i>" and page.locator("h1").text_content() == "<i>safe</i>"
    assert page.locator("img").count() == 0
    shown = page.locator(".nsa-reader").text_content()
    assert "</script> <img\u00b7src=x\u00b7onerror=alert(1)> &lt;b&gt;" in shown


@pytest.mark.parametrize("text", ["x", "x = 1", "x" * 8])
def test_one_token_and_one_block(opened, two_layers, text):
    model = DecoderLM(ModelConfig(256, 1, nsa=NSAConfig.small(num_selected=30)))
    e = SelectionExplorer.of_model(model, text)
    page = opened(e)
    assert sentence(page) == e.describe()
    settled(page)
    assert strip_kinds(page, e.sequence) == ["forced"]


def test_nothing_selected_and_scores_that_are_no_numbers(opened):
    torch.manual_seed(0)
    model = DecoderLM(SMALL_MODEL, ATTENTIONS["nsa-no-selection"].build)
    e = SelectionExplorer.of_model(model, "x" * 64)
    page = opened(e)
    assert sentence(page) == e.describe() and "selected none" in e.describe()
    assert strip_kinds(page, e.sequence) == ["unused"] * 8
    assert page.get_by_label("n", exact=True).is_disabled()

    model = DecoderLM(ModelConfig(256, 1, nsa=NSAConfig.small()))
    (trace,) = model(torch.randint(256, (1, 64)), return_traces=True)[1]
    importance = trace.importance.clone()
    importance[..., 3] = torch.nan
    ids = choose_blocks(importance, select_block_size=8, num_selected=5)
    e = SelectionExplorer(dataclasses.replace(trace, importance=importance, ids=ids))
    page = opened(e)
    assert sentence(page) == e.describe()
    settled(page)
    assert strip_kinds(page, e.sequence) == true_kinds(e.sequence, ids[0, 0, 63], 63)
    assert "scores of blocks 3 are NaN" in page.locator(".nsa-remarks").text_content()
