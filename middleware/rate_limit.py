"""Holds every API key, and every client address, to the configured number of requests."""

import math
import time
from typing import Final

import limits
from aiohttp import web
from limits.aio.storage.memory import Entry, MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter

from gateway import keys
from gateway.client_block import client_block
from gateway.errors import RateLimited
from gateway.settings import Settings
from middleware.contract import AiohttpMiddleware, Handler, Middleware, NoConfig

LIMITED: Final = frozenset({"api", "user"})
"""Whose routes are limited: those that come by a credential; the others have limits of their own, or need none."""
FORGET: Final = 10.0
"""Seconds between two looks for clients whose windows are over."""


class Windows(MemoryStorage):
    """The library's storage in memory, for moving windows, that forgets now and then.

    The library's own looks through all clients at every request, with a thread for each: from a hundred clients on that
    keeps a processor busy (1 ms per request, measured).
    """

    def __init__(self) -> None:
        super().__init__()
        self._forget_at = 0.0

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Take so many places in a client's window; False where fewer are free."""
        now = time.time()
        if now >= self._forget_at:
            self._forget(now)
        entries = self.events.setdefault(key, [])
        last = limit - amount
        if last < 0 or (last < len(entries) and entries[last].atime >= now - expiry):
            return False
        entries[:0] = [Entry(expiry)] * amount
        return True

    def _forget(self, now: float) -> None:
        self._forget_at = now + FORGET
        for key, entries in list(self.events.items()):
            while entries and entries[-1].expiry <= now:
                entries.pop()
            if not entries:
                del self.events[key]


def build(config: NoConfig, settings: Settings) -> AiohttpMiddleware:
    """Return the middleware."""
    _ = config
    allowed = limits.parse_many(settings.rate_limit)
    limiter = MovingWindowRateLimiter(Windows())

    @web.middleware
    async def rate_limit(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.app[keys.ACCESS](request) not in LIMITED:
            return await handler(request)
        notes = request[keys.NOTES]
        shares = [(limit, bucket) for limit in allowed for bucket in _buckets(notes)]
        # All are asked before one is used: whom the one refuses has not used up the other.
        for limit, bucket in shares:
            if not await limiter.test(limit, bucket):
                await _tell(limiter, limit, bucket, request, granted=False)
        for limit, bucket in shares:
            granted = await limiter.hit(limit, bucket)
            await _tell(limiter, limit, bucket, request, granted=granted)
        return await handler(request)

    return rate_limit


def _buckets(notes: keys.RequestNotes) -> list[str]:
    buckets = [f"address:{client_block(notes.client or '')}"]
    if notes.owner is not None:
        buckets.insert(0, notes.owner)
    return buckets


async def _tell(
    limiter: MovingWindowRateLimiter, limit: limits.RateLimitItem, bucket: str, request: web.Request, *, granted: bool
) -> None:
    stats = await limiter.get_window_stats(limit, bucket)
    wait = max(0.0, stats.reset_time - time.time())
    _announce(request[keys.RESPONSE_HEADERS], limit.amount, stats.remaining, wait)
    if not granted:
        raise RateLimited(str(limit), retry_after=math.ceil(wait))


def _announce(headers: dict[str, str], amount: int, remaining: int, wait: float) -> None:
    """Note the tightest of the limits, as OpenAI does: its SDKs and their users read these names."""
    told = headers.get("x-ratelimit-remaining-requests")
    if told is not None and int(told) <= remaining:
        return
    headers["x-ratelimit-limit-requests"] = str(amount)
    headers["x-ratelimit-remaining-requests"] = str(max(0, remaining))
    headers["x-ratelimit-reset-requests"] = duration(wait)


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
