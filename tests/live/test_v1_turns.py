"""What a turn can say to a real Letta V1 server: a history, tools and their results, on both kinds of threads."""

from collections.abc import AsyncIterator, Iterator
from typing import Literal

import msgspec
import pytest

from gateway.errors import AgentGone, GatewayError
from gateway.letta.demo_model import RunningDemoModel
from gateway.letta.rest import RestBackend, RestConfig
from gateway.letta.rest_bridge import TAG, Loan, ToolRow, bridge_name
from gateway.letta.rest_returns import SUPERSEDED
from gateway.metrics import Metrics
from gateway.tasks import TaskSet
from gateway.translation.agent_events import (
    AgentEvent,
    Failure,
    ServerToolCall,
    ServerToolReturn,
    Stop,
    TextDelta,
    ToolCallDelta,
)
from gateway.translation.agent_turn import (
    AgentSaid,
    AgentTurn,
    Call,
    ClientTool,
    Instructed,
    Text,
    ToolResult,
    UserSaid,
)
from tests.letta.batches import heard, next_batch
from tests.live.letta_server import Agent
from tests.live.v1_server import V1Server

pytestmark = pytest.mark.services

OWN_TOOL = '''
def horoscope(sign: str) -> str:
    """Tell the future.

    Args:
        sign (str): the sign
    """
    return "a long journey"
'''
SETTLED = 5.0
ABSENT = "00000000-0000-4000-8000-000000000000"


class ToolSeen(msgspec.Struct):
    name: str


class Seen(msgspec.Struct):
    """A message as the model received it."""

    role: str
    content: str | None = None


class FunctionSeen(msgspec.Struct):
    function: ToolSeen


class Rule(msgspec.Struct):
    """What Letta holds a tool to."""

    tool_name: str
    type: str


class Rules(msgspec.Struct):
    """The rules of an agent."""

    tool_rules: list[Rule]


class RequestSeen(msgspec.Struct):
    messages: list[Seen]
    tools: list[FunctionSeen] | None = None


class Returned(msgspec.Struct):
    """A result as Letta wraps it for the model."""

    status: str
    message: str | None


def tool(name: str) -> ClientTool:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return ClientTool(name, f"The {name}.", msgspec.Raw(msgspec.json.encode(parameters)))


WEATHER, CLOCK = tool("weather"), tool("clock")


@pytest.fixture
def agent(v1: V1Server) -> Iterator[Agent]:
    v1.start()
    created = v1.create_agent()
    yield created
    v1.delete_agent(created.id)


@pytest.fixture
async def backend(v1: V1Server) -> AsyncIterator[RestBackend]:
    tasks = TaskSet()
    backend = RestBackend(RestConfig(v1.base_url), Metrics(), tasks)
    yield backend
    await tasks.close(SETTLED)
    await backend.close()


@pytest.fixture(params=["own thread", "conversation"])
async def place(request: pytest.FixtureRequest, backend: RestBackend, agent: Agent) -> str | None:
    return None if request.param == "own thread" else await backend.new_conversation(agent.id)


def user(text: str) -> UserSaid:
    return UserSaid((Text(text),))


def result(call_id: str, text: str) -> ToolResult:
    return ToolResult(call_id, text)


async def said(backend: RestBackend, turn: AgentTurn) -> list[AgentEvent]:
    """Return what the agent says in a turn, which has to end well."""
    running = backend.turn(turn)
    try:
        await running.open()
        events = await heard(running)
    finally:
        running.close()
    assert not [event for event in events if isinstance(event, Failure)], events
    return events


