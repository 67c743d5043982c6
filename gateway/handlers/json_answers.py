"""A Struct -> the JSON answer that has it."""

from typing import Final

import msgspec
from aiohttp import web

_encode: Final = msgspec.json.Encoder().encode


def json_answer(answer: msgspec.Struct, *, status: int = 200) -> web.Response:
    """Return a whole answer."""
    return web.Response(body=_encode(answer), status=status, content_type="application/json")
