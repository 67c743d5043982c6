"""F26, F30: too few descriptors, too few threads, too much of everything; probes hear that the gateway lives."""

import asyncio
import contextlib
import threading
import time

import pytest

from gateway.letta import breaker, detect, rest
from gateway.server.listener import LINGER
from tests.faults.chaos_upstream import ANSWER, BEGIN, BadLetta, hangs, resets, says, until_cancelled
from tests.faults.gateways import served, until
from tests.server.running import JSON, chat_body, chat_request
from tests.server.subprocesses import GatewayProcess, gateway_process
from tests.server.wire import Connection, ask, connect, request

AGENTS = tuple(f"agent {number}" for number in range(120))


async def alive(gateway: GatewayProcess, within: float = 1.0) -> float:
    """See that it says that it lives, soon."""
    started = time.monotonic()
    answer = await asyncio.wait_for(gateway.ask("GET", "/health"), within)
    assert (answer.status, answer.json()) == (200, {"status": "ok"})
    return time.monotonic() - started


async def test_few_descriptors_and_streams_that_hang(letta: BadLetta) -> None:
    """256 descriptors: as many streams as fit are held, the rest is told so, probes pass, and then all is as before."""
    async with BadLetta(agents=AGENTS) as many, gateway_process(many.url, descriptors=256) as gateway:
        many.plays(*BEGIN, says("Hel"), until_cancelled())
        async with contextlib.AsyncExitStack() as stack:
            clients: list[Connection] = []
            slowest = 0.0
            for number, name in enumerate(AGENTS):
                clients.append(await stack.enter_async_context(gateway.connect()))
                await clients[-1].send(chat_request(stream=True, model=name))
                if number % 20 == 19:
                    await asyncio.sleep(0.05)  # in the very moment of a burst nobody may be idle enough to make room
                    slowest = max(slowest, await alive(gateway))
            heads = [await client.head() for client in clients]
            served_ = [head.status for head in heads].count(200)
            assert {head.status for head in heads} == {200, 503}
            assert {head.header("x-should-retry") for head in heads if head.status == 503} == {"true"}
            assert {bool(head.header("retry-after")) for head in heads if head.status == 503} == {True}
            assert 70 <= served_ <= 90, "half of what is left of 256"
            assert (await gateway.ask("GET", "/ready")).status == 200
            print(f"{served_} streams on 256 descriptors; /health took {slowest * 1000:.0f} ms at most")
        await until(lambda: len(many.cancels) == served_, 5)
        many.plays(*ANSWER)
        await settled(gateway)
        answer = await gateway.ask("POST", "/v1/chat/completions", JSON, chat_body(model="agent 1"))
        assert answer.status == 200
    assert "Traceback" not in gateway.errors
    assert "Too many open files" not in gateway.errors


async def settled(gateway: GatewayProcess) -> None:
    figures = ""
    for _ in range(100):
        figures = (await gateway.ask("GET", "/metrics")).body.decode()
        if "letta_gateway_open_turns 0.0" in figures and "letta_gateway_open_streams 0.0" in figures:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(figures)


async def test_few_descriptors_and_half_requests(letta: BadLetta) -> None:
    """Slowloris: half a head costs a descriptor until somebody needs it."""
    async with gateway_process(letta.url, descriptors=256) as gateway, contextlib.AsyncExitStack() as stack:
        for _ in range(400):
            client = await stack.enter_async_context(gateway.connect())
            with contextlib.suppress(ConnectionError):
                await client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc")
        await alive(gateway)
        answer = await gateway.ask("POST", "/v1/chat/completions", JSON, chat_body())
        assert answer.status == 200
    assert "Traceback" not in gateway.errors


