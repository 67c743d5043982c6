from gateway.letta.scripted import Hang, Script
from tests.server.people import town
from tests.server.running import Running, chat_request, serving
from tests.server.strangers import Strangers
from tests.server.wire import until


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
    async with town(talks=False) as gateway:
        strangers = Strangers(gateway)
        await strangers.try_everything()
        before = series(gateway)
        await strangers.come(2_000)
        assert series(gateway) == before
        assert len(before) < 500
        assert strangers.answers > 2_000
        exposed = gateway.exposed()
        assert not [word for word in (*strangers.words, gateway.ann.id, gateway.ann.email) if word in exposed]
