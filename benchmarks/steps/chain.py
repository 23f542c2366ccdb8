"""The steps by name, and what changes from one to the next."""

import difflib
import importlib
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent
FAMILIES = ("forward", "dq", "dkdv")


def names(family: str) -> list[str]:
    """The steps of one family in order, as "forward_1_pointers"."""
    return sorted(path.stem for path in FOLDER.glob(f"{family}_[0-9]_*.py"))


def with_shipped(family: str) -> list[str]:
    """names(family), and behind them "forward_shipped": the package's own kernel."""
    return [*names(family), f"{family}_shipped"]


def step(name: str) -> ModuleType:
    """A step's module; imported late, so that whoever compiles can say for what first."""
    return importlib.import_module(f"benchmarks.steps.{name}")


def family_of(name: str) -> str:
    """The family of a step."""
    return name.split("_")[0]


def title(name: str) -> str:
    """The first sentence of a step's file, as "Forward 1, pointers: notebook 10's ..."."""
    return (FOLDER / f"{name}.py").read_text("utf-8").split('"""')[1].split("\n\n")[0].strip()


def code(name: str) -> list[str]:
    """The lines of a step's kernel and of its launch, without what it imports."""
    lines = (FOLDER / f"{name}.py").read_text("utf-8").splitlines()
    return lines[lines.index("@triton.jit") :]


def difference(before: str, after: str) -> list[str]:
    """The lines that a step takes away (-) and adds (+); a line that only moved in does not count.

    Lines are compared without their indent, so that a loop around them changes one line.
    """
    old, new = ([line.strip() for line in code(name)] for name in (before, after))
    written = code(after)
    found = []
    for what, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if what != "equal":
            found += [f"- {line}" for line in code(before)[i:j]]
            found += [f"+ {line}" for line in written[k:m]]
    return found


def counted(before: str, after: str) -> tuple[int, int]:
    """How many lines a step takes away and adds."""
    lines = difference(before, after)
    return sum(line[0] == "-" for line in lines), sum(line[0] == "+" for line in lines)
