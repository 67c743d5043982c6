import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeAlias

import msgspec
import pytest

from gateway.errors import (
    AgentGone,
    ConversationBusy,
    GatewayError,
    ShuttingDown,
    TurnCancelled,
    UpstreamInvalid,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamTruncated,
    UpstreamUnavailable,
)
from gateway.letta import app_server, app_server_turn
from gateway.letta.app_server import AppServerBackend, AppServerConfig
from gateway.letta.app_server_turn import AppServerTurn
from gateway.letta.backend import always_ready
from gateway.letta.deadlines import Limits
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_events import (
    AgentEvent,
    Batch,
    Failure,
    ReasoningDelta,
    ServerToolCall,
    ServerToolReturn,
    Stop,
    TextDelta,
    Usage,
)
from gateway.translation.agent_turn import ImageData, Part, Text
from tests.letta.batches import heard, next_batch
from tests.letta.fake_app_server import (
    AGENT,
    OTHER,
    SOON,
    THREADS,
    WELL,
    Answer,
    Exchange,
    FakeAppServer,
    Step,
    accepted,
    agent_row,
    close,
    create_conversation,
    cut_off,
    delta,
    event,
    finished,
    hang,
    nothing_leaks,
    queued,
    raw,
    recorded,
    replies,
    says,
    script,
    stop,
    turn,
    unqueued,
    until,
    usage,
    wait,
)
from tests.said import said_to

WELL_SAID: Final = [TextDelta("Hel"), TextDelta("lo"), Usage(100, 20, 0, 0), Stop("end_turn")]
LEAVE: Final = ShuttingDown("The test is over.", should_retry=False)
HERE: Final = {"agent_id": AGENT, "conversation_id": THREADS[AGENT]}

NewTurn: TypeAlias = Callable[..., AppServerTurn]


@pytest.fixture(autouse=True)
async def clean() -> AsyncIterator[None]:
    async with nothing_leaks():
        yield


@pytest.fixture
async def server() -> AsyncIterator[FakeAppServer]:
    async with FakeAppServer() as server:
        yield server


@pytest.fixture
async def new_turn(server: FakeAppServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NewTurn]:
    """Return a maker of turns, on one backend per set of limits, all agents of which share one socket."""
    monkeypatch.setattr(app_server, "SOCKETS", 1)
    monkeypatch.setattr(app_server_turn, "ACCEPT", 0.3)
    monkeypatch.setattr(app_server_turn, "QUEUED", 0.3)
    monkeypatch.setattr(app_server_turn, "SETTLE", 0.3)
    backends: dict[Limits, AppServerBackend] = {}
    made: list[AppServerTurn] = []

    def new_turn(*content: Part, agent: str = AGENT, **limits: float) -> AppServerTurn:
        chosen = Limits(**limits)
        if chosen not in backends:
            backends[chosen] = AppServerBackend(AppServerConfig(server.url, limits=chosen), Metrics(), TaskSet())
        made.append(backends[chosen].turn(said_to(agent, *(content or (Text("Hi"),)))))
        return made[-1]

    yield new_turn
    for running in made:
        running.close()
    for backend in backends.values():
        await until(lambda backend=backend: not backend.tasks)  # type: ignore[misc]
        for slot in backend._slots:
            assert slot.socket is None or not (slot.socket._listeners or slot.socket._replies)
        await backend.close()


def skipped(running: AppServerTurn) -> float:
    return float(running._backend.metrics.skipped_frames._value.get())


async def said_by(running: AppServerTurn) -> list[AgentEvent]:
    """Open the turn, and return all its events."""
    async with asyncio.timeout(SOON):
        await running.open()
        return await heard(running)


async def failure_of(running: AppServerTurn) -> GatewayError:
    """Return the error that the turn ended with, as its last event."""
    *_, last = await said_by(running)
    assert isinstance(last, Failure)
    assert running.ended
    return last.error


async def cut_short(running: AppServerTurn, kind: type[Exception]) -> list[AgentEvent]:
    """Return the events of a delivery that ends with an error."""
    events: list[AgentEvent] = []

    def take(batch: Batch) -> bool:
        events.extend(batch)
        return True

    async with asyncio.timeout(SOON):
        with pytest.raises(kind):
            await running.deliver(take, always_ready)
    return events


async def give_up(work: Callable[[], Awaitable[object]], when: Callable[[], object]) -> None:
    """Do some work and cancel it as soon as something is so, as a client's disconnect does."""

    async def do() -> None:
        await work()

    task = asyncio.get_running_loop().create_task(do())
    await until(when)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class SlowTaker:
    """Takes a batch, and then nothing until it is told to go on."""

    def __init__(self) -> None:
        self.events: list[AgentEvent] = []
        self.go_on = asyncio.Event()
        self.waits = asyncio.Event()

    def take(self, batch: Batch) -> bool:
        self.events += batch
        return self.go_on.is_set()

    async def ready(self) -> None:
        self.waits.set()
        await self.go_on.wait()


# What goes out -------------------------------------------------------------------------------------------------------


async def test_what_goes_out(server: FakeAppServer, new_turn: NewTurn) -> None:
    assert await said_by(new_turn()) == WELL_SAID
    (start,) = server.asked("runtime_start")
    assert {name: start[name] for name in HERE} == HERE
    (command,) = server.asked("input")
    assert command["runtime"] == HERE
    payload = command["payload"]
    (message,) = payload["messages"]
    assert (message["role"], message["content"]) == ("user", "Hi")
    assert message["client_message_id"] == command["request_id"]
    assert (payload["kind"], payload["exclude_interactive_tools"]) == ("create_message", True)
    assert (payload["client_tool_allowlist"], payload["client_toolset"]["base"]) == ([], "none")


