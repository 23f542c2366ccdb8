"""Answers that lie, change what judges them, or do not let go: named, undone, survived."""

import builtins
import subprocess
import sys
import threading
import time

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

import exercises
from exercises import checking, compare, guard, outside, release
from exercises.bare import bare
from exercises.checking import judge
from exercises.hidden import hidden_check
from exercises.records import Case, Exercise
from nsa_lite import loops

ONES = torch.ones(3)


def verdict(answer, expected=1, seconds=10.0, cases=1, **arguments):
    """The verdict on an answer in a made-up exercise of equal cases."""
    case = Case("a case", {"n": 1, **arguments}, expected)
    made = Exercise(
        "02.1", "a stand-in", "core", 10, lambda generator: [case] * cases, ("",) * 3, seconds
    )
    return judge(made, answer)


# --- results that lie ---


class AlwaysEqual(int):
    __hash__ = int.__hash__

    def __eq__(self, other):
        return True

    def __pos__(self):
        return 1


class AlwaysClose(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.isclose, torch.Tensor.eq, torch.Tensor.double):
            return ONES
        return super().__torch_function__(func, types, args, kwargs or {})


class Disguised:
    """Not a tensor, though isinstance says so."""

    __class__ = torch.Tensor
    shape = torch.Size([3])
    dtype = torch.float32
    device = torch.device("cpu")

    def __getattr__(self, name):
        return lambda *a, **k: ONES


class AnArray:
    def __array__(self, dtype=None):
        return np.ones(3)

    def tolist(self):
        return [1, 1, 1]


class LongList(list):
    def __iter__(self):
        return iter([1, 2])

    def __len__(self):
        return 2


LIES = {
    "an int that equals all": (AlwaysEqual(7), 1, "got 7, which is wrong"),
    "ints that equal all": ([AlwaysEqual(7)], [1], "entry 0: got 7"),
    "a part that equals all": ((AlwaysEqual(7), 1), (1, 1), "result 1: got 7"),
    "a tensor that is close to all": (torch.zeros(3).as_subclass(AlwaysClose), ONES, "got 0"),
    "a tensor by name": (Disguised(), ONES, "a Disguised, and a torch.Tensor was asked for"),
    "an array by name": (AnArray(), [1, 1, 1], "an AnArray, and a list was asked for"),
    "a list that iterates over another": (LongList([1]), [1, 2], "1 entries: too few"),
    "an array of objects": (np.array([AlwaysEqual(7)], dtype=object), [1], "entry 0: got 7"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_result_cannot_answer_for_itself(name):
    value, expected, says = LIES[name]
    said = verdict(lambda n: value, expected)
    assert says in said.line() and not said.right


def test_bare_keeps_values_types_and_memory():
    x = torch.randn(3, requires_grad=True)
    assert bare(x) is x
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert type(bare(parameter)) is torch.Tensor
    assert bare(parameter).data_ptr() == parameter.data_ptr() and bare(parameter).requires_grad
    assert bare((1, [2.5, True], "a", None)) == (1, [2.5, True], "a", None)
    number = bare(np.float64(0.5))
    assert type(number) is float and number == 0.5


def test_a_subclass_of_a_right_result_is_right():
    assert verdict(lambda n: ONES.as_subclass(AlwaysClose), ONES).right
    assert verdict(lambda n: np.float64(0.25), 0.25).right


# --- names that were replaced ---

REPLACED = {
    "torch.isclose": (torch, "isclose"),
    "torch.Tensor.isnan": (torch.Tensor, "isnan"),
    "torch.Tensor.__eq__": (torch.Tensor, "__eq__"),
    "torch.nn.functional.softmax": (torch.nn.functional, "softmax"),
    "builtins.all": (builtins, "all"),
    "exercises.check": (exercises, "check"),
    "exercises.checking.judge": (checking, "judge"),
    "exercises.compare.difference": (compare, "difference"),
    "exercises.compare.wrong_value": (compare, "wrong_value"),
    "exercises.guard.run": (guard, "run"),
    "nsa_lite.loops.window_attention": (loops, "window_attention"),
}


def always(*arguments, **others):
    return True


@pytest.mark.parametrize("label", REPLACED)
@pytest.mark.parametrize("where", ["in the answer", "before"])
def test_what_was_replaced_is_put_back_and_named(label, where):
    place, name = REPLACED[label]
    original = getattr(place, name)

    def answer(n):
        if where == "in the answer":
            setattr(place, name, always)
        return torch.zeros(3)

    if where == "before":
        setattr(place, name, always)
    said = verdict(answer, ONES, cases=2)
    assert getattr(place, name) == original
    assert said.line() == (
        "✗ 02.1 0 of 2 cases: a case: n = 1: axis 0 0: got 0, which is wrong "
        f"(3 of 3 entries are wrong) (put back: {label} was replaced)"
    )


def test_an_added_name_that_hides_an_inherited_one_is_removed():
    def answer(n):
        torch.Tensor.detach = always
        torch.Tensor.mine = always  # hides nothing
        return n

    said = verdict(answer)
    assert said.right and said.put_back == ("torch.Tensor.detach was replaced",)
    assert torch.Tensor.detach is torch._C.TensorBase.detach
    del torch.Tensor.mine


def test_a_line_names_only_some_of_many():
    def answer(n):
        for name in ("relu", "gelu", "silu", "elu", "celu"):
            setattr(torch.nn.functional, name, always)
        return n

    line = verdict(answer).line()
    assert line.startswith("✓ 02.1 1 of 1 cases (put back: ") and line.endswith(", 2 more)")


# --- settings ---


def deterministic(n):
    torch.use_deterministic_algorithms(True, warn_only=True)


SETTINGS = {
    "torch's default dtype": lambda n: torch.set_default_dtype(torch.float64),
    "torch's default device": lambda n: torch.set_default_device("meta"),
    "torch's grad mode": lambda n: torch.set_grad_enabled(False),
    "torch's deterministic mode": deterministic,
    "torch's seed": lambda n: torch.manual_seed(11),
    "Python's recursion limit": lambda n: sys.setrecursionlimit(950),
}


def with_gradient(answer, n):
    """A case that needs float32, the CPU, and gradients."""
    answer(n)
    x = torch.ones(2, requires_grad=True)
    return torch.autograd.grad((x * n).sum(), x)[0]


def gradient_cases(generator):
    return [Case("a case", {"n": 3.0}, torch.full((2,), 3.0), call=with_gradient)]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_an_answer_changes_is_named_and_put_back(name):
    change = SETTINGS[name]
    before = outside.settings()
    random = torch.default_generator.get_state()
    said = verdict(lambda n: (change(n), torch.ones(1))[1].shape[0], cases=2, seconds=60)
    assert said.line() == f"✓ 02.1 2 of 2 cases (put back: {name} was changed)"
    assert outside.settings() == before
    assert torch.equal(torch.default_generator.get_state(), random)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "Python's recursion limit"])
