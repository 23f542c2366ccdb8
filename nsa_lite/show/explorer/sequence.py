"""What is explored: one sequence, its traces by checkpoint and layer, and questions about them."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_lite import Trace
from nsa_lite.blocks import forced_blocks, num_compressed, num_select_blocks
from nsa_lite.checks import require, require_int
from nsa_lite.show.explorer.arguments import (
    Traces,
    answer_positions,
    kept_rows,
    token_labels,
    traces_by_checkpoint,
)
from nsa_lite.show.explorer.beyond import can_tell, mass_beyond
from nsa_lite.show.explorer.gates import gate_hundredths, words
from nsa_lite.show.explorer.ranking import kept_ranks, rank_blocks

Beyond = list[list[Tensor]]  # by checkpoint and layer, each (G, Q, J)


class Place(NamedTuple):
    """Where to look: a checkpoint, a layer and a group by number, and n, the blocks selected."""

    checkpoint: int
    layer: int
    group: int
    n: int


class Kept(NamedTuple):
    """What is known of a sequence of which not everything was kept.

    positions (Q,): where the traces' queries stand, ascending; length: the sequence's tokens;
    ranks: of how many of each query's blocks the importance is known, the best first (None: all);
    beyond: dense attention's mass, if it was worked out already; about: what was left out.
    """

    positions: Tensor
    length: int
    ranks: int | None = None
    beyond: Beyond | None = None
    about: str = ""


class TracedSequence:
    """One row of a batch: what every layer did with it, at one or several checkpoints.

    tokens: a string, bytes, or one string a position; answer_at (Q,): the position of the answer
    that each query looks for, -1 where none is asked, as in a task's Batch; kept: for traces that
    do not hold every query from the first to the last, as those of a recording.
    Errors: ValueError or TypeError that names the argument.
    """

    def __init__(
        self,
        traces: Traces,
        tokens: str | bytes | Iterable[str] | None = None,
        answer_at: Tensor | None = None,
        row: int = 0,
        kept: Kept | None = None,
    ) -> None:
        self.checkpoints = traces_by_checkpoint(traces)
        first = next(iter(self.checkpoints.values()))[0]
        batch, self.groups, self.queries = first.ids.shape[:3]
        require_int("row", row, at_least=0)
        require(row < batch, "row", row, f"the traces hold rows 0 .. {batch - 1}")
        self.row = row
        self.config = first.config
        self.start = first.start
        end = self.start + self.queries
        self.kept = kept or Kept(torch.arange(self.start, end), end)
        self.positions = self.kept.positions
        self.length = self.kept.length
        self.about = self.kept.about
        self.blocks = num_select_blocks(self.length, self.config.select_block_size)
        self.tokens = token_labels(tokens, self.length)
        self.answer_at = answer_positions(answer_at, self.positions)
        self.index = {t: q for q, t in enumerate(self.positions.tolist())}
        self.rankings = [
            [rank_blocks(trace, row, self.positions, self.ranks) for trace in layers]
            for layers in self.checkpoints.values()
        ]

    def only(self, positions: Iterable[int]) -> "TracedSequence":
        """The same sequence with the queries at these positions alone.

        Errors: ValueError unless the traces hold them, and they ascend.
        """
        at = torch.as_tensor(list(positions))
        rows = kept_rows(at, self.index)
        fewer = {
            label: [_rows_of(trace, rows, int(at[0])) for trace in layers]
            for label, layers in self.checkpoints.items()
        }
        known = self.kept.beyond
        beyond = known and [[mass[:, rows] for mass in layers] for layers in known]
        kept = self.kept._replace(positions=at, beyond=beyond, about=self.about)
        return TracedSequence(fewer, self.tokens, self.answer_at[rows], self.row, kept)

    def trace(self, place: Place) -> Trace:
        """The trace of one checkpoint and layer, the whole batch of it."""
        return list(self.checkpoints.values())[place.checkpoint][place.layer]

    # --- what a query reads ---

    @property
    def taken_at_most(self) -> int:
        """The most blocks that a query may have taken."""
        layers = next(iter(self.checkpoints.values()))
        widths = [trace.ids.shape[-1] for xs in self.checkpoints.values() for trace in xs]
        return min(self.blocks, max(layers[0].config.num_selected, *widths))

    @property
    def has_p(self) -> bool:
        """Whether the compressed scores were kept, unless there are none to keep."""
        first = next(iter(self.checkpoints.values()))[0]
        return first.probabilities.shape[-1] > 0 or self.seen(self.length - 1) == 0

    @property
    def ranks(self) -> int:
        """How many of each query's blocks are ranked and have a known importance."""
        most = kept_ranks(self.groups, self.queries, self.blocks, self.taken_at_most)
        return most if self.kept.ranks is None else min(most, self.kept.ranks)

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
        at = place.group, self.index[t]
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

    def summarised(self, t: int) -> int:
        """How many tokens, from the first on, lie in a compressed block that query t sees."""
        seen = self.seen(t)
        return (seen - 1) * self.config.stride + self.config.block_size if seen else 0

    def window_first(self, t: int) -> int:
        """The first token of query t's window."""
        return max(0, t - self.config.window + 1)

    def answer_block(self, t: int) -> int | None:
        """The block that holds the answer of query t, if it asks for one."""
        at = int(self.answer_at[self.index[t]])
        return at // self.config.select_block_size if at >= 0 else None

    def before(self, t: int) -> int | None:
        """The traced query before query t, its neighbour unless some were left out."""
        q = self.index[t]
        return int(self.positions[q - 1]) if q else None

    def overlap(self, place: Place, t: int) -> float | None:
        """The share of query t's blocks that the query before selected; None if either has none."""
        earlier = self.before(t)
        if earlier is None:
            return None
        now = self.selected(place, t)
        before = self.selected(place, earlier)
        return len(set(now) & set(before)) / len(now) if now and before else None

    @cached_property
    def beyond(self) -> Beyond | None:
        """Dense attention's mass on each block's tokens before the query's window, by checkpoint
        and layer (see mass_beyond); None where the traces hold no keys, or too many.
        """
        if self.kept.beyond is not None:
            return self.kept.beyond
        if not all(can_tell(trace) for layers in self.checkpoints.values() for trace in layers):
            return None
        return [
            [mass_beyond(trace, self.row, self.positions) for trace in layers]
            for layers in self.checkpoints.values()
        ]

    def missed(self, place: Place, t: int) -> float | None:
        """Dense attention's mass on what query t reads neither in a block nor in its window.

        None where it is not known.
        """
        self.require_query(t)
        if self.beyond is None:
            return None
        mass = self.beyond[place.checkpoint][place.layer][place.group, self.index[t]]
        return float(mass.sum() - mass[self.selected(place, t)].sum())

    # --- what is said of it ---

    def describe(self, place: Place, t: int) -> str:
        """What query t reads, as one sentence: the same that the browser speaks."""
        forced, free = self.taken(place, t)
        how = "by score" if self.by_score[place.checkpoint][place.layer] else "not by score"
        ids = forced + free
        selected = f"{id_list(ids)} ({id_list(free)} {how})" if ids else "none"
        return (
            f"query {t}: compressed blocks {_range(0, self.seen(t) - 1)}, selected {selected}, "
            f"window {_range(self.window_first(t), t)}, gates {self.gates(place, t)}"
            f"{self._answer_words(t, ids)}{self._checkpoint_words(place)}"
        )

    def _answer_words(self, t: int, selected: list[int]) -> str:
        block = self.answer_block(t)
        if block is None:
            return ""
        return f"; answer in block {block}: {'' if block in selected else 'not '}selected"

    def _checkpoint_words(self, place: Place) -> str:
        names = list(self.checkpoints)
        return f"; checkpoint {names[place.checkpoint]}" if len(names) > 1 else ""

    def gates(self, place: Place, t: int) -> str:
        """The three gates of query t, each the mean over the group's heads: ".41 .88 .52"."""
        each = self.gates_by_group(self.trace(place))[place.group, :, self.index[t]]  # (R, 3)
        return words(gate_hundredths(each[:, None])[0].tolist())

    def gates_by_group(self, trace: Trace) -> Tensor:
        """A trace's gates, the heads sorted by group: (G, R, T, 3)."""
        return trace.gates[self.row].unflatten(0, (self.groups, -1))

    # --- what may be asked ---

    def ranges(self) -> dict[str, tuple[int, int]]:
        """The lowest and highest value of everything that a reader can choose."""
        c = self.config
        return {
            "query": (int(self.positions[0]), int(self.positions[-1])),
            "checkpoint": (0, len(self.checkpoints) - 1),
            "layer": (0, len(self.rankings[0]) - 1),
            "group": (0, self.groups - 1),
            "n": (max(1, c.num_initial + c.num_local), self.largest_n(self.ranks)),
        }

    def largest_n(self, ranks: int) -> int:
        """The largest n of which the first `ranks` blocks of each query tell what it selects."""
        return max(ranks, self.config.num_selected) if ranks == self.blocks else ranks

    def require_query(self, t: int) -> None:
        """Raise unless the traces hold query t."""
        require_int("t", t, at_least=0)
        low, high = self.ranges()["query"]
        some = "" if self.queries == high + 1 - low else f"{self.queries} of the "
        require(t in self.index, "t", t, f"the traces hold {some}queries {low} .. {high}")


def _rows_of(trace: Trace, rows: Tensor, start: int) -> Trace:
    """A trace of some of its queries."""
    return replace(
        trace,
        start=start,
        ids=trace.ids[:, :, rows],
        probabilities=trace.probabilities[:, :, :, rows],
        importance=trace.importance[:, :, rows],
        gates=trace.gates[:, :, rows],
        outputs={name: out[:, :, rows] for name, out in trace.outputs.items()},
        q=None if trace.q is None else trace.q[:, :, rows],
    )


def _range(first: int, last: int) -> str:
    if last < first:
        return "none"
    return str(first) if last == first else f"{first}-{last}"


def id_list(ids: Iterable[int]) -> str:
    """Block ids as a reader sees them, ascending: "0 3 12"; "none" if there are none."""
    return " ".join(map(str, sorted(ids))) or "none"