async def test_parts_go_out_as_parts(server: FakeAppServer, new_turn: NewTurn) -> None:
    await said_by(new_turn(Text("Look"), ImageData("image/png", "QQ==")))
    (command,) = server.asked("input")
    assert command["payload"]["messages"][0]["content"] == [
        {"type": "text", "text": "Look"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QQ=="}},
    ]


# The events ----------------------------------------------------------------------------------------------------------


async def test_recorded_turn(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", recorded("2-text-turn", "m2"))
    running = new_turn()
    assert await said_by(running) == [
        TextDelta("You"),
        TextDelta(" said:"),
        TextDelta(" Hello"),
        TextDelta(" again"),
        Usage(100, 20, 0, 0),
        Stop("end_turn"),
    ]
    assert running.ended
    running.close()
    assert skipped(running) == 0


@pytest.mark.parametrize(
    ("name", "request_id"),
    [("2-text-turn", "m1"), ("5-disconnect-while-tool-pending", "m7"), ("6-parallel-inputs-one-conversation", "pb")],
)
async def test_other_recorded_turns(server: FakeAppServer, new_turn: NewTurn, name: str, request_id: str) -> None:
    server.on("input", recorded(name, request_id))
    *text, counts, end = await said_by(new_turn())
    assert isinstance(text[0], TextDelta)
    assert "".join(each.text for each in text if isinstance(each, TextDelta)).startswith("You said:")
    assert (counts, end) == (Usage(100, 20, 0, 0), Stop("end_turn"))


async def test_recorded_turn_that_waited_for_another(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", recorded("5-disconnect-while-tool-pending", "m6"))
    *_, counts, end = events = await said_by(new_turn())
    assert events[0] == TextDelta("You")
    assert (counts, end) == (Usage(100, 20, 0, 0), Stop("end_turn"))


async def test_recorded_turn_of_an_agent_that_is_gone(server: FakeAppServer, new_turn: NewTurn) -> None:
    end = event("turn_finished", stop_reason="error", error="Agent x not found")
    server.on("input", script(recorded("7-errors", "e2"), end))
    assert isinstance(await failure_of(new_turn()), AgentGone)


async def test_agent_that_went_away_meanwhile(server: FakeAppServer, new_turn: NewTurn) -> None:
    text = f"Agent {AGENT} not found"
    server.on(
        "input",
        turn(delta("loop_error", message=text, stop_reason="error", is_terminal=True), finished("error", text)),
    )
    assert isinstance(await failure_of(new_turn()), AgentGone)


async def test_turn_of_several_steps(server: FakeAppServer, new_turn: NewTurn) -> None:
    call = {"tool_call_id": "call-1", "name": "Read", "arguments": "{}"}
    server.on(
        "input",
        turn(
            delta("reasoning_message", id="r-1", reasoning="Hm"),
            says("Let me see", "m-1"),
            delta("tool_call_message", tool_call=call),
            usage(100, 5, 60),
            stop("tool_rule"),
            delta("tool_return_message", tool_call_id="call-1", name="Read", status="success"),
            stop("requires_approval"),
            delta("assistant_message", id="m-2", seq_id=1, content=[{"type": "text", "text": "Done"}]),
            usage(200, 7, 80),
            stop("end_turn"),
            finished(),
        ),
    )
    events = await said_by(new_turn())
    assert [each for each in events if not isinstance(each, Usage)] == [
        ReasoningDelta("Hm"),
        TextDelta("Let me see"),
        ServerToolCall("call-1", "Read", "{}"),
        ServerToolReturn("call-1", "Read", succeeded=True),
        TextDelta("\n\nDone"),
        Stop("end_turn"),
    ]
    first, second = (each for each in events if isinstance(each, Usage))
    assert first.plus(second) == Usage(300, 12, 140, 0)


@pytest.mark.parametrize("reason", ["end_turn", "max_tokens_exceeded", "max_steps", "tool_rule"])
async def test_good_ends(server: FakeAppServer, new_turn: NewTurn, reason: Any) -> None:
    server.on("input", turn(says("Hi"), finished(reason)))
    assert await said_by(new_turn()) == [TextDelta("Hi"), Stop(reason)]


def retry(attempt: int, message: str) -> Answer:
    """A step that failed, and is tried again."""
    return script(
        delta("error_message", error_type="llm_error", message=message, detail=message),
        delta("retry", message="Retrying", reason="llm_api_error", attempt=attempt, max_attempts=3, delay_ms=1),
    )


async def test_retries_that_help(server: FakeAppServer, new_turn: NewTurn) -> None:
    busy = '429: {"error":{"message":"busy"}}'
    server.on("input", turn(retry(1, busy), retry(2, busy), says("Hi"), stop("end_turn"), finished()))
    running = new_turn()
    assert await said_by(running) == [TextDelta("Hi"), Stop("end_turn")]
    running.close()
    assert skipped(running) == 0


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "upstream_rejected"),
        (401, "model_auth_failed"),
        (402, "insufficient_quota"),
        (413, "context_length_exceeded"),
        (429, "upstream_rate_limited"),
        (500, "model_error"),
        (503, "model_error"),
        (418, "model_error"),
    ],
)
async def test_retries_that_do_not_help(server: FakeAppServer, new_turn: NewTurn, status: int, code: str) -> None:
    text = f'{status}: {{"error":{{"message":"secret"}}}}'
    server.on("input", turn(says("Hi"), retry(1, text), retry(2, text), finished("llm_api_error", text)))
    error = await failure_of(new_turn())
    assert (error.code, error.should_retry) == (code, False)
    assert "secret" not in str(error)


async def test_failure_that_only_a_loop_error_tells(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(delta("loop_error", message="429: {}", stop_reason="error"), finished("error")))
    assert (await failure_of(new_turn())).code == "upstream_rate_limited"


async def test_failure_that_only_the_end_tells(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(finished("error", "401: {}")))
    assert (await failure_of(new_turn())).code == "model_auth_failed"


