"""A client's tools, checked as OpenAI checks them: names, number, size, schemas."""

import re
from collections.abc import Sequence
from typing import Final

import msgspec

from gateway.errors import InvalidRequest
from gateway.translation import content
from gateway.translation.agent_turn import ClientTool
from gateway.translation.ask import Named, ToolChoice
from gateway.translation.schemas import problem

MOST_TOOLS: Final = 128
MOST_SCHEMAS: Final = 65_536
"""Bytes of all schemas of a request; 36 tools of a coding agent take 46 KB."""
LONGEST_NAME: Final = 64
NO_PARAMETERS: Final = msgspec.Raw(b'{"type":"object","properties":{}}')

_NAME: Final = re.compile(r"[a-zA-Z0-9_-]+")


class FunctionSpec(msgspec.Struct):
    """A function as both APIs describe it; ``strict`` is the model's affair."""

    name: str
    description: str | None = None
    parameters: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b"null"))
    strict: bool | None = None


def client_tools(specs: Sequence[FunctionSpec], path: str, inside: str = ".function") -> tuple[ClientTool, ...]:
    """Return the tools; ``path`` names the list, and ``inside`` the way from its items to their functions.

    Raises ``InvalidRequest`` naming the field at fault, in OpenAI's words.
    """
    if len(specs) > MOST_TOOLS:
        raise InvalidRequest(
            f"Invalid '{path}': array too long. Expected an array with maximum length {MOST_TOOLS}, but got an array "
            f"with length {len(specs)} instead.",
            param=path,
            code="array_above_max_length",
        )
    size = sum(len(bytes(spec.parameters)) for spec in specs)
    if size > MOST_SCHEMAS:
        raise InvalidRequest(
            f"Invalid '{path}': the schemas take {size} bytes. Send {MOST_SCHEMAS} at most: fewer or simpler tools.",
            param=path,
            code="tools_too_large",
        )
    tools = tuple(_tool(spec, f"{path}[{index}]{inside}") for index, spec in enumerate(specs))
    _refuse_twins(tools, path, inside)
    return tools


def check_choice(choice: ToolChoice, tools: Sequence[ClientTool], path: str, field: str = "tools") -> None:
    """Raise ``InvalidRequest`` where the choice asks for a tool that is not there."""
    if choice in ("auto", "none"):
        return
    if not tools:
        raise InvalidRequest(
            f"Invalid value for '{path}': '{path}' is only allowed when '{field}' are specified.", param=path
        )
    if isinstance(choice, Named) and all(tool.name != choice.name for tool in tools):
        raise InvalidRequest(
            f"Invalid value for '{path}': the tool is not among '{field}'. Name one of them.", param=path
        )


def check_schema(schema: msgspec.Raw, path: str) -> None:
    """Raise ``InvalidRequest`` unless this is a JSON Schema whose references lead somewhere inside it."""
    wrong = problem(bytes(schema))
    if wrong is not None:
        raise InvalidRequest(f"Invalid schema for '{path}': {wrong}", param=path, code="invalid_function_parameters")


# Tools ---------------------------------------------------------------------------------------------------------------


def _tool(spec: FunctionSpec, path: str) -> ClientTool:
    check_name(spec.name, f"{path}.name")
    description = content.storable(spec.description or "", f"{path}.description")
    parameters = spec.parameters
    if bytes(parameters).strip() == b"null":
        return ClientTool(spec.name, description, NO_PARAMETERS)
    check_schema(parameters, f"{path}.parameters")
    return ClientTool(spec.name, description, msgspec.Raw(bytes(parameters)))


def check_name(name: str, path: str) -> None:
    """Raise ``InvalidRequest`` unless this is a name as OpenAI has them."""
    if not name:
        raise InvalidRequest(
            f"Invalid '{path}': empty string. Expected a string with minimum length 1, but got an empty string "
            "instead.",
            param=path,
            code="empty_string",
        )
    if len(name) > LONGEST_NAME:
        raise InvalidRequest(
            f"Invalid '{path}': string too long. Expected a string with maximum length {LONGEST_NAME}, but got a "
            f"string with length {len(name)} instead.",
            param=path,
            code="string_above_max_length",
        )
    if _NAME.fullmatch(name) is None:
        raise InvalidRequest(
            f"Invalid '{path}': string does not match pattern. Expected a string that matches the pattern "
            "'^[a-zA-Z0-9_-]+$'.",
            param=path,
            code="invalid_value",
        )


def _refuse_twins(tools: Sequence[ClientTool], path: str, inside: str) -> None:
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in seen:
            where = f"{path}[{index}]{inside}.name"
            raise InvalidRequest(f"Invalid '{where}': '{tool.name}' is there twice. Names must be unique.", param=where)
        seen.add(tool.name)
