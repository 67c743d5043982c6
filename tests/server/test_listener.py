import asyncio
import socket
from typing import Final

import pytest
from aiohttp import web

from gateway import keys
from gateway.letta.scripted import Hang, Script, ScriptedBackend
from gateway.server.app import build_app
from gateway.server.listener import SEND_BUFFER, Crowd, Listener, bind
from gateway.translation.agent_events import TextDelta
from tests.server.recorded_logs import recorded_logs
from tests.server.running import FRIEND, JSON, Running, chat_request, serving, settings
from tests.server.wire import Connection, connect, request
from tests.storage.late import LateDatabase, late_database

CANARY: Final = "sk-canary-7f3a"
TOKEN: Final = f"Authorization: Bearer {CANARY}".encode()
HOST: Final = b"\r\nHost: localhost\r\n"
POST: Final = b"POST /v1/chat/completions HTTP/1.1" + HOST + b"Content-Type: application/json\r\n"

MALFORMED: Final = {
    "nul in a header": b"GET / HTTP/1.1" + HOST + TOKEN + b"\0\r\n\r\n",
    "carriage return in a header": b"GET / HTTP/1.1" + HOST + TOKEN + b"\rx: y\r\n\r\n",
    "blank before the colon": b"GET / HTTP/1.1" + HOST + b"Authorization : Bearer " + CANARY.encode() + b"\r\n\r\n",
    "folded header": b"GET / HTTP/1.1" + HOST + b"Authorization: Bearer\r\n " + CANARY.encode() + b"\0\r\n\r\n",
    "no colon": b"GET / HTTP/1.1" + HOST + b"Bearer " + CANARY.encode() + b"\r\n\r\n",
    "header of 9 KiB": b"GET / HTTP/1.1" + HOST + TOKEN + b"x" * 9_000 + b"\r\n\r\n",
    "header name of 9 KiB": b"GET / HTTP/1.1" + HOST + CANARY.encode() + b"x" * 9_000 + b": y\r\n\r\n",
    "cookie of a megabyte": b"GET / HTTP/1.1" + HOST + b"Cookie: " + CANARY.encode() * 70_000 + b"\r\n\r\n",
    "200 headers": b"GET / HTTP/1.1" + HOST + TOKEN + b"\r\nX: y" * 200 + b"\r\n\r\n",
    "URL of 100 kB": b"GET /" + CANARY.encode() + b"x" * 100_000 + b" HTTP/1.1" + HOST + b"\r\n",
    "raw bytes in the URL": b"GET /" + CANARY.encode() + b"\xff\xfe HTTP/1.1" + HOST + b"\r\n",
    "control character in the URL": b"GET /" + CANARY.encode() + b"\x01 HTTP/1.1" + HOST + b"\r\n",
    "URL that is none": b"GET http://[" + CANARY.encode() + b"/ HTTP/1.1" + HOST + b"\r\n",
    "method that is none": CANARY.upper().encode() + b" / HTTP/1.1" + HOST + b"\r\n",
    "version that is none": b"GET / HTTP/" + CANARY.encode() + HOST + b"\r\n",
    "TLS on a plain port": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + CANARY.encode() + b"\r\n\r\n",
    "two lengths": POST + TOKEN + b"\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n{}  ",
    "length and chunks": POST + TOKEN + b"\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "signed length": POST + TOKEN + b"\r\nContent-Length: +5\r\n\r\n{}   ",
    "unknown transfer encoding": POST + TOKEN + b"\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunk size that is none": POST + TOKEN + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + CANARY.encode() + b"\r\n",
    "two hosts": b"GET / HTTP/1.1" + HOST + b"Host: " + CANARY.encode() + b"\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n" + TOKEN + b"\r\n\r\n",
    "unknown expectation": b"GET /v1/models HTTP/1.1" + HOST + b"Expect: " + CANARY.encode() + b"\r\n\r\n",
    "unknown expectation on no path": b"GET /none HTTP/1.1" + HOST + b"Expect: " + CANARY.encode() + b"\r\n\r\n",
}


