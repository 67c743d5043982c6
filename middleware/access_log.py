"""Writes one log line per request, when it is over: what was asked, how it ended, how long it took."""

import asyncio
import time
from typing import Final

import msgspec
import structlog
from aiohttp import web

from gateway import keys
from gateway.settings import Settings
from middleware.contract import AiohttpMiddleware, Handler, Middleware
from middleware.routes import route_of

CLIENT_CLOSED: Final = 499
"""nginx's number for a client that did not wait for its answer."""


class Config(msgspec.Struct, forbid_unknown_fields=True):
    """``quiet`` names routes whose lines are written at level DEBUG: probes and scrapes."""

    quiet: tuple[str, ...] = ("/health", "/ready", "/metrics")


def build(config: Config, settings: Settings) -> AiohttpMiddleware:
    """Return the middleware."""
    _ = settings
    log = structlog.get_logger("gateway.access")
    quiet = frozenset(config.quiet)

    @web.middleware
    async def access_log(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.monotonic()
        status = 500
        try:
            response = await handler(request)
            status = response.status
        except asyncio.CancelledError:
            status = CLIENT_CLOSED
            raise
        else:
            return response
        finally:
            route = route_of(request)
            write = log.debug if route in quiet else log.info
            write("request", **_line(request, route, status, started))

    return access_log


def _line(request: web.Request, route: str, status: int, started: float) -> dict[str, object]:
    notes = request[keys.NOTES]
    line: dict[str, object] = {
        "method": request.method,
        "route": route,
        "status": status,
        "ms": round((time.monotonic() - started) * 1000, 1),
    }
    told = msgspec.structs.asdict(notes)
    first_token = told.pop("first_token")
    if first_token is not None:
        line["first_token_ms"] = round(first_token * 1000, 1)
    line.update({name: value for name, value in told.items() if value is not None})
    return line


middleware = Middleware("access_log", Config, build)
