import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import UpstreamInvalid
from gateway.letta.event_stream import MAX_EVENT, EventStream

BOM = b"\xef\xbb\xbf"


def feed(*reads: bytes) -> list[bytes]:
    stream = EventStream()
    return [event for data in reads for event in stream.feed(data)]


# Interpretation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"", []),
        (b"data: a\n\n", [b"a"]),
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\n", []),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a \n\n", [b" a "]),
        (b"data: a: b\n\n", [b"a: b"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data\n\n", [b""]),
        (b"data:\n\n", [b""]),
        (b"data\ndata\n\n", [b"\n"]),
        (b"\n\n\n\ndata: a\n\n\n\n\ndata: b\n\n\n", [b"a", b"b"]),
        (b": comment\n\ndata: a\n\n", [b"a"]),
        (b": comment\ndata: a\n: another\n\n", [b"a"]),
        (b":\n\n", []),
        (b"id: 7\nretry: 10\ndata: a\nx\ny: z\n\n", [b"a"]),
        (b"Data: a\n\n", []),
        (b" data: a\n\n", []),
        (b"event: message\ndata: a\n\n", [b"a"]),
        (b"event: error\ndata: a\n\n", [b"a"]),
        (b"data: a\nevent: error\n\n", [b"a"]),
        (b"event:\ndata: a\n\n", [b"a"]),
        (b"event: error\n\ndata: a\n\n", [b"a"]),
        (b"event: news\ndata: a\n\ndata: b\n\n", [b"b"]),
        (b"data: a\0b\n\n", [b"a\0b"]),
        (b"data: \xff\n\n", [b"\xff"]),
        (BOM + b"data: a\n\n", [b"a"]),
        (BOM + BOM + b"data: a\n\ndata: b\n\n", [b"b"]),
        (b"data: a\n\n" + BOM + b"data: b\n\n", [b"a"]),
    ],
)
def test_stream_by_the_standard(stream: bytes, events: list[bytes]) -> None:
    assert feed(stream) == events
    assert feed(stream.replace(b"\n", b"\r\n")) == events
    assert feed(stream.replace(b"\n", b"\r")) == events


def test_line_ends_of_every_kind_in_one_stream() -> None:
    assert feed(b"data: a\rdata: b\r\ndata: c\n\r\ndata: d\n\rdata: e\r\r\n") == [b"a\nb\nc", b"d", b"e"]


def test_event_type_that_nobody_asked_for_is_counted() -> None:
    stream = EventStream()
    assert stream.feed(b"event: news\ndata: a\n\nevent: news\n\nevent: more\ndata: b\n\n") == []
    assert stream.skipped == 2


# Reads ---------------------------------------------------------------------------------------------------------------


def test_event_comes_with_the_read_that_completes_it() -> None:
    stream = EventStream()
    assert [stream.feed(data) for data in (b"data: a\n\nda", b"ta: b\n", b"\ndata: c\n\n")] == [
        [b"a"],
        [],
        [b"b", b"c"],
    ]


def test_cr_that_ends_a_blank_line_does_not_wait_for_its_lf() -> None:
    stream = EventStream()
    assert stream.feed(b"data: a\r\n\r") == [b"a"]
    assert stream.feed(b"\ndata: b\r\n\r\n") == [b"b"]


def test_bom_split_over_three_reads() -> None:
    assert feed(BOM[:1], BOM[1:2], BOM[2:], b"data: a\n\n") == [b"a"]


def test_stream_that_begins_like_a_bom() -> None:
    assert feed(b"\xef", b"\xbb", b"data: a\n\ndata: b\n\n") == [b"b"]


def test_empty_reads_change_nothing() -> None:
    assert feed(b"", b"data: a\r", b"", b"\n", b"", b"\r\n", b"") == [b"a"]


def test_character_split_in_its_middle() -> None:
    text = "data: 😀é\n\n".encode()
    for at in range(len(text)):
        assert feed(text[:at], text[at:]) == ["😀é".encode()]


_field = st.sampled_from([b"data", b"data", b"data", b"event", b"id", b"retry", b"", b"x"])
_value = st.sampled_from(
    [b"", b" a", b"a", b" {}", b"  b: c", b" error", b" message", b" news", "\u00e9😀".encode(), BOM, b"\0"]
)
_line = st.tuples(_field, st.sampled_from([b":", b":", b":", b""]), _value).map(b"".join) | st.just(b"")
_end = st.sampled_from([b"\n", b"\r\n", b"\r"])


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Draw a stream with line ends of one kind or of all."""
    end = draw(_end)
    ends = st.just(end) | _end if draw(st.booleans()) else st.just(end)
    lines = draw(st.lists(st.tuples(_line, ends).map(b"".join), max_size=16))
    return draw(st.sampled_from([b"", b"", BOM, BOM[:2]])) + b"".join(lines)


@given(stream=streams(), seed=st.integers(0, 2**32))
def test_splits_do_not_matter(*, stream: bytes, seed: int) -> None:
    whole = EventStream()
    events = whole.feed(stream)
    assert feed(*(stream[at : at + 1] for at in range(len(stream)))) == events
    for at in range(len(stream) + 1):
        assert feed(stream[:at], stream[at:]) == events
    chance = random.Random(seed)
    for _ in range(5):
        cuts = sorted(chance.choices(range(len(stream) + 1), k=chance.randrange(6)))
        parts = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
        split = EventStream()
        assert [event for part in parts for event in split.feed(part)] == events
        assert split.skipped == whole.skipped


# Bounds --------------------------------------------------------------------------------------------------------------


def test_event_that_never_ends() -> None:
    stream = EventStream()
    block = b"data: " + b"x" * 65_530
    for _ in range(MAX_EVENT // len(block)):
        assert stream.feed(block) == []
    with pytest.raises(UpstreamInvalid) as raised:
        stream.feed(block)
    assert raised.value.should_retry is False


def test_comments_that_never_end() -> None:
    stream = EventStream()
    ping = b": ping\n"
    assert stream.feed(ping * (MAX_EVENT // len(ping))) == []
    with pytest.raises(UpstreamInvalid):
        stream.feed(ping)


def test_largest_event_passes() -> None:
    payload = b"x" * (MAX_EVENT - 8)
    assert feed(b"data: " + payload, b"\n", b"\n") == [payload]


def test_many_events_are_no_large_event() -> None:
    stream = EventStream()
    for _ in range(40):
        assert stream.feed(b"data: " + b"x" * 60_000 + b"\n\ndata: y") == [b"x" * 60_000]
        assert stream.feed(b"\n\n") == [b"y"]


def test_largest_event_one_byte_at_a_time_takes_linear_time() -> None:
    quarter, whole = _seconds_for(MAX_EVENT // 4), _seconds_for(MAX_EVENT)
    assert whole < 12 * quarter + 0.1


def _seconds_for(length: int) -> float:
    stream = EventStream()
    stream.feed(b"data: ")
    started = time.process_time()
    for _ in range(length - 6):
        stream.feed(b"x")
    return time.process_time() - started
