"""F17, where Letta misbehaves at the same time: what ``tests/server/test_serve.py`` does not cover."""

import asyncio
import signal
import time

from tests.faults.chaos_upstream import BEGIN, BadLetta, floods, frame_bytes, hangs, says, until_cancelled
from tests.faults.gateways import until
from tests.server.running import chat_request
from tests.server.subprocesses import GatewayProcess, gateway_process
from tests.server.wire import Answer, request


async def test_worst_of_times(letta: BadLetta) -> None:
    """Each of these ends within bounds, and not only when the last deadline of all is over."""
    await asyncio.gather(nothing_answers(), client_is_stalled())


async def nothing_answers() -> None:
    """Readiness probes and requests hang on Letta, from the start on."""
    async with BadLetta() as letta, gateway_process(letta.url, LETTA_GATEWAY_GRACE="0.3") as gateway:
        letta.health = letta.listing = (hangs(),)
        async with gateway.connect() as client, gateway.connect() as probe:
            await client.send(chat_request(stream=True))
            await probe.send(request("GET", "/ready"))
            await until(lambda: letta.connections >= 2)
            assert await ends(gateway, signal.SIGTERM) < 8
            assert await client.closed()


async def client_is_stalled() -> None:
    """A flood, and a client that takes none of it; several signals."""
    async with BadLetta() as letta, gateway_process(letta.url, LETTA_GATEWAY_GRACE="600") as gateway:
        letta.plays(*BEGIN, floods(frame_bytes(id="m", content="word " * 20)))
        async with gateway.connect() as client:
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await client.send(chat_request(stream=True))
            await until(lambda: letta.posted)
            gateway.signal(signal.SIGTERM)
            await gateway.says('"draining"')
            gateway.signal(signal.SIGHUP)
            assert await ends(gateway, signal.SIGTERM) < 12
            assert letta.cancels


async def ends(gateway: GatewayProcess, number: signal.Signals) -> float:
    """Send a signal and return how many seconds the end took."""
    started = time.monotonic()
    gateway.signal(number)
    assert await gateway.ended() == 0
    assert "Traceback" not in gateway.errors
    took = time.monotonic() - started
    print(f"ended {took:.1f} s after the signal")
    return took


async def test_start_does_not_wait_for_letta(letta: BadLetta) -> None:
    letta.health = letta.listing = (hangs(),)
    started = time.monotonic()
    async with gateway_process(letta.url, LETTA_GATEWAY_CONNECT_TIMEOUT="60") as gateway:
        assert time.monotonic() - started < 30
        assert (await gateway.ask("GET", "/health")).status == 200
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0


async def test_hangup_in_mid_stream(letta: BadLetta) -> None:
    """The terminal is gone: the same graceful end."""
    letta.plays(*BEGIN, says("Hel"), until_cancelled())
    async with gateway_process(letta.url, LETTA_GATEWAY_GRACE="0.3") as gateway, gateway.connect() as client:
        await client.send(chat_request(stream=True))
        assert (await client.head()).status == 200
        started = time.monotonic()
        gateway.signal(signal.SIGHUP)
        said = b"".join([piece async for piece in client.pieces()])
        assert await gateway.ended() == 0
        assert 0.25 < time.monotonic() - started < 3
    assert Answer(200, [], said).events[-1]["error"]["code"] == "shutting_down"
    assert [cancel.run_ids for cancel in letta.cancels] == [["run-1"]]
