import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import TurnFailed, UpstreamTruncated
from gateway.translation import responses_answer, sse
from gateway.translation.agent_events import (
    AgentEvent,
    Batch,
    Failure,
    ReasoningDelta,
    ServerToolCall,
    ServerToolReturn,
    Stop,
    StopReason,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from gateway.translation.chat_stream import MAX_TEXT
from gateway.translation.request import MAX_MODEL_LENGTH
from gateway.translation.responses_answer import ResponseAnswer
from gateway.translation.responses_names import FunctionName
from gateway.translation.responses_stream import MAX_ECHO, ResponsesStream
from gateway.translation.responses_tables import INCOMPLETE_REASONS
from gateway.translation.responses_types import Echo
from tests.translation import strategies

FAILED = TurnFailed("The run failed. Try again.", should_retry=False)


def new_stream(*, model: str = "friend", tool_activity: bool = True, **echo: Any) -> ResponsesStream:
    return ResponsesStream(
        response_id="resp_1",
        created=1_700_000_000,
        echo=Echo(model=model, **echo),
        tool_activity=tool_activity,
        namespaced={"crm__find": FunctionName("crm", "find")},
    )


def read(stream: bytes) -> list[Any]:
    """What a client reads: each event is its name and one line of data."""
    if not stream:
        return []
    assert stream.endswith(b"\n\n")
    events = []
    for event in stream[:-2].split(b"\n\n"):
        name, data = event.split(b"\n")
        events.append(json.loads(data.removeprefix(b"data: ")))
        assert name == b"event: " + events[-1]["type"].encode()
    return events


def told(*batches: Batch, **options: Any) -> list[Any]:
    stream = new_stream(**options)
    return read(b"".join(map(stream.receive, batches)) + stream.finish())


def types(events: list[Any]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


# Whole streams -------------------------------------------------------------------------------------------------------


def test_delta_to_the_byte() -> None:
    stream = new_stream()
    stream.receive([TextDelta("Hel")])
    assert stream.receive([TextDelta('l"o')]) == (
        b"event: response.output_text.delta\n"
        b'data: {"type":"response.output_text.delta","item_id":"msg_1_0","output_index":0,"content_index":0,'
        b'"logprobs":[],"delta":"l\\"o","sequence_number":5}\n\n'
    )


def test_text() -> None:
    events = told([TextDelta("Hel")], [TextDelta("lo"), Stop("end_turn")], [Usage(5, 2, 3, 1)])
    assert types(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    part = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
    message = {"type": "message", "id": "msg_1_0", "status": "completed", "content": [part], "role": "assistant"}
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    assert events[2]["item"] == message | {"status": "in_progress", "content": []}
    assert events[3]["part"] == part | {"text": ""}
    assert events[6]["text"] == "Hello"
    assert events[7]["part"] == part
    assert events[8]["item"] == message
    assert events[9]["response"]["output"] == [message]
    assert events[9]["response"]["usage"] == {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 7,
    }
    assert all(event["content_index"] == 0 for event in events[3:8])


def test_reasoning_then_text() -> None:
    events = told([ReasoningDelta("H"), ReasoningDelta("m"), TextDelta("Hi"), Stop("end_turn")])
    assert types(events)[2:10] == [
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
        "output_item.added",
    ]
    assert [event.get("output_index") for event in events[2:-1]] == [0] * 7 + [1] * 6
    assert all(event["summary_index"] == 0 for event in events[3:8])
    assert events[8]["item"] == {
        "type": "reasoning",
        "id": "rs_1_0",
        "status": "completed",
        "summary": [{"type": "summary_text", "text": "Hm"}],
        "encrypted_content": None,
    }


def test_two_parallel_calls_with_fragments_interleaved() -> None:
    events = told(
        [ToolCallDelta("call_a", "f", "{"), ToolCallDelta("call_b", "crm__find", "[")],
        [ToolCallDelta("call_a", None, "}"), ToolCallDelta("call_b", None, "]"), Stop("requires_approval")],
    )
    assert types(events)[2:] == [
        "output_item.added",
        "function_call_arguments.delta",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [event["output_index"] for event in events[2:-1]] == [0, 0, 1, 1, 0, 1, 0, 0, 1, 1]
    call = {"type": "function_call", "status": "completed"}
    assert events[-1]["response"]["output"] == [
        call | {"id": "fc_1_0", "call_id": "call_a", "name": "f", "arguments": "{}"},
        call | {"id": "fc_1_1", "call_id": "call_b", "name": "find", "arguments": "[]", "namespace": "crm"},
    ]


def test_agents_own_tools_are_mcp_calls() -> None:
    events = told(
        [ServerToolCall("a", "archival_search", '{"q":1}'), ServerToolReturn("a", "archival_search", succeeded=True)],
        [
            ServerToolCall("b", "run_code", ""),
            ServerToolReturn("b", None, succeeded=False),
            ServerToolCall("c", "f", ""),
        ],
        [Stop("tool_rule")],
    )
    assert types(events)[2:12] == [
        "output_item.added",
        "mcp_call.in_progress",
        "mcp_call_arguments.delta",
        "mcp_call_arguments.done",
        "mcp_call.completed",
        "output_item.done",
        "output_item.added",
        "mcp_call.in_progress",
        "mcp_call_arguments.done",
        "mcp_call.failed",
    ]
    searched, failed, unfinished = events[-1]["response"]["output"]
    assert searched == {
        "type": "mcp_call",
        "id": "mcp_1_0",
        "name": "archival_search",
        "arguments": '{"q":1}',
        "status": "completed",
        "error": None,
        "output": None,
        "server_label": "letta",
        "approval_request_id": None,
    }
    assert failed["status"] == "failed"
    assert failed["error"]["type"] == "mcp_tool_execution_error"
    assert unfinished["status"] == "incomplete"


def test_agents_own_tools_hidden_do_not_cut_its_text() -> None:
    batch: Batch = [
        TextDelta("a"),
        ServerToolCall("a", "f", "{}"),
        ServerToolReturn("a", "f", succeeded=True),
        TextDelta("b"),
        Stop("end_turn"),
    ]
    (message,) = told(batch, tool_activity=False)[-1]["response"]["output"]
    assert message["content"][0]["text"] == "ab"


def test_nothing_is_sent_before_there_is_something_to_tell() -> None:
    stream = new_stream(tool_activity=False)
    silent: Batch = [Usage(1, 1), ServerToolCall("a", "f", "{}"), TextDelta(""), ReasoningDelta("")]
    assert stream.receive([]) == stream.receive(silent) == b""
    assert stream.chunks == 0


def test_agent_that_says_nothing() -> None:
    events = told([Stop("end_turn")])
    assert types(events) == ["created", "in_progress", "completed"]
    assert events[-1]["response"]["output"] == []


@pytest.mark.parametrize("reason", get_args(StopReason))
def test_end_of_every_stop(reason: StopReason) -> None:
    events = told([TextDelta("a"), Stop(reason)])
    why, response = INCOMPLETE_REASONS[reason], events[-1]["response"]
    status = "completed" if why is None else "incomplete"
    assert events[-1]["type"] == f"response.{status}"
    assert (response["status"], response["output"][0]["status"]) == (status, status)
    assert response["incomplete_details"] == (None if why is None else {"reason": why})


# Failures ------------------------------------------------------------------------------------------------------------


def test_failure_ends_what_is_told() -> None:
    stream = new_stream()
    said = stream.receive([TextDelta("Hel"), Failure(FAILED), TextDelta("lo"), Stop("end_turn")])
    assert stream.error is FAILED
    with pytest.raises(UpstreamTruncated):
        stream.finish()
    *_, last = read(said + stream.fail(FAILED))
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": FAILED.message}
    (message,) = last["response"]["output"]
    assert message["status"] == "incomplete"
    assert message["content"][0]["text"] == "Hel"


def test_failure_before_anything_was_told() -> None:
    assert types(read(new_stream().fail(FAILED))) == ["created", "in_progress", "failed"]


def test_truncated_stream_is_never_completed() -> None:
    stream = new_stream()
    said = stream.receive([TextDelta("Hel")])
    with pytest.raises(UpstreamTruncated) as raised:
        stream.finish()
    assert raised.value.should_retry is False
    assert types(read(said + stream.fail(raised.value)))[-1] == "failed"


@pytest.mark.parametrize("piece", ["x", "xyz" * 100, "x" * (MAX_TEXT + 1)])
@pytest.mark.parametrize("kind", [TextDelta, ReasoningDelta])
def test_answer_longer_than_is_gathered(
    kind: type[TextDelta] | type[ReasoningDelta], piece: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 3 * MAX_TEXT + 7
    monkeypatch.setattr(responses_answer, "MAX_ANSWER", most)
    stream, sent = new_stream(), 0
    while stream.error is None:
        stream.receive([kind(piece)])
        sent += len(piece)
    assert most < sent <= most + len(piece)
    assert stream.error.code == "upstream_answer_too_long"


# The request's echo --------------------------------------------------------------------------------------------------


def test_short_request_is_repeated() -> None:
    events = told([TextDelta("a"), Stop("end_turn")], instructions="Be kind.", metadata={"a": "b"})
    for event in (events[0], events[1], events[-1]):
        assert event["response"]["instructions"] == "Be kind."
        assert event["response"]["metadata"] == {"a": "b"}


def test_long_request_is_repeated_in_the_whole_answer_alone() -> None:
    stream = new_stream(instructions="x" * MAX_ECHO)
    events = read(stream.receive([TextDelta("a"), Stop("end_turn")]) + stream.finish())
    assert {event["response"]["instructions"] for event in (events[0], events[1], events[-1])} == {None}
    whole = json.loads(stream.answer())
    assert whole["instructions"] == "x" * MAX_ECHO
    assert whole["output"] == events[-1]["response"]["output"]


# Properties ----------------------------------------------------------------------------------------------------------


@given(batches=strategies.turns(), tool_activity=st.booleans())
def test_any_turn_is_a_valid_sequence_that_adds_up(*, batches: list[Batch], tool_activity: bool) -> None:
    events = told(*batches, tool_activity=tool_activity)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert types(events)[:2] == ["created", "in_progress"]
    items: dict[int, dict[str, Any]] = {}
    for event in events[2:-1]:
        _follow(event, items)
    assert all(item["done"] for item in items.values())
    assert [item["item"] for _, item in sorted(items.items())] == events[-1]["response"]["output"]
    assert list(items) == list(range(len(items)))


def _follow(event: dict[str, Any], items: dict[int, dict[str, Any]]) -> None:
    kind, index = event["type"], event["output_index"]
    if kind == "response.output_item.added":
        assert index not in items
        items[index] = {"id": event["item"]["id"], "text": "", "done": False}
        return
    item = items[index]
    assert not item["done"]
    assert event.get("item_id", item["id"]) == item["id"]
    if kind.endswith(".delta"):
        item["text"] += event["delta"]
    elif kind.endswith(("text.done", "arguments.done")):
        assert item["text"] == event.get("text", event.get("arguments"))
    elif kind == "response.output_item.done":
        assert event["item"]["id"] == item["id"]
        item |= {"done": True, "item": event["item"]}


@given(batches=strategies.turns(), tool_activity=st.booleans())
def test_cuts_of_the_network_change_nothing(*, batches: list[Batch], tool_activity: bool) -> None:
    whole: Batch = [event for batch in batches for event in batch]
    assert told(*batches, tool_activity=tool_activity) == told(whole, tool_activity=tool_activity)
    assert told(*([event] for event in whole), tool_activity=tool_activity) == told(whole, tool_activity=tool_activity)


@given(batches=strategies.turns(), tool_activity=st.booleans())
def test_stream_and_whole_answer_say_the_same(*, batches: list[Batch], tool_activity: bool) -> None:
    answer = ResponseAnswer(
        response_id="resp_1", created=1_700_000_000, echo=Echo(model="friend"), tool_activity=tool_activity
    )
    stream = ResponsesStream(
        response_id="resp_1", created=1_700_000_000, echo=Echo(model="friend"), tool_activity=tool_activity
    )
    for batch in batches:
        answer.receive(batch)
    events = read(b"".join(map(stream.receive, batches)) + stream.finish())
    assert events[-1]["response"] == json.loads(answer.answer()) == json.loads(stream.answer())
    assert stream.output() == answer.output()
    assert stream.output_items() == answer.output_items()
    assert stream.usage == answer.usage
    assert stream.chunks == len(events)


@given(
    text=strategies.long_text,
    kind=st.sampled_from(["text", "reasoning", "call"]),
    begun=st.booleans(),
    model=st.sampled_from(["\x01", "😀", "é"]).map(lambda letter: letter * MAX_MODEL_LENGTH),
)
def test_no_delta_is_too_long_and_the_text_comes_whole(*, text: str, kind: str, begun: bool, model: str) -> None:
    made: dict[str, AgentEvent] = {
        "text": TextDelta(text),
        "reasoning": ReasoningDelta(text),
        "call": ToolCallDelta("call_a", "f" * 64, text),
    }
    stream = new_stream(model=model, instructions="\x01" * MAX_ECHO)
    first = stream.receive([made[kind]]) if begun else b""
    data = first + stream.receive([made[kind]])
    assert max(map(len, data.split(b"\n"))) <= sse.MAX_LINE
    deltas = [event["delta"] for event in read(data) if event["type"].endswith(".delta")]
    assert "".join(deltas) == text * (2 if begun else 1)
