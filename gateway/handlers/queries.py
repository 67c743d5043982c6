"""A request's query string -> its Struct."""

from typing import TypeVar

import msgspec
from aiohttp import web

from gateway.errors import InvalidRequest
from gateway.translation.field_errors import field_error

T = TypeVar("T", bound=msgspec.Struct)


def query_of(request: web.Request, kind: type[T]) -> T:
    """Return what the query says; raises ``InvalidRequest`` for a field that is wrong, or stands twice.

    A field that is empty, as ``cursor=`` of the first page, is none.
    """
    query = request.query
    known = {field.encode_name for field in msgspec.structs.fields(kind)}
    for name in known:
        if len(query.getall(name, ())) > 1:
            raise InvalidRequest(f"'{name}' stands twice in the query: send it once.", param=name)
    try:
        return msgspec.convert({name: query[name] for name in known if query.get(name)}, kind, strict=False)
    except msgspec.ValidationError as error:
        raise field_error(str(error)) from None
