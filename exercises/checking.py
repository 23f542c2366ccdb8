"""check prints one line about an answer and never raises in a lesson; hint prints one hint.

With NSA_LITE_STRICT=1 in the environment check raises unless the answer is right, so that the
same line serves a lesson, CI and grading.
"""

import copy
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from exercises import compare, course, guard, outside
from exercises.bare import bare
from exercises.records import FOLDER, Case, Exercise, find

LONGEST = 200  # letters of a message: it stays one line
MOST = 3  # things put back that a line names
OURS = tuple(str(FOLDER.parent / name) for name in ("exercises", "nsa_lite", "kernels"))
OWN_SECONDS = 60.0  # for what is ours: making cases, comparing, finding the words


@dataclass(frozen=True)
class _Told:
    """What an answer gave in one case, in plain values, and its inputs as they are afterwards."""

    given: dict[str, object]
    got: object = None
    raised: str = ""  # the text of an error
    stub: bool = False  # the error is that of an exercise nobody has begun


@dataclass(frozen=True)
class _Fault:
    """What one case found; named if it says which mistake that is."""

    text: str
    named: bool
    stub: bool = False


@dataclass(frozen=True)
class Verdict:
    """How many of an exercise's cases an answer passed, and what the others say is wrong.

    put_back is what was found changed outside of the answer, and is as it was.
    """

    number: str
    passed: int
    total: int
    message: str = ""
    attempted: bool = True
    put_back: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        return self.attempted and self.passed == self.total > 0

    def line(self) -> str:
        """One of the three lines that check prints."""
        return f"{self._line()}{self._also()}"

    def _line(self) -> str:
        if not self.attempted:
            return f"○ {self.number} not attempted"
        if self.right:
            return f"✓ {self.number} {self.passed} of {self.total} cases"
        return f"✗ {self.number} {self.passed} of {self.total} cases: {self.message}"

    def _also(self) -> str:
        """ " (put back: torch.isclose was replaced)"."""
        more = len(self.put_back) - MOST
        named = [*self.put_back[:MOST], *([f"{more} more"] if more > 0 else [])]
        return f" (put back: {', '.join(named)})" if named else ""


def check(number: str, answer: object = None, *, seed: int = 0, strict: bool | None = None) -> None:
    """Print one line: not attempted, how many cases are right and what is wrong, or all right.

    The answer gets copies of its inputs, and what it prints is dropped: call it yourself to see.
    seed changes the numbers in the inputs. strict=None takes NSA_LITE_STRICT.
    Errors: AssertionError with the same line, when strict and the answer is not right.
    """
    if guard.is_inside():
        return  # an answer that checks itself would do so for ever
    if strict is None:
        strict = os.environ.get("NSA_LITE_STRICT", "") not in ("", "0")
    try:
        with outside.as_at_the_start() as changed:
            verdict = judge(_find(number), answer, seed)
        verdict = replace(verdict, put_back=(*changed, *verdict.put_back))
    except (LookupError, ImportError, guard.LateError) as error:  # no such exercise; no triton, say
        verdict = Verdict(number, 0, 0, _one_line(str(error)))
    if strict and not verdict.right:
        raise AssertionError(verdict.line())
    print(verdict.line())
    if verdict.attempted and verdict.total:
        course.checked(number, answer, verdict.right)


def _find(number: str) -> Exercise:
    """The exercise; its set is imported as in a new kernel, whatever the notebook has set."""
    exercise = guard.run(lambda: find(number), OWN_SECONDS)
    outside.keep_ours()  # the set's own modules
    return exercise


def hint(number: str, which: int = 1) -> None:
    """Print hint 1 (a question), 2 (a formula) or 3 (a sketch of the code)."""
    try:
        with outside.as_at_the_start():
            hints = _find(number).hints
    except (LookupError, ImportError) as error:
        print(error)
        return
    if which not in (1, 2, 3):
        print(f"{number} has hints 1, 2 and 3, not {which!r}")
        return
    print(f"hint {which} of 3 for {number}:\n{hints[which - 1]}")


