import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest

from gateway.letta.read_hook import told_of_reads
from tests.letta.recording_server import (
    Answer,
    Exchange,
    RecordingServer,
    chunk,
    done,
    fin,
    hang,
    ping,
    rst,
    says,
    stream,
    wait,
)


@pytest.fixture
async def server() -> AsyncIterator[RecordingServer]:
    async with RecordingServer() as server:
        yield server


@pytest.fixture
async def session(server: RecordingServer) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(server.url) as session:
        yield session


TURN = "/v1/agents/agent-1/messages/stream"


def unlost() -> None:
    pytest.fail("the connection was lost")


async def test_each_read_is_told_when_its_bytes_are_there(
    server: RecordingServer, session: aiohttp.ClientSession
) -> None:
    gates = [asyncio.Event() for _ in range(3)]
    server.on("turn", stream(*(step for gate in gates for step in (wait(gate), chunk(b"piece")))))
    response = await session.post(TURN)
    pieces: list[bytes] = []
    with told_of_reads(response, lambda: pieces.append(response.content.read_nowait()), unlost):
        for number, gate in enumerate(gates, 1):
            gate.set()
            await asyncio.sleep(0.03)
            assert b"".join(pieces) == b"piece" * number
    response.close()


async def test_connection_serves_again_after_the_end(server: RecordingServer, session: aiohttp.ClientSession) -> None:
    server.on("turn", stream(ping(), says("Hi"), done()))
    for _ in range(2):
        response = await session.post(TURN)
        with told_of_reads(response, lambda: None, unlost):
            assert await response.content.read()
    assert [request.connection for request in server.requests] == [1, 1]


async def test_late_removal_leaves_the_next_hook_alone(server: RecordingServer, session: aiohttp.ClientSession) -> None:
    gate = asyncio.Event()
    server.on("turn", stream(wait(gate), ping(), done()))
    first = await session.post(TURN)
    reads: list[int] = []
    with told_of_reads(first, lambda: None, unlost):
        gate.set()
        await first.content.read()
        gate.clear()
        second = await session.post(TURN)
        hook = told_of_reads(second, lambda: reads.append(1), unlost)
        hook.__enter__()
    gate.set()
    await second.content.read()
    hook.__exit__(None, None, None)
    assert first.connection is second.connection is None
    assert reads


async def bad_chunk(exchange: Exchange) -> None:
    await exchange.raw(b"zz\r\n")


@pytest.mark.parametrize("loss", [fin(), rst(), bad_chunk])
async def test_lost_connection_is_told(server: RecordingServer, session: aiohttp.ClientSession, loss: Answer) -> None:
    gate = asyncio.Event()
    server.on("turn", stream(ping(), wait(gate), loss, hang()))
    response = await session.post(TURN)
    told = asyncio.Event()
    with told_of_reads(response, lambda: None, told.set):
        gate.set()
        async with asyncio.timeout(2):
            await told.wait()
    response.close()


async def test_answer_that_is_whole_is_not_hooked(server: RecordingServer, session: aiohttp.ClientSession) -> None:
    server.on("turn", stream(ping(), done()))
    response = await session.post(TURN)
    await response.content.wait_eof()
    reads: list[int] = []
    with told_of_reads(response, lambda: reads.append(1), unlost):
        assert await response.content.read()
    assert reads == []
