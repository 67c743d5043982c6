"""The bench itself: exact counts, sane latencies and no errors through upstream, pass-through and driver."""

import contextlib
import http.client
import json
from collections.abc import Iterator

import pytest
import uvloop

from tests.bench import targets
from tests.bench.driver import Tally, open_streams
from tests.bench.frames import LAST_CHUNK, agent_id, letta_script, stamp
from tests.bench.measure import requests, streaming
from tests.bench.plan import QUICK
from tests.bench.targets import Asking, Target
from tests.bench.transcript import fault

PLAN = QUICK.__class__(ramp=0.1, settle=0.1, window=0.4, streams=20, request_seconds=0.2)
HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.fixture(scope="module")
def upstream() -> Iterator[Target]:
    with targets.upstream(agents=3) as target:
        yield target


@pytest.fixture(scope="module")
def passthrough(upstream: Target) -> Iterator[Target]:
    with targets.passthrough(upstream.port) as target:
        yield target


def test_streams_through_the_passthrough_are_counted_exactly(upstream: Target, passthrough: Target) -> None:
    sample = uvloop.run(streaming(passthrough, upstream.process, PLAN, 20, 50))
    assert sample.errors == []
    assert sample.kept_up == pytest.approx(1, abs=0.1)
    assert 0 < sample.latency.p50 < 100
    assert sample.cpu_us > 0


def test_requests_through_the_passthrough_are_answered(passthrough: Target) -> None:
    sample = uvloop.run(requests(passthrough, 4, PLAN))
    assert sample.errors == []
    assert sample.per_second > 50


@pytest.mark.services  # which bring nginx
def test_users_of_gateways_behind_nginx_are_answered(upstream: Target) -> None:
    with contextlib.ExitStack() as stack:
        settings = {"LETTA_GATEWAY_API_KEYS": targets.keys_of_users(3)}
        gateways = [stack.enter_context(targets.gateway(upstream.port, **settings)) for _ in range(2)]
        port, process = stack.enter_context(targets.balancer([gateway.port for gateway in gateways]))
        sample = uvloop.run(requests(Target("front", port, process, targets.ask_as_a_user), 3, PLAN))
    assert sample.errors == []
    assert sample.per_second > 5


def test_a_stream_that_says_less_than_asked_is_an_error(upstream: Target) -> None:
    async def expect_six_of_five() -> list[str]:
        tally = Tally()
        request = upstream.request(Asking(0, "events=5 interval=0.001"))
        await open_streams(upstream.port, tally, [request], 6, lambda: 0.0)
        await tally.all_gone(5)
        return tally.errors

    assert uvloop.run(expect_six_of_five()) == ["5 deltas instead of 6"]


def test_the_listing_has_pages(upstream: Target) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", upstream.port, timeout=5)

    def names(query: str) -> list[str]:
        connection.request("GET", f"/v1/agents/{query}")
        return [agent["name"] for agent in json.load(connection.getresponse())]

    assert names("?limit=2") == ["bench", "bench-1"]
    assert names(f"?limit=2&after={agent_id(1)}") == ["bench-2"]
    assert names(f"?after={agent_id(2)}") == []
    connection.close()


def test_a_transcript_is_read_strictly() -> None:
    script = letta_script(1, 2)
    first, second = (script.before + stamp() + script.after for _ in range(2))
    answer = HEAD + script.opening + first + second + script.closing
    assert fault(answer, 2) is None
    assert fault(answer, 3) == "2 events instead of 3"
    assert fault(HEAD + script.opening + second + first + script.closing, 2) == "the deltas are out of order"
    assert fault(HEAD + first + second + LAST_CHUNK, 2) == "the stream ends without [DONE]"
    assert "cut" in str(fault(answer[:-40], 2))