@pytest.mark.parametrize(("reason", "kind"), [("cancelled", TurnCancelled), ("novelty", UpstreamInvalid)])
async def test_bad_ends_without_a_text(
    server: FakeAppServer, new_turn: NewTurn, reason: str, kind: type[GatewayError]
) -> None:
    server.on("input", turn(finished(reason)))
    assert isinstance(await failure_of(new_turn()), kind)


async def test_content_filter_is_a_refusal(server: FakeAppServer, new_turn: NewTurn) -> None:
    text = "Provider finish_reason: content_filter"
    server.on("input", turn(delta("error_message", message=text), finished("error", text)))
    assert await said_by(new_turn()) == [Stop("refusal")]


async def test_nothing_comes_after_the_end(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(says("Hi"), finished(), says("more"), finished("error"), finished()))
    running = new_turn()
    assert await said_by(running) == [TextDelta("Hi"), Stop("end_turn")]
    await running._backend.ping()
    assert await heard(running) == []


async def test_events_of_others_are_ignored(server: FakeAppServer, new_turn: NewTurn) -> None:
    foreign = {"agent_id": AGENT, "conversation_id": "local-conv-99"}
    text = {"message_type": "assistant_message", "content": "no"}
    server.on(
        "input",
        script(
            says("before"),
            finished("error"),
            event("update_queue", queue=[{"id": "q-9", "client_message_id": "other"}], removed=[]),
            accepted(),
            event("stream_delta", runtime=foreign, delta=text),
            event("stream_delta", runtime={**HERE, "agent_id": OTHER}, delta=text),
            event("stream_delta", subagent_id="subagent-1", delta=text),
            event("turn_finished", runtime=foreign, stop_reason="error"),
            event("update_queue", queue=[], removed=[{"client_message_id": "other", "disposition": "cancelled"}]),
            event("update_device_status"),
            event("novelty"),
            says("Hi"),
            finished(),
        ),
    )
    running = new_turn()
    assert await said_by(running) == [TextDelta("Hi"), Stop("end_turn")]
    assert running._queue_item is None


async def test_unknown_messages_are_counted_once(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(delta("novelty"), delta("novelty"), delta("retry"), raw("junk"), says("Hi"), finished()))
    running = new_turn()
    assert await said_by(running) == [TextDelta("Hi"), Stop("end_turn")]
    running.close()
    running.close()
    assert skipped(running) == 3


async def test_message_that_does_not_fit(server: FakeAppServer, new_turn: NewTurn) -> None:
    gate = asyncio.Event()
    server.on("input", turn(wait(gate), says("Hi"), delta("assistant_message", content=7), says("more"), hang))
    running = new_turn()
    await running.open()
    gate.set()
    assert await cut_short(running, UpstreamInvalid) == [TextDelta("Hi")]
    assert not running.ended


async def test_events_come_as_they_are_sent(server: FakeAppServer, new_turn: NewTurn) -> None:
    gates = [asyncio.Event() for _ in range(3)]
    server.on("input", turn(wait(gates[0]), says("a"), wait(gates[1]), says("b"), wait(gates[2]), finished()))
    running = new_turn()
    await running.open()
    for gate, expected in zip(gates, [TextDelta("a"), TextDelta("b"), Stop("end_turn")], strict=True):
        gate.set()
        assert await next_batch(running) == [expected]
    assert await heard(running) == []


async def test_what_came_before_anybody_took_it(server: FakeAppServer, new_turn: NewTurn) -> None:
    running = new_turn()
    await running.open()
    await until(lambda: running.ended)
    assert await heard(running) == WELL_SAID


async def test_socket_that_is_lost_after_the_whole_answer_came(server: FakeAppServer, new_turn: NewTurn) -> None:
    running = new_turn()
    await running.open()
    await until(lambda: running.ended)
    socket = running._socket
    assert socket is not None
    server.cut()
    await until(lambda: socket.is_lost)
    assert await heard(running) == WELL_SAID


# Refusals ------------------------------------------------------------------------------------------------------------


async def test_agent_that_is_not_there(server: FakeAppServer, new_turn: NewTurn) -> None:
    running = new_turn(agent="agent-nope")
    with pytest.raises(AgentGone):
        await running.open()
    assert running.ended
    assert server.asked("input") == []


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (accepted(None, accepted=False), UpstreamRejected),
        (accepted(None, accepted=False, error="Agent agent-x not found"), AgentGone),
    ],
)
async def test_input_that_is_refused(
    server: FakeAppServer, new_turn: NewTurn, answer: Answer, kind: type[GatewayError]
) -> None:
    server.on("input", answer)
    running = new_turn()
    with pytest.raises(kind):
        await running.open()
    assert running.ended
    await running.cancel()
    await running.drain()
    assert server.asked("abort_message") == []


