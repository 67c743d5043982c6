import json
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import ClientError, InvalidRequest, UnsupportedParameter
from gateway.translation.agent_turn import (
    AgentSaid,
    Call,
    ClientTool,
    ImageData,
    ImageUrl,
    Instructed,
    Part,
    Said,
    Text,
    ToolResult,
    UserSaid,
)
from gateway.translation.ask import GO_ON, Ask, Named, OutputSchema
from gateway.translation.content import LEFT_OUT
from gateway.translation.openai_types import ChatCompletionRequest
from gateway.translation.request import MAX_MODEL_LENGTH, MOST_MESSAGES, ask_of, decode
from gateway.translation.tools import NO_PARAMETERS

USER = {"role": "user", "content": "Hi"}
HI = UserSaid((Text("Hi"),))


def asked(**changes: Any) -> Ask:
    """What is asked by a plain request with these fields changed."""
    return ask_of(decode(json.dumps({"model": "friend", "messages": [USER], **changes}).encode()))


def transcript(*messages: Any) -> tuple[Said, ...]:
    return asked(messages=messages).transcript


def says(content: Any) -> tuple[Part, ...]:
    (said,) = transcript({"role": "user", "content": content})
    assert isinstance(said, UserSaid)
    return said.content


def refusal(**changes: Any) -> ClientError:
    with pytest.raises(ClientError) as raised:
        asked(**changes)
    return raised.value


def outcome(error: ClientError) -> tuple[int, str | None, str | None]:
    return error.status, error.code, error.param


def function(name: str = "get_weather", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


# Fields --------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, list[Any]] = {
    "n": [2, 128],
    "logprobs": [True],
    "top_logprobs": [1, 20],
    "stop": ["END", ["a"], ["a", "b", "c", "d", "e"]],
    "modalities": [["audio"], ["text", "audio"], []],
    "audio": [{"voice": "alloy", "format": "wav"}],
    "prediction": [{"type": "content", "content": "x"}],
    "web_search_options": [{}, {"search_context_size": "low"}],
}
"""What an agent cannot do: 400 ``unsupported_parameter`` that names the field."""

HARMLESS: dict[str, list[Any]] = {
    "n": [1],
    "logprobs": [False],
    "top_logprobs": [0],
    "stop": ["", []],
    "modalities": [["text"]],
}
"""Values of refused fields that ask for nothing."""

IGNORED: dict[str, list[Any]] = {
    "temperature": [0, 0.7, 2],
    "top_p": [0, 1],
    "frequency_penalty": [-2, 2],
    "presence_penalty": [-2, 2],
    "logit_bias": [{}, {"50256": -100}],
    "seed": [-1, 10**30],
    "max_tokens": [1, 10**12],
    "max_completion_tokens": [1],
    "reasoning_effort": ["low"],
    "verbosity": ["low"],
    "service_tier": ["auto"],
    "store": [True],
    "user": ["anna"],
    "safety_identifier": ["anna"],
    "prompt_cache_key": ["x"],
}
"""What the agent's own configuration decides: taken and ignored."""

USED: dict[str, list[Any]] = {
    "stream": [False],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "parallel_tool_calls": [True],
    "response_format": [{"type": "text"}],
    "metadata": [{}, {"chat": "7"}],
}
"""What changes the turn or the answer, with values that ask for nothing."""

PLAIN = Ask(model="friend", transcript=(HI,))


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={value}") for name, values in table.items() for value in values]


def test_every_field_has_a_rule() -> None:
    assert set(ChatCompletionRequest.__struct_fields__) == {
        "model",
        "messages",
        "stream_options",
        *USED,
        *REFUSED,
        *IGNORED,
    }
    assert not set(REFUSED) & set(IGNORED)


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_what_an_agent_cannot_do_is_refused_by_name(name: str, value: Any) -> None:
    error = refusal(**{name: value})
    assert isinstance(error, UnsupportedParameter)
    assert outcome(error) == (400, "unsupported_parameter", name)
    assert error.message.startswith(f"Unsupported parameter: '{name}'. ")


