"""F7: Letta says more than anybody can hear. The gateway is a process of its own, so that its memory can be told."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.faults.chaos_upstream import (
    ANSWER,
    BEGIN,
    DATE,
    BadLetta,
    Exchange,
    Step,
    done,
    floods,
    frame_bytes,
    sends,
    stops,
)
from tests.faults.gateways import nothing_left, rss, until
from tests.server.running import JSON, chat_body, chat_request
from tests.server.subprocesses import GatewayProcess, gateway_process
from tests.server.wire import Answer, connect

MIB = 1_048_576
ROOM = 10 * MIB
ENVIRONMENT: dict[str, Any] = {
    "LETTA_GATEWAY_FIRST_EVENT_TIMEOUT": "0.35",
    "LETTA_GATEWAY_TURN_TIMEOUT": "1.2",
    "LETTA_GATEWAY_SILENCE_TIMEOUT": "2",
    "LETTA_GATEWAY_RATE_LIMIT": "100000/minute",
}


class Memory:
    """The resident memory of a process, watched from its first word on."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.before = rss(pid)
        self.peak = self.before

    async def watch(self) -> None:
        """Look every few milliseconds."""
        while True:
            self.peak = max(self.peak, rss(self.pid))
            await asyncio.sleep(0.01)

    @property
    def growth(self) -> int:
        """Return how much it grew."""
        return self.peak - self.before


@pytest.fixture
async def letta() -> AsyncIterator[BadLetta]:
    async with nothing_left(), BadLetta() as bad:
        yield bad


@pytest.fixture
async def gateway(letta: BadLetta) -> AsyncIterator[GatewayProcess]:
    """Give a gateway that is warm: what it loads and keeps once is no growth."""
    async with gateway_process(letta.url, **ENVIRONMENT) as process:
        for stream in (True, False) * 10:
            assert (await chat(process, stream=stream)).status == 200
        yield process
        assert "Traceback" not in process.errors


async def chat(gateway: GatewayProcess, **more: object) -> Answer:
    return await gateway.ask("POST", "/v1/chat/completions", JSON, chat_body(**{"model": "friend", **more}))  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def watched(gateway: GatewayProcess, name: str) -> AsyncIterator[Memory]:
    """Watch the gateway's memory for as long as the context, and see it bounded."""
    memory = Memory(gateway.process.pid)
    watching = asyncio.get_running_loop().create_task(memory.watch())
    started = time.monotonic()
    try:
        yield memory
    finally:
        watching.cancel()
    print(f"{name}: RSS {memory.growth / MIB:+.1f} MiB in {time.monotonic() - started:.1f} s")
    assert memory.growth < ROOM


async def drink(port: int, wants: bytes) -> tuple[int, bytes]:
    """Read a stream as fast as it comes and keep its end alone."""
    count, last = 0, b""
    async with connect(port) as client:
        await client.send(wants)
        while data := await client.reader.read(262_144):
            count += len(data)
            last = (last + data)[-2_000:]
            if last.endswith(b"0\r\n\r\n"):
                break
    return count, last


async def works_again(letta: BadLetta, gateway: GatewayProcess) -> None:
    letta.plays(*ANSWER)
    assert (await asyncio.wait_for(chat(gateway, stream=True), 3)).text == "Hello"
    figures = (await gateway.ask("GET", "/metrics")).body.decode()
    for name in ("open_turns", "waiting_turns", "open_streams"):
        assert f"letta_gateway_{name} 0.0" in figures


async def test_endless_events(letta: BadLetta, gateway: GatewayProcess) -> None:
    for size in (5, 2_000):
        letta.cancels.clear()
        letta.plays(*BEGIN, floods(frame_bytes(id="message-1", content="x" * size)))
        async with watched(gateway, f"endless events of {size} characters") as memory:
            count, last = await drink(gateway.port, chat_request(stream=True))
        print(f"    {count / MIB:.0f} MiB went through")
        assert b'"code":"turn_timeout"' in last
        assert b"[DONE]" not in last
        assert memory.growth < count / 2
        await until(lambda: letta.cancels)
        assert [cancel.run_ids for cancel in letta.cancels] == [[letta.posted[-1].run_id]]
    await works_again(letta, gateway)


