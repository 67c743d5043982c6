import json
from typing import Any, get_args

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
    StopReason,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from gateway.translation.chat_stream import MAX_TEXT, ChatStream
from gateway.translation.request import MAX_MODEL_LENGTH
from tests.translation import strategies
from tests.translation.client import DONE, fold, lines, read

FAILED = TurnFailed("The run failed. Try again.", should_retry=False)


def new_stream(*, include_usage: bool = False, model: str = "friend") -> ChatStream:
    return ChatStream(completion_id="chatcmpl-1", created=1_700_000_000, model=model, include_usage=include_usage)


def chunks(*events: AgentEvent, include_usage: bool = False) -> list[Any]:
    """What a client reads of these events, fed one batch each, without the end."""
    stream = new_stream(include_usage=include_usage)
    return read(b"".join(stream.receive([event]) for event in events))


def deltas(*events: AgentEvent) -> list[Any]:
    return [chunk["choices"][0]["delta"] for chunk in chunks(*events)]


# The envelope --------------------------------------------------------------------------------------------------------


def test_a_chunk_to_the_byte() -> None:
    stream = new_stream()
    first, second = lines(stream.receive([TextDelta("Hel"), TextDelta('l"o')]))
    head = (
        b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"friend",'
        b'"choices":[{"index":0,"delta":'
    )
    assert first == head + b'{"role":"assistant","content":"Hel"},"logprobs":null,"finish_reason":null}]}'
    assert second == head + b'{"content":"l\\"o"},"logprobs":null,"finish_reason":null}]}'


@pytest.mark.parametrize(
    ("event", "delta"),
    [
        (TextDelta("Hi"), {"role": "assistant", "content": "Hi"}),
        (ReasoningDelta("Hm"), {"role": "assistant", "reasoning_content": "Hm", "reasoning": "Hm"}),
        (
            ToolCallDelta("call_a", "f", ""),
            {
                "role": "assistant",
                "tool_calls": [
                    {"index": 0, "id": "call_a", "type": "function", "function": {"name": "f", "arguments": ""}}
                ],
            },
        ),
        (Stop("end_turn"), {"role": "assistant"}),
    ],
)
def test_role_rides_with_the_first_delta_whatever_it_is(event: AgentEvent, delta: dict[str, Any]) -> None:
    first, *later = deltas(event, event, TextDelta("more"), ReasoningDelta("more"))
    assert first == delta
    assert all("role" not in other for other in later)


def test_role_waits_for_the_first_event_that_is_shown() -> None:
    shown = chunks(Usage(1, 1), ServerToolCall("call_a", "f", "{}"), TextDelta("Hi"))
    assert [chunk["choices"][0]["delta"] for chunk in shown] == [{"role": "assistant", "content": "Hi"}]


def test_one_chunk_per_event() -> None:
    stream = new_stream()
    batch: Batch = [
        TextDelta("a"),
        ReasoningDelta("b"),
        TextDelta("c"),
        ToolCallDelta("call_a", "f", "{"),
        TextDelta(""),
    ]
    assert len(read(stream.receive(batch))) == stream.chunks == len(batch)


def test_id_created_and_model_are_the_same_in_every_chunk() -> None:
    stream = new_stream(include_usage=True)
    events = read(
        stream.receive([TextDelta("a"), ReasoningDelta("b"), ToolCallDelta("c", "f", "{}"), TextDelta("d" * 20_000)])
        + stream.receive([Stop("end_turn"), Usage(1, 2)])
        + stream.finish()
    )
    assert events.pop() == DONE
    assert {(e["id"], e["created"], e["model"], e["object"]) for e in events} == {
        ("chatcmpl-1", 1_700_000_000, "friend", "chat.completion.chunk")
    }
    assert all(
        set(choice) == {"index", "delta", "logprobs", "finish_reason"} for e in events for choice in e["choices"]
    )


