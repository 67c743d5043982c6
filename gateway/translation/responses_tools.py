"""The Responses API's tools and choice among them -> the tools that the client executes.

Of the API's kinds of tools functions and custom tools are the client's to execute. Functions inside a ``namespace`` are
offered under a name made of both, as agents know no namespaces, and called by both again; custom tools are offered as
functions of one text. Hosted kinds (``web_search`` and the like) are OpenAI's own and ignored: the agent has tools of
its own for that.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import msgspec

from gateway.errors import InvalidRequest, UnsupportedParameter
from gateway.translation.agent_turn import ClientTool
from gateway.translation.ask import Named, ToolChoice
from gateway.translation.responses_names import FunctionName, flat_name
from gateway.translation.responses_parts import read_part
from gateway.translation.responses_types import ToolChoiceObject
from gateway.translation.tools import FunctionSpec, check_choice, check_name, check_schema, client_tools


class Tools(msgspec.Struct, frozen=True):
    """A client's tools; ``namespaced`` says of those that are no plain functions what they are for the client."""

    offered: tuple[ClientTool, ...]
    namespaced: Mapping[str, FunctionName]


class _Kind(msgspec.Struct):
    type: str = ""
    name: str = ""
    tools: list[msgspec.Raw] = []


class _Format(msgspec.Struct):
    syntax: str = ""
    definition: str = ""


class _CustomTool(msgspec.Struct):
    name: str
    description: str | None = None
    format: _Format | None = None


class _Found(msgspec.Struct, frozen=True):
    spec: FunctionSpec
    path: str
    within: FunctionName | None = None


_KIND: Final = msgspec.json.Decoder(_Kind)
_FUNCTION: Final = msgspec.json.Decoder(FunctionSpec)
_CUSTOM: Final = msgspec.json.Decoder(_CustomTool)
_ONE_TEXT: Final = msgspec.Raw(
    b'{"type":"object","properties":{"input":{"type":"string"}},"required":["input"],"additionalProperties":false}'
)


def read_tools(raws: Sequence[msgspec.Raw]) -> Tools:
    """Return the functions among the tools; raises ``InvalidRequest`` naming the field at fault."""
    found = [function for index, raw in enumerate(raws) for function in _functions(raw, f"tools[{index}]")]
    _check(found)
    return Tools(
        client_tools([function.spec for function in found], "tools", inside=""),
        {function.spec.name: function.within for function in found if function.within is not None},
    )


def choose(
    choice: str | ToolChoiceObject | None, tools: Sequence[ClientTool]
) -> tuple[tuple[ClientTool, ...], ToolChoice]:
    """Return the tools that may be called and how; raises a ``ClientError`` where the choice cannot be met."""
    match choice:
        case "none" | "required" | "auto":
            chosen: ToolChoice = choice
        case ToolChoiceObject(type="function" | "custom", name=str(name)):
            chosen = Named(name)
        case ToolChoiceObject(type="allowed_tools"):
            allowed = {tool.name for tool in choice.tools or ()}
            tools = [tool for tool in tools if tool.name in allowed]
            chosen = choice.mode or "auto"
        case ToolChoiceObject():
            raise UnsupportedParameter(
                "Unsupported value for 'tool_choice': an agent can be told to call one of the client's functions, and "
                "decides about its own tools itself. Send 'auto', 'none', 'required' or a function.",
                param="tool_choice",
            )
        case _:
            chosen = "auto"
    check_choice(chosen, tools, "tool_choice")
    return tuple(tools), chosen


def _functions(raw: msgspec.Raw, path: str) -> Iterator[_Found]:
    kind = read_part(_KIND, raw, path)
    if kind.type == "function":
        yield _Found(read_part(_FUNCTION, raw, path), path)
    elif kind.type == "custom":
        yield _custom(read_part(_CUSTOM, raw, path), path)
    elif kind.type == "namespace":
        for index, inner in enumerate(kind.tools):
            yield from _inside(kind.name, inner, f"{path}.tools[{index}]")


def _custom(tool: _CustomTool, path: str) -> _Found:
    description = tool.description or ""
    if tool.format is not None and tool.format.definition:
        description += f"\n\nThe input is of this grammar ({tool.format.syntax}):\n{tool.format.definition}"
    spec = FunctionSpec(tool.name, description.strip(), _ONE_TEXT)
    return _Found(spec, path, FunctionName("", tool.name, is_custom=True))


def _inside(namespace: str, raw: msgspec.Raw, path: str) -> Iterator[_Found]:
    if read_part(_KIND, raw, path).type != "function":
        return
    spec = read_part(_FUNCTION, raw, path)
    check_name(spec.name, f"{path}.name")
    flat = msgspec.structs.replace(spec, name=flat_name(spec.name, namespace))
    yield _Found(flat, path, FunctionName(namespace, spec.name) if flat.name != spec.name else None)


def _check(found: Sequence[_Found]) -> None:
    """Refuse what ``client_tools`` would, by the paths of the request: tools that are no functions count there."""
    seen: set[str] = set()
    for function in found:
        name, path = function.spec.name, f"{function.path}.name"
        check_name(name, path)
        if name in seen:
            raise InvalidRequest(f"Invalid '{path}': '{name}' is there twice. Names must be unique.", param=path)
        seen.add(name)
        if bytes(function.spec.parameters).strip() != b"null":
            check_schema(function.spec.parameters, f"{function.path}.parameters")
