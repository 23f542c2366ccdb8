"""What is explored: one sequence, its traces by checkpoint and layer, and questions about them."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_lite.blocks import forced_blocks, num_compressed, num_select_blocks
from nsa_lite.checks import require, require_int
from nsa_lite.layer import Trace
from nsa_lite.selection import choose_blocks

Traces = Trace | list[Trace] | dict[str, Trace | list[Trace]]
GATE_LEVELS = 65534  # gates are kept as whole numbers, so that Python and the browser round alike


class Place(NamedTuple):
    """Where to look: a checkpoint, a layer and a group by number, and n, the blocks selected."""

    checkpoint: int
    layer: int
    group: int
    n: int


class TracedSequence:
    """One row of a batch: what every layer did with it, at one or several checkpoints.

    tokens: a string, bytes, or one string a position; answer_at (T,): the position of the answer
    that each query looks for, -1 where none is asked, as in a task's Batch.
    Errors: ValueError or TypeError that names the argument.
    """

    def __init__(
        self,
        traces: Traces,
        tokens: str | bytes | Iterable[str] | None = None,
        answer_at: Tensor | None = None,
        row: int = 0,
    ) -> None:
        self.checkpoints = _by_checkpoint(traces)
        self.first = next(iter(self.checkpoints.values()))[0]
        self.config, self.start = self.first.config, self.first.start
        batch, self.groups, self.queries = self.first.ids.shape[:3]
        require_int("row", row, at_least=0)
        require(row < batch, "row", row, f"the traces hold rows 0 .. {batch - 1}")
        self.row, self.length = row, self.start + self.queries
        self.blocks = num_select_blocks(self.length, self.config.select_block_size)
        self.tokens = _labels(tokens, self.length)
        self.answer_at = _answers(answer_at, self.queries, self.start)
        self.by_score = [
            [_ranked_by_score(trace, row) for trace in layers]
            for layers in self.checkpoints.values()
        ]

    def trace(self, place: Place) -> Trace:
        """The trace of one checkpoint and layer, the whole batch of it."""
        return list(self.checkpoints.values())[place.checkpoint][place.layer]

    def selected(self, place: Place, t: int) -> list[int]:
        """The blocks that query t selects; those of its trace, or the best n for another n."""
        self.require_query(t)
        trace = self.trace(place)
        if place.n == self.config.num_selected or not self.by_score[place.checkpoint][place.layer]:
            ids = trace.ids[self.row, place.group, t - self.start]
        else:
            c, begun = self.config, num_select_blocks(t + 1, self.config.select_block_size)
            score = trace.importance[self.row, place.group, t - self.start, :begun]
            ids = choose_blocks(
                score[None, None, None],
                select_block_size=c.select_block_size,
                start=t,
                num_selected=place.n,
                num_initial=c.num_initial,
                num_local=c.num_local,
            )
        return [j for j in ids.flatten().tolist() if j >= 0]

    def forced(self, t: int) -> list[int]:
        """The blocks that query t selects whatever their scores."""
        c = self.config
        mask = forced_blocks(
            torch.tensor([t]), self.blocks, c.select_block_size, c.num_initial, c.num_local
        )
        return mask[0].nonzero().flatten().tolist()

    def overlap(self, place: Place, t: int) -> float | None:
        """The share of query t's blocks that query t - 1 selected too; None if either has none."""
        if t == self.start:
            return None
        now, before = self.selected(place, t), self.selected(place, t - 1)
        return len(set(now) & set(before)) / len(now) if now and before else None

    def answer_block(self, t: int) -> int | None:
        """The block that holds the answer of query t, if it asks for one."""
        at = int(self.answer_at[t - self.start])
        return at // self.config.select_block_size if at >= 0 else None

    def describe(self, place: Place, t: int) -> str:
        """What query t reads, as one sentence: the same that the browser speaks."""
        self.require_query(t)
        c, ids, forced = self.config, self.selected(place, t), self.forced(t)
        free = [j for j in ids if j not in forced]
        seen = num_compressed(t + 1, c.block_size, c.stride)
        how = "by score" if self.by_score[place.checkpoint][place.layer] else "not by score"
        selected = f"{_list(ids)} ({_list(free)} {how})" if ids else "none"
        return (
            f"query {t}: compressed blocks {_range(0, seen - 1)}, selected {selected}, "
            f"window {_range(max(0, t - c.window + 1), t)}, gates {self.gates(place, t)}"
        )

    def gates(self, place: Place, t: int) -> str:
        """The three gates of query t, each the mean over the group's heads: ".41 .88 .52"."""
        heads = slice(
            place.group * self.config.group_size, (place.group + 1) * self.config.group_size
        )
        gates = self.trace(place).gates[self.row, heads, t - self.start]  # (R, 3)
        return " ".join(_hundredths(level_of(branch)) for branch in gates.T)

    def ranges(self) -> dict[str, tuple[int, int]]:
        """The lowest and highest value of everything that a reader can choose."""
        c = self.config
        layers = len(next(iter(self.checkpoints.values())))
        return {
            "query": (self.start, self.length - 1),
            "checkpoint": (0, len(self.checkpoints) - 1),
            "layer": (0, layers - 1),
            "group": (0, self.groups - 1),
            "n": (max(1, c.num_initial + c.num_local), max(self.blocks, c.num_selected)),
        }

    def require_query(self, t: int) -> None:
        """Raise unless the traces hold query t."""
        require_int("t", t, at_least=0)
        require(
            self.start <= t < self.length,
            "t",
            t,
            f"the traces hold queries {self.start} .. {self.length - 1}",
        )