@pytest.mark.parametrize(
    ("name", "value"),
    cases(HARMLESS) + cases(IGNORED) + cases(USED) + cases({name: [None] for name in (*REFUSED, *IGNORED, *USED)}),
)
def test_what_changes_nothing_is_taken(name: str, value: Any) -> None:
    expected = msgspec.structs.replace(PLAIN, tool_choice="none") if value == "none" else PLAIN
    assert asked(**{name: value}) == expected


def test_fields_that_nobody_knows_are_ignored() -> None:
    assert asked(chat_id="7", session={"a": [1]}) == PLAIN


@pytest.mark.parametrize(
    ("changes", "code", "param", "message"),
    [
        ({"n": 0}, "invalid_value", "n", "Invalid value for 'n': expected 'int' >= 1."),
        ({"n": 129}, "invalid_value", "n", "Invalid value for 'n': expected 'int' <= 128."),
        ({"n": "1"}, "invalid_type", "n", "Invalid type for 'n': expected 'int | null', got 'str'."),
        (
            {"temperature": 3},
            "invalid_value",
            "temperature",
            "Invalid value for 'temperature': expected 'float' <= 2.0.",
        ),
        ({"temperature": "hot"}, "invalid_type", "temperature", None),
        ({"top_p": 1.5}, "invalid_value", "top_p", None),
        ({"frequency_penalty": -3}, "invalid_value", "frequency_penalty", None),
        ({"max_tokens": 0}, "invalid_value", "max_tokens", None),
        ({"max_tokens": -1}, "invalid_value", "max_tokens", None),
        ({"max_completion_tokens": 1.5}, "invalid_type", "max_completion_tokens", None),
        ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias[...]", None),
        ({"logit_bias": [1]}, "invalid_type", "logit_bias", None),
        ({"top_logprobs": 21}, "invalid_value", "top_logprobs", None),
        ({"stop": [1]}, "invalid_type", "stop[0]", None),
        ({"stream": "yes"}, "invalid_type", "stream", "Invalid type for 'stream': expected 'bool | null', got 'str'."),
        ({"stream": True, "stream_options": []}, "invalid_type", "stream_options", None),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "invalid_type",
            "stream_options.include_usage",
            None,
        ),
        (
            {"stream_options": {"include_usage": True}},
            "invalid_value",
            "stream_options",
            "The 'stream_options' parameter is only allowed when 'stream' is true.",
        ),
        ({"stream": False, "stream_options": {}}, "invalid_value", "stream_options", None),
        (
            {"response_format": {"type": "yaml"}},
            "invalid_value",
            "response_format.type",
            "Invalid value for 'response_format.type': invalid enum value 'yaml'.",
        ),
        (
            {"response_format": {}},
            "missing_required_parameter",
            "response_format.type",
            "Missing required parameter: 'response_format.type'.",
        ),
        ({"metadata": {"a": 1}}, "invalid_type", "metadata[...]", None),
        ({"parallel_tool_calls": "no"}, "invalid_type", "parallel_tool_calls", None),
        ({"user": 7}, "invalid_type", "user", None),
        ({"model": None}, "invalid_type", "model", "Invalid type for 'model': expected 'str', got 'null'."),
        ({"model": 7}, "invalid_type", "model", None),
        ({"model": ""}, "invalid_value", "model", None),
        ({"model": "x" * (MAX_MODEL_LENGTH + 1)}, "invalid_value", "model", None),
    ],
)
def test_field_of_a_wrong_type_or_range(changes: dict[str, Any], code: str, param: str, message: str | None) -> None:
    error = refusal(**changes)
    assert isinstance(error, InvalidRequest)
    assert outcome(error) == (400, code, param)
    assert message is None or error.message == message


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_missing_field(missing: str) -> None:
    body = {"model": "friend", "messages": []}
    del body[missing]
    with pytest.raises(InvalidRequest) as raised:
        decode(json.dumps(body).encode())
    assert outcome(raised.value) == (400, "missing_required_parameter", missing)
    assert raised.value.message == f"Missing required parameter: '{missing}'."


