"""What is explored: one sequence, its traces by checkpoint and layer, and questions about them."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_lite import Trace
from nsa_lite.blocks import forced_blocks, num_compressed, num_select_blocks
from nsa_lite.checks import require, require_int
from nsa_lite.show.explorer.arguments import (
    Traces,
    answer_positions,
    token_labels,
    traces_by_checkpoint,
)
from nsa_lite.show.explorer.gates import gate_hundredths, words
from nsa_lite.show.explorer.ranking import rank_blocks


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
        self.checkpoints = traces_by_checkpoint(traces)
        first = next(iter(self.checkpoints.values()))[0]
        batch, self.groups, self.queries = first.ids.shape[:3]
        require_int("row", row, at_least=0)
        require(row < batch, "row", row, f"the traces hold rows 0 .. {batch - 1}")
        self.row = row
        self.config = first.config
        self.start = first.start
        self.length = self.start + self.queries
        self.blocks = num_select_blocks(self.length, self.config.select_block_size)
        self.tokens = token_labels(tokens, self.length)
        self.answer_at = answer_positions(answer_at, self.queries, self.start)
        self.rankings = [
            [rank_blocks(trace, row) for trace in layers] for layers in self.checkpoints.values()
        ]

    def trace(self, place: Place) -> Trace:
        """The trace of one checkpoint and layer, the whole batch of it."""
        return list(self.checkpoints.values())[place.checkpoint][place.layer]

    # --- what a query reads ---

    @property
    def by_score(self) -> list[list[bool]]:
        """Whether a layer's blocks were chosen by their score, by checkpoint and layer."""
        return [[ranking.by_score for ranking in layers] for layers in self.rankings]

    def taken(self, place: Place, t: int) -> tuple[list[int], list[int]]:
        """The forced and the other blocks that query t selects, each in the order of its ranking.

        They are those of its trace, or the best n if the trace chose by score.
        """
        self.require_query(t)
        ranking = self.rankings[place.checkpoint][place.layer]
        at = place.group, t - self.start
        count = place.n if ranking.by_score else int(ranking.taken[at])
        ids = ranking.order[at][: self.begun(t)][:count].tolist()
        forced = int(ranking.forced[at])
        return ids[:forced], ids[forced:]

    def selected(self, place: Place, t: int) -> list[int]:
        """The blocks that query t selects, ascending."""
        forced, free = self.taken(place, t)
        return sorted(forced + free)

    def forced(self, t: int) -> list[int]:
        """The blocks that query t selects whatever their scores."""
        c = self.config
        mask = forced_blocks(
            torch.tensor([t]), self.blocks, c.select_block_size, c.num_initial, c.num_local
        )
        return mask[0].nonzero().flatten().tolist()

    def begun(self, t: int) -> int:
        """How many selection blocks start at or before query t; the last of them is its own."""
        return num_select_blocks(t + 1, self.config.select_block_size)

    def seen(self, t: int) -> int:
        """How many compressed blocks end at or before query t."""
        return num_compressed(t + 1, self.config.block_size, self.config.stride)

    def window_first(self, t: int) -> int:
        """The first token of query t's window."""
        return max(0, t - self.config.window + 1)

    def answer_block(self, t: int) -> int | None:
        """The block that holds the answer of query t, if it asks for one."""
        at = int(self.answer_at[t - self.start])
        return at // self.config.select_block_size if at >= 0 else None

    def overlap(self, place: Place, t: int) -> float | None:
        """The share of query t's blocks that query t - 1 selected too; None if either has none."""
        if t == self.start:
            return None
        now = self.selected(place, t)
        before = self.selected(place, t - 1)
        return len(set(now) & set(before)) / len(now) if now and before else None

    # --- what is said of it ---

    def describe(self, place: Place, t: int) -> str:
        """What query t reads, as one sentence: the same that the browser speaks."""
        forced, free = self.taken(place, t)
        how = "by score" if self.by_score[place.checkpoint][place.layer] else "not by score"
        ids = forced + free
        selected = f"{_list(ids)} ({_list(free)} {how})" if ids else "none"
        return (
            f"query {t}: compressed blocks {_range(0, self.seen(t) - 1)}, selected {selected}, "
            f"window {_range(self.window_first(t), t)}, gates {self.gates(place, t)}"
        )

    def gates(self, place: Place, t: int) -> str:
        """The three gates of query t, each the mean over the group's heads: ".41 .88 .52"."""
        each = self.gates_by_group(self.trace(place))[place.group, :, t - self.start]  # (R, 3)
        return words(gate_hundredths(each[:, None])[0].tolist())

    def gates_by_group(self, trace: Trace) -> Tensor:
        """A trace's gates, the heads sorted by group: (G, R, T, 3)."""
        return trace.gates[self.row].unflatten(0, (self.groups, -1))

    # --- what may be asked ---

    def ranges(self) -> dict[str, tuple[int, int]]:
        """The lowest and highest value of everything that a reader can choose."""
        c = self.config
        return {
            "query": (self.start, self.length - 1),
            "checkpoint": (0, len(self.checkpoints) - 1),
            "layer": (0, len(self.rankings[0]) - 1),
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


def _range(first: int, last: int) -> str:
    if last < first:
        return "none"
    return str(first) if last == first else f"{first}-{last}"


def _list(ids: list[int]) -> str:
    return " ".join(map(str, sorted(ids))) or "none"
