import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec
import pytest

from gateway.errors import (
    AgentGone,
    ConversationBusy,
    ConversationGone,
    GatewayError,
    PendingApproval,
    ShuttingDown,
    UpstreamInvalid,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamTruncated,
    UpstreamUnavailable,
)
from gateway.letta import rest_turn
from gateway.letta.breaker import LEAST_RETRIES
from gateway.letta.deadlines import Limits
from gateway.letta.failures import ReturnsRefused
from gateway.letta.rest import RestBackend, RestConfig
from gateway.letta.rest_returns import SUPERSEDED
from gateway.letta.rest_turn import RestTurn
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_events import AgentEvent, Failure, Stop, TextDelta, ToolCallDelta, Usage
from gateway.translation.agent_turn import (
    AgentTurn,
    ClientTool,
    ImageData,
    ImageUrl,
    Part,
    Text,
    ToolResult,
    UserSaid,
)
from tests.letta.batches import batches, heard, next_batch
from tests.letta.recording_server import (
    AGENT,
    CONVERSATION,
    Answer,
    Exchange,
    RecordingServer,
    chunk,
    done,
    fin,
    frame,
    garbage,
    hang,
    ping,
    rst,
    says,
    silence,
    status,
    stop,
    stream,
    wait,
)
from tests.said import said_to

WELL_SAID: Final = [TextDelta("Hel"), TextDelta("lo"), Stop("end_turn")]
KEPT: Final = stream(ping(), says("Hel"), says("lo"), stop(), done())
"""A whole turn, on a connection that is kept."""
CUT: Final = [fin(), rst()]
CLEAN: Final = chunk(b"")
LEAVE: Final = ShuttingDown("The test is over.", should_retry=False)
SOON: Final = 2.0

NewTurn: TypeAlias = Callable[..., RestTurn]


