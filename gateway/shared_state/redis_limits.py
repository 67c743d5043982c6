"""``RequestLimits`` that hold for all replicas together; each keeps its share of them while Redis does not answer."""

from collections.abc import Callable, Sequence
from typing import Final

from limits import RateLimitItem
from limits.aio.storage import RedisStorage

from gateway.errors import SharedStateUnavailable
from gateway.metrics import Metrics
from gateway.shared_state.limits import Limiter, Share, Window, memory_limits
from gateway.shared_state.redis import PREFIX, RedisServer

_ANY: Final = "redis://"
"""The library asks for a URL; the connections that it is given are another's."""


class RedisLimits:
    """The limits of one gateway among several; ``replicas`` tells how many there are."""

    def __init__(self, server: RedisServer, metrics: Metrics, replicas: Callable[[], int]) -> None:
        self._server = server
        self._metrics = metrics
        self._replicas = replicas
        storage = RedisStorage(
            _ANY,
            implementation="redispy",
            key_prefix=f"{PREFIX}:limit",
            connection_pool=server.pool,  # type: ignore[arg-type]  # handed on to redis-py as it is
        )
        self._shared = Limiter(storage)
        self._own = memory_limits()

    async def take(self, shares: Sequence[Share]) -> list[Window]:
        """Take a place in each window, or in none where one is full: that one is the last of the answer."""
        try:
            return await self._server.run(lambda _: self._shared.take(shares))
        except SharedStateUnavailable:
            self._metrics.rate_limit_fallbacks.inc()
            replicas = self._replicas()
            return await self._own.take([(_part(limit, replicas), bucket) for limit, bucket in shares])


def _part(limit: RateLimitItem, replicas: int) -> RateLimitItem:
    """Return one gateway's part of a limit, rounded up: nobody is locked out."""
    return type(limit)(-(-limit.amount // max(1, replicas)), limit.multiples, limit.namespace)
