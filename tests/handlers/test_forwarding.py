"""Requests that reach another gateway than the one that has what they are about."""

import asyncio
import contextlib
import contextvars
import socket
import time
from collections.abc import AsyncIterator

import msgspec
import pytest
import structlog.testing
from aiohttp.test_utils import make_mocked_request

from gateway import keys
from gateway.errors import UpstreamUnavailable
from gateway.handlers.forwarding import HEADER, Forwarder
from gateway.letta import probe
from gateway.letta.scripted import Hold, Script
from gateway.server import drain
from gateway.shared_state.places import place_of
from gateway.shared_state.redis_places import place_key
from gateway.shared_state.replicas import BEAT
from gateway.translation.agent_events import Stop, TextDelta, ToolCallDelta, Usage
from tests.faults.test_slow_readers import PER_STREAM
from tests.live.processes import free_port
from tests.server.running import FRIEND, JSON, Running, chat_request, serving
from tests.server.two_gateways import one_of_several, two_gateways
from tests.server.wire import Answer, request, until
from tests.shared_state.cut_redis import cable_to
from tests.shared_state.redis_process import RedisProcess
from tests.storage.late import late_database

pytestmark = pytest.mark.services

Pair = tuple[Running, Running]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALLS = Script(([ToolCallDelta("call-1", "f", "{}")], [Stop("requires_approval"), Usage(1, 1)]))
KEYED = {"Idempotency-Key": "k-1"}
CHAT = {"X-Letta-Chat-Key": "c-1"}


@pytest.fixture
async def pair(redis: RedisProcess) -> AsyncIterator[Pair]:
    async with two_gateways(redis) as gateways:
        yield gateways


def forwards(gateway: Running) -> float:
    (sample, _) = next(iter(gateway.metrics.forwarded.collect())).samples
    return sample.value


def forwarder_of(gateway: Running) -> Forwarder:
    forwarder = gateway.app[keys.FORWARDER]
    assert isinstance(forwarder, Forwarder)
    return forwarder


async def calls(gateway: Running) -> None:
    """Have the agent call a tool of the client's."""
    gateway.backend.play(CALLS)
    answer = await gateway.chat("Do it", headers=CHAT, tools=[TOOL])
    assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"


def results(**more: object) -> bytes:
    call = {"id": "call-1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = [
        {"role": "user", "content": "Do it"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "done"},
    ]
    return msgspec.json.encode({"model": "friend", "messages": said, "tools": [TOOL], **more})


async def bring(gateway: Running, headers: dict[str, str] = CHAT, **more: object) -> Answer:
    return await gateway.ask("POST", "/v1/chat/completions", {**JSON, **headers}, results(**more))


# Tool results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("headers", [CHAT, {}], ids=["by its chat", "by the call alone"])
async def test_results_come_to_where_the_turn_waits(pair: Pair, headers: dict[str, str], stream: bool) -> None:  # noqa: FBT001
    one, other = pair
    await calls(one)
    answer = await bring(other, headers, stream=stream)
    assert answer.status == 200
    assert (len(one.backend.turns), len(other.backend.turns)) == (2, 0)
    assert one.backend.turns[1].sent.returns[0].call_id == "call-1"
    assert forwards(other) == 1
    if stream:
        assert (answer.header("content-type") or "").startswith("text/event-stream")
        assert answer.body.endswith(b"data: [DONE]\n\n")
    assert answer.header("x-request-id")
    after = await bring(other, headers, stream=stream)
    assert after.status == 200
    assert len(other.backend.turns) == 1, "nothing waits any more: anybody may answer"


async def test_new_message_comes_to_where_the_turn_waits(pair: Pair) -> None:
    """So that the call is given up there."""
    one, other = pair
    await calls(one)
    assert (await other.chat("Never mind", headers=CHAT)).status == 200
    assert (len(one.backend.turns), len(other.backend.turns)) == (2, 0)


async def test_gateway_that_has_the_turn_is_gone(redis: RedisProcess) -> None:
    async with late_database() as database, one_of_several(database, redis) as other:
        async with one_of_several(database, redis) as one:
            await calls(one)
        answer = await bring(other)
        assert answer.status == 200
        assert len(other.backend.turns) == 1
        assert forwards(other) == 0


