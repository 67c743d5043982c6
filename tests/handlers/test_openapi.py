from gateway.handlers.openapi import described
from tests.server.running import serving


async def test_description_is_served_as_it_lies_in_the_package() -> None:
    async with serving() as gateway:
        answer = await gateway.ask("GET", "/api/v1/openapi.json")
        assert (answer.status, answer.header("content-type")) == (200, "application/json")
        assert answer.header("cache-control") == "public, max-age=300"
        assert answer.body == described()
        assert answer.json()["openapi"] == "3.1.0"


def test_description_is_read_once() -> None:
    assert described() is described()