async def test_opened_again_after_a_thread_that_could_not_be_started(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("runtime_start", replies(success=False, error="busy for now"), replies())
    server.on("input", turn(says("Hi"), finished()))
    running = new_turn()
    with pytest.raises(UpstreamRejected):
        await running.open()
    first = running._deadlines
    assert await said_by(running) == [TextDelta("Hi"), Stop("end_turn")]
    assert first is not None
    assert first._timer.cancelled()


async def test_reply_that_is_none(server: FakeAppServer, new_turn: NewTurn) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.frame("input_accepted", request_id=exchange.command["request_id"], success="perhaps")

    server.on("input", answer)
    with pytest.raises(UpstreamInvalid):
        await new_turn().open()


async def test_cancel_of_an_input_that_is_refused_meanwhile(server: FakeAppServer, new_turn: NewTurn) -> None:
    gate = asyncio.Event()
    server.on("input", script(wait(gate), accepted(None, accepted=False)))
    running = new_turn()
    await give_up(running.open, lambda: server.asked("input"))
    loop = asyncio.get_running_loop()
    started = loop.time()
    loop.call_later(0.02, gate.set)
    await running.cancel()
    assert loop.time() - started < 0.2
    assert running.ended
    assert server.asked("abort_message") == []


# Deadlines -----------------------------------------------------------------------------------------------------------


async def test_input_that_is_never_accepted(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", hang)
    running = new_turn(turn=0.1)
    with pytest.raises(UpstreamTimeout):
        await running.open()
    assert not running.ended  # nobody knows
    with pytest.raises(TimeoutError):
        await running.cancel()


@pytest.mark.parametrize("answer", [hang, turn(hang)])
async def test_first_event_that_never_comes(server: FakeAppServer, new_turn: NewTurn, answer: Answer) -> None:
    server.on("input", answer)
    running = new_turn(first_event=0.25)
    with pytest.raises(UpstreamTimeout) as raised:
        await said_by(running)
    assert raised.value.code == "upstream_timeout"
    assert not running.ended


async def test_turn_that_takes_too_long(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(says("Hi"), hang))
    running = new_turn(first_event=0.1, turn=0.2)
    with pytest.raises(UpstreamTimeout) as raised:
        await said_by(running)
    assert raised.value.code == "turn_timeout"
    await running.cancel()
    assert running.ended
    assert len(server.asked("abort_message")) == 1


# Inputs that wait ----------------------------------------------------------------------------------------------------


async def test_input_whose_turn_comes(server: FakeAppServer, new_turn: NewTurn) -> None:
    gate = asyncio.Event()
    server.on(
        "input", script(queued(), says("no"), finished("cancelled"), wait(gate), unqueued(), says("Hi"), finished())
    )
    running = new_turn()
    opening = asyncio.get_running_loop().create_task(running.open())
    await until(lambda: running._queue_item)
    assert not opening.done()
    gate.set()
    await opening
    assert await heard(running) == [TextDelta("Hi"), Stop("end_turn")]


async def test_input_that_waits_too_long_is_taken_back_and_sent_again(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", script(queued(), hang), WELL)
    running = new_turn()
    with pytest.raises(ConversationBusy):
        await running.open()
    assert running.ended
    assert server.queue == {}
    assert await said_by(running) == WELL_SAID
    first, second = server.asked("input")
    assert first["request_id"] != second["request_id"], "the server drops what it has seen"
    assert second["payload"]["messages"][0]["client_message_id"] == second["request_id"]


async def test_input_whose_turn_comes_as_it_is_taken_back(server: FakeAppServer, new_turn: NewTurn) -> None:
    gate = asyncio.Event()
    server.on("input", script(queued(), wait(gate), says("Hi"), finished()))
    server.on("remove_queue_item", script(unqueued(), replies(success=False)))
    running = new_turn()
    await running.open()
    assert not server.queue
    gate.set()
    assert await heard(running) == [TextDelta("Hi"), Stop("end_turn")]


async def test_input_that_is_neither_started_nor_given_back(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", script(queued(), hang))
    server.on("remove_queue_item", replies(success=False))
    running = new_turn()
    with pytest.raises(UpstreamTimeout) as raised:
        await running.open()
    assert raised.value.should_retry is False
    assert not running.ended


@pytest.mark.parametrize("ending", [close, cut_off])
async def test_socket_that_is_lost_under_an_input_that_waits(
    server: FakeAppServer, new_turn: NewTurn, ending: Answer
) -> None:
    server.on("input", script(queued(), ending))
    running = new_turn()
    await running.open()
    assert await cut_short(running, UpstreamTruncated) == []
    assert running.ended


async def test_input_that_somebody_takes_out(server: FakeAppServer, new_turn: NewTurn) -> None:
    gate = asyncio.Event()
    server.on("input", script(queued(), wait(gate), unqueued(disposition="cancelled")))
    running = new_turn()
    opening = asyncio.get_running_loop().create_task(running.open())
    await until(lambda: running._queue_item)
    gate.set()
    await opening
    with pytest.raises(TurnCancelled):
        await heard(running)
    assert running.ended


async def test_input_that_is_dequeued_twice(server: FakeAppServer, new_turn: NewTurn) -> None:
    async def taken_out(exchange: Exchange) -> None:
        removed = [{"client_message_id": exchange.command["request_id"], "disposition": "cancelled"}]
        await exchange.event("update_queue", queue=[], removed=removed)

    server.on("input", script(queued(), unqueued(), taken_out, says("Hi"), finished()))
    assert await said_by(new_turn()) == [TextDelta("Hi"), Stop("end_turn")]


async def test_cancel_takes_a_waiting_input_back(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", script(queued("q-7"), hang))
    running = new_turn()
    await give_up(running.open, lambda: running._queue_item)
    await running.cancel()
    assert running.ended
    (removal,) = server.asked("remove_queue_item")
    assert (removal["item_id"], removal["runtime"]) == ("q-7", HERE)
    assert server.queue == {}
    assert server.asked("abort_message") == []


async def test_cancel_of_a_waiting_input_whose_turn_comes_meanwhile(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", script(queued(), hang))
    server.on("remove_queue_item", script(unqueued(), replies(success=False)))
    running = new_turn()
    await give_up(running.open, lambda: running._queue_item)
    await running.cancel()
    assert running.ended
    assert len(server.asked("abort_message")) == 1


async def test_cancel_of_a_waiting_input_that_is_taken_up_after_it_could_not_be_removed(
    server: FakeAppServer, new_turn: NewTurn
) -> None:
    async def pause(_: Exchange) -> None:
        await asyncio.sleep(0.03)

    server.on("input", script(queued(), hang))
    server.on("remove_queue_item", script(replies(success=False), pause, unqueued()))
    running = new_turn()
    await give_up(running.open, lambda: running._queue_item)
    await running.cancel()
    assert running.ended
    assert len(server.asked("remove_queue_item")) == 1
    assert len(server.asked("abort_message")) == 1


async def test_cancel_of_a_waiting_input_that_is_neither_removed_nor_taken_up(
    server: FakeAppServer, new_turn: NewTurn
) -> None:
    server.on("input", script(queued(), hang))
    server.on("remove_queue_item", replies(success=False))
    running = new_turn()
    await give_up(running.open, lambda: running._queue_item)
    with pytest.raises(TimeoutError):
        await running.cancel()
    assert not running.ended
    assert server.asked("abort_message") == [], "another turn may be under way"


async def test_cancel_of_a_waiting_input_whose_place_is_told_late(server: FakeAppServer, new_turn: NewTurn) -> None:
    gate = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        request = exchange.command["request_id"]
        exchange.server.queue["q-7"] = request
        await accepted("queued")(exchange)
        await gate.wait()
        await exchange.event("update_queue", queue=[{"id": "q-7", "client_message_id": request}], removed=[])
        await hang(exchange)

    server.on("input", answer)
    running = new_turn()
    await give_up(running.open, lambda: server.asked("input"))
    assert running._queue_item is None
    asyncio.get_running_loop().call_later(0.02, gate.set)
    await running.cancel()
    assert running.ended
    assert [removal["item_id"] for removal in server.asked("remove_queue_item")] == ["q-7"]
    assert server.queue == {}
    assert server.asked("abort_message") == []


# Cancelling ----------------------------------------------------------------------------------------------------------


async def test_cancel_of_what_was_never_sent(server: FakeAppServer, new_turn: NewTurn) -> None:
    running = new_turn()
    assert running.ended
    await running.cancel()
    await running.drain()
    assert server.commands == []


async def test_turn_given_up_before_it_is_sent(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("runtime_start", hang)
    running = new_turn()
    await give_up(running.open, lambda: server.asked("runtime_start"))
    assert running.ended
    await running.cancel()
    running.close()
    await until(lambda: not running._backend.tasks)
    assert server.asked("input") == []


async def test_cancel_aborts_and_sees_the_turn_end(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(says("Hi"), hang))
    running = new_turn()
    await running.open()
    assert await next_batch(running) == [TextDelta("Hi")]
    await running.cancel()
    assert running.ended
    (abort,) = server.asked("abort_message")
    assert abort["runtime"] == HERE
    await running.cancel()
    assert len(server.asked("abort_message")) == 1
    assert [type(each) for each in await heard(running)] == [Failure]


async def test_cancel_waits_for_the_end_no_longer_than_it_says(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(hang))
    server.on("abort_message", replies(aborted=True))
    running = new_turn()
    await running.open()
    started = asyncio.get_running_loop().time()
    await running.cancel()
    assert 0.25 < asyncio.get_running_loop().time() - started < 1
    assert not running.ended


async def test_agent_whose_turn_does_not_end_goes_on_in_a_copy_of_its_thread(
    server: FakeAppServer, new_turn: NewTurn
) -> None:
    server.on("input", turn(hang), WELL)
    server.on("abort_message", replies(aborted=True))
    stuck = new_turn()
    await stuck.open()
    await stuck.cancel()
    (fork,) = server.asked("conversation_fork")
    assert fork["conversation_id"] == THREADS[AGENT]
    assert await said_by(new_turn()) == WELL_SAID
    copy = server.conversations[-1]
    assert (copy["agent_id"], copy["summary"]) == (AGENT, server.conversations[0]["summary"])
    assert server.asked("input")[-1]["runtime"] == {"agent_id": AGENT, "conversation_id": copy["id"]}
    assert server.asked("runtime_start")[-1]["conversation_id"] == copy["id"]
    assert await said_by(new_turn(agent=OTHER)) == WELL_SAID
    assert server.asked("input")[-1]["runtime"]["conversation_id"] == THREADS[OTHER]


@pytest.mark.parametrize(
    ("answer", "kind"), [(replies(success=False), UpstreamInvalid), (cut_off, UpstreamUnavailable)]
)
async def test_thread_that_cannot_be_copied_is_kept(
    server: FakeAppServer, new_turn: NewTurn, answer: Answer, kind: type[GatewayError]
) -> None:
    server.on("input", turn(hang), WELL)
    server.on("abort_message", replies(aborted=True))
    server.on("conversation_fork", answer)
    stuck = new_turn()
    await stuck.open()
    with pytest.raises(kind):
        await stuck.cancel()
    assert await said_by(new_turn()) == WELL_SAID
    assert server.asked("input")[-1]["runtime"] == HERE


async def test_abort_that_is_not_answered(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(hang))
    server.on("abort_message", hang)
    running = new_turn()
    await running.open()
    with pytest.raises(UpstreamTimeout):
        await running.cancel()


async def test_cancel_waits_for_the_acceptance_first(server: FakeAppServer, new_turn: NewTurn) -> None:
    gate = asyncio.Event()
    server.on("input", script(wait(gate), accepted(), hang))
    running = new_turn()
    await give_up(running.open, lambda: server.asked("input"))
    asyncio.get_running_loop().call_later(0.05, gate.set)
    await running.cancel()
    assert running.ended
    assert [command["type"] for command in server.commands][-2:] == ["input", "abort_message"]


async def test_cancel_of_a_turn_that_ends_as_it_is_accepted(server: FakeAppServer, new_turn: NewTurn) -> None:
    gate = asyncio.Event()
    server.on("input", script(wait(gate), close))
    running = new_turn()
    await give_up(running.open, lambda: server.asked("input"))
    asyncio.get_running_loop().call_later(0.02, gate.set)
    await running.cancel()
    assert running.ended


async def test_turn_that_somebody_else_aborts(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(says("Hi"), stop("cancelled"), finished("cancelled")))
    assert isinstance(await failure_of(new_turn()), TurnCancelled)


async def test_drain_hears_the_turn_to_its_end(server: FakeAppServer, new_turn: NewTurn) -> None:
    gate = asyncio.Event()
    server.on("input", turn(says("Hi"), wait(gate), says("more"), finished()))
    running = new_turn()
    await running.open()
    assert await next_batch(running) == [TextDelta("Hi")]
    asyncio.get_running_loop().call_later(0.02, gate.set)
    await running.drain()
    assert running.ended
    assert server.asked("abort_message") == []


async def test_drain_of_a_turn_that_is_not_accepted_yet(server: FakeAppServer, new_turn: NewTurn) -> None:
    gate = asyncio.Event()
    server.on("input", script(wait(gate), accepted(), says("Hi"), finished()))
    running = new_turn()
    await give_up(running.open, lambda: server.asked("input"))
    gate.set()
    await running.drain()
    assert running.ended


# Aborting ------------------------------------------------------------------------------------------------------------


async def test_abort_before_the_turn_is_opened(new_turn: NewTurn) -> None:
    running = new_turn()
    running.abort(LEAVE)
    running.abort(ConversationBusy())
    with pytest.raises(ShuttingDown) as raised:
        await running.open()
    assert raised.value is LEAVE


@pytest.mark.parametrize(("kind", "ended"), [("runtime_start", True), ("input", False)])
async def test_abort_while_it_is_opened(server: FakeAppServer, new_turn: NewTurn, kind: str, *, ended: bool) -> None:
    server.on(kind, hang)
    running = new_turn()
    opening = asyncio.get_running_loop().create_task(running.open())
    await until(lambda: server.asked(kind))
    running.abort(LEAVE)
    with pytest.raises(ShuttingDown) as raised:
        await opening
    assert raised.value is LEAVE
    assert running.ended is ended


async def test_abort_while_it_is_heard(server: FakeAppServer, new_turn: NewTurn) -> None:
    gate = asyncio.Event()
    server.on("input", turn(says("Hi"), wait(gate), says("more"), finished()))
    running = new_turn()
    await running.open()
    assert await next_batch(running) == [TextDelta("Hi")]
    asyncio.get_running_loop().call_later(0.02, running.abort, LEAVE)
    with pytest.raises(ShuttingDown):
        await heard(running)
    assert not running.ended
    gate.set()
    await until(lambda: running.ended)


async def test_cancel_after_an_abort(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(says("Hi"), hang))
    running = new_turn()
    await running.open()
    running.abort(LEAVE)
    await running.cancel()
    assert running.ended
    assert len(server.asked("abort_message")) == 1


async def test_socket_that_is_lost_after_an_abort(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(says("Hi"), hang))
    running = new_turn()
    await running.open()
    running.abort(LEAVE)
    server.cut()
    await until(lambda: running.ended)
    assert await cut_short(running, ShuttingDown) == [TextDelta("Hi")]


async def test_close_before_the_turn_is_opened(new_turn: NewTurn) -> None:
    running = new_turn()
    running.close()
    running.close()


# The socket ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [close, cut_off])
async def test_socket_that_is_lost_in_the_middle(server: FakeAppServer, new_turn: NewTurn, ending: Answer) -> None:
    gate = asyncio.Event()
    server.on("input", turn(wait(gate), says("Hi"), ending), WELL)
    running = new_turn()
    await running.open()
    gate.set()
    assert await cut_short(running, UpstreamTruncated) == [TextDelta("Hi")]
    assert running.ended  # a socket that is closed cancels what runs on it
    await running.cancel()
    assert server.asked("abort_message") == []
    assert await said_by(new_turn()) == WELL_SAID
    assert server.connections == 2
    assert len(server.asked("runtime_start")) == 2


@pytest.mark.parametrize("ending", [close, cut_off])
async def test_socket_that_is_lost_as_the_thread_is_started(
    server: FakeAppServer, new_turn: NewTurn, ending: Answer
) -> None:
    server.on("runtime_start", script(replies(runtime=HERE), ending))
    running = new_turn()
    with pytest.raises(UpstreamUnavailable) as raised:
        await running.open()
    assert raised.value.should_retry is False
    assert running.ended
    assert server.asked("input") == []


async def test_socket_that_is_lost_before_the_acceptance(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", cut_off)
    running = new_turn()
    with pytest.raises(UpstreamUnavailable) as raised:
        await running.open()
    assert raised.value.should_retry is False
    assert running.ended


async def test_socket_that_is_lost_with_several_turns(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(says("Hi"), hang))
    turns = [new_turn(agent=agent) for agent in (AGENT, OTHER)]
    for running in turns:
        await running.open()
        assert await next_batch(running) == [TextDelta("Hi")]
    assert server.connections == 1
    server.cut()
    for running in turns:
        with pytest.raises(UpstreamTruncated):
            await heard(running)


async def test_server_that_falls_silent(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(says("Hi"), hang))
    running = new_turn(silence=0.3)
    await running.open()
    assert await next_batch(running) == [TextDelta("Hi")]
    server.freeze()
    async with asyncio.timeout(SOON):
        with pytest.raises(UpstreamTruncated):
            await heard(running)


async def test_server_that_says_nothing_but_lives(server: FakeAppServer, new_turn: NewTurn) -> None:
    gate = asyncio.Event()
    server.on("input", turn(says("Hi"), wait(gate), finished()))
    running = new_turn(silence=0.9)
    asyncio.get_running_loop().call_later(1.0, gate.set)
    assert await said_by(running) == [TextDelta("Hi"), Stop("end_turn")]


# Slow takers ---------------------------------------------------------------------------------------------------------


async def test_slow_taker_loses_nothing_and_delays_nobody(server: FakeAppServer, new_turn: NewTurn) -> None:
    words = [f"{number} " for number in range(50)]
    gate = asyncio.Event()
    server.on("input", turn(*map(says, words), wait(gate), finished()))
    slow = new_turn()
    taker = SlowTaker()
    await slow.open()
    taking = asyncio.get_running_loop().create_task(slow.deliver(taker.take, taker.ready))
    await taker.waits.wait()
    server.on("input", turn(says("Hi"), finished()))
    quick = new_turn(agent=OTHER)
    assert await said_by(quick) == [TextDelta("Hi"), Stop("end_turn")]
    assert server.connections == 1
    assert taker.events == [TextDelta(words[0])]
    gate.set()
    await until(lambda: slow.ended)
    assert not taking.done()
    taker.go_on.set()
    await taking
    assert taker.events == [*map(TextDelta, words), Stop("end_turn")]


async def test_taker_that_is_far_too_slow(
    server: FakeAppServer, new_turn: NewTurn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_server_turn, "MOST_WAITING", 10_000)
    gate = asyncio.Event()
    server.on("input", turn(wait(gate), *[says("x" * 1_000)] * 20, hang), turn(says("Hi"), finished()))
    slow = new_turn()
    taker = SlowTaker()
    await slow.open()
    gate.set()
    taking = asyncio.get_running_loop().create_task(slow.deliver(taker.take, taker.ready))
    await taker.waits.wait()
    assert await said_by(new_turn(agent=OTHER)) == [TextDelta("Hi"), Stop("end_turn")]
    taker.go_on.set()
    with pytest.raises(ConnectionResetError):
        await taking
    assert 0 < len(taker.events) < 20
    await slow.cancel()
    assert slow.ended


async def test_taker_that_always_lags_a_little_is_never_too_slow(
    server: FakeAppServer, new_turn: NewTurn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has taken counts no more."""
    monkeypatch.setattr(app_server_turn, "MOST_WAITING", 10_000)
    steps = asyncio.Semaphore(2)

    async def step(_: Exchange) -> None:
        await steps.acquire()

    server.on("input", turn(*[script(step, says("x" * 500))] * 60, finished()))
    running = new_turn()
    await running.open()
    events: list[AgentEvent] = []

    def take(batch: Batch) -> bool:
        events.extend(batch)
        return False

    async def ready() -> None:
        steps.release()
        await until(lambda: running._waiting or running.ended)

    async with asyncio.timeout(SOON):
        await running.deliver(take, ready)
    assert events == [*[TextDelta("x" * 500)] * 60, Stop("end_turn")]
    assert running._waiting_bytes == 0


async def test_drain_of_a_turn_whose_taker_was_far_too_slow(
    server: FakeAppServer, new_turn: NewTurn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_server_turn, "MOST_WAITING", 10_000)
    start, end = asyncio.Event(), asyncio.Event()
    server.on("input", turn(wait(start), *[says("x" * 1_000)] * 20, wait(end), says("more"), finished()))
    running = new_turn()
    taker = SlowTaker()
    await running.open()
    start.set()
    taking = asyncio.get_running_loop().create_task(running.deliver(taker.take, taker.ready))
    await taker.waits.wait()
    await until(lambda: running._is_flooded)
    assert (len(running._waiting), running._waiting_bytes) == (0, 0), "nothing is kept for it any more"
    taker.go_on.set()
    with pytest.raises(ConnectionResetError):
        await taking
    asyncio.get_running_loop().call_later(0.05, end.set)
    async with asyncio.timeout(SOON):
        await running.drain()
    assert running.ended
    assert server.asked("abort_message") == []


async def test_taker_that_raises(server: FakeAppServer, new_turn: NewTurn) -> None:
    def take(_: Batch) -> bool:
        raise ValueError

    running = new_turn()
    await running.open()
    with pytest.raises(ValueError):  # noqa: PT011 - it says no more
        await running.deliver(take, always_ready)
    with contextlib.suppress(GatewayError):
        await running.drain()
    assert running.ended


# Many ----------------------------------------------------------------------------------------------------------------


async def test_several_turns_at_once(server: FakeAppServer, new_turn: NewTurn) -> None:
    agents = [f"agent-{number}" for number in range(20)]
    server.agents = {agent: agent_row(agent, "x") for agent in agents}
    gate = asyncio.Event()

    async def echo(exchange: Exchange) -> None:
        text = exchange.command["payload"]["messages"][0]["content"]
        await script(accepted(), says(text), wait(gate), says("!"), finished())(exchange)

    server.on("input", echo)
    turns = [new_turn(Text(agent), agent=agent) for agent in agents]
    await asyncio.gather(*(running.open() for running in turns))
    assert server.connections == 1
    gate.set()
    said = await asyncio.gather(*(heard(running) for running in turns))
    assert said == [[TextDelta(agent), TextDelta("!"), Stop("end_turn")] for agent in agents]


# First turns on new threads ------------------------------------------------------------------------------------------


@pytest.fixture
def cold_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one turn at a time start on a thread yet to be made."""
    monkeypatch.setattr(app_server, "COLD_STARTS", 1)


def asked_model() -> Step:
    """Tell that the turn waits for its model."""
    return event("update_loop_status", loop_status={"status": "WAITING_FOR_API_RESPONSE", "active_run_ids": []})


@pytest.mark.usefixtures("cold_starts")
@pytest.mark.parametrize("sign", [asked_model(), says("Hel"), finished(), cut_off])
async def test_new_thread_waits_until_the_one_before_is_under_way(
    server: FakeAppServer, new_turn: NewTurn, sign: Step
) -> None:
    go_on, end = asyncio.Event(), asyncio.Event()
    server.conversations.clear()
    server.on("input", turn(wait(go_on), sign, wait(end), finished()), WELL)
    first, second = new_turn(), new_turn(agent=OTHER)
    await first.open()
    opening = asyncio.get_running_loop().create_task(second.open())
    await asyncio.sleep(0.05)
    assert len(server.asked("conversation_create")) == 1
    go_on.set()
    await until(lambda: len(server.asked("input")) == 2)
    assert not end.is_set(), "the first one goes on"
    end.set()
    await opening
    assert (await heard(second))[-1] == Stop("end_turn")
    assert (await said_by(new_turn(agent=OTHER)))[-1] == Stop("end_turn"), "a thread that is there waits for nobody"


@pytest.mark.usefixtures("cold_starts")
async def test_new_thread_that_hangs_holds_up_the_next_one_for_a_while(
    server: FakeAppServer, new_turn: NewTurn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_server_turn, "COLD", 0.2)
    server.conversations.clear()
    server.on("input", turn(hang), WELL)
    await new_turn().open()
    assert (await said_by(new_turn(agent=OTHER)))[-1] == Stop("end_turn")


@pytest.mark.usefixtures("cold_starts")
async def test_new_thread_that_is_given_up_makes_room(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.conversations.clear()
    server.on("conversation_create", hang, create_conversation)
    given_up, waiting = new_turn(), new_turn(agent=OTHER)
    opening = [asyncio.get_running_loop().create_task(running.open()) for running in (given_up, waiting)]
    await until(lambda: server.asked("conversation_create"))
    opening[0].cancel()
    given_up.close()
    await opening[1]
    assert (await heard(waiting))[-1] == Stop("end_turn")
    assert waiting._backend.cold_starts._value == 1


@pytest.mark.usefixtures("cold_starts")
async def test_who_waits_for_room_and_goes_away_takes_none(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.conversations.clear()
    server.on("input", turn(hang))
    first, second = new_turn(), new_turn(agent=OTHER)
    await first.open()
    await give_up(second.open, lambda: second._opening is not None)
    second.close()
    first.close()
    await until(lambda: not first._backend.tasks)
    assert first._backend.cold_starts._value == 1
    assert len(server.asked("conversation_create")) == 1


# What it took --------------------------------------------------------------------------------------------------------


async def test_usage_of_all_steps(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(usage(100, 20), says("Hi"), usage(30, 4, 60), finished()))
    running = new_turn()
    await said_by(running)
    assert await running.usage() == Usage(130, 24, 60, 0)


async def test_usage_of_a_turn_that_failed_after_a_step(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(usage(100, 20), stop("error"), finished("error", "500: {}")))
    running = new_turn()
    await failure_of(running)
    assert await running.usage() == Usage(100, 20, 0, 0)


async def test_turn_without_a_whole_step_took_nothing(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(finished("error", "500: {}")))
    running = new_turn()
    assert await running.usage() is None
    await failure_of(running)
    assert await running.usage() == Usage(0, 0)


async def test_step_that_ends_while_nobody_listens_any_more(server: FakeAppServer, new_turn: NewTurn) -> None:
    gate = asyncio.Event()
    server.on("input", turn(says("Hel"), wait(gate), usage(100, 20), hang))
    running = new_turn()
    await running.open()
    await next_batch(running)
    running.abort(LEAVE)
    gate.set()
    await until(lambda: running._frames.used)
    with pytest.raises(UpstreamTimeout):
        await running.usage()
    await running.cancel()
    assert await running.usage() == Usage(100, 20, 0, 0)


async def test_turn_whose_socket_was_lost(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(usage(100, 20), says("Hel"), cut_off))
    running = new_turn()
    await running.open()
    await cut_short(running, UpstreamTruncated)
    with pytest.raises(UpstreamTimeout):
        await running.usage()


async def test_mark_names_the_message_each_time_anew(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(says("Hi"), finished()))
    first = new_turn()
    running = first._backend.turn(msgspec.structs.replace(first._turn, mark="mark-1"))
    await said_by(running)
    running._begin_anew()
    assert running._request_id == "mark-1.2"
    running.close()
    (asked,) = server.asked("input")
    assert asked["request_id"] == asked["payload"]["messages"][0]["client_message_id"] == "mark-1.1"


# A run that a killed gateway left -------------------------------------------------------------------------------------

ABANDONED: Final = "Conversation local-conv-1 already has an active run (local-run-7)"
IN_THE_WAY: Final = turn(delta("loop_error", message=ABANDONED), finished("error", ABANDONED))


async def test_turn_goes_on_in_a_copy_of_a_conversation_that_waits_for_an_abandoned_run(
    server: FakeAppServer, new_turn: NewTurn
) -> None:
    server.on("input", IN_THE_WAY, WELL)
    running = new_turn()
    assert await said_by(running) == WELL_SAID
    assert [asked["conversation_id"] for asked in server.asked("conversation_fork")] == ["local-conv-1"]
    first, second = server.asked("input")
    assert first["runtime"] == HERE
    assert second["runtime"]["conversation_id"] == server.conversations[-1]["id"] != "local-conv-1"
    assert first["payload"]["messages"][0]["content"] == second["payload"]["messages"][0]["content"]
    assert first["request_id"] != second["request_id"]
    assert running.ended
    assert await running.usage() == Usage(100, 20, 0, 0)
    assert await said_by(new_turn()) == WELL_SAID
    assert server.asked("input")[2]["runtime"] == second["runtime"]


async def test_turn_moves_no_more_than_once(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", IN_THE_WAY)
    assert (await failure_of(new_turn())).code == "agent_run_failed"
    assert len(server.asked("input")) == 2


async def test_client_that_goes_away_before_the_turn_could_move(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", IN_THE_WAY)
    running = new_turn()
    await running.open()
    await until(lambda: running.ended)
    running.close()
    assert await running.usage() == Usage(0, 0)
    assert len(server.asked("input")) == 1
