"""What only the App Server has: tools of its machine, a socket that may freeze, clients beside the gateway."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

import msgspec
import openai
import pytest

from gateway.letta.demo_model import RunningDemoModel
from tests.live.app_server import AppServer
from tests.live.gateways import gateway_before, sdk
from tests.live.letta_server import Agent
from tests.live.test_chat import stream, text_of, user
from tests.server.subprocesses import gateway_process

pytestmark = pytest.mark.services

_SLACK = 5.0
"""Seconds that a busy machine may add to a deadline."""


class _Function(msgspec.Struct):
    name: str


class _Tool(msgspec.Struct):
    function: _Function


class _Asked(msgspec.Struct):
    tools: list[_Tool] = []


@pytest.fixture
def model(app_server: AppServer) -> RunningDemoModel:
    return app_server.model


@pytest.fixture
def agent(app_server: AppServer) -> Iterator[Agent]:
    app_server.start()
    created = app_server.create_agent()
    yield created
    app_server.delete_agent(created.id)


def tools_seen(model: RunningDemoModel) -> set[str]:
    asked = msgspec.json.decode(model.requests[-1].body, type=_Asked)
    return {tool.function.name for tool in asked.tools}


async def says(client: openai.AsyncOpenAI, agent: Agent, text: str) -> str:
    async with asyncio.timeout(20):
        answer = await client.chat.completions.create(model=agent.name, messages=user(text))
    return answer.choices[0].message.content or ""


@contextlib.asynccontextmanager
async def client_before(app_server: AppServer, **environment: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with gateway_before(app_server, **environment) as gateway, sdk(gateway) as client:
        yield client


async def test_the_model_is_offered_no_tools_unless_some_are_allowed(
    app_server: AppServer, agent: Agent, model: RunningDemoModel
) -> None:
    async with client_before(app_server) as client:
        assert await says(client, agent, 'call Bash with {"command": "echo hi", "description": "x"}') == (
            "There is no tool Bash."
        )
    assert tools_seen(model) == set()


@pytest.mark.parametrize("allowed", [{"Bash"}, {"Bash", "Read"}])
async def test_the_model_is_offered_the_tools_that_are_allowed_and_no_others(
    app_server: AppServer, agent: Agent, model: RunningDemoModel, allowed: set[str]
) -> None:
    tools = msgspec.json.encode({agent.name: sorted(allowed)}).decode()
    other = app_server.create_agent()
    async with client_before(app_server, LETTA_GATEWAY_SERVER_TOOLS=tools) as client:
        assert await says(client, agent, "hello") == "You said: hello"
        assert tools_seen(model) == allowed
        assert await says(client, other, "hello") == "You said: hello"
        assert tools_seen(model) == set()


async def test_an_allowed_tool_runs_and_nobody_is_asked(app_server: AppServer, agent: Agent) -> None:
    tools = msgspec.json.encode({agent.id: ["Bash"]}).decode()
    async with client_before(app_server, LETTA_GATEWAY_SERVER_TOOLS=tools) as client:
        said = await says(client, agent, 'call Bash with {"command": "echo hi-$((6*7))", "description": "Say hi"}')
    assert said.startswith("Tool said: ")
    assert "hi-42" in said


async def test_a_turn_that_takes_too_long_is_stopped(
    app_server: AppServer, agent: Agent, model: RunningDemoModel
) -> None:
    # The server notices that a turn was stopped when its model speaks again, and not before.
    async with client_before(app_server, LETTA_GATEWAY_TURN_TIMEOUT="2") as client:
        started = time.monotonic()
        with pytest.raises(openai.APIError) as late:
            await stream(client, agent.name, "count to 3 every 4000 ms")
        assert late.value.code == "turn_timeout"
        assert time.monotonic() - started < 2 + _SLACK
        assert await says(client, agent, "and now?") == "You said: and now?"
    assert "interrupted" in bytes(model.requests[-1].body).decode()


async def test_a_silent_model_does_not_stop_other_agents(app_server: AppServer, agent: Agent) -> None:
    other = app_server.create_agent()
    async with client_before(app_server, LETTA_GATEWAY_TURN_TIMEOUT="2") as client:
        with pytest.raises(openai.APIError) as late:
            await stream(client, agent.name, "hang after 3 words")
        assert late.value.code == "turn_timeout"
        assert await says(client, other, "hello") == "You said: hello"


async def test_an_agent_whose_model_hung_answers_again(app_server: AppServer, agent: Agent) -> None:
    async with client_before(app_server, LETTA_GATEWAY_TURN_TIMEOUT="3") as client:
        with pytest.raises(openai.APIError) as late:
            await stream(client, agent.name, "hang")
        assert late.value.code == "turn_timeout"
        assert await says(client, agent, "and now?") == "You said: and now?"


async def test_first_turns_of_several_agents_at_once_on_a_server_just_started(app_server: AppServer) -> None:
    agents = [app_server.create_agent() for _ in range(5)]
    await asyncio.to_thread(app_server.kill)
    await asyncio.to_thread(app_server.start)
    async with client_before(app_server) as client:
        said = await asyncio.gather(*(says(client, agent, "hello") for agent in agents))
    assert said == ["You said: hello" for _ in agents]


async def test_two_gateways_with_agents_of_their_own(app_server: AppServer, agent: Agent) -> None:
    other = app_server.create_agent()
    async with client_before(app_server) as first, client_before(app_server) as second:
        for number in range(3):
            asked = says(first, agent, f"first {number}"), says(second, other, f"second {number}")
            assert [*await asyncio.gather(*asked)] == [f"You said: first {number}", f"You said: second {number}"]


async def test_two_gateways_with_the_same_agent(app_server: AppServer, agent: Agent) -> None:
    async with client_before(app_server) as first, client_before(app_server) as second:
        assert await says(first, agent, "one") == "You said: one"
        assert await says(second, agent, "two") == "You said: two"
        assert await says(first, agent, "three") == "You said: three"
        said = await asyncio.gather(
            says(first, agent, "count to 20 every 50 ms"),
            *(says(second, agent, f"second {number}") for number in range(3)),
        )
        assert said == [" ".join(f"word{n}" for n in range(20)), *(f"You said: second {n}" for n in range(3))]


async def test_a_gateway_started_again_before_the_same_server(app_server: AppServer, agent: Agent) -> None:
    for start in range(2):
        async with client_before(app_server) as client:
            for turn in range(2):
                assert await says(client, agent, f"turn {start}.{turn}") == f"You said: turn {start}.{turn}"


async def test_a_server_that_freezes(app_server: AppServer, agent: Agent) -> None:
    limits = {"LETTA_GATEWAY_FIRST_EVENT_TIMEOUT": "2", "LETTA_GATEWAY_SILENCE_TIMEOUT": "3"}
    async with client_before(app_server, **limits) as client:
        assert await says(client, agent, "hello") == "You said: hello"
        app_server.freeze()
        try:
            for ask in (stream(client, agent.name, "anybody there?"), says(client, agent, "anybody there?")):
                started = time.monotonic()
                with pytest.raises(openai.APIError):
                    await ask
                assert time.monotonic() - started < 5 + _SLACK
        finally:
            app_server.thaw()
        async with asyncio.timeout(30):
            while True:
                try:
                    assert await says(client, agent, "welcome back") == "You said: welcome back"
                    break
                except openai.APIError:  # the breaker waits before it tries again
                    await asyncio.sleep(0.2)


async def test_its_http_address_is_known_as_an_app_server(app_server: AppServer, agent: Agent) -> None:
    async with gateway_process(app_server.http_url) as gateway, sdk(gateway) as client:
        assert (await gateway.ask("GET", "/ready")).status == 200
        assert text_of(await stream(client, agent.name, "hello")) == "You said: hello"
