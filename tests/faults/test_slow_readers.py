"""F14, F15: clients that stop reading cost little, hold Letta back, and are cut in the end."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from gateway import keys
from gateway.letta import rest_turn
from tests.faults.chaos_upstream import ANSWER, BEGIN, BadLetta, Exchange, floods, frame_bytes, hangs, says
from tests.faults.gateways import Gateway, nothing_left, served, until
from tests.server.running import JSON, chat_request
from tests.server.wire import Connection, request

PER_STREAM = 262_144
FLOOD = frame_bytes(id="message-run-1", content="word " * 20)


@pytest.fixture
async def letta(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[BadLetta]:
    """Give a Letta whose own send buffer is small, so that what the gateway takes shows at once."""
    monkeypatch.setattr(rest_turn, "SETTLE", 0.2)  # a flood does not end when it is cancelled
    async with nothing_left(), BadLetta(buffer=8_192) as bad:
        yield bad


@contextlib.asynccontextmanager
async def stalled(gateway: Gateway, wants: bytes) -> AsyncIterator[Connection]:
    """Ask for something and read nothing: the client's own buffer is as small as it gets."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
    raw.setblocking(False)  # noqa: FBT003 - the socket API's own signature
    await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", gateway.port))
    reader, writer = await asyncio.open_connection(sock=raw, limit=1_024)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    try:
        writer.write(wants)
        yield Connection(reader, writer)
    finally:
        writer.transport.abort()


async def standstill(exchange: Exchange) -> int:
    """Wait until no more bytes are taken, and return how many were."""
    before = -1
    while exchange.absorbed != before:
        before = exchange.absorbed
        await asyncio.sleep(0.15)
    return before


@pytest.mark.parametrize("size", [20, 1_000, 200_000], ids=["words", "pages", "books"])
async def test_stalled_reader(letta: BadLetta, size: int) -> None:
    """What the gateway absorbs, kernel buffers included, is bounded; then Letta is held back; then comes the cut."""
    piece = frame_bytes(id="message-run-1", content="word " * (size // 5))
    letta.plays(*BEGIN, floods(piece))
    async with served(letta, write_timeout=1.2, silence_timeout=10) as gateway:
        async with stalled(gateway, chat_request(stream=True)) as _:
            gateway.requests += 1
            await until(lambda: letta.exchanges and letta.posted)
            (exchange,) = letta.exchanges
            absorbed = await standstill(exchange)
            print(f"a stalled reader of {size}-character deltas cost {absorbed / 1024:.0f} KiB")
            assert gateway.app[keys.TURNS].held == 1
            assert absorbed <= PER_STREAM + (2 * len(piece) if len(piece) > 65_536 else 0)
            took = await until(lambda: letta.cancels, 3)
            assert took < 2
        await gateway.settled()
        assert [cancel.run_ids for cancel in letta.cancels] == [["run-1"]]
        assert gateway.figure("turns_total", outcome="client_disconnected") == 1
        letta.plays(*ANSWER)
        assert (await gateway.chat(stream=True)).text == "Hello"


async def test_slow_reader_holds_letta_back_and_gets_all(letta: BadLetta) -> None:
    words = 3_000
    letta.plays(*BEGIN, floods(FLOOD, total=len(FLOOD) * words), hangs())
    async with served(letta, write_timeout=5, silence_timeout=2) as gateway:
        async with stalled(gateway, chat_request(stream=True)) as client:
            gateway.requests += 1
            await until(lambda: letta.exchanges and letta.posted)
            (exchange,) = letta.exchanges
            absorbed = await standstill(exchange)
            assert absorbed < len(FLOOD) * words / 2
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            answer = await client.answer()
        assert answer.complete
        assert answer.events[-1]["error"]["code"] == "upstream_silent"
        sent = exchange.written // len(FLOOD)
        assert abs(len(answer.events) - 1 - sent) <= 2, "not a word is lost"


async def test_reader_that_sips(letta: BadLetta) -> None:
    """A few bytes now and then are not enough to hold a turn for ever."""
    letta.plays(*BEGIN, floods(FLOOD))
    async with served(letta, write_timeout=0.6, silence_timeout=10, turn_timeout=10) as gateway:
        async with stalled(gateway, chat_request(stream=True)) as client:
            gateway.requests += 1
            raw: socket.socket = client.writer.get_extra_info("socket")
            descriptor = socket.socket(fileno=socket.dup(raw.fileno()))
            descriptor.setblocking(False)  # noqa: FBT003
            try:
                for _ in range(60):
                    with contextlib.suppress(BlockingIOError, ConnectionError):
                        descriptor.recv(10)
                    await asyncio.sleep(0.05)
                    if letta.cancels:
                        break
            finally:
                descriptor.close()
            assert letta.cancels
        await gateway.settled()


async def test_stalled_reader_and_a_silent_letta(letta: BadLetta) -> None:
    """Nothing more to write: the stall shows only at the end of the stream."""
    letta.plays(*BEGIN, floods(FLOOD, total=150_000), hangs())
    async with served(letta, write_timeout=0.5, silence_timeout=0.5) as gateway:
        async with stalled(gateway, chat_request(stream=True)):
            gateway.requests += 1
            await until(lambda: letta.posted)
            await until(lambda: gateway.app[keys.TURNS].held == 0, 4)
        await gateway.settled()


async def test_stalled_reader_of_a_whole_answer(letta: BadLetta) -> None:
    """The turn is over long before the client has its answer: the connection must not stay for ever."""
    letta.plays(*BEGIN, says(*["word " * 1_000] * 200), *ANSWER[2:])
    async with served(letta, write_timeout=1.0, silence_timeout=5) as gateway, stalled(gateway, chat_request()):
        gateway.requests += 1
        await until(lambda: gateway.figure("turns_total", outcome="complete") == 1)
        await until(lambda: len(gateway.listener._crowd) == 0, 5)


async def test_pipeline_of_requests_and_no_reading(letta: BadLetta) -> None:
    """Small answers fill the buffers as well as a big one."""
    async with served(letta, write_timeout=1.0) as gateway:
        wants = request("GET", "/v1/nothing" + "x" * 100, JSON) * 3_000
        async with stalled(gateway, wants):
            await until(lambda: len(gateway.listener._crowd) == 1)
            await until(lambda: len(gateway.listener._crowd) == 0, 5)
        gateway.requests = len([line for line in gateway.logs.requests if line["route"].startswith("/v1")])


async def test_stalled_readers_do_not_slow_others(letta: BadLetta) -> None:
    async with BadLetta(agents=tuple("abcdefgh"), buffer=8_192) as many, served(many, silence_timeout=10) as gateway:
        many.plays(*BEGIN, floods(FLOOD))
        async with contextlib.AsyncExitStack() as stack:
            for name in "abcdef":
                await stack.enter_async_context(stalled(gateway, chat_request(stream=True, model=name)))
                gateway.requests += 1
            await until(lambda: len(many.posted) == 6)
            many.plays(*ANSWER)
            started = asyncio.get_running_loop().time()
            for name in "gh" * 5:
                assert (await gateway.chat(stream=True, model=name)).text == "Hello"
            assert asyncio.get_running_loop().time() - started < 2
        await gateway.settled()
