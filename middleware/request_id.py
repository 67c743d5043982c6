"""Gives every request an id: the client's own where it is sane, ours otherwise; it goes back as ``X-Request-Id``."""

import re
import uuid
from typing import Final

import structlog
from aiohttp import web

from gateway import keys
from gateway.settings import Settings
from middleware.contract import AiohttpMiddleware, Handler, Middleware, NoConfig

# What may stand in a log line, a header and a URL as it is; anything else is replaced, not cleaned.
_SANE: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


def build(config: NoConfig, settings: Settings) -> AiohttpMiddleware:
    """Return the middleware."""
    _ = config, settings

    @web.middleware
    async def request_id(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("X-Request-Id", "")
        chosen = given if _SANE.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        request[keys.REQUEST_ID] = chosen
        with structlog.contextvars.bound_contextvars(request_id=chosen):
            return await handler(request)

    return request_id


middleware = Middleware("request_id", NoConfig, build)
