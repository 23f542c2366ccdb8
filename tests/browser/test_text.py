"""The text of the explorer: every token, how the query reads it, hovered, chosen and searched."""

import pytest
import torch

from nsa_lite import DecoderLM, ModelConfig, NSAConfig
from nsa_lite.show.explorer import SelectionExplorer
from tests.browser.driving import EXPLORER, choose, sentence, settled, view

# The tokens that are made, each with its classes and what is spoken of it.
SPANS = """() => [...document.querySelectorAll('.nsa-text [data-s]')].map((span) => ({
  s: Number(span.dataset.s), text: span.textContent, kinds: span.className.split(' '),
  said: span.getAttribute('aria-label'), hatch: getComputedStyle(span).backgroundImage,
  ground: getComputedStyle(span).backgroundColor,
}))"""
WORDS = {
    "forced": "forced",
    "selected": "selected",
    "window": "in the window",
    "compressed": "compressed only",
    "unread": "not read",
    "unseen": "not yet seen",
}


def kind_of_token(e: SelectionExplorer, t: int, s: int) -> str:
    """How query t reads token s, from the paper's rules alone."""
    c = e.sequence.config
    j = s // c.select_block_size
    if s > t:
        return "unseen"
    if j in e.sequence.forced(t):
        return "forced"
    if j in e.selected(t):
        return "selected"
    if t - s < c.window:
        return "window"
    ends = [i * c.stride + c.block_size - 1 for i in range(s // c.stride + 1)]
    covers = any(end - c.block_size < s <= end <= t for end in ends)
    return "compressed" if covers else "unread"


@pytest.mark.parametrize("t", [5, 30, 77, 111])
def test_every_token_is_marked_by_colour_hatch_and_word(opened, two_layers, t):
    page = opened(two_layers)
    choose(page, query=t)
    spans = page.evaluate(SPANS)
    s = two_layers.sequence
    assert [span["s"] for span in spans] == list(range(s.length))
    looks = {}
    for span in spans:
        kind = kind_of_token(two_layers, t, span["s"])
        assert f"nsa-is-{kind}" in span["kinds"], span
        assert f"block {span['s'] // 8}: {WORDS[kind]}" in span["said"]
        if "nsa-focus" not in span["kinds"]:
            looks[kind] = (span["ground"], span["hatch"])
    assert len(set(looks.values())) == len(looks)
    hatches = [hatch for kind, (_, hatch) in looks.items() if kind not in ("unread", "unseen")]
    assert len(set(hatches)) == len(hatches) and "none" not in hatches


def test_a_hovered_token_is_previewed_and_a_clicked_one_chosen(opened, two_layers):
    page = opened(two_layers)
    preview = page.locator(".nsa-preview")
    token = page.locator(".nsa-text [data-s='40']")
    assert not preview.is_visible()
    token.hover()
    assert sentence(page) == two_layers.describe(40)
    assert preview.is_visible() and preview.text_content() == "preview"
    shown = page.locator("label", has=page.get_by_label("query", exact=True)).text_content()
    assert "111 (preview 40)" in shown  # the slider and the sentence do not contradict each other
    assert view(page)["query"] == 111
    letter = two_layers.sequence.tokens[40].replace(" ", "\u00b7")
    assert page.locator(".nsa-named").text_content() == f"\u201c{letter}\u201d"
    page.mouse.move(3, 3)
    assert sentence(page) == two_layers.describe(111) and not preview.is_visible()
    token.click()
    page.mouse.move(3, 3)
    assert sentence(page) == two_layers.describe(40) and view(page)["query"] == 40
    page.locator(".nsa-text [data-s='17']").click(modifiers=["Shift"])
    assert (view(page)["focus"], view(page)["query"]) == (2, 40)


@pytest.mark.parametrize("width", [390, 1024])
def test_nothing_moves_under_the_mouse(opened, two_layers, width):
    page = opened(two_layers)
    page.set_viewport_size({"width": width, "height": 900})
    settled(page)
    where = "document.querySelector('.nsa-map').getBoundingClientRect().top"
    before = page.evaluate(where)
    for s in (96, 100, 60, 8, 104):
        page.evaluate(f"([s]) => {EXPLORER}.preview(s)", [s])
        settled(page)
        assert page.evaluate(where) == before, s


def test_text_map_and_strip_point_at_the_same_block(opened, two_layers):
    page = opened(two_layers)
    page.locator(".nsa-strip").press("Home")
    settled(page)
    lit = [x["s"] for x in page.evaluate(SPANS) if "nsa-focus" in x["kinds"]]
    assert lit == list(range(8))
    now = [x["s"] for x in page.evaluate(SPANS) if "nsa-now" in x["kinds"]]
    assert now == [111]


def test_keys_in_the_text(opened, two_layers):
    page = opened(two_layers)
    text = page.locator(".nsa-text")
    # Lines: "def f(x):" of 10 signs with its end, "    return (x, x)" of 18.
    for key, query in (
        ("Home", 0),
        ("ArrowRight", 1),
        ("ArrowDown", 11),
        ("ArrowDown", 29),
        ("ArrowUp", 11),
        ("ArrowLeft", 10),
        ("End", 111),
    ):
        text.press(key)
        assert sentence(page) == two_layers.describe(query), key
        active = text.get_attribute("aria-activedescendant")
        spoken = page.locator(f"#{active}").get_attribute("aria-label")
        assert spoken.startswith(f"token {query} ") and spoken.endswith(", the query")


def test_the_question_and_its_answer_are_marked_and_the_next_one_is_a_key_away(opened, recall):
    page = opened(recall)
    s = recall.sequence
    asked = s.positions[s.answer_at >= 0].tolist()
    marks = page.evaluate(SPANS)
    assert [x["s"] for x in marks if "nsa-asks" in x["kinds"]] == asked
    assert [x["s"] for x in marks if "nsa-answer" in x["kinds"]] == [int(s.answer_at[103])]
    page.get_by_role("button", name="Next question").click()
    assert view(page)["query"] == asked[0]  # after the last comes the first
    page.locator(".nsa-text").press("q")
    assert view(page)["query"] == asked[1]
    page.locator(".nsa-map").press("q")
    assert view(page)["query"] == asked[2]
    page.locator(".nsa-map").press("Shift+Q")
    assert view(page)["query"] == asked[1]
    settled(page)
    (answer,) = [x["s"] for x in page.evaluate(SPANS) if "nsa-answer" in x["kinds"]]
    assert answer == int(s.answer_at[s.index[asked[1]]])


def test_a_word_is_found_again_and_again(opened, two_layers):
    page = opened(two_layers)
    box = page.get_by_label("find in the text")
    box.fill("RETURN")
    text = "".join(two_layers.sequence.tokens)
    places = [i for i in range(len(text)) if text.startswith("return", i)]
    for k in (0, 1, 2, 3, 0):
        settled(page)
        assert page.locator(".nsa-count").text_content() == f"{k + 1} of 4"
        spans = page.evaluate(SPANS)
        now = [x["s"] for x in spans if "nsa-hit-now" in x["kinds"]]
        assert now == list(range(places[k], places[k] + 6))
        assert sum("nsa-hit" in x["kinds"] for x in spans) == 18
        assert view(page)["focus"] == places[k] // 8 and view(page)["query"] == 111
        box.press("Enter")
    box.fill("nowhere")
    assert page.locator(".nsa-count").text_content() == "not found"
    page.locator(".nsa-map").press("/")
    assert box.evaluate("box => box === document.activeElement")


def test_a_word_inside_a_token_is_found(opened, recall):
    page = opened(recall)
    tokens = recall.sequence.tokens
    word = tokens[40][1:]
    page.get_by_label("find in the text").fill(word)
    settled(page)
    hit = [x["s"] for x in page.evaluate(SPANS) if "nsa-hit-now" in x["kinds"]]
    assert hit == [next(s for s, token in enumerate(tokens) if word in token)]


def test_signs_that_turn_or_hide_the_text_are_shown_and_kept_apart(opened, two_layers):
    long = "extraordinarily-long-token-number-one"
    tokens = ["a", "\u05d0\u05d1", "\u202ex", "b\u200bc", "\u0301", "\ufeff", long, "\u6f22\u5b57"]
    torch.manual_seed(0)
    model = DecoderLM(ModelConfig(256, 1, nsa=NSAConfig.small()))
    traces = model(torch.randint(256, (1, 40)), return_traces=True)[1]
    page = opened(SelectionExplorer(traces, tokens * 5))
    spans = page.evaluate(SPANS)
    shown = [x["text"] for x in spans[:8]]
    assert shown[:6] == [
        "a", "\u05d0\u05d1", "\u2039202E\u203ax", "b\u2039200B\u203ac", "\u25cc\u0301",
        "\u2039FEFF\u203a",
    ]  # fmt: skip
    assert long in spans[6]["said"]  # clipped to the eye, whole to the ear
    # Each token stands right of the one before it, whatever its direction of writing.
    lefts = page.evaluate(
        "[...document.querySelectorAll('.nsa-line')].map((line) => "
        "[...line.children].map((span) => span.getBoundingClientRect().left))"
    )
    assert all(line == sorted(line) for line in lefts)
    assert page.locator(".nsa-reader bdi").count() == 8
    # One long token does not keep the others from being read on the strip.
    page.get_by_label("zoom", exact=True).press("End")
    settled(page)
    drawn = page.evaluate(
        f"""() => {{
        const words = [], real = CanvasRenderingContext2D.prototype.fillText;
        CanvasRenderingContext2D.prototype.fillText = function (text, ...at) {{
          words.push(String(text));
          return real.call(this, text, ...at);
        }};
        {EXPLORER}.draw();
        CanvasRenderingContext2D.prototype.fillText = real;
        return words;
    }}"""
    )
    assert "\u6f22\u5b57" in drawn and "extraordina\u2026" in drawn


def test_only_the_lines_in_sight_are_made(opened):
    from tests.browser.test_page import long_trace

    page = opened(SelectionExplorer(long_trace(0), "x = (1)\n" * 512))
    assert page.locator(".nsa-line").count() < 30
    for key, s in (("Home", 0), ("End", 4095)):
        page.locator(".nsa-text").press(key)
        settled(page)
        assert page.locator(f".nsa-text [data-s='{s}']").is_visible()
    choose(page, query=2000)
    assert page.locator(".nsa-text [data-s='2000']").is_visible()


def test_what_was_missed_is_marked_drawn_and_said(opened, two_layers):
    page = opened(two_layers)
    s = two_layers.sequence
    for t in (60, 111):
        choose(page, query=t)
        place = two_layers.place
        mass = s.beyond[0][place.layer][place.group, s.index[t]]
        read = set(two_layers.selected(t))
        lost = {j: float(mass[j]) for j in range(t // 8 + 1) if j not in read}
        worst = max(lost, key=lost.get)
        remarks = page.locator(".nsa-remarks li").all_text_contents()
        (said,) = [line for line in remarks if line.startswith("missed: ")]
        whole, most = f"{sum(lost.values()):.2f}", f"{lost[worst]:.2f}"
        assert said == (
            f"missed: {whole.lstrip('0')} of dense attention's mass is on tokens that nothing "
            f"read, most of it in block {worst} ({most.lstrip('0')})"
        )
        assert sum(lost.values()) == pytest.approx(s.missed(place, t), abs=1e-6)
        marked = {
            x["s"] // 8
            for x in page.evaluate(SPANS)
            if {"nsa-missed", "nsa-missed-most"} & set(x["kinds"])
        }
        near = {j for j, x in lost.items() if abs(x - 0.02) < 0.001}
        window = s.window_first(t)
        true = {j for j, x in lost.items() if x >= 0.02 and j * 8 < window}
        assert marked - near == true - near
