"""The pipeline straight before a real Letta V1 server, with no gateway between."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest

from gateway.letta.demo_model import RunningDemoModel
from gateway.open_webui.pipeline import Pipeline, StreamEvent
from tests.live.letta_server import Agent
from tests.live.v1_server import V1Server

pytestmark = pytest.mark.parametrize("letta", ["v1"], indirect=True)

_TOOL: Final = '''
def tell_weather(city: str) -> str:
    """Tell the weather of a city.

    Args:
        city (str): Which city.
    """
    return f"It is sunny in {city}."
'''


@contextlib.asynccontextmanager
async def pipeline_before(server: V1Server) -> AsyncIterator[Pipeline]:
    pipeline = Pipeline()
    pipeline.valves.base_url = server.base_url
    try:
        yield pipeline
    finally:
        await pipeline.on_shutdown()


async def heard(pipeline: Pipeline, agent: Agent, message: str, **body: Any) -> list[StreamEvent]:
    messages = [{"role": "user", "content": message}]
    return [event async for event in pipeline.stream(message, agent.id, messages, body)]


def text(events: list[StreamEvent], kind: str = "message") -> str:
    return "".join(event.data["content"] for event in events if event.type == kind)


async def test_agent_thinks_speaks_and_remembers(letta: V1Server, agent: Agent, demo_model: RunningDemoModel) -> None:
    async with pipeline_before(letta) as pipeline:
        await pipeline.on_startup()
        assert {"id": agent.id, "name": agent.name} in pipeline.pipelines()
        assert text(await heard(pipeline, agent, "Hello there")) == "You said: Hello there"
        events = await heard(pipeline, agent, "think about it")
        assert text(events, "reasoning") == "I have to think about it"
        assert events[-1].type == "usage"
        assert events[-1].data["completion_tokens"] > 0
    request = demo_model.recorder.requests[-1].body
    assert b"Hello there" in bytes(request)


async def test_title_leaves_no_trace(letta: V1Server, agent: Agent, demo_model: RunningDemoModel) -> None:
    async with pipeline_before(letta) as pipeline:
        title = await heard(pipeline, agent, "### Task:\nGenerate a concise title of walnut cake")
        assert text(title).startswith("You said: ### Task:")
        await heard(pipeline, agent, "Hello there")
    assert b"walnut" not in bytes(demo_model.recorder.requests[-1].body)
    assert letta.call("GET", f"/v1/conversations/?agent_id={agent.id}") == b"[]"


async def test_tool_that_runs_on_letta(letta: V1Server, agent: Agent) -> None:
    letta.attach_tool(agent, _TOOL)
    async with pipeline_before(letta) as pipeline:
        events = await heard(pipeline, agent, "call tell_weather now")
    shown = [event.data["description"] for event in events if event.type == "status"]
    assert shown == ["Using tell_weather", "Used tell_weather"]
    assert "sunny in Paris" in text(events)


async def test_tool_that_needs_an_approval(letta: V1Server, agent: Agent) -> None:
    letta.attach_tool(agent, _TOOL.replace("tell_weather", "ask_weather"), needs_approval=True)
    async with pipeline_before(letta) as pipeline:
        events = await heard(pipeline, agent, "call ask_weather now")
        assert text(events).startswith("Tool said: ")
        assert "did not run" in text(events)
        assert text(await heard(pipeline, agent, "Hello there")) == "You said: Hello there", "nothing waits"


async def test_legacy_agent(letta: V1Server) -> None:
    legacy = letta.create_agent(agent_type="memgpt_agent")
    try:
        async with pipeline_before(letta) as pipeline:
            events = await heard(pipeline, legacy, "Hello there")
        assert text(events) == "You said: Hello there"
        assert [event.type for event in events].count("status") == 0
    finally:
        letta.delete_agent(legacy.id)


async def test_caller_that_leaves_stops_the_run(letta: V1Server, agent: Agent) -> None:
    async with pipeline_before(letta) as pipeline:
        events = pipeline.stream("", agent.id, [{"role": "user", "content": "count to 500 every 50 ms"}], {})
        await anext(events)
        await events.aclose()
        assert letta.cancelled_within(agent, 30)


@pytest.mark.parametrize(("script", "code"), [("fail with 429", "rate_limited"), ("fail with 500", "model_error")])
async def test_model_that_fails(letta: V1Server, agent: Agent, script: str, code: str) -> None:
    async with pipeline_before(letta) as pipeline:
        events = await heard(pipeline, agent, script)
    assert events[-1].type == "chat:error"
    assert events[-1].data["code"] == code