async def until(so: Callable[[], object]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(SOON):
        while not so():  # noqa: ASYNC110 - it is seen from outside
            await asyncio.sleep(0.002)


def sockets() -> set[str]:
    """Return the sockets that this process has open."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own is gone by now
            found.add(str(descriptor.readlink()))
    return {link for link in found if link.startswith("socket:")}


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> Iterator[None]:
    """Keep what was there before out of the collections after each test: they take ten times as long with it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
async def nothing_leaks() -> AsyncIterator[None]:
    """See that no socket, no task and no complaint is left when all is closed."""
    complaints: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    before = sockets()
    yield
    gc.collect()
    await until(lambda: sockets() <= before)
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
    assert complaints == []


@pytest.fixture
async def server() -> AsyncIterator[RecordingServer]:
    async with RecordingServer() as server:
        yield server


@pytest.fixture
async def new_turn(server: RecordingServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NewTurn]:
    """Return a maker of turns, on one backend per set of limits.

    After the test they are closed, and closing them has to free everything, before their backends are closed too.
    """
    monkeypatch.setattr(rest_turn, "CONNECT_PAUSES", (0.02, 0.05))
    monkeypatch.setattr(rest_turn, "SETTLE", 0.3)
    monkeypatch.setattr(rest_turn, "END_OF_BODY", 0.3)
    monkeypatch.setattr(rest_turn, "LEARN_RUN", 0.3)
    monkeypatch.setattr(rest_turn, "ERROR_BODY_WAIT", 0.2)
    backends: dict[Limits, RestBackend] = {}
    made: list[RestTurn] = []

    def new_turn(*content: Part, said: AgentTurn | None = None, **limits: float) -> RestTurn:
        chosen = Limits(**limits)
        if chosen not in backends:
            backends[chosen] = RestBackend(RestConfig(server.url, limits=chosen), Metrics(), TaskSet())
        made.append(backends[chosen].turn(said or said_to(AGENT, *(content or (Text("Hi"),)))))
        return made[-1]

    yield new_turn
    for running in made:
        running.close()
    for backend in backends.values():
        await until(lambda backend=backend: not backend.tasks)  # type: ignore[misc]
        connector = backend.session.connector
        assert connector is not None
        assert not connector._acquired
        assert (backend.budget.requests, backend.budget.retries) == (0, 0)
        await backend.close()


def skipped(running: RestTurn) -> float:
    return float(running._backend.metrics.skipped_frames._value.get())


def retries(running: RestTurn) -> float:
    return float(running._backend.metrics.upstream_retries._value.get())


async def open_and_hear(running: RestTurn) -> list[AgentEvent]:
    await running.open()
    return await heard(running)


async def give_up(work: Callable[[], Awaitable[object]], when: Callable[[], object]) -> None:
    """Do some work and cancel it as soon as something is so, as a client's disconnect does."""

    async def do() -> None:
        await work()

    task = asyncio.get_running_loop().create_task(do())
    await until(when)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# What goes out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "sent"),
    [
        ((Text('Hi\n"😀"'),), 'Hi\n"😀"'),
        ((Text("a"), Text("b")), [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
        (
            (Text("Look"), ImageData("image/png", "QQ=="), ImageUrl("https://example.com/a.png")),
            [
                {"type": "text", "text": "Look"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QQ=="}},
                {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
            ],
        ),
    ],
)
async def test_what_goes_out(server: RecordingServer, new_turn: NewTurn, content: tuple[Part, ...], sent: Any) -> None:
    running = new_turn(*content)
    await running.open()
    assert await heard(running) == WELL_SAID
    (request,) = server.requests
    assert (request.method, request.target) == ("POST", f"/v1/agents/{AGENT}/messages/stream")
    assert request.json() == {
        "messages": [{"role": "user", "content": sent}],
        "stream_tokens": True,
        "include_pings": True,
    }
    assert request.header("Accept") == "text/event-stream"
    assert request.header("Content-Type") == "application/json"
    assert request.header("Accept-Encoding") == "identity"  # a proxy that compresses would hold tokens back


# The stream ----------------------------------------------------------------------------------------------------------


async def test_events_come_as_they_are_sent(server: RecordingServer, new_turn: NewTurn) -> None:
    gates = [asyncio.Event() for _ in range(3)]
    server.on("turn", stream(ping(), wait(gates[0]), says("a"), wait(gates[1]), says("b"), wait(gates[2]), stop()))
    running = new_turn()
    await running.open()  # needs no event, nor does the ping make a batch
    for gate, event in zip(gates, [TextDelta("a"), TextDelta("b"), Stop("end_turn")], strict=True):
        gate.set()
        assert await next_batch(running) == [event]
    assert await heard(running) == []


async def test_iteration_goes_on_where_it_stood(server: RecordingServer, new_turn: NewTurn) -> None:
    gate = asyncio.Event()
    server.on("turn", stream(ping(), says("Hel"), wait(gate), says("lo"), stop()))
    running = new_turn()
    await running.open()
    assert await next_batch(running) == [TextDelta("Hel")]
    gate.set()
    assert await heard(running) == WELL_SAID[1:]
    assert await heard(running) == []


async def test_nothing_is_heard_after_done(
    server: RecordingServer, new_turn: NewTurn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest_turn, "END_OF_BODY", 0.1)
    server.on("turn", stream(ping(), says("Hi"), stop(), chunk(b"data: [DONE]\n\n"), hang()))
    running = new_turn()
    await running.open()
    async with asyncio.timeout(SOON):
        assert await heard(running) == [TextDelta("Hi"), Stop("end_turn")]
    running.close()
    await until(lambda: not server.open)


async def test_failed_turn_is_read_to_the_end_of_its_body(server: RecordingServer, new_turn: NewTurn) -> None:
    cleaned_up = asyncio.Event()
    server.on("turn", stream(ping(), stop("error"), frame(message_type="error_message"), wait(cleaned_up)))
    running = new_turn()
    await running.open()
    assert [type(event) for event in await next_batch(running) or ()] == [Failure]
    assert running.ended
    running.close()
    await asyncio.sleep(0.05)
    assert server.open  # Letta is still at work on it
    cleaned_up.set()
    again = new_turn()
    await asyncio.sleep(0.05)
    await again.open()
    assert [request.connection for request in server.requests] == [1, 1]
    again.close()


@pytest.mark.parametrize("ending", [*CUT, CLEAN])
async def test_stop_reason_is_the_end_however_it_ends(
    server: RecordingServer, new_turn: NewTurn, ending: Answer
) -> None:
    server.on("turn", stream(ping(), says("Hel"), says("lo"), stop(), ending, fin()))
    running = new_turn()
    await running.open()
    assert await heard(running) == WELL_SAID
    assert running.ended


@pytest.mark.parametrize("ending", [*CUT, CLEAN])
@pytest.mark.parametrize("steps", [(), (ping(),), (ping(), says("Hel"))])
async def test_end_before_the_stop_reason(
    server: RecordingServer, new_turn: NewTurn, steps: tuple[Answer, ...], ending: Answer
) -> None:
    server.on("turn", stream(*steps, ending, fin()))
    running = new_turn()
    await running.open()
    events: list[AgentEvent] = []

    async def listen() -> None:
        async for batch in batches(running):
            events.extend(batch)

    if ending is CLEAN:
        await listen()  # a clean end without a stop reason: the translation says that it was cut off
        assert not any(isinstance(event, Stop) for event in events)
    else:
        with pytest.raises(UpstreamTruncated) as raised:
            await listen()
        assert raised.value.should_retry is False
    assert events == [TextDelta("Hel")] * (len(steps) - 1)
    assert not running.ended  # nobody knows whether the run goes on


@pytest.mark.parametrize("size", [1, 10_000, 60_000])
@pytest.mark.parametrize("ending", CUT)
async def test_slow_reader_gets_all_that_came_before_the_break(
    server: RecordingServer, new_turn: NewTurn, ending: Answer, size: int
) -> None:
    for steps in ((says("a" * size), stop()), (says("a" * size),)):
        server.on("turn", stream(ping(), *steps, ending))
        running = new_turn()
        await running.open()
        await until(lambda: not server.open)
        await asyncio.sleep(0.02)
        events = [*(await next_batch(running) or ())]
        with contextlib.suppress(UpstreamTruncated):
            async for batch in batches(running):
                events += batch
        assert events == [TextDelta("a" * size), Stop("end_turn")][: len(steps)]
        running.close()


async def test_failure_that_a_stop_announces(server: RecordingServer, new_turn: NewTurn) -> None:
    server.on("turn", stream(ping(), says("Hel"), stop("error"), fin()))
    running = new_turn()
    await running.open()
    *_, last = await heard(running)
    assert isinstance(last, Failure)
    assert running.ended


async def test_unknown_frames_are_counted_once(server: RecordingServer, new_turn: NewTurn) -> None:
    server.on("turn", stream(ping(), frame(message_type="novelty"), chunk(b"event: odd\ndata: x\n\n"), stop(), done()))
    running = new_turn()
    await running.open()
    assert await heard(running) == [Stop("end_turn")]
    running.close()
    running.close()
    assert skipped(running) == 2


async def test_frame_that_is_none(server: RecordingServer, new_turn: NewTurn) -> None:
    server.on("turn", stream(ping(), chunk(b"data: {nonsense\n\n"), hang()))
    running = new_turn()
    await running.open()
    with pytest.raises(UpstreamInvalid):
        await heard(running)
    running.close()
    await until(lambda: not server.open)


# Refusals ------------------------------------------------------------------------------------------------------------

PENDING: Final = json.dumps({"detail": {"code": "PENDING_APPROVAL", "pending_request_id": "message-1"}}).encode()


async def in_pieces(exchange: Exchange) -> None:
    """Answer 409 with a body in two pieces."""
    await exchange.raw(b"HTTP/1.1 409 Conflict\r\nContent-Length: %d\r\n\r\n" % len(PENDING) + PENDING[:20])
    await asyncio.sleep(0.03)
    await exchange.raw(PENDING[20:])


async def half(exchange: Exchange) -> None:
    """Answer 503 and half a body."""
    await exchange.raw(b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 999\r\n\r\n{")
    await exchange.until_left()
    exchange.close()


async def broken(exchange: Exchange) -> None:
    """Answer 404 and a body that breaks off."""
    await exchange.raw(b"HTTP/1.1 404 No\r\nContent-Length: 999\r\n\r\n{")
    exchange.close()


async def flood(exchange: Exchange) -> None:
    """Answer 500 and a body without an end."""
    await exchange.raw(b"HTTP/1.1 500 Oops\r\nContent-Length: 99999999999\r\n\r\n")
    while not exchange.left:
        await exchange.raw(b"x" * 65_536)
    exchange.close()


@pytest.mark.parametrize(
    ("answer", "kind", "code"),
    [
        (status(404, {"detail": "Agent not found"}), AgentGone, "agent_gone"),
        (status(409, {"detail": {"code": "CONVERSATION_BUSY"}}), ConversationBusy, "conversation_busy"),
        (status(409, PENDING), PendingApproval, "pending_approval"),
        (status(429, b""), UpstreamRateLimited, "upstream_rate_limited"),
        (status(500, b"secret"), UpstreamInvalid, "upstream_error"),
        (status(503, b""), UpstreamUnavailable, "upstream_unavailable"),
        (status(307, b"", {"Location": "/elsewhere"}), UpstreamInvalid, "upstream_error"),
        (status(200, b"<html>", {"Content-Type": "text/html"}), UpstreamInvalid, "upstream_invalid_response"),
        (status(200, b"{}"), UpstreamInvalid, "upstream_invalid_response"),
        (status(204), UpstreamInvalid, "upstream_error"),
        (in_pieces, PendingApproval, "pending_approval"),
        (half, UpstreamUnavailable, "upstream_unavailable"),
        (broken, AgentGone, "agent_gone"),
        (flood, UpstreamInvalid, "upstream_error"),
        (garbage(), UpstreamInvalid, "upstream_invalid_response"),
        (garbage(b""), UpstreamUnavailable, "upstream_unavailable"),
    ],
)
async def test_turn_that_is_refused(
    server: RecordingServer, new_turn: NewTurn, answer: Answer, kind: type[GatewayError], code: str
) -> None:
    server.on("turn", answer)
    running = new_turn()
    async with asyncio.timeout(SOON):
        with pytest.raises(kind) as raised:
            await running.open()
    assert raised.value.code == code
    assert running.ended
    if kind is PendingApproval:  # where no call is found to wait, saying so is all that is left
        assert [request.kind for request in server.requests] == ["turn", "calls", "turn"]
    else:
        assert len(server.requests) == 1  # never sent twice, never to another place
    running.close()
    if answer in (half, flood, broken):
        await until(lambda: not server.open)


async def test_wait_that_letta_asks_for(server: RecordingServer, new_turn: NewTurn) -> None:
    server.on("turn", half)
    with pytest.raises(UpstreamUnavailable) as raised:
        await new_turn().open()
    assert raised.value.retry_after == 7


async def test_opened_again_after_a_refusal(server: RecordingServer, new_turn: NewTurn) -> None:
    server.on("turn", status(409), in_pieces, in_pieces, stream(ping(), says("Hel"), says("lo"), stop(), done()))
    running = new_turn(turn=0.5, first_event=0.5)
    with pytest.raises(ConversationBusy):
        await running.open()
    assert running.ended
    first = running._deadlines
    with pytest.raises(PendingApproval):
        await running.open()
    await running.open()
    assert first is not None
    assert first._timer.cancelled()
    assert await heard(running) == WELL_SAID
    assert running.ended
    assert len({request.body for request in server.asked("turn")}) == 1


# Calls that wait -----------------------------------------------------------------------------------------------------

PROFILE: Final = status(200, {"agent_type": "letta_v1_agent", "tools": [{"id": "tool-1", "name": "clock"}]})
PENDING_TEXT: Final = "CONFLICT: Cannot send a new message: The agent is waiting for approval on a tool call."
NOBODY_TEXT: Final = "Cannot process approval response: No tool call is currently awaiting approval."
OTHERS_TEXT: Final = "Invalid tool call IDs. Expected '['a']', but received '['b']'."
CALLS: Final = status(
    200,
    [
        {
            "message_type": "approval_request_message",
            "date": "2026-11-21T15:45:07+00:00",
            "tool_calls": [{"tool_call_id": "call_1"}, {"tool_call_id": "call_2"}],
        }
    ],
)
WEATHER: Final = ClientTool("weather", "The weather.", msgspec.Raw(b'{"type":"object"}'))
HI: Final = (UserSaid((Text("Hi"),)),)


def refuses(detail: str) -> Answer:
    """Refuse in the stream, as letta 0.16.8 does."""
    return stream(
        ping(), stop("error"), frame(message_type="error_message", error_type="internal_error", detail=detail), done()
    )


def answered(**results: str) -> dict[str, Any]:
    """Return the message that answers these calls."""
    approvals = [
        {
            "type": "tool",
            "tool_call_id": call,
            "tool_return": text,
            "status": "error" if text == SUPERSEDED else "success",
        }
        for call, text in results.items()
    ]
    return {"type": "approval", "approvals": approvals}


def told(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def messages(server: RecordingServer) -> list[list[dict[str, Any]]]:
    """Return the messages of each try."""
    return [request.json()["messages"] for request in server.asked("turn")]


@pytest.mark.parametrize(
    "refusal", [status(409, PENDING), in_pieces, refuses(PENDING_TEXT)], ids=["409", "409 in pieces", "in the stream"]
)
@pytest.mark.parametrize("conversation", [None, CONVERSATION])
async def test_new_message_supersedes_calls_that_nobody_knew_of(
    server: RecordingServer, new_turn: NewTurn, refusal: Answer, conversation: str | None
) -> None:
    server.on("agent", PROFILE)
    server.on("calls", CALLS)
    server.on("turn", refusal, KEPT)
    running = new_turn(said=AgentTurn(agent_id=AGENT, conversation_id=conversation, news=HI))
    assert await open_and_hear(running) == WELL_SAID
    assert running.ended
    superseded = answered(call_1=SUPERSEDED, call_2=SUPERSEDED)
    assert messages(server) == [[told("Hi")], [superseded, told("Hi")]]
    (listing,) = server.asked("calls")
    assert (conversation or AGENT) in listing.path
    assert conversation is not None or "conversation_id=default" in listing.target


@pytest.mark.parametrize("refusal", [status(400, {"detail": NOBODY_TEXT}), refuses(NOBODY_TEXT), refuses(OTHERS_TEXT)])
async def test_results_for_calls_that_somebody_settled_meanwhile(
    server: RecordingServer, new_turn: NewTurn, refusal: Answer
) -> None:
    server.on("agent", PROFILE)
    server.on("calls", CALLS)
    server.on("turn", refusal, KEPT)
    returns = (ToolResult("call_2", "noon"), ToolResult("call_7", "late"))
    running = new_turn(said=AgentTurn(agent_id=AGENT, returns=returns, news=HI))
    assert await open_and_hear(running) == WELL_SAID
    settled = [answered(call_1=SUPERSEDED, call_2="noon"), told("Result of the tool call call_7: late"), told("Hi")]
    assert messages(server) == [settled, settled]
    assert [request.kind for request in server.requests] == ["calls", "agent", "turn", "calls", "turn"]


async def test_results_that_nobody_waits_for_are_words(server: RecordingServer, new_turn: NewTurn) -> None:
    running = new_turn(said=AgentTurn(agent_id=AGENT, returns=(ToolResult("call_7", "late"),)))
    assert await open_and_hear(running) == WELL_SAID
    assert messages(server) == [[told("Result of the tool call call_7: late")]]
    assert [request.kind for request in server.requests] == ["calls", "turn"]


@pytest.mark.parametrize(
    ("refusal", "kind"), [(refuses(PENDING_TEXT), PendingApproval), (refuses(NOBODY_TEXT), ReturnsRefused)]
)
async def test_second_refusal_is_the_last(
    server: RecordingServer, new_turn: NewTurn, refusal: Answer, kind: type[GatewayError]
) -> None:
    server.on("turn", refusal)
    running = new_turn()
    *_, last = await open_and_hear(running)
    assert isinstance(last, Failure)
    assert isinstance(last.error, kind)
    assert [request.kind for request in server.requests] == ["turn", "calls", "turn"]
    assert running.ended


async def test_abort_while_the_waiting_calls_are_looked_up(server: RecordingServer, new_turn: NewTurn) -> None:
    server.on("calls", silence())
    server.on("turn", refuses(PENDING_TEXT), KEPT)
    running = new_turn()
    await running.open()
    hearing = asyncio.get_running_loop().create_task(heard(running))
    await until(lambda: server.asked("calls"))
    running.abort(LEAVE)
    with pytest.raises(ShuttingDown):
        await hearing
    assert len(server.asked("turn")) == 1
    assert running.ended


async def test_tools_go_out_and_their_calls_come_back(server: RecordingServer, new_turn: NewTurn) -> None:
    server.on("agent", PROFILE)
    body = {"tool_call_id": "call_1", "name": "client_clock", "arguments": "{}"}
    call = frame(message_type="approval_request_message", tool_call=body)
    server.on("turn", stream(ping(), call, stop("requires_approval"), done()))
    clock = msgspec.structs.replace(WEATHER, name="clock")
    for _ in range(2):
        running = new_turn(said=AgentTurn(agent_id=AGENT, news=HI, tools=(WEATHER, clock)))
        assert await open_and_hear(running) == [ToolCallDelta("call_1", "clock", "{}"), Stop("requires_approval")]
    assert [request.kind for request in server.requests] == ["agent", "health", "turn", "turn"]
    offered = server.asked("turn")[0].json()["client_tools"]
    parameters = {"type": "object"}
    assert offered == [
        {"name": "weather", "description": "The weather.", "parameters": parameters},
        {"name": "client_clock", "description": "The weather.", "parameters": parameters},
    ]


async def test_result_of_the_clients_own_is_not_told_back_to_it(server: RecordingServer, new_turn: NewTurn) -> None:
    server.on("agent", PROFILE)
    server.on("calls", CALLS)
    server.on("turn", stream(ping(), frame(message_type="tool_return_message", tool_call_id="call_1"), stop(), done()))
    running = new_turn(said=AgentTurn(agent_id=AGENT, returns=(ToolResult("call_1", "noon"),)))
    assert await open_and_hear(running) == [Stop("end_turn")]


@pytest.mark.parametrize("returns", [(), (ToolResult("call_1", "noon"),)])
async def test_conversation_that_is_gone(
    server: RecordingServer, new_turn: NewTurn, returns: tuple[ToolResult, ...]
) -> None:
    for kind in ("turn", "calls"):
        server.on(kind, status(404, {"detail": "Conversation not found"}))
    with pytest.raises(ConversationGone):
        await new_turn(said=AgentTurn(agent_id=AGENT, conversation_id=CONVERSATION, returns=returns, news=HI)).open()


# The states of a turn ------------------------------------------------------------------------------------------------


class State:
    """Brings a turn into a state; ``asks`` tells whether a cancel from there reaches Letta, ``ended`` what it says."""

    def __init__(self, name: str, answer: Answer, *, asks: bool, ended: bool) -> None:
        self.name = name
        self.answer = answer
        self.asks = asks
        self.ended = ended

    async def reach(self, server: RecordingServer, running: RestTurn) -> None:
        """Bring the turn there."""
        server.on("turn", self.answer)
        match self.name:
            case "before open":
                pass
            case "open given up":
                await give_up(running.open, lambda: server.requests)
            case "refused":
                with contextlib.suppress(ConversationBusy):
                    await running.open()
            case "after headers":
                await running.open()
            case "mid-stream":
                await running.open()
                assert await next_batch(running) == [TextDelta("Hel")]
            case "broken":
                await running.open()
                with pytest.raises(UpstreamTruncated):
                    await heard(running)
            case "after the end":
                await running.open()
                assert await heard(running) == WELL_SAID
            case _:
                raise AssertionError


async def late(exchange: Exchange) -> None:
    """Take a turn slowly, then stream it until the client goes."""
    await asyncio.sleep(0.1)
    await stream(ping(), says("Hel"), hang())(exchange)


async def late_but_well(exchange: Exchange) -> None:
    """Take a turn slowly, then stream it to its end."""
    await asyncio.sleep(0.05)
    await stream(ping(), says("Hel"), says("lo"), stop(), done())(exchange)


STATES: Final = [
    State("before open", silence(), asks=False, ended=True),
    State("open given up", late, asks=True, ended=False),
    State("refused", status(409), asks=False, ended=True),
    State("after headers", stream(ping(), says("Hel"), hang()), asks=True, ended=False),
    State("mid-stream", stream(ping(), says("Hel"), hang()), asks=True, ended=False),
    State("broken", stream(ping(), says("Hel"), rst()), asks=True, ended=False),
    State("after the end", stream(ping(), says("Hel"), says("lo"), stop(), done()), asks=False, ended=True),
]
every_state = pytest.mark.parametrize("state", STATES, ids=lambda state: state.name)


@every_state
async def test_ended(server: RecordingServer, new_turn: NewTurn, state: State) -> None:
    running = new_turn()
    await state.reach(server, running)
    assert running.ended is state.ended


@every_state
async def test_close(server: RecordingServer, new_turn: NewTurn, state: State) -> None:
    running = new_turn()
    await state.reach(server, running)
    running.close()
    running.close()
    if state.name not in ("refused", "after the end"):  # those connections may serve again
        await until(lambda: not server.open)
    assert server.asked("cancel") == []


@every_state
async def test_cancel(server: RecordingServer, new_turn: NewTurn, state: State) -> None:
    running = new_turn()
    await state.reach(server, running)
    async with asyncio.timeout(SOON):
        await running.cancel()
    cancels = server.asked("cancel")
    assert [(request.path, request.json()) for request in cancels] == (
        [(f"/v1/agents/{AGENT}/messages/cancel", {"run_ids": ["run-1"]})] if state.asks else []
    )
    running.close()
    if state.asks:
        await until(lambda: server.open <= 1)  # what is left is the control plane's


@every_state
async def test_abort(server: RecordingServer, new_turn: NewTurn, state: State) -> None:
    running = new_turn()
    await state.reach(server, running)
    running.abort(LEAVE)
    running.abort(ConversationBusy())
    match state.name:
        case "before open" | "refused":
            goes_on: Awaitable[object] = running.open()
        case "open given up":
            goes_on = running.drain()
        case _:
            goes_on = heard(running)
    with pytest.raises(ShuttingDown) as raised:
        await goes_on
    assert raised.value is LEAVE
    running.close()
    if state.name in ("open given up", "after headers", "mid-stream", "broken"):
        await until(lambda: not server.open)


@every_state
async def test_drain(server: RecordingServer, new_turn: NewTurn, state: State) -> None:
    gate = asyncio.Event()
    answer: Answer = stream(ping(), says("Hel"), wait(gate), says("lo"), stop(), done())
    usual = state.answer if state.name in ("before open", "refused", "broken", "after the end") else answer
    running = new_turn()
    await State(state.name, late_but_well if state.name == "open given up" else usual, asks=False, ended=False).reach(
        server, running
    )
    gate.set()
    async with asyncio.timeout(SOON):
        if state.name == "broken":
            with pytest.raises(UpstreamTruncated):
                await running.drain()
        else:
            await running.drain()
            assert running.ended
            await running.drain()
    assert server.asked("cancel") == []


# Cancelling ----------------------------------------------------------------------------------------------------------


async def test_cancel_sees_the_run_end(server: RecordingServer, new_turn: NewTurn) -> None:
    cancelled = asyncio.Event()

    async def cancel(exchange: Exchange) -> None:
        await status(200, {"run-1": "cancelled"})(exchange)
        cancelled.set()

    server.on("turn", stream(ping(), says("Hel"), wait(cancelled), stop("cancelled"), fin()))
    server.on("cancel", cancel)
    running = new_turn()
    await running.open()
    assert await next_batch(running) == [TextDelta("Hel")]
    await running.cancel()
    assert running.ended
    await running.cancel()
    assert len(server.asked("cancel")) == 1


async def test_cancel_learns_the_run_from_the_first_frame(server: RecordingServer, new_turn: NewTurn) -> None:
    gate = asyncio.Event()
    server.on("turn", stream(wait(gate), ping("run-99"), hang()))
    running = new_turn()
    await running.open()
    asyncio.get_running_loop().call_later(0.05, gate.set)
    await running.cancel()
    assert [request.json() for request in server.asked("cancel")] == [{"run_ids": ["run-99"]}]


async def test_cancel_waits_for_a_silent_stream_no_longer_than_it_says(
    server: RecordingServer, new_turn: NewTurn
) -> None:
    server.on("turn", stream(ping(), hang()))
    running = new_turn()
    await running.open()
    started = asyncio.get_running_loop().time()
    await running.cancel()
    assert 0.25 < asyncio.get_running_loop().time() - started < 1
    assert len(server.asked("cancel")) == 1


@pytest.mark.parametrize("answer", [stream(hang()), stream(ping(None), says("Hel", None), hang()), silence()])
async def test_cancel_of_a_run_without_a_name_ends(server: RecordingServer, new_turn: NewTurn, answer: Answer) -> None:
    server.on("turn", answer)
    running = new_turn()
    await give_up(lambda: open_and_hear(running), lambda: server.requests)
    async with asyncio.timeout(SOON):
        with pytest.raises(TimeoutError):
            await running.cancel()
    assert server.asked("cancel") == []
    running.close()
    await until(lambda: not server.open)


@pytest.mark.parametrize("ending", CUT)
async def test_cancel_learns_the_run_from_what_came_before_the_break(
    server: RecordingServer, new_turn: NewTurn, ending: Answer
) -> None:
    server.on("turn", stream(ping(), ending))
    running = new_turn()
    await running.open()
    await until(lambda: not server.open)
    await asyncio.sleep(0.02)
    await running.cancel()
    assert [request.json() for request in server.asked("cancel")] == [{"run_ids": ["run-1"]}]


@pytest.mark.parametrize("answer", [stream(fin()), stream(rst()), stream(), stream(says("Hel", None), rst())])
async def test_cancel_of_a_broken_stream_without_a_name(
    server: RecordingServer, new_turn: NewTurn, answer: Answer
) -> None:
    server.on("turn", answer)
    running = new_turn()
    await running.open()
    await running.cancel()
    assert server.asked("cancel") == []


async def test_cancel_of_a_turn_that_is_refused_meanwhile(server: RecordingServer, new_turn: NewTurn) -> None:
    async def refuse(exchange: Exchange) -> None:
        await asyncio.sleep(0.05)
        await status(409)(exchange)

    server.on("turn", refuse)
    running = new_turn()
    await give_up(running.open, lambda: server.requests)
    with pytest.raises(ConversationBusy):
        await running.cancel()
    assert running.ended


@pytest.mark.parametrize("answer", [status(404), status(500), garbage(b"")])
async def test_cancel_that_letta_refuses(server: RecordingServer, new_turn: NewTurn, answer: Answer) -> None:
    server.on("turn", stream(ping(), hang()))
    server.on("cancel", answer)
    running = new_turn()
    await running.open()
    with pytest.raises(GatewayError):
        await running.cancel()


async def test_abort_while_a_cancel_waits_for_the_response(server: RecordingServer, new_turn: NewTurn) -> None:
    server.on("turn", silence())
    for settle in ("cancel", "drain"):
        running = new_turn()
        sent = len(server.requests)
        await give_up(running.open, lambda sent=sent: len(server.requests) > sent)  # type: ignore[misc]
        asyncio.get_running_loop().call_later(0.05, running.abort, LEAVE)
        with pytest.raises(ShuttingDown):
            await getattr(running, settle)()
        running.close()
        await until(lambda: not server.open)


async def test_abort_while_a_cancel_waits_for_the_name(server: RecordingServer, new_turn: NewTurn) -> None:
    server.on("turn", stream(hang()))
    running = new_turn()
    await running.open()
    asyncio.get_running_loop().call_later(0.05, running.abort, LEAVE)
    await running.cancel()
    assert server.asked("cancel") == []


async def test_response_that_comes_when_nobody_waits_is_freed(server: RecordingServer, new_turn: NewTurn) -> None:
    server.on("turn", late)
    running = new_turn()
    await give_up(running.open, lambda: server.requests)
    await until(lambda: running._request is not None and running._request.done())
    running.close()
    await until(lambda: not server.open)


async def test_abort_in_the_moment_of_the_response(server: RecordingServer, new_turn: NewTurn) -> None:
    server.on("turn", stream(ping(), hang()))
    running = new_turn()
    opening = asyncio.get_running_loop().create_task(running.open())
    await asyncio.sleep(0)
    assert running._request is not None
    running._request.add_done_callback(lambda _: running.abort(LEAVE))
    async with asyncio.timeout(SOON):
        with pytest.raises(ShuttingDown):
            await opening
    running.close()
    await until(lambda: not server.open)


# Deadlines -----------------------------------------------------------------------------------------------------------


async def pings(exchange: Exchange) -> None:
    """Send a ping every so often."""
    while not exchange.left:
        await ping()(exchange)
        await asyncio.sleep(0.03)
    exchange.close()


async def words(exchange: Exchange) -> None:
    """Say a word every so often."""
    while not exchange.left:
        await says("word ")(exchange)
        await asyncio.sleep(0.03)
    exchange.close()


@pytest.mark.parametrize(
    ("answer", "limits", "code"),
    [
        (silence(), {"first_event": 0.15}, "upstream_timeout"),
        (stream(hang()), {"first_event": 0.15}, "upstream_timeout"),
        (stream(pings), {"first_event": 0.15, "silence": 0.1}, "upstream_timeout"),
        (stream(ping(), hang()), {"silence": 0.15}, "upstream_silent"),
        (stream(ping(), says("Hel"), hang()), {"first_event": 0.1, "silence": 0.2}, "upstream_silent"),
        (silence(), {"silence": 0.05, "first_event": 0.15}, "upstream_timeout"),
        (stream(words), {"turn": 0.25, "silence": 0.15, "first_event": 0.15}, "turn_timeout"),
        (stream(ping(), hang()), {"turn": 0.15}, "turn_timeout"),
    ],
)
async def test_deadline(
    server: RecordingServer, new_turn: NewTurn, answer: Answer, limits: dict[str, float], code: str
) -> None:
    server.on("turn", answer)
    running = new_turn(**limits)
    async with asyncio.timeout(1):
        with pytest.raises(UpstreamTimeout) as raised:
            await open_and_hear(running)
    assert (raised.value.status, raised.value.code, raised.value.should_retry) == (504, code, False)
    running.close()
    await until(lambda: not server.open)


async def test_cancel_after_a_deadline_hears_the_end(server: RecordingServer, new_turn: NewTurn) -> None:
    cancelled = asyncio.Event()

    async def cancel(exchange: Exchange) -> None:
        cancelled.set()
        await status(200, {"run-1": "cancelled"})(exchange)

    server.on("cancel", cancel)
    server.on("turn", stream(ping(), says("Hel"), wait(cancelled), stop("cancelled")))
    running = new_turn(silence=0.1)
    with pytest.raises(UpstreamTimeout):
        await open_and_hear(running)
    await running.cancel()
    assert running.ended
    assert [request.json() for request in server.asked("cancel")] == [{"run_ids": ["run-1"]}]


async def test_pings_hold_the_silence_off(server: RecordingServer, new_turn: NewTurn) -> None:
    gate = asyncio.Event()
    asyncio.get_running_loop().call_later(0.35, gate.set)

    async def quiet(exchange: Exchange) -> None:
        while not gate.is_set():
            await ping()(exchange)
            await asyncio.sleep(0.03)

    server.on("turn", stream(quiet, says("Hel"), says("lo"), stop(), done()))
    running = new_turn(silence=0.15)
    await running.open()
    assert await heard(running) == WELL_SAID


async def test_no_deadline_after_the_end(server: RecordingServer, new_turn: NewTurn) -> None:
    running = new_turn(turn=0.1, silence=0.1)
    await running.open()
    assert await heard(running) == WELL_SAID
    running.close()
    await asyncio.sleep(0.15)
    assert running._error is None


async def test_hang_before_the_answer_tells_the_breaker(server: RecordingServer, new_turn: NewTurn) -> None:
    server.on("turn", silence())
    for _ in range(5):
        with pytest.raises(UpstreamTimeout):
            await new_turn(first_event=0.03).open()
    with pytest.raises(UpstreamUnavailable):
        await new_turn(first_event=0.03).open()
    assert len(server.requests) == 5


# Retries -------------------------------------------------------------------------------------------------------------


async def test_refused_connections_are_tried_again(server: RecordingServer, new_turn: NewTurn) -> None:
    await server.stop()
    running = new_turn()
    with pytest.raises(UpstreamUnavailable) as raised:
        await running.open()
    assert raised.value.should_retry is True
    assert retries(running) == 2
    assert running.ended


async def test_server_that_comes_back(
    server: RecordingServer, new_turn: NewTurn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest_turn, "CONNECT_PAUSES", (0.02, 0.2))
    await server.stop()
    running = new_turn()
    opening = asyncio.get_running_loop().create_task(running.open())
    await until(lambda: retries(running) == 2)
    async with server:
        await opening
        assert await heard(running) == WELL_SAID
        assert len(server.requests) == 1


async def test_budget_bounds_the_retries(server: RecordingServer, new_turn: NewTurn) -> None:
    await server.stop()
    running = new_turn()
    budget = running._backend.budget
    with contextlib.ExitStack() as others:
        for _ in range(LEAST_RETRIES):
            others.enter_context(budget.retry())
        with pytest.raises(UpstreamUnavailable):
            await running.open()
    assert retries(running) == 0


@pytest.mark.parametrize("answer", [garbage(b""), garbage(), garbage(b"HTTP/1.1 200 OK\r\n"), status(503), status(429)])
async def test_what_was_delivered_is_never_sent_again(
    server: RecordingServer, new_turn: NewTurn, answer: Answer
) -> None:
    server.on("turn", answer)
    running = new_turn()
    with pytest.raises(GatewayError):
        await running.open()
    assert len(server.requests) == 1
    assert retries(running) == 0


async def test_abort_between_two_tries(
    server: RecordingServer, new_turn: NewTurn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest_turn, "CONNECT_PAUSES", (5.0,))
    await server.stop()
    running = new_turn()
    opening = asyncio.get_running_loop().create_task(running.open())
    await until(lambda: retries(running) == 1)
    running.abort(LEAVE)
    with pytest.raises(ShuttingDown):
        await opening
    assert running.ended


# Connections ---------------------------------------------------------------------------------------------------------


async def test_connection_serves_the_next_turn(server: RecordingServer, new_turn: NewTurn) -> None:
    server.on("turn", KEPT)
    for _ in range(3):
        running = new_turn()
        await running.open()
        assert await heard(running) == WELL_SAID
        running.close()
    assert {request.connection for request in server.requests} == {1}


async def test_connection_serves_again_though_the_body_ends_a_moment_after_done(
    server: RecordingServer, new_turn: NewTurn
) -> None:
    for _ in range(2):
        gate = asyncio.Event()
        said = (ping(), says("Hi"), stop(), chunk(b"data: [DONE]\n\n"))
        server.on("turn", stream(*said, wait(gate), chunk(b"")))
        running = new_turn()
        await running.open()
        assert await heard(running) == [TextDelta("Hi"), Stop("end_turn")]
        running.close()
        gate.set()
        await asyncio.sleep(0.05)
    assert [request.connection for request in server.requests] == [1, 1]


async def test_connection_that_the_server_closed_while_idle(server: RecordingServer, new_turn: NewTurn) -> None:
    for _ in range(2):
        server.on("turn", KEPT)
        running = new_turn()
        await running.open()
        assert await heard(running) == WELL_SAID
        running.close()
        assert server.open == 1
        server.hang_up()
        await until(lambda: not server.open)
    assert [request.connection for request in server.requests] == [1, 2]


async def test_stream_that_was_left_is_not_used_again(server: RecordingServer, new_turn: NewTurn) -> None:
    for _ in range(2):
        server.on("turn", stream(ping(), says("Hel"), hang()))
        running = new_turn()
        await running.open()
        assert await next_batch(running) == [TextDelta("Hel")]
        running.close()
    assert [request.connection for request in server.requests] == [1, 2]


async def test_many_turns_at_once(server: RecordingServer, new_turn: NewTurn) -> None:
    gate = asyncio.Event()
    server.on("turn", stream(ping(), says("Hel"), wait(gate), says("lo"), stop(), done(), fin()))
    turns = [new_turn() for _ in range(120)]
    await asyncio.gather(*(running.open() for running in turns))
    assert server.open == 120  # no pool's limit makes one wait for another
    gate.set()
    assert await asyncio.gather(*(heard(running) for running in turns)) == [WELL_SAID] * 120


# What it took --------------------------------------------------------------------------------------------------------

MARKED: Final = AgentTurn(agent_id=AGENT, mark="mark-1", news=(UserSaid((Text("Hi"),)),))
USED: Final = frame(message_type="usage_statistics", prompt_tokens=100, completion_tokens=20, total_tokens=120)


def steps_are(server: RecordingServer, prompt: int, completion: int, state: str = "completed") -> None:
    server.on("run", status(200, {"id": "run-1", "status": state, "created_at": "2026-11-21T00:00:00Z"}))
    server.on("steps", status(200, [{"id": "s", "prompt_tokens": prompt, "completion_tokens": completion}]))


async def test_usage_that_the_stream_told_is_not_asked_for(server: RecordingServer, new_turn: NewTurn) -> None:
    server.on("turn", stream(ping(), says("Hello"), stop(), USED, done()))
    running = new_turn(said=MARKED)
    await open_and_hear(running)
    assert await running.usage() == Usage(100, 20)
    assert [request.kind for request in server.requests] == ["turn"]


async def test_usage_of_a_turn_that_failed_is_asked_for(server: RecordingServer, new_turn: NewTurn) -> None:
    steps_are(server, 7, 1, "failed")
    server.on("turn", stream(ping(), stop("llm_api_error"), frame(message_type="error_message"), done()))
    running = new_turn(said=MARKED)
    assert isinstance((await open_and_hear(running))[-1], Failure)
    assert await running.usage() == Usage(7, 1)


async def test_usage_of_a_turn_that_was_cancelled_is_asked_for(server: RecordingServer, new_turn: NewTurn) -> None:
    steps_are(server, 7, 1, "cancelled")
    server.on("turn", stream(ping(), says("Hel"), hang()))
    running = new_turn(said=MARKED)
    await running.open()
    await next_batch(running)
    await running.cancel()
    assert await running.usage() == Usage(7, 1)


@pytest.mark.parametrize("broken", CUT)
async def test_usage_of_a_stream_that_broke_while_the_server_is_up(
    server: RecordingServer, new_turn: NewTurn, broken: Any
) -> None:
    steps_are(server, 7, 1)
    server.on("turn", stream(ping(), says("Hel"), broken))
    running = new_turn(said=MARKED)
    with pytest.raises(UpstreamTruncated):
        await open_and_hear(running)
    assert await running.usage() == Usage(7, 1)


async def test_usage_of_a_stream_that_broke_with_the_server(server: RecordingServer, new_turn: NewTurn) -> None:
    server.on("turn", stream(ping(), says("Hel"), fin()))
    running = new_turn(said=MARKED)
    with pytest.raises(UpstreamTruncated):
        await open_and_hear(running)
    await server.stop()
    with pytest.raises(UpstreamUnavailable):
        await running.usage()


@pytest.mark.parametrize("answer", [stream(fin()), rst(), garbage(), status(502), status(500)])
async def test_turn_of_which_nobody_knows_whether_it_began(
    server: RecordingServer, new_turn: NewTurn, answer: Answer
) -> None:
    server.on("turn", answer)
    running = new_turn(said=MARKED)
    with pytest.raises(GatewayError):
        await open_and_hear(running)
    with pytest.raises(UpstreamTimeout):
        await running.usage()


async def test_abort_before_the_answer_leaves_open_what_it_took(server: RecordingServer, new_turn: NewTurn) -> None:
    server.on("turn", silence())
    running = new_turn(said=MARKED)
    opening = asyncio.get_running_loop().create_task(running.open())
    await until(lambda: server.asked("turn"))
    running.abort(LEAVE)
    with pytest.raises(ShuttingDown):
        await opening
    with pytest.raises(UpstreamTimeout):
        await running.usage()


@pytest.mark.parametrize("number", [404, 409, 422, 429])
async def test_turn_that_was_refused_took_nothing(server: RecordingServer, new_turn: NewTurn, number: int) -> None:
    server.on("turn", status(number))
    running = new_turn(said=MARKED)
    with pytest.raises(GatewayError):
        await running.open()
    assert await running.usage() is None


async def test_turn_that_never_left_took_nothing(server: RecordingServer, new_turn: NewTurn) -> None:
    assert await new_turn(said=MARKED).usage() is None
    running = new_turn(said=MARKED)
    await server.stop()
    with pytest.raises(UpstreamUnavailable):
        await running.open()
    assert await running.usage() is None


async def test_mark_goes_out_by_header_and_message(server: RecordingServer, new_turn: NewTurn) -> None:
    server.on("turn", status(409), KEPT)
    running = new_turn(said=MARKED)
    with pytest.raises(ConversationBusy):
        await running.open()
    await open_and_hear(running)
    first, second = server.asked("turn")
    assert [request.header("X-Api-Request-Log-Id") for request in (first, second)] == ["mark-1", "mark-1"]
    assert [request.json()["messages"][0]["otid"] for request in (first, second)] == ["mark-1.1", "mark-1.2"]


async def test_turn_without_a_mark_names_nothing(server: RecordingServer, new_turn: NewTurn) -> None:
    await open_and_hear(new_turn())
    (request,) = server.asked("turn")
    assert request.header("X-Api-Request-Log-Id") is None
    assert request.json()["messages"] == [{"role": "user", "content": "Hi"}]


async def test_client_that_goes_away_between_the_end_and_the_usage(server: RecordingServer, new_turn: NewTurn) -> None:
    gate = asyncio.Event()
    server.on("turn", stream(ping(), stop(), wait(gate), USED, done()))
    running = new_turn(said=MARKED)
    await running.open()
    await next_batch(running)
    assert running.ended
    gate.set()
    assert await running.usage() == Usage(100, 20)
    assert [request.kind for request in server.requests] == ["turn"]
