"""Faults that share one run of a notebook do what they would do in a run of their own."""

from nsa_lite import blocks, cost
from tests.notebooks.snapshots import LOST, NEVER, Fault, Spot, note_calls, outcomes, put

CELLS = [
    "from nsa_lite.blocks import num_compressed\nlog = ['a']",
    "count = num_compressed(16, 4, 2)\nlog.append('b')\n"
    "import tempfile, pathlib\n(pathlib.Path(tempfile.gettempdir()) / 'one').mkdir()",
    "assert count == 7 and log == ['a', 'b']",
    "log.append('c')",
    "assert num_compressed(16, 4, 2) == 7",
]  # the second fails where its folder exists
ORIGINAL = blocks.num_compressed


def rewritten(place, old, new):
    def put_in(texts, names):
        texts[place] = texts[place].replace(old, new)

    return put_in


def one_more(texts, names):
    names["num_compressed"] = lambda *sizes: 4


def nothing(texts, names):
    pass


def test_each_fault_fails_where_a_run_of_its_own_would_and_leaves_nothing_behind():
    faults = {
        "a text": Fault(1, rewritten(1, "'b'", "'d'"), 2),
        "a function": Fault(Spot(blocks, "num_compressed"), one_more, 4),
        "before its last cell": Fault(0, rewritten(0, "['a']", "[]"), 4),
        "harmless": Fault(1, nothing, 4),
        "after its last cell": Fault(3, rewritten(4, "7", "8"), 3),
        "finds its files": Fault(1, rewritten(2, "7", "8"), 2),
        "never called": Fault(Spot(blocks, "num_select_blocks"), one_more, 4),
        "the process ends": Fault(1, rewritten(1, "count", "import os; os._exit(1); count"), 2),
    }
    found = outcomes(CELLS, faults)
    assert {name: place for name, (place, _) in found.items()} == {
        "a text": 2,
        "a function": 2,
        "before its last cell": 2,
        "harmless": None,
        "after its last cell": None,
        "finds its files": 2,
        "never called": None,
        "the process ends": None,
    }
    assert found["never called"] == NEVER
    assert found["the process ends"] == LOST
    assert blocks.num_compressed is ORIGINAL


def test_a_call_is_noted_wherever_the_function_was_imported_or_kept():
    called = set()
    spot = Spot(blocks, "num_compressed")
    note_calls({spot}, called)
    try:
        kept = {"later": cost.num_compressed}  # an alias in another module, kept by one cell
        assert not called
        assert kept["later"](16, 4, 2) == 7 and called == {spot}
    finally:
        put({spot: ORIGINAL}, {})
    assert blocks.num_compressed is cost.num_compressed is ORIGINAL


def test_a_notebook_that_fails_by_itself_says_nothing_of_its_faults(capfd):
    found = outcomes(["", "1 / 0", ""], {"x": Fault(2, nothing, 2)})
    assert found == {"x": LOST}
    assert "code cell 2 failed" in capfd.readouterr().err
