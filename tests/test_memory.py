"""Selection needs memory for T n l' gathered tokens, never for T x T scores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsa_lite import choose_blocks, selected_attention, window_attention

FULL_SIZE = """
import resource, sys, torch
from nsa_lite import choose_blocks, selected_attention
torch.manual_seed(0)
q = torch.randn(1, 16, 4096, 64, requires_grad=True)
k, v = torch.randn(2, 1, 1, 4096, 64).requires_grad_().unbind()
ids = choose_blocks(torch.rand(1, 1, 4096, 64), select_block_size=64, num_selected=16)
selected_attention(q, k, v, ids, select_block_size=64).square().sum().backward()
assert q.grad.isfinite().all() and q.grad.abs().max() > 0
unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no module `resource`")
def test_the_papers_block_sizes_at_4096_tokens_stay_within_6_gib():
    root = str(Path(__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", FULL_SIZE],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    peak = float(run.stdout)
    assert 0.5 < peak < 6, f"peak memory {peak:.2f} GiB"


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's result had, backward included."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


LENGTH, COUNT, BLOCK, WIDTH = 512, 3, 4, 4
T_BY_T = LENGTH * LENGTH


def largest(attend):
    q, k, v = (torch.randn(1, 1, LENGTH, WIDTH, requires_grad=True) for _ in range(3))
    with LargestTensor() as seen:
        attend(q, k, v).sum().backward()
    return seen.numel


def test_selection_makes_no_tensor_of_t_by_t():
    ids = choose_blocks(
        torch.rand(1, 1, LENGTH, LENGTH // BLOCK), select_block_size=BLOCK, num_selected=COUNT
    )
    numel = largest(lambda *qkv: selected_attention(*qkv, ids, select_block_size=BLOCK))
    assert numel == LENGTH * COUNT * BLOCK * WIDTH < T_BY_T  # the gathered keys, or values


def test_the_window_makes_no_tensor_of_t_by_t():
    window = 16
    assert largest(lambda *qkv: window_attention(*qkv, window=window)) <= LENGTH * 2 * window


def test_dense_attention_does_so_the_count_can_fail():
    assert largest(window_attention) == T_BY_T
