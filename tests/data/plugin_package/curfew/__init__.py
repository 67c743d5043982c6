"""A middleware that somebody else wrote: at night it lets nobody in, and it always says so in a header."""

import msgspec
from aiohttp import web

from gateway import keys
from gateway.errors import Forbidden
from gateway.settings import Settings
from middleware.contract import AiohttpMiddleware, Handler, Middleware


class Config(msgspec.Struct, forbid_unknown_fields=True):
    """Whether it is night, and what to say then."""

    night: bool = False
    message: str = "We are asleep."


def build(config: Config, settings: Settings) -> AiohttpMiddleware:
    """Return the middleware."""
    _ = settings

    @web.middleware
    async def curfew(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[keys.RESPONSE_HEADERS]["X-Curfew"] = "night" if config.night else "day"
        if config.night:
            raise Forbidden(config.message, code="curfew")
        return await handler(request)

    return curfew


middleware = Middleware("curfew", Config, build)
