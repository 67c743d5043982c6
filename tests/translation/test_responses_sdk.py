"""What OpenAI's own SDK makes of the answers: its decoder, its accumulator, its types."""

from collections.abc import Iterator, Sequence
from typing import Any

import httpx2
import openai
import pydantic
import pytest
from openai.types.responses import (
    ParsedResponse,
    Response,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseReasoningItem,
)
from openai.types.responses.response_output_item import McpCall

from gateway.errors import TurnFailed
from gateway.translation.agent_events import (
    Batch,
    ReasoningDelta,
    ServerToolCall,
    ServerToolReturn,
    Stop,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from gateway.translation.responses_answer import ResponseAnswer
from gateway.translation.responses_request import ask_of, decode, echo_of, namespaced
from gateway.translation.responses_stream import ResponsesStream

FAILED = TurnFailed("The run failed. Try again.", should_retry=False)
DONE: Batch = [Stop("end_turn"), Usage(5, 2)]


class Weather(pydantic.BaseModel):
    city: str
    degrees: int


class Exchange:
    """A server in memory that translates for real: each request is read, and the turn answers it."""

    def __init__(self, batches: list[Batch], *, fails: bool = False) -> None:
        self._batches = batches
        self._fails = fails

    def __call__(self, sent: httpx2.Request) -> httpx2.Response:
        request = decode(sent.content)
        ask = ask_of(request)
        parts: dict[str, Any] = {
            "response_id": "resp_1",
            "created": 1_700_000_000,
            "echo": echo_of(request),
            "tool_activity": True,
            "namespaced": namespaced(request),
        }
        if ask.is_stream:
            stream = ResponsesStream(**parts)
            return httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, content=self._told(stream))
        answer = ResponseAnswer(**parts)
        for batch in self._batches:
            answer.receive(batch)
        return httpx2.Response(200, headers={"Content-Type": "application/json"}, content=answer.answer())

    def _told(self, stream: ResponsesStream) -> Iterator[bytes]:
        for batch in self._batches:
            yield stream.receive(batch)
        yield stream.fail(FAILED) if self._fails else stream.finish()


def client(*batches: Batch, fails: bool = False) -> openai.OpenAI:
    transport = httpx2.MockTransport(Exchange(list(batches), fails=fails))
    return openai.OpenAI(
        api_key="sk-test", base_url="http://gateway/v1", http_client=httpx2.Client(transport=transport), max_retries=0
    )


def streamed(*batches: Batch, **asked: Any) -> ParsedResponse[Any]:
    with client(*batches) as sdk, sdk.responses.stream(model="friend", input="Hi", **asked) as stream:
        return stream.get_final_response()


def whole(*batches: Batch, **asked: Any) -> Response:
    with client(*batches) as sdk:
        response: Response = sdk.responses.create(model="friend", input="Hi", **asked)
        return response


def assert_typed(answered: pydantic.BaseModel) -> None:
    """Every field is there and of the type that the SDK says, which does not look itself."""
    type(answered).model_validate_json(answered.model_dump_json(exclude_unset=True, by_alias=True, warnings=False))


TURN: list[Batch] = [
    [ReasoningDelta("H")],
    [ReasoningDelta("m"), ServerToolCall("s", "archival_search", "{}")],
    [ServerToolReturn("s", "archival_search", succeeded=True), TextDelta("Hel")],
    [TextDelta("lo"), ToolCallDelta("call_a", "f", '{"a":'), ToolCallDelta("call_b", "g", "")],
    [ToolCallDelta("call_b", None, "{}"), ToolCallDelta("call_a", None, "1}")],
    [Stop("requires_approval"), Usage(5, 2, 3, 1)],
]


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize(
    ("pieces", "given"),
    [(('{"inp', 'ut": "a\\n"}'), "a\n"), (("no ", "JSON"), "no JSON"), (('{"input": 5}',), '{"input": 5}')],
)
def test_custom_tool_is_called_with_a_text(pieces: Sequence[str], given: str, *, is_stream: bool) -> None:
    tools: Any = [{"type": "custom", "name": "f"}]
    calls: list[Batch] = [
        [ToolCallDelta("call_a", "f" if not index else None, text)] for index, text in enumerate(pieces)
    ]
    end: Batch = [Stop("requires_approval")]
    response = streamed(*calls, end, tools=tools) if is_stream else whole(*calls, end, tools=tools)
    (called,) = response.output
    assert called.type == "custom_tool_call"
    assert (called.call_id, called.name, called.input) == ("call_a", "f", given)
    assert_typed(called)


