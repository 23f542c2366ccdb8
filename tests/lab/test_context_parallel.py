"""One sequence over several processes: the outputs and gradients of one process."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import cross_entropy

from nsa_lite import DecoderLM, ModelConfig, NSAConfig
from nsa_lite.lab import distributed
from nsa_lite.lab.context_parallel import (
    ContextParallel,
    add_up_gradients,
    in_order,
    own_part,
    stretches,
)

LENGTH = 96


def model_of(make=None, **changes):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=13, layers=2, nsa=NSAConfig.small(**changes))
    return (DecoderLM(config) if make is None else DecoderLM(config, make)).double()


def sequences():
    tokens = torch.randint(13, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(logits, answers):
    """The sum over these tokens, divided by all tokens of the sequence."""
    return cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="sum") / (2 * LENGTH)


def one_rank(rank, world, place, changes, results):
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=world)
    model = model_of(ContextParallel, **changes)
    tokens, answers = (own_part(x) for x in sequences())
    logits = model(tokens)
    loss_of(logits, answers).backward()
    add_up_gradients(model)
    torch.save([logits.detach(), *(w.grad for w in model.parameters())], f"{results}/{rank}.pt")
    distributed.leave()


@pytest.mark.parametrize("world, changes", [(2, {}), (3, dict(share_window=True))])
def test_ranks_together_are_one_process(tmp_path, world, changes):
    given = (world, tmp_path / "meeting", changes, tmp_path)
    mp.start_processes(one_rank, given, nprocs=world, start_method="spawn")
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    model = model_of(**changes)
    tokens, answers = sequences()
    logits = model(tokens)
    loss_of(logits, answers).backward()
    whole = in_order([part[0] for part in found], 1)
    torch.testing.assert_close(whole, logits, rtol=1e-10, atol=1e-10)
    for _, *gradients in found:
        for ours, weight in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(ours, weight.grad, rtol=1e-10, atol=1e-12)


def test_each_rank_has_an_early_and_a_late_stretch():
    assert [stretches(16, rank, 2) for rank in range(2)] == [
        (range(4), range(12, 16)),
        (range(4, 8), range(8, 12)),
    ]
    pairs = [sum(p + 1 for part in stretches(64, rank, 4) for p in part) for rank in range(4)]
    assert len(set(pairs)) == 1  # as many query-key pairs of causal attention


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="length = 30: must be a multiple of 2 \\* world = 4"):
        stretches(30, 0, 2)
    layer = ContextParallel(NSAConfig.small())
    x = torch.randn(1, 8, 64)
    for name, asked in {"cache": dict(cache=object()), "last": dict(last=1)}.items():
        with pytest.raises(ValueError, match=f"{name} = .*must be None"):
            layer(x, **asked)
    with pytest.raises(ValueError, match="return_trace = True"):
        layer(x, return_trace=True)
