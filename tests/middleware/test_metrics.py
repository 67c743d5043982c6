import asyncio
import random
import string

from gateway.letta.scripted import Hang, Script
from tests.server.running import Running, chat_request, serving, settings
from tests.server.wire import request, until

SEED = 7


def series(gateway: Running) -> set[str]:
    return {line.rsplit(" ", 1)[0] for line in gateway.exposed().splitlines() if not line.startswith("#")}


async def test_requests_are_counted_by_route_method_and_status() -> None:
    async with serving() as gateway:
        await gateway.ask("GET", "/v1/models")
        await gateway.ask("GET", "/v1/models/friend")
        await gateway.ask("GET", "/v1/models/nobody")
        await gateway.ask("PROPFIND", "/v1/models")
        text = gateway.exposed()
    for labels in (
        'method="GET",route="/v1/models",status="200"',
        'method="GET",route="/v1/models/{model}",status="200"',
        'method="GET",route="/v1/models/{model}",status="404"',
        'method="other",route="other",status="405"',
    ):
        assert f"letta_gateway_requests_total{{{labels}}} 1.0" in text
    assert 'letta_gateway_request_seconds_count{route="/v1/models"} 1.0' in text
    assert "letta_gateway_requests_in_flight 0.0" in text


async def test_client_that_does_not_wait() -> None:
    async with serving() as gateway, gateway.connect() as connection:
        gateway.backend.play(Script((Hang(),)))
        await connection.send(chat_request())
        await until(lambda: "letta_gateway_requests_in_flight 1.0" in gateway.exposed())
        connection.abort()
        await until(lambda: "letta_gateway_requests_in_flight 0.0" in gateway.exposed())
        assert 'status="499"' in gateway.exposed()


async def test_series_stay_the_same_whatever_clients_send() -> None:
    chance = random.Random(SEED)

    def word(most: int) -> str:
        return "".join(chance.choices(string.ascii_letters + string.digits + "-_", k=chance.randint(1, most)))

    def some_request() -> bytes:
        match chance.randrange(5):
            case 0:
                return request("GET", f"/{word(30)}/{word(10)}?{word(5)}={word(5)}")
            case 1:
                method = chance.choice(("PROPFIND", "TRACE", "MKCOL", "PURGE", "SUBSCRIBE", word(20).upper()))
                return request(method, f"/v1/{word(20)}")
            case 2:
                return request("GET", f"/v1/models/{word(40)}", {"X-Request-Id": word(50), "User-Agent": word(50)})
            case 3:
                return chat_request(model=word(30), user=word(30))
            case _:
                return request(word(9), f"/v1/models?{word(9)}", {"X-Forwarded-For": word(20), "Origin": word(9)})

    async with serving(settings(rate_limit="1000000/minute")) as gateway:

        async def send(count: int) -> None:
            for _ in range(count):
                await gateway.raw(some_request())

        await asyncio.gather(*(send(50) for _ in range(4)))
        before = series(gateway)
        await asyncio.gather(*(send(500) for _ in range(4)))
        assert series(gateway) == before
        assert len(before) < 250
