"""What JupyterLab would change in a notebook on opening it, or could not show, is mended first."""

import json
import sys
from pathlib import Path

import pytest
from jupyter_client.kernelspec import get_kernel_spec

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted([*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("exercises/*/*.ipynb")])
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def finish(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    import finish

    return finish


def test_the_kernel_is_named_as_jupyterlab_names_it(finish):
    spec = get_kernel_spec("python3")
    assert finish.KERNEL == {
        "display_name": spec.display_name,
        "language": spec.language,
        "name": "python3",
    }
    assert f"Python {sys.version_info.major}" in spec.display_name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stored_as_jupyterlab_leaves_it(finish, path):
    text = path.read_text("utf-8")
    assert finish.as_opened(text) == text, "run python notebooks/finish.py"
    notebook = json.loads(text)
    assert notebook["metadata"]["kernelspec"] == finish.KERNEL
    assert "widgets" not in notebook["metadata"] and WIDGET not in text


def test_a_widget_leaves_its_picture_and_a_kernel_its_name(finish):
    data = {WIDGET: {"model_id": "7"}, "image/png": "iVBOR", "text/plain": "query 3"}
    cell = {"cell_type": "code", "outputs": [{"data": data, "output_type": "display_data"}]}
    old = {"cells": [cell, {"cell_type": "markdown", "source": "\u00e9"}], "metadata": {}}
    new = json.loads(finish.as_opened(json.dumps(old)))
    assert new["cells"][0]["outputs"][0]["data"] == {"image/png": "iVBOR", "text/plain": "query 3"}
    assert new["metadata"] == {"kernelspec": finish.KERNEL}
    assert new["cells"][1] == old["cells"][1]