@pytest.mark.parametrize("how", ["flushed", "restarted"])
async def test_results_come_to_where_the_turn_waits_though_redis_forgot_it(
    pair: Pair, redis: RedisProcess, how: str
) -> None:
    one, other = pair
    await calls(one)
    if how == "flushed":
        with redis.client() as client:
            client.flushall()
    else:
        redis.kill()
        redis.start()
    async with asyncio.timeout(20):
        while (answer := await bring(other)).status == 503:  # noqa: ASYNC110 - it is seen from outside
            await asyncio.sleep(0.2)
    assert answer.status == 200
    assert (len(one.backend.turns), len(other.backend.turns)) == (2, 0)
    assert forwards(other) == 1


def hold(redis: RedisProcess, place: str) -> None:
    """Write down that a turn of the chat waits there, where signs of life came from a moment ago."""
    with redis.client() as client:
        client.set(place_key(f"local\n{FRIEND.id}\nc-1"), place, ex=60)
        client.zadd("letta-gateway:replicas", {place: time.time()})


async def test_gateway_that_has_the_turn_was_killed_a_moment_ago(pair: Pair, redis: RedisProcess) -> None:
    """It is still counted among the living: nobody listens where it was."""
    _, other = pair
    hold(redis, place_of(f"http://127.0.0.1:{free_port()}", "killed"))
    assert (await other.chat("Hi", headers=CHAT)).status == 200
    assert len(other.backend.turns) == 1
    assert forwards(other) == 0


async def test_another_process_listens_where_the_turn_was(pair: Pair, redis: RedisProcess) -> None:
    one, other = pair
    hold(redis, place_of(f"http://127.0.0.1:{one.port}", "before"))
    assert (await other.chat("Hi", headers=CHAT)).status == 200
    assert (len(one.backend.turns), len(other.backend.turns)) == (0, 1)
    assert forwards(other) == 0


async def test_gateway_that_has_the_turn_says_nothing(redis: RedisProcess) -> None:
    """What it did with the message is not known: it is not said again."""

    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server, two_gateways(redis) as (_, other):
        hold(redis, place_of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "strange"))
        answer = await other.chat("Hi", headers=CHAT)
    assert (answer.status, answer.code, answer.header("x-should-retry")) == (409, "outcome_unknown", "false")
    assert other.backend.turns == []


async def test_gateway_that_has_the_turn_takes_no_connection(redis: RedisProcess) -> None:
    """As its queue is full: nothing was sent, and the turn may still be there."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)  # noqa: FBT003 - the socket API's own signature
            waiting.connect_ex(full.getsockname())
        async with two_gateways(redis) as (_, other):
            hold(redis, place_of(f"http://127.0.0.1:{full.getsockname()[1]}", "full"))
            answer = await other.chat("Hi", headers=CHAT)
    assert (answer.status, answer.code, answer.header("x-should-retry")) == (503, "held_elsewhere", "true")
    assert answer.header("retry-after") == "1"
    assert other.backend.turns == []


@contextlib.asynccontextmanager
async def beside_one_that_breaks_off(redis: RedisProcess, head: bytes, begin: bytes) -> AsyncIterator[Running]:
    """Yield a gateway beside one that has the chat's turn, begins its answer and is gone."""

    async def breaks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + begin)
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.transport.abort()

    server = await asyncio.start_server(breaks, "127.0.0.1", 0)
    async with server, two_gateways(redis) as (_, other):
        hold(redis, place_of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "strange"))
        yield other


async def test_gateway_that_has_the_turn_breaks_off(redis: RedisProcess) -> None:
    head = b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked"
    async with beside_one_that_breaks_off(redis, head, b"9\r\ndata: 1\n\n\r\n") as other:
        answer = await other.chat("Hi", headers=CHAT, stream=True)
        assert 'letta_gateway_errors_total{code="conversation_lost"} 1.0' in other.exposed()
    assert answer.complete
    assert answer.body.startswith(b"data: 1\n\n")
    assert answer.events[-1]["error"]["code"] == "conversation_lost"
    assert b"[DONE]" not in answer.body


@pytest.mark.parametrize("stream", [False, True])
async def test_gateway_that_hands_on_goes_away(redis: RedisProcess, stream: bool) -> None:  # noqa: FBT001
    async def answers_without_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if stream:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            writer.write(b"9\r\ndata: 1\n\n\r\n")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.transport.abort()

    server = await asyncio.start_server(answers_without_end, "127.0.0.1", 0)
    async with server, two_gateways(redis) as (_, other):
        hold(redis, place_of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "strange"))
        asking = asyncio.get_running_loop().create_task(other.chat("Hi", headers=CHAT, stream=stream))
        await until(lambda: other.app[keys.FORWARDER]._under_way)  # type: ignore[union-attr]
        await asyncio.sleep(0.1)
        await drain.drain(other.app, other.listener, 0.2)
        answer = await asking
    if stream:
        assert (answer.status, answer.complete) == (200, True)
        assert answer.events[0] == 1
        assert answer.events[-1]["error"]["code"] == "shutting_down"
    else:
        assert (answer.status, answer.code) == (503, "shutting_down")


