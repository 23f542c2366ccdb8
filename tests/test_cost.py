"""What attention costs: the paper's Table 4, counts of real attention weights, and hand sums."""

import pytest
import torch

from nsa_lite import (
    NSAConfig,
    compressed_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa_lite.cost import (
    cache_bytes,
    compression_flops,
    paper_tokens,
    query_cost,
    sequence_cost,
    tokens_read,
)

PAPER = NSAConfig()
TINY = NSAConfig(
    dim=8,
    heads=4,
    kv_heads=2,
    head_dim=6,
    value_dim=4,
    block_size=4,
    stride=2,
    select_block_size=4,
    num_selected=2,
    num_local=1,
    window=3,
)


@pytest.mark.parametrize(
    ("thousands", "tokens", "ratio"),
    [(8, 2048, "4.0"), (16, 2560, "6.4"), (32, 3584, "9.1"), (64, 5632, "11.6")],
)
def test_table_4(thousands, tokens, ratio):
    length = thousands * 1024
    assert paper_tokens(PAPER, length) == tokens
    assert f"{length / paper_tokens(PAPER, length):.1f}" == ratio


def test_nsa_reads_more_than_full_attention_below_1638_tokens():
    more = [length for length in range(1, 8192) if paper_tokens(PAPER, length) > length]
    assert more == list(range(1, 1638))


def keys_with_weight(attend, keys):
    """How many keys each query reads: with v = identity an output row is its weights."""
    values = torch.eye(keys, dtype=torch.float64)[None, None]
    return (attend(values)[0, 0] > 0).sum(-1).tolist()


@pytest.mark.parametrize(
    "sizes",
    [(4, 2, 4, 3, 5), (4, 2, 8, 3, 1), (1, 1, 3, 4, 7), (6, 3, 6, 5, 100), (2, 2, 2, 40, 8)],
)
def test_tokens_read_counts_the_weights_that_the_operations_give(sizes):
    block, stride, select, chosen, window = sizes
    config = NSAConfig.small(
        block_size=block,
        stride=stride,
        select_block_size=select,
        num_selected=chosen,
        window=window,
    )
    torch.manual_seed(0)
    length = 43
    short = (length - block) // stride + 1
    q, k = torch.randn(2, 1, 1, length, 4, dtype=torch.float64)
    blocks = dict(block_size=block, stride=stride)
    lse = compressed_attention(q, k[:, :, :short], k[:, :, :short], **blocks)[1]
    ids = select_blocks(
        q, k[:, :, :short], lse, **blocks, select_block_size=select, num_selected=chosen
    )
    counted = {
        "compressed": keys_with_weight(
            lambda v: compressed_attention(q, k[:, :, :short], v, **blocks)[0], short
        ),
        "selected": keys_with_weight(
            lambda v: selected_attention(q, k, v, ids, select_block_size=select), length
        ),
        "window": keys_with_weight(lambda v: window_attention(q, k, v, window=window), length),
    }
    expected = [dict(zip(counted, row, strict=True)) for row in zip(*counted.values(), strict=True)]
    assert [tokens_read(config, t) for t in range(length)] == expected
    assert [tokens_read(config, t, "window")["window"] for t in range(length)] == counted["window"]
    dense = keys_with_weight(lambda v: window_attention(q, k, v), length)
    assert [tokens_read(config, t, "dense")["dense"] for t in range(length)] == dense


def test_one_query_by_hand():
    # Query 9: 4 compressed blocks end by it, 4 + 2 tokens of blocks 0 and 2, 3 in the window.
    cost = query_cost(TINY, 9)
    assert cost.tokens == {"compressed": 4, "selected": 6, "window": 3}
    assert cost.total_tokens == 13
    assert cost.flops == 4 * 13 * (2 * 6 + 2 * 4)  # heads, keys, score and value
    assert cost.bytes == 2 * 2 * 13 * (6 + 4)  # bytes a number, groups, keys, key and value
    assert query_cost(TINY, 9, bytes_per_number=4).bytes == 2 * cost.bytes


def test_one_query_of_the_baselines_by_hand():
    assert query_cost(TINY, 9, "dense").tokens == {"dense": 10}
    assert query_cost(TINY, 9, "dense").flops == 4 * 10 * 20
    assert query_cost(TINY, 9, "window").tokens == {"window": 3}
    assert query_cost(TINY, 1, "window").bytes == 2 * 2 * 2 * 10


def test_a_sequence_is_the_sum_of_its_queries_by_hand():
    assert sequence_cost(TINY, 5, "dense").tokens == {"dense": 1 + 2 + 3 + 4 + 5}
    assert sequence_cost(TINY, 5, "window").tokens == {"window": 1 + 2 + 3 + 3 + 3}
    nsa = sequence_cost(TINY, 5)
    assert nsa.tokens == {
        "compressed": 0 + 0 + 0 + 1 + 1,
        "selected": 1 + 2 + 3 + 4 + 5,
        "window": 12,
    }
    assert nsa.flops == 29 * 4 * 20
    assert nsa.bytes == 29 * 2 * 2 * 10


def test_training_takes_seven_matrix_products_for_two():
    once, trained = sequence_cost(TINY, 20), sequence_cost(TINY, 20, training=True)
    assert trained.tokens == once.tokens
    assert trained.flops * 2 == once.flops * 7
    assert trained.bytes == once.bytes * 2


def test_compression_flops_by_hand():
    # T = 10 holds 4 blocks; 2 groups; phi: (4 W -> 2 W) and (2 W -> W), W = 6 and 4.
    per_block = 2 * (24 * 12 + 12 * 6) + 2 * (16 * 8 + 8 * 4)
    assert compression_flops(TINY, 10) == 4 * 2 * per_block
    assert compression_flops(TINY, 3) == 0


def test_cache_bytes_by_hand():
    a_key_and_value = 2 * 2 * (6 + 4)  # bytes a number, groups, widths
    assert cache_bytes(TINY, 10, "dense") == 10 * a_key_and_value
    assert cache_bytes(TINY, 10, "window") == 3 * a_key_and_value
    assert cache_bytes(TINY, 10) == (10 + 3 + 4 + 4) * a_key_and_value
    assert cache_bytes(TINY, 2) == (2 + 2 + 0 + 2) * a_key_and_value
