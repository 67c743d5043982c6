"""What breaks in the middle: the server dies, the client goes away, the gateway is stopped."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from gateway.letta.demo_model import RunningDemoModel
from tests.live.app_server import INTERRUPTED
from tests.live.gateways import gateway_before, sdk
from tests.live.letta_server import Agent, LettaServer
from tests.live.processes import free_port
from tests.live.test_chat import stream, text_of, user
from tests.live.v1_server import V1Server

pytestmark = pytest.mark.services  # a V1 server takes half a minute of a processor to start again


async def whole(client: openai.AsyncOpenAI, model: str, text: str) -> list[tuple[float, ChatCompletionChunk]]:
    await client.chat.completions.create(model=model, messages=user(text))
    return []


async def listen(
    client: openai.AsyncOpenAI, agent: Agent, at_the_fifth_word: Callable[[], Awaitable[None]]
) -> tuple[list[str], openai.APIError]:
    """Listen to an answer until it breaks; it never says that it is complete."""
    said: list[str] = []
    answer = await client.chat.completions.create(
        model=agent.name, messages=user("count to 300 every 50 ms"), stream=True
    )
    try:
        async for chunk in answer:
            assert chunk.choices[0].finish_reason is None
            said.append(chunk.choices[0].delta.content or "")
            if len(said) == 5:
                await at_the_fifth_word()
    except openai.APIError as error:
        return said, error
    pytest.fail("the answer did not break")


async def test_server_killed_in_mid_stream(letta: LettaServer, agent: Agent) -> None:
    async with gateway_before(letta) as gateway, sdk(gateway, retries=2) as client:

        async def kill_the_server() -> None:
            await asyncio.to_thread(letta.kill)

        said, error = await listen(client, agent, kill_the_server)
        assert len(said) >= 5
        assert error.code == "upstream_stream_truncated"

        assert (await gateway.ask("GET", "/health")).status == 200
        assert (await gateway.ask("GET", "/ready")).status == 503
        started = time.monotonic()
        with pytest.raises(openai.InternalServerError) as down:
            await client.with_options(max_retries=0).chat.completions.create(model=agent.name, messages=user("hello?"))
        assert time.monotonic() - started < 5
        assert down.value.status_code == 503
        assert down.value.code == "upstream_unavailable"

        await asyncio.to_thread(letta.start)
        async with asyncio.timeout(15):  # what was found stands for a second, and the server may be back sooner
            while (await gateway.ask("GET", "/ready")).status != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        async with asyncio.timeout(30):
            while True:
                try:
                    assert text_of(await stream(client, agent.name, "welcome back")) == "You said: welcome back"
                    break
                except openai.InternalServerError:  # the breaker waits before it tries again
                    await asyncio.sleep(0.5)


@pytest.mark.parametrize("streamed", [True, False])
async def test_client_gone_in_mid_answer_cancels_the_turn(
    letta: LettaServer, agent: Agent, model: RunningDemoModel, *, streamed: bool
) -> None:
    async with gateway_before(letta) as gateway, sdk(gateway) as client:
        asking = asyncio.get_running_loop().create_task(
            stream(client, agent.name, "count to 300 every 50 ms")
            if streamed
            else whole(client, agent.name, "count to 300 every 50 ms")
        )
        await asyncio.sleep(1.5)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        if isinstance(letta, V1Server):
            # Before an answer has begun, the turn waits a moment for the SDK to try again.
            assert await asyncio.to_thread(letta.cancelled_within, agent, 1.0 if streamed else 2.5)
        # The thread is free again.
        assert text_of(await stream(client, agent.name, "and now?")) == "You said: and now?"
        if letta.kind == "app_server":
            assert INTERRUPTED in bytes(model.requests[-1].body).decode()
        metrics = (await gateway.ask("GET", "/metrics")).body.decode()
    assert 'letta_gateway_turns_total{outcome="client_disconnected"} 1.0' in metrics
    assert "letta_gateway_open_turns 0.0" in metrics


async def test_client_gone_and_the_operator_wants_turns_finished(
    letta: LettaServer, agent: Agent, model: RunningDemoModel
) -> None:
    async with gateway_before(letta, LETTA_GATEWAY_ON_DISCONNECT="finish") as gateway, sdk(gateway) as client:
        asking = asyncio.get_running_loop().create_task(stream(client, agent.name, "count to 20 every 50 ms"))
        await asyncio.sleep(0.8)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        # The next turn waits for the one that goes on.
        assert text_of(await stream(client, agent.name, "and now?")) == "You said: and now?"
    # And the agent remembers all of it.
    assert "word19" in bytes(model.requests[-1].body).decode()


async def test_stopped_in_mid_stream_with_time_to_finish(letta: LettaServer, agent: Agent) -> None:
    async with gateway_before(letta) as gateway, sdk(gateway) as client:
        asking = asyncio.get_running_loop().create_task(stream(client, agent.name, "count to 40 every 50 ms"))
        await asyncio.sleep(1.0)
        gateway.signal(signal.SIGTERM)
        await asyncio.sleep(0.1)
        assert (await gateway.ask("GET", "/ready")).status == 503
        chunks = await asking
        assert text_of(chunks).endswith("word39")
        assert chunks[-2][1].choices[0].finish_reason == "stop"
        assert await gateway.ended() == 0


async def test_stopped_in_mid_stream_with_no_time(letta: LettaServer, agent: Agent) -> None:
    async with gateway_before(letta, LETTA_GATEWAY_GRACE="0.3") as gateway, sdk(gateway) as client:

        async def stop_the_gateway() -> None:
            gateway.signal(signal.SIGTERM)

        _, error = await listen(client, agent, stop_the_gateway)
        assert error.code == "shutting_down"
        assert await gateway.ended() == 0
        # Nobody pays for what nobody reads. (The App Server cancels what a closed socket ran, and tells nobody.)
        if isinstance(letta, V1Server):
            assert await asyncio.to_thread(letta.cancelled_within, agent, 1.0)


async def test_killed_and_started_again_while_the_sdk_tries_again(
    letta: LettaServer, agent: Agent, model: RunningDemoModel, tmp_path: Path
) -> None:
    """The agent has heard it: what the SDK sends again of itself, without a key, is not said a second time."""
    question = f"count to 40 every 50 ms, as {tmp_path.name} wants it"
    environment = {"LETTA_GATEWAY_PORT": str(free_port()), "LETTA_GATEWAY_HOME": str(tmp_path)}

    def asked() -> int:
        return sum(question in bytes(request.body).decode() for request in model.requests)

    async with gateway_before(letta, **environment) as gateway, sdk(gateway, retries=8) as client:
        asking = asyncio.get_running_loop().create_task(whole(client, agent.name, question))
        async with asyncio.timeout(10):
            while not asked():  # noqa: ASYNC110 - it is seen from outside
                await asyncio.sleep(0.01)
        gateway.signal(signal.SIGKILL)
        await gateway.ended()
        async with gateway_before(letta, **environment):
            with pytest.raises(openai.ConflictError) as refused:
                await asking
    assert refused.value.code == "outcome_unknown"
    assert asked() == 1