async def test_endless_nothing(letta: BadLetta, gateway: GatewayProcess) -> None:
    for piece, code in (
        (frame_bytes("ping"), "upstream_timeout"),
        (frame_bytes("nobody_knows", content="x" * 100), "upstream_timeout"),
        (b": nothing\n\n", "upstream_timeout"),
        (b"\n", "upstream_timeout"),
        (b"\r\n", "upstream_timeout"),
        (b"data: [DONE]\n\n", "upstream_stream_truncated"),
        (b": x\n", "upstream_invalid_response"),
    ):
        letta.plays(*BEGIN, floods(piece))
        async with watched(gateway, f"endless {piece[:20]!r}"):
            answer = await chat(gateway, stream=True)
        assert answer.code == code
        assert answer.status in (502, 504)
    await works_again(letta, gateway)


async def test_line_and_listing_of_100_mb(letta: BadLetta, gateway: GatewayProcess) -> None:
    letta.plays(*BEGIN, sends_start(), floods(b"x", total=100 * MIB))
    for stream in (True, False):
        async with watched(gateway, "one line of 100 MiB"):
            answer = await chat(gateway, stream=stream)
        assert (answer.status, answer.code) == (502, "upstream_invalid_response")
    usual = letta.listing
    row = json.dumps({"id": "agent-1", "name": "x" * 1_000, "created_at": DATE}).encode() + b","
    letta.listing = (
        sends(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n["),
        floods(row, total=100 * MIB),
    )
    async with watched(gateway, "a listing of 100 MiB"):
        answer = await chat(gateway, model="who?")
    assert (answer.status, answer.code) == (502, "upstream_invalid_response")
    letta.listing = usual
    await works_again(letta, gateway)


def sends_start() -> Step:
    """Begin a frame that will never end."""

    async def step(exchange: Exchange) -> None:
        await exchange.body(b'data: {"message_type":"assistant_message","content":"')

    return step


async def test_endless_answer_that_is_gathered(letta: BadLetta, gateway: GatewayProcess) -> None:
    """Without a stream the whole answer would have to be kept."""
    for size in (20, 2_000):
        letta.plays(*BEGIN, floods(frame_bytes(id="message-1", content="x" * size), total=1_024 * MIB), stops(), done())
        async with watched(gateway, f"1 GiB of {size}-character deltas, gathered"):
            answer = await chat(gateway, stream=False)
        assert (answer.status, answer.code) == (502, "upstream_answer_too_long")
    await works_again(letta, gateway)


async def test_other_streams_do_not_feel_it(letta: BadLetta, gateway: GatewayProcess) -> None:
    async def paced(exchange: Exchange) -> None:
        for _ in range(40):
            stamp = json.dumps({"at": time.monotonic()})
            await exchange.frame(message_type="assistant_message", id="m", content=stamp)
            await asyncio.sleep(0.02)

    async def latencies() -> list[float]:
        late: list[float] = []
        letta.plays_next(*BEGIN, paced, stops(), done())
        async with connect(gateway.port) as client:
            await client.send(chat_request(stream=True, model="other"))
            assert (await client.head()).status == 200
            async for piece in client.pieces():
                now = time.monotonic()
                if said := Answer(200, [], piece).text:
                    late.append(now - json.loads(said)["at"])
        return sorted(late)

    calm = await latencies()
    letta.plays(*BEGIN, floods(frame_bytes(id="message-1", content="x" * 50)))
    flood = asyncio.get_running_loop().create_task(drink(gateway.port, chat_request(stream=True)))
    await until(lambda: len(letta.exchanges) == 1)
    stormy = await latencies()
    assert not flood.done()
    await flood
    p99 = calm[int(len(calm) * 0.99)], stormy[int(len(stormy) * 0.99)]
    print(f"another stream's p99: {p99[0] * 1000:.1f} ms calm, {p99[1] * 1000:.1f} ms beside a flood")
    assert p99[1] < 0.25
    assert stormy[len(stormy) // 2] < 0.1
    await works_again(letta, gateway)
