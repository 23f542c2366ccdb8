"""A Sphinx extension: equations are set when the site is built, so that pages need no script.

KaTeX runs in Node.js and gives HTML, and MathML for those who listen. A formula that it cannot read
is an error of the build.
"""

import json
import subprocess
from functools import cache
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

HERE = Path(__file__).parent


@cache
def node() -> subprocess.Popen:
    """One Node.js that sets formulas, a line each way."""
    return subprocess.Popen(
        ["node", HERE / "katex.mjs"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


@cache
def typeset(formula: str, display: bool) -> dict[str, str]:
    """{"html": ...}, or {"error": ...}."""
    process = node()
    process.stdin.write(json.dumps({"formula": formula, "display": display}) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def show(translator, element: nodes.Element, display: bool) -> None:
    """Add a formula to the page."""
    formula = element.astext()
    result = typeset(formula, display)
    if "error" in result:
        logger = logging.getLogger(__name__)
        logger.warning("%s in %r", result["error"], formula, location=element)
    html = result.get("html", formula)
    translator.body.append(f'<div class="math-block">{html}</div>' if display else html)
    raise nodes.SkipNode


def inline(translator, element: nodes.Element) -> None:
    """A formula in a line."""
    show(translator, element, display=False)


def block(translator, element: nodes.Element) -> None:
    """A formula on a line of its own."""
    show(translator, element, display=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_html_math_renderer("katex", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
