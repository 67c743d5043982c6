"""The sockets that clients connect to, and the protocol behind them.

aiohttp answers a malformed request head with the offending bytes, before any middleware, and logs them: a token in a
broken header would be echoed and stored. Here such a head gets one fixed answer, and the log one fixed line.

What comes in is read a few pieces per round of the event loop, whoever sends it: see ``turnstile``.

A head that has begun has to be whole within some seconds: aiohttp would wait as long as for the next request.

Connections are bounded, as each one costs a file descriptor: at the bound the one that has been idle longest makes
room, half a request's head counting as idle; where none is idle, the new one is told so and closed.

A port has a queue of connections, and closing it resets what is in it. So a gateway that goes away first turns
newcomers away unheard: the kernel drops their first packet, and they send it again a second later. By then the port is
closed, which sends a balancer to another gateway; or, where several share a port (``SO_REUSEPORT``) and each has its
own queue, the packet reaches one that stays.
"""

import array
import asyncio
import socket
import struct
import sys
from http import HTTPStatus
from typing import Any, Final, cast

import structlog
from aiohttp import web

from gateway import keys
from gateway.errors import GatewayError, InternalError, InvalidRequest, Overloaded, RequestTimeout, dealt_with
from gateway.metrics import Metrics
from gateway.server.descriptors import connections_that_fit
from gateway.server.turnstile import Turnstile

BACKLOG: Final = 4_096
"""Connections that may wait to be accepted; aiohttp's 128 refuses a storm that the kernel would hold."""
SEND_BUFFER: Final = 65_536
"""The kernel's share per client: without it a client that stops reading costs 2.8 MB (measured), with it 191 KiB."""
KEEPALIVE: Final = 75.0
HEAD: Final = 10.0
"""Seconds for a request's head to be whole, from its first byte on: what nginx is told too."""
LINGER: Final = 2.0
STALLED: Final = 60.0
"""Seconds that a client may leave what it was sent untaken: aiohttp waits for ever, and so would its connection."""
RETIRING: Final = 0.5
"""Seconds for handshakes that have begun to end: less than the second after which clients knock again."""
PARTING: Final = 0.05
"""Seconds between two looks at who has not left yet."""

_OPTIONS: Final[dict[str, Any]] = {
    "access_log": None,  # the chain has its own
    "keepalive_timeout": KEEPALIVE,
    "lingering_time": LINGER,
    "auto_decompress": False,  # a 204 kB body of zeros, unpacked, stops the loop for 0.4 s (measured)
}

_log: Final = structlog.get_logger("gateway.server")
_MALFORMED: Final = InvalidRequest(
    "The request is not well-formed HTTP: check its request line and headers.", code="malformed_request"
)


class Crowd:
    """The open connections of one listener, never more than ``most``; those that were answered last stand last."""

    def __init__(self, most: int, metrics: Metrics) -> None:
        self._most = most
        self._connections: dict[GuardedProtocol, None] = {}
        self.metrics = metrics
        self.turnstile = Turnstile()

    def __len__(self) -> int:
        return len(self._connections)

    def admits(self, connection: "GuardedProtocol") -> bool:
        """Take a connection in, at the cost of an idle one if need be; tell whether there was room."""
        if len(self._connections) >= self._most:
            idle = next((other for other in self._connections if other.idle), None)
            if idle is None:
                return False
            self.leave(idle)
            idle.force_close()
        self._connections[connection] = None
        return True

    def answered(self, connection: "GuardedProtocol") -> None:
        """Put a connection behind all that have been idle for longer."""
        if connection in self._connections:
            del self._connections[connection]
            self._connections[connection] = None

    async def part(self, seconds: float) -> None:
        """Wait until all that are here now have left, but no longer than so many seconds."""
        here = set(self._connections)
        for _ in range(round(seconds / PARTING)):
            if not here & self._connections.keys():
                return
            await asyncio.sleep(PARTING)

    def abort(self) -> None:
        """Close every connection at once."""
        for connection in list(self._connections):
            connection.abort()

    def leave(self, connection: "GuardedProtocol") -> None:
        """Forget a connection."""
        self._connections.pop(connection, None)


