"""Holds every API key, and every client address, to the configured number of requests."""

import math
from functools import lru_cache
from typing import Final

import limits
from aiohttp import web

from gateway import keys
from gateway.client_block import client_block
from gateway.errors import RateLimited
from gateway.settings import Settings
from gateway.shared_state.limits import Window
from middleware.contract import AiohttpMiddleware, Handler, Middleware, NoConfig

LIMITED: Final = {"api": "openai", "user": "platform"}
"""Whose routes are limited, and what their API is called in the figures: those that come by a credential; the others
have limits of their own, or need none."""


def build(config: NoConfig, settings: Settings) -> AiohttpMiddleware:
    """Return the middleware."""
    _ = config, settings

    @web.middleware
    async def rate_limit(request: web.Request, handler: Handler) -> web.StreamResponse:
        surface = LIMITED.get(request.app[keys.ACCESS](request))
        if surface is None or request[keys.NOTES].is_forwarded:
            return await handler(request)
        allowed = _parsed(request.app[keys.LIVE].current.rate_limit)
        shares = [(limit, bucket) for limit in allowed for bucket in _buckets(request[keys.NOTES])]
        for window in await request.app[keys.LIMITS].take(shares):
            _announce(request[keys.RESPONSE_HEADERS], window)
            if not window.is_granted:
                request.app[keys.METRICS].rate_limited.labels(surface).inc()
                raise RateLimited(str(window.limit), retry_after=math.ceil(window.wait))
        return await handler(request)

    return rate_limit


@lru_cache(maxsize=16)
def _parsed(rate_limit: str) -> tuple[limits.RateLimitItem, ...]:
    return tuple(limits.parse_many(rate_limit))


def _buckets(notes: keys.RequestNotes) -> list[str]:
    buckets = [f"address:{client_block(notes.client or '')}"]
    if notes.owner is not None:
        buckets.insert(0, notes.owner)
    return buckets


def _announce(headers: dict[str, str], window: Window) -> None:
    """Note the tightest of the limits, as OpenAI does: its SDKs and their users read these names."""
    told = headers.get("x-ratelimit-remaining-requests")
    if told is not None and int(told) <= window.remaining:
        return
    headers["x-ratelimit-limit-requests"] = str(window.limit.amount)
    headers["x-ratelimit-remaining-requests"] = str(max(0, window.remaining))
    headers["x-ratelimit-reset-requests"] = duration(window.wait)


def duration(seconds: float) -> str:
    """Write seconds as OpenAI does: ``120ms``, ``6s``, ``1m30s``, ``1h0m0s``."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes}m{left}s"
    return f"{minutes}m{left}s" if minutes else f"{left}s"


middleware = Middleware("rate_limit", NoConfig, build)
