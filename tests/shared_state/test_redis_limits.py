"""Limits that hold for all gateways together: each ``RedisLimits`` here is one of them."""

import asyncio
import contextlib

import limits
import pytest

from gateway.metrics import Metrics
from gateway.shared_state.redis import RedisServer
from gateway.shared_state.redis_limits import RedisLimits
from tests.shared_state.redis_process import RedisProcess

pytestmark = pytest.mark.services

HUNDRED = limits.parse("100/minute")


async def asked(gateway: RedisLimits, times: int, bucket: str = "ann") -> int:
    """Return how many were let through."""
    taken = await asyncio.gather(*(gateway.take([(HUNDRED, bucket)]) for _ in range(times)))
    return sum(windows[-1].is_granted for windows in taken)


async def test_exactly_the_limit_among_all(server: RedisServer, redis: RedisProcess) -> None:
    async with contextlib.AsyncExitStack() as stack:
        others = [RedisServer(redis.url) for _ in range(2)]
        for other in others:
            stack.push_async_callback(other.close)
        gateways = [RedisLimits(one, Metrics(), lambda: 3) for one in (server, *others)]
        assert sum(await asyncio.gather(*(asked(gateway, 70) for gateway in gateways))) == 100
        assert await asked(gateways[0], 5, "ben") == 5


async def test_what_one_refuses_has_not_used_up_the_other(server: RedisServer) -> None:
    gateway, one = RedisLimits(server, Metrics(), lambda: 1), limits.parse("1/minute")
    assert [window.is_granted for window in await gateway.take([(one, "ann"), (HUNDRED, "address")])] == [True, True]
    for _ in range(3):
        (refused,) = await gateway.take([(HUNDRED, "address"), (one, "ann")])
        assert (refused.is_granted, refused.limit) == (False, one)
        assert 0 < refused.wait <= 60
    (window,) = await gateway.take([(HUNDRED, "address")])
    assert window.remaining == 98


async def test_each_keeps_its_share_while_redis_is_away(server: RedisServer, redis: RedisProcess) -> None:
    metrics = Metrics()
    gateway = RedisLimits(server, metrics, lambda: 3)
    with redis.paused():
        assert await asked(gateway, 60) == 34
    assert b"letta_gateway_rate_limit_fallbacks_total 60.0" in metrics.expose()
    await asyncio.sleep(1.1)
    await server.ping()
    assert await asked(gateway, 120) == 100
