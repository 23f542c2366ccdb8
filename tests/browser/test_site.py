"""The built site in a real browser, and every page's links: `make test-browser` builds it first.

It is served under a path of its own, as on GitHub Pages, and opened from the file system too.
"""

import functools
import http.server
import re
import threading
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from tests.browser.conftest import ROOT, SCREENSHOTS

SITE = ROOT / "build/site"
AXE = ROOT / ".venv/axe/node_modules/axe-core/axe.min.js"
PAGES = sorted(path for path in SITE.rglob("*.html") if "_static" not in path.parts)
# Ten pages of every kind, each in another width and light; a look at all of them takes minutes.
LOOKS = [(1280, "light"), (390, "dark"), (1280, "dark"), (390, "light")]
TEN = (
    "index",
    "notebooks/00_start_here",
    "notebooks/03_selection",
    "notebooks/08_first_triton_kernel",
    "notebooks/14_see_the_selection",
    "exercises/03_selection/exercises_03",
    "equations",
    "skills",
    "glossary",
    "benchmarks/NOTES",
)


class Page(HTMLParser):
    """What the tests ask of a page's text: where it leads, what can be led to, its pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.pictures: list[dict[str, str | None]] = []
        self.frames: list[dict[str, str | None]] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.places |= {values[name] for name in ("id", "name") if values.get(name)}
        self.links += [values[name] for name in ("href", "src") if values.get(name)]
        if tag == "img":
            self.pictures.append(values)
        if tag == "iframe":
            self.frames.append(values)


@functools.cache
def read(path: Path) -> Page:
    return Page(path)


@pytest.fixture(scope="module", autouse=True)
def built():
    assert (SITE / "index.html").exists(), "the site is not built: make test-browser builds it"
    assert AXE.exists(), "axe-core is not here: make test-browser installs it"


# --- every page's text ---


def test_every_notebook_and_set_has_a_page():
    for path in [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("exercises/*/exercises_*.ipynb")]:
        assert (SITE / path.relative_to(ROOT).with_suffix(".html")).exists()


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_a_page_shows_what_its_notebook_stored(path):
    page = (SITE / "notebooks" / f"{path.stem}.html").read_text("utf-8")
    shown = re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", "", page)))
    outputs = [
        output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])
    ]
    printed = [output.text for output in outputs if output.output_type == "stream"]
    missing = [text for text in printed if " ".join(text.split()) not in shown]
    assert len(printed) > 15 and not missing
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    framed = page.count("<noscript><img ")
    assert page.count("../_images/") + framed >= pictures


def test_links_within_the_site_lead_somewhere():
    broken = []
    for path in PAGES:
        for link in read(path).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                broken.append(f"{path.relative_to(SITE)}: {link}")
                continue
            anchored = parts.fragment and target.suffix == ".html"
            if anchored and unquote(parts.fragment) not in read(target).places:
                broken.append(f"{path.relative_to(SITE)}: no such place: {link}")
    assert not broken


def test_no_link_begins_at_the_root_of_a_host():
    """Under any base path, and from a file system."""
    assert not [link for path in PAGES for link in read(path).links if link.startswith("/")]


def test_every_picture_has_words_and_every_frame_a_title():
    without = [
        f"{path.relative_to(SITE)}: {picture.get('src', '')[:60]}"
        for path in PAGES
        for picture in read(path).pictures
        if not (picture.get("alt") or "").strip()
    ]
    assert not without
    assert sum(len(read(path).pictures) for path in PAGES) > 100
    frames = [frame for path in PAGES for frame in read(path).frames]
    assert len(frames) >= 4 and all(frame.get("title") for frame in frames)


def test_the_hidden_tests_stay_out():
    for path in SITE.rglob("exercises_*.html"):
        assert "hidden_check" not in path.read_text("utf-8")


# --- in the browser ---


class Silent(http.server.SimpleHTTPRequestHandler):
    """A server of files that logs nothing."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  its own name
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The site under http://127.0.0.1:port/site/."""
    handler = functools.partial(Silent, directory=str(SITE.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/site/"
        server.shutdown()


@pytest.fixture
def opened(chromium):
    """A function that opens an address; only that host may be asked, and no error be logged."""
    contexts = []
    asked = []
    problems = []

    def open_page(url: str, width: int = 1280, scheme: str = "light"):
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        )
        contexts.append(context)
        host = urlsplit(url)[:2]
        context.on("request", lambda r: asked.append((r.url, host)))
        context.on("weberror", lambda error: problems.append(str(error.error)))
        page = context.new_page()
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems
    others = [u for u, host in asked if urlsplit(u)[:2] != host and not u.startswith("data:")]
    assert asked and not others


@pytest.mark.parametrize(
    ("name", "look"),
    [(name, LOOKS[i % len(LOOKS)]) for i, name in enumerate(TEN)],
    ids=lambda value: value if isinstance(value, str) else f"{value[0]}-{value[1]}",
)
def test_a_page_fits_is_complete_and_can_be_read_by_all(opened, address, name, look):
    page = opened(f"{address}{name}.html", *look)
    assert page.evaluate("document.documentElement.dataset.theme") == look[1]
    assert page.evaluate("document.documentElement.scrollWidth") <= look[0]
    page.evaluate(AXE.read_text("utf-8"))
    # The visible half of an equation is hidden from those who listen: they get its MathML.
    run = "axe.run({ exclude: [['.katex-html']] }, { resultTypes: ['violations'] })"
    found = page.evaluate(run)["violations"]
    told = [
        (x["id"], x["nodes"][0]["html"])
        for x in found
        if x["impact"] in ("moderate", "serious", "critical")
    ]
    page.screenshot(path=SCREENSHOTS / f"site-{name.split('/')[-1]}-{look[0]}-{look[1]}.png")
    assert not told


def test_from_the_file_system_with_its_equations_search_and_dark_mode(opened):
    page = opened((SITE / "notebooks/03_selection.html").as_uri())
    assert page.locator(".katex").count() > 50
    font = "getComputedStyle(document.querySelector('.katex')).fontFamily"
    assert page.evaluate(font).startswith("KaTeX")
    assert page.evaluate("document.fonts.ready.then((f) => [...f].some((x) => x.family === "
                         "'KaTeX_Math' && x.status === 'loaded'))")  # fmt: skip
    page.get_by_label("Color mode").click()
    page.get_by_role("button", name="Dark").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.goto((SITE / "search.html").as_uri() + "?q=importance")
    page.locator("#search-results li a").nth(4).wait_for()  # Sphinx lists them one by one


def test_an_explorer_is_live_on_its_page_and_alone(opened):
    page = opened((SITE / "notebooks/14_see_the_selection.html").as_uri())
    frame = page.locator("iframe.explorer").first
    frame.scroll_into_view_if_needed()
    inside = frame.content_frame
    inside.locator(".nsa-explorer canvas").first.wait_for()
    before = inside.locator(".nsa-sentence").text_content()
    inside.get_by_label("query", exact=True).press("Home")
    assert inside.locator(".nsa-sentence").text_content() != before
    page.locator(".full-page a").first.click()
    page.locator(".nsa-explorer canvas").first.wait_for()


def test_the_first_use_of_a_term_is_a_link_to_the_glossary(opened, address):
    page = opened(f"{address}notebooks/03_selection.html")
    terms = page.locator("a.term")
    names = [re.sub("s$", "", name.lower()) for name in terms.all_text_contents()]
    assert len(names) > 10 and len(names) == len(set(names))
    page.get_by_role("link", name="compression blocks", exact=True).first.click()
    place = page.locator(":target")
    assert place.text_content().strip().startswith("compression block")


def test_previous_and_next_go_from_part_to_part(opened, address):
    page = opened(f"{address}notebooks/06_how_selection_learns.html")
    page.locator("a.right-next").click()
    assert page.url.endswith("/07_online_softmax.html")
    page.locator("a.left-prev").click()
    assert page.url.endswith("/06_how_selection_learns.html")


def test_a_solution_unfolds(opened, address):
    page = opened(f"{address}exercises/03_selection/exercises_03.html")
    solution = page.locator("details", has_text="A solution").first
    code = solution.locator("pre")
    assert not code.is_visible()
    solution.locator("summary").click()
    assert code.is_visible() and "def probabilities" in code.text_content()
