"""The explorer in JupyterLab, in a real browser: run, moved, heard from Python, saved, read unrun.

Two explorers in a small notebook, as `make lab` would show them, and notebook 14 itself.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from jupyter_client import BlockingKernelClient
from nbclient import NotebookClient

from nsa_lite.show.explorer import SelectionExplorer, load_traces
from tests.browser.conftest import ROOT, SCREENSHOTS
from tests.browser.drawn import strip_kinds, true_kinds

COURSE = "14_see_the_selection.ipynb"
NOTEBOOK = "explorers.ipynb"
CELLS = (
    "from nsa_lite.show.explorer import SelectionExplorer, load_traces",
    "recall = SelectionExplorer(load_traces('recorded/selection_recall.npz')[0])\nrecall",
    "second = SelectionExplorer(recall.sequence)\nsecond.layer = 1\nsecond",
)
# A notebook's cells are all in the page, also those out of sight; and no news pop up.
SETTINGS = {"@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"}}
NO_NEWS = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a free port, with a copy of the notebook; its address and its folder."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(ROOT / "notebooks" / COURSE, folder)
    shutil.copytree(ROOT / "notebooks/recorded", folder / "recorded")
    write_notebook(folder)
    for name, setting in SETTINGS.items():
        path = folder / "settings" / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(setting), "utf-8")
    (folder / "config/labconfig").mkdir(parents=True)
    (folder / "config/labconfig/page_config.json").write_text(json.dumps(NO_NEWS), "utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_CONFIG_PATH": str(ROOT / ".jupyter"),  # as `make lab` has it
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "PYTHONPATH": str(ROOT),
    }
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
             f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
             f"--ServerApp.root_dir={folder}", "--IdentityProvider.token=",
             "--LabApp.expose_app_in_browser=True"],
            cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            wait_for_server(f"http://127.0.0.1:{port}", folder / "log", server)
            yield f"http://127.0.0.1:{port}", folder
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(20)


def write_notebook(folder) -> None:
    """The small notebook, run and stored as `make notebooks` stores those of the course."""
    sys.path.insert(0, str(ROOT / "notebooks"))
    import finish

    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    kernel = {"name": "python3", "display_name": "Python 3"}
    nb = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    where = {"metadata": {"path": str(folder)}}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    NotebookClient(nb, resources=where, store_widget_state=False).execute(env=environment)
    (folder / NOTEBOOK).write_text(finish.as_opened(nbformat.writes(nb)), "utf-8")


def wait_for_server(address, log, server) -> None:
    for _ in range(300):
        try:
            return urllib.request.urlopen(f"{address}/api/status", timeout=5).close()
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def context(chromium):
    context = chromium.new_context(viewport={"width": 1400, "height": 1000})
    yield context
    context.close()


def opened(context, lab, notebook: str):
    """A notebook in a page of its own, not yet run."""
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(f"{lab[0]}/lab/tree/{notebook}?reset")  # without those of another test
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    return page


NOW = "window.jupyterapp.shell.currentWidget"
LIVE = "[...document.querySelectorAll('.nsa-explorer')].filter((e) => e.explorer).length"


def idle(page) -> None:
    """Wait until the notebook has its kernel."""
    page.wait_for_function(f"{NOW}?.context?.isReady")
    page.wait_for_function(f"{NOW}.sessionContext.session?.kernel?.status === 'idle'")


@pytest.fixture(scope="module")
def page(context, lab):
    """The small notebook, opened and not yet run."""
    return opened(context, lab, NOTEBOOK)


@pytest.fixture(scope="module")
def run(page):
    """The small notebook, run from the top; its explorers, in order."""
    idle(page)
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function(f"{LIVE} === 2")
    return page.locator(".nsa-explorer")


class In:
    """One explorer of the notebook, with the part of a page's interface that we need."""

    def __init__(self, page, root) -> None:
        self.page, self.locator, self.root = page, root.locator, root

    def says(self, expected: str, where: str = ".nsa-sentence") -> None:
        """Wait until the sentence is what it should be."""
        self.page.wait_for_function(
            "([root, where, words]) => root.querySelector(where).textContent === words",
            arg=[self.root.element_handle(), where, expected],
            timeout=10_000,
        )

    def slide(self, name: str, key: str) -> None:
        self.root.get_by_label(name, exact=True).press(key)


def kernel(folder) -> BlockingKernelClient:
    """A second client of the kernel that ran the notebook."""
    (connection,) = (folder / "runtime").glob("kernel-*.json")
    client = BlockingKernelClient(connection_file=str(connection))
    client.load_connection_file()
    client.start_channels()
    return client


def value(client: BlockingKernelClient, expression: str) -> object:
    """What an expression is in the kernel."""
    asked = {"x": f"__import__('json').dumps({expression})"}
    reply = client.execute_interactive(
        "", user_expressions=asked, timeout=30, output_hook=lambda _: None
    )
    shown = reply["content"]["user_expressions"]["x"]
    assert shown["status"] == "ok", shown
    return json.loads(eval(shown["data"]["text/plain"]))


def test_an_unrun_notebook_shows_the_stored_picture_and_is_not_changed(page):
    area = page.locator(".jp-OutputArea-output img")
    area.first.wait_for(state="attached")
    assert area.count() == 2
    assert area.first.evaluate("image => image.naturalWidth") > 300
    idle(page)
    page.wait_for_timeout(500)  # JupyterLab writes its kernel's name and language once it runs
    assert not page.evaluate(f"{NOW}.context.model.dirty")


