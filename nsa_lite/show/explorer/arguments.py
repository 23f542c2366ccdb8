"""What is asked of the explorer's arguments, and the one form that they are brought into."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from nsa_lite import Trace
from nsa_lite.checks import require

Layers = Trace | Sequence[Trace]
Traces = Layers | Mapping[str, Layers]


def traces_by_checkpoint(traces: Traces) -> dict[str, list[Trace]]:
    """The layers of each checkpoint, all of one form; a run without checkpoints is named "".

    Errors: ValueError or TypeError that names what is missing or unlike the rest.
    """
    several = isinstance(traces, Mapping)
    named = traces if several else {"": traces}
    require(len(named) > 0, "traces", "{}", "must hold at least one checkpoint")
    result = {
        str(label): _layers(f"traces[{label!r}]" if several else "traces", layers)
        for label, layers in named.items()
    }
    _require_alike(result)
    return result


def _layers(name: str, layers: Layers) -> list[Trace]:
    listed = [layers] if isinstance(layers, Trace) else layers
    if not isinstance(listed, list | tuple) or not all(isinstance(x, Trace) for x in listed):
        raise TypeError(
            f"{name}: must be a Trace or a list of them, one a layer, got {type(layers).__name__}"
        )
    require(
        len(listed) > 0,
        name,
        "[]",
        "must hold at least one Trace; a model leaves "
        "none when its attention is dense or a window, and selects nothing",
    )
    return list(listed)


def _require_alike(checkpoints: dict[str, list[Trace]]) -> None:
    first = next(iter(checkpoints.values()))
    for label, layers in checkpoints.items():
        require(
            len(layers) == len(first),
            f"traces[{label!r}]",
            f"{len(layers)} layers",
            f"must have {len(first)}, as the first checkpoint",
        )
        for i, trace in enumerate(layers):
            require(
                _form(trace) == _form(first[0]),
                f"layer {i} of traces[{label!r}]",
                _form(trace),
                f"config, start and (B, G, T) must be those of the first trace, {_form(first[0])}",
            )


def _form(trace: Trace) -> tuple:
    return trace.config, trace.start, trace.ids.shape[:3]


def token_labels(tokens: str | bytes | Iterable[str] | None, length: int) -> list[str]:
    """One string a position; without tokens they are empty.

    Errors: TypeError for numbers, ValueError unless there are `length` of them.
    """
    if tokens is None:
        return [""] * length
    labels = [_of_byte(b) for b in tokens] if isinstance(tokens, bytes) else list(tokens)
    if not all(isinstance(label, str) for label in labels):
        raise TypeError("tokens: must be a string, bytes or one string a position, not numbers")
    require(
        len(labels) == length,
        "tokens",
        f"{len(labels)} of them",
        f"must be one for each of the {length} positions",
    )
    return labels


def _of_byte(byte: int) -> str:
    return chr(byte) if byte < 128 else f"\\x{byte:02x}"


def answer_positions(answer_at: Tensor | None, positions: Tensor) -> Tensor:
    """Where the answer of each query stands, -1 for none: (Q,) int64; positions: the queries' own.

    Errors: ValueError for another shape, or for a position after the query's own.
    """
    if answer_at is None:
        return torch.full_like(positions, -1)
    answers = torch.as_tensor(answer_at).cpu()
    require(
        answers.shape == positions.shape,
        "answer_at.shape",
        tuple(answers.shape),
        f"must be (Q,) = ({len(positions)},), one for each query",
    )
    for query, position in zip(positions.tolist(), answers.tolist(), strict=True):
        require(
            -1 <= position <= query,
            f"answer_at of query {query}",
            position,
            "must be -1 or a position up to the query's own",
        )
    return answers.long()


def kept_rows(positions: Tensor, index: dict[int, int]) -> Tensor:
    """The rows of the traces that hold the queries at these positions; `index` has every row's.

    Errors: ValueError unless there is one at least, they ascend, and the traces hold each.
    """
    require(len(positions) > 0, "positions", "[]", "must name at least one query")
    falls = (positions.diff() <= 0).nonzero().flatten()
    where = int(falls[0]) + 1 if len(falls) else 0
    rule = "must be larger than the one before it"
    require(not len(falls), f"positions[{where}]", int(positions[where]), rule)
    for t in positions.tolist():
        require(t in index, "positions", t, "is no query that the traces hold")
    return torch.tensor([index[t] for t in positions.tolist()])
