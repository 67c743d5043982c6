"""F13: clients that go away, at every moment of a turn."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator

import pytest

from gateway import keys
from gateway.letta import rest_turn
from tests.faults.chaos_upstream import (
    ANSWER,
    BEGIN,
    END,
    BadLetta,
    hangs,
    head,
    ping,
    pings,
    says,
    until_cancelled,
    waits,
)
from tests.faults.gateways import Gateway, served, until
from tests.server.wire import Connection

BOTH = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
HOWS = pytest.mark.parametrize("how", ["fin", "rst"])


@pytest.fixture
async def gateway(letta: BadLetta) -> AsyncIterator[Gateway]:
    async with served(letta, silence_timeout=5, first_event_timeout=5, first_byte_wait=5) as running:
        yield running


def leave(client: Connection, how: str) -> None:
    """Go away, politely or not."""
    if how == "rst":
        raw: socket.socket = client.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.writer.transport.abort()
    else:
        client.writer.close()


async def cancelled_within(letta: BadLetta, gateway: Gateway, run_id: str, seconds: float = 1.0) -> float:
    """See this run cancelled, and no other, and all of it gone; return how long the cancel took."""
    took = await until(lambda: letta.cancels, seconds)
    assert [(cancel.agent_id, cancel.run_ids) for cancel in letta.cancels] == [(letta.ids["friend"], [run_id])]
    await gateway.settled()
    assert gateway.figure("turns_total", outcome="client_disconnected") == 1
    return took


async def next_turn_works(letta: BadLetta, gateway: Gateway) -> None:
    letta.plays(*ANSWER)
    answer = await asyncio.wait_for(gateway.chat(stream=True), 2)
    assert (answer.status, answer.text) == (200, "Hello")


@HOWS
@BOTH
async def test_before_the_first_token(letta: BadLetta, gateway: Gateway, how: str, *, stream: bool) -> None:
    letta.plays(*BEGIN, until_cancelled())
    async with gateway.streaming(stream=stream) as client:
        await until(lambda: letta.posted)
        await asyncio.sleep(0.05)
        leave(client, how)
        took = await cancelled_within(letta, gateway, "run-1")
    print(f"cancelled {took * 1000:.0f} ms after the client left")
    await next_turn_works(letta, gateway)


@HOWS
async def test_in_mid_stream(letta: BadLetta, gateway: Gateway, how: str) -> None:
    letta.plays(*BEGIN, says("Hel", "lo"), until_cancelled())
    async with gateway.streaming() as client:
        assert (await client.head()).status == 200
        leave(client, how)
        took = await cancelled_within(letta, gateway, "run-1")
    print(f"cancelled {took * 1000:.0f} ms after the client left")
    await next_turn_works(letta, gateway)


async def test_while_tokens_flow(letta: BadLetta, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_turn, "SETTLE", 0.2)
    letta.plays(*BEGIN, says(*["word "] * 500, pause=0.005), *END)
    async with gateway.streaming() as client:
        assert (await client.head()).status == 200
        leave(client, "rst")
        await cancelled_within(letta, gateway, "run-1")
    await next_turn_works(letta, gateway)


async def test_without_stream_in_mid_answer(letta: BadLetta, gateway: Gateway) -> None:
    letta.plays(*BEGIN, says("Hel"), until_cancelled())
    async with gateway.streaming(stream=False) as client:
        await until(lambda: letta.posted)
        await asyncio.sleep(0.05)
        leave(client, "fin")
        await cancelled_within(letta, gateway, "run-1")
    await gateway.logged_once()
    assert gateway.logs.requests[-1]["status"] == 499


@BOTH
async def test_before_letta_answers(letta: BadLetta, gateway: Gateway, *, stream: bool) -> None:
    """The run's id is still to come: it is waited for, and cancelled."""
    letta.plays(waits(0.3), *BEGIN, until_cancelled())
    async with gateway.streaming(stream=stream) as client:
        await until(lambda: letta.posted)
        leave(client, "fin")
        await cancelled_within(letta, gateway, "run-1")
    await next_turn_works(letta, gateway)


async def test_before_letta_names_the_run(letta: BadLetta, gateway: Gateway) -> None:
    letta.plays(head(), waits(0.3), ping(), until_cancelled())
    async with gateway.streaming() as client:
        await until(lambda: letta.posted)
        leave(client, "fin")
        await cancelled_within(letta, gateway, "run-1")


@BOTH
async def test_before_the_connection_to_letta(letta: BadLetta, gateway: Gateway, *, stream: bool) -> None:
    """While the agents are being listed: nothing of the message is delivered."""
    listing, letta.listing = letta.listing, (waits(0.2), *letta.listing)
    async with gateway.streaming(stream=stream) as client:
        await until(lambda: letta.connections)
        leave(client, "fin")
        await asyncio.sleep(0.4)
    letta.listing = listing
    await gateway.settled()
    assert not letta.posted
    assert not letta.cancels
    await next_turn_works(letta, gateway)


