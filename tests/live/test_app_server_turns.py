"""What a turn on a real App Server can be: with tools of the client's, parked, in conversations, with a history."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeAlias

import msgspec
import pytest

from gateway.errors import AgentGone
from gateway.letta.app_server import AppServerBackend, AppServerConfig
from gateway.letta.app_server_parked import NO_RESULT
from gateway.letta.app_server_tools import RESERVED
from gateway.letta.app_server_words import GOES_ON
from gateway.letta.demo_model import RunningDemoModel
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
from gateway.translation.agent_turn import (
    AgentSaid,
    AgentTurn,
    Call,
    ClientTool,
    Instructed,
    Said,
    Text,
    ToolResult,
    UserSaid,
)
from tests.letta.batches import heard
from tests.live.app_server import INTERRUPTED, AppServer
from tests.live.letta_server import Agent

pytestmark = pytest.mark.services

SCHEMA = msgspec.Raw(b'{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}')
WEATHER = ("get_weather", "get_time")
PARIS = '{"city":"Paris"}'
SOON = 20.0

NewBackend: TypeAlias = Callable[..., AppServerBackend]
Heard: TypeAlias = list[AgentEvent]


class _Function(msgspec.Struct):
    name: str
    parameters: msgspec.Raw = msgspec.Raw(b"{}")


class _Tool(msgspec.Struct):
    function: _Function


class _Part(msgspec.Struct):
    text: str = ""


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Part] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class _Asked(msgspec.Struct):
    messages: list[_Message]
    tools: list[_Tool] = []

    @property
    def names(self) -> set[str]:
        return {tool.function.name for tool in self.tools}


@pytest.fixture(scope="module")
def agent(app_server: AppServer) -> Iterator[Agent]:
    app_server.start()
    created = app_server.create_agent()
    yield created
    app_server.delete_agent(created.id)


@pytest.fixture
async def new_backend(app_server: AppServer) -> AsyncIterator[NewBackend]:
    made: list[AppServerBackend] = []

    def new_backend(**options: Any) -> AppServerBackend:
        made.append(AppServerBackend(AppServerConfig(app_server.base_url, **options), Metrics(), TaskSet()))
        return made[-1]

    yield new_backend
    for backend in made:
        await backend.close()
        await backend.tasks.close(1)


class Chat:
    """A conversation, or an agent's own thread, and the model behind it."""

    def __init__(self, backend: AppServerBackend, agent: Agent, model: RunningDemoModel, thread: str | None) -> None:
        self.backend = backend
        self.agent = agent
        self.thread = thread
        self._model = model

    async def says(self, *news: str | Instructed, tools: tuple[str, ...] = WEATHER, **fields: Any) -> Heard:
        said = tuple(UserSaid((Text(new),)) if isinstance(new, str) else new for new in news)
        offered = tuple(ClientTool(name, f"Does {name}", SCHEMA) for name in tools)
        return await self.turn(**{"news": said, "tools": offered, **fields})

    async def turn(self, **fields: Any) -> Heard:
        running = self.backend.turn(AgentTurn(agent_id=self.agent.id, conversation_id=self.thread, **fields))
        try:
            async with asyncio.timeout(SOON):
                await running.open()
                return await heard(running)
        finally:
            assert running.ended
            running.close()

    @property
    def asked(self) -> _Asked:
        """What the model was asked last."""
        return msgspec.json.decode(self._model.requests[-1].body, type=_Asked)

    def seen(self, role: str) -> list[str]:
        """Return the messages of a role that the model was asked with."""
        return [message.text for message in self.asked.messages if message.role == role]


@pytest.fixture
async def chat(new_backend: NewBackend, app_server: AppServer, agent: Agent) -> Chat:
    backend = new_backend()
    return Chat(backend, agent, app_server.model, await backend.new_conversation(agent.id))


def text_of(events: Heard) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def calls_of(events: Heard) -> dict[str, str]:
    """Return the ids of the calls by the names of their tools; the last event says that they wait."""
    assert events[-1] == Stop("requires_approval")
    return {event.name: event.call_id for event in events if isinstance(event, ToolCallDelta) and event.name}


