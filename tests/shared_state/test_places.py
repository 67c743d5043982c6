import inspect

import pytest

from gateway.shared_state.places import Alone, Place, Places, place_of
from gateway.shared_state.redis_places import RedisPlaces
from tests.shared_state.protocols import asked_of


def test_place_is_an_address_and_a_process() -> None:
    place = Place(place_of("http://[::1]:8080", "b7"))
    assert (place.address, place.instance) == ("http://[::1]:8080", "b7")


@pytest.mark.parametrize("kind", [Alone, RedisPlaces])
def test_each_kind_has_the_whole_protocol(kind: type) -> None:
    for name, method in asked_of(Places).items():
        given = inspect.getattr_static(kind, name)
        assert inspect.iscoroutinefunction(given) == inspect.iscoroutinefunction(method), name
        assert list(inspect.signature(given).parameters) == list(inspect.signature(method).parameters), name


async def test_alone_everything_is_here() -> None:
    alone = Alone()
    await alone.take("chat", 60)
    await alone.check("chat")
    await alone.leave("chat")
    await alone.forget("chat", "http://10.0.0.1:8080 one")