class GuardedProtocol(web.RequestHandler):
    """aiohttp's server protocol, with errors that echo nothing, in a crowd that is bounded."""

    __slots__ = ("_crowd", "_late", "_unread", "_wire")

    def __init__(self, manager: web.Server, crowd: Crowd, **options: Any) -> None:
        super().__init__(manager, **options)
        self._crowd = crowd
        self._wire: asyncio.Transport | None = None
        self._unread: list[bytes] = []
        self._late: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Tell whether no request is being answered, as aiohttp's own keep-alive timer asks."""
        return self._waiter is not None and not self._waiter.done() and not self._unread

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, if there is room."""
        # What a TCP server gives; uvloop's transports are no subclasses of asyncio's.
        self._wire = wire = cast("asyncio.Transport", transport)
        if self._crowd.admits(self):
            super().connection_made(transport)
            return
        self.force_close()  # hears nothing from now on
        wire.write(_FULL)
        wire.close()

    def data_received(self, data: bytes) -> None:
        """Read what came, or let it wait until there is a place in a round."""
        if not self._unread and self._crowd.turnstile.enters():
            self._hear(data)
            return
        self._unread.append(data)
        if len(self._unread) == 1:
            if self._wire is not None:
                self._wire.pause_reading()  # more of it waits in the kernel
            self._crowd.turnstile.wait(self._read)

    def _read(self) -> None:
        data = b"".join(self._unread)
        self._unread.clear()
        if self._wire is None or self._wire.is_closing():
            return
        self._hear(data)
        if not (self._reading_paused or self._buffer_paused):  # which is aiohttp's to lift
            self._wire.resume_reading()

    def _hear(self, data: bytes) -> None:
        """Read what came, and give a head that is not whole by then its time."""
        heads = self._request_count
        super().data_received(data)
        if self._request_count != heads:
            self._stop_clock()
        elif self._late is None and (self.idle or not heads) and data.strip(b"\r\n"):
            self._late = asyncio.get_running_loop().call_later(HEAD, self._end_late)

    def _stop_clock(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _end_late(self) -> None:
        """Tell whoever lets a head wait that its time is over, and close."""
        self._late = None
        if self._wire is not None and not self._wire.is_closing():
            self._crowd.metrics.rejected_heads.inc()
            self._wire.write(_LATE)
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Make room."""
        self._stop_clock()
        self._crowd.leave(self)
        super().connection_lost(exc)

    def abort(self) -> None:
        """Close at once: aiohttp's closing waits until the client has taken what it was sent, which may be never."""
        if self._wire is not None:
            self._wire.abort()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send the answer, unless it is one that aiohttp made outside the chain: it quotes the request."""
        if isinstance(resp, web.HTTPException):
            resp = self.handle_error(request, resp.status, resp)
        self._crowd.answered(self)
        return await super().finish_response(request, resp, start_time)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what never reached the chain: a malformed head, or a bug in the server itself."""
        _ = message
        if request.writer.output_size > 0:
            raise ConnectionError("part of an answer is sent already")
        error = _MALFORMED if status < 500 else InternalError(should_retry=False)  # noqa: PLR2004 - HTTP's own line
        if status < 500:  # noqa: PLR2004
            self._crowd.metrics.rejected_heads.inc()
            _log.warning("request refused by the server", status=status, kind=type(exc).__name__)
        else:
            _log.error("request failed outside the chain", exc_info=exc)
        if exc is not None:
            dealt_with(exc)
        response = web.Response(
            body=error.body(),
            status=status,
            content_type="application/json",
            headers={"X-Content-Type-Options": "nosniff", "Server": ""},
        )
        response.force_close()
        return response


