"""What a person does with a page, and what the page says to it."""

import time

READY = "document.querySelector('.nsa-explorer')?.explorer && true"
EXPLORER = "document.querySelector('.nsa-explorer').explorer"


def wait(page, expression: str, seconds: float = 15) -> None:
    """Until a JavaScript expression holds; the page's own policy forbids it to poll by itself."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not within {seconds} s: {expression}"
        page.wait_for_timeout(50)


def sentence(page) -> str:
    page.evaluate("new Promise(requestAnimationFrame)")
    return page.locator(".nsa-sentence").first.text_content()


def slide(page, name: str, key: str) -> None:
    page.get_by_label(name, exact=True).press(key)


def settled(page) -> None:
    """After the frame in which a change is drawn."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def view(page) -> dict:
    """What is looked at."""
    return page.evaluate(f"{EXPLORER}.view")


def choose(page, **choices: int) -> None:
    """Set what a slider sets."""
    for name, value in choices.items():
        page.evaluate(f"([name, value]) => {EXPLORER}.choose(name, value)", [name, value])
    settled(page)