def judge(exercise: Exercise, answer: object, seed: int = 0) -> Verdict:
    """Run every case; the message is the first one that can name the mistake."""
    with outside.as_at_the_start() as changed:
        cases = guard.run(lambda: exercise.cases(torch.Generator().manual_seed(seed)), OWN_SECONDS)
        verdict = _verdict(exercise, answer, cases, changed)
    return replace(verdict, put_back=tuple(dict.fromkeys(changed)))


def _verdict(exercise: Exercise, answer: object, cases: list[Case], changed: list[str]) -> Verdict:
    """The verdict on these cases; what an answer changed outside of itself is added to changed."""
    if answer is None or answer is ...:
        return Verdict(exercise.number, 0, len(cases), attempted=False)
    if not callable(answer):
        said = f"check wants your function itself, and got {compare.a(answer)}"
        return Verdict(exercise.number, 0, len(cases), said)
    end = time.monotonic() + exercise.seconds
    found = []
    for case in cases:
        told_already = any(fault and fault.named for fault in found)
        left = end - time.monotonic()
        found.append(_fault(answer, case, left, exercise.seconds, changed, told_already))
        if time.monotonic() > end:
            break
    faults = [fault for fault in found if fault]
    if len(faults) == len(cases) and all(fault.stub for fault in faults):
        return Verdict(exercise.number, 0, len(cases), attempted=False)
    shown = next((f for f in faults if f.named), faults[0] if faults else None)
    message = _one_line(shown.text) if shown else ""
    return Verdict(exercise.number, len(found) - len(faults), len(cases), message)


def _fault(  # noqa: PLR0913  a case, its time, and what is known from the cases before
    answer: Callable,
    case: Case,
    seconds: float,
    limit: float,
    changed: list[str],
    told_already: bool,
) -> _Fault | None:
    """What is wrong with an answer in one case, or None; told_already: another names the mistake.

    Nothing of the answer's is touched outside of the guard: not its result, nor its error's text.
    """
    try:
        told = guard.run(lambda: _told(answer, case, changed), seconds)
    except guard.LateError:
        text = f"stopped after {limit:g} seconds: does a loop never end, or do too much?"
        return _Fault(f"{case.name}: {text}", named=True)
    except Exception:  # an error whose type has no name, say
        return _Fault(f"{case.name}: the function raised an error that cannot be told", named=True)
    try:
        text, named = guard.run(lambda: _wrong(case, told, told_already), OWN_SECONDS)
    except guard.LateError:
        text, named = "the result cannot be compared in time", True
    return _Fault(f"{case.name}: {text}", named, told.stub) if text else None


def _told(answer: Callable, case: Case, changed: list[str]) -> _Told:
    """Call the answer with copies of the inputs, and put back what it changes outside of itself."""
    given = copy.deepcopy(case.arguments)
    call = case.call or (lambda answer, *arguments: answer(*arguments))
    before = outside.settings()
    try:
        return _Told(given, got=bare(call(answer, *given.values())))
    except BaseException as error:  # KeyboardInterrupt too: the learner's own comes elsewhere
        return _Told(given, raised=_raised(error), stub=_is_the_stubs(error))
    finally:
        changed += outside.put_back(before)


def _wrong(case: Case, told: _Told, told_already: bool) -> tuple[str | None, bool]:
    """What is wrong in a case, if anything, and whether that names the mistake.

    To name it the case may run every known mistake: once is enough.
    """
    if told.raised:
        return told.raised, True
    try:
        for name, value in case.arguments.items():
            if not compare.same(told.given[name], value):
                return f"the function changed its input {name} in place; work on a copy", True
        if said := compare.form(told.got, case.expected):
            return said, True
        said = compare.wrong_value(told.got, case.expected, case.axes)
    except BaseException as error:  # a sparse tensor, or what the answer put into its inputs
        return f"the result cannot be compared ({type(error).__name__})", True
    explained = _explained(case, told.got) if said and not told_already else None
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
    except BaseException:  # an error whose text is an error
        text = ""
    where = f" (line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
    return f"the function raised {type(error).__name__}{text}{where}"


def _one_line(text: str) -> str:
    """The text without line breaks, and no longer than a message may be."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
