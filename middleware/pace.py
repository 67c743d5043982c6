"""Has requests begin a few at a time: a crowd that comes at once does not hold up the streams that are under way."""

import asyncio
from collections import deque
from typing import Final

from aiohttp import web

from gateway.settings import Settings
from middleware.contract import AiohttpMiddleware, Handler, Middleware, NoConfig

PER_ROUND: Final = 4
"""Requests that begin in one round of the event loop: each takes some tenths of a millisecond until it first waits."""


class Turnstile:
    """Lets some in per round of the event loop, the others behind them as they came; alone, nobody waits."""

    def __init__(self, per_round: int = PER_ROUND) -> None:
        self._per_round = per_round
        self._free = per_round
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_turning = False

    async def enter(self) -> None:
        """Wait for a place."""
        loop = asyncio.get_running_loop()
        if not self._is_turning:
            self._is_turning = True
            loop.call_soon(self._turn, loop)
        if self._free and not self._waiting:
            self._free -= 1
            return
        place: asyncio.Future[None] = loop.create_future()
        self._waiting.append(place)
        await place

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._free = self._per_round
        while self._waiting and self._free:
            place = self._waiting.popleft()
            if not place.done():  # who went away meanwhile takes no place
                place.set_result(None)
                self._free -= 1
        self._is_turning = self._free < self._per_round
        if self._is_turning:
            loop.call_soon(self._turn, loop)


def build(config: NoConfig, settings: Settings) -> AiohttpMiddleware:
    """Return the middleware."""
    _ = config, settings
    turnstile = Turnstile()

    @web.middleware
    async def pace(request: web.Request, handler: Handler) -> web.StreamResponse:
        await turnstile.enter()
        return await handler(request)

    return pace


middleware = Middleware("pace", NoConfig, build)
