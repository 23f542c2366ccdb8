"""decode_step: the newest tokens' rows of nsa_attention, whatever the lengths, heads and widths."""

import re
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nsa_lite import KV, decode_step, nsa_attention
from nsa_lite.blocks import num_compressed

SIZES = dict(block_size=4, stride=2, select_block_size=4, num_selected=4, window_size=5)
GROUPS, D, DV = 2, 6, 5
ROWS = 43  # room behind every sequence, and a multiple of nothing


class Held(NamedTuple):
    """All that decode_step asks of a cache."""

    raw: dict[str, KV]
    blocks: KV
    lengths: Tensor


def held(lengths):
    """A cache with these lengths; NaN stands behind them, and where blocks are not whole."""
    batch = len(lengths)

    def rows(count, ends):
        kv = KV(*(torch.randn(batch, GROUPS, count, w, dtype=torch.float64) for w in (D, DV)))
        for b, end in enumerate(ends):
            for x in kv:
                x[b, :, end:] = torch.nan
        return kv

    raw = {name: rows(ROWS, lengths) for name in ("selected", "window")}
    whole = [num_compressed(n, 4, 2) for n in lengths]
    return Held(raw, rows(ROWS // 2 + 1, whole), torch.tensor(lengths))


def asked(lengths, new, heads=4):
    """Queries and gates of every position, and those of each sequence's newest tokens."""
    batch = len(lengths)
    q = torch.randn(batch, heads, ROWS, D, dtype=torch.float64)
    gates = torch.rand(batch, heads, ROWS, 3, dtype=torch.float64)
    ends = list(enumerate(lengths))
    newest = [torch.stack([x[b, :, n - new : n] for b, n in ends]) for x in (q, gates)]
    return q, gates, *newest


def last_rows(q, gates, cache, new, sizes):
    """One nsa_attention for each whole sequence, from its first token on: its last rows and ids."""
    outs, ids = [], []
    for b, n in enumerate(cache.lengths.tolist()):
        blocks = tuple(x[b : b + 1, :, : num_compressed(n, 4, 2)] for x in cache.blocks)
        selected = tuple(x[b : b + 1, :, :n] for x in cache.raw["selected"])
        window = tuple(x[b : b + 1, :, :n] for x in cache.raw["window"])
        given = (q[b : b + 1, :, :n], blocks, selected, window, gates[b : b + 1, :, :n])
        out, branches = nsa_attention(*given, **sizes, return_branches=True)
        outs.append(out[:, :, -new:])
        ids.append(branches.ids[:, :, -new:])
    return torch.cat(outs), torch.cat(ids)


def agree(lengths, new=1, heads=4, **changes):
    torch.manual_seed(0)
    sizes = {**SIZES, **changes}
    cache = held(lengths)
    q, gates, newest, newest_gates = asked(lengths, new, heads)
    out, ids = decode_step(newest, cache, newest_gates, **sizes, return_ids=True)
    expected, chosen = last_rows(q, gates, cache, new, sizes)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(ids, chosen)
    return out, ids


@pytest.mark.parametrize("length", range(1, ROWS + 1))
def test_one_token_at_any_place_is_the_last_row(length):
    agree([length])


@pytest.mark.parametrize("new", range(1, 9))
def test_several_new_tokens_each_have_their_own_selection(new):
    _, ids = agree([new, new + 1, 17, 30, 41, ROWS], new)
    assert new < 3 or not torch.equal(ids[-1, :, 0], ids[-1, :, -1])
    agree([new] * 3, new)
    agree([ROWS] * 3, new)


@pytest.mark.parametrize("heads", [2, 6, 128])  # R = 1, 3 and 64
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_any_heads_and_batch(heads, batch):
    agree([1 + 7 * b % ROWS for b in range(batch)], heads=heads)


@pytest.mark.parametrize(
    "change",
    [
        dict(scale=0.3),
        dict(num_initial=0, num_local=1),
        dict(num_selected=40),  # more than there are
        dict(window_size=1),
        dict(window_size=100),
        dict(select_block_size=8),
    ],
)
def test_every_size_has_its_say(change):
    out, _ = agree([3, 29, 42], new=3, **change)
    if change != dict(num_selected=40):
        plain, _ = agree([3, 29, 42], new=3)
        assert not torch.allclose(out[1:], plain[1:])


def test_most_blocks_are_not_read():
    """11 blocks have begun, 4 are read: what stands in the others changes nothing."""
    torch.manual_seed(0)
    cache = held([ROWS])
    *_, q, gates = asked([ROWS], 1)
    out, ids = decode_step(q, cache, gates, **SIZES, return_ids=True)
    for g in range(GROUPS):
        read = (ids[0, g, 0, :, None] * 4 + torch.arange(4)).flatten()
        unread = sorted(set(range(ROWS)) - set(read.tolist()))
        assert len(unread) == ROWS - 15  # block 0, one of choice, the last two, of 4 and 3 tokens
        for x in cache.raw["selected"]:
            x[0, g, unread] = torch.nan
    assert torch.equal(decode_step(q, cache, gates, **SIZES), out)


def test_there_is_no_history():
    cache = held([9])
    *_, q, gates = asked([9], 1)
    out = decode_step(q.requires_grad_(), cache, gates.requires_grad_(), **SIZES)
    assert not out.requires_grad


@pytest.mark.parametrize("dtype, near", [(torch.bfloat16, 4e-2), (torch.float32, 1e-5)])
def test_low_precision_rounds_and_no_more(dtype, near):
    torch.manual_seed(0)
    lengths = [5, 20]
    exact = held(lengths)
    *_, q, gates = asked(lengths, 2)
    low = Held(
        {name: KV(*(x.to(dtype) for x in kv)) for name, kv in exact.raw.items()},
        KV(*(x.to(dtype) for x in exact.blocks)),
        exact.lengths,
    )
    sizes = {**SIZES, "num_selected": 40}  # rounding may not change what is chosen
    out = decode_step(q.to(dtype), low, gates.to(dtype), **sizes)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), decode_step(q, exact, gates, **sizes), rtol=near, atol=near
    )


