"""What the browser is sent, once: numbers that it has only to draw.

Whatever follows from the paper's rules is worked out here: how many blocks have begun, how many
compressed blocks a query sees, where its window begins, and in which order it takes its blocks.
What a query selects is then the first n of its order, for every n.

The order is sent as ids, best first, and beside each id by how many levels its score falls from
the one before; the browser puts the scores back in their places as it reads them. Two layers of
4,096 random queries with 12 bits a score take 0.37 MB of ids and 0.70 of steps. Levels by id
take 0.91 alone and leave the browser to sort, and with a rank beside each level 1.28.

Axes: K checkpoints, L layers, G groups, R heads of a group, Q queries, J selection blocks,
N compressed blocks.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nsa_lite import NSAConfig, Trace
from nsa_lite.blocks import overlap_in_strides
from nsa_lite.show.explorer.gates import GATE_LEVELS, NO_GATE, gate_hundredths, gate_levels
from nsa_lite.show.explorer.ranking import Ranking
from nsa_lite.show.explorer.sequence import TracedSequence

SCORE_LEVELS = 60_000  # a row's largest score: fine enough for the three digits that are shown
COARSE_LEVELS = SCORE_LEVELS // 16  # 12 bits
NAN = 65_535  # stands for a score that is not a number
Arrays = dict[str, np.ndarray]


class Detail(NamedTuple):
    """How much is sent.

    p: the compressed scores of each head ("heads"), their sum over a group's heads ("group"), or
    none of them (""); levels: of the scores; ranks: of how many of a query's blocks, the best
    first (None: of all; 0: of those taken and one more); beyond: whether dense attention's mass is
    sent.
    """

    p: str
    levels: int = SCORE_LEVELS
    ranks: int | None = None
    beyond: bool = True

    def of(self, sequence: TracedSequence) -> "Detail":
        """The same, with the numbers of a sequence: two that send the same are then equal."""
        most = sequence.ranks
        fewest = min(most, sequence.taken_at_most + 1)
        return self._replace(
            p=self.p if sequence.has_p else "",
            ranks=most if self.ranks is None else min(most, max(self.ranks, fewest)),
            beyond=self.beyond and sequence.beyond is not None,
        )


# The first that fits is taken: each leaves out something more than the one before it.
DETAILS = (
    Detail("heads"),
    Detail("group"),
    Detail(""),
    Detail("", COARSE_LEVELS),
    Detail("", COARSE_LEVELS, ranks=128),
    Detail("", COARSE_LEVELS, ranks=64),
    Detail("", COARSE_LEVELS, ranks=64, beyond=False),
    Detail("", COARSE_LEVELS, ranks=32, beyond=False),
    Detail("", COARSE_LEVELS, ranks=0, beyond=False),
)


def arrays_of(sequence: TracedSequence, detail: Detail = DETAILS[0]) -> Arrays:
    """Everything that the browser draws, each array by its name.

    Shapes: positions, begun, seen, summarised, window_first, answer_block, answer_at (Q,) int32;
    order (K, L, G, Q, ranks) uint8 or uint16, steps (K, L, G, Q, ranks) uint16, score_scale (K, L,
    G, Q) float32; taken, forced (K, L, G, Q) uint16; gates (K, L, G, R, Q, 3) and gate_hundredths
    (K, L, G, Q, 3) uint8; with p "heads" or "group" p (K, L, G, R or 1, Q, N) uint8 with p_scale
    (K, L, G, R or 1, Q) float32; where it is known and sent, beyond (K, L, G, Q, J) uint8 with
    beyond_scale (K, L, G, Q) float32.
    """
    sent = detail.of(sequence)
    each = _of_queries(sequence)
    layers = [
        _of_layer(sequence, trace, ranking, sent)
        for traces, rankings in zip(sequence.checkpoints.values(), sequence.rankings, strict=True)
        for trace, ranking in zip(traces, rankings, strict=True)
    ]
    if sent.beyond:
        assert sequence.beyond is not None
        masses = [mass for layers_of_one in sequence.beyond for mass in layers_of_one]
        for layer, mass in zip(layers, masses, strict=True):
            layer["beyond"], layer["beyond_scale"] = bytes_that_add_up(mass)
    axes = len(sequence.rankings), len(sequence.rankings[0])
    for name in layers[0]:
        stacked = np.stack([layer[name] for layer in layers])
        each[name] = stacked.reshape(*axes, *stacked.shape[1:])
    each["steps"] = _steps(each["steps"])
    return each


def unpacked_bytes(sequence: TracedSequence, detail: Detail) -> int:
    """About how many bytes arrays_of makes, before it makes them."""
    p, _, ranks, beyond = detail.of(sequence)
    assert ranks is not None  # of a sequence they are a number
    rows = sum(map(len, sequence.rankings)) * sequence.groups * sequence.queries
    compressed = next(iter(sequence.checkpoints.values()))[0].probabilities.shape[-1]
    parts = {"heads": sequence.config.group_size, "group": 1, "": 0}[p]
    mass = sequence.blocks if beyond else 0
    return rows * (4 * ranks + parts * compressed + mass)


def _of_queries(sequence: TracedSequence) -> Arrays:
    """What a query's position alone decides, or the text: each (Q,) int32."""
    queries = sequence.positions.tolist()
    answers = [sequence.answer_block(t) for t in queries]
    return {
        "positions": np.array(queries, "<i4"),
        "begun": np.array([sequence.begun(t) for t in queries], "<i4"),
        "seen": np.array([sequence.seen(t) for t in queries], "<i4"),
        "summarised": np.array([sequence.summarised(t) for t in queries], "<i4"),
        "window_first": np.array([sequence.window_first(t) for t in queries], "<i4"),
        "answer_block": np.array([-1 if j is None else j for j in answers], "<i4"),
        "answer_at": sequence.answer_at.numpy().astype("<i4"),
    }


