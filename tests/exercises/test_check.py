"""check keeps its word: one of three lines, whatever the answer does; strict raises that line."""

import os
import signal
import sys
import threading
import time

import pytest
import torch

from exercises import check, compare, hint
from exercises.checking import judge
from exercises.records import Case, Exercise, Mistake, find, load


@pytest.fixture(autouse=True)
def lesson(monkeypatch):
    monkeypatch.delenv("NSA_LITE_STRICT", raising=False)


def line_of(capsys, number, answer) -> str:
    """What check prints: exactly one line."""
    check(number, answer)
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.count("\n") == 1, shown
    return shown.out.rstrip("\n")


def right(length, block_size, stride):
    return max(0, (length - block_size) // stride + 1)


def stub(length, block_size, stride):
    # YOUR CODE HERE
    raise NotImplementedError()


# --- the three lines ---


@pytest.mark.parametrize("answer", [None, ..., stub], ids=["none", "dots", "stub"])
def test_the_line_for_no_attempt(capsys, answer):
    assert line_of(capsys, "02.1", answer) == "○ 02.1 not attempted"


def test_the_line_for_a_right_answer(capsys):
    assert line_of(capsys, "02.1", right) == "✓ 02.1 6 of 6 cases"


def test_the_line_for_a_wrong_answer(capsys):
    line = line_of(capsys, "02.1", lambda length, size, stride: (length - size) // stride + 1)
    assert line == (
        "✗ 02.1 5 of 6 cases: a sequence too short for any block: 1 tokens, blocks of "
        "4 every 2: got -1, and no sequence has fewer than 0 blocks"
    )


def test_an_exercise_that_does_not_exist(capsys):
    assert line_of(capsys, "02.9", right) == (
        "✗ 02.9 0 of 0 cases: there is no exercise '02.9'; there are 02.1, 02.2, 02.3, 02.4"
    )
    assert "there is no exercise set '77'" in line_of(capsys, "77.1", right)


# --- strict: for CI and grading ---


@pytest.mark.parametrize("answer", [stub, lambda *sizes: 0], ids=["stub", "wrong"])
@pytest.mark.parametrize("by", ["environment", "argument"])
def test_strict_raises_the_line(monkeypatch, capsys, answer, by):
    line = line_of(capsys, "02.1", answer)
    if by == "environment":
        monkeypatch.setenv("NSA_LITE_STRICT", "1")
    with pytest.raises(AssertionError) as error:
        check("02.1", answer, strict=True if by == "argument" else None)
    assert str(error.value) == line


def test_strict_lets_a_right_answer_pass_and_0_is_not_strict(monkeypatch, capsys):
    monkeypatch.setenv("NSA_LITE_STRICT", "1")
    assert line_of(capsys, "02.1", right).startswith("✓")
    monkeypatch.setenv("NSA_LITE_STRICT", "0")
    assert line_of(capsys, "02.1", stub).startswith("○")


# --- answers that misbehave ---


def raises(error):
    def answer(*arguments):
        raise error

    return answer


class SilentError(Exception):
    def __str__(self):
        raise ValueError("no text")


class Unfriendly:
    """A result that refuses everything."""

    def __getattribute__(self, name):
        raise RuntimeError(name)

    def __eq__(self, other):
        raise RuntimeError("==")


def endless_recursion(*arguments):
    return endless_recursion(*arguments)


def prints_a_lot(length, *others):
    for _ in range(10_000):
        print("x" * 100)
        print("x" * 100, file=sys.stderr)
    return length * 1000


MISBEHAVING = {
    "exit": (raises(SystemExit(1)), "SystemExit"),
    "quit": (lambda *x: sys.exit("bye"), "SystemExit: bye"),
    "error": (raises(ValueError("l is too long")), "ValueError: l is too long"),
    "error without text": (raises(SilentError()), "SilentError"),
    "two lines of text": (raises(ValueError("one\ntwo")), "ValueError: one two"),
    "memory": (raises(MemoryError()), "MemoryError"),
    "recursion": (endless_recursion, "RecursionError"),
    "generator exit": (raises(GeneratorExit()), "GeneratorExit"),
    "torch's own": (raises(NotImplementedError("no kernel")), "NotImplementedError: no kernel"),
    "too few arguments": (lambda length: 1, "TypeError"),
    "not a function": (7, "check wants your function itself, and got an int"),
    "unfriendly": (lambda *x: Unfriendly(), "an Unfriendly, and an int was asked for"),
    "text": (lambda *x: "4", "a str, and an int was asked for"),
    "true": (lambda *x: True, "a bool, and an int was asked for"),
    "nan": (lambda *x: float("nan"), "a float, and an int was asked for"),
    "much output": (prints_a_lot, "would need token"),
    "its own source": (lambda *x: 10**6 + int("x"), "line "),
}


@pytest.mark.parametrize("name", MISBEHAVING)
def test_a_misbehaving_answer_gets_one_line(capsys, name):
    answer, says = MISBEHAVING[name]
    line = line_of(capsys, "02.1", answer)
    assert line.startswith("✗ 02.1 0 of 6 cases: ") and says in line, line
    assert len(line) < 260


def mask(length, count, size, stride):
    return torch.arange(count) * stride + size - 1 <= torch.arange(length)[:, None]


TENSORS = {
    "nothing": (lambda *x: None, "returned None: is a return missing?"),
    "a list": (lambda *x: mask(*x).tolist(), "a list, and a torch.Tensor was asked for"),
    "another shape": (lambda *x: mask(*x)[None], "the shape is (1, 5, 1)"),
    "another type": (lambda *x: mask(*x).float(), "torch.float32, and bool was asked for"),
    "complex": (lambda *x: mask(*x) + 0j, "complex64, and bool was asked for"),
    "another device": (lambda *x: mask(*x).to("meta"), "on the device meta, the inputs on cpu"),
    "sparse": (lambda *x: (~mask(*x)).to_sparse(), "✗ 02.2 0 of 5 cases"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_of_another_form_is_named(capsys, name):
    answer, says = TENSORS[name]
    assert says in line_of(capsys, "02.2", answer)


# --- time ---

SHORT = 0.3


def exercise(*cases: Case, seconds: float = SHORT) -> Exercise:
    return Exercise(
        "02.1", "a stand-in", "core", 10, lambda generator: list(cases), ("",) * 3, seconds
    )


def busy(*arguments):
    while True:
        pass


def stubborn(*arguments):
    while True:
        try:
            time.sleep(0.01)
        except:  # noqa: E722  a bare except, as a learner may write it
            return 1


@pytest.mark.parametrize(
    "answer", [busy, stubborn, lambda *x: time.sleep(30)], ids=["busy", "stubborn", "asleep"]
)
def test_an_answer_that_does_not_end_is_stopped(answer):
    begun = time.monotonic()
    case = Case("quick", {"n": 1}, 1)
    verdict = judge(exercise(case, case), answer)
    assert verdict.line() == (
        "✗ 02.1 0 of 2 cases: quick: stopped after 0.3 seconds: does a loop "
        "never end, or do too much?"
    )
    assert time.monotonic() - begun < 10


def test_a_stopped_loop_leaves_no_thread_behind():
    before = threading.active_count()
    judge(exercise(Case("quick", {"n": 1}, 1)), busy)
    assert threading.active_count() <= before


def test_the_learner_can_interrupt():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    threads = threading.active_count()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        judge(exercise(Case("slow", {"n": 1}, 1), seconds=30), busy)
    signal.signal(signal.SIGINT, before)
    assert threading.active_count() <= threads


# --- the notebook around it stays as it was ---


def test_inputs_are_copies_and_a_change_is_named():
    x = torch.zeros(3)
    case = Case("copy", {"x": x, "sizes": [1, 2]}, 0.0)
    verdict = judge(exercise(case), lambda x, sizes: float(x.add_(1).sum() * 0))
    assert verdict.message == "copy: the function changed its input x in place; work on a copy"
    assert x.eq(0).all()
    verdict = judge(exercise(case), lambda x, sizes: float(sizes.pop() * 0))
    assert verdict.message == "copy: the function changed its input sizes in place; work on a copy"
    assert judge(exercise(case), lambda x, sizes: 0.0).right


def test_the_random_state_stays(capsys):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    line_of(capsys, "02.1", lambda *x: torch.manual_seed(0) and 1)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_check_of_gradients_works_where_the_notebook_has_switched_them_off(capsys, mode):
    answer = load("02", "answers").attention_by_loop
    with mode():
        assert line_of(capsys, "02.4", answer) == "✓ 02.4 13 of 13 cases"


def test_the_seed_changes_the_numbers_but_not_the_cases():
    zero, one = (find("02.3").cases(torch.Generator().manual_seed(s)) for s in (0, 1))
    assert [case.name for case in zero] == [case.name for case in one]
    assert not torch.equal(zero[0].arguments["x"], one[0].arguments["x"])


# --- hints ---


def test_hints_are_printed_one_at_a_time(capsys):
    for which in (1, 2, 3):
        hint("02.1", which)
        assert capsys.readouterr().out == (
            f"hint {which} of 3 for 02.1:\n{find('02.1').hints[which - 1]}\n"
        )
    hint("02.1", 4)
    assert capsys.readouterr().out == "02.1 has hints 1, 2 and 3, not 4\n"
    hint("02.7", 1)
    assert "there is no exercise '02.7'" in capsys.readouterr().out


# --- comparing values ---


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (torch.ones(2).double(), torch.ones(2)),
        (torch.ones(2).int(), torch.ones(2).long()),
        (torch.tensor([0.3333]), torch.tensor([1 / 3])),
        (torch.tensor([-torch.inf]), torch.tensor([-torch.inf])),
        ((1, 2), [1, 2]),
        (range(1, 3), [1, 2]),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.tensor(3), 3),
        (3, 3.0),
        ([torch.ones(1), 2], (torch.ones(1), 2)),
    ],
)
def test_another_way_to_say_the_same_is_accepted(got, expected):
    assert compare.difference(got, expected) is None


@pytest.mark.parametrize(
    ("got", "expected", "axes", "says"),
    [
        (
            torch.tensor([[0.0, 1.0]]),
            torch.tensor([[0.0, 2.0]]),
            ("query", "block"),
            "query 0, block 1: got 1, which is wrong (1 of 2 entries are wrong)",
        ),
        (torch.tensor([0.0, torch.nan]), torch.zeros(2), ("query",), "query 1: got nan"),
        (torch.tensor([0.3]), torch.tensor([1 / 3]), (), "axis 0 0: got 0.3"),
        (torch.tensor([torch.inf]), torch.tensor([-torch.inf]), ("row",), "row 0: got inf"),
        (
            (torch.zeros(1), torch.ones(1)),
            (torch.zeros(1), torch.zeros(1)),
            {"out": ("query",), "lse": ("query",)},
            "lse: query 0: got 1",
        ),
        ([1, 2, 3], [1, 2], (), "3 entries: too many"),
        ([1], [1, 2], (), "1 entries: too few"),
        ([1, 3], [1, 2], (), "entry 1: got 3"),
        (3.0, 3, (), "a float, and an int was asked for"),
        (True, 1, (), "a bool, and an int was asked for"),
        (1.001, 1.0, (), "got 1.001"),
    ],
)
def test_a_difference_says_where(got, expected, axes, says):
    assert says in compare.difference(got, expected, axes)


def test_a_mistake_is_recognised_only_where_it_is_the_only_one_that_fits():
    mistakes = {"doubled": 4, "squared": 4, "tripled": 6}
    assert compare.recognise(6, mistakes) == "tripled"
    assert compare.recognise(4, mistakes) is None


def test_a_mistake_is_named_by_what_its_function_gives():
    mistakes = [
        Mistake("doubled", lambda n: 2 * n, "{n} was doubled"),
        Mistake("squared", lambda n: n * n, "{n} was squared"),
        Mistake("inverted", lambda n: 1 // (n - 3), "{n} was inverted"),  # stops at 3
    ]
    assert compare.name_mistake(9, mistakes, (3,), n="three") == "three was squared"
    assert compare.name_mistake(4, mistakes, (2,), n="two") is None, "two of them give 4"
    assert compare.name_mistake(5, mistakes, (3,), n="three") is None


def test_a_mistake_may_be_called_as_the_case_calls_and_compared_in_part():
    mistakes = [Mistake("swapped", lambda a, b: (b, a), "they were swapped")]

    def call(answer, a):
        return answer(a, a + 1)

    def first(result):
        return result[0]

    assert compare.name_mistake((6, "?"), mistakes, (5,), call=call, part=first)
    assert compare.name_mistake((6, "?"), mistakes, (5,), call=call) is None
