"""What the browser is sent, once: numbers that it has only to draw.

Whatever follows from the paper's rules is worked out here: how many blocks have begun, how many
compressed blocks a query sees, where its window begins, and in which order it takes its blocks.
What a query selects is then the first n of its order, for every n.

The order is sent as ids, best first, and beside each id by how many levels its score falls from
the one before; the browser puts the scores back in their places as it reads them. Two layers of
4,096 random queries with 12 bits a score take 0.37 MB of ids and 0.70 of steps. Levels by id
take 0.91 alone and leave the browser to sort, and with a rank beside each level 1.28.

Axes: K checkpoints, L layers, G groups, R heads of a group, T queries, J selection blocks,
N compressed blocks.
"""

import numpy as np
import torch
from torch import Tensor

from nsa_lite import Trace
from nsa_lite.show.explorer.gates import GATE_LEVELS, NO_GATE, gate_hundredths, gate_levels
from nsa_lite.show.explorer.ranking import Ranking
from nsa_lite.show.explorer.sequence import TracedSequence

SCORE_LEVELS = 60_000  # a row's largest score: fine enough for the three digits that are shown
NAN = 65_535  # stands for a score that is not a number
# How much is sent: the compressed scores of each head, their sum over a group's heads, or none of
# them; at last the importances with 12 bits in place of 16.
DETAILS = ("heads", "group", "none", "coarse")
Arrays = dict[str, np.ndarray]


def arrays_of(sequence: TracedSequence, detail: str = "heads") -> Arrays:
    """Everything that the browser draws, each array by its name.

    Shapes: begun, seen, window_first, answer_block (T,) int32; order (K, L, G, T, J) uint8 or
    uint16, steps (K, L, G, T, J) uint16, score_scale (K, L, G, T) float32; taken, forced (K, L,
    G, T) uint16; gates (K, L, G, R, T, 3) and gate_hundredths (K, L, G, T, 3) uint8; and for
    "heads" and "group" p (K, L, G, R or 1, T, N) uint8 with p_scale (K, L, G, R or 1, T) float32.
    """
    each = _of_queries(sequence)
    layers = [
        _of_layer(sequence, trace, ranking, detail)
        for traces, rankings in zip(sequence.checkpoints.values(), sequence.rankings, strict=True)
        for trace, ranking in zip(traces, rankings, strict=True)
    ]
    axes = len(sequence.rankings), len(sequence.rankings[0])
    for name in layers[0]:
        stacked = np.stack([layer[name] for layer in layers])
        each[name] = stacked.reshape(*axes, *stacked.shape[1:])
    each["steps"] = _steps(each["steps"])
    return each


def _of_queries(sequence: TracedSequence) -> Arrays:
    """What a query's position alone decides, or the text: each (T,) int32."""
    queries = range(sequence.start, sequence.length)
    answers = [sequence.answer_block(t) for t in queries]
    return {
        "begun": np.array([sequence.begun(t) for t in queries], "<i4"),
        "seen": np.array([sequence.seen(t) for t in queries], "<i4"),
        "window_first": np.array([sequence.window_first(t) for t in queries], "<i4"),
        "answer_block": np.array([-1 if j is None else j for j in answers], "<i4"),
    }


def _of_layer(sequence: TracedSequence, trace: Trace, ranking: Ranking, detail: str) -> Arrays:
    """What a layer did, without the axes K and L; the steps are still levels, best first."""
    levels, scale = score_levels(trace.importance[sequence.row].cpu(), most_levels(detail))
    gates = sequence.gates_by_group(trace)
    ids = np.min_scalar_type(sequence.blocks - 1).newbyteorder("<")
    result = {
        "order": ranking.order.numpy().astype(ids),
        "steps": levels.gather(-1, ranking.order).numpy().astype("<u2"),
        "score_scale": scale.numpy().astype("<f4"),
        "taken": ranking.taken.numpy().astype("<u2"),
        "forced": ranking.forced.numpy().astype("<u2"),
        "gates": gate_levels(gates).numpy(),
        "gate_hundredths": gate_hundredths(gates).numpy(),
    }
    if detail in ("heads", "group"):
        heads = trace.probabilities[sequence.row].float().cpu().nan_to_num()
        result |= _of_heads(heads if detail == "heads" else heads.sum(1, keepdim=True))
    return result


def _of_heads(p: Tensor) -> Arrays:
    """Probabilities in 255 steps of their row's largest: (G, R or 1, T, N)."""
    heads = p.numpy()
    scale = heads.max(-1, keepdims=True, initial=0.0)
    levels = np.rint(255 * heads / np.where(scale > 0, scale, 1))
    return {"p": levels.astype("u1"), "p_scale": scale[..., 0].astype("<f4")}


def _steps(levels: np.ndarray) -> np.ndarray:
    """By how much each level lies below the one before, modulo 2^16, from the first to the last."""
    flat = levels.reshape(-1)
    return (np.concatenate([flat[:1] * 0, flat[:-1]]) - flat).reshape(levels.shape)


def most_levels(detail: str) -> int:
    """The whole number that stands for a row's largest score."""
    return SCORE_LEVELS // 16 if detail == "coarse" else SCORE_LEVELS


def score_levels(score: Tensor, most: int = SCORE_LEVELS) -> tuple[Tensor, Tensor]:
    """Scores as whole numbers: a score is about level / most * scale.

    Shapes: score (..., J) -> levels (..., J) int64 0 .. most, or NAN; scale (...) float32.
    """
    finite = score.double().nan_to_num(nan=0.0).clamp(min=0, max=torch.finfo(torch.float32).max)
    scale = finite.amax(-1)
    levels = (finite / scale.where(scale > 0, 1.0)[..., None] * most).round().long()
    return levels.masked_fill(score.isnan(), NAN), scale.float()


def facts_of(sequence: TracedSequence, detail: str) -> dict:
    """What the browser needs to read the arrays and to draw: sizes on the page, and names."""
    c = sequence.config
    return {
        "start": sequence.start,
        "queries": sequence.queries,
        "blocks": sequence.blocks,
        "select_block_size": c.select_block_size,  # a block's width on the strip
        "bars": {"first": (c.block_size - c.stride) / 2, "step": c.stride},  # in tokens
        "traced_n": c.num_selected,
        "levels": {"scores": most_levels(detail), "gates": GATE_LEVELS},
        "nan": {"scores": NAN, "gates": NO_GATE},
        "checkpoints": list(sequence.checkpoints),
        "by_score": sequence.by_score,
        "tokens": sequence.tokens,
        "ranges": sequence.ranges(),
    }
