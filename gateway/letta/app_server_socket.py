"""One WebSocket to the App Server: requests matched with their replies, events handed to the turn they belong to.

One reader serves all turns of the socket and never waits for any of them. Closing the socket cancels what runs on it
(letta 0.34.12), so a socket that broke ends its turns.
"""

import asyncio
import itertools
import uuid
from collections.abc import AsyncGenerator
from typing import Final, Protocol

import aiohttp
import msgspec

from gateway.errors import BackendError, UpstreamTimeout, UpstreamUnavailable
from gateway.letta import app_server_wire as wire
from gateway.letta.app_server_wire import Command, Incoming, Runtime
from gateway.metrics import Metrics

MOST_BYTES: Final = 33_554_432
"""Of one message: a listing of a thousand agents is 1 MiB."""


class Listener(Protocol):
    """Whoever hears the events of a conversation."""

    def heard(self, frame: Incoming, size: int) -> None:
        """Take one frame of so many bytes; it must not wait."""
        ...

    def lost(self) -> None:
        """Learn that there will be no more."""
        ...


class Socket:
    """An open WebSocket; ``read`` is its reader, run as a task."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse, metrics: Metrics) -> None:
        self._ws = ws
        self._metrics = metrics
        self._replies: dict[str, asyncio.Future[bytes]] = {}
        self._pages: dict[str, asyncio.Queue[bytes]] = {}
        self._listeners: dict[Runtime, Listener] = {}
        self.started: set[Runtime] = set()
        """Conversations that this socket hears."""
        self.unrestricted: set[Runtime] = set()
        """Those of them where no tool waits for a person's permission."""
        self.offered: dict[Runtime, bytes] = {}
        """The digests of the external tools that it registered for conversations."""
        self.models_asked = False
        self.is_lost = False

    async def read(self) -> None:
        """Read until the socket is closed or broken, by either side; then tell whoever still waits."""
        try:
            async for message in self._ws:
                if message.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                    break
                self._route(message.data)
        finally:
            self.is_lost = True
            for reply in self._replies.values():
                if not reply.done():
                    reply.set_exception(gone())
            for pages in self._pages.values():
                pages.put_nowait(b"")
            for listener in list(self._listeners.values()):
                listener.lost()
            await self._ws.close()

    async def close(self) -> None:
        """Close it; the reader ends."""
        await self._ws.close()

    def hear(self, runtime: Runtime, listener: Listener) -> None:
        """Let a turn have the events of its conversation."""
        self._listeners[runtime] = listener

    def forget(self, runtime: Runtime, listener: Listener) -> None:
        """Let it have no more, unless another one has taken its place."""
        if self._listeners.get(runtime) is listener:
            del self._listeners[runtime]

    def drop(self, runtime: Runtime) -> None:
        """Forget a conversation that is no more."""
        self.started.discard(runtime)
        self.unrestricted.discard(runtime)
        self.offered.pop(runtime, None)

    async def send(self, command: Command) -> None:
        """Send a command; raises ``UpstreamUnavailable`` where the socket is gone."""
        if self.is_lost or self._ws.closed:
            raise gone()
        try:
            await self._ws.send_str(wire.encode(command).decode())
        except (aiohttp.ClientError, OSError) as error:
            raise gone() from error

    async def ask(self, command: Command, within: float) -> bytes:
        """Send a command and return the reply to it, undecoded; raises ``UpstreamTimeout`` where none comes in time."""
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._replies[command.request_id] = reply
        try:
            async with asyncio.timeout(within):
                await self.send(command)
                return await reply
        except TimeoutError:
            raise UpstreamTimeout("The Letta server did not reply in time.", should_retry=False) from None
        finally:
            del self._replies[command.request_id]

    async def ask_pages(self, command: Command, within: float) -> AsyncGenerator[bytes]:
        """Send a command and give its replies, undecoded, for as long as they are taken; each comes in this time."""
        pages = self._pages[command.request_id] = asyncio.Queue[bytes]()
        try:
            await self.send(command)
            while True:
                async with asyncio.timeout(within):
                    page = await pages.get()
                if not page:
                    raise gone()
                yield page
        except TimeoutError:
            raise UpstreamTimeout("The Letta server did not reply in time.", should_retry=False) from None
        finally:
            del self._pages[command.request_id]

    def _route(self, data: bytes) -> None:
        try:
            frame = wire.decode_incoming(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._metrics.skipped_frames.inc()
            return
        runtime = frame.runtime
        if frame.request_id is not None:
            reply = self._replies.get(frame.request_id)
            if reply is not None and not reply.done():
                reply.set_result(data)
            pages = self._pages.get(frame.request_id)
            if pages is not None:
                pages.put_nowait(data)
        if runtime is not None:
            listener = self._listeners.get(runtime)
            if listener is not None:
                listener.heard(frame, len(data))


_PROCESS: Final = uuid.uuid4().hex[:16]
_numbers: Final = itertools.count(1)


def new_request_id() -> str:
    """Return an id that no request of any gateway has had.

    The server drops an input whose message id it has seen on that conversation within the hour, and says that it
    started it (letta 0.34.12).
    """
    return f"gateway-{_PROCESS}-{next(_numbers)}"


def gone() -> BackendError:
    """Return the error of a socket that is gone."""
    return UpstreamUnavailable(
        "The connection to the Letta server was lost. The message may have been delivered.",
        retry_after=2.0,
        should_retry=False,
    )
