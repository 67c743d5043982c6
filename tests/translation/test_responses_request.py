from typing import Any

import msgspec
import pytest

from gateway.errors import ClientError, InvalidRequest, UnsupportedParameter
from gateway.translation.agent_turn import AgentSaid, Call, Instructed, Text, ToolResult, UserSaid
from gateway.translation.ask import Ask, Named, OutputSchema
from gateway.translation.responses_names import FunctionName
from gateway.translation.responses_request import (
    ask_of,
    conversation_of,
    decode,
    echo_of,
    namespaced,
    references,
    said_of,
)
from gateway.translation.responses_types import EchoedConversation, ResponsesRequest, TextConfig, TextFormat

SCHEMA = {"type": "object", "properties": {"q": {"type": "string"}}}
HI = UserSaid((Text("Hi"),))


def body(**fields: Any) -> bytes:
    return msgspec.json.encode({"model": "friend", "input": "Hi"} | fields)


def request(**fields: Any) -> ResponsesRequest:
    return decode(body(**fields))


def ask(**fields: Any) -> Ask:
    return ask_of(request(**fields))


def refused(**fields: Any) -> ClientError:
    with pytest.raises((InvalidRequest, UnsupportedParameter)) as raised:
        ask(**fields)
    return raised.value


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "name": name, "parameters": SCHEMA}


# What is asked -------------------------------------------------------------------------------------------------------


def test_text_alone() -> None:
    assert ask() == Ask(model="friend", transcript=(HI,), wants_usage=True)


def test_instructions_stand_before_what_was_said() -> None:
    before = (UserSaid((Text("Hello"),)), AgentSaid("Hello."))
    asked = ask_of(request(instructions="Be kind."), before=before)
    assert asked.transcript == (Instructed("Be kind."), *before, HI)
    assert said_of(request(instructions="Be kind.")) == (HI,)


@pytest.mark.parametrize("blank", ["", "  ", None])
def test_blank_instructions(blank: str | None) -> None:
    assert ask(instructions=blank).transcript == (HI,)


def test_everything_at_once() -> None:
    asked = ask(
        stream=True,
        stream_options={"include_obfuscation": False},
        tools=[tool("f"), {"type": "web_search"}],
        tool_choice={"type": "function", "name": "f"},
        parallel_tool_calls=False,
        metadata={"chat_id": "7"},
    )
    assert (asked.is_stream, asked.parallel_calls, asked.tool_choice, asked.chat) == (True, False, Named("f"), "7")
    assert [tool.name for tool in asked.tools] == ["f"]


def test_what_coding_agents_send() -> None:
    """As codex 0.169 does: no instructions, its own ids, namespaces, reasoning sent back."""
    asked = request(
        input=[
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be careful."}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}], "id": "msg_a"},
            {"type": "reasoning", "id": "rs_1_0", "summary": [], "content": None, "encrypted_content": None},
            {"type": "function_call", "name": "send", "namespace": "mail", "arguments": "{}", "call_id": "a"},
            {"type": "function_call_output", "call_id": "a", "output": "sent", "id": "fco_a"},
        ],
        stream=True,
        store=False,
        include=["reasoning.encrypted_content"],
        reasoning={"summary": "auto", "effort": None},
        prompt_cache_key="thread",
        client_metadata={"any": {"thing": 1}},
        tool_choice="auto",
        parallel_tool_calls=False,
        tools=[
            tool("shell"),
            {"type": "namespace", "name": "mail", "description": "Mail", "tools": [tool("send")]},
            {"type": "web_search", "external_web_access": False},
        ],
    )
    assert ask_of(asked).transcript == (
        Instructed("Be careful."),
        HI,
        AgentSaid("", (Call("a", "mail__send", "{}"),)),
        ToolResult("a", "sent"),
    )
    assert [tool.name for tool in ask_of(asked).tools] == ["shell", "mail__send"]
    assert namespaced(asked) == {"mail__send": FunctionName("mail", "send")}
    assert asked.store is False


@pytest.mark.parametrize("named", ["conv_1", {"id": "conv_1"}])
def test_conversation_is_the_chat(named: Any) -> None:
    asked = request(conversation=named, metadata={"chat_id": "7"})
    assert conversation_of(asked) == "conv_1"
    assert ask_of(asked).chat == "conversation:conv_1"
    assert echo_of(asked).conversation == EchoedConversation("conv_1")


