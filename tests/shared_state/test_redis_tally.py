"""Failures that are counted for all gateways together: each ``RedisTally`` here is one of them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from gateway.metrics import Metrics
from gateway.shared_state.redis import RedisServer
from gateway.shared_state.redis_tally import LOST, RedisTally
from gateway.shared_state.tally import Pace, Share
from tests.shared_state.redis_process import RedisProcess

pytestmark = pytest.mark.services

STEADY = Pace(free=3, first_delay=100.0, longest_delay=300.0, forget=600.0)
PAIR, ACCOUNT = Share("pair", ("ann", "203.0.113.7"), STEADY), Share("account", ("ann",), STEADY)


@pytest.fixture
async def gateways(redis: RedisProcess) -> AsyncIterator[list[RedisTally]]:
    async with contextlib.AsyncExitStack() as stack:
        servers = [RedisServer(redis.url) for _ in range(2)]
        for server in servers:
            stack.push_async_callback(server.close)
        yield [RedisTally(server, Metrics()) for server in servers]


async def fails(gateway: RedisTally, *shares: Share) -> float:
    """Return the wait; where there is none, the attempt fails."""
    ticket = await gateway.begin(shares)
    if ticket.wait == 0:
        await ticket.end(is_failure=True)
    return ticket.wait


def age(redis: RedisProcess, seconds: float) -> None:
    """Have everything happened so much earlier."""
    with redis.client() as client:
        for key in client.keys("letta-gateway:tries:*"):
            for field in ("failed_at", "begun_at"):
                client.hincrbyfloat(key, field, -seconds)


async def test_failures_at_all_gateways_count_together(gateways: list[RedisTally], redis: RedisProcess) -> None:
    waits = []
    for number in range(7):
        waits.append(round(await fails(gateways[number % 2], ACCOUNT)))
        age(redis, waits[-1])
        if waits[-1]:
            assert await fails(gateways[number % 2], ACCOUNT) == 0
    assert waits == [0, 0, 0, 100, 200, 300, 300]


async def test_clock_of_redis_is_put_back(gateways: list[RedisTally], redis: RedisProcess) -> None:
    for _ in range(3):
        await fails(gateways[0], ACCOUNT)
    age(redis, -3600)
    assert 99 < await fails(gateways[0], ACCOUNT) <= 100
    age(redis, 40)
    assert 59 < await fails(gateways[0], ACCOUNT) <= 60


async def test_exactly_as_many_as_are_free_of_those_that_come_at_once(gateways: list[RedisTally]) -> None:
    tickets = await asyncio.gather(*(gateway.begin([ACCOUNT]) for gateway in gateways * 10))
    assert sum(ticket.wait == 0 for ticket in tickets) == 3


async def test_success_forgives_the_own_failures_and_leaves_those_from_elsewhere(gateways: list[RedisTally]) -> None:
    one, other = gateways
    await fails(one, Share("pair", ("ann", "198.51.100.1"), STEADY), ACCOUNT)
    await fails(one, PAIR, ACCOUNT)
    await (await other.begin([PAIR, ACCOUNT])).end(is_success=True)
    assert [await fails(other, ACCOUNT) for _ in range(2)] == [0, 0]
    assert await fails(other, ACCOUNT) > 0


async def test_attempt_that_was_none_leaves_nothing(gateways: list[RedisTally], redis: RedisProcess) -> None:
    await (await gateways[0].begin([PAIR, ACCOUNT])).end()
    with redis.client() as client:
        assert client.keys() == []


async def test_failures_are_forgotten_after_a_time_without_one(gateways: list[RedisTally], redis: RedisProcess) -> None:
    for _ in range(3):
        await fails(gateways[0], ACCOUNT)
    with redis.client() as client:
        (key,) = client.keys()
        assert 800 < client.ttl(key) <= 900
        assert b"ann" not in key, "names are not told to Redis"
    age(redis, 600)
    assert [await fails(gateways[0], ACCOUNT) for _ in range(3)] == [0, 0, 0]


async def test_attempt_whose_gateway_was_killed_is_none_after_a_while(
    gateways: list[RedisTally], redis: RedisProcess
) -> None:
    for _ in range(3):
        await gateways[0].begin([ACCOUNT])
    assert (await gateways[1].begin([ACCOUNT])).wait > 0
    age(redis, LOST)
    assert (await gateways[1].begin([ACCOUNT])).wait == 0


async def test_who_is_known_is_known_to_all_and_for_a_time(gateways: list[RedisTally]) -> None:
    one, other = gateways
    await one.knows(PAIR.key, 0.2)
    assert await other.is_known(PAIR.key)
    await asyncio.sleep(0.3)
    assert not await other.is_known(PAIR.key)


async def test_each_counts_for_itself_while_redis_is_away(gateways: list[RedisTally], redis: RedisProcess) -> None:
    one, _ = gateways
    await one.knows(PAIR.key, 60)
    ticket = await one.begin([PAIR])
    with redis.paused():
        asked = time.monotonic()
        assert [await fails(one, ACCOUNT) for _ in range(3)] == [0, 0, 0]
        assert await fails(one, ACCOUNT) > 0
        assert await one.is_known(PAIR.key)
        assert b"letta_gateway_rate_limit_fallbacks_total 4.0" in one._metrics.expose()
        await ticket.end(is_failure=True)
        assert time.monotonic() - asked < 2
