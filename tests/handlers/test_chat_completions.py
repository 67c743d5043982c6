import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from gateway.errors import (
    AgentGone,
    ConversationBusy,
    GatewayError,
    TurnFailed,
    UpstreamTimeout,
    UpstreamTruncated,
    UpstreamUnavailable,
)
from gateway.letta.backend import Agent
from gateway.letta.scripted import Break, Hang, Hold, Pause, Script, ScriptedBackend, ScriptedTurn, Step, says
from gateway.translation.agent_events import Batch, Failure, ReasoningDelta, Stop, TextDelta, Usage
from gateway.translation.agent_turn import AgentTurn, Text
from tests.said import parts_of
from tests.server.running import FRIEND, JSON, Running, chat_body, chat_request, serving, settings
from tests.server.wire import Answer, Connection, until

HEL: Batch = [TextDelta("Hel")]
LO: Batch = [TextDelta("lo")]
END: Batch = [Stop("end_turn"), Usage(10, 2)]
REFUSED = UpstreamUnavailable(retry_after=2.0, should_retry=True)
BROKEN = UpstreamTruncated(should_retry=False)
BOTH = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with serving() as running:
        yield running


def figure(gateway: Running, name: str) -> float:
    line = next(line for line in gateway.exposed().splitlines() if line.startswith(f"letta_gateway_{name} "))
    return float(line.split()[1])


async def settled(gateway: Running) -> None:
    """See that nothing is left of any turn."""
    gauges = ("open_turns", "requests_in_flight", "open_streams", "waiting_turns")
    await until(lambda: all(figure(gateway, name) == 0 for name in gauges))
    assert all(turn.closed for turn in gateway.backend.turns if turn.opened)
    answer = await asyncio.wait_for(gateway.chat("and now?"), 2)
    assert answer.status == 200, "the thread is free"


# An answer -----------------------------------------------------------------------------------------------------------


async def test_stream(gateway: Running) -> None:
    gateway.backend.play(Script(([ReasoningDelta("Hm")], HEL, LO, END)))
    answer = await gateway.chat("Hello?", stream=True, stream_options={"include_usage": True})
    assert (answer.status, answer.complete, answer.text) == (200, True, "Hello")
    *chunks, done = answer.events
    assert done == "[DONE]"
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["total_tokens"] == 12
    (turn,) = gateway.backend.turns
    assert turn.sent.agent_id == FRIEND.id
    assert parts_of(turn.sent) == (Text("Hello?"),)
    await settled(gateway)


async def test_each_batch_goes_out_when_it_comes(gateway: Running) -> None:
    gates = [asyncio.Event() for _ in range(3)]
    gateway.backend.play(Script((Hold(gates[0]), HEL, Hold(gates[1]), LO, Hold(gates[2]), END)))
    async with gateway.connect() as connection:
        await connection.send(chat_request(stream=True))
        gates[0].set()
        await connection.head()
        pieces = connection.pieces()
        assert b"Hel" in await anext(pieces)
        gates[1].set()
        assert b"lo" in await anext(pieces)
        gates[2].set()
        assert b'"finish_reason":"stop"' in await anext(pieces)


async def test_whole_answer(gateway: Running) -> None:
    gateway.backend.play(Script(([ReasoningDelta("Hm")], HEL, LO, END)))
    answer = await gateway.chat("Hello?")
    assert (answer.status, answer.header("content-type")) == (200, "application/json")
    body = answer.json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == "Hello"
    assert body["usage"]["total_tokens"] == 12
    await settled(gateway)


async def test_agent_id_and_name_are_both_models(gateway: Running) -> None:
    for model in (FRIEND.name, FRIEND.id):
        assert (await gateway.chat(model=model)).json()["model"] == model


async def test_figures(gateway: Running) -> None:
    await gateway.chat(stream=True)
    await gateway.chat()
    text = gateway.exposed()
    for line in (
        'letta_gateway_turns_total{outcome="complete"} 2.0',
        'letta_gateway_tokens_total{kind="prompt"} 200.0',
        'letta_gateway_tokens_total{kind="completion"} 40.0',
        "letta_gateway_first_token_seconds_count 1.0",
        "letta_gateway_chunks_total 5.0",
        "letta_gateway_open_streams 0.0",
    ):
        assert line in text


