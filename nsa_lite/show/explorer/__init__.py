"""Look at what a trace selected: in a notebook, in one HTML page, as a picture or a sentence."""

try:
    import anywidget  # noqa: F401
except ImportError as error:
    raise ImportError(
        "nsa_lite.show.explorer needs the package anywidget, which `make lab` installs: "
        "pip install -c constraints.txt anywidget"
    ) from error

from nsa_lite.show.explorer.recording import load_traces, save_traces
from nsa_lite.show.explorer.widget import SelectionExplorer

__all__ = ["SelectionExplorer", "load_traces", "save_traces"]
