"""Run one notebook that was handed in, in a kernel of its own, and read its points."""

import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode

from exercises import release
from exercises.handed_in import HandedIn, NotGradedError, exercise_of, grade_id, handed_in

CELL_SECONDS = 60  # then a cell is interrupted
NOTEBOOK_SECONDS = 300  # then the kernel is killed
OUTPUTS = 20  # of a cell that are kept, so that a flood fits into memory
MOST = 20  # other files of a student's
LARGEST = 5 * 2**20  # bytes of one
OURS = ("exercises", "nsa_lite", "kernels", "benchmarks")  # nobody brings their own


@dataclass(frozen=True)
class Grade:
    """The points of a notebook by exercise, what each failed check said, and what is odd.

    failed says why there are no points at all.
    """

    number: str = ""
    points: dict[str, int] = field(default_factory=dict)
    says: dict[str, str] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)
    failed: str = ""


class Client(NotebookClient):
    """Runs a notebook and keeps what its cells say, though not all of a flood, and no pictures."""

    def __init__(self, nb: NotebookNode, folder: Path) -> None:
        super().__init__(
            nb,
            kernel_name="python3",  # the student's may be called otherwise
            extra_arguments=["--log-level=ERROR"],
            timeout=CELL_SECONDS,
            interrupt_on_timeout=True,
            allow_errors=True,
            record_timing=False,
            resources={"metadata": {"path": str(folder)}},
        )
        self.now = 0  # the cell that runs
        self.on_cell_execute = self._note

    def _note(self, cell: NotebookNode, cell_index: int) -> None:
        self.now = cell_index

    def output(self, outs, msg, display_id, cell_index):
        kind = msg["msg_type"]
        if kind == "error" or (kind == "stream" and len(outs) < OUTPUTS):
            return super().output(outs, msg, display_id, cell_index)
        return None

    def kill(self) -> None:
        """End the kernel at once, from any thread."""
        if self.km is not None and self.km.has_kernel:
            self.km.provisioner.process.kill()


def grade(path: Path) -> Grade:
    """The grade of a notebook; whatever is wrong with it, nothing is raised: a class is waiting."""
    try:
        found = handed_in(path)
        with folder_of(path) as folder:
            failed = run(found.nb, folder)
    except NotGradedError as error:
        return Grade(failed=_one_line(str(error)))
    except Exception as error:
        return Grade(failed=_one_line(f"{type(error).__name__}: {error}"))
    return Grade(found.number, odd=found.odd, failed=failed) if failed else read_grade(found)


def run(nb: NotebookNode, folder: Path) -> str:
    """Run the cells in a new kernel; what they said stands in them. Why that failed, or ""."""
    client = Client(nb, folder)
    alarm = threading.Timer(NOTEBOOK_SECONDS, client.kill)
    alarm.start()
    ours = {"PYTHONPATH": str(release.ROOT), "NSA_LITE_STRICT": "0", "OMP_NUM_THREADS": "1"}
    try:
        client.execute(env={**os.environ, **ours})
    except DeadKernelError:
        late = (
            f"was stopped after {NOTEBOOK_SECONDS} seconds" if alarm.finished.is_set() else "died"
        )
        source = nb.cells[client.now].source
        return _one_line(f"the kernel {late} in cell {client.now + 1}: {source}")
    except Exception as error:
        return _one_line(f"{type(error).__name__}: {error}")
    finally:
        alarm.cancel()
    return ""


@contextmanager
def folder_of(path: Path) -> Iterator[Path]:
    """A folder with copies of what lies beside the notebook: what it writes there harms nobody."""
    with tempfile.TemporaryDirectory() as name:
        for file in companions(path):
            shutil.copy(file, name)
        yield Path(name)


def companions(path: Path) -> list[Path]:
    """A student's other files: those beside a notebook that has its folder for itself.

    Nothing hidden, large or named like ours, and nothing at all from a folder full of files.
    """
    beside = [f for f in sorted(path.parent.iterdir()) if f.is_file() and f != path]
    if len(beside) > MOST or any(f.suffix == ".ipynb" for f in beside):
        return []
    small = [f for f in beside if f.stat().st_size <= LARGEST]
    return [f for f in small if f.name[0] != "." and f.stem not in OURS]


def read_grade(found: HandedIn) -> Grade:
    """The points that a notebook's checks gave, when it has run."""
    points = {}
    says = {}
    odd = list(found.odd)
    for n, cell in enumerate(found.nb.cells, 1):
        fault = _fault(cell)
        if grade_id(cell).startswith("check-"):
            name = exercise_of(cell)
            points[name] = 0 if fault else cell.metadata["nbgrader"]["points"]
            says[name] = fault
            odd += [f"{name}: {line}" for line in _odd_lines(cell, name, fault)]
        elif fault:
            odd.append(f"cell {n} {fault}")
    return Grade(found.number, points, says, odd)


def _fault(cell: NotebookNode) -> str:
    """Why a cell did not come to its end: the line of a check, or the error; "" if it did."""
    if cell.cell_type != "code" or not cell.source.strip():
        return ""
    errors = [output for output in cell.outputs if output.output_type == "error"]
    if not errors:
        return "" if cell.execution_count else "did not run"
    name, text = errors[0].ename, errors[0].evalue
    return _one_line(text if name == "AssertionError" and text else f"raised {name}: {text}")


def _odd_lines(cell: NotebookNode, exercise: str, fault: str) -> list[str]:
    """What a check had to put back before it could judge, and whether it spoke at all."""
    said = "".join(output.get("text", "") for output in cell.outputs).splitlines()
    spoken = [line for line in said if re.match(f"[○✗✓] {exercise} ", line)]
    lines = [line for line in said if "put back: " in line]
    due = 1 if fault else 2  # check's line; and the hidden test's, unless that raised it
    if len(spoken) < due and not fault.startswith(("raised", "did not run")):
        lines.append("`check` said nothing: the notebook has a check of its own")
    return lines


def _one_line(text: str) -> str:
    """The text on one line, and not for ever."""
    text = " ".join(text.split())
    return text if len(text) <= 240 else f"{text[:237]}..."
