"""What turns took on both real Letta servers: the gateway says what the server keeps, however they end."""

import asyncio
import sys
import time
import uuid
from collections.abc import AsyncIterator

import pytest

from gateway.letta.backend import AgentBackend, RunningTurn, SentTurn
from gateway.tasks import TaskSet
from gateway.translation.agent_events import AgentEvent, Failure, Stop, ToolCallDelta, Usage
from gateway.translation.agent_turn import AgentTurn, Text, ToolResult, UserSaid
from tests.letta.batches import heard, next_batch
from tests.live.dying_turn import WEATHER, backend_of
from tests.live.letta_server import Agent, LettaServer

SOON = 20.0
SETTLED = 5.0


@pytest.fixture
async def backend(letta: LettaServer, agent: Agent) -> AsyncIterator[AgentBackend]:
    tasks = TaskSet()
    backend = backend_of(letta.kind, letta.base_url, tasks)
    yield backend
    await tasks.close(SETTLED)
    await backend.close()


@pytest.fixture(params=["own thread", pytest.param("conversation", marks=pytest.mark.services)])
async def place(request: pytest.FixtureRequest, backend: AgentBackend, agent: Agent) -> str | None:
    return None if request.param == "own thread" else await backend.new_conversation(agent.id)


class Thread:
    """A thread of an agent's, and what the turns on it took."""

    def __init__(self, backend: AgentBackend, letta: LettaServer, agent: Agent, place: str | None) -> None:
        self.backend = backend
        self.letta = letta
        self.agent = agent
        self.place = place
        self.taken = Usage(0, 0)

    def turn(self, text: str, *returns: ToolResult, with_tools: bool = False) -> RunningTurn:
        return self.backend.turn(
            AgentTurn(
                agent_id=self.agent.id,
                conversation_id=self.place,
                mark=str(uuid.uuid4()),
                news=(UserSaid((Text(text),)),) if text else (),
                returns=returns,
                tools=(WEATHER,) if with_tools or returns else (),
            )
        )

    async def whole(self, running: RunningTurn) -> list[AgentEvent]:
        async with asyncio.timeout(SOON):
            await running.open()
            events = await heard(running)
        await self.settle(running)
        return events

    async def settle(self, running: RunningTurn) -> None:
        usage = await running.usage()
        assert usage is not None
        self.taken = self.taken.plus(usage)
        running.close()

    async def spend(self, sent: SentTurn) -> Usage | None:
        usage = await self.backend.spent(sent)
        self.taken = self.taken.plus(usage or Usage(0, 0))
        return usage

    async def agrees(self) -> bool:
        counted = await asyncio.to_thread(self.letta.counted, self.agent.id)
        return (self.taken.prompt_tokens, self.taken.completion_tokens) == counted


@pytest.fixture
def thread(backend: AgentBackend, letta: LettaServer, agent: Agent, place: str | None) -> Thread:
    return Thread(backend, letta, agent, place)


async def die(letta: LettaServer, agent: Agent, place: str | None, text: str, moment: str) -> SentTurn:
    """Let another process begin a turn and die in it."""
    sent = SentTurn(str(uuid.uuid4()), agent.id, place, time.time())
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.live.dying_turn", letta.kind, letta.base_url, agent.id, place or "-", sent.mark,
        text, moment,
    )  # fmt: skip
    assert await process.wait() == -9
    return sent


async def test_turns_that_end_well_and_badly(thread: Thread) -> None:
    await thread.whole(thread.turn("hello"))
    assert thread.taken.completion_tokens > 0
    await thread.whole(thread.turn("hello again"))
    events = await thread.whole(thread.turn("fail with 400"))
    assert any(isinstance(event, Failure) for event in events)
    await thread.whole(thread.turn("and now?"))
    assert await thread.agrees()


async def test_call_and_its_result_are_counted_once(thread: Thread) -> None:
    events = await thread.whole(thread.turn("call get_weather now", with_tools=True))
    assert events[-1] == Stop("requires_approval") or Stop("requires_approval") in events
    parked = thread.taken
    assert parked.completion_tokens > 0
    (call_id,) = {event.call_id for event in events if isinstance(event, ToolCallDelta)}
    await thread.whole(thread.turn("", ToolResult(call_id, "sunny")))
    assert thread.taken.completion_tokens > parked.completion_tokens
    assert await thread.agrees()


async def test_call_that_a_message_supersedes(thread: Thread) -> None:
    await thread.whole(thread.turn("call get_weather now", with_tools=True))
    await thread.whole(thread.turn("never mind"))
    assert await thread.agrees()


async def test_turn_cancelled_in_mid_answer(thread: Thread) -> None:
    await thread.whole(thread.turn("hello"))
    running = thread.turn("count to 100 every 50 ms")
    await running.open()
    for _ in range(4):
        await next_batch(running)
    await running.cancel()
    await thread.settle(running)
    await asyncio.sleep(1.0)
    assert await thread.agrees()


async def test_turn_that_goes_on_unheard(thread: Thread) -> None:
    running = thread.turn("count to 10 every 20 ms")
    await running.open()
    await next_batch(running)
    await running.drain()
    await thread.settle(running)
    assert thread.taken.completion_tokens >= 10
    assert await thread.agrees()


@pytest.mark.services
@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("count to 100 every 50 ms", "opened"),
        ("count to 100 every 50 ms", "4"),
        ("call get_weather now", "parked"),
    ],
)
async def test_gateway_killed_in_a_turn(
    thread: Thread, letta: LettaServer, agent: Agent, place: str | None, text: str, moment: str
) -> None:
    await thread.whole(thread.turn("hello"))
    sent = await die(letta, agent, place, text, moment)
    usage = await thread.spend(sent)
    assert usage is not None or moment == "opened"
    assert (moment == "parked") == bool(usage and usage.completion_tokens)
    await asyncio.sleep(1.0)  # nothing goes on
    assert await thread.agrees()
    assert await thread.backend.spent(sent) == usage, "asking again says the same"
    await thread.whole(thread.turn("and now?"))
    assert await thread.agrees()


async def test_gateway_killed_once_the_answer_was_said(
    thread: Thread, letta: LettaServer, agent: Agent, place: str | None
) -> None:
    sent = await die(letta, agent, place, "count to 3 every 10 ms", "3")
    await asyncio.sleep(0.5)
    await thread.spend(sent)
    assert await thread.agrees()


async def test_turn_that_never_was_sent(thread: Thread, agent: Agent, place: str | None) -> None:
    await thread.whole(thread.turn("hello"))
    never = SentTurn(str(uuid.uuid4()), agent.id, place, time.time())
    assert await thread.backend.spent(never) is None
    nowhere = SentTurn(str(uuid.uuid4()), "agent-00000000-0000-4000-8000-000000000000", None, time.time())
    assert await thread.backend.spent(nowhere) is None
