"""``RequestLimits`` that hold for all replicas together; each keeps its share of them while Redis does not answer."""

from collections.abc import Callable, Sequence
from typing import Final

from limits import RateLimitItem

from gateway.errors import SharedStateUnavailable
from gateway.metrics import Metrics
from gateway.shared_state.limits import MemoryLimits, Share, Window
from gateway.shared_state.redis import PREFIX, RedisServer

# One question for all windows, as Redis may be some milliseconds away. The times are by Redis' own clock: those of the
# replicas may differ. It may be put back, or be another one's after a failover: what was taken ahead of it is free.
# KEYS: a window for each share. ARGV: for each share its amount and its seconds.
# Returns the number of the first share whose window is full, and the milliseconds until it is over; or 0, and for each
# share the places that are left and those milliseconds.
_TAKE: Final = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local function oldest(key, amount, since)
  local low, high, found, at = 0, amount - 1, -1, nil
  while low <= high do
    local middle = math.floor((low + high) / 2)
    local entry = tonumber(redis.call('LINDEX', key, middle) or '')
    if entry and entry >= since then
      found, at, low = middle, entry, middle + 1
    else
      high = middle - 1
    end
  end
  return found + 1, at or now
end
local answers = {}
for i, key in ipairs(KEYS) do
  local amount, seconds = tonumber(ARGV[2 * i - 1]), tonumber(ARGV[2 * i])
  while tonumber(redis.call('LINDEX', key, 0) or 0) > now do redis.call('LPOP', key) end
  local count, at = oldest(key, amount, now - seconds)
  local wait = math.ceil((at + seconds - now) * 1000)
  if count >= amount then return {i, wait} end
  answers[i] = {amount - count - 1, wait}
end
for i, key in ipairs(KEYS) do
  redis.call('LPUSH', key, string.format('%.6f', now))
  redis.call('LTRIM', key, 0, ARGV[2 * i - 1] - 1)
  redis.call('EXPIRE', key, ARGV[2 * i])
end
return {0, answers}
"""


class RedisLimits:
    """The limits of one gateway among several; ``replicas`` tells how many there are."""

    def __init__(self, server: RedisServer, metrics: Metrics, replicas: Callable[[], int]) -> None:
        self._server = server
        self._metrics = metrics
        self._replicas = replicas
        self._take = server.script(_TAKE)
        self._own = MemoryLimits()

    async def take(self, shares: Sequence[Share]) -> list[Window]:
        """Take a place in each window, or in none where one is full: that one is the last of the answer."""
        try:
            return await self._take_shared(shares)
        except SharedStateUnavailable:
            self._metrics.rate_limit_fallbacks.inc()
            replicas = self._replicas()
            return await self._own.take([(_part(limit, replicas), bucket) for limit, bucket in shares])

    async def _take_shared(self, shares: Sequence[Share]) -> list[Window]:
        names = [f"{PREFIX}:limit:{limit.key_for(bucket)}" for limit, bucket in shares]
        args = [number for limit, _ in shares for number in (limit.amount, limit.get_expiry())]
        refused, answers = await self._server.run(lambda _: self._take(keys=names, args=args))
        if refused:
            (limit, _), wait = shares[refused - 1], answers / 1000
            return [Window(limit, is_granted=False, remaining=0, wait=wait)]
        return [
            Window(limit, is_granted=True, remaining=remaining, wait=wait / 1000)
            for (limit, _), (remaining, wait) in zip(shares, answers, strict=True)
        ]


def _part(limit: RateLimitItem, replicas: int) -> RateLimitItem:
    """Return one gateway's part of a limit, rounded up: nobody is locked out."""
    return type(limit)(-(-limit.amount // max(1, replicas)), limit.multiples, limit.namespace)