def _of_layer(sequence: TracedSequence, trace: Trace, ranking: Ranking, detail: Detail) -> Arrays:
    """What a layer did, without the axes K and L; the steps are still levels, best first."""
    levels, scale = score_levels(ranking.score[..., : detail.ranks], ranking.largest, detail.levels)
    gates = sequence.gates_by_group(trace)
    ids = np.min_scalar_type(sequence.blocks - 1).newbyteorder("<")
    result = {
        "order": ranking.order[..., : detail.ranks].numpy().astype(ids),
        "steps": levels.numpy().astype("<u2"),
        "score_scale": scale.numpy().astype("<f4"),
        "taken": ranking.taken.numpy().astype("<u2"),
        "forced": ranking.forced.numpy().astype("<u2"),
        "gates": gate_levels(gates).numpy(),
        "gate_hundredths": gate_hundredths(gates).numpy(),
    }
    if detail.p:
        heads = trace.probabilities[sequence.row].float().cpu().nan_to_num()
        p = heads if detail.p == "heads" else heads.sum(1, keepdim=True)
        result["p"], result["p_scale"] = bytes_of_rows(p)
    return result


def bytes_of_rows(x: Tensor, most: int = 255) -> tuple[np.ndarray, np.ndarray]:
    """Each row in `most` steps of its largest number, uint8, and that number, float32."""
    rows = x.numpy()
    scale = rows.max(-1, initial=0.0)
    levels = np.rint(most * rows / np.where(scale > 0, scale, 1)[..., None])
    return levels.astype("u1"), scale.astype("<f4")