def _whole(error: GatewayError) -> bytes:
    """Write a whole answer to a connection that is not heard any further."""
    headers = {
        **error.headers(),
        "Content-Type": "application/json",
        "Content-Length": str(len(error.body())),
        "X-Content-Type-Options": "nosniff",
        "Connection": "close",
    }
    lines = [
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join((*lines, "", "")).encode() + error.body()


_FULL: Final = _whole(Overloaded())
_LATE: Final = _whole(RequestTimeout("The request's head did not arrive in time. Send it again, in one piece."))


class Listener:
    """One application on one address: ``start``, then ``port``; ``stop`` takes no more connections.

    With a ``shared_port`` it listens there too, beside other processes; ``retire`` leaves that port to them. ``shut``
    lets no newcomers in on the other port either, but who is connected stays. ``hand_over`` has another application
    answer at the same port.
    """

    def __init__(
        self,
        app: web.Application,
        host: str,
        port: int,
        *,
        most: int | None = None,
        stalled: float = STALLED,
        shared_port: int = 0,
    ) -> None:
        self._crowd = Crowd(most or connections_that_fit(), app[keys.METRICS])
        self._host = host
        self._wanted_port = port
        self._shared_port = shared_port
        self._stalled = stalled
        self._runner = _runner(app)
        self._own: tuple[socket.socket, asyncio.Server] | None = None
        self._shared: tuple[socket.socket, asyncio.Server] | None = None
        self._tried = port
        self.port = port

    @property
    def address(self) -> str:
        """Return where it listened last, or tried to."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{host}:{self._tried}"

    @property
    def connections(self) -> int:
        """Return how many are open."""
        return len(self._crowd)

    async def start(self) -> None:
        """Start the application, then listen; raises ``OSError`` where the address cannot be had."""
        await self.start_alone()
        await self._share()

    async def start_alone(self) -> None:
        """Do so on its own port and not on the shared one; raises as ``start``."""
        await self._runner.setup()
        bound = bind(self._host, self._wanted_port, self._stalled)
        self.port = self._tried = bound.getsockname()[1]
        self._own = bound, await self._listen(bound)

    async def hand_over(self, app: web.Application) -> None:
        """Start another application, have it answer whoever comes from now on, and end the one before; as ``start``."""
        runner = _runner(app)
        try:
            await runner.setup()
        except BaseException:
            await runner.cleanup()
            raise
        before, self._runner = self._runner, runner
        await self._crowd.part(LINGER)  # who is connected already is answered by the one that took the connection
        await before.cleanup()
        await self._share()

    async def _share(self) -> None:
        if self._shared_port:
            self._tried = self._shared_port
            shared = bind(self._host, self._shared_port, self._stalled, shared=True)
            self._shared = shared, await self._listen(shared)

    async def _listen(self, bound: socket.socket) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        return await loop.create_server(lambda: self._protocol(loop), sock=bound, backlog=BACKLOG)

    def _protocol(self, loop: asyncio.AbstractEventLoop) -> GuardedProtocol:
        server = self._runner.server
        assert server is not None  # noqa: S101 - setup made it
        return GuardedProtocol(server, self._crowd, loop=loop, **_OPTIONS)

    async def retire(self) -> None:
        """Leave the shared port, if there is one, to the others that listen on it: none of its connections is lost."""
        if self._shared is not None:
            await _close_slowly(*self._shared)

    async def shut(self) -> None:
        """Let no newcomers in; who is connected stays. Takes half a second."""
        if self._own is not None:
            await _close_slowly(*self._own)

    async def stop(self) -> None:
        """Take no more connections, end those that are open, and close the application."""
        for port in (self._shared, self._own):
            if port is not None:
                port[1].close()
        await self._runner.cleanup()
        self._crowd.abort()  # who has not taken the end of its answer by now would keep the process from ending


def _runner(app: web.Application) -> web.AppRunner:
    return web.AppRunner(app, handler_cancellation=True, shutdown_timeout=LINGER)


async def _close_slowly(listening: socket.socket, server: asyncio.Server) -> None:
    try:
        turn_away(listening)
    except OSError as error:  # some sandboxes allow no filter: who knocks while the port is closed is reset
        _log.warning("newcomers cannot be turned away unheard", reason=error.strerror)
    else:
        await asyncio.sleep(RETIRING)
    server.close()


def bind(host: str, port: int, stalled: float = STALLED, *, shared: bool = False) -> socket.socket:
    """Return a listening address; accepted connections inherit its small send buffer and its patience.

    A ``shared`` one may be bound again by other processes of the same user.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if sys.platform == "linux":
            # Of streams the handler thinks itself; this ends whole answers that nobody reads, and hosts that vanished.
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(stalled * 1_000))
        bound.setblocking(False)  # noqa: FBT003 - the socket API's own signature
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def turn_away(listening: socket.socket) -> None:
    """Let the kernel drop the first packet of connections that are new; those that are being made are made."""
    if sys.platform == "linux":
        code = array.array("B", b"".join(struct.pack("HBBI", *instruction) for instruction in _NO_NEW))
        program = struct.pack("HP", len(_NO_NEW), code.buffer_info()[0])
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


_SO_ATTACH_FILTER: Final = 26
# Classic BPF as (code, jump if so, jump if not, operand), over a packet from its TCP header on.
_NO_NEW: Final = (
    (0x30, 0, 0, 13),  # load the byte of the flags
    (0x45, 0, 1, 0x02),  # is SYN among them?
    (0x06, 0, 0, 0),  # yes: drop it
    (0x06, 0, 0, 0xFFFF_FFFF),  # no: keep all of it
)