@pytest.mark.parametrize("is_stream", [True, False])
def test_whole_turn(*, is_stream: bool) -> None:
    response = streamed(*TURN) if is_stream else whole(*TURN)
    reasoning, searched, message, first, second = response.output
    assert isinstance(reasoning, ResponseReasoningItem)
    assert [part.text for part in reasoning.summary] == ["Hm"]
    assert isinstance(searched, McpCall)
    assert (searched.name, searched.status, searched.error) == ("archival_search", "completed", None)
    assert isinstance(message, ResponseOutputMessage)
    assert isinstance(first, ResponseFunctionToolCall)
    assert isinstance(second, ResponseFunctionToolCall)
    assert (first.call_id, first.name, first.arguments) == ("call_a", "f", '{"a":1}')
    assert (second.call_id, second.name, second.arguments) == ("call_b", "g", "{}")
    assert response.output_text == "Hello"
    assert response.status == "completed"
    assert response.usage is not None
    assert (response.usage.total_tokens, response.usage.input_tokens_details.cached_tokens) == (7, 3)
    assert_typed(response)


def test_each_event_is_of_the_sdks_types() -> None:
    with client(*TURN) as sdk, sdk.responses.create(model="friend", input="Hi", stream=True) as stream:
        events = list(stream)
    for event in events:
        assert_typed(event)
    assert events[-1].type == "response.completed"


def test_deltas_accumulate() -> None:
    sdk = client([TextDelta("Hel")], [TextDelta("lo")], DONE)
    with sdk, sdk.responses.stream(model="friend", input="Hi") as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
    assert snapshots == ["Hel", "Hello"]


def test_structured_output_is_parsed() -> None:
    said: list[Batch] = [[TextDelta('{"city":"Rome",')], [TextDelta('"degrees":21}')], DONE]
    assert streamed(*said, text_format=Weather).output_parsed == Weather(city="Rome", degrees=21)
    with client(*said) as sdk:
        parsed = sdk.responses.parse(model="friend", input="Hi", text_format=Weather)
    assert parsed.output_parsed == Weather(city="Rome", degrees=21)


def test_arguments_of_strict_tools_are_parsed() -> None:
    response = streamed(
        [ToolCallDelta("call_a", "Weather", '{"city":"Rome","degrees":21}'), Stop("requires_approval")],
        tools=[{"type": "function", **openai.pydantic_function_tool(Weather)["function"]}],
    )
    (call,) = response.output
    assert call.type == "function_call"
    assert call.parsed_arguments == {"city": "Rome", "degrees": 21}


def test_incomplete_response() -> None:
    said: list[Batch] = [[TextDelta("Hel")], [Stop("max_tokens_exceeded")]]
    with client(*said) as sdk, sdk.responses.create(model="friend", input="Hi", stream=True) as stream:
        *_, last = stream
    assert last.type == "response.incomplete"
    response = whole(*said)
    assert response == last.response
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == "Hel"
    assert_typed(response)


@pytest.mark.parametrize("said", [[], [[TextDelta("Hel")]]])
def test_failed_response(said: list[Batch]) -> None:
    with client(*said, fails=True) as sdk, sdk.responses.create(model="friend", input="Hi", stream=True) as stream:
        *_, last = stream
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert last.response.error.message == FAILED.message
    assert last.response.output_text == ("Hel" if said else "")
    assert_typed(last.response)


def test_stream_helper_does_not_complete_a_failed_response() -> None:
    with client([TextDelta("Hel")], fails=True) as sdk, sdk.responses.stream(model="friend", input="Hi") as stream:
        told = [event.type for event in stream]
        assert told[-1] == "response.failed"
        with pytest.raises(RuntimeError, match=r"response\.completed"):
            stream.get_final_response()


def test_request_is_echoed() -> None:
    tools: Any = [
        {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": True},
        {"type": "web_search"},
    ]
    response = whole(
        [TextDelta("Hi")],
        DONE,
        tools=tools,
        tool_choice={"type": "function", "name": "f"},
        instructions="Be kind.",
        metadata={"chat_id": "1"},
        reasoning={"effort": "low", "summary": "auto"},
        temperature=0.5,
        max_output_tokens=100,
        previous_response_id="resp_0",
        store=False,
        parallel_tool_calls=False,
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}, "verbosity": "low"},
    )
    assert [tool.type for tool in response.tools] == ["function", "web_search"]
    assert response.to_dict()["tool_choice"] == {"type": "function", "name": "f"}
    assert (response.instructions, response.metadata) == ("Be kind.", {"chat_id": "1"})
    assert (response.temperature, response.max_output_tokens) == (0.5, 100)
    assert (response.previous_response_id, response.parallel_tool_calls) == ("resp_0", False)
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.type == "json_schema"
    assert_typed(response)
