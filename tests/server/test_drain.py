import asyncio
import contextlib

import pytest
import structlog.testing
from aiohttp import web

from gateway import keys
from gateway.letta.scripted import Hang, Hold, Script
from gateway.server import drain
from gateway.translation.agent_events import Stop, TextDelta
from tests.server.running import chat_request, serving
from tests.server.wire import until


async def test_nothing_is_open() -> None:
    async with serving() as gateway:
        await asyncio.wait_for(drain.drain(gateway.app, gateway.listener, 30.0), 1.0)
        assert "letta_gateway_draining 1.0" in gateway.exposed()


async def test_open_turn_is_let_go_on() -> None:
    gate = asyncio.Event()
    async with serving() as gateway, gateway.connect() as connection:
        gateway.backend.play(Script(([TextDelta("Hel")], Hold(gate), [TextDelta("lo"), Stop("end_turn")])))
        await connection.send(chat_request(stream=True))
        head = await connection.head()
        draining = asyncio.get_running_loop().create_task(drain.drain(gateway.app, gateway.listener, 30.0))
        await asyncio.sleep(0.02)
        assert (await gateway.ask("GET", "/ready")).json() == {"status": "draining"}
        assert (await gateway.ask("GET", "/v1/models")).status == 200, "what still comes is served"
        assert not draining.done()
        gate.set()
        body = b"".join([piece async for piece in connection.pieces()])
        await draining
    assert head.status == 200
    assert body.endswith(b"data: [DONE]\n\n")


async def test_turn_that_waits_for_results_is_waited_for_and_they_come_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "ACCEPTING", 0.2)
    async with serving() as gateway:
        gateway.backend.parked = 1
        draining = asyncio.get_running_loop().create_task(drain.drain(gateway.app, gateway.listener, 30.0))
        await asyncio.sleep(1.0)
        assert not draining.done()
        assert (await gateway.chat()).status == 200, "results come as requests, on connections that are new"
        gateway.backend.parked = 0
        await asyncio.wait_for(draining, 4.0)


async def test_turn_that_waits_for_results_longer_than_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as gateway:
        gateway.backend.parked = 1
        with structlog.testing.capture_logs() as lines:
            await asyncio.wait_for(drain.drain(gateway.app, gateway.listener, 0.5), 2.0)
    assert [(line["event"], line.get("parked")) for line in lines if "parked" in line] == [
        ("draining", 1),
        ("turns that wait for results are ended", 1),
    ]


async def test_request_whose_turn_has_not_begun_is_waited_for() -> None:
    gate = asyncio.Event()
    async with serving() as gateway, gateway.connect() as connection:
        gateway.backend.holding = Hold(gate)
        await connection.send(chat_request(stream=True))
        await until(lambda: gateway.backend.searches)
        draining = asyncio.get_running_loop().create_task(drain.drain(gateway.app, gateway.listener, 30.0))
        await asyncio.sleep(0.05)
        assert not draining.done()
        gate.set()
        answer = await connection.answer()
        assert answer.body.endswith(b"data: [DONE]\n\n")
        await asyncio.wait_for(draining, 1.0)


async def test_request_whose_turn_begins_after_the_grace_is_refused() -> None:
    gate = asyncio.Event()
    async with serving() as gateway, gateway.connect() as connection:
        gateway.backend.holding = Hold(gate)
        await connection.send(chat_request(stream=True))
        await until(lambda: gateway.backend.searches)
        await drain.drain(gateway.app, gateway.listener, 0.05)
        gate.set()
        answer = await connection.answer()
        assert (answer.status, answer.code) == (503, "shutting_down")
        assert answer.header("x-should-retry") == "true"


async def test_grace_is_over() -> None:
    async with serving() as gateway, gateway.connect() as connection:
        gateway.backend.play(Script(([TextDelta("Hel")], Hang())))
        await connection.send(chat_request(stream=True))
        await connection.head()
        await drain.drain(gateway.app, gateway.listener, 0.05)
        body = b"".join([piece async for piece in connection.pieces()])
        assert b'"code":"shutting_down"' in body
        assert b"[DONE]" not in body
        assert gateway.backend.turns[0].cancelled


async def test_clients_that_keep_coming_do_not_hold_it_up_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a balancer does that asks nobody for readiness: it goes elsewhere once it is refused."""
    monkeypatch.setattr(drain, "ACCEPTING", 0.5)
    served = refused = 0
    async with serving() as gateway:

        async def keeps_coming() -> None:
            nonlocal served, refused
            while not refused:
                try:
                    answer = await gateway.chat()
                except ConnectionRefusedError:
                    refused += 1
                else:
                    assert answer.status == 200
                    served += 1

        async with asyncio.timeout(10), asyncio.TaskGroup() as clients:
            for _ in range(8):
                clients.create_task(keeps_coming())
            await until(lambda: served)
            await drain.drain(gateway.app, gateway.listener, 30.0)
    assert refused == 8
    assert served > 20


async def test_request_that_crosses_the_end_on_a_kept_connection_is_answered() -> None:
    async with serving() as gateway, contextlib.AsyncExitStack() as stack:
        kept = [await stack.enter_async_context(gateway.connect()) for _ in range(5)]
        for connection in kept:
            await connection.send(chat_request(stream=False))
            assert (await connection.answer()).status == 200
        draining = asyncio.get_running_loop().create_task(drain.drain(gateway.app, gateway.listener, 30.0))
        for connection in kept:
            await asyncio.sleep(0.2)
            await connection.send(chat_request(stream=False))
            answer = await connection.answer()
            assert (answer.status, answer.header("connection")) == (200, "close")
        await asyncio.wait_for(draining, 4.0)


async def test_connections_are_not_kept_while_going_away() -> None:
    async with serving() as gateway, gateway.connect() as connection:
        drain.begin(gateway.app)
        for method, path in (("GET", "/v1/models"), ("GET", "/v1/nothing")):
            answer = await gateway.ask(method, path)
            assert answer.header("connection") == "close"
        await connection.send(chat_request(stream=True))
        answer = await connection.answer()
        assert answer.header("connection") == "close"
        assert await connection.closed()


def test_switch_is_off_at_first() -> None:
    app = web.Application()
    app[keys.DRAIN] = drain.DrainSwitch()
    assert not app[keys.DRAIN].draining
