"""Each message names the argument, its value and the rule."""

import pytest
import torch

import kernels


def zeros(*shape, **options):
    return torch.zeros(*shape, **options, device="cuda" if torch.cuda.is_available() else "cpu")


q, k = zeros(1, 4, 8, 16), zeros(1, 2, 8, 16)
ids = zeros(1, 2, 8, 1, dtype=torch.int32)
window = kernels.window_attention


def select(lse=None, **changes):
    options = dict(block_size=4, stride=2, select_block_size=4, num_selected=4)
    lse = zeros(1, 4, 8) if lse is None else lse
    return kernels.select_blocks(q, k, lse, **{**options, **changes})


def selected(ids=ids, size=4, **changes):
    return kernels.selected_attention(q, k, k, ids, select_block_size=size, **changes)


def whole(**changes):
    given = dict(
        compressed=(k, k),
        selected=(k, k),
        window=(k, k),
        gates=zeros(1, 4, 8, 3),
        block_size=4,
        stride=2,
        select_block_size=4,
        num_selected=4,
        window_size=3,
    )
    return kernels.nsa_attention(q, **{**given, **changes})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: window(q.double(), k.double(), k.double()), "float64.*nsa_lite"),
        (lambda: window(q, k.half(), k), r"k.dtype = torch.float16: must be q.dtype"),
        (lambda: window(q[0], k, k), r"q.shape = \(4, 8, 16\): must have 4 dimensions"),
        (lambda: window([1], k, k), "q: must be a torch.Tensor, got list"),
        (lambda: window(q[:, :3], k, k), r"heads \(3\) must be 1 to 64 times k's heads \(2\)"),
        (lambda: window(q[:, :, :0], k, k), "must not be empty"),
        (lambda: window(q, k[..., :8], k), r"k.shape = \(1, 2, 8, 8\): width must be 16"),
        (lambda: window(q, k, k[:, :, :5]), r"v.shape = \(1, 2, 5, 16\)"),
        (lambda: window(q, k[:, :, :5], k[:, :, :5]), r"at least start \+ T = 8 keys"),
        (lambda: window(q, k, k, window=0), "window = 0: must be at least 1"),
        (lambda: window(q, k, k, window=2.0), "window = 2.0: must be an int"),
        (lambda: window(q, k, k, start=-1), "start = -1"),
        (lambda: window(q, k, k, scale=0.0), "scale = 0.0: must be positive"),
        (lambda: window(zeros(1, 2, 8, 300), zeros(1, 2, 8, 300), k), "1 to 256"),
        (
            lambda: kernels.compressed_attention(q, k, k, block_size=4, stride=3),
            "stride = 3: must divide block_size = 4",
        ),
        (lambda: select(stride=3), "stride = 3: must divide"),
        (lambda: select(select_block_size=6, stride=4), "must be a multiple of stride = 4"),
        (lambda: select(block_size=8), "block_size = 8: must not exceed select_block_size = 4"),
        (lambda: select(num_selected=2), "num_selected = 2: must be at least"),
        (lambda: select(lse=zeros(1, 4, 7)), r"lse.shape = \(1, 4, 7\)"),
        (lambda: select(lse=zeros(1, 4, 8).half()), "lse: must be a float32 tensor"),
        (lambda: select(stride=1, select_block_size=512), "a block has more than 128 keys"),
        (lambda: selected(ids.float()), "ids: must be an int32 or int64 tensor"),
        (lambda: selected(ids[:, :1]), r"ids.shape = \(1, 1, 8, 1\)"),
        (lambda: selected(ids.expand(1, 2, 8, 65)), "n must be 1 to 64"),
        (lambda: selected(size=0), "select_block_size = 0"),
        (lambda: selected(size=512), "select_block_size = 512: must be at most 256"),
        (lambda: kernels.gated_sum(zeros(1, 4, 8, 2), (q, q, q)), r"gates.shape"),
        (
            lambda: whole(gates=zeros(1, 4, 8, 2)),
            r"gates.shape = \(1, 4, 8, 2\): must be \(1, 4, 8, 3",
        ),
        (lambda: whole(selected=(k, k[:, :, :5])), r"selected\[1\].shape = \(1, 2, 5, 16\)"),
        (
            lambda: whole(window=(k[:, :, :5], k[:, :, :5])),
            r"window\[0\].shape.*at least start \+ T",
        ),
        (lambda: whole(compressed=(k[..., :8], k)), r"compressed\[0\].shape.*width must be 16"),
        (lambda: whole(window_size=0), "window_size = 0: must be at least 1"),
        (lambda: whole(num_selected=2), "num_selected = 2: must be at least"),
        (lambda: whole(choose=lambda lse: ids[:, :1]), r"ids.shape = \(1, 1, 8, 1\)"),
        (lambda: kernels.gated_sum(zeros(1, 4, 8, 3), (q, q, q[:, :2])), r"outputs\[2\].shape"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels take bfloat16")
def test_interpreted_bfloat16_is_refused():
    with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly"):
        window(q.bfloat16(), k.bfloat16(), k.bfloat16())
