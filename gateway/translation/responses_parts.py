"""One part of a request, read on its own: errors name the field's path from the request's top."""

from typing import TypeVar

import msgspec

from gateway.errors import InvalidRequest
from gateway.translation.field_errors import field_error

_Part = TypeVar("_Part")


def read_part(decoder: msgspec.json.Decoder[_Part], raw: msgspec.Raw, path: str) -> _Part:
    """Return a part of a request, typed; raises ``InvalidRequest`` with the field's path from the top."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise field_error(_below(str(error), path)) from None
    except RecursionError:
        raise InvalidRequest(f"'{path}' is nested too deeply: flatten it.", param=path, code="invalid_json") from None


def _below(message: str, path: str) -> str:
    what, at, where = message.rpartition(" - at `$")
    return f"{what} - at `$.{path}{where}" if at else f"{message} - at `$.{path}`"
