"""A Letta server that misbehaves as it is told, on bare sockets: nothing tidies up what it sends.

``BadLetta`` listens; each turn that comes is played from a script, a tuple of ``Step``s, in order::

    async with BadLetta() as letta:
        letta.plays(head(), ping(), says("Hel"), resets())     # every turn from now on
        letta.plays_next(status(503, {"Retry-After": "7"}))   # the next turn alone

Frames look as letta 0.16.8 writes them (``tests/data/v1``). A script that ends closes the connection properly, as each
answer says that it will: a FIN, after the last chunk where the body is chunked. The health check, the listing of agents
and the cancel have scripts of their own: ``health``, ``listing``, ``cancelling``.
"""

import asyncio
import contextlib
import fcntl
import json
import re
import socket
import ssl
import struct
import termios
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Self, TypeAlias

import msgspec

VERSION: Final = "0.16.8"
DATE: Final = "2026-11-20T15:16:15+00:00"
FLOOD_PIECE: Final = 65_536
_SIOCOUTQ: Final = termios.TIOCOUTQ


class Posted(msgspec.Struct):
    """A turn that came: what was asked for, and when its client left it, in the loop's time."""

    agent_id: str
    run_id: str
    headers: dict[str, str]
    body: dict[str, Any]
    came_at: float
    left_at: float | None = None


class Cancel(msgspec.Struct):
    """A cancel that came."""

    agent_id: str
    run_ids: list[str]
    at: float


