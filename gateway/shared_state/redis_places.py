"""``Places`` of replicas, in Redis: an entry that ends by itself for each thing."""

from typing import Final

from gateway.errors import HeldElsewhere
from gateway.shared_state.places import is_past
from gateway.shared_state.redis import RedisServer, key_of

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
    """Return under which key a place is written down."""
    return key_of("place", name)


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
        if not is_past(place, self._here):
            raise HeldElsewhere(name, place)
        await self.forget(name, place)
        await self._server.run(lambda _: self._take(keys=[key], args=args))

    async def check(self, name: str) -> None:
        """Raise ``HeldElsewhere`` where another gateway has something."""
        held: bytes | None = await self._server.run(lambda client: client.get(place_key(name)))  # type: ignore[arg-type, return-value]
        place = None if held is None else held.decode()
        if place is None or place == self._here:
            return
        if is_past(place, self._here):
            await self.forget(name, place)
            return
        raise HeldElsewhere(name, place)

    async def leave(self, name: str) -> None:
        """Say that this gateway has something no more."""
        await self.forget(name, self._here)

    async def forget(self, name: str, place: str) -> None:
        """Forget a place that is no more."""
        await self._server.run(lambda _: self._forget(keys=[place_key(name)], args=[place]))
