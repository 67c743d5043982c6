"""JSON Schemas that clients send: whether a schema is one, and whether its references lead somewhere inside it."""

from typing import Annotated, Any, Final, Literal, TypeAlias
from urllib.parse import unquote

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, field

from gateway.translation.field_errors import MAX_SHOWN

MOST_SCHEMA: Final = 65_536
"""Bytes of one schema."""
MOST_DEPTH: Final = 64

_Type: TypeAlias = Literal["string", "number", "integer", "boolean", "object", "array", "null"]
_Count: TypeAlias = Annotated[int, Meta(ge=0)]


class _Schema(Struct):
    """The shape of a JSON Schema, of draft 6 to 2020-12; what nobody knows is ignored, and so are a pattern's insides.

    Read by msgspec: jsonschema takes two seconds to hold one of 64 KB against the metaschema.
    """

    type: _Type | list[_Type] | UnsetType = UNSET
    enum: list[Any] | UnsetType = UNSET
    reference: str | UnsetType = field(name="$ref", default=UNSET)
    id: str | UnsetType = field(name="$id", default=UNSET)
    defs: "_Named" = field(name="$defs", default=UNSET)
    definitions: "_Named" = UNSET
    title: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    format: str | UnsetType = UNSET
    pattern: str | UnsetType = UNSET
    min_length: _Count | UnsetType = field(name="minLength", default=UNSET)
    max_length: _Count | UnsetType = field(name="maxLength", default=UNSET)
    multiple_of: Annotated[float, Meta(gt=0)] | UnsetType = field(name="multipleOf", default=UNSET)
    minimum: float | UnsetType = UNSET
    maximum: float | UnsetType = UNSET
    exclusive_minimum: float | UnsetType = field(name="exclusiveMinimum", default=UNSET)
    exclusive_maximum: float | UnsetType = field(name="exclusiveMaximum", default=UNSET)
    items: "_Schema | bool | list[_Schema | bool] | UnsetType" = UNSET
    prefix_items: "_Several" = field(name="prefixItems", default=UNSET)
    contains: "_One" = UNSET
    min_items: _Count | UnsetType = field(name="minItems", default=UNSET)
    max_items: _Count | UnsetType = field(name="maxItems", default=UNSET)
    unique_items: bool | UnsetType = field(name="uniqueItems", default=UNSET)
    properties: "_Named" = UNSET
    required: list[str] | UnsetType = UNSET
    additional_properties: "_One" = field(name="additionalProperties", default=UNSET)
    pattern_properties: "_Named" = field(name="patternProperties", default=UNSET)
    property_names: "_One" = field(name="propertyNames", default=UNSET)
    min_properties: _Count | UnsetType = field(name="minProperties", default=UNSET)
    max_properties: _Count | UnsetType = field(name="maxProperties", default=UNSET)
    all_of: "_Several" = field(name="allOf", default=UNSET)
    any_of: "_Several" = field(name="anyOf", default=UNSET)
    one_of: "_Several" = field(name="oneOf", default=UNSET)
    negated: "_One" = field(name="not", default=UNSET)
    condition: "_One" = field(name="if", default=UNSET)
    then: "_One" = UNSET
    otherwise: "_One" = field(name="else", default=UNSET)


_One: TypeAlias = _Schema | bool | UnsetType
_Several: TypeAlias = Annotated[list[_Schema | bool], Meta(min_length=1)] | UnsetType
_Named: TypeAlias = dict[str, _Schema | bool] | UnsetType

_NUL: Final = rb"\u0000"
_SHAPE: Final = msgspec.json.Decoder(_Schema)


def problem(schema: bytes) -> str | None:
    """Say what is wrong with the schema of an object, as the end of a sentence; None where nothing is."""
    if len(schema) > MOST_SCHEMA:
        return f"it takes {len(schema)} bytes. Send {MOST_SCHEMA} at most."
    try:
        document = msgspec.json.decode(schema)
        if not isinstance(document, dict):
            return "expected an object."
        if document.get("type", "object") != "object":
            return "its type must be 'object'."
        _SHAPE.decode(schema)
    except msgspec.ValidationError as error:
        return _misshapen(str(error))
    except (msgspec.DecodeError, RecursionError):
        return "it cannot be read. Is it nested too deeply?"
    flaw = _flaw(document)
    if flaw is None and _NUL in schema and _has_nul(document):
        return "it contains a NUL character, which cannot be stored: remove it."
    return flaw


def _misshapen(message: str) -> str:
    what, _, where = message.rpartition(" - at `$")
    place = where.rstrip("`").lstrip(".") or "its top"
    detail = (what or message).replace("`", "'")[:MAX_SHOWN]
    return f"it is no valid JSON Schema at '{place}': {detail[:1].lower()}{detail[1:]}."


# Inside --------------------------------------------------------------------------------------------------------------

_NAMED: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose objects hold schemas by names of the client's."""
_LITERAL: Final = frozenset({"const", "default", "enum", "examples"})
"""Keywords that hold values: what looks like a reference there is none."""

_Kind: TypeAlias = Literal["schema", "names", "literal"]


def _flaw(document: object) -> str | None:
    """Say what is wrong with what a schema holds."""
    sound: set[str] = set()
    pending: list[tuple[object, int, _Kind]] = [(document, 0, "schema")]
    while pending:
        node, depth, kind = pending.pop()
        if depth > MOST_DEPTH:
            return f"it is nested more than {MOST_DEPTH} levels deep."
        if isinstance(node, dict):
            reference = node.get("$ref") if kind == "schema" else None
            if isinstance(reference, str) and not _leads_somewhere(reference, document, sound):
                return "a '$ref' in it leads nowhere. Refer to a definition inside the schema, as '#/$defs/name'."
            for key, inner in node.items():
                if isinstance(inner, dict | list):
                    within = _kind_of(key) if kind == "schema" else "schema" if kind == "names" else kind
                    pending.append((inner, depth + 1, within))
        elif isinstance(node, list):
            pending += [(inner, depth + 1, kind) for inner in node if isinstance(inner, dict | list)]
    return None


def _has_nul(node: object) -> bool:
    match node:
        case str():
            return "\0" in node
        case dict():
            return any("\0" in key or _has_nul(inner) for key, inner in node.items())
        case list():
            return any(_has_nul(inner) for inner in node)
    return False


def _kind_of(keyword: str) -> _Kind:
    return "names" if keyword in _NAMED else "literal" if keyword in _LITERAL else "schema"


def _leads_somewhere(reference: str, document: object, sound: set[str]) -> bool:
    """Tell whether a reference ends at something that is no reference: one that leads round and round does not.

    ``sound`` are those that are known to.
    """
    seen: set[str] = set()
    following: object = reference
    while isinstance(following, str) and following not in sound:
        if following in seen:
            return False
        seen.add(following)
        found = target(following, document)
        if not isinstance(found, dict | bool):
            return False
        following = found.get("$ref") if isinstance(found, dict) else None
    sound |= seen
    return True


def target(reference: str, document: object) -> object | None:
    """Return what a reference of a schema leads to inside it; None where that is nothing."""
    if reference == "#":
        return document
    if not reference.startswith("#/"):
        return None
    node = document
    for raw in reference[2:].split("/"):
        step = unquote(raw).replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and step in node:
            node = node[step]
        elif isinstance(node, list) and step.isdecimal() and int(step) < len(node):
            node = node[int(step)]
        else:
            return None
    return node
