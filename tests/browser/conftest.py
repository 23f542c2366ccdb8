"""The explorer in a real browser: `make test-browser` runs these, a plain pytest leaves them out.

Screenshots are kept in build/screenshots.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch

from nsa_lite import DecoderLM, ModelConfig, NSAConfig
from nsa_lite.show.explorer import SelectionExplorer, load_traces
from tests.browser.driving import READY, wait

WANTED = "NSA_LITE_BROWSER" in os.environ
ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "build/screenshots"
collect_ignore_glob = [] if WANTED else ["test_*.py"]


def pytest_terminal_summary(terminalreporter) -> None:
    if not WANTED:
        terminalreporter.write_line("tests/browser is left out; `make test-browser` runs it")


@pytest.fixture(scope="session")
def chromium():
    """Debian's Chromium (or Chrome), headless."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if found is None:
        pytest.exit(
            "There is no Chromium here: install it (on Debian: apt install chromium), "
            "then run make test-browser again.",
            returncode=1,
        )
    arguments = ["--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # Chromium's own sandbox refuses to run as root
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def two_layers():
    """An explorer of two layers and two groups, with random weights."""
    torch.manual_seed(0)
    model = DecoderLM(ModelConfig(256, 2, nsa=NSAConfig.small()))
    return SelectionExplorer.of_model(model, "def f(x):\n    return (x, x)\n" * 4)


@pytest.fixture(scope="session")
def recall():
    """The recorded run of notebook 14: nine checkpoints, sixteen questions."""
    return SelectionExplorer(load_traces(ROOT / "notebooks/recorded/selection_recall.npz")[0])


@pytest.fixture(scope="session")
def haystack():
    """The recorded look at 65,536 tokens: the queries that ask, three rules."""
    return SelectionExplorer(load_traces(ROOT / "notebooks/recorded/selection_haystack.npz")[0])


@pytest.fixture
def opened(chromium, tmp_path):
    """A function that saves an explorer and opens the file, offline; no error may be logged."""
    context = chromium.new_context(viewport={"width": 1100, "height": 860}, accept_downloads=True)
    context.set_offline(True)
    problems = []
    asked = []
    context.on("request", lambda request: asked.append(request.url))

    def open_page(explorer, address: str = "", **options):
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.goto(explorer.save_html(tmp_path / "page.html", **options).as_uri() + address)
        wait(page, READY)
        return page

    yield open_page
    context.close()
    assert not problems
    assert all(url.startswith(("file:", "data:")) for url in asked), asked
