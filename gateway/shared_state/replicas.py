"""How many gateways there are, and what time it is for all of them: each says now and then that it is there."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from redis.asyncio import Redis

from gateway.errors import SharedStateUnavailable
from gateway.shared_state.places import Place, is_past
from gateway.shared_state.redis import PREFIX, RedisServer
from gateway.shared_state.redis_memory import LOOK, MEMORY

BEAT: Final = 2.0
"""Seconds between two signs of life."""
SILENT: Final = 15.0
"""Seconds without one after which a gateway is not counted."""

_KEY: Final = f"{PREFIX}:replicas"
# By Redis' own clock: those of the replicas may differ. Where it was put back, what lies ahead of it is forgotten:
# whoever is there says so anew.
_BEAT: Final = """
local time = redis.call('TIME')
local now = tonumber(time[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], now + ARGV[2], '+inf')
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])
return {string.format('%d.%06d', time[1], time[2]), redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')}
"""

# A limit of nought is none; who may not ask sees nothing.
_EVICTION: Final = """
local info = redis.pcall('INFO', 'memory')
if type(info) ~= 'string' or string.match(info, 'maxmemory:(%d+)') == '0' then return '' end
return string.match(info, 'maxmemory_policy:([%w-]+)') or ''
"""

_log: Final = structlog.get_logger("gateway.shared_state")


class Replicas:
    """The gateways of one Redis, seen by the one at ``here``."""

    def __init__(self, server: RedisServer, here: str) -> None:
        self._server = server
        self._here = here
        self._beat = server.script(_BEAT)
        self._look = server.script(LOOK)
        self._eviction = server.script(_EVICTION)
        self._signs: dict[str, float] = {here: 0.0}
        self._twins: set[str] = set()
        self._ahead = time.time() - time.monotonic()
        """Seconds by which the time is ahead of this machine's monotonic clock: its own until Redis has told its."""

    def count(self) -> int:
        """Return how many there were when Redis was last asked, this one included."""
        return len(self._signs)

    def others(self) -> list[str]:
        """Return where the others were when Redis was last asked."""
        return [place for place in self._signs if not is_past(place, self._here)]

    def now(self) -> float:
        """Return the time in UTC seconds by Redis' clock, as those of the machines may differ."""
        return time.monotonic() + self._ahead

    async def beat(self) -> None:
        """Say that this one is there, and count all; raises ``SharedStateUnavailable``."""
        args: list[str | int] = [self._here, int(SILENT)]
        now, said = await self._server.run(lambda _: self._beat(keys=[_KEY], args=args))
        self._ahead = float(now) - time.monotonic()
        signs = {said[at].decode(): float(said[at + 1]) for at in range(0, len(said), 2)}
        self._look_for_twins(signs)
        self._signs = signs

    def _look_for_twins(self, signs: dict[str, float]) -> None:
        """Tell of another process that is alive at this one's address: one that was here before gives no new signs."""
        address = Place(self._here).address
        for place, sign in signs.items():
            is_new = place not in self._twins and sign > self._signs.get(place, sign)
            if is_new and place != self._here and Place(place).address == address:
                self._twins.add(place)
                _log.error(
                    "another gateway says that it is at this one's address: requests go astray until "
                    "LETTA_GATEWAY_ADVERTISE of each is a URL at which the others reach it",
                    address=address,
                )

    async def is_there(self, place: str) -> bool:
        """Tell whether a gateway gave a sign of life lately; raises ``SharedStateUnavailable``."""
        return await self._server.run(lambda client: client.zscore(_KEY, place)) is not None

    async def look(self, tell_again: Callable[[], Awaitable[None]]) -> None:
        """Have told again what Redis forgot, if it did; raises ``SharedStateUnavailable``."""
        mark = (await self._server.run(lambda _: self._look(keys=[MEMORY], args=[self._server.mark]))).decode()
        if self._server.mark not in {"", mark}:
            _log.warning("redis lost what it was told: it is told again")
            await tell_again()
        if self._server.mark != mark:
            await self._look_at_eviction()
        self._server.mark = mark

    async def _look_at_eviction(self) -> None:
        policy = (await self._server.run(lambda _: self._eviction())).decode()
        if policy not in {"", "noeviction"}:
            _log.error(
                "redis drops what it is told when its memory is full: turns of one chat may overlap then; set its "
                "maxmemory-policy to noeviction",
                policy=policy,
            )

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
