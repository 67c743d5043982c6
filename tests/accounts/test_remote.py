from collections.abc import AsyncIterator

import msgspec
import pytest

from gateway.accounts.remote import MAX_BODY, RemoteConfig, RemoteService
from gateway.errors import UpstreamInvalid, UpstreamUnavailable
from gateway.letta.breaker import FAILURES_TO_OPEN, Breaker
from tests.accounts.recorded_service import RecordedService, Sample, recorded_service


class Thing(msgspec.Struct):
    name: str


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def server() -> AsyncIterator[RecordedService]:
    async with recorded_service() as running:
        yield running


@pytest.fixture
async def service(server: RecordedService) -> AsyncIterator[RemoteService]:
    made = RemoteService(RemoteConfig("The thing service", "things", f"{server.url}/below", answer=0.3))
    yield made
    await made.close()


async def test_answer_as_it_came(server: RecordedService, service: RemoteService) -> None:
    server.on(
        "POST",
        "/below/things",
        Sample(201, {"name": "x"}, {"Retry-After": "7", "Date": "Sat, 21 Nov 2026 18:40:25 GMT"}),
    )
    reply = await service.ask("POST", "/things", headers={"X-Key": "k"}, query={"a": "b c"}, body=Thing("sent"))
    assert (reply.status, reply.retry_after, reply.date) == (201, 7.0, 1_795_286_425.0)
    assert service.decoded(reply, Thing) == Thing("x")
    asked = server.asked("POST", "/below/things")[0]
    assert (asked.json(), asked.query, asked.headers["X-Key"]) == ({"name": "sent"}, {"a": "b c"}, "k")
    assert asked.headers["Content-Type"] == "application/json"


async def test_question_without_a_body_has_no_content_type(server: RecordedService, service: RemoteService) -> None:
    server.on("GET", "/below/things", Sample())
    reply = await service.ask("GET", "things", headers={})
    assert (reply.status, reply.body, reply.retry_after) == (200, b"", None)
    asked = server.asked("GET", "/below/things")[0]
    assert "Content-Type" not in asked.headers or asked.body == b""


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422, 429])
async def test_refusal_is_an_answer(server: RecordedService, service: RemoteService, status: int) -> None:
    server.on("GET", "/below/things", Sample(status))
    assert (await service.ask("GET", "things", headers={})).status == status


@pytest.mark.parametrize("status", [500, 501, 502, 503, 504, 522])
async def test_failure_of_the_server_is_503(server: RecordedService, service: RemoteService, status: int) -> None:
    server.on("GET", "/below/things", Sample(status, {"secret": "text"}, {"Retry-After": "9"}))
    with pytest.raises(UpstreamUnavailable) as raised:
        await service.ask("GET", "things", headers={})
    error = raised.value
    assert (error.status, error.code, error.retry_after) == (503, "things_unavailable", 9.0)
    assert error.message == "The thing service cannot be reached right now. Try again in a moment."


async def test_silence_is_503_within_the_deadline(server: RecordedService, service: RemoteService) -> None:
    server.on("GET", "/below/things", Sample(silent=True))
    with pytest.raises(UpstreamUnavailable) as raised:
        await service.ask("GET", "things", headers={})
    assert raised.value.headers() == {"Retry-After": "2", "x-should-retry": "true"}


async def test_server_that_is_not_there() -> None:
    service = RemoteService(RemoteConfig("The thing service", "things", "http://127.0.0.1:9"))
    with pytest.raises(UpstreamUnavailable):
        await service.ask("GET", "things", headers={})
    await service.close()


async def test_server_that_is_down_is_not_asked_every_time(server: RecordedService) -> None:
    clock = Clock()
    config = RemoteConfig("The thing service", "things", server.url)
    service = RemoteService(config, breaker=Breaker(clock))
    server.on("GET", "/things", Sample(503))
    for _ in range(FAILURES_TO_OPEN + 3):
        with pytest.raises(UpstreamUnavailable, match="The thing service cannot be reached"):
            await service.ask("GET", "things", headers={})
    assert len(server.requests) == FAILURES_TO_OPEN
    clock.now += 60
    server.on("GET", "/things", Sample())
    assert (await service.ask("GET", "things", headers={})).status == 200
    assert (await service.ask("GET", "things", headers={})).status == 200
    await service.close()


async def test_redirect_is_not_followed(server: RecordedService, service: RemoteService) -> None:
    server.on("GET", "/below/things", Sample(302, headers={"Location": f"{server.url}/elsewhere"}))
    assert (await service.ask("GET", "things", headers={})).status == 302
    assert not server.asked("GET", "/elsewhere")


async def test_answer_without_end_is_refused(server: RecordedService, service: RemoteService) -> None:
    server.on("GET", "/below/things", Sample(200, "x" * MAX_BODY))
    with pytest.raises(UpstreamInvalid):
        await service.ask("GET", "things", headers={})


@pytest.mark.parametrize("response", [None, [], {"name": 1}, {}])
async def test_answer_of_another_kind(server: RecordedService, service: RemoteService, response: object) -> None:
    server.on("GET", "/below/things", Sample(200, response))
    reply = await service.ask("GET", "things", headers={})
    with pytest.raises(UpstreamInvalid) as raised:
        service.decoded(reply, Thing)
    assert (raised.value.status, raised.value.code) == (502, "things_invalid_response")


@pytest.mark.parametrize(
    ("value", "seconds"), [("3", 3.0), ("999999", 3_600.0), ("-1", None), ("soon", None), ("²", None)]
)
async def test_how_long_to_wait(
    server: RecordedService, service: RemoteService, value: str, seconds: float | None
) -> None:
    server.on("GET", "/below/things", Sample(429, headers={"Retry-After": value, "Date": "yesterday"}))
    reply = await service.ask("GET", "things", headers={})
    assert (reply.retry_after, reply.date) == (seconds, None)