def test_the_explorers_draw_what_the_traces_hold(run, page):
    sequence, _ = load_traces(ROOT / "notebooks/recorded/selection_recall.npz")
    explorer = SelectionExplorer(sequence)
    for layer in (0, 1):
        here = In(page, run.nth(layer))
        here.slide("query", "End")
        explorer.layer = layer
        here.says(explorer.describe())
        ids = sequence.checkpoints["step 1500"][layer].ids[0, 0, -1]
        assert strip_kinds(here, sequence) == true_kinds(sequence, ids, explorer.query)
    run.first.screenshot(path=SCREENSHOTS / "lab.png")


def test_every_control_reaches_its_ends_and_python_sees_it(run, page, lab):
    here = In(page, run.first)
    client = kernel(lab[1])
    for name, (low, high) in value(client, "recall.sequence.ranges()").items():
        if low == high:
            assert here.root.get_by_label(name, exact=True).is_disabled()
            continue
        for key, end in (("Home", low), ("End", high)):
            here.slide(name, key)
            deadline = time.monotonic() + 10
            while value(client, f"recall.{name}") != end:
                assert time.monotonic() < deadline, (name, key)
    here.slide("zoom", "End")
    here.slide("zoom", "Home")
    value(client, "setattr(recall, 'n', 6)")
    value(client, "setattr(recall, 'query', 17)")
    here.says(value(client, "recall.describe(17)"))  # Python moves it, too
    client.stop_channels()


def test_python_opens_the_second_pane_and_the_reader_closes_it(run, page, lab):
    here = In(page, run.first)
    client = kernel(lab[1])
    beside = "dict(checkpoint=0, layer=0, group=0)"
    value(client, f"setattr(recall, 'beside', {beside})")
    here.says(value(client, "recall.difference()"), where=".nsa-difference")
    here.root.get_by_label("beside: checkpoint").press("End")
    high = value(client, "recall.sequence.ranges()")["checkpoint"][1]
    deadline = time.monotonic() + 10
    while value(client, "recall.beside['checkpoint']") != high:
        assert time.monotonic() < deadline
    here.root.get_by_role("button", name="One pane").click()
    while value(client, "recall.beside") is not None:
        assert time.monotonic() < deadline
    client.stop_channels()


def test_keys_move_the_query_and_leave_the_notebook_alone(run, page, lab):
    here = In(page, run.first)
    client = kernel(lab[1])
    active = f"{NOW}.content.activeCellIndex"
    at_map = here.locator(".nsa-map")
    at_map.click(position={"x": 100, "y": 100})
    cells = f"{NOW}.content.widgets.length"
    count = page.evaluate(cells)
    cell = page.evaluate(active)
    for key, query in (
        ("Home", 0),
        ("ArrowDown", 1),
        ("ArrowDown", 2),
        ("ArrowUp", 1),
        ("End", 103),
    ):
        at_map.press(key)
        here.says(value(client, f"recall.describe({query})"))
    for key in ("a", "b", "d", "d"):  # JupyterLab's own: new cells, and away with one
        at_map.press(key)
    assert (page.evaluate(cells), page.evaluate(active)) == (count, cell)
    here.says(value(client, "recall.describe(103)"), where="[role=status]")
    client.stop_channels()


def test_saved_and_opened_again_without_its_kernel_the_explorers_live(run, page, context, lab):
    address, folder = lab
    here = In(page, run.first)
    here.slide("query", "Home")
    here.slide("query", "ArrowRight")
    client = kernel(folder)
    said = [value(client, f"recall.describe({query})") for query in (1, 2)]
    client.stop_channels()
    here.says(said[0])
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_function(f"!{NOW}.context.model.dirty")
    saved = json.loads((folder / NOTEBOOK).read_text("utf-8"))
    assert "application/vnd.jupyter.widget-state+json" in saved["metadata"]["widgets"]
    page.evaluate(f"{NOW}.sessionContext.shutdown()")
    page.close()
    again = opened(context, lab, NOTEBOOK)
    again.wait_for_function(f"{LIVE} === 2")
    assert "model not found" not in again.locator(".jp-Notebook").text_content()
    shown = In(again, again.locator(".nsa-explorer").first)
    shown.says(said[0])
    shown.slide("query", "ArrowRight")  # and it is no picture
    shown.says(said[1])
    again.close()


def test_notebook_14_shows_its_pictures_and_then_its_explorers(context, lab):
    stored = json.loads((ROOT / "notebooks" / COURSE).read_text("utf-8"))["cells"]
    outputs = [o for cell in stored for o in cell.get("outputs", [])]
    said = ["".join(o.get("data", {}).get("text/plain", "")) for o in outputs]
    explorers = sum(words.startswith("query ") for words in said)
    assert explorers >= 3
    course = opened(context, lab, COURSE)
    idle(course)
    course.wait_for_timeout(500)
    assert not course.evaluate(f"{NOW}.context.model.dirty")
    assert course.locator(".jp-OutputArea-output img").count() >= explorers
    assert "model not found" not in course.locator(".jp-Notebook").text_content()
    course.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    course.wait_for_function(f"{LIVE} === {explorers}", timeout=180_000)
    course.close()
