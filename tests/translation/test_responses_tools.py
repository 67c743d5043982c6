from typing import Any

import msgspec
import pytest

from gateway.errors import ClientError, InvalidRequest, UnsupportedParameter
from gateway.translation.agent_turn import ClientTool
from gateway.translation.ask import Named
from gateway.translation.responses_names import FunctionName
from gateway.translation.responses_tools import Tools, choose, read_tools
from gateway.translation.responses_types import NamedFunctionTool, ToolChoiceObject

SCHEMA = {"type": "object", "properties": {"q": {"type": "string"}}}


def function(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "name": name, "parameters": SCHEMA, "strict": False, **more}


def read(*tools: Any) -> Tools:
    return read_tools([msgspec.Raw(msgspec.json.encode(tool)) for tool in tools])


def refused(*tools: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        read(*tools)
    return raised.value


OFFERED = read(function("f"), function("g")).offered


def test_function() -> None:
    tools = read(function("find", description="Finds."))
    assert tools == Tools((ClientTool("find", "Finds.", tools.offered[0].parameters),), {})
    assert msgspec.json.decode(tools.offered[0].parameters) == SCHEMA


def test_hosted_tools_are_ignored() -> None:
    hosted = [{"type": "web_search"}, {"type": "mcp", "server_label": "x"}, {}]
    assert [tool.name for tool in read(*hosted, function("f")).offered] == ["f"]


def test_custom_tool_is_a_function_of_one_text() -> None:
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}
    tools = read({"type": "custom", "name": "f", "description": "Edits.", "format": grammar})
    (offered,) = tools.offered
    assert offered.description == "Edits.\n\nThe input is of this grammar (lark):\nstart: /.+/"
    assert msgspec.json.decode(offered.parameters)["required"] == ["input"]
    assert tools.namespaced == {"f": FunctionName("", "f", is_custom=True)}
    assert choose(ToolChoiceObject("custom", "f"), tools.offered) == (tools.offered, Named("f"))


def test_functions_inside_a_namespace() -> None:
    inner = [function("find"), {"type": "custom", "name": "patch"}, function("x" * 64)]
    tools = read(function("find"), {"type": "namespace", "name": "crm", "description": "CRM", "tools": inner})
    names = [tool.name for tool in tools.offered]
    assert names[:2] == ["find", "crm__find"]
    assert tools.namespaced == {"crm__find": FunctionName("crm", "find"), names[2]: FunctionName("crm", "x" * 64)}


@pytest.mark.parametrize("empty", [{"type": "namespace", "name": "crm"}, {"type": "namespace", "tools": []}])
def test_namespace_without_functions(empty: dict[str, Any]) -> None:
    assert read(empty) == Tools((), {})


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([3], "tools[0]"),
        ([{"type": 3}], "tools[0].type"),
        ([{"type": "web_search"}, {"type": "function"}], "tools[1].name"),
        ([{"type": "web_search"}, function("a b")], "tools[1].name"),
        ([{"type": "web_search"}, function("f"), function("f")], "tools[2].name"),
        ([function("f", parameters={"type": 3})], "tools[0].parameters"),
        ([{"type": "namespace", "name": "n", "tools": [{"type": "x"}, function("")]}], "tools[0].tools[1].name"),
        ([{"type": "namespace", "name": "n", "tools": [function("f", parameters=3)]}], "tools[0].tools[0].parameters"),
        ([{"type": "namespace", "name": "a b", "tools": [function("f")]}], "tools[0].tools[0].name"),
        ([function(f"f{index}") for index in range(129)], "tools"),
    ],
)
def test_fault_is_named_by_the_requests_own_path(tools: list[Any], param: str) -> None:
    assert refused(*tools).param == param


def test_wording_of_a_name_that_is_too_long() -> None:
    assert refused(function("f" * 71)).message == (
        "Invalid 'tools[0].name': string too long. Expected a string with maximum length 64, but got a string with "
        "length 71 instead."
    )


# The choice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["auto", "none", "required"])
def test_choice_by_word(choice: str) -> None:
    assert choose(choice, OFFERED) == (OFFERED, choice)


def test_choice_left_out() -> None:
    assert choose(None, ()) == ((), "auto")


def test_function_chosen_by_name() -> None:
    assert choose(ToolChoiceObject("function", "g"), OFFERED) == (OFFERED, Named("g"))


def test_allowed_tools_are_the_ones_offered() -> None:
    allowed = [NamedFunctionTool("function", "g"), NamedFunctionTool("web_search")]
    assert choose(ToolChoiceObject("allowed_tools", None, "required", allowed), OFFERED) == (OFFERED[1:], "required")


@pytest.mark.parametrize(
    ("choice", "tools", "error"),
    [
        ("required", (), InvalidRequest),
        (ToolChoiceObject("function", "h"), OFFERED, InvalidRequest),
        (ToolChoiceObject("allowed_tools", None, "required", []), OFFERED, InvalidRequest),
        (ToolChoiceObject("web_search"), OFFERED, UnsupportedParameter),
        (ToolChoiceObject("function"), OFFERED, UnsupportedParameter),
    ],
)
def test_choice_that_cannot_be_met(
    choice: str | ToolChoiceObject, tools: tuple[ClientTool, ...], error: type[ClientError]
) -> None:
    with pytest.raises(error) as raised:
        choose(choice, tools)
    assert raised.value.param == "tool_choice"
