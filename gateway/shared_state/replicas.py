"""How many gateways there are: each says now and then that it is there."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from redis.asyncio import Redis

from gateway.errors import SharedStateUnavailable
from gateway.shared_state.redis import PREFIX, RedisServer
from gateway.shared_state.redis_memory import LOOK, MEMORY

BEAT: Final = 2.0
"""Seconds between two signs of life."""
SILENT: Final = 15.0
"""Seconds without one after which a gateway is not counted."""

_KEY: Final = f"{PREFIX}:replicas"
# By Redis' own clock: those of the replicas may differ.
_BEAT: Final = """
local now = tonumber(redis.call('TIME')[1])
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])
return redis.call('ZCARD', KEYS[1])
"""

_log: Final = structlog.get_logger("gateway.shared_state")


class Replicas:
    """The gateways of one Redis, seen by the one at ``here``."""

    def __init__(self, server: RedisServer, here: str) -> None:
        self._server = server
        self._here = here
        self._beat = server.script(_BEAT)
        self._look = server.script(LOOK)
        self._count = 1

    def count(self) -> int:
        """Return how many there were when Redis was last asked, this one included."""
        return self._count

    async def beat(self) -> None:
        """Say that this one is there, and count all; raises ``SharedStateUnavailable``."""
        self._count = int(await self._server.run(lambda _: self._beat(keys=[_KEY], args=[self._here, int(SILENT)])))

    async def is_there(self, place: str) -> bool:
        """Tell whether a gateway gave a sign of life lately; raises ``SharedStateUnavailable``."""
        return await self._server.run(lambda client: client.zscore(_KEY, place)) is not None

    async def look(self, tell_again: Callable[[], Awaitable[None]]) -> None:
        """Have told again what Redis forgot, if it did; raises ``SharedStateUnavailable``."""
        mark = (await self._server.run(lambda _: self._look(keys=[MEMORY], args=[self._server.mark]))).decode()
        if self._server.mark not in {"", mark}:
            _log.warning("redis lost what it was told: it is told again")
            await tell_again()
        self._server.mark = mark

    async def run(self, tell_again: Callable[[], Awaitable[None]]) -> None:
        """Say so until cancelled; ``tell_again`` tells Redis what it forgot."""
        while True:
            with contextlib.suppress(SharedStateUnavailable):  # the server says so; the count of before stands
                await self.beat()
                await self.look(tell_again)
            await asyncio.sleep(BEAT)

    async def leave(self) -> None:
        """Say that this one is no more; raises ``SharedStateUnavailable``."""

        async def leave(client: Redis) -> None:
            await client.zrem(_KEY, self._here)

        await self._server.run(leave)