async def test_while_waiting_for_the_turn_before(letta: BadLetta, gateway: Gateway) -> None:
    """Who leaves the queue is not served; who waits behind is."""
    letta.plays_next(*BEGIN, says("Hel"), waits(0.3), says("lo"), *END)
    async with gateway.streaming("one") as first:
        await first.head()
        async with gateway.streaming("two") as second:
            await until(lambda: gateway.figure("waiting_turns") == 1)
            third = asyncio.get_running_loop().create_task(gateway.chat("three", stream=True))
            await until(lambda: gateway.figure("waiting_turns") == 2)
            leave(second, "fin")
            await until(lambda: gateway.figure("waiting_turns") == 1)
        assert (await third).text == "Hello"
    assert [turn.body["messages"][0]["content"] for turn in letta.posted] == ["one", "three"]
    assert letta.cancels == []


@BOTH
async def test_request_is_cut(letta: BadLetta, gateway: Gateway, *, stream: bool) -> None:
    async with gateway.connect() as client:
        await client.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b'Content-Length: 500\r\n\r\n{"model":'
        )
        gateway.requests += 1
        await asyncio.sleep(0.05)
        leave(client, "fin")
    await gateway.settled()
    assert letta.lines == []


async def test_thread_is_free_only_when_the_run_has_ended(letta: BadLetta, gateway: Gateway) -> None:
    """Turns of one thread never overlap, the one that is being cancelled included."""
    letta.cancelling = (waits(0.3), *letta.cancelling)
    letta.plays_next(*BEGIN, says("Hel"), until_cancelled())
    async with gateway.streaming() as client:
        await client.head()
        leave(client, "fin")
    assert (await gateway.chat(stream=True)).text == "Hello"
    assert letta.posted[1].came_at - letta.cancels[0].at >= 0.29


async def test_other_runs_of_the_agent_go_on(letta: BadLetta, gateway: Gateway) -> None:
    letta.plays_next(*BEGIN, says("Hel"), waits(0.4), says("lo"), *END)
    letta.plays_next(*BEGIN, says("Hel"), until_cancelled())
    async with gateway.streaming(model="other") as stays, gateway.streaming(model="friend") as goes:
        await stays.head()
        await goes.head()
        leave(goes, "rst")
        await until(lambda: letta.cancels)
        said = b"".join([piece async for piece in stays.pieces()])
    assert b"[DONE]" in said
    assert len(letta.cancels) == 1
    left = next(turn for turn in letta.posted if turn.run_id in letta.cancels[0].run_ids)
    assert left.agent_id == letta.ids["friend"]


# LETTA_GATEWAY_ON_DISCONNECT=finish ----------------------------------------------------------------------------------


@BOTH
async def test_finish_lets_the_run_end(letta: BadLetta, *, stream: bool) -> None:
    letta.plays_next(*BEGIN, says("Hel"), waits(0.4), says("lo"), *END)
    async with served(letta, on_disconnect="finish") as gateway:
        async with gateway.streaming(stream=stream) as client:
            await until(lambda: letta.posted)
            await asyncio.sleep(0.1)
            leave(client, "fin")
        await asyncio.sleep(0.1)
        assert gateway.app[keys.TURNS].held == 1
        assert (await gateway.chat(stream=True)).text == "Hello"
        assert letta.posted[1].came_at - letta.posted[0].came_at > 0.4, "after the one before"
    assert letta.cancels == []


async def test_finish_has_its_deadlines(letta: BadLetta) -> None:
    letta.plays_next(*BEGIN, says("Hel"), hangs())
    async with served(letta, on_disconnect="finish") as gateway:
        async with gateway.streaming() as client:
            await client.head()
            leave(client, "fin")
        await gateway.settled(4)
        assert (await gateway.chat(stream=True)).text == "Hello"


async def test_finish_and_a_flood(letta: BadLetta) -> None:
    letta.plays_next(*BEGIN, says("Hel"), pings(0.0))
    async with served(letta, on_disconnect="finish", first_event_timeout=5, turn_timeout=0.7) as gateway:
        async with gateway.streaming() as client:
            await client.head()
            leave(client, "fin")
        await gateway.settled(4)
        assert (await gateway.chat(stream=True)).text == "Hello"


# Many ----------------------------------------------------------------------------------------------------------------


async def test_storm_of_leavers(letta: BadLetta) -> None:
    agents = tuple(f"agent {number}" for number in range(40))
    async with BadLetta(agents=agents) as many, served(many, silence_timeout=5, first_event_timeout=5) as gateway:
        many.plays(*BEGIN, says("Hel"), until_cancelled())
        for wave in range(2):
            async with asyncio.TaskGroup() as group:
                for number, name in enumerate(agents):
                    group.create_task(visit(gateway, name, 0.002 * (number % 20), wave))
        await gateway.settled()
    named = [cancel.run_ids[0] for cancel in many.cancels]
    assert len(named) == len(set(named)) <= 80
    assert set(named) == {turn.run_id for turn in many.posted}


async def visit(gateway: Gateway, name: str, stay: float, wave: int) -> None:
    async with gateway.streaming(model=name) as client:
        await asyncio.sleep(stay)
        leave(client, "rst" if wave else "fin")