async def test_few_descriptors_and_half_bodies(letta: BadLetta) -> None:
    """Half a body is a request under way: what is over the bound is turned away until its time is over."""
    half = request("POST", "/v1/chat/completions", {**JSON, "Content-Length": "500"}, b'{"model":')
    async with (
        gateway_process(letta.url, descriptors=256, LETTA_GATEWAY_BODY_TIMEOUT="1") as gateway,
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(150):
            client = await stack.enter_async_context(gateway.connect())
            with contextlib.suppress(ConnectionError):
                await client.send(half)
        refused = await gateway.ask("GET", "/health")
        assert (refused.status, refused.code, refused.header("x-should-retry")) == (503, "overloaded", "true")
        started = time.monotonic()
        while (await gateway.ask("GET", "/health")).status != 200:  # noqa: ASYNC110 - as a probe does
            await asyncio.sleep(0.1)
        print(f"alive again {time.monotonic() - started:.1f} s after half the bodies came")
        assert time.monotonic() - started < 1.0 + LINGER + 1
        assert (await gateway.ask("POST", "/v1/chat/completions", JSON, chat_body())).status == 200
    assert "Traceback" not in gateway.errors


async def test_letta_is_down(letta: BadLetta) -> None:
    async with served(letta) as gateway:
        await letta.refuse()
        for _ in range(7):
            ready = await ask(gateway.port, "GET", "/ready")
            assert (ready.status, ready.json()["status"]) == (503, "not_ready")
            assert (await ask(gateway.port, "GET", "/health")).json() == {"status": "ok"}
        await letta.listen()
        async with asyncio.timeout(3):
            while (await ask(gateway.port, "GET", "/ready")).status != 200:  # noqa: ASYNC110 - as a probe does
                await asyncio.sleep(0.1)


async def test_letta_comes_and_goes(letta: BadLetta) -> None:
    """Readiness tells what is; the breaker has its own pace."""
    async with served(letta) as gateway:
        assert (await gateway.chat()).status == 200
        letta.health = (resets(),)
        assert (await ask(gateway.port, "GET", "/ready")).status == 503
        for _ in range(breaker.FAILURES_TO_OPEN):
            assert (await ask(gateway.port, "GET", "/ready")).status == 503
            assert (await gateway.chat()).status == 200, "what readiness says refuses nobody"


async def test_probes_while_letta_hangs(letta: BadLetta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "PING_TIMEOUT", 0.5)
    monkeypatch.setattr(detect, "TIMEOUT", 0.5)
    letta.health = letta.listing = (hangs(),)
    async with served(letta) as gateway, contextlib.AsyncExitStack() as stack:
        for _ in range(50):
            client = await stack.enter_async_context(connect(gateway.port))
            await client.send(request("GET", "/ready"))
        started = time.monotonic()
        assert (await ask(gateway.port, "GET", "/health")).status == 200
        assert time.monotonic() - started < 0.5


async def test_no_thread_is_free(letta: BadLetta) -> None:
    """Threads check big bodies and look names up: without them, small requests and probes are served all the same."""
    free = threading.Event()
    async with served(letta) as gateway:
        assert (await gateway.chat("once")).status == 200  # letta-client's very first question takes a thread
        assert (await ask(gateway.port, "GET", "/ready")).status == 200  # and so does opening the database
        loop = asyncio.get_running_loop()
        hogs = [loop.run_in_executor(None, free.wait) for _ in range(64)]
        try:
            started = time.monotonic()
            assert (await ask(gateway.port, "GET", "/health")).status == 200
            assert (await ask(gateway.port, "GET", "/ready")).status == 200
            assert (await gateway.chat(stream=True)).text == "Hello"
            assert time.monotonic() - started < 1
            big = loop.create_task(gateway.chat("x" * 300_000))
            await asyncio.sleep(0.1)
            assert (await gateway.chat("small")).status == 200
            assert not big.done()
        finally:
            free.set()
        assert (await big).status == 200
        await asyncio.gather(*hogs)
        await loop.shutdown_default_executor()


async def test_more_turns_than_may_be(letta: BadLetta) -> None:
    letta.plays(*BEGIN, says("Hel"), until_cancelled())
    async with served(letta, max_turns=3, silence_timeout=5, queue_depth=2) as gateway:
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(gateway.streaming(model="friend")) for _ in range(3)]
            await until(lambda: gateway.figure("waiting_turns") == 2)
            answers = await asyncio.gather(*(gateway.chat(model=name) for name in ("friend", "other")))
            assert {(a.status, a.code, a.header("x-should-retry")) for a in answers} == {(503, "overloaded", "true")}
            assert (await ask(gateway.port, "GET", "/health")).status == 200
            assert clients
        await gateway.settled()