@pytest.mark.parametrize("body", ["null", "[]", "7", '"x"', "true"])
def test_body_that_is_no_object(body: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        decode(body.encode())
    assert outcome(raised.value) == (400, "invalid_type", None)


def test_body_that_is_nested_too_deeply() -> None:
    body = b'{"model":"friend","messages":[],"x":%b%b}'
    assert decode(body % (b"[" * 100, b"]" * 100)).model == "friend"
    with pytest.raises(InvalidRequest) as raised:
        decode(body % (b"[" * 100_000, b"]" * 100_000))
    assert outcome(raised.value) == (400, "invalid_json", None)


def test_what_a_message_quotes_is_bounded_and_cannot_pose_as_a_path() -> None:
    error = refusal(messages=[{"role": "evil` - at `$.model", "content": "Hi"}])
    assert error.param == "messages[0].role"
    long = refusal(messages=[{"role": "x" * 100_000, "content": "Hi"}])
    assert long.param == "messages[0].role"
    assert len(long.message) < 300


# The answer's form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "is_stream", "wants_usage"),
    [
        ({}, False, False),
        ({"stream": True}, True, False),
        ({"stream": True, "stream_options": None}, True, False),
        ({"stream": True, "stream_options": {}}, True, False),
        ({"stream": True, "stream_options": {"include_usage": False}}, True, False),
        ({"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}, True, True),
    ],
)
def test_stream_and_its_usage(changes: dict[str, Any], is_stream: bool, wants_usage: bool) -> None:  # noqa: FBT001
    ask = asked(**changes)
    assert (ask.is_stream, ask.wants_usage) == (is_stream, wants_usage)


def test_chat_and_task_of_the_metadata() -> None:
    ask = asked(metadata={"chat_id": "c-1", "task": "title_generation", "more": "x"})
    assert (ask.chat, ask.task) == ("c-1", "title_generation")
    assert (asked(metadata={"chat": "c-1"}).chat, asked(metadata={}).task) == (None, None)


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def test_answer_of_a_schema() -> None:
    described = {"name": "count", "description": "How many", "strict": True, "schema": SCHEMA}
    output = asked(response_format={"type": "json_schema", "json_schema": described}).output
    assert output is not None
    assert output.schema is not None
    assert (output.name, output.description, json.loads(bytes(output.schema))) == ("count", "How many", SCHEMA)


@pytest.mark.parametrize("described", [{"name": "count"}, {"name": "count", "schema": None, "description": None}])
def test_answer_of_a_schema_that_is_left_open(described: dict[str, Any]) -> None:
    assert asked(response_format={"type": "json_schema", "json_schema": described}).output == OutputSchema("count")


def test_answer_that_is_any_object() -> None:
    assert asked(response_format={"type": "json_object"}).output == OutputSchema()


@pytest.mark.parametrize(
    ("response_format", "code", "param", "message"),
    [
        (
            {"type": "json_schema"},
            "missing_required_parameter",
            "response_format.json_schema",
            "Missing required parameter: 'response_format.json_schema'.",
        ),
        (
            {"type": "json_schema", "json_schema": None},
            "missing_required_parameter",
            "response_format.json_schema",
            None,
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
            "missing_required_parameter",
            "response_format.json_schema.name",
            "Missing required parameter: 'response_format.json_schema.name'.",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "a b"}},
            "invalid_value",
            "response_format.json_schema.name",
            None,
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "x" * 65}},
            "string_above_max_length",
            "response_format.json_schema.name",
            None,
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}},
            "invalid_function_parameters",
            "response_format.json_schema.schema",
            "Invalid schema for 'response_format.json_schema.schema': its type must be 'object'.",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": {"n": {"type": "whole"}}}}},
            "invalid_function_parameters",
            "response_format.json_schema.schema",
            None,
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": [1]}},
            "invalid_function_parameters",
            "response_format.json_schema.schema",
            None,
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "description": "\0"}},
            "invalid_value",
            "response_format.json_schema.description",
            None,
        ),
    ],
)
def test_answer_of_a_form_that_cannot_be_asked_for(
    response_format: dict[str, Any], code: str, param: str, message: str | None
) -> None:
    error = refusal(response_format=response_format)
    assert outcome(error) == (400, code, param)
    assert message is None or error.message == message


