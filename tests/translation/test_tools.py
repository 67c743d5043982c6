import json
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import InvalidRequest
from gateway.translation.agent_turn import ClientTool
from gateway.translation.ask import Named, ToolChoice
from gateway.translation.tools import (
    LONGEST_NAME,
    MOST_SCHEMAS,
    MOST_TOOLS,
    NO_PARAMETERS,
    FunctionSpec,
    check_choice,
    check_name,
    check_schema,
    client_tools,
)


def spec(name: str = "get_weather", parameters: Any = None, **fields: Any) -> FunctionSpec:
    return FunctionSpec(name, parameters=msgspec.Raw(json.dumps(parameters).encode()), **fields)


def refusal(*specs: FunctionSpec, path: str = "tools", inside: str = ".function") -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        client_tools(specs, path, inside)
    assert raised.value.status == 400
    return raised.value


def of_size(size: int, number: int = 0) -> dict[str, Any]:
    """Return a schema that takes so many bytes."""
    schema = {"type": "object", "properties": {"p": {"type": "string", "description": str(number)}}}
    schema["properties"]["p"]["description"] += "x" * (size - len(json.dumps(schema)))  # type: ignore[index]
    return schema


# What is taken -------------------------------------------------------------------------------------------------------


def test_no_tools() -> None:
    assert client_tools([], "tools") == ()


def test_tools_in_their_order() -> None:
    tools = client_tools([spec("b", {"type": "object"}, description="B", strict=True), spec("a")], "tools")
    assert tools == (ClientTool("b", "B", msgspec.Raw(b'{"type": "object"}')), ClientTool("a", "", NO_PARAMETERS))


@pytest.mark.parametrize("name", ["f", "a" * LONGEST_NAME, "get_weather", "get-weather", "Get7", "-", "_", "0"])
def test_name_as_openai_has_them(name: str) -> None:
    assert client_tools([spec(name)], "tools")[0].name == name


def test_as_many_tools_as_there_may_be() -> None:
    assert len(client_tools([spec(f"f{number}") for number in range(MOST_TOOLS)], "tools")) == 128


def test_schemas_as_large_as_they_may_be() -> None:
    half = MOST_SCHEMAS // 2
    assert len(client_tools([spec("a", of_size(half)), spec("b", of_size(half))], "tools")) == 2
    assert len(client_tools([spec("a", of_size(MOST_SCHEMAS))], "tools")) == 1


def test_schema_outlives_the_body_that_it_came_in() -> None:
    body = bytearray(b'{"name":"f","parameters":{"type":"object"}}')
    (tool,) = client_tools([msgspec.json.decode(bytes(body), type=FunctionSpec)], "tools")
    body[:] = b"x" * len(body)
    assert bytes(tool.parameters) == b'{"type":"object"}'


# What is refused, in OpenAI's words ----------------------------------------------------------------------------------


def test_one_tool_too_many() -> None:
    error = refusal(*[spec(f"f{number}") for number in range(129)])
    assert (error.code, error.param) == ("array_above_max_length", "tools")
    assert error.message == (
        "Invalid 'tools': array too long. Expected an array with maximum length 128, but got an array with length 129 "
        "instead."
    )


PATTERN = (
    "Invalid 'tools[0].function.name': string does not match pattern. Expected a string that matches the pattern "
    "'^[a-zA-Z0-9_-]+$'."
)


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        (
            "x" * 71,
            "string_above_max_length",
            (
                "Invalid 'tools[0].function.name': string too long. Expected a string with maximum length 64, but got "
                "a string with length 71 instead."
            ),
        ),
        ("x" * 65, "string_above_max_length", None),
        (
            "",
            "empty_string",
            (
                "Invalid 'tools[0].function.name': empty string. Expected a string with minimum length 1, but got an "
                "empty string instead."
            ),
        ),
        ("get.weather", "invalid_value", PATTERN),
        ("get weather", "invalid_value", PATTERN),
        (" f", "invalid_value", PATTERN),
        ("f\n", "invalid_value", PATTERN),
        ("f\0", "invalid_value", PATTERN),
        ("wetter_für", "invalid_value", PATTERN),
        ("\u0661", "invalid_value", PATTERN),
        ("\uff46", "invalid_value", PATTERN),
        ("f/../g", "invalid_value", PATTERN),
    ],
)
def test_name_that_openai_would_refuse(name: str, code: str, message: str | None) -> None:
    error = refusal(spec(name))
    assert (error.code, error.param) == (code, "tools[0].function.name")
    assert message is None or error.message == message


def test_names_that_are_there_twice() -> None:
    error = refusal(spec("a"), spec("b"), spec("a"))
    assert (error.code, error.param) == ("invalid_value", "tools[2].function.name")
    assert error.message == "Invalid 'tools[2].function.name': 'a' is there twice. Names must be unique."
    assert len(client_tools([spec("a"), spec("A")], "tools")) == 2


