import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing

import aiohttp
import msgspec
import pytest

from gateway.errors import UpstreamTimeout, UpstreamUnavailable
from gateway.letta import app_server_wire as wire
from gateway.letta.app_server_socket import Socket, new_request_id
from gateway.letta.app_server_wire import Incoming, Runtime, ServerInfo
from gateway.metrics import Metrics
from tests.letta.fake_app_server import (
    AGENT,
    SOON,
    Answer,
    FakeAppServer,
    close,
    cut_off,
    event,
    garbage,
    hang,
    nothing_leaks,
    raw,
    replies,
    script,
    until,
    wait,
)

HERE = Runtime(AGENT, "default")
ELSEWHERE = Runtime(AGENT, "local-conv-1")


class Ear:
    """A ``Listener`` that writes down what it hears."""

    def __init__(self) -> None:
        self.frames: list[Incoming] = []
        self.sizes: list[int] = []
        self.losses = 0

    @property
    def kinds(self) -> list[str]:
        return [frame.type for frame in self.frames]

    def heard(self, frame: Incoming, size: int) -> None:
        self.frames.append(frame)
        self.sizes.append(size)

    def lost(self) -> None:
        self.losses += 1


def decoded(body: bytes) -> wire.Reply:
    return msgspec.json.decode(body, type=wire.Reply)


def question() -> ServerInfo:
    return ServerInfo(request_id=new_request_id())


def abort(runtime: Runtime) -> wire.Abort:
    return wire.Abort(request_id=new_request_id(), runtime=runtime)


@pytest.fixture(autouse=True)
async def clean() -> AsyncIterator[None]:
    async with nothing_leaks():
        yield


@pytest.fixture
async def server() -> AsyncIterator[FakeAppServer]:
    async with FakeAppServer() as server:
        yield server


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
async def socket(server: FakeAppServer, metrics: Metrics) -> AsyncIterator[Socket]:
    async with aiohttp.ClientSession() as session:
        socket = Socket(await session.ws_connect(f"{server.url}/ws"), metrics)
        reader = asyncio.get_running_loop().create_task(socket.read())
        yield socket
        await socket.close()
        async with asyncio.timeout(SOON):
            await reader
        assert socket.is_lost


def skipped(metrics: Metrics) -> float:
    return float(metrics.skipped_frames._value.get())


async def lose(server: FakeAppServer, socket: Socket) -> None:
    """Break the socket, and wait until that is noticed."""
    server.cut()
    await until(lambda: socket.is_lost)


# Requests ------------------------------------------------------------------------------------------------------------


async def test_reply_is_given_to_who_asked(server: FakeAppServer, socket: Socket) -> None:
    reply = decoded(await socket.ask(question(), SOON))
    assert reply.success
    assert [command["type"] for command in server.commands] == ["app_server_info"]


async def test_replies_that_come_out_of_order(server: FakeAppServer, socket: Socket) -> None:
    late = asyncio.Event()
    server.on("app_server_info", script(wait(late), replies(error="late")), replies(error="early"))
    first = asyncio.get_running_loop().create_task(socket.ask(question(), SOON))
    await until(lambda: server.commands)
    assert decoded(await socket.ask(question(), SOON)).error == "early"
    late.set()
    assert decoded(await first).error == "late"


async def test_reply_that_comes_twice(server: FakeAppServer, socket: Socket) -> None:
    server.on("app_server_info", script(replies(error="first"), replies(error="second")), replies(error="third"))
    assert decoded(await socket.ask(question(), SOON)).error == "first"
    assert decoded(await socket.ask(question(), SOON)).error == "third"


async def test_reply_that_comes_twice_at_once(server: FakeAppServer, socket: Socket) -> None:
    server.on("app_server_info", hang)
    command = question()
    asked = asyncio.get_running_loop().create_task(socket.ask(command, SOON))
    await until(lambda: command.request_id in socket._replies)
    for error in (b"first", b"second"):
        socket._route(b'{"type":"x_response","request_id":"%s","error":"%s"}' % (command.request_id.encode(), error))
    assert decoded(await asked).error == "first"


async def test_reply_that_never_comes(server: FakeAppServer, socket: Socket) -> None:
    server.on("app_server_info", hang, replies())
    with pytest.raises(UpstreamTimeout) as raised:
        await socket.ask(question(), 0.05)
    assert raised.value.should_retry is False
    assert await socket.ask(question(), SOON)