# Before the first byte -----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("script", "status", "code", "retry"),
    [
        (Script(opening=(Break(REFUSED),)), 503, "upstream_unavailable", "true"),
        (Script(opening=(Break(UpstreamTimeout(should_retry=False)),)), 504, "upstream_timeout", "false"),
        (Script((Break(BROKEN),)), 502, "upstream_stream_truncated", "false"),
        (Script(([Failure(TurnFailed(should_retry=False))],)), 502, "agent_run_failed", "false"),
        (Script(()), 502, "upstream_stream_truncated", "false"),
        (Script(opening=(Break(AgentGone()),)), 404, "model_not_found", None),
    ],
    ids=["refused", "too late", "broken off", "failed", "empty", "agent is gone"],
)
async def test_failure_before_the_first_byte_is_a_status(
    gateway: Running,
    stream: bool,  # noqa: FBT001
    script: Script,
    status: int,
    code: str,
    retry: str | None,
) -> None:
    gateway.backend.play(script)
    answer = await gateway.chat(stream=stream)
    assert (answer.status, answer.code, answer.header("x-should-retry")) == (status, code, retry)
    assert answer.header("content-type") == "application/json"
    assert 'letta_gateway_turns_total{outcome="failed"} 1.0' in gateway.exposed()
    await settled(gateway)


@BOTH
async def test_bug_before_the_first_byte(stream: bool) -> None:  # noqa: FBT001
    class Buggy(ScriptedBackend):
        def turn(self, turn: AgentTurn) -> ScriptedTurn:
            raise ZeroDivisionError

    async with serving(backend=Buggy([FRIEND])) as gateway:
        answer = await gateway.chat(stream=stream)
    assert (answer.status, answer.code) == (500, "internal_error")
    assert answer.header("x-should-retry") == "false"


@BOTH
async def test_letta_is_down(stream: bool) -> None:  # noqa: FBT001
    backend = ScriptedBackend([FRIEND])
    backend.down = REFUSED
    async with serving(backend=backend) as gateway:
        answer = await gateway.chat(stream=stream)
    assert (answer.status, answer.code) == (503, "upstream_unavailable")
    assert answer.header("retry-after") == "2"
    assert backend.turns == []


async def test_agent_that_is_gone_is_forgotten(gateway: Running) -> None:
    await gateway.ask("GET", "/v1/models")
    gateway.backend.play(Script(opening=(Break(AgentGone()),)))
    gateway.backend.listed.clear()
    assert (await gateway.chat()).code == "model_not_found"
    assert (await gateway.ask("GET", "/v1/models")).json()["data"] == []


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (chat_body(model="nobody"), "model_not_found"),
        (chat_body(model="Friend"), "model_not_found"),
        (chat_body(n=2), "unsupported_parameter"),
        (chat_body(messages=[]), "any"),
    ],
)
async def test_request_that_starts_no_turn(gateway: Running, body: bytes, code: str) -> None:
    answer = await gateway.ask("POST", "/v1/chat/completions", JSON, body)
    assert 400 <= answer.status < 500
    assert code in (answer.code, "any")
    assert gateway.backend.turns == []


