"""The recipe itself: a real Letta V1 server starts, speaks, and is cancelled, as the gateway relies on."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator

import aiohttp
import msgspec
import pytest

from gateway.letta.demo_model import RunningDemoModel
from tests.live.letta_server import Agent
from tests.live.v1_server import V1Server


class Frame(msgspec.Struct):
    message_type: str = ""
    content: str | None = None
    run_id: str | None = None
    stop_reason: str | None = None
    total_tokens: int | None = None


class Run(msgspec.Struct):
    status: str


@pytest.fixture
def agent(v1: V1Server) -> Iterator[Agent]:
    v1.start()  # a test before this one may have killed it
    created = v1.create_agent()
    yield created
    v1.delete_agent(created.id)


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def turn(http: aiohttp.ClientSession, v1: V1Server, agent: Agent, text: str) -> AsyncGenerator[Frame | str, None]:
    """Give the frames of a turn, `[DONE]` as it is."""
    body = {"messages": [{"role": "user", "content": text}], "stream_tokens": True, "include_pings": True}
    async with http.post(f"{v1.base_url}/v1/agents/{agent.id}/messages/stream", json=body) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        async for line in response.content:
            if data := line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b"":
                yield data.decode() if data == b"[DONE]" else msgspec.json.decode(data, type=Frame)


async def test_the_server_is_well(v1: V1Server, http: aiohttp.ClientSession) -> None:
    async with http.get(f"{v1.base_url}/v1/health/") as response:
        assert await response.json() == {"version": "0.16.8", "status": "ok"}


async def test_a_turn(v1: V1Server, agent: Agent, http: aiohttp.ClientSession) -> None:
    frames = [frame async for frame in turn(http, v1, agent, "Hello there")]
    kinds = [frame.message_type for frame in frames if isinstance(frame, Frame)]
    assert kinds == ["ping", *["assistant_message"] * 4, "stop_reason", "usage_statistics"]
    assert frames[-1] == "[DONE]"
    said = [frame.content for frame in frames if isinstance(frame, Frame) and frame.content]
    assert said == ["You", " said:", " Hello", " there"]


async def test_the_model_sees_the_message_as_it_was_sent(
    v1: V1Server, agent: Agent, http: aiohttp.ClientSession, demo_model: RunningDemoModel
) -> None:
    async for _ in turn(http, v1, agent, "As it is"):
        pass
    body = msgspec.json.decode(demo_model.requests[-1].body)
    assert body["messages"][-1] == {"role": "user", "content": "As it is"}


async def cancel(http: aiohttp.ClientSession, v1: V1Server, agent: Agent, run_id: str | None) -> None:
    url = f"{v1.base_url}/v1/agents/{agent.id}/messages/cancel"
    async with http.post(url, json={"run_ids": [run_id]}) as response:
        assert await response.json() == {run_id: "cancelled"}


def stored(v1: V1Server, agent: Agent) -> list[str]:
    messages = v1.call("GET", f"/v1/agents/{agent.id}/messages?order=asc")
    return [message.message_type for message in msgspec.json.decode(messages, type=list[Frame])]


async def test_a_cancelled_turn_ends_without_done_and_leaves_nothing_behind(
    v1: V1Server, agent: Agent, http: aiohttp.ClientSession
) -> None:
    frames: list[Frame | str] = []
    cancelled_at = 0.0
    async for frame in turn(http, v1, agent, "count to 100 every 20 ms"):
        frames.append(frame)
        if len(frames) == 5:
            assert isinstance(frame, Frame)
            await cancel(http, v1, agent, frame.run_id)
            cancelled_at = time.monotonic()
    assert time.monotonic() - cancelled_at < 2
    last = frames[-1]
    assert isinstance(last, Frame)
    assert (last.message_type, last.stop_reason) == ("stop_reason", "cancelled")
    assert stored(v1, agent) == ["system_message"]


async def test_a_cancelled_turn_stays_open_while_the_model_is_silent(
    v1: V1Server, agent: Agent, http: aiohttp.ClientSession
) -> None:
    frames = turn(http, v1, agent, "hang")
    first = await anext(frames)
    assert isinstance(first, Frame)
    await asyncio.sleep(0.5)
    await cancel(http, v1, agent, first.run_id)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(frames), 2)
    run = msgspec.json.decode(v1.call("GET", f"/v1/runs/{first.run_id}"), type=Run)
    assert run.status == "cancelled"


async def test_a_client_that_goes_away_does_not_end_the_run(
    v1: V1Server, agent: Agent, http: aiohttp.ClientSession
) -> None:
    frames = turn(http, v1, agent, "count to 20 every 50 ms")
    for _ in range(3):
        await anext(frames)
    await frames.aclose()
    await asyncio.sleep(2)
    assert stored(v1, agent) == ["system_message", "user_message", "assistant_message"]


async def test_a_legacy_agent_speaks(v1: V1Server, http: aiohttp.ClientSession) -> None:
    legacy = v1.create_agent(agent_type="memgpt_agent")
    frames = [frame async for frame in turn(http, v1, legacy, "Hello")]
    said = "".join(f.content or "" for f in frames if isinstance(f, Frame) and f.message_type == "assistant_message")
    assert said == "You said: Hello"


@pytest.mark.services
async def test_the_server_comes_back_on_the_same_port(v1: V1Server, agent: Agent) -> None:
    port = v1.port
    await asyncio.to_thread(v1.kill)
    assert not v1.healthy()
    await asyncio.to_thread(v1.start)
    assert v1.port == port
    assert v1.healthy()
    assert v1.call("GET", f"/v1/agents/{agent.id}")