def bytes_that_add_up(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """bytes_of_rows that keep what a row adds up to, however many small numbers it holds.

    The running sum is rounded, not each number: a block in which dense attention sees next to
    nothing may get a step, and a thousand such blocks get the steps that they have together.
    """
    rows = x.double().numpy()
    scale = rows.max(-1, initial=0.0).astype("<f4")
    unit = np.where(scale > 0, scale, 1).astype("f8")[..., None] / 255
    running = np.rint(rows.cumsum(-1) / unit)
    levels = np.diff(running, prepend=0.0)
    return levels.clip(0, 255).astype("u1"), scale


def _steps(levels: np.ndarray) -> np.ndarray:
    """By how much each level lies below the one before, modulo 2^16, from the first to the last."""
    flat = levels.reshape(-1)
    return (np.concatenate([flat[:1] * 0, flat[:-1]]) - flat).reshape(levels.shape)


def score_levels(score: Tensor, largest: Tensor, most: int = SCORE_LEVELS) -> tuple[Tensor, Tensor]:
    """Scores as whole numbers: a score is about level / most * scale.

    Shapes: score (..., ranks), largest (...) of all blocks of the row -> levels (..., ranks) int64
    0 .. most, or NAN; scale (...) float32.
    """
    top = torch.finfo(torch.float32).max
    scale = largest.double().clamp(min=0, max=top)
    finite = score.double().nan_to_num(nan=0.0).clamp(min=0, max=top)
    levels = (finite / scale.where(scale > 0, 1.0)[..., None] * most).round().long()
    return levels.masked_fill(score.isnan(), NAN), scale.float()


def facts_of(sequence: TracedSequence, detail: Detail) -> dict:
    """What the browser needs to read the arrays and to draw: sizes on the page, and names."""
    sent = detail.of(sequence)
    assert sent.ranks is not None  # of a sequence they are a number
    c = sequence.config
    ranges = sequence.ranges()
    low, _ = ranges["n"]
    return {
        "start": int(sequence.positions[0]),
        "queries": sequence.queries,
        "length": sequence.length,
        "blocks": sequence.blocks,
        "ranks": sent.ranks,
        "select_block_size": c.select_block_size,  # a block's width on the strip
        "bars": {"first": (c.block_size - c.stride) / 2, "step": c.stride},  # in tokens
        "pooling": pooling_of(c),
        "traced_n": c.num_selected,
        "levels": {"scores": sent.levels, "gates": GATE_LEVELS},
        "nan": {"scores": NAN, "gates": NO_GATE},
        "checkpoints": list(sequence.checkpoints),
        "by_score": sequence.by_score,
        "tokens": sequence.tokens,
        "ranges": ranges | {"n": (low, sequence.largest_n(sent.ranks))},
        "about": " ".join(filter(None, [sequence.about, *left_out(sequence, sent)])),
    }


def pooling_of(config: NSAConfig) -> dict:
    """Eq. 9 as weights: block j gets weights[m] of compressed block j step + first + m.

    With l=32, d=16, l'=64: 1 2 2 2 1 of blocks 4j - 1 .. 4j + 3.
    """
    sizes = config.block_size, config.stride, config.select_block_size
    inside = config.select_block_size // config.stride
    covering = config.block_size // config.stride
    block = covering  # far enough from the text's beginning
    first = block * inside - (covering - 1)
    column = overlap_in_strides((block + 1) * inside, block + 1, *sizes)[first:, block]
    return {"first": 1 - covering, "step": inside, "weights": column.int().tolist()}


def left_out(sequence: TracedSequence, detail: Detail) -> list[str]:
    """What is not sent, a sentence each; `detail` has the sequence's own numbers."""
    p, levels, ranks, beyond = detail
    assert ranks is not None
    sentences = {
        "Of the compressed scores (Eq. 8) each group's sum over its heads is here.": (
            p == "group" and sequence.config.group_size > 1
        ),
        "The compressed scores (Eq. 8) are left out, to keep this small.": not p,
        "Importances are rounded to 12 bits.": levels < SCORE_LEVELS,
        f"Of each query's {sequence.blocks:,} blocks the {ranks} best are here.": (
            ranks < sequence.blocks
        ),
        "What dense attention weighs is left out.": (not beyond and sequence.beyond is not None),
    }
    return [sentence for sentence, said in sentences.items() if said]
