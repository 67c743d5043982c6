"""``Places`` of replicas, in Redis: an entry that ends by itself for each thing."""

import hashlib
from typing import Final

from gateway.errors import HeldElsewhere
from gateway.shared_state.places import Place
from gateway.shared_state.redis import PREFIX, RedisServer

_TAKE: Final = """
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] then return held end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return false
"""
_FORGET: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return false
"""


def place_key(name: str) -> str:
    """Return under which key a place is written down: names hold owners and chats, which Redis need not know."""
    return f"{PREFIX}:place:{hashlib.blake2b(name.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"


class RedisPlaces:
    """The places, seen from the gateway at ``here``."""

    def __init__(self, server: RedisServer, here: str) -> None:
        self._server = server
        self._here = here
        self._take = server.script(_TAKE)
        self._forget = server.script(_FORGET)

    async def take(self, name: str, seconds: float) -> None:
        """Say that this gateway has something, for so long."""
        key, args = place_key(name), (self._here, int(seconds * 1000))
        held = await self._server.run(lambda _: self._take(keys=[key], args=args))
        if held is None:
            return
        place = held.decode()
        if not self._is_past(place):
            raise HeldElsewhere(name, place)
        await self.forget(name, place)
        await self._server.run(lambda _: self._take(keys=[key], args=args))

    async def check(self, name: str) -> None:
        """Raise ``HeldElsewhere`` where another gateway has something."""
        held: bytes | None = await self._server.run(lambda client: client.get(place_key(name)))  # type: ignore[arg-type, return-value]
        place = None if held is None else held.decode()
        if place is None or place == self._here:
            return
        if self._is_past(place):
            await self.forget(name, place)
            return
        raise HeldElsewhere(name, place)

    async def leave(self, name: str) -> None:
        """Say that this gateway has something no more."""
        await self.forget(name, self._here)

    async def forget(self, name: str, place: str) -> None:
        """Forget a place that is no more."""
        await self._server.run(lambda _: self._forget(keys=[place_key(name)], args=[place]))

    def _is_past(self, place: str) -> bool:
        """Tell that whoever had it is no more: this gateway listens at its address now."""
        return Place(place).address == Place(self._here).address
