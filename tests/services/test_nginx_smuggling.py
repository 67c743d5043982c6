"""B10: what two parsers may read as two things, sent to the gateway alone and through nginx.

Each row says how many requests the gateway may see of it, and how many messages the agent may hear. In most of them a
second request hides: ``HIDDEN``, whole and with a good key.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

import msgspec
import pytest
import pytest_asyncio

from gateway import keys
from gateway.translation.agent_turn import Text, UserSaid
from tests.server.recorded_logs import RecordedLogs, recorded_logs
from tests.server.running import JSON, Running, chat_body, serving, settings
from tests.server.wire import Connection, request
from tests.services.nginx import API_KEY, KEY, PROXY, Nginx, nginx

HIDDEN: Final = request("POST", "/v1/chat/completions", {**KEY, **JSON}, chat_body("hidden"))
OPEN: Final = chat_body("open")
SIZE: Final = str(len(OPEN)).encode()
QUIET: Final = 0.3
"""Seconds without a byte after which nothing more is to come."""


def post(*lines: bytes, body: bytes = b"", version: bytes = b"1.1") -> bytes:
    """Write a request for a chat completion that has these lines in its head."""
    known = (b"Host: localhost", b"Content-Type: application/json", b"Authorization: Bearer " + API_KEY.encode())
    return b"\r\n".join((b"POST /v1/chat/completions HTTP/" + version, *known, *lines, b"", body))


def get(*lines: bytes, first: bytes = b"GET /v1/models HTTP/1.1", body: bytes = b"") -> bytes:
    """Write a request for the models that has these lines in its head."""
    return b"\r\n".join((first, b"Host: localhost", b"Authorization: Bearer " + API_KEY.encode(), *lines, b"", body))


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    """Write a body in chunks."""
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + end


class Case(msgspec.Struct, frozen=True):
    """What is sent; then what the gateway sees and the agent hears of it, directly and (unless the same) through nginx.

    nginx bears bare line feeds and the like. What it hands on it writes anew: a second request that it has read there
    is the client's own, and the gateway sees it as one. What ``may_be_refused``, newer ones refuse.
    """

    sent: bytes
    seen: int = 0
    heard: int = 0
    seen_through: int | None = None
    heard_through: int | None = None
    may_be_refused: bool = False


TE: Final = b"Transfer-Encoding: chunked"
CASES: Final = {
    "length and chunks": Case(post(b"Content-Length: " + SIZE, TE, body=chunked() + HIDDEN)),
    "chunks and length": Case(post(TE, b"Content-Length: 5", body=chunked() + HIDDEN)),
    "two lengths": Case(post(b"Content-Length: " + SIZE, b"Content-Length: 0", body=OPEN + HIDDEN)),
    "two lengths that agree": Case(post(*[b"Content-Length: " + SIZE] * 2, body=OPEN)),
    "two lengths in one": Case(post(b"Content-Length: %b, %b" % (SIZE, SIZE), body=OPEN)),
    "signed length": Case(post(b"Content-Length: +" + SIZE, body=OPEN + HIDDEN)),
    "negative length": Case(post(b"Content-Length: -1", body=HIDDEN)),
    "length in hex": Case(post(b"Content-Length: 0x10", body=OPEN + HIDDEN)),
    "length of 30 digits": Case(post(b"Content-Length: 1" + b"0" * 29, body=HIDDEN)),
    "length that overflows to zero": Case(post(b"Content-Length: 18446744073709551616", body=HIDDEN)),
    "no length": Case(post(b"Content-Length:", body=HIDDEN)),
    "unknown encoding": Case(post(b"Transfer-Encoding: xchunked", body=chunked(OPEN) + HIDDEN)),
    "encoding of nothing": Case(post(b"Transfer-Encoding: identity", body=chunked() + HIDDEN)),
    "chunks that are not last": Case(post(b"Transfer-Encoding: chunked, identity", body=chunked(OPEN) + HIDDEN)),
    "chunks twice": Case(post(b"Transfer-Encoding: chunked, chunked", body=chunked(OPEN) + HIDDEN)),
    "chunks in two lines": Case(post(TE, TE, body=chunked(OPEN) + HIDDEN)),
    "encoding after a control character": Case(post(b"Transfer-Encoding: \x0bchunked", body=chunked() + HIDDEN)),
    "chunks in capitals": Case(post(b"Transfer-Encoding: CHUNKED", body=chunked(OPEN)), 1, 1),
    "chunks in HTTP/1.0": Case(post(TE, body=chunked() + HIDDEN, version=b"1.0")),
    "blank before the colon of an encoding": Case(post(b"Transfer-Encoding : chunked", body=chunked() + HIDDEN)),
    "blank before the colon of a length": Case(post(b"Content-Length : 5", body=HIDDEN)),
    "underscore in an encoding": Case(post(b"Transfer_Encoding: chunked", b"Content-Length: " + SIZE, body=OPEN), 1, 1),
    "flood of chunk extensions": Case(post(TE, body=b"1;" + b"x" * 60_000 + b"\r\n{\r\n" + chunked()), 1, 0),
    "chunk size with a sign": Case(post(TE, body=b"+5\r\n{    \r\n0\r\n\r\n" + HIDDEN)),
    "chunk size with a prefix": Case(post(TE, body=b"0x5\r\n{    \r\n0\r\n\r\n" + HIDDEN)),
    "chunk size that overflows": Case(post(TE, body=b"10000000000000000\r\n" + HIDDEN)),
    "chunk longer than it says": Case(post(TE, body=b"2\r\n{ }\r\n0\r\n\r\n" + HIDDEN)),
    "bare line feeds in chunks": Case(post(TE, body=b"2\n{}\n0\n\n" + HIDDEN), 0, 0, 2, 1, may_be_refused=True),
    "bare line feeds": Case(get().replace(b"\r\n", b"\n"), 0, 0, 1),
    "line feed that ends the head early": Case(get(b"X: y\n\n" + HIDDEN), 0, 0, 2, 1),
    "folded header": Case(get(b"X: y\r\n Transfer-Encoding: chunked", body=HIDDEN)),
    "folded encoding": Case(post(b"Transfer-Encoding:\r\n chunked", body=chunked() + HIDDEN)),
    "NUL in a value": Case(get(b"X: y\0z")),
    "carriage return in a value": Case(get(b"X: y\rTransfer-Encoding: chunked")),
    "two hosts": Case(get(b"Host: elsewhere")),
    "no host": Case(get().replace(b"Host: localhost\r\n", b"")),
    "host that is none": Case(get().replace(b"Host: localhost", b"Host: local/host"), 1, 0, 0),
    "HTTP/0.9": Case(b"GET /health\r\n", 0, 0, 1),
    "HTTP/1.2": Case(get(first=b"GET /v1/models HTTP/1.2"), 0, 0, 1),
    "HTTP/2.0": Case(get(first=b"GET /v1/models HTTP/2.0")),
    "beginning of HTTP/2": Case(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"),
    "change to HTTP/2": Case(
        get(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"), 1
    ),
    "two request lines": Case(get(first=b"GET /v1/models HTTP/1.1\r\nGET /v1/models HTTP/1.1")),
    "two targets": Case(get(first=b"GET /v1/models /metrics HTTP/1.1")),
    "target with a host": Case(get(first=b"GET http://elsewhere/v1/models HTTP/1.1"), 1),
    "tunnel": Case(get(first=b"CONNECT localhost:80 HTTP/1.1"), 1, 0, 0),
    "1,000 in a row": Case(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1_000, 1_000),
    "two messages in a row": Case(post(b"Content-Length: " + SIZE, body=OPEN) + HIDDEN, 2, 2),
    "half a body": Case(post(b"Content-Length: 5000", body=HIDDEN), 1, 0),
    "body of a request that has none": Case(
        get(b"Content-Length: %d" % len(HIDDEN), b"Content-Type: application/json", body=HIDDEN), 1
    ),
    "trailer": Case(post(TE, body=chunked(OPEN, end=b"0\r\nX-Api-Key: y\r\n\r\n")), 1, 1),
    "length in a trailer": Case(post(TE, body=chunked(OPEN, end=b"0\r\nContent-Length: 5\r\n\r\n")), 0, 0, 1, 1),
    "length that the connection claims": Case(
        post(b"Connection: Content-Length", b"Content-Length: " + SIZE, body=OPEN), 1, 1
    ),
    "expectation": Case(post(b"Expect: 100-continue", b"Content-Length: " + SIZE, body=OPEN), 1, 1),
}


class Counted:
    """A gateway, the nginx before it, and what has come of requests so far."""

    def __init__(self, gateway: Running, nginx: Nginx, logs: RecordedLogs) -> None:
        self.gateway = gateway
        self.nginx = nginx
        self.logs = logs

    @property
    def seen(self) -> int:
        """Return how many requests got past the gateway's parser."""
        return len(self.logs.requests)

    @property
    def heard(self) -> list[str]:
        """Return what the agent was told."""
        said = [said for turn in self.gateway.backend.turns for said in turn.sent.news if isinstance(said, UserSaid)]
        return [part.text for one in said for part in one.content if isinstance(part, Text)]


