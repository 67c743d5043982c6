"""HTTP as it stands on the wire: tests say every byte of a request, and see every byte of the answer."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, Final

import msgspec

PATIENCE: Final = 10.0


async def until(so: Callable[[], object]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(PATIENCE):
        while not so():  # noqa: ASYNC110 - it is seen from outside: nothing there could set an event
            await asyncio.sleep(0.002)


class Answer(msgspec.Struct, frozen=True):
    """One HTTP answer; header names are in lower case, ``complete`` tells whether it ended as it should."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    complete: bool = True
    version: str = "HTTP/1.1"

    def header(self, name: str) -> str | None:
        """Return a header that stands once at most."""
        found = [value for given, value in self.headers if given == name.lower()]
        assert len(found) <= 1, found
        return found[0] if found else None

    def json(self) -> Any:
        """Return the body, decoded."""
        return msgspec.json.decode(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """Return OpenAI's error object, and see that it is one."""
        assert self.header("content-type") in ("application/json", "application/json; charset=utf-8"), self
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert isinstance(error["message"], str)
        assert isinstance(error["type"], str)
        return dict(error)

    @property
    def code(self) -> str:
        """Return the error's code."""
        return str(self.error["code"])

    @property
    def events(self) -> list[Any]:
        """Return what the data lines of a stream hold, decoded; ``"[DONE]"`` stays as it is."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return [line if line == "[DONE]" else msgspec.json.decode(line) for line in lines]

    @property
    def text(self) -> str:
        """Return the text of all chunks of a stream."""
        choices = [c for e in self.events if isinstance(e, dict) for c in e.get("choices", [])]
        return "".join(choice["delta"].get("content") or "" for choice in choices)


class Connection:
    """One connection of a client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Write bytes as they are."""
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> Answer:
        """Read an answer's head."""
        async with asyncio.timeout(PATIENCE):
            raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").split("\r\n")[:-2]
        version, status, _ = first.split(" ", 2)
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        return Answer(int(status), headers, b"", version=version)

    async def answer(self, method: str = "GET") -> Answer:
        """Read a whole answer, however its end is marked."""
        head = await self.head()
        while head.status == 100:
            head = await self.head()
        body, complete = b"", True
        try:
            async with asyncio.timeout(PATIENCE):
                if method == "HEAD" or head.status in (204, 304):
                    pass
                elif head.header("transfer-encoding") == "chunked":
                    async for piece in self.pieces():
                        body += piece
                elif (length := head.header("content-length")) is not None:
                    body = await self.reader.readexactly(int(length))
                else:
                    body = await self.reader.read()
        except (asyncio.IncompleteReadError, ConnectionResetError):
            complete = False
        return msgspec.structs.replace(head, body=body, complete=complete)

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the chunks of a chunked body as they come; raises where it does not end well."""
        while size := int((await self.reader.readuntil(b"\r\n")).strip(), 16):
            yield await self.reader.readexactly(size)
            await self.reader.readexactly(2)
        await self.reader.readexactly(2)

    async def closed(self) -> bool:
        """Tell whether the other side has closed, once all that it sent is read."""
        try:
            async with asyncio.timeout(PATIENCE):
                await self.reader.read()
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False
        return True

    def abort(self) -> None:
        """Go away at once."""
        self.writer.transport.abort()

    async def close(self) -> None:
        """Go away."""
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


@contextlib.asynccontextmanager
async def connect(port: int, host: str = "127.0.0.1", *, source: str | None = None) -> AsyncIterator[Connection]:
    """Open a connection for as long as the context, from another of this machine's addresses if need be."""
    local = (source, 0) if source else None
    connection = Connection(*await asyncio.open_connection(host, port, local_addr=local))
    try:
        yield connection
    finally:
        await connection.close()


Headers = Mapping[str, str | bytes] | Iterable[tuple[str, str | bytes]]


def request(method: str, target: str, headers: Headers = (), body: bytes = b"") -> bytes:
    """Write a request; ``Host`` and ``Content-Length`` are added unless given (empty: left out)."""
    given = list(headers.items() if isinstance(headers, Mapping) else headers)
    names = {name.lower() for name, _ in given}
    if "host" not in names:
        given.insert(0, ("Host", "localhost"))
    if body and not names & {"content-length", "transfer-encoding"}:
        given.append(("Content-Length", str(len(body))))
    lines = [f"{method} {target} HTTP/1.1".encode()]
    for name, value in given:
        if value != "":
            lines.append(name.encode() + b": " + (value if isinstance(value, bytes) else value.encode()))
    return b"\r\n".join((*lines, b"", body))


async def ask(
    port: int,
    method: str,
    target: str,
    headers: Headers = (),
    body: bytes = b"",
    *,
    host: str = "127.0.0.1",
    source: str | None = None,
) -> Answer:
    """Send one request on a connection of its own and read the answer."""
    async with connect(port, host, source=source) as connection:
        with contextlib.suppress(ConnectionError):  # refused before it was sent: the answer says why
            await connection.send(request(method, target, headers, body))
        return await connection.answer(method)