async def test_reply_that_nobody_waits_for_any_more(server: FakeAppServer, socket: Socket, metrics: Metrics) -> None:
    late = asyncio.Event()
    server.on("app_server_info", script(wait(late), replies(error="late")), replies(error="early"))
    with pytest.raises(UpstreamTimeout):
        await socket.ask(question(), 0.05)
    late.set()
    assert decoded(await socket.ask(question(), SOON)).error == "early"
    assert skipped(metrics) == 0


async def test_request_that_is_given_up(server: FakeAppServer, socket: Socket) -> None:
    server.on("app_server_info", hang, replies())
    asked = asyncio.get_running_loop().create_task(socket.ask(question(), SOON))
    await until(lambda: server.commands)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert not socket._replies
    assert await socket.ask(question(), SOON)


async def test_many_requests_at_once(server: FakeAppServer, socket: Socket) -> None:
    bodies = await asyncio.gather(*(socket.ask(question(), SOON) for _ in range(200)))
    assert len({wire.decode_incoming(body).request_id for body in bodies}) == 200


def test_request_ids_are_never_the_same() -> None:
    assert len({new_request_id() for _ in range(100)}) == 100


def test_request_ids_of_another_process_are_others() -> None:
    """The server drops an input whose id it has seen, and says that it started it: a restart may repeat none."""
    ask = "from gateway.letta.app_server_socket import new_request_id; print(new_request_id())"
    made = {subprocess.check_output([sys.executable, "-c", ask], text=True) for _ in range(2)}
    assert len(made) == 2


# Events --------------------------------------------------------------------------------------------------------------


async def test_events_are_given_to_the_conversation_they_belong_to(server: FakeAppServer, socket: Socket) -> None:
    here, elsewhere = Ear(), Ear()
    socket.hear(HERE, here)
    socket.hear(ELSEWHERE, elsewhere)
    server.on("abort_message", script(event("one"), event("two"), replies(runtime={})))
    server.on("abort_message", script(event("one", note="ä" * 10), event("two"), replies()))
    await socket.ask(abort(HERE), SOON)
    assert (here.kinds, elsewhere.kinds) == (["one", "two"], [])
    assert here.sizes[0] > here.sizes[1]
    await socket.ask(abort(ELSEWHERE), SOON)
    assert (here.kinds, elsewhere.kinds) == (["one", "two"], ["one", "two"])


async def test_reply_that_is_an_event_too(server: FakeAppServer, socket: Socket) -> None:
    ear = Ear()
    socket.hear(HERE, ear)
    await socket.ask(abort(HERE), SOON)
    assert ear.kinds == ["abort_message_response"]


async def test_events_that_nobody_hears(server: FakeAppServer, socket: Socket, metrics: Metrics) -> None:
    ear, successor = Ear(), Ear()
    server.on("abort_message", script(event("one"), replies()))
    socket.hear(HERE, ear)
    socket.hear(HERE, successor)
    socket.forget(HERE, ear)
    await socket.ask(abort(HERE), SOON)
    assert (ear.kinds, successor.kinds) == ([], ["one"])
    socket.forget(HERE, successor)
    socket.forget(HERE, successor)
    await socket.ask(abort(HERE), SOON)
    assert (ear.kinds, successor.kinds) == ([], ["one"])
    assert skipped(metrics) == 0


@pytest.mark.parametrize("junk", ["", "nonsense", "[1]", '{"type":7}', b"\xff\xfe", "[" * 5_000])
async def test_junk_is_counted_and_forgotten(
    server: FakeAppServer, socket: Socket, metrics: Metrics, junk: str | bytes
) -> None:
    server.on("app_server_info", script(raw(junk), replies()))
    assert await socket.ask(question(), SOON)
    assert skipped(metrics) == 1


@pytest.mark.parametrize("odd", ["{}", '{"type":"novelty","x":[1]}', '{"type":"x","request_id":"nobody-1"}', b"{}"])
async def test_frames_of_unknown_kinds_are_nobodys(
    server: FakeAppServer, socket: Socket, metrics: Metrics, odd: str | bytes
) -> None:
    ear = Ear()
    socket.hear(HERE, ear)
    server.on("app_server_info", script(raw(odd), replies()))
    assert await socket.ask(question(), SOON)
    assert (ear.frames, skipped(metrics)) == ([], 0)


