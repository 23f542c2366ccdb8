"""What `make notebooks` does after running them: no machine's paths, and the README's picture.

The picture is the stored output of the cell of 00 tagged "readme-picture": made by that cell.
"""

import base64
import json
import os
from pathlib import Path

HERE = Path(__file__).parent


def readme_picture() -> bytes:
    """The PNG that the tagged cell of 00 stored."""
    cells = json.loads((HERE / "00_start_here.ipynb").read_text("utf-8"))["cells"]
    tagged = next(c for c in cells if "readme-picture" in c["metadata"].get("tags", []))
    data = next(o["data"] for o in tagged["outputs"] if "image/png" in o.get("data", {}))
    return base64.b64decode(data["image/png"])


def relative_paths(text: str) -> str:
    """A stored error names the files it went through: name them from the project's folder."""
    root = f"{HERE.parent.resolve()}/"
    home = os.path.expanduser("~")
    return text.replace(root, "").replace(root.replace(home, "~", 1), "")


if __name__ == "__main__":
    for path in HERE.glob("*.ipynb"):
        path.write_text(relative_paths(path.read_text("utf-8")), "utf-8")
    (HERE / "query_reads.png").write_bytes(readme_picture())
