"""The pictures of recorded decoding steps, and what they say in words: by numbers made by hand."""

import pytest

from benchmarks import draw

RATE = 1e12  # bytes a second, so a million bytes take a microsecond
TIMES = {  # batch, context, who -> in a graph, called, bytes
    (1, 8192, "NSA"): (20.0, 80.0, 4e6),
    (1, 65536, "NSA"): (25.0, 90.0, 12e6),
    (4, 65536, "NSA"): (50.0, 95.0, 48e6),
    (1, 8192, "FlashAttention-2"): (22.0, 60.0, 16e6),
    (1, 65536, "FlashAttention-2"): (150.0, 170.0, 134e6),
    (4, 65536, "FlashAttention-2"): (550.0, 560.0, 536e6),
    (1, 65536, "cuDNN"): (140.0, 160.0, 134e6),
}
WHERE = {"device": "a card", "versions": {}}


@pytest.fixture
def record():
    """A record with these rows, one refusal, and a row of another config, which counts nowhere."""
    rows = [
        dict(config="A", batch=b, length=n, name=name, graph_us=graph, eager_us=eager, bytes=size)
        for (b, n, name), (graph, eager, size) in TIMES.items()
    ]
    rows.append({**rows[0], "config": "B", "graph_us": 1.0})
    rows.append(dict(config="A", batch=1, length=65536, name="fla-core NSA", refused="no"))
    return {**WHERE, "rows": rows}


def test_a_curve_runs_by_context_at_one_batch_or_by_batch_at_one_context(record):
    found = draw.find_steps(record, "A", "NSA", "graph_us", "length", 1)
    assert found == {8192: 20.0, 65536: 25.0}
    assert draw.find_steps(record, "A", "NSA", "graph_us", "batch", 65536) == {1: 25.0, 4: 50.0}
    assert draw.find_steps(record, "A", "NSA", "eager_us", "batch", 8192) == {1: 80.0}
    assert draw.find_steps(record, "A", "fla-core NSA", "graph_us", "length", 1) == {}


def test_each_curve_is_drawn_and_beside_it_what_the_bytes_would_take(record):
    by_context, by_batch = draw.draw_decoding(record, RATE).axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in by_context.lines}
    assert lines == {
        "NSA": [20.0, 25.0],
        "FlashAttention-2": [22.0, 150.0],
        "cuDNN": [140.0],
        "fla-core NSA": [],
        "NSA: bytes at the copy rate": pytest.approx([4.0, 12.0]),
        "dense: bytes at the copy rate": pytest.approx([16.0, 134.0]),
    }
    assert [line.get_xdata().tolist() for line in by_batch.lines][:3] == [[1, 4], [1, 4], [1]]
    for ax in (by_context, by_batch):
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [tick.get_text() for tick in by_context.get_xticklabels()] == ["8k", "64k"]
    assert "a card" in by_context.figure.get_suptitle()


def test_the_words_have_the_numbers_of_the_picture(record):
    one, two, three = draw.decoding_in_words(record, RATE).splitlines()
    assert one == (
        "batch 1, 8k, microseconds: NSA 20.0; FlashAttention-2 22.0; "
        "NSA, its bytes at the copy rate 4.0; dense, its bytes at the copy rate 16.0"
    )
    assert two.startswith("batch 1, 64k, ") and "cuDNN 140; NSA, its" in two
    assert three.startswith("batch 4, 64k, microseconds: NSA 50.0; FlashAttention-2 550;")


def test_host_time_has_two_bars_for_each_that_was_measured(record):
    (ax,) = draw.draw_host_time(record).axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [
        "NSA",
        "FlashAttention-2",
        "cuDNN",
    ]
    called, graph = ax.containers[:2]
    assert [bar.get_width() for bar in called] == [90, 170, 160]
    assert [bar.get_width() for bar in graph] == [25, 150, 140]
    assert [text.get_text() for text in ax.texts] == ["90.0", "170", "160", "25.0", "150", "140"]
    words = draw.host_time_in_words(record)
    assert words.startswith("NSA 90.0 us called, 25.0 in a graph; FlashAttention-2 170 us")
    assert "fla-core" not in words


def test_the_record_that_is_kept_fills_every_curve():
    record = draw.records.load("decode")
    for ax in draw.draw_decoding(record, RATE).axes:
        assert all(len(line.get_xdata()) >= 4 for line in ax.lines)
    for name in draw.STEPS:
        contexts = draw.find_steps(record, "A", name, "graph_us", "length", 1)
        batches = draw.find_steps(record, "A", name, "graph_us", "batch", 65536)
        assert list(contexts) == [4096 * 2**i for i in range(7)], name  # 4k to 256k
        assert list(batches) == [1, 4, 16, 32], name
