import json
from typing import Any, get_args

import pytest
from hypothesis import given

from gateway.errors import TurnFailed, UpstreamTruncated
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
from gateway.translation.chat_stream import ChatStream
from gateway.translation.completion import Completion
from gateway.translation.tables import FINISH_REASONS
from tests.translation import strategies
from tests.translation.client import fold, read


def new_completion() -> Completion:
    return Completion(completion_id="chatcmpl-1", created=1_700_000_000, model="friend")


def answer(*events: AgentEvent) -> Any:
    completion = new_completion()
    for event in events:
        completion.receive([event])
    return json.loads(completion.answer())


def message(*events: AgentEvent) -> Any:
    return answer(*events)["choices"][0]["message"]


def test_whole_answer() -> None:
    assert answer(
        ReasoningDelta("H"), ReasoningDelta("m"), TextDelta("Hel"), TextDelta("lo"), Stop("end_turn"), Usage(5, 2, 1, 0)
    ) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "friend",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello",
                    "refusal": None,
                    "reasoning_content": "Hm",
                    "reasoning": "Hm",
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 2,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 1},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


def test_answer_without_reasoning_or_calls_leaves_them_out() -> None:
    assert message(TextDelta("Hi"), Stop("end_turn")) == {"role": "assistant", "content": "Hi", "refusal": None}


def test_agent_that_says_nothing() -> None:
    assert message(Stop("end_turn"))["content"] == ""


def test_two_parallel_calls_without_text() -> None:
    said = message(
        ToolCallDelta("call_a", "f", "{"),
        ToolCallDelta("call_b", "g", ""),
        ToolCallDelta("call_a", None, "}"),
        Stop("requires_approval"),
    )
    assert said["content"] is None
    assert said["tool_calls"] == [
        {"id": "call_a", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        {"id": "call_b", "type": "function", "function": {"name": "g", "arguments": ""}},
    ]


def test_text_beside_a_call_is_kept() -> None:
    said = message(TextDelta("Let me see."), ToolCallDelta("call_a", "f", "{}"), Stop("requires_approval"))
    assert said["content"] == "Let me see."


def test_what_runs_on_letta_is_not_shown() -> None:
    said = message(
        ServerToolCall("call_a", "f", "{}"), ServerToolReturn("call_a", "f", succeeded=True), Stop("tool_rule")
    )
    assert "tool_calls" not in said


@pytest.mark.parametrize("reason", get_args(StopReason))
def test_finish_reason_of_every_stop(reason: StopReason) -> None:
    assert answer(TextDelta("a"), Stop(reason))["choices"][0]["finish_reason"] == FINISH_REASONS[reason]


def test_usage_of_several_steps_is_added_up() -> None:
    assert answer(Usage(5, 2), Usage(7, 1), Stop("end_turn"))["usage"] == {
        "prompt_tokens": 12,
        "completion_tokens": 3,
        "total_tokens": 15,
    }


def test_usage_is_zero_where_letta_reports_none() -> None:
    assert answer(Stop("end_turn"))["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


def test_truncated_answer_is_an_error() -> None:
    completion = new_completion()
    completion.receive([TextDelta("Hel"), Usage(1, 1)])
    with pytest.raises(UpstreamTruncated) as raised:
        completion.answer()
    assert raised.value.should_retry is False
    assert completion.usage == Usage(1, 1)


def test_failure_is_raised_where_it_comes() -> None:
    failed = TurnFailed(should_retry=False)
    with pytest.raises(TurnFailed) as raised:
        new_completion().receive([TextDelta("Hel"), Failure(failed), Stop("end_turn")])
    assert raised.value is failed


@given(batches=strategies.turns())
def test_stream_and_whole_answer_say_the_same(batches: list[Batch]) -> None:
    stream = ChatStream(completion_id="chatcmpl-1", created=1_700_000_000, model="friend", include_usage=True)
    completion = new_completion()
    for batch in batches:
        completion.receive(batch)
    whole = json.loads(completion.answer())
    streamed = fold(read(b"".join(map(stream.receive, batches)) + stream.finish()))
    (choice,) = whole["choices"]
    assert streamed.done
    assert streamed.text == (choice["message"]["content"] or "")
    assert streamed.reasoning == choice["message"].get("reasoning", "")
    assert choice["message"].get("reasoning") == choice["message"].get("reasoning_content")
    assert [(call.id, call.name, call.arguments) for call in streamed.calls] == [
        (call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in choice["message"].get("tool_calls", [])
    ]
    assert streamed.finish_reason == choice["finish_reason"]
    assert streamed.usage == whole["usage"]
    assert stream.usage == completion.usage