async def test_client_takes_nothing_of_a_forwarded_stream(redis: RedisProcess) -> None:
    """What it costs is bounded, kernel buffers included; the gateway that answers is held back; then comes the cut."""
    absorbed, cut = 0, asyncio.Event()
    piece = b"data: " + b"x" * 4_000 + b"\n\n"

    async def floods(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal absorbed
        writer.transport.set_write_buffer_limits(high=0)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                await writer.drain()
                absorbed += len(piece)
        cut.set()
        writer.transport.abort()

    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8_192)
    server = await asyncio.start_server(floods, sock=listening)
    async with server, two_gateways(redis, write_timeout=1.5) as (_, other):
        hold(redis, place_of(f"http://127.0.0.1:{listening.getsockname()[1]}", "strange"))
        with socket.socket() as client, structlog.testing.capture_logs() as lines:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
            client.connect(("127.0.0.1", other.port))
            client.sendall(chat_request(headers=CHAT, stream=True))
            async with asyncio.timeout(5):
                await cut.wait()
        await until(lambda: any(line["event"] == "request" for line in lines))
    print(f"a stalled reader of a forwarded stream cost {absorbed / 1024:.0f} KiB")
    assert absorbed <= PER_STREAM
    (line,) = [line for line in lines if line["event"] == "request"]
    assert (line["outcome"], line["status"]) == ("client_disconnected", 200)
    assert not [line for line in lines if line["log_level"] == "error"]


async def test_gateway_that_has_the_turn_breaks_off_in_a_whole_answer(redis: RedisProcess) -> None:
    """The client sees that it is cut, and nothing else in it."""
    head = b"Content-Type: application/json\r\nContent-Length: 100"
    async with beside_one_that_breaks_off(redis, head, b"{") as other:
        with socket.socket() as client, structlog.testing.capture_logs() as lines:
            client.setblocking(False)  # noqa: FBT003 - the socket API's own signature
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, ("127.0.0.1", other.port))
            await loop.sock_sendall(client, chat_request(headers=CHAT))
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while data := await loop.sock_recv(client, 65_536):
                    answer += data
        await until(lambda: any(line["event"] == "request" for line in lines))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.count(b"HTTP/1.1") == 1
    assert not answer.endswith(b"0\r\n\r\n")
    assert [line["outcome"] for line in lines if line["event"] == "request"] == ["failed"]
    assert not [line for line in lines if line["log_level"] == "error"]


# Answers that are asked for again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [KEYED, {"x-stainless-retry-count": "1"}], ids=["key", "sdk"])
async def test_request_that_is_repeated_while_it_is_answered(pair: Pair, headers: dict[str, str]) -> None:
    one, other = pair
    gate = asyncio.Event()
    one.backend.play(Script(([TextDelta("Hel")], Hold(gate), [TextDelta("lo")], [Stop("end_turn"), Usage(1, 1)])))
    first_headers = headers if headers is KEYED else {"x-stainless-retry-count": "0"}
    first = asyncio.get_running_loop().create_task(one.chat(headers=first_headers, stream=True))
    while not one.backend.turns:  # noqa: ASYNC110 - it is seen from outside
        await asyncio.sleep(0.01)
    again = asyncio.get_running_loop().create_task(other.chat(headers=headers, stream=True))
    await asyncio.sleep(0.3)
    gate.set()
    assert (await first).body == (await again).body
    assert (len(one.backend.turns), len(other.backend.turns), forwards(other)) == (1, 0, 1)


async def test_answer_that_is_over_is_told_again_by_whoever_is_asked(pair: Pair) -> None:
    one, other = pair
    first = await one.chat(headers=KEYED)
    again = await other.chat(headers=KEYED)
    assert (again.status, again.body) == (200, first.body)
    assert (len(one.backend.turns), len(other.backend.turns), forwards(other)) == (1, 0, 0)
    another = await other.chat("Something else", headers=KEYED)
    assert (another.status, another.code) == (422, "idempotency_key_reused")


