"""``Places`` of replicas, in Redis: an entry that ends by itself for each thing.

Each gateway remembers its own, and tells them again where Redis forgot them.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from redis.asyncio import Redis
from redis.commands.core import AsyncScript

from gateway.errors import HeldElsewhere, SharedStateUnavailable
from gateway.shared_state.places import is_past
from gateway.shared_state.redis import RedisServer, key_of
from gateway.shared_state.redis_memory import LOOKING, MEMORY, SETTLE

AT_ONCE: Final = 500
"""Places that are told again with one question."""
PAUSE: Final = 0.1
"""Seconds between two questions while others may still tell what they have."""
FORGET: Final = 30.0
"""Seconds between two looks for own places that have ended by themselves."""
_SETTLING: Final = b"settling"  # no place: that is two words

# KEYS: place, memory. ARGV: here, mark, milliseconds.
_TAKE: Final = (
    LOOKING
    + """
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] then return held end
if not held and look(KEYS[2], ARGV[2]).forgot then return 'settling' end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return false
"""
)
# KEYS: place, memory. ARGV: here, mark.
_CHECK: Final = (
    LOOKING
    + """
local held = redis.call('GET', KEYS[1])
if not held and look(KEYS[2], ARGV[2]).forgot then return 'settling' end
return held
"""
)
_FORGET: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return false
"""


def place_key(name: str) -> str:
    """Return under which key a place is written down."""
    return key_of("place", name)


class RedisPlaces:
    """The places, seen from the gateway at ``here``."""

    def __init__(self, server: RedisServer, here: str) -> None:
        self._server = server
        self._here = here
        self._take = server.script(_TAKE)
        self._check = server.script(_CHECK)
        self._forget = server.script(_FORGET)
        self._mine: dict[str, float] = {}
        self._forget_at = 0.0

    async def take(self, name: str, seconds: float) -> None:
        """Say that this gateway has something, for so long."""
        milliseconds = int(seconds * 1000)
        place = await self._settled(self._take, name, milliseconds)
        if place is not None:
            if not is_past(place, self._here):
                raise HeldElsewhere(name, place)
            await self.forget(name, place)
            await self._settled(self._take, name, milliseconds)
        self._remember(name, time.monotonic() + seconds)

    async def check(self, name: str) -> None:
        """Raise ``HeldElsewhere`` where another gateway has something."""
        place = await self._settled(self._check, name)
        if place is None or place == self._here:
            return
        if is_past(place, self._here):
            await self.forget(name, place)
            return
        raise HeldElsewhere(name, place)

    async def leave(self, name: str) -> None:
        """Say that this gateway has something no more."""
        self._mine.pop(name, None)
        await self.forget(name, self._here)

    async def forget(self, name: str, place: str) -> None:
        """Forget a place that is no more."""
        await self._server.run(lambda _: self._forget(keys=[place_key(name)], args=[place]))

    async def tell_again(self) -> None:
        """Say once more what this gateway has, where nobody else says so; raises ``SharedStateUnavailable``."""
        self._forget_old()
        mine = list(self._mine.items())
        for start in range(0, len(mine), AT_ONCE):
            await self._tell(mine[start : start + AT_ONCE])

    async def _tell(self, mine: Sequence[tuple[str, float]]) -> None:
        now = time.monotonic()

        async def tell(client: Redis) -> None:
            async with client.pipeline(transaction=False) as pipeline:
                for name, ends_at in mine:
                    left = max(1, int((ends_at - now) * 1000))
                    pipeline.set(place_key(name), self._here, px=left, nx=True)
                await pipeline.execute()

        await self._server.run(tell)

    async def _settled(self, script: AsyncScript, name: str, *more: int) -> str | None:
        """Return what a script says of a place, once every gateway had the time to say what it has."""
        keys, give_up_at = [place_key(name), MEMORY], time.monotonic() + 2 * SETTLE
        while True:
            args = [self._here, self._server.mark, *more]
            place: bytes | None = await self._server.run(lambda _, args=args: script(keys=keys, args=args))  # type: ignore[misc]
            if place != _SETTLING:
                return None if place is None else place.decode()
            if time.monotonic() > give_up_at:
                raise SharedStateUnavailable("settling")
            await asyncio.sleep(PAUSE)

    def _remember(self, name: str, ends_at: float) -> None:
        self._mine[name] = ends_at
        if time.monotonic() >= self._forget_at:
            self._forget_old()

    def _forget_old(self) -> None:
        now = time.monotonic()
        self._forget_at = now + FORGET
        self._mine = {name: ends_at for name, ends_at in self._mine.items() if ends_at > now}