def bad_lengths(lengths):
    return lambda cache: cache._replace(lengths=lengths)


def without(part):
    def change(cache):
        kv = cache.raw[part]
        return cache._replace(raw={**cache.raw, part: KV(kv.k, kv.v[:, :, :9])})

    return change


CALLS = [
    (dict(new=9), None, ValueError, "q.shape = (2, 4, 9, 6): must hold 1 to 8 new tokens"),
    (
        {},
        bad_lengths([9, 9]),
        TypeError,
        "cache.lengths: must be an int32 or int64 tensor (B,), got list",
    ),
    ({}, bad_lengths(torch.tensor([9.0, 9.0])), TypeError, "got torch.float32"),
    ({}, bad_lengths(torch.tensor([9])), ValueError, "cache.lengths.shape = (1,): must be (B,)"),
    ({}, bad_lengths(torch.tensor([9, 44])), ValueError, "cache.lengths = 9 .. 44: must lie"),
    (dict(new=2), bad_lengths(torch.tensor([9, 1])), ValueError, "cache.lengths = 1 .. 9"),
    ({}, bad_lengths(torch.tensor([9, 0])), ValueError, "cache.lengths = 0 .. 9"),
    ({}, lambda c: c._replace(blocks=None), ValueError, "cache.blocks = None"),
    (
        {},
        lambda c: c._replace(blocks=KV(*(x[:, :, :2] for x in c.blocks))),
        ValueError,
        "cache.blocks[0].shape = (2, 2, 2, 6): must hold the 3 blocks of the longest sequence",
    ),
    ({}, without("window"), ValueError, "cache.raw['window'][1].shape = (2, 2, 9, 5)"),
    ({}, without("selected"), ValueError, "cache.raw['selected'][1].shape = (2, 2, 9, 5)"),
    (dict(stride=3), None, ValueError, "stride = 3: must divide block_size = 4"),
    (dict(num_selected=2), None, ValueError, "num_selected = 2"),
    (dict(window_size=0), None, ValueError, "window_size = 0"),
]


@pytest.mark.parametrize(("change", "damage", "error", "words"), CALLS)
def test_bad_arguments_are_refused(change, damage, error, words):
    change = dict(change)
    new = change.pop("new", 1)
    cache = held([9, 9])
    *_, q, gates = asked([9, 9], new)
    cache = cache if damage is None else damage(cache)
    with pytest.raises(error, match=re.escape(words)):
        decode_step(q, cache, gates, **{**SIZES, **change})


def test_gates_of_other_queries_are_refused():
    cache = held([9, 9])
    *_, q, gates = asked([9, 9], 2)
    with pytest.raises(ValueError, match="gates.shape"):
        decode_step(q, cache, gates[:, :, :1], **SIZES)
