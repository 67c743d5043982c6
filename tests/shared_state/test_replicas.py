import asyncio
import contextlib
import time

import pytest
import structlog.testing

from gateway.errors import SharedStateUnavailable
from gateway.shared_state.places import place_of
from gateway.shared_state.redis import RedisServer
from gateway.shared_state.replicas import Replicas
from tests.shared_state.redis_process import RedisProcess

pytestmark = pytest.mark.services

ONE, OTHER = place_of("http://10.0.0.1:8080", "one"), place_of("http://10.0.0.2:8080", "other")


async def nothing() -> None:
    """Have nothing that Redis should be told again."""


async def test_gateways_are_counted(server: RedisServer) -> None:
    one, other = Replicas(server, ONE), Replicas(server, OTHER)
    assert one.count() == 1
    await one.beat()
    assert not await one.is_there(OTHER)
    await other.beat()
    await one.beat()
    assert (one.count(), other.count()) == (2, 2)
    assert (one.others(), other.others()) == ([OTHER], [ONE])
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


async def test_one_that_was_there_before_the_clock_was_put_back_is_not_counted(
    server: RedisServer, redis: RedisProcess
) -> None:
    one, other = Replicas(server, ONE), Replicas(server, OTHER)
    await one.beat()
    await other.beat()
    with redis.client() as client:
        for place in (ONE, OTHER):
            client.zincrby("letta-gateway:replicas", 3600, place)
    await one.beat()
    assert one.count() == 1
    assert not await one.is_there(OTHER)


async def test_time_is_one_for_all_whatever_their_clocks_say(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    one = Replicas(server, ONE)
    monkeypatch.setattr(time, "time", lambda: now() - 3600)
    other = Replicas(server, OTHER)
    assert one.now() - other.now() == pytest.approx(3600, abs=1)
    for gateway in (one, other):
        await gateway.beat()
        assert gateway.now() == pytest.approx(now(), abs=0.5)


async def test_signs_of_life_go_on_while_redis_is_away(server: RedisServer, redis: RedisProcess) -> None:
    one = Replicas(server, ONE)
    telling = asyncio.get_running_loop().create_task(one.run(nothing))
    await asyncio.sleep(0.2)
    with redis.paused():
        await asyncio.sleep(0.2)
        assert one.count() == 1
    telling.cancel()


async def test_two_at_one_address_are_told_of_once(server: RedisServer) -> None:
    twin = place_of("http://10.0.0.1:8080", "twin")
    one, other = Replicas(server, ONE), Replicas(server, twin)
    with structlog.testing.capture_logs() as lines:
        for _ in range(4):
            await other.beat()
            await one.beat()
            await asyncio.sleep(1.1)  # Redis' clock is asked for its seconds
    assert [(line["log_level"], line["address"]) for line in lines] == [("error", "http://10.0.0.1:8080")] * 2
    assert all("LETTA_GATEWAY_ADVERTISE" in line["event"] for line in lines)


async def test_gateway_that_was_here_before_is_no_twin(server: RedisServer) -> None:
    before, elsewhere, now = (Replicas(server, place) for place in (place_of("http://10.0.0.1:8080", "b"), OTHER, ONE))
    await before.beat()
    with structlog.testing.capture_logs() as lines:
        for _ in range(3):
            await elsewhere.beat()
            await now.beat()
            await asyncio.sleep(1.1)
    assert lines == []


@pytest.mark.parametrize(
    ("maxmemory", "policy", "is_told"),
    [
        ("1gb", "volatile-lru", True),
        ("1gb", "allkeys-lru", True),
        ("1gb", "noeviction", False),
        ("0", "volatile-lru", False),
    ],
)
async def test_redis_that_drops_what_it_is_told_is_told_of_once(
    server: RedisServer, redis: RedisProcess, maxmemory: str, policy: str, *, is_told: bool
) -> None:
    one = Replicas(server, ONE)
    with redis.client() as client, structlog.testing.capture_logs() as lines:
        client.config_set("maxmemory", maxmemory)
        client.config_set("maxmemory-policy", policy)
        try:
            for _ in range(3):
                await one.look(nothing)
        finally:
            client.config_set("maxmemory", 0)
            client.config_set("maxmemory-policy", "noeviction")
    assert [(line["log_level"], line["policy"]) for line in lines] == ([("error", policy)] if is_told else [])
    assert all("maxmemory-policy to noeviction" in line["event"] for line in lines)


async def forgets(redis: RedisProcess, how: str) -> None:
    if how == "flushed":
        with redis.client() as client:
            client.flushall()
    else:
        redis.kill()
        redis.start()


@pytest.mark.parametrize("how", ["flushed", "restarted"])
async def test_redis_that_forgot_is_told_again(server: RedisServer, redis: RedisProcess, how: str) -> None:
    one, told = Replicas(server, ONE), list[str]()

    async def tell_again() -> None:
        told.append("again")

    for _ in range(2):
        await one.look(tell_again)
    assert told == [], "a Redis that is new has forgotten nothing"
    await forgets(redis, how)
    async with asyncio.timeout(10):
        while not server.is_up or not told:
            with contextlib.suppress(SharedStateUnavailable):
                await one.look(tell_again)
    await one.look(tell_again)
    assert told == ["again"]


async def test_what_could_not_be_told_again_is_told_the_next_time(server: RedisServer, redis: RedisProcess) -> None:
    one, told = Replicas(server, ONE), list[str]()

    async def tell_again() -> None:
        told.append("again")
        if len(told) == 1:
            raise SharedStateUnavailable

    await one.look(tell_again)
    await forgets(redis, "flushed")
    with pytest.raises(SharedStateUnavailable):
        await one.look(tell_again)
    for _ in range(2):
        await one.look(tell_again)
    assert told == ["again"] * 2


async def test_gateway_that_came_after_the_loss_hides_it_from_nobody(server: RedisServer, redis: RedisProcess) -> None:
    one, told = Replicas(server, ONE), list[str]()

    async def tell_again() -> None:
        told.append("again")

    await one.look(tell_again)
    await forgets(redis, "flushed")
    newcomer = RedisServer(redis.url)
    await Replicas(newcomer, OTHER).look(nothing)
    await newcomer.close()
    await one.look(tell_again)
    assert told == ["again"]
