import json

from hypothesis import given
from hypothesis import strategies as st

from gateway.letta.event_stream import EventStream
from gateway.translation import sse


def test_event_is_one_line_and_a_blank_one() -> None:
    assert sse.event(b'{"a":1}') == b'data: {"a":1}\n\n'


def test_event_with_a_name() -> None:
    assert sse.named_event(b"text", b'{"a":1}') == b'event: text\ndata: {"a":1}\n\n'


def test_done_is_openais() -> None:
    assert sse.DONE == b"data: [DONE]\n\n"


@given(document=st.recursive(st.none() | st.text() | st.integers(), st.lists, max_leaves=5))
def test_written_events_can_be_read(document: object) -> None:
    written = json.dumps(document).encode()
    assert EventStream().feed(sse.event(written) + sse.DONE) == [written, b"[DONE]"]
