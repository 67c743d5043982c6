import json
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.translation.schemas import MOST_DEPTH, MOST_SCHEMA, problem


def wrong(schema: Any) -> str | None:
    return problem(json.dumps(schema).encode())


def with_property(inner: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"p": inner}, **more}


# What is taken -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"type": "object", "properties": {}, "required": [], "additionalProperties": False, "strict": True},
        with_property({"type": "string", "enum": ["a", None, 1], "default": None, "examples": [1], "const": {}}),
        with_property({"type": ["string", "null"], "description": "D", "title": "T", "format": "date", "x-ours": [1]}),
        with_property({"type": "number", "minimum": -1, "maximum": 1.5, "multipleOf": 0.1, "exclusiveMinimum": 0}),
        with_property({"type": "string", "minLength": 0, "maxLength": 9, "pattern": "^a"}),
        with_property(
            {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2, "uniqueItems": True}
        ),
        with_property({"type": "array", "prefixItems": [{"type": "string"}, True], "items": False, "contains": {}}),
        with_property({"anyOf": [{"type": "string"}, {"type": "null"}], "not": {"const": 1}, "oneOf": [True]}),
        with_property({"if": {"type": "string"}, "then": {"minLength": 1}, "else": False, "allOf": [{}]}),
        with_property({"type": "object", "patternProperties": {"^x": {}}, "propertyNames": {"pattern": "^x"}}),
        with_property({}, unevaluatedProperties=False, dependentSchemas={"p": {}}, minProperties=1, maxProperties=2),
        # what other drafts have: zod writes the seventh, and its tuples as a list of items
        {"$schema": "http://json-schema.org/draft-07/schema#", **with_property({"items": [{"type": "string"}]})},
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:x", "$comment": "c"},
        # patterns are ECMAScript's
        with_property({"type": "string", "pattern": r"^\p{L}+$"}),
        with_property({"type": "string", "pattern": r"(?<year>\d{4})"}),
        with_property({}, properties={"type": {"type": "string"}, "properties": {}, "required": True, "$ref": {}}),
    ],
)
def test_schemas_that_clients_send(schema: Any) -> None:
    assert wrong(schema) is None


@pytest.mark.parametrize(
    "schema",
    [
        with_property({"$ref": "#/$defs/a"}, **{"$defs": {"a": {"type": "string"}}}),
        with_property({"$ref": "#/definitions/a"}, definitions={"a": True}),
        with_property({"$ref": "#"}),
        with_property({"$ref": "#/properties/q"}, properties={"p": {"$ref": "#/properties/q"}, "q": {}}),
        {"$ref": "#/$defs/node", "$defs": {"node": {"properties": {"next": {"$ref": "#/$defs/node"}}}}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"items": {"$ref": "#/$defs/a"}}}},
        {"$ref": "#/$defs/a~1b~0c%20d", "$defs": {"a/b~c d": {}}},
        {"$ref": "#/anyOf/1", "anyOf": [{}, {"type": "object"}]},
        with_property({"const": {"$ref": "x"}, "default": {"$ref": "http://x"}, "enum": [{"$ref": "y"}]}),
    ],
)
def test_references_that_lead_somewhere(schema: Any) -> None:
    assert wrong(schema) is None


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ([], "expected an object."),
        (7, "expected an object."),
        ("x", "expected an object."),
        (True, "expected an object."),
        (None, "expected an object."),
        ({"type": "array"}, "its type must be 'object'."),
        ({"type": None}, "its type must be 'object'."),
        ({"type": ["object", "null"]}, "its type must be 'object'."),
        (
            with_property({"type": "strin"}),
            "it is no valid JSON Schema at 'properties[...].type': invalid enum value 'strin'.",
        ),
        (
            {"properties": []},
            "it is no valid JSON Schema at 'properties': expected 'object', got 'array'.",
        ),
        ({"required": "p"}, "it is no valid JSON Schema at 'required': expected 'array', got 'str'."),
        ({"required": [1]}, "it is no valid JSON Schema at 'required[0]': expected 'str', got 'int'."),
        (with_property({"required": True}), None),
        (with_property("string"), None),
        (with_property(None), None),
        (with_property([{"type": "string"}]), None),
        (with_property({"items": "string"}), None),
        (with_property({"items": {"type": 7}}), None),
        (with_property({"enum": "a"}), None),
        (with_property({"anyOf": []}), None),
        (with_property({"anyOf": {"type": "string"}}), None),
        (with_property({"minLength": -1}), None),
        (with_property({"minLength": "1"}), None),
        (with_property({"multipleOf": 0}), None),
        (with_property({"minimum": "0"}), None),
        (with_property({"pattern": 7}), None),
        (with_property({"description": 7}), None),
        (with_property({"$ref": 7}), None),
        ({"additionalProperties": "no"}, None),
        ({"$defs": {"a": 1}}, None),
    ],
)
def test_what_is_no_schema(schema: Any, message: str | None) -> None:
    found = wrong(schema)
    assert found is not None
    assert message is None or found == message