def test_a_check_works_whatever_the_notebook_has_set_and_leaves_it(name):
    before = outside.settings()
    try:
        SETTINGS[name](1)
        mine = outside.settings()
        made = Exercise("02.1", "", "core", 10, gradient_cases, ("",) * 3)
        said = judge(made, lambda n: n)
        assert said.line() == "✓ 02.1 1 of 1 cases"
        assert outside.settings() == mine
    finally:
        outside.put_back(before)


def test_a_default_device_that_is_put_back_leaves_nothing_for_the_compiler_to_break_at():
    before = outside.settings()
    torch.set_default_device("meta")
    outside.put_back(before)
    halves = torch.compile(lambda x: x.unflatten(-1, (2, -1)), backend="eager", fullgraph=True)
    assert halves(torch.ones(4)).shape == (2, 2)


# --- answers that do not let go ---


def endless(*arguments):
    while True:
        pass


class EndlessTextError(Exception):
    def __str__(self):
        endless()


class EndlessNumber(int):
    def __eq__(self, other):
        endless()

    __hash__ = int.__hash__


def raises(error):
    def answer(*arguments):
        raise error

    return answer


class Nameless(type):
    @property
    def __name__(cls):
        raise ValueError


def prints_for_ever(*arguments):
    while True:
        try:
            print("still here")
            sum(range(100))
        except:  # noqa: E722
            pass


def adds_for_ever(*arguments):
    while True:
        try:  # noqa: SIM105
            sum(range(1000))
        except BaseException:
            pass


@pytest.mark.parametrize(
    "answer",
    [endless, raises(EndlessTextError()), prints_for_ever, adds_for_ever],
    ids=["busy", "text", "prints", "adds"],
)
def test_an_endless_answer_ends_in_a_message_and_takes_no_time_afterwards(answer, capsys):
    begun = time.monotonic()
    said = verdict(answer, seconds=0.3)
    assert said.message.startswith("a case: stopped after 0.3 seconds")
    assert time.monotonic() - begun < 10
    used = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - used < 0.2, "something still runs"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyboardInterrupt(), "raised KeyboardInterrupt"),
        (SystemExit(3), "raised SystemExit: 3"),
        (guard.HeldError, "raised HeldError"),
        (guard.LateError(), "raised LateError"),
        (type("Quiet", (BaseException,), {"__str__": lambda self: 1})(), "raised Quiet"),
        (type("Worse", (Exception,), {"__str__": raises(KeyboardInterrupt())})(), "raised Worse"),
        (Nameless("Gone", (Exception,), {})(), "raised an error that cannot be told"),
    ],
    ids=["interrupt", "exit", "held", "late", "quiet", "worse", "nameless"],
)
def test_no_error_of_an_answer_reaches_the_notebook(error, says):
    if error is guard.HeldError:  # raised as a class it would hold its own thread
        assert "stopped after" in verdict(raises(error), seconds=0.3).message
    else:
        assert says in verdict(raises(error)).message


