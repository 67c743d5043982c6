"""Bytes -> socket: the streamed response, its heartbeats, its deadlines, its end.

Headers go out with the first data, so that a failure before it keeps its HTTP status, but no later than the first-byte
wait: then they go with a heartbeat, and proxies stay awake.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Self

import structlog
from aiohttp import web
from aiohttp.http import StreamWriter
from aiohttp_sse import EventSourceResponse

from gateway import keys

PING: Final = 15.0
HIGH_WATER: Final = 32_768
"""Bytes that may wait for a slow client in this process; beyond them the stream waits too."""
_FIRST_PING: Final = b": ping\n\n"

_log: Final = structlog.get_logger("gateway.sse")


class SseResponse(EventSourceResponse):
    """One streamed answer: aiohttp-sse's headers and pings, our own way of writing.

    Writing raises ``ConnectionResetError`` where the client went away or took nothing for ``write_timeout`` seconds.
    """

    def __init__(self, request: web.Request, write_timeout: float) -> None:
        super().__init__(sep="\n", allow_all_methods=True, ping_interval=PING, send_timeout=write_timeout)
        del self.headers["Connection"]  # aiohttp knows whether it stays open
        self._request = request
        self._write_timeout = write_timeout
        self._beginning = asyncio.Lock()
        self._left = False
        self._writer: StreamWriter | None = None
        self._transport: asyncio.Transport | None = None
        self._is_chunked = True

    @property
    def begun(self) -> bool:
        """Tell whether headers went out: from then on a failure is an in-band error."""
        return self._writer is not None

    @asynccontextmanager
    async def beginning_within(self, seconds: float) -> AsyncIterator[Self]:
        """Send headers and a heartbeat after so many seconds unless data came first; stop the pings at the end."""
        tasks = self._request.app[keys.TASKS]
        timer = asyncio.get_running_loop().call_later(
            seconds, lambda: tasks.spawn(self._begin_with_ping(), "begin stream")
        )
        try:
            yield self
        finally:
            timer.cancel()
            self._left = True
            self.stop_streaming()

    async def begin(self, data: bytes) -> None:
        """Send the headers with the first data, in one packet; where they are out, the data alone."""
        async with self._beginning:
            if self._writer is None:
                writer = await self._prepare_writer()
                await writer.write(data, drain=False)
                return
        if not self.offer(data):
            await self.drain()

    def offer(self, data: bytes) -> bool:
        """Write whole events to a response that has begun; False where the client is slow: then wait in ``drain``.

        A chunk of HTTP's is framed here and goes straight to the transport: of the gateway's own cost per token, the
        way through aiohttp's writer would be a third.
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client went away")
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)
        return transport.get_write_buffer_size() <= HIGH_WATER

    async def drain(self) -> None:
        """Wait for a slow client."""
        assert self._writer is not None  # noqa: S101 - it has begun
        try:
            async with asyncio.timeout(self._write_timeout):
                await self._writer.drain()
        except TimeoutError:
            self._abort()
            raise ConnectionResetError("the client takes nothing") from None
        except ConnectionError as error:  # aiohttp tells who waits of a lost connection by the plain class
            raise ConnectionResetError("the client went away") from error

    async def end(self, data: bytes) -> None:
        """Write the last events and end the response."""
        async with self._beginning:
            if self._writer is None:
                await self._prepare_writer()
        self.stop_streaming()
        try:
            async with asyncio.timeout(self._write_timeout):
                await self.write_eof(data)
        except TimeoutError:
            self._abort()
            raise ConnectionResetError("the client takes nothing") from None

    def stop_streaming(self) -> None:
        """Stop the pings, and let go of their task, which has this response; before the headers there are none."""
        if self._ping_task is not None:
            super().stop_streaming()
            self._ping_task = None

    async def _prepare_writer(self) -> StreamWriter:
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client went away")
        writer = await self.prepare(self._request)
        if not isinstance(writer, StreamWriter):
            raise ConnectionResetError("the client went away")
        transport.set_write_buffer_limits(high=HIGH_WATER)
        self._transport = transport
        self._is_chunked = writer.chunked  # HTTP/1.0 knows no chunks: there the end of the connection ends the answer
        self._writer = writer
        return writer

    async def _begin_with_ping(self) -> None:
        if self.begun or self._left:  # left: an error is being answered as a status
            return
        try:
            await self.begin(_FIRST_PING)
        except ConnectionError:
            _log.debug("client went away before the first byte")

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
