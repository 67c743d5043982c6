from collections.abc import Callable

import pytest

from gateway.errors import HeldElsewhere, SharedStateUnavailable
from gateway.shared_state.places import place_of
from gateway.shared_state.redis import RedisServer
from gateway.shared_state.redis_places import RedisPlaces
from tests.shared_state.redis_process import RedisProcess

pytestmark = pytest.mark.services

ONE, OTHER = place_of("http://10.0.0.1:8080", "one"), place_of("http://10.0.0.2:8080", "other")


@pytest.fixture
def places(server: RedisServer) -> Callable[[str], RedisPlaces]:
    return lambda here: RedisPlaces(server, here)


async def test_what_one_has_the_other_is_told_of(places: Callable[[str], RedisPlaces]) -> None:
    one, other = places(ONE), places(OTHER)
    await one.take("chat", 60)
    await one.check("chat")
    await one.take("chat", 60)
    for ask in (other.check("chat"), other.take("chat", 60)):
        with pytest.raises(HeldElsewhere) as raised:
            await ask
        assert (raised.value.name, raised.value.place) == ("chat", ONE)
    await other.check("another chat")


async def test_left_and_taken_by_another(places: Callable[[str], RedisPlaces]) -> None:
    one, other = places(ONE), places(OTHER)
    await one.take("chat", 60)
    await other.leave("chat")
    with pytest.raises(HeldElsewhere):
        await other.check("chat")
    await one.leave("chat")
    await other.take("chat", 60)
    with pytest.raises(HeldElsewhere):
        await one.check("chat")


async def test_gateway_that_was_here_before_has_nothing_any_more(places: Callable[[str], RedisPlaces]) -> None:
    before, now = places(ONE), places(place_of("http://10.0.0.1:8080", "started again"))
    await before.take("a", 60)
    await before.take("b", 60)
    await now.check("a")
    await now.take("b", 60)
    await now.check("b")


async def test_place_ends_by_itself(places: Callable[[str], RedisPlaces], redis: RedisProcess) -> None:
    await places(ONE).take("chat", 60)
    with redis.client() as client:
        (key,) = client.keys()
        assert 59_000 < client.pttl(key) <= 60_000
        assert b"chat" not in key, "names are not told to Redis"


async def test_forgotten_only_as_it_was_found(places: Callable[[str], RedisPlaces]) -> None:
    one, other = places(ONE), places(OTHER)
    await one.take("chat", 60)
    await other.forget("chat", place_of("http://10.0.0.1:8080", "before"))
    with pytest.raises(HeldElsewhere):
        await other.check("chat")
    await other.forget("chat", ONE)
    await other.check("chat")


async def test_redis_is_away(places: Callable[[str], RedisPlaces], redis: RedisProcess) -> None:
    one = places(ONE)
    with redis.paused():
        for ask in (one.take("chat", 60), one.check("chat"), one.leave("chat"), one.forget("chat", ONE)):
            with pytest.raises(SharedStateUnavailable):
                await ask
