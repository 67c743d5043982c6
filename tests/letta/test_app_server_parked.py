import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, TypeAlias

import msgspec
import pytest

from gateway.errors import ShuttingDown, UpstreamRejected, UpstreamTimeout
from gateway.letta import app_server, app_server_parked, app_server_turn
from gateway.letta.app_server import AppServerBackend, AppServerConfig
from gateway.letta.app_server_parked import NO_RESULT
from gateway.letta.app_server_turn import AppServerTurn
from gateway.letta.app_server_words import GOES_ON as GOES_ON_WORDS
from gateway.letta.deadlines import Limits
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_events import (
    AgentEvent,
    ServerToolCall,
    ServerToolReturn,
    Stop,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from gateway.translation.agent_turn import AgentTurn, ClientTool, Instructed, Text, ToolResult, UserSaid
from tests.letta import fake_app_server
from tests.letta.batches import heard
from tests.letta.fake_app_server import (
    AGENT,
    SOON,
    THREADS,
    WELL,
    Answer,
    Exchange,
    FakeAppServer,
    accepted,
    asks,
    call,
    checked,
    conversation_row,
    finished,
    hang,
    nothing_leaks,
    queued,
    recorded,
    recorded_after_result,
    replies,
    returned,
    says,
    script,
    tool_step,
    turn,
    unqueued,
    until,
    usage,
)

SCHEMA: Final = msgspec.Raw(b'{"type":"object"}')
HERE: Final = {"agent_id": AGENT, "conversation_id": THREADS[AGENT]}
CHAT: Final = "local-conv-chat"
STOP: Final = Stop("requires_approval")
GOES_ON: Final = (says("Done"), usage(70, 7), finished())
TWO: Final = turn(tool_step(c1="get_weather", c2="get_time"), *GOES_ON)
TWO_WITH_WORDS: Final = turn(tool_step(c1="get_weather", c2="get_time"), unqueued(), *GOES_ON)
CALLED: Final = [
    Usage(50, 5, 0, 0),
    ToolCallDelta("c1", "get_weather", "{}"),
    ToolCallDelta("c2", "get_time", "{}"),
    STOP,
]
WENT_ON: Final = [TextDelta("Done"), Usage(70, 7, 0, 0), Stop("end_turn")]

NewTurn: TypeAlias = Callable[..., AppServerTurn]


@pytest.fixture(autouse=True)
async def clean() -> AsyncIterator[None]:
    async with nothing_leaks():
        yield


@pytest.fixture
async def server() -> AsyncIterator[FakeAppServer]:
    async with FakeAppServer() as server:
        server.conversations.append(conversation_row(CHAT, AGENT, "A chat"))
        yield server


@pytest.fixture
def options() -> dict[str, Any]:
    """What a test wants the backend to be like."""
    return {}


@pytest.fixture
async def backend(
    server: FakeAppServer, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[AppServerBackend]:
    monkeypatch.setattr(app_server, "SOCKETS", 1)
    monkeypatch.setattr(app_server_parked, "ANSWER", 0.5)
    monkeypatch.setattr(app_server_turn, "SETTLE", 0.5)
    backend = AppServerBackend(AppServerConfig(server.url, **options), Metrics(), TaskSet())
    yield backend
    await until(lambda: not backend.tasks)
    async with asyncio.timeout(SOON):
        await backend.close()
    assert not backend.threads.parked
    await until(lambda: not backend.tasks)


@pytest.fixture
async def new_turn(backend: AppServerBackend) -> AsyncIterator[NewTurn]:
    made: list[AppServerTurn] = []

    def new_turn(*news: str, tools: tuple[str, ...] = ("get_weather", "get_time"), **fields: Any) -> AppServerTurn:
        offered = tuple(ClientTool(name, "", SCHEMA) for name in tools)
        said = tuple(UserSaid((Text(text),)) for text in news)
        made.append(backend.turn(AgentTurn(**{"agent_id": AGENT, "tools": offered, "news": said, **fields})))
        return made[-1]

    yield new_turn
    for running in made:
        running.close()


def results(**texts: str) -> tuple[ToolResult, ...]:
    return tuple(ToolResult(call_id, text) for call_id, text in texts.items())


async def said_by(running: AppServerTurn) -> list[AgentEvent]:
    """Open the turn, and return all its events."""
    async with asyncio.timeout(SOON):
        await running.open()
        return await heard(running)


def has_ended(running: AppServerTurn) -> bool:
    return running.ended


def payloads(server: FakeAppServer) -> list[Any]:
    return [command["payload"] for command in server.asked("input")]


def contents(server: FakeAppServer) -> list[Any]:
    return [payload["messages"][0]["content"] for payload in payloads(server)]


def kinds(server: FakeAppServer) -> list[str]:
    wanted = ("input", "external_tool_call_response", "abort_message", "remove_queue_item")
    return [command["type"] for command in server.commands if command["type"] in wanted]


# The loop ------------------------------------------------------------------------------------------------------------


async def test_recorded_loop(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", recorded("3-external-tool-turn", "m3"))
    request = "external-tool-da323825-9119-413f-96a2-0ba1386ac259"
    server.on("external_tool_call_response", recorded_after_result("3-external-tool-turn", request, "m3"))
    first = new_turn("call get_weather now", tools=("get_weather",))
    called = "call_c444616a52a84bac9109"
    assert await said_by(first) == [
        Usage(100, 20, 0, 0),
        ToolCallDelta(called, "get_weather", '{"city":"Paris"}'),
        STOP,
    ]
    assert first.ended
    *text, count, end = await said_by(new_turn(tools=("get_weather",), returns=results(**{called: "sunny 20C"})))
    assert "".join(event.text for event in text if isinstance(event, TextDelta)) == "Tool said: sunny 20C"
    assert (count, end) == (Usage(100, 20, 0, 0), Stop("end_turn"))
    assert server.asked("external_tool_call_response") == [
        {
            "type": "external_tool_call_response",
            "request_id": request,
            "result": {"content": [{"type": "text", "text": "sunny 20C"}]},
        }
    ]


@pytest.mark.parametrize("conversation", [None, CHAT])
async def test_two_calls_and_their_results(
    server: FakeAppServer, backend: AppServerBackend, new_turn: NewTurn, conversation: str | None
) -> None:
    server.on("input", TWO)
    first = new_turn("What is up?", conversation_id=conversation)
    assert await said_by(first) == CALLED
    assert first.ended
    assert [*backend.threads.parked] == [first._runtime]
    assert backend.parked == 1
    second = new_turn(
        conversation_id=conversation, returns=(ToolResult("c1", "no net", succeeded=False), ToolResult("c2", "12:00"))
    )
    assert await said_by(second) == WENT_ON
    assert server.results == {"c1": ("no net", True), "c2": ("12:00", False)}
    assert kinds(server) == ["input", "external_tool_call_response", "external_tool_call_response"]
    assert server.asked("input")[0]["runtime"] == {
        "agent_id": AGENT,
        "conversation_id": conversation or THREADS[AGENT],
    }


async def test_loop_of_several_rounds(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(tool_step(c1="get_time"), tool_step(c2="get_weather"), *GOES_ON))
    assert await said_by(new_turn("Hi")) == [Usage(50, 5, 0, 0), ToolCallDelta("c1", "get_time", "{}"), STOP]
    again = await said_by(new_turn(returns=results(c1="12:00")))
    assert again == [Usage(50, 5, 0, 0), ToolCallDelta("c2", "get_weather", "{}"), STOP]
    assert await said_by(new_turn(returns=results(c2="rain"))) == WENT_ON
    assert server.results == {"c1": ("12:00", False), "c2": ("rain", False)}


async def test_what_goes_out_with_tools(server: FakeAppServer, new_turn: NewTurn) -> None:
    for _ in range(2):
        assert await said_by(new_turn("Hi")) != []
    start, *others = server.asked("runtime_start")
    assert not others
    assert start["mode"] == "unrestricted"
    (group,) = start["external_tools"]
    assert [tool["name"] for tool in group["tools"]] == ["get_weather", "get_time"]
    for payload in payloads(server):
        assert payload["external_tool_scope_ids"] == [group["scope_id"]]
        assert payload["client_tool_allowlist"] == ["get_weather", "get_time"]
        assert payload["client_toolset"] == {"base": "none", "include": []}
        assert payload["exclude_interactive_tools"] is True
    assert server.asked("runtime_external_tools_update") == []


async def test_tools_are_registered_again_when_they_change(server: FakeAppServer, new_turn: NewTurn) -> None:
    for tools in (("a",), ("a",), ("b", "c"), (), ("b", "c"), ("a",)):
        await said_by(new_turn("Hi", tools=tools))
    registered = [
        [tool["name"] for group in update["external_tools"] for tool in group["tools"]]
        for command in server.asked("runtime_external_tools_update")
        for update in command["updates"]
        if update["runtimes"] == [HERE]
    ]
    assert registered == [["b", "c"], ["a"]]
    assert payloads(server)[3] == {
        "kind": "create_message",
        "messages": payloads(server)[3]["messages"],
        "client_tool_allowlist": [],
        "client_toolset": {"base": "none", "include": []},
        "exclude_interactive_tools": True,
    }


async def test_thread_that_was_used_without_tools_is_started_for_them(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.conversations.clear()
    await said_by(new_turn("Hi", tools=()))
    assert server.asked("runtime_start") == []
    await said_by(new_turn("Hi"))
    assert [command["mode"] for command in server.asked("runtime_start")] == ["unrestricted"]


@pytest.mark.parametrize("options", [{"server_tools": {"*": ("Bash", "look")}}])
async def test_tools_of_both_sides(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on(
        "input",
        turn(
            call("s1", "Bash"),
            call("c1", "client_look"),
            checked(("s1", "c1")),
            asks("c1", "client_look"),
            returned("s1", "hi"),
            returned("c1", "seen"),
            *GOES_ON,
        ),
    )
    assert await said_by(new_turn("Hi", tools=("look",))) == [
        ServerToolCall("s1", "Bash", "{}"),
        ToolCallDelta("c1", "look", "{}"),
        STOP,
    ]
    assert payloads(server)[0]["client_tool_allowlist"] == ["Bash", "look", "client_look"]
    assert payloads(server)[0]["client_toolset"] == {"base": "none", "include": ["Bash", "look"]}
    again = await said_by(new_turn(tools=("look",), returns=results(c1="seen")))
    assert again == [ServerToolReturn("s1", None, succeeded=True), *WENT_ON]


async def test_call_that_the_server_refuses_is_not_the_clients(server: FakeAppServer, new_turn: NewTurn) -> None:
    refused = script(call("c1", "get_time"), checked((), ("c1",)), returned("c1", "missing parameter", "error"))
    server.on("input", turn(refused, *GOES_ON))
    assert await said_by(new_turn("Hi")) == [
        ServerToolCall("c1", "get_time", "{}"),
        ServerToolReturn("c1", None, succeeded=False),
        *WENT_ON,
    ]


async def test_server_that_asks_for_all_results_at_once(server: FakeAppServer, new_turn: NewTurn) -> None:
    async def both(exchange: Exchange) -> None:
        await asyncio.gather(asks("c1", "get_weather")(exchange), asks("c2", "get_time")(exchange))

    step = script(call("c1", "get_weather"), call("c2", "get_time"), usage(50, 5), checked(("c1", "c2")), both)
    server.on("input", turn(step, *GOES_ON))
    assert await said_by(new_turn("Hi")) == CALLED
    await until(lambda: len(server.pending) == 2)
    assert await said_by(new_turn(returns=results(c2="12:00", c1="rain"))) == WENT_ON
    assert server.results == {"c1": ("rain", False), "c2": ("12:00", False)}


async def test_clock_of_a_turn_that_waits_stands_still(server: FakeAppServer, backend: AppServerBackend) -> None:
    limited = AppServerBackend(
        AppServerConfig(server.url, limits=Limits(first_event=0.4, turn=0.5)), backend.metrics, backend.tasks
    )
    tools = (ClientTool("get_time", "", SCHEMA),)
    server.on("input", turn(tool_step(c1="get_time"), *GOES_ON), turn(hang))
    first = limited.turn(AgentTurn(agent_id=AGENT, news=(UserSaid((Text("Hi"),)),), tools=tools))
    assert (await said_by(first))[-1] == STOP
    await asyncio.sleep(0.6)
    second = limited.turn(AgentTurn(agent_id=AGENT, returns=results(c1="12:00"), tools=tools))
    assert await said_by(second) == WENT_ON
    late = limited.turn(AgentTurn(agent_id=AGENT, news=(UserSaid((Text("Hi"),)),), tools=tools))
    with pytest.raises(UpstreamTimeout):
        await said_by(late)
    for running in (first, second, late):
        running.close()
    await limited.close()


# More than results ---------------------------------------------------------------------------------------------------


async def test_results_that_come_with_a_message(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", TWO_WITH_WORDS, queued())
    await said_by(new_turn("Hi"))
    assert await said_by(new_turn("Be quick", returns=results(c1="rain", c2="12:00"))) == WENT_ON
    assert server.results == {"c1": ("rain", False), "c2": ("12:00", False)}
    assert contents(server) == ["Hi", "Be quick"]
    assert kinds(server) == ["input", "input", "external_tool_call_response", "external_tool_call_response"]


async def test_some_of_the_results(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", TWO)
    await said_by(new_turn("Hi"))
    assert await said_by(new_turn(returns=results(c2="12:00"))) == WENT_ON
    assert server.results == {"c1": (NO_RESULT, True), "c2": ("12:00", False)}


async def test_message_instead_of_the_results(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", TWO_WITH_WORDS, queued())
    await said_by(new_turn("Hi"))
    second = new_turn(news=(Instructed("Be nice."), UserSaid((Text("Never mind"),))))
    assert await said_by(second) == WENT_ON
    assert second.ended
    assert server.results == {"c1": (NO_RESULT, True), "c2": (NO_RESULT, True)}
    assert contents(server)[1] == [
        {"type": "text", "text": "<system-reminder>\nBe nice.\n</system-reminder>"},
        {"type": "text", "text": "Never mind"},
    ]


async def test_results_of_other_calls_are_told_in_words(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", TWO_WITH_WORDS, queued())
    await said_by(new_turn("Hi"))
    assert await said_by(new_turn(returns=results(c1="rain", c9="old"))) == WENT_ON
    assert server.results == {"c1": ("rain", False), "c2": (NO_RESULT, True)}
    assert contents(server)[1] == "Result of the tool call c9: old"


async def test_result_that_is_too_long_for_the_server(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", TWO_WITH_WORDS, queued())
    await said_by(new_turn("Hi"))
    long = "".join(f"line {number}\n" for number in range(5_000))
    assert await said_by(new_turn(returns=results(c1=long, c2="12:00"))) == WENT_ON
    taken, is_error = server.results["c1"]
    assert not is_error
    assert len(taken) < 32_000
    start, rest = taken.removesuffix(GOES_ON_WORDS), contents(server)[1]
    assert rest.startswith("The rest of the result of the tool get_weather:\n")
    assert start + rest.partition("\n")[2] == long


@pytest.mark.parametrize("tools", [(), ("other",)])
async def test_message_with_other_tools(server: FakeAppServer, new_turn: NewTurn, tools: tuple[str, ...]) -> None:
    server.on("input", turn(tool_step(c1="get_weather", c2="get_time"), hang), WELL)
    await said_by(new_turn("Hi"))
    events = await said_by(new_turn("Go on", tools=tools, returns=results(c1="rain")))
    assert events[-1] == Stop("end_turn")
    assert contents(server)[1] == [
        {"type": "text", "text": "Result of the tool get_weather: rain"},
        {"type": "text", "text": "Go on"},
    ]
    assert payloads(server)[1]["client_tool_allowlist"] == list(tools)
    assert kinds(server)[:3] == ["input", "external_tool_call_response", "abort_message"]
    assert server.results["c1"] == (NO_RESULT, True)


async def test_turn_with_other_tools_that_does_not_end(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(tool_step(c1="get_time"), hang), WELL)
    server.on("abort_message", replies(aborted=True))
    await said_by(new_turn("Hi"))
    assert (await said_by(new_turn("Go on", tools=())))[-1] == Stop("end_turn")
    assert server.asked("input")[1]["runtime"]["conversation_id"] != THREADS[AGENT]


@pytest.mark.parametrize("cut", [True, False])
async def test_results_after_the_socket_was_lost(server: FakeAppServer, new_turn: NewTurn, *, cut: bool) -> None:
    server.on("input", TWO, WELL)
    first = new_turn("Hi")
    await said_by(first)
    if cut:
        server.cut()
        await until(lambda: not first._backend.threads.parked)
    else:
        first._backend.threads.parked.clear()  # as after a restart
    again = await said_by(new_turn("And?", returns=results(c1="rain", c2="12:00")))
    assert again[-1] == Stop("end_turn")
    assert contents(server)[1] == [
        {"type": "text", "text": "Result of the tool call c1: rain"},
        {"type": "text", "text": "Result of the tool call c2: 12:00"},
        {"type": "text", "text": "And?"},
    ]


async def test_turn_that_ended_without_the_results(server: FakeAppServer, new_turn: NewTurn) -> None:
    async def gives_up(exchange: Exchange) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await asks("c1", "get_time")(exchange)
        await finished("cancelled")(exchange)

    server.on("input", turn(call("c1", "get_time"), checked(("c1",)), gives_up), WELL)
    first = new_turn("Hi")
    assert (await said_by(first))[-1] == STOP
    await until(lambda: not first._backend.threads.parked)
    assert (await said_by(new_turn(returns=results(c1="12:00"))))[-1] == Stop("end_turn")
    assert contents(server)[1] == "Result of the tool call c1: 12:00"


# Nobody comes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"parked_timeout": 0.1}])
async def test_turn_that_waits_too_long(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(tool_step(c1="get_time"), hang), WELL)
    first = new_turn("Hi")
    await said_by(first)
    await until(lambda: server.asked("abort_message"))
    await until(lambda: not first._backend.threads.parked)
    assert kinds(server) == ["input", "external_tool_call_response", "abort_message"]
    assert server.results == {"c1": (NO_RESULT, True)}
    assert (await said_by(new_turn(returns=results(c1="late"))))[-1] == Stop("end_turn")
    assert contents(server)[1] == "Result of the tool call c1: late"


async def test_no_turn_waits_longer_than_the_server_does(new_turn: NewTurn, server: FakeAppServer) -> None:
    server.on("input", turn(tool_step(c1="get_time"), hang))
    first = new_turn("Hi")
    await said_by(first)
    (parked,) = first._backend.threads.parked.values()
    assert 280 < parked._limit.when() - asyncio.get_running_loop().time() < 290


async def test_close_ends_what_waits(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(tool_step(c1="get_time"), hang))
    first = new_turn("Hi")
    await said_by(first)
    started = time.monotonic()
    await first._backend.close()
    assert time.monotonic() - started < 0.4
    assert kinds(server) == ["input", "external_tool_call_response", "abort_message"]
    assert not first._backend.threads.parked


async def test_conversation_that_is_deleted_under_a_turn_that_waits(
    server: FakeAppServer, backend: AppServerBackend, new_turn: NewTurn
) -> None:
    chat = await backend.new_conversation(AGENT)
    server.on("input", turn(tool_step(c1="get_time"), hang))
    await said_by(new_turn("Hi", conversation_id=chat))
    await backend.delete_conversation(chat)
    assert not backend.threads.parked
    assert kinds(server) == ["input", "external_tool_call_response", "abort_message"]
    (update,) = server.asked("runtime_external_tools_update")[-1]["updates"]
    assert update == {"runtimes": [{"agent_id": AGENT, "conversation_id": chat}], "external_tools": []}


# Who goes away -------------------------------------------------------------------------------------------------------


async def test_call_of_a_turn_that_is_being_cancelled(server: FakeAppServer, new_turn: NewTurn) -> None:
    go_on = asyncio.Event()

    async def waits(_: Exchange) -> None:
        await go_on.wait()

    async def aborted(exchange: Exchange) -> None:
        go_on.set()
        await exchange.reply(runtime=exchange.runtime, aborted=True)

    server.on("input", turn(says("Hm"), waits, tool_step(c1="get_time"), finished("cancelled")))
    server.on("abort_message", aborted)
    running = new_turn("Hi")
    await running.open()
    assert not has_ended(running)
    async with asyncio.timeout(SOON):
        await running.cancel()
    assert server.results == {"c1": (NO_RESULT, True)}
    assert has_ended(running)
    assert not running._backend.threads.parked


@pytest.mark.parametrize("news", [(), ("Be quick",)])
async def test_cancel_of_a_turn_that_went_on(server: FakeAppServer, new_turn: NewTurn, news: tuple[str, ...]) -> None:
    server.on("input", turn(tool_step(c1="get_time"), *([unqueued()] if news else []), says("Hm"), hang), queued())
    await said_by(new_turn("Hi"))
    second = new_turn(*news, returns=results(c1="12:00"))
    await second.open()
    await until(lambda: second._waiting)
    assert not has_ended(second)
    async with asyncio.timeout(SOON):
        await second.cancel()
    assert has_ended(second)
    assert kinds(server)[-1] == "abort_message"
    assert server.asked("remove_queue_item") == []


async def test_turn_given_up_before_its_results_are_sent(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", TWO, script())
    await said_by(new_turn("Hi"))
    second = new_turn("Be quick", returns=results(c1="rain", c2="12:00"))
    opening = asyncio.get_running_loop().create_task(second.open())
    await until(lambda: len(server.asked("input")) == 2)
    second.abort(ShuttingDown("The test is over."))
    with pytest.raises(ShuttingDown):
        await opening
    assert not has_ended(second)
    async with asyncio.timeout(SOON):
        await second.cancel()
    assert server.results["c1"] == (NO_RESULT, True)


async def test_cancel_takes_back_what_waits_behind_the_calls(server: FakeAppServer, new_turn: NewTurn) -> None:
    steps = (call("c1", "get_time"), checked(("c1",)), asks("c1", "get_time"), hang)
    server.on("input", turn(*steps), queued())
    await said_by(new_turn("Hi"))
    second = new_turn("Be quick", returns=results(c1="12:00"))
    await second.open()
    async with asyncio.timeout(SOON):
        await second.cancel()
    assert kinds(server)[-2:] == ["remove_queue_item", "abort_message"]
    assert has_ended(second)


async def test_input_with_results_that_is_refused(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", TWO, accepted(accepted=False, error="no"))
    await said_by(new_turn("Hi"))
    second = new_turn("Be quick", returns=results(c1="rain"))
    with pytest.raises(UpstreamRejected):
        await second.open()
    assert not has_ended(second)
    async with asyncio.timeout(SOON):
        await second.cancel()
    assert server.results == {"c1": (NO_RESULT, True)}
    assert kinds(server)[-1] == "abort_message"


async def test_message_whose_turn_comes_as_the_one_before_ends(server: FakeAppServer, new_turn: NewTurn) -> None:
    server.on("input", turn(tool_step(c1="get_time"), hang), WELL)
    await said_by(new_turn("Hi"))
    assert (await said_by(new_turn("Be quick", returns=results(c1="12:00"))))[-1] == Stop("end_turn")


async def test_two_conversations_of_one_agent(server: FakeAppServer, new_turn: NewTurn) -> None:
    def answer(name: str) -> Answer:
        return turn(tool_step(**{f"{name}1": name}), says(f"Done {name}"), finished())

    server.on("input", answer("a"), answer("b"))
    first, second = new_turn("Hi", tools=("a",)), new_turn("Hi", tools=("b",), conversation_id=CHAT)
    await first.open()
    await second.open()
    assert ToolCallDelta("a1", "a", "{}") in await heard(first)
    assert ToolCallDelta("b1", "b", "{}") in await heard(second)
    answers = await asyncio.gather(
        said_by(new_turn(tools=("a",), returns=results(a1="A"))),
        said_by(new_turn(tools=("b",), returns=results(b1="B"), conversation_id=CHAT)),
    )
    assert [answer[0] for answer in answers] == [TextDelta("Done a"), TextDelta("Done b")]
    assert server.results == {"a1": ("A", False), "b1": ("B", False)}


# What it took --------------------------------------------------------------------------------------------------------


async def test_call_and_its_results_are_two_turns_and_no_step_counts_twice(
    server: FakeAppServer, new_turn: NewTurn
) -> None:
    server.on("input", TWO)
    first = new_turn("Hi")
    await said_by(first)
    second = new_turn(returns=results(c1="sunny", c2="12:00"))
    await said_by(second)
    assert await first.usage() == Usage(50, 5, 0, 0)
    assert await second.usage() == Usage(70, 7, 0, 0)


async def test_step_that_is_quicker_than_the_end_of_its_turn_counts_for_the_next(
    server: FakeAppServer, new_turn: NewTurn
) -> None:
    async def too_late(exchange: Exchange) -> None:
        await asyncio.sleep(0.05)
        await fake_app_server._abort(exchange)

    server.on("input", turn(tool_step(c1="get_weather"), usage(8, 1), hang), WELL)
    server.on("abort_message", too_late)
    first = new_turn("Hi")
    await said_by(first)
    second = new_turn("never mind", tools=())
    await said_by(second)
    assert await first.usage() == Usage(50, 5, 0, 0)
    assert await second.usage() == Usage(108, 21, 0, 0)