def level_of(gates: Tensor) -> Tensor:
    """Gates 0 .. 1 as whole numbers 0 .. GATE_LEVELS; one more stands for NaN."""
    levels = (gates.double().cpu().clamp(0, 1) * GATE_LEVELS).round()
    return levels.nan_to_num(nan=GATE_LEVELS + 1).long()


def _hundredths(levels: Tensor) -> str:
    """The mean of some gates, rounded with whole numbers only, as ".41"."""
    if int(levels.max()) > GATE_LEVELS:
        return "NaN"
    full = GATE_LEVELS * len(levels)
    percent = (200 * int(levels.sum()) + full) // (2 * full)
    return f"{percent / 100:.2f}".removeprefix("0")


def _range(first: int, last: int) -> str:
    return "none" if last < first else str(first) if last == first else f"{first}-{last}"


def _list(ids: list[int]) -> str:
    return " ".join(map(str, ids)) or "none"


# --- what is asked of the arguments ---


def _by_checkpoint(traces: Traces) -> dict[str, list[Trace]]:
    named = traces if isinstance(traces, dict) else {"": traces}
    named = {label: [x] if isinstance(x, Trace) else x for label, x in named.items()}
    require(len(named) > 0, "traces", "{}", "must hold at least one checkpoint")
    for label, layers in named.items():
        name = f"traces[{label!r}]" if isinstance(traces, dict) else "traces"
        if not isinstance(layers, list | tuple) or not all(isinstance(x, Trace) for x in layers):
            raise TypeError(
                f"{name}: must be a Trace or a list of them, one a layer, got "
                f"{type(layers).__name__}"
            )
        require(
            len(layers) > 0,
            name,
            "[]",
            "must hold at least one Trace; a model leaves "
            "none when its attention is dense or a window, and selects nothing",
        )
    first = next(iter(named.values()))
    for label, layers in named.items():
        require(
            len(layers) == len(first),
            f"traces[{label!r}]",
            f"{len(layers)} layers",
            f"must have {len(first)}, as the first checkpoint",
        )
        for i, trace in enumerate(layers):
            _require_same_form(f"layer {i} of traces[{label!r}]", trace, first[0])
    return {str(label): list(layers) for label, layers in named.items()}


def _require_same_form(name: str, trace: Trace, first: Trace) -> None:
    def form(x: Trace) -> tuple:
        return x.config, x.start, x.ids.shape[:3]

    require(
        form(trace) == form(first),
        name,
        form(trace),
        f"config, start and (B, G, T) must be those of the first trace, {form(first)}",
    )


def _labels(tokens: str | bytes | Iterable[str] | None, length: int) -> list[str]:
    if tokens is None:
        return [""] * length
    if isinstance(tokens, bytes):
        tokens = [chr(b) if b < 128 else f"\\x{b:02x}" for b in tokens]
    labels = list(tokens)
    if not all(isinstance(label, str) for label in labels):
        raise TypeError("tokens: must be a string, bytes or one string a position, not numbers")
    require(
        len(labels) == length,
        "tokens",
        f"{len(labels)} of them",
        f"must be one for each of the {length} positions",
    )
    return labels


def _answers(answer_at: Tensor | None, queries: int, start: int) -> Tensor:
    if answer_at is None:
        return torch.full((queries,), -1)
    answer_at = torch.as_tensor(answer_at).cpu()
    require(
        answer_at.shape == (queries,),
        "answer_at.shape",
        tuple(answer_at.shape),
        f"must be (T,) = ({queries},)",
    )
    for query, position in enumerate(answer_at.tolist(), start):
        require(
            -1 <= position <= query,
            f"answer_at of query {query}",
            position,
            "must be -1 or a position up to the query's own",
        )
    return answer_at.long()


def _ranked_by_score(trace: Trace, row: int) -> bool:
    """Whether the ids are the best n of the importance, but for the last digits of a tie."""
    score, ids = trace.importance[row].cpu().nan_to_num(nan=0.0), trace.ids[row].cpu().long()
    c, (queries, blocks) = trace.config, score.shape[1:]
    if ids.shape[-1] != c.num_selected:
        return False
    now = torch.arange(trace.start, trace.start + queries)
    j = torch.arange(blocks)
    forced = forced_blocks(now, blocks, c.select_block_size, c.num_initial, c.num_local)
    free = (j * c.select_block_size <= now[:, None]) & ~forced
    chosen = torch.zeros(*score.shape[:2], blocks + 1, dtype=torch.bool)
    chosen = chosen.scatter(-1, ids.where(ids >= 0, blocks), True)[..., :blocks]
    lowest = score.masked_fill(~(chosen & free), torch.inf).amin(-1)
    best_left = score.masked_fill(chosen | ~free, -torch.inf).amax(-1)
    return bool((lowest >= best_left - 1e-4 * score.amax(-1).abs()).all())