# After it ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rest", "code"),
    [
        ((Break(BROKEN),), "upstream_stream_truncated"),
        ((), "upstream_stream_truncated"),
        (([Failure(TurnFailed(should_retry=False))],), "agent_run_failed"),
        ((Break(UpstreamTimeout(code="upstream_silent")),), "upstream_silent"),
    ],
    ids=["broken off", "no stop reason", "failed", "silent"],
)
async def test_failure_after_the_first_byte_is_in_band(gateway: Running, rest: tuple[Step, ...], code: str) -> None:
    gateway.backend.play(Script((HEL, *rest)))
    answer = await gateway.chat(stream=True)
    assert (answer.status, answer.complete, answer.text) == (200, True, "Hel")
    *chunks, last = answer.events
    assert last["error"]["code"] == code
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert "[DONE]" not in chunks
    assert not [chunk for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert f'letta_gateway_errors_total{{code="{code}"}} 1.0' in gateway.exposed()
    assert f'letta_gateway_upstream_errors_total{{code="{code}"}} 1.0' in gateway.exposed()
    await settled(gateway)


async def test_bug_after_the_first_byte_is_in_band_and_shows_nothing(gateway: Running) -> None:
    gateway.backend.play(Script((HEL, [TextDelta(5)])))  # type: ignore[arg-type]
    answer = await gateway.chat(stream=True)
    last = answer.events[-1]
    assert last["error"]["code"] == "internal_error", answer.body
    assert answer.complete


async def test_whole_answer_that_breaks_off_is_a_status(gateway: Running) -> None:
    gateway.backend.play(Script((HEL, Break(BROKEN))))
    answer = await gateway.chat()
    assert (answer.status, answer.code) == (502, "upstream_stream_truncated")


# The first-byte wait -------------------------------------------------------------------------------------------------


async def test_headers_and_a_heartbeat_go_out_when_the_agent_thinks_long() -> None:
    gate = asyncio.Event()
    async with serving(settings(first_byte_wait=0.05)) as gateway, gateway.connect() as connection:
        gateway.backend.play(Script((Hold(gate), HEL, END)))
        started = time.monotonic()
        await connection.send(chat_request(stream=True))
        head = await connection.head()
        assert head.status == 200
        assert 0.04 < time.monotonic() - started < 1
        pieces = connection.pieces()
        assert await anext(pieces) == b": ping\n\n", "a comment, no data"
        gate.set()
        rest = b"".join([piece async for piece in pieces])
    assert Answer(200, [], rest).text == "Hel"
    assert rest.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "script",
    [
        Script((Pause(0.15), Break(BROKEN))),
        Script(opening=(Pause(0.15), Break(UpstreamTimeout()))),
        Script(opening=(Pause(0.15), Break(AgentGone()))),
    ],
)
async def test_failure_after_the_wait_is_in_band(script: Script) -> None:
    async with serving(settings(first_byte_wait=0.05)) as gateway:
        gateway.backend.play(script)
        answer = await gateway.chat(stream=True)
        assert (answer.status, answer.complete) == (200, True)
        (last,) = answer.events
        assert last["error"]["code"] in ("upstream_stream_truncated", "upstream_timeout", "model_not_found")
        assert b": ping" in answer.body
        await settled(gateway)


async def test_waiting_turn_gets_headers_too() -> None:
    gate = asyncio.Event()
    async with serving(settings(first_byte_wait=0.05)) as gateway, gateway.connect() as second:
        gateway.backend.play(Script((Hold(gate), HEL, END)))
        first = asyncio.get_running_loop().create_task(gateway.chat())
        await until(lambda: gateway.backend.turns)
        await second.send(chat_request(stream=True))
        assert (await second.head()).status == 200
        gate.set()
        assert (await first).status == 200
        body = b"".join([piece async for piece in second.pieces()])
        assert Answer(200, [], body).text == "Hello, world!"


# Clients that go away ------------------------------------------------------------------------------------------------


WINDOWS = {
    "before the turn is open": Script(opening=(Hang(),)),
    "before the first token": Script((Hang(),)),
    "in the middle": Script((HEL, Hang())),
}


@BOTH
@pytest.mark.parametrize("window", WINDOWS)
async def test_client_goes_away(gateway: Running, stream: bool, window: str) -> None:  # noqa: FBT001
    gateway.backend.play(WINDOWS[window])
    async with gateway.connect() as connection:
        await connection.send(chat_request(stream=stream))
        await until(lambda: gateway.backend.turns and gateway.backend.turns[0].opened)
        if stream and window == "in the middle":
            await connection.head()
        started = time.monotonic()
        connection.abort()
        await until(lambda: gateway.backend.turns[0].cancelled)
        assert time.monotonic() - started < 1
    await settled(gateway)
    assert 'letta_gateway_turns_total{outcome="client_disconnected"} 1.0' in gateway.exposed()