def test_model_name_that_needs_escapes() -> None:
    name = '"\\ né 😀 "content":"'
    stream = new_stream(model=name)
    events = read(stream.receive([TextDelta("a"), TextDelta("b"), ReasoningDelta("c"), ReasoningDelta("d")]))
    assert {event["model"] for event in events} == {name}
    assert fold(events).text == "ab"


def test_batch_of_which_nothing_is_shown() -> None:
    stream = new_stream()
    assert stream.receive([]) == b""
    assert (
        stream.receive([ServerToolCall("a", "f", "{}"), ServerToolReturn("a", "f", succeeded=True), Usage(1, 1)]) == b""
    )
    assert stream.chunks == 0


# Text, reasoning, tool calls -----------------------------------------------------------------------------------------


def test_reasoning_goes_out_under_both_names() -> None:
    assert deltas(TextDelta("x"), ReasoningDelta("think"))[1] == {"reasoning_content": "think", "reasoning": "think"}


def test_text_whose_json_looks_like_the_templates_hole() -> None:
    texts = ["\x00", '"\x00"', "\\u0000", '"\\u0000"']
    assert [d["content"] for d in deltas(TextDelta("first"), *map(TextDelta, texts))][1:] == texts
    thought = [d["reasoning"] for d in deltas(ReasoningDelta("first"), *map(ReasoningDelta, texts))]
    assert thought[1:] == texts


def test_tool_call_in_fragments() -> None:
    first, second, third = (
        delta["tool_calls"]
        for delta in deltas(
            ToolCallDelta("call_a", "get_weather", ""),
            ToolCallDelta("call_a", None, '{"city'),
            ToolCallDelta("call_a", "get_weather", '": 1}'),
        )
    )
    assert first == [
        {"index": 0, "id": "call_a", "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    ]
    assert second == [{"index": 0, "function": {"arguments": '{"city'}}]
    assert third == [{"index": 0, "function": {"arguments": '": 1}'}}]


def test_two_parallel_calls_with_fragments_interleaved() -> None:
    events = chunks(
        ToolCallDelta("call_a", "f", "{"),
        ToolCallDelta("call_b", "g", "["),
        ToolCallDelta("call_a", None, "}"),
        ToolCallDelta("call_b", None, "]"),
    )
    assert [event["choices"][0]["delta"]["tool_calls"][0]["index"] for event in events] == [0, 1, 0, 1]
    assert [(call.id, call.name, call.arguments) for call in fold(events).calls] == [
        ("call_a", "f", "{}"),
        ("call_b", "g", "[]"),
    ]


def test_call_without_a_name() -> None:
    (delta,) = deltas(ToolCallDelta("call_a", None, "{}"))
    assert delta["tool_calls"][0]["function"] == {"name": "", "arguments": "{}"}


def test_long_arguments_are_split_and_named_once() -> None:
    arguments = json.dumps({"text": "é" * 3 * MAX_TEXT}, ensure_ascii=False)
    fragments = [delta["tool_calls"][0] for delta in deltas(ToolCallDelta("call_a", "f", arguments))]
    assert len(fragments) == 4
    assert ["type" in fragment for fragment in fragments] == [True, False, False, False]
    assert ["name" in fragment["function"] for fragment in fragments] == [True, False, False, False]
    assert "".join(fragment["function"]["arguments"] for fragment in fragments) == arguments


# The end -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "finish"),
    [
        ("end_turn", "stop"),
        ("tool_rule", "stop"),
        ("no_tool_call", "stop"),
        ("max_steps", "length"),
        ("max_tokens_exceeded", "length"),
        ("requires_approval", "tool_calls"),
        ("refusal", "content_filter"),
    ],
)
def test_finish_reason_of_every_stop(stop: StopReason, finish: str) -> None:
    text, end = chunks(TextDelta("a"), Stop(stop))
    assert text["choices"][0]["finish_reason"] is None
    assert end["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": finish}


def test_whole_stream() -> None:
    stream = new_stream()
    events = read(stream.receive([TextDelta("Hi"), Stop("end_turn")]) + stream.finish())
    assert events[-1] == DONE
    assert fold(events).finish_reason == "stop"
    assert all("usage" not in event for event in events[:-1])


def test_usage_chunk_only_when_asked() -> None:
    stream = new_stream(include_usage=True)
    events = read(stream.receive([TextDelta("Hi"), Usage(5, 2, None, 1), Stop("end_turn")]))
    assert [event["usage"] for event in events] == [None, None]
    assert stream.receive([Usage(5, 2, 3)]) == b""
    usage, done = read(stream.finish())
    assert done == DONE
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 4,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 1},
    }


