"""Keeps bodies within bounds: size, time, type, encoding, and JSON that means one thing only.

What the head alone tells is refused here, a path that climbs too: a proxy before the gateway may have taken it for
another one, and let through what it closes. The body itself is read when a handler asks for it, after auth: nobody who
may not ask makes the gateway read and parse.
"""

import asyncio
import json
import math
import re
from typing import Final
from urllib.parse import unquote

import msgspec
from aiohttp import StreamReader, web

from gateway import keys
from gateway.errors import InvalidRequest, PayloadTooLarge, RequestTimeout, UnsupportedMediaType
from gateway.settings import Settings
from middleware.contract import AiohttpMiddleware, Handler, Middleware, NoConfig

BODY_METHODS: Final = frozenset({"POST", "PUT", "PATCH"})
OFF_LOOP: Final = 262_144
"""Bytes from which a body is checked in a thread: a hundred milliseconds of parsing would stop every stream."""

MAX_PARTS: Final = 500_000
"""Values in a body, counted by their commas and brackets: parsing a list of numbers stops every thread until it is done
(0.6 s for 20 MiB, measured)."""

_ENCODED: Final = re.compile(r"%2[ef]", re.IGNORECASE)
_UTF8: Final = re.compile(r"(charset\s*=\s*\"?utf-?8\"?)?", re.IGNORECASE)
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def build(config: NoConfig, settings: Settings) -> AiohttpMiddleware:
    """Return the middleware."""
    _ = config

    @web.middleware
    async def body_guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if _climbs(request.rel_url.raw_path):
            raise InvalidRequest(
                "The path holds a segment of dots alone, '.' or '..'. Send it without that, and an agent by its id.",
                code="malformed_request",
            )
        if request.method in BODY_METHODS and request.match_info.http_exception is None:
            _check_head(request, settings.max_body)
            request[keys.BODY] = GuardedBody(request.content, settings.max_body, settings.body_timeout)
        return await handler(request)

    return body_guard


def _climbs(path: str) -> bool:
    return any(segment in (".", "..") for segment in _ENCODED.sub(lambda found: unquote(found[0]), path).split("/"))


def _check_head(request: web.Request, max_body: int) -> None:
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaType("A compressed body is not accepted. Send it without Content-Encoding.")
    if request.body_exists and not _is_json(request.headers.get("Content-Type", "")):
        raise UnsupportedMediaType("The body must be JSON in UTF-8. Send it with 'Content-Type: application/json'.")
    if request.content_length is not None and request.content_length > max_body:
        raise PayloadTooLarge(max_body)


def _is_json(content_type: str) -> bool:
    kind, _, parameters = content_type.partition(";")
    return kind.strip().lower() == "application/json" and _UTF8.fullmatch(parameters.strip("; \t")) is not None


class GuardedBody:
    """A ``JsonBody``: read and checked once, on the first ``read``.

    The request has it, so it has no request: a ring of the two would keep the body until the garbage collector comes.
    """

    def __init__(self, content: StreamReader, max_body: int, timeout: float) -> None:
        self._content = content
        self._max_body = max_body
        self._timeout = timeout
        self._body: bytes | None = None

    async def read(self) -> bytes:
        """Return the body, which is the text of one JSON object."""
        if self._body is None:
            body = await self._receive()
            if len(body) > OFF_LOOP:
                await asyncio.to_thread(check_json, body)
            else:
                check_json(body)
            self._body = body
        return self._body

    async def _receive(self) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout):
                while data := await self._content.readany():
                    body += data
                    if len(body) > self._max_body:
                        raise PayloadTooLarge(self._max_body)
        except TimeoutError:
            raise RequestTimeout from None
        except web.RequestPayloadError:
            raise InvalidRequest("The request's body is broken.", code="invalid_body") from None
        return bytes(body)


# JSON ----------------------------------------------------------------------------------------------------------------


class _Ambiguous(ValueError):
    """JSON that two readers may read as two things."""


def check_json(body: bytes) -> None:
    """Raise ``InvalidRequest`` unless the body is one JSON object, and the same one to every reader.

    Python's parser finds what msgspec lets pass: names given twice. msgspec finds what Python lets pass: half a
    surrogate pair, which no UTF-8 can hold.
    """
    if not body.strip():
        raise _invalid("it is empty")
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_PARTS:
        raise _invalid(f"it holds more than {MAX_PARTS} commas and brackets")
    try:
        document = _parse(body.decode("utf-8"))
        if _SURROGATE.search(body):
            msgspec.json.decode(body)
    except (UnicodeError, msgspec.DecodeError):
        raise _invalid("it is not UTF-8 text") from None
    except _Ambiguous as error:
        raise _invalid(str(error)) from None
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg.lower()}, at character {error.pos}") from None
    except RecursionError:
        raise _invalid("it is nested too deeply") from None
    except ValueError:
        raise _invalid("a number in it is too long") from None
    if document is not _OBJECT:
        raise _invalid("it must be an object")


def _invalid(what: str) -> InvalidRequest:
    return InvalidRequest(f"The request's body is not valid JSON: {what}.", code="invalid_json")


_OBJECT: Final = object()


def _object(pairs: list[tuple[str, object]]) -> object:
    """Stand for every object: its content is checked and not kept."""
    if len(dict(pairs)) != len(pairs):
        raise _Ambiguous("a name stands twice in one object")
    return _OBJECT


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Ambiguous("a number in it is out of range")
    return value


def _constant(name: str) -> float:
    raise _Ambiguous(f"{name} is not JSON")


_parse: Final = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant).decode


middleware = Middleware("body_guard", NoConfig, build)