@BOTH
async def test_client_goes_away_while_it_waits_for_its_turn(gateway: Running, stream: bool) -> None:  # noqa: FBT001
    gate = asyncio.Event()
    gateway.backend.play(Script((Hold(gate), *says("one").steps)))
    first = asyncio.get_running_loop().create_task(gateway.chat("first"))
    await until(lambda: gateway.backend.turns)
    async with gateway.connect() as connection:
        await connection.send(chat_request("second", stream=stream))
        await until(lambda: figure(gateway, "waiting_turns") == 1)
        connection.abort()
        await until(lambda: figure(gateway, "waiting_turns") == 0)
    gate.set()
    assert (await first).status == 200
    await settled(gateway)
    assert [parts_of(turn.sent) for turn in gateway.backend.turns] == [(Text("first"),), (Text("and now?"),)]


async def test_client_goes_away_while_the_agent_is_looked_up() -> None:
    backend = ScriptedBackend([FRIEND])
    gate = asyncio.Event()
    backend.holding = Hold(gate)
    async with serving(backend=backend) as gateway, gateway.connect() as connection:
        await connection.send(chat_request(stream=True))
        await until(lambda: backend.searches)
        connection.abort()
        await until(lambda: figure(gateway, "requests_in_flight") == 0)
        gate.set()
        await settled(gateway)
        assert [parts_of(turn.sent) for turn in backend.turns] == [(Text("and now?"),)]


async def test_headers_do_not_wait_for_a_slow_look_up() -> None:
    backend = ScriptedBackend([FRIEND])
    gate = asyncio.Event()
    backend.holding = Hold(gate)
    async with serving(settings(first_byte_wait=0.05), backend=backend) as gateway, gateway.connect() as connection:
        await connection.send(chat_request(stream=True))
        head = await connection.reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head
        gate.set()
        await connection.reader.readuntil(b"[DONE]")


async def test_turn_may_go_on_without_its_client() -> None:
    gate = asyncio.Event()
    async with serving(settings(on_disconnect="finish")) as gateway, gateway.connect() as connection:
        gateway.backend.play(Script((HEL, Hold(gate), LO, END)))
        await connection.send(chat_request(stream=True))
        await connection.head()
        connection.abort()
        await until(lambda: gateway.backend.turns[0].drained)
        gate.set()
        await settled(gateway)
        assert gateway.backend.turns[0].heard == 3
        assert not gateway.backend.turns[0].cancelled


# Clients that read slowly --------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def stalled(gateway: Running) -> AsyncIterator[Connection]:
    """Connect a client that asks for a stream and does not read."""
    async with gateway.connect() as connection:
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined, unused-ignore]
        await connection.send(chat_request(stream=True))
        yield connection
        connection.abort()


async def test_reader_that_takes_nothing_is_given_up_and_costs_little() -> None:
    batch: Batch = [TextDelta("x" * 4_000)]
    flood = Script((*[batch] * 5_000, END))
    async with serving(settings(write_timeout=0.3)) as gateway:
        gateway.backend.play(flood)
        async with stalled(gateway):
            await until(lambda: gateway.backend.turns and gateway.backend.turns[0].cancelled)
        heard = gateway.backend.turns[0].heard
        assert heard * 4_000 < 8_000_000, "of 20 MB: what the kernel of this machine takes, and no more"
        await settled(gateway)
        assert 'letta_gateway_turns_total{outcome="client_disconnected"} 1.0' in gateway.exposed()


async def test_reader_that_never_takes_the_end() -> None:
    """All of the answer fits into buffers but its last part."""
    big = "x" * 4_900
    async with serving(settings(write_timeout=0.3)) as gateway:
        gateway.backend.play(Script(([TextDelta(big)] * 2_000, END)))
        async with stalled(gateway):
            await until(lambda: 'outcome="client_disconnected"} 1.0' in gateway.exposed())
        await settled(gateway)


