"""A Redis that is down, paused, slow, full or confused: told within bounds, once, and found again by itself."""

import asyncio
import time

import pytest
import structlog.testing

from gateway.errors import SharedStateUnavailable
from gateway.shared_state.redis import ANSWER, PAUSE, RedisServer
from tests.shared_state.redis_process import RedisProcess
from tests.shared_state.slow_redis import slow_redis

pytestmark = pytest.mark.services

BOUND = 2 * ANSWER + 1.5
"""Seconds until a question is known not to be answered, on a machine that is busy."""


async def refused(server: RedisServer) -> float:
    started = time.monotonic()
    with pytest.raises(SharedStateUnavailable) as raised:
        await server.ping()
    assert (raised.value.status, raised.value.retry_after, raised.value.should_retry) == (503, 1.0, True)
    return time.monotonic() - started


async def back(server: RedisServer) -> None:
    async with asyncio.timeout(PAUSE + 5):
        while True:
            try:
                await server.ping()
            except SharedStateUnavailable:
                await asyncio.sleep(0.05)
            else:
                return


async def test_down_and_back(redis: RedisProcess, server: RedisServer) -> None:
    with structlog.testing.capture_logs() as lines:
        await server.ping()
        redis.kill()
        try:
            assert await refused(server) < BOUND
            asked = time.monotonic()
            for _ in range(1_000):
                await refused(server)
            assert time.monotonic() - asked < PAUSE, "nobody is asked meanwhile"
        finally:
            redis.start()
        await back(server)
    assert [line["event"] for line in lines] == ["redis unavailable", "redis available"], "one line for each change"


async def test_paused_and_back(redis: RedisProcess, server: RedisServer) -> None:
    await server.ping()
    with redis.paused():
        waited = await asyncio.gather(*(refused(server) for _ in range(100)))
        assert max(waited) < BOUND
        assert not server.is_up
    await back(server)


async def test_slow(redis: RedisProcess, server: RedisServer) -> None:
    with redis.client() as client:
        client.client_pause(2_000)
    assert await refused(server) < BOUND
    await back(server)


async def test_never_there() -> None:
    server = RedisServer("redis://127.0.0.1:1/0")
    assert await refused(server) < BOUND
    await server.close()


async def test_full(redis: RedisProcess, server: RedisServer) -> None:
    with redis.client() as client:
        client.config_set("maxmemory", 1)
        try:
            with pytest.raises(SharedStateUnavailable):
                await server.ping()
        finally:
            client.config_set("maxmemory", 0)
    await back(server)


async def test_key_of_another_kind(redis: RedisProcess, server: RedisServer) -> None:
    with redis.client() as client:
        client.set("x", "y")
    with pytest.raises(SharedStateUnavailable):
        await server.run(lambda asked: asked.hget("x", "y"))


async def test_cancelled_question_leaves_its_answer_to_nobody(redis: RedisProcess, server: RedisServer) -> None:
    with redis.client() as client:
        client.mset({f"k{n}": n for n in range(200)})

    async def ask(number: int) -> object:
        return await server.run(lambda asked: asked.get(f"k{number}"))

    for number in range(0, 200, 2):
        task = asyncio.get_running_loop().create_task(ask(number))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        assert await ask(number + 1) == str(number + 1).encode()


async def test_crowd_on_a_loop_that_is_busy(server: RedisServer) -> None:
    """It is this process that is late, not Redis."""

    async def hogs() -> None:
        for _ in range(4):
            await asyncio.sleep(0)
            time.sleep(0.3)  # noqa: ASYNC251 - this is what it is about

    await server.ping()
    await asyncio.gather(hogs(), *(server.ping() for _ in range(200)))
    assert server.is_up


async def test_every_answer_takes_a_while(redis: RedisProcess) -> None:
    """Connections are made meanwhile, which takes several answers."""
    async with slow_redis(redis, 0.1) as url:
        server = RedisServer(url)
        await asyncio.gather(*(server.ping() for _ in range(100)))
        assert server.is_up
        await server.close()


async def test_connection_that_is_never_made(redis: RedisProcess, server: RedisServer) -> None:
    with redis.paused():
        assert await refused(server) < BOUND
    await back(server)
