"""No accident passes a check: sizes that coincide or never vary, and numbers that are all tame."""

import itertools
from dataclasses import asdict, is_dataclass

import pytest
import torch
from torch import Tensor

from exercises.checking import judge
from exercises.records import load

# the sets that hold to this
HELD = ("01", "02", "03", "04", "05", "06", "07", "08", "09", "10", "11", "12")
EXERCISES = {e.number: e for number in HELD for e in load(number).EXERCISES}
WITHOUT_SIZES = (
    "06.1",
    "08.3",
    "12.3",
)  # of numbers, of the contest's sizes, which are the same for all, and of a text
AXES = {  # what the axes of an exercise's tensors are, "-" for no size; of a list, those of each
    "01.2": dict(q="T D", k="T D", v="T Dv"),
    "01.3": dict(outs="P T Dv", lses="P T"),
    "01.5": dict(q="B H T D", k="B G S D", v="B G S Dv"),
    "02.3": dict(x="T D", position="block_size D", weight="- out"),
    "02.4": dict(q="T D", k="N D", v="N Dv"),
    "03.1": dict(scores="T N", lse="T"),
    "03.2": dict(p="T N"),
    "03.3": dict(scores="H T N"),
    "03.4": dict(score="T J"),
    "03.5": dict(q="T D", k="T D", v="T Dv", ids="T n"),
    "04.2": dict(q="T D", k="T D", v="T Dv"),
    "04.3": dict(logits="T -", compressed="H T Dv", selected="H T Dv", window="H T Dv"),
    "04.4": dict(weight="C D"),
    "04.5": dict(q="T D", k="- T D", v="- T Dv", gates="T -"),
    "05.1": dict(x="T D"),
    "05.2": dict(x="T C"),
    "05.3": dict(q="H T D", k="N D"),
    "05.4": dict(score="T J"),
    "05.5": {
        "x": "T C",
        "p.query": "C HD",
        "p.keys.window": "C D",
        "p.phi_k.position": "block_size D",
        "p.phi_k.first": "- hidden_of_phi",
        "p.gate.first": "C hidden",
        "p.gate.second": "hidden -",
    },
    "06.2": dict(out_a="T Dv", lse_a="T", out_b="T Dv", lse_b="T"),
    "06.3": dict(m="T", total="T", out="T Dv", scores="T N", v="N Dv"),
    "06.5": dict(q="T D", k="N D", v="N Dv"),
    "07.1": dict(x="size", y="size"),
    "07.2": dict(s="rows width", seen="rows"),
    "07.3": dict(q="T D", k="T D", v="T Dv"),
    "07.4": dict(q="R T D", k="S D", v="S D", ids="T n"),
    "07.5": dict(ids="U n"),
    "08.1": dict(mass="queries blocks", ids="queries n"),
    "08.2": dict(score="own"),
    "08.4": dict(z="queries blocks", mass="queries blocks"),
    "09.2": dict(buffer="B G capacity width", new="B G T width", lengths="B"),
    "09.3": dict(outs="P rows Dv", maxima="P rows", sums="P rows"),
    "09.5": dict(scores="heads n", values="n Dv", overlap="n J"),
    "10.1": dict(memory="M D"),
    "10.2": dict(q="R T D", k="N D", lse="R T"),
    "10.3": dict(total="T N"),
    "10.4": dict(scores="T J"),
    "10.5": dict(q="R T D", k="N D", lse="R T"),
    "11.1": dict(out="T Dv", dout="T Dv", dlse="T"),
    "11.2": dict(logits="T -", outs="- T Dv", dout="T Dv"),
    "11.3": dict(q="R D", k="J l D", v="J l Dv", ids="n", dout="R Dv"),
    "11.4": dict(ids="T n"),
    "11.5": dict(q="T R D", k="l D", v="l Dv", dout="T R Dv", tokens="readers"),
    "11.6": dict(rows="readers width"),
}
NO_SIZES = {"dim", "num_initial", "num_local", "rope_theta"}  # of a config: nothing reads them
NO_SIZES |= {"skipped", "poison"}  # of a case of set 07
ONLY_POWERS_OF_TWO = {"number_bytes", "bytes_per_number"}
TILES = {  # what Triton takes as a power of two only
    "07.1": {"block"},
    "07.3": {"D", "Dv", "M", "N"},
    "07.4": {"R", "D", "l_sel"},
}


def cases_of(number):
    return EXERCISES[number].cases(torch.Generator().manual_seed(0))


def flat(arguments: dict, before="") -> dict[str, object]:
    """Arguments by name, those in a dict with its name before theirs: "p.keys.window"."""
    found = {}
    for name, value in arguments.items():
        parts = flat(value, f"{before}{name}.") if isinstance(value, dict) else None
        found |= {before + name: value} if parts is None else parts
    return found


