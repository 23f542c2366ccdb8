"""One statement a line, in every module and every cell: nothing is packed to save lines."""

from pathlib import Path

import nbformat
import pytest

from tests.form import packed, rebound

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path
    for room in ("nsa_lite", "kernels", "exercises", "benchmarks", "notebooks", "site")
    for path in (ROOT / room).rglob("*.py")
)
NOTEBOOKS = sorted([*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("exercises/*/*.ipynb")])


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_module_packs_statements(path):
    assert packed(path.read_text("utf-8")) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_no_cell_packs_statements_or_binds_a_name_to_two_types(path):
    found = []
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == "code":
            faults = [*packed(cell.source), *rebound(cell.source)]
            found += [f"cell {number}: {fault}" for fault in faults]
    assert found == []


# --- the rules themselves ---


@pytest.mark.parametrize(
    "source",
    [
        "a, b = f(), g()",
        "counts, axes = {}, plt.subplots(3)[1]",
        "_ = plots.use_style(), torch.manual_seed(0)",
        "_ = ax.plot(x)",
        "def f():\n    a, b = [g()], 3",
    ],
)
def test_packed_statements_are_found(source):
    assert len(packed(source)) == 1


@pytest.mark.parametrize(
    "source",
    ["l, d = 4, 2", "batch, heads = q.shape[:2]", "a, b = f()", "a, b = b, a", "a = (f(), g())"],
)
def test_one_idea_is_not_packed(source):
    assert packed(source) == []


@pytest.mark.parametrize(
    "source",
    [
        "rows = []\nrows = torch.stack(rows)",
        "for t in range(3):\n    print(t)\nt = torch.arange(3)",
        "x = [1]\nx = {1: 2}",
        "x = 'a'\nx = ['a']",
    ],
)
def test_a_name_of_two_types_is_found(source):
    assert len(rebound(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "x = torch.ones(3)\nx = x + 1",
        "total = 0\ntotal = max(total, 3)",
        "def f():\n    x = []\nx = torch.ones(3)",
        "for i in range(3):\n    x = torch.ones(i)\nfor i in range(4):\n    print(i)",
    ],
)
def test_a_name_of_one_type_is_not(source):
    assert rebound(source) == []