def test_references_are_named_and_resolved() -> None:
    asked = request(input=[{"type": "item_reference", "id": "msg_1_0"}, {"role": "user", "content": "Hi"}])
    assert references(asked) == ("msg_1_0",)
    assert references(request()) == ()
    with pytest.raises(InvalidRequest, match="Item with id 'msg_1_0' not found"):
        ask_of(asked)


@pytest.mark.parametrize(
    ("text", "output"),
    [
        (None, None),
        ({"verbosity": "low"}, None),
        ({"format": {"type": "text"}}, None),
        ({"format": {"type": "json_object"}}, OutputSchema()),
    ],
)
def test_output_without_a_schema(text: Any, output: OutputSchema | None) -> None:
    assert ask(text=text).output == output


def test_output_of_a_schema() -> None:
    asked = {"type": "json_schema", "name": "n", "description": "d", "schema": SCHEMA, "strict": True}
    output = ask(text={"format": asked}).output
    assert output is not None
    assert (output.name, output.description) == ("n", "d")
    assert output.schema is not None
    assert msgspec.json.decode(output.schema) == SCHEMA


# The echo ------------------------------------------------------------------------------------------------------------


def test_echo_of_a_short_request() -> None:
    echo = echo_of(request())
    assert (echo.model, echo.store, echo.truncation, echo.metadata) == ("friend", True, "disabled", {})
    assert echo.text == TextConfig(TextFormat("text"))


def test_echo_repeats_tools_as_they_came() -> None:
    tools = [tool("f"), {"type": "web_search", "any": [1]}]
    assert [msgspec.json.decode(one) for one in echo_of(request(tools=tools)).tools] == tools


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
    ],
)
def test_what_an_agent_cannot_do_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refused(**fields)
    assert isinstance(error, UnsupportedParameter)
    assert (error.param, error.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": ""}, "model", "invalid_value"),
        ({"model": "x" * 513}, "model", "invalid_value"),
        ({"model": 3}, "model", "invalid_type"),
        ({"input": None}, "input", "invalid_type"),
        ({"input": 3}, "input", "invalid_type"),
        ({"input": ""}, "input", "invalid_value"),
        ({"input": "\0"}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [{"role": "user", "content": 3}]}, "input[0].content", "invalid_type"),
        ({"instructions": 3}, "instructions", "invalid_type"),
        ({"instructions": "\0"}, "instructions", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream_options": {}}, "stream_options", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"truncation": "some"}, "truncation", "invalid_value"),
        ({"tools": [tool("a" * 65)]}, "tools[0].name", "string_above_max_length"),
        ({"tools": {}}, "tools", "invalid_type"),
        ({"tool_choice": "f"}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "invalid_value"),
        ({"tool_choice": {}}, "tool_choice.type", "missing_required_parameter"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_value"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name", "missing_required_parameter"),
        (
            {"text": {"format": {"type": "json_schema", "name": "n"}}},
            "text.format.schema",
            "missing_required_parameter",
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": 3}}}},
            "text.format.schema",
            "invalid_function_parameters",
        ),
        ({"metadata": {"a": 3}}, "metadata[...]", "invalid_type"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "invalid_value"),
        ({"conversation": ""}, "conversation", "invalid_value"),
        ({"conversation": {}}, "conversation.id", "missing_required_parameter"),
        ({"previous_response_id": "x" * 513}, "previous_response_id", "invalid_value"),
        (
            {"previous_response_id": "resp_1", "conversation": "conv_1"},
            "previous_response_id",
            "mutually_exclusive_parameters",
        ),
    ],
)
def test_fault_is_named(fields: dict[str, Any], param: str, code: str) -> None:
    error = refused(**fields)
    assert (error.param, error.code) == (param, code)


@pytest.mark.parametrize("missing", ["model", "input"])
def test_missing_field(missing: str) -> None:
    fields = {"model": "friend", "input": "Hi"}
    del fields[missing]
    with pytest.raises(InvalidRequest) as raised:
        decode(msgspec.json.encode(fields))
    assert raised.value.message == f"Missing required parameter: '{missing}'."


def test_nested_too_deeply() -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    with pytest.raises(InvalidRequest) as raised:
        decode(b'{"model":"friend","input":"Hi","prompt":' + deep + b"}")
    assert raised.value.code == "invalid_json"
