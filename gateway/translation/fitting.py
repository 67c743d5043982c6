"""Whether a document fits a client's JSON Schema, found out within bounds: both come from outside.

Patterns are not tried: they are ECMAScript's, and one can keep Python's matcher busy for years.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import msgspec
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.exceptions import UnknownType
from jsonschema.validators import extend
from referencing import Registry
from referencing.exceptions import Unresolvable

MOST_STEPS: Final = 20_000
"""Keywords that are tried: half a second's work at most. A schema of some lines can ask for billions."""

_Errors: TypeAlias = Iterator[ValidationError]
_Check: TypeAlias = Callable[[Any, Any, Any, Any], _Errors | None]


class _TooMuch(Exception):
    """The steps are used up."""


class _Steps:
    """Counts what is tried for one document."""

    def __init__(self) -> None:
        self._left = MOST_STEPS

    def counted(self, check: _Check) -> _Check:
        """Return the check of a keyword, counted by what it goes through."""

        def checked(validator: Any, value: Any, instance: Any, schema: Any) -> _Errors:
            self._left -= 1 + (len(value) // 8 if isinstance(value, list | dict) else 0)
            if self._left < 0:
                raise _TooMuch
            yield from check(validator, value, instance, schema) or ()

        return checked


def fits(document: object, schema: msgspec.Raw) -> bool:
    """Tell whether a document fits a schema; one that cannot be told of within bounds does not."""
    steps = _Steps()
    checks = {keyword: steps.counted(check) for keyword, check in _CHECKS.items()}
    kind: Any = extend(Draft202012Validator, checks)  # type: ignore[no-untyped-call]
    try:
        return bool(kind(_undated(msgspec.json.decode(schema)), registry=Registry()).is_valid(document))
    except (_TooMuch, RecursionError, Unresolvable, UnknownType, ArithmeticError, ValueError, TypeError):
        return False


def _undated(schema: object) -> object:
    """Return a schema without the drafts that its parts name: jsonschema would check those by that draft's rules."""
    if isinstance(schema, dict):
        return {key: _undated(inner) for key, inner in schema.items() if key != "$schema" or not isinstance(inner, str)}
    return [_undated(inner) for inner in schema] if isinstance(schema, list) else schema


def _not_tried(_validator: Any, _value: Any, _instance: Any, _schema: Any) -> None:
    pass


def _unique(_validator: Any, value: Any, instance: Any, _schema: Any) -> _Errors:
    """Compare by what is written: in pairs, as jsonschema does, a long list takes for ever."""
    if value is True and isinstance(instance, list):
        written = {msgspec.json.encode(item, order="deterministic") for item in instance}
        if len(written) < len(instance):
            yield ValidationError("not unique")


def _additional(validator: Any, value: Any, instance: Any, schema: Any) -> _Errors | None:
    if "patternProperties" in schema:
        return None
    return _DRAFT["additionalProperties"](validator, value, instance, schema)


def _items(validator: Any, value: Any, instance: Any, schema: Any) -> _Errors | None:
    """Take the older drafts' list of items for what is called prefixItems now."""
    keyword = "prefixItems" if isinstance(value, list) else "items"
    return _DRAFT[keyword](validator, value, instance, schema)


_DRAFT: Final[dict[str, _Check]] = dict(Draft202012Validator.VALIDATORS)
_CHECKS: Final[dict[str, _Check]] = {
    **_DRAFT,
    "additionalProperties": _additional,
    "items": _items,
    "pattern": _not_tried,
    "patternProperties": _not_tried,
    "unevaluatedItems": _not_tried,
    "unevaluatedProperties": _not_tried,
    "uniqueItems": _unique,
}
