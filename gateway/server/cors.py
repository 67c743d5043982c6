"""Cross-origin requests, for exactly the origins that are configured; without any, no CORS header ever goes out."""

from typing import Final

from aiohttp import web

from gateway.server.routes import Route

METHODS: Final = "GET, POST, PATCH, DELETE, OPTIONS"
EXPOSED: Final = (
    "X-Request-Id, Retry-After, x-should-retry, x-ratelimit-limit-requests, x-ratelimit-remaining-requests, "
    "x-ratelimit-reset-requests"
)
MAX_AGE: Final = "600"


async def preflight(request: web.Request) -> web.Response:
    """Answer a browser's question; the headers that allow anything come from ``allow``."""
    _ = request
    return web.Response(status=204)


PREFLIGHT: Final = (
    Route("OPTIONS", "/v1/{path:.*}", preflight, "open"),
    Route("OPTIONS", "/api/v1/{path:.*}", preflight, "open"),
)


def allow(request: web.BaseRequest, response: web.StreamResponse, origins: frozenset[str]) -> None:
    """Add the headers for an origin that is allowed, and for no other."""
    response.headers.add("Vary", "Origin")
    origin = request.headers.get("Origin")
    if origin not in origins:
        return
    response.headers["Access-Control-Allow-Origin"] = origin
    response.headers["Access-Control-Expose-Headers"] = EXPOSED
    if request.method == "OPTIONS":
        response.headers["Access-Control-Allow-Methods"] = METHODS
        # Whatever the page asks to send: OpenAI's SDK adds some ten headers of its own, and none opens anything here.
        asked = request.headers.get("Access-Control-Request-Headers")
        if asked is not None:
            response.headers["Access-Control-Allow-Headers"] = asked
        response.headers["Access-Control-Max-Age"] = MAX_AGE