# Tools ---------------------------------------------------------------------------------------------------------------

WEATHER = ClientTool("get_weather", "", NO_PARAMETERS)


def test_tools_keep_their_order_and_their_schemas_bytes() -> None:
    raw = '{ "type":"object","properties" : {"city":{"type":"string"}} }'
    body = (
        f'{{"model":"friend","messages":[{json.dumps(USER)}],"tools":['
        f'{{"type":"function","function":{{"name":"b","description":"B","parameters":{raw},"strict":true}}}},'
        '{"type":"function","function":{"name":"a"}}]}'
    )
    ask = ask_of(decode(body.encode()))
    assert ask.tools == (ClientTool("b", "B", msgspec.Raw(raw.encode())), ClientTool("a", "", NO_PARAMETERS))
    assert (ask.tool_choice, ask.parallel_calls) == ("auto", True)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        (function(), Named("get_weather")),
    ],
)
def test_choice_of_tools(choice: Any, expected: Any) -> None:
    ask = asked(tools=[function(), function("other")], tool_choice=choice)
    assert ask.tool_choice == expected
    assert [tool.name for tool in ask.tools] == ["get_weather", "other"]


def test_one_call_at_a_time() -> None:
    assert asked(tools=[function()], parallel_tool_calls=False).parallel_calls is False
    assert asked(tools=[function()], parallel_tool_calls=None).parallel_calls is True


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        (
            {"tool_choice": "required"},
            "tool_choice",
            "Invalid value for 'tool_choice': 'tool_choice' is only allowed when 'tools' are specified.",
        ),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", None),
        (
            {"tool_choice": function()},
            "tool_choice",
            "Invalid value for 'tool_choice': 'tool_choice' is only allowed when 'tools' are specified.",
        ),
        (
            {"tools": [function("other")], "tool_choice": function()},
            "tool_choice",
            "Invalid value for 'tool_choice': the tool is not among 'tools'. Name one of them.",
        ),
        (
            {"function_call": {"name": "f"}},
            "function_call",
            "Invalid value for 'function_call': 'function_call' is only allowed when 'functions' are specified.",
        ),
        (
            {"functions": [{"name": "g"}], "function_call": {"name": "f"}},
            "function_call",
            "Invalid value for 'function_call': the tool is not among 'functions'. Name one of them.",
        ),
    ],
)
def test_choice_of_a_tool_that_is_not_there(changes: dict[str, Any], param: str, message: str | None) -> None:
    error = refusal(**changes)
    assert outcome(error) == (400, "invalid_value", param)
    assert message is None or error.message == message


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"tools": {}}, "invalid_type", "tools"),
        ({"tools": [1]}, "invalid_type", "tools[0]"),
        ({"tools": [{}]}, "missing_required_parameter", "tools[0].function"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "invalid_value", "tools[0].type"),
        ({"tools": [{"function": {}}]}, "missing_required_parameter", "tools[0].function.name"),
        ({"tools": [function(), {"function": {"name": 7}}]}, "invalid_type", "tools[1].function.name"),
        ({"tools": [function(description=7)]}, "invalid_type", "tools[0].function.description"),
        ({"tools": [function(parameters="x")]}, "invalid_function_parameters", "tools[0].function.parameters"),
        ({"tools": [function(), function()]}, "invalid_value", "tools[1].function.name"),
        ({"functions": [{"name": "a b"}]}, "invalid_value", "functions[0].name"),
        ({"functions": [{"name": "f", "parameters": 7}]}, "invalid_function_parameters", "functions[0].parameters"),
        ({"functions": [{"name": "f"}] * 129}, "array_above_max_length", "functions"),
        ({"tools": [function()], "tool_choice": "any"}, "invalid_value", "tool_choice"),
        ({"tools": [function()], "tool_choice": {"type": "function"}}, "missing_required_parameter", None),
        ({"tools": [function()], "tool_choice": 7}, "invalid_type", "tool_choice"),
    ],
)
def test_tools_that_are_none(changes: dict[str, Any], code: str, param: str | None) -> None:
    error = refusal(**changes)
    assert (error.status, error.code) == (400, code)
    assert param is None or error.param == param


