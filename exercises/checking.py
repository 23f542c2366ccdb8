"""check prints one line about an answer and never raises in a lesson; hint prints one hint.

With NSA_LITE_STRICT=1 in the environment check raises unless the answer is right, so that the
same line serves a lesson, CI and grading.
"""

import copy
import os
import time
import traceback
from dataclasses import dataclass

import torch

from exercises import compare, guard
from exercises.records import FOLDER, Case, Exercise, find

LONGEST = 200  # letters of a message: it stays one line
OURS = tuple(str(FOLDER.parent / name) for name in ("exercises", "nsa_lite", "kernels"))


@dataclass(frozen=True)
class _Fault:
    """What one case found; named if it says which mistake that is."""

    text: str
    named: bool


@dataclass(frozen=True)
class Verdict:
    """How many of an exercise's cases an answer passed, and what the others say is wrong."""

    number: str
    passed: int
    total: int
    message: str = ""
    attempted: bool = True

    @property
    def right(self) -> bool:
        return self.attempted and self.passed == self.total > 0

    def line(self) -> str:
        """One of the three lines that check prints."""
        if not self.attempted:
            return f"○ {self.number} not attempted"
        if self.right:
            return f"✓ {self.number} {self.passed} of {self.total} cases"
        return f"✗ {self.number} {self.passed} of {self.total} cases: {self.message}"


def check(number: str, answer: object = None, *, seed: int = 0, strict: bool | None = None) -> None:
    """Print one line: not attempted, how many cases are right and what is wrong, or all right.

    The answer gets copies of its inputs, and what it prints is dropped: call it yourself to see.
    seed changes the numbers in the inputs. strict=None takes NSA_LITE_STRICT.
    Errors: AssertionError with the same line, when strict and the answer is not right.
    """
    try:
        verdict = judge(find(number), answer, seed)
    except (LookupError, ImportError) as error:  # no such exercise; no triton, say
        verdict = Verdict(number, 0, 0, _one_line(str(error)))
    if strict is None:
        strict = os.environ.get("NSA_LITE_STRICT", "") not in ("", "0")
    if strict and not verdict.right:
        raise AssertionError(verdict.line())
    print(verdict.line())


def hint(number: str, which: int = 1) -> None:
    """Print hint 1 (a question), 2 (a formula) or 3 (a sketch of the code)."""
    try:
        hints = find(number).hints
    except (LookupError, ImportError) as error:
        print(error)
        return
    if which not in (1, 2, 3):
        print(f"{number} has hints 1, 2 and 3, not {which!r}")
        return
    print(f"hint {which} of 3 for {number}:\n{hints[which - 1]}")


def judge(exercise: Exercise, answer: object, seed: int = 0) -> Verdict:
    """Run every case; the message is the first one that can name the mistake."""
    with torch.inference_mode(False), torch.enable_grad():  # whatever the notebook has set
        cases = exercise.cases(torch.Generator().manual_seed(seed))
    if answer is None or answer is ...:
        return Verdict(exercise.number, 0, len(cases), attempted=False)
    if not callable(answer):
        said = f"check wants your function itself, and got {compare.a(answer)}"
        return Verdict(exercise.number, 0, len(cases), said)
    end = time.monotonic() + exercise.seconds
    passed = 0
    faults = []
    for case in cases:
        try:
            fault = _fault(answer, case, end - time.monotonic(), exercise.seconds)
        except NotImplementedError:
            return Verdict(exercise.number, 0, len(cases), attempted=False)
        passed += fault is None
        faults += [fault] if fault else []
        if time.monotonic() > end:
            break
    shown = next((f for f in faults if f.named), faults[0] if faults else None)
    return Verdict(exercise.number, passed, len(cases), _one_line(shown.text) if shown else "")


def _fault(answer, case: Case, seconds: float, limit: float) -> _Fault | None:
    """What is wrong with an answer in one case, or None. Errors: the stub's NotImplementedError."""
    given = copy.deepcopy(case.arguments)
    call = case.call or (lambda answer, *arguments: answer(*arguments))
    try:
        got = guard.run(lambda: call(answer, *given.values()), seconds)
    except guard.LateError:
        text = f"stopped after {limit:g} seconds: does a loop never end, or do too much?"
        named = True
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or _is_the_stubs(error):
            raise
        text = _raised(error)
        named = True
    else:
        text, named = _wrong(case, got, given)
    return _Fault(f"{case.name}: {text}", named) if text else None


def _wrong(case: Case, got: object, given: dict[str, object]) -> tuple[str | None, bool]:
    """What is wrong with a result, if anything, and whether that names the mistake.

    given are the inputs that the answer got, as they are after the call.
    """
    for name, value in case.arguments.items():
        if not compare.same(given[name], value):
            return f"the function changed its input {name} in place; work on a copy", True
    try:
        if said := compare.form(got, case.expected):
            return said, True
        said = compare.wrong_value(got, case.expected, case.axes)
    except Exception as error:  # a sparse tensor, an object that refuses to be compared
        return f"the result cannot be compared ({type(error).__name__})", True
    explained = _explained(case, got) if said else None
    return explained or (said and _with_numbers(case, said)), bool(explained)


def _explained(case: Case, got: object) -> str | None:
    """The case's own words for a wrong value, where it has any."""
    try:
        return case.explain and case.explain(got, case.expected, **case.arguments)
    except Exception:  # it met a value that its author did not think of
        return None


def _with_numbers(case: Case, said: str) -> str:
    """The message with the arguments before it, where all of them are plain numbers."""
    if not all(isinstance(x, int | float) for x in case.arguments.values()):
        return said
    return f"{', '.join(f'{name} = {x}' for name, x in case.arguments.items())}: {said}"


def _is_the_stubs(error: BaseException) -> bool:
    """Whether the stub raised it; PyTorch raises the same kind of error, with a text."""
    return isinstance(error, NotImplementedError) and not error.args


def _raised(error: BaseException) -> str:
    """ "ValueError: text (line 3: the learner's line)"."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if f.line and not f.filename.startswith(OURS) and "site-packages" not in f.filename
    ]
    try:
        text = f": {error}" if str(error) else ""
    except Exception:  # an error whose text is an error
        text = ""
    where = f" (line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
    return f"the function raised {type(error).__name__}{text}{where}"


def _one_line(text: str) -> str:
    """The text without line breaks, and no longer than a message may be."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