async def test_same_key_at_both_at_once(pair: Pair) -> None:
    one, other = pair
    answers = await asyncio.gather(*(gateway.chat(headers=KEYED) for gateway in (one, other, one, other)))
    assert [answer.status for answer in answers] == [200] * 4
    assert len({answer.body for answer in answers}) == 1
    assert len(one.backend.turns) + len(other.backend.turns) == 1


async def test_response_is_cancelled_where_it_is_answered(pair: Pair) -> None:
    one, other = pair
    one.backend.play(Script(([TextDelta("Hel")], Hold(asyncio.Event()))))
    body = msgspec.json.encode({"model": "friend", "input": "Hi", "stream": True})
    async with one.connect() as connection:
        await connection.send(request("POST", "/v1/responses", JSON, body))
        await connection.head()
        said = b""
        async for piece in connection.pieces():
            said += piece
            if b"Hel" in said:
                break
        name = said.partition(b'"id":"resp_')[2].partition(b'"')[0].decode()
        answer = await other.ask("POST", f"/v1/responses/resp_{name}/cancel", JSON)
    assert answer.status == 200
    assert forwards(other) == 1
    again = await other.ask("POST", f"/v1/responses/resp_{name}/cancel", JSON)
    assert again.status == 400


# Marks ---------------------------------------------------------------------------------------------------------------


async def test_request_is_counted_once_and_its_client_is_known(redis: RedisProcess) -> None:
    async with two_gateways(redis, rate_limit="3/minute", api_keys=("sk-1",)) as (one, other):
        client = {"X-Forwarded-For": "203.0.113.7", "Authorization": "Bearer sk-1"}
        one.backend.play(CALLS)
        await one.chat("Do it", headers={**CHAT, **client}, tools=[TOOL])
        with structlog.testing.capture_logs() as lines:
            answer = await bring(other, {**CHAT, **client})
        assert answer.status == 200
        assert answer.header("x-ratelimit-remaining-requests") == "1"
        assert len(one.backend.turns) == 2
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["client"] for line in requests] == ["203.0.113.7"] * 2


@pytest.mark.parametrize("stream", [False, True])
async def test_request_is_one_in_the_figures_of_both(pair: Pair, *, stream: bool) -> None:
    one, other = pair
    await calls(one)
    assert (await bring(other, stream=stream)).status == 200
    exposed = [gateway.exposed() for gateway in pair]

    def total(series: str) -> float:
        lines = [line for text in exposed for line in text.splitlines() if line.startswith(f"letta_gateway_{series}")]
        return sum(float(line.split()[-1]) for line in lines)

    route = 'route="/v1/chat/completions"'
    assert total(f'requests_total{{method="POST",{route}') == 2
    assert total(f"request_seconds_count{{{route}") == 2
    assert total('turns_total{outcome="complete"}') == 2
    assert total('turns_total{outcome="failed"}') == 0
    assert total("first_token_seconds_count ") == (1 if stream else 0)
    assert (total("errors_total"), total("failures_total"), total("forwarded_requests_total ")) == (0, 0, 1)
    assert (total("requests_in_flight "), total("open_streams ")) == (0, 0)


async def test_request_under_way_is_one_in_the_figures_of_both(pair: Pair) -> None:
    one, other = pair
    await calls(one)
    gate = asyncio.Event()
    one.backend.play(Script(([TextDelta("Hel")], Hold(gate), [TextDelta("lo")], [Stop("end_turn"), Usage(1, 1)])))
    asking = asyncio.get_running_loop().create_task(bring(other, stream=True))
    await until(lambda: "letta_gateway_open_streams 1.0" in one.exposed())
    assert "letta_gateway_requests_in_flight 1.0" in other.exposed()
    assert "letta_gateway_requests_in_flight 0.0" in one.exposed()
    assert "letta_gateway_open_streams 0.0" in other.exposed()
    gate.set()
    await asking


@pytest.mark.parametrize("mark", ["", "x", "1 2 3", "1 203.0.113.9 instance " + "0" * 64, "é é é é"])
async def test_mark_that_was_made_up_means_nothing(redis: RedisProcess, mark: str) -> None:
    async with two_gateways(redis, rate_limit="2/minute") as (one, _):
        statuses = [(await one.chat(headers={HEADER: mark})).status for _ in range(3)]
    assert statuses == [200, 200, 429]


