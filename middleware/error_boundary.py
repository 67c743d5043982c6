"""Turns every failure inside it into an answer in OpenAI's shape; what is not ours to show becomes a plain 500."""

from typing import Final

import structlog
from aiohttp import web

from gateway import keys
from gateway.errors import (
    BackendError,
    GatewayError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    RouteNotFound,
    dealt_with,
)
from gateway.settings import Settings
from middleware.contract import AiohttpMiddleware, Handler, Middleware, NoConfig
from middleware.routes import route_of

_log: Final = structlog.get_logger("gateway.errors")


def build(config: NoConfig, settings: Settings) -> AiohttpMiddleware:
    """Return the middleware."""
    _ = config, settings

    @web.middleware
    async def error_boundary(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except GatewayError as error:
            return _answer(request, dealt_with(error))
        except web.HTTPException as error:
            return _answer(request, _from_router(dealt_with(error)))
        except Exception as error:  # noqa: BLE001 - the boundary: a bug becomes a logged 500
            _log.exception("request failed", exc_info=error)
            dealt_with(error)
            return _answer(request, InternalError(should_retry=False))

    return error_boundary


def _from_router(error: web.HTTPException) -> GatewayError:
    match error:
        case web.HTTPMethodNotAllowed(allowed_methods=allowed) if allowed != {"OPTIONS"}:
            return MethodNotAllowed(frozenset(allowed))
        case web.HTTPNotFound() | web.HTTPMethodNotAllowed():  # OPTIONS alone: a preflight fits every path
            return RouteNotFound()
        case web.HTTPServerError():
            return InternalError(should_retry=False)
        case _:
            return InvalidRequest("The request cannot be served as it is. Check it against the API's documentation.")


def _answer(request: web.Request, error: GatewayError) -> web.Response:
    code = request.app[keys.METRICS].count_error(error, route_of(request))
    request[keys.NOTES].error_code = code
    if isinstance(error, BackendError):
        _log.warning("upstream failed", code=code, cause=type(error.__cause__).__name__ if error.__cause__ else None)
    return web.Response(
        body=error.body(), status=error.status, content_type="application/json", headers=error.headers()
    )


middleware = Middleware("error_boundary", NoConfig, build)