def usages(events: Heard) -> int:
    return sum(isinstance(event, Usage) for event in events)


# The loop ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False])
async def test_two_calls_and_their_results(
    new_backend: NewBackend, app_server: AppServer, agent: Agent, *, own: bool
) -> None:
    backend = new_backend()
    thread = None if own else await backend.new_conversation(agent.id)
    chat = Chat(backend, agent, app_server.model, thread)
    events = await chat.says("call get_weather and get_time now")
    calls = calls_of(events)
    assert [event for event in events if isinstance(event, ToolCallDelta)] == [
        ToolCallDelta(calls["get_weather"], "get_weather", PARIS),
        ToolCallDelta(calls["get_time"], "get_time", PARIS),
    ]
    assert usages(events) == 1
    assert chat.asked.names == set(WEATHER)
    returns = (
        ToolResult(calls["get_time"], "it stopped", succeeded=False),
        ToolResult(calls["get_weather"], "sunny"),
    )
    answer = await chat.says(returns=returns)
    assert text_of(answer) == "Tool said: sunny; it stopped"
    assert answer[-1] == Stop("end_turn")
    assert usages(answer) == 1
    assert not any(isinstance(event, ServerToolCall | ServerToolReturn) for event in answer)
    assert chat.seen("tool")[-2:] == ["sunny", "it stopped"]


async def test_two_rounds(chat: Chat) -> None:
    calls = calls_of(await chat.says("call get_weather now"))
    again = await chat.says("call get_time now", returns=(ToolResult(calls["get_weather"], "sunny"),))
    calls = calls_of(again)
    assert [*calls] == ["get_time"]
    assert text_of(await chat.says(returns=(ToolResult(calls["get_time"], "12:00"),))) == "Tool said: 12:00"


async def test_results_with_a_message_behind_them(chat: Chat) -> None:
    calls = calls_of(await chat.says("call get_weather and get_time now"))
    events = await chat.says("be quick", returns=(ToolResult(calls["get_time"], "12:00"),))
    assert text_of(events) == "You said: be quick"
    assert [(message.role, message.text) for message in chat.asked.messages[-3:]] == [
        ("tool", NO_RESULT),
        ("tool", "12:00"),
        ("user", "be quick"),
    ]


async def test_result_that_is_too_long_for_the_server(chat: Chat) -> None:
    calls = calls_of(await chat.says("call get_weather now"))
    long = "".join(f"{number}," for number in range(8_000))  # one word: the model repeats it word by word
    await chat.says(returns=(ToolResult(calls["get_weather"], long),))
    result, rest = (message.text for message in chat.asked.messages[-2:])
    assert result.removesuffix(GOES_ON) + rest.partition("\n")[2] == long


async def test_call_that_lacks_an_argument_is_settled_by_the_server(chat: Chat) -> None:
    events = await chat.says("call get_weather with {}")
    assert events[-1] == Stop("end_turn")
    assert [type(event) for event in events if isinstance(event, ToolCallDelta | ServerToolCall)] == [ServerToolCall]
    assert "missing required parameter" in text_of(events)


# Abandoned -----------------------------------------------------------------------------------------------------------


async def test_new_message_instead_of_results(chat: Chat) -> None:
    calls_of(await chat.says("call get_weather and get_time now"))
    started = time.monotonic()
    assert text_of(await chat.says("never mind")) == "You said: never mind"
    assert time.monotonic() - started < 10
    assert chat.seen("tool") == [NO_RESULT, NO_RESULT]
    assert INTERRUPTED not in chat.asked.messages[-1].text


@pytest.mark.parametrize("tools", [(), ("other",)])
async def test_new_message_with_other_tools(chat: Chat, tools: tuple[str, ...]) -> None:
    calls = calls_of(await chat.says("call get_weather and get_time now"))
    started = time.monotonic()
    events = await chat.says("go on", tools=tools, returns=(ToolResult(calls["get_time"], "12:00"),))
    assert time.monotonic() - started < 10
    assert text_of(events) == "You said: Result of the tool get_time: 12:00\ngo on"
    assert chat.asked.names == set(tools)


