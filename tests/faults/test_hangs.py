"""F2, F3, F8: Letta says nothing, or hardly anything, for as long as one lets it."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator

import pytest

from gateway.handlers import sse
from gateway.letta import detect, rest, rest_turn
from tests.faults.chaos_upstream import (
    BEGIN,
    END,
    BadLetta,
    body,
    frame_bytes,
    hangs,
    head,
    ping,
    pings,
    says,
    sends,
    status,
    stops,
    until_cancelled,
    waits,
)
from tests.faults.gateways import Gateway, served
from tests.server.wire import Answer

BOTH = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


@pytest.fixture
async def gateway(letta: BadLetta) -> AsyncIterator[Gateway]:
    async with served(letta) as running:
        assert (await running.get("/v1/models")).status == 200
        yield running


def timed_out(answer: Answer, code: str) -> None:
    """See a 504 that says that the message may be there."""
    assert (answer.status, answer.code, answer.header("x-should-retry")) == (504, code, "false")


async def next_turn_works(letta: BadLetta, gateway: Gateway) -> None:
    """See that the thread is free again."""
    letta.plays(*BEGIN, says("Hel", "lo"), *END)
    answer = await asyncio.wait_for(gateway.chat(stream=True), 3)
    assert (answer.status, answer.text) == (200, "Hello")


# No answer -----------------------------------------------------------------------------------------------------------


@BOTH
async def test_no_answer(letta: BadLetta, gateway: Gateway, *, stream: bool) -> None:
    letta.plays(hangs())
    started = time.monotonic()
    answer = await gateway.chat(stream=stream)
    assert answer.code in ("upstream_silent", "upstream_timeout"), "whichever deadline is the nearer one"
    timed_out(answer, answer.code)
    assert 0.25 < time.monotonic() - started < 1.2
    await gateway.settled(3)
    assert gateway.figure("upstream_errors_total", code=answer.code) == 1
    assert letta.posted[0].left_at is not None
    await next_turn_works(letta, gateway)


@BOTH
async def test_headers_and_no_frame(letta: BadLetta, gateway: Gateway, *, stream: bool) -> None:
    letta.plays(head(), hangs())
    timed_out(await gateway.chat(stream=stream), "upstream_silent")
    await gateway.settled(3)
    assert letta.cancels == [], "nobody knows what to cancel"
    await next_turn_works(letta, gateway)


@BOTH
async def test_pings_and_no_answer(letta: BadLetta, gateway: Gateway, *, stream: bool) -> None:
    """Letta is alive, its model is not."""
    letta.plays(head(), pings(0.05))
    started = time.monotonic()
    timed_out(await gateway.chat(stream=stream), "upstream_timeout")
    assert 0.6 < time.monotonic() - started < 1.5
    took = await gateway.settled(3)
    assert [cancel.run_ids for cancel in letta.cancels] == [["run-1"]]
    assert took < 3
    await next_turn_works(letta, gateway)


async def test_heartbeats_flow_while_letta_thinks(letta: BadLetta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING", 0.1)
    letta.plays(head(), pings(0.05))
    async with served(letta, first_byte_wait=0.2, first_event_timeout=1.0) as gateway:
        async with gateway.streaming() as client:
            started = time.monotonic()
            answer = await client.head()
            assert answer.status == 200
            assert 0.15 < time.monotonic() - started < 0.6
            arrived = [(time.monotonic(), piece) async for piece in client.pieces()]
        beats = [at for at, piece in arrived if piece == b": ping\n\n"]
        assert len(beats) >= 5
        assert max(later - sooner for sooner, later in itertools.pairwise(beats)) < 0.35
        (error,) = Answer(200, [], b"".join(piece for _, piece in arrived)).events
        assert error["error"]["code"] == "upstream_timeout"
        await gateway.settled()
        assert gateway.figure("turns_total", outcome="failed") == 1
    assert [cancel.run_ids for cancel in letta.cancels] == [["run-1"]]


@pytest.mark.parametrize(
    ("number", "code"), [(409, "conversation_busy"), (422, "upstream_rejected"), (500, "upstream_error")]
)
async def test_status_and_a_body_that_never_comes(
    letta: BadLetta, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    monkeypatch.setattr(rest_turn, "ERROR_BODY_WAIT", 0.2)
    async with served(letta, queue_wait=0.2) as gateway:
        for body_ in ("", '{"detail":'):
            letta.plays(status(number, {"Content-Length": "100"}, body_), hangs())
            assert (await gateway.chat()).code == code
        await next_turn_works(letta, gateway)


# In the middle -------------------------------------------------------------------------------------------------------


async def test_silence_in_mid_stream(letta: BadLetta, gateway: Gateway) -> None:
    letta.plays(*BEGIN, says("Hel"), hangs())
    started = time.monotonic()
    answer = await gateway.chat(stream=True)
    assert 0.25 < time.monotonic() - started < 1.2
    assert (answer.status, answer.text, answer.complete) == (200, "Hel", True)
    assert answer.events[-1]["error"]["code"] == "upstream_silent"
    took = await gateway.settled(3)
    assert [cancel.run_ids for cancel in letta.cancels] == [["run-1"]], "the run is stopped"
    assert took < 3
    assert gateway.figure("upstream_errors_total", code="upstream_silent") == 1
    await gateway.logged_once()
    assert gateway.logs.requests[-1]["error_code"] == "upstream_silent"
    await next_turn_works(letta, gateway)


async def test_silence_in_mid_stream_without_stream(letta: BadLetta, gateway: Gateway) -> None:
    letta.plays(*BEGIN, says("Hel"), hangs())
    timed_out(await gateway.chat(), "upstream_silent")
    await gateway.settled(3)
    assert [cancel.run_ids for cancel in letta.cancels] == [["run-1"]]


async def test_silence_in_mid_frame(letta: BadLetta, gateway: Gateway) -> None:
    letta.plays(*BEGIN, says("Hel"), body(frame_bytes(content="lo")[:40]), hangs())
    answer = await gateway.chat(stream=True)
    assert answer.text == "Hel"
    assert answer.events[-1]["error"]["code"] == "upstream_silent"


async def test_pings_keep_a_stream_alive(letta: BadLetta, gateway: Gateway) -> None:
    pause = (ping(), waits(0.15)) * 4
    letta.plays(*BEGIN, says("Hel"), *pause, says("lo"), *END)
    answer = await gateway.chat(stream=True)
    assert answer.text == "Hello"
    assert answer.events[-1] == "[DONE]"


async def test_hang_after_the_stop_reason(letta: BadLetta, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is said: what is missing is Letta's own end of the stream."""
    monkeypatch.setattr(rest_turn, "END_OF_BODY", 0.3)
    letta.plays(*BEGIN, says("Hel", "lo"), stops(), hangs())
    started = time.monotonic()
    answer = await gateway.chat(stream=True)
    assert time.monotonic() - started < 1.2
    assert answer.text == "Hello"
    await gateway.settled(3)
    assert letta.cancels == [], "it is over"


