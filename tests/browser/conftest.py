"""The explorer in a real browser: `make test-browser` runs these, a plain pytest leaves them out.

Screenshots are kept in build/screenshots.
"""

import os
import shutil
from pathlib import Path

import pytest

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