async def test_results_after_the_socket_was_lost(chat: Chat, new_backend: NewBackend) -> None:
    calls = calls_of(await chat.says("call get_weather now"))
    for slot in chat.backend._slots:
        if slot.socket is not None:
            await slot.socket.close()
    chat.backend = new_backend()  # another process, after a restart
    said = text_of(await chat.says("and now?", returns=(ToolResult(calls["get_weather"], "sunny"),)))
    assert said == f"You said: Result of the tool call {calls['get_weather']}: sunny\nand now?"


async def test_turn_that_nobody_comes_back_to(new_backend: NewBackend, app_server: AppServer, agent: Agent) -> None:
    backend = new_backend(parked_timeout=0.3)
    chat = Chat(backend, agent, app_server.model, await backend.new_conversation(agent.id))
    calls = calls_of(await chat.says("call get_weather now"))
    started = time.monotonic()
    while backend.threads.parked:  # noqa: ASYNC110 - it is seen from outside
        await asyncio.sleep(0.02)
    assert time.monotonic() - started < 10
    late = await chat.says(returns=(ToolResult(calls["get_weather"], "sunny"),))
    assert text_of(late) == f"You said: Result of the tool call {calls['get_weather']}: sunny"


async def test_close_ends_what_waits(chat: Chat, new_backend: NewBackend) -> None:
    calls_of(await chat.says("call get_weather now"))
    started = time.monotonic()
    await chat.backend.close()
    assert time.monotonic() - started < 10
    chat.backend = new_backend()
    assert text_of(await chat.says("hello")) == "You said: hello"


async def test_cancel_while_a_call_comes(chat: Chat) -> None:
    offered = tuple(ClientTool(name, "", SCHEMA) for name in WEATHER)
    said = (UserSaid((Text("think and call get_weather now"),)),)
    running = chat.backend.turn(
        AgentTurn(agent_id=chat.agent.id, conversation_id=chat.thread, news=said, tools=offered)
    )
    await running.open()
    started = time.monotonic()
    await running.cancel()
    running.close()
    assert text_of(await chat.says("hello")) == "You said: hello"
    assert time.monotonic() - started < 15


# What the model sees -------------------------------------------------------------------------------------------------


async def test_history_and_instructions(chat: Chat) -> None:
    history: tuple[Said, ...] = (
        Instructed("Be brief."),
        UserSaid((Text("What is the weather?"),)),
        AgentSaid("Let me see.", (Call("1", "get_weather", PARIS),)),
        ToolResult("1", "rain"),
        AgentSaid("It rains."),
    )
    events = await chat.says(Instructed("Answer in French."), "and now?", tools=(), history=history)
    assert text_of(events) == "You said: and now?"
    seen = chat.asked.messages[-1].text
    words = ("Be brief.", "What is the weather?", "Let me see.", "rain", "It rains.", "Answer in French.", "and now?")
    places = [seen.index(part) for part in words]
    assert places == sorted(places)
    assert chat.asked.names == set()


async def test_tools_of_both_sides(new_backend: NewBackend, app_server: AppServer, agent: Agent) -> None:
    backend = new_backend(server_tools={agent.id: ("Bash",)})
    chat = Chat(backend, agent, app_server.model, await backend.new_conversation(agent.id))
    command = 'call Bash with {"command": "echo hi-$((6*7))", "description": "Say hi"}'
    events = await chat.says(command, tools=("get_weather", "Bash"))
    assert chat.asked.names == {"Bash", "get_weather", "client_Bash"}
    assert "hi-42" in text_of(events)
    assert [event.name for event in events if isinstance(event, ServerToolCall)] == ["Bash"]
    called = await chat.says("call client_Bash and get_weather now", tools=("get_weather", "Bash"))
    assert {*calls_of(called)} == {"Bash", "get_weather"}
    await chat.says("hello", tools=())
    assert chat.asked.names == {"Bash"}


