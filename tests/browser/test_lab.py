"""Notebook 14 in JupyterLab, in a real browser: run, moved, heard from Python, and read unrun."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from jupyter_client import BlockingKernelClient

from nsa_lite.show.explorer import SelectionExplorer, load_traces
from tests.browser.conftest import ROOT, SCREENSHOTS
from tests.browser.drawn import strip_kinds, true_kinds

NOTEBOOK = "14_see_the_selection.ipynb"
# A notebook's cells are all in the page, also those out of sight; and no news pop up.
SETTINGS = {"@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"}}
NO_NEWS = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a free port, with a copy of the notebook; its address and its folder."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(ROOT / "notebooks" / NOTEBOOK, folder)
    shutil.copytree(ROOT / "notebooks/recorded", folder / "recorded")
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


def wait_for_server(address, log, server) -> None:
    for _ in range(300):
        try:
            return urllib.request.urlopen(f"{address}/api/status", timeout=5).close()
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def page(lab, chromium):
    """The notebook, opened and not yet run."""
    context = chromium.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(f"{lab[0]}/lab/tree/{NOTEBOOK}")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    yield page
    context.close()


@pytest.fixture(scope="module")
def run(page):
    """The notebook, run from the top; its explorers, in order."""
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.context?.isReady")
    page.wait_for_function(
        "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'"
    )
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function(
        "[...document.querySelectorAll('.nsa-explorer')].filter((e) => e.explorer).length === 3"
    )
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


def test_an_unrun_notebook_shows_the_stored_picture_and_sentence(page):
    sentences = page.locator(".jp-OutputArea-output", has_text="Shown: query 103:")
    sentences.first.wait_for(state="attached")
    area = page.locator(".jp-OutputArea", has_text="Shown: query 103:").first
    assert area.locator("img").count() == 1
    assert area.locator("img").evaluate("image => image.naturalWidth") > 300
    area.screenshot(path=SCREENSHOTS / "unrun.png")


def test_three_explorers_draw_what_the_traces_hold(run, page):
    for place, task in ((1, "recall"), (2, "text")):
        sequence, _ = load_traces(ROOT / f"notebooks/recorded/selection_{task}.npz")
        explorer = SelectionExplorer(sequence)
        here = In(page, run.nth(place))
        here.slide("query", "End")
        if task == "text":
            here.slide("layer", "Home")
        last = sequence.length - 1
        explorer.query = last
        here.says(explorer.describe())
        ids = list(sequence.checkpoints.values())[-1][0].ids[0, 0, -1]
        assert strip_kinds(here, sequence) == true_kinds(sequence, ids, last)
    run.nth(1).screenshot(path=SCREENSHOTS / "lab.png")


def test_every_control_reaches_its_ends_and_python_sees_it(run, page, lab):
    here = In(page, run.nth(1))
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


def test_keys_move_the_query_and_leave_the_notebook_alone(run, page, lab):
    here = In(page, run.nth(1))
    client = kernel(lab[1])
    active = "window.jupyterapp.shell.currentWidget.content.activeCellIndex"
    at_map = here.locator(".nsa-map")
    at_map.click(position={"x": 100, "y": 100})
    cells = "window.jupyterapp.shell.currentWidget.content.widgets.length"
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
