"""Limits that hold for all gateways together: each ``RedisLimits`` here is one of them."""

import asyncio
import contextlib
import time

import limits
import pytest

from gateway.metrics import Metrics
from gateway.shared_state.redis import RedisServer
from gateway.shared_state.redis_limits import RedisLimits
from tests.shared_state.redis_process import RedisProcess
from tests.shared_state.slow_redis import slow_redis

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


async def test_redis_some_milliseconds_away_counts_for_all(redis: RedisProcess) -> None:
    metrics = Metrics()
    async with slow_redis(redis, 0.07) as url:
        server = RedisServer(url)
        gateway, shares = RedisLimits(server, metrics, lambda: 1), [(HUNDRED, "ann"), (HUNDRED, "address")]
        taken = await asyncio.gather(*(gateway.take(shares) for _ in range(12)))
        await server.close()
    assert all(window.is_granted for windows in taken for window in windows)
    assert b"letta_gateway_rate_limit_fallbacks_total 0.0" in metrics.expose()


async def test_place_is_free_again_when_its_time_is_over(server: RedisServer) -> None:
    gateway, two = RedisLimits(server, Metrics(), lambda: 1), limits.parse("2/second")
    for remaining in (1, 0):
        (window,) = await gateway.take([(two, "ann")])
        assert (window.is_granted, window.remaining) == (True, remaining)
    (refused,) = await gateway.take([(two, "ann")])
    assert (refused.is_granted, refused.remaining) == (False, 0)
    await asyncio.sleep(refused.wait)
    (window,) = await gateway.take([(two, "ann")])
    assert window.is_granted


async def test_clock_of_redis_is_put_back(server: RedisServer, redis: RedisProcess) -> None:
    gateway, three = RedisLimits(server, Metrics(), lambda: 1), limits.parse("3/minute")
    for _ in range(2):
        await gateway.take([(three, "ann")])
    with redis.client() as client:
        (key,) = client.keys("letta-gateway:limit:*")
        for number in range(1, 3):
            client.lset(key, -number, f"{time.time() + 3600 - number:.6f}")
        client.rpush(key, f"{time.time() - 10:.6f}")  # one from before the clock was wrong
    windows = [(await gateway.take([(three, "ann")]))[-1] for _ in range(3)]
    assert [window.is_granted for window in windows] == [True, True, False]
    assert 45 < windows[-1].wait <= 50


async def test_each_keeps_its_share_while_redis_is_away(server: RedisServer, redis: RedisProcess) -> None:
    metrics = Metrics()
    gateway = RedisLimits(server, metrics, lambda: 3)
    with redis.paused():
        assert await asked(gateway, 60) == 34
    assert b"letta_gateway_rate_limit_fallbacks_total 60.0" in metrics.expose()
    await asyncio.sleep(1.1)
    await server.ping()
    assert await asked(gateway, 120) == 100