async def test_breath_of_a_frame_and_no_more(letta: BadLetta) -> None:
    """A byte now and then is a sign of life; the turn's own deadline ends it."""
    letta.plays(*BEGIN, says("Hel"), body(frame_bytes(content="lo") * 20, piece=1, pause=0.02))
    async with served(letta, turn_timeout=0.6) as gateway:
        started = time.monotonic()
        answer = await gateway.chat(stream=True)
        assert 0.55 < time.monotonic() - started < 2
        assert answer.events[-1]["error"]["code"] == "turn_timeout"
        await gateway.settled(3)
        assert [cancel.run_ids for cancel in letta.cancels] == [["run-1"]]
        letta.plays(*BEGIN, *(says("word "), waits(0.1)) * 50)
        answer = await gateway.chat(stream=True)
        assert answer.events[-1]["error"]["code"] == "turn_timeout"
        timed_out(await gateway.chat(), "turn_timeout")


# The cancel itself ---------------------------------------------------------------------------------------------------


async def test_cancel_hangs(letta: BadLetta, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be cancelled holds the thread for a bounded time."""
    monkeypatch.setattr(rest, "CONTROL_TIMEOUT", 0.5)
    letta.cancelling = (hangs(),)
    letta.plays(*BEGIN, says("Hel"), hangs())
    answer = await gateway.chat(stream=True)
    assert answer.events[-1]["error"]["code"] == "upstream_silent"
    letta.cancelling = BadLetta().cancelling
    await next_turn_works(letta, gateway)


async def test_cancel_fails(letta: BadLetta, gateway: Gateway) -> None:
    letta.cancelling = (status(500, {}, "canary"),)
    letta.plays(*BEGIN, says("Hel"), hangs())
    await gateway.chat(stream=True)
    await next_turn_works(letta, gateway)
    (line,) = [line for line in gateway.logs.lines if line["event"] == "turn not settled"]
    assert "canary" not in str(line)


async def test_cancelled_run_lingers(letta: BadLetta, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """V1 looks at the mark when the model's next chunk comes: a stream may stay open for long."""
    monkeypatch.setattr(rest_turn, "SETTLE", 0.2)
    letta.plays(*BEGIN, says("Hel"), pings(0.05))
    async with gateway.streaming() as client:
        await client.head()
        client.abort()
    took = await gateway.settled(3)
    assert took < 3
    assert [cancel.run_ids for cancel in letta.cancels] == [["run-1"]]


async def test_cancelled_run_ends(letta: BadLetta, gateway: Gateway) -> None:
    letta.plays(*BEGIN, says("Hel"), until_cancelled())
    async with gateway.streaming() as client:
        await client.head()
        client.abort()
    assert await gateway.settled() < 1


# The control plane ---------------------------------------------------------------------------------------------------


async def test_listing_hangs(letta: BadLetta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "CONTROL_TIMEOUT", 0.4)
    letta.listing = (hangs(),)
    async with served(letta) as gateway:
        started = time.monotonic()
        answers = [await gateway.get("/v1/models"), await gateway.chat()]
        assert time.monotonic() - started < 1.5
        assert {(answer.status, answer.code, answer.header("x-should-retry")) for answer in answers} == {
            (504, "upstream_timeout", "true")
        }
    assert letta.posted == []


async def test_listing_trickles(letta: BadLetta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "CONTROL_TIMEOUT", 0.4)
    head_ = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 10000\r\n\r\n"
    letta.listing = (sends(head_), *(sends(b" "), waits(0.05)) * 200)
    async with served(letta) as gateway:
        started = time.monotonic()
        answer = await gateway.chat()
        assert time.monotonic() - started < 1
        assert (answer.status, answer.code) == (504, "upstream_timeout")


async def test_health_check_trickles(letta: BadLetta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "PING_TIMEOUT", 0.3)
    monkeypatch.setattr(detect, "TIMEOUT", 0.3)
    head_ = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 10000\r\n\r\n"
    for health in ((hangs(),), (sends(head_), *(sends(b" "), waits(0.05)) * 100)):
        letta.health = health
        async with served(letta) as gateway:
            started = time.monotonic()
            ready = await gateway.get("/ready")
            assert time.monotonic() - started < 1
            assert ready.status == 503
            assert (await gateway.get("/health")).status == 200