async def test_many_large_tools_of_awkward_names(chat: Chat) -> None:
    names = [*sorted(RESERVED), *(f"tool_{number:03}_{'x' * 55}" for number in range(128 - len(RESERVED)))]
    padding = "x" * 420
    schema = msgspec.json.encode({"type": "object", "properties": {"a": {"type": "string", "description": padding}}})
    offered = tuple(ClientTool(name, "Does something", msgspec.Raw(schema)) for name in names)
    assert sum(len(schema) for _ in names) > 60_000
    called = await chat.turn(
        news=(UserSaid((Text(f'call client_Bash and client_Read and {names[-1]} with {{"a": "b"}}'),)),), tools=offered
    )
    calls = calls_of(called)
    assert [*calls] == ["Bash", "Read", names[-1]]
    assert len(chat.asked.names) == 128
    returns = tuple(ToolResult(call_id, name[:4]) for name, call_id in calls.items())
    assert text_of(await chat.turn(returns=returns, tools=offered)) == "Tool said: Bash; Read; tool"


async def test_two_conversations_of_one_agent_at_once(chat: Chat) -> None:
    other = Chat(chat.backend, chat.agent, chat._model, await chat.backend.new_conversation(chat.agent.id))

    async def loop(chat: Chat, tool: str) -> str:
        calls = calls_of(await chat.says(f"call {tool} now", tools=(tool,)))
        assert [*calls] == [tool]
        return text_of(await chat.says(tools=(tool,), returns=(ToolResult(calls[tool], f"{tool}'s"),)))

    said = await asyncio.gather(loop(chat, "mine"), loop(other, "yours"))
    assert [*said] == ["Tool said: mine's", "Tool said: yours's"]
    seen = [
        names
        for request in chat._model.requests[-4:]
        if (names := msgspec.json.decode(request.body, type=_Asked).names)
    ]
    assert sorted(map(sorted, seen)) == [["mine"], ["mine"], ["yours"], ["yours"]]


# Conversations and agents --------------------------------------------------------------------------------------------


async def test_conversation_that_is_put_away(chat: Chat, app_server: AppServer) -> None:
    calls_of(await chat.says("call get_weather now"))
    assert chat.thread is not None
    await chat.backend.delete_conversation(chat.thread)
    rows = app_server.ask("conversation_list", query={"limit": 1_000})["conversations"]
    row = next(row for row in rows if row["id"] == chat.thread)
    assert row["archived"]
    assert row["summary"] == "Chat by letta-gateway"
    await chat.backend.delete_conversation("local-conv-99999")


async def test_conversation_that_is_not_there(chat: Chat) -> None:
    chat.thread = "local-conv-99999"
    with pytest.raises(AgentGone) as raised:
        await chat.says("hello")
    assert raised.value.code == "conversation_gone"


async def test_conversation_whose_model_hung(chat: Chat, new_backend: NewBackend) -> None:
    assert text_of(await chat.says("hello")) == "You said: hello"
    said = (UserSaid((Text("hang after 1 words"),)),)
    running = chat.backend.turn(AgentTurn(agent_id=chat.agent.id, conversation_id=chat.thread, news=said))
    await running.open()
    await asyncio.sleep(0.3)
    await running.cancel()
    running.close()
    assert text_of(await chat.says("and now?")) == "You said: and now?"
    assert "hello" in "".join(chat.seen("user"))
    chat.backend = new_backend()
    assert text_of(await chat.says("and after a restart?")) == "You said: and after a restart?"
    assert any("and now?" in text for text in chat.seen("user"))


async def test_what_an_agent_is(new_backend: NewBackend, agent: Agent) -> None:
    backend = new_backend(server_tools={agent.name: ("Read",)})
    details = await backend.details(agent.id)
    assert details.model is not None
    assert details.model.startswith("lmstudio/")
    assert details.tools == ("Read",)
    for ask in (backend.details, backend.new_conversation):
        with pytest.raises(AgentGone):
            await ask("agent-local-00000000-0000-4000-8000-000000000000")
