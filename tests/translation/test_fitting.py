import json
import time
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.translation import fitting
from gateway.translation.fitting import fits


def fit(document: Any, schema: Any) -> bool:
    return fits(document, msgspec.Raw(json.dumps(schema).encode()))


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "age": {"type": ["integer", "null"], "minimum": 0},
        "friends": {"type": "array", "items": {"$ref": "#"}},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"name": "Anna"}, True),
        ({"name": "Anna", "age": None, "kind": "b"}, True),
        ({"name": "Anna", "friends": [{"name": "Ben", "friends": [{"name": "Cid"}]}]}, True),
        ({}, False),
        ({"name": ""}, False),
        ({"name": 7}, False),
        ({"name": "Anna", "age": -1}, False),
        ({"name": "Anna", "age": 1.5}, False),
        ({"name": "Anna", "kind": "c"}, False),
        ({"name": "Anna", "more": 1}, False),
        ({"name": "Anna", "friends": [{"name": "Ben", "friends": [{}]}]}, False),
    ],
)
def test_document_and_schema(document: Any, expected: Any) -> None:
    assert fit(document, PERSON) is expected


@pytest.mark.parametrize(
    ("document", "schema", "expected"),
    [
        ({"p": [1, "a"]}, {"properties": {"p": {"prefixItems": [{"type": "integer"}, {"type": "string"}]}}}, True),
        ({"p": ["a", 1]}, {"properties": {"p": {"items": [{"type": "integer"}, {"type": "string"}]}}}, False),
        ({"p": [1, "a"]}, {"properties": {"p": {"items": [{"type": "integer"}, {"type": "string"}]}}}, True),
        ({"p": [1, 2, 1]}, {"properties": {"p": {"uniqueItems": True}}}, False),
        ({"p": [1, 2, 3]}, {"properties": {"p": {"uniqueItems": True}}}, True),
        ({"p": [{"a": 1, "b": 2}, {"b": 2, "a": 1}]}, {"properties": {"p": {"uniqueItems": True}}}, False),
        ({"p": [1, 1]}, {"properties": {"p": {"uniqueItems": False}}}, True),
        ({"x1": 1}, {"patternProperties": {"^x": {}}, "additionalProperties": False}, True),
    ],
)
def test_keywords_that_are_told_of_otherwise(document: Any, schema: Any, expected: Any) -> None:
    assert fit(document, schema) is expected


def test_patterns_are_not_tried() -> None:
    assert fit({"p": "b"}, {"properties": {"p": {"pattern": "^a$"}}})
    assert fit({"p": "b"}, {"properties": {"p": {"pattern": r"\p{L}("}}})


def test_part_that_names_another_draft_is_checked_all_the_same() -> None:
    draft = {"$schema": "http://json-schema.org/draft-07/schema#"}
    assert fit({"p": "b"}, {**draft, "properties": {"p": {**draft, "pattern": "("}}})
    assert not fit({"p": "b"}, {**draft, "properties": {"p": {**draft, "type": "integer"}}})
    assert not fit({"$schema": 1}, {"properties": {"$schema": {"type": "string"}}})


BROKEN: list[tuple[Any, Any]] = [
    ({}, {"$ref": "#/$defs/absent"}),
    ({}, {"$ref": "http://127.0.0.1:9/x"}),
    ({}, {"$dynamicRef": "http://127.0.0.1:9/x"}),
    ({"a": 1}, {"$defs": {"x": {}}, "properties": {"a": {"$id": "http://127.0.0.1:9/b", "$ref": "#/$defs/x"}}}),
    ({}, {"allOf": [{"$ref": "#"}]}),
    ({"a": 1}, {"dependentRequired": {"a": 7}}),
    ({"a": 1}, {"properties": {"a": {"type": "whole"}}}),
    ({"a": 1}, {"properties": {"a": {"minimum": "0"}}}),
]


@pytest.mark.parametrize(("document", "schema"), BROKEN)
def test_schema_that_cannot_be_told_by_fits_nothing(document: Any, schema: Any) -> None:
    assert not fit(document, schema)


LABORIOUS: dict[str, tuple[Any, Any]] = {
    "a pattern": ({"a": "a" * 60 + "!"}, {"properties": {"a": {"pattern": "^(a+)+$"}}}),
    "a pattern of names": ({"a" * 60 + "!": 1}, {"patternProperties": {"^(a+)+$": {}}, "additionalProperties": False}),
    "a doubling tree": (
        {},
        {
            "$ref": "#/$defs/a0",
            "$defs": {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(60)} | {"a60": {}},
        },
    ),
    "a doubling tree of what is absent": (
        {},
        {
            "$ref": "#/$defs/a0",
            "$defs": {f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(60)} | {"a60": False},
        },
    ),
    "alternatives": (
        {"a": ["x"] * 100_000},
        {"properties": {"a": {"items": {"anyOf": [{"type": "null"}] * 99 + [{}]}}}},
    ),
    "values": ({"a": [9_999] * 100_000}, {"properties": {"a": {"items": {"enum": list(range(10_000))}}}}),
    "what is contained": ({"a": [1] * 200_000}, {"properties": {"a": {"contains": {"const": 2}}}}),
    "what is unique": ({"a": [{"x": n} for n in range(50_000)]}, {"properties": {"a": {"uniqueItems": True}}}),
}


@pytest.mark.parametrize(("document", "schema"), LABORIOUS.values(), ids=LABORIOUS.keys())
def test_nothing_takes_long(document: Any, schema: Any) -> None:
    began = time.process_time()
    fit(document, schema)
    assert time.process_time() - began < 20  # without an end to the steps it would be years


def test_steps_are_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = {"properties": {"a": {"items": {"type": "integer"}}}}
    monkeypatch.setattr(fitting, "MOST_STEPS", 20)
    assert fit({"a": [1] * 10}, schema)
    assert not fit({"a": [1] * 30}, schema)


# Against jsonschema --------------------------------------------------------------------------------------------------

_document = st.dictionaries(
    st.sampled_from("ab"),
    st.recursive(
        st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "x"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
        max_leaves=5,
    ),
)
_schema = st.recursive(
    st.booleans()
    | st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["object", "array", "string", "integer", "null"]),
            "minimum": st.integers(-1, 1),
            "minLength": st.integers(0, 1),
            "maxItems": st.integers(0, 2),
            "enum": st.lists(st.integers(-3, 3) | st.none()),
            "required": st.lists(st.sampled_from("ab"), unique=True),
        },
    ),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "items": inner,
            "not": inner,
            "additionalProperties": inner,
            "contains": inner,
            "properties": st.dictionaries(st.sampled_from("ab"), inner),
            "anyOf": st.lists(inner, min_size=1, max_size=2),
            "oneOf": st.lists(inner, min_size=1, max_size=2),
        },
    ),
    max_leaves=5,
)


@given(document=_document, schema=_schema)
def test_jsonschema_says_the_same(document: Any, schema: Any) -> None:
    assert fit(document, schema) is jsonschema.Draft202012Validator(schema).is_valid(document)
