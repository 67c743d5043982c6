"""What msgspec says of a request that does not fit -> OpenAI's wording, with the field's path."""

from typing import Final, TypeVar

import msgspec

from gateway.errors import InvalidRequest

T = TypeVar("T")

MAX_SHOWN: Final = 200
"""Characters of the request that an error message may show."""


def decoded(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """Return what a body that is known to be JSON says; raises ``InvalidRequest`` naming the first field at fault."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise field_error(str(error)) from None
    except RecursionError:
        raise InvalidRequest("The request's body is nested too deeply: flatten it.", code="invalid_json") from None


def field_error(message: str) -> InvalidRequest:
    """Return msgspec's ``... - at `$.a[0].b``` in OpenAI's wording, with the path as ``param``."""
    # The last one: what stands before it may quote the request.
    what, at, where = message.rpartition(" - at `$")
    if not at:
        what, where = message, ""
    path = where.rstrip("`").lstrip(".")
    if what.startswith("Object missing required field `"):
        field = what.rpartition("`")[0].rpartition("`")[2]
        name = f"{path}.{field}" if path else field
        return InvalidRequest(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    detail = what.replace("`", "'")[:MAX_SHOWN]
    name = path or "body"
    if ", got " in detail:
        return InvalidRequest(f"Invalid type for '{name}': {_lower(detail)}.", param=path or None, code="invalid_type")
    return InvalidRequest(f"Invalid value for '{name}': {_lower(detail)}.", param=path or None, code="invalid_value")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
