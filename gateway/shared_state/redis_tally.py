"""``Tally`` of replicas, in Redis; each counts for itself while that does not answer."""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from redis.commands.core import AsyncScript

from gateway.errors import SharedStateUnavailable
from gateway.metrics import Metrics
from gateway.shared_state.redis import RedisServer, key_of
from gateway.shared_state.tally import Key, MemoryTally, Share, Ticket

ENTRIES: Final = 20_000
"""Keys of each kind that are counted here while Redis is away; in Redis they end by themselves."""
LOST: Final = 60
"""Seconds after which what is under way was lost with its gateway."""

# As ``Counts`` in ``tally``, by Redis' own clock: where that was put back, what lies ahead of it counts as of now.
# KEYS: one for each share.
_TRIED: Final = f"""
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local function tried(key)
  local held = redis.call('HMGET', key, 'failed', 'under_way', 'failed_at', 'begun_at')
  local found = {{}}
  for i = 1, 4 do found[i] = tonumber(held[i] or 0) end
  if math.max(found[3], found[4]) > now then
    found[3], found[4] = math.min(found[3], now), math.min(found[4], now)
    redis.call('HSET', key, 'failed_at', string.format('%.6f', found[3]), 'begun_at', string.format('%.6f', found[4]))
  end
  if now - found[4] >= {LOST} then found[2] = 0 end
  return unpack(found)
end
local function keep(key, failed, under_way, failed_at, begun_at, seconds)
  if failed + under_way == 0 then
    redis.call('DEL', key)
  else
    redis.call('HSET', key, 'failed', failed, 'under_way', under_way,
      'failed_at', string.format('%.6f', failed_at), 'begun_at', string.format('%.6f', begun_at))
    redis.call('EXPIRE', key, seconds)
  end
end
"""
# ARGV: for each share its pace, as free, first delay, longest delay and the seconds until it is forgotten.
_BEGIN: Final = (
    _TRIED
    + """
local longest, counts = 0, {}
for i, key in ipairs(KEYS) do
  local free, first = tonumber(ARGV[4 * i - 3]), tonumber(ARGV[4 * i - 2])
  local most, forget = tonumber(ARGV[4 * i - 1]), tonumber(ARGV[4 * i])
  local failed, under_way, failed_at, begun_at = tried(key)
  if under_way == 0 and now - failed_at >= forget then failed, failed_at = 0, 0 end
  local over = failed + under_way - free
  if failed + under_way > 0 and over >= 0 then
    local since = under_way > 0 and math.max(failed_at, begun_at) or failed_at
    longest = math.max(longest, since + math.min(most, first * 2 ^ math.min(over, 40)) - now)
  end
  counts[i] = {failed, under_way, failed_at, math.ceil(forget + most)}
end
if longest > 0 then return string.format('%.6f', longest) end
for i, key in ipairs(KEYS) do
  local count = counts[i]
  keep(key, count[1], count[2] + 1, count[3], now, count[4])
end
return '0'
"""
)
# ARGV: whether it failed, whether it succeeded, and for each share the seconds for which its count is kept.
_END: Final = (
    _TRIED
    + """
local own = 0
for i, key in ipairs(KEYS) do
  local failed, under_way, failed_at, begun_at = tried(key)
  if ARGV[1] == '1' then failed, failed_at = failed + 1, now end
  if i == 1 and ARGV[2] == '1' then own = failed end
  keep(key, math.max(0, failed - own), math.max(0, under_way - 1), failed_at, begun_at, ARGV[i + 2])
end
return false
"""
)


class RedisTally:
    """The tally of one gateway among several."""

    def __init__(self, server: RedisServer, metrics: Metrics) -> None:
        self._server = server
        self._metrics = metrics
        self._own = MemoryTally(ENTRIES)
        self._begin = server.script(_BEGIN)
        self._end = server.script(_END)

    async def begin(self, shares: Sequence[Share]) -> Ticket:
        """Count an attempt that is made now, if it may be made."""
        names = [key_of("tries", "\n".join((share.kind, *share.key))) for share in shares]
        paces = [share.pace for share in shares]
        args = [number for pace in paces for number in (pace.free, pace.first_delay, pace.longest_delay, pace.forget)]
        try:
            wait = float(await self._server.run(lambda _: self._begin(keys=names, args=args)))
        except SharedStateUnavailable:
            self._metrics.rate_limit_fallbacks.inc()
            return await self._own.begin(shares)
        kept = [math.ceil(pace.forget + pace.longest_delay) for pace in paces]
        return RedisTicket(self._server, self._end, wait, names, kept)

    async def knows(self, key: Key, seconds: float) -> None:
        """Remember a key for so long, here too, for when Redis is away."""
        await self._own.knows(key, seconds)
        with suppress(SharedStateUnavailable):
            await self._server.run(lambda client: client.set(_known(key), 1, px=int(seconds * 1000)))

    async def is_known(self, key: Key) -> bool:
        """Tell whether a key is remembered."""
        try:
            return bool(await self._server.run(lambda client: client.exists(_known(key))))
        except SharedStateUnavailable:
            return await self._own.is_known(key)


class RedisTicket:
    """``Ticket`` of a tally in Redis."""

    def __init__(
        self, server: RedisServer, script: AsyncScript, wait: float, names: list[str], kept: list[int]
    ) -> None:
        self.wait = wait
        self._server = server
        self._script = script
        self._names = names
        self._kept = kept

    async def end(self, *, is_failure: bool = False, is_success: bool = False) -> None:
        """Count how it ended; where Redis went away meanwhile, it counts as under way for a while."""
        args = [int(is_failure), int(is_success), *self._kept]
        with suppress(SharedStateUnavailable):
            await self._server.run(lambda _: self._script(keys=self._names, args=args))


def _known(key: Key) -> str:
    return key_of("known", "\n".join(key))
