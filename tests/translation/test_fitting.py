import json
import time
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.translation import fitting
from gateway.translation.fitting import Fitting


def fitting_of(schema: Any) -> Fitting:
    return Fitting(msgspec.Raw(json.dumps(schema).encode()))


def fit(document: Any, schema: Any) -> bool:
    return fitting_of(schema).takes(document)


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
        ({"p": [True, 1, "1", 1.5]}, {"properties": {"p": {"uniqueItems": True}}}, True),
        ({"x1": 1}, {"patternProperties": {"^x": {}}, "additionalProperties": False}, True),
    ],
)
def test_keywords_that_are_told_of_otherwise(document: Any, schema: Any, expected: Any) -> None:
    assert fit(document, schema) is expected


def test_keywords_that_are_not_tried() -> None:
    assert set(jsonschema.Draft202012Validator.VALIDATORS) - set(fitting._CHECKS) == {
        "format",
        "pattern",
        "patternProperties",
        "unevaluatedItems",
        "unevaluatedProperties",
    }


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
    ({}, {"not": {"$ref": "#/$defs/absent"}}),
    ({}, {"not": {"$dynamicRef": "#x"}}),
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
    "what nothing is asked of": ({"a": [0] * 500_000}, {"allOf": [{"properties": {"a": {"items": {}}}}] * 1_000}),
    "what nothing can contain": ({"a": [0] * 500_000}, {"properties": {"a": {"contains": False}}}),
    "words that are in every failure": (
        {"a": ["x" * 1_000_000]},
        {"properties": {"a": {"anyOf": [{"items": False}] * 3_000}}},
    ),
    "long lists that are nearly the same": (
        {"a": [[0] * 99 + [1]] * 9_000},
        {"properties": {"a": {"items": {"enum": [[0] * 100] * 320}}}},
    ),
    "long items that are written out": (
        {"a": [["x" * 1_000_000]]},
        {"allOf": [{"properties": {"a": {"not": {"not": {"uniqueItems": True}}}}}] * 900},
    ),
    "divisions": (
        {"a": [1e308, 1e-300] * 9_000},
        {"properties": {"a": {"items": {"anyOf": [{"multipleOf": 1.1e-300}] * 900}}}},
    ),
    "what is contained": ({"a": [1] * 200_000}, {"properties": {"a": {"contains": {"const": 2}}}}),
    "what is unique": ({"a": [{"x": n} for n in range(50_000)]}, {"properties": {"a": {"uniqueItems": True}}}),
}


@pytest.mark.parametrize(("document", "schema"), LABORIOUS.values(), ids=LABORIOUS.keys())
def test_nothing_takes_long(document: Any, schema: Any) -> None:
    asked = fitting_of(schema)
    began = time.process_time()
    asked.takes(document)
    assert (
        time.process_time() - began < 0.3
    )  # on a loop that answers others: without an end to the steps it would be years


def test_steps_are_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = {"properties": {"a": {"items": {"type": "integer"}}}}
    monkeypatch.setattr(fitting, "MOST_STEPS", 20)
    assert fit({"a": [1] * 10}, schema)
    assert not fit({"a": [1] * 30}, schema)


def test_answers_of_one_turn_share_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "MOST_STEPS", 20)
    asked = fitting_of({"properties": {"a": {"items": {"type": "integer"}}}})
    assert [asked.takes({"a": [1] * 10}) for _ in range(2)] == [True, False]


def test_what_a_reference_leads_to_is_tried_once_for_each_value() -> None:
    doubling = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(60)}
    schema = {"$ref": "#/$defs/a0", "$defs": {**doubling, "a60": {"required": ["x"]}}}
    assert fit({"x": 1}, schema)
    assert not fit({}, schema)


FIELDS: list[tuple[Any, Any, Any]] = [
    ({"type": "string", "description": "A word or two."}, "some words", 7),
    ({"type": "integer", "minimum": 0}, 7, -1),
    ({"type": ["string", "null"]}, None, 7),
    ({"enum": [f"choice {n}" for n in range(50)]}, "choice 49", "choice"),
    ({"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]}, {"city": "Paris"}, {"city": None}),
    ({"type": "array", "items": {"type": "string"}}, ["a", "b", "c"], ["a", None]),
]


def nested(depth: int) -> tuple[Any, Any]:
    """Return a schema of 50 properties and one that holds the like of it, so many levels deep, and an answer to it."""
    properties = {f"field_{depth}_{n}": FIELDS[n % 6][0] for n in range(50)}
    answer = {f"field_{depth}_{n}": FIELDS[n % 6][1] for n in range(50)}
    if depth > 1:
        properties["inner"], answer["inner"] = nested(depth - 1)
    strict = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties, **strict}, answer


def test_large_schema_of_a_real_application_is_checked() -> None:
    place = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    schema, answer = nested(6)
    schema["$defs"] = {"place": place}
    assert fit(answer, schema)
    deepest = answer
    while "inner" in deepest:
        deepest = deepest["inner"]
    for number, (_, right, wrong) in enumerate(FIELDS):
        deepest[f"field_1_{number}"] = wrong
        assert not fit(answer, schema)
        deepest[f"field_1_{number}"] = right
    assert fit(answer, schema)


def test_long_list_of_a_real_application_is_checked() -> None:
    row, answer = nested(1)
    place = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    schema = {"$defs": {"place": place}, "properties": {"rows": {"type": "array", "items": row}}}
    assert fit({"rows": [answer] * 60}, schema)
    assert not fit({"rows": [*[answer] * 60, {**answer, "field_1_0": 7}]}, schema)


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
            "maximum": st.integers(-1, 1),
            "exclusiveMinimum": st.integers(-1, 1),
            "exclusiveMaximum": st.integers(-1, 1),
            "multipleOf": st.integers(1, 3),
            "maxLength": st.integers(0, 1),
            "minItems": st.integers(0, 2),
            "minProperties": st.integers(0, 2),
            "maxProperties": st.integers(0, 2),
            "uniqueItems": st.booleans(),
            "const": _document,
            "dependentRequired": st.dictionaries(st.sampled_from("ab"), st.lists(st.sampled_from("ab"), unique=True)),
            "minLength": st.integers(0, 1),
            "maxItems": st.integers(0, 2),
            "enum": st.lists(st.integers(-3, 3) | st.none() | st.booleans() | st.lists(st.sampled_from([0, False]))),
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
            "minContains": st.integers(0, 2),
            "maxContains": st.integers(0, 2),
            "prefixItems": st.lists(inner, min_size=1, max_size=2),
            "propertyNames": inner,
            "if": inner,
            "then": inner,
            "else": inner,
            "allOf": st.lists(inner, min_size=1, max_size=2),
            "dependentSchemas": st.dictionaries(st.sampled_from("ab"), inner),
            "properties": st.dictionaries(st.sampled_from("ab"), inner),
            "anyOf": st.lists(inner, min_size=1, max_size=2),
            "oneOf": st.lists(inner, min_size=1, max_size=2),
        },
    ),
    max_leaves=5,
)


@settings(max_examples=300)
@given(document=_document, schema=_schema)
def test_jsonschema_says_the_same(document: Any, schema: Any) -> None:
    assert fit(document, schema) is jsonschema.Draft202012Validator(schema).is_valid(document)
