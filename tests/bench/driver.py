"""The clients of the measurements, as raw asyncio protocols that do almost nothing for a delta but count it.

A stream client counts the bytes that mark deltas and dates every so-manyth of them; it does not take the chunked
encoding apart. One stream in some dozens keeps its bytes, and `transcript.py` reads those strictly at the end.
"""

import asyncio
import re
import time
from collections.abc import Callable
from typing import cast

from tests.bench.frames import LAST_CHUNK, MARK, age_of_first_stamp
from tests.bench.transcript import fault

_CLOSING = b"\r\n" + LAST_CHUNK
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_OK = b"HTTP/1.1 200"
_AUDITED = 40
_SAMPLED = 16


class Tally:
    """What all streams of a crowd have seen together."""

    def __init__(self) -> None:
        self.deltas = 0
        self.reads = 0
        self.latencies: list[float] = []
        self.first_tokens: list[float] = []
        self.errors: list[str] = []
        self.finished = 0
        self.live: set[StreamClient] = set()
        self._all_gone = asyncio.Event()

    def opened(self, client: "StreamClient") -> None:
        """Count a stream in."""
        self.live.add(client)
        self._all_gone.clear()

    def gone(self, client: "StreamClient", error: str | None) -> None:
        """Count a stream out."""
        self.live.discard(client)
        if error:
            self.errors.append(error)
        else:
            self.finished += 1
        if not self.live:
            self._all_gone.set()

    async def all_gone(self, timeout: float) -> None:
        """Wait for the last stream; what is still open then is an error, and is closed."""
        try:
            async with asyncio.timeout(timeout):
                await self._all_gone.wait()
        except TimeoutError:
            for client in tuple(self.live):
                client.give_up()


class StreamClient(asyncio.Protocol):
    """One stream: sends a request, counts deltas, and checks its end."""

    def __init__(self, tally: Tally, request: bytes, expected: int, *, audited: bool = False) -> None:
        self._tally = tally
        self._request = request
        self._expected = expected
        self._kept: list[bytes] | None = [] if audited else None
        self._seen = 0
        self._next_sample = 1
        self._tail = b""
        self._started = False
        self._over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask, and start the clock."""
        self._transport = cast("asyncio.Transport", transport)
        self._tally.opened(self)
        self._sent = time.monotonic()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count; everything rarer stands in a method of its own."""
        found = data.count(MARK)
        if found:
            tally = self._tally
            tally.deltas += found
            tally.reads += 1
            self._seen += found
            if self._seen >= self._next_sample:
                self._sample(data)
        if self._kept is not None:
            self._kept.append(data)
        ending = data if len(data) >= len(_CLOSING) else self._tail + data
        self._tail = ending[-len(_CLOSING) :]
        if self._tail == _CLOSING:
            self._finish(None if self._seen == self._expected else f"{self._seen} deltas instead of {self._expected}")
        elif not self._started:
            self._started = True
            if not data.startswith(_OK):
                self._finish(data[:300].decode("latin-1"))

    def connection_lost(self, exc: Exception | None) -> None:
        """A connection that goes before the answer is whole is an error."""
        self._finish(f"cut after {self._seen} of {self._expected} deltas: {exc!r}")

    def give_up(self) -> None:
        """Close a stream that should have ended by now."""
        self._finish(f"still open, with {self._seen} of {self._expected} deltas")

    def _sample(self, data: bytes) -> None:
        now = time.monotonic()
        if self._next_sample == 1:
            self._tally.first_tokens.append(now - self._sent)
        age = age_of_first_stamp(data, now)
        if age is not None:
            self._tally.latencies.append(age)
        self._next_sample = self._seen + _SAMPLED

    def _finish(self, error: str | None) -> None:
        if self._over:
            return
        self._over = True
        if self._kept is not None and error is None:
            error = fault(b"".join(self._kept), self._expected)
        self._tally.gone(self, error)
        self._transport.close()


class RequestClient(asyncio.Protocol):
    """A closed loop on one kept-alive connection: the next request leaves when the last answer is whole."""

    def __init__(self, request: bytes, expected: int, errors: list[str], status: bytes = _OK) -> None:
        self.latencies: list[float] = []
        self._request = request
        self._expected = expected
        self._status = status
        self._errors = errors
        self._received = b""
        self._stopping = False
        self._idle = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the loop."""
        self._transport = cast("asyncio.Transport", transport)
        self._ask()

    def data_received(self, data: bytes) -> None:
        """Note how long a whole answer took, and ask again."""
        self._received += data
        if not _whole(self._received):
            return
        self.latencies.append(time.monotonic() - self._sent)
        if not self._received.startswith(self._status) or self._received.count(MARK) != self._expected:
            self._errors.append(self._received[:300].decode("latin-1"))
        self._received = b""
        if self._stopping:
            self._transport.close()
        else:
            self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        """A connection that goes before it is told to is an error."""
        if not self._stopping:
            self._errors.append(f"the connection was lost: {exc!r}")
        if not self._idle.done():
            self._idle.set_result(None)

    async def stop(self) -> None:
        """Let the last answer come, and close."""
        self._stopping = True
        try:
            async with asyncio.timeout(30):
                await self._idle
        except TimeoutError:
            self._errors.append("no answer for 30 s")
            self._transport.abort()

    def _ask(self) -> None:
        self._sent = time.monotonic()
        self._transport.write(self._request)


async def open_streams(
    port: int, tally: Tally, requests: list[bytes], expected: int, gaps: Callable[[], float], *, audit: bool = True
) -> None:
    """Open one stream for each request, each that gap after the last, whatever became of the others (open loop)."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    for number, request in enumerate(requests):
        client = StreamClient(tally, request, expected, audited=audit and number % _AUDITED == 0)
        try:
            await loop.create_connection(lambda client=client: client, "127.0.0.1", port)  # type: ignore[misc]
        except OSError as error:
            tally.errors.append(f"not connected: {error!r}")
        due += gaps()
        await asyncio.sleep(max(0.0, due - loop.time()))


async def ask_in_a_loop(
    port: int, requests: list[bytes], expected: int, seconds: float, *, status: bytes = _OK
) -> tuple[list[float], float, list[str]]:
    """Run one closed loop for each request; give the latencies, the seconds it took, and what was not as expected."""
    loop = asyncio.get_running_loop()
    errors: list[str] = []
    clients = [RequestClient(request, expected, errors, status) for request in requests]
    begin = time.monotonic()
    for client in clients:
        try:
            await loop.create_connection(lambda client=client: client, "127.0.0.1", port)  # type: ignore[misc]
        except OSError as error:
            return [], 1.0, [f"not connected: {error!r}"]
    await asyncio.sleep(seconds)
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client.stop())
    latencies = [value for client in clients for value in client.latencies]
    return latencies, time.monotonic() - begin, errors


def _whole(answer: bytes) -> bool:
    """Tell whether an answer has come in full, by its length or its last chunk."""
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        return False
    length = _LENGTH.search(answer, 0, end)
    return len(answer) >= end + 4 + int(length[1]) if length else answer.endswith(_CLOSING)
