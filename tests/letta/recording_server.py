"""A Letta server that writes down what it was asked, byte for byte, and answers as it is told.

::

    async with RecordingServer() as server:
        server.on("turn", status(409), stream(ping(), says("Hi"), stop()))   # in this order; the last one stays
        ...
        assert server.asked("turn")[0].header("x-project") == "my-project"

An ``Answer`` is a coroutine function of the ``Exchange``; where it leaves the exchange ``keep`` (the default), the
connection serves the next request; ``ended`` tells whether a chunked body came to its end.
Frames look as letta 0.16.8 writes them.
"""

import asyncio
import contextlib
import json
import re
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Literal, Self, TypeAlias, cast
from urllib.parse import parse_qsl

import msgspec

RUN: Final = "run-1"
AGENT: Final = "agent-00000000-0000-4000-8000-000000000001"
CONVERSATION: Final = "conv-00000000-0000-4000-8000-000000000002"
TOOL: Final = "tool-00000000-0000-4000-8000-000000000004"
PROVIDER: Final = "provider-00000000-0000-4000-8000-000000000005"
HEALTH: Final = {"version": "0.16.8", "status": "ok"}

Kind: TypeAlias = Literal[
    "health",
    "listing",
    "agent",
    "turn",
    "cancel",
    "calls",
    "new conversation",
    "delete conversation",
    "agent blocks",
    "recompile",
    "tools",
    "upsert tool",
    "delete tool",
    "attach tool",
    "detach tool",
    "approval of a tool",
    "new agent",
    "delete agent",
    "models",
    "providers",
    "new provider",
    "change provider",
    "delete provider",
    "write memory",
    "conversations",
    "recompile conversation",
    "runs",
    "run",
    "steps",
    "messages of a run",
    "unknown",
]

_EMPTY: Final[tuple[Kind, ...]] = ("models", "providers", "conversations", "runs", "steps", "messages of a run")
_KINDS: Final = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in cast(
        "tuple[tuple[str, Kind], ...]",
        (
            (r"\w+ health", "health"),
            (r"POST agents", "new agent"),
            (r"\w+ agents", "listing"),
            (r"DELETE agents/[^/]+", "delete agent"),
            (r"\w+ agents/[^/]+", "agent"),
            (r"\w+ agents/[^/]+/messages/stream", "turn"),
            (r"POST conversations/[^/]+/messages", "turn"),
            (r"\w+ agents/[^/]+/messages/cancel", "cancel"),
            (r"GET (agents|conversations)/[^/]+/messages", "calls"),
            (r"POST conversations", "new conversation"),
            (r"DELETE conversations/[^/]+", "delete conversation"),
            (r"GET agents/[^/]+/core-memory/blocks", "agent blocks"),
            (r"POST agents/[^/]+/recompile", "recompile"),
            (r"PATCH agents/[^/]+/core-memory/blocks/[^/]+", "write memory"),
            (r"GET models", "models"),
            (r"GET providers", "providers"),
            (r"POST providers", "new provider"),
            (r"PATCH providers/[^/]+", "change provider"),
            (r"DELETE providers/[^/]+", "delete provider"),
            (r"GET conversations", "conversations"),
            (r"POST conversations/[^/]+/recompile", "recompile conversation"),
            (r"GET runs", "runs"),
            (r"GET runs/[^/]+", "run"),
            (r"GET runs/[^/]+/steps", "steps"),
            (r"GET runs/[^/]+/messages", "messages of a run"),
            (r"GET tools", "tools"),
            (r"PUT tools", "upsert tool"),
            (r"DELETE tools/[^/]+", "delete tool"),
            (r"PATCH agents/[^/]+/tools/attach/[^/]+", "attach tool"),
            (r"PATCH agents/[^/]+/tools/detach/[^/]+", "detach tool"),
            (r"PATCH agents/[^/]+/tools/approval/[^/]+", "approval of a tool"),
        ),
    )
)
"""What is asked for, by method and path, whatever prefix the path has."""


