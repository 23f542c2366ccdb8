"""What is sent to the browser, once: a few typed arrays, rounded, and what is needed to read them.

Axes: K checkpoints, L layers, G groups, H heads, R heads of a group, T queries, J selection
blocks, N compressed blocks.
"""

import zlib

import numpy as np
import torch
from torch import Tensor

from nsa_lite.show.explorer.sequence import TracedSequence, level_of

SCORE_LEVELS = 60_000  # a row's largest score; the room above, up to NAN, is for round_in_order
NAN = 65_535  # stands for a score that is not a number
# How much is sent: the compressed scores of each head, their sum over a group's heads, or none of
# them; at last the importances with 12 bits in place of 16.
DETAILS = ("heads", "group", "none", "coarse")


def arrays_of(sequence: TracedSequence, detail: str = "heads") -> dict[str, np.ndarray]:
    """Everything that the browser draws.

    Shapes: scores (K, L, G, T, J) uint16 with score_scale (K, L, G, T) float32; chosen (K, L, G,
    T, ceil(J / 8)) uint8, a bit a block; gates (K, L, H, T, 3) uint16; answer_at (T,) int32; and
    for "heads" and "group" p (K, L, G, R or 1, T, N) uint8 with p_scale (K, L, G, R or 1, T).
    """
    most = score_levels(detail)
    row, layers = sequence.row, [x for xs in sequence.checkpoints.values() for x in xs]
    shape = (len(sequence.checkpoints), len(layers) // len(sequence.checkpoints))

    def stack(each: list[Tensor]) -> np.ndarray:
        stacked = torch.stack(each)
        return stacked.reshape(*shape, *stacked.shape[1:]).numpy()

    rounded = [round_in_order(x.importance[row].cpu(), most) for x in layers]
    scores, scales = zip(*rounded, strict=True)
    result = {
        "score_scale": stack(list(scales)).astype("<f4"),
        "answer_at": sequence.answer_at.numpy().astype("<i4"),
        "scores": stack(list(scores)).astype("<u2"),
        "gates": stack([level_of(x.gates[row]) for x in layers]).astype("<u2"),
        "chosen": np.packbits(
            stack([_chosen(x.ids[row].cpu(), sequence.blocks) for x in layers]),
            axis=-1,
            bitorder="little",
        ),
    }
    if detail in ("heads", "group"):
        heads = [x.probabilities[row].float().cpu().nan_to_num() for x in layers]
        heads = stack([x.sum(1, keepdim=True) for x in heads] if detail == "group" else heads)
        scale = heads.max(-1, keepdims=True, initial=0.0)
        result["p"] = np.rint(255 * heads / np.where(scale > 0, scale, 1)).astype("u1")
        result["p_scale"] = scale[..., 0].astype("<f4")
    return result


def score_levels(detail: str) -> int:
    """The whole number that stands for a row's largest score."""
    return SCORE_LEVELS // 16 if detail == "coarse" else SCORE_LEVELS


def round_in_order(score: Tensor, most: int = SCORE_LEVELS) -> tuple[Tensor, Tensor]:
    """Scores as whole numbers that rank exactly as the scores do, ties to the lower id.

    Shapes: score (..., J) -> levels (..., J) 0 .. NAN - 1 (or NAN), scale (...): score is about
    level / most * scale. Plain rounding could swap two blocks: a level that would rank
    too low goes up by one.
    """
    finite = score.double().nan_to_num(nan=0.0).clamp(min=0, max=torch.finfo(torch.float32).max)
    scale = finite.amax(-1)
    levels = (finite / scale.where(scale > 0, 1.0)[..., None] * most).round().long()
    order = finite.sort(dim=-1, descending=True, stable=True).indices.flip(-1)  # lowest rank first
    ranked = levels.gather(-1, order)
    # Rank k must exceed rank k - 1 if its id is higher, or at least equal it if it is lower.
    steps = torch.nn.functional.pad((order[..., 1:] > order[..., :-1]).long().cumsum(-1), (1, 0))
    ranked = (ranked - steps).cummax(-1).values + steps
    levels = levels.scatter(-1, order, ranked).masked_fill(score.isnan(), NAN)
    return levels, scale.float()


def _chosen(ids: Tensor, blocks: int) -> Tensor:
    """(G, T, n) ids as bool (G, T, J)."""
    mask = torch.zeros(*ids.shape[:2], blocks + 1, dtype=torch.bool)  # one more column: -1
    return mask.scatter(-1, ids.long().where(ids >= 0, blocks), True)[..., :blocks]


def facts_of(sequence: TracedSequence, arrays: dict[str, np.ndarray], detail: str) -> dict:
    """What JavaScript needs to read the arrays: sizes, names, and where each array begins."""
    c, place, begins = sequence.config, 0, {}
    for name, array in arrays.items():
        begins[name] = {"type": array.dtype.name, "shape": array.shape, "begins": place}
        place += _padded(array.nbytes)
    sizes = (
        "heads",
        "kv_heads",
        "block_size",
        "stride",
        "select_block_size",
        "num_selected",
        "num_initial",
        "num_local",
        "window",
    )
    return {
        "sizes": {name: getattr(c, name) for name in sizes},
        "start": sequence.start,
        "queries": sequence.queries,
        "blocks": sequence.blocks,
        "checkpoints": list(sequence.checkpoints),
        "by_score": sequence.by_score,
        "tokens": sequence.tokens,
        "arrays": begins,
        "ranges": sequence.ranges(),
        "score_levels": score_levels(detail),
        "nan": NAN,
    }


def packed(arrays: dict[str, np.ndarray]) -> bytes:
    """The arrays one after the other, each begun at a multiple of 8 bytes, compressed (zlib).

    Of a uint16 array first all low bytes, then all high ones: like beside like packs better.
    """
    joined = b"".join(_bytes(a).ljust(_padded(a.nbytes), b"\0") for a in arrays.values())
    return zlib.compress(joined, 6)


def _bytes(array: np.ndarray) -> bytes:
    if array.dtype != np.uint16:
        return array.tobytes()
    return array.reshape(-1, 1).view(np.uint8).T.tobytes()


def _padded(count: int) -> int:
    return -(-count // 8) * 8


def packed_within(sequence: TracedSequence, limit: int) -> tuple[dict, bytes]:
    """Facts and packed arrays with as much detail as `limit` bytes allow; at least the scores."""
    for detail in DETAILS:
        arrays = arrays_of(sequence, detail)
        data = packed(arrays)
        if len(data) <= limit:
            break
    return facts_of(sequence, arrays, detail), data
