"""What `make notebooks` does after running them: no machine's paths, small pictures, the README's.

Pictures are stored with the 256 colours that fit them best. A notebook names its kernel as
JupyterLab does, which marks it as changed otherwise as soon as it is opened; and of a widget the
picture stays alone: without its kernel JupyterLab would show "model not found" in the picture's
place. The README's picture is the stored output of the cell of 00 tagged "readme-picture": made by
that cell.
"""

import base64
import io
import json
import os
import re
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
WIDGET = "application/vnd.jupyter.widget-view+json"


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


def packed(picture: bytes) -> bytes:
    """The same PNG with 256 colours, if that takes fewer bytes and it is opaque.

    Lines and their soft edges lose nothing that an eye would see; an already packed one stays.
    """
    image = Image.open(io.BytesIO(picture))
    if image.mode == "P" or image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        return picture
    few = image.convert("RGB").quantize(256, kmeans=2, dither=Image.Dither.NONE)
    out = io.BytesIO()
    few.save(out, "PNG", optimize=True, dpi=image.info.get("dpi"))
    return min(picture, out.getvalue(), key=len)


def small_pictures(text: str) -> str:
    """A notebook's text with every stored PNG packed."""

    def smaller(found: re.Match) -> str:
        again = packed(base64.b64decode(found[2].replace("\\n", "")))
        return f'{found[1]}"{base64.b64encode(again).decode()}"'

    return re.sub(r'("image/png": )"([^"]+)"', smaller, text)


def as_opened(text: str) -> str:
    """A notebook's text with what JupyterLab would change on opening it, or could not show."""
    notebook = json.loads(text)
    notebook["metadata"]["kernelspec"] = KERNEL
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for path in HERE.glob("*.ipynb"):
        text = small_pictures(relative_paths(path.read_text("utf-8")))
        path.write_text(as_opened(text), "utf-8")
    for path in HERE.parent.glob("exercises/*/*.ipynb"):
        path.write_text(as_opened(path.read_text("utf-8")), "utf-8")
    (HERE / "query_reads.png").write_bytes(readme_picture())
