"""What a gateway gives nobody while another one may have it, though Redis knows nothing of it."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine

import pytest

from gateway.errors import HeldElsewhere
from gateway.metrics import Metrics
from gateway.shared_state.memory import MemoryLocks
from gateway.shared_state.places import place_of
from gateway.shared_state.redis import RedisServer
from gateway.shared_state.redis_locks import RedisLocks
from gateway.shared_state.redis_memory import SETTLE
from gateway.shared_state.redis_places import RedisPlaces
from gateway.shared_state.replicas import BEAT, Replicas
from gateway.tasks import TaskSet
from tests.shared_state.redis_process import RedisProcess

pytestmark = pytest.mark.services

ONE, OTHER = place_of("http://10.0.0.1:8080", "one"), place_of("http://10.0.0.2:8080", "other")


class Gateway:
    """What one of the gateways has of Redis."""

    def __init__(self, url: str, here: str) -> None:
        self.server, self.tasks = RedisServer(url), TaskSet()
        local = MemoryLocks(depth=lambda: 8, wait=20.0, metrics=Metrics())
        self.locks = RedisLocks(self.server, local, self.tasks, here=here, wait=20.0)
        self.places = RedisPlaces(self.server, here)
        self._replicas = Replicas(self.server, here)

    async def look(self) -> None:
        """Look once, as it does now and then."""

        async def tell_again() -> None:
            await self.places.tell_again()
            await self.locks.renew()

        await self._replicas.look(tell_again)

    async def close(self) -> None:
        await self.tasks.close(0)
        await self.server.close()


@pytest.fixture
async def pair(redis: RedisProcess) -> AsyncIterator[tuple[Gateway, Gateway]]:
    one, other = Gateway(redis.url, ONE), Gateway(redis.url, OTHER)
    for gateway in (one, other):
        await gateway.look()
    yield one, other
    for gateway in (one, other):
        await gateway.close()


def test_gateways_have_the_time_to_tell_again() -> None:
    assert SETTLE > 2 * BEAT


async def test_what_one_has_is_not_given_to_another_after_a_flush(
    pair: tuple[Gateway, Gateway], redis: RedisProcess
) -> None:
    one, other = pair
    await one.places.take("chat", 60)
    with redis.client() as client:
        client.flushall()
    asks: tuple[Coroutine[None, None, object], ...] = (other.locks.acquire("chat"), other.places.check("chat"))
    asked = [asyncio.get_running_loop().create_task(ask) for ask in asks]
    await asyncio.sleep(0.5)
    assert not any(ask.done() for ask in asked)
    await one.look()
    for ask in asked:
        with pytest.raises(HeldElsewhere) as raised:
            await ask
        assert raised.value.place == ONE


async def test_turn_under_way_keeps_its_thread_after_a_flush(
    pair: tuple[Gateway, Gateway], redis: RedisProcess
) -> None:
    one, other = pair
    lease, lost = await one.locks.acquire("t"), list[bool]()
    lease.on_lost = lambda: lost.append(True)
    with redis.client() as client:
        client.flushall()
    waiting = asyncio.get_running_loop().create_task(other.locks.acquire("t"))
    await asyncio.sleep(0.5)
    await one.look()
    await asyncio.sleep(SETTLE)
    assert not waiting.done()
    one.locks.release(lease)
    await waiting
    assert not lost


async def test_what_nobody_has_is_given_a_moment_after_a_flush(
    pair: tuple[Gateway, Gateway], redis: RedisProcess
) -> None:
    _, other = pair
    with redis.client() as client:
        client.flushall()
    asked = time.monotonic()
    await other.places.check("chat")
    await other.locks.acquire("chat")
    assert SETTLE - 0.1 < time.monotonic() - asked < 2 * SETTLE


async def test_what_has_ended_by_itself_is_not_told_again(pair: tuple[Gateway, Gateway], redis: RedisProcess) -> None:
    one, other = pair
    await one.places.take("over", 0.05)
    await one.places.take("left", 60)
    await one.places.leave("left")
    await one.places.take("chat", 60)
    with redis.client() as client:
        client.flushall()
        await asyncio.sleep(0.1)
        await one.look()
        assert len(client.keys("letta-gateway:place:*")) == 1
    with pytest.raises(HeldElsewhere):
        await other.places.check("chat")