def sizes_of(number, case) -> dict[str, int]:
    """Every size that a case has: its whole numbers, and the axes of its tensors."""
    found = {}
    for name, value in flat(case.arguments).items():
        if is_dataclass(value):
            fields = asdict(value).items()
            found |= {k: v for k, v in fields if type(v) is int and k not in NO_SIZES}
        elif type(value) is int and name not in NO_SIZES:
            found[name.split(".")[-1]] = value
        elif name in AXES.get(number, {}):
            first = value
            if isinstance(value, list):
                first = value[0]
                found["shares"] = len(value)
            named = zip(AXES[number][name].split(), first.shape, strict=True)
            for axis, size in named:
                if axis != "-":
                    assert found.setdefault(axis, size) == size, f"{case.name}: {axis}"
    return found


@pytest.fixture(params=EXERCISES)
def number(request):
    return request.param


@pytest.fixture
def sizes(number):
    """Each size's values, case by case."""
    rows = [sizes_of(number, case) for case in cases_of(number)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_every_size_varies_and_is_not_always_a_power_of_two(number, sizes):
    assert sizes or number in WITHOUT_SIZES
    powers = ONLY_POWERS_OF_TWO | TILES.get(number, set())
    for name, values in sizes.items():
        assert len(set(values)) > 1, f"{name} is always {values[0]}"
        odd = [x for x in values if x & (x - 1)]
        assert odd or name in powers, f"{name} is always a power of two"


def test_no_two_sizes_are_always_equal_or_in_one_ratio(sizes):
    for (one, a), (other, b) in itertools.combinations(sizes.items(), 2):
        ratios = {x / y if y else 0.0 for x, y in zip(a, b, strict=True)}
        assert len(ratios) > 1, f"{one} and {other} always have the ratio {ratios}"


def test_some_blocks_are_longer_than_two_strides(sizes):
    if {"block_size", "stride"} <= set(sizes):
        pairs = list(zip(sizes["block_size"], sizes["stride"], strict=True))
        assert any(l > 2 * d for l, d in pairs) and any(l == d for l, d in pairs)


TOO_SHORT = (  # exercises, and the name of their length
    ("02.1", "length"),
    ("02.2", "length"),
    ("02.3", "T"),
    ("02.4", "T"),
    ("05.1", "T"),
    ("05.3", "T"),
    ("05.5", "T"),
    ("06.5", "T"),
)


def test_some_sequences_are_too_short_for_any_block():
    for number, length in TOO_SHORT:
        rows = [sizes_of(number, case) for case in cases_of(number)]
        assert any(row[length] < row["block_size"] for row in rows), number


def floats_of(case) -> list[Tensor]:
    """Its tensors of floating point numbers, those in lists one by one."""
    values = [v for x in case.arguments.values() for v in (x if isinstance(x, list) else [x])]
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def products(case) -> Tensor:
    """The scaled scores of all queries and keys, by groups of heads."""
    q, k = (case.arguments[name] for name in "qk")
    if q.dim() == 4:
        q = q.unflatten(1, (k.shape[1], -1))
        k = k[:, :, None]
    return q @ k.mT * q.shape[-1] ** -0.5


def numbers_of(name: str):
    """The numbers of one argument, those of a list together."""

    def values(case) -> Tensor:
        found = case.arguments[name]
        return torch.cat([x.flatten() for x in found]) if isinstance(found, list) else found

    return values


def scaled(case) -> Tensor:
    """The products of all queries and keys, times the scale that the case has."""
    return case.arguments["q"] @ case.arguments["k"].mT * case.arguments["scale"]


SCORES = {  # what goes through an exponential
    "01.2": products,
    "01.3": numbers_of("lses"),
    "01.5": products,
    "02.4": products,
    "03.1": numbers_of("scores"),
    "03.3": numbers_of("scores"),
    "03.5": products,
    "04.2": products,
    "04.3": numbers_of("logits"),
    "04.5": products,
    "05.3": products,
    "06.1": lambda case: torch.tensor([case.arguments["m"], case.arguments["score"]]),
    "06.2": numbers_of("lse_a"),
    "06.3": numbers_of("scores"),
    "06.5": products,
    "07.2": lambda case: case.arguments["s"] * case.arguments["scale"],
    "07.3": scaled,
    "07.4": scaled,
    "08.4": numbers_of("z"),
    "09.3": numbers_of("maxima"),
    "09.5": numbers_of("scores"),
    "10.2": products,
    "10.5": products,
    "11.2": numbers_of("logits"),
    "11.3": scaled,
    "11.5": scaled,
}
MAY_BE_MISSING = (
    "01.3",
    "03.1",
    "06.1",
    "06.2",
    "06.3",
    "09.3",
    "09.5",
)  # with -inf among the scores


@pytest.mark.parametrize("number", SCORES)
def test_scores_are_very_large_very_negative_all_equal_and_missing(number):
    """Beyond 128 exp and exp2 are infinite in float32, and below -149 they are 0."""
    seen = [SCORES[number](case).flatten() for case in cases_of(number)]
    finite = [x[x.isfinite()] for x in seen]
    assert any((x > 128).any() for x in finite)
    assert any(len(x) > 1 and (x < -149).all() for x in finite), "nothing but very negative ones"
    assert any(len(x) > 1 and (x == x[0]).all() for x in finite), "all of them equal"
    if number in MAY_BE_MISSING:
        assert any((x == -torch.inf).any() for x in seen), "none is missing"


def test_some_rows_may_read_nothing():
    maxima = [case.arguments["maxima"] for case in cases_of("09.3")]
    scores = [torch.cat(case.arguments["scores"], 1) for case in cases_of("09.5")]
    assert any((x == -torch.inf).all(0).any() for x in maxima)
    assert any((x == -torch.inf).all() for x in scores)


GARBAGE = ("01.5", "02.3", "03.4", "04.2", "05.1", "05.3", "05.4", "06.5", "07.2", "07.4")
GARBAGE += ("09.2", "09.3", "09.5", "10.1", "10.2", "11.3", "11.5")


def test_what_stands_where_nothing_may_be_read_is_no_number():
    for number in GARBAGE:
        garbage = [x for case in cases_of(number) for x in floats_of(case)]
        assert any(x.isnan().any() or (x == torch.inf).any() for x in garbage), number


def test_the_cache_is_empty_full_ragged_and_of_one_length():
    cases = cases_of("09.2")
    lengths = [case.arguments["lengths"] for case in cases]
    rooms = [c.arguments["buffer"].shape[2] - c.arguments["new"].shape[2] for c in cases]
    assert any((x == 0).any() for x in lengths)
    assert any((x == room).any() for x, room in zip(lengths, rooms, strict=True))
    assert any(len(x) > 1 and (x == x[0]).all() for x in lengths)
    assert any(len(x) > 2 and len(x.unique()) == len(x) for x in lengths)


def test_a_step_meets_every_kind_of_end():
    """Fewer tokens than each size, a whole last block, a ragged one, fewer and more blocks."""
    for kind in (
        lambda c, n: n < c.block_size,
        lambda c, n: c.block_size <= n < c.window,
        lambda c, n: n % c.select_block_size == 0,
        lambda c, n: n % c.select_block_size and n > c.num_selected * c.select_block_size,
        lambda c, n: 1 < -(-n // c.select_block_size) < c.num_selected,
        lambda c, n: c.window < c.select_block_size,
        lambda c, n: (n - c.block_size) % c.stride and n > c.block_size,
        lambda c, n: c.block_size not in (c.stride, 2 * c.stride),
    ):
        found = [kind(c.arguments["config"], c.arguments["length"]) for c in cases_of("09.4")]
        assert any(found)


INPUTS = {  # how many tensors an answer gets that must stay as they are
    "01.2": 3,
    "01.3": 2,
    "01.5": 3,
    "02.3": 3,
    "02.4": 3,
    "03.1": 2,
    "03.2": 1,
    "03.3": 1,
    "03.4": 1,
    "03.5": 4,
    "04.2": 3,
    "04.3": 4,
    "04.4": 1,
    "04.5": 4,
    "05.1": 1,
    "05.2": 1,
    "05.3": 2,
    "05.4": 1,
    "05.5": 1,
    "06.2": 4,
    "06.3": 5,
    "06.5": 3,
    "07.1": 2,
    "07.2": 2,
    "07.3": 3,
    "07.4": 4,
    "07.5": 1,
    "08.1": 2,
    "08.2": 1,
    "10.1": 1,
    "10.2": 3,
    "10.3": 1,
    "10.5": 3,
    "11.1": 3,
    "11.2": 3,
    "11.3": 5,
    "11.4": 1,
    "11.5": 5,
}


def spoiling(right, place: int):
    """A right answer that changes one of its tensors once it is done."""

    def answer(*arguments):
        result = right(*arguments)
        given = [x for x in arguments if isinstance(x, Tensor)][place]
        if not given.requires_grad:
            given.fill_(7)
        return result

    return answer


@pytest.mark.parametrize("number", INPUTS)
def test_a_change_to_any_input_is_refused(number):
    right = load(number, "answers").RIGHT[number][0]
    for place in range(INPUTS[number]):
        verdict = judge(EXERCISES[number], spoiling(right, place))
        assert "changed its input" in verdict.message, f"{place}: {verdict.line()}"