NOWHERE = "a '$ref' in it leads nowhere. Refer to a definition inside the schema, as '#/$defs/name'."


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/absent"},
        {"$ref": ""},
        {"$ref": "#"},
        {"$ref": "#name"},
        {"$ref": "#/"},
        {"$ref": "other.json"},
        {"$ref": "https://example.com/schema.json"},
        {"$ref": "https://example.com/schema.json#/$defs/a", "$defs": {"a": {}}},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"$ref": "#/$defs/c", "$defs": {"c": {"$ref": "#/$defs/a"}, "a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/x"}}},
        {"$ref": "#/anyOf/2", "anyOf": [{}, {}]},
        {"$ref": "#/anyOf/-1", "anyOf": [{}, {}]},
        {"$ref": "#/anyOf/²", "anyOf": [{}, {}]},
        {"$ref": "#/required/0", "required": ["a"]},
        {"$ref": "#/title", "title": "T"},
        with_property({"items": {"anyOf": [{"$ref": "#/$defs/absent"}]}}),
        with_property({}, properties={"enum": {"$ref": "#/absent"}}),
    ],
)
def test_references_that_lead_nowhere(schema: Any) -> None:
    assert wrong(schema) == NOWHERE


@pytest.mark.parametrize(
    "schema",
    [
        with_property({"const": "a\0"}),
        with_property({"description": "\0"}),
        {"properties": {"a\0": {}}},
        {"required": ["\0"]},
        {"x": {"y": ["\0"]}},
    ],
)
def test_nul_character_anywhere(schema: Any) -> None:
    assert wrong(schema) == "it contains a NUL character, which cannot be stored: remove it."


def test_escaped_backslash_before_a_u_is_no_nul_character() -> None:
    assert wrong(with_property({"pattern": r"[^\u0000]"})) is None


@pytest.mark.parametrize(
    "schema",
    [
        b"",
        b"{",
        b"{}x",
        b'{"a":\xff}',
        b'{"a":"\\ud800"}',
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":' + b"9" * 5_000 + b"}",
    ],
)
def test_what_is_no_json(schema: bytes) -> None:
    assert problem(schema) is not None


def test_one_byte_too_many() -> None:
    schema = b'{"title":"%b"}' % (b"x" * (MOST_SCHEMA - 12))
    assert problem(schema) is None
    assert problem(schema.replace(b"x", b"xx", 1)) == "it takes 65537 bytes. Send 65536 at most."


# Depth and time ------------------------------------------------------------------------------------------------------


def nested(levels: int) -> bytes:
    return b'{"items":' * levels + b"{}" + b"}" * levels


def test_as_deep_as_it_may_be() -> None:
    assert problem(nested(MOST_DEPTH)) is None
    assert problem(nested(MOST_DEPTH + 1)) == "it is nested more than 64 levels deep."


@pytest.mark.parametrize("schema", [nested(900), nested(6_000), b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}"])
def test_far_too_deep(schema: bytes) -> None:
    assert "nested" in (problem(schema) or "")


LABORIOUS: dict[str, Any] = {
    "properties": {"properties": {f"p{number}": {} for number in range(4_500)}},
    "errors": {"properties": {f"p{number}": {"type": 1} for number in range(3_000)}},
    "alternatives": {"anyOf": [{}] * 16_000},
    "values": {"enum": [{}] * 15_000},
    "names": {"required": [str(number) for number in range(6_000)]},
    "a chain of references": {
        "$ref": "#/$defs/a0",
        "$defs": {f"a{number}": {"$ref": f"#/$defs/a{number + 1}"} for number in range(1_500)} | {"a1500": {}},
    },
    "a doubling tree of references": {
        "$ref": "#/$defs/a0",
        "$defs": {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(60)} | {"a60": {}},
    },
    "a pattern": with_property({"pattern": "(a+)+" * 9_000}),
}


@pytest.mark.parametrize("schema", LABORIOUS.values(), ids=LABORIOUS.keys())
def test_no_schema_takes_long_to_check(schema: Any) -> None:
    data = json.dumps(schema, separators=(",", ":")).encode()
    assert len(data) <= MOST_SCHEMA
    began = time.process_time()
    problem(data)
    assert time.process_time() - began < 0.3


# Against the metaschema ----------------------------------------------------------------------------------------------

_value = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["string", "object", "a", ""]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)
_KEYWORDS = sorted(
    set(jsonschema.Draft202012Validator.VALIDATORS) - {"$dynamicRef", "$ref", "dependentRequired", "unevaluatedItems"}
)
_schema = st.recursive(
    st.booleans() | st.dictionaries(st.sampled_from(_KEYWORDS), _value, max_size=3),
    lambda inner: (
        st.dictionaries(st.sampled_from(["items", "not", "additionalProperties", "contains"]), inner, max_size=2)
        | st.fixed_dictionaries({"properties": st.dictionaries(st.sampled_from("ab"), inner, max_size=2)})
        | st.fixed_dictionaries({"anyOf": st.lists(inner, max_size=2)})
    ),
    max_leaves=4,
)


@given(schema=_schema)
def test_what_the_metaschema_takes_is_taken(schema: Any) -> None:
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        return
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError:
        return
    assert wrong(schema) is None