def test_usage_asked_for_and_not_reported() -> None:
    stream = new_stream(include_usage=True)
    stream.receive([Stop("end_turn")])
    usage, _ = read(stream.finish())
    assert usage["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


@pytest.mark.parametrize("batches", [[], [[TextDelta("Hel")]], [[TextDelta("Hello"), Usage(1, 1)]]])
def test_truncated_stream_is_never_a_stop(batches: list[Batch]) -> None:
    stream = new_stream()
    said = b"".join(map(stream.receive, batches))
    with pytest.raises(UpstreamTruncated) as raised:
        stream.finish()
    assert raised.value.should_retry is False
    events = read(said + stream.fail(raised.value))
    assert fold(events).finish_reason is None
    assert events[-1] == {
        "error": {
            "message": raised.value.message,
            "type": "server_error",
            "param": None,
            "code": "upstream_stream_truncated",
        }
    }


def test_failure_ends_what_is_shown() -> None:
    stream = new_stream()
    shown = read(stream.receive([TextDelta("Hel"), Failure(FAILED), TextDelta("lo"), Stop("end_turn")]))
    assert fold(shown).text == "Hel"
    assert stream.error is FAILED
    with pytest.raises(UpstreamTruncated):
        stream.finish()
    assert read(stream.fail(FAILED)) == [{"error": json.loads(FAILED.body())["error"]}]


# Properties ----------------------------------------------------------------------------------------------------------


@given(
    text=strategies.long_text,
    kind=st.sampled_from(["text", "reasoning", "call"]),
    begun=st.booleans(),
    model=st.sampled_from(["\x01", "😀", "é"]).map(lambda letter: letter * MAX_MODEL_LENGTH),
)
def test_no_line_is_too_long_and_the_text_comes_whole(*, text: str, kind: str, begun: bool, model: str) -> None:
    made: dict[str, AgentEvent] = {
        "text": TextDelta(text),
        "reasoning": ReasoningDelta(text),
        "call": ToolCallDelta("call_a", "f" * 64, text),
    }
    stream = new_stream(include_usage=True, model=model)
    if begun:
        stream.receive([TextDelta("begun")])
    said = stream.receive([made[kind]])
    assert max(map(len, lines(said))) < sse.MAX_LINE
    folded = fold(read(said))
    assert text == (folded.text or folded.reasoning or folded.calls[0].arguments)


def test_the_costliest_text_fills_the_line_and_no_more() -> None:
    stream = new_stream(include_usage=True, model="\x01" * MAX_MODEL_LENGTH)
    longest = max(map(len, lines(stream.receive([ReasoningDelta("\x01" * 3 * MAX_TEXT)]))))
    assert 0.9 * sse.MAX_LINE < longest < sse.MAX_LINE


@given(batches=strategies.turns(), include_usage=st.booleans())
def test_batches_do_not_change_what_is_said(*, batches: list[Batch], include_usage: bool) -> None:
    cut, whole = new_stream(include_usage=include_usage), new_stream(include_usage=include_usage)
    events = [event for batch in batches for event in batch]
    assert b"".join(map(cut.receive, batches)) + cut.finish() == whole.receive(events) + whole.finish()
    assert cut.chunks == whole.chunks


def test_every_stop_reason_is_tried_above() -> None:
    tried = {case[0] for case in test_finish_reason_of_every_stop.pytestmark[0].args[1]}  # type: ignore[attr-defined]
    assert tried == set(get_args(StopReason))
