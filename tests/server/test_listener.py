import asyncio
import contextlib
import socket
from typing import Final

import pytest
from aiohttp import web

from gateway import keys
from gateway.letta.scripted import Hang, Script, ScriptedBackend
from gateway.server import listener
from gateway.server.app import build_app
from gateway.server.listener import RETIRING, SEND_BUFFER, Crowd, Listener, bind, turn_away
from gateway.storage.engine import Database
from gateway.tasks import TaskSet
from gateway.translation.agent_events import TextDelta
from tests.live.processes import free_port
from tests.server.recorded_logs import recorded_logs
from tests.server.running import FRIEND, JSON, Running, chat_request, serving, settings
from tests.server.wire import Connection, ask, connect, request
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


async def test_half_a_head_is_ended_though_bytes_drip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HEAD", 0.5)
    async with serving() as gateway, gateway.connect() as connection:
        await connection.send(b"GET /health")
        begun = asyncio.get_running_loop().time()
        answering = asyncio.get_running_loop().create_task(connection.answer())
        while not answering.done():
            with contextlib.suppress(ConnectionError):
                await connection.send(b"x")
            await asyncio.sleep(0.1)
        answer = await answering
        assert 0.4 < asyncio.get_running_loop().time() - begun < 3
        assert (answer.status, answer.code, answer.header("connection")) == (408, "request_timeout", "close")
        assert await connection.closed()
        assert "letta_gateway_rejected_heads_total 1.0" in gateway.exposed()


async def test_half_a_head_after_a_request_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HEAD", 0.3)
    async with serving() as gateway, gateway.connect() as connection:
        await connection.send(request("GET", "/health"))
        assert (await connection.answer()).status == 200
        await asyncio.sleep(0.5)
        await connection.send(b"GET /health HT")
        assert (await connection.answer()).status == 408


async def test_head_that_comes_in_pieces_is_answered_and_its_connection_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HEAD", 0.5)
    whole = request("GET", "/health")
    async with serving() as gateway, gateway.connect() as connection:
        await connection.send(b"\r\n")
        await asyncio.sleep(0.7)
        for _ in range(2):
            for piece in (whole[:5], whole[5:20], whole[20:]):
                await connection.send(piece)
                await asyncio.sleep(0.1)
            assert (await connection.answer()).status == 200
            await asyncio.sleep(0.7)


async def test_body_that_takes_longer_than_a_head_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HEAD", 0.3)
    whole = chat_request()
    async with serving() as gateway, gateway.connect() as connection:
        await connection.send(whole[:-5])
        for byte in whole[-5:]:
            await asyncio.sleep(0.15)
            await connection.send(bytes([byte]))
        assert (await connection.answer()).status == 200


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


# A port that is shared -----------------------------------------------------------------------------------------------


def knock(port: int, times: int) -> list[socket.socket]:
    """Begin connections without waiting for them."""
    knocking = [socket.socket() for _ in range(times)]
    for each in knocking:
        each.setblocking(False)  # noqa: FBT003
        with contextlib.suppress(BlockingIOError):
            each.connect(("127.0.0.1", port))
    return knocking


def accepted(listening: socket.socket) -> list[socket.socket]:
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(listening.accept()[0])
    return found


async def test_newcomers_that_are_turned_away_come_to_the_other() -> None:
    """And those that were there before are not lost: from outside none of this shows, but for a second's wait."""
    staying = bind("127.0.0.1", 0, shared=True)
    port = staying.getsockname()[1]
    with staying, bind("127.0.0.1", port, shared=True) as leaving:
        staying.listen(100)
        leaving.listen(100)
        early = knock(port, 40)
        await asyncio.sleep(0.05)
        turn_away(leaving)
        late = knock(port, 40)
        await asyncio.sleep(0.2)
        before = [*accepted(leaving), *accepted(staying)]
        assert len(before) < 80
        leaving.close()
        await asyncio.sleep(1.2)
        after = accepted(staying)
        assert {len(each.getpeername()) for each in [*early, *late]} == {2}, "all are connected"
        peers = {each.getpeername() for each in [*before, *after]}
    assert peers == {each.getsockname() for each in [*early, *late]}
    for each in (*early, *late, *before, *after):
        each.close()


async def test_gateway_that_leaves_a_shared_port_hears_nobody_new_and_answers_who_is_there() -> None:
    port = free_port()
    async with late_database() as database, contextlib.AsyncExitStack() as stack:
        leaving, staying = [await listening_too(port, database) for _ in range(2)]
        try:
            early = [await stack.enter_async_context(connect(port)) for _ in range(20)]
            await asyncio.sleep(0.02)
            there = len(leaving._crowd)
            assert 0 < there < 20
            retiring = asyncio.get_running_loop().create_task(leaving.retire())
            await asyncio.sleep(0)
            late = knock(port, 40)
            await asyncio.sleep(RETIRING / 2)
            assert len(leaving._crowd) == there
            await retiring
            async with asyncio.timeout(5):
                while len(staying._crowd) < 60 - there:  # noqa: ASYNC110 - seen from outside
                    await asyncio.sleep(0.01)
            for client in early:
                await client.send(request("GET", "/health"))
                assert (await client.answer()).status == 200
            for each in late:
                each.close()
        finally:
            await leaving.stop()
            await staying.stop()


async def test_shared_port_and_the_own_one() -> None:
    port = free_port()
    async with late_database() as database:
        first, second = [await listening_too(port, database) for _ in range(2)]
        try:
            for where in (first.port, second.port, port):
                assert (await ask(where, "GET", "/health")).status == 200
            assert len({first.port, second.port, port}) == 3
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(40):
                    await stack.enter_async_context(connect(port))
                await asyncio.sleep(0.02)
                assert len(first._crowd) > 5
                assert len(second._crowd) > 5
                assert len(first._crowd) + len(second._crowd) == 40
            await first.retire()
            assert (await ask(first.port, "GET", "/health")).status == 200, "its own port stays open"
        finally:
            await first.stop()
            await second.stop()


