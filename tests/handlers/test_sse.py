import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web

from gateway import keys
from gateway.handlers.sse import HIGH_WATER, SseResponse
from gateway.server.listener import Listener
from tests.server.running import serving
from tests.server.wire import Connection, connect, request, until

Play = Callable[[web.Request, SseResponse], Awaitable[None]]


@contextlib.asynccontextmanager
async def answering(
    play: Play, *, wait: float = 5.0, write_timeout: float = 0.3, ping: float = 60.0
) -> AsyncIterator[Connection]:
    """Connect to a server whose one handler streams what ``play`` says."""

    async def handle(request: web.Request) -> web.StreamResponse:
        response = SseResponse(request, write_timeout)
        response._ping_interval = ping
        async with response.beginning_within(wait):
            await play(request, response)
        return response

    async with serving() as gateway:
        app = web.Application()
        app[keys.TASKS], app[keys.METRICS] = gateway.app[keys.TASKS], gateway.metrics
        app.router.add_post("/", handle)
        listener = Listener(app, "127.0.0.1", 0)
        await listener.start()
        try:
            async with connect(listener.port) as connection:
                await connection.send(request("POST", "/", {"Content-Length": "0"}))
                yield connection
        finally:
            await listener.stop()


async def push(response: SseResponse, data: bytes) -> None:
    """Write as the chat handler does."""
    if not response.begun:
        await response.begin(data)
    elif not response.offer(data):
        await response.drain()


async def test_data_ends_the_wait() -> None:
    begun: list[bool] = []

    async def play(_: web.Request, response: SseResponse) -> None:
        begun.append(response.begun)
        await push(response, b"data: 1\n\n")
        begun.append(response.begun)
        await response.end(b"data: 2\n\n")

    async with answering(play) as connection:
        answer = await connection.answer()
    assert begun == [False, True]
    assert (answer.status, answer.body, answer.complete) == (200, b"data: 1\n\ndata: 2\n\n", True)
    assert answer.header("content-type") == "text/event-stream"
    assert answer.header("connection") is None


async def test_end_alone() -> None:
    async def play(_: web.Request, response: SseResponse) -> None:
        await response.end(b"data: [DONE]\n\n")

    async with answering(play) as connection:
        assert (await connection.answer()).body == b"data: [DONE]\n\n"


async def test_headers_go_with_a_comment_after_the_wait() -> None:
    gate = asyncio.Event()

    async def play(_: web.Request, response: SseResponse) -> None:
        await gate.wait()
        await response.end(b"data: [DONE]\n\n")

    async with answering(play, wait=0.02) as connection:
        assert (await connection.head()).status == 200
        pieces = connection.pieces()
        assert await anext(pieces) == b": ping\n\n"
        gate.set()
        assert await anext(pieces) == b"data: [DONE]\n\n"


async def test_comments_keep_the_stream_awake() -> None:
    async def play(_: web.Request, response: SseResponse) -> None:
        await push(response, b"data: 1\n\n")
        await asyncio.sleep(0.1)
        await response.end(b"data: 2\n\n")

    async with answering(play, ping=0.02) as connection:
        lines = (await connection.answer()).body.split(b"\n\n")
    assert lines[0] == b"data: 1"
    assert lines[-2:] == [b"data: 2", b""]
    assert set(lines[1:-2]) == {b": ping"}


async def test_error_in_the_very_moment_in_which_the_wait_is_over() -> None:
    """Either a status or a stream goes out, never the one into the other."""

    async def play(_: web.Request, response: SseResponse) -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not response.begun
        raise web.HTTPServiceUnavailable

    async with answering(play, wait=0) as connection:
        answer = await connection.answer()
        assert (answer.status, answer.code) == (503, "internal_error")
        assert await connection.closed()


async def test_client_went_away_before_the_first_byte() -> None:
    said: list[str] = []

    async def play(request: web.Request, response: SseResponse) -> None:
        assert request.transport is not None
        request.transport.abort()
        try:
            await push(response, b"data: 1\n\n")
            await asyncio.sleep(1)
        except (ConnectionResetError, asyncio.CancelledError) as error:
            said.append(type(error).__name__)
            raise

    async with answering(play) as connection:
        assert await connection.closed()
        await until(lambda: said)


async def flood(response: SseResponse) -> int:
    sent = 0
    with contextlib.suppress(ConnectionResetError):
        while sent < 50_000_000:
            await push(response, b"data: " + b"x" * 16_000 + b"\n\n")
            sent += 16_008
    return sent


async def test_reader_that_takes_nothing() -> None:
    buffered: list[int] = []
    sent: list[int] = []

    async def play(request: web.Request, response: SseResponse) -> None:
        transport = request.transport
        assert transport is not None

        async def watch() -> None:
            while not transport.is_closing():
                buffered.append(transport.get_write_buffer_size())
                await asyncio.sleep(0.002)

        watching = request.app[keys.TASKS].spawn(watch(), "watch")
        sent.append(await flood(response))
        await watching

    async with answering(play) as connection:
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined, unused-ignore]
        await until(lambda: sent)
    assert sent[0] < 10_000_000
    assert max(buffered) < HIGH_WATER + 2 * 16_100


async def test_reader_that_never_takes_the_end() -> None:
    ended: list[str] = []

    async def play(_: web.Request, response: SseResponse) -> None:
        try:
            await response.end(b"x" * 20_000_000)
        except ConnectionResetError as error:
            ended.append(str(error))
            raise

    async with answering(play) as connection:
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined, unused-ignore]
        await until(lambda: ended)
    assert ended == ["the client takes nothing"]