# The end -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [close, cut_off])
async def test_who_waits_learns_that_the_socket_is_lost(server: FakeAppServer, socket: Socket, ending: Answer) -> None:
    ears = [Ear(), Ear()]
    for ear, runtime in zip(ears, (HERE, ELSEWHERE), strict=True):
        socket.hear(runtime, ear)
    server.on("app_server_info", hang)
    server.on("list_models", ending)
    asked = [asyncio.get_running_loop().create_task(socket.ask(question(), SOON)) for _ in range(2)]
    await until(lambda: len(server.commands) == 2)
    with pytest.raises(UpstreamUnavailable) as raised:
        await socket.ask(wire.ListModels(request_id=new_request_id()), SOON)
    assert raised.value.should_retry is False
    for each in asked:
        with pytest.raises(UpstreamUnavailable):
            await each
    assert [ear.losses for ear in ears] == [1, 1]
    assert socket.is_lost


async def test_nothing_is_sent_on_a_lost_socket(server: FakeAppServer, socket: Socket) -> None:
    await lose(server, socket)
    with pytest.raises(UpstreamUnavailable):
        await socket.send(question())
    with pytest.raises(UpstreamUnavailable):
        await socket.ask(question(), SOON)
    assert server.commands == []


async def test_send_that_fails(server: FakeAppServer, socket: Socket) -> None:
    transport = socket._ws._writer.transport
    transport.abort()
    assert not socket.is_lost
    with pytest.raises(UpstreamUnavailable) as raised:
        await socket.send(question())
    assert isinstance(raised.value.__cause__, aiohttp.ClientError)


@pytest.mark.parametrize("ending", [close, cut_off])
async def test_request_that_is_answered_as_the_socket_is_lost(
    server: FakeAppServer, socket: Socket, ending: Answer
) -> None:
    server.on("app_server_info", script(replies(), ending))
    assert await socket.ask(question(), SOON)


async def test_server_that_breaks_the_protocol(server: FakeAppServer, socket: Socket) -> None:
    server.on("app_server_info", garbage)
    with pytest.raises(UpstreamUnavailable):
        await socket.ask(question(), SOON)
    assert socket.is_lost


async def test_server_that_answers_no_heartbeat(server: FakeAppServer) -> None:
    server.on("app_server_info", hang)
    async with aiohttp.ClientSession() as session:
        socket = Socket(await session.ws_connect(f"{server.url}/ws", heartbeat=0.2), Metrics())
        reader = asyncio.get_running_loop().create_task(socket.read())
        await until(lambda: server.open)
        server.freeze()
        with pytest.raises(UpstreamUnavailable):
            await socket.ask(question(), SOON)
        await reader


async def test_close_ends_the_reader_and_what_waits(server: FakeAppServer, socket: Socket) -> None:
    ear = Ear()
    socket.hear(HERE, ear)
    server.on("app_server_info", hang)
    asked = asyncio.get_running_loop().create_task(socket.ask(question(), SOON))
    await until(lambda: server.commands)
    await socket.close()
    with pytest.raises(UpstreamUnavailable):
        await asked
    assert (ear.losses, socket.is_lost) == (1, True)
    await until(lambda: not server.open)


# Replies in pages ----------------------------------------------------------------------------------------------------


async def test_pages_are_given_until_enough_are_taken(server: FakeAppServer, socket: Socket) -> None:
    server.on("app_server_info", script(*(replies(error=str(number)) for number in range(9))))
    taken = []
    async with aclosing(socket.ask_pages(question(), SOON)) as pages:
        async for page in pages:
            taken.append(decoded(page).error)
            if len(taken) == 3:
                break
    assert taken == ["0", "1", "2"]
    assert socket._pages == {}


async def test_page_that_does_not_come(server: FakeAppServer, socket: Socket) -> None:
    server.on("app_server_info", script(replies(error="0"), hang))
    pages = socket.ask_pages(question(), 0.05)
    assert decoded(await anext(pages)).error == "0"
    with pytest.raises(UpstreamTimeout):
        await anext(pages)


async def test_socket_that_is_lost_between_two_pages(server: FakeAppServer, socket: Socket) -> None:
    server.on("app_server_info", script(replies(error="0"), hang))
    pages = socket.ask_pages(question(), SOON)
    await anext(pages)
    server.cut()
    with pytest.raises(UpstreamUnavailable):
        await anext(pages)