async def test_another_application_takes_over_at_the_same_ports() -> None:
    """Nobody is turned away, and the shared port is opened by the second one alone."""
    port = free_port()

    async def answer(request: web.Request) -> web.Response:
        _ = request
        return web.Response(status=503)

    async with late_database() as database:
        app = build_app(settings(), database, backend=ScriptedBackend([FRIEND]))
        first = web.Application()
        first[keys.METRICS] = app[keys.METRICS]
        first.router.add_get("/health", answer)
        ended = []

        async def end(app: web.Application) -> None:
            ended.append(app)

        first.on_cleanup.append(end)
        listener = Listener(first, "127.0.0.1", 0, shared_port=port)
        try:
            await listener.start_alone()
            own, statuses = listener.port, []
            with pytest.raises(OSError, match="Connect call failed"):
                await ask(port, "GET", "/health")
            async with connect(own) as early:
                await early.send(request("GET", "/health"))
                assert (await early.answer()).status == 503
                taking = TaskSet().spawn(listener.hand_over(app), "take over")
                for _ in range(20):
                    statuses.append((await ask(own, "GET", "/health")).status)
                    await asyncio.sleep(0.05)
                await early.send(request("GET", "/health"))
                assert (await early.answer()).status == 503, "by the one that took its connection"
            await taking
            assert set(statuses) <= {200, 503}
            assert (ended, listener.port) == ([first], own)
            for where in (own, port):
                assert (await ask(where, "GET", "/health")).status == 200
        finally:
            await listener.stop()


async def test_application_that_does_not_start_takes_nothing_over() -> None:
    async def fail(app: web.Application) -> None:
        _ = app
        raise KeyError("start")

    async with late_database() as database:
        first = build_app(settings(), database, backend=ScriptedBackend([FRIEND]))
        second = web.Application()
        second.on_startup.append(fail)
        listener = Listener(first, "127.0.0.1", 0)
        try:
            await listener.start()
            with pytest.raises(KeyError, match="start"):
                await listener.hand_over(second)
            assert (await ask(listener.port, "GET", "/health")).status == 200
        finally:
            await listener.stop()


async def test_shared_port_that_another_program_has() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with late_database() as database:
            listener = new_listener(port, database)
            with pytest.raises(OSError, match="in use"):
                await listener.start()
            assert listener.address == f"127.0.0.1:{port}"
            await listener.stop()


async def test_port_on_which_no_filter_is_allowed_is_closed_all_the_same() -> None:
    async with serving() as gateway, gateway.connect() as kept:
        await kept.send(request("GET", "/health"))
        assert (await kept.answer()).status == 200
        assert gateway.listener._own is not None
        listening = gateway.listener._own[0]
        turn_away(listening)
        listening.setsockopt(socket.SOL_SOCKET, 44, 1)  # SO_LOCK_FILTER: another filter is EPERM from now on
        with recorded_logs() as logs:
            await gateway.listener.shut()
        assert [line["event"] for line in logs.lines if line["level"] == "warning"] == [
            "newcomers cannot be turned away unheard"
        ]
        await kept.send(request("GET", "/health"))
        assert (await kept.answer()).status == 200
        with pytest.raises(ConnectionRefusedError):
            await gateway.ask("GET", "/health")


async def test_port_that_nobody_shares_is_left_at_once() -> None:
    async with serving() as gateway:
        started = asyncio.get_running_loop().time()
        await gateway.listener.retire()
        assert asyncio.get_running_loop().time() - started < 0.1
        assert (await gateway.ask("GET", "/health")).status == 200


def new_listener(shared_port: int, database: Database) -> Listener:
    return Listener(
        build_app(settings(), database, backend=ScriptedBackend([FRIEND])), "127.0.0.1", 0, shared_port=shared_port
    )


async def listening_too(shared_port: int, database: Database) -> Listener:
    listener = new_listener(shared_port, database)
    await listener.start()
    return listener


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


# Crowds --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 300_000], ids=["small", "large"])
async def test_crowd_that_comes_at_once_is_answered_as_one_alone(size: int) -> None:
    """In pieces of any size, two requests on each connection, some of which are given up in the midst."""
    sent = chat_request("word " * (size // 5))

    async def ask_twice(gateway: Running, number: int) -> list[int]:
        async with gateway.connect() as connection:
            for start in range(0, len(sent), len(sent) // (1 + number % 5) + 1):
                await connection.send(sent[start : start + len(sent) // (1 + number % 5) + 1])
            if number % 10 == 9:
                return []
            first = await connection.answer("POST")
            await connection.send(sent)
            return [first.status, (await connection.answer("POST")).status]

    async with serving(settings(queue_depth=1_000, rate_limit="100000/minute")) as gateway:
        statuses = await asyncio.gather(*(ask_twice(gateway, number) for number in range(60)))
    assert [one for one in statuses if one] == [[200, 200]] * 54


async def test_requests_that_come_in_one_piece_are_answered_in_order() -> None:
    paths = ["/health", "/none", "/v1/models", "/health"]
    async with serving() as gateway, contextlib.AsyncExitStack() as stack:
        crowd = [await stack.enter_async_context(gateway.connect()) for _ in range(30)]
        for connection in crowd:
            await connection.send(b"".join(request("GET", path) for path in paths))
        answered = [[(await connection.answer()).status for _ in paths] for connection in crowd]
    assert answered == [[200, 404, 200, 200]] * 30