@pytest_asyncio.fixture
async def counted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Counted]:
    usual = settings(api_keys=(API_KEY,), trusted_networks=(f"{PROXY}/32",), rate_limit="100000/minute")
    with recorded_logs() as logs:
        async with serving(usual) as gateway, nginx(tmp_path_factory.mktemp("nginx"), gateway.port) as running:
            yield Counted(gateway, running, logs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_sent_to_the_gateway(counted: Counted, case: Case) -> None:
    async with counted.gateway.connect() as client:
        answers = await everything(client, case.sent)
    await settled(counted)
    assert (counted.seen, len(counted.heard)) == (case.seen, case.heard), answers[:200]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_sent_through_nginx(counted: Counted, case: Case) -> None:
    async with counted.nginx.connect() as client:
        answers = await everything(client, case.sent)
    await settled(counted)
    seen = case.seen if case.seen_through is None else case.seen_through
    heard = case.heard if case.heard_through is None else case.heard_through
    expected = {(seen, heard), (0, 0)} if case.may_be_refused else {(seen, heard)}
    assert (counted.seen, len(counted.heard)) in expected, answers[:200]
    handed_on = [line for line in counted.nginx.requests if line["gateway"]]
    assert len(handed_on) == counted.seen, "the gateway reads as many requests as nginx writes"
    for number in range(4):  # nothing is left in a connection that nginx keeps: each answer is that of its request
        probe = await counted.nginx.ask("GET", "/v1/models", {**KEY, "X-Request-Id": f"probe-{number}"})
        assert (probe.status, probe.header("x-request-id")) == (200, f"probe-{number}")


async def everything(client: Connection, sent: bytes) -> bytes:
    """Send bytes, and read until the other side closes or falls silent."""
    answers = b""
    with contextlib.suppress(ConnectionError, TimeoutError):
        client.writer.write(sent)
        while True:
            async with asyncio.timeout(QUIET):
                piece = await client.reader.read(65_536)
            if not piece:
                break
            answers += piece
    return answers


async def settled(counted: Counted) -> None:
    """Wait until no request is under way."""
    for _ in range(200):
        if not counted.gateway.app[keys.DRAIN].requests:
            break
        await asyncio.sleep(0.01)
