import asyncio

import pytest

from gateway.shared_state.places import place_of
from gateway.shared_state.redis import RedisServer
from gateway.shared_state.replicas import Replicas
from tests.shared_state.redis_process import RedisProcess

pytestmark = pytest.mark.services

ONE, OTHER = place_of("http://10.0.0.1:8080", "one"), place_of("http://10.0.0.2:8080", "other")


async def test_gateways_are_counted(server: RedisServer) -> None:
    one, other = Replicas(server, ONE), Replicas(server, OTHER)
    assert one.count() == 1
    await one.beat()
    assert not await one.is_there(OTHER)
    await other.beat()
    await one.beat()
    assert (one.count(), other.count()) == (2, 2)
    assert await one.is_there(OTHER)
    await other.leave()
    await one.beat()
    assert one.count() == 1
    assert not await one.is_there(OTHER)


async def test_one_that_is_silent_is_not_counted(server: RedisServer, redis: RedisProcess) -> None:
    one, other = Replicas(server, ONE), Replicas(server, OTHER)
    await other.beat()
    with redis.client() as client:
        client.zincrby("letta-gateway:replicas", -60, OTHER)
    await one.beat()
    assert one.count() == 1


async def test_signs_of_life_go_on_while_redis_is_away(server: RedisServer, redis: RedisProcess) -> None:
    one = Replicas(server, ONE)
    telling = asyncio.get_running_loop().create_task(one.run())
    await asyncio.sleep(0.2)
    with redis.paused():
        await asyncio.sleep(0.2)
        assert one.count() == 1
    telling.cancel()
