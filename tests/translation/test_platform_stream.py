from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import TurnFailed, UpstreamTruncated
from gateway.translation import sse
from gateway.translation.agent_events import (
    AgentEvent,
    Batch,
    Failure,
    ReasoningDelta,
    ServerToolCall,
    ServerToolReturn,
    Stop,
    TextDelta,
    Usage,
)
from gateway.translation.platform_answer import PlatformAnswer
from gateway.translation.platform_stream import PlatformStream, done, token_counts
from gateway.translation.platform_types import Message, Started, TokenCounts
from tests.translation.strategies import long_text, turns

STOP = Stop("end_turn")


class Streamed:
    """A stream that is read as a client does."""

    def __init__(self) -> None:
        self.answer = PlatformAnswer()
        self.stream = PlatformStream(Started("msg_answer", "msg_question"), self.answer)

    def tell(self, *events: AgentEvent) -> list[tuple[str, Any]]:
        return read(self.stream.receive(list(events)))


def read(data: bytes) -> list[tuple[str, Any]]:
    """Return the events of a stream by name, and see that each is two lines and a blank one."""
    events = []
    *blocks, rest = data.decode().split("\n\n")
    assert rest == ""
    for block in blocks:
        name, payload = block.split("\n")
        assert name.startswith("event: ")
        assert payload.startswith("data: ")
        events.append((name[7:], msgspec.json.decode(payload[6:])))
    return events


def test_events_in_their_order() -> None:
    streamed = Streamed()
    assert streamed.tell(Usage(1, 1)) == []
    assert streamed.tell(ReasoningDelta("Hm")) == [
        ("start", {"message_id": "msg_answer", "user_message_id": "msg_question"}),
        ("reasoning", {"delta": "Hm"}),
    ]
    assert streamed.tell(ServerToolCall("call-1", "search", "{}")) == [
        ("tool", {"id": "call-1", "name": "search", "status": "running"})
    ]
    assert streamed.tell(ServerToolReturn("call-1", None, succeeded=True), TextDelta("Hel"), TextDelta("lo")) == [
        ("tool", {"id": "call-1", "name": "search", "status": "done"}),
        ("text", {"delta": "Hel"}),
        ("text", {"delta": "lo"}),
    ]
    assert streamed.tell(STOP, Usage(10, 2, 4, None)) == []
    assert read(streamed.stream.finish()) == [
        (
            "usage",
            {
                "prompt_tokens": 11,
                "completion_tokens": 3,
                "total_tokens": 14,
                "cached_tokens": 4,
                "reasoning_tokens": 0,
            },
        )
    ]
    assert streamed.stream.chunks == 7


def test_answer_of_no_words_is_begun_all_the_same() -> None:
    streamed = Streamed()
    assert streamed.tell(STOP) == []
    assert [name for name, _ in read(streamed.stream.finish())] == ["start", "usage"]


def test_stream_that_was_cut_off() -> None:
    streamed = Streamed()
    streamed.tell(TextDelta("Hel"))
    with pytest.raises(UpstreamTruncated):
        streamed.stream.finish()


def test_failure_ends_what_is_told() -> None:
    streamed = Streamed()
    assert [name for name, _ in streamed.tell(TextDelta("Hel"), Failure(TurnFailed()), TextDelta("lo"))] == [
        "start",
        "text",
    ]
    assert isinstance(streamed.stream.error, TurnFailed)
    ((name, data),) = read(streamed.stream.fail(streamed.stream.error))
    assert name == "error"
    assert data["error"]["code"] == "agent_run_failed"


def test_done_is_the_message_as_it_is_kept() -> None:
    message = Message(id="msg_1", role="assistant", status="complete", text="a\nb", created_at=1.0)
    ((name, data),) = read(done(message))
    assert name == "done"
    assert (data["message"]["id"], data["message"]["text"]) == ("msg_1", "a\nb")


def test_nothing_counted_is_zero() -> None:
    assert token_counts(None) == TokenCounts(0, 0, 0, 0, 0)


@given(batches=turns())
def test_deltas_add_up_to_what_is_kept(batches: list[Batch]) -> None:
    streamed = Streamed()
    events = [event for batch in batches for event in streamed.tell(*batch)]
    events += read(streamed.stream.finish())
    said = streamed.answer.said()
    assert "".join(data["delta"] for name, data in events if name == "text") == said.text
    assert "".join(data["delta"] for name, data in events if name == "reasoning") == said.reasoning
    assert [name for name, _ in events].count("start") == 1
    assert (events[0][0], events[-1][0]) == ("start", "usage")
    assert streamed.stream.chunks == len(events)
    told = {data["id"]: (data["name"], data["status"]) for name, data in events if name == "tool"}
    ended = {call.id: (call.name, call.status) for call in said.activity}
    assert {call_id: end for call_id, end in told.items() if end[1] != "running"} == {
        call_id: end for call_id, end in ended.items() if call_id in told and told[call_id][1] != "running"
    }
    assert set(told) <= set(ended)
    assert "\0" not in said.text + said.reasoning


@given(text=long_text, is_reasoning=st.booleans())
def test_no_delta_is_longer_than_a_line_may_be(text: str, *, is_reasoning: bool) -> None:
    streamed = Streamed()
    data = streamed.stream.receive([ReasoningDelta(text) if is_reasoning else TextDelta(text)])
    assert all(len(line) <= sse.MAX_LINE for line in data.split(b"\n"))
    kept = streamed.answer.said()
    assert "".join(piece["delta"] for name, piece in read(data) if name != "start") == kept.text + kept.reasoning
