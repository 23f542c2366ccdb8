"""Each message names the argument, its value and the rule; in nsa_lite's words, if it has any."""

import pytest
import torch

import kernels
import nsa_lite


def zeros(*shape, **options):
    return torch.zeros(*shape, **options, device="cuda" if torch.cuda.is_available() else "cpu")


q, k = zeros(1, 4, 8, 16), zeros(1, 2, 8, 16)
ids = zeros(1, 2, 8, 1, dtype=torch.int32)
window = kernels.window_attention


def select(lse=None, **changes):
    options = {"block_size": 4, "stride": 2, "select_block_size": 4, "num_selected": 4}
    lse = zeros(1, 4, 8) if lse is None else lse
    return kernels.select_blocks(q, k, lse, **{**options, **changes})


def selected(ids=ids, size=4, **changes):
    return kernels.selected_attention(q, k, k, ids, select_block_size=size, **changes)


def whole(**changes):
    given = {
        "compressed": (k, k),
        "selected": (k, k),
        "window": (k, k),
        "gates": zeros(1, 4, 8, 3),
        "block_size": 4,
        "stride": 2,
        "select_block_size": 4,
        "num_selected": 4,
        "window_size": 3,
    }
    return kernels.nsa_attention(q, **{**given, **changes})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: window(q.double(), k.double(), k.double()), "float64.*nsa_lite"),
        (lambda: window(q, k.half(), k), r"k.dtype = torch.float16: must be q.dtype"),
        (lambda: window(q[0], k, k), r"q.shape = \(4, 8, 16\): must be \(B, H, T, D\)"),
        (lambda: window([1], k, k), r"q: must be a torch.Tensor \(B, H, T, D\), got list"),
        (lambda: window(q[:, :3], k, k), r"heads \(3\) must be a multiple of k's heads \(2\)"),
        (
            lambda: window(zeros(1, 130, 8, 16), k, k),
            r"heads \(130\) must be 1 to 64 times k's .* \(2\)",
        ),
        (
            lambda: window(q[:, :, :0], k, k),
            "must hold at least one query, and no axis may be empty",
        ),
        (lambda: window(q, k[..., :8], k), r"k.shape = \(1, 2, 8, 8\): width must be q's, 16"),
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
        (
            lambda: whole(compressed=(k[..., :8], k)),
            r"compressed\[0\].shape.*width must be q's, 16",
        ),
        (lambda: whole(window_size=0), "window_size = 0: must be at least 1"),
        (lambda: whole(select_block_size=512), "select_block_size = 512: must be at most 256"),
        (lambda: whole(num_selected=2), "num_selected = 2: must be at least"),
        (lambda: whole(choose=lambda _: ids[:, :1]), r"ids.shape = \(1, 1, 8, 1\)"),
        (lambda: kernels.gated_sum(zeros(1, 4, 8, 3), (q, q, q[:, :2])), r"outputs\[2\].shape"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is not waited for")
def test_interpreted_negative_gates_are_refused():
    gates = zeros(1, 4, 8, 3)
    whole(gates=gates)
    gates[0, 1, 2, 0] = -0.5
    with pytest.raises(ValueError, match=r"gates = -0.5: must be at least 0"):
        whole(gates=gates)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels take bfloat16")
def test_interpreted_bfloat16_is_refused():
    with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly"):
        window(q.bfloat16(), k.bfloat16(), k.bfloat16())


def attend(module, q=q, k=k, v=k, **options):
    return module.window_attention(q, k, v, **options)


def compress(module, **changes):
    return module.compressed_attention(q, k, k, **{"block_size": 4, "stride": 2, **changes})


def choose(module, lse=None, **changes):
    options = {"block_size": 4, "stride": 2, "select_block_size": 4, "num_selected": 4}
    lse = zeros(1, 4, 8) if lse is None else lse
    return module.select_blocks(q, k, lse, **{**options, **changes})


def read(module, ids=ids, size=4):
    return module.selected_attention(q, k, k, ids, select_block_size=size)


@pytest.mark.parametrize(
    "call",
    [
        lambda module: attend(module, q=[1]),
        lambda module: attend(module, v=3),
        lambda module: attend(module, q=q.int()),
        lambda module: attend(module, k=k.half()),
        lambda module: attend(module, v=k.half()),
        lambda module: attend(module, q=q[0]),
        lambda module: attend(module, q=q[:, :, :0]),
        lambda module: attend(module, q=q[..., :0], k=k[..., :0]),
        lambda module: attend(module, k=k.expand(2, -1, -1, -1)),
        lambda module: attend(module, k=k[..., :8]),
        lambda module: attend(module, q=q[:, :3]),
        lambda module: attend(module, k=k[:, :0], v=k[:, :0]),
        lambda module: attend(module, v=k[:, :, :5]),
        lambda module: attend(module, k=k[:, :, :5], v=k[:, :, :5]),
        lambda module: attend(module, start=3),
        lambda module: attend(module, start=-1),
        lambda module: attend(module, start=True),
        lambda module: attend(module, window=0),
        lambda module: attend(module, window=2.0),
        lambda module: compress(module, stride=3),
        lambda module: compress(module, block_size=0),
        lambda module: compress(module, start=1.5),
        lambda module: choose(module, select_block_size=6, stride=4),
        lambda module: choose(module, block_size=8),
        lambda module: choose(module, num_selected=2),
        lambda module: choose(module, num_local=-1),
        lambda module: choose(module, lse=zeros(1, 4, 7)),
        lambda module: read(module, ids.float()),
        lambda module: read(module, ids[:, :1]),
        lambda module: read(module, size=0),
    ],
)
def test_both_backends_say_the_same(call):
    said = []
    for module in (kernels, nsa_lite):
        with pytest.raises((ValueError, TypeError)) as refusal:
            call(module)
        said.append((refusal.type, str(refusal.value)))
    assert said[0] == said[1]


def test_more_blocks_than_the_kernels_take_are_named_also_by_the_whole():
    q = zeros(1, 2, 20, 16)
    k = zeros(1, 1, 20, 16)
    short = zeros(1, 1, 4, 16)
    gates = zeros(1, 2, 20, 3)
    sizes = dict(block_size=8, stride=4, select_block_size=8, window_size=4)
    with pytest.raises(ValueError, match="n must be 1 to 64"):
        kernels.nsa_attention(q, (short, short), (k, k), (k, k), gates, num_selected=65, **sizes)


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(dtype=torch.float64), "float64"),
        (dict(group_size=65), "65 heads a group"),
        (dict(head_dim=257), "widths 257 and 128"),
        (dict(select_block_size=320), "blocks of 320"),
        (dict(num_selected=65), "65 blocks a query"),
        (dict(device=torch.device("cpu")), "cpu"),
    ],
)
def test_why_not_names_what_the_kernels_do_not_take(change, word):
    sizes = dict(group_size=16, head_dim=128, value_dim=128, num_selected=16)
    sizes |= dict(select_block_size=64, stride=16)
    plain = dict(device=torch.device("cuda"), dtype=torch.bfloat16) | sizes
    assert word in kernels.why_not(**plain | change)
