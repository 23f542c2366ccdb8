"""The layer's benchmark: every variant is the layer that it says, and every refusal is a row."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks import draw, layer
from benchmarks.cases import CONFIGS
from nsa_lite import DenseAttention, NSAttention

ON_A_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


def test_the_layer_is_the_papers_with_values_as_wide_as_keys():
    config = CONFIGS["A"].layer()
    assert (config.dim, config.heads, config.kv_heads) == (2560, 64, 4)
    assert (config.head_dim, config.value_dim, config.window) == (128, 128, 512)
    assert (config.block_size, config.stride) == (32, 16)
    assert (config.select_block_size, config.num_selected) == (64, 16)
    assert CONFIGS["paper"].layer().head_dim == 192


def test_every_variant_has_what_the_comparison_needs():
    kinds = {variant.layer for variant in layer.VARIANTS.values()}
    assert kinds == {NSAttention, DenseAttention}
    held = {v.held_to for v in layer.VARIANTS.values() if v.layer is DenseAttention}
    assert held == {SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION}
    ways = {(v.layer, v.held_to, v.called) for v in layer.VARIANTS.values()}
    assert len(ways) == len(layer.VARIANTS) == 7


@ON_A_CPU
def test_a_record_has_the_form_of_the_benchmarks(tmp_path, capsys, monkeypatch):
    path = tmp_path / "layer.json"
    monkeypatch.setitem(layer.VARIANTS, "dense", layer.Variant(DenseAttention, layer.eager))
    words = ["--config", "tiny", "--name", "NSA", "--name", "NSA checkpointed", "--name", "dense"]
    assert layer.main([*words, "--out", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["command"].startswith("python -m benchmarks.layer --config tiny --name NSA")
    assert str(path) not in record["command"]
    assert [row["name"] for row in record["rows"]] == ["NSA", "NSA checkpointed", "dense"]
    for row in record["rows"]:
        assert (row["config"], row["length"]) == ("tiny", 64)
        assert row["forward_ms"] > 0 and row["backward_ms"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    first, *lines = draw.layer_table(record).splitlines()
    assert "cpu, interpreted" in first and [line[:5].strip() for line in lines] == [
        "NSA",
        "NSA c",
        "dense",
    ]


@ON_A_CPU
def test_without_a_device_only_the_tiny_layer_runs(tmp_path, capsys):
    assert layer.main(["--out", str(tmp_path / "layer.json")]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


def broken(config):
    raise NotImplementedError("not here\nand more")


def test_a_refusal_is_a_row_and_the_others_still_run(monkeypatch):
    variants = {"broken": layer.Variant(broken, layer.eager), "NSA": layer.VARIANTS["NSA"]}
    monkeypatch.setattr(layer, "VARIANTS", variants)
    refused, timed = layer.rows("tiny", 32, ["broken", "NSA"], "cpu")
    assert refused["refused"] == "NotImplementedError: not here" and "forward_ms" not in refused
    assert timed["name"] == "NSA" and timed["forward_ms"] > 0


def test_what_is_left_out_at_a_length_is_not_run(monkeypatch):
    monkeypatch.setattr(layer, "LEFT_OUT", {32: ("cuDNN",)})
    names = ["NSA", "cuDNN"]
    assert [row["name"] for row in layer.rows("tiny", 32, names, "cpu")] == ["NSA"]
    assert [row["name"] for row in layer.rows("tiny", 48, names, "cpu")] == names


# --- the variants ---


def gradients(name):
    case = layer.case_of(name, CONFIGS["tiny"], 40, "cpu")
    layer.step(case)
    return [leaf.grad for leaf in case.leaves]


def test_checkpointing_gives_the_same_gradients():
    for kept, made_anew in zip(gradients("NSA"), gradients("NSA checkpointed"), strict=True):
        assert torch.equal(kept, made_anew)


def test_a_step_starts_with_no_gradients():
    case = layer.case_of("NSA", CONFIGS["tiny"], 40, "cpu")
    layer.step(case)
    once = [leaf.grad for leaf in case.leaves]
    layer.step(case)
    for first, leaf in zip(once, case.leaves, strict=True):
        assert torch.equal(first, leaf.grad) and first.abs().sum() > 0


@pytest.mark.parametrize(
    ("held_to", "flash", "cudnn"),
    [
        (SDPBackend.FLASH_ATTENTION, True, False),
        (SDPBackend.CUDNN_ATTENTION, False, True),
        (None, True, True),
    ],
)
def test_a_dense_layer_is_held_to_one_attention(monkeypatch, held_to, flash, cudnn):
    seen = []

    def called(_dense):
        def run(x):
            flags = torch.backends.cuda
            seen.append((flags.flash_sdp_enabled(), flags.cudnn_sdp_enabled()))
            return x + 0  # on a CPU no attention of cuDNN would run

        return run

    variant = layer.Variant(DenseAttention, called, held_to)
    monkeypatch.setattr(layer, "VARIANTS", {"dense": variant})
    layer.step(layer.case_of("dense", CONFIGS["tiny"], 16, "cpu"))
    assert seen == [(flash, cudnn)]


def test_a_compiled_layer_goes_through_the_compiler(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    layer.case_of("NSA compiled", CONFIGS["tiny"], 16, "cpu")
    layer.case_of("cuDNN compiled", CONFIGS["tiny"], 16, "cpu")
    assert [type(module) for module in compiled] == [NSAttention, DenseAttention]


# --- where the time goes ---


def test_the_profile_adds_up():
    kernels = [layer.Spent("b" * 200, 2, 6.0), layer.Spent("a", 1, 2.0)]
    head, whole, first, second = layer.spent_table("forward", kernels).splitlines()
    assert head.split() == ["calls", "ms", "%"]
    assert whole.split() == ["forward,", "in", "all", "3", "8.000", "100.0"]
    assert first.split() == ["b" * layer.NAME_WIDTH, "2", "6.000", "75.0"]
    assert second.split() == ["a", "1", "2.000", "25.0"]


@ON_A_CPU
def test_the_profile_tells_the_forward_from_the_backward(capsys):
    assert layer.main(["--config", "tiny", "--profile"]) == 0
    text = capsys.readouterr().out
    forward, backward = text.split("backward, in all")
    assert "forward, in all" in forward and "NSA, config tiny, 64 tokens" in forward
    assert "aten::softmax" not in backward and "_backward" in backward
    times = [float(line.split()[-2]) for line in forward.splitlines()[3:] if "aten::" in line]
    assert len(times) > 5 and times == sorted(times, reverse=True)