def text_of(events: list[AgentEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def calls_of(events: list[AgentEvent]) -> dict[str, tuple[str, str]]:
    """Return the name and the arguments of each call of the client's tools."""
    calls: dict[str, tuple[str, str]] = {}
    for event in events:
        if isinstance(event, ToolCallDelta):
            name, arguments = calls.get(event.call_id, ("", ""))
            calls[event.call_id] = (name + (event.name or ""), arguments + event.arguments)
    return calls


def stop_of(events: list[AgentEvent]) -> str:
    (stop,) = (event.reason for event in events if isinstance(event, Stop))
    return stop


def seen(demo_model: RunningDemoModel) -> RequestSeen:
    """Return the model's last request."""
    return msgspec.json.decode(demo_model.requests[-1].body, type=RequestSeen)


def seen_messages(demo_model: RunningDemoModel) -> list[tuple[str, str | None]]:
    """Return the messages of the model's last request, without Letta's own in front."""
    return [(message.role, message.content) for message in seen(demo_model).messages[1:]]


def seen_results(demo_model: RunningDemoModel) -> list[Returned]:
    messages = seen(demo_model).messages
    return [msgspec.json.decode(m.content or "", type=Returned) for m in messages if m.role == "tool"]


# What was said before -------------------------------------------------------------------------------------------------


async def test_history_reaches_the_model_in_its_roles_before_the_news(
    backend: RestBackend, agent: Agent, place: str | None, demo_model: RunningDemoModel
) -> None:
    turn = AgentTurn(
        agent_id=agent.id,
        conversation_id=place,
        history=(
            Instructed("Be kind."),
            user("One"),
            AgentSaid("Two", (Call("call_1", "weather", "{}"),)),
            ToolResult("call_1", "sunny"),
            AgentSaid("Three"),
        ),
        news=(Instructed("Be brief."), user("Four"), user("Five")),
    )
    events = await said(backend, turn)
    assert (text_of(events), stop_of(events)) == ("You said: Five", "end_turn")
    assert seen_messages(demo_model) == [
        ("system", "Be kind."),
        ("user", "One"),
        ("assistant", "Two\n(Called the tool weather with {})"),
        ("user", "Result of the tool weather: sunny"),
        ("assistant", "Three"),
        ("system", "Be brief."),
        ("user", "Four"),
        ("user", "Five"),
    ]


async def test_conversations_know_nothing_of_each_other(
    backend: RestBackend, agent: Agent, demo_model: RunningDemoModel
) -> None:
    one, other = [await backend.new_conversation(agent.id) for _ in range(2)]
    await said(backend, AgentTurn(agent_id=agent.id, conversation_id=one, news=(user("Mine"),)))
    await said(backend, AgentTurn(agent_id=agent.id, news=(user("Own"),)))
    await said(backend, AgentTurn(agent_id=agent.id, conversation_id=other, news=(user("Other"),)))
    assert seen_messages(demo_model) == [("user", "Other")]


async def test_deleted_conversation_is_gone(backend: RestBackend, agent: Agent) -> None:
    conversation = await backend.new_conversation(agent.id)
    await backend.delete_conversation(conversation)
    await backend.delete_conversation(conversation)
    with pytest.raises(GatewayError) as raised:
        await said(backend, AgentTurn(agent_id=agent.id, conversation_id=conversation, news=(user("Hi"),)))
    assert raised.value.code == "conversation_gone"


async def test_agent_that_is_not_there(backend: RestBackend) -> None:
    for question in (backend.details, backend.new_conversation):
        with pytest.raises(AgentGone):
            await question(f"agent-{ABSENT}")


# Tools of the client's ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "where"), [("native", "own thread"), ("native", "conversation"), ("bridge", "conversation")]
)
async def test_tool_loop_with_two_calls_at_once(
    v1: V1Server, agent: Agent, demo_model: RunningDemoModel, way: Literal["native", "bridge"], where: str
) -> None:
    tasks = TaskSet()
    backend = RestBackend(RestConfig(v1.base_url, client_tools=way), Metrics(), tasks)
    place = await backend.new_conversation(agent.id) if where == "conversation" else None
    names = [offered.name if way == "native" else bridge_name(offered) for offered in (WEATHER, CLOCK)]
    turn = AgentTurn(
        agent_id=agent.id,
        conversation_id=place,
        news=(user(f"call {names[0]} and {names[1]} now"),),
        tools=(WEATHER, CLOCK),
    )
    events = await said(backend, turn)
    calls = calls_of(events)
    assert list(calls.values()) == [("weather", '{"city": "Paris"}'), ("clock", '{"city": "Paris"}')]
    assert stop_of(events) == "requires_approval"
    first, second = calls
    returns = (ToolResult(second, "no clock", succeeded=False), result(first, "sunny"))
    turn = AgentTurn(agent_id=agent.id, conversation_id=place, returns=returns, tools=(WEATHER, CLOCK))
    events = await said(backend, turn)
    assert stop_of(events) == "end_turn"
    assert not [event for event in events if isinstance(event, ServerToolReturn)]
    assert seen_results(demo_model) == [Returned("OK", "sunny"), Returned("Failed", "no clock")]  # as they were called
    assert sorted(offered.function.name for offered in seen(demo_model).tools or ()) == sorted(names)
    await tasks.close(SETTLED)
    await backend.close()
    assert tools_left(v1, agent) == []


def tools_left(v1: V1Server, agent: Agent) -> list[str]:
    """Return what the bridge has left on the server: tools, and an agent's rules for them."""
    tools = msgspec.json.decode(v1.call("GET", "/v1/tools/?limit=200"), type=list[ToolRow])
    rules = msgspec.json.decode(v1.call("GET", f"/v1/agents/{agent.id}"), type=Rules).tool_rules
    return [
        *(row.name for row in tools if TAG in (row.tags or ())),
        *(rule.tool_name for rule in rules if rule.type == "requires_approval"),
    ]


async def test_legacy_agent_gets_tools_by_the_bridge(v1: V1Server, demo_model: RunningDemoModel) -> None:
    legacy = v1.create_agent(agent_type="memgpt_v2_agent")
    tasks = TaskSet()
    backend = RestBackend(RestConfig(v1.base_url), Metrics(), tasks)
    ask = AgentTurn(agent_id=legacy.id, news=(user(f"call {bridge_name(WEATHER)} now"),), tools=(WEATHER, CLOCK))
    events = await said(backend, ask)
    assert list(calls_of(events).values()) == [("weather", '{"city":"Paris"}')]
    (call,) = calls_of(events)
    await said(backend, AgentTurn(agent_id=legacy.id, returns=(result(call, "sunny"),), tools=(WEATHER, CLOCK)))
    assert "It was not denied: the client ran it." in (seen_results(demo_model)[-1].message or "")
    assert "sunny" in (seen_results(demo_model)[-1].message or "")
    assert stop_of(await said(backend, ask)) == "requires_approval"
    await said(backend, AgentTurn(agent_id=legacy.id, news=(user("Never mind"),)))
    assert SUPERSEDED in (seen_results(demo_model)[-1].message or "")
    assert "Never mind" in (seen_results(demo_model)[-1].message or "")
    await tasks.close(SETTLED)
    await backend.close()
    assert tools_left(v1, legacy) == []
    v1.delete_agent(legacy.id)


async def test_tools_that_a_crash_left_are_cleaned_up(v1: V1Server, backend: RestBackend, agent: Agent) -> None:
    crashed = RestBackend(RestConfig(v1.base_url, client_tools="bridge"), Metrics(), TaskSet())
    await crashed.bridge.lend(Loan(crashed.bridge, agent.id), agent.id, (WEATHER,))
    await crashed.close()
    assert bridge_name(WEATHER) in tools_left(v1, agent)
    assert (await backend.details(agent.id)).tools == ()
    await backend.clean_up()
    assert bridge_name(WEATHER) not in tools_left(v1, agent)[:-1]


async def call_weather(backend: RestBackend, agent: Agent, place: str | None, what: str = "weather") -> list[str]:
    turn = AgentTurn(agent_id=agent.id, conversation_id=place, news=(user(f"call {what} now"),), tools=(WEATHER, CLOCK))
    return list(calls_of(await said(backend, turn)))


@pytest.mark.parametrize("text", ["", "x" * 1_000_000], ids=["empty", "1 MB"])
async def test_result_of_any_size(backend: RestBackend, agent: Agent, demo_model: RunningDemoModel, text: str) -> None:
    (call,) = await call_weather(backend, agent, None)
    await said(backend, AgentTurn(agent_id=agent.id, returns=(result(call, text),)))
    (returned,) = (m.content or "" for m in seen(demo_model).messages if m.role == "tool")
    assert f'"message": "{text[:5_000]}' in returned  # Letta cuts what would fill a fifth of the model's window


async def test_results_with_news_behind_them(backend: RestBackend, agent: Agent, demo_model: RunningDemoModel) -> None:
    place = await backend.new_conversation(agent.id)
    (call,) = await call_weather(backend, agent, place)
    turn = AgentTurn(
        agent_id=agent.id,
        conversation_id=place,
        returns=(result(call, "sunny"),),
        news=(Instructed("Be brief."), user("And now?")),
    )
    assert text_of(await said(backend, turn)) == "You said: And now?"
    assert seen_results(demo_model) == [Returned("OK", "sunny")]
    assert seen_messages(demo_model)[-2:] == [("system", "Be brief."), ("user", "And now?")]


async def test_new_message_supersedes_the_calls_that_wait(
    backend: RestBackend, agent: Agent, place: str | None, demo_model: RunningDemoModel
) -> None:
    await call_weather(backend, agent, place, "weather and clock")
    turn = AgentTurn(agent_id=agent.id, conversation_id=place, news=(user("Never mind"),))
    assert text_of(await said(backend, turn)) == "You said: Never mind"
    assert seen_results(demo_model) == [Returned("Failed", SUPERSEDED)] * 2
    assert text_of(await said(backend, turn)) == "You said: Never mind"


async def test_results_for_some_of_the_calls(backend: RestBackend, agent: Agent, demo_model: RunningDemoModel) -> None:
    _, second = await call_weather(backend, agent, None, "weather and clock")
    turn = AgentTurn(agent_id=agent.id, returns=(result(second, "noon"), result("call_0", "who asked?")))
    await said(backend, turn)
    assert seen_results(demo_model) == [Returned("Failed", SUPERSEDED), Returned("OK", "noon")]
    assert seen_messages(demo_model)[-1] == ("user", "Result of the tool call call_0: who asked?")


async def test_result_that_nobody_waits_for_goes_in_as_words(
    backend: RestBackend, agent: Agent, demo_model: RunningDemoModel
) -> None:
    place = await backend.new_conversation(agent.id)
    turn = AgentTurn(
        agent_id=agent.id, conversation_id=place, returns=(result("call_0", "sunny"),), news=(user("Well?"),)
    )
    assert text_of(await said(backend, turn)) == "You said: Well?"
    assert seen_messages(demo_model)[-2:] == [
        ("user", "Result of the tool call call_0: sunny"),
        ("user", "Well?"),
    ]


async def test_late_result_of_a_superseded_call_goes_in_as_words(
    backend: RestBackend, agent: Agent, demo_model: RunningDemoModel
) -> None:
    (call,) = await call_weather(backend, agent, None)
    await said(backend, AgentTurn(agent_id=agent.id, news=(user("Never mind"),)))
    await said(backend, AgentTurn(agent_id=agent.id, returns=(result(call, "sunny"),)))
    assert seen_messages(demo_model)[-1] == ("user", f"Result of the tool call {call}: sunny")


async def test_calls_of_one_place_do_not_wait_in_another(backend: RestBackend, agent: Agent) -> None:
    conversation = await backend.new_conversation(agent.id)
    (call,) = await call_weather(backend, agent, conversation)
    assert await backend.waiting_calls(agent.id, None) == ()
    assert await backend.waiting_calls(agent.id, conversation) == (call,)
    await call_weather(backend, agent, None)
    assert await backend.waiting_calls(agent.id, conversation) == (call,)


async def test_tool_named_like_one_of_the_agents_own(
    v1: V1Server, backend: RestBackend, agent: Agent, demo_model: RunningDemoModel
) -> None:
    v1.attach_tool(agent, OWN_TOOL)
    turn = AgentTurn(agent_id=agent.id, news=(user("call client_horoscope now"),), tools=(WEATHER, tool("horoscope")))
    events = await said(backend, turn)
    assert list(calls_of(events).values()) == [("horoscope", '{"city": "Paris"}')]
    offered = [offered.function.name for offered in seen(demo_model).tools or ()]
    assert offered == ["horoscope", "weather", "client_horoscope"]
    (call,) = calls_of(events)
    turn = AgentTurn(agent_id=agent.id, returns=(result(call, "rain"),))
    assert stop_of(await said(backend, turn)) == "end_turn"
    assert seen_results(demo_model) == [Returned("OK", "rain")]


async def test_tool_of_the_agents_own_that_waits_for_somebodys_approval(
    v1: V1Server, backend: RestBackend, agent: Agent
) -> None:
    v1.attach_tool(agent, OWN_TOOL.replace("horoscope", "oracle"), needs_approval=True)
    events = await said(backend, AgentTurn(agent_id=agent.id, news=(user("call oracle now"),), tools=(WEATHER,)))
    assert calls_of(events) == {}
    assert [event.name for event in events if isinstance(event, ServerToolCall) and event.name] == ["oracle"]
    assert stop_of(events) == "end_turn"
    events = await said(backend, AgentTurn(agent_id=agent.id, news=(user("Never mind"),)))
    assert text_of(events) == "You said: Never mind"


async def test_details(v1: V1Server, backend: RestBackend, agent: Agent) -> None:
    v1.attach_tool(agent, OWN_TOOL)
    details = await backend.details(agent.id)
    assert (details.model, details.tools) == ("openai-proxy/demo", ("horoscope",))


# Interruptions --------------------------------------------------------------------------------------------------------


async def test_cancelled_turn_with_tools_leaves_its_place_free(
    backend: RestBackend, agent: Agent, place: str | None
) -> None:
    running = backend.turn(
        AgentTurn(agent_id=agent.id, conversation_id=place, news=(user("count to 500 every 20 ms"),), tools=(WEATHER,))
    )
    await running.open()
    assert await next_batch(running) == [TextDelta("word0")]
    await running.cancel()
    assert running.ended
    running.close()
    events = await said(backend, AgentTurn(agent_id=agent.id, conversation_id=place, news=(user("Hi"),)))
    assert text_of(events) == "You said: Hi"


# Overlays -------------------------------------------------------------------------------------------------------------


def system_prompt(demo_model: RunningDemoModel) -> str:
    return seen(demo_model).messages[0].content or ""


async def test_instructions_are_seen_in_their_turn_alone(
    backend: RestBackend, agent: Agent, demo_model: RunningDemoModel
) -> None:
    for text in ("Speak softly. " * 3_600, "Shout."):
        await said(backend, AgentTurn(agent_id=agent.id, news=(user("Hi"),), overlay=text))
        assert text in system_prompt(demo_model)
        assert "<base_instructions>" in system_prompt(demo_model)
    assert "softly" not in system_prompt(demo_model)
    await said(backend, AgentTurn(agent_id=agent.id, news=(user("Hi"),)))
    assert "client_instructions" not in system_prompt(demo_model)


async def test_instructions_hold_for_every_step_of_their_turn(
    backend: RestBackend, agent: Agent, demo_model: RunningDemoModel
) -> None:
    asked = AgentTurn(agent_id=agent.id, news=(user("call weather now"),), tools=(WEATHER,), overlay="Shout.")
    (call_id,) = calls_of(await said(backend, asked))
    returned = (ToolResult(call_id, "sunny"),)
    await said(backend, AgentTurn(agent_id=agent.id, returns=returned, tools=(WEATHER,), overlay="Shout."))
    assert "Shout." in system_prompt(demo_model)