async def test_reader_that_is_slow_gets_everything() -> None:
    texts = [f"{number:04}" + "x" * 2_000 for number in range(300)]
    async with serving(settings(write_timeout=2.0)) as gateway:
        gateway.backend.play(says(*texts))
        async with stalled(gateway) as connection:
            await asyncio.sleep(0.2)
            connection.writer.transport.resume_reading()  # type: ignore[attr-defined, unused-ignore]
            answer = await connection.answer()
        assert answer.text == "".join(texts)
        assert answer.events[-1] == "[DONE]"


# One turn at a time --------------------------------------------------------------------------------------------------


async def test_second_turn_waits_for_the_first(gateway: Running) -> None:
    gate = asyncio.Event()
    gateway.backend.play(Script((Hold(gate), *says("one").steps)), says("two"))
    loop = asyncio.get_running_loop()
    first = loop.create_task(gateway.chat("first", stream=True))
    await until(lambda: gateway.backend.turns)
    second = loop.create_task(gateway.chat("second", stream=True))
    await until(lambda: figure(gateway, "waiting_turns") == 1)
    assert len(gateway.backend.turns) == 1
    gate.set()
    assert [(await task).text for task in (first, second)] == ["one", "two"]


async def test_other_agents_do_not_wait() -> None:
    other = Agent("agent-other", "other", 0)
    async with serving(backend=ScriptedBackend([FRIEND, other])) as gateway, gateway.connect() as connection:
        gateway.backend.play(Script((HEL, Hang())))
        await connection.send(chat_request(stream=True))
        await connection.head()
        assert (await gateway.chat(model="other")).status == 200
        connection.abort()


@BOTH
async def test_too_many_wait(stream: bool) -> None:  # noqa: FBT001
    gate = asyncio.Event()
    async with serving(settings(queue_depth=2)) as gateway:
        gateway.backend.play(Script((Hold(gate), *says("one").steps)))
        loop = asyncio.get_running_loop()
        first = loop.create_task(gateway.chat())
        await until(lambda: gateway.backend.turns)
        waiting = [loop.create_task(gateway.chat()) for _ in range(2)]
        await until(lambda: figure(gateway, "waiting_turns") == 2)
        refused = await gateway.chat(stream=stream)
        assert (refused.status, refused.code) == (409, "conversation_busy")
        assert refused.header("retry-after") == "2"
        assert refused.header("x-should-retry") == "true"
        gate.set()
        assert [(await task).status for task in (first, *waiting)] == [200, 200, 200]
        await settled(gateway)


async def test_wait_is_too_long() -> None:
    async with serving(settings(queue_wait=0.05)) as gateway, gateway.connect() as connection:
        gateway.backend.play(Script((HEL, Hang())))
        await connection.send(chat_request(stream=True))
        await connection.head()
        refused = await gateway.chat()
        assert (refused.status, refused.code) == (409, "conversation_busy")
        connection.abort()
        await until(lambda: gateway.backend.turns[0].cancelled)


async def test_letta_itself_is_busy_for_a_while(gateway: Running) -> None:
    busy: GatewayError = ConversationBusy()
    gateway.backend.play(Script((HEL, END), opening=(Break(busy),)))
    answer = await gateway.chat(stream=True)
    assert answer.text == "Hel"
    assert gateway.backend.turns[0].opened == 2


async def test_gateway_is_full() -> None:
    async with serving(settings(max_turns=1)) as gateway, gateway.connect() as connection:
        gateway.backend.play(Script((HEL, Hang())))
        await connection.send(chat_request(stream=True))
        await connection.head()
        refused = await gateway.chat()
        assert (refused.status, refused.code) == (503, "overloaded")
        assert refused.header("retry-after") == "2"
        assert refused.header("x-should-retry") == "true"
        assert (await gateway.ask("GET", "/health")).status == 200
        connection.abort()
        await settled(gateway)
