import json

import msgspec

from gateway.translation.responses_types import (
    ConversationId,
    Response,
    ResponsesRequest,
    StreamEvent,
    TextConfig,
    TextFormat,
    ToolChoiceObject,
)


def test_items_and_tools_are_read_later() -> None:
    body = b'{"model":"m","input":[{"any":1},2],"tools":[{"type":"new"}],"new_field":{}}'
    request = msgspec.json.decode(body, type=ResponsesRequest)
    assert [bytes(item) for item in request.input if isinstance(item, msgspec.Raw)] == [b'{"any":1}', b"2"]
    assert [bytes(tool) for tool in request.tools or ()] == [b'{"type":"new"}']


def test_choices_and_conversations_by_name_or_by_object() -> None:
    body = b'{"model":"m","input":"","tool_choice":{"type":"function","name":"f"},"conversation":{"id":"c"}}'
    request = msgspec.json.decode(body, type=ResponsesRequest)
    assert request.tool_choice == ToolChoiceObject("function", "f")
    assert request.conversation == ConversationId("c")


def test_text_format_is_echoed_without_what_it_does_not_say() -> None:
    assert msgspec.json.encode(TextConfig(TextFormat("text"))) == b'{"format":{"type":"text"}}'


def test_event_holds_what_it_is_given_and_its_number_last() -> None:
    event = StreamEvent(type="t", output_index=0, logprobs=(), delta="d", sequence_number=0)
    assert msgspec.json.encode(event) == b'{"type":"t","output_index":0,"logprobs":[],"delta":"d","sequence_number":0}'


def test_response_in_progress() -> None:
    encoded = json.loads(msgspec.json.encode(Response(id="resp_1", model="m", created_at=1, status="in_progress")))
    assert (encoded["object"], encoded["output"], encoded["usage"]) == ("response", [], None)
