"""What a gateway gives nobody while another one may have it, though Redis knows nothing of it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TypeVar

import pytest

from gateway.errors import HeldElsewhere, SharedStateUnavailable
from gateway.metrics import Metrics
from gateway.shared_state.memory import MemoryLocks
from gateway.shared_state.places import place_of
from gateway.shared_state.redis import RedisServer
from gateway.shared_state.redis_locks import LEASE, RedisLocks
from gateway.shared_state.redis_memory import SETTLE, STOOD
from gateway.shared_state.redis_places import RedisPlaces
from gateway.shared_state.replicas import BEAT, Replicas
from gateway.tasks import TaskSet
from tests.shared_state.cut_redis import nobody_else_either
from tests.shared_state.redis_process import RedisProcess

pytestmark = pytest.mark.services

T = TypeVar("T")
ONE, OTHER = place_of("http://10.0.0.1:8080", "one"), place_of("http://10.0.0.2:8080", "other")


class Gateway:
    """What one of the gateways has of Redis."""

    def __init__(self, url: str, here: str, lease: float = LEASE) -> None:
        self.server, self.tasks = RedisServer(url), TaskSet()
        local = MemoryLocks(depth=lambda: 8, wait=20.0, metrics=Metrics())
        self.locks = RedisLocks(
            self.server, local, self.tasks, here=here, wait=20.0, is_cut_off=nobody_else_either, lease=lease
        )
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


@contextlib.asynccontextmanager
async def gateways(redis: RedisProcess, lease: float = LEASE) -> AsyncIterator[tuple[Gateway, Gateway]]:
    """Have two that know of a Redis."""
    one, other = Gateway(redis.url, ONE, lease), Gateway(redis.url, OTHER, lease)
    for gateway in (one, other):
        await gateway.look()
    try:
        yield one, other
    finally:
        for gateway in (one, other):
            await gateway.close()


@pytest.fixture
async def pair(redis: RedisProcess) -> AsyncIterator[tuple[Gateway, Gateway]]:
    async with gateways(redis) as pair:
        yield pair


async def answered(ask: Callable[[], Awaitable[T]]) -> T:
    """Ask until Redis answers."""
    while True:
        with contextlib.suppress(SharedStateUnavailable):
            return await ask()
        await asyncio.sleep(0.02)


def test_gateways_have_the_time_to_tell_again() -> None:
    assert SETTLE > 2 * BEAT
    assert STOOD >= 2 * BEAT


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


async def test_turn_under_way_keeps_its_thread_after_a_restart_from_an_older_snapshot(tmp_path: Path) -> None:
    with RedisProcess(tmp_path) as redis:
        async with gateways(redis) as (one, other):
            one.locks.release(await one.locks.acquire("t"))
            await asyncio.sleep(0.2)
            with redis.client() as client:
                client.save()
            lease, lost = await one.locks.acquire("t"), list[bool]()
            lease.on_lost = lambda: lost.append(True)
            redis.kill()
            redis.start()
            waiting = asyncio.get_running_loop().create_task(answered(lambda: other.locks.acquire("t")))
            await asyncio.sleep(2 * BEAT)
            assert not waiting.done()
            await answered(one.look)
            await asyncio.sleep(SETTLE)
            assert not waiting.done()
            one.locks.release(lease)
            after = await waiting
            assert lease.fence is not None
            assert after.fence is not None
            assert after.fence > lease.fence
            assert not lost


async def test_turn_under_way_keeps_its_thread_after_redis_stood_still_for_longer_than_its_lease(
    redis: RedisProcess,
) -> None:
    async with gateways(redis, lease=1.0) as (one, other):
        lease, lost = await one.locks.acquire("t"), list[bool]()
        lease.on_lost = lambda: lost.append(True)
        with redis.paused():
            await asyncio.sleep(STOOD + 1)
        waiting = asyncio.get_running_loop().create_task(answered(lambda: other.locks.acquire("t")))
        await asyncio.sleep(SETTLE + 1)
        assert not waiting.done()
        one.locks.release(lease)
        await waiting
        assert not lost


async def test_thread_of_a_gateway_that_died_while_redis_stood_still_is_free_a_moment_later(
    redis: RedisProcess,
) -> None:
    async with gateways(redis, lease=1.0) as (one, other):
        await one.locks.acquire("t")
        one.locks.stop()  # what is left of it
        with redis.paused():
            await asyncio.sleep(STOOD + 1)
        back = time.monotonic()
        await answered(lambda: other.locks.acquire("t"))
        assert SETTLE - 1 < time.monotonic() - back < 2 * SETTLE


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
