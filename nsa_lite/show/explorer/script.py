"""The browser's side as one module: the files of js/ joined, each of them one idea."""

from pathlib import Path

HERE = Path(__file__).parent
# In the order in which one reads them; what a file uses stands in the files before it.
PARTS = (
    "looks",
    "trace",
    "sheet",
    "map",
    "strip",
    "words",
    "text",
    "controls",
    "pane",
    "picture",
    "tools",
    "explorer",
    "address",
    "start",
)


def script() -> str:
    """JavaScript: one module that exports what anywidget calls, and has a page's openPage."""
    return "\n".join((HERE / f"js/{part}.js").read_text("utf-8") for part in PARTS)


def style() -> str:
    """CSS: the explorer's own, light and dark."""
    return (HERE / "explorer.css").read_text("utf-8")