class Exchange:
    """One request and the socket under it, in the hands of a script.

    ``absorbed`` is how many bytes the other side's machine has taken: all that was written, but for what waits on ours.
    """

    def __init__(self, letta: "BadLetta", line: str, writer: asyncio.StreamWriter, run_id: str) -> None:
        self.letta = letta
        self.line = line
        self.writer = writer
        self.run_id = run_id
        self.chunked = False
        self.written = 0
        self.message_id = f"message-{run_id}"
        self.left = asyncio.Event()
        self.cancelled = asyncio.Event()

    @property
    def socket(self) -> socket.socket:
        """Return the socket itself."""
        found: socket.socket = self.writer.get_extra_info("socket")
        return found

    @property
    def absorbed(self) -> int:
        """Return the bytes that left this side."""
        waiting = struct.unpack("i", fcntl.ioctl(self.socket.fileno(), _SIOCOUTQ, b"\0\0\0\0"))[0]
        return self.written - self.writer.transport.get_write_buffer_size() - int(waiting)

    async def raw(self, data: bytes) -> None:
        """Write bytes as they are."""
        self.written += len(data)
        self.writer.write(data)
        await self.writer.drain()

    async def body(self, data: bytes) -> None:
        """Write bytes of the body, as one chunk where it is chunked."""
        await self.raw(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)

    async def frame(self, **fields: Any) -> None:
        """Write one frame."""
        await self.body(b"data: " + json.dumps(fields).encode() + b"\n\n")

    async def end(self) -> None:
        """End a chunked body as it should be."""
        if self.chunked:
            self.chunked = False
            await self.raw(b"0\r\n\r\n")

    def reset(self) -> None:
        """Close with RST: what was not taken yet is lost."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Step: TypeAlias = Callable[[Exchange], Awaitable[None]]
"""One thing that a script does."""
Script: TypeAlias = tuple[Step, ...]


class Over(Exception):
    """Ends a script: the connection is done with."""


# Before and around the answer ----------------------------------------------------------------------------------------


def head(*, chunked: bool = True, headers: Mapping[str, str] = {}) -> Step:
    """Answer 200 and the headers of a stream; uvicorn sends it in chunks, a proxy may not."""

    async def step(exchange: Exchange) -> None:
        given = {"Content-Type": "text/event-stream; charset=utf-8", "Connection": "close", **headers}
        given |= {"Transfer-Encoding": "chunked"} if chunked else {}
        await exchange.raw(_head(200, given))
        exchange.chunked = chunked

    return step


def status(number: int, headers: Mapping[str, str] = {}, body: bytes | str = b"") -> Step:
    """Answer with any status, headers and body; ``Content-Length`` is right unless given."""

    async def step(exchange: Exchange) -> None:
        data = body.encode() if isinstance(body, str) else body
        usual = {"Content-Type": "application/json", "Content-Length": str(len(data)), "Connection": "close"}
        given = {**usual, **headers}
        await exchange.raw(_head(number, {name: value for name, value in given.items() if value}) + data)

    return step


def answers(document: Any) -> Step:
    """Answer 200 with JSON."""
    return status(200, {}, json.dumps(document))


def waits(seconds: float) -> Step:
    """Say nothing for a while."""

    async def step(_: Exchange) -> None:
        await asyncio.sleep(seconds)

    return step


def hangs() -> Step:
    """Say nothing until the other side goes away."""

    async def step(exchange: Exchange) -> None:
        await exchange.left.wait()
        raise Over

    return step


def resets() -> Step:
    """Close with RST."""

    async def step(exchange: Exchange) -> None:
        await asyncio.sleep(0.02)  # what was written goes out first, or the RST overtakes it
        exchange.reset()
        raise Over

    return step


def breaks_off() -> Step:
    """Close with FIN where a stream is not at its end."""

    async def step(exchange: Exchange) -> None:
        exchange.chunked = False
        raise Over

    return step


def sends(data: bytes) -> Step:
    """Write bytes as they are, past the chunks."""

    async def step(exchange: Exchange) -> None:
        await exchange.raw(data)

    return step


# In the stream -------------------------------------------------------------------------------------------------------


def body(data: bytes, *, piece: int = 0, pause: float = 0.0) -> Step:
    """Write bytes of the body; in pieces of so many bytes, each a packet of its own, where told."""

    async def step(exchange: Exchange) -> None:
        size = piece or len(data) or 1
        for start in range(0, len(data), size):
            await exchange.body(data[start : start + size])
            await asyncio.sleep(pause)

    return step


def frame(message_type: str, **fields: Any) -> Step:
    """Send any frame, with the envelope that Letta gives it."""

    async def step(exchange: Exchange) -> None:
        await exchange.frame(**envelope(message_type, exchange.run_id, **fields))

    return step


def ping() -> Step:
    """Send a ping, which names the run."""
    return frame("ping", id="ping-1")


def pings(every: float) -> Step:
    """Send pings until the other side goes away."""

    async def step(exchange: Exchange) -> None:
        while not exchange.left.is_set():
            await exchange.frame(**envelope("ping", exchange.run_id, id="ping-1"))
            await asyncio.sleep(every)
        raise Over

    return step


def says(*words: str, pause: float = 0.0) -> Step:
    """Let the agent say some words, a frame each."""

    async def step(exchange: Exchange) -> None:
        for word in words:
            await exchange.frame(**envelope("assistant_message", exchange.run_id, id=exchange.message_id, content=word))
            await asyncio.sleep(pause)

    return step


def stops(reason: str = "end_turn") -> Step:
    """Say why the turn ended."""

    async def step(exchange: Exchange) -> None:
        await exchange.frame(message_type="stop_reason", stop_reason=reason)

    return step


def usage(prompt: int = 10, completion: int = 2) -> Step:
    """Report tokens."""

    async def step(exchange: Exchange) -> None:
        await exchange.frame(
            message_type="usage_statistics",
            completion_tokens=completion,
            prompt_tokens=prompt,
            total_tokens=prompt + completion,
            step_count=1,
        )

    return step


def done() -> Step:
    """Send ``[DONE]`` and the end of the body."""

    async def step(exchange: Exchange) -> None:
        await exchange.body(b"data: [DONE]\n\n")
        await exchange.end()

    return step


def fails(error_type: str, message: str, detail: str) -> Step:
    """Fail the run as Letta does: the event of type ``error`` that follows a stop reason."""

    async def step(exchange: Exchange) -> None:
        told = {"message_type": "error_message", "run_id": exchange.run_id, "error_type": error_type}
        text = json.dumps({**told, "message": message, "detail": detail, "seq_id": None})
        await exchange.body(f"event: error\ndata: {text}\n\n".encode())

    return step


def until_cancelled() -> Step:
    """Wait for the cancel of this run, then end as V1 does: the stop reason, and no ``[DONE]``."""

    async def step(exchange: Exchange) -> None:
        waiting = {asyncio.ensure_future(event.wait()) for event in (exchange.cancelled, exchange.left)}  # noqa: TID251
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        if exchange.left.is_set():
            raise Over
        await exchange.frame(message_type="stop_reason", stop_reason="cancelled")
        await exchange.end()

    return step


def floods(piece: bytes, *, total: int | None = None) -> Step:
    """Send the same bytes again and again, as fast as they are taken, to the end or to so many bytes."""

    async def step(exchange: Exchange) -> None:
        many = piece * max(1, FLOOD_PIECE // len(piece))
        sent = 0
        while (total is None or sent < total) and not exchange.left.is_set():
            await exchange.body(many)
            sent += len(many)
            await asyncio.sleep(0)
        if exchange.left.is_set():
            raise Over

    return step


def envelope(message_type: str, run_id: str, **fields: Any) -> dict[str, Any]:
    """Return a frame as Letta fills it."""
    nothing = dict.fromkeys(("name", "otid", "sender_id", "step_id", "is_err", "seq_id"))
    return {"id": "x", "date": DATE, **nothing, "message_type": message_type, "run_id": run_id, **fields}


def frame_bytes(message_type: str = "assistant_message", run_id: str = "run-1", **fields: Any) -> bytes:
    """Return one frame as bytes."""
    return b"data: " + json.dumps(envelope(message_type, run_id, **fields)).encode() + b"\n\n"


BEGIN: Final[Script] = (head(), ping())
END: Final[Script] = (stops(), usage(), done())
ANSWER: Final[Script] = (*BEGIN, says("Hel", "lo"), *END)
"""A turn in which nothing goes wrong."""
PROFILE: Final[Script] = (answers({"agent_type": "letta_v1_agent", "model": "demo", "tools": []}),)
"""What an agent is."""
NO_STEPS: Final[Script] = (answers([]),)
"""What a run took of which nothing is left."""
NO_APP_SERVER: Final[Script] = (status(404, {}, '{"detail":"Not Found"}'),)


# The server ----------------------------------------------------------------------------------------------------------


class BadLetta:
    """Listens for as long as the context, and remembers what came.

    ``agents`` are the names that are listed. ``posted`` and ``cancels`` hold the turns and the cancels that came,
    ``lines`` every request line; ``exchanges`` are the turns under way, ``connections`` counts what was accepted.
    """

    def __init__(
        self, *, agents: tuple[str, ...] = ("friend", "other"), tls: ssl.SSLContext | None = None, buffer: int = 0
    ) -> None:
        self.ids = {name: f"agent-00000000-0000-4000-8000-{number:012}" for number, name in enumerate(agents, 1)}
        self.health: Script = (answers({"version": VERSION, "status": "ok"}),)
        self.listing: Script = (
            answers([{"id": id_, "name": name, "created_at": DATE} for name, id_ in self.ids.items()]),
        )
        self.cancelling: Script = (answers({}),)
        self.posted: list[Posted] = []
        self.cancels: list[Cancel] = []
        self.lines: list[str] = []
        self.exchanges: list[Exchange] = []
        self.connections = 0
        self._tls = tls
        self._buffer = buffer
        self._script: Script = ANSWER
        self._next: deque[Script] = deque()
        self._serving: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    def plays(self, *steps: Step) -> None:
        """Play this script for every turn from now on."""
        self._script = steps

    def plays_next(self, *steps: Step) -> None:
        """Play this script once, after those that wait already."""
        self._next.append(steps)

    @property
    def url(self) -> str:
        """Return where it is."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        """Listen."""
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Go away, whatever was being played."""
        await self.refuse()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def listen(self) -> None:
        """Listen, where it listened before."""
        bound = socket.create_server(("127.0.0.1", self.port), backlog=1_000)
        if self._buffer:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._buffer)
        self.port = bound.getsockname()[1]
        self._server = await asyncio.start_server(self._serve, sock=bound, ssl=self._tls)

    async def refuse(self) -> None:
        """Close the port: who connects is refused. What is being played goes on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        self.connections += 1
        if self._tls is None:  # or what is absorbed could not be told from what waits; TLS has buffers of its own
            writer.transport.set_write_buffer_limits(high=0)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._converse(reader, writer)
        finally:
            self._serving.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError, ssl.SSLError):
                await writer.wait_closed()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *rest = raw.split("\r\n")[:-2]
        headers = {name.lower(): value.strip() for name, _, value in (text.partition(":") for text in rest)}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        self.lines.append(line)
        exchange, script = self._meet(line, headers, content, writer)
        await self._play(exchange, script, reader)

    def _meet(
        self, line: str, headers: dict[str, str], content: bytes, writer: asyncio.StreamWriter
    ) -> tuple[Exchange, Script]:
        now = asyncio.get_running_loop().time()
        agent = re.search(r"/v1/agents/([^/ ]+)/messages/(stream|cancel)", line)
        exchange = Exchange(self, line, writer, f"run-{len(self.posted) + 1}")
        if "/app-server-info" in line:
            return exchange, NO_APP_SERVER
        if agent is None:
            return exchange, self._control(line)
        if agent[2] == "cancel":
            cancel = Cancel(agent[1], json.loads(content)["run_ids"], now)
            self.cancels.append(cancel)
            for other in self.exchanges:
                if other.run_id in cancel.run_ids:
                    other.cancelled.set()
            return exchange, self.cancelling
        self.posted.append(Posted(agent[1], exchange.run_id, headers, json.loads(content), now))
        return exchange, self._next.popleft() if self._next else self._script

    def _control(self, line: str) -> Script:
        if "/health" in line:
            return self.health
        if re.search(r"/v1/agents/agent-[^/ ]+ ", line):
            return PROFILE
        return NO_STEPS if "/v1/runs/" in line else self.listing

    async def _play(self, exchange: Exchange, script: Script, reader: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()
        turn = self.posted[-1] if "/messages/stream" in exchange.line else None

        async def watch() -> None:
            with contextlib.suppress(ConnectionError):
                await reader.read(1)  # there is one request per connection: what ends this is its end
            exchange.left.set()
            if turn is not None:
                turn.left_at = loop.time()

        watching = loop.create_task(watch())
        self.exchanges.append(exchange)
        try:
            for step in script:
                await step(exchange)
            await exchange.end()
        except Over:
            pass
        finally:
            self.exchanges.remove(exchange)
            watching.cancel()


def _head(number: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {number} Something", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join((*lines, "", "")).encode("latin-1")
