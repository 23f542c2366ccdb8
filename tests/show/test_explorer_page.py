"""The browser's side as far as Python can tell: its files, what it is sent, the second pane."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nsa_lite import NSAConfig
from nsa_lite.show.explorer import SelectionExplorer
from nsa_lite.show.explorer import script as script_module
from nsa_lite.show.explorer.arrays import pooling_of
from nsa_lite.show.explorer.script import PARTS, script
from nsa_lite.show.explorer.sequence import TracedSequence

FOLDER = Path(script_module.__file__).parent
TEXT = "def f(x):\n    return (x, x)\n" * 4


# --- the files ---


def test_every_file_is_joined_once_and_short():
    assert sorted(PARTS) == sorted(path.stem for path in (FOLDER / "js").glob("*.js"))
    for path in (FOLDER / "js").glob("*.js"):
        text = path.read_text("utf-8")
        assert script().count(text) == 1
        assert len(text.splitlines()) <= 280, path.name
        assert max(map(len, text.splitlines())) <= 110, path.name


def test_javascript_names_no_rule_of_the_paper():
    code = re.sub(r"//.*", "", script())
    sizes = r"num_?initial|num_?local|stride|\bblock_?size|num_?selected|facts\.window|kv_?heads"
    assert not re.findall(sizes, code, re.IGNORECASE)
    # Only ids are sorted, into ascending order; scores are never compared to choose a block.
    assert set(re.findall(r"\.(?:to)?[sS]ort(?:ed)?\(.*?\)(?=[.;)])", code)) <= {
        ".sort((a, b) => a - b)",
        ".sort()",
    }
    assert len(re.findall(r"\bbars\b", code)) == 1  # where the compressed blocks' bars stand
    assert len(re.findall(r"\bpooling\b", code)) == 1  # how heads share an importance
    assert not re.findall(r"/ \w*\.?size\b", code)  # a token's block is looked up


# --- what is sent ---


@pytest.mark.parametrize("sizes", [(32, 16, 64), (8, 4, 8), (4, 4, 8), (4, 1, 4), (6, 2, 8)])
def test_pooling_weighs_the_tokens_that_two_blocks_share(sizes):
    l, d, wide = sizes
    c = NSAConfig.small(block_size=l, stride=d, select_block_size=wide)
    pooling = pooling_of(c)
    for j in (3, 7):
        shared = {}
        for i in range(20 * wide):
            tokens = set(range(i * d, i * d + l)) & set(range(j * wide, (j + 1) * wide))
            if tokens:
                shared[i] = len(tokens) // d
        first = j * pooling["step"] + pooling["first"]
        sent = {first + m: weight for m, weight in enumerate(pooling["weights"])}
        assert sent == shared


def test_the_papers_weights():
    assert pooling_of(NSAConfig()) == {"first": -1, "step": 4, "weights": [1, 2, 2, 2, 1]}


def test_summarised_tokens_are_counted_one_by_one(explorer):
    s = explorer.sequence
    c = s.config
    for t in range(s.length):
        blocks = [
            range(i * c.stride, i * c.stride + c.block_size)
            for i in range(s.length)
            if i * c.stride + c.block_size - 1 <= t
        ]
        assert s.summarised(t) == len(set().union(*blocks))


def test_the_sentence_names_the_answer_and_the_checkpoint(explorer):
    s = explorer.sequence
    answers = torch.full((s.queries,), -1)
    answers[50] = 17  # in block 2
    answers[60] = 1  # in block 0, which is always selected
    layers = s.checkpoints[""]
    told = SelectionExplorer(TracedSequence({"step 0": layers, "step 9": layers}, TEXT, answers))
    plain = explorer.describe(50)
    found = "selected" if 2 in explorer.selected(50) else "not selected"
    assert told.describe(50) == f"{plain}; answer in block 2: {found}; checkpoint step 9"
    assert told.describe(60).endswith("; answer in block 0: selected; checkpoint step 9")
    told.checkpoint = 0
    assert told.describe(51) == f"{explorer.describe(51)}; checkpoint step 0"


# --- a second pane ---


def test_two_panes_are_compared(explorer):
    assert explorer.beside is None
    with pytest.raises(ValueError, match="beside = None: names no second pane to compare"):
        explorer.difference()
    explorer.layer = 0
    explorer.beside = {"checkpoint": 0, "layer": 1, "group": 1}
    layers = explorer.sequence.checkpoints[""]
    for t in (20, 77, 111):
        here = {j for j in layers[0].ids[0, 0, t].tolist() if j >= 0}
        there = {j for j in layers[1].ids[0, 1, t].tolist() if j >= 0}

        def ids(blocks: set[int]) -> str:
            return " ".join(map(str, sorted(blocks))) or "none"

        assert explorer.difference(t) == (
            f"query {t}: {len(here & there)} blocks in both ({ids(here & there)}), only in the "
            f"first {ids(here - there)}, only beside {ids(there - here)}"
        )
    explorer.beside = None


@pytest.mark.parametrize(
    ("beside", "error", "message"),
    [
        ({"checkpoint": 0}, ValueError, "beside = .*must be None or hold"),
        (
            {"checkpoint": 0, "layer": 2, "group": 0},
            ValueError,
            r"layer'\] = 2: must lie in 0 .. 1",
        ),
        ({"checkpoint": 0, "layer": 0, "group": "1"}, TypeError, r"group'\] = '1': must be an int"),
        ({"checkpoint": -1, "layer": 0, "group": 0}, ValueError, r"checkpoint'\] = -1: must be"),
    ],
)
def test_a_second_pane_out_of_range_is_refused(explorer, beside, error, message):
    with pytest.raises(error, match=message):
        explorer.beside = beside
    assert explorer.beside is None


def test_the_page_begins_with_what_is_shown(explorer, tmp_path):
    explorer.query = 40
    explorer.beside = {"checkpoint": 0, "layer": 1, "group": 1}
    page = explorer.save_html(tmp_path / "page.html").read_text("utf-8")
    state = re.search(r'id="state">(.*?)</script>', page)[1]
    assert '"query":40' in state and '"beside":{"checkpoint":0,"layer":1,"group":1}' in state


def test_a_page_keeps_to_its_policy(explorer, tmp_path):
    page = explorer.save_html(tmp_path / "page.html").read_text("utf-8")
    policy = re.search(r'Content-Security-Policy"\s+content="(.*?)"', page)[1]
    assert policy.startswith("default-src 'none'; ") and "http" not in policy
    assert "connect-src" not in policy and "blob:" not in policy
    assert not re.search(r"\beval\(|new Function|\.innerHTML = [^LP]", script())


def test_a_trace_without_keys_says_nothing_of_what_is_missed(explorer):
    bare = [replace(trace, q=None, k=None) for trace in explorer.sequence.checkpoints[""]]
    e = SelectionExplorer(bare, TEXT)
    assert "beyond" not in e.facts["arrays"] and "beyond" in explorer.facts["arrays"]
