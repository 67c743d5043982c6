"""Counts and times every request, by the router's own patterns and closed sets: no label is a client's choice.

One that a gateway hands on to another is counted where the client sent it.
"""

import asyncio
import time

from aiohttp import web

from gateway import keys
from gateway.metrics import METHODS
from gateway.settings import Settings
from middleware.access_log import CLIENT_CLOSED
from middleware.contract import AiohttpMiddleware, Handler, Middleware, NoConfig
from middleware.routes import route_of


def build(config: NoConfig, settings: Settings) -> AiohttpMiddleware:
    """Return the middleware."""
    _ = config, settings

    @web.middleware
    async def metrics(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request[keys.NOTES].is_forwarded:
            return await handler(request)
        figures = request.app[keys.METRICS]
        started = time.monotonic()
        status = 500
        figures.in_flight.inc()
        try:
            response = await handler(request)
            status = response.status
        except asyncio.CancelledError:
            status = CLIENT_CLOSED
            raise
        else:
            return response
        finally:
            figures.in_flight.dec()
            route = route_of(request)
            method = request.method if request.method in METHODS else "other"
            figures.requests.labels(route, method, str(status)).inc()
            figures.duration.labels(route).observe(time.monotonic() - started)

    return metrics


middleware = Middleware("metrics", NoConfig, build)
