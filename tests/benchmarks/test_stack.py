"""The benchmark of a stack: its weights by hand, its record on a CPU, and what is told of both."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import records, stack
from benchmarks.cases import CONFIGS, Sizes

ROOT = Path(__file__).parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


def linear(rows: int, columns: int, bias: bool = True) -> int:
    return rows * columns + columns * bias


def weights(name: str, c: Sizes) -> int:
    """All weights of a stack, each matrix with its rows and columns."""
    query = linear(c.dim, c.heads * c.width, bias=False)
    key_and_value = linear(c.dim, c.groups * (c.width + c.value), bias=False)
    output = linear(c.heads * c.value, c.dim, bias=False)
    attention = query + key_and_value + output
    if name == "NSA":
        attention += 2 * key_and_value  # three branches, each with its own
        gate = linear(c.dim, c.dim // 2) + linear(c.dim // 2, 3 * c.heads)
        attention += gate + phi(c.block_size, c.width) + phi(c.block_size, c.value)
    mlp = linear(c.dim, 4 * c.dim) + linear(4 * c.dim, c.dim)
    block = attention + mlp + 2 * c.dim  # and two norms
    return 10 * block + 2 * 256 * c.dim + c.dim  # 256 symbols in and out, the last norm


def phi(block_size: int, width: int) -> int:
    hidden = 2 * width
    return block_size * width + linear(block_size * width, hidden) + linear(hidden, width)


def test_the_mlp_of_config_a_by_hand():
    assert linear(2560, 10240) + linear(10240, 2560) == 52_441_600
    assert phi(32, 128) == 4096 + 1_048_832 + 32_896


@NO_GPU
def test_on_a_cpu_both_rows_are_timed_and_their_weights_counted(tmp_path, capsys):
    path = tmp_path / "stack.json"
    assert stack.main(["--config", "tiny", "--length", "64", "--out", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["command"] == "python -m benchmarks.stack --config tiny --length 64"
    assert [row["name"] for row in record["rows"]] == ["NSA", "dense, cuDNN"]
    for row in record["rows"]:
        assert (row["config"], row["length"], row["layers"]) == ("tiny", 64, 10)
        assert row["weights"] == weights(row["name"], CONFIGS["tiny"])
        assert row["step_ms"] > 0
        assert row["tokens_a_second"] == pytest.approx(64_000 / row["step_ms"])
    assert len(capsys.readouterr().out.splitlines()) == 2


@NO_GPU
@pytest.mark.parametrize("name", stack.ATTENTIONS)
def test_a_step_trains_every_weight(name, monkeypatch):
    made = []
    of = stack.DecoderLM
    monkeypatch.setattr(stack, "DecoderLM", lambda *given: made.append(of(*given)) or made[-1])
    step, count = stack.step_of(name, "tiny", 64, "cpu")
    (model,) = made
    before = {key: weight.clone() for key, weight in model.named_parameters()}
    step()
    for key, weight in model.named_parameters():
        assert weight.grad.abs().sum() > 0, key
        assert not torch.equal(weight, before[key]), key
    assert count == sum(weight.numel() for weight in before.values())


@NO_GPU
def test_without_a_gpu_only_the_tiny_stack_runs(tmp_path, capsys):
    assert stack.main(["--config", "A", "--out", str(tmp_path / "stack.json")]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("error: no CUDA device") and not said.out
    assert not list(tmp_path.iterdir())


def test_a_refusal_is_a_row_and_the_others_still_run(monkeypatch):
    def broken(_config):
        raise NotImplementedError("not here\nand more")

    monkeypatch.setitem(stack.ATTENTIONS, "NSA", broken)
    refused, timed = stack.rows("tiny", 32, "cpu")
    assert refused["refused"] == "NotImplementedError: not here" and "step_ms" not in refused
    assert stack.show(refused) == "NSA: NotImplementedError: not here"
    assert timed["name"] == "dense, cuDNN" and timed["step_ms"] > 0


# --- what was recorded, and what is told of it ---


def recorded(config: str = "A") -> dict[str, dict]:
    rows = records.load("stack")["rows"]
    return {row["name"]: row for row in rows if row["config"] == config}


@pytest.mark.parametrize("config", ["A", "paper"])
def test_the_recorded_stacks_have_the_weights_of_their_config(config):
    rows = recorded(config)
    assert set(rows) == {"NSA", "dense, cuDNN"}
    for name, row in rows.items():
        assert (row["length"], row["layers"]) == (65_536, 10)
        assert row["weights"] == weights(name, CONFIGS[config])


def text_of(page: str) -> str:
    return " ".join((ROOT / page).read_text("utf-8").split())


@pytest.mark.parametrize("config", ["A", "paper"])
def test_the_notes_give_the_recorded_stacks(config):
    notes, rows = text_of("benchmarks/NOTES.md"), recorded(config)
    for name, row in rows.items():
        columns = (
            f"{row['weights'] / 1e9:.2f} billion",
            f"{row['step_ms']:.0f}",
            f"{row['tokens_a_second']:.0f}",
            f"{row['peak_gib']:.1f}",
        )
        assert f"| {config} | {name} | {' | '.join(columns)} |" in notes
    ours, dense = rows["NSA"], rows["dense, cuDNN"]
    assert f"{dense['step_ms'] / ours['step_ms']:.2f} times" in notes


def test_the_notes_say_what_more_memory_the_weights_take():
    notes, rows = text_of("benchmarks/NOTES.md"), recorded()
    ours, dense = rows["NSA"], rows["dense, cuDNN"]
    more = ours["peak_gib"] - dense["peak_gib"]
    held = 16 * (ours["weights"] - dense["weights"]) / 2**30  # a weight, its gradient, two moments
    assert f"{more:.1f} GiB more" in notes and f"is {held:.1f} of that" in notes


def test_the_notes_compare_the_stacks_with_ten_layers():
    """Both with their forward twice; NSA also as it was timed, checkpointed."""
    notes, rows = text_of("benchmarks/NOTES.md"), recorded()
    layers = {r["name"]: r for r in records.load("layer")["rows"] if r["length"] == 65_536}
    timed = layers["NSA checkpointed"]
    timed = 10 * (timed["forward_ms"] + timed["backward_ms"])
    ours, dense = (
        10 * (2 * layers[name]["forward_ms"] + layers[name]["backward_ms"])
        for name in ("NSA", "cuDNN")
    )
    assert (
        f"{ours:.0f} and {dense:.0f} (NSA checkpointed as one layer, timed: {timed:.0f})" in notes
    )
    step = rows["NSA"]["step_ms"]
    left_dense = rows["dense, cuDNN"]["step_ms"] - dense
    assert f"{step - ours:.0f} to {step - timed:.0f} and {left_dense:.0f}" in notes
    products = 10 * 4 * 2 * 65_536 * 2 * 2560 * 10_240  # of the MLPs: forward twice, backward
    assert f"{products / 1e12:.0f} TFLOP" in notes


def test_the_readme_gives_the_recorded_stacks():
    readme, rows = text_of("README.md"), recorded()
    ours, dense = rows["NSA"], rows["dense, cuDNN"]
    assert f"{ours['weights'] / 1e9:.2f} billion weights" in readme
    assert f"{ours['step_ms'] / 1e3:.1f} s and {ours['peak_gib']:.1f} GiB" in readme
    assert f"{dense['step_ms'] / 1e3:.1f} s and {dense['peak_gib']:.1f} GiB" in readme
    assert f"{dense['step_ms'] / ours['step_ms']:.2f} times as long" in readme
    ours, dense = recorded("paper")["NSA"], recorded("paper")["dense, cuDNN"]
    ratio = f"{dense['step_ms'] / ours['step_ms']:.2f}"
    assert f"and {ratio} times with the paper's widths" in readme


def test_another_configs_rows_stay(tmp_path):
    path = tmp_path / "stack.json"
    for length in ("64", "128", "64"):
        assert stack.main(["--config", "tiny", "--length", length, "--out", str(path)]) == 0
    assert [row["length"] for row in json.loads(path.read_text())["rows"]] == [128, 128, 64, 64]