@pytest.mark.parametrize("sent", MALFORMED.values(), ids=MALFORMED.keys())
async def test_malformed_request_tells_nothing_it_held(sent: bytes) -> None:
    with recorded_logs() as logs:
        async with serving() as gateway, gateway.connect() as connection:
            await connection.send(sent)
            answer = await connection.answer()
            assert await connection.closed()
            exposed = gateway.exposed()
        lines = logs.lines
    assert answer.status in (400, 417)
    assert answer.code == "malformed_request"
    assert answer.header("x-content-type-options") == "nosniff"
    assert not answer.header("server")
    assert lines[-1]["event"] == "request refused by the server"
    assert len([line for line in lines if line["level"] != "debug"]) == 1
    for said in (str(answer.headers), answer.body.decode(), logs.text, exposed):
        assert CANARY not in said.lower()
    assert "letta_gateway_rejected_heads_total 1.0" in exposed


async def test_expectation_of_http() -> None:
    async with serving() as gateway, gateway.connect() as connection:
        body = chat_request().split(b"\r\n\r\n", 1)[1]
        head = request(
            "POST", "/v1/chat/completions", {**JSON, "Expect": "100-continue", "Content-Length": str(len(body))}
        )
        await connection.send(head)
        assert (await connection.head()).status == 100
        await connection.send(body)
        assert (await connection.answer()).status == 200


async def test_bug_in_the_server_itself() -> None:
    """Where not even the error boundary answers."""

    async def fail(request: web.Request) -> web.Response:
        raise RuntimeError(CANARY)

    app = web.Application()
    async with serving() as gateway:
        app[keys.METRICS] = gateway.metrics
    app.router.add_get("/", fail)
    listener = Listener(app, "127.0.0.1", 0)
    await listener.start()
    try:
        with recorded_logs() as logs:
            async with connect(listener.port) as connection:
                await connection.send(request("GET", "/"))
                answer = await connection.answer()
    finally:
        await listener.stop()
    assert (answer.status, answer.code) == (500, "internal_error")
    assert CANARY not in answer.body.decode()
    assert "RuntimeError" in logs.text  # whoever is paged needs the traceback