def test_names_in_the_list_that_they_are_in() -> None:
    assert refusal(spec(""), path="functions", inside="").param == "functions[0].name"
    assert refusal(spec("a"), spec("a"), path="functions", inside="").param == "functions[1].name"
    assert refusal(spec("f", [1]), path="functions", inside="").param == "functions[0].parameters"


def test_description_with_a_nul_character() -> None:
    error = refusal(spec("f", description="\0"))
    assert (error.code, error.param) == ("invalid_value", "tools[0].function.description")


def test_schemas_that_are_too_large_together() -> None:
    half = MOST_SCHEMAS // 2
    error = refusal(spec("a", of_size(half)), spec("b", of_size(half + 1)))
    assert (error.code, error.param) == ("tools_too_large", "tools")
    assert error.message == (
        "Invalid 'tools': the schemas take 65537 bytes. Send 65536 at most: fewer or simpler tools."
    )


def test_hundred_kilobytes_of_one_schema() -> None:
    assert refusal(spec("f", of_size(100_000))).code == "tools_too_large"


@pytest.mark.parametrize("parameters", [[], "x", 7, True, {"type": "array"}, {"properties": []}, {"$ref": "#/x"}])
def test_parameters_that_are_no_schema_of_an_object(parameters: Any) -> None:
    error = refusal(spec("a"), spec("f", parameters))
    assert (error.code, error.param) == ("invalid_function_parameters", "tools[1].function.parameters")
    assert error.message.startswith("Invalid schema for 'tools[1].function.parameters': ")


def test_schema_by_itself() -> None:
    check_schema(msgspec.Raw(b'{"type":"object"}'), "text.format.schema")
    with pytest.raises(InvalidRequest) as raised:
        check_schema(msgspec.Raw(b"[]"), "text.format.schema")
    assert raised.value.message == "Invalid schema for 'text.format.schema': expected an object."
    assert raised.value.param == "text.format.schema"


def test_name_by_itself() -> None:
    check_name("count", "text.format.name")
    with pytest.raises(InvalidRequest) as raised:
        check_name("", "text.format.name")
    assert raised.value.param == "text.format.name"


# The choice ----------------------------------------------------------------------------------------------------------

TOOLS = (ClientTool("f", "", NO_PARAMETERS), ClientTool("g", "", NO_PARAMETERS))


@pytest.mark.parametrize("choice", ["auto", "none", "required", Named("f"), Named("g")])
def test_choice_among_tools(choice: ToolChoice) -> None:
    check_choice(choice, TOOLS, "tool_choice")


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_choice_that_needs_no_tools(choice: ToolChoice) -> None:
    check_choice(choice, (), "tool_choice")


@pytest.mark.parametrize(
    ("choice", "tools", "message"),
    [
        ("required", (), "'tool_choice' is only allowed when 'tools' are specified."),
        (Named("f"), (), "'tool_choice' is only allowed when 'tools' are specified."),
        (Named("h"), TOOLS, "the tool is not among 'tools'. Name one of them."),
        (Named("F"), TOOLS, "the tool is not among 'tools'. Name one of them."),
    ],
)
def test_choice_of_what_is_not_there(choice: ToolChoice, tools: tuple[ClientTool, ...], message: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        check_choice(choice, tools, "tool_choice")
    assert raised.value.message == f"Invalid value for 'tool_choice': {message}"
    assert (raised.value.code, raised.value.param) == ("invalid_value", "tool_choice")


# A coding agent's tools ----------------------------------------------------------------------------------------------


def roo_tools() -> list[FunctionSpec]:
    """Return tools as Roo Code sends them: 36, of 46 KB, every property required, no other property allowed."""
    properties = {
        f"argument_{number}": {
            "type": ["string", "null"],
            "description": f"What argument {number} is for, said at some length, as models read it. " * 2 + "It",
        }
        for number in range(6)
    }
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return [spec(f"tool_{number}", schema, description="d" * 200, strict=True) for number in range(36)]


def test_tools_of_a_coding_agent_take_no_time() -> None:
    specs = roo_tools()
    size = sum(len(bytes(spec.parameters)) for spec in specs)
    assert 44_000 < size < 48_000
    taken = []
    for _ in range(5):
        began = time.process_time()
        assert len(client_tools(specs, "tools")) == 36
        taken.append(time.process_time() - began)
    assert min(taken) < 0.005


@given(name=st.text(max_size=70), description=st.none() | st.text(), parameters=st.binary(max_size=40))
def test_any_tool_is_taken_as_it_is_or_refused(name: str, description: str | None, parameters: bytes) -> None:
    raw = msgspec.Raw(parameters)
    try:
        (tool,) = client_tools([FunctionSpec(name, description, raw)], "tools")
    except InvalidRequest as error:
        assert (error.param or "").startswith("tools[0].function.")  # noqa: PT017 - either may happen
    else:
        assert (tool.name, tool.description) == (name, description or "")
        assert bytes(tool.parameters) in (parameters, bytes(NO_PARAMETERS))