async def test_mark_that_is_old_means_nothing(pair: Pair) -> None:
    forwarder = forwarder_of(pair[0])
    old = f"{time.time() - 62:.0f}", "203.0.113.9", forwarder.instance
    for sent_at in (old[0], f"{time.time():.0f}"):
        parts = ("POST", "/v1/chat/completions", sent_at, *old[1:])
        mark = " ".join((*parts[2:], forwarder._sign(*parts)))
        made = make_mocked_request("POST", "/v1/chat/completions", headers={HEADER: mark})
        with structlog.testing.capture_logs() as lines:
            assert (forwarder.read(made) is None) == (sent_at == old[0])
        assert ["out of date" in line["event"] for line in lines] == [True] * (sent_at == old[0])
        elsewhere = make_mocked_request("POST", "/v1/responses", headers={HEADER: mark})
        assert forwarder.read(elsewhere) is None


async def test_clocks_of_two_gateways_are_apart(redis: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead, now = contextvars.ContextVar("ahead", default=0.0), time.time
    monkeypatch.setattr(time, "time", lambda: now() + ahead.get())
    async with late_database() as database, one_of_several(database, redis, rate_limit="3/minute") as one:
        token = ahead.set(3600.0)
        async with one_of_several(database, redis, rate_limit="3/minute") as other:
            ahead.reset(token)  # the other has it with all that it does
            await asyncio.sleep(0.5)  # a sign of life is given at once
            await calls(one)
            answer = await bring(other)
            third = await one.ask("GET", "/v1/models")
    assert (answer.status, len(one.backend.turns)) == (200, 2)
    assert (third.status, third.header("x-ratelimit-remaining-requests")) == (200, "0"), "counted once"


async def test_gateway_that_is_alone_forwards_nothing() -> None:
    async with serving() as gateway:
        assert gateway.app[keys.FORWARDER] is None
        assert (await gateway.chat(headers={**CHAT, HEADER: "1 203.0.113.9 instance x"})).status == 200


# What others say of Redis --------------------------------------------------------------------------------------------


async def test_others_tell_whether_redis_answers_them(pair: Pair, redis: RedisProcess) -> None:
    one, other = pair
    forwarder = forwarder_of(one)
    other.backend.down = UpstreamUnavailable()
    here = f"http://127.0.0.1:{other.port}"
    place = place_of(here, forwarder_of(other).instance)
    assert await forwarder.redis_of(place) == "answers", "whatever Letta does"
    assert await forwarder.redis_of(place_of(here, "before")) == "gone"
    assert await forwarder.redis_of(place_of(f"http://127.0.0.1:{free_port()}", "killed")) == "gone"
    with redis.paused():
        await asyncio.sleep(probe.TTL)
        assert await forwarder.redis_of(place) == "silent"


async def test_gateway_that_cannot_be_reached_tells_nothing(redis: RedisProcess) -> None:
    async with two_gateways(redis) as (one, _):
        forwarder = forwarder_of(one)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"http://127.0.0.1:{silent.getsockname()[1]}"
            assert await forwarder.redis_of(place_of(address, "elsewhere")) == "unknown"


async def test_answer_of_a_gateway_that_alone_is_cut_off_ends_with_an_error(redis: RedisProcess) -> None:
    async with (
        late_database() as database,
        cable_to(redis) as cable,
        one_of_several(database, cable) as one,
        one_of_several(database, redis, queue_wait=2.0) as other,
    ):
        one.backend.play(Script(([TextDelta("Hello")], Hold(asyncio.Event()))))
        await asyncio.sleep(2 * BEAT)  # the first one has seen the second by then
        asking = asyncio.get_running_loop().create_task(one.chat(stream=True))
        await until(lambda: one.backend.turns)
        cable.cut()
        async with asyncio.timeout(15):
            while (await other.chat()).status != 200:
                pass
        assert asking.done(), "the conversation is not in two places at once"
        assert (await asking).events[-1]["error"]["code"] == "conversation_lost"


# Redis is away -------------------------------------------------------------------------------------------------------


async def test_no_redis_no_turn(pair: Pair, redis: RedisProcess) -> None:
    one, _ = pair
    with redis.paused():
        answer = await one.chat()
        assert (answer.status, answer.code) == (503, "shared_state_unavailable")
        assert (answer.header("retry-after"), answer.header("x-should-retry")) == ("1", "true")
        assert (await one.ask("GET", "/health")).status == 200
        assert (await one.ask("GET", "/ready")).status == 503
        assert (await one.ask("GET", "/v1/models")).status == 200, "what needs no lock is answered, within a share"
    await asyncio.sleep(1.1)
    async with asyncio.timeout(10):
        while (await one.chat()).status != 200:  # noqa: ASYNC110 - it is seen from outside
            await asyncio.sleep(0.1)
    assert one.backend.turns