def test_a_result_that_never_compares_is_not_asked():
    assert verdict(lambda n: EndlessNumber(7)).message == "a case: n = 1: got 7, which is wrong"


def test_an_input_that_holds_an_object_that_raises_is_reported():
    class Raises(int):
        __eq__ = raises(KeyboardInterrupt())
        __hash__ = int.__hash__

    said = verdict(lambda n, sizes: sizes.__setitem__(0, Raises(1)), None, sizes=[1])
    assert said.message == "a case: the result cannot be compared (KeyboardInterrupt)"


def test_an_input_that_holds_an_endless_object_is_compared_inside_the_guard(monkeypatch):
    monkeypatch.setattr(checking, "OWN_SECONDS", 0.3)
    said = verdict(lambda n, sizes: sizes.__setitem__(0, EndlessNumber(1)), None, sizes=[1])
    assert said.message == "a case: the result cannot be compared in time"


def test_python_ends_well_after_an_answer_that_never_did():
    """More than once: a thread that prints while Python ends brings it down every other time."""
    script = (
        "from exercises.checking import judge\n"
        "from tests.exercises.test_hostile import verdict, prints_for_ever\n"
        "print(verdict(prints_for_ever, seconds=0.2).line()[:34])\n"
    )
    for _ in range(3):
        ran = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=release.ROOT
        )
        assert ran.returncode == 0 and ran.stderr == "", ran.stderr[-500:]
        assert ran.stdout == "✗ 02.1 0 of 1 cases: a case: stopp\n"


def test_an_answer_that_checks_itself_does_so_once(capsys):
    def answer(*sizes):
        checking.check("02.1", answer)
        return 0

    checking.check("02.1", answer)
    assert capsys.readouterr().out.startswith("✗ 02.1 2 of 6 cases: ")


def test_a_check_works_where_the_folder_is_gone(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    checking.check("02.1", lambda *sizes: None)
    assert "02.1 0 of 6 cases: " in capsys.readouterr().out


# --- an exercise in part, and the hidden tests ---


def test_an_error_in_one_branch_is_not_an_exercise_nobody_began():
    def answer(length, block_size, stride):
        if length < block_size:
            raise NotImplementedError
        return (length - block_size) // stride + 1

    verdicts = judge(checking.find("02.1"), answer)
    assert 0 < verdicts.passed < verdicts.total
    assert "raised NotImplementedError (line " in verdicts.line()


def test_the_hidden_tests_judge_whatever_check_has_become(capsys):
    checking.check = always
    with pytest.raises(AssertionError, match="○ 02.1 not attempted"):
        hidden_check("02.1", None)
    assert checking.check is exercises.check
    assert capsys.readouterr().out == "put back: exercises.checking.check was replaced\n"


# --- a real notebook ---

NOTEBOOK = {
    "from exercises import check\nimport sys, threading, torch": None,
    "def right(n, l, d):\n    return max(0, (n - l) // d + 1)": None,
    "def f(*a):\n    raise KeyboardInterrupt\ncheck('02.1', f)": "raised KeyboardInterrupt",
    "def f(*a):\n    sys.exit()\ncheck('02.1', f)": "raised SystemExit",
    "def f(*a):\n    while True:\n        try:\n            print('flood')\n"
    "        except:\n            pass\ncheck('02.1', f)": "stopped after 10 seconds",
    "class E(Exception):\n    def __str__(self): raise self\n"
    "def f(*a): raise E\ncheck('02.1', f)": "raised E (line 3",
    "def f(*a):\n    torch.set_default_dtype(torch.float64)\n    torch.set_default_device('meta')\n"
    "    return right(*a)\ncheck('02.1', f)": "✓ 02.1 6 of 6 cases (put back: torch's default "
    "dtype was changed, torch's default device was changed)",
    "torch.set_default_device('meta')\ntorch.set_default_dtype(torch.float64)\n"
    "check('02.1', right)": "✓ 02.1 6 of 6 cases",
    "check('02.2', lambda t, c, l, d: torch.zeros(t, c))": "torch.float32, and bool was asked",
    "torch.isclose = lambda *a, **k: torch.tensor(True)\ncheck('02.1', right)": "(put back: "
    "torch.isclose was replaced)",
    "print(threading.active_count() < 12, torch.ones(1).device, torch.get_default_dtype())": "True "
    "meta torch.float64",
}


def test_a_notebook_survives_them_all():
    cells = [nbformat.v4.new_code_cell(source) for source in NOTEBOOK]
    nb = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(nb, timeout=120, resources={"metadata": {"path": str(release.ROOT)}}).execute()
    for cell, says in zip(nb.cells, NOTEBOOK.values(), strict=True):
        said = "".join(output.get("text", "") for output in cell.outputs)
        assert said.count("\n") == (says is not None), (cell.source, said)
        assert (says or "") in said, cell.source


def test_no_thread_of_a_check_is_left_but_those_held():
    before = threading.active_count()
    verdict(endless, seconds=0.2)
    verdict(lambda n: 1)
    assert threading.active_count() <= before