class Request(msgspec.Struct, frozen=True):
    """A request as it came; ``path`` is not decoded, header names are as sent, ``connection`` counts from 1."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    connection: int

    @property
    def path(self) -> str:
        """Return the target without its query."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> dict[str, str]:
        """Return the query, decoded; no name stands twice."""
        pairs = parse_qsl(self.target.partition("?")[2], keep_blank_values=True, strict_parsing="?" in self.target)
        assert len(dict(pairs)) == len(pairs), pairs
        return dict(pairs)

    @property
    def kind(self) -> Kind:
        """Return what is asked for, whatever prefix the path has."""
        _, _, rest = self.path.rstrip("/").partition("/v1/")
        asked = f"{self.method} {rest}"
        return next((kind for pattern, kind in _KINDS if pattern.fullmatch(asked)), "unknown")

    def header(self, name: str) -> str | None:
        """Return a header that stands once at most."""
        found = [value for given, value in self.headers if given.lower() == name.lower()]
        assert len(found) <= 1, found
        return found[0] if found else None

    def json(self) -> Any:
        """Return the body, decoded."""
        return json.loads(self.body)


class Exchange:
    """One request and the connection it came on."""

    def __init__(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.request = request
        self.keep = True
        self.ended = False
        self._reader = reader
        self._writer = writer

    @property
    def left(self) -> bool:
        """Tell whether the client closed the connection."""
        return self._reader.at_eof() or self._reader.exception() is not None or self._writer.is_closing()

    async def raw(self, data: bytes) -> None:
        """Write bytes as they are."""
        self._writer.write(data)
        await self._writer.drain()

    async def status(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Write a whole answer."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        await self.raw(f"HTTP/1.1 {status} Said\r\nContent-Length: {len(body)}\r\n{lines}\r\n".encode() + body)

    async def chunk(self, data: bytes) -> None:
        """Write a chunk of a chunked body; an empty one ends it."""
        self.ended = not data
        await self.raw(b"%x\r\n%b\r\n" % (len(data), data))

    async def frame(self, **fields: Any) -> None:
        """Write one frame of a turn."""
        await self.chunk(b"data: " + json.dumps(fields).encode() + b"\n\n")

    async def until_left(self) -> None:
        """Wait until the client is gone."""
        while not self.left:  # noqa: ASYNC110 - a stream reader tells nobody
            await asyncio.sleep(0.002)

    def close(self) -> None:
        """Close the connection with a FIN."""
        self.keep = False

    def reset(self) -> None:
        """Close the connection with a RST."""
        self.keep = False
        made: socket.socket = self._writer.get_extra_info("socket")
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


Answer: TypeAlias = Callable[[Exchange], Awaitable[None]]
Step: TypeAlias = Answer
"""A piece of an answer."""


# Answers -------------------------------------------------------------------------------------------------------------


def status(number: int, body: bytes | str | object = b"", headers: Mapping[str, str] | None = None) -> Answer:
    """Answer with a status, headers and a body: bytes, text, or what JSON can say."""
    match body:
        case bytes():
            data = body
        case str():
            data = body.encode()
        case _:
            data = json.dumps(body).encode()

    async def answer(exchange: Exchange) -> None:
        await exchange.status(number, {"Content-Type": "application/json", **(headers or {})}, data)

    return answer


def silence() -> Answer:
    """Say nothing until the client is gone."""

    async def answer(exchange: Exchange) -> None:
        await exchange.until_left()
        exchange.close()

    return answer


def garbage(data: bytes = b"\x00\x01 this is no HTTP\r\n\r\n") -> Answer:
    """Answer with bytes that are not HTTP."""

    async def answer(exchange: Exchange) -> None:
        await exchange.raw(data)
        exchange.close()

    return answer


def stream(*steps: Step, headers: Mapping[str, str] | None = None) -> Answer:
    """Answer 200 with a stream of frames, well ended unless a step closed the connection."""

    async def answer(exchange: Exchange) -> None:
        given = {"Content-Type": "text/event-stream; charset=utf-8", "Transfer-Encoding": "chunked", **(headers or {})}
        lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        await exchange.raw(f"HTTP/1.1 200 OK\r\n{lines}\r\n".encode())
        for step in steps:
            await step(exchange)
            if exchange.ended or not exchange.keep:
                return
        await exchange.chunk(b"")

    return answer


# Steps of a stream ---------------------------------------------------------------------------------------------------


def ping(run: str | None = RUN) -> Step:
    """Send the first frame, which names the run."""
    return frame(message_type="ping", **({} if run is None else {"run_id": run}))


def says(text: str, run: str | None = RUN) -> Step:
    """Send a piece of the agent's text."""
    named = {} if run is None else {"run_id": run}
    return frame(message_type="assistant_message", id="message-1", content=text, **named)


def stop(reason: str = "end_turn") -> Step:
    """Send the stop reason, without anything after it."""
    return frame(message_type="stop_reason", stop_reason=reason, run_id=RUN)


def done() -> Step:
    """Send ``[DONE]`` and the end of the body in one write, as a quick server does."""

    async def step(exchange: Exchange) -> None:
        exchange.ended = True
        await exchange.raw(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    return step


def frame(**fields: Any) -> Step:
    """Send one frame."""

    async def step(exchange: Exchange) -> None:
        await exchange.frame(**fields)

    return step


def chunk(data: bytes) -> Step:
    """Send bytes of the body."""

    async def step(exchange: Exchange) -> None:
        await exchange.chunk(data)

    return step


def wait(event: asyncio.Event) -> Step:
    """Wait for the test's word."""

    async def step(_: Exchange) -> None:
        await event.wait()

    return step


def hang() -> Step:
    """Send nothing more until the client is gone."""
    return silence()


def fin() -> Step:
    """Close the connection, in the middle of whatever it is."""

    async def step(exchange: Exchange) -> None:
        exchange.close()

    return step


def rst() -> Step:
    """Reset the connection; what was sent is read before, unless the client is slow."""

    async def step(exchange: Exchange) -> None:
        await asyncio.sleep(0.02)
        exchange.reset()

    return step


WELL: Final = stream(ping(), says("Hel"), says("lo"), stop(), done())
"""A whole turn."""


# The server ----------------------------------------------------------------------------------------------------------


class RecordingServer:
    """Listens for as long as the context; ``requests`` came in this order, ``connections`` were made so far.

    ``open`` counts the connections that are alive. Unless told otherwise it lists no agent and is well.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self.open = 0
        self.port = 0
        self._answers: dict[Kind, deque[Answer]] = {}
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.on("health", status(200, HEALTH))
        self.on("listing", status(200, []))
        self.on("agent", status(404, {"detail": "no such agent"}))
        self.on("turn", WELL)
        self.on("cancel", status(200, {}))
        self.on("calls", status(200, []))
        self.on("new conversation", status(200, {"id": CONVERSATION, "agent_id": AGENT}))
        self.on("delete conversation", status(200, None))
        for nothing in ("agent blocks", "tools", *_EMPTY):
            self.on(nothing, status(200, []))
        self.on("upsert tool", status(200, {"id": TOOL, "name": "client_tool"}))
        for done_with in (
            "attach tool",
            "detach tool",
            "delete tool",
            "approval of a tool",
        ):
            self.on(done_with, status(200, {"id": AGENT}))
        self.on("recompile", status(200, "compiled"))
        self.on("recompile conversation", status(200, "compiled"))
        self.on("new agent", status(200, {"id": AGENT, "name": "new"}))
        self.on("delete agent", status(200, {"message": "deleted"}))
        self.on("new provider", status(200, {"id": PROVIDER, "name": "new"}))
        self.on("change provider", status(200, {"id": PROVIDER, "name": "new"}))
        self.on("write memory", status(404, {"detail": "no such block"}))
        self.on("run", status(404, {"detail": "no such run"}))
        self.on("unknown", status(404, {"detail": "Not Found"}))

    async def __aenter__(self) -> Self:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1_000)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Listen no more, and drop what is open."""
        await self.stop()

    @property
    def url(self) -> str:
        """Return where it is."""
        return f"http://127.0.0.1:{self.port}"

    def on(self, kind: Kind, *answers: Answer) -> None:
        """Answer requests of a kind with these, in order; the last one stays."""
        self._answers[kind] = deque(answers)

    def asked(self, kind: Kind) -> list[Request]:
        """Return the requests of a kind."""
        return [request for request in self.requests if request.kind == kind]

    def hang_up(self) -> None:
        """Close every connection, idle or not."""
        for writer in self._writers:
            writer.close()

    async def stop(self) -> None:
        """Listen no more, and drop what is open."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        self.connections += 1
        self.open += 1
        number = self.connections
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._exchange(reader, writer, number):
                    pass
        finally:
            self.open -= 1
            self._writers.discard(writer)
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int) -> bool:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        method, target, _ = first.split(" ")
        headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        lengths = [int(value) for name, value in headers if name.lower() == "content-length"]
        body = await reader.readexactly(sum(lengths))
        request = Request(method, target, headers, body, connection)
        self.requests.append(request)
        answers = self._answers[request.kind]
        exchange = Exchange(request, reader, writer)
        await (answers.popleft() if len(answers) > 1 else answers[0])(exchange)
        return exchange.keep