def test_functions_by_their_older_name() -> None:
    functions = [{"name": "f", "description": "F", "parameters": SCHEMA}, {"name": "g", "parameters": None}]
    ask = asked(functions=functions, function_call={"name": "f"})
    assert [(tool.name, tool.description) for tool in ask.tools] == [("f", "F"), ("g", "")]
    assert json.loads(bytes(ask.tools[0].parameters)) == SCHEMA
    assert ask.tool_choice == Named("f")
    assert asked(functions=functions, function_call="none").tool_choice == "none"
    assert asked(functions=functions).tool_choice == "auto"


def test_tools_win_over_functions() -> None:
    ask = asked(tools=[function()], functions=[{"name": "f"}], function_call={"name": "f"}, tool_choice="required")
    assert (ask.tools, ask.tool_choice) == ((WEATHER,), "required")


# Messages ------------------------------------------------------------------------------------------------------------


def test_whole_transcript_is_read() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert transcript(
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": "First"},
        {"role": "assistant", "content": "Yes?", "refusal": None, "name": "friend", "reasoning_content": "Hm"},
        {"role": "user", "name": "anna", "content": [{"type": "text", "text": "Second"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "42", "name": "f"},
    ) == (
        Instructed("Be kind"),
        UserSaid((Text("First"),)),
        AgentSaid("Yes?"),
        UserSaid((Text("Second"),)),
        AgentSaid("", (Call("call_1", "f", '{"a": 1}'),)),
        ToolResult("call_1", "42"),
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({}, ""),
        ({"content": None}, ""),
        ({"content": ""}, ""),
        ({"content": "Yes"}, "Yes"),
        ({"content": []}, ""),
        ({"content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]}, "a\n\nb"),
    ],
)
@pytest.mark.parametrize("calls", [None, [], [{"id": "call_1", "function": {"name": "f", "arguments": "{}"}}]])
def test_what_the_assistant_said(content: dict[str, Any], text: str, calls: Any) -> None:
    said = transcript(USER, {"role": "assistant", "tool_calls": calls, **content}, USER)[1]
    assert said == AgentSaid(text, (Call("call_1", "f", "{}"),) if calls else ())


def test_several_calls_and_their_results_in_another_order() -> None:
    calls = [{"id": f"call_{n}", "type": "function", "function": {"name": "f"}} for n in range(3)]
    results = [{"role": "tool", "tool_call_id": f"call_{n}", "content": str(n)} for n in (2, 0)]
    assert transcript(USER, {"role": "assistant", "tool_calls": calls}, *results)[1:] == (
        AgentSaid("", tuple(Call(f"call_{n}", "f", "") for n in range(3))),
        ToolResult("call_2", "2"),
        ToolResult("call_0", "0"),
    )


def test_function_call_and_its_result_by_their_older_names() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    assert transcript(USER, call, {"role": "function", "name": "f", "content": "42"})[1:] == (
        AgentSaid("", (Call("f", "f", "{}"),)),
        ToolResult("f", "42"),
    )


@pytest.mark.parametrize("content", ["", "42", [], [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]])
def test_result_of_a_tool_as_text_or_parts(content: Any) -> None:
    """qwen-code sends parts."""
    said = transcript(USER, {"role": "tool", "tool_call_id": "call_1", "content": content})[1]
    assert said == ToolResult("call_1", content if isinstance(content, str) else "4\n\n2" if content else "")


def test_user_message_behind_a_tools_result() -> None:
    """Roo Code tells of its environment there."""
    said = transcript(
        USER,
        {"role": "assistant", "tool_calls": [{"id": "call_1", "function": {"name": "f"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "42"},
        {"role": "user", "content": [{"type": "text", "text": "<environment_details>"}]},
    )
    assert said[2:] == (ToolResult("call_1", "42"), UserSaid((Text("<environment_details>"),)))


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("content", ["Be kind", [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind"}]])
def test_instructions_stand_anywhere(role: str, content: Any) -> None:
    said = Instructed("Be kind" if isinstance(content, str) else "Be\n\nkind")
    message = {"role": role, "content": content}
    assert transcript(message, USER) == (said, HI)
    assert transcript(USER, message) == (HI, said)
    assert transcript(USER, {"role": "assistant", "content": "Yes"}, message, USER, message) == (
        HI,
        AgentSaid("Yes"),
        said,
        HI,
        said,
    )


@pytest.mark.parametrize("content", ["", " \n", [], [{"type": "text", "text": ""}]])
def test_blank_instructions_say_nothing(content: Any) -> None:
    assert transcript({"role": "system", "content": content}, USER) == (HI,)


BLANK = ["", " \n\t", [], [{"type": "text", "text": " "}]]


@pytest.mark.parametrize("content", BLANK)
def test_older_user_messages_may_be_empty(content: Any) -> None:
    empty, answer = {"role": "user", "content": content}, {"role": "assistant", "content": "Yes"}
    assert transcript(empty, answer, USER) == (AgentSaid("Yes"), HI)


@pytest.mark.parametrize("content", BLANK)
@pytest.mark.parametrize("before", [[], [USER], [USER, {"role": "assistant", "content": "Yes"}, USER]])
def test_new_user_messages_may_not_be_empty(content: Any, before: list[Any]) -> None:
    error = refusal(messages=[*before, {"role": "user", "content": content}])
    assert outcome(error) == (400, "invalid_value", f"messages[{len(before)}].content")


@pytest.mark.parametrize(
    ("messages", "code", "param"),
    [
        (None, "invalid_type", "messages"),
        ("Hi", "invalid_type", "messages"),
        ({}, "invalid_type", "messages"),
        ([], "invalid_value", "messages"),
        ([7], "invalid_type", "messages[0]"),
        ([USER, None], "invalid_type", "messages[1]"),
        ([{}], "missing_required_parameter", "messages[0].role"),
        ([{"content": "Hi"}], "missing_required_parameter", "messages[0].role"),
        ([{"role": "robot", "content": "Hi"}], "invalid_value", "messages[0].role"),
        ([{"role": 7, "content": "Hi"}], "invalid_value", "messages[0].role"),
        ([{"role": "user"}], "missing_required_parameter", "messages[0].content"),
        ([{"role": "user", "content": None}], "invalid_type", "messages[0].content"),
        ([{"role": "user", "content": 7}], "invalid_type", "messages[0].content"),
        ([{"role": "user", "content": {"type": "text"}}], "invalid_type", "messages[0].content"),
        ([{"role": "user", "content": "a\0b"}], "invalid_value", "messages[0].content"),
        ([{"role": "system"}, USER], "missing_required_parameter", "messages[0].content"),
        ([{"role": "system", "content": None}, USER], "invalid_type", "messages[0].content"),
        ([{"role": "developer", "content": "a\0b"}, USER], "invalid_value", "messages[0].content"),
        (
            [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, USER],
            "invalid_value",
            "messages[0].content[0].type",
        ),
        ([{"role": "tool", "content": "1"}], "missing_required_parameter", "messages[0].tool_call_id"),
        ([{"role": "tool", "tool_call_id": "", "content": "1"}], "invalid_value", "messages[0].tool_call_id"),
        ([{"role": "tool", "tool_call_id": "x" * 513, "content": "1"}], "invalid_value", "messages[0].tool_call_id"),
        ([{"role": "tool", "tool_call_id": "\0", "content": "1"}], "invalid_value", "messages[0].tool_call_id"),
        ([{"role": "tool", "tool_call_id": None, "content": "1"}], "invalid_type", "messages[0].tool_call_id"),
        ([{"role": "function", "content": "1"}], "missing_required_parameter", "messages[0].name"),
        ([{"role": "function", "name": "", "content": "1"}], "invalid_value", "messages[0].name"),
        ([{"role": "assistant", "content": 7}, USER], "invalid_type", "messages[0].content"),
        ([{"role": "assistant", "tool_calls": {}}, USER], "invalid_type", "messages[0].tool_calls"),
    ],
)
def test_messages_that_cannot_be_answered(messages: Any, code: str, param: str) -> None:
    assert outcome(refusal(messages=messages)) == (400, code, param)


@pytest.mark.parametrize(
    ("call", "code", "param"),
    [
        ({"function": {"name": "f"}}, "missing_required_parameter", "tool_calls[0].id"),
        ({"id": "x"}, "missing_required_parameter", "tool_calls[0].function"),
        ({"id": "x", "function": {"name": "f", "arguments": {}}}, "invalid_type", "tool_calls[0].function.arguments"),
        ({"id": "", "function": {"name": "f"}}, "invalid_value", "tool_calls[0].id"),
        ({"id": "x\0", "function": {"name": "f"}}, "invalid_value", "tool_calls[0].id"),
        ({"id": "x", "function": {"name": "f\0"}}, "invalid_value", "tool_calls[0].function.name"),
    ],
)
def test_call_of_the_assistants_that_is_none(call: dict[str, Any], code: str, param: str) -> None:
    error = refusal(messages=[{"role": "assistant", "tool_calls": [call]}, USER])
    assert outcome(error) == (400, code, f"messages[0].{param}")


def test_what_machines_wrote_is_never_refused() -> None:
    call = {"id": "x", "function": {"name": "f", "arguments": "\0"}}
    said = transcript(
        USER,
        {"role": "assistant", "content": "a\0b", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "x", "content": "\0c"},
        {"role": "function", "name": "f", "content": "\0"},
    )
    assert said[1:] == (
        AgentSaid("a\ufffdb", (Call("x", "f", "\ufffd"),)),
        ToolResult("x", "\ufffdc"),
        ToolResult("f", "\ufffd"),
    )


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "file", "file": {"file_id": "f"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    ],
)
def test_result_in_parts_says_what_is_missing(part: dict[str, Any]) -> None:
    parts = [{"type": "text", "text": "Here:"}, part]
    assert transcript({"role": "tool", "tool_call_id": "x", "content": parts}) == (
        ToolResult("x", f"Here:\n\n{LEFT_OUT}"),
    )


@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_tool_that_gave_nothing(content: dict[str, Any]) -> None:
    assert transcript({"role": "tool", "tool_call_id": "x", **content}) == (ToolResult("x", ""),)


ANSWER = {"role": "assistant", "content": "Hello"}
NOTHING = {"role": "system", "content": " "}
BE_KIND = {"role": "system", "content": "Be kind"}


@pytest.mark.parametrize(
    "messages",
    [
        [ANSWER],
        [BE_KIND, ANSWER],
        [USER, {"role": "assistant", "content": " "}],
        [USER, {"role": "assistant", "tool_calls": [{"id": "call_1", "function": {"name": "f"}}]}],
        [BE_KIND],
        [NOTHING],
        [USER, ANSWER, BE_KIND],
        [USER, ANSWER, NOTHING],
        [USER, ANSWER, NOTHING, NOTHING],
        [{"role": "user", "content": ""}, ANSWER, NOTHING],
        [NOTHING, NOTHING, USER, ANSWER, NOTHING, NOTHING, NOTHING],
    ],
)
def test_nothing_is_said_since_the_assistant_spoke(messages: list[Any]) -> None:
    error = refusal(messages=messages)
    assert outcome(error) == (400, "invalid_value", f"messages[{len(messages) - 1}].role")
    assert error.message == (
        "The last message must be of role 'user' or 'tool', which the agent answers, or an answer's text with which it "
        "goes on."
    )


@pytest.mark.parametrize("messages", [[USER, ANSWER], [BE_KIND, USER, ANSWER], [USER, ANSWER, USER, ANSWER]])
def test_answer_that_is_to_be_continued(messages: list[Any]) -> None:
    said = asked(messages=messages)
    assert said.goes_on
    assert said.transcript[-2:] == (AgentSaid("Hello"), GO_ON)
    assert not asked(messages=[*messages, USER]).goes_on


def test_as_many_messages_as_there_may_be() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}] * (MOST_MESSAGES // 2)
    began = time.process_time()
    assert len(transcript(*turns[1:], USER)) == MOST_MESSAGES
    assert time.process_time() - began < 1
    error = refusal(messages=[*turns, USER])
    assert outcome(error) == (400, "invalid_value", "messages")
    assert error.message == "'messages' has more than 10000 items: send fewer."


# Parts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "code", "param"),
    [
        ({}, "missing_required_parameter", "[1].type"),
        ({"type": "video"}, "invalid_value", "[1].type"),
        ({"type": "text"}, "missing_required_parameter", "[1].text"),
        ({"type": "text", "text": 7}, "invalid_type", "[1].text"),
        ({"type": "text", "text": "\0"}, "invalid_value", "[1].text"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "unsupported_parameter", "[1]"),
        ({"type": "file", "file": {"file_id": "x"}}, "unsupported_parameter", "[1]"),
        ({"type": "image_url"}, "missing_required_parameter", "[1].image_url"),
        ({"type": "image_url", "image_url": "https://example.com/a.png"}, "invalid_type", "[1].image_url"),
        ({"type": "image_url", "image_url": {}}, "missing_required_parameter", "[1].image_url.url"),
        ({"type": "image_url", "image_url": {"url": ""}}, "invalid_image_url", "[1].image_url.url"),
    ],
)
def test_part_that_cannot_be_said(part: dict[str, Any], code: str, param: str) -> None:
    error = refusal(messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}, part]}])
    error_param = error.param or ""
    assert (error.status, error.code) == (400, code)
    # A part whose own validation comes late is named by what was asked of Letta; the rest by msgspec's path.
    assert error_param == f"messages[0].content{param}"


def test_blank_text_beside_an_image_is_left_out() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/jpg;base64,AAAA"}}
    assert says([{"type": "text", "text": " "}, picture]) == (ImageData("image/jpeg", "AAAA"),)


def test_nothing_but_blank_text() -> None:
    error = refusal(messages=[{"role": "user", "content": [{"type": "text", "text": ""}]}])
    assert (error.code, error.param) == ("invalid_value", "messages[0].content")


def test_text_and_images_in_the_order_they_came() -> None:
    parts = says(
        [
            {"type": "text", "text": "Look:"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw==", "detail": "low"}},
            {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
            {"type": "text", "text": " nice?"},
        ]
    )
    assert parts == (
        Text("Look:"),
        ImageData("image/png", "iVBORw=="),
        ImageUrl("https://example.com/a.png"),
        Text(" nice?"),
    )


# Anything else -------------------------------------------------------------------------------------------------------

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
_part = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "image_url", "input_audio", "file", "x"]) | _json,
        "text": _json,
        "image_url": st.fixed_dictionaries({}, optional={"url": st.text() | st.text().map("data:".__add__), "x": _json})
        | _json,
    },
)
_message = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "user", "assistant", "system", "tool", "function", "x"]) | _json,
        "tool_call_id": st.text(),
        "name": st.text(),
        "content": st.lists(_part, max_size=3) | _json,
    },
)
_body = st.fixed_dictionaries(
    {"model": st.text() | _json, "messages": st.lists(_message, max_size=3) | _json},
    optional=dict.fromkeys(set(ChatCompletionRequest.__struct_fields__) - {"model", "messages"}, _json),
)


@given(body=_body | st.dictionaries(st.text(), _json) | _json)
def test_any_json_is_answered_or_refused(body: Any) -> None:
    try:
        ask = ask_of(decode(msgspec.json.encode(_within_64_bits(body))))
    except ClientError as error:
        assert (error.status, bool(error.message), bool(error.code)) == (400, True, True)  # noqa: PT017
    else:
        assert any(isinstance(said, UserSaid | ToolResult) for said in ask.transcript)
        assert all(said.content for said in ask.transcript if isinstance(said, UserSaid))


def _within_64_bits(value: Any) -> Any:
    """msgspec writes no longer integers; that the gateway refuses them is tested above."""
    match value:
        case dict():
            return {key: _within_64_bits(item) for key, item in value.items()}
        case list():
            return [_within_64_bits(item) for item in value]
        case int() if not isinstance(value, bool) and abs(value) >= 2**63:
            return 7
        case _:
            return value
