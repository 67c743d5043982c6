"""Whether documents fit a client's JSON Schema, found out within bounds: both come from outside.

jsonschema, by which the tests hold this, has no bounds: it writes the document into each failure on its way, and goes a
way again as often as a schema's references lead there.
Patterns are not tried: they are ECMAScript's, and one can keep Python's matcher busy for years.
"""

from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import islice
from typing import Any, Final, TypeAlias

import msgspec

from gateway.translation.schemas import target

MOST_STEPS: Final = 10_000
"""Schemas held against values, for all documents of one answer: some 20 ms, in which nothing else is answered."""
LISTED: Final = 8
"""What is listed in a schema, and looked through for the price of a step."""

WRITTEN: Final = 64
"""Bytes of JSON that are written for the price of a step."""
DIVISION: Final = 16
"""Steps that the division of two numbers costs."""

_Check: TypeAlias = Callable[["Fitting", Any, Any, dict[str, Any]], bool]


class _Untellable(Exception):
    """The steps are used up, or the schema is none."""


class Fitting:
    """Tells of documents whether they fit a schema; one that cannot be told of within bounds does not.

    What a reference leads to is held against each value once: some lines of schema can ask for it billions of times.
    """

    def __init__(self, schema: msgspec.Raw) -> None:
        self._schema: object = msgspec.json.decode(schema)
        self._left = MOST_STEPS
        self._told: dict[tuple[str, int], bool | None] = {}

    def takes(self, document: object) -> bool:
        """Tell whether a document fits, at the price of what is left of the steps."""
        self._told.clear()  # values are known by their places in memory
        try:
            return self.fits(document, self._schema)
        except (_Untellable, RecursionError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return False  # the schema is none, where nothing else had to know

    def fits(self, value: object, schema: object) -> bool:
        """Tell whether a value within the document fits a part of the schema."""
        self._left -= 1
        if self._left < 0:
            raise _Untellable
        if not isinstance(schema, dict):
            return bool(schema)
        for keyword, wanted in schema.items():
            check = _CHECKS.get(keyword)
            if check is not None and not check(self, wanted, value, schema):
                return False
        return True

    def all_fit(self, values: Iterable[object], schema: object) -> bool:
        """Tell whether each of some values fits a part of the schema."""
        return all(self.fits(value, schema) for value in values)

    def follows(self, reference: str, value: object) -> bool:
        """Tell whether a value fits what a reference leads to."""
        place = (reference, id(value))
        if place not in self._told:
            schema = target(reference, self._schema)
            if not isinstance(schema, dict | bool):
                raise _Untellable
            self._told[place] = None
            self._told[place] = self.fits(value, schema)
        told = self._told[place]
        if told is None:
            raise _Untellable  # it leads round and round
        return told

    def same(self, one: object, other: object) -> bool:
        """Tell whether two values are the same one in JSON, where true is not 1."""
        if isinstance(one, dict) and isinstance(other, dict):
            self.spend(1 + len(one) // LISTED)
            return one.keys() == other.keys() and all(self.same(value, other[key]) for key, value in one.items())
        if isinstance(one, list) and isinstance(other, list):
            self.spend(1 + len(one) // LISTED)
            return len(one) == len(other) and all(map(self.same, one, other))
        return isinstance(one, bool) is isinstance(other, bool) and one == other

    def spend(self, steps: int) -> None:
        """Pay for what is about to be gone through."""
        self._left -= steps
        if self._left < 0:
            raise _Untellable


# Values --------------------------------------------------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_TYPES: Final[dict[str, Callable[[object], bool]]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": _is_number,
    "integer": lambda value: _is_number(value) and value == int(value),  # type: ignore[call-overload]
}


def _exact(number: float) -> Fraction:
    return Fraction(repr(number))  # as it is written, which is not what a float is


# Keywords ------------------------------------------------------------------------------------------------------------


def _reference(fitting: Fitting, wanted: str, value: Any, _schema: Any) -> bool:
    return fitting.follows(wanted, value)


def _type(_fitting: Fitting, wanted: str | list[str], value: Any, _schema: Any) -> bool:
    return _TYPES[wanted](value) if isinstance(wanted, str) else any(_TYPES[kind](value) for kind in wanted)


def _enum(fitting: Fitting, wanted: list[Any], value: Any, _schema: Any) -> bool:
    fitting.spend(len(wanted) // LISTED)
    return any(fitting.same(value, each) for each in wanted)


def _const(fitting: Fitting, wanted: Any, value: Any, _schema: Any) -> bool:
    return fitting.same(value, wanted)


def _all_of(fitting: Fitting, wanted: list[Any], value: Any, _schema: Any) -> bool:
    return all(fitting.fits(value, each) for each in wanted)


def _any_of(fitting: Fitting, wanted: list[Any], value: Any, _schema: Any) -> bool:
    return any(fitting.fits(value, each) for each in wanted)


def _one_of(fitting: Fitting, wanted: list[Any], value: Any, _schema: Any) -> bool:
    return sum(fitting.fits(value, each) for each in wanted) == 1


def _not(fitting: Fitting, wanted: Any, value: Any, _schema: Any) -> bool:
    return not fitting.fits(value, wanted)


def _if(fitting: Fitting, wanted: Any, value: Any, schema: dict[str, Any]) -> bool:
    return fitting.fits(value, schema.get("then" if fitting.fits(value, wanted) else "else", True))


def _properties(fitting: Fitting, wanted: dict[str, Any], value: Any, _schema: Any) -> bool:
    fitting.spend(len(wanted) // LISTED)
    return not isinstance(value, dict) or all(
        fitting.fits(value[name], schema) for name, schema in wanted.items() if name in value
    )


def _additional_properties(fitting: Fitting, wanted: Any, value: Any, schema: dict[str, Any]) -> bool:
    if not isinstance(value, dict) or "patternProperties" in schema:
        return True
    fitting.spend(len(value) // LISTED)
    named = schema.get("properties", {})
    return fitting.all_fit((inner for name, inner in value.items() if name not in named), wanted)


def _property_names(fitting: Fitting, wanted: Any, value: Any, _schema: Any) -> bool:
    return not isinstance(value, dict) or fitting.all_fit(value, wanted)


def _required(fitting: Fitting, wanted: list[str], value: Any, _schema: Any) -> bool:
    fitting.spend(len(wanted) // LISTED)
    return not isinstance(value, dict) or all(name in value for name in wanted)


def _dependent_required(fitting: Fitting, wanted: dict[str, list[str]], value: Any, schema: Any) -> bool:
    fitting.spend(len(wanted) // LISTED)
    return not isinstance(value, dict) or all(
        _required(fitting, names, value, schema) for name, names in wanted.items() if name in value
    )


def _dependent_schemas(fitting: Fitting, wanted: dict[str, Any], value: Any, _schema: Any) -> bool:
    fitting.spend(len(wanted) // LISTED)
    return not isinstance(value, dict) or all(
        fitting.fits(value, schema) for name, schema in wanted.items() if name in value
    )


def _prefix_items(fitting: Fitting, wanted: list[Any], value: Any, _schema: Any) -> bool:
    return not isinstance(value, list) or all(map(fitting.fits, value, wanted))


def _items(fitting: Fitting, wanted: Any, value: Any, schema: dict[str, Any]) -> bool:
    """Take the older drafts' list of items for what is called prefixItems now."""
    if isinstance(wanted, list):
        return _prefix_items(fitting, wanted, value, schema)
    return not isinstance(value, list) or fitting.all_fit(
        islice(value, len(schema.get("prefixItems", ())), None), wanted
    )


def _contains(fitting: Fitting, wanted: Any, value: Any, schema: dict[str, Any]) -> bool:
    if not isinstance(value, list):
        return True
    found = sum(fitting.fits(item, wanted) for item in value)
    return bool(schema.get("minContains", 1) <= found <= schema.get("maxContains", len(value)))


def _unique_items(fitting: Fitting, wanted: Any, value: Any, _schema: Any) -> bool:
    """Compare by what is written: in pairs a long list takes for ever."""
    if wanted is not True or not isinstance(value, list):
        return True
    written = set()
    for item in value:
        text = msgspec.json.encode(item, order="deterministic")
        fitting.spend(1 + len(text) // WRITTEN)
        written.add(text)
    return len(written) == len(value)


def _multiple_of(fitting: Fitting, wanted: float, value: Any, _schema: Any) -> bool:
    fitting.spend(DIVISION)
    return not _is_number(value) or (_exact(value) / _exact(wanted)).denominator == 1


def _bound(kind: Callable[[object], bool], holds: Callable[[Any, Any], bool]) -> _Check:
    """Return the check of a bound for one kind of values."""
    return lambda _fitting, wanted, value, _schema: not kind(value) or holds(value, wanted)


_CHECKS: Final[dict[str, _Check]] = {
    "$dynamicRef": _reference,
    "$ref": _reference,
    "additionalProperties": _additional_properties,
    "allOf": _all_of,
    "anyOf": _any_of,
    "const": _const,
    "contains": _contains,
    "dependentRequired": _dependent_required,
    "dependentSchemas": _dependent_schemas,
    "enum": _enum,
    "exclusiveMaximum": _bound(_is_number, lambda value, most: bool(value < most)),
    "exclusiveMinimum": _bound(_is_number, lambda value, least: bool(value > least)),
    "if": _if,
    "items": _items,
    "maxItems": _bound(_TYPES["array"], lambda value, most: len(value) <= most),
    "maxLength": _bound(_TYPES["string"], lambda value, most: len(value) <= most),
    "maxProperties": _bound(_TYPES["object"], lambda value, most: len(value) <= most),
    "maximum": _bound(_is_number, lambda value, most: bool(value <= most)),
    "minItems": _bound(_TYPES["array"], lambda value, least: len(value) >= least),
    "minLength": _bound(_TYPES["string"], lambda value, least: len(value) >= least),
    "minProperties": _bound(_TYPES["object"], lambda value, least: len(value) >= least),
    "minimum": _bound(_is_number, lambda value, least: bool(value >= least)),
    "multipleOf": _multiple_of,
    "not": _not,
    "oneOf": _one_of,
    "prefixItems": _prefix_items,
    "properties": _properties,
    "propertyNames": _property_names,
    "required": _required,
    "type": _type,
    "uniqueItems": _unique_items,
}
