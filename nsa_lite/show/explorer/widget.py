"""The explorer as a Jupyter widget: JavaScript draws it, and the cell keeps a picture as well."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import anywidget
import matplotlib.pyplot as plt
import torch
import traitlets
from PIL import Image
from torch import Tensor

from nsa_lite import DecoderLM
from nsa_lite.checks import require, require_instance, require_int
from nsa_lite.show.explorer.arguments import Traces
from nsa_lite.show.explorer.packing import packed_within
from nsa_lite.show.explorer.page import page_of
from nsa_lite.show.explorer.picture import draw_queries, two_queries
from nsa_lite.show.explorer.script import script, style
from nsa_lite.show.explorer.sequence import Place, TracedSequence, id_list

HERE = Path(__file__).parent
WIDGET_LIMIT = 32_000_000  # bytes sent to the notebook, at most, unless the scores alone are more


class SelectionExplorer(anywidget.AnyWidget):
    """See what each query of a trace selects, and why; `query`, `n` ... can be set from Python.

    traces: a Trace, a list of them (one a layer), a dict of such (one a checkpoint of a training
    run), or what load_traces gives. tokens: a string, bytes or one string a position. answer_at
    (T,): where the answer of each query stands, -1 for none. row: which sequence of the batch.
    beside: None, or the checkpoint, layer and group of a second pane, {"checkpoint": 0, ...}.
    Errors: ValueError or TypeError that names the argument.
    """

    _esm = script()
    _css = style()
    data = traitlets.Bytes().tag(sync=True)
    facts = traitlets.Dict().tag(sync=True)
    query = traitlets.Int().tag(sync=True)
    checkpoint = traitlets.Int().tag(sync=True)
    layer = traitlets.Int().tag(sync=True)
    group = traitlets.Int().tag(sync=True)
    n = traitlets.Int().tag(sync=True)
    beside = traitlets.Dict(allow_none=True, default_value=None).tag(sync=True)

    def __init__(
        self,
        traces: Traces | TracedSequence,
        tokens: str | bytes | Iterable[str] | None = None,
        answer_at: Tensor | None = None,
        row: int = 0,
    ) -> None:
        if isinstance(traces, TracedSequence):
            self.sequence = traces
        else:
            self.sequence = TracedSequence(traces, tokens, answer_at, row)
        facts, data = packed_within(self.sequence, WIDGET_LIMIT)
        super().__init__(
            facts=facts,
            data=data,
            query=int(self.sequence.positions[-1]),
            checkpoint=len(self.sequence.checkpoints) - 1,
            n=self.sequence.config.num_selected,
        )

    @classmethod
    def of_model(cls, model: DecoderLM, text: str | bytes | Tensor) -> "SelectionExplorer":
        """Run a model on a text and look at it; a tensor of tokens is (T,) or (T, S) int64.

        Errors: ValueError or TypeError that names the argument.
        """
        require_instance("model", model, DecoderLM, "a DecoderLM")
        require_instance(
            "text", text, (Tensor, str, bytes), "a string, bytes or a tensor of tokens"
        )
        if isinstance(text, Tensor):
            tokens = text
            labels = [" ".join(map(str, at)) for at in text.view(len(text), -1).tolist()]
        else:
            labels = text.encode() if isinstance(text, str) else text
            require(len(labels) > 0, "text", repr(text), "must hold at least one byte")
            tokens = torch.tensor(list(labels))
        with torch.no_grad():
            device = model.embedding.weight.device
            _, traces = model(tokens[None].to(device), return_traces=True)
        return cls(traces, labels)

    @traitlets.validate("query", "checkpoint", "layer", "group", "n")
    def _in_range(self, proposal: dict) -> int:
        name = proposal["trait"].name
        value = proposal["value"]
        low, high = self.facts["ranges"][name]
        require(low <= value <= high, name, value, f"must lie in {low} .. {high}")
        if name == "query":
            self.sequence.require_query(value)
        return value

    @traitlets.validate("beside")
    def _beside_in_range(self, proposal: dict) -> dict[str, int] | None:
        beside = proposal["value"]
        if beside is None:
            return None
        names = ["checkpoint", "group", "layer"]
        require(sorted(beside) == names, "beside", beside, f"must be None or hold {names}")
        for name, value in beside.items():
            low, high = self.facts["ranges"][name]
            require_int(f"beside[{name!r}]", value, at_least=low)
            require(value <= high, f"beside[{name!r}]", value, f"must lie in {low} .. {high}")
        return beside

    @property
    def place(self) -> Place:
        """The checkpoint, layer, group and n that are shown."""
        return Place(self.checkpoint, self.layer, self.group, self.n)

    def describe(self, t: int | None = None) -> str:
        """What query t reads, as one sentence; the query that is shown, if none is named."""
        return self.sequence.describe(self.place, self.query if t is None else t)

    def selected(self, t: int | None = None) -> list[int]:
        """The blocks that query t selects, ascending; the query that is shown, if none is named."""
        return self.sequence.selected(self.place, self.query if t is None else t)

    def difference(self, t: int | None = None) -> str:
        """Which blocks query t selects in both panes and in one alone, as one sentence.

        Errors: ValueError when there is no second pane.
        """
        require(self.beside is not None, "beside", self.beside, "names no second pane to compare")
        at = self.query if t is None else t
        here = set(self.sequence.selected(self.place, at))
        there = set(self.sequence.selected(Place(n=self.n, **self.beside), at))
        return (
            f"query {at}: {len(here & there)} blocks in both ({id_list(here & there)}), "
            f"only in the first {id_list(here - there)}, only beside {id_list(there - here)}"
        )

    def picture(self) -> bytes:
        """The text and two queries as a PNG of few colours, which notebooks keep."""
        queries = two_queries(self.sequence, self.query)
        figure = draw_queries(self.sequence, self.place, queries, self.query)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=96)
        plt.close(figure)
        small = io.BytesIO()
        Image.open(drawn).convert("RGB").quantize(32).save(small, format="png", optimize=True)
        return small.getvalue()

    def save_html(self, path: str | Path, title: str = "What a query selects") -> Path:
        """Write one page that shows the same offline, without Jupyter, in less than 2 MB.

        Errors: ValueError when the scores alone are larger than that.
        """
        state = {"query": self.query, **self.place._asdict(), "beside": self.beside}
        page = page_of(self.sequence, state, title, self.describe(), self.picture())
        written = Path(path)
        written.write_text(page, "utf-8")
        return written

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict, dict] | None:
        """The widget; for readers without a kernel the same cell keeps a picture and a sentence."""
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:
            return None
        data, metadata = bundle
        return {**data, "text/plain": self.describe(), "image/png": self.picture()}, metadata