async def test_bug_after_the_first_byte_cuts_the_answer_off() -> None:
    async def fail(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half of it")
        raise RuntimeError(CANARY)

    app = web.Application()
    async with serving() as gateway:
        app[keys.METRICS] = gateway.metrics
    app.router.add_get("/", fail)
    listener = Listener(app, "127.0.0.1", 0)
    await listener.start()
    try:
        async with connect(listener.port) as connection:
            await connection.send(request("GET", "/"))
            answer = await connection.answer()
    finally:
        await listener.stop()
    assert answer.status == 200
    assert not answer.complete


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with serving() as gateway, gateway.connect() as connection:
        for path in ("/health", "/v1/nothing", "/v1/models"):
            connection.writer.write(request("GET", path))
        assert [(await connection.answer()).status for _ in range(3)] == [200, 404, 200]


# Addresses -----------------------------------------------------------------------------------------------------------


def test_small_send_buffer_is_inherited() -> None:
    listening = bind("127.0.0.1", 0)
    listening.listen()
    listening.setblocking(True)  # noqa: FBT003
    with listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * SEND_BUFFER  # Linux doubles it


def test_address_in_use() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(OSError, match="in use"):
            bind("127.0.0.1", first.getsockname()[1])


def test_host_that_is_none() -> None:
    with pytest.raises(OSError):  # noqa: PT011 - whatever the resolver says
        bind("no-such-host.invalid", 0)


async def test_ipv6() -> None:
    try:
        bind("::1", 0).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    async with serving(host="::1") as gateway:
        assert (await gateway.ask("GET", "/health", {"Host": f"[::1]:{gateway.port}"})).status == 200


async def test_stopped_before_it_was_started() -> None:
    await Listener(build_app(settings(), LateDatabase(), backend=ScriptedBackend()), "127.0.0.1", 0).stop()


async def test_start_on_an_address_that_is_taken_can_be_stopped() -> None:
    async with serving() as first, late_database() as database:
        second = Listener(build_app(settings(), database, backend=ScriptedBackend()), "127.0.0.1", first.port)
        with pytest.raises(OSError, match="in use"):
            await second.start()
        await second.stop()


async def test_stop_ends_what_is_open() -> None:
    backend = ScriptedBackend([FRIEND])
    backend.play(Script(([TextDelta("Hel")], Hang())))
    async with serving(backend=backend) as gateway:
        idle = Connection(*await asyncio.open_connection("127.0.0.1", gateway.port))
        busy = Connection(*await asyncio.open_connection("127.0.0.1", gateway.port))
        await busy.send(chat_request(stream=True))
        await busy.head()
        started = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - started < 6
    assert await idle.closed()
    assert await busy.closed()
    await idle.close()
    await busy.close()
    assert backend.closed


# The bound on connections --------------------------------------------------------------------------------------------


class Bounded(Running):
    """A gateway with room for four connections."""

    async def stop(self) -> None:
        """Stop it, and close its database."""
        await self.listener.stop()
        await self.app[keys.DATABASE].close()


async def bounded(most: int = 4) -> Bounded:
    backend = ScriptedBackend([FRIEND], usual=Script((Hang(),)))
    app = build_app(settings(), LateDatabase(), backend=backend)
    listener = Listener(app, "127.0.0.1", 0, most=most)
    await listener.start()
    return Bounded(app, backend, listener, "127.0.0.1")


async def opened(gateway: Running, data: bytes = b"") -> Connection:
    connection = Connection(*await asyncio.open_connection("127.0.0.1", gateway.port))
    await connection.send(data)
    await asyncio.sleep(0.005)
    return connection


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: local", b"POST"])
async def test_idle_connections_make_room(sent: bytes) -> None:
    """Those that never sent a whole head among them: nobody starves the gateway by holding connections."""
    gateway = await bounded()
    try:
        idle = [await opened(gateway, sent) for _ in range(8)]
        assert (await gateway.ask("GET", "/health")).status == 200
        assert all([await connection.closed() for connection in idle[:4]])
    finally:
        await gateway.stop()
    for connection in idle:
        await connection.close()


async def test_the_one_that_has_been_idle_longest_makes_room() -> None:
    gateway = await bounded()
    try:
        first, *others = [await opened(gateway) for _ in range(4)]
        await first.send(request("GET", "/health"))
        assert (await first.answer()).status == 200
        assert (await gateway.ask("GET", "/health")).status == 200
        assert await others[0].closed()
        await first.send(request("GET", "/health"))
        assert (await first.answer()).status == 200, "it was answered last, so it stays"
    finally:
        await gateway.stop()
    for connection in (first, *others):
        await connection.close()


async def test_connections_that_are_being_answered_keep_their_place() -> None:
    gateway = await bounded()
    try:
        busy = [await opened(gateway, chat_request(stream=True, model=FRIEND.id)) for _ in range(4)]
        answer = await gateway.ask("GET", "/health")
        assert (answer.status, answer.code) == (503, "overloaded")
        assert answer.header("retry-after") == "2"
        assert answer.header("x-should-retry") == "true"
        assert answer.header("connection") == "close"
        busy[0].abort()
        await asyncio.sleep(0.02)
        assert (await gateway.ask("GET", "/health")).status == 200
        for connection in busy:
            connection.abort()
        await asyncio.sleep(0.05)
    finally:
        await gateway.stop()
    for connection in busy:
        await connection.close()


async def test_crowd_forgets_who_left() -> None:
    async with serving() as gateway:
        crowd = gateway.listener._crowd
        assert isinstance(crowd, Crowd)
        for _ in range(20):
            await gateway.ask("GET", "/health")
        await asyncio.sleep(0.02)
        assert len(crowd) == 0
